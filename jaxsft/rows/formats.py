"""What a row means: the format of a source is chosen by its columns, and its rows become items.

In: rows of `sources.py`. Out: items, or the `Problem` that makes a row bad. What each format reads is `readings.py`;
tokens and masks of conversations are left to `chat.py`.
"""

import collections
import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxsft.config import SourceConfig
from jaxsft.rows.flags import could_be_flag
from jaxsft.rows.items import Conversation, Document, Item, Tokenised
from jaxsft.rows.messages import AS_USUAL, READ_KEYS, Message, Spelling
from jaxsft.rows.readings import FORMATS, PREFERENCE, Format, says
from jaxsft.rows.roles import ALIASES, check_role
from jaxsft.rows.sources import DataError, Problem, Row, bad_rows, read_rows
from jaxsft.rows.strict import TOO_DEEP, BadRow, short

__all__ = [
    "FORMATS", "SAMPLE", "Chosen", "Conversation", "Document", "Item", "Message", "Problem", "Tokenised",
    "choose_format", "convert", "detect_format", "load_items", "rename",
]  # fmt: skip


class Chosen(NamedTuple):
    """The format in which the rows of a source are read."""

    format: str
    reason: str
    """Why this one, for the user."""
    ignored: list[str]
    """Columns of the rows that it does not read."""
    columns: Mapping[str, str]
    """Ours -> theirs: those of the config, and names that differ from ours in capitals or blanks alone."""
    refused: frozenset[str]
    """Columns that no row may have, since this format was only detected, and another would make more of them."""


def choose_format(rows: Sequence[Row], source: SourceConfig) -> Chosen:
    """The format of a source, from the config or from the columns of its first rows; each row counts, so that one odd
    row decides nothing.

    Raises:
        DataError: no format fits, or the source's `format`, `columns` or `roles` cannot be right.
    """
    _check_settings(rows, source)
    columns, folded = dict(source.columns), _folded(rows, source)
    if source.format is not None:
        format, reason = source.format, "given in the config"
    else:
        found, error = _detected(rows, columns)
        if found is None:
            columns = folded | columns
            found, _ = _detected(rows, columns)
        if found is None:
            raise DataError(f"{source.path}: {error or 'no rows that can be read'}")
        format = found
        reason = f"has the columns {', '.join(columns.get(name, name) for name in FORMATS[format].columns)}"
    known = FORMATS[format]
    read = known.columns + known.optional
    columns |= {ours: theirs for ours, theirs in folded.items() if ours in read and ours not in columns}
    there = dict.fromkeys(name for row in rows for name in rename(row.fields, columns))
    refused: frozenset[str] = frozenset() if source.format is not None else _richer(format)
    in_part = {theirs.split(".")[0] for theirs in columns.values()}
    ignored = [name for name in there if name not in read and name not in in_part]
    return Chosen(format, reason, ignored, columns, refused - in_part)


def _detected(rows: Sequence[Row], columns: Mapping[str, str]) -> tuple[str | None, DataError | None]:
    """The format of most rows; None where none fits any row, and what is said of the first."""
    found: collections.Counter[str] = collections.Counter()
    first: DataError | None = None
    for row in rows:
        fields = rename(row.fields, columns)
        try:
            found[detect_format(name for name, value in fields.items() if value is not None)] += 1
        except DataError as error:
            first = first or error
    return (found.most_common(1)[0][0] if found else None), first


def _folded(rows: Sequence[Row], source: SourceConfig) -> dict[str, str]:
    """Columns whose names are ours but for capitals, and blanks or hyphens: ours -> theirs."""
    there = dict.fromkeys(name for row in rows for name in row.fields)
    known = {name for format in FORMATS.values() for name in (*format.columns, *format.optional)}
    found: dict[str, list[str]] = {}
    for name in there:
        ours = re.sub(r"[\s-]+", "_", name.strip().lower())
        if ours in known and ours not in there and ours not in source.columns and name not in source.columns.values():
            found.setdefault(ours, []).append(name)
    return {ours: theirs[0] for ours, theirs in found.items() if len(theirs) == 1}


