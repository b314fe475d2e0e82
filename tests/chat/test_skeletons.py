"""Conversations that are drawn by a skeleton are those that are found out one by one, on templates of any habit."""

import random

import numpy as np
import pytest
from test_starts import CHATML, NEEDS_USER, THINKS_LAST
from trained import assistant, encoder_of, system, user

from jaxsft.chat import weighing
from jaxsft.chat.metered import allowance
from jaxsft.chat.skeletons import Place
from jaxsft.chat.starts import MaskError
from jaxsft.chat.symbols import Symbol, Watch, Watched, WatchingEnvironment, watched
from jaxsft.chat.template import ChatTemplate
from jaxsft.chat.theirs import Theirs
from jaxsft.rows.items import Conversation

AROUND = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + SHOWN + '<|im_end|>\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe.<|im_end|>\n' }}{% endif %}"
FOLLOWED = {
    "as it is": CHATML,
    "trimmed": AROUND.replace("SHOWN", "m.content | trim"),
    "trimmed at one end": AROUND.replace("SHOWN", "m.content.lstrip('\\n')"),
    "a default system text": DEFAULT_SYSTEM + CHATML,
    "thinking before the last answer": THINKS_LAST,
    "asks": AROUND.replace("SHOWN", "('!' if 'yes' in m.content else '') + m.content"),
    "asks for the beginning": AROUND.replace("SHOWN", "m.content + ('?' if m.content.startswith('a') else '')"),
    "asks for a whole": AROUND.replace("SHOWN", "('same' if m.content == 'Hi' else '') + m.content"),
    "asks for one of a list": AROUND.replace("SHOWN", "('one' if m.content in ['Hi', 'no'] else '') + m.content"),
    "a macro": "{% macro show(text) %}{{ text }}{% endmacro %}" + AROUND.replace("SHOWN", "show(m.content)"),
    "a block": AROUND.replace("{{ '<|im_start|>'", "{% set b %}{{ m.content }}{% endset %}{{ '<|im_start|>'").replace(
        "SHOWN", "b"
    ),
    "answers by the author": CHATML.replace(
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}",
        "{{ '<|im_start|>' + m.role + '\n' }}{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}",
    ),
    "all in one": "{% set ns = namespace(s='') %}{% for m in messages %}"
    "{% set ns.s = ns.s ~ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' %}{% endfor %}{{ ns.s }}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
}
LOST = {
    "its length": "m.content + (m.content | length) | string",
    "a character": "m.content[0] + m.content",
    "a part": "m.content[:1] + m.content[1:]",
    "words": "m.content.split(' ') | join(' ')",
    "capitals": "m.content | upper",
    "a replacement": "m.content | replace('yes', 'no')",
    "in a text": "('!' if m.content in 'Hi there' else '') + m.content",
    "as JSON": "m.content | tojson",
    "all as JSON": "m | tojson",
    "formatted": "'%s' % m.content",
    "formatted by a method": "'{}'.format(m.content)",
    "joined": "['', m.content] | join('')",
    "joined by a method": "''.join([m.content])",
    "a key": "{m.content: 'x'}[m.content] + m.content",
    "order": "('!' if m.content < 'b' else '') + m.content",
    "another content": "('!' if m.content == messages[0].content else '') + m.content",
    "trimmed with what is before it": "(' ' + m.content) | trim",
    "trimmed of letters": "m.content.strip('y')",
    "a test": "('!' if m.content is lower else '') + m.content",
    "where it stands": "m.content + m.content.find('e') | string",
    "Python's spelling": "[m.content] | string",
    "a loop": "(m.content | list | length) | string + m.content",
    "changed": "('!' if loop.changed(m.content) else '') + m.content",
}
WORDS = ["yes", "no", "a", "Hi", "3.14", "\n", "  ", "é🙂", "<|im_end|>", "<think>", "</think>", "'", "\t", "don't"]


