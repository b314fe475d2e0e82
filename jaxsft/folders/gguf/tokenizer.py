"""The tokenizer of a GGUF file: the one that lies beside it, or one made of its metadata where that is exact.

In: the metadata of a file (`file.py`). Out: a tokenizer of transformers, or a `ConfigError` that says which one to
give.

A file holds tokens and merges, but of how a text is cut up before only a name (`tokenizer.ggml.pre`). Names that are
not in `PRE_TOKENIZERS` are refused, and so are SentencePiece vocabularies, whose order of merges is not in the file:
for those the original tokenizer is needed.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxsft.config import ConfigError
from jaxsft.disk.foreign import check_tokenizer_files
from jaxsft.folders.gguf.file import GGUFFile, read_gguf
from jaxsft.folders.gguf.model import gguf_file

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Values of tokenizer.ggml.token_type."""


def _split(pattern: str) -> list[dict[str, Any]]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, byte_level]


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt-2": {"pre": [BYTE_LEVEL]},
    "smollm": {"pre": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]},
    "llama-bpe": {
        "pre": _split(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
            r"|\s+(?!\S)|\s+"
        ),
        "ignore_merges": True,
    },
    "qwen2": {
        "normalizer": {"type": "NFC"},
        "pre": _split(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
            r"|\s+(?!\S)|\s+"
        ),
    },
    "tekken": {
        "pre": _split(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
            r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        "ignore_merges": True,
    },
}
"""tokenizer.ggml.pre -> how tokenizers of this name cut a text up, as tokenizer.json says it."""


def load_gguf_tokenizer(path: str | pathlib.Path) -> Any:
    """The fast tokenizer of a GGUF model, with the chat template of the file if it has none of its own.

    Raises:
        ConfigError: the file has no tokenizer that could be made exactly, or the one beside it has other tokens.
    """
    import transformers

    place = gguf_file(path)
    file = read_gguf(place)
    metadata, vocabulary = file.metadata, read_vocabulary(file)
    if (place.parent / "tokenizer.json").exists():
        tokenizer = _load_beside(place.parent)
        _check_tokens(tokenizer, vocabulary, where=f"{place.parent / 'tokenizer.json'}")
    else:
        special = {}
        tokens = vocabulary.tokens
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
            id = metadata.get(f"tokenizer.ggml.{key}_token_id")
            if type(id) is int and 0 <= id < len(tokens):
                special[f"{name}_token"] = tokens[id]
        backend = _byte_level(place, metadata, vocabulary)
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, clean_up_tokenization_spaces=False, **special
        )
        _check_tokens(tokenizer, vocabulary, where=f"{place}: the tokenizer made of its metadata")
    template = metadata.get("tokenizer.chat_template")
    if not (template is None or isinstance(template, str)):
        raise ConfigError(f"{place}: tokenizer.chat_template is a {type(template).__name__}, expected a text")
    tokenizer.chat_template = tokenizer.chat_template or template
    return tokenizer


class Vocabulary(NamedTuple):
    """What a GGUF's metadata says of its tokens; empty where it says nothing."""

    tokens: list[str]
    types: list[int]
    """One for each of `tokens`, or none at all."""
    merges: list[str] | None


def read_vocabulary(file: GGUFFile) -> Vocabulary:
    """The tokens of a GGUF model.

    Raises:
        ConfigError: they are no lists of texts and numbers, or not as many of each.
    """
    given = {key: file.metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "merges")}
    for key, kind in (("tokens", str), ("token_type", int), ("merges", str)):
        value = given[key]
        if value is not None and not (isinstance(value, list) and all(type(each) is kind for each in value)):
            what = {str: "texts", int: "whole numbers"}[kind]
            raise ConfigError(f"{file.path}: tokenizer.ggml.{key}: {str(value)[:60]}, expected a list of {what}")
    tokens, types = given["tokens"] or [], given["token_type"] or []
    if types and len(types) != len(tokens):
        raise ConfigError(
            f"{file.path}: tokenizer.ggml.token_type has {len(types)} entries, but there are {len(tokens)} tokens"
        )
    return Vocabulary(tokens, types, given["merges"])


