import threading
import time
import zlib

import numpy as np
import pytest

from jaxsft.batch import Example, count_segments
from jaxsft.batches.loader import Loader, prefetch
from jaxsft.batches.mixture import make_dataset
from jaxsft.batches.prepare import Prepared
from jaxsft.config import SourceConfig
from jaxsft.rows.sources import DataError


def prepared_of(examples):
    tokens = np.concatenate([np.asarray(example.tokens, np.int32) for example in examples])
    weights = np.concatenate([np.asarray(example.loss_weights, np.float32) for example in examples])
    offsets = np.cumsum([0] + [len(example.tokens) for example in examples]).astype(np.int64)
    origins = np.array([(0, line, line) for line in range(len(examples))])
    return Prepared("key", tokens, weights, np.zeros(len(tokens), np.uint8), offsets, origins, {"files": ["f"]})


def dataset_of(examples):
    return make_dataset([prepared_of(examples)])


def random_examples(random, count, longest, shortest=1):
    return [
        Example(random.integers(1, 1000, length), random.integers(0, 3, length))
        for length in random.integers(shortest, longest + 1, count)
    ]


def random_prepared(random, count, longest):
    return dataset_of(random_examples(random, count, longest))


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
    prepared = dataset_of([Example([a, b, c], [0, 1, 1]), Example([x, y], [1, 1])])
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


@pytest.mark.parametrize(
    ("packing", "seed", "steps", "crc_of_rows", "crc_of_batches"),
    [
        (True, 0, 47, 961497429, 1596124332),
        (True, 5, 47, 2493902557, 1640778552),
        (False, 0, 84, 3685795645, 1055904377),
        (False, 5, 84, 2033923093, 924298114),
    ],
)
def test_one_source_gives_the_batches_that_it_always_gave(packing, seed, steps, crc_of_rows, crc_of_batches):
    """Figures of the first release: a run that was begun then goes on."""
    random = np.random.default_rng(7)
    lengths = random.integers(2, 33, 500)
    dataset = dataset_of([Example(random.integers(1, 1000, n), random.integers(0, 3, n)) for n in lengths])
    loader = Loader(dataset, seq_len=32, batch_size=6, seed=seed, packing=packing)
    assert loader.steps_per_epoch == steps
    assert loader.rows_crc(0, 2 * steps) == crc_of_rows
    crc = 0
    for step in (0, 1, steps - 1, steps, 2 * steps + 3):
        for leaf in loader.batch(step):
            crc = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), crc)
    assert crc == crc_of_batches


def test_steps_are_known_before_the_first():
    loader = Loader(random_prepared(np.random.default_rng(0), 100, 8), seq_len=8, batch_size=2, seed=0, packing=False)
    assert [loader.num_steps(epochs) for epochs in (1, 1.1, 0.5, 2, 2.98)] == [50, 55, 25, 100, 149]
    assert [loader.epochs_done(step) for step in (0, 25, 50, 125)] == [0, 0.5, 1, 2.5]


def mixed_loader(**keys):
    """Sources of 40, 10 and 7 examples, of which an epoch draws 20, 25 and 7: other ones in every epoch."""
    random = np.random.default_rng(3)
    sources = [prepared_of(random_examples(random, size, 16, 2)) for size in (40, 10, 7)]
    configs = [SourceConfig(path="a", epochs=0.5), SourceConfig(path="b", count=25), SourceConfig(path="c")]
    keys = {"seq_len": 16, "batch_size": 4, "seed": 1, "packing": True} | keys
    return Loader(make_dataset(sources, configs), **keys)


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_of_a_mixture_trains_what_is_drawn_and_every_batch_is_built_position_by_position(packing):
    loader = mixed_loader(packing=packing)
    dataset, counts, first = loader.dataset, np.zeros((6, 57), int), 0
    for epoch in range(6):
        end = loader.num_steps(epoch + 1)
        for step in range(first, end):
            examples = [loader.examples_in_row(row) for row in loader.row_ids(step)]
            rows = [naive_row(dataset, each, 16) for each in examples]
            for leaf, naive in zip(loader.batch(step), zip(*rows, strict=True), strict=True):
                np.testing.assert_array_equal(leaf, np.array(naive))
            np.add.at(counts[epoch], np.concatenate(examples), 1)
            assert epoch <= loader.epochs_done(step) < epoch + 1
        first = end
    assert counts[:, :40].sum(axis=1).tolist() == [20] * 6
    assert counts[:, 40:50].sum(axis=1).tolist() == [25] * 6
    assert (counts[:, 50:] == 1).all()
    for epoch in (0, 2, 4):
        assert (counts[epoch : epoch + 2, :40].sum(axis=0) == 1).all(), "two halves make a whole"
        assert (counts[epoch : epoch + 2, 40:50].sum(axis=0) == 5).all()
    assert (counts[1] != counts[3]).any(), "another half in the next pass"