def _richer(format: str) -> frozenset[str]:
    """Columns that rows of a format may not have beside its own: what they say would be lost.

    Of plain text, all that any other format is made of; of a question and its answer, what a format with the same
    question or answer reads as a part of either.
    """
    known = FORMATS[format]
    read = {*known.columns, *known.optional}
    others = [other for name, other in FORMATS.items() if name != format and other.context is not None]
    if format == "text":
        names = {name for other in FORMATS.values() for name in (*other.columns, *(other.context or ()))}
        return frozenset(names - read - _PROVENANCE)
    if known.context is None:
        return frozenset()
    return (
        frozenset(name for other in others if set(other.columns) & set(known.columns) for name in other.context or ())
        - read
    )


_PROVENANCE = {"source", "user", "SOURCE", "message_tree_id"}
"""Columns of other formats that beside a text only say where it comes from."""


def detect_format(columns: Iterable[str]) -> str:
    """The first format of `FORMATS`, in its order, whose columns are all there.

        detect_format(["id", "messages", "prompt", "completion"]) == "messages"

    Raises:
        DataError: no format fits; lists the columns and what every format needs.
    """
    columns = list(columns)
    if set(_FLAT_TREE) <= set(columns):
        raise DataError(
            f"columns {', '.join(_FLAT_TREE)}: messages of OpenAssistant's trees, one a row; use the files of whole "
            "trees, one tree a row (columns message_tree_id and prompt)"
        )
    for name, known in FORMATS.items():
        if set(known.columns) <= set(columns):
            return name
    given = f"no known format has the columns {', '.join(columns) or '(none)'}"
    if {"chosen", "rejected"} <= set(columns):
        raise DataError(f"{given}: {PREFERENCE}")
    if columns == [str(number) for number in range(1, len(columns) + 1)]:
        given += " (numbers stand for a first line that holds no names); name them by `columns`, such as "
        given += "columns={question: '1', answer: '2'}"
    else:
        given += "; name them by `columns` (ours: theirs), such as columns={prompt: inputs, completion: targets}"
    needs = "\n".join(f"  {name}: {', '.join(known.columns)}" for name, known in FORMATS.items())
    raise DataError(f"{given}. The formats need:\n{needs}")


def convert(
    row: Row,
    format: str,
    *,
    columns: Mapping[str, str] = {},
    spelling: Spelling = AS_USUAL,
    trained_roles: Collection[str] | None = ("assistant",),
    refused: Collection[str] = (),
) -> list[Item] | Problem:
    """What a row holds (one item, or one per path of a message tree), or why it is bad.

    `columns` (ours -> theirs) renames. A row without a turn of `trained_roles` is bad, since nothing of it would be
    trained; None means that any turn will do. Nor may a row have any column of `refused`.
    """
    known = FORMATS[format]
    fields = {name: value for name, value in rename(row.fields, columns).items() if value is not None}
    try:
        _check_kind(fields)
        _check_refused(fields, refused, format)
        if "instruction" in known.columns and "input" in known.optional and says(fields.get("input")):
            fields.setdefault("instruction", "")  # The question may stand in `input` alone.
        for name in known.columns:
            if name not in fields:
                raise _missing(row, name, columns, format)
        items = known.convert(fields, spelling)
        _check_unread(fields, known, items, spelling)
        for item in items:
            _check_trained(item, trained_roles)
    except BadRow as bad:
        return Problem(bad.code, row.origin, str(bad))
    except RecursionError:  # JSON in the text of JSON, each of which is not too deep alone.
        return Problem("too-deep", row.origin, TOO_DEEP)
    return [item._replace(origin=row.origin) for item in items]


