"""The formats: which columns each needs, and what a row of it says.

In: the columns of one row under our names. Out: its items, or a `BadRow`. A new format is one function and one entry in
`FORMATS`. How turns are spelt is `messages.py`; which format a source has, `detection.py`; what makes a row bad in
every format, `formats.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxsft.rows import trees
from jaxsft.rows.calls import read_tools
from jaxsft.rows.flags import read_flag, read_weight
from jaxsft.rows.items import Conversation, Document, Item, Tokenised
from jaxsft.rows.messages import AS_USUAL, Message, Spelling, read_messages, read_template_kwargs, unread_keys
from jaxsft.rows.strict import (
    BadRow,
    ListAsWritten,
    ObjectAsWritten,
    check_text,
    inner_json,
    kind_of,
    parse_json,
    short,
)
from jaxsft.rows.tokenised import MASKS, read_tokens


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


def _from_messages(column: str) -> Callable[[dict[str, Any], Spelling], list[Item]]:
    def read(fields: dict[str, Any], spelling: Spelling) -> list[Item]:
        turns = _list(fields, column)
        if all(isinstance(turn, str) for turn in turns) and (decoded := _decoded_turns(turns)):
            turns = decoded
        elif all(isinstance(turn, str) for turn in turns):
            # As in LIMA: texts that take turns, the user's first.
            turns = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(turns)]
        elif isinstance(turns[0], dict) and _round(turns[0]):
            rounds = [_round(turn) for turn in turns if isinstance(turn, dict)]
            if len(rounds) == len(turns) and all(rounds):
                turns = [message for messages in rounds for message in messages]
        messages = read_messages(turns, spelling)
        if {"chosen", "rejected"} & fields.keys() and messages[-1]["role"] != "assistant":
            raise BadRow("preference-row", PREFERENCE)
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

    Its other keys go to the message of the answer.
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
            is_in_input = question == "instruction" and not says(asked) and says(fields.get("input"))
            needed = () if is_in_input else (question,)
            if spelling.input_heading and question == "instruction" and needed and says(fields.get("input")):
                fields = {**fields, "input": spelling.input_heading + check_text(fields["input"], "input")}
            said = _joined(fields, before, needed, after)
            prompt = [{"role": "user", "content": said}]
        if asked == [] and not isinstance(answered, list):
            raise BadRow("wrong-type", f"{question}: an empty list, and {answers[0]} is no list of messages")
        completion = _side(answered, answers[0], spelling, after=prompt)
        if isinstance(answered, str):
            completion = [{"role": "assistant", "content": _joined(fields, reasons, answers, ())}]
        # In a prompt that is given as messages, turns of the assistant are context and not trained.
        trained_from = 0 if isinstance(asked, str) and isinstance(answered, str) else len(prompt)
        history = _history(fields)
        return [
            _conversation(fields, history + prompt + completion, spelling, trained_from and trained_from + len(history))
        ]

    context = (*before, *after, *reasons)
    return Format((question, *answers), (*context, "history", *_ROW), read, context)


def _text_or_turns(value: Any) -> Any:
    """A column that may be a list of turns or a text."""
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


PREFERENCE = (
    "a chosen and a rejected answer are for preference training; to train on the chosen ones, rename: "
    "columns={messages: chosen} where they are lists of messages, columns={completion: chosen} where they are texts"
)
_TOOLS = ("tools", "functions")
_SETTINGS = ("chat_template_kwargs", "weight", "train", "mask_history")
"""Columns that say how a row is rendered and trained."""
_ROW = ("system", "system_prompt", *_TOOLS, *_SETTINGS)
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


def says(value: Any) -> bool:
    """Whether a column says anything: text that is not blank, or a list or an object with something in it."""
    return bool(value.strip()) if isinstance(value, str) else isinstance(value, list | dict) and bool(value)


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
    unread = unread_keys(messages, spelling)
    if fields.keys().isdisjoint(_SETTINGS):
        return Conversation(messages, tools, {}, trained_from, unread_keys=unread)
    history_masked = read_flag(_setting(fields, "mask_history", False), "mask_history")
    return Conversation(
        messages,
        tools,
        read_template_kwargs(_setting(fields, "chat_template_kwargs", {})),
        trained_from,
        weight=_row_weight(fields),
        train_on="last_turn" if history_masked else None,
        unread_keys=unread,
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
    if not given:
        return None
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
    if value is None:
        return ""
    if column == "choices" and _is_texts(value):
        value = "\n".join(value or ())
    text = check_text(value, column)
    return text if text.strip() else ""


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)
