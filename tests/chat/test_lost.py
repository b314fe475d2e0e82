"""What a template shows of calls in other words than their own."""

import pytest
from trained import assistant, encoded, trained, user

from jaxsft.chat.starts import MaskError

BY_ID = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '<call>' + c.id + ':' + c.function.arguments | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def calling(*calls):
    made = [
        {"id": id, "type": "function", "function": {"name": name, "arguments": {"at": at}}} for id, name, at in calls
    ]
    return [user("Look"), assistant("", tool_calls=made)]


@pytest.mark.parametrize("id", ["functions.get_weather:0", "get_weather", "call/get_weather#7", "get_weather:12"])
def test_a_call_whose_id_holds_its_name_is_shown(make_tokenizer, id):
    found = trained(calling((id, "get_weather", "Rome")), make_tokenizer(BY_ID))
    assert found == [["<call>" + id + ':{"at": "Rome"}<|im_end|>']]


def test_parallel_calls_are_shown_each_by_its_own_id(make_tokenizer):
    tokenizer = make_tokenizer(BY_ID)
    pair = ("functions.look:0", "look", "Rome"), ("functions.find:1", "find", "Bern")
    assert "functions.find:1" in trained(calling(*pair), tokenizer)[0][0]
    swapped = ("functions.look:0", "find", "Rome"), ("functions.find:1", "look", "Bern")
    assert "does not show its tool call ('find'" in str(encoded(calling(*swapped), tokenizer))


@pytest.mark.parametrize("id", ["call00001", "functions.get_weather_today:0", "functions.weather:0", "forget_weather"])
def test_a_call_whose_id_says_something_else_is_refused(make_tokenizer, id):
    found = encoded(calling((id, "get_weather", "Rome")), make_tokenizer(BY_ID))
    assert isinstance(found, MaskError) and found.code == "field-absent"
    assert "message 2 (assistant): the chat template of tiny does not show its tool call ('get_weather'" in str(found)


def test_an_id_that_is_not_shown_stands_for_nothing(make_tokenizer):
    tokenizer = make_tokenizer(BY_ID.replace("c.id", "'id'"))
    assert isinstance(encoded(calling(("functions.look:0", "look", "Rome")), tokenizer), MaskError)
