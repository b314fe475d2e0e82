"""Streams: every row once a pass, bounded windows, and any batch again without a look at what came before."""

import itertools
import json
import shutil
import zlib

import numpy as np
import pytest

from jaxsft.batches import stream as stream_module
from jaxsft.batches.stream import StreamLoader
from jaxsft.chat.encoder import ChatEncoder, stop_ids
from jaxsft.config import ConfigError, DataConfig
from jaxsft.disk.writing import WriteError
from jaxsft.rows.sources import DataError, read_rows

NUM_ROWS = 50


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


@pytest.fixture
def make(tmp_path, make_tokenizer):
    """Streams of 50 questions, numbered, whose answers have 0 to 30 letters; all are closed in the end."""
    tokenizer = make_tokenizer()
    write(tmp_path / "a.jsonl", [{"question": f"{n}?", "answer": "x" * (1 + 7 * n % 31)} for n in range(NUM_ROWS)])
    made = []

    def make(train=None, batch_size=4, seed=0, **options):
        options = {"seq_len": 96, "shuffle_buffer": 16} | options
        config = DataConfig(train=train or str(tmp_path / "a.jsonl"), stream=True, **options)
        encoder = ChatEncoder(tokenizer, config, stop_ids(tokenizer))
        made.append(StreamLoader(config, encoder, tokenizer_files_key="t", batch_size=batch_size, seed=seed))
        return made[-1]

    make.folder, make.tokenizer, make.made = tmp_path, tokenizer, made
    yield make
    for loader in made:
        loader.close()


def questions(make, loader, steps):
    """The questions of each step, in the order of the rows."""
    found = []
    for step in steps:
        texts = [make.tokenizer.decode(row) for row in loader.batch(step).tokens]
        found.append([part.split("?")[0] for text in texts for part in text.split("<|im_start|>user\n")[1:]])
    return found


