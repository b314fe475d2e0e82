"""Hugging Face folders: where a model lies, its config and tokenizer; and the folder that a run ends with.

In: a folder or hub id, or a GGUF model, which is read as if it were such a folder. Out: what transformers would read of
it, with errors that say what is wrong; and at the end of a run a folder that transformers opens. The weights themselves
are those of `weights/`.
"""

import contextlib
import difflib
import fcntl
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from types import ModuleType
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from jaxsft.config import ConfigError
from jaxsft.data.named_templates import NAMED_TEMPLATES, template_text
from jaxsft.data.probe import check_template
from jaxsft.gguf.model import is_gguf, open_gguf
from jaxsft.gguf.tokenizer import load_gguf_tokenizer
from jaxsft.model.architecture import DecoderConfig
from jaxsft.weights.mxfp4 import is_mxfp4, unpacked
from jaxsft.weights.save import dump_json, write_weights
from jaxsft.weights.stored import DTYPES, Stored, load_json, open_folder

# Folders, configs and tokenizers.


def model_folder(path: str, *, weights: bool = True) -> pathlib.Path:
    """The local folder of a model: `path` itself, or the hub's copy of it, downloaded once; or its GGUF file.

    Args:
        path: a folder, a .gguf file, or a hub id such as `org/name`.
        weights: whether a download brings the safetensors along.

    Raises:
        ConfigError: there is no such folder, and the hub does not give one.
    """
    folder = pathlib.Path(path).expanduser()
    if folder.is_dir() or (folder.exists() and is_gguf(path)):
        return folder
    if folder.exists():
        raise ConfigError(f"{path}: a file, but a model is a folder with config.json")
    if path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise ConfigError(f"{path}: no such folder")
    import huggingface_hub

    patterns = ["*.json", "*.jinja", "*.model", "*.txt"] + ["*.safetensors"] * weights
    # Some have the same weights once more: in folders, or under the names of their first authors.
    others = ["*/*", "consolidated*"]
    try:
        found = huggingface_hub.snapshot_download(path, allow_patterns=patterns, ignore_patterns=others)
        return pathlib.Path(found)
    except Exception as error:  # The hub's client raises many kinds, of three libraries.
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(f"{path}: no such folder here, and the hub gave no model of that name: {reason}") from None


def load_hf_config(folder: pathlib.Path) -> dict[str, Any]:
    """The folder's `config.json`, or what it would say of a GGUF model.

    Raises:
        ConfigError: there is none, or it is not a JSON object.
    """
    if is_gguf(str(folder)):
        return open_gguf(folder)[1]
    return load_json(folder / "config.json")


def open_source(folder: pathlib.Path) -> tuple[Stored, dict[str, Any]]:
    """Where a model's weights lie, and its config.json: the one place that knows in which formats models come.

    What is wrong with safetensors is noted in the `Stored`.

    Raises:
        ConfigError: no config.json, or what is wrong with a GGUF.
    """
    if is_gguf(str(folder)):
        return open_gguf(folder)
    stored, hf_config = open_folder(folder), load_hf_config(folder)
    return unpacked(stored, hf_config) if is_mxfp4(hf_config) else (stored, hf_config)


def load_generation_config(folder: pathlib.Path) -> dict[str, Any]:
    """The folder's `generation_config.json`; empty where there is none."""
    path = folder / "generation_config.json"
    return load_json(path) if path.exists() else {}


def load_tokenizer(path: str, chat_template: str | None = None) -> Any:
    """The fast tokenizer of a folder or hub id, its chat template replaced if another is given.

    Tokens that the template needs are not added here; `pretrained.open_tokenizer` does that.

    Args:
        path: folder or hub id.
        chat_template: the name of a template of ours, or else a Jinja file.

    Raises:
        ConfigError: no tokenizer there, one without a `tokenizer.json`, or neither a template of ours nor a file.
    """
    return load_tokenizer_and_own_template(path, chat_template)[0]


