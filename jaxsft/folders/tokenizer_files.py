"""The files of a tokenizer in an export: those that it came in, with only what differs, for transformers 4 and 5 alike.

In: a tokenizer, and the folder that it came from. Out: its files. What was not changed is as it came, to the byte;
tokens that were added are added to each file that lists tokens, and listed as special. transformers' own save writes
all files anew, forgets fields that it does not use, lists no added token as special where version 4 looks for it, and
names a class that only version 5 has.
"""

import json
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jaxsft.folders.gguf.model import is_gguf
from jaxsft.folders.hf import is_same_tokenizer
from jaxsft.folders.weights.save import dump_json
from jaxsft.folders.weights.stored import load_json

Json = dict[str, Any]

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json"),
)
MORE_TEMPLATES = "additional_chat_templates"
"""The folder of the templates that have names, where there are several."""

ONE_CLASS = "PreTrainedTokenizerFast"
"""Reads tokenizer.json as it is, in transformers 4 and 5."""
NEW_CLASSES = frozenset(
    [
        *("TokenizersBackend", "PythonBackend", "SentencePieceBackend", "MistralCommonBackend"),
        *("EsmcTokenizer", "LasrTokenizer", "Qwen3_5Tokenizer", "Siglip2Tokenizer", "Tipsv2Tokenizer"),
        "VideoPrismTokenizer",
    ]
)
"""What tokenizer_class may say that transformers 4.57 does not know."""
OF_ONE_MACHINE = ("is_local", "local_files_only", "backend")
"""How a tokenizer was opened when transformers 5 saved it."""


# In words that both know.


def with_known_words(config: Json) -> Json:
    """A tokenizer_config.json or special_tokens_map.json that transformers 4 opens, too; the same where it does.

    Worked example: {"tokenizer_class": "TokenizersBackend", "is_local": true, "extra_special_tokens": ["<a>"]} becomes
    {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<a>"]}.
    """
    known: Json = {}
    for key, value in config.items():
        if key in OF_ONE_MACHINE:
            continue
        if key == "tokenizer_class" and value in NEW_CLASSES:
            value = ONE_CLASS
        if key == "extra_special_tokens" and isinstance(value, list):
            # There, the word is for tokens with names of their own, and a list is an error.
            more = [token for token in value if token not in known.get("additional_special_tokens", [])]
            key, value = "additional_special_tokens", known.get("additional_special_tokens", []) + more
        elif key == "additional_special_tokens" and isinstance(value, list):
            value = value + [token for token in known.get(key, []) if token not in value]
        elif key == "model_specific_special_tokens" and isinstance(value, dict):
            key, value = "extra_special_tokens", value
        known[key] = value
    return known


def describe_known_words(source: pathlib.Path) -> list[str]:
    """What the user should know of what an export of this folder's tokenizer says otherwise."""
    path = source / "tokenizer_config.json"
    if not path.is_file():
        return []
    before = load_json(path)
    after = with_known_words(before)
    changes = [
        f"{key} {before[key]!r} is {after[key]!r}" for key in after if key in before and before[key] != after[key]
    ]
    changes += [f"{key} is left out" for key in before if key in OF_ONE_MACHINE]
    if isinstance(before.get("extra_special_tokens"), list):
        changes.append("extra_special_tokens is called additional_special_tokens")
    if not changes:
        return []
    return [f"tokenizer_config.json of the export is one that transformers 4 opens, too: {', '.join(changes)}"]


def describe_sentencepiece(source: pathlib.Path, added: Sequence[str]) -> list[str]:
    """What the user should know of a SentencePiece model beside a tokenizer.json that gets more tokens."""
    if not added or not (source / "tokenizer.model").is_file():
        return []
    return [
        f"tokenizer.model stays as it came, without the {len(added)} added tokens: they stand in tokenizer.json, and "
        "for programs that read tokenizer.model under added_tokens_decoder in tokenizer_config.json"
    ]


# Writing.


def settle_tokenizer(folder: pathlib.Path, tokenizer: Any, source: pathlib.Path | None) -> None:
    """Makes what transformers saved in `folder` the files that the tokenizer came in, with only what differs.

    Args:
        folder: holds what `tokenizer.save_pretrained` wrote, and config.json.
        tokenizer: what was saved.
        source: the folder that it came from; None, a GGUF model, or without a tokenizer.json: it is taken as
            transformers saved it.
    """
    template = getattr(tokenizer, "chat_template", None)
    saved = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    if source is None or is_gguf(str(source)) or not (source / "tokenizer.json").is_file():
        content = _load(folder / "tokenizer.json")
        added = {token["id"]: token for token in content.get("added_tokens", [])}
        config = _load(folder / "tokenizer_config.json")
        named = {_content(value) for key, value in config.items() if key.endswith("_token")}
        special = [token["content"] for token in added.values() if token["special"]]
        _list_tokens(folder, added, [token for token in special if token not in named], {})
        _use_known_words(folder)
    else:
        before = _open(source)
        _put_back(folder, source)
        is_same = is_same_tokenizer(before, tokenizer)
        if not is_same:
            _add(folder, before, tokenizer)
        is_same = not _use_known_words(folder) and is_same
        # If more than tokens is new in the tokenizer, or its class reads tokenizer.json in a way of its own, the files
        # are those that transformers saved, as few of them as are needed.
        for name in () if is_same else ("tokenizer.json", "tokenizer_config.json"):
            if _is_read_as(folder, tokenizer):
                break
            (folder / name).write_bytes(saved[name])
            _list_tokens(folder, _added_tokens(tokenizer), _new_special(before, tokenizer), {})
            _use_known_words(folder)
        if before.chat_template == template:
            template = None
        else:
            _take_out_templates(folder)
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_bytes(template.encode())


