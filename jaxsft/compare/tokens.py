"""Two preparations of the same row held against each other: every token and every weight that differs, by cause.

In: what both made of a row, and what transformers renders of it (`Row`). Out: `Found`, stretches of one kind each. A
token differs where it has no partner on the other side, a weight where two partners are not trained alike. The first
token of an example is nobody's target, so its weight is 0 on both sides. Nothing here knows jax, torch or TRL.
"""

import difflib
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np

TEMPLATE, ASSISTANT = "template", "assistant"
"""Writers of a token that matter here; see `chat.encoder.WRITERS`."""
OTHER = "other"
MOST_MERGED = 12
"""Stretches that are looked at together, to see whether they are the same text in other tokens."""

EXPLANATIONS = {
    "every token trained": "TRL trains the whole text, the questions and the template's words too: it refuses to mask "
    "by turns where it neither knows the chat template nor finds generation tags in it, and its default is no mask.",
    "header trained": "TRL trains the end of the assistant's header, which the model is given when it is asked: the "
    "generation tags of its training template begin before it.",
    "after the stop token": "TRL trains what the template writes after the stop token, as a rule a line break, though "
    "generation has ended there.",
    "stop token not trained": "Ours trains the stop token that ends the turn and TRL does not, so that the model would "
    "not learn to stop there.",
    "stop token appended": "The template writes no stop token after the last turn; ours appends one, or puts it in the "
    "place of what the template writes.",
    "answer not trained": "A turn of the assistant, or a part of one, that ours trains and TRL does not: its mask has "
    "only the completion, or only what stands between generation tags.",
    "boundary token": "A token that is header and answer at once: one side trains it, the other does not.",
    "empty mask": "TRL trains nothing of this row.",
    "left out by the config": "TRL trains words of the assistant that the config leaves out (earlier turns, reasoning, "
    "turns of weight 0), for which it has no setting.",
    "weight": "The row or turn has a weight of its own; TRL knows none and trains it with 1.",
    "unrolled": "The template shows the model another past later (it strips earlier thinking). Ours makes an example "
    "of each such turn, with the past that the model will see there; TRL makes one of all.",
    "control tokens": "Text of the data spells a control token: ours writes it as ordinary text, TRL as the token.",
    "template patched": "TRL replaced the chat template by one of its own for training, which writes other text.",
    "length": "Longer than seq_len: TRL cuts there, and leaves out a row that then trains nothing; ours does what "
    "data.overlong says.",
    "begin of text": "One side has a begin-of-text token more than the other.",
    "end of text": "One side has an end-of-text token more than the other.",
    "row changed": "datasets gave TRL another row than stands in the file.",
    "other text": "transformers renders the row with this template otherwise than ours.",
    "tokenised otherwise": "The same text in other tokens, none of them a control token.",
    "refused": "Ours refuses the row, and says why; TRL trains it.",
    "missing": "TRL has no example of this row, though it has trained tokens within seq_len.",
    OTHER: "Not explained.",
}
"""Kind -> what it means and whose doing it is."""


class Piece(NamedTuple):
    """One example as ours prepared it."""

    tokens: np.ndarray
    weights: np.ndarray
    writers: tuple[str, ...]
    """Who wrote each token."""


class Row(NamedTuple):
    """What was made of one source row."""

    origin: str
    pieces: tuple[Piece, ...]
    """Our examples of it: several where it is unrolled or split, none where it is left out."""
    theirs: np.ndarray | None
    """Tokens of TRL's example; None where it has none."""
    trained: np.ndarray
    """bool, like `theirs`."""
    rendered: np.ndarray | None = None
    """What transformers makes of the row with the very template; None: was not asked, for the tokens are equal."""
    patched: np.ndarray | None = None
    """The same with TRL's training template; None: it has none."""
    is_unrolled: bool = False
    is_cut: bool = False
    """Ours lost tokens to `data.overlong`, or is in pieces."""
    is_refused: bool = False
    is_changed: bool = False
    """The row that TRL saw is not the one in the file."""


class Habits(NamedTuple):
    """What holds for all rows of a comparison."""

    max_length: int
    stops: frozenset[int]
    control: frozenset[int]
    begin: int | None
    """Id of the begin-of-text token."""
    masks: str
    """What TRL trains: "assistant", "completion" or "all"."""
    decode: Callable[[Sequence[int]], str]


