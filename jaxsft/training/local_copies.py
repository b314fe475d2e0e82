"""Copies of the state on the disks of the hosts, more often than there are checkpoints, for when a run is killed.

    FOLDER/KEY/process-K/STEP/meta.json    what is known at this step, and where what lies; written first
    FOLDER/KEY/process-K/STEP/arrays.bin   the parts of all arrays that this process's devices hold
    FOLDER/KEY/process-K/STEP/seal.json    see `seal.py`; written last
    RUN/checkpoints/local.json             the mark of this run, which is in each of its copies

In: a state at a step. Out: the newest one that every process has, where all of them are what they were: the same
processes, devices and mesh. A former copy is removed when every process has sealed the next.
"""

import contextlib
import hashlib
import json
import math
import os
import pathlib
import socket
import uuid
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from jaxsft.disk.seal import (
    REMOVING,
    SEAL,
    Entry,
    finish_removing,
    problem_of,
    read_object,
    remove_sealed,
    write_seal,
)
from jaxsft.disk.writing import aside_of, at_home, check_space, user_cache, write_whole, writing
from jaxsft.hosts.exchange import first_text, gather_texts

META, ARRAYS, MARK = "meta.json", "arrays.bin", "local.json"
BLOCK_BYTES = 1 << 24


class Part(NamedTuple):
    """What one or more devices of a process hold of an array."""

    bounds: list[list[int]]
    """First and last + 1 of each dim."""
    offset: int
    """Of its first byte in the file."""


