"""Rows to examples on disk: counted without a gap, cached under all that determines them, and whole or not there."""

import gc
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from jaxsft.batches.portions import encode_rows, merged_reports
from jaxsft.batches.prepare import chunks, open_source, prepare, read_items
from jaxsft.batches.workers import Workers, seldom_collected
from jaxsft.chat.encoder import ChatEncoder, stop_ids
from jaxsft.config import DataConfig, SourceConfig
from jaxsft.rows import formats
from jaxsft.rows.sources import DataError


@pytest.fixture
def setting(tmp_path, make_tokenizer):
    tokenizer = make_tokenizer()
    rows = [{"question": f"What is {n}?", "answer": "x" * n} for n in range(1, 21)]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def parts(stops=None, tokenizer=tokenizer, format=None, columns=None, roles=None, path=None, **options):
        given = {"path": str(path or source), "format": format, "columns": columns or {}, "roles": roles or {}}
        config = DataConfig(train=given, cache=str(tmp_path / "cache"), **options)
        return config, config.train[0], ChatEncoder(tokenizer, config, stops or stop_ids(tokenizer))

    def run(limit=None, key="t", **options):
        return prepare(*parts(**options), tokenizer_files_key=key, limit=limit)

    run.source, run.tokenizer, run.parts, run.folder = source, tokenizer, parts, tmp_path
    run.cache = tmp_path / "cache" / "jaxsft-prepared"
    return run


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def test_prepared_examples_are_those_of_the_conversations_in_order(setting):
    prepared = setting(seq_len=100)
    assert len(prepared.lengths) == 20
    for index in range(20):
        tokens, weights = prepared.example(index)
        text = (
            f"<|im_start|>user\nWhat is {index + 1}?<|im_end|>\n<|im_start|>assistant\n{'x' * (index + 1)}<|im_end|>\n"
        )
        assert setting.tokenizer.decode(tokens) == text
        assert setting.tokenizer.decode(tokens[weights > 0]) == "x" * (index + 1) + "<|im_end|>"
        assert prepared.origin(index) == f"{setting.source}:{index + 1}"
        assert prepared.siblings(index) == range(index, index + 1)
    report = prepared.report
    assert report["format"] == "question_answer" and report["rows"] == report["examples"] == 20
    assert report["tokens"] == prepared.lengths.sum() == len(prepared.writers)
    assert report["trained_tokens"] == sum(range(2, 22))
    assert report["dropped"] == report["cut"] == report["bad_rows"] == {}
    assert report["longest"]["origin"] == f"{setting.source}:20"


def test_overlong_examples_are_dropped_and_counted_or_listed(setting):
    lengths = setting(seq_len=100).lengths
    prepared = setting(seq_len=int(lengths[14]))
    report = prepared.report
    assert prepared.lengths.tolist() == [length for length in lengths.tolist() if length <= lengths[14]]
    assert report["dropped"] == {"longer than seq_len": {"examples": 5, "tokens": lengths[15:].sum()}}
    assert report["longest"]["tokens"] == lengths[-1]
    with pytest.raises(DataError, match=rf"rows.jsonl:16: overlong: {lengths[15]} tokens"):
        setting(seq_len=int(lengths[14]), overlong="error")
    with pytest.raises(DataError, match=r"no example is left of 20 rows \(dropped: 20 longer .*data.seq_len=8"):
        setting(seq_len=8)
    assert not [path for path in setting.cache.iterdir() if path.name.startswith(".")], "nothing half-built is left"


@pytest.mark.parametrize("policy", [None, "drop", "truncate_turns", "truncate", "split"])
def test_rows_examples_and_tokens_add_up_whatever_becomes_of_long_ones(setting, policy):
    long = [{"role": role, "content": word * 12} for word in "abcd" for role in ("user", "assistant")]
    write(setting.folder / "chats.jsonl", [{"messages": long[:count]} for count in (2, 4, 8)] * 3)
    write(setting.folder / "texts.jsonl", [{"text": "t" * length} for length in (5, 100, 120, 121)])
    for name in ("chats", "texts"):
        for seq_len in (30, 60, 61, 100, 500):
            try:
                prepared = setting(path=setting.folder / f"{name}.jsonl", seq_len=seq_len, overlong=policy)
            except DataError as error:
                assert "no example is left" in str(error)
                continue
            report = prepared.report
            assert report["rows"] == report["kept_rows"] + report["dropped_rows"] + sum(report["bad_rows"].values())
            lost = [*report["dropped"].values(), *report["cut"].values()]
            assert report["encoded"]["tokens"] == report["tokens"] + sum(each["tokens"] for each in lost)
            assert prepared.lengths.max() <= seq_len and report["tokens"] == prepared.lengths.sum()
            for index in range(len(prepared.lengths)):
                assert prepared.example(index).loss_weights[1:].any()
                assert index in prepared.siblings(index)


