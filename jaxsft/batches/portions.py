"""Some hundred rows at a time become examples, and what became of every row is counted.

In: rows, good and bad, and a `Recipe`. Out: a `Portion`: the arrays of the examples that are kept, and counts in which
no row and no token is missing. Portions are made in any process and added up in order by a `Tally`.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxsft.batches.lengths import fit_length
from jaxsft.chat.encoder import ChatEncoder, MaskError
from jaxsft.rows import formats
from jaxsft.rows.items import Conversation, Item
from jaxsft.rows.messages import Spelling
from jaxsft.rows.sources import DataError, Problem, Row, bad_rows

PERCENTILES = (5, 25, 50, 75, 95, 99)
NUM_LISTED = 10
"""Bad rows that are shown with their reason; of all others only the code is kept."""
MOST_SKIPPED = 0.01
"""Share of bad rows above which a source is not what it was thought to be."""
UNCLEAR = ("unknown-flag",)
"""Codes of rows about which the config must say something: leaving some out would not make the others right."""
UNTRAINED = "nothing-trained"
"""Code of rows whose weights or flags leave nothing to train."""


class Recipe(NamedTuple):
    """All that makes examples of rows; can be sent to another process."""

    encoder: ChatEncoder
    format: str
    columns: Mapping[str, str]
    spelling: Spelling
    trained_roles: Sequence[str] | None
    """A row without a turn of these is bad; None: any will do."""
    seq_len: int
    overlong: str | None
    refused: Collection[str] = ()
    """Columns that no row may have."""


class Portion(NamedTuple):
    """The examples of some rows: example i of the portion is `tokens[sum(lengths[:i]):sum(lengths[:i + 1])]`."""

    num_rows: int
    problems: list[Problem]
    """One for each bad row."""
    refused: list[Problem]
    """Examples that are too long where `data.overlong` is "error"."""
    tokens: np.ndarray
    loss_weights: np.ndarray
    writers: np.ndarray
    lengths: np.ndarray
    """int64 [num_examples]"""
    origins: list[str]
    """Of the row of each example."""
    items: np.ndarray
    """int64 [num_examples]: which conversation or document of the portion it was made from."""
    num_items: int
    num_kept_rows: int
    """Rows of which at least one example is kept."""
    num_dropped_rows: int
    """Good rows of which none is kept."""
    encoded_lengths: np.ndarray
    """int64: tokens of each example before any was dropped or cut."""
    longest_origin: str
    num_extra_pieces: int
    """Pieces of examples that were split, beyond the first of each."""
    dropped: dict[str, list[int]]
    """Reason -> [examples, tokens]."""
    cut: dict[str, list[int]]
    """Reason -> [examples, tokens that were cut off]."""
    counts: dict[str, int]
    unread_keys: dict[str, int]
    """Keys of messages that nobody reads, and how many messages have them."""

    @property
    def num_trained(self) -> int:
        """Tokens that are trained as a target; the first one of an example is nobody's."""
        firsts = np.cumsum(self.lengths) - self.lengths
        return int(np.count_nonzero(self.loss_weights)) - int(np.count_nonzero(self.loss_weights[firsts]))


def convert_row(row: Row | Problem, recipe: Recipe) -> list[Item] | Problem:
    """What a row says."""
    if isinstance(row, Problem):
        return row
    return formats.convert(
        row,
        recipe.format,
        columns=recipe.columns,
        spelling=recipe.spelling,
        trained_roles=recipe.trained_roles,
        refused=recipe.refused,
    )


