import json

import pytest

from jaxsft.config import SourceConfig
from jaxsft.rows import detection, formats, messages
from jaxsft.rows.calls import read_tools
from jaxsft.rows.detection import choose_format, detect_format
from jaxsft.rows.items import Conversation, Document, Tokenised
from jaxsft.rows.messages import Spelling, read_messages
from jaxsft.rows.readings import FORMATS
from jaxsft.rows.sources import DataError, Problem, Row, read_rows
from jaxsft.rows.strict import BadRow

HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1, "b": None}}}
USER, FUNCTION_CALL = {"from": "human", "value": "Hi"}, {"from": "function_call", "value": '{"name": "f"}'}


def convert(format, columns=None, roles=None, keys=None, **fields):
    """The one item of a row."""
    spelling = Spelling(roles or {}, keys or {})
    (item,) = formats.convert(Row(fields, "a.jsonl:7"), format, columns=columns or {}, spelling=spelling)
    return item


def said(*texts, system=None):
    """Turns that alternate, the user's first."""
    turns = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]
    return [{"role": "system", "content": system}] * (system is not None) + turns


def answer(**message):
    """What becomes of an assistant's turn."""
    return read_messages([HELLO[0], {"role": "assistant", **message}], Spelling())[1]


def shared(*turns):
    return read_messages(turns, Spelling())


def test_every_format_gives_the_messages_that_it_means():
    assert convert("messages", messages=HELLO, id=3) == Conversation(HELLO, origin="a.jsonl:7")
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    for format in ("conversations", "conversation"):
        assert convert(format, **{format: turns}).messages == HELLO
    system = [{"role": "system", "content": "Be kind."}]
    assert convert("conversations", conversations=turns, system="Be kind.").messages == system + HELLO
    assert convert("conversations", conversations=system + HELLO, system="Be rude.").messages == system + HELLO
    assert convert("messages", messages=turns).messages == HELLO
    assert convert("messages", messages=json.dumps(turns)).messages == HELLO
    assert convert("conversations", conversations=[{"role": "Human", "value": "Hi"}, turns[1]]).messages == HELLO
    assert convert("conversations", conversations=["Hi", "Hello", "a", "b"]).messages == said("Hi", "Hello", "a", "b")
    rounds = [{"input": "Hi", "output": "Hello"}, {"input": "a", "output": "b"}]
    assert convert("conversation", conversation=rounds).messages == said("Hi", "Hello", "a", "b")
    rounds = [{"system": "Be kind.", "human": "Hi", "assistant": "Hello"}, {"human": "a", "assistant": "b"}]
    assert convert("conversation", conversation=rounds).messages == said("Hi", "Hello", "a", "b", system="Be kind.")
    rounds = [{"input": "Hi", "output": "Hello", "output_with_loss": False}, {"input": "a", "output": "b"}]
    assert [turn.get("weight") for turn in convert("messages", messages=rounds).messages] == [None, 0.0, None, None]
    assert convert("prompt_completion", prompt="Hi", completion="Hello").messages == HELLO
    assert convert("alpaca", instruction="Hi", input=" ", output="Hello").messages == HELLO
    assert convert("alpaca", instruction="Add", input="1 2", output="3").messages == said("Add\n\n1 2", "3")
    history = [["a", "b"], ["c", "d"]]
    with_past = convert("alpaca", instruction="Hi", output="Hello", system="Be kind.", history=history)
    assert with_past.messages == said("a", "b", "c", "d", "Hi", "Hello", system="Be kind.")
    assert convert("text", text=" as it is\n") == Document(" as it is\n", "a.jsonl:7")


