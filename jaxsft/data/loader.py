"""The prepared dataset on disk, and `batch(step)`: which tokens every step trains on, as a pure function.

In: a source of rows, a tokenizer, and the data section of the config. Out: memory-mapped examples (tokenised once,
cached under a key of all that determines them) and numpy batches of exactly the rows asked for. Placing batches on
devices is left to the caller.
"""

import contextlib
import hashlib
import inspect
import json
import os
import pathlib
import queue
import shutil
import sys
import threading
import uuid
import zlib
from collections.abc import Callable, Generator, Sequence
from importlib import metadata
from typing import Any, NamedTuple, TypeVar

import numpy as np

from jaxsft.batch import Batch, Example
from jaxsft.config import DataConfig
from jaxsft.data import chat, formats, sources
from jaxsft.data.packing import permutation, plan
from jaxsft.data.sources import DataError, bad_rows

T = TypeVar("T")

REPORT = "report.json"
ARRAYS: dict[str, Any] = {"tokens": np.int32, "loss_weights": np.float32, "offsets": np.int64}


class Prepared(NamedTuple):
    """All examples of a source: example i is `tokens[offsets[i]:offsets[i + 1]]`, and the same of `loss_weights`."""

    key: str
    """Changes when anything changes that determines the examples; hex."""
    tokens: np.ndarray
    """int32 [num_tokens], memory-mapped."""
    loss_weights: np.ndarray
    """float32 [num_tokens], memory-mapped."""
    offsets: np.ndarray
    """int64 [num_examples + 1], memory-mapped."""
    report: dict[str, Any]
    """What was read, kept and dropped, and the `fingerprint` by field that a continued run compares; plain JSON."""

    @property
    def lengths(self) -> np.ndarray:
        """int64 [num_examples]: tokens of each example."""
        return np.diff(self.offsets)

    def example(self, index: int) -> Example:
        span = slice(self.offsets[index], self.offsets[index + 1])
        return Example(self.tokens[span], self.loss_weights[span])


def prepare(
    config: DataConfig,
    source: str,
    tokenizer: chat.Tokenizer,
    *,
    tokenizer_files_key: str,
    stops: Sequence[int],
    limit: int | None = None,
) -> Prepared:
    """Reads, converts, tokenises and weighs every row of a source, or finds that in the cache.

    Args:
        config: the data section; the tokenizer already carries its `chat_template`.
        source: `config.train` or `config.eval`.
        tokenizer: a fast tokenizer.
        tokenizer_files_key: changes when any file of the tokenizer changes.
        stops: what `chat.stop_ids` says.
        limit: only the first so many rows.

    Raises:
        DataError: anything wrong with the rows, or none is left.
    """
    described = {
        "source": sources.source_digest(source),
        "format": config.format,
        "chat_template": tokenizer.chat_template,
        "tokenizer": tokenizer_files_key,
        "train_on": config.train_on,
        "seq_len": config.seq_len,
        "overlong": config.overlong,
        "stops": list(stops),
        "limit": limit,
    }
    # What a continued run must find unchanged: by content, so that a newer jaxsft may prepare it anew.
    fingerprint = {name: _digest(value) for name, value in described.items() if name != "overlong"}
    described |= {
        "code": [inspect.getsource(module) for module in (sources, formats, chat, sys.modules[__name__])],
        "versions": [metadata.version(package) for package in ("transformers", "tokenizers")],
    }
    key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    folder = _cache_folder(config) / key
    prepared = _load(folder, key)
    if prepared is not None:
        return prepared
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Built beside its place and then renamed, so that a folder of that name is always whole.
    building = folder.with_name(f".{key[:16]}-{uuid.uuid4().hex}")
    building.mkdir()
    try:
        _build(building, config, source, tokenizer, stops, limit, fingerprint)
        prepared = _load(building, key)
        assert prepared is not None, "whole, for it was just written"
        _put_in_place(building, folder, key)
        # Whoever comes second uses the first one's. Mapped files outlive their names, should those be gone by now.
        return _load(folder, key) or prepared
    finally:
        shutil.rmtree(building, ignore_errors=True)