def load_tokenizer_and_own_template(path: str, chat_template: str | None) -> tuple[Any, str | None]:
    """As `load_tokenizer`, and the chat template that the tokenizer came with."""
    folder = model_folder(path, weights=False)
    try:
        if is_gguf(str(folder)):
            tokenizer = load_gguf_tokenizer(folder)
        else:
            import transformers

            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except ConfigError:
        raise
    except Exception as error:  # transformers raises whatever its parsers raise.
        raise ConfigError(f"{folder}: no tokenizer could be loaded: {type(error).__name__}: {error}") from None
    if not tokenizer.is_fast:
        raise ConfigError(f"{folder}: {type(tokenizer).__name__} is a slow tokenizer; a tokenizer.json is needed")
    own_template = tokenizer.chat_template
    if isinstance(own_template, dict):  # several by name; they are looked through, not chosen from
        own_template = "\n".join(own_template.values())
    if chat_template is not None:
        tokenizer.chat_template = read_chat_template(chat_template)
    _check_template(tokenizer, chat_template or str(folder))
    return tokenizer, own_template


def read_chat_template(name: str) -> str:
    """The template of ours that has this name, or else the text of the file.

    Raises:
        ConfigError: neither; with the nearest name.
    """
    if name in NAMED_TEMPLATES:
        return template_text(name)
    try:
        return pathlib.Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        near = difflib.get_close_matches(name.lower(), NAMED_TEMPLATES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"data.chat_template: {name}: not readable as a chat template: {error}; nor is it the name of one of ours "
            f"({', '.join(NAMED_TEMPLATES)}){hint}"
        ) from None


def _check_template(tokenizer: Any, where: str) -> None:
    """A template is a program of someone else's: it is tried in a process of its own before it is used here.

    Raises:
        ConfigError: it is no Jinja, or takes more time or memory than any template should.
    """
    templates = tokenizer.chat_template or {}
    variables = json.dumps({name: str(token) for name, token in tokenizer.special_tokens_map.items()}, sort_keys=True)
    for source in templates.values() if isinstance(templates, dict) else [templates]:
        if problem := check_template(source, variables):
            raise ConfigError(f"{where}: the chat template {problem}")