PAIRS = [
    ({"inputs": "Hi", "targets": "Hello"}, "Hi", "Hello"),
    ({"definition": "Greet.", "inputs": "Hi", "targets": "Hello", "id": "1"}, "Greet.\n\nHi", "Hello"),
    ({"inputs": [5], "targets": [6], "inputs_pretokenized": "Hi", "targets_pretokenized": "Hello"}, "Hi", "Hello"),
    ({"input": "Hi", "output": "Hello"}, "Hi", "Hello"),
    ({"input": "Hi", "target": "Hello"}, "Hi", "Hello"),
    ({"prompt": "Hi", "target": "Hello", "response": "Hey"}, "Hi", "Hello"),
    ({"prompt": "Hi", "response": "Hello"}, "Hi", "Hello"),
    ({"prompt": "Hi", "generation": "Hello"}, "Hi", "Hello"),
    ({"source": "Hi", "target": "Hello"}, "Hi", "Hello"),
    ({"query": "Hi", "response": "Hello"}, "Hi", "Hello"),
    ({"problem": "Hi", "solution": "Hello", "answer": "4"}, "Hi", "Hello"),
    ({"instruction": "Hi", "context": "there", "response": "Hello", "category": "x"}, "Hi\n\nthere", "Hello"),
    ({"instruction": "Hi", "input": "", "response": "Hello"}, "Hi", "Hello"),
    ({"instruction": "Hi", "input": "there", "output": "Hello", "text": "all"}, "Hi\n\nthere", "Hello"),
    ({"instruction": "Hi", "output": "a", "reflection": "b", "corrected": "c"}, "Hi", "a\n\nb\n\nc"),
    ({"question": "Hi", "answer": "Hello", "category": "x"}, "Hi", "Hello"),
    ({"question": "Hi", "answer": "no", "rationale": "Because."}, "Hi", "Because.\n\nno"),
    ({"article": "Once.", "question": "When?", "answer": "Once"}, "Once.\n\nWhen?", "Once"),
    (
        {"question": "Which?", "choices": ["a", "b"], "solution": "a", "explanation": "So."},
        "Which?\n\na\nb",
        "So.\n\na",
    ),
    ({"article": "Long.", "summary": "Short."}, "Long.", "Short."),
    ({"message_1": "Hi", "message_2": "Hello"}, "Hi", "Hello"),
    ({"INSTRUCTION": "Hi", "RESPONSE": "Hello", "SOURCE": "x"}, "Hi", "Hello"),
    ({"Definition": ["Greet."], "Instances": [{"input": "Hi", "output": ["Hello", "Hey"]}]}, "Greet.\n\nHi", "Hello"),
]


@pytest.mark.parametrize(("fields", "question", "reply"), PAIRS, ids=["-".join(case[0]) for case in PAIRS])
def test_text_to_text_rows_become_a_question_and_an_answer(fields, question, reply):
    assert convert(detect_format(fields), **fields).messages == said(question, reply)


def test_a_system_prompt_stands_before_a_pair():
    fields = {"system_prompt": "Be kind.", "question": "Hi", "response": "Hello", "id": "1"}
    assert convert(detect_format(fields), **fields).messages == said("Hi", "Hello", system="Be kind.")


def test_every_instance_of_a_task_is_a_conversation():
    instances = [{"id": str(n), "input": f"{n}+1", "output": [str(n + 1)]} for n in range(3)]
    row = Row({"Definition": ["Add."], "Positive Examples": [], "Instances": instances}, "task.json:1")
    items = formats.convert(row, detect_format(row.fields))
    assert [item.messages for item in items] == [said(f"Add.\n\n{n}+1", str(n + 1)) for n in range(3)]
    assert {item.origin for item in items} == {"task.json:1"}


def test_a_prompt_of_messages_is_never_trained():
    both = convert("prompt_completion", prompt=HELLO + HELLO[:1], completion=HELLO[1:])
    assert both.messages == HELLO + HELLO and both.trained_from == 3
    both = convert("prompt_completion", prompt=HELLO + HELLO[:1], completion="Hello", system="Be kind.")
    assert both.messages == said("Hi", "Hello", "Hi", "Hello", system="Be kind.") and both.trained_from == 4
    assert convert("prompt_completion", prompt="Hi", completion=HELLO[1:]).messages == HELLO
    # A result may come right after the prompt's call.
    asked, result = [HELLO[0], {"role": "assistant", "tool_calls": [CALL]}], {"role": "tool", "content": "42"}
    assert convert("prompt_completion", prompt=asked, completion=[result, HELLO[1]]).trained_from == 2
    # Nemotron's way.
    assert convert("input_output", input=HELLO[:1], output="Hello").messages == HELLO


def test_fields_of_messages_stay_as_they_are_and_nulls_are_left_out():
    messages = [
        {"role": "user", "content": " Hi\n", "name": "Eve", "tool_calls": None, "mood": {"good": True}},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "hm"},
        {"role": "tool", "content": "", "tool_call_id": "7"},
        {"role": "assistant", "content": "Done"},
    ]
    result = convert("messages", messages=messages, chat_template_kwargs={"thinking": True})
    assert result.messages == [
        {"role": "user", "content": " Hi\n", "name": "Eve", "mood": {"good": True}},
        {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "hm"},
        *messages[2:],
    ]
    assert result.template_kwargs == {"thinking": True}
    assert messages[0]["tool_calls"] is None, "the row itself is not changed"


