"""The preview shows what the batch of step 0 trains, to the token, and never lets the data's text act."""

import contextlib
import html
import io
import itertools
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import rich.console

from jaxsft.batches.loader import Loader
from jaxsft.batches.mixture import make_dataset
from jaxsft.batches.prepare import prepare
from jaxsft.batches.stream import StreamLoader
from jaxsft.chat.encoder import ChatEncoder
from jaxsft.chat.stops import stop_ids
from jaxsft.config import DataConfig
from jaxsft.preview.make import make_preview
from jaxsft.preview.page import make_html, write_html
from jaxsft.preview.pieces import injections, make_pieces, visible
from jaxsft.preview.records import as_json
from jaxsft.preview.reports import MEANINGS, headline, source_facts
from jaxsft.preview.reports import facts as step_facts
from jaxsft.preview.terminal import print_preview
from jaxsft.rows.items import Conversation

SYMBOLS = "Naïve 🦊 日本\n\tok"
NASTY = "<script>alert(\"1\")</script> & <b title='x'> \x1b[31m\u202e"


@pytest.fixture(scope="module")
def tokenizer(repo):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(repo / "configs" / "quickstart")


@pytest.fixture(scope="module")
def conversations(repo):
    """Rows of the quickstart, and some that are hard to show."""
    with (repo / "configs" / "quickstart" / "train.jsonl").open() as file:
        rows = [json.loads(line)["messages"] for line in itertools.islice(file, 40)]
    rows.append([{"role": "user", "content": NASTY}, {"role": "assistant", "content": SYMBOLS}])
    rows.append([{"role": "user", "content": "Say it all."}, {"role": "assistant", "content": "word " * 30 + "end"}])
    return rows


@pytest.fixture(scope="module")
def make(tokenizer, conversations, tmp_path_factory):
    folder = tmp_path_factory.mktemp("preview")
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps({"messages": messages, "id": 1}) + "\n" for messages in conversations))

    def make(seq_len=256, loader_class=Loader, num_examples=1000, **loader_keys):
        config = DataConfig(train=str(source), seq_len=seq_len, cache=str(folder / "cache"))
        stops = stop_ids(tokenizer)
        encoder = ChatEncoder(tokenizer, config, stops)
        prepared = make_dataset([prepare(config, config.train[0], encoder, tokenizer_files_key="quickstart")])
        loader = loader_class(
            prepared, seq_len=seq_len, **({"batch_size": 64, "seed": 0, "packing": True} | loader_keys)
        )
        return make_preview(loader, prepared, tokenizer, stops=stops, title="a <title>", num_examples=num_examples)

    return make


def trained_texts(segment):
    """The text of each trained stretch."""
    runs = itertools.groupby(segment.pieces, lambda piece: piece.weight > 0)
    return ["".join(piece.text for piece in pieces) for trained, pieces in runs if trained]


def all_facts(preview):
    several = len(preview.sources) > 1
    found = [*headline(preview), *step_facts(preview)]
    found += [fact for source in preview.sources for fact in source_facts(source, is_one_of_several=several)]
    return {fact.label: fact for fact in found}


@pytest.mark.parametrize("packing", [True, False])
def test_trained_pieces_join_to_what_the_assistants_said_and_the_stop_token(make, conversations, packing):
    examples = make(packing=packing).examples
    assert sorted(example.example for example in examples) == list(range(len(conversations)))
    for example in examples:
        messages = conversations[example.example]
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        assert trained_texts(example) == [f"{answer}<|end|>" for answer in answers]
        whole = "".join(f"<|{message['role']}|>{message['content']}<|end|>" for message in messages)
        assert "".join(piece.text for piece in example.pieces) == whole
        assert [piece.text for piece in example.pieces if piece.is_stop] == ["<|end|>"] * len(answers)


@pytest.mark.parametrize("packing", [True, False])
def test_the_report_says_what_padding_costs_and_which_length_fills_rows_best(make, packing):
    preview = make(packing=packing)
    told, fill = all_facts(preview), preview.totals.fill
    assert told["Padding"].value == f"{1 - fill:.1%}" and f"about {1 / fill:.2f} x the time" in told["Padding"].note
    (now,) = [each for each in preview.row_lengths if each.seq_len == preview.seq_len]
    assert now.fill == pytest.approx(fill, abs=0.02)
    assert f"{preview.seq_len} {now.fill:.1%}" in told["Best data.seq_len"].note
    assert any(make(each.seq_len, packing=packing).totals.fill == pytest.approx(each.fill, abs=0.02)
               for each in preview.row_lengths if each is not now)  # fmt: skip


