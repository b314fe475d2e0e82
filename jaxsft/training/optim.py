"""Schedules, and the table of optimizers.

In: the `optim` section and the number of steps. Out: a schedule `step -> learning rate`, and an optimizer
(`optimizers/`), which is told the learning rate of each step, so that it is a function of the step alone, whatever the
optimizer has counted.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsft.config import OptimConfig
from jaxsft.training.optimizers.adafactor import adafactor
from jaxsft.training.optimizers.eight_bit import adamw8bit
from jaxsft.training.optimizers.moments import adamw, lion, sgd
from jaxsft.training.optimizers.muon import muon
from jaxsft.training.optimizers.optimizer import Optimizer
from jaxsft.training.optimizers.schedule_free import schedule_free_adamw

Schedule = Callable[[jax.Array | int], jax.Array]


def warmup_steps(config: OptimConfig, num_steps: int) -> int:
    """Steps of warm-up: as given, or the given share of all steps, rounded up."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    return min(num_steps, -int(-config.warmup_ratio * num_steps // 1))


class Course(NamedTuple):
    """The numbers of a schedule, float32. A step is given them, so that runs which differ in them share its program."""

    peak: np.float32
    rise: np.float32
    """Of each step of warm-up, as a share of the peak."""
    fall: np.float32
    """Of each step on the way down, likewise."""
    num_steps: np.float32
    final: np.float32
    """What is reached after the last step, as a share of the peak."""
    above: np.float32
    """1 - final."""


def make_course(config: OptimConfig, num_steps: int) -> Course:
    """The numbers of the schedule of a run of `num_steps` steps."""
    warmup = warmup_steps(config, num_steps)
    decay_start = warmup
    if config.schedule == "wsd":
        decay_start = max(warmup, num_steps - round(config.decay_ratio * num_steps))
    final = config.final_ratio
    # As XLA divides by a constant: so the rates are, to the bit, those of a program that knows its numbers.
    one = np.float32(1)
    rise, fall = (one / np.float32(max(steps, 1)) for steps in (warmup, num_steps - decay_start))
    return Course(np.float32(config.learning_rate), rise, fall, *map(np.float32, (num_steps, final, 1 - final)))


def rate_at(kind: str, course: Course, step: jax.Array | int) -> jax.Array:
    """Learning rate of step i (from 0), of a `config.schedule`.

    Warm-up rises linearly: step i of W has (i + 1) / W of the peak, so that no step is wasted on a rate of 0. What
    follows runs from the peak at step W to `final_ratio` of it after the last step, which would be step `num_steps`:
    so the last batch is learnt from as well. On a line, on half a cosine, or (wsd) after staying at the peak, on a line
    over the last `decay_ratio` of all steps; constant stays at the peak.

    Worked example: peak 1, linear, 2 steps of warm-up, 6 steps, final_ratio 0: 0.5, 1, 1, 0.75, 0.5, 0.25.
    """
    step = jnp.asarray(step, jnp.float32)
    rise = jnp.minimum(1.0, (step + 1) * course.rise)
    # The share of the way down that is left: near the end it is exact, and 1 minus the share that is done is not.
    left = jnp.clip((course.num_steps - step) * course.fall, 0.0, 1.0)
    height = {
        "constant": jnp.ones_like(left),
        "linear": left,
        "wsd": left,
        "cosine": jnp.square(jnp.sin(0.5 * jnp.pi * left)),
    }[kind]
    return course.peak * rise * (course.final + course.above * height)


def make_schedule(config: OptimConfig, num_steps: int) -> Schedule:
    """Learning rate of step i (from 0), of `num_steps` steps in all; see `rate_at`."""
    return functools.partial(rate_at, config.schedule, make_course(config, num_steps))


OPTIMIZERS: dict[str, Callable[[OptimConfig], Optimizer]] = {
    "adamw": adamw,
    "adamw8bit": adamw8bit,
    "adafactor": adafactor,
    "lion": lion,
    "muon": muon,
    "sgd": sgd,
    "schedule_free_adamw": schedule_free_adamw,
}


def make_optimizer(config: OptimConfig) -> Optimizer:
    """The optimizer of `config.name`."""
    return OPTIMIZERS[config.name](config)