def test_a_role_that_the_config_declares_stays_and_templates_decide_the_order_of_turns():
    roles = ["system", "user", "user", "assistant", "assistant", "developer", "critic_2", "système", "system"]
    turns = [{"role": role, "content": "a"} for role in roles]
    declared = {"critic_2": "critic_2", "critic": "système"}
    assert [message["role"] for message in convert("messages", roles=declared, messages=turns).messages] == roles
    assert convert("conversations", roles=declared, conversations=turns).messages == turns
    assert convert("messages", messages=[{"role": "system", "content": ""}, *HELLO]).messages[0]["content"] == ""
    # A known name too, where the template knows it by that one.
    observed = [*HELLO, {"role": "observation", "content": "4"}, HELLO[1]]
    assert convert("messages", messages=observed).messages[2]["role"] == "tool"
    assert convert("messages", roles={"observation": "observation"}, messages=observed).messages == observed


def test_names_of_roles_are_renamed_by_the_config_first():
    turns = [{"role": "Patient", "content": "Hi"}, {"role": "Doctor", "content": "Hello"}]
    roles = {"Patient": "user", "Doctor": "assistant"}
    assert convert("messages", roles=roles, messages=turns).messages == HELLO
    assert convert("prompt_completion", roles=roles, prompt=turns[:1], completion=turns[1:]).messages == HELLO
    shared = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    assert (
        convert("conversations", roles={"gpt": "critic"}, conversations=[*shared, *HELLO]).messages[1]["role"]
        == "critic"
    )


def test_a_row_needs_a_turn_of_the_roles_that_are_trained():
    row = Row({"messages": [HELLO[0], {"role": "critic", "content": "Bad."}]}, "a:1")
    declared = {"spelling": Spelling({"critic": "critic"})}
    assert formats.convert(row, "messages", **declared).code == "no-assistant-turn"
    assert formats.convert(row, "messages", trained_roles=("judge",), **declared).code == "no-trained-turn"
    for trained in (("critic",), ("assistant", "user"), None):
        assert isinstance(formats.convert(row, "messages", trained_roles=trained, **declared), list)


def test_tool_calls_of_every_spelling_come_out_the_same():
    arguments = {"a": 1, "b": None}
    for calls in (
        [CALL],
        [{"function": {"name": "f", "arguments": arguments}}],
        [{"function": {"name": "f", "arguments": json.dumps(arguments)}}],
        [{"name": "f", "arguments": arguments}],
        [{"name": "f", "parameters": arguments}],
        [{"type": "tool_use", "name": "f", "input": arguments}],
        [json.dumps({"name": "f", "arguments": arguments})],
        json.dumps([CALL]),
    ):
        assert answer(tool_calls=calls) == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert answer(function_call={"name": "f", "arguments": arguments})["tool_calls"] == [CALL]
    for empty in ({}, {"arguments": ""}, {"arguments": None}, {"arguments": "{}"}):
        assert answer(tool_calls=[{"name": "f", **empty}])["tool_calls"][0]["function"]["arguments"] == {}
    assert answer(tool_calls=[{**CALL, "id": "c1"}, CALL])["tool_calls"] == [{**CALL, "id": "c1"}, CALL]


def test_function_calls_and_observations_become_calls_and_results():
    call = {"from": "function_call", "value": json.dumps({"name": "f", "arguments": {"a": 1, "b": None}})}
    result = {"from": "observation", "value": "42"}
    messages = shared(USER, call, result, {"from": "gpt", "value": "It is 42."})
    assert messages == [
        HELLO[0],
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "It is 42."},
    ]
    for name in ("tool_call", "function_calls"):
        assert shared(USER, {**call, "from": name}, result)[1]["tool_calls"] == [CALL]
    for name in ("tool", "function", "tool_response", "function_response", "tool_result"):
        assert shared(USER, call, {**result, "from": name})[2] == {"role": "tool", "content": "42"}
    assert shared(USER, call, {**result, "value": {"n": [42, "ü"]}})[2]["content"] == '{"n": [42, "ü"]}'


def test_calls_one_after_the_other_are_parallel_calls_of_one_turn_with_the_text_before_them():
    other = {"from": "function_call", "value": [{"name": "g", "arguments": {}}, {"name": "h", "arguments": "{}"}]}
    results = [{"from": "observation", "value": str(n)} for n in range(3)]
    text = {"from": "gpt", "value": "Let me see."}
    messages = shared(USER, text, FUNCTION_CALL, other, *results, FUNCTION_CALL)
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "tool", "tool", "assistant"]
    assert [call["function"]["name"] for call in messages[1]["tool_calls"]] == ["f", "g", "h"]
    assert messages[1]["content"] == "Let me see." and messages[5]["content"] == ""
    # A turn that thinks before it calls is a turn of its own, and turns of different weight stay apart.
    assert len(shared(USER, text, {**FUNCTION_CALL, "thinking": "hm"})) == 3
    assert shared(USER, {**FUNCTION_CALL, "thinking": "hm"}, FUNCTION_CALL)[1]["reasoning_content"] == "hm"
    assert [len(shared(USER, {**text, "train": train}, FUNCTION_CALL)) for train in (True, False)] == [3, 3]
    assert len(shared(USER, {**text, "weight": 2}, {**FUNCTION_CALL, "weight": 2.0})) == 2


