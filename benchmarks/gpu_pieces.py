"""Cases of `gpu.py` about pieces of a step: the loss, and the gradient of a table of embeddings."""

from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from gpu_cases import DETERMINISTIC, Case, milliseconds

from jaxsft.model.embedding import _look_up
from jaxsft.model.layers import Logits
from jaxsft.training import loss as module
from jaxsft.training.chunks import trained_first


def loss(is_small: bool) -> list[Case]:
    """Shares of trained tokens, and whether the loop's turns are those that they need or always the same."""
    sizes = [(256, 64, 4096)] if is_small else [(16384, 1536, 151936), (16384, 576, 49152)]
    return [
        Case({"tokens": tokens, "width": width, "vocabulary": vocabulary, "trained_share": share, "turns": turns}, lost)
        for tokens, width, vocabulary in sizes
        for share in (1.0, 0.4)
        for turns in ("as needed", "fixed", "as many as needed, fixed")
    ]


def lost(*, tokens: int, width: int, vocabulary: int, trained_share: float, turns: str) -> dict[str, Any]:
    """Milliseconds of the loss and its gradients."""
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (1, tokens, width), jnp.bfloat16)
    table = 0.02 * jax.random.normal(keys[1], (vocabulary, width), jnp.float32)
    targets = jax.random.randint(keys[2], (1, tokens), 0, vocabulary)
    weights = (jax.random.uniform(keys[3], (1, tokens)) < trained_share).astype(jnp.float32)
    num_trained = int(weights.sum())

    def fixed(weights: Any, vocab_size: int) -> Any:
        chunks = trained_first(weights, vocab_size)
        count = weights.size if turns == "fixed" else num_trained
        return chunks._replace(number=-(-count // chunks.size))

    logits = Logits(vocab_size=vocabulary)

    def total(hidden: Any, table: Any) -> Any:
        return module.next_token_loss(hidden, table, targets, weights, logits=logits).loss_sum

    with mock.patch.object(module, "trained_first", trained_first if turns == "as needed" else fixed):
        taken = milliseconds(jax.jit(jax.value_and_grad(total, (0, 1))), hidden, table)
    return {"ms": taken, "tflops": 6 * num_trained * width * vocabulary / taken / 1e9}


def embed(is_small: bool) -> list[Case]:
    """Tables, how frequent the most frequent token is, and the order in which rows are added up."""
    sizes = [(512, 64, 4096)] if is_small else [(16384, 1536, 151936), (16384, 576, 49152)]
    return [
        Case(
            {"tokens": tokens, "width": width, "vocabulary": vocabulary, "frequent": share, "order": order},
            embedded,
            environment,
        )
        for environment in ({}, DETERMINISTIC)
        for tokens, width, vocabulary in sizes
        for share in (0.0, 0.07, 1.0)
        for order in ("as they come", "sorted")
    ]


def embedded(*, tokens: int, width: int, vocabulary: int, frequent: float, order: str) -> dict[str, Any]:
    """Milliseconds of the gradient, how far the frequent token's is from a sum in float64, and whether it repeats."""
    rng = np.random.default_rng(0)
    drawn = np.where(rng.random(tokens) < frequent, 7, rng.integers(0, vocabulary, tokens)).astype(np.int32)
    ids, table = jnp.asarray(drawn)[None], jnp.zeros((vocabulary, width), jnp.float32)
    gradient = jax.random.normal(jax.random.key(0), (1, tokens, width), jnp.bfloat16) + 1

    @jax.jit
    def of_table(ids: Any, gradient: Any) -> Any:
        if order == "sorted":
            by_id = jnp.argsort(ids[0])
            ids, gradient = ids[:, by_id], gradient[:, by_id]
        _, vjp = jax.vjp(lambda table: _look_up("v d", jnp.dtype("bfloat16"), table, ids), table)
        return vjp(gradient)[0]

    found = np.asarray(of_table(ids, gradient))
    exact = np.asarray(gradient, np.float64)[0][drawn == 7].sum(axis=0)
    return {
        "ms": milliseconds(of_table, ids, gradient),
        "apart": float(np.abs(found[7] - exact).max() / max(np.abs(exact).max(), 1e-30)),
        "repeats": found.tobytes() == np.asarray(of_table(ids, gradient)).tobytes(),
    }
