#!/usr/bin/env bash
# llama.cpp's converter gives every token of a BPE tokenizer with byte fallback (as Llama 2's) the score -1000 where the
# folder has a tokenizer.json and no tokenizer.model. llama.cpp joins the pair of best score first and, where all are
# equal, the leftmost: a text becomes other tokens than in transformers, which goes by the order of the merges. Nothing
# is said of it, and the exit code is 0.
#
# Ends with 0 as long as that is so. The converter comes from the source of llama-cpp-python, the library prebuilt.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
quietly() { "$@" > "$folder/log" 2>&1 || { cat "$folder/log"; exit 2; }; }
python3 -m venv "$folder/venv"
python="$folder/venv/bin/python"
quietly "$python" -m pip install transformers==4.57.6 torch==2.13.0 sentencepiece==0.2.0 protobuf==4.25.8 xllamacpp==2026.10.11549
quietly "$python" -m pip download --no-deps --no-binary llama_cpp_python -d "$folder" llama_cpp_python==0.3.36
tar -xzf "$folder"/llama_cpp_python-0.3.36.tar.gz -C "$folder"

"$python" - "$folder/model" 2> /dev/null <<'PYTHON'
import sys
import tokenizers, transformers
from tokenizers import decoders, models, normalizers

pieces = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *"▁abc", "bc", "ab"]
vocabulary = {piece: id for id, piece in enumerate(pieces)}
# The first merge is that of b and c, wherever an a stands before them.
bpe = tokenizers.Tokenizer(models.BPE(vocabulary, [("b", "c"), ("a", "b")], unk_token="<unk>", byte_fallback=True))
bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **named)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
config = transformers.LlamaConfig(vocab_size=len(pieces), max_position_embeddings=128, **sizes)
transformers.LlamaForCausalLM(config).save_pretrained(sys.argv[1])
tokenizer.save_pretrained(sys.argv[1])
tokens = tokenizer.tokenize("abc")
print(f"transformers {transformers.__version__}: 'abc' is {tokens}")
assert tokens == ["▁", "a", "bc"]
PYTHON

source="$folder/llama_cpp_python-0.3.36/vendor/llama.cpp"
quietly "$python" "$source/convert_hf_to_gguf.py" "$folder/model" --outfile "$folder/model.gguf" --outtype f32
echo "converter of llama-cpp-python 0.3.36 ends with 0"

PYTHONPATH="$source/gguf-py" "$python" - "$folder/model.gguf" 2> /dev/null <<'PYTHON'
import json, sys, urllib.request
import gguf, xllamacpp

reader = gguf.GGUFReader(sys.argv[1])
scores = set(reader.fields["tokenizer.ggml.scores"].contents())
print(f"scores that it wrote: {scores}")
assert scores == {-1000.0}
pieces = reader.fields["tokenizer.ggml.tokens"].contents()
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup = sys.argv[1], 64, False
server = xllamacpp.Server(params)
asked = json.dumps({"content": "abc", "add_special": False}).encode()
request = urllib.request.Request(f"{server.listening_address}/tokenize", asked, {"Content-Type": "application/json"})
tokens = [pieces[id] for id in json.load(urllib.request.urlopen(request))["tokens"]]
print(f"llama.cpp (xllamacpp 2026.10.11549): 'abc' is {tokens}")
assert tokens == ["▁", "ab", "c"]
PYTHON