def test_tools_of_every_spelling_come_out_the_same():
    function = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": {}}}}
    tool = {"type": "function", "function": function}
    bare = {"name": "f", "description": "d", "input_schema": function["parameters"]}
    for tools in ([tool], [function], function, [bare], [{"type": "function", **function}], [json.dumps(function)]):
        assert read_tools(tools) == read_tools(json.dumps(tools)) == [tool]
    assert read_tools([tool, function]) == [tool, tool]
    assert read_tools([]) is read_tools("") is read_tools("[]") is None
    assert convert("alpaca", instruction="Hi", output="Hello", tools=[tool]).tools == [tool]


def test_blocks_become_text_reasoning_calls_and_results():
    text, thought = {"type": "text", "text": "Hel"}, {"type": "thinking", "thinking": "hm", "signature": "x"}
    use = {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1, "b": None}}
    assert answer(content=[text, {"type": "output_text", "value": "lo"}]) == HELLO[1]
    assert answer(content=["Hel", {"text": "lo", "cache_control": {}}]) == HELLO[1]
    assert answer(content=[thought, text, use]) == {
        "role": "assistant",
        "content": "Hel",
        "reasoning_content": "hm",
        "tool_calls": [{"id": "c1", **CALL}],
    }
    call = {"type": "tool_call", "value": json.dumps({"name": "f", "arguments": {"a": 1, "b": None}})}
    assert answer(content=[{"type": "reasoning", "value": "hm"}, call])["tool_calls"] == [CALL]
    results = [{"type": "tool_result", "tool_use_id": "c1", "content": [text]}, {"type": "tool_result", "content": "2"}]
    messages = read_messages(
        [HELLO[0], {"role": "assistant", "content": [use]}, {"role": "user", "content": results}], Spelling()
    )
    assert messages[2:] == [{"role": "tool", "content": "Hel", "tool_call_id": "c1"}, {"role": "tool", "content": "2"}]
    with_text = {"role": "user", "content": [*results, {"type": "text", "text": "Go on."}], "train": False}
    messages = read_messages([HELLO[0], {"role": "assistant", "content": [use]}, with_text], Spelling())
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "tool", "user"]
    assert [message.get("weight") for message in messages] == [None, None, 0, 0, 0]
    tool = {"role": "tool", "content": [{"type": "text", "text": "4"}, {"type": "text", "text": "2"}]}
    assert read_messages([*HELLO, tool], Spelling())[2]["content"] == "42"
    listed = {"role": "tool", "content": [{"type": "house", "rooms": 3}]}
    assert read_messages([*HELLO, listed], Spelling())[2]["content"] == '[{"type": "house", "rooms": 3}]'


def test_reasoning_under_any_name_is_reasoning_content():
    for name in messages.REASONING:
        assert answer(content="Hello", **{name: "hm"}) == {**HELLO[1], "reasoning_content": "hm"}
        assert answer(content="Hello", **{name: ""}) == HELLO[1]
    assert answer(thinking="hm", reasoning="hm", content="") == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "hm",
    }


def test_weight_and_train_become_one_weight():
    for given, weight in [
        ({"weight": 2}, 2.0),
        ({"weight": 0.5, "train": True}, 0.5),
        ({"weight": 0.5, "train": 0}, 0.0),
        ({"train": False}, 0.0),
        ({"train": 1}, 1.0),
    ]:
        message = answer(content="Hello", **given)
        flags = {"weight": weight} | ({"train": True} if given.get("train") else {})
        assert message == {**HELLO[1], **flags} and isinstance(message["weight"], float)
    assert answer(content="Hello", weight=None) == HELLO[1]
    assert answer(content="", weight=0)["content"] == "", "what is not trained may be empty"


def test_flags_of_a_row_count_for_all_of_it():
    assert convert("messages", messages=HELLO, weight=0.5).weight == 0.5
    assert convert("text", text="a", weight="0.5").weight == 0.5
    segments = [{"label": False, "text": "<s>Hi"}, {"label": True, "text": "Hello</s>"}, {"label": True, "text": ""}]
    assert convert("segments", segments=segments)[2:] == (1.0, ((5, 14),))
    assert convert("messages", messages=HELLO, train=True).weight == 1.0
    assert convert("messages", messages=HELLO, mask_history=True).train_on == "last_turn"
    assert convert("messages", messages=HELLO, mask_history=False).train_on is None
    # Cells of CSV.
    cells = {"question": "Hi", "answer": "Hello", "weight": " ", "train": "True", "mask_history": "", "tools": ""}
    cells |= {"chat_template_kwargs": "", "history": "", "system": ""}
    assert convert("question_answer", **cells) == Conversation(HELLO, origin="a.jsonl:7")
    cells |= {"weight": "2", "train": "1", "mask_history": "true", "chat_template_kwargs": '{"a": 1}'}
    read = convert("question_answer", **cells)
    assert (read.weight, read.train_on, read.template_kwargs) == (2.0, "last_turn", {"a": 1})
    assert convert("input_ids", input_ids=[5, 6, 7], weight=0.5).loss_weights == [0, 0.5, 0.5]


