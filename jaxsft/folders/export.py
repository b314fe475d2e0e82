"""The folder that a run ends with: weights, config, tokenizer and generation_config, as transformers opens them.

In: the state of a model, its tokenizer and the folder that it came from. Out: a folder. What was not changed is as it
came, to the byte. The folder is written aside, sealed and renamed, so that it is whole or not there; what was there
before stays until then, whatever fails. Of an earlier export, only what is known to be ours is removed: a file that
somebody added or changed stays, in a folder beside.
"""

import concurrent.futures
import contextlib
import fcntl
import json
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx

from jaxsft.config import ConfigError
from jaxsft.disk.buckets import BucketPath
from jaxsft.disk.seal import REMOVING, SEAL, Entry, checksums, finish_removing, remove_sealed
from jaxsft.disk.writing import WriteError, check_space, is_file, set_aside, write_error
from jaxsft.folders import bucket_export
from jaxsft.folders.bucket_export import MARK_TEXT, UNFINISHED_MARK, is_unfinished
from jaxsft.folders.config_words import with_older_words
from jaxsft.folders.hf import load_generation_config
from jaxsft.folders.mirror import origin_of
from jaxsft.folders.tokenizer_files import TOKENIZER_FILES, indent_of, settle_tokenizer
from jaxsft.folders.weights.layout import variables_of, whole_weights
from jaxsft.folders.weights.save import Made, dump_json, write_weights
from jaxsft.folders.weights.stored import DTYPES, Stored
from jaxsft.hosts.exchange import done_by_first
from jaxsft.hosts.sealing import problem_together, seal_together

__all__ = ["TOKENIZER_FILES", "ExportError", "export_dtype", "export_folder", "export_problem"]


CARD = "README.md"
"""The model card, as the hub calls it."""


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


