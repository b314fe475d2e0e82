"""Which examples are worth a look: those of the first step, and one of each kind that the data has.

In: the loader and its dataset. Out: examples with the reasons to show them, and the place in a batch where each is
first trained. Nothing here decodes more than it must: the data may have a million examples.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxsft.batches.loader import Loader
from jaxsft.batches.mixture import Dataset
from jaxsft.batches.prepare import Prepared
from jaxsft.batches.stream import StreamLoader
from jaxsft.chat.control import Tokenizer
from jaxsft.chat.encoder import WRITERS

MOST_ROWS = 50_000
"""Rows of the first epoch that are looked through."""
MOST_TOKENS = 1 << 24
"""Tokens of a source that are looked through for a kind of token."""
MOST_DECODED = 2_000
"""Examples of a source that are decoded to find a text in them."""
MOST_SIBLINGS = 4
MOST_SOURCES = 24


class Place(NamedTuple):
    """Where an example is trained for the first time."""

    step: int
    row: int
    """Number within the step's batch, from 0."""
    row_id: int
    """What the loader calls that row."""
    segment: int
    """Within the row, from 1: its segment id."""


class Choice(NamedTuple):
    """An example to show."""

    example: int
    """Number in the dataset."""
    place: Place | None
    """None: not in the first epoch, or too late in it to be looked for."""
    reasons: tuple[str, ...]


class Choices(NamedTuple):
    shown: tuple[Choice, ...]
    drawn: tuple[int, ...]
    """Examples of each source in the rows that were looked through."""


def choose(
    loader: Loader | StreamLoader,
    dataset: Dataset,
    tokenizer: Tokenizer,
    *,
    stops: Sequence[int],
    num_first: int,
) -> Choices:
    """The first examples of step 0 in the order trained, then one of each kind that is not among them.

    Args:
        loader: of `dataset`.
        dataset: the examples.
        tokenizer: that made them.
        stops: what `stops.stop_ids` says.
        num_first: examples of step 0.
    """
    first: list[tuple[int, Place]] = []
    for row, row_id in enumerate(loader.row_ids(0)):
        if len(first) >= num_first or row_id < 0 or row_id >= loader.num_rows:
            break
        for segment, example in enumerate(loader.examples_in_row(int(row_id)), start=1):
            first.append((int(example), Place(0, row, int(row_id), segment)))
    del first[num_first:]
    numbers = [example for example, _ in first]
    reasons: dict[int, list[str]] = {}
    for reason, example in _kinds(dataset, tokenizer, stops, numbers):
        reasons.setdefault(example, []).append(reason)
    places, drawn = _survey(loader, dataset, {*reasons} - {*numbers})
    shown = [Choice(example, place, ("step 0", *reasons.get(example, ()))) for example, place in first]
    shown += [
        Choice(example, places.get(example), tuple(why)) for example, why in reasons.items() if example not in numbers
    ]
    return Choices(tuple(shown), drawn)


def _survey(
    loader: Loader | StreamLoader, dataset: Dataset, wanted: set[int]
) -> tuple[dict[int, Place], tuple[int, ...]]:
    """Where the wanted examples are first trained, and how often each source is drawn; of the first epoch."""
    places: dict[int, Place] = {}
    bounds = np.cumsum(dataset.sizes)
    drawn = np.zeros(len(bounds), np.int64)
    num_rows = 0
    for step in range(loader.steps_per_epoch):
        for row, row_id in enumerate(loader.row_ids(step)):
            if not 0 <= row_id < loader.num_rows:  # padding, or a row of a stream's next window
                continue
            examples = loader.examples_in_row(int(row_id))
            drawn += np.bincount(np.searchsorted(bounds, examples, side="right"), minlength=len(bounds))
            num_rows += 1
            for segment, example in enumerate(examples.tolist(), start=1):
                if example in wanted:
                    places.setdefault(example, Place(step, row, int(row_id), segment))
        if num_rows >= MOST_ROWS:
            break
    return places, tuple(drawn.tolist())