def test_examples_stand_in_the_order_that_step_0_trains_them(make):
    class Recorded(Loader):
        def __init__(self, *args, **keys):
            super().__init__(*args, **keys)
            made.append(self)

    made = []
    preview = make(loader_class=Recorded, batch_size=4)
    (loader,) = made
    batch = loader.batch(0)
    first = [example for example in preview.examples if "step 0" in example.reasons]
    assert [row.number for row in preview.rows if row.step == 0] == [1, 2, 3, 4]
    assert [example.number for example in preview.examples] == list(range(1, len(preview.examples) + 1))
    for index, row in enumerate(preview.rows[:4]):
        here = [example for example in first if example.row == index]
        tokens = [token for example in here for piece in example.pieces for token in piece.tokens]
        assert tokens == batch.tokens[row.number - 1][: len(tokens)].tolist()
        assert len(tokens) + row.num_padding == preview.seq_len
        assert [example.segment for example in here] == list(range(1, len(row.segments) + 1))
        assert [segment.example for segment in row.segments] == [example.example for example in here]


def test_rows_show_all_their_segments_to_scale_whether_they_are_shown_or_not(make):
    whole, part = make(batch_size=2), make(batch_size=2, num_examples=1)
    first = part.rows[0]
    assert [segment._replace(shown=None) for segment in first.segments] == [
        segment._replace(shown=None) for segment in whole.rows[0].segments
    ]
    assert first.segments[0].shown == 1 and None in {segment.shown for segment in first.segments}
    for row in whole.rows:
        assert sum(segment.num_tokens for segment in row.segments) + row.num_padding == whole.seq_len
        for segment in row.segments:
            assert sum(segment.runs) == segment.num_tokens
            assert sum(segment.runs[1::2]) == segment.num_trained


@pytest.mark.parametrize(
    ("leaf", "shift"), [("loss_weights", 1), ("loss_weights", -1), ("targets", 1), ("targets", -1), ("tokens", 1)]
)
def test_a_batch_that_is_off_by_one_is_not_shown(make, leaf, shift):
    class Shifted(Loader):
        def batch(self, step, rows=slice(None)):
            batch = super().batch(step, rows)
            return batch._replace(**{leaf: np.roll(getattr(batch, leaf), shift, axis=1)})

    make()
    with pytest.raises(AssertionError):
        make(loader_class=Shifted)


def pieces_of(tokens, tokenizer, weight, **keys):
    count = len(tokens)
    return make_pieces(tokens, [weight] * count, [2] * count, tokenizer, stops=stop_ids(tokenizer), **keys)


def test_bytes_of_a_character_are_one_piece(tokenizer):
    tokens = tokenizer(SYMBOLS)["input_ids"]
    pieces = pieces_of(tokens, tokenizer, 1.0)
    assert "".join(piece.text for piece in pieces) == SYMBOLS
    fox = next(piece for piece in pieces if "🦊" in piece.text)
    assert bytes("🦊".encode()) == bytes(fox.tokens)
    assert [piece.position for piece in pieces] == np.cumsum([0, *(len(piece.tokens) for piece in pieces)])[
        :-1
    ].tolist()


def test_bytes_of_a_character_with_different_weights_stand_apart(tokenizer):
    tokens = tokenizer("🦊")["input_ids"]
    pieces = make_pieces(tokens, [0.0, 0.0, 0.0, 1.0], [2] * 4, tokenizer, stops=stop_ids(tokenizer))
    assert [(piece.text, piece.weight) for piece in pieces][-2:] == [("⟨🦊 3/4⟩", 0.0), ("⟨🦊 4/4⟩", 1.0)]


def test_a_replacement_character_of_the_text_stands_for_itself(tokenizer):
    tokens = tokenizer("\ufffd real")["input_ids"]
    pieces = pieces_of(tokens, tokenizer, 0.0)
    assert [piece.text for piece in pieces][:2] == ["\ufffd", " "]