def test_bad_rows_are_all_listed_or_skipped_and_counted_but_never_more_than_1_percent(setting):
    good = [{"question": "Q", "answer": "A"}] * 598
    write(setting.source, [*good[:300], '{"question": ', *good[300:], {"question": "Q", "answer": ""}])
    with pytest.raises(DataError, match=r"rows.jsonl:301: bad-json") as error:
        setting()
    assert "rows.jsonl:600: " in str(error.value) and "2 bad rows" in str(error.value)
    assert error.value.exit_code == 65
    assert os.listdir(setting.cache) == ["jaxsft.txt"]
    report = setting(on_bad_row="skip").report
    assert report["rows"] == 600 and report["examples"] == 598
    assert sum(report["bad_rows"].values()) == 2 and report["bad_rows"]["bad-json"] == 1
    write(setting.source, [*good, *["[]"] * 7])
    with pytest.raises(DataError, match=r"(?s)7 of 605 rows are bad, more than the 1% .*rows.jsonl:599: not-an-object"):
        setting(on_bad_row="skip")


def test_a_row_is_bad_as_a_whole_where_its_mask_cannot_be_established(setting):
    rows = [{"question": "Q", "answer": "A"}] * 150
    rows[7] = {"question": "Q <|im_start|> Q", "answer": "A"}
    write(setting.source, rows)
    with pytest.raises(DataError, match=r"rows.jsonl:8: "):
        setting(control_tokens="error")
    report = setting(control_tokens="error", on_bad_row="skip").report
    assert report["kept_rows"] == report["examples"] == 149 and sum(report["bad_rows"].values()) == 1


def test_everything_that_determines_the_examples_changes_the_key(setting, make_tokenizer):
    base = setting().key
    assert setting().key == base
    copy = setting.folder / "copy.jsonl"
    shutil.copy(setting.source, copy)
    changed = [
        setting(seq_len=500),
        setting(train_on="last_turn"),
        setting(train_on=["assistant"]),
        setting(train_reasoning=False),
        setting(unroll="never"),
        setting(control_tokens="error"),
        setting(overlong="truncate"),
        setting(on_bad_row="skip"),
        setting(format="question_answer"),
        setting(columns={"question": "answer", "answer": "question"}),
        setting(roles={"Patient": "user"}),
        setting(chat_template_kwargs={"x": 1}),
        setting(limit=3),
        setting(key="u"),
        setting(path=copy),
        setting(stops=[*stop_ids(setting.tokenizer), 5]),
        setting(tokenizer=make_tokenizer("{# new #}" + setting.tokenizer.chat_template)),
    ]
    setting.source.write_text(setting.source.read_text().replace("What is 7?", "What is 8?"))
    changed.append(setting())
    assert len({base, *(prepared.key for prepared in changed)}) == 19


def test_the_code_that_makes_examples_is_part_of_the_key(setting, monkeypatch):
    before = setting()
    monkeypatch.setattr("jaxsft.batches.prepare.code_key", lambda: "newer")
    after = setting()
    assert after.key != before.key
    assert after.report["fingerprint"] == before.report["fingerprint"], "but a run may go on with what is equal"


def test_a_second_run_maps_what_the_first_one_wrote(setting, monkeypatch):
    first = setting()
    monkeypatch.setattr("jaxsft.batches.prepare._build", None)
    second = setting()
    np.testing.assert_array_equal(first.tokens, second.tokens)
    assert isinstance(second.tokens, np.memmap) and second.report == first.report


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_damaged_cache_is_built_anew(setting):
    first = setting()
    expected, report, folder = np.array(first.tokens), first.report, setting.cache / first.key
    names = sorted(path.name for path in folder.iterdir())
    damages = [lambda name=name, at=at: flip(folder / name, at) for name in names for at in (0, 9, -1)]
    damages += [lambda name=name: os.truncate(folder / name, 8) for name in names]
    damages += [lambda name=name: (folder / name).unlink() for name in names]
    damages += [
        lambda: (folder / "report.json").write_text('{"rows": '),
        lambda: (folder / "seal.json").write_text("{}"),
        *[
            lambda text=text: (folder / "seal.json").write_bytes(text)
            for text in (b"[]", b"7", b"", b"null", b"\xff\0\xfe", b"[" * 100_000, b'{"a":' * 100_000, b" " * 10**6)
        ],
        lambda: shutil.rmtree(folder),
        lambda: [path.unlink() for path in folder.iterdir()],
    ]
    for damage in damages:
        damage()
        there = folder.exists()
        said = []
        config, source, encoder = setting.parts()
        again = prepare(config, source, encoder, tokenizer_files_key="t", say=said.append)
        assert len(said) == there and all(f"{folder}: prepared data that are damaged" in line for line in said)
        np.testing.assert_array_equal(again.tokens, expected)
        assert again.report == report
        assert sorted(os.listdir(setting.cache)) == sorted([first.key, "jaxsft.txt"])


