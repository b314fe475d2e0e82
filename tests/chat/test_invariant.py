"""Wrong weights are found from provenance and prompts alone, whatever made them."""

import numpy as np
import pytest
from test_starts import CHATML, GREETED, THINKS_LAST
from trained import assistant, encoder_of, system, user

from jaxsft.chat.invariant import check_weights
from jaxsft.chat.starts import MaskError
from jaxsft.rows.items import Conversation

TURNS = [system("Be brief."), user("Hi, you?"), assistant("A bot."), user("2+2?"), assistant("4")]
CALLED = [
    user("Rain?"),
    assistant("", tool_calls=[{"id": "1", "type": "function", "function": {"name": "look", "arguments": {"at": "x"}}}]),
    {"role": "tool", "content": "Sun", "tool_call_id": "1"},
    assistant("No."),
]
WITH_CALLS = CHATML.replace("m['content']", "m['content'] + (m['tool_calls'] | tojson if m['tool_calls'] else '')")
IGNORES = CHATML.partition("{% if add")[0]
NO_STOP = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}" + (
    "{{ 'assistant: ' if add_generation_prompt }}"
)
INST = (
    "{% for m in messages %}{{ '[INST]' + m.content + '[/INST]' if m.role != 'assistant' else m.content + eos_token }}"
    "{% endfor %}"
)


@pytest.fixture
def examples(monkeypatch):
    """What is known of the examples of a conversation, with their tokens and weights."""
    import jaxsft.chat.weighing as chat

    def record(messages, tokenizer, **data):
        seen = []
        with monkeypatch.context() as patched:
            patched.setattr(chat, "check_weights", lambda *given, name: seen.append((*given, name)))
            patched.setattr(chat, "weighs_outside", lambda free, starts, ends, weights: weights > 0)
            (found,) = encoder_of(tokenizer, **data).encode([Conversation(messages)])
        assert not isinstance(found, MaskError), found
        return seen

    return record


CASES = [
    (CHATML, TURNS),
    (WITH_CALLS, CALLED),
    (IGNORES, TURNS),
    (NO_STOP, TURNS[1:]),
    (INST, TURNS[1:]),
    (THINKS_LAST, GREETED),
    (THINKS_LAST, TURNS),
]


@pytest.mark.parametrize(("template", "messages"), CASES)
def test_weight_on_any_token_that_is_not_trained_is_refused(make_tokenizer, examples, template, messages):
    tokenizer = make_tokenizer(template)
    for given, starts, ends, weights, name in examples(messages, tokenizer):
        check_weights(given, starts, ends, weights, name=name)
        text, tried = str(given.layout.text), 0
        for at in np.flatnonzero(weights == 0):
            wrong = weights.copy()
            wrong[at] = 0.5
            # The words that close an answer may be trained where its stop token is appended to them.
            if "stop" not in text and at == len(weights) - 1 and template == NO_STOP:
                continue
            with pytest.raises(MaskError, match=r"message \d .*with the chat template of tiny, .* would be trained"):
                check_weights(given, starts, ends, wrong, name=name)
            tried += 1
        assert tried > 5


@pytest.mark.parametrize(("template", "messages"), CASES)
def test_weights_that_begin_too_early_or_end_too_late_are_refused(make_tokenizer, examples, template, messages):
    tokenizer = make_tokenizer(template)
    for given, starts, ends, weights, name in examples(messages, tokenizer):
        begins = np.flatnonzero(np.diff(np.concatenate([[0], weights > 0])) > 0)
        for begin in begins:
            wrong = weights.copy()
            wrong[max(begin - 1, 0)] = 1
            if begin:
                with pytest.raises(MaskError):
                    check_weights(given, starts, ends, wrong, name=name)
        shifted = np.roll(weights > 0, -1).astype(np.float32)
        if begins[0]:
            with pytest.raises(MaskError):
                check_weights(given, starts, ends, shifted, name=name)


