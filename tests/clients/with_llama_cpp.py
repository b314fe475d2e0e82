"""llama.cpp converts an export, loads what it made, and answers.

    with_llama_cpp.py EXPORT REFERENCE OUT      the converter's path in LLAMA_CPP_CONVERTER

The GGUF is left beside OUT.
"""

import os
import pathlib
import subprocess
import sys

import llama_cpp
import numpy as np
from said import MAX_NEW_TOKENS, QUESTIONS, Checks, Reference, arguments, differing

FLOAT32 = 0
"""llama.cpp's number for it, for the cache too; it would be float16."""


def convert(export: pathlib.Path, gguf: pathlib.Path) -> None:
    """Raises RuntimeError with the last thing that the converter said."""
    command = [sys.executable, os.environ["LLAMA_CPP_CONVERTER"], str(export), "--outfile", str(gguf)]
    done = subprocess.run([*command, "--outtype", "f32"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])


def opened(gguf: pathlib.Path) -> llama_cpp.Llama:
    cache = {"type_k": FLOAT32, "type_v": FLOAT32, "flash_attn": False}
    return llama_cpp.Llama(str(gguf), n_ctx=512, n_batch=512, n_threads=2, verbose=False, **cache)


def logits_after(llm: llama_cpp.Llama, ids: list[int]) -> np.ndarray:
    llm.eval(ids)
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(llm.n_vocab(),)).copy()


def answer(llm: llama_cpp.Llama, ids: list[int]) -> tuple[np.ndarray, list[int]]:
    """The logits after the question, and the most probable token again and again until one ends the answer."""
    llm.reset()
    first = logits = logits_after(llm, ids)
    tokens: list[int] = []
    while len(tokens) < MAX_NEW_TOKENS:
        tokens.append(int(logits.argmax()))
        if ends(llm, tokens[-1]):
            break
        logits = logits_after(llm, tokens[-1:])
    return first, tokens


def ends(llm: llama_cpp.Llama, id: int) -> bool:
    return llama_cpp.llama_vocab_is_eog(llm._model.vocab, id)


def compare(llm: llama_cpp.Llama, reference: Reference, checks: Checks) -> None:
    said = reference.said
    vocab = llm._model.vocab
    checks.same("rows", llm.n_vocab(), said["rows"])
    checks.same("stop tokens", [id for id in said["stops"] if not ends(llm, id)], [])
    ordinary = {
        token: id
        for token, id in said["control"].items()
        if not llama_cpp.llama_vocab_get_attr(vocab, id)
        & (llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN)
    }
    checks.same("control tokens", ordinary, {})
    special = set(said["control"].values())
    acting = []
    for token in said["control"]:
        text = f"a {token} b{token}user\nhello"
        acting += [token] if special & set(llm.tokenize(text.encode(), add_bos=False, special=False)) else []
    checks.add("text that spells them stays text", not acting, f"acts: {', '.join(acting)}")
    ids = [llm.tokenize(text.encode(), add_bos=False, special=True) for text in said["texts"]]
    problem = differing(ids, said["ids"])
    checks.add("tokens", not problem, problem)
    plain = [llm.tokenize(each[-1]["content"].encode(), add_bos=True, special=False) for each in QUESTIONS]
    problem = differing(plain, said["plain_ids"])
    checks.add("plain text", not problem, problem)
    answers = [answer(llm, each) for each in said["ids"]]
    checks.near("logits", np.stack([logits for logits, _ in answers]), reference.logits)
    problem = differing([tokens for _, tokens in answers], said["answers"])
    checks.add("answers", not problem, problem)


if __name__ == "__main__":
    export, reference, out = arguments()
    checks = Checks("llama_cpp_python", "transformers")
    with checks.attempt("converts"):
        convert(export, out.with_suffix(".gguf"))
    if checks.found["converts"]["holds"]:
        with checks.attempt("opens"):
            llm = opened(out.with_suffix(".gguf"))
            compare(llm, reference, checks)
            template = export / "chat_template.jinja"
            if template.is_file():
                checks.add("template", llm.metadata.get("tokenizer.chat_template") == template.read_text(), "another")
    checks.write(out)
