"""What a run measures: the sums of its steps, FLOPs and MFU, speed, what the host costs, and when too little is finite.

In: `StepMetrics` of some steps, and clocks. Out: one flat dict of plain numbers per line, for `metrics_file.py`,
`console.py` and `writers.py`; docs/metrics.md explains every key.
"""

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from jaxsft.model.abstract import Model
from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.experts import RouterSums, router_losses
from jaxsft.model.quantized import dims_of
from jaxsft.training.chips import chip_of
from jaxsft.training.loss import LossSums


class StepMetrics(NamedTuple):
    """What one step reports, float32 scalars; sums stay sums so that any number of steps can be put together."""

    sums: LossSums
    tokens: Any
    """tokens that are not padding."""
    attention_pairs: Any
    """(query, key) pairs that attention has to look at, of all layers."""
    grad_norm: Any
    """global norm of the gradient before clipping."""
    learning_rate: Any
    skipped: Any
    """1 where the loss or the gradient was not finite and nothing was changed."""
    objective: Any
    """sum of what is minimised, without the routers' losses; None where it is `sums.loss_sum`."""
    router: RouterSums | None
    """Of each layer of a mixture of experts (leading L)."""


def train_flops(
    *,
    matmul_params: int,
    tokens: float,
    attention_width: int,
    attention_pairs: float,
    frozen_matmul_params: int = 0,
) -> float:
    """FLOPs that training on these tokens needs, without recomputation and without padding.

    6 per parameter of a matmul and token (2 forward, 4 backward; 2 backward where it is frozen), and for each (query,
    key) pair 12 per head element (two products, forward and twice backward). Chowdhery et al. 2022 (PaLM), appendix B.

    Args:
        matmul_params: parameters that multiply a token; the embedding table only where it is the output projection,
            of experts those of the `top_k` that a token chooses.
        tokens: tokens that are not padding.
        attention_width: query heads times head dim.
        attention_pairs: (query, key) pairs that attend, of all layers.
        frozen_matmul_params: likewise, that are not trained.
    """
    return (6.0 * matmul_params + 4.0 * frozen_matmul_params) * tokens + 12.0 * attention_width * attention_pairs