def _load_beside(folder: pathlib.Path) -> Any:
    import transformers

    check_tokenizer_files(folder)
    try:
        if (folder / "tokenizer_config.json").exists():
            return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # transformers raises whatever its parsers raise, and a panic of Rust is one too.
        raise ConfigError(f"{folder}: no tokenizer could be loaded: {type(error).__name__}: {error}") from None


def check_gguf_tokens(tokenizer: Any, path: str | pathlib.Path, *, where: str, added: Sequence[str] = ()) -> None:
    """Refuses a tokenizer whose ids mean other tokens than those of a GGUF model.

    Args:
        where: what the tokenizer is called in the error.
        added: tokens of it that we added ourselves.

    Raises:
        ConfigError: with the first id that differs, and both tokens.
    """
    _check_tokens(tokenizer, read_vocabulary(read_gguf(gguf_file(path))), where=where, added=added)


def _check_tokens(tokenizer: Any, vocabulary: Vocabulary, *, where: str, added: Sequence[str] = ()) -> None:
    """llama.cpp's converter writes SentencePiece's space as itself in some tokens; ids of no token are passed over."""
    given = {id: token for token, id in tokenizer.get_vocab().items() if token not in added}
    types = vocabulary.types
    for id, token in enumerate(vocabulary.tokens):
        unused = bool(types) and types[id] == UNUSED or token.startswith("[PAD")
        theirs = given.get(id)
        if unused or theirs is not None and theirs.replace("▁", " ") == token.replace("▁", " "):
            continue
        found = "has no such id" if theirs is None else f"has {theirs!r} there"
        raise ConfigError(f"{where}: is not the GGUF's: token {id} is {token!r} in the GGUF, but the tokenizer {found}")


def _byte_level(path: pathlib.Path, metadata: dict[str, Any], vocabulary: Vocabulary) -> Any:
    """A `tokenizers.Tokenizer` of a vocabulary of bytes, as tokenizer.json would give it."""
    import tokenizers

    remedy = "give the tokenizer of the original model as model.tokenizer, or put its tokenizer.json beside the file"
    kind, pre = (metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind != "gpt2" or not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise ConfigError(
            f"{path}: from a tokenizer of model {kind!r} and pre {pre!r} none can be made exactly (of model 'gpt2' and "
            f"pre {known} one can); {remedy}"
        )
    tokens, types, merges = vocabulary
    if not tokens or merges is None or not types:
        raise ConfigError(f"{path}: tokenizer.ggml.tokens, token_type or merges is missing; {remedy}")
    rules = PRE_TOKENIZERS[pre]
    used = [(id, token) for id, token in enumerate(tokens) if types[id] != UNUSED]
    last_normal = max((id for id, _ in used if types[id] == NORMAL), default=-1)
    added = [
        {
            "id": id,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": types[id] == CONTROL,
        }
        for id, token in used
        if types[id] in (CONTROL, USER_DEFINED)
    ]
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    bos = bos if type(bos) is int and 0 <= bos < len(tokens) else -1
    begins = metadata.get("tokenizer.ggml.add_bos_token") is True and bos >= 0
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": rules.get("ignore_merges", False),
        # Tokens after the last usual one are known as added ones only, as in tokenizer.json.
        "vocab": {token: id for id, token in used if id <= last_normal},
        "merges": [merge.split(" ", 1) for merge in merges],
    }
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": rules.get("normalizer"),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": rules["pre"]},
        "post_processor": _begin(tokens[bos], bos) if begins else None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": model,
    }
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(content))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises Exception itself, and what a panic of Rust becomes
        raise ConfigError(f"{path}: the tokenizer in its metadata is corrupt: {error}") from None


def _begin(token: str, id: int) -> dict[str, Any]:
    """The beginning of every text is marked with a token."""
    mark = {"SpecialToken": {"id": token, "type_id": 0}}
    texts = [{"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB")]
    return {
        "type": "TemplateProcessing",
        "single": [mark, texts[0]],
        "pair": [mark, texts[0], {"SpecialToken": {"id": token, "type_id": 1}}, texts[1]],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
    }
