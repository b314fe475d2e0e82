"""Reasoning where the prompt has closed it, and reasoning in marks of other names."""

import pytest
import transformers
from trained import assistant, encoded, encoder_of, trained, user

from jaxsft.chat.starts import MaskError
from jaxsft.chat.thinking import read_tags
from jaxsft.rows.flags import CONTENT_WEIGHTS, REASONING_WEIGHTS

ANSWERED = "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
CLOSES = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}{{ m.content }}"
    + ANSWERED
    + "{{ '<think>\n\n</think>\n\n' if enable_thinking is defined and not enable_thinking }}{% endif %}"
)
OTHER_MARKS = CLOSES.replace("<think>", "[THINK]").replace("</think>", "[/THINK]")
ONLY_CLOSES = CLOSES.replace("'<think>\n\n</think>\n\n' if", "'</think>' if")
OFF = {"enable_thinking": False}
THINKING = [user("2+2?"), assistant("4", reasoning_content="two and two")]


@pytest.mark.parametrize("template", [CLOSES, OTHER_MARKS, ONLY_CLOSES], ids=["think", "brackets", "closing alone"])
@pytest.mark.parametrize("per_row", [True, False])
def test_an_answer_that_reasons_behind_a_closed_thought_is_refused_or_loses_it(make_tokenizer, template, per_row):
    tokenizer = make_tokenizer(template)
    options = {"kwargs": OFF} if per_row else {"chat_template_kwargs": OFF}
    found = encoded(THINKING, tokenizer, **options)
    assert isinstance(found, MaskError) and found.code == "reasoning"
    assert "message 2 (assistant): it reasons, but with the chat template of tiny" in str(found)
    assert "data.reasoning" in str(found)
    (one,) = encoded(THINKING, tokenizer, reasoning="drop", **options)
    assert one.counts["dropped_reasoning"] == 1
    assert trained(THINKING, tokenizer, reasoning="drop", **options) == [["4<|im_end|>"]]
    # With thinking on, nothing is dropped.
    kept = trained(THINKING, tokenizer, reasoning="drop")
    assert "two and two" in kept[0][0] and "dropped_reasoning" not in encoded(THINKING, tokenizer)[0].counts


def test_thoughts_inside_the_content_are_dropped_from_every_answer(make_tokenizer):
    tokenizer = make_tokenizer(CLOSES)
    inside = [user("2+2?"), assistant("<think>\nwell\n</think>\n\n4"), user("3?"), assistant("<think>hm</think>3")]
    found = encoded(inside, tokenizer, kwargs=OFF)
    assert isinstance(found, MaskError) and found.code == "reasoning"
    assert trained(inside, tokenizer, kwargs=OFF, reasoning="drop") == [["4<|im_end|>", "3<|im_end|>"]]
    assert encoded(inside, tokenizer, kwargs=OFF, reasoning="drop")[0].counts["dropped_reasoning"] == 2


def test_reasoning_that_a_template_does_not_show_may_be_dropped(make_tokenizer):
    tokenizer = make_tokenizer()
    assert "does not show its reasoning_content" in str(encoded(THINKING, tokenizer))
    assert trained(THINKING, tokenizer, reasoning="drop") == [["4<|im_end|>"]]


def test_answers_that_do_not_reason_are_trained_behind_a_closed_thought(make_tokenizer):
    plain = [user("2+2?"), assistant("4"), user("Closed: </think>?"), assistant("yes")]
    assert trained(plain, make_tokenizer(CLOSES), kwargs=OFF) == [["4<|im_end|>", "yes<|im_end|>"]]


def test_a_reasoning_turn_that_is_not_trained_contradicts_nothing(make_tokenizer):
    messages = [user("2+2?"), {**THINKING[1], "train": False}, user("3?"), assistant("3")]
    assert trained(messages, make_tokenizer(CLOSES), kwargs=OFF) == [["3<|im_end|>"]]


def test_a_prompt_that_begins_a_thought_has_not_closed_it(make_tokenizer):
    opened = CLOSES.replace("{{ '<think>\n\n</think>\n\n' if", "{{ '<think>\n' if")
    assert trained(THINKING, make_tokenizer(opened), kwargs=OFF) == [["two and two\n</think>\n\n4<|im_end|>"]]


