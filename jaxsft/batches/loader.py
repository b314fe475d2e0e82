"""`batch(step)`: which tokens every step trains on, as a pure function.

In: prepared sources and what an epoch draws from them. Out: numpy batches of exactly the rows asked for. Placing
batches on devices is left to the caller.
"""

import math
import queue
import threading
import zlib
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from jaxsft.batch import Batch, Example, count_segments
from jaxsft.batches.mixture import Dataset, epoch_examples
from jaxsft.batches.packing import PackingPlan, permutation, plan

T = TypeVar("T")


class _Epoch(NamedTuple):
    """The rows of an epoch; row r holds `examples[plan.examples[...]]`."""

    number: int
    examples: np.ndarray
    """int64 [num_draws]: examples of the dataset."""
    plan: PackingPlan
    """How the draws are packed."""


class Loader:
    """The batches of a run: everything here is a pure function of the arguments below and of `step`.

    Where every epoch draws the same examples, rows are packed once, and each epoch goes through all of them in its own
    order; otherwise each epoch packs rows of its own, whose numbers go on where those of the epoch before end. Where
    the last batch of an epoch has rows left over, they are padding.
    """

    def __init__(
        self, dataset: Dataset, *, seq_len: int, batch_size: int, seed: int, packing: bool, shuffle: bool = True
    ) -> None:
        self._dataset, self._lengths, self._packing = dataset, dataset.lengths, packing
        self._seq_len, self._batch_size, self._seed, self._shuffle = seq_len, batch_size, seed, shuffle
        self._is_same_each_epoch = dataset.is_same_each_epoch
        self._planned: tuple[_Epoch, ...] = ()
        # For the epochs that were looked at so far, the number of their first row: epoch e has the rows from [e] to [e
        # + 1] - 1.
        self._row_bounds = [0]
        self._step_bounds = [0]
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))
        self._built: tuple[int, dict[tuple[int, int], Batch]] = (-1, {})
        self._most_segments = [0]  # of a row, over the epochs up to each
        self._promised_segments: int | None = None
        self._extend()

    @property
    def dataset(self) -> Dataset:
        return self._dataset

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What must be equal for a run to be continued."""
        return self._dataset.fingerprint

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T) of every batch."""
        return self._batch_size, self._seq_len

    @property
    def num_rows(self) -> int:
        """Packed rows of the first epoch, padding rows not counted."""
        return self._row_bounds[1]

    @property
    def fill(self) -> float:
        """Share of the positions of the first epoch's rows that hold tokens."""
        return float(self._lengths[self._plan(0).examples].sum()) / (self.num_rows * self._seq_len)

    @property
    def is_packed(self) -> bool:
        return self._packing

    @property
    def is_same_each_epoch(self) -> bool:
        return self._is_same_each_epoch

    @property
    def steps_per_epoch(self) -> int:
        """Steps of the first epoch; later epochs differ by a step or so where their examples do."""
        return self._step_bounds[1]

    def num_steps(self, epochs: float) -> int:
        """Steps of so many epochs."""
        if self._is_same_each_epoch:
            # Rounded first: 1.1 * 50 is a little more than 55 in floating point.
            return math.ceil(round(epochs * self.steps_per_epoch, 6))
        whole, part = divmod(epochs, 1)
        while len(self._step_bounds) < whole + 2:
            self._extend()
        first, end = self._step_bounds[int(whole) : int(whole) + 2]
        return first + math.ceil(round(part * (end - first), 6))

    def most_segments(self, num_steps: int) -> int:
        """Examples in a row at most, and what fills it up counted as one more, over so many steps.

        From now on `batch` makes no row that has more.
        """
        last = 0 if self._is_same_each_epoch else self._epoch_of_step(max(num_steps, 1) - 1)[0]
        self._promised_segments = self._most_segments[last + 1]
        return self._promised_segments

    def epochs_done(self, step: int) -> float:
        """Epochs before a step."""
        if self._is_same_each_epoch:
            return step / self.steps_per_epoch
        epoch, index = self._epoch_of_step(step)
        return epoch + index / max(self._step_bounds[epoch + 1] - self._step_bounds[epoch], 1)

    def row_ids(self, step: int) -> np.ndarray:
        """Which packed rows step trains on, int64 [batch_size]; -1 is a row of padding.

        5 rows in batches of 2, unshuffled: step 0 has `[0, 1]`, step 2 has `[4, -1]`, step 3 has `[0, 1]` again, or
        `[5, 6]` where each epoch packs rows of its own.
        """
        epoch, index = self._epoch_of_step(step)
        ids = self._epoch_order(epoch)[index * self._batch_size : (index + 1) * self._batch_size]
        if not self._is_same_each_epoch:
            ids = ids + self._row_bounds[epoch]
        return np.pad(ids, (0, self._batch_size - len(ids)), constant_values=-1)

    def rows_crc(self, start: int, stop: int) -> int:
        """CRC-32 of the row ids of steps `start` to `stop - 1`: equal where two runs trained on the same rows."""
        crc = 0
        for step in range(start, stop):
            crc = zlib.crc32(self.row_ids(step).astype("<i8").tobytes(), crc)
        return crc

    def examples_in_row(self, row: int) -> np.ndarray:
        """The examples of a packed row in order, int64; none for -1."""
        if row < 0:
            return np.zeros(0, np.int64)
        number = 0 if self._is_same_each_epoch else int(np.searchsorted(self._row_bounds, row, side="right")) - 1
        epoch = self._plan(number)
        row -= self._row_bounds[number]
        return epoch.examples[epoch.plan.examples[slice(*epoch.plan.row_starts[row : row + 2])]]

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
            ids = self.row_ids(step)[start:stop]
            examples = [[self._dataset.example(index) for index in self.examples_in_row(int(row))] for row in ids]
            batch = make_batch(examples, self._seq_len)
            _check_segments(batch, self._promised_segments, step)
            built[start, stop] = batch
        return built[start, stop]

    def rows_so_far(self, step: int) -> dict[str, int]:
        """Nothing to tell: what became of the rows is known before the first step. See `StreamLoader`."""
        return {}

    def close(self) -> None:
        """Nothing to end. See `StreamLoader`."""

    def _epoch_of_step(self, step: int) -> tuple[int, int]:
        """The epoch of a step, and its number there."""
        if self._is_same_each_epoch:
            return divmod(step, self.steps_per_epoch)
        while self._step_bounds[-1] <= step:
            self._extend()
        epoch = int(np.searchsorted(self._step_bounds, step, side="right")) - 1
        return epoch, step - self._step_bounds[epoch]

    def _extend(self) -> None:
        """Looks at one more epoch."""
        epoch = self._plan(len(self._row_bounds) - 1)
        num_rows = len(epoch.plan.row_starts) - 1
        self._row_bounds.append(self._row_bounds[-1] + num_rows)
        self._step_bounds.append(self._step_bounds[-1] + -(-num_rows // self._batch_size))
        lengths = self._lengths[epoch.examples[epoch.plan.examples]]
        tokens = np.add.reduceat(lengths, epoch.plan.row_starts[:-1]) if num_rows else np.zeros(0)
        segments = np.diff(epoch.plan.row_starts) + (tokens < self._seq_len)
        self._most_segments.append(max(self._most_segments[-1], int(segments.max(initial=1))))

    def _plan(self, number: int) -> _Epoch:
        """The rows of an epoch; the latest two are kept, for who reads ahead and who looks back."""
        for epoch in self._planned:
            if epoch.number == number:
                return epoch
        examples = epoch_examples(self._dataset, seed=self._seed, epoch=number)
        seed = self._seed if self._is_same_each_epoch else derived_seed(self._seed, 4, number)
        planned = plan(self._lengths[examples], self._seq_len, seed=seed, packing=self._packing)
        epoch = _Epoch(number, examples, planned)
        self._planned = (*self._planned[-1:], epoch)
        return epoch

    def _epoch_order(self, epoch: int) -> np.ndarray:
        num_rows = self.num_rows
        if not self._is_same_each_epoch:
            num_rows = self._row_bounds[epoch + 1] - self._row_bounds[epoch]
        if not self._shuffle:
            return np.arange(num_rows)
        known, order = self._order
        if known != epoch:
            order = permutation(num_rows, seed=(self._seed, 2, epoch))
            self._order = (epoch, order)
        return order


def derived_seed(*parts: int) -> int:
    """One number made of several; other numbers give another one."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


def make_batch(rows: Sequence[Sequence[Example]], seq_len: int) -> Batch:
    """Rows of examples as a batch, read-only; see `Batch` for the worked example that this follows."""
    shape = (len(rows), seq_len)
    batch = Batch(*(np.zeros(shape, dtype) for dtype in (np.int32, np.int32, np.float32, np.int32, np.int32)))
    for row, examples in enumerate(rows):
        at = 0
        for segment, (tokens, loss_weights) in enumerate(examples, start=1):
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


def _check_segments(batch: Batch, most: int | None, step: int) -> None:
    """Attention may be compiled for so many segments: of more, two would be taken for one (`model/cudnn.py`)."""
    if most is None or not len(batch.segment_ids):
        return
    if (found := int(count_segments(batch.segment_ids).max())) > most:
        raise RuntimeError(f"step {step}: a row has {found} segments, and {most} at most were expected")


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
