"""Two runs of the same steps held against each other, in the order in which faults show.

In: a folder with `ours` and `theirs`. Out: `Check`s, from the rows over the layers to the last parameters; the first
that fails says where the two part. Differences of arrays are relative: norm of the difference by norm of theirs.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors

from jaxsft.batch import Batch
from jaxsft.report.records import Check

TOLERANCES = {
    "float32": {
        "learning rate": 1e-6,
        "layer": 1e-4,
        "logits": 1e-4,
        "first loss": 1e-5,
        "gradient": 1e-3,
        "update": 2e-3,
        "parameters": 1e-4,
        "loss": 1e-4,
        "gradient norm": 1e-2,
    },
    "bfloat16": {
        "learning rate": 1e-6,
        "layer": 5e-2,
        "logits": 5e-2,
        "first loss": 1e-2,
        "gradient": 1e-1,
        "update": 5e-1,
        "parameters": 1e-2,
        "loss": 2e-2,
        "gradient norm": 1e-1,
    },
}
"""By the dtype of matmuls: what two right programs may differ by."""

NOISE = 1e-4
"""A tensor whose gradient is smaller than this share of the largest is zero by its mathematics, such as the gradient of
a bias of keys: its difference is measured by this share instead."""


def check_runs(folder: pathlib.Path, *, compute_dtype: str) -> list[Check]:
    """All checks, in order; each is made whatever became of those before it."""
    ours, theirs, tolerances = folder / "ours", folder / "theirs", TOLERANCES[compute_dtype]
    our_lines, their_lines = (_lines(side) for side in (ours, theirs))
    checks = [_check_batches(ours, theirs), _check_curve("learning rate", our_lines, their_lines, tolerances)]
    checks += _check_first_row(ours, theirs, tolerances)
    checks.append(_check_curve("loss", our_lines[:1], their_lines[:1], tolerances, name="first loss"))
    start = _Tensors(folder / "model")
    checks += [
        _check_tensors("gradients of the first step", "gradient", ours, theirs, "gradients", tolerances),
        _check_tensors("update of the first step", "update", ours, theirs, "params_first", tolerances, start=start),
        _check_tensors("parameters after the first step", "parameters", ours, theirs, "params_first", tolerances),
        _check_curve("loss", our_lines, their_lines, tolerances, name="loss of every step"),
        _check_curve("grad_norm", our_lines, their_lines, tolerances, name="gradient norm of every step"),
        _check_tensors("parameters after the last step", "parameters", ours, theirs, "params_last", tolerances),
    ]
    return checks


def verdict(checks: Sequence[Check], *, num_steps: int) -> str:
    """One or two sentences: whether the two runs are one, and if not, where they part first."""
    failed = [check for check in checks if check.passed is False]
    if not failed:
        return f"The two runs are the same: all {len(checks)} checks hold over {num_steps} steps."
    first = failed[0]
    others = f" {len(failed) - 1} later checks fail as well." if len(failed) > 1 else ""
    return f"The two runs part: {first.name}, at {first.where}. {_HINTS.get(first.name, first.detail)}{others}"


_HINTS = {
    "rows": "They do not train on the same tokens: look for the shift, the mask or the packing.",
    "learning rates": "The schedules differ: compare its settings below.",
    "residual stream": "What comes before agrees, so one of the two computes this layer otherwise: compare the "
    "settings of the model below (ropes, norms and their epsilons, windows, scales), and the weights of this layer.",
    "logits": "All layers agree, so the final norm, the output projection or what is done to logits differs.",
    "first loss": "The logits agree, so the loss itself differs: its weights, its divisor, or a shift.",
    "gradients of the first step": "The forward passes agree, so the backward pass differs, or the microbatches are "
    "put together otherwise.",
    "update of the first step": "The gradients agree, so the optimizer differs: compare epsilon, betas, weight decay "
    "and clipping below.",
}


def _check_batches(ours: pathlib.Path, theirs: pathlib.Path) -> Check:
    """The rows as the devices got them against rows built apart from the examples; equal to the bit."""
    mine, other = ({leaf: np.load(side / f"{leaf}.npy") for leaf in Batch._fields} for side in (ours, theirs))
    trained = (mine["loss_weights"] != 0) | (other["loss_weights"] != 0)
    for leaf in ("tokens", "segment_ids", "positions", "loss_weights", "targets"):
        differs = mine[leaf] != other[leaf]
        if leaf == "targets":
            differs &= trained
        if differs.any():
            step, row, position = (int(each[0]) for each in np.nonzero(differs))
            values = f"{mine[leaf][step, row, position]} and {other[leaf][step, row, position]}"
            return Check(
                name="rows",
                passed=False,
                measured=float(differs.sum()),
                tolerance=0.0,
                where=f"step {step + 1}, row {row}, position {position}: {leaf} {values}",
                detail=f"positions whose {leaf} differ, of {differs.size:,}",
            )
    detail = f"positions that differ of {trained.size:,}, {int(trained.sum()):,} of them trained, in any of five arrays"
    return Check("rows", True, 0.0, 0.0, "", detail)


def _check_curve(
    key: str, ours: list[dict], theirs: list[dict], tolerances: Mapping[str, float], *, name: str | None = None
) -> Check:
    """The largest relative difference of a number over the steps; if it is too large, the first step where it is."""
    measure = {"learning rate": "learning_rate"}.get(key, key)
    kind = {"grad_norm": "gradient norm"}.get(key, key) if name != "first loss" else name
    assert kind is not None
    tolerance = tolerances[kind]
    pairs = [(a["step"], a[measure], b[measure]) for a, b in zip(ours, theirs, strict=True)]
    differences = [abs(a - b) / max(abs(b), 1e-30) for _, a, b in pairs]
    worst = int(np.nanargmax(differences)) if not all(map(np.isnan, differences)) else 0
    too_large = [at for at, difference in enumerate(differences) if not difference <= tolerance]
    at = too_large[0] if too_large else worst
    step, mine, other = pairs[at]
    return Check(
        name=name or "learning rates",
        passed=not too_large,
        measured=differences[worst],
        tolerance=tolerance,
        where=f"step {step}: {mine:.8g} and {other:.8g}",
        detail=f"largest relative difference over {len(pairs)} step{'s' * (len(pairs) > 1)}",
    )


def _check_first_row(ours: pathlib.Path, theirs: pathlib.Path, tolerances: Mapping[str, float]) -> list[Check]:
    """What the first row becomes, layer by layer, and its logits."""
    mine, other = (_Tensors(side / "first_row.safetensors") for side in (ours, theirs))
    a, b = mine["residuals"], other["residuals"]
    names = ["the embeddings", *(f"layer {number} of {len(a) - 1}" for number in range(1, len(a)))]
    by_layer = [_relative(x, y) for x, y in zip(a, b, strict=True)]
    too_large = [at for at, difference in enumerate(by_layer) if not difference <= tolerances["layer"]]
    at = too_large[0] if too_large else int(np.argmax(by_layer))
    before = f" (before it {by_layer[at - 1]:.1e})" if too_large and at else ""
    layers = Check(
        name="residual stream",
        passed=not too_large,
        measured=by_layer[at],
        tolerance=tolerances["layer"],
        where=names[at] + before,
        detail="relative difference of the first row after each layer, "
        + ("the first that is too large" if too_large else "the largest"),
    )
    difference = _relative(mine["logits"], other["logits"])
    logits = Check(
        name="logits",
        passed=difference <= tolerances["logits"],
        measured=difference,
        tolerance=tolerances["logits"],
        where="the first row",
        detail=f"relative difference over {a.shape[1]:,} positions; the largest of a logit is "
        f"{np.abs(mine['logits'] - other['logits']).max():.1e}",
    )
    return [layers, logits]


def _check_tensors(
    name: str,
    kind: str,
    ours: pathlib.Path,
    theirs: pathlib.Path,
    part: str,
    tolerances: Mapping[str, float],
    *,
    start: "_Tensors | None" = None,
) -> Check:
    """The largest relative difference of any tensor; every tensor must be there on both sides.

    With `start` it is what was added to these tensors that is compared, where the two gradients agree (of a gradient
    that is only noise, Adam makes whole steps), and beyond what float32 rounds.
    """
    mine, other = (_Tensors(side / part) for side in (ours, theirs))
    if missing := sorted(mine.names ^ other.names):
        where = f"{missing[0]}: only {'ours' if missing[0] in mine.names else 'theirs'} has it"
        return Check(name, False, float(len(missing)), 0.0, where, "tensors that only one of the two has")
    gradients = [_Tensors(side / "gradients") for side in (ours, theirs)]
    norms = {each: float(np.linalg.norm(other[each].ravel())) for each in other.names}
    floor = NOISE * max(norms.values()) if kind == "gradient" else 0.0
    differences = {}
    for tensor in sorted(mine.names):
        a, b = mine[tensor], other[tensor]
        if start is None:
            differences[tensor] = float(np.linalg.norm((a - b).ravel())) / max(norms[tensor], floor, 1e-30)
            continue
        g, h = (each[tensor] for each in gradients)
        agree = np.abs(g - h) <= 1e-3 * np.abs(h)
        update = np.where(agree, b - start[tensor], 0)
        apart = float(np.linalg.norm(np.where(agree, a - b, 0).ravel())) - 2.0**-23 * norms[tensor]
        differences[tensor] = max(apart, 0.0) / max(float(np.linalg.norm(update.ravel())), 1e-30)
    worst = max(differences, key=differences.__getitem__)
    too_many = sum(not each <= tolerances[kind] for each in differences.values())
    return Check(
        name=name,
        passed=not too_many,
        measured=differences[worst],
        tolerance=tolerances[kind],
        where=worst,
        detail=f"largest relative difference of {len(differences)} tensors"
        + (f"; {too_many} of them are beyond the tolerance" if too_many else ""),
    )


class _Tensors:
    """The tensors of a safetensors file, or of all in a folder, read when asked for."""

    def __init__(self, path: pathlib.Path) -> None:
        paths = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        self._files = [safetensors.safe_open(each, framework="numpy") for each in paths]
        self._file_of = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118 (no mapping)

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._file_of[name].get_tensor(name).astype(np.float32)


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm((a - b).ravel()) / max(float(np.linalg.norm(b.ravel())), 1e-30))


def _lines(side: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (side / "metrics.jsonl").read_text().splitlines()]