def num_params(params: Any, config: DecoderConfig) -> tuple[int, int]:
    """Parameters of a model (Variables with `axes`), and how many more only fill up its tables of the vocabulary."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    total = real = 0
    for leaf in leaves:
        if (sizes := dims_of(leaf)) is None:
            continue
        total += math.prod(sizes.values())
        real += math.prod((sizes | ({"v": config.vocab_size} if "v" in sizes else {})).values())
    return real, total - real


def matmul_params(params: Any, config: DecoderConfig) -> int:
    """The parameters that multiply a token, of abstract parameters (Variables with `axes`)."""
    leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))[0]
    total = 0
    for path, leaf in leaves:
        names = [key.key for key in path]
        is_looked_up = names[0] == "embed_positions" or (names[0] == "embed_tokens" and not config.tie_embeddings)
        is_matrix = names[-1] in ("weight", "codes", "a", "b") and not any("norm" in name for name in names)
        if is_looked_up or not is_matrix or (sizes := dims_of(leaf)) is None:
            continue
        if "v" in sizes:
            sizes["v"] = config.vocab_size
        if "router" not in names and "e" in sizes and config.routing is not None:
            sizes["e"] = config.routing.top_k
        total += math.prod(sizes.values())
    return total


NOT_FINITE = "not_finite"
"""Key of a line: which of its numbers are null, and what they were."""

MAX_SKIPPED_IN_A_ROW = 10


class SkipWatch:
    """Ends a run in which too many steps change nothing, as their loss or gradient is not finite."""

    def __init__(self, *, num_steps: int, max_skipped: float, first: int, skipped: int, in_a_row: int = 0) -> None:
        """
        Args:
            num_steps: of the whole run.
            max_skipped: share of them that may be skipped, rounded up.
            first: first step that it will see.
            skipped: steps skipped before that.
            in_a_row: how many of them just before it.
        """
        self._allowed = math.ceil(max_skipped * num_steps)
        self._share, self._num_steps = max_skipped, num_steps
        self._step, self._total, self._in_a_row = first, skipped, in_a_row

    @property
    def in_a_row(self) -> int:
        """Steps skipped without one between them that was not, up to the last one seen."""
        return self._in_a_row

    @property
    def first_of_row(self) -> int:
        """Index of the first of them: the state before it is the first that may be bad."""
        return self._step - self._in_a_row

    def see(self, steps: Sequence[StepMetrics]) -> str | None:
        """Takes the next steps (host values); says what is too much of them, if it is."""
        for step in steps:
            self._step += 1
            self._in_a_row = self._in_a_row + 1 if step.skipped else 0
            self._total += int(step.skipped)
            if self._in_a_row >= MAX_SKIPPED_IN_A_ROW:
                return f"{self._in_a_row} steps in a row were skipped, up to step {self._step}"
            if self._total >= self._num_steps:
                return f"all {self._num_steps} steps of the run were skipped"
            if step.skipped and self._total > self._allowed:
                return (
                    f"{self._total} steps were skipped, up to step {self._step}, where optim.max_skipped "
                    f"({self._share:g} of {self._num_steps:,} steps) allows {self._allowed}"
                )
        return None


class Diverged(RuntimeError):
    """A run whose loss, gradients or parameters are not finite; nothing is exported. Its text is shown as it is."""

    exit_code = 1


class Totals(NamedTuple):
    """Counts since the run began; a continued run goes on from its last line."""

    tokens: float = 0.0
    trained_tokens: float = 0.0
    skipped_steps: float = 0.0


def summarise(steps: Sequence[StepMetrics], totals: Totals, *, batch_positions: int) -> tuple[dict[str, float], Totals]:
    """One line of metrics from the steps since the last one (host values).

    Args:
        steps: at least one step; loss and accuracy are over all their trained tokens, not means of means.
        totals: counts before these steps.
        batch_positions: positions of the batch of one step, padding included.
    """
    sums = LossSums(*(float(np.sum(values, dtype=np.float64)) for values in zip(*(s.sums for s in steps), strict=True)))
    tokens = sum(float(step.tokens) for step in steps)
    totals = Totals(
        tokens=totals.tokens + tokens,
        trained_tokens=totals.trained_tokens + sums.trained_tokens,
        skipped_steps=totals.skipped_steps + sum(float(step.skipped) for step in steps),
    )
    line = {
        "loss": divide(sums.loss_sum, sums.weight_sum),
        "accuracy": divide(sums.correct_sum, sums.weight_sum),
        "grad_norm": float(np.mean([step.grad_norm for step in steps])),
        "learning_rate": float(steps[-1].learning_rate),
        "tokens": tokens,
        "trained_tokens": sums.trained_tokens,
        "padding_share": 1 - tokens / (len(steps) * batch_positions),
        "total_tokens": totals.tokens,
        "total_trained_tokens": totals.trained_tokens,
        "skipped_steps": totals.skipped_steps,
    }
    if any(step.objective is not None for step in steps):
        # Steps that a former start left may have been of the plain loss.
        objectives = [step.sums.loss_sum if step.objective is None else step.objective for step in steps]
        line["objective"] = divide(float(np.sum(objectives, dtype=np.float64)), sums.weight_sum)
    return line | _router_line(steps), totals


def _router_line(steps: Sequence[StepMetrics]) -> dict[str, float]:
    """How a mixture of experts chose: its losses, means over steps, and the largest share of choices in any layer.

    A share of 1 is an even one, num_experts is all choices.
    """
    routers = [step.router for step in steps if step.router is not None]
    if not routers:
        return {}
    losses = [router_losses(step.router, max(float(step.tokens), 1.0)) for step in steps if step.router is not None]
    counts = np.sum([router.counts for router in routers], axis=0, dtype=np.float64)
    shares = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1.0)
    balances, zs = zip(*losses, strict=True)
    return {
        "router_balance": float(np.mean(balances)),
        "router_z": float(np.mean(zs)),
        "router_max_share": float(shares.max()) * counts.shape[-1],
    }


def dump_steps(steps: Sequence[StepMetrics]) -> list[list[Any]]:
    """Steps that no line reports yet (host values), as plain JSON, exact."""
    return [[np.asarray(leaf, np.float32).tolist() for leaf in jax.tree.leaves(step)] for step in steps]


def load_steps(dumped: Sequence[Sequence[Any]]) -> list[StepMetrics]:
    """What `dump_steps` was given."""
    scalars = len(LossSums._fields) + len(StepMetrics._fields) - 3
    steps = []
    for values in dumped:
        leaves: list[Any] = [np.asarray(value, np.float32) for value in values]
        sums, rest = LossSums(*leaves[: len(LossSums._fields)]), leaves[len(LossSums._fields) : scalars]
        # What a step may lack: the objective, one number, and the sums of routers.
        optional = leaves[scalars:]
        objective = optional.pop(0) if optional and optional[0].ndim == 0 else None
        router = RouterSums(*optional) if optional else None
        steps.append(StepMetrics._make([sums, *rest, objective, router]))
    return steps


def to_json_line(line: dict[str, Any]) -> str:
    """One line of JSON. It knows no NaN and no infinity: such a number is null there, and `not_finite` says which.

    Worked example: {"step": 3, "loss": nan} becomes {"step": 3, "loss": null, "not_finite": {"loss": "nan"}}.
    """
    lost = {key: str(value) for key, value in line.items() if isinstance(value, float) and not math.isfinite(value)}
    shown = line | dict.fromkeys(lost) | ({NOT_FINITE: lost} if lost else {})
    return json.dumps(shown, allow_nan=False)


def from_json_line(text: str) -> Any:
    """What `to_json_line` was given; also of lines that hold NaN, as they once did.

    Raises:
        ValueError: the text is no JSON.
    """
    line = json.loads(text)
    lost = line.pop(NOT_FINITE, {}) if isinstance(line, dict) else {}
    return line | {key: float(value) for key, value in lost.items()} if lost else line


def divide(numerator: float, denominator: float) -> float:
    """The one division at the edge; 0 where nothing was trained."""
    return numerator / denominator if denominator else 0.0


class Stopwatch:
    """Seconds since the last line, and the shares of them in which the devices had no step because of the host.

    Devices run a step while the host already prepares the next ones. So the host's time counts only where it ends with
    no step running: where the step before is still under way, nothing was lost. A stretch in the middle of which that
    step ended counts whole, so both shares are upper bounds. Nothing waits for the devices on account of this.
    """

    def __init__(self) -> None:
        self._start = self._since = time.perf_counter()
        self._waited = self._busy = 0.0
        self._result: Any = None

    def begin(self, already: float = 0.0) -> None:
        """Starts a lap, of which so many seconds have passed in a former start of the run."""
        self._since = time.perf_counter()
        self._start, self._waited, self._busy = self._since - already, 0.0, 0.0

    def so_far(self) -> float:
        """Seconds of this lap."""
        return time.perf_counter() - self._start

    def wait(self, batches: Any) -> Any:
        """The next batch."""
        self._busy += self._lost()
        batch = next(batches)
        self._waited += self._lost()
        return batch

    def launching(self) -> None:
        """A step is about to be started."""
        self._busy += self._lost()

    def launched(self, result: Any) -> None:
        """A step was started, and will give `result`, an array."""
        lost, self._result = self._lost(), result
        # On a CPU the call may have run the step itself; then most of its time was the step's.
        if not result.is_ready():
            self._busy += lost

    def caught_up(self) -> None:
        """The host has just waited for the devices; that is no time of its own."""
        self._since = time.perf_counter()

    def lap(self) -> tuple[float, float, float]:
        """(seconds, share waiting for data, share in the loop's own work) since the last lap; starts the next one."""
        self._busy += self._lost()
        seconds, waited, busy = self._since - self._start, self._waited, self._busy
        self._start, self._waited, self._busy = self._since, 0.0, 0.0
        return seconds, waited / seconds, busy / seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside is taken out of this lap: evaluations, sample answers, saves."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._since = time.perf_counter()
            self._start += self._since - begin

    def _lost(self) -> float:
        """Seconds since this was last asked, 0 where a step is running."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        return seconds if self._result is None or self._result.is_ready() else 0.0


class Speedometer:
    """Tokens per second, MFU where the peak is known, and memory, of one run."""

    def __init__(self, model: Model, config: DecoderConfig) -> None:
        """Of a model by its abstract parameters: those that are trained, and those that are not."""
        self._matmul_params = matmul_params(model.params, config)
        self._frozen_matmul_params = matmul_params(model.frozen, config)
        self._attention_width = config.num_heads * config.head_dim
        chip = chip_of(jax.devices()[0])
        self._peak = chip.flops * jax.device_count() if chip else None

    def read(self, steps: Sequence[StepMetrics], watch: Stopwatch) -> dict[str, float]:
        """The figures of the steps since the last line; starts the next lap of the watch."""
        seconds, waited, busy = watch.lap()
        tokens = sum(float(step.tokens) for step in steps)
        line = {
            "steps": len(steps),
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "trained_tokens_per_second": sum(float(step.sums.trained_tokens) for step in steps) / seconds,
            "data_wait_share": waited,
            "host_share": busy,
            "memory_gib": memory_gib(),
        }
        if self._peak:
            flops = train_flops(
                matmul_params=self._matmul_params,
                frozen_matmul_params=self._frozen_matmul_params,
                tokens=tokens,
                attention_width=self._attention_width,
                attention_pairs=sum(float(step.attention_pairs) for step in steps),
            )
            line["mfu"] = flops / seconds / self._peak
        return line


def memory_gib() -> float:
    """Largest memory use so far, GiB: of the fullest local accelerator, or of this process on CPU."""
    peaks = [stats["peak_bytes_in_use"] for d in jax.local_devices() if (stats := d.memory_stats() or {})]
    if peaks:
        return max(peaks) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