def test_tokens_keep_their_labels_and_masks_as_weights():
    ids = [5, 6, 7, 2]

    def weights(**fields):
        item = convert("input_ids", input_ids=ids, **fields)
        assert isinstance(item, Tokenised) and item.tokens == ids and item.origin == "a.jsonl:7"
        return item.loss_weights

    # The first token is nobody's target.
    assert (
        weights() == weights(labels=ids) == weights(attention_mask=[1] * 4, position_ids=[0, 1, 2, 3]) == [0, 1, 1, 1]
    )
    assert weights(labels=[-100, -100, 7, 2]) == [0, 0, 1, 1]
    assert weights(completion_mask=[0, 0, 1, 1]) == weights(assistant_masks=[0, 0, 1, 1]) == [0, 0, 1, 1]
    assert weights(loss_mask=[0, 0, 0.5, 2]) == [0, 0, 0.5, 2]
    assert weights(completion_mask=[0, 1, 1, 1], assistant_masks=[1, 1, 0, 1], labels=[5, 6, 7, -100]) == [0, 1, 0, 0]


def node(role, text, *replies, **more):
    return {"role": role, "text": text, "replies": list(replies), **more}


TREE = node(
    "prompter",
    "q",
    node(
        "assistant",
        "a1",
        node("prompter", "q1", node("assistant", "a11", rank=1), node("assistant", "a12", rank=0)),
        rank=1,
    ),
    node(
        "assistant",
        "a2",
        node("prompter", "unanswered"),
        node("prompter", "q2", node("assistant", "a21")),
        node("prompter", "q3", node("assistant", "a31")),
        rank=0,
    ),
    node("assistant", "a3", node("prompter", "unanswered"), rank=2),
    node("assistant", "deleted", deleted=True, rank=-1),
    node("assistant", "refused", node("prompter", "q4", node("assistant", "a4")), review_result=False),
)


def test_a_tree_gives_each_path_to_a_last_answer_or_the_best_one():
    row = Row({"message_tree_id": "1", "tree_state": "ready_for_export", "prompt": TREE}, "trees.jsonl:3")
    assert detect_format(row.fields) == "oasst"
    items = formats.convert(row, "oasst")
    assert [item.messages for item in items] == [
        said("q", "a1", "q1", "a11"),
        said("q", "a1", "q1", "a12"),
        said("q", "a2", "q2", "a21"),
        said("q", "a2", "q3", "a31"),
        said("q", "a3"),
    ]
    assert {item.origin for item in items} == {"trees.jsonl:3"}
    (best,) = formats.convert(row, "oasst_best")
    assert best.messages == said("q", "a2", "q2", "a21")


def test_columns_of_other_names_are_renamed():
    row = {"frage": "Hi", "antwort": "Hello", "question": "not this"}
    columns = {"question": "frage", "answer": "antwort"}
    assert convert("question_answer", columns=columns, **row).messages == HELLO
    swapped = {"prompt": "completion", "completion": "prompt"}
    assert convert("prompt_completion", columns=swapped, prompt="Hello", completion="Hi").messages == HELLO
    problem = formats.convert(Row({"frage": "Hi"}, "a:1"), "question_answer", columns=columns)
    assert problem.code == "missing-column" and "no column 'antwort' (for answer), or null" in problem.reason
    chosen = {
        "columns": {"prompt": "prompt", "completion": "chosen"},
        "prompt": "Hi",
        "chosen": "Hello",
        "rejected": "No",
    }
    assert convert("prompt_completion", **chosen).messages == HELLO


def test_detection_follows_a_fixed_order():
    assert [detect_format(format.columns) for format in FORMATS.values()] == [
        {"oasst_best": "oasst"}.get(name, name) for name in FORMATS
    ]
    assert detect_format(["text", "question", "answer", "messages"]) == "messages"
    assert detect_format(["text", "instruction", "output", "input"]) == "alpaca"
    with pytest.raises(DataError) as error:
        detect_format(["prompt", "reply"])
    assert "prompt, reply" in str(error.value)
    for columns, words in {
        ("prompt", "chosen", "rejected"): "are for preference training; to train on the chosen ones, rename",
        ("message_id", "parent_id", "text", "role"): "messages of OpenAssistant's trees, one a row",
        ("1", "2", "3"): "a first line that holds no names",
    }.items():
        with pytest.raises(DataError, match=words):
            detect_format(columns)