class LocalCopies:
    """The copies of one process of a run.

    Args:
        checkpoints: `checkpoints/` of the run.
        folder: on this host; left out: in the user's cache.
        say: where one-line notices go.
    """

    def __init__(self, checkpoints: epath.Path, folder: str | None, say: Callable[[str], None]) -> None:
        root = at_home(folder) if folder else user_cache(say) / "checkpoints"
        # The path names the run to those who look; its mark tells it from others that had the same path.
        key = hashlib.sha256(os.fspath(checkpoints).encode()).hexdigest()[:16]
        self.folder = epath.Path(root.absolute() / key / f"process-{jax.process_index()}")
        self._mark_path = checkpoints / MARK
        self._say = say
        self._mark = first_text("local mark", self._read_mark())

    def _read_mark(self) -> str:
        if jax.process_index() == 0 and self._mark_path.exists():
            with contextlib.suppress(OSError, ValueError):
                return str(read_object(self._mark_path)["run"])
        return ""

    def begin(self) -> None:
        """Gives the run its mark where it has none; to be called by every process, before the first copy.

        Raises:
            WriteError: it cannot be written.
        """
        if not self._mark:
            mark = first_text("local mark", uuid.uuid4().hex)
            if jax.process_index() == 0:
                self._mark_path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(self._mark_path, json.dumps({"run": mark}) + "\n")
            self._mark = mark

    def write(self, step: int, held: "Held", meta: dict[str, Any]) -> None:
        """Writes and seals a copy, and removes the former ones when all processes have sealed theirs.

        Every process must call this, in any thread. A copy that fails is said, and no error: checkpoints are apart.
        """
        problem = ""
        try:
            self._write(self.folder / str(step), held, meta)
        except OSError as error:
            problem = f"process {jax.process_index()}: {error}"
        problem = next(filter(None, gather_texts("local copy", problem)), "")
        if problem:
            self._say(f"WARNING: no local copy of step {step}: {problem}")
        else:
            self.remove(before=step)

    def _write(self, target: epath.Path, held: "Held", meta: dict[str, Any]) -> None:
        self._clear(target)
        check_space(target, held.num_bytes)
        with writing(target, held.num_bytes):
            target.mkdir(parents=True)
            about = {"run": self._mark, "host": socket.gethostname(), "process": jax.process_index()}
            about |= {"num_processes": jax.process_count(), "parts": held.parts}
            text = json.dumps(meta | {"local": about})
            write_whole(target / META, text)
            entry = _write(target / ARRAYS, held.pieces)
            write_seal(target, {META: Entry(len(text), zlib.crc32(text.encode())), ARRAYS: entry})

    def newest(self, abstract: dict[str, jax.ShapeDtypeStruct], *, after: int) -> tuple[int, dict[str, Any]] | None:
        """The newest step that every process has a whole copy of, and what was saved with it; None where there is none.

        Args:
            abstract: what is asked of it, with shardings.
            after: only of a later step than this.
        """
        mine = {step: self._misfit(step, abstract, after) for step in self._steps() if step > after}
        parts = [json.loads(text) for text in gather_texts("local copies", json.dumps(list(mine.items())))]
        tables = [dict(part) for part in parts]
        for step in sorted({step for table in tables for step in table}, reverse=True):
            lacking = [number for number, table in enumerate(tables) if step not in table]
            problem = next((table[step] for table in tables if table.get(step)), None)
            if lacking:
                problem = f"process {', '.join(map(str, lacking))} has none"
            elif problem is None:
                # All of them read their own to the byte.
                problems = gather_texts("local copy read", problem_of(self.folder / str(step)) or "")
                at = next((number for number, each in enumerate(problems) if each), None)
                problem = None if at is None else f"process {at}: {problems[at]}"
            if problem is None:
                return step, read_object(self.folder / str(step) / META)
            self._say(f"passed over the local copies of step {step}: {problem}")
        return None

    def read(self, step: int, meta: dict[str, Any], abstract: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """The arrays of a copy that `newest` has found."""
        path = pathlib.Path(os.fspath(self.folder / str(step) / ARRAYS))
        arrays = {}
        for name, leaf in abstract.items():
            places = {_as_key(part[0]): part[1] for part in meta["local"]["parts"][name]}

            def of(index: Any, leaf: Any = leaf, places: dict[Any, int] = places) -> np.ndarray:
                bounds = _bounds(index, leaf.shape)
                shape = [last - first for first, last in bounds]
                values = np.empty(shape, leaf.dtype)
                _read_into(path, places[_as_key(bounds)], values)
                return values

            arrays[name] = jax.make_array_from_callback(leaf.shape, leaf.sharding, of)
        return jax.block_until_ready(arrays)

    def remove(self, *, before: int) -> None:
        """Removes the copies of earlier steps, and what former runs in this run folder have left on this host."""
        if not self.folder.is_dir():
            return
        for child in list(self.folder.iterdir()):
            about = self._about(child)
            if about is not None and (about["run"] != self._mark or int(child.name) < before):
                with contextlib.suppress(OSError):  # What is left is removed with the next.
                    self._clear(child)
        for folder in (self.folder, self.folder.parent):
            if folder.is_dir() and not any(folder.iterdir()):
                with contextlib.suppress(OSError):  # Another process may be about to use it.
                    folder.rmdir()

    def _steps(self) -> list[int]:
        """Of finished copies of this run."""
        folders = list(self.folder.iterdir()) if self.folder.is_dir() else []
        found = [(folder, self._about(folder)) for folder in folders if (folder / SEAL).exists()]
        return sorted(int(folder.name) for folder, about in found if about and about["run"] == self._mark != "")

    def _about(self, target: epath.Path) -> dict[str, Any] | None:
        """What a folder says of itself; None where it is no copy that this process of a run in this folder has made."""
        try:
            meta = read_object(target / META)
            about = meta["local"]
            is_ours = str(meta["step"]) == target.name and about["process"] == jax.process_index()
            return about if is_ours and socket.gethostname() == about["host"] and about["run"] else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _misfit(self, step: int, abstract: dict[str, jax.ShapeDtypeStruct], after: int) -> str | None:
        """Why a copy is of no use to this start; what its meta.json says is not compared with its seal yet."""
        try:
            return self._misfit_of(step, abstract) or self._lost_best(step, after)
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            return f"their {META} does not say what they hold"

    def _lost_best(self, step: int, after: int) -> str | None:
        """A best checkpoint that was saved before this copy and never finished would be missing for good."""
        best = read_object(self.folder / str(step) / META)["progress"].get("patience", {}).get("best_step")
        if best is not None and best > max(after, 0):
            return f"checkpoint {best}, which was the best by then, was not finished"
        return None

    def _misfit_of(self, step: int, abstract: dict[str, jax.ShapeDtypeStruct]) -> str | None:
        about = self._about(self.folder / str(step))
        if about is None:
            raise ValueError
        if about["num_processes"] != jax.process_count():
            return f"they are of {about['num_processes']} processes, and this is a start of {jax.process_count()}"
        meta = read_object(self.folder / str(step) / META)
        if meta["arrays"] != {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in abstract.items()}:
            return "they are of another model or optimizer"
        for name, leaf in abstract.items():
            held = {_as_key(part[0]) for part in about["parts"][name]}
            indices = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
            if not {_as_key(_bounds(index, leaf.shape)) for index in indices} <= held:
                return "they are of another mesh"
        return None

    def _clear(self, target: epath.Path) -> None:
        """Removes a copy, or what is left of one; nothing that is not ours."""
        if not target.is_dir() or os.path.islink(target):
            return
        if (target / REMOVING).exists():
            finish_removing(target)
        elif (target / SEAL).exists():
            if self._about(target) is not None:
                remove_sealed(target)
        else:  # killed while it was written
            asides = {aside_of(target / name).name for name in (META, SEAL)}
            names = {child.name for child in target.iterdir()}
            if names <= asides or (names <= {META, ARRAYS, *asides} and self._about(target) is not None):
                for name in names:
                    (target / name).unlink()
                target.rmdir()


class Held(NamedTuple):
    """What a process holds of a state, in host memory."""

    pieces: list[np.ndarray]
    parts: dict[str, list[Part]]
    """By the names of the arrays."""
    num_bytes: int


def hold(leaves: dict[str, jax.Array]) -> Held:
    """The parts of arrays that this process has, in host memory; they may be donated then."""
    shards: list[Any] = []
    parts: dict[str, list[Part]] = {}
    offset = 0
    for name, leaf in leaves.items():
        known: dict[Any, Part] = {}
        for shard in leaf.addressable_shards:
            bounds = _bounds(shard.index, leaf.shape)
            if _as_key(bounds) not in known:
                known[_as_key(bounds)] = Part([list(each) for each in bounds], offset)
                offset += math.prod(last - first for first, last in bounds) * leaf.dtype.itemsize
                shard.data.copy_to_host_async()
                shards.append(shard.data)
        parts[name] = list(known.values())
    # On a CPU, an array in host memory is the memory of the device, which the next step writes into.
    pieces = [np.array(shard, copy=True).reshape(-1).view(np.uint8) for shard in shards]
    assert sum(piece.nbytes for piece in pieces) == offset
    return Held(pieces, parts, offset)


def _write(path: epath.Path, pieces: Sequence[np.ndarray]) -> Entry:
    size, crc = 0, 0
    with path.open("wb") as file:
        for piece in pieces:
            for at in range(0, len(piece), BLOCK_BYTES):
                block = piece[at : at + BLOCK_BYTES].data
                file.write(block)
                size, crc = size + len(block), zlib.crc32(block, crc)
        file.flush()
        os.fsync(file.fileno())
    return Entry(size, crc)


def _read_into(path: pathlib.Path, offset: int, values: np.ndarray) -> None:
    flat = values.reshape(-1).view(np.uint8)
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        done = 0
        while done < len(flat):
            count = file.readinto(flat[done:].data)
            if not count:
                raise OSError(f"{path} became shorter while it was read")
            done += count


def _bounds(index: Any, shape: Sequence[int]) -> list[tuple[int, int]]:
    return [each.indices(size)[:2] for each, size in zip(index, shape, strict=True)]


def _as_key(bounds: Any) -> tuple[tuple[int, int], ...]:
    return tuple((first, last) for first, last in bounds)