def export_folder(
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
    merge: Mapping[str, Made] | None = None,
    has_new_rows: bool = False,
    card: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Writes a Hugging Face folder: weights, config, tokenizer with chat template, generation_config.

    Every process of the run must call this; they share the files of weights, and process 0 writes all others. The
    folder appears in one rename, complete or not at all, and takes the place of an earlier export. config.json and
    generation_config.json are those of the source, to the byte if nothing in them has to change; what only transformers
    5 would read in config.json is there in the words of version 4, too.

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
        merge, has_new_rows: see `write_weights`.
        card: text of README.md, on process 0; None: it has none.
        say: is told where files went that stood in an earlier export and are not known to be ours.

    Raises:
        ConfigError: `folder` holds something else than an export, or is `source_folder`.
        ExportError: it could not be written.
    """
    folder = target_of(folder)
    source = pathlib.Path(source_folder) if source_folder else None
    check_target(folder, [source] if source else [])
    into = None
    if dtype is not None or stored is None or not stored.files:
        name = export_dtype(hf_config, dtype)
        into = next(each for each in DTYPES.values() if each.name == name)

    def write_others(aside: pathlib.Path) -> None:
        save_tokenizer(aside, tokenizer)
        _write_configs(aside, hf_config, source, tokenizer=tokenizer, stop_ids=stop_ids, dtype=into)
        settle_tokenizer(aside, tokenizer, pathlib.Path(tokenizer_folder) if tokenizer_folder else None)
        write_card(aside, card)

    def write(aside: pathlib.Path) -> dict[str, Entry | None]:
        return write_weights(
            aside,
            params,
            family,
            vocab_size=vocab_size,
            dtype=into,
            stored=stored,
            max_shard_bytes=max_shard_bytes,
            merge=merge,
            has_new_rows=has_new_rows,
        )

    write_whole_folder(folder, say, num_bytes=_num_bytes(params, into, stored), weights=write, others=write_others)


def target_of(folder: Any) -> Any:
    """The path of an export on a disk or in a bucket, absolute."""
    return folder if isinstance(folder, BucketPath) else pathlib.Path(folder).absolute()


def check_target(folder: pathlib.Path, sources: Sequence[pathlib.Path]) -> None:
    """Refuses a folder in whose place no export may come: one of the sources, or what is no export.

    Raises:
        ConfigError: names the folder.
    """
    if any(folder.resolve() == origin_of(source).resolve() for source in sources):
        raise ConfigError(f"{folder}: the export would replace the model that it was made from")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir()) and not _is_export(folder)):
        raise ConfigError(f"{folder}: exists and is not an export; move it away or export elsewhere")


def _is_export(folder: pathlib.Path) -> bool:
    if isinstance(folder, BucketPath) and (is_unfinished(folder) or (folder / REMOVING).exists()):
        return True
    return any((folder / name).exists() for name in ("config.json", "adapter_config.json"))


def _num_bytes(params: nnx.State, into: np.dtype | None, stored: Stored | None) -> int:
    """Bytes of the weights as they are written: all in one dtype, or each in that in which it was stored."""
    if into is None and stored is not None:
        tensors = stored.tensors.values()
        return sum(math.prod(each.shape) * each.dtype.itemsize for each in tensors if each.dtype is not None)
    itemsize = into.itemsize if into is not None else 4
    return sum(math.prod(each.shape) for each in whole_weights(variables_of(params)).values()) * itemsize


def save_tokenizer(folder: pathlib.Path, tokenizer: Any) -> None:
    """Writes the tokenizer as transformers saves it.

    Raises:
        ExportError: it could not be written.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the Rust library raises plain Exceptions
        raise ExportError(f"the tokenizer could not be written: {error}") from error


def write_card(folder: pathlib.Path, card: str | None) -> None:
    """Writes the model card, where there is one."""
    if card is not None:
        (folder / CARD).write_text(card, encoding="utf-8")


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
    write_generation_config(folder, hf_config, source, tokenizer=tokenizer, stop_ids=stop_ids)
    config = dict(hf_config)
    if dtype is not None:
        dtype_keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
        config |= dict.fromkeys(dtype_keys, dtype.name)
    config, _ = with_older_words(config)
    _write_config(folder / "config.json", config | _new_ids(config, tokenizer, stop_ids), source)


def write_generation_config(
    folder: pathlib.Path,
    hf_config: dict[str, Any],
    source: pathlib.Path | None,
    *,
    tokenizer: Any,
    stop_ids: Sequence[int],
) -> None:
    """generation_config.json, that of `source` with only what differs: it names every id that ends an answer."""
    generation_config = load_generation_config(source) if source else {}
    if changes := _new_ids(generation_config, tokenizer, stop_ids):
        # With this key, transformers would write the file anew from config.json.
        generation_config.pop("_from_model_config", None)
    if not generation_config:
        known = {key: getattr(tokenizer, key) for key in ("bos_token_id", "pad_token_id")}
        changes = {key: hf_config.get(key) if id is None else id for key, id in known.items()} | changes
        changes = {key: id for key, id in changes.items() if id is not None}
    _write_config(folder / "generation_config.json", generation_config | changes, source)


def _new_ids(config: dict[str, Any], tokenizer: Any, stop_ids: Sequence[int]) -> dict[str, Any]:
    """The special ids that differ from those in a config; bos and pad only where the config has them."""
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
    """Writes a config in the layout of the source's file of this name, and as its very bytes where nothing differs."""
    before = source / path.name if source else None
    if before is None or not before.is_file():
        path.write_bytes(dump_json(dict(sorted(config.items()))))
        return
    text = before.read_bytes()
    if json.loads(text) != config:
        text = dump_json(config, indent=indent_of(text))
    path.write_bytes(text)


def export_problem(folder: pathlib.Path) -> str | None:
    """What is wrong with an export that was written before, None when every file is as it was sealed.

    Its card may have been written on, as cards are there for. Every process must call this.
    """
    return problem_together(epath.Path(folder), free=(CARD,))


def write_whole_folder(
    folder: pathlib.Path,
    say: Callable[[str], None],
    *,
    num_bytes: int,
    weights: Callable[[pathlib.Path], dict[str, Entry | None]],
    others: Callable[[pathlib.Path], None],
) -> None:
    """Writes an export, which takes the place of `folder` if nothing fails, and is removed if something does.

    Every process must call this.

    Args:
        folder: where to.
        say: as `export_folder`.
        num_bytes: of the weights.
        weights: writes them into a folder, on every process; returns what `write_weights` does.
        others: writes all else, on process 0, while weights are gathered.

    Raises:
        ExportError: what failed.
    """
    if isinstance(folder, BucketPath):
        _write_to_bucket(folder, say, weights=weights, others=others)
        return
    aside = _partial(folder)
    with contextlib.ExitStack() as begun, concurrent.futures.ThreadPoolExecutor(1) as thread:

        def begin() -> None:
            check_space(folder, num_bytes)
            begun.enter_context(_alone(folder, say))

        try:
            done_by_first("export begun", begin)
        except (ExportError, WriteError):
            raise
        except OSError as error:
            raise ExportError(str(error)) from error
        try:
            done_by_first("export folder", lambda: begun.enter_context(_in_the_making(aside)))
            beside = thread.submit(others if jax.process_index() == 0 else lambda aside: None, aside)
            written: dict[str, Entry | None] = {}
            failed: OSError | ConfigError | None = None
            try:
                written = weights(aside)
            except (OSError, ConfigError) as error:
                failed = error

            def sums() -> dict[str, Entry]:
                beside.result()
                if failed is not None:
                    raise failed
                return _sums(aside, written)

            # What fails on one process is told to all. The mark stays until the folder is sealed, so that one whose
            # export was killed is known as ours.
            seal_together(epath.Path(aside), sums)
            done_by_first("export finished", lambda: _finish(aside, folder, say))
        except OSError as error:
            reason = str(error) if isinstance(error, ExportError) else error.strerror or str(error)
            raise ExportError(str(write_error(folder, reason))) from error


def _write_to_bucket(
    folder: BucketPath,
    say: Callable[[str], None],
    *,
    weights: Callable[[pathlib.Path], dict[str, Entry | None]],
    others: Callable[[pathlib.Path], None],
) -> None:
    """As `write_whole_folder`: each process puts its files together on its own disk, and sends them."""
    partial = bucket_export.partial_of(folder)
    with contextlib.ExitStack() as begun, tempfile.TemporaryDirectory(prefix="jaxsft-export-") as made:
        aside = pathlib.Path(made)
        try:
            done_by_first("export begun", lambda: begun.enter_context(bucket_export.begun(folder, say)))
            written: dict[str, Entry | None] = {}
            failed: OSError | ConfigError | None = None
            try:
                written = weights(aside)
            except OSError as error:
                failed = write_error(aside, error.strerror or str(error))
            except ConfigError as error:
                failed = error

            def sums() -> dict[str, Entry]:
                if failed is not None:
                    raise failed
                if jax.process_index() == 0:
                    others(aside)
                found = _sums(aside, written)
                bucket_export.send(aside, partial, found)
                return found

            seal_together(partial, sums)
            done_by_first("export finished", lambda: bucket_export.put_in_place(folder, say))
        except WriteError as error:
            raise ExportError(str(error)) from error
        except OSError as error:
            raise ExportError(str(write_error(folder, error.strerror or str(error)))) from error


@contextlib.contextmanager
def _in_the_making(aside: pathlib.Path) -> Iterator[None]:
    """A folder to write into; what is left of it at the end is removed."""
    aside.mkdir(parents=True)
    try:
        (aside / UNFINISHED_MARK).write_bytes(MARK_TEXT)
        yield
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _sums(aside: pathlib.Path, written: dict[str, Entry | None]) -> dict[str, Entry]:
    """What this process has written; process 0 all but weights."""
    sums = {name: entry for name, entry in written.items() if entry is not None}
    if jax.process_index() == 0:
        sums |= checksums(epath.Path(aside), but=[UNFINISHED_MARK, *written])
    return sums


def _finish(aside: pathlib.Path, folder: pathlib.Path, say: Callable[[str], None]) -> None:
    (aside / UNFINISHED_MARK).unlink()
    _rename_over(aside, folder, say)


@contextlib.contextmanager
def _alone(folder: pathlib.Path, say: Callable[[str], None]) -> Iterator[None]:
    """Keeps other exports to `folder` out, and finishes or removes what a killed export has left.

    Raises:
        ExportError: another one is being written, or what stands where it would be written is not ours.
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
        left, replaced = _partial(folder), _replaced(folder)
        was_going = (replaced / REMOVING).exists()
        for each in (left, replaced):
            if not each.is_symlink():  # a removal that was cut off
                finish_removing(epath.Path(each), to_the_byte=True)
        if (left / SEAL).exists() and not left.is_symlink():  # killed before the rename
            remove_sealed(epath.Path(left), to_the_byte=True)
        if left.exists() or left.is_symlink():
            if left.is_symlink() or not _is_marked(left):
                raise ExportError(f"{left}: is in the way and no unfinished export of jaxsft; move it away")
            shutil.rmtree(left)
        is_ours = was_going or _is_export(replaced)
        if replaced.is_symlink() or (replaced.exists() and not is_ours):
            raise ExportError(f"{replaced}: is in the way and no export of jaxsft; move it away")
        if not folder.exists() and replaced.exists():
            replaced.rename(folder)  # killed between the two renames
        _put_away(folder, say)
        yield
    finally:
        os.close(parent)


def _is_marked(folder: pathlib.Path) -> bool:
    mark = folder / UNFINISHED_MARK
    return is_file(mark) and mark.read_bytes() == MARK_TEXT


def _partial(folder: pathlib.Path) -> pathlib.Path:
    return folder.with_name(f".{folder.name}.jaxsft-partial")


def _replaced(folder: pathlib.Path) -> pathlib.Path:
    return folder.with_name(f".{folder.name}.jaxsft-replaced")


def _rename_over(new: pathlib.Path, folder: pathlib.Path, say: Callable[[str], None]) -> None:
    """Puts `new` in the place of `folder`, which is put away only after that, and comes back if it fails."""
    old = _replaced(folder)
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    _put_away(folder, say)


def _put_away(folder: pathlib.Path, say: Callable[[str], None]) -> None:
    """Removes the export that stood here before; files of it that are not as we wrote them go to a folder beside."""
    old = _replaced(folder)
    if not old.exists():
        return
    if (old / SEAL).exists():
        remove_sealed(epath.Path(old), to_the_byte=True)
    elif not any(old.iterdir()):
        old.rmdir()
    if old.exists():
        beside = set_aside(old, name=folder.name)
        names = ", ".join(sorted(each.name for each in beside.iterdir())[:5])
        say(
            f"{folder} held files that this program did not write, or that were changed: they are in {beside} ({names})"
        )