def _use_known_words(folder: pathlib.Path) -> bool:
    """Whether anything had to change."""
    names = ("tokenizer_config.json", "special_tokens_map.json")
    return any([_change(folder / name, with_known_words) for name in names])


def _open(folder: pathlib.Path) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _is_read_as(folder: pathlib.Path, tokenizer: Any) -> bool:
    try:
        return is_same_tokenizer(_open(folder), tokenizer)
    except Exception:  # transformers raises whatever its parsers raise
        return False


def _put_back(folder: pathlib.Path, source: pathlib.Path) -> None:
    """The files of the source in the place of what was saved."""
    for name in TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    shutil.rmtree(folder / MORE_TEMPLATES, ignore_errors=True)
    if (source / MORE_TEMPLATES).is_dir():
        shutil.copytree(source / MORE_TEMPLATES, folder / MORE_TEMPLATES)


def _take_out_templates(folder: pathlib.Path) -> None:
    for name in ("chat_template.jinja", "chat_template.json"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / MORE_TEMPLATES, ignore_errors=True)
    _change(folder / "tokenizer_config.json", lambda config: {k: v for k, v in config.items() if k != "chat_template"})


# What is new in a tokenizer.


def _added_tokens(tokenizer: Any) -> dict[int, Json]:
    """The added tokens of a tokenizer.json."""
    names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return {
        int(id): {"id": int(id), **{name: getattr(token, name) for name in names}}
        for id, token in tokenizer.added_tokens_decoder.items()
    }


def _new_special(before: Any, tokenizer: Any) -> list[str]:
    """The control tokens that it has got, in the order of their ids, and those that were named (eos_token, ...)."""
    old, now = _added_tokens(before), _added_tokens(tokenizer)
    new = [now[id]["content"] for id in sorted(now) if now[id]["special"] and old.get(id) != now[id]]
    names = tokenizer.SPECIAL_TOKENS_ATTRIBUTES
    was, is_now = ([str(getattr(each, name)) for name in names if getattr(each, name)] for each in (before, tokenizer))
    return new + [token for token in dict.fromkeys(was) if token not in is_now and token not in new]


def _add(folder: pathlib.Path, before: Any, tokenizer: Any) -> None:
    """Adds the tokens that are new to the source's files, and says which have other names now."""
    old, now = _added_tokens(before), _added_tokens(tokenizer)
    new = {id: token for id, token in now.items() if old.get(id) != token}
    if new:

        def add(content: Json) -> Json:
            tokens = {token["id"]: token for token in content.get("added_tokens", [])} | new
            return content | {"added_tokens": [tokens[id] for id in sorted(tokens)]}

        _change(folder / "tokenizer.json", add)
    names = {
        name: str(token) if (token := getattr(tokenizer, name)) is not None else None
        for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES
        if str(getattr(before, name)) != str(getattr(tokenizer, name))
    }
    _list_tokens(folder, new, _new_special(before, tokenizer), names, rest=old)


def _list_tokens(
    folder: pathlib.Path,
    added: dict[int, Json],
    special: Iterable[str],
    names: Json,
    *,
    rest: dict[int, Json] | None = None,
) -> None:
    """Lists tokens in the files beside tokenizer.json.

    Args:
        added: tokens for `added_tokens_decoder`.
        special: those that are control tokens.
        names: eos_token and the like that are other tokens now.
        rest: all other added tokens, for a file that lists none yet.
    """
    path = folder / "tokenizer_config.json"
    listed = list(special)

    def with_listed(values: Json) -> Json:
        values = with_known_words(values)
        known = values.get("additional_special_tokens") or []
        missing = [token for token in listed if token not in map(_content, known)]
        return values | names | ({"additional_special_tokens": [*known, *missing]} if missing else {})

    def decoder(values: Json) -> Json:
        if not added:
            return {}
        known = values.get("added_tokens_decoder")
        tokens = known or {str(id): _without_id(token) for id, token in sorted((rest or {}).items())}
        return {"added_tokens_decoder": tokens | {str(id): _without_id(token) for id, token in sorted(added.items())}}

    if not path.is_file():
        path.write_bytes(dump_json({"tokenizer_class": ONE_CLASS}))
    _change(path, lambda values: with_listed(values) | decoder(values))
    map_path = folder / "special_tokens_map.json"
    if not map_path.is_file() and (listed or names):
        # All that transformers 4 would write there.
        config = _load(path)
        keys = [key for key in SPECIAL_NAMES if config.get(key) is not None]
        map_path.write_bytes(dump_json({key: config[key] for key in keys}))
    _change(map_path, with_listed)
    _change(folder / "added_tokens.json", lambda ids: ids | {token["content"]: id for id, token in added.items()})


SPECIAL_NAMES = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
    "additional_special_tokens",
)


def _content(token: Any) -> Any:
    """The text of a token, which a file may give as a dict with its options."""
    return token.get("content") if isinstance(token, dict) else token


def _without_id(token: Json) -> Json:
    return {key: value for key, value in token.items() if key != "id"}


def _load(path: pathlib.Path) -> Json:
    return load_json(path) if path.is_file() else {}


def _change(path: pathlib.Path, change: Callable[[Json], Json]) -> bool:
    """Writes a JSON file again, laid out as it is, if `change` of it is something else, and says whether it is."""
    if not path.is_file():
        return False
    text = path.read_bytes()
    before = json.loads(text)
    after = change(before)
    is_other = after != before or list(after) != list(before)
    if is_other:
        path.write_bytes(dump_json(after, indent=indent_of(text)))
    return is_other


def indent_of(text: bytes) -> int:
    """By how many spaces a JSON file indents."""
    found = re.search(rb"\n( +)\S", text)
    return len(found[1]) if found else 2