class Place(NamedTuple):
    """A stretch that differs for one reason."""

    kind: str
    piece: int
    """Index among our examples; -1 where we have none."""
    ours: tuple[int, int]
    """First index, and the one after the last."""
    theirs: tuple[int, int]
    tokens: int
    """Tokens without a partner, of both sides."""
    weights: int
    """Partners that are not trained alike."""


class Found(NamedTuple):
    """The differences of one row."""

    places: tuple[Place, ...]
    differing_tokens: int
    """Tokens that differ, counted apart from their causes, to check that none is missed or told twice."""
    differing_weights: int


def compare(row: Row, habits: Habits) -> Found:
    """All that differs between two preparations of a row, each token and weight in exactly one place."""
    sizes = [len(piece.tokens) for piece in row.pieces]
    theirs = row.theirs
    if not row.pieces or theirs is None:
        size = sum(sizes) + (0 if theirs is None else len(theirs))
        if not size:
            return Found((), 0, 0)
        kind = _whole_row_kind(row, habits)
        ours_end, theirs_end = sum(sizes[:1]), 0 if theirs is None else len(theirs)
        return Found((Place(kind, 0 if sizes else -1, (0, ours_end), (0, theirs_end), size, 0),), size, 0)
    base = len(row.pieces) - 1 if row.is_unrolled else 0
    places = [
        Place("unrolled" if row.is_unrolled else "length", number, (0, size), (0, 0), size, 0)
        for number, size in enumerate(sizes)
        if number != base
    ]
    piece = row.pieces[base]
    codes = align(piece.tokens, theirs)
    places += [place._replace(piece=base) for place in _token_places(row, piece, codes, habits)]
    weights = [place._replace(piece=base) for place in _weight_places(row, piece, codes, habits)]
    partners = sum(end - start for tag, start, end, _, _ in codes if tag == "equal")
    ours_of, theirs_of = _partners(codes)
    alike = _effective(piece.weights)[ours_of] == _effective(row.trained)[theirs_of]
    return Found((*places, *weights), sum(sizes) + len(theirs) - 2 * partners, int(np.sum(~alike)))


Code = tuple[str, int, int, int, int]


def align(ours: np.ndarray, theirs: np.ndarray) -> list[Code]:
    """Stretches in order, as difflib names them; equal ends are matched first, so that one insertion stays one.

    align([1, 2, 3], [1, 3]) == [("equal", 0, 1, 0, 1), ("delete", 1, 2, 1, 1), ("equal", 2, 3, 1, 2)]
    """
    least = min(len(ours), len(theirs))
    same = np.asarray(ours)[:least] == np.asarray(theirs)[:least]
    head = least if same.all() else int(np.argmin(same))
    rest = least - head
    same = np.asarray(ours)[len(ours) - rest :][::-1] == np.asarray(theirs)[len(theirs) - rest :][::-1]
    tail = rest if same.all() else int(np.argmin(same))
    ours_left, theirs_left = (each[head : len(each) - tail].tolist() for each in (ours, theirs))
    matcher = difflib.SequenceMatcher(None, ours_left, theirs_left, autojunk=False)
    codes: list[Code] = [("equal", 0, head, 0, head)] if head else []
    codes += [(tag, a + head, b + head, c + head, d + head) for tag, a, b, c, d in matcher.get_opcodes()]
    if tail:
        codes.append(("equal", len(ours) - tail, len(ours), len(theirs) - tail, len(theirs)))
    return codes


def _partners(codes: Sequence[Code]) -> tuple[np.ndarray, np.ndarray]:
    """int64 [n] each: indices of the tokens that have one another."""
    spans = [(a, b, c, d) for tag, a, b, c, d in codes if tag == "equal"]
    ours = [np.arange(a, b) for a, b, _, _ in spans]
    theirs = [np.arange(c, d) for _, _, c, d in spans]
    empty = [np.zeros(0, np.int64)]
    return np.concatenate(ours or empty), np.concatenate(theirs or empty)


def _effective(weights: np.ndarray) -> np.ndarray:
    """float64: the first token is nobody's target."""
    found = np.array(weights, np.float64)
    found[:1] = 0.0
    return found


