"""What a row holds: read in the format of its source, it becomes items, or it is bad and says why.

In: rows of `sources.py`, and their format (`detection.py`). Out: items (`items.py`), or the `Problem` that makes a row
bad. What each format reads is `readings.py`; tokens and masks of conversations are left to `chat/`.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jaxsft.config import SourceConfig
from jaxsft.rows.detection import SAMPLE, choose_format, rename
from jaxsft.rows.flags import could_be_flag
from jaxsft.rows.items import Conversation, Document, Item, Tokenised
from jaxsft.rows.messages import AS_USUAL, Spelling
from jaxsft.rows.readings import FORMATS, PREFERENCE, Format, says
from jaxsft.rows.roles import ALIASES
from jaxsft.rows.sources import Problem, Row, bad_rows, read_rows
from jaxsft.rows.strict import TOO_DEEP, BadRow, short


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
    there = rename(row.fields, columns) if columns else row.fields
    fields = {name: value for name, value in there.items() if value is not None}
    try:
        _check_kind(fields)
        if refused:
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
    except RecursionError:  # JSON in a text of JSON: too deep together
        return Problem("too-deep", row.origin, TOO_DEEP)
    return [item._replace(origin=row.origin) for item in items]


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


def _missing(row: Row, name: str, columns: Mapping[str, str], format: str) -> BadRow:
    if {"chosen", "rejected"} <= row.fields.keys():
        return BadRow("preference-row", PREFERENCE)
    theirs = f"{columns[name]!r} (for {name})" if name in columns else repr(name)
    there = [column for column, value in row.fields.items() if value is not None]
    reason = f"no column {theirs}, or null; the rows are read as {format!r}, this one has {', '.join(there) or 'none'}"
    return BadRow("missing-column", reason)


_MEDIA = ("image", "images", "video", "videos", "audio", "audios", "image_url", "pixel_values")


def _check_kind(fields: dict[str, Any]) -> None:
    """Refuses rows with images, audio or video, and rows that say whether an answer is good."""
    for name in () if fields.keys().isdisjoint(_MEDIA) else _MEDIA:
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
    """Refuses a column that a richer format would read, unless its text also stands in a column that is read."""
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
    """Whether the text of a column also stands in the texts that are read. Of a row that is one text, a short column
    must begin it: further inside, a few characters may be there by chance."""
    text = " ".join(value.split()) if isinstance(value, str) else None
    if text is None:
        return False
    if is_whole and len(text) < 20:
        return any(each.startswith(text) for each in texts)
    return any(text in each for each in texts)


def _check_unread(fields: dict[str, Any], known: Format, items: Sequence[Item], spelling: Spelling) -> None:
    """Refuses a column that is not read and could say which turns are trained."""
    mask = fields.get("mask")
    is_chat = isinstance(items[0], Conversation) if items else False
    # In NeMo's data, `mask` names the role whose turns are not trained.
    whose = ALIASES.get(mask.lower()) if isinstance(mask, str) and "mask" not in spelling.ignored else "user"
    if is_chat and whose not in ("user", "system"):
        raise BadRow("unknown-flag", f"mask: {short(mask)} is not to be trained; use data.train_on, and ignore_keys")
    unread = [name for name, values in fields.items() if isinstance(values, list) and name not in known.columns]
    if not unread:
        return
    counts: set[int] = set()
    for item in items:
        if isinstance(item, Conversation):
            counts |= {len(item.messages), sum(message["role"] == "assistant" for message in item.messages)}
    for name in unread:
        values = fields[name]
        if name in (*known.optional, *spelling.ignored):
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