class Loader:
    """The batches of a run: everything here is a pure function of the arguments below and of `step`.

    Rows are packed once; each epoch goes through all of them in its own order, so that it trains every example exactly
    once. Where the last batch of an epoch has rows left over, they are padding.
    """

    def __init__(
        self, prepared: Prepared, *, seq_len: int, batch_size: int, seed: int, packing: bool, shuffle: bool = True
    ) -> None:
        self._prepared = prepared
        self._plan = plan(prepared.lengths, seq_len, seed=seed, packing=packing)
        self._seq_len, self._batch_size, self._seed, self._shuffle = seq_len, batch_size, seed, shuffle
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))
        self._built: tuple[int, dict[tuple[int, int], Batch]] = (-1, {})

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T) of every batch."""
        return self._batch_size, self._seq_len

    @property
    def num_rows(self) -> int:
        return len(self._plan.row_starts) - 1

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_rows // self._batch_size)

    def row_ids(self, step: int) -> np.ndarray:
        """Which packed rows step trains on, int64 [batch_size]; -1 is a row of padding.

        5 rows in batches of 2, unshuffled: step 0 has `[0, 1]`, step 2 has `[4, -1]`, step 3 has `[0, 1]` again.
        """
        epoch, index = divmod(step, self.steps_per_epoch)
        ids = self._epoch_order(epoch)[index * self._batch_size : (index + 1) * self._batch_size]
        return np.pad(ids, (0, self._batch_size - len(ids)), constant_values=-1)

    def rows_crc(self, start: int, stop: int) -> int:
        """CRC-32 of the row ids of steps `start` to `stop - 1`: equal where two runs trained on the same rows."""
        crc = 0
        for step in range(start, stop):
            crc = zlib.crc32(self.row_ids(step).astype("<i8").tobytes(), crc)
        return crc

    def examples_in_row(self, row: int) -> np.ndarray:
        """The examples of a packed row in order, int32; none for -1."""
        return self._plan.examples[slice(*self._plan.row_starts[row : row + 2])] if row >= 0 else np.zeros(0, np.int32)

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """The batch of a step, or only some of its rows; leaves [rows, seq_len], read-only.

        The slices of the latest step are kept: each leaf and shard of a global array asks for them anew.
        """
        start, stop, stride = rows.indices(self._batch_size)
        assert stride == 1, "rows are asked for as one block"
        built_step, built = self._built
        if built_step != step:
            built = {}
            self._built = (step, built)
        if (start, stop) not in built:
            built[start, stop] = self._build_batch(self.row_ids(step)[start:stop])
        return built[start, stop]

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(self.num_rows)
        known, order = self._order
        if known != epoch:
            order = permutation(self.num_rows, seed=(self._seed, 2, epoch))
            self._order = (epoch, order)
        return order

    def _build_batch(self, row_ids: np.ndarray) -> Batch:
        """See `Batch` for the worked example that this follows."""
        shape = (len(row_ids), self._seq_len)
        batch = Batch(*(np.zeros(shape, dtype) for dtype in (np.int32, np.int32, np.float32, np.int32, np.int32)))
        for row, row_id in enumerate(row_ids):
            at = 0
            for segment, index in enumerate(self.examples_in_row(int(row_id)), start=1):
                tokens, loss_weights = self._prepared.example(index)
                end = at + len(tokens)
                batch.tokens[row, at:end] = tokens
                # The last position of a segment has no target: the next token is another segment's first.
                batch.targets[row, at : end - 1] = tokens[1:]
                batch.loss_weights[row, at : end - 1] = loss_weights[1:]
                batch.segment_ids[row, at:end] = segment
                batch.positions[row, at:end] = np.arange(end - at)
                at = end
        for leaf in batch:
            leaf.flags.writeable = False
        return batch


def prefetch(make: Callable[[int], T], start: int, stop: int, *, depth: int = 2) -> Generator[T, None, None]:
    """`make(start), ..., make(stop - 1)`, made in order by a background thread, at most `depth` ahead.

    The thread starts with the first item asked for, and ends when the iterator is exhausted or closed. What `make`
    raises is raised in the place of its item.
    """
    made: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
    room = threading.Semaphore(depth)
    closed = threading.Event()

    def work() -> None:
        for step in range(start, stop):
            room.acquire()
            if closed.is_set():
                return
            try:
                made.put((make(step), None))
            except BaseException as error:
                made.put((None, error))
                return

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        for _ in range(start, stop):
            item, error = made.get()
            if error is not None:
                raise error
            room.release()
            yield item  # type: ignore[misc]
    finally:
        closed.set()
        room.release()
        thread.join()


def _digest(value: Any) -> str:
    """A value in a few characters, to be compared and shown: itself where it is short."""
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 40 else hashlib.sha256(text.encode()).hexdigest()[:16]


def _cache_folder(config: DataConfig) -> pathlib.Path:
    if config.cache is not None:
        return pathlib.Path(config.cache).expanduser()
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "jaxsft"


def _load(folder: pathlib.Path, key: str) -> Prepared | None:
    """The prepared data in a folder; None unless it is whole."""
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        if {name: (folder / f"{name}.bin").stat().st_size for name in ARRAYS} != report["bytes"]:
            return None
        arrays = {name: np.memmap(folder / f"{name}.bin", dtype, "r") for name, dtype in ARRAYS.items()}
        return Prepared(key, **arrays, report=report)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _put_in_place(building: pathlib.Path, folder: pathlib.Path, key: str) -> None:
    """Renames; of several processes that prepare the same, the first one's work stays."""
    try:
        building.rename(folder)
        return
    except OSError:
        if _load(folder, key) is not None:
            return
    # What stands there is damaged. Another process may be about to replace it as well.
    damaged = building.with_name(f"{building.name}-damaged")
    with contextlib.suppress(OSError):
        folder.rename(damaged)
    shutil.rmtree(damaged, ignore_errors=True)
    with contextlib.suppress(OSError):
        building.rename(folder)


