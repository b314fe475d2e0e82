import json
import os
import shutil
import threading
import time

import numpy as np
import pytest

from jaxsft.batch import Example
from jaxsft.config import DataConfig
from jaxsft.data.chat import stop_ids
from jaxsft.data.loader import Loader, Prepared, prefetch, prepare
from jaxsft.data.sources import DataError


def prepared_of(examples):
    tokens = np.concatenate([np.asarray(example.tokens, np.int32) for example in examples])
    weights = np.concatenate([np.asarray(example.loss_weights, np.float32) for example in examples])
    offsets = np.cumsum([0] + [len(example.tokens) for example in examples]).astype(np.int64)
    return Prepared("key", tokens, weights, offsets, {})


def random_prepared(random, count, longest):
    return prepared_of(
        [
            Example(random.integers(1, 1000, length), random.integers(0, 3, length))
            for length in random.integers(1, longest + 1, count)
        ]
    )


def naive_row(prepared, indices, seq_len):
    """Position by position, straight from the words of Batch's docstring."""
    segments = [prepared.example(index) for index in indices]
    flat = [
        (int(token), number, position, segment)
        for number, segment in enumerate(segments, start=1)
        for position, token in enumerate(segment.tokens)
    ]
    row = []
    for token, number, position, segment in flat:
        has_next = position + 1 < len(segment.tokens)
        target = int(segment.tokens[position + 1]) if has_next else 0
        weight = float(segment.loss_weights[position + 1]) if has_next else 0.0
        row.append((token, target, weight, number, position))
    row += [(0, 0, 0.0, 0, 0)] * (seq_len - len(row))
    return list(zip(*row, strict=True))


