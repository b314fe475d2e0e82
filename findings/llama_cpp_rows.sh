#!/usr/bin/env bash
# A vocabulary of more rows than the tokenizer has tokens, as many models have it (rows filled up to a multiple of 64 or
# 128): llama.cpp's converter fills the list of tokens up to `vocab_size`, but not for a BPE tokenizer with byte fallback
# (as Llama 2's) that has a tokenizer.json and no tokenizer.model. There the list and the embedding differ in the GGUF,
# the converter says nothing and ends with 0, and the library refuses the file.
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
import tokenizers, torch, transformers
from tokenizers import decoders, models, normalizers

pieces = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *"▁abc", "bc", "ab"]
vocabulary = {piece: id for id, piece in enumerate(pieces)}
bpe = tokenizers.Tokenizer(models.BPE(vocabulary, [("b", "c"), ("a", "b")], unk_token="<unk>", byte_fallback=True))
bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **named)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
config = transformers.LlamaConfig(vocab_size=320, max_position_embeddings=128, **sizes)
transformers.LlamaForCausalLM(config).save_pretrained(sys.argv[1])
tokenizer.save_pretrained(sys.argv[1])
logits = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])(torch.tensor([tokenizer("abc")["input_ids"]])).logits
print(f"transformers {transformers.__version__} opens it: {len(tokenizer)} tokens, logits of {logits.shape[-1]} rows")
assert (len(tokenizer), logits.shape[-1]) == (265, 320)
PYTHON

source="$folder/llama_cpp_python-0.3.36/vendor/llama.cpp"
quietly "$python" "$source/convert_hf_to_gguf.py" "$folder/model" --outfile "$folder/model.gguf" --outtype f32
echo "converter of llama-cpp-python 0.3.36 ends with 0"

PYTHONPATH="$source/gguf-py" "$python" - "$folder/model.gguf" 2> "$folder/log" <<'PYTHON'
import sys
import gguf, xllamacpp

reader = gguf.GGUFReader(sys.argv[1])
tokens = len(reader.fields["tokenizer.ggml.tokens"].contents())
(rows,) = [int(tensor.shape[1]) for tensor in reader.tensors if tensor.name == "token_embd.weight"]
print(f"the GGUF: {tokens} tokens, {rows} rows")
assert (tokens, rows) == (265, 320)
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup = sys.argv[1], 64, False
try:
    xllamacpp.Server(params)
except RuntimeError:
    print("llama.cpp (xllamacpp 2026.10.11549) refuses it:")
else:
    sys.exit("llama.cpp opens it now")
PYTHON
grep -m 1 -o "tensor 'token_embd.weight' has wrong shape.*" "$folder/log"
