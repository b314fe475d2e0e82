"""What a run will train, for the eye: examples token by token, and what became of the rows.

In: a loader and its dataset. Out: a plain `Preview`, for the terminal, the page and `--json`. Weights of tokens are
traced back from the batches that the devices get, not from the mask code, so the picture shows what is really trained.
Needs neither the weights of a model nor an accelerator.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from jaxsft.batch import Batch
from jaxsft.batches.loader import Loader
from jaxsft.batches.mixture import Dataset
from jaxsft.batches.portions import merged_reports
from jaxsft.batches.stream import StreamLoader
from jaxsft.chat.control import Tokenizer
from jaxsft.preview import reports
from jaxsft.preview.choice import Choice, choose, ends_in_stop
from jaxsft.preview.pieces import injections, make_pieces
from jaxsft.preview.records import Example, Gap, Preview, Row, Segment, Totals
from jaxsft.preview.row_lengths import row_lengths

MOST_TOKENS = 40_000
"""Tokens that are shown one by one, in all: a page that a browser opens and a mailbox takes."""
MOST_RUNS = 60
"""Stretches of a segment that are listed one by one."""
MOST_NOTES = 50


def make_preview(
    loader: Loader | StreamLoader,
    dataset: Dataset,
    tokenizer: Tokenizer,
    *,
    stops: Sequence[int],
    title: str,
    notes: Sequence[str] = (),
    num_examples: int = 16,
) -> Preview:
    """The first examples in the order in which step 0 trains them, one of each other kind, and the report of the data.

    Args:
        loader: of `dataset`; of a stream, the first window is shown.
        dataset: the examples and their reports.
        tokenizer: that made them.
        stops: what `stops.stop_ids` says.
        title: such as the run's name.
        notes: on the tokenizer, beside those on the template.
        num_examples: how many of step 0 are shown token by token.
    """
    choices = choose(loader, dataset, tokenizer, stops=stops, num_first=num_examples)
    numbers: dict[int, int] = {}
    for number, choice in enumerate(choices.shown, start=1):
        numbers.setdefault(choice.example, number)
    rows = _Rows(loader, dataset, numbers)
    most = _fair_share(dataset.lengths[[choice.example for choice in choices.shown]].tolist(), MOST_TOKENS)
    examples = tuple(
        _example(number, choice, dataset, tokenizer, rows=rows, numbers=numbers, stops=stops, most=most)
        for number, choice in enumerate(choices.shown, start=1)
    )
    report = merged_reports([source.report for source in dataset.sources])
    return Preview(
        title,
        isinstance(loader, StreamLoader),
        loader.shape[1],
        loader.shape[0],
        _totals(loader, dataset),
        reports.sources(dataset, choices.drawn),
        reports.losses(report, loader.shape[1]),
        reports.counts(report),
        tuple(dict.fromkeys([*notes, *report["notes"]]))[:MOST_NOTES],
        reports.length_bars(dataset),
        row_lengths(
            [source.lengths for source in dataset.sources],
            [float(draws) for draws in dataset.draws],
            seq_len=loader.shape[1],
            packing=loader.is_packed,
        ),
        tuple(rows.made),
        examples,
    )


def _fair_share(lengths: Sequence[int], total: int) -> int:
    """The most tokens of each so that all together are at most `total`: short ones whole, long ones alike.

    _fair_share([10, 100, 100], 110) is 50.
    """
    ascending = sorted(lengths)
    for index, length in enumerate(ascending):
        left = len(ascending) - index
        if length * left > total:
            return total // left
        total -= length
    return max(ascending, default=0)


class _Rows:
    """Rows of batches, each built once, and checked: what is read off them is what a loss sees."""

    def __init__(self, loader: Loader | StreamLoader, dataset: Dataset, numbers: dict[int, int]) -> None:
        self._loader, self._dataset, self._numbers = loader, dataset, numbers
        self._indices: dict[tuple[int, int], int] = {}
        self._weights: list[list[np.ndarray]] = []
        self.made: list[Row] = []

    def trained(self, choice: Choice) -> tuple[int | None, np.ndarray]:
        """The index of an example's row, and the weights of its tokens."""
        if choice.place is None:
            return None, np.array(self._dataset.example(choice.example).loss_weights)
        step, row, row_id, segment = choice.place
        index = self._indices.get((step, row))
        if index is None:
            index = self._indices[step, row] = len(self.made)
            self._make(step, row, row_id)
        return index, self._weights[index][segment - 1]

    def _make(self, step: int, row: int, row_id: int) -> None:
        batch = self._loader.batch(step, slice(row, row + 1))
        _check_batch(batch)
        segments, weights_of_segments = [], []
        for segment, example in enumerate(self._loader.examples_in_row(row_id).tolist(), start=1):
            weights = _weights(batch, segment, example, self._dataset)
            weights_of_segments.append(weights)
            trained = int(np.count_nonzero(weights))
            segments.append(
                Segment(example, self._numbers.get(example), len(weights), trained, _runs(weights != 0, trained))
            )
        assert batch.segment_ids.max() == len(segments), "the row holds an example that the loader does not name"
        padding = int(np.count_nonzero(batch.segment_ids == 0))
        self.made.append(Row(step, row + 1, tuple(segments), padding))
        self._weights.append(weights_of_segments)