def test_the_error_names_the_turn_and_says_whose_text_it_is(make_tokenizer, examples):
    ((given, starts, ends, weights, name),) = examples(TURNS, make_tokenizer())
    text = str(given.layout.text)

    def refusal(words):
        at = text.index(words)
        wrong = weights + ((starts >= at) & (ends <= at + len(words)))
        with pytest.raises(MaskError) as error:
            check_weights(given, starts, ends, wrong, name=name)
        return str(error.value)

    assert "'brief' would be trained, which is said by message 1:" in refusal("brief")
    assert "message 5 (assistant)" in refusal("2+2") and "said by message 4" in refusal("2+2")
    assert "message 3 (assistant)" in refusal("Hi, you") and "written by the template" in refusal(
        "<|im_start|>assistant"
    )


def test_another_message_s_stop_token_may_not_be_trained(make_tokenizer, examples):
    ((given, starts, ends, weights, name),) = examples(TURNS, make_tokenizer())
    stops = [at for at, start in enumerate(starts) if str(given.layout.text).startswith("<|im_end|>", start)]
    for at in stops:
        wrong = weights.copy()
        wrong[at] = 1
        if weights[at]:
            check_weights(given, starts, ends, wrong, name=name)
        else:
            with pytest.raises(MaskError, match="'<|im_end|>' would be trained"):
                check_weights(given, starts, ends, wrong, name=name)


def test_turns_that_are_not_trained_may_carry_no_weight(make_tokenizer, examples):
    quiet = [*TURNS[:2], {**TURNS[2], "train": False}, *TURNS[3:]]
    ((given, starts, ends, weights, name),) = examples(quiet, make_tokenizer())
    at = str(given.layout.text).index("A bot.")
    with pytest.raises(MaskError, match="'A bot.' would be trained, which is said by message 3"):
        check_weights(given, starts, ends, weights + ((starts >= at) & (ends <= at + 6)), name=name)


def test_reasoning_that_is_only_seen_may_carry_no_weight(make_tokenizer, examples):
    template = CHATML.replace(
        "m['content']", "(m['reasoning_content'] + ';' if m['reasoning_content'] else '') + m['content']"
    )
    thinking = [TURNS[1], assistant("4", reasoning_content="two and two")]
    ((given, starts, ends, weights, name),) = examples(thinking, make_tokenizer(template), train_reasoning=False)
    check_weights(given, starts, ends, weights, name=name)
    at = str(given.layout.text).index("two and")
    with pytest.raises(MaskError, match="'two' would be trained"):
        check_weights(given, starts, ends, weights + ((starts >= at) & (ends <= at + 3)), name=name)


def test_a_token_across_the_border_may_be_trained_and_one_beside_it_may_not(make_tokenizer, examples):
    ((given, starts, ends, weights, name),) = examples(TURNS, make_tokenizer())
    first = int(np.flatnonzero(weights)[0])
    joined = starts.copy(), ends.copy(), weights.copy()
    joined[0][first] = starts[first - 1]  # As if one token stood for the last character of the prompt as well.
    check_weights(given, *joined, name=name)
    # A token of no characters belongs to its neighbours, trained or not.
    empty = starts.copy(), ends.copy(), weights.copy()
    empty[1][first - 1], empty[0][first - 1], empty[2][first - 1] = starts[first], starts[first], 1
    check_weights(given, *empty, name=name)
    empty[1][first - 2], empty[0][first - 2], empty[2][first - 2] = starts[first - 2], starts[first - 2], 1
    with pytest.raises(MaskError):
        check_weights(given, *empty, name=name)


def test_a_fault_of_the_code_that_finds_turns_becomes_a_bad_row(make_tokenizer, monkeypatch):
    from jaxsft.chat import turns

    real = turns.find_begin
    monkeypatch.setattr(turns, "find_begin", lambda question: real(question)._replace(start=real(question).start - 4))
    (found,) = encoder_of(make_tokenizer()).encode([Conversation(TURNS)])
    assert isinstance(found, MaskError) and "message 3 (assistant): with the chat template of tiny" in str(found)
