"""The last exchange of a conversation, and conversations without their oldest ones."""

import pytest
from trained import assistant, encoded, encoder_of, runs, system, text_of, trained, user

from jaxsft.batches.lengths import fit_length
from jaxsft.chat.exchanges import last_exchange, without_oldest
from jaxsft.chat.starts import MaskError
from jaxsft.rows.items import Conversation

CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": {"at": "x"}}}
WITH_CALLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{{ m.tool_calls | tojson if m.tool_calls }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALLED = [
    system("s"), user("a"), assistant("b"), user("c"), assistant("", tool_calls=[CALL]),
    {"role": "tool", "content": "t", "tool_call_id": "1"}, assistant("d"),
]  # fmt: skip


def roles_of(conversation):
    return "".join(f"{message['role'][0]}{message['content']}" for message in conversation.messages)


def test_the_last_exchange_is_trained_with_its_calls(make_tokenizer):
    (texts,) = trained(CALLED, make_tokenizer(WITH_CALLS), train_on="last_exchange")
    assert texts[0].startswith('[{"id"') and texts[1] == "d<|im_end|>" and len(texts) == 2
    assert last_exchange(CALLED) == 4 and last_exchange(CALLED[4:]) == 0


def test_an_exchange_that_nobody_answers_trains_nothing(make_tokenizer):
    found = encoded([*CALLED[:3], user("e")], make_tokenizer(WITH_CALLS), train_on="last_exchange")
    assert isinstance(found, MaskError) and found.code == "nothing-trained"
    assert trained([assistant("hello"), assistant("there")], make_tokenizer(WITH_CALLS), train_on="last_exchange")


def test_the_oldest_exchange_goes_and_system_texts_stay():
    shorter = without_oldest(Conversation(CALLED))
    assert roles_of(shorter) == "ssuca" + "tt" + "ad" and without_oldest(shorter) is None
    greeted = [
        system("s"),
        assistant("g"),
        user("a"),
        user("b"),
        assistant("c"),
        system("m"),
        user("d"),
        assistant("e"),
    ]
    first = without_oldest(Conversation(greeted))
    assert roles_of(first) == "ssuaubacsmudae"
    second = without_oldest(first)
    assert roles_of(second) == "sssmudae" and without_oldest(second) is None
    moved = without_oldest(Conversation(greeted, trained_from=5))
    assert moved.trained_from == 4 and without_oldest(moved).trained_from == 1


def test_exchanges_go_until_the_rest_fits_and_are_counted(make_tokenizer):
    tokenizer = make_tokenizer()
    turns = [system("s"), *[each for n in range(5) for each in (user(f"q{n}"), assistant(f"a{n}"))]]
    (whole,) = encoded(turns, tokenizer)
    length = len(whole.example.tokens)
    (one,) = encoded(turns, tokenizer, overlong="drop_oldest", seq_len=length - 1)
    assert runs(one, tokenizer) == [f"a{n}<|im_end|>" for n in range(1, 5)]
    assert text_of(one, tokenizer).startswith("<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq1")
    assert one.counts["dropped_exchanges"] == 1
    assert one.counts["dropped_exchange_tokens"] == length - len(one.example.tokens)
    (last,) = encoded(turns, tokenizer, overlong="drop_oldest", seq_len=len(one.example.tokens) // 2)
    assert runs(last, tokenizer)[-1] == "a4<|im_end|>" and last.counts["dropped_exchanges"] > 1
    (fits,) = encoded(turns, tokenizer, overlong="drop_oldest", seq_len=length)
    assert "dropped_exchanges" not in fits.counts


@pytest.mark.parametrize("seq_len", [2, 20])
def test_a_last_exchange_that_is_too_long_is_dropped_whole(make_tokenizer, seq_len):
    turns = [user("q"), assistant("a"), user("long " * 20), assistant("b")]
    (one,) = encoded(turns, make_tokenizer(), overlong="drop_oldest", seq_len=seq_len)
    assert "dropped_exchanges" not in one.counts
    fitted = fit_length(one, seq_len, "drop_oldest")
    assert not fitted.spans and fitted.dropped[0].tokens == len(one.example.tokens)


def test_the_stop_token_of_the_last_turn_alone_may_be_trained(make_tokenizer):
    tokenizer = make_tokenizer()
    turns = [user("q"), assistant("a"), user("r"), assistant("b")]
    assert trained(turns, tokenizer, train_stop="last") == [["a", "b<|im_end|>"]]
    assert trained(turns, tokenizer, train_stop="last", unroll="always") == [["a"], ["b<|im_end|>"]]
    quiet = [*turns[:3], {**turns[3], "train": False}]
    assert trained(quiet, tokenizer, train_stop="last") == [["a<|im_end|>"]]
    bare = make_tokenizer("{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}")
    assert trained(turns, bare, train_stop="last") == [["a"], ["b<|endoftext|>"]]


def test_turns_that_are_not_trained_to_stop_are_not_asked_and_the_others_have_their_answers(make_tokenizer):
    tokenizer = make_tokenizer()
    turns = [user("q"), assistant("a"), user("r"), assistant("b")]
    for train_stop, asked in (("every", ["a<|im_end|>", "b<|im_end|>"]), ("last", ["b<|im_end|>"])):
        found = encoder_of(tokenizer, train_stop=train_stop).trained_turns(Conversation(turns, origin="rows:1"))
        assert [tokenizer.decode(turn.answer) for turn in found] == asked


def test_what_a_template_refuses_cannot_be_asked_and_says_so(make_tokenizer):
    """As it is in the training: a held-out row may be skipped there, and must not end the run here."""
    refusing = WITH_CALLS + "{% if messages | length == 3 %}{{ raise_exception('not three') }}{% endif %}"
    encoder = encoder_of(make_tokenizer(refusing))
    refused = Conversation([user("q"), assistant("a"), user("r")][:3], origin="rows:1")
    (found,) = encoder.encode([refused])
    assert isinstance(found, MaskError)
    with pytest.raises(MaskError, match="refuses this conversation: not three"):
        encoder.trained_turns(refused)
