"""What became of the rows, from the reports of prepared sources: numbers, and what they mean in a sentence.

In: a dataset with the reports of its sources. Out: records for the preview (`records.py`), and lines of facts for the
terminal and the page.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxsft.batches import lengths
from jaxsft.batches.mixture import Dataset
from jaxsft.chat.turns import FOUND_BY
from jaxsft.preview.records import Bar, Count, Longest, Loss, Preview, Source
from jaxsft.preview.row_lengths import best

MEANINGS = {
    "straddling_tokens": "tokens that begin before an answer and end in it; they are trained",
    "straddling_parts": "tokens that two parts of an answer share; they have the lesser weight of the two",
    "split_control_tokens": "spelt out by the data and encoded as ordinary text, so that no row can forge a turn",
    "appended_stops": "stop tokens that the chat template does not write; appended to answers, and trained",
    "unrolled_examples": "turns with an example of their own, as the template shows them another past later",
    "repeated_tokens": "tokens that several examples of one conversation share: what unrolling costs",
    "dropped_reasoning": "answers whose reasoning was left out, as data.reasoning says",
    "dropped_exchanges": "oldest exchanges of conversations that were left out, as data.overlong says",
    "dropped_exchange_tokens": "tokens of these exchanges",
    "stripped_stops": "stop tokens spelt out at the end of answers; taken off, as the template writes its own",
    "left_out_turns": "turns that data.unroll=never does not train; data.unroll=auto would",
    "control_tokens_in_text": "control tokens in plain text, kept as such",
    "tokenised_without_stop": "examples that came as tokens and train a turn that ends in no stop token",
}
"""What `Encoded.counts` counts."""

REMEDIES = {
    "control-token": "data.control_tokens=split would encode such text as ordinary text",
    "field-absent": "give a data.chat_template that shows every field, or rows without it",
    "template-refuses": "give a data.chat_template that takes such conversations",
    "no-assistant-turn": "data.train_on chooses whose turns are trained",
    "no-trained-turn": "data.train_on chooses whose turns are trained",
    "nothing-trained": "data.train_on chooses whose turns are trained",
    "unknown-role": "data.train.N.roles says whose turns they are",
    "unknown-flag": "data.ignore_keys, or data.train.N.keys, says what the key means",
    "reasoning": "data.reasoning=drop would leave the reasoning out",
    "image-or-audio": "only text can be trained",
}
"""Code of a bad row -> what would help."""


def losses(report: Mapping[str, Any], seq_len: int) -> tuple[Loss, ...]:
    """Examples that were dropped or cut, and bad rows, by reason, with what would keep them."""
    longer = f"data.seq_len={report['longest']['tokens']} would keep all whole"
    by_length = {lengths.TOO_LONG, lengths.NO_TURN_FITS, lengths.CUT_AFTER_TURN, lengths.CUT_AT_SEQ_LEN, lengths.SPLIT}
    named = {lengths.TOO_LONG: f"longer than data.seq_len = {seq_len:,} tokens"}

    def remedy(reason: str) -> str:
        if reason == lengths.TOO_LONG:
            return f"{longer}; data.overlong=truncate_turns would keep the turns that fit"
        return longer if reason in by_length else "nothing is learnt from them"

    found = [
        Loss(kind, named.get(reason, reason), n["examples"], n["tokens"], remedy(reason))
        for kind, key in (("dropped", "dropped"), ("cut", "cut"))
        for reason, n in report[key].items()
    ]
    names_them = "data.on_bad_row=error names the first of them by file and line"
    for code, count in report["bad_rows"].items():
        found.append(Loss("bad", code, count, None, "; ".join(filter(None, [REMEDIES.get(code), names_them]))))
    return tuple(found)


def counts(report: Mapping[str, Any]) -> tuple[Count, ...]:
    found = []
    for name, count in report["counts"].items():
        meaning = MEANINGS.get(name, "")
        if name == "repeated_tokens":
            meaning += f", {share(count, report['tokens'])} of all tokens"
        if name.startswith("turns_by_"):
            meaning = "how their beginning was found: " + FOUND_BY.get(name.removeprefix("turns_by_"), "")
        found.append(Count(name, count, meaning))
    # The unusual ones first.
    return tuple(sorted(found, key=lambda each: each.name.startswith("turns_by_")))


def sources(dataset: Dataset, drawn: Sequence[int]) -> tuple[Source, ...]:
    """Each source of a dataset, with its share of the draws as asked and as found in the packed rows."""
    found = []
    for source, draws, seen in zip(dataset.sources, dataset.draws, drawn, strict=True):
        report = source.report
        found.append(
            Source(
                report["path"],
                report["format"],
                report["format_reason"],
                tuple(report["columns_ignored"]),
                dict(report["keys_ignored"]),
                report["rows"],
                sum(report["bad_rows"].values()),
                report["items"],
                report["examples"],
                report["tokens"],
                report["trained_tokens"],
                report["length_percentiles"],
                Longest(**report["longest"]),
                float(draws),
                float(draws / sum(dataset.draws)),
                seen / max(sum(drawn), 1),
            )
        )
    return tuple(found)


def length_bars(dataset: Dataset) -> tuple[Bar, ...]:
    """At most 20 bars, each a power of two wide, and one for what was dropped."""
    all_lengths = dataset.lengths
    longest = int(all_lengths.max())
    width = 1
    while longest > 20 * width:
        width *= 2
    bins = (all_lengths - 1) // width
    found = np.bincount(bins)
    bars = [Bar(at * width + 1, (at + 1) * width, int(found[at])) for at in range(int(bins.min()), len(found))]
    reasons = (lengths.TOO_LONG, lengths.NO_TURN_FITS)
    overlong = [source.report["dropped"].get(reason) for source in dataset.sources for reason in reasons]
    if num_overlong := sum(each["examples"] for each in overlong if each):
        bars.append(Bar(longest + 1, None, num_overlong))
    return tuple(bars)


class Fact(NamedTuple):
    """One line of the report, for people."""

    label: str
    value: str
    note: str = ""


def headline(preview: Preview) -> tuple[Fact, ...]:
    """The four numbers to know."""
    totals = preview.totals
    num_dropped = sum(loss.amount for loss in preview.losses if loss.kind == "dropped")
    dropped = f", {num_dropped:,} dropped" if num_dropped else ", none dropped"
    per_row = totals.drawn_examples / totals.packed_rows
    window = "first window: " if preview.stream else ""
    return (
        Fact("Examples", f"{totals.examples:,}", f"{window}of {totals.rows:,} rows{dropped}"),
        Fact("Tokens", f"{totals.tokens:,}", f"{totals.tokens / totals.examples:,.0f} per example on average"),
        Fact(
            "Trained",
            share(totals.trained_tokens, totals.tokens),
            f"of the tokens: {totals.trained_tokens:,} carry loss",
        ),
        Fact(
            "Rows filled",
            f"{totals.fill:.1%}",
            f"{totals.packed_rows:,} rows of {preview.seq_len:,}, {per_row:.1f} examples each",
        ),
    )


def facts(preview: Preview) -> Iterator[Fact]:
    """How the examples become steps."""
    totals = preview.totals
    span = "window" if preview.stream else "epoch"
    padding = totals.step_positions - totals.step_tokens
    yield Fact(
        "Padding",
        f"{1 - totals.fill:.1%}",
        f"of {totals.packed_rows * preview.seq_len:,} positions in {span} 1: about {1 / totals.fill:.2f} x the time of "
        "full rows",
    )
    tried = ", ".join(f"{each.seq_len:,} {each.fill:.1%}" for each in preview.row_lengths)
    fullest = best(preview.row_lengths)
    now = ", as it is" * (fullest.seq_len == preview.seq_len)
    yield Fact("Best data.seq_len", f"{fullest.seq_len:,}{now}", f"rows would be full to: {tried}")
    yield Fact(f"Steps per {span}", f"{totals.steps_per_epoch:,}", f"of {preview.batch_size:,} rows each")
    yield Fact(
        "Step 0",
        f"{totals.step_examples:,} examples, {totals.step_tokens:,} tokens",
        f"{totals.step_trained_tokens:,} trained ({share(totals.step_trained_tokens, totals.step_tokens)}), "
        f"{share(padding, totals.step_positions)} padding",
    )


def source_facts(source: Source, *, is_one_of_several: bool) -> Iterator[Fact]:
    """What became of the rows of a source."""
    bad = f"{source.bad_rows:,} of them bad, left out" if source.bad_rows else ""
    yield Fact("Format", source.format, source.format_reason)
    yield Fact("Columns ignored", ", ".join(source.columns_ignored) or "none")
    if source.keys_ignored:
        counted = ", ".join(f"{name} ({count:,})" for name, count in source.keys_ignored.items())
        yield Fact("Keys of messages ignored", counted)
    yield Fact("Rows read", f"{source.rows:,}", bad)
    if source.items != source.rows - source.bad_rows or source.items != source.examples:
        yield Fact("Conversations", f"{source.items:,}", f"which make {plural(source.examples, 'example')}")
    if is_one_of_several:
        trained = share(source.trained_tokens, source.tokens)
        yield Fact("Examples", f"{source.examples:,}", f"{source.tokens:,} tokens, {trained} trained")
        passes = f"{source.draws_per_epoch / source.examples:.4g} passes over the source"
        drawn = f"{source.draws_per_epoch:,.1f}".removesuffix(".0")
        yield Fact(
            "Share of the draws",
            f"{source.realised_share:.2%}",
            f"asked for: {source.asked_share:.2%}, {drawn} per epoch, {passes}",
        )
    percentiles = " · ".join(f"{p}%: {length:,}" for p, length in source.length_percentiles.items())
    yield Fact("Length percentiles", percentiles, "tokens per example, dropped ones included")
    yield Fact("Longest", f"{source.longest.tokens:,} tokens", source.longest.origin)


def row_heading(preview: Preview, index: int) -> str:
    row = preview.rows[index]
    return (
        f"step {row.step:,}, row {row.number} of {preview.batch_size:,}: {plural(len(row.segments), 'example')}, "
        f"{preview.seq_len - row.num_padding:,} of {preview.seq_len:,} positions, "
        f"{share(row.num_padding, preview.seq_len)} padding"
    )


def plural(number: int, name: str) -> str:
    return f"{number:,} {name}{'s' * (number != 1)}"


def share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"
