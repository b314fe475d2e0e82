"""Whose turn it is, in the words of any trainer, and in every format alike."""

import pytest

from jaxsft.rows import formats
from jaxsft.rows.messages import Spelling, read_messages
from jaxsft.rows.roles import ALIASES, CALLER, NAMES, read_role
from jaxsft.rows.sources import Row
from jaxsft.rows.strict import BadRow

CALL = '{"name": "f", "arguments": {"a": 1}}'
CALLED = [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]


def messages(column, turns, **spelling):
    found = formats.convert(Row({column: turns}, "a:1"), column, spelling=Spelling(**spelling))
    assert isinstance(found, list), found
    return found[0].messages


@pytest.mark.parametrize("column", ["messages", "conversations", "conversation"])
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value"), ("role", "value")])
@pytest.mark.parametrize(
    ("user", "assistant", "call", "result"),
    [
        ("user", "assistant", "tool_call", "tool_response"),  # ms-swift
        ("human", "gpt", "function_call", "observation"),  # LLaMA-Factory
        ("USER", "CHATBOT", "TOOL_CALLS", "TOOL"),  # Cohere, and capitals in general
        ("Human", "Assistant", "Function-Call", "Function-Response"),
        ("prompter", "model", "tool call", "ipython"),
        ("user", "gpt", "tool_calls", "tool_result"),  # mixed in one row
    ],
)
def test_known_names_of_roles_are_ours_in_every_format(column, keys, user, assistant, call, result):
    role, content = keys
    turns = [(user, "Hi"), (call, CALL), (result, "42"), (assistant, "It is 42.")]
    assert messages(column, [{role: name, content: text} for name, text in turns]) == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": CALLED},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "It is 42."},
    ]


def test_names_are_known_also_in_prompts_and_completions():
    fields = {"prompt": [{"role": "Human", "content": "Hi"}], "completion": [{"role": "BOT", "content": "Hello"}]}
    (item,) = formats.convert(Row(fields, "a:1"), "prompt_completion")
    assert [message["role"] for message in item.messages] == ["user", "assistant"]


def test_each_name_has_one_meaning():
    names = [name for each in NAMES.values() for name in each]
    assert len(set(names)) == len(names) and not set(names) & NAMES.keys()
    assert {ALIASES[name] for name in NAMES} == NAMES.keys() and CALLER in NAMES


def test_roles_of_the_config_go_first_and_mean_what_they_say():
    turns = [{"role": "Doctor", "content": "Hi"}, {"role": "gpt", "content": "a"}, {"role": "model", "content": "b"}]
    found = messages("messages", turns, roles={"Doctor": "user", "model": "model"})
    assert [message["role"] for message in found] == ["user", "assistant", "model"]
    assert read_role("human", "", {"human": "critic"}) == "critic"
    assert read_role("Human", "", {"human": "critic"}) == "user", "to the letter"
    called = messages(
        "messages", [*turns[:1], {"role": "act", "content": CALL}], roles={"Doctor": "user", "act": CALLER}
    )
    assert called[1]["tool_calls"] == CALLED


def test_a_role_that_nobody_knows_is_refused_with_what_cures_it():
    for role in ("Doctor", "wizard", "tool_use_v2", "assistant2", "customer"):
        with pytest.raises(BadRow) as error:
            read_role(role, "message 3", {})
        assert error.value.code == "unknown-role"
        assert "message 3" in str(error.value) and f"{{{role}: assistant}}" in str(error.value)
        for ours in ("assistant", role):
            assert read_role(role, "", {role: ours}) == ours


@pytest.mark.parametrize("role", [*NAMES, "human", "Assistant", "gpt", CALLER, "doctor", "", None, 3, ["user"]])
def test_a_turn_of_a_role_and_a_text_alone_is_read_like_any_other(role):
    """Which is not looked into where the config says nothing of keys."""

    def read(turn, **spelling):
        try:
            return read_messages([turn], Spelling(**spelling))
        except BadRow as bad:
            return bad.code, str(bad)

    roles = {"user": "user", "gpt": "assistant", "system": "developer", "doctor": "doctor"}
    for declared in ({}, roles, {"assistant": "user"}):
        for content in ("Hi", " \n", "", "\u3000", "a\0b", None, 3, ["a"], [{"type": "text", "text": "a"}]):
            for turn in ({"role": role, "content": content}, {"content": content, "role": role}):
                alone = read(turn, roles=declared)
                assert alone == read(turn, roles=declared, ignored=("no such key",))
                assert alone == read({**turn, "none": None}, roles=declared)
                if isinstance(alone, list):
                    assert list(alone[0]) == ["role", "content"] or "tool_calls" in alone[0]