def _whole_row_kind(row: Row, habits: Habits) -> str:
    """Why one of the two has no example of the row at all."""
    if row.is_refused:
        return "refused"
    if not row.pieces:
        return "length" if row.is_cut else OTHER
    piece = row.pieces[0]
    fits = np.any(_effective(piece.weights)[: habits.max_length])
    return "missing" if fits and not row.is_cut and len(piece.tokens) <= habits.max_length else "length"


# Tokens without a partner.


def _token_places(row: Row, piece: Piece, codes: Sequence[Code], habits: Habits) -> list[Place]:
    assert row.theirs is not None
    places, at = [], 0
    while at < len(codes):
        tag, a, b, c, d = codes[at]
        if tag == "equal":
            at += 1
            continue
        is_last = at == len(codes) - 1
        until = _same_text(codes, at, piece.tokens, row.theirs, habits)
        if until:
            spelt = any(int(id) in habits.control for id in row.theirs[c : codes[until - 1][4]])
            kind = "control tokens" if spelt else "tokenised otherwise"
        else:
            until, kind = at + 1, _token_kind(row, piece, codes[at], habits, is_last=is_last)
        for tag, a, b, c, d in codes[at:until]:
            if tag != "equal":
                places.append(Place(kind, 0, (a, b), (c, d), b - a + d - c, 0))
        at = until
    return places


def _same_text(codes: Sequence[Code], at: int, ours: np.ndarray, theirs: np.ndarray, habits: Habits) -> int:
    """The end of the stretches from `at` on that are the same text in other tokens; 0 where they are not."""
    _, a, _, c, _ = codes[at]
    for until in range(at + 1, min(at + MOST_MERGED, len(codes)) + 1):
        _, _, b, _, d = codes[until - 1]
        if b == a or d == c or codes[until - 1][0] == "equal":
            continue
        if habits.decode(ours[a:b].tolist()) == habits.decode(theirs[c:d].tolist()):
            return until
    return 0


def _token_kind(row: Row, piece: Piece, code: Code, habits: Habits, *, is_last: bool) -> str:
    assert row.theirs is not None
    _, a, b, c, d = code
    lacking, added = piece.tokens[a:b].tolist(), row.theirs[c:d].tolist()
    if is_last and (len(row.theirs) == habits.max_length or row.is_cut) and _is_cut_short(row, piece, code, habits):
        return "length"
    if {*lacking, *added, *piece.tokens[:a].tolist()} == {habits.begin}:
        return "begin of text"
    if b == len(piece.tokens) and lacking and lacking[-1] in habits.stops:
        return "stop token appended"
    if is_last and not lacking and set(added) <= habits.stops:
        return "end of text"
    expected = row.patched if row.patched is not None else row.rendered
    if expected is None or not np.array_equal(expected[: habits.max_length], row.theirs):
        return "row changed" if row.is_changed else OTHER
    if row.is_unrolled and not _equals(row.rendered, piece.tokens):
        return "unrolled"
    if row.patched is not None and not _equals(row.rendered, row.patched):
        return "template patched"
    return "other text"


def _equals(one: np.ndarray | None, other: np.ndarray) -> bool:
    return one is not None and np.array_equal(one, other)


def _is_cut_short(row: Row, piece: Piece, code: Code, habits: Habits) -> bool:
    """The stretch is the end of one side that the other was not let go on to."""
    _, a, b, c, d = code
    if len(row.theirs if row.theirs is not None else ()) == habits.max_length and b > a:
        return True
    return row.is_cut and d > c


# Partners that are not trained alike.


def _weight_places(row: Row, piece: Piece, codes: Sequence[Code], habits: Habits) -> list[Place]:
    ours_of, theirs_of = _partners(codes)
    ours, theirs = _effective(piece.weights), _effective(row.trained)
    places: list[Place] = []
    for a, c in zip(ours_of.tolist(), theirs_of.tolist(), strict=True):
        if ours[a] == theirs[c]:
            continue
        kind = _weight_kind(row, piece, a, c, habits)
        last = places[-1] if places else None
        if last is not None and (last.kind, last.ours[1], last.theirs[1]) == (kind, a, c):
            places[-1] = last._replace(
                ours=(last.ours[0], a + 1), theirs=(last.theirs[0], c + 1), weights=last.weights + 1
            )
        else:
            places.append(Place(kind, 0, (a, a + 1), (c, c + 1), 0, 1))
    return places


