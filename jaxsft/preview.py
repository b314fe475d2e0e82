"""What the first step will train, for the eye: tokens coloured by weight, and what became of the rows.

In: a loader and its prepared data. Out: a plain `Preview`, printed here, made a page by `preview_page.py`. Weights
of tokens are traced back from the batch that the devices get, not from the mask code, so the picture shows what is
really trained. Needs neither the weights of a model nor an accelerator.
"""

import itertools
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxsft.batch import Batch
from jaxsft.data.chat import Tokenizer
from jaxsft.data.lengths import TOO_LONG
from jaxsft.data.loader import Loader
from jaxsft.data.mixture import Dataset
from jaxsft.data.portions import merged_reports
from jaxsft.data.stream import StreamLoader

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


class Piece(NamedTuple):
    """A token as text, or the few tokens that hold the bytes of one character."""

    text: str
    """As it is in the data, newlines and all."""
    tokens: tuple[int, ...]
    position: int
    """Of its first token in the segment."""
    weight: float
    """As a target; 0 is context."""
    is_special: bool
    """A token that no text spells, such as `<|im_start|>`."""
    is_stop: bool
    """Ends an answer, and is trained to."""


class Segment(NamedTuple):
    """One example in a row."""

    number: int
    """Within the row, from 1: its segment id."""
    example: int
    """Index in the prepared data."""
    pieces: tuple[Piece, ...]
    num_tokens: int
    num_trained: int


class PreviewRow(NamedTuple):
    """One row of the batch of step 0."""

    number: int
    """Within the batch, from 1."""
    segments: tuple[Segment, ...]
    hidden: tuple[int, ...]
    """Lengths of further segments of the row, which are not shown."""
    num_padding: int


class Fact(NamedTuple):
    """One line of the report."""

    label: str
    value: str
    note: str = ""


class Drop(NamedTuple):
    """Examples left out for one reason."""

    reason: str
    examples: int
    tokens: int
    remedy: str


class Bar(NamedTuple):
    """How many examples have `first` to `last` tokens; `last` is None for all longer ones, which were dropped."""

    first: int
    last: int | None
    num_examples: int


class Preview(NamedTuple):
    """All that is shown."""

    title: str
    seq_len: int
    num_rows: int
    """Rows in a batch, of which `rows` are the first."""
    rows: tuple[PreviewRow, ...]
    headline: tuple[Fact, ...]
    facts: tuple[Fact, ...]
    drops: tuple[Drop, ...]
    lengths: tuple[Bar, ...]


def make_preview(
    loader: Loader | StreamLoader,
    prepared: Dataset,
    tokenizer: Tokenizer,
    *,
    stops: Sequence[int],
    title: str,
    num_examples: int = 16,
) -> Preview:
    """The first examples in the order in which step 0 trains them, and the report of the data.

    Args:
        loader: of `prepared`.
        prepared: the examples and their report.
        tokenizer: that made them.
        stops: what `chat.stop_ids` says.
        title: of the page, such as the config's file name.
        num_examples: how many are shown token by token.
    """
    batch = loader.batch(0)
    _check_batch(batch)
    row_ids = loader.row_ids(0)
    rows: list[PreviewRow] = []
    left = num_examples
    for index, row_id in enumerate(row_ids):
        examples = loader.examples_in_row(int(row_id))
        if left <= 0 or not len(examples):
            break
        segments = [
            _segment(batch, index, number, int(example), prepared, tokenizer, stops)
            for number, example in enumerate(examples[:left], start=1)
        ]
        hidden = tuple(int(length) for length in prepared.lengths[examples[left:]])
        padding = int(np.count_nonzero(batch.segment_ids[index] == 0))
        rows.append(PreviewRow(index + 1, tuple(segments), hidden, padding))
        left -= len(segments)
    num_rows, seq_len = batch.tokens.shape
    return Preview(
        title,
        seq_len,
        num_rows,
        tuple(rows),
        _headline(loader, prepared, seq_len),
        _facts(loader, prepared, batch),
        _drops(prepared, seq_len),
        _length_bars(prepared),
    )


