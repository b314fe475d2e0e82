import json

import pytest

from jaxsft.data.formats import FORMATS, Conversation, Document, detect_format, to_conversations
from jaxsft.data.sources import DataError, Row, read_rows

HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": None}}}]}


def convert(format, **fields):
    return to_conversations([Row(fields, "a.jsonl:7")], format)[0]


def test_every_format_gives_the_messages_that_it_means():
    assert convert("messages", messages=HELLO, id=3) == Conversation(HELLO, origin="a.jsonl:7")
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    assert convert("conversations", conversations=turns).messages == HELLO
    system = [{"role": "system", "content": "Be kind."}]
    assert convert("conversations", conversations=turns, system="Be kind.").messages == system + HELLO
    assert convert("conversations", conversations=HELLO).messages == HELLO
    assert convert("prompt_completion", prompt="Hi", completion="Hello").messages == HELLO
    assert convert("alpaca", instruction="Hi", input=" ", output="Hello").messages == HELLO
    assert convert("alpaca", instruction="Add", input="1 2", output="3").messages[0]["content"] == "Add\n\n1 2"
    with_past = convert("alpaca", instruction="Hi", output="Hello", system="Be kind.", history=[["a", "b"]])
    assert [message["content"] for message in with_past.messages] == ["Be kind.", "a", "b", "Hi", "Hello"]
    assert convert("question_answer", question="Hi", answer="Hello").messages == HELLO
    assert convert("text", text=" as it is\n") == Document(" as it is\n", "a.jsonl:7")


def test_a_prompt_of_messages_is_never_trained():
    both = convert("prompt_completion", prompt=HELLO + HELLO[:1], completion=HELLO[1:])
    assert both.messages == HELLO + HELLO and both.trained_from == 3


def test_fields_of_messages_stay_as_they_are_and_nulls_are_left_out():
    messages = [
        {"role": "user", "content": " Hi\n", "name": "Eve", "tool_calls": None},
        {**CALL, "reasoning_content": "hm"},
        {"role": "tool", "content": "", "tool_call_id": "7"},
        {"role": "assistant", "content": "Done"},
    ]
    result = convert("messages", messages=messages, tools='[{"name": "f"}]', chat_template_kwargs={"thinking": True})
    assert result.messages == [
        {"role": "user", "content": " Hi\n", "name": "Eve"},
        {"role": "assistant", "tool_calls": CALL["tool_calls"], "reasoning_content": "hm"},
        *messages[2:],
    ]
    assert result.tools == [{"name": "f"}] and result.template_kwargs == {"thinking": True}


def test_detection_follows_a_fixed_order():
    assert [detect_format(format.columns) for format in FORMATS.values()] == list(FORMATS)
    assert detect_format(["text", "question", "answer", "messages"]) == "messages"
    assert detect_format(["text", "instruction", "output", "input"]) == "alpaca"
    with pytest.raises(DataError) as error:
        detect_format(["prompt", "target"])
    assert "prompt, target" in str(error.value)
    for name, format in FORMATS.items():
        assert f"{name}: {', '.join(format.columns)}" in str(error.value)


