"""A model folder in a bucket, as transformers can open it: its small files on this disk, its weights where they lie.

In: the folder in the bucket. Out: a folder in the user's cache with its config, tokenizer and templates, and a note of
where it came from, by which its weights are found and read in parts. Its name follows from what the bucket says of all
files, so that a file that is written anew makes another one.
"""

import contextlib
import hashlib
import pathlib
import shutil
import uuid

from jaxsft.config import ConfigError
from jaxsft.disk.buckets import BucketPath
from jaxsft.disk.foreign import MOST_TOKENIZER_BYTES, READ_SUFFIXES
from jaxsft.disk.writing import Path, place, user_cache, writing

ORIGIN = ".jaxsft-origin"
"""A file that holds the address of the folder in the bucket."""
ADAPTER = "adapter_model.safetensors"
"""Weights that are small, and are read at once."""


def mirror(folder: BucketPath) -> pathlib.Path:
    """The folder on this disk; made where it is not there.

    Raises:
        ConfigError: it is no model folder, or holds something of a size that no such file has.
        OSError: the bucket cannot be reached.
    """
    if folder.is_file():
        what = "a GGUF file is read from a disk only; download it" if folder.suffix == ".gguf" else "a file"
        raise ConfigError(f"{folder}: {what}; a model in a bucket is a folder with config.json and safetensors")
    files = [each for each in folder.files() if _is_read(each.relative_to(folder))] if folder.exists() else []
    names = {str(each.relative_to(folder)) for each in files}
    if not names & {"config.json", "adapter_config.json", "tokenizer.json"}:
        raise ConfigError(f"{folder}: no model folder there: none of its files is config.json")
    stats = {each: each.stat() for each in files}
    small = [each for each in files if each.suffix != ".safetensors" or each.name == ADAPTER]
    if large := [each for each in small if stats[each].length > MOST_TOKENIZER_BYTES and each.name != ADAPTER]:
        size = stats[large[0]].length
        raise ConfigError(f"{large[0]}: {size:,} bytes, expected at most {MOST_TOKENIZER_BYTES:,}")
    key = hashlib.sha256("\n".join([str(folder), *(f"{each} {stats[each].version}" for each in files)]).encode())
    target = user_cache() / "models" / key.hexdigest()[:32]
    if target.is_dir():
        return target
    aside = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    with writing(target):
        try:
            for each in small:
                to = aside / str(each.relative_to(folder))
                to.parent.mkdir(parents=True, exist_ok=True)
                each.download(to)
            (aside / ORIGIN).write_text(str(folder))
            with contextlib.suppress(FileExistsError):
                aside.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return target


def origin_of(folder: pathlib.Path) -> Path:
    """Where the files of a model folder lie that are not in its mirror; itself where it is none.

    A note in any other folder is not believed: it may have come from anyone, and name any place.
    """
    note, mirrors = folder / ORIGIN, user_cache() / "models"
    is_mirror = folder.absolute().parent == mirrors.absolute() and note.is_file()
    return place(note.read_text()) if is_mirror else folder


def _is_read(name: BucketPath) -> bool:
    """Whether a file of a model folder, by its path there, is one that anyone opens."""
    inside = name.parts[:-1] in ((), ("additional_chat_templates",))
    return inside and name.suffix in READ_SUFFIXES and name.suffix != ".gguf"