def choose(*rows, **source):
    return choose_format([Row(fields, f"a:{n}") for n, fields in enumerate(rows)], SourceConfig(path="a", **source))


def test_one_odd_row_decides_nothing_about_the_format():
    row, odd = {"prompt": "a", "completion": "b", "id": 1}, {"text": "version 2"}
    chosen = choose(odd, row, {**row, "messages": None}, {"more": 3})
    assert chosen.format == "prompt_completion" and chosen.reason == "has the columns prompt, completion"
    assert sorted(chosen.ignored) == ["id", "messages", "more", "text"]
    problem = formats.convert(Row(odd, "a:1"), chosen.format)
    assert problem == Problem("missing-column", "a:1", problem.reason) and "'prompt'" in problem.reason
    assert choose(odd, row, format="text")[:2] == ("text", "given in the config")
    assert choose({"a": "b", "c": "d"}, columns={"prompt": "a", "completion": "c"}).format == "prompt_completion"


def test_settings_that_cannot_be_right_are_errors_that_name_what_is_known():
    row = {"prompt": "a", "reply": "b"}
    for source, words in [
        ({"format": "alpacca"}, r"format 'alpacca' is not known \(did you mean alpaca\?\); known: messages, "),
        (
            {"columns": {"complesion": "reply"}},
            r"'complesion' is no column of any format \(did you mean completion\?\)",
        ),
        (
            {"columns": {"question": "reply"}, "format": "alpaca"},
            "no column of format 'alpaca'.* ours are instruction, ",
        ),
        ({"columns": {"completion": "replay"}}, "the rows have no column 'replay'; theirs are prompt, reply"),
        ({"columns": {"completion": "reply"}, "roles": {"Eve": "user\n"}}, "'user.n' is no role"),
        ({"columns": {"completion": "reply"}, "roles": {"Eve": ""}}, "'' is no role"),
        (
            {"columns": {"completion": "reply"}, "keys": {"skip": "mask"}},
            r"keys: skip: 'mask' is no key of a turn \(did you mean masked\?\); `keys` is theirs: ours",
        ),
    ]:
        with pytest.raises(DataError, match=words):
            choose(row, **source)


def test_a_reason_shows_only_the_beginning_of_what_was_given():
    with pytest.raises(BadRow) as error:
        read_messages([{"role": "user", "content": {"a": "x" * 1000}}], Spelling())
    assert len(str(error.value)) < 150


MATERIAL = {
    "alpaca_en.json": ("alpaca", 999),
    "flan_cot_strategyqa.tsv": ("question_answer", 2061),
    "glaive_toolcall_en.json": ("conversations", 300),
    "gsm8k_test.jsonl": ("question_answer", 1319),
    "gsm8k_train.jsonl": ("question_answer", 7473),
    "oasst_trees_en.jsonl": ("oasst", 546),
    "reason_tool_use.jsonl": ("messages", 50),
    "sharegpt_dummy.json": ("conversations", 500),
    "superni_predictions.jsonl": ("prompt_target", 252),
    "t0_adversarial_qa.jsonl": ("prompt_completion", 1000),
}


@pytest.mark.parametrize("name", MATERIAL)
def test_real_data_is_detected_and_converted(material, name):
    # Only the one without a header needs names.
    columns = {"question": "1", "answer": "2", "rationale": "3"} if name.endswith(".tsv") else {}
    source = SourceConfig(path=str(material / "data" / name), columns=columns)
    rows = list(read_rows(source.path, limit=detection.SAMPLE))
    items = formats.load_items(source)
    assert (choose_format(rows, source).format, len(items)) == MATERIAL[name]
    for item in items:
        assert item.messages[-1]["role"] in ("assistant", "user") and item.messages[0]["role"] in ("system", "user")
    if name.startswith("reason"):
        assert any(message.get("reasoning_content") for message in items[0].messages) and items[0].tools
    if name.startswith(("reason", "glaive")):
        called = [message["tool_calls"] for item in items for message in item.messages if "tool_calls" in message]
        assert len(called) > 50 and all(call[0]["function"]["arguments"] is not None for call in called)


def test_the_embedded_data_is_in_messages_format(repo):
    rows = list(read_rows(str(repo / "configs" / "quickstart" / "train.jsonl"), limit=50))
    assert detect_format(rows[0].fields) == "messages"
    assert formats.convert(rows[0], "messages")[0].messages == rows[0].fields["messages"]


