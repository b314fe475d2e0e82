"""Templates that hog on some rows only: each such row is a bad one, named, wherever it is rendered; long rows pass."""

import json
import threading
import time

import pytest

from jaxsft.batches.portions import encode_rows
from jaxsft.batches.prepare import open_source, prepare
from jaxsft.batches.stream import StreamLoader
from jaxsft.batches.workers import Workers
from jaxsft.chat.control import Tokenizer
from jaxsft.chat.encoder import ChatEncoder, stop_ids
from jaxsft.chat.metered import TemplateHogs, allowance
from jaxsft.chat.starts import MaskError
from jaxsft.chat.template import ChatTemplate, TemplateError, TracingEnvironment, _compiled, _Plain, number_sources
from jaxsft.config import DataConfig
from jaxsft.rows.items import Conversation
from jaxsft.rows.sources import DataError

AROUND = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
    "{% if 'HOG' in m.content %}HERE{% endif %}{{ '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
DOUBLED = "{% set ns = namespace(s=S) %}{% for i in range(60) %}{% set ns.s = N %}{% endfor %}{{ ns.s }}"
BIG = "{% set b = m.content * 999999 %}"

HOGS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops over a text": "{% for a in 'x' * 9999 %}{% for b in 'x' * 9999 %}{% endfor %}{% endfor %}",
    "loops that are filtered": "{% for a in range(9999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "loops over filters": "{% for a in range(99999)|map('string') %}{% for b in range(99999)|map('string') %}"
    "{% endfor %}{% endfor %}",
    "recursive loop": "{% for x in [1, 1] recursive %}{{ loop([1, 1]) if loop.depth < 60 }}{% endfor %}",
    "recursive macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "product": "{{ 'x' * 10 ** 9 }}",
    "product of the content": "{{ 10 ** 9 * m.content }}",
    "product of a list": "{{ ([m.content] * 10 ** 9)|length }}",
    "doubled by +": DOUBLED.replace("S", "m.content").replace("N", "ns.s + ns.s"),
    "doubled by ~": DOUBLED.replace("S", "m.content").replace("N", "ns.s ~ ns.s"),
    "doubled in a list": DOUBLED.replace("S", "[1]").replace("N", "ns.s + ns.s"),
    "doubled by nesting": DOUBLED.replace("S", "[1]").replace("N", "[ns.s, ns.s]"),
    "doubled, as JSON": DOUBLED.replace("S", "[1]").replace("N", "[ns.s, ns.s]").replace("ns.s }}", "ns.s|tojson }}"),
    "doubled by replace": DOUBLED.replace("S", "m.content").replace("N", "ns.s.replace('H', 'HH')"),
    "doubled by a block": "{% set ns = namespace(s=m.content) %}{% for i in range(60) %}"
    "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}{% endfor %}",
    "squared": "{% set ns = namespace(n=9) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "power": "{{ (m.content|length) ** (10 ** 9) }}",
    "join": "{{ range(99999)|join('x' * 99999) }}",
    "method join": "{{ ('x' * 99999).join(range(99999)|map('string')) }}",
    "replace": "{{ ('y' * 99999)|replace('y', 'z' * 99999) }}",
    "translate": "{{ ('y' * 99999).translate({121: 'z' * 99999}) }}",
    "center": "{{ m.content|center(10 ** 9) }}",
    "ljust": "{{ m.content.ljust(10 ** 9) }}",
    "zfill": "{{ m.content.zfill(10 ** 9) }}",
    "expandtabs": "{{ '\\t'.expandtabs(10 ** 9) }}",
    "bytes": "{{ (5).to_bytes(10 ** 9, 'big')|length }}",
    "indent": "{{ ('a\\n' * 99999)|indent(99999) }}",
    "JSON's indent": "{{ [1, m.content]|tojson(indent=10 ** 9) }}",
    "wordwrap": "{{ ('x' * 999999)|wordwrap(1, wrapstring='y' * 9999) }}",
    "batch": "{{ [1]|batch(10 ** 9, 'x')|list|length }}",
    "slice": "{{ [1]|slice(10 ** 9)|list|length }}",
    "round": "{{ 2.5|round(10 ** 9, 'floor') }}",
    "percent": "{{ '%999999999d' % 3 }}",
    "percent star": "{{ '%*d' % (999999999, 3) }}",
    "format": "{{ '{:>999999999}'.format(m.content) }}",
    "format within": "{{ '{:>{}}'.format(m.content, 999999999) }}",
    "filter format": "{{ '%999999999s'|format(m.content) }}",
    "lorem ipsum": "{{ lipsum(n=10 ** 9) }}",
    "slices": BIG + "{% for i in range(9999) %}{{ b[1:] }}{% endfor %}",
    "printed often": BIG + "{% for i in range(9999) %}{{ b }}{% endfor %}",
    "a list printed": BIG + "{{ [b] * 9999 }}",
    "searched often": BIG + "{% for i in range(99999) %}{% if 'z' in b %}{% endif %}{% endfor %}",
}


