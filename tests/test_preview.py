"""The preview shows what the batch of step 0 trains, to the token, and never lets the data's text act."""

import io
import itertools
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import rich.console

from jaxsft.config import DataConfig
from jaxsft.data.chat import ChatEncoder, stop_ids
from jaxsft.data.loader import Loader
from jaxsft.data.mixture import make_dataset
from jaxsft.data.prepare import prepare
from jaxsft.preview import make_pieces, make_preview, print_preview
from jaxsft.preview_page import make_html, write_html

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


def segments_of(preview):
    return [segment for row in preview.rows for segment in row.segments]


@pytest.mark.parametrize("packing", [True, False])
def test_trained_pieces_join_to_what_the_assistants_said_and_the_stop_token(make, conversations, packing):
    segments = segments_of(make(packing=packing))
    assert sorted(segment.example for segment in segments) == list(range(len(conversations)))
    for segment in segments:
        messages = conversations[segment.example]
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        assert trained_texts(segment) == [f"{answer}<|end|>" for answer in answers]
        whole = "".join(f"<|{message['role']}|>{message['content']}<|end|>" for message in messages)
        assert "".join(piece.text for piece in segment.pieces) == whole
        assert [piece.text for piece in segment.pieces if piece.is_stop] == ["<|end|>"] * len(answers)


def test_examples_stand_in_the_order_that_step_0_trains_them(make):
    class Recorded(Loader):
        def __init__(self, *args, **keys):
            super().__init__(*args, **keys)
            made.append(self)

    made = []
    preview = make(loader_class=Recorded, batch_size=4)
    (loader,) = made
    batch = loader.batch(0)
    assert [row.number for row in preview.rows] == [1, 2, 3, 4]
    for row in preview.rows:
        tokens = [token for segment in row.segments for piece in segment.pieces for token in piece.tokens]
        assert tokens == batch.tokens[row.number - 1][: len(tokens)].tolist()
        assert len(tokens) + row.num_padding == preview.seq_len
        assert [segment.number for segment in row.segments] == list(range(1, len(row.segments) + 1))


def test_examples_beyond_the_limit_are_counted_as_not_shown(make):
    whole, part = make(batch_size=2), make(batch_size=2, num_examples=1)
    (row,) = part.rows
    assert row.segments == whole.rows[0].segments[:1]
    assert row.hidden == tuple(segment.num_tokens for segment in whole.rows[0].segments[1:])


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


def test_bytes_of_a_character_are_one_piece(tokenizer):
    tokens = tokenizer(SYMBOLS)["input_ids"]
    pieces = make_pieces(tokens, [1.0] * len(tokens), tokenizer, stop_ids(tokenizer))
    assert "".join(piece.text for piece in pieces) == SYMBOLS
    fox = next(piece for piece in pieces if "🦊" in piece.text)
    assert bytes("🦊".encode()) == bytes(fox.tokens)
    assert [piece.position for piece in pieces] == np.cumsum([0, *(len(piece.tokens) for piece in pieces)])[
        :-1
    ].tolist()


def test_bytes_of_a_character_with_different_weights_stand_apart(tokenizer):
    tokens = tokenizer("🦊")["input_ids"]
    pieces = make_pieces(tokens, [0.0, 0.0, 0.0, 1.0], tokenizer, stop_ids(tokenizer))
    assert [(piece.text, piece.weight) for piece in pieces][-2:] == [("⟨🦊 3/4⟩", 0.0), ("⟨🦊 4/4⟩", 1.0)]


def test_a_replacement_character_of_the_text_stands_for_itself(tokenizer):
    tokens = tokenizer("\ufffd real")["input_ids"]
    pieces = make_pieces(tokens, [0.0] * len(tokens), tokenizer, stop_ids(tokenizer))
    assert [piece.text for piece in pieces][:2] == ["\ufffd", " "]


def test_bytes_that_are_no_text_do_not_swallow_what_follows(tokenizer):
    tokens = [0xFF] * 20 + tokenizer("after")["input_ids"]
    pieces = make_pieces(tokens, [1.0] * len(tokens), tokenizer, stop_ids(tokenizer))
    assert [token for piece in pieces for token in piece.tokens] == tokens
    assert "".join(piece.text for piece in pieces).endswith("after")