def refused(**fields):
    """Why a row of a detected format is bad; None where it is good."""
    chosen = choose(fields)
    found = formats.convert(Row(fields, "a:1"), chosen.format, columns=chosen.columns, refused=chosen.refused)
    return found.reason if isinstance(found, Problem) and found.code == "unread-column" else None


def test_a_column_that_a_richer_format_would_read_is_not_dropped_without_a_word():
    for fields, words in [
        ({"prompt": "Hi", "text": "Hello"}, "without 'prompt': give format=text if that is meant, or say what is what"),
        ({"instruction": "Hi", "text": "Hello"}, "columns={prompt: instruction, completion: text}"),
        ({"question": "Hi", "input": "there", "text": "Hello"}, "without 'question', 'input'"),
        ({"text": "a", "messages": "not read", "response": "b"}, None),
        ({"prompt": "Hi", "completion": "Hello", "context": "there"}, "'prompt_completion' (prompt and completion), w"),
        ({"question": "Hi", "answer": "Hello", "explanation": "So."}, "without 'explanation'"),
        ({"query": "Hi", "response": "Hello", "passage": "Once."}, "give format=query_response"),
        ({"prompt": "Hi", "response": "Hello", "input": ["there"]}, "without 'input'"),
    ]:
        reason = refused(**fields)
        assert reason is None if words is None else words in reason, fields
        if words is not None:
            chosen = choose(fields, format=detect_format(fields))
            assert not chosen.refused, "whoever gives the format means it"
            assert isinstance(formats.convert(Row(fields, ""), chosen.format, refused=chosen.refused), list)
    for fields in [
        {"text": "Hello", "source": "wiki", "meta": {"a": 1}, "user": "eve"},
        {"text": "Hello", "prompt": " ", "answer": None, "input": []},
        {"instruction": "Hi", "output": "Hello", "text": "Hi Hello", "input": ""},
        {"problem": "Hi", "solution": "Hello", "answer": "4"},
        {"messages": HELLO, "prompt": "Hi", "context": "there"},
        {"input_ids": [5, 6], "text": "a", "prompt": "Hi"},
        {"text": "Hi \nHello", "prompt": "Hi", "answer": "Hi Hello"},
        {"prompt": "Add these two: a long list of numbers.", "target": "x", "input": "a long list  of numbers."},
    ]:
        assert refused(**fields) is None, fields


