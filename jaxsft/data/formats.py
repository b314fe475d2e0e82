"""What a row means: each format turns the columns of one row into conversations, plain text, or tokens.

In: rows of `sources.py`. Out: items, or the `Problem` that makes a row bad. A new format is one function and one entry
in `FORMATS`. How turns are spelt is `messages.py`; tokens and masks of conversations are left to `chat.py`.
"""

import collections
import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxsft.config import SourceConfig
from jaxsft.data import trees
from jaxsft.data.calls import read_tools
from jaxsft.data.flags import could_be_flag, read_flag, read_weight
from jaxsft.data.messages import (
    AS_USUAL,
    READ_KEYS,
    Message,
    Spelling,
    read_messages,
    read_template_kwargs,
    unread_keys,
)
from jaxsft.data.roles import ALIASES, check_role
from jaxsft.data.sources import DataError, Problem, Row, bad_rows, read_rows
from jaxsft.data.strict import (
    BadRow,
    ListAsWritten,
    ObjectAsWritten,
    check_text,
    inner_json,
    kind_of,
    parse_json,
    short,
)
from jaxsft.data.tokenised import MASKS, read_tokens


class Conversation(NamedTuple):
    """Messages of one row, as chat templates take them."""

    messages: list[Message]
    """Dicts with role, content, reasoning_content, tool_calls, tool_call_id, name, and what says how they are trained
    (`flags.py`) where the data has it; other keys of the data stay as they are."""
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = {}
    """Further variables of the chat template."""
    trained_from: int = 0
    """Messages before this index are never trained: the prompt of a prompt/completion row."""
    origin: str = ""
    weight: float = 1.0
    """Of all that is trained in it."""
    train_on: str | None = None
    """"last_turn" where the row asks for it, whatever the config says."""
    unread_keys: dict[str, int] = {}
    """Keys of its messages that nobody reads, and how many messages have them."""


class Document(NamedTuple):
    """Plain text, all of it trained or, where `trained` is given, only those parts of it (first character, end)."""

    text: str
    origin: str = ""
    weight: float = 1.0
    trained: tuple[tuple[int, int], ...] | None = None


class Tokenised(NamedTuple):
    """Tokens, as the row has them."""

    tokens: list[int]
    loss_weights: list[float]
    """Weight of each token as a target."""
    origin: str = ""


Item = Conversation | Document | Tokenised


class Format(NamedTuple):
    """How rows of one format are recognised and read."""

    columns: tuple[str, ...]
    """Columns that every row must have."""
    optional: tuple[str, ...]
    """Columns that are read where a row has them."""
    convert: Callable[[dict[str, Any], Spelling], list[Item]]
    """Columns to items without origin. Raises BadRow."""
    context: tuple[str, ...] | None = None
    """Of a question and an answer in columns of their own: those of `optional` that are parts of either."""


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
        raise DataError(f"{given}: {_PREFERENCE}")
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
        if "instruction" in known.columns and "input" in known.optional and _says(fields.get("input")):
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


def _from_messages(column: str) -> Callable[[dict[str, Any], Spelling], list[Item]]:
    def read(fields: dict[str, Any], spelling: Spelling) -> list[Item]:
        turns = _list(fields, column)
        if all(isinstance(turn, str) for turn in turns) and (decoded := _decoded_turns(turns)):
            turns = decoded
        elif all(isinstance(turn, str) for turn in turns):
            # As in LIMA: texts that take turns, the user's first.
            turns = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(turns)]
        else:
            rounds = [_round(turn) for turn in turns if isinstance(turn, dict)]
            if len(rounds) == len(turns) and all(rounds):
                turns = [message for messages in rounds for message in messages]
        messages = read_messages(turns, spelling)
        if {"chosen", "rejected"} & fields.keys() and messages[-1]["role"] != "assistant":
            raise BadRow("preference-row", _PREFERENCE)
        return [_conversation(fields, messages, spelling)]

    return read