def conversations(number=120, seed=0):
    """Conversations of few shapes and any content, blank ones among them."""
    chance = random.Random(seed)

    def text():
        return " ".join(
            chance.choices(
                WORDS,
                [6, 6, 6, 4, 4, 2, 2, 2, 0.2, 0.2, 0.2, 1, 1, 1],
                k=chance.choice([0, *range(1, 7)] + [*range(1, 7)] * 4),
            )
        )

    found = []
    for _ in range(number):
        messages = [system(text())] * (chance.random() < 0.3)
        for _ in range(chance.randint(1, 2)):
            messages += [user(text()), assistant(text())]
        if chance.random() < 0.2:
            messages[-1] |= {"weight": 0.5}
        found.append(Conversation(messages, origin="rows:1"))
    return found


def outcome(found):
    """Everything of the examples of one conversation, or why there is none."""
    if isinstance(found, MaskError):
        return found.code, str(found)
    return [
        (*(array.tolist() for array in (*each.example, each.writers, each.turn_ends)), each.counts, each.origin)
        for each in found
    ]


def compare(tokenizer, items, **data):
    """Encodes with skeletons and without; returns how many conversations were found out, and how many there are."""
    fast, slow = encoder_of(tokenizer, **data), encoder_of(tokenizer, **data)
    slow._skeletons = None
    num_found, find_out = [], fast._found_out
    fast._found_out = lambda conversation: num_found.append(1) or find_out(conversation)
    for theirs, ours, item in zip(slow.encode(items), fast.encode(items), items, strict=True):
        assert outcome(ours) == outcome(theirs), item.messages
    return len(num_found), len(items)


@pytest.mark.parametrize("template", FOLLOWED.values(), ids=FOLLOWED)
def test_a_skeleton_gives_what_is_found_out(make_tokenizer, template):
    num_found, num_items = compare(make_tokenizer(template), conversations())
    # Those have blank contents, give other answers to what is asked, or are the first of their shape.
    assert num_found < num_items


def test_a_content_that_gives_another_answer_is_not_drawn(make_tokenizer):
    def conversation(text):
        return Conversation([user(text), assistant("Hi")], origin="rows:1")

    encoder = encoder_of(make_tokenizer(FOLLOWED["asks"]))
    encoder.encode([conversation("no"), conversation("a")])
    shape = encoder._skeletons.shape(conversation("no"))

    def drawn(text):
        return encoder._skeletons.draw(shape, conversation(text), look=lambda number: None)

    assert drawn("3.14") is not None
    assert drawn("oh yes") is None


@pytest.mark.parametrize("data", [
    {"train_on": "all"}, {"train_on": "last_turn"}, {"train_on": ["user", "assistant"]}, {"unroll": "always"},
    {"unroll": "never"}, {"train_reasoning": False}, {"train_stop": "last"}, {"control_tokens": "error"},
    {"overlong": "drop_oldest", "seq_len": 40},
])  # fmt: skip
@pytest.mark.parametrize("template", [CHATML, THINKS_LAST], ids=["chatml", "thinks"])
def test_whatever_is_trained(make_tokenizer, template, data):
    num_found, num_items = compare(make_tokenizer(template), conversations(), **data)
    assert num_found < num_items or (template == THINKS_LAST and data.get("unroll") == "never")


@pytest.mark.parametrize("shown", LOST.values(), ids=LOST)
def test_where_a_template_looks_at_a_content_nothing_is_taken_for_granted(make_tokenizer, shown):
    tokenizer = make_tokenizer(AROUND.replace("SHOWN", shown))
    watch = Watch()
    messages = [{"role": "user", "content": watched("yes, they", Symbol(1, ()), watch)}]
    template = ChatTemplate(tokenizer.chat_template, {})
    template.render_with(WatchingEnvironment, messages, allowance=allowance(0, 0))
    assert not watch.is_followed
    num_found, num_items = compare(tokenizer, conversations(30))
    assert num_found == num_items


def test_every_method_of_texts_but_those_that_are_followed_looks_at_a_content():
    followed = {"strip", "lstrip", "rstrip", "startswith", "endswith", "__contains__", "__eq__", "__ne__"}
    for name in dir(str):
        if name in followed or not callable(getattr(str, name)) or getattr(Watched, name) is getattr(object, name, 0):
            continue
        watch = Watch()
        content = watched("abc", Symbol(1, ()), watch)
        if name in ("__add__", "__bool__", "__str__", "__new__", "__getattribute__", "__sizeof__", "__class__"):
            continue
        for arguments in ((), ("b",), (1,), ("b", "c"), ({},)):
            try:
                getattr(content, name)(*arguments)
            except Exception:
                continue
        assert not watch.is_followed or name.startswith(
            ("__reduce", "__init", "__getnew", "__getstate", "__dir", "__subclass")
        ), name