BAD = [
    ("messages", {"message": HELLO}, "messages: expected a list"),
    ("messages", {"messages": []}, "at least one message"),
    ("messages", {"messages": "Hi"}, "expected a list"),
    ("messages", {"messages": ["Hi"]}, "message 1: expected an object"),
    ("messages", {"messages": [{"content": "Hi"}]}, "message 1: no role"),
    ("messages", {"messages": [*HELLO, {"role": "robot", "content": "x"}]}, "message 3: unknown role 'robot'"),
    ("messages", {"messages": [{"role": ["user"], "content": "x"}]}, "unknown role"),
    ("messages", {"messages": HELLO[:1]}, "no assistant turn"),
    ("messages", {"messages": [HELLO[0], {"role": "assistant"}]}, r"message 2 \(assistant\): no content"),
    ("messages", {"messages": [HELLO[0], {"role": "assistant", "content": None}]}, "no content"),
    ("messages", {"messages": [HELLO[0], {"role": "assistant", "content": " \n"}]}, "content is blank"),
    ("messages", {"messages": [{"role": "user", "content": ""}, HELLO[1]]}, r"message 1 \(user\): content is blank"),
    ("messages", {"messages": [{"role": "user", "content": 4}, HELLO[1]]}, "content must be text, got 4"),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}, HELLO[1]]}, "no images or audio"),
    ("messages", {"messages": [{"role": "tool", "content": "x"}, *HELLO]}, "must follow the assistant's call"),
    ("messages", {"messages": [{**CALL, "role": "user"}, *HELLO]}, "not the assistant's"),
    ("messages", {"messages": [HELLO[0], {**CALL, "tool_calls": "f()"}]}, "tool_calls must be a list"),
    ("messages", {"messages": [HELLO[0], {**HELLO[1], "weight": 0}]}, "'weight' per message is not supported"),
    ("messages", {"messages": [HELLO[0], {**HELLO[1], "reasoning_content": 3}]}, "reasoning_content must be text"),
    ("messages", {"messages": HELLO, "tools": "{"}, "tools: not readable as JSON"),
    ("messages", {"messages": HELLO, "tools": "f"}, "tools: not readable as JSON"),
    ("messages", {"messages": HELLO, "tools": [3]}, "tools: expected a list of objects"),
    ("messages", {"messages": HELLO, "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    ("conversations", {"conversations": [{"from": "alien", "value": "x"}]}, "unknown role 'alien' in `from`"),
    ("conversations", {"conversations": [{"from": "human"}]}, r"conversations\[0\]: expected an object with `from`"),
    ("prompt_completion", {"prompt": "Hi", "completion": HELLO}, "both be text or both be lists"),
    ("prompt_completion", {"prompt": "Hi"}, "completion: missing, null or blank"),
    ("prompt_completion", {"prompt": HELLO, "completion": HELLO[:1]}, "no assistant turn.* in the completion"),
    ("alpaca", {"instruction": "Hi", "output": "Hello", "input": 3}, "input: must be text, got 3"),
    ("alpaca", {"instruction": "Hi", "output": "Hello", "history": ["a"]}, r"history\[0\]: expected a pair"),
    ("question_answer", {"question": "Hi", "answer": None}, "answer: missing, null or blank"),
    ("text", {"text": "  "}, "text: missing, null or blank"),
]


@pytest.mark.parametrize(("format", "fields", "reason"), BAD, ids=range(len(BAD)))
def test_a_bad_row_is_named_with_file_line_and_reason(format, fields, reason):
    with pytest.raises(DataError, match=f"^1 bad .* row:\n  a.jsonl:7: .*{reason}"):
        convert(format, **fields)


def test_all_bad_rows_are_reported_together_ten_and_the_count():
    rows = [Row({"text": "x" * (line % 2)}, f"a.jsonl:{line}") for line in range(1, 31)]
    with pytest.raises(DataError) as error:
        to_conversations(rows, "text")
    lines = str(error.value).split("\n")
    assert lines[0] == "15 bad (format 'text') rows:" and lines[1].startswith("  a.jsonl:2: ")
    assert lines[-1] == "  ... and 5 more" and len(lines) == 12


def test_real_data_is_detected_and_converted(material):
    for name, format, count in [
        ("gsm8k_test.jsonl", "question_answer", 1319),
        ("alpaca_en.json", "alpaca", None),
        ("sharegpt_dummy.json", "conversations", None),
        ("t0_adversarial_qa.jsonl", "prompt_completion", None),
    ]:
        rows = list(read_rows(str(material / "data" / name)))
        assert detect_format(rows[0].fields) == format
        if format != "prompt_completion":
            assert len(to_conversations(rows, format)) == len(rows) and count in (None, len(rows))
    # Content as lists of parts: refused row by row, with the line.
    with pytest.raises(DataError, match=r"reason_tool_use.jsonl:1: message 1 \(system\): content is a list of parts"):
        to_conversations(read_rows(str(material / "data" / "reason_tool_use.jsonl")), "messages")


def test_the_embedded_data_is_in_messages_format(repo):
    rows = list(read_rows(str(repo / "configs" / "quickstart" / "train.jsonl"), limit=50))
    assert detect_format(rows[0].fields) == "messages"
    assert json.loads(json.dumps(rows[0].fields["messages"])) == to_conversations(rows, "messages")[0].messages