def _decoded_turns(texts: Sequence[str]) -> list[Any]:
    """Turns that are written as JSON, each for itself; [] where one of the texts is anything else."""
    turns = []
    for text in texts:
        if not text.lstrip().startswith("{"):
            return []
        try:
            turn = parse_json(text)
        except BadRow:
            return []
        if not {"role", "from"} & turn.keys():
            return []
        turns.append(turn)
    return turns


_ROUNDS = (("input", "output"), ("human", "assistant"), ("user", "assistant"))


def _round(turn: dict[str, Any]) -> list[Message]:
    """A question and its answer in one object, as in Capybara, ms-swift and XTuner; [] if it is none.

    What else it says is said of the answer.
    """
    for question, answer in _ROUNDS:
        if question in turn and answer in turn:
            rest = {key: value for key, value in turn.items() if key not in (question, answer, "system")}
            if "output_with_loss" in rest:
                rest["loss"] = rest.pop("output_with_loss")
            system = [{"role": "system", "content": turn["system"]}] if turn.get("system") else []
            asked, answered = _turns(turn[question], turn[answer])
            return [*system, asked, {**rest, **answered}]
    return []


def _pair(
    question: str,
    *answers: str,
    before: tuple[str, ...] = (),
    after: tuple[str, ...] = (),
    reasons: tuple[str, ...] = (),
) -> Format:
    """A question and its answer in columns of their own.

    The user says the columns `before`, the question, and the columns `after`; the assistant the `reasons` and the
    answers; what is blank is left out, and a blank line stands between. Either may also be a list of messages.
    """

    def read(fields: dict[str, Any], spelling: Spelling) -> list[Item]:
        asked, answered = (_text_or_turns(fields[name]) for name in (question, answers[0]))
        prompt = _side(asked, question, spelling)
        if isinstance(asked, str):
            # Alpaca's rows may have all of the question in `input`.
            is_in_input = question == "instruction" and not _says(asked) and _says(fields.get("input"))
            needed = () if is_in_input else (question,)
            if spelling.input_heading and question == "instruction" and needed and _says(fields.get("input")):
                fields = {**fields, "input": spelling.input_heading + check_text(fields["input"], "input")}
            said = _joined(fields, before, needed, after)
            prompt = [{"role": "user", "content": said}]
        if asked == [] and not isinstance(answered, list):
            raise BadRow("wrong-type", f"{question}: an empty list, and {answers[0]} is no list of messages")
        completion = _side(answered, answers[0], spelling, after=prompt)
        if isinstance(answered, str):
            completion = [{"role": "assistant", "content": _joined(fields, reasons, answers, ())}]
        # Of a prompt given as messages, its assistant turns are context and not trained.
        trained_from = 0 if isinstance(asked, str) and isinstance(answered, str) else len(prompt)
        history = _history(fields)
        return [
            _conversation(fields, history + prompt + completion, spelling, trained_from and trained_from + len(history))
        ]

    context = (*before, *after, *reasons)
    return Format((question, *answers), (*context, "history", *_ROW), read, context)


def _text_or_turns(value: Any) -> Any:
    """What may be either, as text where it is no list of turns."""
    is_turns = isinstance(value, list) and all(
        isinstance(turn, dict) and {"role", "from"} & turn.keys() for turn in value
    )
    return value.written if isinstance(value, ListAsWritten | ObjectAsWritten) and not is_turns else value


def _side(value: Any, column: str, spelling: Spelling, after: Sequence[Message] | None = None) -> list[Message]:
    if value == [] and after is None:
        return []  # A whole conversation may stand in the completion.
    if isinstance(value, list) and value:
        return read_messages(value, spelling, after=after or (), where=f"{column}: message")
    if isinstance(value, str):
        return []
    raise BadRow("wrong-type", f"{column}: must be text, or a list of at least one message, got {short(value)}")


def _from_input_ids(fields: dict[str, Any], spelling: Spelling) -> list[Item]:
    tokens, weights = read_tokens(fields)
    weight = _row_weight(fields)
    return [Tokenised(tokens, [each * weight for each in weights])]


