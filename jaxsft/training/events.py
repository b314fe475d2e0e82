"""What happens in a run, as records: `jaxsft.run` yields them one by one, in the order in which things happen."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath


class Line(NamedTuple):
    """Some steps were done; what they came to was written to `metrics.jsonl`."""

    step: int
    """Steps done."""
    metrics: Mapping[str, Any]
    """See docs/metrics.md: `loss`, `accuracy`, `learning_rate`, `tokens_per_second`, ..."""


class Evaluated(NamedTuple):
    """The held-out rows were looked at."""

    step: int
    metrics: Mapping[str, float]
    """`eval_loss`, `eval_accuracy`, ..., and those of each set where there are several."""
    samples: Mapping[str, Any]
    """By set: a list of `Answer`s, each with its `question` and `text`."""


class Saved(NamedTuple):
    """A checkpoint is being written; training goes on meanwhile."""

    step: int
    folder: epath.Path


class Stopped(NamedTuple):
    """The run was asked to stop and has saved this step; it goes on when it is started again."""

    step: int
    reason: str
    """Such as SIGTERM."""


class Finished(NamedTuple):
    """The run is over, and its model is ready for transformers."""

    step: int
    export: epath.Path


Event = Line | Evaluated | Saved | Stopped | Finished