def _check_batch(batch: Batch) -> None:
    """What is read off a batch below is what a loss sees: each weight belongs to the next token of its segment."""
    same = np.zeros(batch.tokens.shape, bool)
    same[:, :-1] = (batch.segment_ids[:, :-1] == batch.segment_ids[:, 1:]) & (batch.segment_ids[:, :-1] > 0)
    following = np.roll(batch.tokens, -1, axis=1)
    assert (batch.loss_weights[~same] == 0).all(), "a weight on the first token of a segment, or on padding"
    assert (batch.targets == following)[same].all(), "a target is not the next token of its segment"


def _segment(
    batch: Batch,
    row: int,
    number: int,
    example: int,
    prepared: Dataset,
    tokenizer: Tokenizer,
    stops: Sequence[int],
) -> Segment:
    """A segment of the batch, traced back from targets to tokens.

    With the batch of `Batch`'s worked example, segment 1: loss_weights `[1, 1, 0]` are those of the targets `b`, `c`
    and of none, so the tokens `a b c` have weights `[0, 1, 1]`.
    """
    (at,) = np.nonzero(batch.segment_ids[row] == number)
    tokens = batch.tokens[row, at]
    weights = np.concatenate([[0.0], batch.loss_weights[row, at[:-1]]])
    assert len(at) and at[-1] - at[0] + 1 == len(at), "a segment is one block"
    assert (batch.positions[row, at] == np.arange(len(at))).all(), "positions restart in each segment"
    expected = prepared.example(example)
    assert np.array_equal(tokens, expected.tokens), f"row {row} segment {number} is not example {example}"
    assert np.array_equal(weights[1:], expected.loss_weights[1:]), f"the batch trains other tokens of example {example}"
    pieces = make_pieces([int(token) for token in tokens], [float(weight) for weight in weights], tokenizer, stops)
    return Segment(number, example, pieces, len(at), int(np.count_nonzero(weights)))


def make_pieces(
    tokens: Sequence[int], weights: Sequence[float], tokenizer: Tokenizer, stops: Sequence[int]
) -> tuple[Piece, ...]:
    """Tokens as pieces of text that join to the text of all.

    The bytes of one character, such as those of an emoji, are one piece of several tokens. Should they differ in
    weight, each is a piece of its own, and shown as `⟨🦊 1/4⟩`.
    """
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.content.strip(" ▁\t\r\n")}
    pieces: list[Piece] = []
    at = 0
    for text, size in _texts(tokens, tokenizer, special):
        ids = tuple(tokens[at : at + size])
        stop = size == 1 and ids[0] in stops and weights[at] > 0
        if len(set(weights[at : at + size])) == 1:
            pieces.append(Piece(text, ids, at, weights[at], ids[0] in special, stop))
        else:
            for part, id in enumerate(ids):
                name = f"⟨{text} {part + 1}/{size}⟩"
                pieces.append(Piece(name, (id,), at + part, weights[at + part], False, False))
        at += size
    return tuple(pieces)


_LONGEST_CHARACTER = 8
"""Tokens that are joined at most until their bytes are text; else they never will be."""


