"""A small tokenizer as those of Llama 2 and Mistral come: SentencePiece BPE with byte fallback, and `tokenizer.model`.

    make_sentencepiece.py TEXT OUT     learns 600 pieces from a text file; OUT becomes the folder

The material's tokenizers of this sort have no `tokenizer.model`, which llama.cpp's converter reads where there is one.
"""

import json
import pathlib
import sys

import sentencepiece
import transformers

text, out = map(pathlib.Path, sys.argv[1:])
part = out.with_name(f"{out.name}.part")
part.mkdir(parents=True, exist_ok=True)
sentencepiece.SentencePieceTrainer.train(
    input=str(text), model_prefix=str(part / "tokenizer"), model_type="bpe", vocab_size=600, byte_fallback=True,
    character_coverage=0.99, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
)  # fmt: skip
(part / "tokenizer.vocab").unlink()
# A space in front, as Llama 2 and Mistral have it in tokenizer.json; the key would make transformers 4 convert again.
named = {"legacy": True, "add_prefix_space": True}
transformers.LlamaTokenizerFast(vocab_file=str(part / "tokenizer.model"), **named).save_pretrained(part)
config = json.loads((part / "tokenizer_config.json").read_text())
del config["add_prefix_space"]
(part / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
part.rename(out)