def with_hog(hog):
    return AROUND.replace("HERE", hog)


def conversation(answer="fine"):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]
    return Conversation(messages, None, {})


def make_encoder(tokenizer: Tokenizer, **options) -> ChatEncoder:
    return ChatEncoder(tokenizer, DataConfig(train="-", **options), stop_ids(tokenizer))


@pytest.mark.parametrize("name", HOGS)
def test_a_row_on_which_a_template_hogs_is_stopped_in_seconds_and_others_pass(name):
    template = ChatTemplate(with_hog(HOGS[name]), {})
    fine, hogged = (number_sources(conversation(text).messages, None, {}) for text in ("fine", "HOG"))
    assert template.render(fine, 2) == template.render_plain(fine, 2)
    for render in (template.render, template.render_plain):
        begin = time.process_time()
        with pytest.raises(TemplateHogs, match="far more with this conversation than its length allows"):
            render(hogged, 2)
        assert time.process_time() - begin < 20
    assert template.render(fine, 2).endswith("fine<|im_end|>\n"), "and nothing stays behind"


@pytest.fixture
def hogging(make_tokenizer, tmp_path):
    """A source whose row 301 makes the template hog, and what reads it."""
    tokenizer = make_tokenizer(with_hog(HOGS["nested loops"]))
    rows = [{"question": "Q", "answer": "HOG" if n == 300 else "fine"} for n in range(600)]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def parts(**options):
        config = DataConfig(train=str(source), cache=str(tmp_path / "cache"), seq_len=100, **options)
        return config, ChatEncoder(tokenizer, config, stop_ids(tokenizer))

    return parts


def test_a_row_that_makes_the_template_hog_is_a_bad_row_with_a_code_of_its_own(hogging):
    config, encoder = hogging()
    with pytest.raises(DataError, match=r"rows\.jsonl:301: template-hogs: the chat template of tiny: "):
        prepare(config, config.train[0], encoder, tokenizer_files_key="t")
    config, encoder = hogging(on_bad_row="skip")
    report = prepare(config, config.train[0], encoder, tokenizer_files_key="t").report
    assert report["bad_rows"] == {"template-hogs": 1} and report["examples"] == 599


def test_it_is_so_in_workers_too(hogging):
    config, encoder = hogging()
    opened = open_source(config, config.train[0], encoder)
    rows = list(opened.rows)[290:310]
    workers = Workers([opened.recipe])
    try:
        workers.start()
        while not workers._are_ready():
            time.sleep(0.05)
        (portion,) = workers.map([(0, rows)])
    finally:
        workers.close()
    assert portion.problems == encode_rows(opened.recipe, rows).problems
    assert [(problem.code, problem.origin[-4:]) for problem in portion.problems] == [("template-hogs", ":301")]


def test_it_is_so_in_the_thread_of_a_stream_too(hogging):
    config, encoder = hogging(stream=True, shuffle_buffer=600)
    loader = StreamLoader(config, encoder, tokenizer_files_key="t", batch_size=4, seed=0)
    with pytest.raises(DataError, match=r"rows\.jsonl:301: template-hogs"):
        loader.batch(0)
    loader.close()


def test_threads_that_render_at_once_do_not_use_up_each_others_allowance():
    template = ChatTemplate("{% for m in messages %}{% for i in range(9000) %}{% endfor %}{% endfor %}done", {})
    traceable = number_sources(conversation().messages, None, {})
    found = []

    def work():
        found.extend(template.render_plain(traceable, 2) for _ in range(40))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["done"] * 160


