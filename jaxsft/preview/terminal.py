"""The preview in a terminal: in colour, or in plain signs where there is none (NO_COLOR, a pipe).

In: the `Preview`. Out: text on the terminal. Every text of the data is printed so that no character of it acts.
"""

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING

from jaxsft.preview.pieces import Piece, quoted, visible
from jaxsft.preview.records import Example, Preview
from jaxsft.preview.reports import Fact, facts, headline, plural, row_heading, source_facts

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

TRAINED, PARTLY, STOP, SPECIAL = "bold green", "yellow", "bold white on red", "cyan"
TEMPLATE, INJECTED, CONTEXT = "dim", "magenta", ""


def print_preview(preview: Preview, console: "Console | None" = None, *, num_examples: int = 4) -> None:
    """Prints the report and the first examples."""
    import rich.console
    from rich.text import Text

    console = console or rich.console.Console(highlight=False)
    coloured = console.color_system is not None and not console.no_color

    def say(*parts: str | tuple[str, str] | Text) -> None:
        console.print(Text.assemble(*parts), soft_wrap=True)

    def say_facts(found: Iterable[Fact]) -> None:
        for fact in found:
            say((f"  {fact.label:<19}  ", "dim"), visible(fact.value), (f"  {visible(fact.note)}", "dim"))

    say((visible(preview.title), "bold"))
    say_facts([*headline(preview), *facts(preview)])
    several = len(preview.sources) > 1
    for number, source in enumerate(preview.sources, start=1):
        name = f"Source {number}" if several else "Source"
        say("\n", (name, "bold"), f"  {visible(source.path)}")
        say_facts(source_facts(source, is_one_of_several=several))
    say("\n", ("Left out", "bold"), "" if preview.losses else "  nothing")
    for loss in preview.losses:
        what = plural(loss.amount, "row" if loss.kind == "bad" else "example")
        what += "" if loss.tokens is None else f", {plural(loss.tokens, 'token')}"
        say(f"  {loss.kind:<7}  ", (visible(loss.reason), "red"), f": {what}", (f"; {loss.remedy}", "dim"))
    if preview.counts:
        say("\n", ("Counted", "bold"))
    for count in preview.counts:
        say(f"  {count.amount:>9,}  {count.name.replace('_', ' ')}", (f"  {count.meaning}", "dim"))
    if preview.notes:
        say("\n", ("Notes", "bold"))
    for note in preview.notes:
        say(f"  - {visible(note)}")
    say("\n", ("Tokens per example", "bold"))
    most = max(bar.num_examples for bar in preview.lengths)
    for bar in preview.lengths:
        name = f"{bar.first:,} - {bar.last:,}" if bar.last else f"over {preview.seq_len:,}"
        drawn = "█" * -(-40 * bar.num_examples // most)
        say((f"  {name:>15}  ", "dim"), (drawn, "blue" if bar.last else "red"), f" {bar.num_examples:,}")
    say("\n", ("Examples", "bold"), ", in the order trained   ", _legend(coloured))
    row = None
    for example in preview.examples[:num_examples]:
        if example.row != row and example.row is not None:
            row = example.row
            say("\n", (f"━━ {row_heading(preview, row)}", "bold"))
        say((f"── {example_heading(example)}", "dim"))
        for injection in example.injections:
            kind = "system text" if injection.is_system else "text"
            text = visible(quoted(injection))
            text = text if len(text) <= 100 else f"{text[:99]}…"
            say((f"   the template adds {kind} that no row holds: ", INJECTED), f"“{text}”")
        shown = _example_text(example, coloured)
        if shown.plain.endswith("\n"):
            shown.right_crop(1)
        say(shown)
    left = len(preview.examples) - num_examples
    if left > 0:
        say("\n", (f"{left} more examples are on the page", "dim"))


def example_heading(example: Example) -> str:
    reasons = [reason for reason in example.reasons if reason != "step 0"]
    parts = [f"example {example.number}", example.origin, f"{example.num_tokens:,} tokens"]
    parts += [f"{example.num_trained:,} trained", *reasons]
    if example.num_siblings > 1:
        parts.append(f"one of {example.num_siblings} of its conversation or text")
    return visible(", ".join(parts))


def _legend(coloured: bool) -> "Text":
    from rich.text import Text

    if coloured:
        return Text.assemble(
            ("trained", TRAINED), "  ", ("at a weight other than 1", PARTLY), "  ", ("stop token, trained", STOP), "  ",
            ("special token", SPECIAL), "  ", ("the template's text", TEMPLATE), "  ", ("context", CONTEXT),
        )  # fmt: skip
    return Text("⟦trained⟧  ⟦0.5× trained at that weight⟧  ■ after a trained stop token; all else is context")


def _example_text(example: Example, coloured: bool) -> "Text":
    from rich.text import Text

    injected = {
        position
        for injection in example.injections
        for position in range(injection.position, injection.position + injection.num_tokens)
    }

    def style(piece: Piece) -> str:
        if piece.weight:
            name = STOP if piece.is_stop else TRAINED if piece.weight == 1 else PARTLY
            return name.replace("bold ", "") if piece.writer == "template" and not piece.is_stop else name
        if piece.position in injected:
            return INJECTED
        return SPECIAL if piece.is_special else TEMPLATE if piece.writer == "template" else CONTEXT

    text = Text()
    gap = example.gap
    for weight, pieces in itertools.groupby(example.pieces, lambda piece: piece.weight):
        if weight and not coloured:
            text.append("⟦" if weight == 1 else f"⟦{weight:g}× ")
        for piece in pieces:
            if gap and piece.position == gap.position + gap.num_tokens:
                text.append(f"\n… {gap.num_tokens:,} more tokens, {gap.num_trained:,} of them trained …\n")
            shown = visible(piece.text).replace("\n", "↵\n").replace("\t", "⇥\t")
            mark = "■" if piece.is_stop and not coloured else ""
            text.append(shown + mark, style(piece) if coloured else None)
        if weight and not coloured:
            text.append("⟧")
    return text
