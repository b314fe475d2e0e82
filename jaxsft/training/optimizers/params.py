"""What a parameter is to an optimizer: its path, the matrices that it is made of, how it is decayed, and its group.

In: a state of Variables with `axes`, and the section `optim`. Out: the same state with an answer in the place of each
value, or the Variables by their paths.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jaxsft.config import ConfigError, GroupConfig, OptimConfig


def by_path(tree: Any) -> dict[str, Any]:
    """The Variables of a state under their paths, such as `layers.mlp.up_proj.weight`."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_variable)[0]
    return {path_text(path): leaf for path, leaf in leaves}


def replaced(tree: Any, value_of: Callable[[str, Any], Any]) -> Any:
    """The state with `value_of(path, variable)` in the place of each Variable's value."""

    def of_leaf(path: Any, variable: Any) -> Any:
        return variable.replace(value_of(path_text(path), variable))

    return jax.tree_util.tree_map_with_path(of_leaf, tree, is_leaf=_is_variable)


def path_text(path: Any) -> str:
    """The path of a parameter as a user writes it."""
    return ".".join(str(key.key) for key in path)


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


def sides(axes: str) -> list[tuple[int, ...]]:
    """The dims of one layer's weight, by their numbers; heads and their dim are one.

    `"l d n h"` gives `[(1,), (2, 3)]`, `"l e d f"` gives `[(1,), (2,), (3,)]`, and the norm `"l n h"` `[(1, 2)]`.
    """
    found: list[tuple[int, ...]] = []
    letters = axes.split()
    for number, letter in enumerate(letters):
        if letter == "h" and number and letters[number - 1] in "nk":
            found[-1] += (number,)
        elif letter != "l":
            found.append((number,))
    return found


def matrix(axes: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The dims of the inputs and those of the outputs of a weight that is a matrix for each layer and expert.

    `"l n h d"` gives `((1, 2), (3,))` and `"l e d f"` gives `((2,), (3,))`; None for biases and norms, and for routers,
    of which the number of experts is a dim.
    """
    letters = axes.split()
    found = [side for side in sides(axes) if letters[side[0]] != "e"]
    return (found[0], found[1]) if len(found) == 2 else None


def is_decayed(path: str, param: Any) -> bool:
    """True for matrices; norms and biases are not decayed: seen per layer, they have one side, or are named bias."""
    return len(sides(param.get_metadata("axes"))) > 1 and path.rpartition(".")[2] != "bias"


def decays(config: OptimConfig, params: Any, *, usual: Any) -> Any:
    """The weight decay of each parameter: that of its group, or of all that are decayed; None where it is 0.

    `usual` is `config.weight_decay`, as a number or an array.
    """

    def of_param(path: str, param: Any) -> Any:
        given = [group.weight_decay for group in config.groups if _is_in(path, group)]
        of_group = next((decay for decay in reversed(given) if decay is not None), None)
        if of_group is not None:
            return of_group or None
        return usual if is_decayed(path, param) and config.weight_decay > 0 else None

    return replaced(params, of_param)


def rate_factors(config: OptimConfig, params: Any) -> Any:
    """By what the learning rate of each parameter is multiplied: 1.0 outside of all groups."""

    def of_param(path: str, param: Any) -> float:
        factors = [group.learning_rate_factor for group in config.groups if _is_in(path, group)]
        return next((factor for factor in reversed(factors) if factor is not None), 1.0)

    return replaced(params, of_param)


def _is_in(path: str, group: GroupConfig) -> bool:
    return any(re.search(pattern, path) for pattern in group.match)


def check_groups(config: OptimConfig, params: Any) -> None:
    """Refuses patterns that no trained parameter has, before any weight is read.

    Raises:
        ConfigError: all of them, and the paths that there are.
    """
    paths = list(by_path(params))
    problems = [
        f"optim.groups.{number}.match: {pattern!r} is found in no trained parameter"
        for number, group in enumerate(config.groups)
        for pattern in group.match
        if not any(re.search(pattern, path) for path in paths)
    ]
    if problems:
        raise ConfigError("\n".join([*problems, "the trained parameters are:", *(f"  {path}" for path in paths)]))


def size_per_layer(axes: str, shape: tuple[int, ...]) -> int:
    """Numbers in one layer of a weight."""
    return math.prod(size for letter, size in zip(axes.split(), shape, strict=True) if letter != "l")


def axes_without(axes: str, dims: tuple[int, ...]) -> str:
    """The letters of a weight without those of some dims: of `"l d n h"` and `(2, 3)`, `"l d"`."""
    return " ".join(letter for number, letter in enumerate(axes.split()) if number not in dims)
