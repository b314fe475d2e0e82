"""Held-out rows that are trained as well are counted, by file and by content, and refused; the oracle is a set."""

import json
import random
import shutil

import numpy as np
import pytest

from jaxsft.batches.overlap import check_overlap, overlapping
from jaxsft.batches.prepare import prepare
from jaxsft.chat.encoder import ChatEncoder, stop_ids
from jaxsft.config import DataConfig
from jaxsft.rows.sources import DataError


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(*texts):
    return {"messages": [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]}


@pytest.fixture
def prepared(tmp_path, make_tokenizer):
    """The config, and the prepared rows of training and of the held-out set."""

    def run(train, eval, *, limit=None, template=None, **options):
        config = DataConfig.model_validate({"train": train, "eval": eval, "cache": str(tmp_path / "cache"), **options})
        tokenizer = make_tokenizer(template) if template else make_tokenizer()
        encoder = ChatEncoder(tokenizer, config, stop_ids(tokenizer))
        made = [prepare(config, source, encoder, tokenizer_files_key="t") for source in config.train]
        held = prepare(config, config.eval["eval"], encoder, tokenizer_files_key="t", limit=limit)
        return config, made, held

    return run


def test_rows_that_are_trained_as_well_are_counted_whatever_else_stands_in_them(tmp_path, prepared):
    draw = random.Random(0)
    rows = [chat(f"What is {n}?", "x" * draw.randint(1, 40), "And?", f"It is {n}.") for n in range(300)]
    held = rows[40:50] + [chat(f"Who is {n}?", "x" * n) for n in range(1, 21)]
    # Another format, more columns, another order: the same content.
    held = [
        {"conversations": [{"from": t["role"], "value": t["content"]} for t in row["messages"]], "id": n}
        for n, row in enumerate(held)
    ]
    draw.shuffle(held)
    config, train, found = prepared(write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", held))
    seen = {source.example(n).tokens.tobytes() for source in train for n in range(len(source.lengths))}
    expected = [found.example(n).tokens.tobytes() in seen for n in range(len(found.lengths))]
    assert overlapping(found, train).tolist() == expected and sum(expected) == 10
    with pytest.raises(
        DataError, match=r"10 of 30 held-out rows of data.eval.eval are in data.train as well, .*allow_ov"
    ):
        check_overlap(config, "eval", [found], train)
    said = []
    allowing = config.model_copy(update={"allow_overlap": True})
    check_overlap(allowing, "eval", [found], train, say=said.append)
    assert len(said) == 1 and "10 of 30" in said[0]


def test_rows_that_are_only_alike_are_no_overlap(tmp_path, prepared):
    rows = [chat("What is it?", "a" * 50 + letter + "a" * 50) for letter in "bcdefg"]
    config, train, held = prepared(write(tmp_path / "a.jsonl", rows[:3]), write(tmp_path / "b.jsonl", rows[3:]))
    assert not overlapping(held, train).any()
    check_overlap(config, "eval", [held], train)
    # A beginning that is trained is not the whole.
    longer = [chat("What is it?", rows[0]["messages"][1]["content"], "And?", "No.")]
    config, train, held = prepared(write(tmp_path / "a.jsonl", rows[:3]), write(tmp_path / "c.jsonl", longer))
    assert not overlapping(held, train).any()


def test_plain_text_and_unrolled_conversations_are_compared_as_wholes(tmp_path, prepared):
    texts = [{"text": "t" * n + "." * 90} for n in range(1, 30)]
    _, train, held = prepared(
        write(tmp_path / "a.jsonl", texts), write(tmp_path / "b.jsonl", texts[5:7] + [{"text": "u" * 200}]), seq_len=32
    )
    assert overlapping(held, train).tolist() == [True, True, False]
    chats = [chat("a", "b", "c", str(n)) for n in range(5)]
    _, train, held = prepared(
        write(tmp_path / "c.jsonl", chats[:4]), write(tmp_path / "d.jsonl", chats[3:]), unroll="always"
    )
    assert len(held.lengths) == 4 and overlapping(held, train).tolist() == [True, False]


def test_a_file_that_is_read_for_both_counts_with_all_its_rows(tmp_path, prepared, monkeypatch):
    rows = [chat("Hi", str(n)) for n in range(8)]
    path = write(tmp_path / "a.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    for held_out in (path, "a.jsonl", "./*.jsonl", {"path": path, "roles": {"user": "system"}}):
        config, train, held = prepared([path], held_out)
        with pytest.raises(DataError, match="8 of 8 held-out rows"):
            check_overlap(config, "eval", [held], train)
    config, train, held = prepared([path], path, limit=3)
    with pytest.raises(DataError, match="3 of 3 held-out rows"):
        check_overlap(config, "eval", [held], train)
    shutil.copy(path, tmp_path / "copy.json")
    config, train, held = prepared([path], str(tmp_path / "copy.json"))
    assert overlapping(held, train).all()


def test_of_a_stream_only_the_files_can_be_compared(tmp_path):
    path, other = write(tmp_path / "a.jsonl", [chat("Hi", "a")]), write(tmp_path / "b.jsonl", [chat("Hi", "a")])
    for eval, words in ((path, "a.jsonl of data.eval.eval is read for training as well"), (other, None)):
        config = DataConfig.model_validate({"train": path, "eval": eval, "stream": True})
        if words is None:
            check_overlap(config, "eval", [], None)
            continue
        with pytest.raises(DataError, match=words):
            check_overlap(config, "eval", [], None)


def test_the_comparison_costs_little(tmp_path, prepared):
    """It looks at a few tokens of each example, and not at all of them."""
    rows = [chat(f"What is {n}?", "x" * 400 + str(n)) for n in range(2000)]
    _, train, held = prepared(write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows[:10]))
    touched = []

    class Counting(np.ndarray):
        def __getitem__(self, key):
            found = super().__getitem__(key)
            touched.append(getattr(found, "size", 1))
            return found

    (source,) = train
    assert overlapping(held, [source._replace(tokens=source.tokens.view(Counting))]).all()
    assert sum(touched) < 0.1 * len(source.tokens)
