"""Where a turn begins, on templates whose prompts do not say it."""

import pytest
from trained import assistant, encoded, encoder_of, runs, system, text_of, trained, user

from jaxsft.chat.likeness import common_length, is_border, parting, whole_length
from jaxsft.chat.starts import MaskError

NEEDS_USER = (
    "{%- if messages | selectattr('role', 'equalto', 'user') | list | length == 0 %}"
    "{{- raise_exception('no user turn') }}{%- endif %}"
)
THINKS_LAST = (
    NEEDS_USER + "{%- set last = namespace(user=0) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set last.user = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and loop.index0 > last.user %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{{- m.content | trim }}{{- m.tool_calls | tojson if m.tool_calls }}{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GREETED = [system("be nice"), assistant("hello"), user("hi"), assistant("yes?")]


def test_texts_have_whole_words_and_marks_in_common():
    assert common_length("<|im_start|>", "<|im_end|>") == 5 and whole_length("<|im_start|>", "<|im_end|>") == 0
    assert whole_length("<|end|>\n<|user|>", "<|end|>\n<|model|>") == 8
    assert whole_length("Yes, no one", "Yes, not one") == 5 and whole_length("Yes, no", "Yes, not") == 7
    assert parting("<|a|><|think|>", "<|a|><|text|>") == 5 and parting("\nA:", "\n\nA: Yes") == 4
    assert [at for at in range(9) if is_border("ab <c>d e", at)] == [0, 2, 3, 6, 7, 8]


# A greeting, on templates that refuse a prompt before the first question.


def test_a_greeting_without_a_prompt_begins_behind_the_header_of_the_other_turns(make_tokenizer):
    tokenizer = make_tokenizer(THINKS_LAST)
    last = "\n</think>\n\nyes?<|im_end|>"
    assert trained(GREETED, tokenizer) == [["hello<|im_end|>", last]]
    assert trained(GREETED[1:], tokenizer) == [["hello<|im_end|>", last]]
    two = [assistant("hello"), assistant("I am a bot"), *GREETED[2:]]
    assert trained(two, tokenizer) == [["hello<|im_end|>", "I am a bot<|im_end|>", last]]
    assert trained([assistant(""), *GREETED[2:]], tokenizer) == [["<|im_end|>", last]]


def test_a_greeting_that_calls_a_tool_begins_behind_the_header_too(make_tokenizer):
    tokenizer = make_tokenizer(THINKS_LAST)
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": {"at": "x"}}}
    found = trained([GREETED[0], assistant("", tool_calls=[call]), *GREETED[2:]], tokenizer)
    assert found[0][0].startswith('[{"id": "1"') and found[0][0].endswith("}]<|im_end|>")


@pytest.mark.parametrize("enabled", [True, False])
def test_a_greeting_is_found_whatever_the_prompts_begin(make_tokenizer, enabled):
    template = THINKS_LAST.replace(
        "assistant\n<think>\n'", "assistant\n' + ('<think>\n' if think else '<think>\n\n</think>\n\n')"
    )
    found = trained(GREETED, make_tokenizer(template), kwargs={"think": enabled})
    assert found[0][0] == "hello<|im_end|>"


def test_markers_of_one_beginning_are_not_taken_for_each_other(make_tokenizer):
    # The header of a greeting is another one than that of an answer, and alike in its first letters.
    template = NEEDS_USER + (
        "{% for m in messages %}{{ '<|im_start|>' if m.role != 'assistant' else '<|im_greet|>' if loop.index0 < 2 else "
        "'<|im_answer|>' }}{{ m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_answer|>' }}{% endif %}"
    )
    assert trained(GREETED, make_tokenizer(template)) == [["hello<|im_end|>", "yes?<|im_end|>"]]


def test_a_greeting_whose_beginning_nothing_shows_is_refused_with_template_and_turn(make_tokenizer):
    template = NEEDS_USER + (
        "{% for m in messages %}{% if m.tool_calls %}{{ '<call>' + m.tool_calls[0].function.name }}{% else %}"
        "{{ '<' + m.role + '>' + m.content }}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": {}}}
    found = encoded([GREETED[0], assistant("", tool_calls=[call]), *GREETED[2:]], make_tokenizer(template))
    assert isinstance(found, MaskError)
    assert "message 2 (assistant): where it begins cannot be told: the chat template of tiny" in str(found)


def test_a_system_text_that_stands_inside_an_answer_s_place_is_no_part_of_it(make_tokenizer):
    # As in Llama 2: the system text goes into the first message, whoever says that.
    template = (
        "{% set rest = messages[1:] if messages[0].role == 'system' else messages %}{% for m in rest %}"
        "{% set text = '<<SYS>>' + messages[0].content + '<</SYS>>' + m.content "
        "if loop.first and messages[0].role == 'system' else m.content %}"
        "{{ '[INST] ' + text + ' [/INST]' if m.role == 'user' else ' ' + text + eos_token }}{% endfor %}"
    )
    tokenizer = make_tokenizer(template)
    assert trained(GREETED, tokenizer) == [["hello<|endoftext|>", " yes?<|endoftext|>"]]
    assert trained(GREETED[:2], tokenizer) == [["hello<|endoftext|>"]]


