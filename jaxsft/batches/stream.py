"""Sources too large to prepare: rows are read, encoded, shuffled and packed window by window while training goes on.

In: sources of any length, the encoder, a seed. Out: batches as `loader.Loader` gives them, a pure function of the rows,
the settings and `step`. A window is `data.shuffle_buffer` rows, of several sources by their weights; it is packed into
rows of its own, which are shuffled, and batches flow on from one window to the next. A source that ends begins again,
in windows that are shuffled otherwise.

Where a window begins in its sources, and with which packed row, is known when the one before it is made. An index file
keeps that, so that a continued run makes only the window that it stands in. The file is a cache: without it, all
windows are made again from the first, to the same rows.
"""

import bisect
import concurrent.futures
import contextlib
import json
import pathlib
import threading
import zlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from importlib import metadata
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from jaxsft.batch import Batch
from jaxsft.batches.loader import derived_seed, make_batch
from jaxsft.batches.mixture import Dataset, check_weights, draw_counts, make_dataset, shares
from jaxsft.batches.packing import PackingPlan, permutation, plan
from jaxsft.batches.portions import Tally, added_counts, merged_descriptions, nothing_left, percentiles
from jaxsft.batches.prepare import code_key, digest, input_heading, no_rows, open_source, prepared_in_memory
from jaxsft.batches.workers import CHUNK, Task, Workers
from jaxsft.chat.encoder import ChatEncoder
from jaxsft.config import ConfigError, DataConfig
from jaxsft.disk.writing import append, write_whole
from jaxsft.rows.sources import Problem, Row, is_hub, read_rows, source_files

KEPT_WINDOWS = 3
"""Windows kept in memory: batches are made ahead of training, and the steps trained last are looked at again."""
LEAST_ROWS = 1000
"""The share of bad rows is that of at least so many rows: a stream's first window may be small."""


_NOTHING: dict[str, Any] = {"rows": 0, "bad_rows": {}, "dropped": {}, "cut": {}}
"""The counts of a stream that has not begun."""


class _Start(NamedTuple):
    """Where a window begins."""

    first_row: int
    """Its number among the packed rows of all windows."""
    cursors: list[list[int]]
    """For each source: how often it was gone through, and rows read since."""
    counts: dict[str, Any]
    """What became of the rows of all windows before: rows, and bad_rows, dropped and cut by reason."""


class _Window(NamedTuple):
    dataset: Dataset
    plan: PackingPlan
    order: np.ndarray
    """int64 [num_rows]: the rows of the plan as they are trained."""