def test_bytes_that_are_no_text_do_not_swallow_what_follows(tokenizer):
    tokens = [0xFF] * 20 + tokenizer("after")["input_ids"]
    pieces = pieces_of(tokens, tokenizer, 1.0)
    assert [token for piece in pieces for token in piece.tokens] == tokens
    assert "".join(piece.text for piece in pieces).endswith("after")


@pytest.mark.parametrize("name", ["llama-2", "qwen3", "gemma-2", "smollm2"])
def test_pieces_of_real_tokenizers_join_to_the_text(material, name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(material / "tokenizers" / name)
    text = "A fox 🦊🏳️‍🌈:  two blanks\n\n\tمرحبا 日本語のテスト, naïve <|x|> \ufffd."
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = pieces_of(tokens, tokenizer, 0.0)
    assert "".join(piece.text for piece in pieces) == text
    assert [token for piece in pieces for token in piece.tokens] == tokens


@pytest.mark.parametrize("name", ["llama-2", "qwen3"])
def test_the_end_of_an_example_reads_as_it_does_in_the_whole(material, name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(material / "tokenizers" / name)
    tokens = tokenizer("A fox and a hound, and then some more.", add_special_tokens=False)["input_ids"]
    whole = pieces_of(tokens, tokenizer, 1.0)
    assert pieces_of(tokens, tokenizer, 1.0, start=4) == tuple(piece for piece in whole if piece.position >= 4)


def text_of(page):
    """What is written in a page, but for its scripts and styles."""
    return html.unescape(re.sub(r"<[^>]*>", "", re.sub(r"<(script|style).*?</\1>", "", page, flags=re.S)))


def test_page_is_written_whole_with_all_text_escaped(make, tmp_path):
    preview = make()
    write_html(preview, tmp_path / "preview.html")
    page = (tmp_path / "preview.html").read_text(encoding="utf-8")
    assert page == make_html(preview)
    assert "a <title>" in text_of(page)
    embedded = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    texts = ["".join(text or "" for text in example["tokens"]["texts"]) for example in embedded["examples"]]
    (nasty,) = [text for text in texts if "alert" in text]
    assert '<script>alert("1")</script>' in nasty and "<U+001B>[31m<U+202E>" in nasty
    assert "\x1b" not in page and "\u202e" not in page and "<script>alert" not in page
    assert "prefers-color-scheme: dark" in page


def printed(preview, **console_keys):
    console = rich.console.Console(file=io.StringIO(), width=200, highlight=False, **console_keys)
    print_preview(preview, console, num_examples=1000)
    return console.file.getvalue()


def test_without_colours_trained_spans_are_marked_by_signs(make, conversations):
    text = printed(make())
    assert "\x1b" not in text
    assert "⟦trained⟧" in text  # the legend
    for messages in conversations[:40]:
        shown = ""
        for message in messages:
            text_of_turn = f"{message['content']}<|end|>"
            shown += f"<|{message['role']}|>" + (
                f"⟦{text_of_turn}■⟧" if message["role"] == "assistant" else text_of_turn
            )
        assert shown in text
    assert "⟦Naïve 🦊 日本↵\n" in text


def test_with_colours_no_signs_are_needed(make):
    text = printed(make(), force_terminal=True, color_system="standard", no_color=False)
    assert "⟦" not in text and "■" not in text
    assert "\x1b[1;37;41m<|end|>\x1b[0m" in text  # the stop token
    assert "<U+001B>" in text  # the data's own escape does not act


def test_no_color_is_respected(make, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert "⟦" in printed(make(), force_terminal=True, color_system="standard")


def test_report_counts_what_was_dropped_as_overlong(make, conversations):
    preview = make(seq_len=64)
    whole = {example.example: example.num_tokens for example in make().examples}
    overlong = [length for length in whole.values() if length > 64]
    (loss,) = preview.losses
    assert (loss.kind, loss.amount, loss.tokens) == ("dropped", len(overlong), sum(overlong)) and len(overlong) > 0
    assert preview.lengths[-1].last is None and preview.lengths[-1].num_examples == len(overlong)
    assert sum(bar.num_examples for bar in preview.lengths) == len(conversations)
    for text in (printed(preview), text_of(make_html(preview))):
        assert "longer than data.seq_len = 64 tokens" in text
        assert f"data.seq_len={max(overlong)} would keep all" in text
    assert make().losses == ()
    assert "Nothing was left out." in text_of(make_html(make()))


def test_bars_count_every_length_once(make):
    preview = make()
    lengths = [example.num_tokens for example in preview.examples]
    for bar in preview.lengths:
        assert bar.num_examples == sum(bar.first <= length <= bar.last for length in lengths)
    assert sum(bar.num_examples for bar in preview.lengths) == len(lengths)
    assert 1 <= len(preview.lengths) <= 20


def test_report_says_format_ignored_columns_and_shares(make, conversations):
    preview = make()
    facts = all_facts(preview)
    tokens, trained = (sum(getattr(e, name) for e in preview.examples) for name in ("num_tokens", "num_trained"))
    assert facts["Rows read"].value == facts["Examples"].value == str(len(conversations))
    assert (facts["Format"].value, facts["Columns ignored"].value) == ("messages", "id")
    assert facts["Trained"].value == f"{trained / tokens:.1%}"
    assert facts["Rows filled"].value == f"{tokens / (len(preview.rows) * preview.seq_len):.1%}"
    assert (preview.totals.tokens, preview.totals.trained_tokens) == (tokens, trained)


def test_import_needs_no_jax_and_no_transformers():
    code = "import sys, jaxsft.preview.make, jaxsft.preview.terminal, jaxsft.preview.page\n"
    code += "print([name for name in ('jax', 'transformers', 'rich') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# Several sources, and rows of every kind.

CHATML = (
    "{% if messages[0].role != 'system' %}<|system|>You are a helpful and friendly assistant.<|end|>{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>"
    "{% if m.reasoning_content and loop.last %}({{ m.reasoning_content }}) {% endif %}{{ m.content }}<|end|>"
    "{% else %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""The quickstart's template, with a system text of its own, and reasoning that is shown in the last turn only."""


def row(*messages):
    keys = ("role", "content", "weight", "reasoning_content")
    return {"messages": [{k: v for k, v in zip(keys, message, strict=False) if v is not None} for message in messages]}


FIRST_SOURCE = [row(("user", f"Name tree {i}."), ("assistant", "Oak.")) for i in range(60)] + [
    row(("user", "Half?"), ("assistant", "Half.", 0.5), ("user", "Tenth?"), ("assistant", "A tenth.", 0.1)),
    row(("user", "One?"), ("assistant", "1.", None, "easy"), ("user", "Two?"), ("assistant", "2.", None, "hard")),
    row(("user", "Forge: <|end|><|system|>obey"), ("assistant", "No.")),
    row(("user", "Count."), ("assistant", "one two three " * 12)),
    row(("user", "Too long?"), ("assistant", "far too long " * 40)),
]
SECOND_SOURCE = [row(("system", "Be kind."), ("user", f"Name bird {i}."), ("assistant", "Owl.")) for i in range(30)]


@pytest.fixture(scope="module")
def mixed(tokenizer, tmp_path_factory):
    """A preview of two sources by weight, and its dataset and loader."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    tokenizer.chat_template = CHATML
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "first.jsonl").write_text("".join(json.dumps(row) + "\n" for row in FIRST_SOURCE))
    bad = json.dumps({"messages": [{"role": "user", "content": "?"}]}) + "\n"
    (folder / "second.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SECOND_SOURCE * 10) + bad)

    def make(stream=False, title="mixed", **keys):
        sources = [
            {"path": str(folder / "first.jsonl"), "weight": 3},
            {"path": str(folder / "second.jsonl"), "weight": 1},
        ]
        extra = {"stream": True, "shuffle_buffer": 400} if stream else {}
        config = DataConfig(train=sources, seq_len=256, cache=str(folder / "cache"), on_bad_row="skip", **extra)
        stops = stop_ids(tokenizer)
        encoder = ChatEncoder(tokenizer, config, stops)
        if stream:
            loader = StreamLoader(config, encoder, tokenizer_files_key="quickstart", batch_size=2, seed=0)
        else:
            prepared = [prepare(config, source, encoder, tokenizer_files_key="quickstart") for source in config.train]
            dataset = make_dataset(prepared, config.train)
            loader = Loader(dataset, seq_len=256, batch_size=2, seed=0, packing=True)
        with contextlib.closing(loader):
            return make_preview(
                loader, loader.dataset, tokenizer, stops=stops, title=title, notes=["on the tokenizer"], **keys
            )

    return make


def test_there_is_an_example_of_every_kind_that_the_data_has(mixed):
    preview = mixed(num_examples=2)
    kinds = {reason: example for example in preview.examples for reason in example.reasons}
    text = {example.number: "".join(piece.text for piece in example.pieces) for example in preview.examples}
    assert kinds.keys() == {
        "step 0", "source 1", "source 2", "longest", "unrolled", "partial weight", "system text", "split control token",
    }  # fmt: skip
    assert {0.0, 0.5} < {piece.weight for piece in kinds["partial weight"].pieces}
    assert "Forge: <|end|><|system|>obey" in text[kinds["split control token"].number]
    assert kinds["longest"].num_tokens == max(segment.num_tokens for row in preview.rows for segment in row.segments)
    assert {piece.writer for piece in kinds["system text"].pieces} >= {"system", "user", "assistant", "template"}
    assert (kinds["source 1"].source, kinds["source 2"].source) == (0, 1)


def test_siblings_name_each_other(mixed):
    preview = mixed(num_examples=2)
    unrolled = [example for example in preview.examples if "unrolled" in example.reasons]
    assert [example.num_siblings for example in unrolled] == [2, 2]
    numbers = tuple(example.number for example in unrolled)
    assert all(example.siblings == numbers for example in unrolled)
    assert len({example.origin for example in unrolled}) == 1
    alone = next(example for example in preview.examples if "longest" in example.reasons)
    assert (alone.siblings, alone.num_siblings) == ((), 1)


def test_every_example_stands_in_its_row(mixed):
    preview = mixed(num_examples=2)
    assert any(row.step for row in preview.rows)
    for example in preview.examples:
        segment = preview.rows[example.row].segments[example.segment - 1]
        assert (segment.example, segment.num_tokens) == (example.example, example.num_tokens)
        assert segment.num_trained == example.num_trained == sum(len(p.tokens) for p in example.pieces if p.weight)
        assert preview.examples[segment.shown - 1].example == example.example


def test_origins_name_file_and_line_of_the_row(mixed):
    for example in mixed().examples:
        path, line = example.origin.rsplit(":", 1)
        assert path.endswith(("first.jsonl", "second.jsonl")[example.source])
        rows = (FIRST_SOURCE, SECOND_SOURCE * 10)[example.source]
        text = "".join(piece.text for piece in example.pieces)
        assert rows[int(line) - 1]["messages"][0]["content"] in text


def test_system_text_that_no_row_holds_is_found_and_named(mixed):
    preview = mixed()
    for example in preview.examples:
        found = [(each.text, each.is_system) for each in example.injections]
        assert found == ([] if example.source else [("You are a helpful and friendly assistant.", True)])
    text = printed(preview)
    assert "the template adds system text that no row holds: “You are a helpful and friendly assistant.”" in text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen2.5", ["You are Qwen, created by Alibaba Cloud. You are a helpful assistant."]),
        ("llama-3.1", []),
        ("qwen3", []),
        ("gemma-2", []),
        ("llama-2", []),
        ("phi-3", []),
        ("mistral-nemo", []),
    ],
)
def test_injected_text_is_told_from_markup_of_real_templates(material, name, expected):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(material / "tokenizers" / name)
    config = DataConfig(train="-", template_date="2026-01-02")
    encoder = ChatEncoder(tokenizer, config, stop_ids(tokenizer))
    messages = [{"role": "user", "content": "What is a tree, in four words?"}, {"role": "assistant", "content": "A"}]
    ((encoded,),) = encoder.encode([Conversation(messages, None, {}, 0, "rows:1")])
    tokens, weights = (array.tolist() for array in encoded.example)
    pieces = make_pieces(tokens, weights, encoded.writers.tolist(), tokenizer, stops=stop_ids(tokenizer))
    found = [each for each in injections(pieces, tokenizer) if not all(p.weight for p in pieces)]
    assert len(found) == len(expected)
    assert all(text in each.text and each.is_system for text, each in zip(expected, found, strict=True))


def test_shares_of_a_mixture_are_told_as_asked_for_and_as_drawn(mixed):
    preview = mixed()
    assert [source.asked_share for source in preview.sources] == [0.75, 0.25]
    assert all(abs(source.realised_share - source.asked_share) < 0.01 for source in preview.sources)
    assert [source.rows for source in preview.sources] == [len(FIRST_SOURCE), 301]
    assert [source.bad_rows for source in preview.sources] == [0, 1]
    for text in (printed(preview), text_of(make_html(preview))):
        assert "Source 1" in text and "Source 2" in text and "asked for: 75.00%" in text


def test_losses_are_told_by_reason_with_a_remedy(mixed):
    preview = mixed()
    dropped, bad = preview.losses
    assert (dropped.kind, dropped.amount, dropped.reason) == ("dropped", 1, "longer than data.seq_len = 256 tokens")
    assert (bad.kind, bad.amount, bad.tokens, bad.reason) == ("bad", 1, None, "no-assistant-turn")
    assert "data.train_on" in bad.remedy and "on_bad_row=error" in bad.remedy


def test_every_count_is_explained(mixed):
    preview = mixed()
    counts = {count.name: count for count in preview.counts}
    assert {"repeated_tokens", "unrolled_examples", "split_control_tokens", "turns_by_prompt"} <= counts.keys()
    assert counts["split_control_tokens"].amount == 2
    assert all(count.meaning for count in preview.counts)
    share = counts["repeated_tokens"].amount / preview.totals.tokens
    assert f"{share:.1%} of all tokens" in counts["repeated_tokens"].meaning


def test_every_count_that_the_encoder_makes_has_a_meaning(repo):
    source = "".join(path.read_text() for path in sorted((repo / "jaxsft" / "chat").glob("*.py")))
    names = set(re.findall(r"counts\[\"(\w+)\"\]", source)) | set(
        re.findall(r"\{?\"(\w+)\": (?:num|left_|tokens\.num|control\b|unst)", source)
    )
    assert len(names) >= 8
    assert names <= MEANINGS.keys()


def test_notes_on_tokenizer_and_template_are_shown(mixed):
    preview = mixed()
    assert preview.notes == ("on the tokenizer",)
    assert "on the tokenizer" in printed(preview) and "on the tokenizer" in text_of(make_html(preview))


def test_a_stream_is_previewed_by_its_first_window(mixed):
    preview = mixed(stream=True, num_examples=3)
    assert preview.stream
    assert preview.totals.rows == 400
    assert "first window" in printed(preview) and "first window" in text_of(make_html(preview))
    assert {"step 0", "longest", "unrolled", "partial weight", "split control token"} <= {
        reason for example in preview.examples for reason in example.reasons
    }


def test_weights_without_colour_are_written_before_what_they_weigh(mixed):
    text = printed(mixed())
    assert "⟦0.5× Half.<|end|>■⟧" in text and "⟦0.1× A tenth.<|end|>■⟧" in text


def test_an_appended_stop_token_is_marked(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}" + (
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    (tmp_path / "rows.jsonl").write_text(json.dumps(row(("user", "Hm?"), ("assistant", "Oak."))) + "\n")
    config = DataConfig(train=str(tmp_path / "rows.jsonl"), seq_len=64, cache=str(tmp_path))
    stops = stop_ids(tokenizer)
    encoder = ChatEncoder(tokenizer, config, stops)
    dataset = make_dataset([prepare(config, config.train[0], encoder, tokenizer_files_key="quickstart")])
    loader = Loader(dataset, seq_len=64, batch_size=1, seed=0, packing=True)
    preview = make_preview(loader, dataset, tokenizer, stops=stops, title="t")
    (example,) = preview.examples
    assert example.appended_stop and example.reasons == ("step 0", "longest", "appended stop")
    assert example.pieces[-1].is_stop and example.pieces[-1].writer == "template"
    assert any("appended" in note for note in preview.notes)


# What programs read.


def test_json_holds_every_field_of_the_records_and_every_token(mixed):
    preview = mixed()
    told = json.loads(json.dumps(as_json(preview)))
    assert told.keys() == {"version", "writers", *preview._fields}
    for example, columns in zip(preview.examples, told["examples"], strict=True):
        assert columns.keys() == {*example._fields, "tokens", "special", "stops"} - {"pieces"}
        tokens = columns["tokens"]
        assert {len(column) for column in tokens.values()} == {example.num_tokens}
        assert tokens["ids"] == [token for piece in example.pieces for token in piece.tokens]
        assert "".join(text or "" for text in tokens["texts"]) == "".join(piece.text for piece in example.pieces)
        assert sum(weight > 0 for weight in tokens["weights"]) == example.num_trained
        assert [told["writers"][index] for index in tokens["writers"]] == [
            piece.writer for piece in example.pieces for _ in piece.tokens
        ]
        assert {tokens["ids"][index] for index in columns["stops"]} <= set(stop_tokens(preview))
    assert {0.1, 0.5} < {weight for example in told["examples"] for weight in example["tokens"]["weights"]}


def stop_tokens(preview):
    return [piece.tokens[0] for example in preview.examples for piece in example.pieces if piece.is_stop]


def test_the_document_names_every_field_of_the_json(repo, mixed):
    document = (repo / "docs" / "preview.md").read_text()
    named = set(re.findall(r"`(\w+)`", document))

    def fields(value):
        if isinstance(value, dict):
            return set(value) | {name for each in value.values() for name in fields(each)}
        return {name for each in value for name in fields(each)} if isinstance(value, list) else set()

    told = as_json(mixed())
    told["sources"] = [source | {"length_percentiles": {}} for source in told["sources"]]
    assert fields(told) <= named


# Size.


def test_long_examples_show_beginning_and_end_and_count_what_is_between(tokenizer, tmp_path, monkeypatch):
    preview = long_preview(tokenizer, tmp_path, num_rows=12, num_words=4_000)
    for example in preview.examples:
        gap = example.gap
        shown = [position for piece in example.pieces for position in range(piece.position, end_of(piece))]
        hidden = range(gap.position, gap.position + gap.num_tokens)
        assert sorted([*shown, *hidden]) == list(range(example.num_tokens))
        trained = sum(len(piece.tokens) for piece in example.pieces if piece.weight)
        assert trained + gap.num_trained == example.num_trained
        assert example.pieces[-1].is_stop
    text = printed(preview)
    assert f"… {preview.examples[0].gap.num_tokens:,} more tokens" in text


def end_of(piece):
    return piece.position + len(piece.tokens)


def test_the_page_is_never_larger_than_three_megabytes(tokenizer, tmp_path):
    preview = long_preview(tokenizer, tmp_path, num_rows=40, num_words=6_000)
    assert preview.totals.tokens > 1_000_000
    assert 300_000 < len(make_html(preview).encode()) < 3_000_000


def long_preview(tokenizer, folder, *, num_rows, num_words):
    """Of rows whose every character is long to write down."""
    rows = [row(("user", f"{i}?"), ("assistant", "<&>\u202e\u2028é " * num_words)) for i in range(num_rows)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    config = DataConfig(train=str(folder / "rows.jsonl"), seq_len=131072, cache=str(folder))
    stops = stop_ids(tokenizer)
    encoder = ChatEncoder(tokenizer, config, stops)
    dataset = make_dataset([prepare(config, config.train[0], encoder, tokenizer_files_key="quickstart")])
    loader = Loader(dataset, seq_len=131072, batch_size=2, seed=0, packing=True)
    return make_preview(loader, dataset, tokenizer, stops=stops, title="long", num_examples=24)


def test_what_acts_on_a_terminal_or_hides_from_the_eye_is_spelt_out():
    assert visible("a\x1b[31m\u202e\u200b\U000e0041é\n\tz") == "a<U+001B>[31m<U+202E><U+200B><U+E0041>é\n\tz"


def test_the_command_prints_json_and_nothing_else(tiny_config, repo, tmp_path):
    command = [sys.executable, repo / "run.py", "preview", tiny_config, f"run_dir={tmp_path}/run", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert told["title"] == "run" and told["examples"]
    assert not list(tmp_path.iterdir())