def test_a_later_row_that_has_more_is_refused_like_the_first(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"text": "a"}] * detection.SAMPLE + [{"text": "b", "question": "Hi"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(
        DataError, match=rf"a.jsonl:{len(rows)}: unread-column: read as 'text' \(text\), without 'quest"
    ):
        formats.load_items(SourceConfig(path=str(path)))


def test_names_of_columns_are_known_in_capitals_too():
    for row, format, ours in [
        ({"Prompt": "Hi", "Completion": "Hello"}, "prompt_completion", HELLO),
        ({"INSTRUCTION": "Add", "Input": "1 2", "OUTPUT": "3"}, "alpaca", said("Add\n\n1 2", "3")),
        ({" question ": "Hi", "Answer": "Hello", "System-Prompt": ""}, "question_answer", HELLO),
        ({"Messages": HELLO}, "messages", HELLO),
        ({"INSTRUCTION": "Hi", "RESPONSE": "Hello"}, "INSTRUCTION_RESPONSE", HELLO),
        ({"prompt": "Hi", "Prompt": "not this", "completion": "Hello"}, "prompt_completion", HELLO),
    ]:  # fmt: skip
        chosen = choose(row)
        assert chosen.format == format
        (item,) = formats.convert(Row(row, ""), chosen.format, columns=chosen.columns)
        assert item.messages == ours
    assert choose({"Prompt": "Hi", "Completion": "Hello"}).reason == "has the columns Prompt, Completion"
    assert choose({"Prompt": "a", "COMPLETION": "b", "Other": "c"}).ignored == ["Other"]


def test_an_instruction_may_stand_in_the_input_alone():
    for instruction in ({"instruction": ""}, {"instruction": " \n"}, {}, {"instruction": None}):
        for answer_column in ("output", "response", "completion", "answer"):
            format = {"output": "alpaca"}.get(answer_column, f"instruction_{answer_column}")
            fields = {**instruction, "input": "Hi", answer_column: "Hello"}
            assert convert(format, **fields).messages == HELLO
    problem = formats.convert(Row({"instruction": "", "input": " ", "output": "a"}, ""), "alpaca")
    assert problem.code == "blank-text"


def test_tools_may_stand_in_the_row_in_older_words_or_in_a_message():
    function = {"name": "f", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": function}]
    system = {"role": "system", "content": "Be kind."}
    for row in (
        {"messages": HELLO, "functions": [function]},
        {"messages": HELLO, "functions": json.dumps([function]), "tools": []},
        {"messages": HELLO, "functions": [function], "tools": tools},
    ):
        assert convert("messages", **row) == Conversation(HELLO, tools, origin="a.jsonl:7")
    for given in ({"tools": tools}, {"tools": json.dumps(tools)}, {"functions": [function]}):
        item = convert("messages", messages=[{**system, **given}, *HELLO])
        assert item.messages == [system, *HELLO] and item.tools == tools and not item.unread_keys
        # A template that reads the tools of a message, as GLM 4's does, finds them there.
        row = Row({"messages": [{**system, **given}, *HELLO]}, "")
        (item,) = formats.convert(row, "messages", spelling=Spelling(template_keys=tuple(given)))
        assert item.messages[0] == {**system, **given} and item.tools is None
    other = {"messages": [{**system, "tools": [{"name": "g"}]}, *HELLO], "tools": tools}
    assert formats.convert(Row(other, ""), "messages").code == "bad-tools"


def test_a_column_may_be_a_part_of_one():
    row = {"question": "Who?", "answers": {"text": ["Eve", "Ann"], "start": [3, 9]}, "meta": [{"a": {"b": "deep"}}]}
    for theirs, said_there in [
        ("answers.text.0", "Eve"),
        ("answers.text.1", "Ann"),
        ("meta.0.a.b", "deep"),
    ]:
        columns = {"answer": theirs}
        assert choose(row, columns=columns).format == "question_answer"
        assert convert("question_answer", columns=columns, **row).messages == said("Who?", said_there)
    # A column whose name has a dot is that column.
    dotted = {"question": "Hi", "a.0": "Hello", "a": ["x"]}
    assert convert("question_answer", columns={"answer": "a.0"}, **dotted).messages == HELLO
    for theirs in ("answers.text.2", "answers.texts.0", "answers.text.x", "question.0", "answers.text.-1"):
        with pytest.raises(DataError, match=f"the rows have no column '{theirs}'"):
            choose(row, columns={"answer": theirs})
        problem = formats.convert(Row(row, "a:1"), "question_answer", columns={"answer": theirs})
        assert problem.code == "missing-column" and f"{theirs!r} (for answer)" in problem.reason
    assert "answers" not in choose(row, columns={"answer": "answers.text.0"}).ignored
    # What else stands in the column is still read.
    chats = {"messages": [{"role": "system", "content": "Be kind.", "list": [{"name": "f"}]}, *HELLO]}
    assert convert("messages", columns={"tools": "messages.0.list"}, **chats).tools[0]["function"] == {"name": "f"}


def test_a_whole_conversation_may_stand_in_the_completion():
    for prompt, completion in (([], HELLO), ([], said("a", "b", "c", "d")), ([], HELLO[1:])):
        item = convert("prompt_completion", prompt=prompt, completion=completion)
        assert item.messages == completion and item.trained_from == 0


def test_a_result_of_nothing_is_empty():
    called = [HELLO[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    for result in ({"role": "tool", "content": None}, {"role": "tool"}, {"role": "tool", "tool_call_id": "1"}):
        messages = read_messages([*called, result, HELLO[1]], Spelling())
        assert messages[2] == {key: value for key, value in result.items() if value is not None} | {"content": ""}
    assert shared(USER, FUNCTION_CALL, {"from": "observation", "value": None})[2] == {"role": "tool", "content": ""}


def test_reasoning_may_be_given_as_blocks():
    for blocks in (
        [{"type": "text", "text": "h"}, {"type": "text", "text": "m"}],
        ["h", "m"],
        [{"type": "thinking", "thinking": "hm", "signature": "x"}],
        [{"type": "reasoning", "content": "h"}, "m"],
    ):
        for name in messages.REASONING:
            assert answer(content="Hello", **{name: blocks}) == {**HELLO[1], "reasoning_content": "hm"}


def test_the_input_of_alpacas_rows_has_the_heading_that_the_template_asks_for():
    spelling = Spelling(input_heading="### Input:\n")
    for row, question in [
        ({"instruction": "Add", "input": "1 2", "output": "3"}, "Add\n\n### Input:\n1 2"),
        ({"instruction": "Add", "input": " ", "output": "3"}, "Add"),
        ({"instruction": "", "input": "1 + 2", "output": "3"}, "1 + 2"),
        ({"instruction": "Add", "input": "1 2", "context": "Now.", "response": "3"}, "Add\n\n### Input:\n1 2\n\nNow."),
    ]:
        (item,) = formats.convert(Row(row, ""), detect_format(row), spelling=spelling)
        assert item.messages == said(question, "3")