def _kinds(
    dataset: Dataset, tokenizer: Tokenizer, stops: Sequence[int], first: Sequence[int]
) -> Iterator[tuple[str, int]]:
    """A reason and an example for each kind that the data has; one of step 0 where there is one."""
    ends = np.cumsum(dataset.sizes).tolist()
    starts = [0, *ends[:-1]]
    firsts = [
        [example - start for example in first if start <= example < end]
        for start, end in zip(starts, ends, strict=True)
    ]
    if len(starts) > 1:
        for number, (start, here) in enumerate(zip(starts, firsts, strict=True), start=1):
            if number <= MOST_SOURCES:
                yield f"source {number}", start + (here[0] if here else 0)
    yield "longest", int(np.argmax(dataset.lengths))
    known: set[str] = set()
    for start, source, here in zip(starts, dataset.sources, firsts, strict=True):
        found = list(_kinds_of_source(source, tokenizer, stops, here))
        yield from ((reason, start + index) for reason, index in found if reason not in known)
        known |= {reason for reason, _ in found}


def _kinds_of_source(
    source: Prepared, tokenizer: Tokenizer, stops: Sequence[int], first: Sequence[int]
) -> Iterator[tuple[str, int]]:
    counts = source.report["counts"]
    siblings = next((source.siblings(index) for index in first if len(source.siblings(index)) > 1), None)
    if siblings is None:
        (same,) = np.nonzero(np.diff(source.origins[:, 2]) == 0)
        siblings = source.siblings(int(same[0])) if len(same) else range(0)
    name = "unrolled" if counts.get("unrolled_examples") else "one of several pieces"
    yield from ((name, index) for index in siblings[:MOST_SIBLINGS])

    def first_with(array: np.ndarray, condition: Callable[[np.ndarray], np.ndarray]) -> int | None:
        for index in first:
            if condition(array[source.offsets[index] : source.offsets[index + 1]]).any():
                return index
        token = _first_token(array, condition)
        return None if token is None else int(np.searchsorted(source.offsets, token, side="right")) - 1

    found = {"partial weight": first_with(source.loss_weights, lambda w: (w != 0) & (w != 1))}
    for writer in ("system", "tool"):
        is_writer = functools.partial(np.equal, WRITERS.index(writer))
        found[f"{writer} text"] = first_with(source.writers, is_writer)
    everywhere = [*first, *np.linspace(0, len(source.lengths) - 1, MOST_DECODED).astype(int).tolist()]
    if counts.get("appended_stops"):
        found["appended stop"] = next((index for index in everywhere if ends_in_stop(source, index, stops)), None)
    if counts.get("split_control_tokens"):
        found["split control token"] = next(
            (index for index in everywhere if _spells_control_token(source, index, tokenizer)), None
        )
    yield from ((reason, index) for reason, index in found.items() if index is not None)


def _first_token(array: np.ndarray, condition: Callable[[np.ndarray], np.ndarray]) -> int | None:
    size = 1 << 20
    for start in range(0, min(len(array), MOST_TOKENS), size):
        (found,) = np.nonzero(condition(array[start : start + size]))
        if len(found):
            return start + int(found[0])
    return None


def ends_in_stop(source: Prepared, index: int, stops: Sequence[int]) -> bool:
    """The last token of an example is a trained stop token, which nobody wrote."""
    last = source.offsets[index + 1] - 1
    return bool(source.tokens[last] in stops and source.loss_weights[last] > 0 and source.writers[last] == 0)


def _spells_control_token(source: Prepared, index: int, tokenizer: Tokenizer) -> bool:
    """Text that somebody wrote, and that is several tokens, reads like a token that is one."""
    span = slice(source.offsets[index], source.offsets[index + 1])
    control = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    tokens = [int(id) for id in source.tokens[span][source.writers[span] != 0] if int(id) not in control]
    text = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return any(content in text for content in control.values())