def steps_of(loader, num_windows):
    """Steps whose rows are all of the first windows."""
    for window in range(num_windows):
        loader._window(window)
    return range(loader._starts[num_windows].first_row // loader.shape[0])


def test_each_window_trains_its_rows_once_and_in_another_order_than_the_file(make):
    loader = make(batch_size=1)
    steps_of(loader, 3)
    bounds = [start.first_row for start in loader._starts[:4]]
    for window, (start, end) in enumerate(itertools.pairwise(bounds)):
        seen = sum(questions(make, loader, range(start, end)), [])
        expected = [str(n) for n in range(window * 16, window * 16 + 16)]
        assert sorted(seen) == sorted(expected) and seen != expected


def test_every_row_comes_once_a_pass_and_the_next_pass_has_another_order(make):
    loader = make(batch_size=1, shuffle_buffer=25)
    steps_of(loader, 4)
    middle, end = loader._starts[2].first_row, loader._starts[4].first_row
    passes = [sum(questions(make, loader, range(*span)), []) for span in ((0, middle), (middle, end))]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(str(n) for n in range(NUM_ROWS))
    assert passes[0] != passes[1]
    assert loader.epochs_done(0) == 0 and loader.epochs_done(end) >= 1


def test_batches_depend_on_the_seed_and_on_nothing_else(make):
    one, same, other = make(), make(), make(seed=1)
    for step in range(12):
        for leaf, again in zip(one.batch(step), same.batch(step), strict=True):
            np.testing.assert_array_equal(leaf, again)
    assert one.rows_crc(0, 12) == same.rows_crc(0, 12) != other.rows_crc(0, 12)


def test_row_slices_equal_the_whole_for_every_number_of_processes(make):
    whole = make(batch_size=12)
    for num_processes in (2, 3, 12):
        share = 12 // num_processes
        loaders = [make(batch_size=12) for _ in range(num_processes)]
        for step in (3, 0, 4):
            parts = [loader.batch(step, slice(at * share, (at + 1) * share)) for at, loader in enumerate(loaders)]
            for leaf, *pieces in zip(whole.batch(step), *parts, strict=True):
                np.testing.assert_array_equal(leaf, np.concatenate(pieces))
        assert len({loader.rows_crc(0, 5) for loader in [whole, *loaders]}) == 1


def indexed(make, path, **options):
    loader = make(**options)
    loader.use_index(path, is_writer=True)
    return loader


def test_a_continued_stream_gives_the_same_batches_and_reads_only_from_its_window_on(make, monkeypatch):
    index = make.folder / "stream.jsonl"
    first = indexed(make, index)
    batches, crcs = [first.batch(step) for step in range(20)], [first.rows_crc(at, at + 1) for at in range(20)]
    lost = [(first.epochs_done(step), first.rows_so_far(step)) for step in range(20)]
    first.close()
    skipped = []

    def read(source, **options):
        skipped.append(options["skip"])
        return read_rows(source, **options)

    for step in (0, 1, 7, 13, 19):
        for path in (index, make.folder / "missing" / "stream.jsonl"):
            path.parent.mkdir(exist_ok=True)
            again = indexed(make, path)
            skipped.clear()
            monkeypatch.setattr(stream_module, "read_rows", read)
            for leaf, expected in zip(again.batch(step), batches[step], strict=True):
                np.testing.assert_array_equal(leaf, expected)
            monkeypatch.undo()
            assert again.rows_crc(step, step + 1) == crcs[step]
            assert (again.epochs_done(step), again.rows_so_far(step)) == lost[step]
            if path == index:
                number, _ = again._locate(4 * step)
                assert skipped[0] == again._starts[number].cursors[0][1]
            again.close()
            shutil.rmtree(make.folder / "missing", ignore_errors=True)


def test_an_index_that_is_cut_off_or_of_another_stream_does_no_harm(make):
    index = make.folder / "stream.jsonl"
    first = indexed(make, index)
    expected = [first.batch(step) for step in range(20)]
    first.close()
    whole = index.read_text()
    lines = whole.splitlines(keepends=True)
    other = indexed(make, make.folder / "other.jsonl", seed=3)
    other.batch(12)
    other.close()
    for text in (
        "",
        lines[0],
        whole[:-9],
        "".join(lines[:3]) + "{}",
        "".join(lines[:4]) + "garbage\n",
        whole.replace("16", "17"),
        " \n\n",
        "[]\n",
        sealed(json.loads(lines[0][9:])) + sealed([]),
        sealed(json.loads(lines[0][9:])) + sealed([0, [[0, 0]], []]) + lines[2],
        "".join(lines[:3]) + sealed([5, [[0]], {}]),
        lines[0] + lines[3],
        "".join(lines[:4]) + "\0" * 4096,
        "".join(lines[:4]) + "00000000 " + "[" * 100_000 + "\n",
        b"\xff\xfe\0" * 100,
        whole.encode() + b"\xff\n",
        (make.folder / "other.jsonl").read_text(),
    ):
        index.write_bytes(text if isinstance(text, bytes) else text.encode())
        again = indexed(make, index)
        for step in (19, 3):
            for leaf, whole_leaf in zip(again.batch(step), expected[step], strict=True):
                np.testing.assert_array_equal(leaf, whole_leaf)
        again.close()
        assert index.read_text().startswith("".join(lines[:6])), "mended"


def sealed(value):
    text = json.dumps(value)
    return f"{zlib.crc32(text.encode()):08x} {text}\n"


def test_an_index_that_cannot_be_written_is_one_clear_error(make, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WriteError, match=r"file/stream\.jsonl: could not be written: Not a directory"):
        make().use_index(tmp_path / "file" / "stream.jsonl", is_writer=True)
    (tmp_path / "stream.jsonl").mkdir()
    with pytest.raises(WriteError, match=r"stream\.jsonl: could not be written: Is a directory"):
        make().use_index(tmp_path / "stream.jsonl", is_writer=True)
    loader = indexed(make, tmp_path / "index.jsonl")
    (tmp_path / "index.jsonl").unlink()
    (tmp_path / "index.jsonl").mkdir()
    with pytest.raises(WriteError, match=r"index\.jsonl: could not be written: Is a directory \(\d+ bytes needed"):
        loader.batch(0)


def test_sources_are_mixed_by_their_weights_and_each_goes_round_by_itself(make):
    write(make.folder / "b.jsonl", [{"text": f"text {n}"} for n in range(3)])
    train = [
        {"path": str(make.folder / "a.jsonl"), "weight": 3.0},
        {"path": str(make.folder / "b.jsonl"), "weight": 1.0},
    ]
    loader = make(train=train, shuffle_buffer=10, batch_size=1)
    num_steps = len(steps_of(loader, 40))
    texts = ["".join(make.tokenizer.decode(loader.batch(step).tokens[0])) for step in range(num_steps)]
    found = [sum(text.count(mark) for text in texts) for mark in ("<|im_start|>user", "text ")]
    assert found == [300, 100]
    counts = [sum(text.count(f"text {n}") for text in texts) for n in range(3)]
    assert max(counts) - min(counts) <= 1
    assert loader._starts[40].cursors == [[6, 0], [33, 1]] or loader._starts[40].cursors == [[5, 50], [33, 1]]


def test_bad_rows_and_what_is_dropped_are_counted_as_far_as_was_trained(make):
    good = [{"question": f"{n}?", "answer": "x"} for n in range(2000)]
    good[3] = {"question": "3?", "answer": "x" * 500}
    write(make.folder / "c.jsonl", [*good[:20], "{", *good[20:]])
    loader = make(train=str(make.folder / "c.jsonl"), on_bad_row="skip", batch_size=1)
    last = steps_of(loader, 3)[-1]
    ends = [start.first_row for start in loader._starts]
    assert loader.rows_so_far(ends[1]) == {"stream_rows": 16, "stream_dropped_examples/longer than seq_len": 1}
    assert loader.rows_so_far(last + 1) == {
        "stream_rows": 48,
        "stream_bad_rows/bad-json": 1,
        "stream_dropped_examples/longer than seq_len": 1,
    }
    strict = make(train=str(make.folder / "c.jsonl"), batch_size=1)
    strict.batch(0)
    with pytest.raises(DataError, match=r"c.jsonl:21: bad-json"):
        strict.batch(ends[1])
    write(make.folder / "c.jsonl", [*good[:20], *["{"] * 11, *good[20:]])
    loader = make(train=str(make.folder / "c.jsonl"), on_bad_row="skip", batch_size=1)
    with pytest.raises(DataError, match="11 of 32 rows are bad"):
        loader.batch(40)


def test_a_stream_without_an_example_left_ends_in_an_error(make):
    with pytest.raises(DataError, match="no example is left"):
        make(seq_len=8).batch(0)
    write(make.folder / "empty.jsonl", [])
    with pytest.raises(DataError, match="no rows"):
        make(train=str(make.folder / "empty.jsonl"))


def test_what_has_no_meaning_for_a_stream_is_refused(make):
    path = str(make.folder / "a.jsonl")
    with pytest.raises(ConfigError, match="data.train.0.count: no meaning for a stream"):
        make(train=[{"path": path, "count": 3}])
    with pytest.raises(ConfigError, match="data.train.0.weight: required where several sources are streamed"):
        make(train=[path, path])


def test_closing_ends_the_thread_and_what_it_is_doing(make):
    loader = make(shuffle_buffer=5000)
    loader._thread.submit(loader._make, 0)
    loader.close()
    assert not any(thread.is_alive() for thread in loader._thread._threads)
    with pytest.raises(RuntimeError, match="closed"):
        loader.batch(0)


def test_the_first_window_is_what_a_preview_shows(make):
    loader = make(batch_size=2)
    assert loader.dataset.sizes == [16] and loader.num_rows == loader._starts[1].first_row
    seen = [index for row in range(loader.num_rows) for index in loader.examples_in_row(row)]
    assert sorted(seen) == list(range(16))
    assert len(loader.examples_in_row(loader.num_rows)) == 0
    assert loader.dataset.origin(3) == f"{make.folder}/a.jsonl:4"
    assert loader.dataset.sources[0].report["rows"] == 16
