"""Hugging Face folders: where a model lies, its config, its tokenizer and its chat template.

In: a folder or hub id, or a GGUF model, which is read as if it were such a folder. Out: what transformers would read of
it, with errors that say what is wrong. The weights are those of `weights/`; the folder that a run ends with is
`export.py`'s.
"""

import difflib
import hashlib
import json
import pathlib
from collections.abc import Collection, Sequence
from typing import Any

from jaxsft.chat.named_templates import NAMED_TEMPLATES, template_text
from jaxsft.chat.probe import check_template
from jaxsft.config import ConfigError
from jaxsft.disk.buckets import BucketPath
from jaxsft.disk.foreign import MOST_CONFIG_BYTES, check_folder, check_tokenizer_files, read_regular
from jaxsft.disk.writing import place
from jaxsft.folders.gguf.model import is_gguf, open_gguf
from jaxsft.folders.gguf.tokenizer import load_gguf_tokenizer
from jaxsft.folders.mirror import mirror, origin_of
from jaxsft.folders.weights.bnb4 import dequantized, is_bnb4
from jaxsft.folders.weights.mxfp4 import is_mxfp4, unpacked
from jaxsft.folders.weights.stored import Stored, load_json, open_folder
from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.bounds import layer_problems, problems_of
from jaxsft.model.families.known import FAMILIES
from jaxsft.model.fields import refusal


def model_folder(path: str, *, weights: bool = True, revision: str | None = None) -> pathlib.Path:
    """The local folder of a model: `path` itself, or the hub's copy of it, downloaded once; or its GGUF file.

    Of a folder in a bucket, it is the one of its small files, see `mirror.py`.

    Args:
        path: a folder, a .gguf file, or a hub id such as `org/name`.
        weights: whether a download brings the safetensors along.
        revision: commit, branch or tag on the hub; left out: the newest.

    Raises:
        ConfigError: there is no such folder, and the hub does not give one.
    """
    folder = place(path, "model.path")
    if isinstance(folder, BucketPath):
        try:
            return mirror(folder)
        except OSError as error:
            raise ConfigError(f"{path}: not readable: {error.strerror or error}") from None
    if folder.is_dir():
        check_folder(folder)
        return folder
    if folder.exists() and is_gguf(path):
        return folder
    if folder.exists():
        raise ConfigError(f"{path}: a file, but a model is a folder with config.json")
    if path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise ConfigError(f"{path}: no such folder")
    import huggingface_hub

    patterns = ["*.json", "*.jinja", "*.model", "*.txt"] + ["*.safetensors"] * weights
    # Some repositories hold the same weights a second time: in folders, or in the format of their authors.
    others = ["*/*", "consolidated*"]
    try:
        found = pathlib.Path(
            huggingface_hub.snapshot_download(path, revision=revision, allow_patterns=patterns, ignore_patterns=others)
        )
    except Exception as error:  # The hub's client raises many kinds, of three libraries.
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(f"{path}: no such folder here, and the hub gave no model of that name: {reason}") from None
    check_folder(found)
    return found


def load_hf_config(folder: pathlib.Path) -> dict[str, Any]:
    """The folder's `config.json`, or what it would say of a GGUF model.

    Raises:
        ConfigError: there is none, it is not a JSON object, or a number in it cannot be meant.
    """
    if is_gguf(str(folder)):
        return open_gguf(folder)[1]
    hf_config = load_json(folder / "config.json")
    _check_numbers(hf_config)
    return hf_config


def _check_numbers(hf_config: dict[str, Any]) -> None:
    """Refuses impossible numbers of layers before transformers, asked for a tokenizer, builds a list of so many."""
    is_known = hf_config.get("model_type") in list(FAMILIES)
    if problems := problems_of(hf_config) if is_known else layer_problems(hf_config):
        raise refusal(problems)


def open_source(folder: pathlib.Path) -> tuple[Stored, dict[str, Any]]:
    """Where a model's weights lie, and its config.json: the one place that knows in which formats models come.

    What is wrong with safetensors is noted in the `Stored`.

    Raises:
        ConfigError: no config.json, numbers of fewer bits that are not read, or what is wrong with a GGUF.
    """
    if is_gguf(str(folder)):
        return open_gguf(folder)
    stored, hf_config = open_folder(origin_of(folder)), load_hf_config(folder)
    if is_bnb4(hf_config):
        return dequantized(stored, hf_config)
    if is_mxfp4(hf_config):
        return unpacked(stored, hf_config)
    _refuse_quantized(folder, hf_config)
    return stored, hf_config


def _refuse_quantized(folder: pathlib.Path, hf_config: dict[str, Any]) -> None:
    """Refuses weights stored with fewer bits in ways that are not read, whatever the model.

    Raises:
        ConfigError: says which way it is, and what to do.
    """
    quantization = hf_config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") in (None, "none"):
        return  # What else may stand there is refused as a field.
    method = str(quantization["quant_method"])[:40]
    how = "load it in transformers so that it is dequantised, and save that"
    if method == "fp8":
        how += " (quantization_config=FineGrainedFP8Config(dequantize=True), dtype bfloat16)"
    raise ConfigError(
        f"{folder / 'config.json'}: quantization_config: the weights are stored with quant_method {method!r}, which is "
        "not read; read are bfloat16, float16 and float32, mxfp4 and bitsandbytes' four bits. Convert the files to "
        f"bfloat16 first: {how}"
    )


def load_generation_config(folder: pathlib.Path) -> dict[str, Any]:
    """The folder's `generation_config.json`; empty where there is none."""
    path = folder / "generation_config.json"
    return load_json(path) if path.exists() or path.is_symlink() else {}


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

            check_tokenizer_files(folder)
            if (folder / "config.json").is_file():
                _check_numbers(load_json(folder / "config.json"))
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except ConfigError:
        raise
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # transformers raises whatever its parsers raise, and a panic of Rust is one too.
        raise ConfigError(f"{folder}: no tokenizer could be loaded: {type(error).__name__}: {error}") from None
    if not tokenizer.is_fast:
        raise ConfigError(f"{folder}: {type(tokenizer).__name__} is a slow tokenizer; a tokenizer.json is needed")
    own_template = tokenizer.chat_template
    templates = list(own_template.values()) if isinstance(own_template, dict) else [own_template]
    if wrong := [each for each in templates if not (each is None or isinstance(each, str))]:
        raise ConfigError(f"{folder}: the chat template is a {type(wrong[0]).__name__}, expected a text")
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
    path = place(name, "data.chat_template")
    try:
        # Read as bytes, since reading text would change its line ends: an export holds the template as it is.
        return read_regular(path, most=MOST_CONFIG_BYTES).decode()
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
    # These keys hold settings of the last call, which decide nothing here.
    backend.update(truncation=None, padding=None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return hashlib.sha256(json.dumps([backend, special], sort_keys=True).encode()).hexdigest()


def is_same_tokenizer(one: Any, other: Any) -> bool:
    """Whether two tokenizers have the same key, found in a fraction of the time where their vocabulary is large.

    Both are left without truncation and padding, which transformers sets anew in every call.
    """
    specials = [{name: str(token) for name, token in each.special_tokens_map.items()} for each in (one, other)]
    return specials[0] == specials[1] and _backend_text(one) == _backend_text(other)


def _backend_text(tokenizer: Any) -> str:
    """JSON of the Rust tokenizer without settings of the last call, which decide nothing here."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend.to_str()


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