def _weight_kind(row: Row, piece: Piece, a: int, c: int, habits: Habits) -> str:
    weight, is_trained = float(piece.weights[a]), bool(row.trained[c])
    if weight and is_trained:
        return "weight"
    if weight:
        return _untrained_by_them(row, piece, a, c, habits)
    if habits.masks == "all":
        return "every token trained"
    before, after = _nearest(piece.weights, a)
    start, end = _run(row.trained, c)
    run = slice(max(a - (c - start), 0), a + end - c)  # the same stretch of ours, as long as no token is missing in it
    if not piece.weights[run].any() and ASSISTANT in piece.writers[run]:
        return "unrolled" if row.is_unrolled else "left out by the config"
    follows_stop = before is not None and int(piece.tokens[before]) in habits.stops
    if follows_stop and before is not None and _is_template(piece, before + 1, a + 1):
        text = habits.decode(piece.tokens[before + 1 : a + 1].tolist())
        if not text.strip():
            return "after the stop token"
    if after is not None and _is_template(piece, a, after) and c + after - a < end:
        return "header trained"
    if piece.writers[a] == ASSISTANT:
        return "left out by the config"
    return "boundary token" if after == a + 1 or before == a - 1 else OTHER


def _untrained_by_them(row: Row, piece: Piece, a: int, c: int, habits: Habits) -> str:
    if not row.trained[1:].any():
        return "empty mask"
    goes_before, goes_after = bool(row.trained[c - 1]), c + 1 < len(row.trained) and bool(row.trained[c + 1])
    if int(piece.tokens[a]) in habits.stops and goes_before:
        return "stop token not trained"
    if goes_after and (a == 0 or not piece.weights[a - 1]):
        return "boundary token"
    return "answer not trained"


def _run(trained: np.ndarray, c: int) -> tuple[int, int]:
    """The stretch of trained tokens that holds one."""
    before, after = np.nonzero(~trained[:c])[0], np.nonzero(~trained[c:])[0]
    return (int(before[-1]) + 1 if len(before) else 0), (int(after[0]) + c if len(after) else len(trained))


def _nearest(weights: np.ndarray, a: int) -> tuple[int | None, int | None]:
    """The trained tokens before and after an index."""
    before, after = np.nonzero(weights[:a])[0], np.nonzero(weights[a + 1 :])[0]
    return (int(before[-1]) if len(before) else None), (int(after[0]) + a + 1 if len(after) else None)


def _is_template(piece: Piece, start: int, end: int) -> bool:
    return all(writer == TEMPLATE for writer in piece.writers[start:end])


# Texts for people.


def shown(
    tokens: np.ndarray,
    trained: np.ndarray,
    at: tuple[int, int],
    decode: Callable[[Sequence[int]], str],
    around: int = 8,
) -> str:
    """The tokens around a stretch as text; trained ones in [[...]]."""
    start, end = max(at[0] - around, 0), min(at[1] + around, at[0] + 6 * around, len(tokens))
    text, at_token = ("..." if start else ""), start
    while at_token < end:
        until = at_token
        while until < end and bool(trained[until]) == bool(trained[at_token]):
            until += 1
        part = decode(tokens[at_token:until].tolist())
        text += f"[[{part}]]" if trained[at_token] else part
        at_token = until
    return text + ("..." if end < len(tokens) else "")


def count_by_kind(found: Collection[Found]) -> dict[str, tuple[int, int, int]]:
    """Kind -> rows that have it, tokens without a partner, partners trained otherwise; most tokens first."""
    counts: dict[str, list[int]] = {}
    for each in found:
        for kind in {place.kind for place in each.places}:
            counts.setdefault(kind, [0, 0, 0])[0] += 1
        for place in each.places:
            counts[place.kind][1] += place.tokens
            counts[place.kind][2] += place.weights
    ordered = sorted(counts.items(), key=lambda each: -each[1][1] - each[1][2])
    return {kind: (rows, tokens, weights) for kind, (rows, tokens, weights) in ordered}
