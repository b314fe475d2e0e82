"""What the first step will train, for the eye: tokens coloured by weight, and what became of the rows.

In: a loader and its prepared data. Out: a plain `Preview`, printed to a terminal or written as one HTML page. Weights
of tokens are traced back from the batch that the devices get, not from the mask code, so the picture shows what is
really trained. Needs neither the weights of a model nor an accelerator.
"""

import html
import itertools
import os
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxsft.batch import Batch
from jaxsft.data.chat import Tokenizer
from jaxsft.data.loader import Loader, Prepared

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
    loader: Loader,
    prepared: Prepared,
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
        _drops(prepared.report, seq_len),
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
    prepared: Prepared,
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


def _headline(loader: Loader, prepared: Prepared, seq_len: int) -> tuple[Fact, ...]:
    report = prepared.report
    examples, tokens, positions = report["examples"], report["tokens"], loader.num_rows * seq_len
    dropped = f", {report['overlong_examples']:,} dropped" if report["overlong_examples"] else ", none dropped"
    return (
        Fact("Examples", f"{examples:,}", f"of {report['rows']:,} rows{dropped}"),
        Fact("Tokens", f"{tokens:,}", f"{tokens / examples:,.0f} per example on average"),
        Fact(
            "Trained",
            _share(report["trained_tokens"], tokens),
            f"of the tokens: {report['trained_tokens']:,} carry loss",
        ),
        Fact(
            "Rows filled",
            _share(tokens, positions),
            f"{loader.num_rows:,} rows of {seq_len:,}, {examples / loader.num_rows:.1f} examples each",
        ),
    )


def _facts(loader: Loader, prepared: Prepared, batch: Batch) -> tuple[Fact, ...]:
    report = prepared.report
    positions = loader.num_rows * batch.tokens.shape[1]
    in_step = int(np.count_nonzero(batch.segment_ids))
    trained = int(np.count_nonzero(batch.loss_weights))
    step_padding = _share(batch.tokens.size - in_step, batch.tokens.size)
    percentiles = " · ".join(f"{p}%: {length:,}" for p, length in report["length_percentiles"].items())
    facts = [
        Fact("Source", str(report["source"])),
        Fact("Format", report["format"], report["format_reason"]),
        Fact("Columns ignored", ", ".join(report["columns_ignored"]) or "none"),
        Fact("Rows read", f"{report['rows']:,}"),
        Fact("Length percentiles", percentiles, "tokens per example, dropped ones included"),
        Fact("Longest", f"{report['longest']['tokens']:,} tokens", report["longest"]["origin"]),
        Fact("Padding", _share(positions - report["tokens"], positions), f"of {positions:,} positions in an epoch"),
        Fact("Steps per epoch", f"{loader.steps_per_epoch:,}", f"of {len(batch.tokens):,} rows each"),
        Fact(
            "Step 0",
            f"{int(batch.segment_ids.max(axis=1).sum()):,} examples, {in_step:,} tokens",
            f"{trained:,} trained ({_share(trained, in_step)}), {step_padding} padding",
        ),
    ]
    if report["straddling_tokens"]:
        note = "trained tokens that begin in the prompt, before their turn does"
        facts.append(Fact("Straddling tokens", f"{report['straddling_tokens']:,}", note))
    return tuple(facts)


def _drops(report: dict[str, Any], seq_len: int) -> tuple[Drop, ...]:
    if not report["overlong_examples"]:
        return ()
    longest = report["longest"]["tokens"]
    remedy = f"data.seq_len={longest} would keep all"
    reason = f"more than data.seq_len = {seq_len:,} tokens"
    return (Drop(reason, report["overlong_examples"], report["overlong_tokens"], remedy),)


def _length_bars(prepared: Prepared) -> tuple[Bar, ...]:
    """At most 20 bars, each a power of two wide, and one for what was dropped."""
    longest = int(prepared.lengths.max())
    width = 1
    while longest > 20 * width:
        width *= 2
    bins = (prepared.lengths - 1) // width
    counts = np.bincount(bins)
    bars = [Bar(at * width + 1, (at + 1) * width, int(counts[at])) for at in range(int(bins.min()), len(counts))]
    if prepared.report["overlong_examples"]:
        bars.append(Bar(longest + 1, None, prepared.report["overlong_examples"]))
    return tuple(bars)


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _visible(text: str) -> str:
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

    say((_visible(preview.title), "bold"))
    facts = [*preview.headline, *preview.facts]
    width = max(len(fact.label) for fact in facts)
    for fact in facts:
        say((f"  {fact.label:<{width}}  ", "dim"), _visible(fact.value), (f"  {_visible(fact.note)}", "dim"))
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
        say("\n", (f"━━ {_row_heading(row, preview)}", "bold"))
        for segment in row.segments[: num_examples - shown]:
            say((f"── {_segment_heading(segment)}", "dim"))
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
            shown = _visible(piece.text).replace("\n", "↵\n")
            style = _STOP if piece.is_stop else _TRAINED if trained else _SPECIAL if piece.is_special else _CONTEXT
            text.append(shown + ("■" if piece.is_stop and not coloured else ""), style if coloured else None)
        if trained and not coloured:
            text.append("⟧")
    return text