def test_a_question_that_makes_the_template_hog_is_an_error_and_no_hang(make_tokenizer):
    encoder = make_encoder(make_tokenizer(with_hog(HOGS["doubled by +"])))
    with pytest.raises(MaskError) as error:
        encoder.prompt([{"role": "user", "content": "HOG"}])
    assert error.value.code == "template-hogs"


def test_a_template_that_hogs_on_another_day_than_that_of_the_run_is_stopped_before_transformers_has_it(make_tokenizer):
    """Transformers renders with the date of today, and without limits."""
    hog = "{% if strftime_now('%Y') != '1999' %}" + HOGS["nested loops"] + "{% endif %}"
    tokenizer = make_tokenizer(with_hog(hog))
    (result,) = make_encoder(tokenizer, template_date="1999-01-01").encode([conversation("HOG")])
    assert isinstance(result, MaskError) and result.code == "template-hogs"


@pytest.mark.parametrize(
    "template",
    [
        AROUND.replace("HERE", ""),
        "{% set ns = namespace(t='') %}{% for m in messages %}{% set ns.t = ns.t + '<|im_start|>' + m.role + '\\n' + "
        "m.content|trim + '<|im_end|>\\n' %}{% endfor %}{{ ns.t }}",
        "{% for m in messages %}{% for other in messages[:loop.index] %}{% endfor %}<|im_start|>{{ m.role }}\n"
        "{% for c in m.content %}{{ c }}{% endfor %}<|im_end|>\n{% endfor %}",
        "{% for i in range(messages|length) %}{% set m = messages[i] %}{% for w in m.content.split(' ') %}{% endfor %}"
        "{{ '<|im_start|>%s\n' % m.role + m.content|replace('  ', ' ') }}<|im_end|>\n{% endfor %}",
    ],
    ids=["plain", "added up", "letter by letter, and all messages for each", "by words"],
)
def test_long_rows_pass(template):
    """A megabyte of text in 2,000 messages."""
    messages = [
        {"role": role, "content": ("word and " * 56)[:-1]} for _ in range(1000) for role in ("user", "assistant")
    ]
    traceable = number_sources(messages, None, {})
    assert sum(len(source.text) for source in traceable.sources) > 10**6
    expected = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    assert ChatTemplate(template, {}).render_plain(traceable, 2000) == expected
    if "for c in" not in template:
        assert ChatTemplate(template, {}).render(traceable, 2000) == expected


def test_what_a_render_may_cost_grows_with_the_conversation_alone():
    assert allowance(1, 10) < allowance(2, 10) < allowance(2, 1000)
    assert allowance(1, 10) < 2**27


def test_endless_recursion_is_a_refusal_in_one_line():
    template = ChatTemplate("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", {})
    with pytest.raises(TemplateError, match="RecursionError"):
        template.render(number_sources(conversation().messages, None, {}), 2)


def test_tools_that_are_dumped_again_cost_the_same_again_and_are_never_those_of_another_row():
    template = ChatTemplate(
        "{{ tools | tojson }}{{ tools | tojson(indent=2) }}{{ tools | tojson(indent=1) }}{{ tools | tojson(2) }}", {}
    )
    tools = [{"name": word, "parameters": {"type": "object", "of": ["<é>", 1, None]}} for word in ("a", "bc")]
    messages = [{"role": "user", "content": "Hi"}]
    rows = [number_sources(messages, [tool], {}) for tool in tools]
    for kind in (_Plain, TracingEnvironment):
        environment = _compiled(template._sources["default"], None, kind, threading.get_ident()).environment
        for row, tool in zip(rows, tools, strict=True):
            texts, costs = [], []
            for _ in range(3):
                is_traced = kind is TracingEnvironment
                texts.append(template.render(row, 1) if is_traced else template.render_plain(row, 1))
                costs.append(row.allowance - environment.left)
            dumped = [json.dumps([tool], ensure_ascii=False, indent=step) for step in (None, 2, 1)]
            assert set(texts) == {"".join(dumped) + json.dumps([tool])} and len(set(costs)) == 1 and costs[0] > 0
            if is_traced:
                assert len({text.runs for text in texts}) == 1
                owners = {source for _, source, _ in texts[-1].runs} - {0}
                assert {row.sources[owner - 1].text for owner in owners} >= {tool["name"], "parameters", "<é>"}
