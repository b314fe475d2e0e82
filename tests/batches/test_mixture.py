"""Which examples an epoch draws of several sources."""

from fractions import Fraction

import numpy as np
import pytest

from jaxsft.batches.mixture import Dataset, draw_counts, draws_per_epoch, epoch_examples, make_dataset
from jaxsft.batches.prepare import Prepared
from jaxsft.config import ConfigError, DataConfig, SourceConfig


def source_of(size):
    """A source of `size` examples of one token."""
    tokens = np.zeros(size, np.int32)
    origins = np.array([(0, line + 1, line) for line in range(size)]).reshape(-1, 3)
    return Prepared("", tokens, tokens, tokens, np.arange(size + 1), origins, {"files": [f"of{size}"]})


def dataset_of(sizes, **settings):
    """`dataset_of((4, 8), weight=(1, 3))`."""
    configs = [
        SourceConfig(path="p", **{key: values[at] for key, values in settings.items() if values[at] is not None})
        for at in range(len(sizes))
    ]
    return make_dataset([source_of(size) for size in sizes], configs)


def counts(dataset, epochs, seed=0):
    """How often each example is drawn, [epochs, num_examples]."""
    drawn = [epoch_examples(dataset, seed=seed, epoch=epoch) for epoch in range(epochs)]
    return np.array([np.bincount(each, minlength=sum(dataset.sizes)) for each in drawn])


def shares(dataset, epochs):
    """What part of all draws each source was."""
    totals = counts(dataset, epochs).sum(axis=0)
    ends = np.cumsum(dataset.sizes)
    drawn = [totals[end - size : end].sum() for end, size in zip(ends, dataset.sizes, strict=True)]
    return np.array(drawn) / sum(drawn)


@pytest.mark.parametrize(
    ("sizes", "weights"),
    [
        ((100_000, 50), (0.9, 0.1)),
        ((300, 200_000, 7), (5, 1, 4)),
        ((3, 4, 5), (0.007, 0.1, 0.893)),
        ((1, 1), (2 / 3, 1 / 3)),
        ((1000,) * 12, tuple(range(1, 13))),
    ],
)
def test_the_share_over_100_000_draws_is_what_was_asked_for_within_1_percent(sizes, weights):
    dataset = dataset_of(sizes, weight=weights)
    epochs = -(-100_000 // sum(sizes))
    realised = shares(dataset, epochs)
    np.testing.assert_allclose(realised, np.array(weights) / sum(weights), rtol=0.01)


def test_an_epoch_by_weights_is_as_long_as_all_sources_together():
    dataset = dataset_of((900, 100), weight=(3, 1))
    assert dataset.draws == (750, 250)
    assert counts(dataset, 1).sum() == 1000


def test_a_source_is_used_up_before_any_of_it_comes_again():
    for settings in ({"weight": (1, 9)}, {"count": (50, 777)}, {"epochs": (0.3, 2.7)}):
        dataset = dataset_of((100, 60), **settings)
        for epochs in range(1, 12):
            totals = counts(dataset, epochs).sum(axis=0)
            for part in (totals[:100], totals[100:]):
                assert part.max() - part.min() <= 1


def test_a_down_sampled_source_shows_other_examples_until_all_were_seen():
    dataset = dataset_of((100, 20), epochs=(0.25, 1))
    seen = counts(dataset, 8)[:, :100]
    for start in (0, 4):
        assert (seen[start : start + 4].sum(axis=0) == 1).all()
        assert (seen[start : start + 4].sum(axis=1) == 25).all()
    assert (seen[0] != seen[4]).any(), "and then in another order"


def test_sources_without_a_setting_are_gone_through_once_and_counts_and_epochs_stand_beside_each_other():
    dataset = dataset_of((10, 20, 30), count=(None, 5, None), epochs=(None, None, 2.0))
    assert dataset.draws == (10, 5, 60)
    assert counts(dataset, 1)[0, :10].tolist() == [1] * 10
    assert counts(dataset, 1)[0, 30:].tolist() == [2] * 30


def test_an_epoch_of_whole_passes_is_the_same_examples_each_time():
    dataset = dataset_of((5, 3), epochs=(1, 2))
    assert dataset.is_same_each_epoch
    for epoch in range(3):
        assert epoch_examples(dataset, seed=0, epoch=epoch).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 5, 6, 7]
    assert not dataset_of((5, 3), epochs=(1, 1.5)).is_same_each_epoch


def test_draws_depend_on_seed_and_epoch_and_on_nothing_else():
    def drawn(seed, epoch):
        return tuple(epoch_examples(dataset_of((100, 100), weight=(1, 2)), seed=seed, epoch=epoch))

    assert len({drawn(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9
    assert drawn(2, 1) == drawn(2, 1)


def test_settings_mean_their_decimal_digits():
    assert draws_per_epoch([100], [SourceConfig(path="p", epochs=0.29)]) == [29]
    assert draws_per_epoch([3], [SourceConfig(path="p", epochs=0.1)]) == [Fraction(3, 10)]
    assert [draw_counts([Fraction(5, 2)], epoch) for epoch in range(3)] == [[(0, 3)], [(3, 5)], [(5, 8)]]


def test_an_epoch_may_be_empty_but_never_the_first():
    dataset = dataset_of((3,), epochs=(0.1,))
    assert counts(dataset, 10).sum(axis=1).tolist() == [1, 0, 0, 1, 0, 0, 1, 0, 0, 0]


def test_weights_beside_sources_without_are_refused():
    with pytest.raises(ConfigError, match=r"data.train.1, data.train.2: no `weight`"):
        dataset_of((1, 1, 1), weight=(1, None, None), count=(None, 3, None))


def test_examples_are_found_in_their_source():
    dataset = dataset_of((3, 2), epochs=(1, 1))
    assert isinstance(dataset, Dataset)
    assert [dataset.origin(at) for at in range(5)] == ["of3:1", "of3:2", "of3:3", "of2:1", "of2:2"]
    with pytest.raises(IndexError):
        dataset.locate(5)


def test_an_epoch_may_end_when_the_first_source_or_every_source_was_gone_through():
    configs = [SourceConfig(path="a", weight=3), SourceConfig(path="b", weight=1)]
    assert draws_per_epoch([900, 100], configs) == [750, 250]
    assert draws_per_epoch([900, 100], configs, ends="first") == [300, 100]
    assert draws_per_epoch([900, 100], configs, ends="all") == [900, 300]
    three = [SourceConfig(path=name, weight=weight) for name, weight in (("a", 1), ("b", 1), ("c", 0.5))]
    assert draws_per_epoch([10, 40, 3], three, ends="first") == [6, 6, 3]
    assert draws_per_epoch([10, 40, 3], three, ends="all") == [40, 40, 20]
    dataset = make_dataset([source_of(900), source_of(100)], configs, ends="first")
    drawn = epoch_examples(dataset, seed=0, epoch=0)
    assert len(drawn) == 400 and len(set(drawn[drawn >= 900])) == 100 and len(set(drawn[drawn < 900])) == 300


def test_how_a_mixture_ends_is_refused_where_it_means_nothing():
    weighted = [{"path": "a", "weight": 1}, {"path": "b", "weight": 2}]
    assert DataConfig.model_validate({"train": weighted, "mixture_ends": "first"}).mixture_ends == "first"
    for sources, more in (([{"path": "a"}], {}), ([{"path": "a"}, {"path": "b"}], {}), (weighted, {"stream": True})):
        with pytest.raises(ValueError, match="`mixture_ends` has no effect"):
            DataConfig.model_validate({"train": sources, "mixture_ends": "all", **more})