def tokenizer_key(tokenizer: Any) -> str:
    """SHA-256 of what determines the tokens of a text (the chat template is not part of it)."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # State of the last call, which we never use.
    backend.update(truncation=None, padding=None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return hashlib.sha256(json.dumps([backend, special], sort_keys=True).encode()).hexdigest()


def check_vocabulary(
    tokenizer: Any, config: DecoderConfig, *, needed: Collection[int], added: Sequence[str] = ()
) -> list[str]:
    """Compares the ids of a tokenizer with the embeddings of a model; returns sentences for the user.

    Control tokens that the model has no embedding for, and that no answer needs, are only noted: gemma-3-1b has the
    image token of its larger sisters.

    Args:
        tokenizer: of the model, or another.
        config: of the model.
        needed: ids of stop tokens, and of what the chat template writes.
        added: tokens that we added ourselves; the model will get embeddings for them.

    Raises:
        ConfigError: with a token and both numbers.
    """
    beyond = {
        id: token for token, id in tokenizer.get_vocab().items() if id >= config.vocab_size and token not in added
    }
    refused = [id for id in beyond if id in needed or id not in tokenizer.added_tokens_decoder]
    if refused:
        raise ConfigError(
            f"the tokenizer does not fit the model: its token {beyond[max(refused)]!r} has id {max(refused)}, but the "
            f"model's vocab_size is {config.vocab_size} (ids 0 to {config.vocab_size - 1})"
        )
    if not beyond:
        return []
    tokens = ", ".join(f"{token!r} ({id})" for id, token in sorted(beyond.items())[:5])
    return [
        f"the model has no embedding for {len(beyond)} of the tokenizer's tokens, which rows must not have: {tokens}"
    ]


# Export.


class ExportError(OSError):
    """The folder of an export could not be written; what was there before is untouched. Its text is shown as it is."""

    exit_code = 74


def export_dtype(hf_config: dict[str, Any], asked: str | None) -> str:
    """Dtype of the exported weights: as asked, else as `config.json` says, else float32.

    Raises:
        ConfigError: safetensors that we write have no such dtype.
    """
    dtype = asked or hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32"
    known = [each.name for each in DTYPES.values()]
    if dtype not in known:
        raise ConfigError(
            f"config.json: dtype {dtype!r} cannot be exported; give one of {', '.join(known)} as model.export_dtype"
        )
    return dtype


def export(
    folder: pathlib.Path,
    params: nnx.State,
    *,
    family: ModuleType,
    hf_config: dict[str, Any],
    vocab_size: int,
    tokenizer: Any,
    stop_ids: Sequence[int],
    dtype: str | None = None,
    stored: Stored | None = None,
    source_folder: pathlib.Path | None = None,
    tokenizer_folder: pathlib.Path | None = None,
    max_shard_bytes: int = 50 * 10**9,
) -> None:
    """Writes a Hugging Face folder: weights, config, tokenizer with chat template, generation_config.

    Every process of the run must call this. Tensors are gathered one after the other, and process 0 writes each as it
    comes, so no more than one is ever in host memory. The folder appears in one rename, complete or not at all, and
    takes the place of an earlier export. config.json and generation_config.json are those of the source, to the byte if
    nothing in them has to change.

    Args:
        params: the whole state of the model, Variables with axes.
        hf_config: the model's `config.json`; written with the dtype and the stop ids of what is exported.
        vocab_size: rows of the vocabulary; the tables of the state may have more.
        stop_ids: every token id that ends an answer; generation_config.json and config.json name them all.
        dtype: float32, bfloat16 or float16; left out: that of each tensor in `stored`, else what `hf_config` says, else
            float32.
        stored: what the weights were read from: its names, dtypes and split into files are kept.
        source_folder: where the model came from; the other keys of its generation_config.json are kept.
        tokenizer_folder: where the tokenizer came from; its files are kept where they still say the same.
        max_shard_bytes: largest safetensors file, where `stored` says nothing; a larger tensor has a file to itself.

    Raises:
        ConfigError: `folder` holds something else than an export, or is `source_folder`.
        ExportError: it could not be written.
    """
    folder = pathlib.Path(folder).absolute()
    if source_folder is not None and folder.resolve() == pathlib.Path(source_folder).resolve():
        raise ConfigError(f"{folder}: the export would replace the model that it was made from")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir()) and not (folder / "config.json").exists()):
        raise ConfigError(f"{folder}: exists and is not an export; move it away or export elsewhere")
    into = None
    if dtype is not None or stored is None or not stored.files:
        name = export_dtype(hf_config, dtype)
        into = next(each for each in DTYPES.values() if each.name == name)
    writes = jax.process_index() == 0
    aside = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    with _alone(folder) if writes else contextlib.nullcontext():
        try:
            if writes:
                aside.mkdir(parents=True)
                _write_tokenizer(aside, tokenizer, tokenizer_folder)
                source = pathlib.Path(source_folder) if source_folder else None
                _write_configs(aside, hf_config, source, tokenizer=tokenizer, stop_ids=stop_ids, dtype=into)
            write_weights(
                aside,
                params,
                family,
                vocab_size=vocab_size,
                dtype=into,
                stored=stored,
                max_shard_bytes=max_shard_bytes,
                writes=writes,
            )
            if writes:
                _rename_over(aside, folder)
        except OSError as error:
            raise ExportError(f"{folder}: the export could not be written: {error}") from error
        finally:
            if writes:
                shutil.rmtree(aside, ignore_errors=True)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("export")


TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json"),
)


def _write_tokenizer(folder: pathlib.Path, tokenizer: Any, source: pathlib.Path | None) -> None:
    """The tokenizer: the files that it came in, as long as it is the same, else as transformers saves it.

    transformers 5 writes a class name that other programs do not know, and forgets fields that it does not use.

    Raises:
        ExportError: it could not be written.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the Rust library has no kinds of errors
        raise ExportError(f"the tokenizer could not be written: {error}") from error
    config_file = folder / "tokenizer_config.json"
    if source is not None and (source / "tokenizer.json").is_file():
        before, own_template = load_tokenizer_and_own_template(str(source), None)
        if tokenizer_key(before) == tokenizer_key(tokenizer):
            same_template = own_template == tokenizer.chat_template
            for name in TOKENIZER_FILES:
                if name.startswith("chat_template") and not same_template:
                    continue
                (folder / name).unlink(missing_ok=True)
                if (source / name).is_file():
                    shutil.copyfile(source / name, folder / name)
            if not same_template and "chat_template" in (config := load_json(config_file)):
                del config["chat_template"]
                config_file.write_bytes(dump_json(config))
            return
    if config_file.is_file():
        config = load_json(config_file)
        for key in ("is_local", "local_files_only"):
            config.pop(key, None)
        if config.get("tokenizer_class") == "TokenizersBackend":
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config_file.write_bytes(dump_json(config))


