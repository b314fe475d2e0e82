"""Two runs of the same steps held against each other, in the order in which faults show.

In: a folder with `ours` and `theirs`. Out: `Check`s, from the rows over the layers to the last parameters; the first
that fails says where the two part. Differences of arrays are relative: norm of the difference by norm of theirs.
"""

import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import safetensors

from jaxsft.batch import Batch
from jaxsft.report.records import Check
from jaxsft.training.metrics import from_json_line

TOLERANCES = {
    "float32": {
        "learning rate": 1e-6,
        "layer": 2e-5,
        "logits": 1e-4,
        "first loss": 1e-5,
        "gradient": 1e-3,
        "update": 2e-3,
        "total update": 5e-3,
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
        "total update": 5e-1,
        "parameters": 5e-2,
        "loss": 2e-2,
        "gradient norm": 1e-1,
    },
}
"""By how much two right programs may differ, for each dtype of matmuls."""

NOISE = 1e-4
"""A gradient that is smaller than this share of the largest tensor's is zero by its mathematics, such as that of a bias
of keys, and what is computed is rounding."""


def check_runs(folder: pathlib.Path, *, compute_dtype: str) -> list[Check]:
    """All checks, in order; each is made whatever became of those before it."""
    ours, theirs, tolerances = folder / "ours", folder / "theirs", TOLERANCES[compute_dtype]
    our_lines, their_lines = (_lines(side) for side in (ours, theirs))
    checks = [_check_batches(ours, theirs), _check_curve("learning rate", our_lines, their_lines, tolerances)]
    checks += _check_first_row(ours, theirs, tolerances)
    checks.append(_check_curve("loss", our_lines[:1], their_lines[:1], tolerances, name="first loss"))
    trained = next(each for each in (folder / "adapter", folder / "model") if each.exists())
    start, last = _Tensors(trained), len(our_lines)
    checks += [
        _check_gradients(ours, theirs, tolerances),
        _check_update(
            "update of the first step", "params_first", ours, theirs, start, tolerances["update"], num_steps=1
        ),
        _check_parameters("parameters after the first step", "params_first", ours, theirs, tolerances),
        _check_curve("loss", our_lines, their_lines, tolerances, name="loss of every step"),
        _check_curve("grad_norm", our_lines, their_lines, tolerances, name="gradient norm of every step"),
    ]
    if last > 1:  # with one step, the last step is the first
        checks += [
            _check_update(
                "update of all steps", "params_last", ours, theirs, start, tolerances["total update"], num_steps=last
            ),
            _check_parameters("parameters after the last step", "params_last", ours, theirs, tolerances),
        ]
    return checks


def verdict(checks: Sequence[Check], *, num_steps: int) -> str:
    """One or two sentences: whether the two runs are one, and if not, where they part first."""
    failed = [check for check in checks if check.passed is False]
    made = sum(check.passed is not None for check in checks)
    if not failed:
        not_made = f"; {len(checks) - made} could not be made" if made < len(checks) else ""
        steps = f"{num_steps} step{'s' * (num_steps != 1)}"
        return f"The two runs are the same: all {made} checks hold over {steps}{not_made}."
    first, *others = failed
    hint = _HINTS.get(first.name, f"What is measured: {first.detail}.")
    more = f" Failed checks after it: {len(others)}." if others else ""
    return f"The two runs part: {first.name}, at {first.where}. {hint}{more}"


_HINTS = {
    "rows": "They do not train on the same tokens: look for the shift, the mask or the packing.",
    "learning rates": "The schedules differ: compare its settings below.",
    "residual stream": "What comes before agrees, so one of the two computes this layer otherwise: compare the "
    "settings of the model below (ropes, norms and their epsilons, windows, scales), and the weights of this layer.",
    "logits": "All layers agree, so the final norm, the output projection or what is done to logits differs.",
    "first loss": "The logits of the row that was looked at agree, so the loss itself differs (its weights, its "
    "divisor, a shift), or the model does in another row.",
    "gradients of the first step": "The forward passes agree, so the backward pass differs, or the microbatches are "
    "put together otherwise.",
    "update of the first step": "The gradients agree, so the optimizer differs: compare epsilon and weight decay "
    "below.",
    "update of all steps": "The first step agrees, so what shows only later differs: compare betas, weight decay and "
    "clipping below.",
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
    # A learning rate that falls to zero is measured by the largest.
    largest = max(abs(b) for _, _, b in pairs) if measure == "learning_rate" else 0.0
    differences = [abs(a - b) / max(abs(b), largest, 1e-30) for _, a, b in pairs]
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
    """What one row of the first step becomes, layer by layer, and its logits."""
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
        detail="relative difference of one row after each layer, "
        + ("the first that is too large" if too_large else "the largest"),
    )
    difference = _relative(mine["logits"], other["logits"])
    logits = Check(
        name="logits",
        passed=difference <= tolerances["logits"],
        measured=difference,
        tolerance=tolerances["logits"],
        where="one row of the first step",
        detail=f"relative difference over {a.shape[1]:,} positions; the largest of a logit is "
        f"{np.abs(mine['logits'] - other['logits']).max():.1e}",
    )
    return [layers, logits]


