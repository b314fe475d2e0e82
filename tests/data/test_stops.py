"""Stop tokens that are appended, and headers inside of a turn."""

import pytest
from trained import assistant, encoded, encoder_of, text_of, trained, user

TURNS = [user("Hi"), assistant("Yo"), user("Hm"), assistant("Ok")]
BOTH = ["<|endoftext|>", "<|im_end|>"]
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": {"at": "x"}}}
RESULT = {"role": "tool", "content": "Sun", "tool_call_id": "1"}
HEADER = "<|im_start|>assistant\n"


@pytest.mark.parametrize("first", ["<|endoftext|>", "<|im_end|>"])
@pytest.mark.parametrize("unroll", ["auto", "always"])
def test_the_stop_that_is_appended_is_the_one_that_other_answers_have(make_tokenizer, first, unroll):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{{ STOP if not loop.last }}{% endfor %}"
        "{% if add_generation_prompt %}{{ STOP + '<|im_start|>assistant\n' }}{% endif %}"
    ).replace("STOP", repr(first))
    tokenizer = make_tokenizer(template)
    for stops in (BOTH, BOTH[::-1]):
        found = trained(TURNS, tokenizer, stops=stops, unroll=unroll)
        assert [text for texts in found for text in texts] == ["Yo" + first, "Ok" + first]
        assert trained(TURNS[:2], tokenizer, stops=stops, unroll=unroll) == [["Yo" + first]]
        assert f"{first!r} is appended" in encoder_of(tokenizer, stops=stops).notes[0]


def test_a_call_that_lacks_its_stop_gets_that_of_other_calls(make_tokenizer):
    tokenizer = make_tokenizer(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{{ m.tool_calls | tojson if m.tool_calls }}"
        "{{ '' if loop.last else '<|im_end|>' if m.tool_calls else eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ eos_token + '<|im_start|>assistant\n' }}{% endif %}"
    )
    messages = [user("Rain?"), assistant("", tool_calls=[CALL])]
    (((call,),),) = (trained(messages, tokenizer, stops=BOTH),)
    assert call.endswith("}]<|im_end|>")
    assert trained(TURNS[:2], tokenizer, stops=BOTH) == [["Yo<|endoftext|>"]]


def test_where_no_answer_has_a_stop_the_first_of_the_list_is_appended(make_tokenizer):
    tokenizer = make_tokenizer("{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}")
    assert trained(TURNS, tokenizer, stops=BOTH[::-1])[-1] == ["Ok<|im_end|>"]
    assert trained(TURNS, tokenizer, stops=BOTH)[-1] == ["Ok<|endoftext|>"]


def test_what_closes_only_some_answers_in_part_is_no_closing_mark(make_tokenizer):
    # `<|im_` is what both ends have in common, letter by letter.
    tokenizer = make_tokenizer(
        "{% for m in messages %}{{ '[' + m.role + ']' + m.content + ('<|im_done|>' if loop.last else '<|im_sep|>') }}"
        "{% endfor %}"
    )
    assert [texts for texts in trained(TURNS, tokenizer, stops=["<|endoftext|>"])][-1] == ["Ok<|endoftext|>"]


# A call in a section of its own.

SECTIONS = (
    "{% for m in messages %}{% if m.content or not m.tool_calls %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}"
    "{% if m.tool_calls %}{{ '<|im_start|>assistant\n' + m.tool_calls | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BOTH_PARTS = [user("Rain?"), assistant("I look.", tool_calls=[CALL]), RESULT, assistant("No.")]


def test_a_header_inside_a_turn_that_a_prompt_there_has_is_the_template_s(make_tokenizer):
    tokenizer = make_tokenizer(SECTIONS)
    (texts,) = trained(BOTH_PARTS, tokenizer)
    assert texts[0] == "I look.<|im_end|>" and texts[1].startswith('[{"id": "1"') and texts[2] == "No.<|im_end|>"
    assert texts[1].endswith("}]<|im_end|>") and len(texts) == 3


def test_two_headers_inside_a_turn_are_decided_each_by_its_prompt(make_tokenizer):
    template = SECTIONS.replace(
        "{% if m.content or", "{% if m.reasoning_content %}{{ '<|im_start|>assistant\n<think>' + m.reasoning_content + "
        "'<|im_end|>\n' }}{% endif %}{% if m.content or",
    )  # fmt: skip
    messages = [BOTH_PARTS[0], {**BOTH_PARTS[1], "reasoning_content": "hm"}]
    (texts,) = trained(messages, make_tokenizer(template))
    assert [text[:8] for text in texts][:1] == ["<think>h"] and len(texts) >= 2
    assert not any(HEADER + "[{" in text for text in texts)


def test_a_header_inside_a_turn_that_only_the_model_writes_is_trained(make_tokenizer):
    # A prompt after the words alone closes them otherwise, so what follows them here is one generation.
    template = SECTIONS.replace(
        "m.content + '<|im_end|>\n'", "m.content + ('<|go_on|>' if m.tool_calls else '<|im_end|>\n')"
    )
    (texts,) = trained(BOTH_PARTS, make_tokenizer(template))
    assert texts[0].startswith("I look.<|go_on|>" + HEADER + '[{"id": "1"') and len(texts) == 2


def test_sections_that_follow_without_a_header_are_the_model_s(make_tokenizer):
    template = SECTIONS.replace("'<|im_start|>assistant\n' + m.tool_calls", "'<call>' + m.tool_calls")
    tokenizer = make_tokenizer(template)
    (one,) = encoded(BOTH_PARTS[:2], tokenizer)
    assert text_of(one, tokenizer).count("<|im_start|>") == 2