def test_several_at_once_prepare_the_same(setting):
    results = []
    threads = [threading.Thread(target=lambda: results.append(setting())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and len({prepared.key for prepared in results}) == 1
    assert all(np.array_equal(prepared.tokens, results[0].tokens) for prepared in results)
    assert sorted(os.listdir(setting.cache)) == sorted([results[0].key, "jaxsft.txt"])


def test_the_limit_takes_the_first_rows(setting):
    assert len(setting(limit=3).lengths) == 3


def test_bad_data_leaves_nothing_behind(setting):
    write(setting.source, [{"question": "Q", "answer": ""}])
    with pytest.raises(DataError, match="rows.jsonl:1: .*answer"):
        setting()
    assert os.listdir(setting.cache) == ["jaxsft.txt"]


def test_columns_of_other_names_are_read_and_those_that_are_not_are_named(setting):
    write(setting.source, [{"Q": "What?", "A": "That.", "id": 1}])
    report = setting(columns={"question": "Q", "answer": "A"}).report
    assert report["format"] == "question_answer" and report["columns_ignored"] == ["id"]


def test_read_items_gives_what_is_prepared_before_it_becomes_tokens(setting):
    config, source, encoder = setting.parts()
    items = list(itertools.islice(read_items(config, source, encoder), 3))
    assert [item.messages[-1]["content"] for item in items] == ["x", "xx", "xxx"]
    assert items == formats.load_items(source, limit=3)


def test_workers_give_the_same_portions_in_the_same_order(setting):
    """Bitwise, in other processes, which know nothing of jax; and again after a call that was broken off."""
    write(setting.source, [{"question": f"What is {n}?", "answer": "x" * (n % 90)} for n in range(2000)])
    opened = open_source(*setting.parts(seq_len=80))
    tasks = [(0, chunk) for chunk in chunks(opened.rows, 64)]
    here = [encode_rows(opened.recipe, rows) for _, rows in tasks]
    assert sum(len(portion.problems) for portion in here) > 10
    workers = Workers([opened.recipe])
    try:
        workers.start()
        while not workers._are_ready():
            pass
        for _ in range(2):
            there = list(workers.map(tasks))
            assert len(there) == len(here)
            for one, other in zip(here, there, strict=True):
                assert pickle.dumps(one) == pickle.dumps(other) or equal(one, other)
            for _ in itertools.islice(workers.map(tasks), 3):
                pass
    finally:
        workers.close()


def equal(one, other):
    return all(
        np.array_equal(mine, theirs) and mine.dtype == theirs.dtype if isinstance(mine, np.ndarray) else mine == theirs
        for mine, theirs in zip(one, other, strict=True)
    )


def test_what_workers_import_knows_nothing_of_jax():
    code = "import sys, jaxsft.batches.workers, jaxsft.batches.prepare; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_workers_end_when_their_program_is_killed(setting, repo):
    code = f"""
import os, sys
sys.path.insert(0, {str(repo)!r})
from jaxsft.batches.workers import Workers
workers = Workers([])
workers.start()
while not workers._are_ready():
    pass
print(*[worker._process.pid for worker in workers._processes], flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=repo)
    assert done.returncode == -9
    deadline = time.monotonic() + 20
    for pid in map(int, done.stdout.split()):
        while is_running(pid):
            assert time.monotonic() < deadline, "a worker outlives its program"
            time.sleep(0.05)


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_what_a_worker_raises_is_raised_here(setting):
    opened = open_source(*setting.parts())
    workers = Workers([opened.recipe])
    workers.start()
    while not workers._are_ready():
        pass
    with pytest.raises(Exception, match="has no attribute|not subscriptable|unpack|object"):
        list(workers.map([(0, [None])]))
    workers.close()


def test_how_rows_are_cut_into_portions_changes_nothing(setting, monkeypatch):
    whole = setting(seq_len=37)
    shutil.rmtree(setting.cache)
    monkeypatch.setattr("jaxsft.batches.prepare.chunks.__defaults__", (3,))
    parts = setting(seq_len=37)
    for name in ("tokens", "loss_weights", "writers", "offsets", "origins"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))
    assert whole.report == parts.report


def test_reports_of_several_sources_add_up(setting):
    write(setting.folder / "other.jsonl", [{"text": "abc " * 30}] * 3)
    one, other = setting(seq_len=50).report, setting(path=setting.folder / "other.jsonl", seq_len=50).report
    both = merged_reports([one, other])
    assert both["rows"] == 23 and both["tokens"] == one["tokens"] + other["tokens"]
    assert both["format"] == "question_answer, text"
    assert both["cut"] == other["cut"] and both["longest"] == other["longest"]


def test_the_source_config_alone_says_what_is_read(setting):
    config, _, encoder = setting.parts()
    with pytest.raises(DataError, match="nowhere"):
        prepare(config, SourceConfig(path=str(setting.folder / "nowhere.jsonl")), encoder, tokenizer_files_key="t")


def test_rows_that_say_so_are_not_trained_and_not_bad(setting):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    silent = [turns[0], {**turns[1], "weight": 0}]
    rows = [{"messages": turns}, {"messages": turns, "train": False}, {"messages": silent}, {"messages": turns}]
    write(setting.source, rows)
    report = setting().report
    assert (report["rows"], report["examples"], report["bad_rows"]) == (4, 2, {})
    assert report["dropped"] == {"not to be trained, as the row says": {"examples": 2, "tokens": 0}}
    assert min(report["length_percentiles"].values()) > 0
    write(setting.source, rows[1:3])
    with pytest.raises(DataError, match="no example is left of 2 rows"):
        setting()


def test_rows_in_portions_of_any_size_give_the_same_and_a_bad_one_among_them_is_named(setting):
    rows = [{"question": f"What is {n}?", "answer": "x" * n} for n in range(1, 41)]
    rows[10] = {"question": "What is <|im_end|>?", "answer": "refused"}
    rows[25] = {"question": "What is é🙂?", "answer": " \n"}  # Of another shape, and refused as well.
    write(setting.source, rows)
    parts = setting.parts(control_tokens="error", seq_len=30, overlong="truncate")
    found = []
    for size in (1, 3, 40):
        opened = open_source(*parts)
        portions = [encode_rows(opened.recipe, some) for some in chunks(opened.rows, size)]
        arrays = [
            np.concatenate([getattr(portion, name) for portion in portions]).tolist()
            for name in ("tokens", "loss_weights", "writers", "lengths", "encoded_lengths")
        ]
        lists = [
            sorted(each for portion in portions for each in getattr(portion, name)) for name in ("origins", "problems")
        ]
        found.append(arrays + lists)
    assert found[0] == found[1] == found[2]
    assert sorted(problem.origin for problem in found[0][-1]) == [f"{setting.source}:11", f"{setting.source}:26"]
    with pytest.raises(DataError, match=r"rows\.jsonl:11: control-token: .*<\|im_end\|>"):
        setting(control_tokens="error", seq_len=30, overlong="truncate")


def test_garbage_is_looked_for_as_before_once_rows_are_encoded():
    def state():
        return gc.get_threshold(), gc.get_freeze_count()

    before, more = state(), [[] for _ in range(100)]
    for failing in (False, True):
        try:
            with seldom_collected():
                (first, *others), frozen = state()
                assert first > before[0][0] and others == [*before[0][1:]] and frozen >= before[1] + len(more)
                assert not failing or 1 / 0
        except ZeroDivisionError:
            assert failing
        assert state() == before
    # Threads that prepare at once do not end in the order in which they began.
    one, other = seldom_collected(), seldom_collected()
    one.__enter__(), other.__enter__()
    one.__exit__(None, None, None), other.__exit__(None, None, None)
    assert state() == before
    try:
        gc.set_threshold(0)  # never
        with seldom_collected():
            assert gc.get_threshold()[0] == 0
        gc.set_threshold(*before[0])
        gc.freeze()  # somebody else's, who means it to last
        frozen = state()
        with seldom_collected():
            assert state() == frozen
        assert state() == frozen
    finally:
        gc.set_threshold(*before[0])
        gc.unfreeze()
