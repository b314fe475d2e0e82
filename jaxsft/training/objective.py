"""What is minimised of a token: its loss, or what the section `loss` of a config makes of it; and the gradient of that.

In: what the softmax over the whole vocabulary says of some positions. Out: a number for each, and the factors of its
gradient by the logits. How the vocabulary is gone over, whole, cut or in blocks, is up to `loss.py` and
`loss_in_blocks.py`. With l the logits, V the tokens of the vocabulary, p the probability of the target and e, z the
keys `label_smoothing` and `z_loss`:

    nll              logsumexp(l) - l_target
    label_smoothing  (1 - e) * nll + e * (logsumexp(l) - mean_v l_v)      Szegedy et al. 2015, section 7
    dft              p * nll, p taken as a constant                       Wu et al. 2025
    z_loss           + z * logsumexp(l)^2                                 Chowdhery et al. 2022, section 5
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxsft.config import LossConfig
from jaxsft.model.layers import Logits

PLAIN = LossConfig()
"""The loss itself."""


class Objective(NamedTuple):
    """What of each position is minimised, and over which vocabulary. Static: a compiled step is made for it."""

    loss: LossConfig
    logits: Logits

    @property
    def needs_logit_sum(self) -> bool:
        """Whether `Seen.logit_sum` is asked for."""
        return self.loss.label_smoothing > 0


class Seen(NamedTuple):
    """What the whole vocabulary says of each of N positions, float32 [N]."""

    maximum: jax.Array
    """The largest logit."""
    normaliser: jax.Array
    """The sum of exp(logit - maximum)."""
    target_logit: jax.Array
    logit_sum: jax.Array | None
    """Of the logits of all tokens; None where nothing asks for it."""

    @property
    def logsumexp(self) -> jax.Array:
        """Of all logits."""
        return jnp.log(self.normaliser) + self.maximum

    @property
    def nll(self) -> jax.Array:
        """In nats."""
        return self.logsumexp - self.target_logit


class Factors(NamedTuple):
    """Of the gradient by the logits: of_softmax * softmax - of_target * onehot(target) - of_tokens; each [N]."""

    of_softmax: jax.Array
    of_target: jax.Array
    of_tokens: jax.Array | None
    """Of every token alike; None is 0."""


def logit_sum(logits: jax.Array) -> jax.Array:
    """[N], over the tokens among logits [N, V]; what is none has the lowest float (`Logits`)."""
    return jnp.where(is_token(logits), logits, 0.0).sum(axis=-1)


def is_token(logits: jax.Array) -> jax.Array:
    """Which of some logits are those of a token."""
    return logits != jnp.finfo(jnp.float32).min


def values(objective: Objective, seen: Seen) -> jax.Array:
    """float32 [N], what is minimised of each position, unweighted."""
    loss, _ = objective
    value = seen.nll
    if loss.dft:
        value = _probability(seen) * value
    if loss.label_smoothing:
        assert seen.logit_sum is not None
        spread = seen.logsumexp - seen.logit_sum / objective.logits.vocab_size
        value = (1.0 - loss.label_smoothing) * value + loss.label_smoothing * spread
    if loss.z_loss:
        value += loss.z_loss * jnp.square(seen.logsumexp)
    return value


def sums_of(objective: Objective, seen: Seen, weight: jax.Array, is_right: jax.Array) -> tuple[jax.Array, ...]:
    """(objective sum, correct sum) of positions [N], and the loss sum where that is another: float32 [] each."""

    def total(value: jax.Array) -> jax.Array:
        # Positions of weight 0 fill up a chunk, and their targets may be anything.
        return jnp.sum(jnp.where(weight == 0, 0.0, weight * value))

    loss_sum, correct_sum = total(seen.nll), jnp.sum(weight * is_right)
    if objective.loss.is_plain:
        return loss_sum, correct_sum
    return total(values(objective, seen)), correct_sum, loss_sum


def factors(objective: Objective, seen: Seen, weight: jax.Array) -> Factors:
    """Of the gradient of weight [N] * `values`."""
    loss, _ = objective
    if loss.is_plain:
        return Factors(weight, weight, None)
    of_nll = weight * _probability(seen) if loss.dft else weight
    of_softmax = of_nll + 2.0 * loss.z_loss * weight * seen.logsumexp if loss.z_loss else of_nll
    if not loss.label_smoothing:
        return Factors(of_softmax, of_nll, None)
    share = loss.label_smoothing / objective.logits.vocab_size
    return Factors(of_softmax, (1.0 - loss.label_smoothing) * of_nll, share * of_nll)


def _probability(seen: Seen) -> jax.Array:
    """Of the target. Where it is no token, as it may be at weight 0, its logit may be above all others."""
    return jnp.exp(-jnp.maximum(seen.nll, 0.0))