def _row_heading(row: PreviewRow, preview: Preview) -> str:
    num_segments = len(row.segments) + len(row.hidden)
    used = preview.seq_len - row.num_padding
    return (
        f"row {row.number} of {preview.num_rows:,}: {num_segments} example{'s' * (num_segments > 1)}, "
        f"{used:,} of {preview.seq_len:,} positions, {_share(row.num_padding, preview.seq_len)} padding"
    )


def _segment_heading(segment: Segment) -> str:
    return (
        f"segment {segment.number}: example {segment.example:,}, {segment.num_tokens:,} tokens, "
        f"{segment.num_trained:,} trained"
    )


# The page.


def write_html(preview: Preview, path: str | os.PathLike[str]) -> None:
    """Writes the preview as one self-contained page, without scripts; `path` may be gs:// and the like."""
    from etils import epath

    epath.Path(path).write_bytes(make_html(preview).encode())


def make_html(preview: Preview) -> str:
    """The page; every text of the data is escaped."""
    tiles = "".join(
        f'<div class="tile"><b>{_escape(fact.label)}</b><strong>{_escape(fact.value)}</strong>'
        f"<span>{_escape(fact.note)}</span></div>"
        for fact in preview.headline
    )
    facts = "".join(
        f"<tr><th>{_escape(fact.label)}</th><td>{_escape(fact.value)} <small>{_escape(fact.note)}</small></td></tr>"
        for fact in preview.facts
    )
    rows = "".join(_html_row(row, preview) for row in preview.rows)
    shown = sum(len(row.segments) for row in preview.rows)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{_escape(preview.title)} · jaxsft preview</title>