def _from_tree(
    paths: Callable[[Any], list[list[trees.Node]]],
) -> Callable[[dict[str, Any], Spelling], list[Item]]:
    def read(fields: dict[str, Any], spelling: Spelling) -> list[Item]:
        found = paths(fields["prompt"])
        if not found:
            raise BadRow("no-assistant-turn", "no answer in this tree, so nothing to train")
        turns = [[{"role": node["role"], "content": node["text"]} for node in path] for path in found]
        return [_conversation(fields, read_messages(path, spelling), spelling) for path in turns]

    return read


def _from_task(fields: dict[str, Any], spelling: Spelling) -> list[Item]:
    """A task file of Natural Instructions: each instance after the definition; of several answers the first."""
    definition = fields["Definition"]
    definition = "\n".join(definition) if _is_texts(definition) else check_text(definition, "Definition")
    items: list[Item] = []
    for index, instance in enumerate(_list(fields, "Instances")):
        where = f"Instances[{index}]"
        if not isinstance(instance, dict):
            raise BadRow("wrong-type", f"{where}: expected an object with input and output, got {kind_of(instance)}")
        output = instance.get("output")
        output = output[0] if isinstance(output, list) and output else output
        texts = {"input": instance.get("input"), "output": output}
        if blank := [name for name, text in texts.items() if not isinstance(text, str) or not text.strip()]:
            raise BadRow("blank-text", f"{where}: {blank[0]}: missing, null, blank or no text")
        question = f"{definition}\n\n{texts['input']}"
        items.append(_conversation(fields, _turns(question, str(output)), spelling))
    return items


def _from_text(fields: dict[str, Any], spelling: Spelling) -> list[Item]:
    return [Document(_text(fields, "text"), weight=_row_weight(fields))]


def _from_segments(fields: dict[str, Any], spelling: Spelling) -> list[Item]:
    """Texts one after the other, each trained or not, with whatever control tokens they spell: no template is used."""
    segments = fields.get("segments")
    if isinstance(segments, str):
        segments = inner_json(segments, "bad-segments", "segments: ")
    if not isinstance(segments, list) or not segments:
        raise BadRow("bad-segments", f"segments: expected a list of objects with label and text, got {short(segments)}")
    text, trained = "", []
    for index, segment in enumerate(segments):
        where = f"segments[{index}]"
        if not isinstance(segment, dict) or not isinstance(segment.get("text"), str):
            raise BadRow("bad-segments", f"{where}: expected an object with label and text, got {short(segment)}")
        if not isinstance(segment.get("label"), bool):
            raise BadRow("bad-segments", f"{where}: label must be true or false, got {short(segment.get('label'))}")
        if segment["label"] and segment["text"]:
            trained.append((len(text), len(text) + len(segment["text"])))
        text += segment["text"]
    if not trained:
        raise BadRow("nothing-trained", "no segment with text has label true")
    return [Document(check_text(text, "segments"), weight=_row_weight(fields), trained=tuple(trained))]


_TOOLS = ("tools", "functions")
_ROW = ("system", "system_prompt", *_TOOLS, "chat_template_kwargs", "weight", "train", "mask_history")
_CONTEXT = ("context", "article", "passage")

FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), _ROW, _from_messages("messages")),
    "conversations": Format(("conversations",), _ROW, _from_messages("conversations")),
    "conversation": Format(("conversation",), _ROW, _from_messages("conversation")),
    "input_ids": Format(
        ("input_ids",), ("labels", *MASKS, "attention_mask", "position_ids", "weight", "train"), _from_input_ids
    ),
    "oasst": Format(("message_tree_id", "prompt"), _ROW, _from_tree(trees.all_paths)),
    "oasst_best": Format(("message_tree_id", "prompt"), _ROW, _from_tree(trees.best_path)),
    "natural_instructions": Format(("Definition", "Instances"), _ROW, _from_task),
    "prompt_completion": _pair("prompt", "completion"),
    "p3": _pair("inputs_pretokenized", "targets_pretokenized"),
    "inputs_targets": _pair("inputs", "targets", before=("definition",)),
    "prompt_target": _pair("prompt", "target"),
    "prompt_targets": _pair("prompt", "targets"),
    "source_target": _pair("source", "target"),
    "reflection": _pair("instruction", "output", "reflection", "corrected", after=("input", "context")),
    "alpaca": _pair("instruction", "output", after=("input", "context")),
    "instruction_target": _pair("instruction", "target", after=("input", "context")),
    "instruction_response": _pair("instruction", "response", after=("input", "context")),
    "instruction_completion": _pair("instruction", "completion", after=("input", "context")),
    "instruction_revision": _pair("instruction", "revision"),
    "instruction_answer": _pair("instruction", "answer", after=("input", "context")),
    "input_target": _pair("input", "target", before=("definition",)),
    "question_solution": _pair("question", "solution", before=_CONTEXT, after=("choices",), reasons=("explanation",)),
    "question_answer": _pair("question", "answer", before=_CONTEXT, reasons=("rationale",)),
    "question_response": _pair("question", "response", before=_CONTEXT),
    "problem_solution": _pair("problem", "solution"),
    "problem_answer": _pair("problem", "answer", reasons=("rationale",)),
    "query_response": _pair("query", "response"),
    "query_answer": _pair("query", "answer"),
    "prompt_response": _pair("prompt", "response"),
    "prompt_generation": _pair("prompt", "generation"),
    "prompt_output": _pair("prompt", "output"),
    "prompt_answer": _pair("prompt", "answer"),
    "input_output": _pair("input", "output", before=("definition",)),
    "article_summary": _pair("article", "summary"),
    "document_summary": _pair("document", "summary"),
    "dialogue_summary": _pair("dialogue", "summary"),
    "message_1_message_2": _pair("message_1", "message_2"),
    "INSTRUCTION_RESPONSE": _pair("INSTRUCTION", "RESPONSE"),
    "user_assistant": _pair("user", "assistant"),
    "segments": Format(("segments",), ("weight", "train"), _from_segments),
    "text": Format(("text",), ("weight", "train"), _from_text),
}
"""In the order of detection: a format that says more about the turns goes before one that says less, and the answer
that was written (completion, target, output) before one that a model may have given (response)."""

_FLAT_TREE = ("message_id", "parent_id", "text", "role")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios", "image_url", "pixel_values")
_PREFERENCE = (
    "a chosen and a rejected answer are for preference training; to train on the chosen ones, rename: "
    "columns={messages: chosen} where they are lists of messages, columns={completion: chosen} where they are texts"
)


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
        return BadRow("preference-row", _PREFERENCE)
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
    there = [name for name in fields if name in refused and _says(fields[name])]
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


def _says(value: Any) -> bool:
    """Whether a column says anything: text that is not blank, or a list or an object with something in it."""
    return bool(value.strip()) if isinstance(value, str) else isinstance(value, list | dict) and bool(value)


