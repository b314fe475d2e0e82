"""Which turns and parts of turns are trained, in the words of other trainers."""

import json

import pytest

from jaxsft.batches.portions import encode_rows
from jaxsft.batches.prepare import open_source, prepare
from jaxsft.chat.encoder import ChatEncoder, stop_ids
from jaxsft.config import DataConfig
from jaxsft.rows import formats
from jaxsft.rows.flags import COUNTERS, SENSES, could_be_flag, read_details, within
from jaxsft.rows.messages import AS_USUAL, Spelling, read_messages
from jaxsft.rows.sources import DataError, Row

ASK, SAY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def answer(spelling=AS_USUAL, **message):
    return read_messages([ASK, {**SAY, **message}], spelling)[1]


# Key, value, weight that it gives, whether a user's turn is then trained too.
SPELLINGS = [
    ("loss", False, 0.0, False),  # ms-swift, XTuner
    ("loss", True, 1.0, False),
    ("loss", 0, 0.0, False),
    ("loss", 0.5, 0.5, False),
    ("loss_scale", 2.0, 2.0, False),  # ms-swift
    ("loss_scale", 0.0, 0.0, False),
    ("training", False, 0.0, False),  # Axolotl
    ("training", True, 1.0, True),
    ("train", 0, 0.0, False),
    ("train", True, 1.0, True),
    ("trainable", False, 0.0, False),  # Tinker
    ("trainable", True, 1.0, True),
    ("weight", 0, 0.0, False),  # OpenAI, Together, Fireworks, Mistral
    ("weight", 0.25, 0.25, False),
    ("masked", True, 0.0, False),  # torchtune
    ("masked", False, 1.0, False),
    ("loss_mask", 0, 0.0, False),
    ("loss_mask", 1, 1.0, True),
    ("loss_weight", 0.0, 0.0, False),  # LLaMA-Factory
    ("loss_weight", 0.5, 0.5, True),
    ("step_loss_mask", 0, 0.0, False),  # slime
]


@pytest.mark.parametrize(("key", "value", "weight", "any_role"), SPELLINGS)
def test_the_flags_of_other_trainers_become_weight_and_train(key, value, weight, any_role):
    message = answer(**{key: value})
    assert message == {**SAY, "weight": weight} | ({"train": True} if any_role else {})
    user = read_messages([{**ASK, key: value}, SAY], AS_USUAL)[0]
    assert user.get("train", False) is any_role
    assert answer(**{key: None}) == SAY, "null says nothing"


def test_every_flag_has_a_spelling_here_and_several_multiply():
    assert {case[0] for case in SPELLINGS} == SENSES.keys()
    assert answer(loss=True, loss_scale=3, weight=0.5)["weight"] == 1.5
    assert answer(train=True, loss=False) == {**SAY, "weight": 0.0}
    assert answer(masked=True, weight=2)["weight"] == 0.0


def test_the_first_of_parallel_calls_says_whether_they_are_trained():
    call = {"role": "tool_call", "content": '{"name": "f"}'}
    for flag, weights in (({"loss": False}, [0.0]), ({"loss_scale": 2}, [2.0])):
        messages = read_messages([ASK, {**call, **flag}, call], AS_USUAL)[1:]
        assert [message.get("weight") for message in messages] == weights
        assert len(messages[0]["tool_calls"]) == 2
    assert len(read_messages([ASK, {**call, "loss": False}, {**call, "loss": True}], AS_USUAL)) == 3


def test_an_unknown_key_that_could_be_a_flag_is_refused_until_the_config_says_what_it_is():
    turns = [ASK, {**SAY, "quality_ok": False}, ASK, SAY]
    row = Row({"messages": turns}, "a.jsonl:7")
    problem = formats.convert(row, "messages")
    assert problem.code == "unknown-flag" and problem.origin == "a.jsonl:7" and "'quality_ok'" in problem.reason
    for spelling, weights in [
        (Spelling(ignored=("quality_ok",)), [None, None]),
        (Spelling(keys={"quality_ok": "train"}), [0.0, None]),
        (Spelling(keys={"quality_ok": "masked"}), [1.0, None]),
        (Spelling(template_keys=("quality_ok",)), [None, None]),
    ]:
        (item,) = formats.convert(row, "messages", spelling=spelling)
        assert [message.get("weight") for message in item.messages[1::2]] == weights
    # A known one can be ignored as well.
    assert read_messages([ASK, {**SAY, "loss": False}], Spelling(ignored=("loss",)))[1] == SAY