def test_the_worked_example_of_batch():
    a, b, c, x, y = 11, 12, 13, 21, 22
    prepared = prepared_of([Example([a, b, c], [0, 1, 1]), Example([x, y], [1, 1])])
    for seed in range(20):
        loader = Loader(prepared, seq_len=6, batch_size=1, seed=seed, packing=True)
        if loader.examples_in_row(0).tolist() == [0, 1]:
            break
    batch = loader.batch(0)
    assert batch.tokens.tolist() == [[a, b, c, x, y, 0]]
    assert batch.targets.tolist() == [[b, c, 0, y, 0, 0]]
    assert batch.loss_weights.tolist() == [[1, 1, 0, 1, 0, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2, 2, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert [leaf.dtype for leaf in batch] == [np.int32, np.int32, np.float32, np.int32, np.int32]


@pytest.mark.parametrize("trial", range(20))
def test_every_batch_equals_the_one_built_position_by_position(trial):
    random = np.random.default_rng(trial)
    prepared = random_prepared(random, int(random.integers(1, 60)), 16)
    batch_size = int(random.integers(1, 7))
    loader = Loader(prepared, seq_len=16, batch_size=batch_size, seed=trial, packing=bool(trial % 3))
    for step in range(2 * loader.steps_per_epoch):
        rows = [naive_row(prepared, loader.examples_in_row(row), 16) for row in loader.row_ids(step)]
        for leaf, naive in zip(loader.batch(step), zip(*rows, strict=True), strict=True):
            np.testing.assert_array_equal(leaf, np.array(naive))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_trains_every_example_exactly_once(packing, shuffle):
    prepared = random_prepared(np.random.default_rng(0), 101, 30)
    loader = Loader(prepared, seq_len=32, batch_size=4, seed=3, packing=packing, shuffle=shuffle)
    for epoch in range(3):
        steps = range(epoch * loader.steps_per_epoch, (epoch + 1) * loader.steps_per_epoch)
        seen = [index for step in steps for row in loader.row_ids(step) for index in loader.examples_in_row(row)]
        assert sorted(seen) == list(range(101))
        weight = sum(float(loader.batch(step).loss_weights.sum()) for step in steps)
        assert weight == sum(float(prepared.example(index).loss_weights[1:].sum()) for index in range(101))


def test_the_last_batch_of_an_epoch_is_filled_with_padding_rows():
    prepared = random_prepared(np.random.default_rng(0), 5, 8)
    loader = Loader(prepared, seq_len=8, batch_size=2, seed=0, packing=False, shuffle=False)
    assert [loader.row_ids(step).tolist() for step in range(4)] == [[0, 1], [2, 3], [4, -1], [0, 1]]
    assert all(not leaf[1].any() for leaf in loader.batch(2))


def test_epochs_come_in_different_orders_and_seeds_too():
    prepared = random_prepared(np.random.default_rng(0), 64, 8)

    def order(seed, epoch):
        loader = Loader(prepared, seq_len=8, batch_size=64, seed=seed, packing=False)
        return tuple(loader.row_ids(epoch))

    assert len({order(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9
    assert order(1, 2) == order(1, 2)


def test_row_slices_equal_the_whole_for_every_number_of_processes():
    prepared = random_prepared(np.random.default_rng(1), 200, 20)
    whole = Loader(prepared, seq_len=24, batch_size=12, seed=5, packing=True)
    for num_processes in (1, 2, 3, 4, 6, 12):
        share = 12 // num_processes
        loaders = [Loader(prepared, seq_len=24, batch_size=12, seed=5, packing=True) for _ in range(num_processes)]
        for step in (7, 0, 1, whole.steps_per_epoch + 1):
            parts = [
                loader.batch(step, slice(process * share, (process + 1) * share))
                for process, loader in enumerate(loaders)
            ]
            for leaf, *pieces in zip(whole.batch(step), *parts, strict=True):
                np.testing.assert_array_equal(leaf, np.concatenate(pieces))


def test_a_step_asked_for_again_is_not_built_again_and_cannot_be_changed():
    loader = Loader(random_prepared(np.random.default_rng(0), 20, 8), seq_len=8, batch_size=4, seed=0, packing=True)
    batch = loader.batch(3, slice(0, 2))
    assert loader.batch(3, slice(None, 2)) is batch
    with pytest.raises(ValueError, match="read-only"):
        batch.tokens[0, 0] = 1


def test_prefetch_gives_every_item_in_order_and_at_most_depth_ahead():
    made = []

    def make(step):
        made.append(step)
        return step * step

    items = prefetch(make, 3, 9, depth=2)
    assert next(items) == 9
    time.sleep(0.1)
    assert made == [3, 4, 5], "the one taken, and two ahead"
    assert list(items) == [16, 25, 36, 49, 64]
    assert list(prefetch(make, 4, 4)) == []


def test_prefetch_raises_in_the_place_of_the_item_and_ends_its_thread():
    def make(step):
        if step == 2:
            raise DataError("step 2 is bad")
        return step

    items = prefetch(make, 0, 5)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(DataError, match="step 2 is bad"):
        next(items)
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_prefetch_that_is_closed_early_leaves_no_thread():
    for taken in (0, 1, 3):
        items = prefetch(lambda step: step, 0, 1000, depth=2)
        for _ in range(taken):
            next(items)
        items.close()
        assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.fixture
def setting(tmp_path, make_tokenizer):
    tokenizer = make_tokenizer()
    rows = [{"question": f"What is {n}?", "answer": "x" * n} for n in range(1, 21)]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(limit=None, stops=None, key="t", tokenizer=tokenizer, **options):
        config = DataConfig(train=str(source), cache=str(tmp_path / "cache"), **options)
        stops = stops or stop_ids(tokenizer)
        return prepare(config, config.train, tokenizer, tokenizer_files_key=key, stops=stops, limit=limit)

    run.source, run.cache, run.tokenizer = source, tmp_path / "cache", tokenizer
    return run


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
    report = prepared.report
    assert report["format"] == "question_answer" and report["rows"] == report["examples"] == 20
    assert report["tokens"] == prepared.lengths.sum() and report["trained_tokens"] == sum(range(2, 22))
    assert report["overlong_examples"] == 0 and report["longest"]["origin"] == f"{setting.source}:20"


def test_overlong_examples_are_dropped_and_counted_or_listed(setting):
    lengths = setting(seq_len=100).lengths
    prepared = setting(seq_len=int(lengths[14]))
    report = prepared.report
    assert prepared.lengths.tolist() == [length for length in lengths.tolist() if length <= lengths[14]]
    assert report["overlong_examples"] + report["examples"] == report["rows"] == 20
    assert report["overlong_tokens"] == lengths[15:].sum() and report["longest"]["tokens"] == lengths[-1]
    with pytest.raises(DataError, match=rf"rows.jsonl:16: {lengths[15]} tokens"):
        setting(seq_len=int(lengths[14]), overlong="error")
    with pytest.raises(DataError, match="no example is left: all 20 have more than data.seq_len=8 tokens"):
        setting(seq_len=8)
    assert not [path for path in setting.cache.iterdir() if path.name.startswith(".")], "nothing half-built is left"


def test_everything_that_determines_the_examples_changes_the_key(setting, make_tokenizer):
    base = setting().key
    assert setting().key == base
    changed = [
        setting(seq_len=500),
        setting(train_on="last_turn"),
        setting(overlong="error"),
        setting(format="question_answer"),
        setting(limit=3),
        setting(key="u"),
        setting(stops=[*stop_ids(setting.tokenizer), 5]),
        setting(tokenizer=make_tokenizer("{# new #}" + setting.tokenizer.chat_template)),
    ]
    setting.source.write_text(setting.source.read_text().replace("What is 7?", "What is 8?"))
    changed.append(setting())
    assert len({base, *(prepared.key for prepared in changed)}) == 10


def test_a_second_run_maps_what_the_first_one_wrote(setting, monkeypatch):
    first = setting()
    monkeypatch.setattr("jaxsft.data.loader._build", None)
    second = setting()
    np.testing.assert_array_equal(first.tokens, second.tokens)
    assert isinstance(second.tokens, np.memmap) and second.report == first.report


def test_a_damaged_cache_is_built_anew(setting):
    first = setting()
    expected, folder = np.array(first.tokens), setting.cache / first.key
    damages = [
        lambda: os.truncate(folder / "tokens.bin", 8),
        lambda: (folder / "offsets.bin").unlink(),
        lambda: (folder / "report.json").unlink(),
        lambda: (folder / "report.json").write_text('{"rows": '),
        lambda: shutil.rmtree(folder),
        lambda: [path.unlink() for path in folder.iterdir()],
    ]
    for damage in damages:
        damage()
        np.testing.assert_array_equal(setting().tokens, expected)
        assert os.listdir(setting.cache) == [first.key]


def test_several_at_once_prepare_the_same(setting):
    results = []
    threads = [threading.Thread(target=lambda: results.append(setting())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and len({prepared.key for prepared in results}) == 1
    assert all(np.array_equal(prepared.tokens, results[0].tokens) for prepared in results)
    assert os.listdir(setting.cache) == [results[0].key]


def test_the_limit_takes_the_first_rows(setting):
    assert len(setting(limit=3).lengths) == 3


def test_bad_data_leaves_nothing_behind(setting):
    setting.source.write_text('{"question": "Q", "answer": ""}\n')
    with pytest.raises(DataError, match="rows.jsonl:1: answer: missing, null or blank"):
        setting()
    assert os.listdir(setting.cache) == []