<style>{_CSS}</style>
</head>
<body>
<header><h1>{_escape(preview.title)}</h1>
<p>What this run will train, read from the batch of its first step.</p></header>
<section class="tiles">{tiles}</section>
<section class="report">
<div class="card"><h2>Data</h2><table class="facts">{facts}</table></div>
<div class="card"><h2>Tokens per example</h2>{_html_histogram(preview)}<h2>Dropped</h2>{_html_drops(preview)}</div>
</section>
<section>
<h2>Step 0, token by token
<small>{shown} examples in the order trained; point at a token for its id, position and weight</small></h2>
<p class="legend"><span><i class="t trained">trained</i> the model learns to write it</span>
<span><i class="t trained stop">stop</i> trained, ends the answer</span>
<span><i class="t special">special</i> control token</span>
<span><i class="t">context</i> read, not trained</span></p>
{rows}
</section>
<footer>Made by jaxsft. Weights were traced back from the batch's targets and checked against the examples.</footer>
</body>
</html>
"""


def _escape(text: str) -> str:
    return html.escape(_visible(text), quote=True)


def _html_row(row: PreviewRow, preview: Preview) -> str:
    strip = "".join(_html_strip(row, segment) for segment in row.segments)
    for size in row.hidden:
        strip += f'<span class="hidden" style="flex:{size}" title="not shown: {size:,} tokens"></span>'
    if row.num_padding:
        strip += f'<span class="padding" style="flex:{row.num_padding}" title="{row.num_padding:,} of padding"></span>'
    segments = "".join(
        f'<article id="{_anchor(row, segment)}"><h4><b>{segment.number}</b> example {segment.example:,}'
        f"<span>{segment.num_tokens:,} tokens, {segment.num_trained:,} trained</span></h4>"
        f"<pre>{''.join(map(_html_piece, segment.pieces))}</pre></article>"
        for segment in row.segments
    )
    more = f'<p class="hint">{len(row.hidden)} more in this row, not shown</p>' if row.hidden else ""
    heading = _escape(_row_heading(row, preview))
    return f'<details open><summary>{heading}</summary><nav class="strip">{strip}</nav>{segments}{more}</details>'


def _anchor(row: PreviewRow, segment: Segment) -> str:
    return f"row{row.number}-segment{segment.number}"


def _html_strip(row: PreviewRow, segment: Segment) -> str:
    """A segment to scale, with its trained stretches."""
    runs = ""
    for trained, pieces in itertools.groupby(segment.pieces, lambda piece: piece.weight != 0):
        size = sum(len(piece.tokens) for piece in pieces)
        runs += f'<i class="{"on" if trained else "off"}" style="flex:{size}"></i>'
    title = _escape(_segment_heading(segment))
    return f'<a href="#{_anchor(row, segment)}" style="flex:{segment.num_tokens}" title="{title}">{runs}</a>'


def _html_piece(piece: Piece) -> str:
    flags = {
        "trained": piece.weight != 0,
        "special": piece.is_special,
        "stop": piece.is_stop,
        "multi": len(piece.tokens) > 1,
    }
    classes = " ".join(["t", *(name for name, flag in flags.items() if flag)])
    name = piece.text.replace("\n", "\\n").replace("\t", "\\t")
    ids = " ".join(map(str, piece.tokens))
    weight = f"trained, weight {piece.weight:g}" if piece.weight else "context, weight 0"
    last = f" to {piece.position + len(piece.tokens) - 1}" if len(piece.tokens) > 1 else ""
    title = f"“{name}” · id {ids} · position {piece.position}{last} · {weight}" + ", stop token" * piece.is_stop
    text = _escape(piece.text).replace("\n", '<i class="nl"></i>\n').replace("\t", '<i class="tab"></i>\t')
    count = f' data-n="{len(piece.tokens)}"' if len(piece.tokens) > 1 else ""
    return f'<span class="{classes}"{count} title="{_escape(title)}">{text}</span>'


def _html_drops(preview: Preview) -> str:
    if not preview.drops:
        return '<p class="none">Nothing was dropped.</p>'
    rows = "".join(
        f"<tr><td>{_escape(drop.reason)}<br><small>{_escape(drop.remedy)}</small></td>"
        f"<td>{drop.examples:,}</td><td>{drop.tokens:,}</td></tr>"
        for drop in preview.drops
    )
    return f'<table class="drops"><tr><th>reason</th><th>examples</th><th>tokens</th></tr>{rows}</table>'


def _html_histogram(preview: Preview) -> str:
    """Bars upwards, as SVG; the last one, in red, is what was dropped."""
    bars, width, height, base = preview.lengths, 560, 220, 190
    most = max(bar.num_examples for bar in bars)
    step = min(width / len(bars), 60)
    every = -(-len(bars) // 8)
    parts = []
    for index, bar in enumerate(bars):
        tall = bar.num_examples / most * (base - 18)
        name = f"{bar.first:,} to {bar.last:,}" if bar.last else f"over {preview.seq_len:,}, dropped"
        kind = "bar" if bar.last else "bar dropped"
        parts.append(
            f'<rect class="{kind}" x="{index * step + 1:.1f}" y="{base - tall:.1f}" width="{step - 2:.1f}" '
            f'height="{tall:.1f}" rx="1.5"><title>{name} tokens: {bar.num_examples:,}</title></rect>'
        )
        # The last label would run over the edge, so it ends where its bar ends.
        place = f'x="{(index + 0.5) * step:.1f}"' if bar.last else f'x="{(index + 1) * step - 1:.1f}" class="end"'
        if bar.num_examples == most or bar.last is None:
            parts.append(f'<text {place} y="{base - tall - 5:.1f}">{bar.num_examples:,}</text>')
        if bar.last is None or (index % every == every - 1 and (bars[-1].last or index < len(bars) - 2)):
            parts.append(f'<text {place} y="{base + 16}">{f"{bar.last:,}" if bar.last else "dropped"}</text>')
    parts.append(f'<line x1="0" x2="{width}" y1="{base}" y2="{base}"/>')
    label = "Histogram of tokens per example"
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


_CSS = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1d2330; --soft: #667085; --line: #e1e5ec;
  --trained: #c6f0d2; --trained-ink: #0a4a22; --mark: #22a355; --stop: #d0312d; --stop-ink: #fff; --special: #e9e7fb;
  --special-ink: #4a3fb0; --bar: #5b7fd6; --off: #cfd6e2; --cut: rgba(20, 30, 50, .10); }
@media (prefers-color-scheme: dark) {
  :root { --page: #0f131a; --card: #171c26; --ink: #e4e8f0; --soft: #98a2b5; --line: #2a3240;
    --trained: #1a5232; --trained-ink: #b9f5cd; --mark: #3fc777; --stop: #e5534b; --stop-ink: #fff; --special: #2b2950;
    --special-ink: #bdb5ff; --bar: #6d8fe6; --off: #3c4658; --cut: rgba(255, 255, 255, .11); } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 28px 24px 60px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { margin: 0; font-size: 24px; overflow-wrap: anywhere; } h2 { margin: 0 0 10px; font-size: 16px; }
header p, footer, .hint, small { color: var(--soft); } header p { margin: 2px 0 20px; }
h2 small { margin-left: 8px; font-size: 13px; font-weight: 400; }
section { margin-bottom: 26px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 14px; }
.tile, .card, details { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 12px 16px; } .tile b { display: block; color: var(--soft); font-size: 13px; font-weight: 500; }
.tile strong { display: block; font-size: 26px; line-height: 1.25; } .tile span { color: var(--soft); font-size: 13px; }
.report { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 14px; }
.card { padding: 16px; min-width: 0; }
table { width: 100%; border-collapse: collapse; font-size: 14px; }
th, td { padding: 5px 0; text-align: left; vertical-align: top; border-top: 1px solid var(--line);
  overflow-wrap: anywhere; }
tr:first-child > * { border-top: 0; } th { color: var(--soft); font-weight: 500; }
.facts th { width: 145px; padding-right: 12px; overflow-wrap: normal; }
.drops :is(th, td):not(:first-child) { width: 90px; text-align: right; font-variant-numeric: tabular-nums; }
.none { margin: 0; color: var(--soft); }
svg { display: block; width: 100%; margin-bottom: 14px; } svg text { fill: var(--soft); font-size: 12px;
  text-anchor: middle; } svg .end { text-anchor: end; } svg line { stroke: var(--line); } .bar { fill: var(--bar); }
.bar.dropped { fill: var(--stop); }
.legend { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 0 0 12px;
  padding: 9px 0; background: var(--page); font-size: 13px; color: var(--soft); }
.legend span { display: inline-flex; align-items: center; gap: 6px; } footer { font-size: 13px; }
.legend .t { font-style: normal; } .legend .t:not(.trained, .special) { color: var(--ink); }
details { margin-bottom: 16px; padding: 0 16px 16px; }
summary { padding: 12px 0; cursor: pointer; font-weight: 600; }
.strip { display: flex; height: 20px; gap: 2px; margin-bottom: 14px; }
.strip > * { display: flex; min-width: 0; border-radius: 3px; overflow: hidden; } .strip i { height: 100%; }
.strip .on { background: var(--mark); } .strip .off, .strip .hidden { background: var(--off); }
.strip .hidden { opacity: .45; }
.strip .padding { background: repeating-linear-gradient(135deg, var(--off) 0 1px, transparent 1px 6px);
  border: 1px solid var(--off); }
.strip a:hover { outline: 2px solid var(--bar); }
article { margin-top: 12px; border: 1px solid var(--line); border-radius: 8px; overflow: hidden;
  scroll-margin-top: 48px; }
article:target { border-color: var(--bar); box-shadow: 0 0 0 1px var(--bar); }
h4 { display: flex; align-items: center; gap: 8px; margin: 0; padding: 5px 10px; font-size: 13px; font-weight: 500;
  color: var(--soft); border-bottom: 1px solid var(--line); }
h4 b { min-width: 22px; padding: 0 6px; border-radius: 11px; background: var(--off); color: var(--ink);
  text-align: center; } h4 span { margin-left: auto; }
pre { margin: 0; padding: 10px 12px; white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; }
pre, .legend .t { font: 13.5px/1.75 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.t { padding: 2px 0; box-shadow: inset 1px 0 var(--cut); } pre .t:hover { outline: 2px solid var(--bar); }
.trained { background: var(--trained); color: var(--trained-ink); }
.special { margin: 0 1px; padding: 1px 5px; border-radius: 5px; background: var(--special); color: var(--special-ink);
  font-size: 12px; box-shadow: none; } .special.trained { background: var(--trained); color: var(--trained-ink); }
.trained.stop { margin: 0 1px; padding: 1px 5px; border-radius: 5px; background: var(--stop); color: var(--stop-ink);
  font-size: 12px; font-weight: 600; box-shadow: none; } .trained.stop::after { content: " \\25A0"; }
.multi::after { content: attr(data-n); vertical-align: sub; font-size: 9px; opacity: .65; }
.nl::before { content: "\\21B5"; opacity: .45; font-style: normal; } .tab::before { content: "\\21E5"; opacity: .45; }
.legend .t { padding: 1px 5px; border-radius: 4px; } .hint { font-size: 13px; }
@media (max-width: 520px) { .report { grid-template-columns: 1fr; } }
"""
