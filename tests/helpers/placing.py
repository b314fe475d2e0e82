"""Parameters that are made once and laid on many meshes: nothing is compiled for another mesh."""

from typing import Any

import jax
from jax.sharding import Mesh

from jaxsft.mesh import shardings


def place(params: Any, mesh: Mesh) -> Any:
    """A state of arrays of the host, each device's part where it belongs, in memory of its own."""
    return jax.device_put(params, shardings(mesh, params), may_alias=False)
