"""Where a model comes from: a folder or hub id, or a PEFT folder and the base model that its config names."""

import pathlib
from typing import NamedTuple

from jaxsft.config import ConfigError
from jaxsft.folders import hf
from jaxsft.folders.peft.read import AdapterFolder, is_adapter, open_adapter
from jaxsft.folders.peft.settings import CONFIG_FILE

TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


class Source(NamedTuple):
    """A model on disk, with or without an adapter."""

    folder: pathlib.Path
    """Of the model, or of the base of an adapter; or a GGUF file."""
    name: str
    """Of the model or base as an adapter_config.json names it: hub id, or absolute path."""
    revision: str | None
    """The commit on the hub, where it is known."""
    adapter: AdapterFolder | None

    @property
    def tokenizer(self) -> pathlib.Path:
        """The folder of the tokenizer: that of the adapter, where it has one."""
        if self.adapter is not None and any((self.adapter.folder / each).exists() for each in TOKENIZERS):
            return self.adapter.folder
        return self.folder


def find_source(path: str, *, weights: bool = True) -> Source:
    """Looks where a model lies, and whether it is an adapter; the hub's files are downloaded once.

    Args:
        path: a folder, a .gguf file, or a hub id; of a model or of an adapter.
        weights: whether a download brings the safetensors along.

    Raises:
        ConfigError: nothing is there; or the adapter's base is not, or is an adapter itself.
    """
    folder = hf.model_folder(path, weights=weights)
    if not is_adapter(folder):
        return _source(path, folder, None, None)
    adapter = open_adapter(folder if weights else hf.model_folder(path))
    base, revision = adapter.settings.base_model_name_or_path, adapter.settings.revision
    key = f"{folder / CONFIG_FILE}: base_model_name_or_path"
    try:
        base_folder = hf.model_folder(base, weights=weights, revision=revision)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None
    if is_adapter(base_folder):
        raise ConfigError(f"{key}: {base}: an adapter itself, expected a model; merge it first")
    return _source(base, base_folder, revision, adapter)


def _source(path: str, folder: pathlib.Path, revision: str | None, adapter: AdapterFolder | None) -> Source:
    is_here = pathlib.Path(path).expanduser() == folder
    if folder.parent.name == "snapshots":
        revision = folder.name
    return Source(folder, str(folder.absolute()) if is_here else path, revision, adapter)