def _write_configs(
    folder: pathlib.Path,
    hf_config: dict[str, Any],
    source: pathlib.Path | None,
    *,
    tokenizer: Any,
    stop_ids: Sequence[int],
    dtype: np.dtype | None,
) -> None:
    """config.json and generation_config.json, those of `source` with only what differs."""
    config = dict(hf_config)
    if dtype is not None:
        dtype_keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
        config |= dict.fromkeys(dtype_keys, dtype.name)
    _write_config(folder / "config.json", config | _new_ids(config, tokenizer, stop_ids), source)
    generation_config = load_generation_config(source) if source else {}
    if changes := _new_ids(generation_config, tokenizer, stop_ids):
        # With this mark, transformers would make the file anew from config.json.
        generation_config.pop("_from_model_config", None)
    if not generation_config:
        known = {key: getattr(tokenizer, key) for key in ("bos_token_id", "pad_token_id")}
        changes = {key: hf_config.get(key) if id is None else id for key, id in known.items()} | changes
        changes = {key: id for key, id in changes.items() if id is not None}
    _write_config(folder / "generation_config.json", generation_config | changes, source)


def _new_ids(config: dict[str, Any], tokenizer: Any, stop_ids: Sequence[int]) -> dict[str, Any]:
    """The special ids that a config has to say otherwise; bos and pad only where it speaks of them."""
    ids: dict[str, Any] = {}
    if set(_as_list(config.get("eos_token_id"))) != set(stop_ids):
        ids["eos_token_id"] = stop_ids[0] if len(stop_ids) == 1 else list(stop_ids)
    for key in ("bos_token_id", "pad_token_id"):
        id = getattr(tokenizer, key)
        if id is not None and config.get(key) not in (None, id):
            ids[key] = id
    return ids


def _as_list(ids: Any) -> list[int]:
    return list(ids) if isinstance(ids, list) else [] if ids is None else [ids]


def _write_config(path: pathlib.Path, config: dict[str, Any], source: pathlib.Path | None) -> None:
    """As the source's file of this name lays it out, and its very bytes where it says the same."""
    before = source / path.name if source else None
    if before is None or not before.is_file():
        path.write_bytes(dump_json(dict(sorted(config.items()))))
        return
    text = before.read_bytes()
    if json.loads(text) != config:
        indent = re.search(rb"\n( +)\S", text)
        text = dump_json(config, indent=len(indent[1]) if indent else 2)
    path.write_bytes(text)


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[None]:
    """Keeps other exports to `folder` out, and clears away what those that were killed have left.

    Raises:
        ExportError: another one is being written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    parent = os.open(folder.parent, os.O_RDONLY)
    try:
        try:
            fcntl.flock(parent, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ExportError(f"{folder}: another export is being written there") from None
        except OSError:  # a filesystem without locks
            pass
        for left in folder.parent.glob(f".{folder.name}.partial-*"):
            shutil.rmtree(left, ignore_errors=True)
        if not folder.exists() and _replaced(folder).exists():
            _replaced(folder).rename(folder)  # killed between the two renames
        yield
    finally:
        os.close(parent)


def _replaced(folder: pathlib.Path) -> pathlib.Path:
    return folder.with_name(f".{folder.name}.replaced")


def _rename_over(new: pathlib.Path, folder: pathlib.Path) -> None:
    """Puts `new` in the place of `folder`, which is removed only after that, and comes back if it fails."""
    old = _replaced(folder)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
