"""The two records that flow through the program: one tokenised example, and one batch of packed rows.

Everything here is plain data. Who makes an `Example` is `chat/encoder.py`; who makes a `Batch` is `batches/loader.py`;
who consumes one is `training/step.py`.
"""

from typing import Any, NamedTuple

import numpy as np


class Example(NamedTuple):
    """One tokenised conversation, or one unrolled turn of it.

    Worked example: the conversation `user: 2+2?  assistant: 4` might become

        tokens       = [<user>, 2, +, 2, ?, <assistant>, 4, <end>]
        loss_weights = [     0, 0, 0, 0, 0,           0, 1,     1]
    """

    tokens: np.ndarray
    """int32 [T]"""
    loss_weights: np.ndarray
    """float32 [T]: the weight of token t *as a target*, 0 where it is not trained."""


class Batch(NamedTuple):
    """Packed rows; every leaf is [B, T] (or [A, B, T] as microbatches), numpy on the host, jax.Array on devices.

    Worked example: the segments `[a b c]` and `[x y]` in one row of length 6, with `b`, `c` and `y` trained:

        tokens       = [a, b, c, x, y, 0]
        targets      = [b, c, 0, y, 0, 0]     the first token of a segment is nobody's target
        loss_weights = [1, 1, 0, 1, 0, 0]     aligned with targets
        segment_ids  = [1, 1, 1, 2, 2, 0]     0 is padding
        positions    = [0, 1, 2, 0, 1, 0]
    """

    tokens: Any
    """int32, model inputs."""
    targets: Any
    """int32, the token to predict at this position, already shifted."""
    loss_weights: Any
    """float32, weight of each target."""
    segment_ids: Any
    """int32, which example of the row, from 1."""
    positions: Any
    """int32, index within the segment."""


def count_segments(segment_ids: np.ndarray) -> np.ndarray:
    """Segments of each row of int32 [B, T], padding counted as one: `[[1, 1, 2, 0], [1, 2, 3, 3]]` gives `[3, 3]`."""
    return 1 + (np.diff(segment_ids, axis=1) != 0).sum(axis=1)
