"""Parts of a turn that are trained less than the rest, on templates of every kind; the oracle is the text itself."""

import re

import numpy as np
import pytest
import test_templates

from jaxsft.chat.encoder import ChatEncoder, MaskError, stop_ids
from jaxsft.chat.parts import token_weights
from jaxsft.config import DataConfig
from jaxsft.rows import formats
from jaxsft.rows.sources import Row

ASK = {"role": "user", "content": "2+2?"}
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def template(content):
    turn = "{{ '<|im_start|>' + m['role'] + '\n' }}" + content + "{{ '<|im_end|>\n' }}"
    return "{% for m in messages %}" + turn + "{% endfor %}" + PROMPT


PLAIN = template("{{ m['content'] }}")
TRIMMED = template("{{ m['content'] | trim }}")
BLOCKS = template("{% for part in m['content'] %}{{ part['text'] }}{% endfor %}")
CAPITALS = template("{{ m['content'] | upper }}")
QUOTED = template("{{ m['content'] | tojson }}")
THINKING = template(
    "{% if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] }}"
)
# Takes the thinking out of the content, writes the tags itself, and shows it in the last turn only, as Qwen 3 does.
APART = template(
    "{% set said = m['content'] %}{% if '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{% endif %}{{ said }}"
)
UNFOLLOWED = template("{{ '%s!' % m['content'] }}")


def text_part(text, **flags):
    return {"type": "text", "text": text, **flags}


def encode(template, make_tokenizer, messages, merges=(), **data):
    """The examples of a row of messages, or why it has none."""
    tokenizer = make_tokenizer(template, merges=merges)
    config = DataConfig.model_validate({"train": "rows", **data})
    items = formats.convert(Row({"messages": messages}, "a:1"), "messages", trained_roles=None)
    assert isinstance(items, list), items
    (found,) = ChatEncoder(tokenizer, config, stop_ids(tokenizer)).encode(items)
    return found, tokenizer


def trained(found, tokenizer):
    """Text and weight of each unbroken run of equally trained tokens."""
    (encoded,) = found
    tokens, weights = encoded.example
    edges = np.flatnonzero(np.diff(np.concatenate([[-1.0], weights, [-1.0]])))
    runs = [(tokenizer.decode(tokens[a:b]), float(weights[a])) for a, b in zip(edges, edges[1:], strict=False)]
    return [run for run in runs if run[1]]


MASKED_FIRST = [text_part("Well... ", train=False), text_part("It is 4.")]


@pytest.mark.parametrize("template", [PLAIN, TRIMMED, BLOCKS, THINKING, APART])
def test_a_block_that_is_not_to_be_trained_is_context_on_every_template(template, make_tokenizer):
    found, tokenizer = encode(template, make_tokenizer, [ASK, {"role": "assistant", "content": MASKED_FIRST}])
    assert trained(found, tokenizer) == [("It is 4.<|im_end|>", 1.0)]
    (encoded,) = found
    text = tokenizer.decode(encoded.example.tokens)
    assert "Well... It is 4.<|im_end|>" in text, "it is still seen"


def test_every_spelling_of_parts_trains_what_it_says(make_tokenizer):
    content = "Well... It is 4."
    masked, kept = text_part(content[:8]), text_part(content[8:])
    for turn in (
        {"content": [{**masked, "train": False}, kept]},
        {"content": [{**masked, "weight": 0}, {**kept, "weight": 1}]},
        {"content": [{**masked, "loss": False}, {**kept, "loss": True}]},
        {"content": [{**masked, "masked": True}, kept]},
        {"content": [{"type": "text", "value": content[:8], "trainable": False}, content[8:]]},
        {"content": content, "train_detail": [{"begin_offset": 0, "end_offset": 7, "train": False}]},
        {"content": content, "train_detail": [{"begin_offset": 8, "end_offset": 15, "train": True}]},
        {"content": content, "training_detail": '[{"begin_offset": 8, "end_offset": 15, "train": true}]'},
        {"content": [masked, kept], "train_detail": [{"begin_offset": 0, "end_offset": 7, "train": False}]},
        {"content": content, "train_detail": [{"begin_offset": 8, "end_offset": 15, "weight": 1}], "train": True},
    ):
        found, tokenizer = encode(PLAIN, make_tokenizer, [ASK, {"role": "assistant", **turn}])
        assert trained(found, tokenizer) == [(content[8:] + "<|im_end|>", 1.0)], turn


def test_weights_of_parts_turns_and_rows_multiply_and_the_stop_is_the_turns(make_tokenizer):
    parts = [text_part("a", weight=0.5), text_part("b"), text_part("c", weight=2), text_part("d", train=False)]
    found, tokenizer = encode(PLAIN, make_tokenizer, [ASK, {"role": "assistant", "content": parts, "weight": 0.5}])
    assert trained(found, tokenizer) == [("a", 0.25), ("b", 0.5), ("c", 1.0), ("<|im_end|>", 0.5)]


