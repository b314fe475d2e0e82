"""What a layer keeps for its backward pass beside its input, by name; all else is computed again there.

In: arrays of a layer, which `keep` gives a name. Out: the policy that `jax.checkpoint` takes for `model.remat`. Names
stand on what a sum has become, as that of a linear map with its bias, so that no summand is kept beside it.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.ad_checkpoint import checkpoint_name

Remat = Literal["none", "attention", "full", "offload"]

Name = Literal["input", "linear", "attention", "residual"]
"""Of the residual stream before a layer; outputs of linear maps; what attention makes, with the logarithms of its
totals; the residual stream between attention and MLP."""


def keep(x: jax.Array, name: Name) -> jax.Array:
    """`x`, which a layer may keep under this name."""
    return checkpoint_name(x, name)


_ONLY = jax.checkpoint_policies.save_only_these_names

POLICIES: dict[Remat, Callable[..., bool] | None] = {
    "none": _ONLY("linear", "attention"),
    "attention": _ONLY("attention", "residual"),
    "full": None,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
"""Remat -> which names are kept. With "none", norms, rotations and activations are computed again, which costs less
than to write and read them."""


def all_but_slices(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy for layers of which nothing is to be computed again, but whose weights are slices of a period's."""
    return primitive.name not in ("slice", "squeeze")