def test_what_could_be_a_flag():
    for values in ([True], [None, False], [0], [1, 1], [0, 1.0], [0.5, 1], ["true", "x"], ["False"]):
        assert could_be_flag(values), values
    for values in ([], ["yes"], [0.5, 0.7], [0, 1, 2], [3], [-1, 1], [{"a": True}], [[1, 0]]):
        assert not could_be_flag(values), values
    for name in COUNTERS:
        assert answer(**{name: 1})[name] == 1


def test_keys_of_other_names_are_renamed():
    spelling = Spelling(keys={"speaker": "role", "utterance": "content", "skip": "masked"})
    turns = [{"speaker": "human", "utterance": "Hi"}, {"speaker": "gpt", "utterance": "Hello", "skip": True}]
    assert read_messages(turns, spelling) == [ASK, {**SAY, "weight": 0.0}]
    with pytest.raises(ValueError, match="'role' is given twice, once as 'speaker'"):
        read_messages([{**ASK, "speaker": "human"}], spelling)


def test_unread_keys_are_counted_over_all_rows_and_shown(tmp_path, make_tokenizer):
    turns = [{**ASK, "mood": "fine", "id": 0}, {**SAY, "id": 1, "score": 0.7}]
    rows = [{"messages": turns}, {"messages": [ASK, SAY, {**ASK, "mood": "bad"}, SAY]}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(train=str(path), cache=str(tmp_path / "cache"))
    tokenizer = make_tokenizer()
    encoder = ChatEncoder(tokenizer, config, stop_ids(tokenizer))
    report = prepare(config, config.train[0], encoder, tokenizer_files_key="t").report
    assert report["keys_ignored"] == {"id": 2, "mood": 2, "score": 1}
    opened = open_source(config, config.train[0], encoder)
    assert encode_rows(opened.recipe, list(opened.rows)).unread_keys == report["keys_ignored"]


def test_an_unclear_flag_refuses_the_file_also_where_bad_rows_are_skipped(tmp_path, make_tokenizer):
    path = tmp_path / "a.jsonl"
    rows = [{"messages": [ASK, SAY]}] * 200
    rows[150] = {"messages": [ASK, {**SAY, "rejected": True}]}
    path.write_text("\n".join(map(json.dumps, rows)))
    tokenizer = make_tokenizer()

    def run(keys=None, **options):
        source = {"path": str(path), "keys": keys or {}}
        config = DataConfig(train=source, cache=str(tmp_path / "cache"), on_bad_row="skip", **options)
        encoder = ChatEncoder(tokenizer, config, stop_ids(tokenizer))
        return prepare(config, config.train[0], encoder, tokenizer_files_key="t")

    with pytest.raises(DataError, match=r"(?s)data.on_bad_row does not skip.*a.jsonl:151: unknown-flag: .*'rejected'"):
        run()
    ignoring, masking = run(ignore_keys=["rejected"]), run(keys={"rejected": "masked"})
    assert ignoring.report["kept_rows"] == 200 and masking.report["kept_rows"] == 199
    assert ignoring.key != masking.key, "what the config says of keys changes what is trained"


def test_ranges_of_characters_cover_the_content():
    def ranges(*details, length=10):
        given = [{"begin_offset": a, "end_offset": b, "train": train} for a, b, train in details]
        return [(start, end, flags.get("weight")) for start, end, flags in read_details(given, length, "")]

    assert ranges((0, 3, False)) == [(0, 4, 0.0), (4, 10, None)]
    assert ranges((2, 3, True)) == [(0, 2, 0.0), (2, 4, 1.0), (4, 10, 0.0)]
    assert ranges((5, 9, False), (0, 4, True)) == [(0, 5, 1.0), (5, 10, 0.0)]
    assert ranges((0, 1, False), (4, 5, True)) == [(0, 2, 0.0), (2, 4, 0.0), (4, 6, 1.0), (6, 10, 0.0)]


def test_parts_of_a_text_keep_the_weights_of_their_characters():
    weights = [(0, 4, 0.0), (6, 8, 0.5)]
    by_character = [0.0] * 4 + [1.0] * 2 + [0.5] * 2 + [1.0] * 2
    for start in range(11):
        for end in range(start, 11):
            found = [1.0] * (end - start)
            for a, b, weight in within(weights, start, end):
                found[a:b] = [weight] * (b - a)
            assert found == by_character[start:end]