def test_parts_in_the_middle_of_a_conversation_touch_no_other_turn(make_tokenizer):
    middle = [text_part("no"), text_part(" and ", train=False), text_part("yes")]
    turns = [ASK, {"role": "assistant", "content": middle}, ASK, {"role": "assistant", "content": "no and yes"}]
    found, tokenizer = encode(PLAIN, make_tokenizer, turns)
    assert [run[0] for run in trained(found, tokenizer)] == ["no", "yes<|im_end|>", "no and yes<|im_end|>"]


def test_a_token_that_two_parts_share_has_the_lesser_weight_and_is_counted(make_tokenizer):
    merges = (("Ġ", "I"), ("ĠI", "t"))
    found, tokenizer = encode(
        PLAIN, make_tokenizer, [ASK, {"role": "assistant", "content": MASKED_FIRST}], merges=merges
    )
    assert trained(found, tokenizer) == [(" is 4.<|im_end|>", 1.0)], "the token ' It' belongs to both"
    assert found[0].counts["straddling_parts"] == 1
    emoji = [text_part("🤖", train=False), text_part("🤖")]
    found, tokenizer = encode(PLAIN, make_tokenizer, [ASK, {"role": "assistant", "content": emoji}])
    assert trained(found, tokenizer) == [("🤖<|im_end|>", 1.0)] and "straddling_parts" not in found[0].counts


def test_reasoning_has_parts_of_its_own(make_tokenizer):
    reasoning = [text_part("5?", train=False), text_part(" No, 4.")]
    for turn in (
        {"reasoning_content": reasoning, "content": "4"},
        {
            "content": [
                {"type": "thinking", "thinking": "5?", "train": False},
                {**reasoning[1], "type": "thinking"},
                "4",
            ]
        },
        {"thinking": [{"type": "thinking", "thinking": "5?", "loss": 0}, " No, 4."], "content": "4"},
    ):
        found, tokenizer = encode(THINKING, make_tokenizer, [ASK, {"role": "assistant", **turn}])
        runs = trained(found, tokenizer)
        assert runs == [("<think>\n", 1.0), (" No, 4.\n</think>\n\n4<|im_end|>", 1.0)], turn
    plain = {"role": "assistant", "reasoning_content": ["5? ", "No."], "content": "4"}
    found, tokenizer = encode(THINKING, make_tokenizer, [ASK, plain])
    assert trained(found, tokenizer) == [("<think>\n5? No.\n</think>\n\n4<|im_end|>", 1.0)]


def test_what_a_template_writes_in_place_of_a_part_is_trained_like_that_part(make_tokenizer):
    thought, said = "<think>\nIs it 5?\n</think>\n\n", "It is 4."
    for parts, expected in [
        ([text_part(thought, train=False), text_part(said)], ["It is 4.<|im_end|>"]),
        ([text_part(thought), text_part(said, train=False)], ["<think>\nIs it 5?\n</think>\n\n", "<|im_end|>"]),
        (
            [text_part("<think>\nIs it 5?"), text_part("\n</think>\n\n" + said, train=False)],
            ["<think>\nIs it 5?", "<|im_end|>"],
        ),
    ]:
        for template in (APART, PLAIN):
            found, tokenizer = encode(template, make_tokenizer, [ASK, {"role": "assistant", "content": parts}])
            assert [run[0] for run in trained(found, tokenizer)] == expected
    # In an earlier turn the thinking is stripped: an example of its own, with the same parts.
    turns = [ASK, {"role": "assistant", "content": [text_part(thought, train=False), text_part(said)]}, ASK]
    found, tokenizer = encode(APART, make_tokenizer, [*turns, {"role": "assistant", "content": "4"}])
    assert len(found) == 2 and [run[0] for run in trained(found[:1], tokenizer)] == ["It is 4.<|im_end|>"]


def test_other_spellings_of_the_content_keep_its_parts(make_tokenizer):
    parts = [text_part('Well "a" ', train=False), text_part('it "is" 4.')]
    for template, expected in ((CAPITALS, 'IT "IS" 4.<|im_end|>'), (QUOTED, r'it \"is\" 4."<|im_end|>')):
        found, tokenizer = encode(template, make_tokenizer, [ASK, {"role": "assistant", "content": parts}])
        text = "".join(run[0] for run in trained(found, tokenizer))
        assert expected in text and "ell" not in text.lower()


def test_where_the_parts_cannot_be_told_in_the_text_the_row_is_refused(make_tokenizer):
    found, _ = encode(UNFOLLOWED, make_tokenizer, [ASK, {"role": "assistant", "content": MASKED_FIRST}])
    assert isinstance(found, MaskError)
    # The only part that is to be trained is in no token of its own.
    parts = [text_part("5", train=False), text_part("4")]
    found, _ = encode(PLAIN, make_tokenizer, [ASK, {"role": "assistant", "content": parts}], merges=(("5", "4"),))
    assert isinstance(found, MaskError) and "message 2: " in str(found) and "parts that are to be trained" in str(found)