def _build(
    folder: pathlib.Path,
    config: DataConfig,
    source: str,
    tokenizer: chat.Tokenizer,
    stops: Sequence[int],
    limit: int | None,
    fingerprint: dict[str, str],
) -> None:
    """Writes the arrays, and last the report, whose presence says that the rest is there."""
    format, columns, conversations = formats.load_conversations(source, format=config.format, limit=limit)
    known = formats.FORMATS[format]
    lengths: list[int] = []
    overlong: list[tuple[str, int]] = []
    longest = (0, "")
    num_trained = num_straddling = crc = 0
    with (folder / "tokens.bin").open("wb") as tokens, (folder / "loss_weights.bin").open("wb") as loss_weights:
        for encoded in chat.prepare_examples(conversations, tokenizer, train_on=config.train_on, stops=stops):
            example, length = encoded.example, len(encoded.example.tokens)
            longest = max(longest, (length, encoded.origin), key=lambda pair: pair[0])
            if length > config.seq_len:
                overlong.append((encoded.origin, length))
                continue
            lengths.append(length)
            num_trained += int(np.count_nonzero(example.loss_weights[1:]))
            num_straddling += encoded.num_straddling
            parts = example.tokens.astype(np.int32).tobytes(), example.loss_weights.astype(np.float32).tobytes()
            tokens.write(parts[0])
            loss_weights.write(parts[1])
            crc = zlib.crc32(parts[1], zlib.crc32(parts[0], crc))
    if overlong and config.overlong == "error":
        problems = [(origin, f"{length} tokens") for origin, length in overlong]
        raise bad_rows(problems, f"overlong (data.seq_len is {config.seq_len}, data.overlong is 'error')")
    if not lengths:
        raise DataError(
            f"{source}: no example is left: all {len(overlong)} have more than data.seq_len={config.seq_len} tokens "
            f"(the shortest has {min(length for _, length in overlong)})"
        )
    np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64).tofile(folder / "offsets.bin")
    all_lengths = lengths + [length for _, length in overlong]
    report = {
        "source": source,
        "format": format,
        "format_reason": "given in data.format" if config.format else f"has the columns {', '.join(known.columns)}",
        "columns_ignored": sorted(set(columns) - {*known.columns, *known.optional}),
        "rows": len(conversations),
        "examples": len(lengths),
        "tokens": sum(lengths),
        "trained_tokens": num_trained,
        "straddling_tokens": num_straddling,
        "overlong_examples": len(overlong),
        "overlong_tokens": sum(length for _, length in overlong),
        "longest": {"tokens": longest[0], "origin": longest[1]},
        "length_percentiles": {str(p): int(np.percentile(all_lengths, p)) for p in (5, 25, 50, 75, 95, 99)},
        "fingerprint": fingerprint | {"examples": f"{crc:08x}"},
        "bytes": {name: (folder / f"{name}.bin").stat().st_size for name in ARRAYS},
    }
    (folder / REPORT).write_text(json.dumps(report, indent=2, ensure_ascii=False), encoding="utf-8")