def _check_gradients(ours: pathlib.Path, theirs: pathlib.Path, tolerances: Mapping[str, float]) -> Check:
    """The largest relative difference of any tensor's gradient; every tensor must be there on both sides."""
    mine, other = (_Tensors(side / "gradients") for side in (ours, theirs))
    if missing := sorted(mine.names ^ other.names):
        where = f"{missing[0]}: only {'ours' if missing[0] in mine.names else 'theirs'} has it"
        detail = "tensors that only one of the two has"
        return Check("gradients of the first step", False, float(len(missing)), 0.0, where, detail)
    norms = {each: _norm(other[each]) for each in other.names}
    floor = NOISE * max(norms.values())
    differences = {each: _norm(mine[each] - other[each]) / max(norms[each], floor, 1e-30) for each in sorted(norms)}
    return _of_tensors("gradients of the first step", differences, tolerances["gradient"])


def _check_parameters(
    name: str, part: str, ours: pathlib.Path, theirs: pathlib.Path, tolerances: Mapping[str, float]
) -> Check:
    """The largest relative difference of any tensor, without elements whose gradient is noise."""
    differences, left_out = {}, 0
    for tensor, a, b, is_noise in _pairs(ours, theirs, part):
        left_out += int(is_noise.sum())
        differences[tensor] = _norm(np.where(is_noise, 0, a - b)) / max(_norm(b), 1e-30)
    return _of_tensors(name, differences, tolerances["parameters"], _left_out(left_out))


def _check_update(
    name: str,
    part: str,
    ours: pathlib.Path,
    theirs: pathlib.Path,
    start: "_Tensors",
    tolerance: float,
    *,
    num_steps: int,
) -> Check:
    """The largest relative difference of what was added to any tensor since `start`.

    Adam makes whole steps of a gradient that is noise, so such elements are left out; after one step also those whose
    gradients agree to less than three digits. A tensor that moved so little that the rounding of its float32 numbers
    would hide a fault is not checked, and counted.
    """
    mine, other = (_Tensors(side / "gradients") for side in (ours, theirs))
    differences, left_out, num_hidden = {}, 0, 0
    for tensor, a, b, is_noise in _pairs(ours, theirs, part):
        if num_steps == 1:
            is_noise |= np.abs(mine[tensor] - other[tensor]) > 1e-3 * np.abs(other[tensor])
        left_out += int(is_noise.sum())
        update = _norm(np.where(is_noise, 0, b - start[tensor]))
        rounding = 2.0**-23 * math.sqrt(num_steps) * _norm(np.where(is_noise, 0, b))
        if rounding >= tolerance * update:
            num_hidden += 1
            continue
        differences[tensor] = _norm(np.where(is_noise, 0, a - b)) / update
    hidden = f"; {num_hidden} tensors moved too little to be told from rounding" if num_hidden else ""
    if not differences:
        return Check(name, None, None, tolerance, "", "nothing moved by more than rounding" + hidden)
    return _of_tensors(name, differences, tolerance, hidden + _left_out(left_out))


def _pairs(
    ours: pathlib.Path, theirs: pathlib.Path, part: str
) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """(name, ours, theirs, which elements had a gradient that is noise) of each tensor."""
    mine, other = (_Tensors(side / part) for side in (ours, theirs))
    gradients = [_Tensors(side / "gradients") for side in (ours, theirs)]
    largest = max(_norm(gradients[1][name]) / math.sqrt(gradients[1][name].size) for name in gradients[1].names)
    for name in sorted(mine.names & other.names):
        g, h = (each[name] for each in gradients)
        yield name, mine[name], other[name], (np.abs(h) < NOISE * largest) & ((g != 0) | (h != 0))


def _of_tensors(name: str, differences: Mapping[str, float], tolerance: float, note: str = "") -> Check:
    """The check of the largest difference; one that is no number is larger than all."""
    worst = max(differences, key=lambda each: math.inf if math.isnan(differences[each]) else differences[each])
    too_many = sum(not each <= tolerance for each in differences.values())
    return Check(
        name=name,
        passed=not too_many,
        measured=differences[worst],
        tolerance=tolerance,
        where=worst,
        detail=f"largest relative difference of {len(differences)} tensors"
        + (f"; {too_many} of them are beyond the tolerance" if too_many else "")
        + note,
    )


def _left_out(count: int) -> str:
    return f"; {count:,} numbers are left out, as their gradient is noise" if count else ""


def _norm(array: np.ndarray) -> float:
    return float(np.linalg.norm(array.ravel()))


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
        return self._file_of[name].get_tensor(name).astype(np.float32, copy=False)


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm((a - b).ravel()) / max(float(np.linalg.norm(b.ravel())), 1e-30))


def _lines(side: pathlib.Path) -> list[dict[str, Any]]:
    return [from_json_line(line) for line in (side / "metrics.jsonl").read_text().splitlines()]
