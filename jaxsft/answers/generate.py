"""Answers of a model: sampling with a key/value cache.

One function is compiled, for the prompt and again for a single token: it writes keys and values into the cache and
draws the next token of every row. In: prompts as token ids. Out: the ids of the answers, up to and with the stop token.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxsft.config import ConfigError
from jaxsft.mesh import ROW_AXES, partition_spec, replicated, shardings
from jaxsft.model.abstract import Model
from jaxsft.model.decoder import Cache

PROMPT_MULTIPLE = 64
"""Prompts are padded to a multiple of this, so that few shapes are compiled."""
MAX_ROWS = 64
"""Prompts answered at once, per device that holds rows."""


class Sampling(NamedTuple):
    """How a token is drawn."""

    temperature: float
    """0 takes the most likely token."""
    top_p: float
    """Draws from the fewest tokens whose probabilities reach this sum."""
    seed: int


GREEDY = Sampling(temperature=0.0, top_p=1.0, seed=0)


class Generator:
    """Answers prompts with one model; holds the compiled step, not the parameters."""

    def __init__(self, model: Model, mesh: Mesh, *, stop_ids: Sequence[int]) -> None:
        self._mesh = mesh
        self.stop_ids = frozenset(stop_ids)
        graphdef = model.graphdef
        config = nnx.merge(*model).config
        self._ropes = config.ropes
        self._num_positions = config.max_position if config.learned_positions else math.inf

        def advance(
            weights: Any,
            cache: Cache,
            tokens: Any,
            segment_ids: Any,
            positions: Any,
            last: Any,
            number: Any,
            sampling: Sampling,
        ) -> tuple[Cache, jax.Array]:
            """Reads tokens [B, T] into the cache; the next token of each row follows the one at index `last` [B].

            `number` counts the tokens drawn so far.
            """
            decoder = nnx.merge(graphdef, weights)
            hidden, cache, _ = decoder(tokens, segment_ids, positions, cache=cache)
            hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
            logits = decoder.logits(hidden)[:, 0]
            key = jax.random.fold_in(jax.random.key(sampling.seed), number)
            return cache, draw(logits, sampling, key)

        def make_cache(weights: Any, rows: int, size: int) -> Cache:
            return nnx.merge(graphdef, weights).make_cache(rows, size)

        # Only the rows are sharded; within the step the partitioner decides, since training's constraints do not fit
        # single tokens.
        self._rows, whole = NamedSharding(mesh, partition_spec("b")), replicated(mesh)
        weights = shardings(mesh, model.weights)
        # Every process passes the same prompts and sees all the answers.
        self._advance = jax.jit(
            advance,
            in_shardings=(weights, None, self._rows, self._rows, self._rows, self._rows, whole, whole),
            out_shardings=(None, whole),
            donate_argnums=1,
        )
        self._make_cache = jax.jit(make_cache, static_argnums=(1, 2), in_shardings=(weights,))

    def answers(
        self,
        weights: Any,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
    ) -> list[list[int]]:
        """The answer to each prompt: ids up to and with a stop id, or `max_new_tokens` of them.

        A model with a table of positions answers no further than that goes.

        Raises:
            ValueError: a prompt is empty.
            ConfigError: a prompt is longer than the model's table of positions.
        """
        answers: list[list[int]] = []
        for columns, group in self._groups(weights, prompts, max_new_tokens, sampling):
            found: list[list[int]] = [[] for _ in group]
            for column in columns:
                for prompt, answer, token in zip(group, found, column, strict=False):
                    if self._goes_on(prompt, answer):
                        answer.append(int(token))
                if not any(map(self._goes_on, group, found)):
                    break
            answers += found
        return answers

    def _goes_on(self, prompt: Sequence[int], answer: list[int]) -> bool:
        stopped = bool(answer) and answer[-1] in self.stop_ids
        return not stopped and len(prompt) + len(answer) <= self._num_positions

    def stream(
        self, weights: Any, prompt: Sequence[int], *, max_new_tokens: int, sampling: Sampling = GREEDY
    ) -> Iterator[int]:
        """The answer to one prompt, token by token as they are made, the stop id last."""
        for columns, _ in self._groups(weights, [prompt], max_new_tokens, sampling):
            for length, column in enumerate(columns, start=len(prompt)):
                yield int(column[0])
                if int(column[0]) in self.stop_ids or length >= self._num_positions:
                    return

    def _groups(
        self, weights: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling
    ) -> Iterator[tuple[Iterator[np.ndarray], Sequence[Sequence[int]]]]:
        """Groups of prompts that are answered at once, with their columns of tokens [B], B at least as many."""
        if not all(prompts):
            raise ValueError("a prompt has no tokens")
        if (longest := max(map(len, prompts), default=0)) > self._num_positions:
            raise ConfigError(f"a prompt has {longest} tokens, but the model has only {self._num_positions} positions")
        row_multiple = math.prod(self._mesh.shape[axis] for axis in ROW_AXES)
        size = _round_up(max(map(len, prompts), default=0), PROMPT_MULTIPLE)
        rows = _round_up(min(max(len(prompts), 1), MAX_ROWS * row_multiple), row_multiple)
        for first in range(0, len(prompts), rows):
            group = prompts[first : first + rows]
            # Each group draws its own numbers; the first one those of the seed, as `stream` does.
            group_sampling = sampling._replace(seed=sampling.seed + first)
            yield self._columns(weights, group, (rows, size), max_new_tokens, group_sampling), group

    def _columns(
        self,
        weights: Any,
        prompts: Sequence[Sequence[int]],
        shape: tuple[int, int],
        max_new_tokens: int,
        sampling: Sampling,
    ) -> Iterator[np.ndarray]:
        """One token of every row at a time. Prompts start at slot 0 and are padded behind; answers follow the padding.

        Attention goes by segment and position, not by slot, so the padding between prompt and answer is never seen.
        """
        rows, size = shape
        sequences = np.zeros((rows, _round_up(size + max_new_tokens, PROMPT_MULTIPLE)), np.int32)
        lengths = np.zeros(rows, np.int32)
        for row, prompt in enumerate(prompts):
            sequences[row, : len(prompt)] = prompt
            lengths[row] = len(prompt)
        next_tokens = np.zeros(rows, np.int32)
        for i in range(max_new_tokens):
            if i == 0 or any(rope.changes_at(lengths).any() for rope in self._ropes):
                # All tokens so far are read again: with this length, the keys that were cached before have other
                # angles.
                size = max(size, _round_up(int(lengths.max()), PROMPT_MULTIPLE))
                cache = self._make_cache(weights, rows, size + max_new_tokens)
                segment_ids = (np.arange(size) < lengths[:, None]).astype(np.int32)
                read = sequences[:, :size], segment_ids, np.arange(size, dtype=np.int32) * segment_ids
                last = np.maximum(lengths - 1, 0)
            else:
                read = next_tokens[:, None], np.ones((rows, 1), np.int32), lengths[:, None] - 1
                last = np.zeros(rows, np.int32)
            cache, column = self._advance(weights, cache, *map(self._put, (*read, last)), i, sampling)
            next_tokens = np.asarray(column)
            yield next_tokens
            sequences[np.arange(rows), lengths] = next_tokens
            lengths = lengths + 1

    def _put(self, array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, self._rows, lambda index: array[index])


def draw(logits: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    """The next token of each row, int32 [B], from logits [B, V]; nucleus sampling of Holtzman et al., 2020."""

    def sampled() -> jax.Array:
        descending = jnp.argsort(logits, axis=-1, descending=True, stable=True)
        scaled = jnp.take_along_axis(logits, descending, axis=-1) / sampling.temperature
        probabilities = jax.nn.softmax(scaled)
        # Kept are the tokens before which the sum of more likely ones is still short of top_p, and always the first.
        is_kept = (jnp.cumsum(probabilities, axis=-1) - probabilities < sampling.top_p).at[..., 0].set(True)
        choice = jax.random.categorical(key, jnp.where(is_kept, scaled, -jnp.inf))
        return jnp.take_along_axis(descending, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)

    # Sorting the vocabulary takes a hundred times as long as finding the largest.
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.lax.cond(sampling.temperature > 0, sampled, lambda: greedy)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