def _texts(tokens: Sequence[int], tokenizer: Tokenizer, special: set[int]) -> Iterable[tuple[str, int]]:
    """Text and number of tokens of each piece; decoded after the piece before it, since a blank depends on that."""

    def decode(start: int, end: int) -> str:
        return tokenizer.decode(tokens[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    context = done = 0
    pending = ""
    for end in range(1, len(tokens) + 1):
        if tokens[end - 1] in special:
            text = tokenizer.added_tokens_decoder[tokens[end - 1]].content
        else:
            before, after = decode(context, done), decode(context, end)
            text = after[len(before) :] if after.startswith(before) else decode(done, end)
            can_grow = end < len(tokens) and tokens[end] not in special and end - done < _LONGEST_CHARACTER
            if text.endswith("\N{REPLACEMENT CHARACTER}") and can_grow:
                pending = text
                continue
            if pending and text.startswith(pending):
                # Nothing came of waiting: the sign stands for itself, or for bytes that are no text.
                yield pending, end - 1 - done
                text, done = text[len(pending) :], end - 1
        yield text, end - done
        context, done, pending = done, end, ""


def _headline(loader: Loader | StreamLoader, prepared: Dataset, seq_len: int) -> tuple[Fact, ...]:
    report = merged_reports([source.report for source in prepared.sources])
    examples, tokens, positions = report["examples"], report["tokens"], loader.num_rows * seq_len
    num_dropped = sum(each["examples"] for each in report["dropped"].values())
    dropped = f", {num_dropped:,} dropped" if num_dropped else ", none dropped"
    return (
        Fact("Examples", f"{examples:,}", f"of {report['rows']:,} rows{dropped}"),
        Fact("Tokens", f"{tokens:,}", f"{tokens / examples:,.0f} per example on average"),
        Fact(
            "Trained",
            share(report["trained_tokens"], tokens),
            f"of the tokens: {report['trained_tokens']:,} carry loss",
        ),
        Fact(
            "Rows filled",
            share(tokens, positions),
            f"{loader.num_rows:,} rows of {seq_len:,}, {examples / loader.num_rows:.1f} examples each",
        ),
    )


def _facts(loader: Loader | StreamLoader, prepared: Dataset, batch: Batch) -> tuple[Fact, ...]:
    report = merged_reports([source.report for source in prepared.sources])
    positions = loader.num_rows * batch.tokens.shape[1]
    in_step = int(np.count_nonzero(batch.segment_ids))
    trained = int(np.count_nonzero(batch.loss_weights))
    step_padding = share(batch.tokens.size - in_step, batch.tokens.size)
    percentiles = " · ".join(f"{p}%: {length:,}" for p, length in report["length_percentiles"].items())
    facts = [
        Fact("Source", report["path"]),
        Fact("Format", report["format"], report["format_reason"]),
        Fact("Columns ignored", ", ".join(report["columns_ignored"]) or "none"),
        Fact("Rows read", f"{report['rows']:,}"),
        Fact("Length percentiles", percentiles, "tokens per example, dropped ones included"),
        Fact("Longest", f"{report['longest']['tokens']:,} tokens", report["longest"]["origin"]),
        Fact("Padding", share(positions - report["tokens"], positions), f"of {positions:,} positions in an epoch"),
        Fact("Steps per epoch", f"{loader.steps_per_epoch:,}", f"of {len(batch.tokens):,} rows each"),
        Fact(
            "Step 0",
            f"{int(batch.segment_ids.max(axis=1).sum()):,} examples, {in_step:,} tokens",
            f"{trained:,} trained ({share(trained, in_step)}), {step_padding} padding",
        ),
    ]
    facts += [Fact(name.replace("_", " ").capitalize(), f"{n:,}") for name, n in report["counts"].items()]
    return tuple(facts)


def _drops(prepared: Dataset, seq_len: int) -> tuple[Drop, ...]:
    report = merged_reports([source.report for source in prepared.sources])
    remedies = {TOO_LONG: f"data.seq_len={report['longest']['tokens']} would keep all"}
    return tuple(
        Drop(
            f"more than data.seq_len = {seq_len:,} tokens" if reason == TOO_LONG else reason,
            n["examples"],
            n["tokens"],
            remedies.get(reason, ""),
        )
        for reason, n in report["dropped"].items()
    )


def _length_bars(prepared: Dataset) -> tuple[Bar, ...]:
    """At most 20 bars, each a power of two wide, and one for what was dropped."""
    longest = int(prepared.lengths.max())
    width = 1
    while longest > 20 * width:
        width *= 2
    bins = (prepared.lengths - 1) // width
    counts = np.bincount(bins)
    bars = [Bar(at * width + 1, (at + 1) * width, int(counts[at])) for at in range(int(bins.min()), len(counts))]
    num_overlong = sum(
        source.report["dropped"].get(TOO_LONG, {"examples": 0})["examples"] for source in prepared.sources
    )
    if num_overlong:
        bars.append(Bar(longest + 1, None, num_overlong))
    return tuple(bars)


def share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def visible(text: str) -> str:
    """Characters that would act instead of being seen (escapes, bidirectional overrides) as `<U+001B>`."""
    return "".join(f"<U+{ord(char):04X}>" if _acts(char) else char for char in text)


def _acts(char: str) -> bool:
    kind = unicodedata.category(char)
    return (
        (kind in ("Cc", "Zl", "Zp") and char not in "\n\t")
        or char in "\u200b\u200e\u200f\ufeff"
        or (kind == "Cf" and ("\u202a" <= char <= "\u202e" or "\u2066" <= char <= "\u2069"))
    )


# The terminal.


def print_preview(preview: Preview, console: "Console | None" = None, *, num_examples: int = 4) -> None:
    """Prints the report and the first examples; in colour, or in plain signs where there is none (NO_COLOR, a pipe)."""
    import rich.console
    from rich.text import Text

    console = console or rich.console.Console(highlight=False)
    coloured = console.color_system is not None and not console.no_color

    def say(*parts: str | tuple[str, str] | Text) -> None:
        console.print(Text.assemble(*parts), soft_wrap=True)

    say((visible(preview.title), "bold"))
    facts = [*preview.headline, *preview.facts]
    width = max(len(fact.label) for fact in facts)
    for fact in facts:
        say((f"  {fact.label:<{width}}  ", "dim"), visible(fact.value), (f"  {visible(fact.note)}", "dim"))
    for drop in preview.drops or [Drop("nothing", 0, 0, "")]:
        counts = f": {drop.examples:,} examples, {drop.tokens:,} tokens; {drop.remedy}" if drop.examples else ""
        say((f"  {'Dropped':<{width}}  ", "dim"), (drop.reason, "red" if drop.examples else ""), counts)
    say("\n", ("Tokens per example", "bold"))
    most = max(bar.num_examples for bar in preview.lengths)
    for bar in preview.lengths:
        name = f"{bar.first:,} - {bar.last:,}" if bar.last else f"over {preview.seq_len:,}"
        drawn = "█" * -(-40 * bar.num_examples // most)
        say((f"  {name:>15}  ", "dim"), (drawn, "blue" if bar.last else "red"), f" {bar.num_examples:,}")
    say("\n", ("Step 0", "bold"), ", in the order trained   ", _legend(coloured))
    shown = 0
    for row in preview.rows:
        if shown >= num_examples:
            break
        say("\n", (f"━━ {row_heading(row, preview)}", "bold"))
        for segment in row.segments[: num_examples - shown]:
            say((f"── {segment_heading(segment)}", "dim"))
            text = _segment_text(segment, coloured)
            if text.plain.endswith("\n"):
                text.right_crop(1)
            say(text)
            shown += 1


def _legend(coloured: bool) -> "Text":
    from rich.text import Text

    if coloured:
        return Text.assemble(
            ("trained", _TRAINED), "  ", ("stop token, trained", _STOP), "  ", ("special token", _SPECIAL), "  ",
            ("context", _CONTEXT),
        )  # fmt: skip
    return Text("⟦trained⟧  ■ after a trained stop token; all else is context")


_TRAINED, _STOP, _SPECIAL, _CONTEXT = "bold green", "bold white on red", "cyan", "dim"


def _segment_text(segment: Segment, coloured: bool) -> "Text":
    from rich.text import Text

    text = Text()
    for trained, pieces in itertools.groupby(segment.pieces, lambda piece: piece.weight != 0):
        if trained and not coloured:
            text.append("⟦")
        for piece in pieces:
            shown = visible(piece.text).replace("\n", "↵\n")
            style = _STOP if piece.is_stop else _TRAINED if trained else _SPECIAL if piece.is_special else _CONTEXT
            text.append(shown + ("■" if piece.is_stop and not coloured else ""), style if coloured else None)
        if trained and not coloured:
            text.append("⟧")
    return text


def row_heading(row: PreviewRow, preview: Preview) -> str:
    num_segments = len(row.segments) + len(row.hidden)
    used = preview.seq_len - row.num_padding
    return (
        f"row {row.number} of {preview.num_rows:,}: {num_segments} example{'s' * (num_segments > 1)}, "
        f"{used:,} of {preview.seq_len:,} positions, {share(row.num_padding, preview.seq_len)} padding"
    )


def segment_heading(segment: Segment) -> str:
    return (
        f"segment {segment.number}: example {segment.example:,}, {segment.num_tokens:,} tokens, "
        f"{segment.num_trained:,} trained"
    )