CLOSED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{{ OPEN + (m.reasoning_content or '') + '\n' + CLOSE + '\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + OPEN + '\n' + CLOSE + '\n\n' }}{% endif %}"
)
"""All answers have a thought, and all prompts close an empty one: it looks like a part of the header."""


@pytest.mark.parametrize(
    ("opening", "closing"),
    [
        ("<think>\n", "</think>"),
        ("[THINK]", "[/THINK]"),
        ("<|thought|>\n", "<|end_of_thought|>"),
        ("Thought: ", "Answer:"),
    ],
)
@pytest.mark.parametrize("is_later", [False, True])
def test_a_thought_that_every_prompt_closes_contradicts_answers_that_reason(make_tokenizer, opening, closing, is_later):
    template = CLOSED.replace("OPEN", repr(opening)).replace("CLOSE", repr(closing))
    tokenizer = make_tokenizer(template)
    before = [user("1+1?"), assistant("2")] if is_later else []
    found = encoded([*before, *THINKING], tokenizer)
    assert isinstance(found, MaskError) and found.code == "reasoning"
    assert trained([*before, *THINKING], tokenizer, reasoning="drop")[0][-1] == "4<|im_end|>"
    plain = [*before, user("2+2?"), assistant("4")]
    assert trained(plain, tokenizer)[0][-1] == "4<|im_end|>"


def test_a_thought_inside_the_content_contradicts_a_prompt_that_every_answer_s_thought_is_closed_in(make_tokenizer):
    template = CLOSED.replace("OPEN", repr("<think>\n")).replace("CLOSE", repr("</think>"))
    template = template.replace(
        "{% if m.role == 'assistant' %}",
        "{% set thought = m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content else '' %}"
        "{% set said = m.content.split('</think>')[-1] %}{% if m.role == 'assistant' %}",
    )
    template = template.replace("(m.reasoning_content or '')", "thought").replace("m.content + '<|im", "said + '<|im")
    tokenizer = make_tokenizer(template)
    inside = [user("2+2?"), assistant("<think>well</think>4")]
    found = encoded(inside, tokenizer)
    assert isinstance(found, MaskError) and found.code == "reasoning"
    assert trained(inside, tokenizer, reasoning="drop") == [["4<|im_end|>"]]


@pytest.mark.parametrize("closed", ["</think>", "<think></think>", "<think>\n\n</think>\n\n"])
@pytest.mark.parametrize("unless", ["", " if not enable_thinking else '<think>'"])
def test_a_header_with_the_closing_in_it_contradicts_a_content_that_thinks_as_it_stands(make_tokenizer, closed, unless):
    mark = f"({closed!r}{unless})"
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (MARK if m.role == 'assistant' else '') }}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}{{ '<|im_start|>assistant\n' + MARK if add_generation_prompt }}"
    ).replace("MARK", mark)
    tokenizer = make_tokenizer(template)
    inside = [user("2+2?"), assistant("<think>\nwell\n</think>\n\n4"), user("3?"), assistant("<think>hm</think>3")]
    for kwargs in ({}, OFF):
        found = encoded(inside, tokenizer, kwargs=kwargs)
        assert isinstance(found, MaskError) and found.code == "reasoning"
        assert trained(inside, tokenizer, kwargs=kwargs, reasoning="drop") == [["4<|im_end|>", "3<|im_end|>"]]


def test_a_mark_that_ends_thoughts_and_questions_alike_closes_no_thought_in_a_prompt(make_tokenizer):
    template = (
        "{% for m in messages %}{% if m.reasoning_content %}"
        "{{ '<|im_start|>assistant[channel]analysis\n' + m.reasoning_content + '<|im_end|>' }}{% endif %}"
        "{{ '<|im_start|>' + m.role + ('[channel]final\n' if m.role == 'assistant' else '\n') }}"
        "{{ m.content + '<|im_end|>' }}"
        "{% endfor %}{{ '<|im_start|>assistant' if add_generation_prompt }}"
    )
    assert "two and two" in trained(THINKING, make_tokenizer(template))[0][0]


TAGS = [["<reasoning>", "</reasoning>"], ["[T]", "[/T]"]]


def test_reasoning_in_marks_of_other_names_is_given_to_the_template_as_such(make_tokenizer):
    tokenizer = make_tokenizer(CLOSES)
    expected = [["<think>\nwell\n</think>\n\n4<|im_end|>"]]
    for content in ("<reasoning>\nwell\n</reasoning>\n\n4", " [T]well[/T]4", "[T]well[/T]\n4"):
        turns = [user("2+2?"), assistant(content)]
        assert trained(turns, tokenizer, reasoning_tags=TAGS) == expected
        assert trained(turns, tokenizer) == [[content + "<|im_end|>"]]
    assert encoder_of(tokenizer, reasoning_tags=TAGS).settings["reasoning_tags"] != []


def test_marks_elsewhere_than_at_the_start_are_content():
    for content in ("4 [T]x[/T]", "[T]never closed", "", "[/T]"):
        assert read_tags(assistant(content), [("[T]", "[/T]")]) == assistant(content)
    assert read_tags(user("[T]x[/T]"), [("[T]", "[/T]")]) == user("[T]x[/T]")


@pytest.mark.parametrize(
    ("content", "ranges", "thought", "answer", "of_thought", "of_answer"),
    [
        ("<r>Hm.</r>Yes.", [(3, 6, 0.0)], "Hm.", "Yes.", [(0, 3, 0.0)], []),
        (" <r>\nHm.\n</r>\n\nYes. No.", [(0, 24, 0.5)], "Hm.", "Yes. No.", [(0, 3, 0.5)], [(0, 8, 0.5)]),
        ("<r>Hm.</r>Yes. No.", [(15, 18, 0.0)], "Hm.", "Yes. No.", [], [(5, 8, 0.0)]),
    ],
)
def test_parts_of_a_content_keep_their_weights_when_its_reasoning_is_read_apart(
    content, ranges, thought, answer, of_thought, of_answer
):
    message = {"role": "assistant", "content": content, CONTENT_WEIGHTS: ranges}
    apart = read_tags(message, [("<r>", "</r>")])
    assert (apart["reasoning_content"], apart["content"]) == (thought, answer)
    assert (apart[REASONING_WEIGHTS], apart[CONTENT_WEIGHTS]) == (of_thought, of_answer)


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("content", ["<think>\nhm\n</think>\n\n4", "4"])
def test_qwen3_does_not_think_where_it_is_told_not_to_for_a_row_or_for_a_run(material, content, per_row):
    tokenizer = transformers.AutoTokenizer.from_pretrained(material / "tokenizers" / "qwen3")
    options = {"kwargs": OFF} if per_row else {"chat_template_kwargs": OFF}
    thought = {} if "<think>" in content else {"reasoning_content": "hm"}
    messages = [user("2+2?"), assistant("3", **thought), user("And?"), assistant(content, **thought)]
    found = encoded(messages, tokenizer, **options)
    assert isinstance(found, MaskError) and "its prompt has closed the thought" in str(found)
    dropped = trained(messages, tokenizer, reasoning="drop", **options)
    assert [text for texts in dropped for text in texts][-1] == "4<|im_end|>"