def rename(fields: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Columns under our names; what stood under such a name before is not read.

    rename({"answers": {"text": ["a", "b"]}}, {"completion": "answers.text.0"}) == {"completion": "a"}
    """
    if not columns:
        return dict(fields)
    rest = {name: value for name, value in fields.items() if name not in columns and name not in columns.values()}
    found = {ours: _value_at(fields, theirs) for ours, theirs in columns.items()}
    return rest | {ours: value for ours, value in found.items() if value is not None}


def _value_at(fields: Mapping[str, Any], path: str) -> Any:
    """The column of that name, or what a path of keys and numbers from 0 leads to; None where there is nothing."""
    if path in fields:
        return fields[path]
    value: Any = fields
    for key in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(key)
        elif isinstance(value, list) and re.fullmatch(r"\d+", key) and int(key) < len(value):
            value = value[int(key)]
        else:
            return None
    return value


def load_items(source: SourceConfig, *, limit: int | None = None) -> list[Item]:
    """All items of a source, or of its first `limit` rows.

    Raises:
        DataError: a source that cannot be read, settings that cannot be right, or all bad rows together.
    """
    read = list(read_rows(source.path, limit=limit))
    rows = [row for row in read if isinstance(row, Row)]
    problems = [row for row in read if isinstance(row, Problem)]
    if not rows:
        raise bad_rows(problems, "bad")
    chosen = choose_format(rows[:SAMPLE], source)
    spelling = Spelling(source.roles, source.keys)
    items = []
    for row in rows:
        found = convert(row, chosen.format, columns=chosen.columns, spelling=spelling, refused=chosen.refused)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            items += found
    if problems:
        raise bad_rows(problems, f"bad (format {chosen.format!r})")
    return items


SAMPLE = 100
"""Rows from which a format is chosen."""


_FLAT_TREE = ("message_id", "parent_id", "text", "role")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios", "image_url", "pixel_values")


def _check_settings(rows: Sequence[Row], source: SourceConfig) -> None:
    if source.format is not None and source.format not in FORMATS:
        near = difflib.get_close_matches(source.format, FORMATS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise DataError(f"{source.path}: format {source.format!r} is not known{hint}; known: {', '.join(FORMATS)}")
    there = list(dict.fromkeys(name for row in rows for name in row.fields))
    formats = [FORMATS[source.format]] if source.format else list(FORMATS.values())
    known = list(dict.fromkeys(name for format in formats for name in (*format.columns, *format.optional)))
    for ours, theirs in source.columns.items():
        if ours not in known:
            near = difflib.get_close_matches(ours, known, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            of = f"format {source.format!r}" if source.format else "any format"
            raise DataError(
                f"{source.path}: columns: {ours!r} is no column of {of}{hint}; `columns` is ours: theirs, and ours are "
                f"{', '.join(known)}"
            )
        if rows and theirs not in there and all(_value_at(row.fields, theirs) is None for row in rows):
            raise DataError(
                f"{source.path}: columns: {ours}: {theirs}: the rows have no column {theirs!r}; theirs are "
                f"{', '.join(there)}, and `a.b.0` is the first of the list under key b of column a"
            )
    for theirs, ours in source.keys.items():
        if ours not in READ_KEYS:
            near = difflib.get_close_matches(ours, READ_KEYS, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise DataError(
                f"{source.path}: keys: {theirs}: {ours!r} is no key of a turn{hint}; `keys` is theirs: ours, and ours "
                f"are {', '.join(READ_KEYS)}"
            )
    for theirs, ours in source.roles.items():
        try:
            check_role(ours, f"roles: {theirs}: {ours}")
        except BadRow as bad:
            raise DataError(f"{source.path}: {bad}; `roles` is theirs: ours, such as {{Doctor: assistant}}") from None


def _missing(row: Row, name: str, columns: Mapping[str, str], format: str) -> BadRow:
    if {"chosen", "rejected"} <= row.fields.keys():
        return BadRow("preference-row", PREFERENCE)
    theirs = f"{columns[name]!r} (for {name})" if name in columns else repr(name)
    there = [column for column, value in row.fields.items() if value is not None]
    reason = f"no column {theirs}, or null; the rows are read as {format!r}, this one has {', '.join(there) or 'none'}"
    return BadRow("missing-column", reason)


def _check_kind(fields: dict[str, Any]) -> None:
    """The row is for supervised training on text."""
    for name in _MEDIA:
        # A number or a flag may count or mark something, all else is a picture or where to find one.
        if fields.get(name) and not isinstance(fields[name], bool | int | float):
            raise BadRow("image-or-audio", f"column {name!r}: only text is supported, no images, audio or video")
    for name in ("kto_tag", "label"):
        if isinstance(fields.get(name), bool) and (
            name != "label" or {"completion", "messages", "conversations"} & fields.keys()
        ):
            reason = f"column {name!r} says whether the answer is good or bad; keep the good rows and leave it out"
            raise BadRow("preference-row", reason)


def _check_refused(fields: dict[str, Any], refused: Collection[str], format: str) -> None:
    """No column that a richer format would read is dropped without a word."""
    there = [name for name in fields if name in refused and says(fields[name])]
    if not there:
        return
    known = FORMATS[format]
    read = [" ".join(fields[name].split()) for name in known.columns if isinstance(fields.get(name), str)]
    if found := [name for name in there if not _is_in(fields[name], read, is_whole=format == "text")]:
        names = ", ".join(map(repr, found))
        own = " and ".join(known.columns)
        example = "columns={prompt: ..., completion: ...}"
        if format == "text":
            example = f"columns={{prompt: {found[0]}, completion: text}}"
        raise BadRow(
            "unread-column",
            f"read as {format!r} ({own}), without {names}: give format={format} if that is meant, or say what is what "
            f"by `columns` (ours: theirs), such as {example}",
        )


def _is_in(value: Any, texts: Sequence[str], *, is_whole: bool) -> bool:
    """Whether a column stands in the texts that are read as well; where one text is all of a row, not by chance."""
    text = " ".join(value.split()) if isinstance(value, str) else None
    if text is None:
        return False
    if is_whole and len(text) < 20:
        return any(each.startswith(text) for each in texts)
    return any(text in each for each in texts)


def _check_unread(fields: dict[str, Any], known: Format, items: Sequence[Item], spelling: Spelling) -> None:
    """No column that is not read says which turns are trained."""
    mask = fields.get("mask")
    is_chat = isinstance(items[0], Conversation) if items else False
    # NeMo's: whose turns are not trained.
    whose = ALIASES.get(mask.lower()) if isinstance(mask, str) and "mask" not in spelling.ignored else "user"
    if is_chat and whose not in ("user", "system"):
        raise BadRow("unknown-flag", f"mask: {short(mask)} is not to be trained; use data.train_on, and ignore_keys")
    counts: set[int] = set()
    for item in items:
        if isinstance(item, Conversation):
            counts |= {len(item.messages), sum(message["role"] == "assistant" for message in item.messages)}
    for name, values in fields.items():
        if not isinstance(values, list) or name in (*known.columns, *known.optional, *spelling.ignored):
            continue
        if len(values) not in counts or not all(isinstance(value, bool | int | float) for value in values):
            continue
        if could_be_flag(values):
            raise BadRow(
                "unknown-flag",
                f"the column {name!r} ({short(values)}) could say which turns are trained, and is not read; name it in "
                "data.ignore_keys, or give each turn its `weight`",
            )


def _check_trained(item: Item, trained_roles: Collection[str] | None) -> None:
    if isinstance(item, Document | Tokenised):
        weights = [item.weight] if isinstance(item, Document) else item.loss_weights
        if not any(weights):
            raise BadRow("nothing-trained", "the weight of the row is 0, or `train` is false, so nothing to train")
        return
    turns = item.messages[item.trained_from :]
    turns = [turn for turn in turns if turn.get("train", trained_roles is None or turn["role"] in trained_roles)]
    if not turns:
        wanted = " or ".join(trained_roles or ("any",))
        given = list(dict.fromkeys(message["role"] for message in item.messages))
        where = " in the completion" if item.trained_from else ""
        reason = f"no {wanted} turn{where}, so nothing to train (roles: {', '.join(given)})"
        if not set(given) <= ALIASES.keys():
            reason += "; other names are renamed by `roles` (theirs: ours)"
        raise BadRow("no-assistant-turn" if wanted == "assistant" else "no-trained-turn", reason)
    if not item.weight or not any(turn.get("weight", 1.0) for turn in turns):
        raise BadRow("nothing-trained", "every turn to train has weight 0 or `train` false, so nothing to train")
