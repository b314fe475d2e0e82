"""Several prepared sources as one dataset, and which of their examples an epoch draws.

In: the sizes of the sources, their `weight`, `count` or `epochs`, a seed and the number of the epoch. Out: examples by
their number in the whole, as a pure function of these. A source is drawn from without replacement until it is used up,
then anew in another order; an epoch goes on where the one before it stopped. So a source that is drawn from less often
shows other examples in each epoch until all were seen, and one that is drawn from more often repeats them evenly.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from jaxsft.batch import Example
from jaxsft.batches.packing import permutation
from jaxsft.batches.prepare import Prepared
from jaxsft.config import ConfigError, SourceConfig


class Dataset(NamedTuple):
    """Prepared sources, their examples numbered one source after the other."""

    sources: tuple[Prepared, ...]
    draws: tuple[Fraction, ...]
    """How many examples of each source an epoch draws on average; see `draws_per_epoch`."""

    @property
    def sizes(self) -> list[int]:
        return [len(source.offsets) - 1 for source in self.sources]

    @property
    def lengths(self) -> np.ndarray:
        """int64 [num_examples]: tokens of each example."""
        return np.concatenate([source.lengths for source in self.sources])

    def locate(self, index: int) -> tuple[Prepared, int]:
        """The source of an example, and its number there."""
        for source in self.sources:
            size = len(source.offsets) - 1
            if index < size:
                return source, int(index)
            index -= size
        raise IndexError(index)

    def example(self, index: int) -> Example:
        source, at = self.locate(index)
        return source.example(at)

    def writers(self, index: int) -> np.ndarray:
        """uint8 [T]: who wrote each token of an example, see `chat.encoder.WRITERS`."""
        source, at = self.locate(index)
        return source.writers[source.offsets[at] : source.offsets[at + 1]]

    def origin(self, index: int) -> str:
        """`file:line` of the row that an example was made from."""
        source, at = self.locate(index)
        return source.origin(at)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What must be equal for two datasets to be the same, by name; plain JSON."""
        found: dict[str, Any] = {}
        for number, source in enumerate(self.sources):
            name = "data" if len(self.sources) == 1 else f"data.train.{number}"
            found |= {f"{name}: {field}": value for field, value in source.report["fingerprint"].items()}
        if [*self.draws] != self.sizes:
            found["data: examples per epoch"] = ", ".join(map(str, self.draws))
        return found

    @property
    def is_same_each_epoch(self) -> bool:
        """Every epoch draws the same examples: each source as a whole, any number of times."""
        return all(draws % size == 0 for draws, size in zip(self.draws, self.sizes, strict=True))


def make_dataset(
    sources: Sequence[Prepared], configs: Sequence[SourceConfig] | None = None, *, ends: str = "total"
) -> Dataset:
    """Several sources as one; without configs, an epoch goes through each of them once. For `ends` see
    `draws_per_epoch`."""
    sizes = [len(source.offsets) - 1 for source in sources]
    return Dataset(tuple(sources), tuple(draws_per_epoch(sizes, configs or [None] * len(sizes), ends=ends)))


def draws_per_epoch(
    sizes: Sequence[int], configs: Sequence[SourceConfig | None], *, ends: str = "total"
) -> list[Fraction]:
    """How many examples of each source an epoch draws on average; exact, whatever floats were given.

    With `weight`, an epoch draws as many examples as all sources have together, shared out by the weights: sources of
    900 and 100 examples with the weights 3 and 1 give 750 and 250, so that the first is gone through once in 1.2
    epochs, the second 2.5 times in each. `count` draws so many, `epochs` so many passes, and neither of them one pass.

    Raises:
        ConfigError: only some of the sources have a weight.
    """
    check_weights(configs)
    if len(configs) > 1 and configs[0] is not None and configs[0].weight is not None:
        parts = shares([config for config in configs if config is not None])
        once = [size / part for size, part in zip(sizes, parts, strict=True)]
        total = {"total": Fraction(sum(sizes)), "first": min(once), "all": max(once)}[ends]
        return [part * total for part in parts]
    draws = []
    for size, config in zip(sizes, configs, strict=True):
        if config is not None and config.count is not None:
            draws.append(Fraction(config.count))
        else:
            # The decimal digits are what was meant: 0.29 of 100 examples is 29, and the nearest float is a little off.
            passes = config.epochs if config is not None and config.epochs is not None else 1
            draws.append(Fraction(repr(passes)) * size)
    return draws


def shares(configs: Sequence[SourceConfig]) -> list[Fraction]:
    """What part of all draws each source is, by weight."""
    weights = [Fraction(repr(config.weight)) for config in configs]
    return [weight / sum(weights) for weight in weights]


def check_weights(configs: Sequence[SourceConfig | None]) -> None:
    """Refuses a weight beside sources that have none: shares are shares of the whole."""
    given = [config is not None and config.weight is not None for config in configs]
    if any(given) and not all(given):
        without = ", ".join(f"data.train.{at}" for at, has in enumerate(given) if not has)
        raise ConfigError(f"{without}: no `weight`, but other sources have one; give each of them one, or none")


def draw_counts(draws: Sequence[Fraction], epoch: int) -> list[tuple[int, int]]:
    """For each source its draws in an epoch, as the numbers of the first one and of the one after the last.

    2.5 per epoch are the draws 0, 1, 2 in epoch 0, and 3, 4 in epoch 1: never more than one off the exact share,
    however many epochs.
    """
    return [(math.ceil(each * epoch), math.ceil(each * (epoch + 1))) for each in draws]


def epoch_examples(dataset: Dataset, *, seed: int, epoch: int) -> np.ndarray:
    """The examples that an epoch trains, int64, one source after the other; more than once where it is over-sampled."""
    first = 0
    drawn = []
    for number, (size, span) in enumerate(zip(dataset.sizes, draw_counts(dataset.draws, epoch), strict=True)):
        drawn.append(first + _drawn(size, *span, seed=seed, source=number))
        first += size
    return np.concatenate(drawn)


def _drawn(size: int, start: int, stop: int, *, seed: int, source: int) -> np.ndarray:
    """Draws `start` to `stop - 1` of a source of `size` examples."""
    if start % size == 0 and stop % size == 0:
        # Whole passes need no order of their own, as the rows that they are packed into are shuffled: a pass is all
        # examples in order.
        return np.tile(np.arange(size), (stop - start) // size)
    passes = range(start // size, -(-stop // size))
    orders = [permutation(size, seed=(seed, 3, source, number)) for number in passes]
    return np.concatenate(orders)[start - passes.start * size : stop - passes.start * size] if orders else np.arange(0)