def encode_rows(recipe: Recipe, rows: Sequence[Row | Problem]) -> Portion:
    """The examples of some rows, in order.

    A row is bad as a whole: where one conversation of it cannot be used, none of it is.
    """
    problems: dict[int, Problem] = {}
    items: list[Item] = []
    rows_of_items: list[int] = []
    for at, row in enumerate(rows):
        found = convert_row(row, recipe)
        if isinstance(found, Problem):
            problems[at] = found
        else:
            items += found
            rows_of_items += [at] * len(found)
    results = recipe.encoder.encode(items)
    for at, item, result in zip(rows_of_items, items, results, strict=True):
        if isinstance(result, MaskError):
            problems.setdefault(at, Problem(result.code, item.origin, str(result)))

    tokens, loss_weights, writers, origins, item_numbers, refused = [], [], [], [], [], []
    lengths: list[int] = []
    dropped: dict[str, list[int]] = {}
    cut: dict[str, list[int]] = {}
    counts: dict[str, int] = {}
    unread_keys: dict[str, int] = {}
    for item in items:
        if isinstance(item, Conversation) and item.unread_keys:
            unread_keys = added_counts(unread_keys, item.unread_keys)
    num_extra_pieces = num_items = 0
    longest = (0, "")
    encoded_lengths: list[int] = []
    kept_rows, good_rows = set(), set()
    for at in [at for at, problem in problems.items() if problem.code == UNTRAINED]:
        # Nothing is wrong with a row whose own flags say so.
        del problems[at]
        good_rows.add(at)
        encoded_lengths.append(0)
        _count(dropped, "not to be trained, as the row says", 0)
    untrained = frozenset(good_rows)
    for at, result in zip(rows_of_items, results, strict=True):
        if at in problems or at in untrained:
            continue
        good_rows.add(at)
        assert not isinstance(result, MaskError), "its row is bad"
        for encoded in result:
            fitted = fit_length(encoded, recipe.seq_len, recipe.overlong)
            length = len(encoded.example.tokens)
            encoded_lengths.append(length)
            if length > longest[0]:
                longest = (length, encoded.origin)
            for loss in fitted.dropped:
                _count(dropped, loss.reason, loss.tokens)
            if fitted.cut:
                _count(cut, fitted.cut.reason, fitted.cut.tokens)
            if fitted.is_refused:
                refused.append(Problem("overlong", encoded.origin, f"{length} tokens"))
            for name, count in encoded.counts.items():
                counts[name] = counts.get(name, 0) + count
            num_pieces = len(fitted.spans) + len(fitted.dropped)
            num_extra_pieces += num_pieces - 1
            for start, end in fitted.spans:
                kept_rows.add(at)
                lengths.append(end - start)
                tokens.append(encoded.example.tokens[start:end])
                loss_weights.append(encoded.example.loss_weights[start:end])
                writers.append(encoded.writers[start:end])
                origins.append(encoded.origin)
                item_numbers.append(num_items)
        num_items += 1
    assert len(problems) + len(good_rows) == len(rows), "a row gave neither an example nor a reason"
    portion = Portion(
        len(rows),
        list(problems.values()),
        refused,
        _joined(tokens, np.int32),
        _joined(loss_weights, np.float32),
        _joined(writers, np.uint8),
        np.array(lengths, np.int64),
        origins,
        np.array(item_numbers, np.int64),
        num_items,
        len(kept_rows),
        len(good_rows - kept_rows),
        np.array(encoded_lengths, np.int64),
        longest[1],
        num_extra_pieces,
        dropped,
        cut,
        counts,
        unread_keys,
    )
    _check(portion)
    return portion


def _count(counts: dict[str, list[int]], reason: str, tokens: int) -> None:
    examples_and_tokens = counts.setdefault(reason, [0, 0])
    examples_and_tokens[0] += 1
    examples_and_tokens[1] += tokens