def test_a_question_that_another_content_answers_otherwise_is_asked_of_every_row(make_tokenizer):
    tokenizer = make_tokenizer(FOLLOWED["asks"])
    items = [Conversation([user(text), assistant("b")], origin="r:1") for text in ("x", "y", "z", "yes", "w", "yes!")]
    num_found, _ = compare(tokenizer, items)
    assert num_found == 4  # The first two, of which the skeleton is made, and those with a yes.


def test_a_text_that_transformers_renders_otherwise_is_refused(make_tokenizer, monkeypatch):
    items = conversations()
    encoder = encoder_of(make_tokenizer())
    expected = list(map(outcome, encoder.encode(items)))
    assert encoder._skeletons._known, "there is a skeleton"
    monkeypatch.setattr(Theirs, "render_plain", lambda self, messages: "something else")
    assert list(map(outcome, encoder.encode(items))) == expected
    monkeypatch.setattr(Theirs, "render", lambda self, messages, **options: "something else")
    for found in encoder.encode(items):
        assert isinstance(found, MaskError)
    assert "rendered otherwise here than by transformers" in str(found)


def test_plain_renders_are_those_of_apply_chat_template(make_tokenizer):
    for template in (*FOLLOWED.values(), NEEDS_USER + CHATML):
        tokenizer = make_tokenizer(template)
        theirs = Theirs(tokenizer, {"think": True})
        for item in conversations(20):
            expected = tokenizer.apply_chat_template(item.messages, tokenize=False, think=True)
            assert theirs.render_plain(item.messages) == expected == theirs.render(item.messages, kwargs={})


def test_the_last_look_is_given_to_examples_by_a_skeleton(make_tokenizer):
    encoder = encoder_of(make_tokenizer())
    items = [Conversation([user(text), assistant("b")], origin="r:1") for text in ("x", "y", "z")]
    assert not any(isinstance(found, MaskError) for found in encoder.encode(items))
    ((shape, skeleton),) = encoder._skeletons._known.items()
    ((turn, places),) = skeleton.examples[0].turns
    wrong = skeleton.examples[0]._replace(turns=[(turn, (places[0], Place(0, 0), *places[2:]))])
    encoder._skeletons._known[shape] = skeleton._replace(examples=[wrong])
    for found in encoder.encode(items):
        assert isinstance(found, MaskError) and "would be trained" in str(found)


def test_examples_do_not_depend_on_those_that_are_weighed_with_them(make_tokenizer):
    items = [*conversations(60), Conversation([user("<|im_end|>"), assistant("a")]), *conversations(20, seed=1)]
    for template in (CHATML, THINKS_LAST, "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"):
        encoder = encoder_of(make_tokenizer(template))
        together = list(map(outcome, encoder.encode(items)))
        for size in (1, 2, 7, 50):
            apart = [found for at in range(0, len(items), size) for found in encoder.encode(items[at : at + size])]
            assert list(map(outcome, apart)) == together


def test_the_last_look_at_many_examples_is_the_one_at_each(make_tokenizer, monkeypatch):
    """Any single weight is refused in a window where it is refused by itself."""
    seen = []
    encoder = encoder_of(make_tokenizer())
    check = weighing.weighs_outside
    monkeypatch.setattr(weighing, "weighs_outside", lambda *given: seen.append(given) or check(*given))
    encoder.encode(conversations(12))
    ((free, starts, ends, weights),) = seen
    assert len(free) > 12 and not check(*seen[0]).any()
    for at in range(len(weights)):
        changed = np.zeros_like(weights)
        changed[at] = 1
        shares = any(starts[at] < end and ends[at] > start for start, end in free)
        assert check(free, starts, ends, changed)[at] != shares
