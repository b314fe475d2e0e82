"""Stop tokens that are appended, and headers inside of a turn."""

import pytest
from trained import assistant, encoded, encoder_of, text_of, trained, user

from jaxsft.chat.stops import stop_ids

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


def test_a_header_inside_a_turn_behind_a_stop_is_the_template_s(make_tokenizer):
    tokenizer = make_tokenizer(SECTIONS)
    (texts,) = trained(BOTH_PARTS, tokenizer)
    assert texts[0] == "I look.<|im_end|>" and texts[1].startswith('[{"id": "1"') and texts[2] == "No.<|im_end|>"
    assert texts[1].endswith("}]<|im_end|>") and len(texts) == 3


def test_where_thoughts_have_a_section_too_the_model_writes_all_headers_inside_a_turn(make_tokenizer):
    template = SECTIONS.replace(
        "{% if m.content or", "{% if m.reasoning_content %}{{ '<|im_start|>assistant\n<think>' + m.reasoning_content + "
        "'<|im_end|>\n' }}{% endif %}{% if m.content or",
    )  # fmt: skip
    messages = [BOTH_PARTS[0], {**BOTH_PARTS[1], "reasoning_content": "hm"}]
    for stops in (None, BOTH):
        ((text,),) = trained(messages, make_tokenizer(template), stops=stops)
        assert text.startswith("<think>hm<|im_end|>\n" + HEADER + "I look.<|im_end|>\n" + HEADER + '[{"id": "1"')


def test_a_header_inside_a_turn_that_only_the_model_writes_is_trained(make_tokenizer):
    # No stop token precedes it, so what follows the words is one generation.
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


@pytest.mark.parametrize(
    ("asked", "inner"),
    [
        # The prompt holds more than the header inside: thinking that it begins.
        ("<|im_start|>assistant\n<think>\n", "<|im_start|>assistant\n"),
        # Another role's word, with the same marks.
        ("<|im_start|>assistant\n", "<|im_start|>tool call\n"),
        ("assistant[sep]\n", "tool call[sep]\n"),
        ("<|im_start|>assistant", "<|im_start|>tool"),
    ],
)
@pytest.mark.parametrize("blanks", ["", "\n"])
def test_what_a_template_writes_behind_a_stop_inside_of_a_turn_is_not_trained_up_to_the_call(
    make_tokenizer, asked, inner, blanks
):
    # A prompt that asks on behind the words goes on without their end, as Nemotron Nano's does.
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{{ ASKED + m.content + ('' if loop.last and add_generation_prompt else '<|im_end|>' + BLANKS) }}"
        "{% if m.tool_calls %}{{ INNER + '<call>' + m.tool_calls[0].function.name + '(' }}"
        "{{ m.tool_calls[0].function.arguments | tojson + ')<|im_end|>' + BLANKS }}{% endif %}"
        "{% else %}{{ ASKED.replace('assistant', m.role) + m.content + '<|im_end|>' + BLANKS }}{% endif %}{% endfor %}"
        "{{ ASKED if add_generation_prompt }}"
    )
    for name, text in (("ASKED", asked), ("INNER", inner), ("BLANKS", blanks)):
        template = template.replace(name, repr(text))
    found = trained(BOTH_PARTS, make_tokenizer(template))
    assert found == [["I look.<|im_end|>", '<call>look({"at": "x"})<|im_end|>', "No.<|im_end|>"]]


def test_calls_that_have_a_section_each_end_each_with_their_stop(make_tokenizer):
    template = SECTIONS.replace(
        "{% if m.tool_calls %}{{ '<|im_start|>assistant\n' + m.tool_calls | tojson + '<|im_end|>\n' }}{% endif %}",
        "{% for call in m.tool_calls or [] %}"
        "{{ '<|im_start|>assistant\n<call>' + call.function.name + '<|im_end|>\n' }}{% endfor %}",
    )
    calls = [{"id": name, "type": "function", "function": {"name": name, "arguments": {}}} for name in ("see", "hear")]
    messages = [user("Rain?"), assistant("I look.", tool_calls=calls)]
    found = trained(messages, make_tokenizer(template))
    assert found == [["I look.<|im_end|>", "<call>see<|im_end|>", "<call>hear<|im_end|>"]]


def test_a_header_inside_a_turn_without_a_stop_before_it_is_the_model_s(make_tokenizer):
    # The words alone, and a prompt, would give the same text; but nothing tells the model to end there.
    template = SECTIONS.replace("<|im_end|>\n", "\n")
    (text,) = [text for texts in trained(BOTH_PARTS[:2], make_tokenizer(template)) for text in texts]
    assert text.startswith("I look.\n" + HEADER + '[{"id": "1"') and text.endswith("<|endoftext|>")