def _joined(arrays: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.zeros(0, dtype)


def _check(portion: Portion) -> None:
    """No row, no example and no token may vanish uncounted."""
    bad, kept = len(portion.problems), portion.num_kept_rows
    assert portion.num_rows == kept + bad + portion.num_dropped_rows, "rows"
    dropped_examples, dropped_tokens = _sums(portion.dropped)
    examples = len(portion.encoded_lengths) + portion.num_extra_pieces
    assert examples == len(portion.lengths) + dropped_examples, "examples"
    tokens = len(portion.tokens) + dropped_tokens + _sums(portion.cut)[1]
    assert int(portion.encoded_lengths.sum()) == tokens, "tokens"


def _sums(counts: Mapping[str, Sequence[int]]) -> tuple[int, int]:
    return sum(each[0] for each in counts.values()), sum(each[1] for each in counts.values())


class Tally:
    """What became of all rows so far."""

    def __init__(self) -> None:
        self.rows = self.kept_rows = self.dropped_rows = self.items = self.examples = 0
        self.tokens = self.trained_tokens = self.encoded_examples = self.encoded_tokens = 0
        self.bad_rows: dict[str, int] = {}
        self.dropped: dict[str, list[int]] = {}
        self.cut: dict[str, list[int]] = {}
        self.counts: dict[str, int] = {}
        self.unread_keys: dict[str, int] = {}
        self.longest: tuple[int, str] = (0, "")
        self.problems: list[Problem] = []
        self.refused: list[Problem] = []

    def add(self, portion: Portion) -> None:
        self.rows += portion.num_rows
        self.kept_rows += portion.num_kept_rows
        self.dropped_rows += portion.num_dropped_rows
        self.items += portion.num_items
        self.examples += len(portion.lengths)
        self.tokens += len(portion.tokens)
        self.trained_tokens += portion.num_trained
        self.encoded_examples += len(portion.encoded_lengths)
        self.encoded_tokens += int(portion.encoded_lengths.sum())
        for problem in portion.problems:
            self.bad_rows[problem.code] = self.bad_rows.get(problem.code, 0) + 1
        for mine, theirs in ((self.dropped, portion.dropped), (self.cut, portion.cut)):
            for reason, (examples, tokens) in theirs.items():
                before = mine.get(reason, [0, 0])
                mine[reason] = [before[0] + examples, before[1] + tokens]
        for name, count in portion.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
        self.unread_keys = added_counts(self.unread_keys, portion.unread_keys)
        if len(portion.encoded_lengths) and portion.encoded_lengths.max() > self.longest[0]:
            self.longest = int(portion.encoded_lengths.max()), portion.longest_origin
        for listed, new in ((self.problems, portion.problems), (self.refused, portion.refused)):
            for problem in new:
                listed.append(problem if len(listed) < NUM_LISTED else problem._replace(reason=""))
        assert self.rows == self.kept_rows + self.dropped_rows + sum(self.bad_rows.values()), "rows"

    @property
    def num_bad_rows(self) -> int:
        return sum(self.bad_rows.values())

    def check(self, on_bad_row: str, seq_len: int, *, before: tuple[int, int] = (0, 0), least_rows: int = 0) -> None:
        """Raises for what the user does not want to be left out silently.

        Args:
            on_bad_row: "error" or "skip".
            seq_len: for the message.
            before: rows, and bad ones of them, that were counted elsewhere before.
            least_rows: the share of bad rows is that of at least so many, where more rows are to come.

        Raises:
            DataError: bad rows that are not to be skipped or are too many, or examples that are refused as too long.
        """
        if self.problems and on_bad_row == "error":
            raise bad_rows(self.problems, "bad")
        if unclear := [problem for problem in self.problems if problem.code in UNCLEAR]:
            raise bad_rows(unclear, "unclear (data.on_bad_row does not skip such rows)")
        rows, bad = self.rows + before[0], self.num_bad_rows + before[1]
        if self.problems and bad > MOST_SKIPPED * max(rows, least_rows):
            raise DataError(
                f"{bad:,} of {rows:,} rows are bad, more than the {MOST_SKIPPED:.0%} that data.on_bad_row=skip allows; "
                f"{bad_rows(self.problems, 'bad')}"
            )
        if self.refused:
            raise bad_rows(self.refused, f"overlong (data.seq_len is {seq_len}, data.overlong is 'error')")

    def report(self) -> dict[str, Any]:
        """All counts as plain JSON."""
        return {
            "rows": self.rows,
            "kept_rows": self.kept_rows,
            "bad_rows": dict(sorted(self.bad_rows.items())),
            "dropped_rows": self.dropped_rows,
            "items": self.items,
            "encoded": {"examples": self.encoded_examples, "tokens": self.encoded_tokens},
            "examples": self.examples,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "dropped": {reason: {"examples": n, "tokens": t} for reason, (n, t) in sorted(self.dropped.items())},
            "cut": {reason: {"examples": n, "tokens": t} for reason, (n, t) in sorted(self.cut.items())},
            "counts": dict(sorted(self.counts.items())),
            "keys_ignored": dict(sorted(self.unread_keys.items())),
            "longest": {"tokens": self.longest[0], "origin": self.longest[1]},
        }


def nothing_left(path: str, report: Mapping[str, Any], seq_len: int, shortest: int) -> DataError:
    """The error of a source of which no example is kept."""
    reasons = ", ".join(f"{each['examples']:,} {reason}" for reason, each in report["dropped"].items())
    return DataError(
        f"{path}: no example is left of {report['rows']:,} rows (dropped: {reasons or 'none'}; data.seq_len={seq_len}, "
        f"the shortest example has {shortest} tokens)"
    )


def percentiles(lengths: np.ndarray) -> dict[str, int]:
    lengths = lengths[lengths > 0]  # A row that is not to be trained has none.
    return {str(p): int(np.percentile(lengths, p)) for p in PERCENTILES} if len(lengths) else {}


def merged_reports(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The reports of several sources as one: counts added up, texts joined; the longest example of all."""
    merged = merged_descriptions(reports)
    for key in ("rows", "kept_rows", "dropped_rows", "items", "examples", "tokens", "trained_tokens"):
        merged[key] = sum(report[key] for report in reports)
    for key in ("bad_rows", "counts", "keys_ignored", "dropped", "cut"):
        for report in reports:
            merged[key] = added_counts(merged.get(key, {}), report[key])
    merged["longest"] = max((report["longest"] for report in reports), key=lambda each: each["tokens"])
    merged["length_percentiles"] = reports[0]["length_percentiles"] if len(reports) == 1 else {}
    return merged


def merged_descriptions(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What reports say in words."""
    merged: dict[str, Any] = {
        key: ", ".join(dict.fromkeys(report[key] for report in reports)) for key in ("path", "format", "format_reason")
    }
    return merged | {
        key: list(dict.fromkeys(each for report in reports for each in report[key]))
        for key in ("columns_ignored", "notes")
    }


def added_counts(one: Any, other: Any) -> Any:
    """Counts by name, or lists of counts, or such by name, added up."""
    if isinstance(one, Mapping):
        return {
            name: added_counts(one[name], other[name]) if name in one and name in other else {**one, **other}[name]
            for name in {**one, **other}
        }
    return [a + b for a, b in zip(one, other, strict=True)] if isinstance(one, list) else one + other