def test_a_part_that_is_to_be_trained_makes_its_turn_one_that_is(make_tokenizer):
    asked = {"role": "user", "content": [text_part("2"), text_part("+2?", train=True)]}
    found, tokenizer = encode(PLAIN, make_tokenizer, [asked, {"role": "assistant", "content": "4"}])
    assert [run[0] for run in trained(found, tokenizer)] == ["+2?<|im_end|>", "4<|im_end|>"]
    for never in ({"train": False}, {"loss": False}, {"weight": 0}):
        found, tokenizer = encode(PLAIN, make_tokenizer, [{**asked, **never}, {"role": "assistant", "content": "4"}])
        assert [run[0] for run in trained(found, tokenizer)] == ["4<|im_end|>"]
    weighed = {"role": "user", "content": [text_part("2", train=False), text_part("+2?", weight=1)]}
    found, tokenizer = encode(PLAIN, make_tokenizer, [weighed, {"role": "assistant", "content": "4"}])
    assert [run[0] for run in trained(found, tokenizer)] == ["4<|im_end|>"]


def test_a_turn_of_which_no_part_is_trained_is_not_trained(make_tokenizer):
    bad = {"role": "assistant", "content": [text_part("bad", train=False), text_part(" \n")]}
    found, tokenizer = encode(PLAIN, make_tokenizer, [ASK, bad, ASK, {"role": "assistant", "content": "4"}])
    assert [run[0] for run in trained(found, tokenizer)] == ["4<|im_end|>"]


def test_flags_count_where_every_token_is_trained(make_tokenizer):
    turns = [ASK, {"role": "assistant", "content": "bad", "loss": False}, ASK]
    turns.append({"role": "assistant", "content": [text_part("worse", train=False), text_part("4")]})
    found, tokenizer = encode(PLAIN, make_tokenizer, turns, train_on="all")
    text = "".join(run[0] for run in trained(found, tokenizer))
    assert "bad" not in text and "worse" not in text and text.count("2+2?") == 2 and "4<|im_end|>" in text


def test_templates_do_not_see_what_says_how_a_turn_is_trained(make_tokenizer):
    dumped = "{% for m in messages %}{{ m | tojson }}{{ '<|im_end|>' }}{% endfor %}" + PROMPT
    turn = {"role": "assistant", "content": MASKED_FIRST, "weight": 2}
    found, tokenizer = encode(dumped, make_tokenizer, [ASK, turn], train_on="all")
    text = tokenizer.decode(found[0].example.tokens)
    assert "Well" in text and "weight" not in text


def test_the_weight_of_a_token_is_the_least_of_its_characters():
    weights = np.array([0, 0.5, 1, 2], np.float32)
    least, greatest = token_weights(weights, np.array([0, 0, 1, 2, 4]), np.array([1, 2, 4, 4, 4]))
    assert least.tolist() == [0, 0, 0.5, 1, 1] and greatest.tolist() == [0, 0.5, 2, 2, 1]


THOUGHT = "<think>\nno1 no2\n</think>\n\n"
PARTED = {
    "first": [text_part("no1 no2", train=False), text_part(" say1 say2")],
    "last": [text_part("say1 say2"), text_part(" no1 no2", weight=0)],
    "middle": [text_part("say1"), text_part(" no1 no2", loss=False), text_part(" say2 end")],
    "thinking": [text_part(THOUGHT, masked=True), text_part("Well. say1 say2")],  # A token may be shared.
}


def test_parts_are_trained_as_they_say_on_every_real_template(material):
    refused, num_trained = set(), 0
    for fitted in test_templates.fit_templates(material):
        try:
            encoder = test_templates.make_encoder(fitted.tokenizer, test_templates.stops_of(fitted))
        except Exception:  # Of a template that no conversation fits; the test of all templates is about these.
            continue
        for name, parts in PARTED.items():
            turns = [{"role": "user", "content": "ask1?"}, {"role": "assistant", "content": parts}]
            (found,) = encoder.encode(formats.convert(Row({"messages": turns}, "a:1"), "messages"))
            if isinstance(found, MaskError):
                refused.add((fitted.name, name))
                continue
            (encoded,) = found
            ids, weights = encoded.example
            text = fitted.tokenizer.decode(ids[weights > 0])
            assert not re.search(r"no[12]|ask1", text), (fitted.name, name, text)
            assert re.findall(r"say[12]", text) == ["say1", "say2"], (fitted.name, name, text)
            assert encoder.stops & set(ids[weights > 0].tolist()), (fitted.name, name, text)
            num_trained += 1
    assert num_trained > 550 and len(refused) < 40, sorted(refused)