def test_a_mixture_asked_for_in_any_order_and_in_any_slices_is_the_same():
    whole = mixed_loader()
    steps = range(whole.num_steps(4))
    batches = [whole.batch(step) for step in steps]
    ids = [whole.row_ids(step) for step in steps]
    for step in np.random.default_rng(0).permutation(len(steps)):
        fresh = mixed_loader()  # as after a restart
        np.testing.assert_array_equal(fresh.row_ids(step), ids[step])
        halves = [fresh.batch(step, slice(0, 2)), fresh.batch(step, slice(2, 4))]
        for leaf, *pieces in zip(batches[step], *halves, strict=True):
            np.testing.assert_array_equal(leaf, np.concatenate(pieces))
    known = np.concatenate(ids)
    known = known[known >= 0]
    assert len(np.unique(known)) == len(known), "each epoch has rows of its own"


def test_steps_of_a_mixture_are_known_before_the_first():
    loader = mixed_loader()
    bounds = [mixed_loader().num_steps(epochs) for epochs in range(1, 5)]
    assert bounds == sorted(bounds) and loader.steps_per_epoch == bounds[0]
    for epochs, bound in enumerate(bounds, start=1):
        assert loader.epochs_done(bound) == epochs and epochs - 1 < loader.epochs_done(bound - 1) < epochs
    assert bounds[0] < loader.num_steps(1.5) < bounds[1]


def segments_in(loader, num_steps):
    return max(int(count_segments(loader.batch(step).segment_ids).max()) for step in range(num_steps))


@pytest.mark.parametrize("packing", [True, False])
def test_the_most_segments_of_a_row_are_known_before_the_first_step(packing):
    """Counted over all batches; padding is one more, but not in a row that is full."""
    sizes = {"seq_len": 24, "batch_size": 3, "packing": packing}
    for trial in range(5):
        prepared = random_prepared(np.random.default_rng(trial), 60, 20)
        loader = Loader(prepared, seed=trial, **sizes)
        assert loader.most_segments(7) == segments_in(loader, loader.steps_per_epoch)
        # Epochs of a mixture are packed anew.
        mixed = mixed_loader(seed=trial, **sizes)
        num_steps = mixed.num_steps(3)
        assert mixed.most_segments(num_steps) == segments_in(mixed, num_steps)
    full = dataset_of([Example([1] * 4, [1] * 4) for _ in range(6)])
    assert Loader(full, seq_len=8, batch_size=3, seed=0, packing=True).most_segments(1) == 2
    assert Loader(full, seq_len=9, batch_size=3, seed=0, packing=True).most_segments(1) == 3


def test_a_row_with_more_segments_than_promised_is_not_made():
    """An epoch further on than was asked about may hold one."""
    seen = set()
    for seed in range(10):
        loader = mixed_loader(seed=seed, seq_len=24, batch_size=3, packing=True)
        first, most = loader.most_segments(1), mixed_loader(seed=seed, seq_len=24, batch_size=3, packing=True)
        num_steps = loader.num_steps(4)
        is_more = segments_in(most, num_steps) > first
        seen.add(is_more)
        if is_more:
            with pytest.raises(RuntimeError, match=f"a row has .* segments, and {first} at most were expected"):
                segments_in(loader, num_steps)
        else:
            segments_in(loader, num_steps)
    assert True in seen


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