class StreamLoader:
    """The batches of a run on streams; close it, since it works ahead.

    Raises:
        ConfigError: several sources without weights; their sizes, which would say what else to do, are not known.
        DataError: a source that cannot be opened.
    """

    def __init__(
        self, config: DataConfig, encoder: ChatEncoder, *, tokenizer_files_key: str, batch_size: int, seed: int
    ) -> None:
        check_weights(config.train)
        for number, source in enumerate(config.train):
            for key in ("count", "epochs"):
                if getattr(source, key) is not None:
                    raise ConfigError(f"data.train.{number}.{key}: no meaning for a stream; give weights instead")
            if len(config.train) > 1 and source.weight is None:
                raise ConfigError(f"data.train.{number}.weight: required where several sources are streamed, not given")
        self._config, self._batch_size, self._seed = config, batch_size, seed
        one = len(config.train) == 1
        self._quotas = [part * config.shuffle_buffer for part in ([Fraction(1)] if one else shares(config.train))]
        opened = [open_source(config, source, encoder, stream=True) for source in config.train]
        self._described = [each.described for each in opened]
        self._workers = Workers([each.recipe for each in opened])
        self._readers: list[tuple[list[int], Iterator[Row | Problem]] | None] = [None] * len(opened)
        self.fingerprint = _fingerprint(config, encoder, tokenizer_files_key)
        """What must be equal for a run to be continued."""
        self._starts = [_Start(0, [[0, 0] for _ in opened], _NOTHING)]
        self._row_crcs: dict[int, np.ndarray] = {}
        # One thread makes all windows, one after the other; the lock is for who asks for them.
        self._thread = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="stream")
        self._windows: dict[int, concurrent.futures.Future[_Window]] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._built: tuple[int, dict[tuple[int, int], Batch]] = (-1, {})
        self._index: pathlib.Path | None = None

    def use_index(self, path: pathlib.Path, *, is_writer: bool) -> None:
        """Takes from a file where windows begin, if it was written for this stream, and from now on adds to it.

        Args:
            path: the file, which need not exist; its folder must.
            is_writer: of several processes, the one that writes.

        Raises:
            WriteError: it cannot be written, now or when a window is made.
        """
        key = digest([self.fingerprint, self._seed, code_key(), metadata.version("tokenizers")])
        lines = _whole_lines(path)
        if lines[:1] == [key]:
            self._starts = _starts(lines[1:], len(self._readers)) or self._starts
        if is_writer:
            self._index = path
            write_whole(path, "".join(map(_sealed, [key, *self._starts])))

    @property
    def dataset(self) -> Dataset:
        """The examples of the first window."""
        return self._window(0).dataset

    @property
    def described(self) -> list[dict[str, Any]]:
        """What is known of each source before its rows are read: path, format, format_reason, columns_ignored."""
        return self._described

    @property
    def is_packed(self) -> bool:
        return self._config.packing

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T) of every batch."""
        return self._batch_size, self._config.seq_len

    @property
    def num_rows(self) -> int:
        """Packed rows of the first window."""
        return len(self._window(0).order)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of the first window."""
        return -(-self.num_rows // self._batch_size)

    def most_segments(self, num_steps: int) -> int | None:
        """As `Loader.most_segments`; None where rows are packed, as the examples to come are not known."""
        return None if self._config.packing else 2

    def num_steps(self, epochs: float) -> int:
        raise AssertionError("the config asks for train.steps")

    def epochs_done(self, step: int) -> float:
        """How often the source was gone through when the rows before a step had been read; whole numbers."""
        return float(min(passes for passes, _ in self._start_after(step).cursors))

    def rows_so_far(self, step: int) -> dict[str, int]:
        """What became of the rows that were read for the steps before this one."""
        counts = self._start_after(step).counts
        found = {"stream_rows": counts["rows"]}
        found |= {f"stream_bad_rows/{code}": count for code, count in counts["bad_rows"].items()}
        for key in ("dropped", "cut"):
            found |= {f"stream_{key}_examples/{reason}": count[0] for reason, count in counts[key].items()}
        return found

    def row_ids(self, step: int) -> np.ndarray:
        """Which packed rows step trains on, int64 [batch_size], counted over all windows."""
        return np.arange(step * self._batch_size, (step + 1) * self._batch_size)

    def rows_crc(self, start: int, stop: int) -> int:
        """CRC-32 of the tokens of steps `start` to `stop - 1`: equal where two runs trained on the same rows."""
        crc = 0
        for step in range(start, stop):
            for row in self.row_ids(step):
                number, at = self._locate(int(row))
                if number not in self._row_crcs:
                    self._window(number)
                crc = zlib.crc32(self._row_crcs[number][at].tobytes(), crc)
        return crc

    def examples_in_row(self, row: int) -> np.ndarray:
        """The examples of a packed row in order, as numbers in `dataset`; none for rows of later windows."""
        number, at = self._locate(row)
        return _examples_in_row(self._window(0), at) if number == 0 else np.zeros(0, np.int64)

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """The batch of a step, or only some of its rows; leaves [rows, seq_len], read-only; see `Loader.batch`."""
        start, stop, stride = rows.indices(self._batch_size)
        assert stride == 1, "rows are asked for as one block"
        built_step, built = self._built
        if built_step != step:
            built = {}
            self._built = (step, built)
        if (start, stop) not in built:
            examples = []
            for row in self.row_ids(step)[start:stop]:
                number, at = self._locate(int(row))
                window = self._window(number)
                examples.append([window.dataset.example(index) for index in _examples_in_row(window, at)])
            built[start, stop] = make_batch(examples, self._config.seq_len)
        return built[start, stop]

    def close(self) -> None:
        self._closed.set()
        self._thread.shutdown(cancel_futures=True)
        self._workers.close()

    def _start_after(self, step: int) -> _Start:
        """The beginning of the window after the one that the last row before a step stands in."""
        number, _ = self._locate(max(step * self._batch_size - 1, 0))
        return self._starts[number + 1]

    def _locate(self, row: int) -> tuple[int, int]:
        """The window of a packed row, and its place there."""
        while self._starts[-1].first_row <= row:
            self._window(len(self._starts) - 1)
        number = bisect.bisect_right(self._starts, row, key=lambda start: start.first_row) - 1
        return number, row - self._starts[number].first_row

    def _window(self, number: int) -> _Window:
        """A window; the next one is begun."""
        with self._lock:
            if self._closed.is_set():
                raise RuntimeError("the stream is closed")
            for wanted in (number, number + 1):
                if wanted not in self._windows:
                    self._windows[wanted] = self._thread.submit(self._make, wanted)
            for old in sorted(self._windows)[: -KEPT_WINDOWS - 1]:
                if old not in (number, number + 1):
                    del self._windows[old]
            future = self._windows[number]
        return future.result()

    def _make(self, number: int) -> _Window:
        """Reads, encodes and packs a window, and notes where the next one begins."""
        start = self._starts[number]
        cursors = [list(cursor) for cursor in start.cursors]
        tally = Tally()
        portions = []
        for portion in self._workers.map(self._tasks(number, cursors)):
            portions.append(portion)
            tally.add(portion)
        before = start.counts
        tally.check(
            self._config.on_bad_row,
            self._config.seq_len,
            before=(before["rows"], sum(before["bad_rows"].values())),
            least_rows=LEAST_ROWS,
        )
        counts = added_counts(before, {key: getattr(tally, key) for key in before})
        lengths = np.concatenate([portion.encoded_lengths for portion in portions])
        report = merged_descriptions(self._described) | tally.report()
        report |= {"length_percentiles": percentiles(lengths), "fingerprint": {}, "bytes": {}}
        dataset = make_dataset([prepared_in_memory(portions, report)])
        planned = plan(
            dataset.lengths,
            self._config.seq_len,
            seed=derived_seed(self._seed, 5, number),
            packing=self._config.packing,
        )
        num_rows = len(planned.row_starts) - 1
        order = permutation(num_rows, seed=(self._seed, 6, number))
        window = _Window(dataset, planned, order)
        next_start = _Start(start.first_row + num_rows, cursors, counts)
        if not next_start.first_row and all(passes for passes, _ in cursors):
            raise nothing_left(report["path"], report, self._config.seq_len, int(min(lengths, default=0)))
        self._row_crcs[number] = np.array([_row_crc(window, at) for at in range(num_rows)], np.uint32)
        if number + 1 == len(self._starts):
            self._starts.append(next_start)
            if self._index is not None:
                append(self._index, _sealed(next_start).encode())
        return window

    def _tasks(self, window: int, cursors: list[list[int]]) -> Iterator[Task]:
        """The rows of a window, source by source; moves the cursors."""
        for source, (first, stop) in enumerate(draw_counts(self._quotas, window)):
            for at in range(first, stop, CHUNK):
                if self._closed.is_set():
                    raise RuntimeError("the stream is closed")
                yield source, self._read(source, cursors[source], min(CHUNK, stop - at))

    def _read(self, source: int, cursor: list[int], count: int) -> list[Row | Problem]:
        """The next rows of a source; moves the cursor, over the end to the beginning where it must."""
        path = self._config.train[source].path
        rows: list[Row | Problem] = []
        while True:
            reader = self._readers[source]
            if reader is None or reader[0] != cursor:
                reader = [*cursor], read_rows(path, skip=cursor[1], stream=True)
            found = list(islice(reader[1], count - len(rows)))
            rows += found
            cursor[1] += len(found)
            self._readers[source] = [*cursor], reader[1]
            if len(rows) == count:
                return rows
            if cursor[1] == 0:
                raise no_rows(path)
            cursor[:] = cursor[0] + 1, 0


def _examples_in_row(window: _Window, at: int) -> np.ndarray:
    row = window.order[at]
    return window.plan.examples[slice(*window.plan.row_starts[row : row + 2])]


def _row_crc(window: _Window, at: int) -> int:
    crc = 0
    for index in _examples_in_row(window, at):
        example = window.dataset.example(index)
        crc = zlib.crc32(example.loss_weights.tobytes(), zlib.crc32(example.tokens.tobytes(), crc))
    return crc


def _fingerprint(config: DataConfig, encoder: ChatEncoder, tokenizer_files_key: str) -> dict[str, Any]:
    """What the stream is made of, files by their names and sizes: they are too large to read them all for a hash."""
    described: dict[str, Any] = {
        "tokenizer": tokenizer_files_key,
        "seq_len": config.seq_len,
        "overlong": config.overlong,
        "shuffle_buffer": config.shuffle_buffer,
        "stream": [
            [source.format, source.columns, source.roles, source.weight, *_files(source.path)]
            for source in config.train
        ],
    } | encoder.settings
    described |= {"keys": [source.keys for source in config.train]} if any(s.keys for s in config.train) else {}
    described |= {"ignore_keys": sorted(config.ignore_keys)} if config.ignore_keys else {}
    described |= {"input_heading": heading} if (heading := input_heading(config)) else {}
    return {f"data: {name}": digest(value) for name, value in described.items()}


def _files(path: str) -> Sequence[Any]:
    return [path] if is_hub(path) else [[file.name, file.stat().st_size] for file in source_files(path)]


def _sealed(value: Any) -> str:
    """A line of an index: its CRC-32, and JSON."""
    text = json.dumps(value)
    return f"{zlib.crc32(text.encode()):08x} {text}\n"


def _whole_lines(path: pathlib.Path) -> list[Any]:
    """The lines of an index up to the first that is damaged, such as one that was being written when it was cut off."""
    lines: list[Any] = []
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if not path.is_file():  # Reading a pipe would not end.
            return lines
        for line in path.read_bytes().split(b"\n")[:-1]:
            value = json.loads(line[9:])
            if _sealed(value).encode() != line + b"\n":
                break
            lines.append(value)
    return lines


def _starts(lines: list[Any], num_sources: int) -> list[_Start]:
    """Where windows begin, as far as the lines say that."""
    starts: list[_Start] = []
    for line in lines:
        match line:
            case [int(first_row), list(cursors), dict(counts)]:
                pairs = [cursor for cursor in cursors if isinstance(cursor, list) and len(cursor) == 2]
                are_numbers = all(type(number) is int and number >= 0 for pair in pairs for number in pair)
                if len(pairs) != len(cursors) or len(cursors) != num_sources or not are_numbers:
                    break
                if counts.keys() != _NOTHING.keys() or first_row < (starts[-1].first_row if starts else 0):
                    break
                starts.append(_Start(first_row, cursors, counts))
            case _:
                break
    return starts if starts and starts[0] == _Start(0, [[0, 0]] * num_sources, _NOTHING) else []
