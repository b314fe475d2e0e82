"""Files that others made, read without trust: regular files only, no larger than they can sensibly be.

In: a path in a model folder, whoever made it. Out: its bytes, or the JSON in it. A pipe would be waited for, a device
read for ever, and deep JSON ends Python's own recursion; all of it is one `ConfigError` that names the file.
"""

import json
import os
import pathlib
import stat
from collections.abc import Collection
from typing import Any, BinaryIO

from jaxsft.config import ConfigError
from jaxsft.disk.buckets import BucketPath

MOST_CONFIG_BYTES = 1 << 25
"""Largest config.json and the like; real ones have some KB, and some MB where they list tokens."""
MOST_JSON_BYTES = 100_000_000
"""Largest list of tensors, as safetensors allows it."""
MOST_TOKENIZER_BYTES = 1 << 29
"""Largest tokenizer.json; real ones have up to 40 MB."""
MOST_DEPTH = 64
"""Levels of nesting in JSON."""

READ_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".safetensors", ".gguf")
"""Endings of files in a model folder that this program or transformers might open."""
SMALL_JSON = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.json"),
)
"""What transformers reads beside tokenizer.json; each holds one object."""
SINGLE_NAMES = (*SMALL_JSON, "tokenizer.json", "chat_template.jinja", "tokenizer.model", "vocab.json", "merges.txt")

KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def open_regular(path: pathlib.Path | BucketPath) -> BinaryIO:
    """Opens a regular file, or a link to one, for reading.

    Raises:
        ConfigError: it is something else.
        OSError: it is not there, or may not be read.
    """
    if isinstance(path, BucketPath):
        return path.open("rb")
    _refuse_irregular(path, os.stat(path))
    # Should it have become a pipe meanwhile, opening it does not wait.
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    try:
        _refuse_irregular(path, os.fstat(file.fileno()))
    except BaseException:
        file.close()
        raise
    return file


def _refuse_irregular(path: pathlib.Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"{path}: {KINDS.get(stat.S_IFMT(found.st_mode), 'no file')}, expected a regular file")


def read_regular(path: pathlib.Path | BucketPath, *, most: int) -> bytes:
    """The whole of a regular file of at most `most` bytes.

    Raises:
        ConfigError: it is something else, or larger.
        OSError: it is not there, or may not be read.
    """
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        size = path.stat().st_size
        raise ConfigError(f"{path}: {max(size, len(data)):,} bytes, expected at most {most:,}")
    return data


def read_json(path: pathlib.Path | BucketPath, *, most: int = MOST_CONFIG_BYTES) -> Any:
    """What a JSON file holds.

    Raises:
        ConfigError: it is no regular file, too large, no JSON in UTF-8, or nested too deeply.
    """
    try:
        value = json.loads(read_regular(path, most=most).decode("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except RecursionError:
        raise ConfigError(f"{path}: {_too_deep()}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}") from None
    if is_deep(value):
        raise ConfigError(f"{path}: {_too_deep()}")
    return value


def read_object(path: pathlib.Path | BucketPath, *, most: int = MOST_CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        ConfigError: as `read_json`, or it holds something else.
    """
    value = read_json(path, most=most)
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def is_deep(value: Any) -> bool:
    """Whether a value of JSON is nested more than MOST_DEPTH levels deep."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MOST_DEPTH):
        children = (parent.values() if isinstance(parent, dict) else parent for parent in level)
        level = [child for each in children for child in each if isinstance(child, dict | list)]
        if not level:
            return False
    return True


def _too_deep() -> str:
    return f"nested too deeply, expected at most {MOST_DEPTH} levels"


def check_folder(folder: pathlib.Path) -> None:
    """Refuses a model folder in which something else lies where a file is expected: it would be waited for, or read
    without end.

    Raises:
        ConfigError: names it and what it is.
    """
    try:
        names = sorted(name for name in os.listdir(folder) if name.lower().endswith(READ_SUFFIXES))
    except OSError as error:
        raise ConfigError(f"{folder}: not readable: {error}") from None
    templates = folder / "additional_chat_templates"
    more = sorted(templates.iterdir()) if templates.is_dir() else []
    for path in [*(folder / name for name in names), *more]:
        try:
            found = os.stat(path)
        except OSError:
            continue  # Whoever reads it says what is wrong with it.
        if path.name in SINGLE_NAMES or not stat.S_ISDIR(found.st_mode):
            _refuse_irregular(path, found)


def check_tokenizer_files(folder: pathlib.Path) -> None:
    """Refuses what transformers should not be given to read as the files of a tokenizer.

    Raises:
        ConfigError: names the file, and what is wrong with it.
    """
    check_folder(folder)
    for name in SMALL_JSON:
        if (folder / name).is_file():
            read_object(folder / name)
    _check_size(folder, ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt"))


def _check_size(folder: pathlib.Path, names: Collection[str]) -> None:
    for name in names:
        path = folder / name
        if path.is_file() and (size := path.stat().st_size) > MOST_TOKENIZER_BYTES:
            raise ConfigError(f"{path}: {size:,} bytes, expected at most {MOST_TOKENIZER_BYTES:,}")
