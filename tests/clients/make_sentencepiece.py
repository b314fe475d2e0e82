"""A small tokenizer as those of Llama 2 and Mistral come: SentencePiece BPE with byte fallback, `tokenizer.model` and all.

    make_sentencepiece.py TEXT OUT     learns 600 pieces from a text file; OUT becomes the folder

The material's tokenizers of this sort have no `tokenizer.model`, which llama.cpp's converter reads before anything else.
"""

import pathlib
import sys

import sentencepiece
import transformers

text, out = map(pathlib.Path, sys.argv[1:])
out.mkdir(parents=True)
sentencepiece.SentencePieceTrainer.train(
    input=str(text), model_prefix=str(out / "tokenizer"), model_type="bpe", vocab_size=600, byte_fallback=True,
    character_coverage=0.99, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
)  # fmt: skip
(out / "tokenizer.vocab").unlink()
transformers.LlamaTokenizerFast(vocab_file=str(out / "tokenizer.model"), legacy=True).save_pretrained(out)