def test_a_prompt_without_the_tools_does_not_have_them_trained(make_tokenizer):
    # As in Phi-4-mini: a prompt of nothing but a system text is empty.
    template = (
        "{% set rest = messages[1:] %}{% if rest %}{{ '<|im_start|>' + messages[0].content }}"
        "{{ tools | tojson if tools }}"
        "{{ '<|im_end|>' }}{% for m in rest %}{{ '<' + m.role + '>' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}{% endif %}"
    )
    tool = {"type": "function", "function": {"name": "look", "description": "d", "parameters": {}}}
    tokenizer = make_tokenizer(template)
    (one,) = encoded(GREETED, tokenizer, tools=[tool])
    assert trained(GREETED, tokenizer, tools=[tool]) == [["hello<|im_end|>", "yes?<|im_end|>"]]
    assert "look" in text_of(one, tokenizer)


# Templates that ignore add_generation_prompt.

TURNS = [user("Hi"), assistant("Yo"), user("Hm"), assistant("Ok")]


@pytest.mark.parametrize(
    "end", ["eos_token if loop.last", "eos_token if loop.last else '<|im_end|>'", "eos_token if not loop.last"]
)
@pytest.mark.parametrize("header", ["assistant: ", "<|im_start|>assistant\n", "[assistant]"])
def test_a_past_that_only_ends_otherwise_leaves_the_header_untrained(make_tokenizer, end, header):
    before, after = header.split("assistant")
    template = (
        f"{{% for m in messages %}}{{{{ {before!r} + m.role + {after!r} + m.content }}}}"
        f"{{{{ {end} }}}}{{{{ '\\n' }}}}{{% endfor %}}"
    )
    tokenizer = make_tokenizer(template)
    stops = ["<|endoftext|>", "<|im_end|>"]
    examples = encoded(TURNS, tokenizer, stops=stops)
    found = [text.replace("\n", "") for one in examples for text in runs(one, tokenizer)]
    assert found == ["Yo<|endoftext|>", "Ok<|endoftext|>"]
    assert all(text_of(one, tokenizer).count(header) == at for at, one in enumerate(examples, start=1))


def test_words_that_only_end_a_text_are_no_header(make_tokenizer):
    template = "{% for m in messages %}{{ m.role + ': ' + m.content }}{{ ' END.' if loop.last }}{{ '\n' }}{% endfor %}"
    found = trained(TURNS[:2], make_tokenizer(template))
    assert found == [["Yo<|endoftext|>"]]


# Templates that end with their header whether asked or not.


@pytest.mark.parametrize("opening", ["[SAY]", "<say>\n", "Answer: "])
@pytest.mark.parametrize(
    ("user_part", "header"),
    [("<user>", "<assistant>"), ("<|im_start|>user\n", "<|im_start|>assistant\n"), ("U: ", "A: ")],
)
def test_the_model_s_own_opening_is_trained_behind_a_header_that_is_always_there(
    make_tokenizer, opening, user_part, header
):
    template = (
        "{% for m in messages %}{{ USER if m.role == 'user' else HEADER + OPENING }}{{ m.content + eos_token }}"
        "{% endfor %}{{ HEADER }}"
    )
    for name, text in (("USER", user_part), ("HEADER", header), ("OPENING", opening)):
        template = template.replace(name, repr(text))
    tokenizer = make_tokenizer(template)
    expected = [[opening + "Yo<|endoftext|>", opening + "Ok<|endoftext|>"]]
    assert trained(TURNS, tokenizer) == expected
    assert not any("ignores add_generation_prompt" in note for note in encoder_of(tokenizer).notes)
    guarded = template.replace(
        "{{ " + repr(header) + " }}", "{{ " + repr(header) + " if messages[-1].role == 'user' }}"
    )
    assert trained(TURNS, make_tokenizer(guarded)) == expected


def test_the_header_that_is_always_there_is_no_part_of_a_greeting(make_tokenizer):
    template = (
        "{% for m in messages %}<{{m.role}}>{% if m.role=='assistant' %}[SAY]{% endif %}{{m.content+eos_token}}"
        "{% endfor %}<assistant>"
    )
    assert trained(TURNS[1:], make_tokenizer(template)) == [["[SAY]Yo<|endoftext|>", "[SAY]Ok<|endoftext|>"]]


def test_what_closes_a_question_is_no_header_and_what_follows_it_is(make_tokenizer):
    template = (
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '</' + m.role + '>' }}"
        "{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    )
    assert trained(TURNS, make_tokenizer(template)) == [["Yo</assistant><|endoftext|>", "Ok</assistant><|endoftext|>"]]
