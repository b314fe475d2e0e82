"""What two preparations of the same rows have shown, as a report.

In: rows as both prepared them, their differences by cause, and runs. Out: a `Report`, which passes when no difference
is unexplained and both compute the same loss and gradients of the same tokens. That the preparations differ is no
failure: it is what the report is about.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxsft.compare import tokens
from jaxsft.report.records import Check, Report, Run, TokenDifference

NUM_CHECKED = 8
"""Examples on which both compute a loss."""
NUM_SHOWN = 3
"""Differences of each kind that are shown."""


class Same(NamedTuple):
    """Of both figures of the same tokens: values, or what may differ."""

    loss: Any
    grad_norm: Any


def make_report(
    compared: Sequence[tokens.Row],
    results: Sequence[tokens.Found],
    habits: tokens.Habits,
    *,
    runs: Sequence[Run],
    of_first: tuple[Same, Same],
    tolerances: Same,
    refusal: str | None,
    title: str,
    facts: dict[str, str],
) -> Report:
    """All of it as a report; it passes when nothing is unexplained and the losses of equal tokens are equal."""
    counts = tokens.count_by_kind(results)
    checks = [*_mask_check(refusal, habits), *_token_checks(compared, results, counts)]
    of_same = _same_checks(*of_first, tolerances)
    checks += of_same
    unexplained = counts.get(tokens.OTHER, (0, 0, 0))[0]
    equal = sum(not each.places for each in results)
    passed = all(check.passed is not False for check in checks if check.name in JUDGED)
    most = ", ".join(f"{kind} ({rows:,} rows)" for kind, (rows, _, _) in list(counts.items())[:3])
    verdict = f"{equal:,} of {len(results):,} rows are prepared alike. " + (
        f"Every difference is explained; most of them: {most}." if counts and not unexplained else ""
    )
    if unexplained:
        verdict += f"{unexplained:,} rows differ in a way that is not explained."
    for check in of_same:
        verdict += f" The {check.name} differs: {check.detail}." if check.passed is False else ""
    figures = {
        f"differs: {kind}": f"{rows:,} rows, {lone:,} tokens without a partner, {weights:,} tokens trained by one alone"
        for kind, (rows, lone, weights) in counts.items()
    }
    return Report(
        title=title,
        command="",
        verdict=verdict.strip(),
        passed=passed,
        checks=tuple(checks),
        runs=tuple(runs),
        differences=tuple(_examples(compared, results, habits)),
        difference_counts={kind: rows for kind, (rows, _, _) in counts.items()},
        explanations={kind: tokens.EXPLANATIONS[kind] for kind in counts},
        facts=facts | figures,
    )


_SAME = Same("loss of the same tokens", "gradient norm of the same tokens")
JUDGED = ("every difference explained", "counts add up", *_SAME)


def _mask_check(refusal: str | None, habits: tokens.Habits) -> list[Check]:
    detail = {
        "assistant": "TRL masks all but the assistant's turns",
        "completion": "TRL masks the prompt of each row",
        "all": "TRL trains every token" + (f"; it says: {refusal}" if refusal else ""),
    }[habits.masks]
    return [Check("TRL's mask", refusal is None, None, None, "", detail)]


def _token_checks(
    compared: Sequence[tokens.Row], results: Sequence[tokens.Found], counts: dict[str, tuple[int, int, int]]
) -> list[Check]:
    num = max(len(results), 1)
    other_tokens = [at for at, each in enumerate(results) if each.differing_tokens]
    other_weights = [at for at, each in enumerate(results) if each.differing_weights]
    unexplained = [at for at, each in enumerate(results) if any(p.kind == tokens.OTHER for p in each.places)]
    counted = (sum(each[1] for each in counts.values()), sum(each[2] for each in counts.values()))
    naive = (sum(e.differing_tokens for e in results), sum(e.differing_weights for e in results))

    def where(rows: Sequence[int]) -> str:
        return compared[rows[0]].origin if rows else ""

    return [
        Check(
            "same tokens",
            not other_tokens,
            len(other_tokens) / num,
            0.0,
            where(other_tokens),
            f"share of rows whose tokens differ ({len(other_tokens):,} of {num:,})",
        ),
        Check(
            "same tokens trained",
            not other_weights,
            len(other_weights) / num,
            0.0,
            where(other_weights),
            f"share of rows in which a token that both have is not trained alike ({len(other_weights):,} of {num:,})",
        ),
        Check(
            "every difference explained",
            not unexplained,
            float(sum(counts.get(tokens.OTHER, (0, 0, 0))[1:])),
            0.0,
            where(unexplained),
            "tokens and weights that differ for no known cause",
        ),
        Check(
            "counts add up",
            counted == naive,
            float(abs(counted[0] - naive[0]) + abs(counted[1] - naive[1])),
            0.0,
            "",
            f"{counted[0]:,} tokens and {counted[1]:,} weights by cause, {naive[0]:,} and {naive[1]:,} counted plainly",
        ),
    ]


def _same_checks(ours: Same, theirs: Same, tolerances: Same) -> list[Check]:
    checks = []
    for name, one, other, tolerance in zip(_SAME, ours, theirs, tolerances, strict=True):
        difference = abs(one - other) / max(abs(other), 1e-12)
        words = f"relative, with the weights to begin with, on TRL's tokens and mask: ours {one:.7f}, TRL's {other:.7f}"
        checks.append(Check(name, difference <= tolerance, difference, tolerance, f"first {NUM_CHECKED} rows", words))
    return checks


def _examples(
    compared: Sequence[tokens.Row], results: Sequence[tokens.Found], habits: tokens.Habits
) -> list[TokenDifference]:
    """The first few of each kind."""
    shown: dict[str, list[TokenDifference]] = {}
    for row, found in zip(compared, results, strict=True):
        seen = set()
        for place in found.places:
            if place.kind in seen or len(shown.setdefault(place.kind, [])) >= NUM_SHOWN:
                continue
            seen.add(place.kind)
            ours = theirs = ""
            if place.piece >= 0:
                piece = row.pieces[place.piece]
                ours = tokens.shown(piece.tokens, piece.weights > 0, place.ours, habits.decode)
            if row.theirs is not None:
                theirs = tokens.shown(row.theirs, row.trained, place.theirs, habits.decode)
            shown[place.kind].append(TokenDifference(row.origin, place.kind, place.ours[0], ours, theirs))
    return [each for kind in shown.values() for each in kind]