def _check_unread(fields: dict[str, Any], known: Format, items: Sequence[Item], spelling: Spelling) -> None:
    """No column that is not read lists which turns are trained."""
    for name in fields.keys() - {*known.columns, *known.optional, *spelling.ignored}:
        values = fields[name]
        if not isinstance(values, list) or not all(isinstance(value, bool | int | float) for value in values):
            continue
        for item in items:
            if not isinstance(item, Conversation) or not could_be_flag(values):
                continue
            answers = [message for message in item.messages if message["role"] == "assistant"]
            if len(values) in (len(item.messages), len(answers)):
                raise BadRow(
                    "unknown-flag",
                    f"the column {name!r} ({short(values)}) could say which turns are trained, and is not read; name "
                    "it in data.ignore_keys, or give each turn its `weight`",
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


def _conversation(
    fields: dict[str, Any], messages: list[Message], spelling: Spelling, trained_from: int = 0
) -> Conversation:
    system = [fields[name] for name in ("system", "system_prompt") if fields.get(name)]
    # A system turn of the conversation goes before the column, as in LLaMA-Factory.
    if system and not any(message["role"] == "system" for message in messages):
        text = check_text(system[0], "system")
        if text.strip():
            messages = [{"role": "system", "content": text}, *messages]
            trained_from += trained_from > 0
    tools = _tools(fields, messages, spelling)
    history_masked = read_flag(_setting(fields, "mask_history", False), "mask_history")
    return Conversation(
        messages,
        tools,
        read_template_kwargs(_setting(fields, "chat_template_kwargs", {})),
        trained_from,
        weight=_row_weight(fields),
        train_on="last_turn" if history_masked else None,
        unread_keys=unread_keys(messages, spelling),
    )


def _tools(fields: dict[str, Any], messages: list[Message], spelling: Spelling) -> list[dict[str, Any]] | None:
    """The tools of a row, OpenAI's older `functions`, or those of a message, which are taken out of it.

    A template that reads the tools of a message finds them there.
    """
    given = [fields[name] for name in _TOOLS if name in fields]
    for message in messages:
        for name in _TOOLS:
            if name in message and name not in spelling.template_keys:
                given.append(message.pop(name))
    found = [tools for tools in map(read_tools, given) if tools]
    if any(tools != found[0] for tools in found):
        raise BadRow("bad-tools", "tools: given twice, and not the same")
    return found[0] if found else None


def _row_weight(fields: dict[str, Any]) -> float:
    weight = read_weight(_setting(fields, "weight", 1.0), "")
    return weight if read_flag(_setting(fields, "train", True), "train") else 0.0


def _setting(fields: dict[str, Any], name: str, default: Any) -> Any:
    """What a row says about itself; the cells of CSV are text, and empty where nothing is said."""
    value = fields.get(name, default)
    if not isinstance(value, str):
        return value
    if not value.strip():
        return default
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        return float(value)
    except ValueError:
        return value


def _history(fields: dict[str, Any]) -> list[Message]:
    """Earlier rounds, pairs of question and answer."""
    history = fields.get("history") or []
    if isinstance(history, str):
        history = inner_json(history, "bad-history", "history: ")
    if not isinstance(history, list):
        raise BadRow("bad-history", f"history: expected a list of pairs, got {kind_of(history)}")
    messages = []
    for index, pair in enumerate(history):
        if not _is_texts(pair) or len(pair) != 2:
            raise BadRow("bad-history", f"history[{index}]: expected a pair of question and answer, got {short(pair)}")
        messages += _turns(*pair)
    return read_messages(messages, AS_USUAL)


def _turns(question: Any, answer: Any) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _list(fields: dict[str, Any], column: str) -> list[Any]:
    value = fields[column]
    if isinstance(value, str) and value.lstrip().startswith("["):  # CSV knows no lists.
        value = inner_json(value, "wrong-type", f"{column}: ")
    if not isinstance(value, list):
        raise BadRow("wrong-type", f"{column}: expected a list of messages, got {kind_of(value)}")
    if not value:
        raise BadRow("no-messages", f"{column}: expected at least one message, got an empty list")
    return value


def _joined(fields: dict[str, Any], before: Sequence[str], needed: Sequence[str], after: Sequence[str]) -> str:
    texts = [_optional_text(fields, name) for name in before]
    texts += [_text(fields, name) for name in needed]
    texts += [_optional_text(fields, name) for name in after]
    return "\n\n".join(text for text in texts if text)


def _text(fields: dict[str, Any], column: str) -> str:
    text = _optional_text(fields, column)
    if not text:
        raise BadRow("blank-text", f"{column}: blank; expected text")
    return text


def _optional_text(fields: dict[str, Any], column: str) -> str:
    value = fields.get(column)
    if column == "choices" and _is_texts(value):
        value = "\n".join(value or ())
    text = check_text("" if value is None else value, column)
    return text if text.strip() else ""


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)