# Tokens that end a thought and an answer alike.

THOUGHTS_APART = (
    "{% for m in messages %}{% if m.reasoning_content %}"
    "{{ HEAD + 'assistant' + THINK + m.reasoning_content + '<|im_end|>' }}{% endif %}"
    "{% if m.tool_calls %}{{ HEAD + 'assistant' + CALL + m.tool_calls[0].function.name }}"
    "{{ m.tool_calls[0].function.arguments | tojson + '<|im_end|>' }}"
    "{% else %}{{ HEAD + m.role + (SAY if m.role == 'assistant' else '\n') + m.content + '<|im_end|>' }}{% endif %}"
    "{% endfor %}{{ HEAD + 'assistant' if add_generation_prompt }}"
)
THOUGHT = [user("Rain?"), assistant("No.", reasoning_content="hm")]
THOUGHT_CALL = [user("Rain?"), assistant("", reasoning_content="hm", tool_calls=[CALL])]


def thoughts_apart(head: str, think: str, say: str) -> str:
    template = THOUGHTS_APART
    for name, text in (("HEAD", head), ("THINK", think), ("SAY", say), ("CALL", "[call]")):
        template = template.replace(name, repr(text))
    return template


@pytest.mark.parametrize(
    ("head", "think", "say"),
    [
        ("<|im_start|>", "<think>", "\n"),
        ("<|im_start|>", "[channel]analysis\n", "[channel]final\n"),
        ("[", "]hm:", "]"),
    ],
)
def test_a_token_that_also_ends_thoughts_is_no_stop_where_there_is_another_one(make_tokenizer, head, think, say):
    tokenizer = make_tokenizer(thoughts_apart(head, think, say))
    eos, end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert stop_ids(tokenizer) == [eos]
    assert stop_ids(tokenizer, [[end, eos], end]) == [eos], "whoever configured it"
    inner = f"{think}hm<|im_end|>{head}assistant"
    assert trained(THOUGHT, tokenizer) == [[f"{inner}{say}No.<|im_end|><|endoftext|>"]]
    assert trained(THOUGHT_CALL, tokenizer) == [[inner + '[call]look{"at": "x"}<|im_end|><|endoftext|>']]
    assert not any("between the reasoning" in note for note in encoder_of(tokenizer).notes)


@pytest.mark.parametrize(
    ("head", "think", "say"),
    [("<|im_start|>", "<think>", "\n"), ("<|im_start|>", "[channel]analysis\n", "[channel]final\n")],
)
def test_where_no_other_token_ends_answers_the_model_still_writes_all_of_it(make_tokenizer, head, think, say):
    tokenizer = make_tokenizer(thoughts_apart(head, think, say))
    tokenizer.eos_token = "<|im_end|>"
    (end,) = tokenizer.convert_tokens_to_ids(["<|im_end|>"])
    assert stop_ids(tokenizer) == [end]
    inner = f"{think}hm<|im_end|>{head}assistant"
    assert trained(THOUGHT, tokenizer) == [[f"{inner}{say}No.<|im_end|>"]]
    assert trained(THOUGHT_CALL, tokenizer) == [[inner + '[call]look{"at": "x"}<|im_end|>']]
    (note,) = [note for note in encoder_of(tokenizer).notes if "between the reasoning" in note]
    assert "'<|im_end|>'" in note and "may not stop it after its reasoning" in note


def test_thoughts_that_are_only_shown_where_thinking_is_on_are_looked_for_too(make_tokenizer):
    template = thoughts_apart("<|im_start|>", "<think>", "\n").replace(
        "{% if m.reasoning_content %}", "{% if m.reasoning_content and enable_thinking %}"
    )
    tokenizer = make_tokenizer(template)
    assert stop_ids(tokenizer) == [tokenizer.eos_token_id]
    (text,) = trained(THOUGHT, tokenizer, kwargs={"enable_thinking": True})[0]
    assert text == "<think>hm<|im_end|><|im_start|>assistant\nNo.<|im_end|><|endoftext|>"


def test_a_token_that_ends_thoughts_and_not_the_last_answer_is_no_stop_either(make_tokenizer):
    template = thoughts_apart("<|im_start|>", "[channel]analysis\n", "[channel]final\n").replace(
        "m.content + '<|im_end|>'", "m.content + (eos_token if loop.last and m.role == 'assistant' else '<|im_end|>')"
    )
    tokenizer = make_tokenizer(template)
    assert stop_ids(tokenizer) == [tokenizer.eos_token_id]
    expected = "[channel]analysis\nhm<|im_end|><|im_start|>assistant[channel]final\nNo.<|endoftext|>"
    assert trained(THOUGHT, tokenizer) == [[expected]]