def _check_batch(batch: Batch) -> None:
    """Each weight belongs to the next token of its segment."""
    same = np.zeros(batch.tokens.shape, bool)
    same[:, :-1] = (batch.segment_ids[:, :-1] == batch.segment_ids[:, 1:]) & (batch.segment_ids[:, :-1] > 0)
    following = np.roll(batch.tokens, -1, axis=1)
    assert (batch.loss_weights[~same] == 0).all(), "a weight on the first token of a segment, or on padding"
    assert (batch.targets == following)[same].all(), "a target is not the next token of its segment"


def _weights(batch: Batch, segment: int, example: int, dataset: Dataset) -> np.ndarray:
    """The weights of a segment of a row, traced back from targets to tokens.

    With the batch of `Batch`'s worked example, segment 1: loss_weights `[1, 1, 0]` are those of the targets `b`, `c`
    and of none, so the tokens `a b c` have weights `[0, 1, 1]`.
    """
    (at,) = np.nonzero(batch.segment_ids[0] == segment)
    tokens = batch.tokens[0, at]
    weights = np.concatenate([[0.0], batch.loss_weights[0, at[:-1]]])
    assert len(at) and at[-1] - at[0] + 1 == len(at), "a segment is one block"
    assert (batch.positions[0, at] == np.arange(len(at))).all(), "positions restart in each segment"
    expected = dataset.example(example)
    assert np.array_equal(tokens, expected.tokens), f"segment {segment} is not example {example}"
    assert np.array_equal(weights[1:], expected.loss_weights[1:]), f"the batch trains other tokens of example {example}"
    return weights


def _runs(trained: np.ndarray, num_trained: int) -> tuple[int, ...]:
    """Lengths of stretches, untrained and trained in turn: `[0, 0, 1, 1, 0]` is (2, 2, 1)."""
    lengths = [len(list(run)) for _, run in itertools.groupby(trained.tolist())]
    if len(lengths) > MOST_RUNS:
        return len(trained) - num_trained, num_trained
    return tuple(([0] if len(trained) and trained[0] else []) + lengths)


def _example(
    number: int,
    choice: Choice,
    dataset: Dataset,
    tokenizer: Tokenizer,
    *,
    rows: _Rows,
    numbers: dict[int, int],
    stops: Sequence[int],
    most: int,
) -> Example:
    """An example with at most so many tokens; of a long one, beginning and end."""
    row, weights = rows.trained(choice)
    source, at = dataset.locate(choice.example)
    index = next(index for index, each in enumerate(dataset.sources) if each is source)
    first = choice.example - at  # of the source, in the dataset
    siblings = source.siblings(at)
    tokens, writers = source.example(at).tokens.tolist(), dataset.writers(choice.example).tolist()
    weight_list = weights.tolist()
    head, tail = len(tokens), len(tokens)
    gap = None
    if len(tokens) > most:
        head, tail = most * 2 // 3, len(tokens) - (most - most * 2 // 3)
    pieces = make_pieces(tokens[:head], weight_list, writers, tokenizer, stops=stops)
    if tail > head:
        gap = Gap(head, tail - head, int(np.count_nonzero(weights[head:tail])))
        pieces += make_pieces(tokens, weight_list, writers, tokenizer, stops=stops, start=tail)
    return Example(
        number,
        choice.example,
        index,
        source.origin(at),
        choice.reasons,
        row,
        choice.place and choice.place.segment,
        tuple(numbers[first + each] for each in siblings if first + each in numbers) if len(siblings) > 1 else (),
        len(siblings),
        len(tokens),
        int(np.count_nonzero(weights)),
        gap,
        injections(pieces, tokenizer),
        bool(source.report["counts"].get("appended_stops")) and ends_in_stop(source, at, stops),
        pieces,
    )


def _totals(loader: Loader | StreamLoader, dataset: Dataset) -> Totals:
    batch = loader.batch(0)
    _check_batch(batch)
    report = merged_reports([source.report for source in dataset.sources])
    drawn_tokens = sum(
        float(draws) * float(source.lengths.mean())
        for source, draws in zip(dataset.sources, dataset.draws, strict=True)
    )
    positions = loader.num_rows * loader.shape[1]
    return Totals(
        report["rows"],
        sum(report["bad_rows"].values()),
        report["examples"],
        report["tokens"],
        report["trained_tokens"],
        loader.num_rows,
        float(sum(dataset.draws)),
        loader.fill if isinstance(loader, Loader) else drawn_tokens / positions,
        loader.steps_per_epoch,
        int(batch.segment_ids.max(axis=1).sum()),
        int(np.count_nonzero(batch.segment_ids)),
        int(np.count_nonzero(batch.loss_weights)),
        batch.tokens.size,
    )