@pytest.mark.parametrize("name", ["llama-2", "qwen3", "gemma-2", "smollm2"])
def test_pieces_of_real_tokenizers_join_to_the_text(material, name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(material / "tokenizers" / name)
    text = "A fox 🦊🏳️‍🌈:  two blanks\n\n\tمرحبا 日本語のテスト, naïve <|x|> \ufffd."
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = make_pieces(tokens, [0.0] * len(tokens), tokenizer, stop_ids(tokenizer))
    assert "".join(piece.text for piece in pieces) == text
    assert [token for piece in pieces for token in piece.tokens] == tokens


class _Page(HTMLParser):
    """Text and tags of a page, as a browser would see them."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.attributes = set(), "", []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def test_page_escapes_all_text_and_loads_nothing(make, tmp_path):
    preview = make()
    write_html(preview, tmp_path / "preview.html")
    page = (tmp_path / "preview.html").read_text(encoding="utf-8")
    assert page == make_html(preview)
    seen = _Page(page)
    assert not seen.tags & {"script", "img", "iframe", "object", "link"}
    assert '<script>alert("1")</script>' in seen.text
    assert "<U+001B>[31m<U+202E>" in seen.text
    assert "\x1b" not in page and "\u202e" not in page
    assert "a <title>" in seen.text
    names = {name for name, _ in seen.attributes}
    assert not {name for name in names if name.startswith("on") or name in ("src", "srcset")}
    assert all(value.startswith("#") for name, value in seen.attributes if name == "href")
    assert "url(" not in page and "@import" not in page
    assert "prefers-color-scheme: dark" in page


def test_page_colours_the_trained_tokens_and_no_others(make):
    preview = make()
    page = make_html(preview).split('class="legend"')[1].split("</p>", 1)[1]
    classes = [set(names.split()) for names in re.findall(r'<span class="(t[^"]*)"', page)]
    pieces = [piece for segment in segments_of(preview) for piece in segment.pieces]
    assert len(classes) == len(pieces)
    for names, piece in zip(classes, pieces, strict=True):
        assert ("trained" in names) == (piece.weight > 0)
        assert ("stop" in names) == piece.is_stop
        assert ("special" in names) == piece.text.startswith("<|")


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
    whole = {segment.example: segment.num_tokens for segment in segments_of(make())}
    overlong = [length for length in whole.values() if length > 64]
    (drop,) = preview.drops
    assert (drop.examples, drop.tokens) == (len(overlong), sum(overlong)) and len(overlong) > 0
    assert preview.lengths[-1].last is None and preview.lengths[-1].num_examples == len(overlong)
    assert sum(bar.num_examples for bar in preview.lengths) == len(conversations)
    for text in (printed(preview), _Page(make_html(preview)).text):
        assert "more than data.seq_len = 64 tokens" in text
        assert f"data.seq_len={max(overlong)} would keep all" in text
    assert make().drops == ()
    assert "Nothing was dropped." in make_html(make())


def test_bars_count_every_length_once(make):
    preview = make()
    lengths = [segment.num_tokens for segment in segments_of(preview)]
    for bar in preview.lengths:
        assert bar.num_examples == sum(bar.first <= length <= bar.last for length in lengths)
    assert sum(bar.num_examples for bar in preview.lengths) == len(lengths)
    assert 1 <= len(preview.lengths) <= 20


def test_report_says_format_ignored_columns_and_shares(make, conversations):
    preview = make()
    facts = {fact.label: fact for fact in (*preview.headline, *preview.facts)}
    segments = segments_of(preview)
    tokens, trained = sum(s.num_tokens for s in segments), sum(s.num_trained for s in segments)
    assert facts["Rows read"].value == facts["Examples"].value == str(len(conversations))
    assert (facts["Format"].value, facts["Columns ignored"].value) == ("messages", "id")
    assert facts["Trained"].value == f"{trained / tokens:.1%}"
    assert facts["Rows filled"].value == f"{tokens / (len(preview.rows) * preview.seq_len):.1%}"


def test_import_needs_no_jax_and_no_transformers():
    code = (
        "import sys, jaxsft.preview; print([name for name in ('jax', 'transformers', 'rich') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
