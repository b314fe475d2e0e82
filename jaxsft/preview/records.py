"""The preview as plain records: what `make.py` finds out, and what the terminal, the page and `--json` show.

The fields are the machine-readable preview, see `as_json`: their names stay.
"""

from typing import Any, NamedTuple

from jaxsft.chat.encoder import WRITERS
from jaxsft.preview.pieces import Injection, Piece

JSON_VERSION = 1
"""Changes when a field changes its meaning or goes."""


class Longest(NamedTuple):
    """The longest example of a source, kept or not."""

    tokens: int
    origin: str


class Source(NamedTuple):
    """What became of the rows of one source."""

    path: str
    format: str
    format_reason: str
    columns_ignored: tuple[str, ...]
    keys_ignored: dict[str, int]
    """Of messages, and how many messages have them."""
    rows: int
    bad_rows: int
    items: int
    """Conversations or documents in the good rows."""
    examples: int
    tokens: int
    trained_tokens: int
    length_percentiles: dict[str, int]
    """Tokens per example, those included that were dropped; by percentile."""
    longest: Longest
    draws_per_epoch: float
    asked_share: float
    """Share of all draws, as the config asks for it."""
    realised_share: float
    """Share of the draws in the rows of the first epoch, as far as they were looked through."""


class Loss(NamedTuple):
    """What was left out for one reason."""

    kind: str
    """ "dropped" examples, "cut" examples or "bad" rows."""
    reason: str
    amount: int
    """Examples, or rows."""
    tokens: int | None
    """None for bad rows, which have none."""
    remedy: str


class Count(NamedTuple):
    """Something unusual, and how often it was met."""

    name: str
    amount: int
    meaning: str


class Bar(NamedTuple):
    """How many examples have `first` to `last` tokens; `last` is None for all longer ones, which were dropped."""

    first: int
    last: int | None
    num_examples: int


class RowLength(NamedTuple):
    """How full rows of some length would be."""

    seq_len: int
    fill: float
    """Share of their positions that would hold tokens."""


class Totals(NamedTuple):
    """All sources together."""

    rows: int
    bad_rows: int
    examples: int
    tokens: int
    trained_tokens: int
    packed_rows: int
    """Rows of the first epoch, or of a stream's first window."""
    drawn_examples: float
    """Per epoch."""
    fill: float
    """Share of the positions of `packed_rows` that hold tokens."""
    steps_per_epoch: int
    step_examples: int
    """Examples in step 0; the next three are of step 0, too."""
    step_tokens: int
    step_trained_tokens: int
    step_positions: int


class Segment(NamedTuple):
    """An example in its row."""

    example: int
    """Number in the dataset."""
    shown: int | None
    """Its number among the examples of the preview."""
    num_tokens: int
    num_trained: int
    runs: tuple[int, ...]
    """Tokens not trained, then trained, then not, and so on; only two numbers where there would be very many."""


class Row(NamedTuple):
    """A row of a batch, packed."""

    step: int
    number: int
    """Within the batch, from 1."""
    segments: tuple[Segment, ...]
    num_padding: int


class Gap(NamedTuple):
    """Tokens in the middle of a long example that are not shown."""

    position: int
    num_tokens: int
    num_trained: int


class Example(NamedTuple):
    """An example token by token."""

    number: int
    """Within the preview, from 1."""
    example: int
    """Of the dataset, from 0."""
    source: int
    """Index into `sources`."""
    origin: str
    """file:line of its row."""
    reasons: tuple[str, ...]
    """Why it is shown."""
    row: int | None
    """Index into `rows`; None where it is not in the first epoch, or late in a long one."""
    segment: int | None
    """Within the row, from 1."""
    siblings: tuple[int, ...]
    """Numbers, within the preview, of the examples of the same conversation, this one included; empty if alone."""
    num_siblings: int
    """All of them, shown or not; 1 if alone."""
    num_tokens: int
    num_trained: int
    gap: Gap | None
    injections: tuple[Injection, ...]
    appended_stop: bool
    """Its last token is a stop token that its source's template does not write."""
    pieces: tuple[Piece, ...]


class Preview(NamedTuple):
    """All that is shown."""

    title: str
    stream: bool
    """Of a stream only the first window is known, and counted."""
    seq_len: int
    batch_size: int
    """Rows in a batch."""
    totals: Totals
    sources: tuple[Source, ...]
    losses: tuple[Loss, ...]
    counts: tuple[Count, ...]
    notes: tuple[str, ...]
    """What the user should know about tokenizer and template, in sentences."""
    lengths: tuple[Bar, ...]
    row_lengths: tuple[RowLength, ...]
    """Values of `data.seq_len` that keep the same examples whole, that of the run among them, the shortest first."""
    rows: tuple[Row, ...]
    examples: tuple[Example, ...]


def as_json(preview: Preview) -> dict[str, Any]:
    """The preview as plain JSON: the fields of the records above, but for `pieces`, in whose place each example has

        tokens: {"ids": [...], "texts": [...], "weights": [...], "writers": [...]}
        special, stops: indices into these lists, of control tokens and of stop tokens that are trained

    Column k is token k of the example; behind a `gap`, token k + gap.num_tokens. Where a character is several tokens,
    its text stands with the first and is null with the others. `writers` are indices into the list `writers` at the
    top, beside `version`.
    """
    return {"version": JSON_VERSION, "writers": list(WRITERS)} | _plain(preview)


def _plain(value: Any) -> Any:
    if isinstance(value, Example):
        fields = {name: _plain(field) for name, field in value._asdict().items() if name != "pieces"}
        return fields | _columns(value.pieces)
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: _plain(field) for name, field in value._asdict().items()}
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def _columns(pieces: tuple[Piece, ...]) -> dict[str, Any]:
    ids: list[int] = []
    texts: list[str | None] = []
    weights: list[float] = []
    writers: list[int] = []
    special, stops = [], []
    for piece in pieces:
        special += [len(ids)] * piece.is_special
        stops += [len(ids)] * piece.is_stop
        size = len(piece.tokens)
        ids += piece.tokens
        texts += [piece.text, *[None] * (size - 1)]
        weights += [_short(piece.weight)] * size
        writers += [WRITERS.index(piece.writer)] * size
    columns = {"ids": ids, "texts": texts, "weights": weights, "writers": writers}
    return {"tokens": columns, "special": special, "stops": stops}


def _short(weight: float) -> float:
    """Without the digits that float32 adds: 0.1 for 0.10000000149; whole numbers as such."""
    return int(weight) if weight == int(weight) else float(f"{weight:.6g}")
