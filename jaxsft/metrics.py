"""What a run measures and where it goes: the sums of steps, FLOPs and MFU, the progress display, `metrics.jsonl`.

In: `StepMetrics` of some steps, and clocks. Out: one flat dict of plain numbers per line, shown and written.
"""

import json
import math
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from flax import nnx

from jaxsft.loss import LossSums
from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.experts import RouterSums, router_losses


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
    router: RouterSums | None
    """Of each layer of a mixture of experts (leading L)."""


PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}
"""Dense bfloat16 FLOP/s of one device as its maker states them, by the beginning of `device_kind`."""


def peak_flops(device: jax.Device) -> float | None:
    """Peak of one device, None where it is not known (as on CPUs): then no MFU is reported."""
    names = [name for name in PEAK_FLOPS if device.device_kind.startswith(name)]
    return PEAK_FLOPS[max(names, key=len)] if names else None


def train_flops(*, matmul_params: int, tokens: float, attention_width: int, attention_pairs: float) -> float:
    """FLOPs that training on these tokens needs, without recomputation and without padding.

    6 per parameter of a matmul and token (2 forward, 4 backward), and for each (query, key) pair 12 per head element
    (two products, forward and twice backward). Chowdhery et al. 2022 (PaLM), appendix B.

    Args:
        matmul_params: parameters that multiply a token; the embedding table only where it is the output projection,
            of experts those of the `top_k` that a token chooses.
        tokens: tokens that are not padding.
        attention_width: query heads times head dim.
        attention_pairs: (query, key) pairs that attend, of all layers.
    """
    return 6.0 * matmul_params * tokens + 12.0 * attention_width * attention_pairs


def matmul_params(params: Any, config: DecoderConfig) -> int:
    """The parameters that multiply a token, of abstract parameters (Variables with `axes`)."""
    leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))[0]
    total = 0
    for path, leaf in leaves:
        names = [key.key for key in path]
        is_looked_up = names[0] == "embed_positions" or (names[0] == "embed_tokens" and not config.tie_embeddings)
        if names[-1] != "weight" or is_looked_up or any("norm" in name for name in names):
            continue
        sizes = dict(zip(leaf.get_metadata("axes").split(), leaf.shape, strict=True))
        if "v" in sizes:
            sizes["v"] = config.vocab_size
        if names[-2] != "router" and "e" in sizes and config.routing is not None:
            sizes["e"] = config.routing.top_k
        total += math.prod(sizes.values())
    return total


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


def divide(numerator: float, denominator: float) -> float:
    """The one division at the edge; 0 where nothing was trained."""
    return numerator / denominator if denominator else 0.0


class Stopwatch:
    """Seconds since the last line, and the share of them spent waiting for data."""

    def __init__(self) -> None:
        self._start, self._waited = time.perf_counter(), 0.0

    def wait(self, batches: Any) -> Any:
        """The next batch, its waiting time counted."""
        begin = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - begin
        return batch

    def lap(self) -> tuple[float, float]:
        """(seconds, share waited) since the last lap, and starts the next one."""
        now = time.perf_counter()
        seconds, waited = now - self._start, self._waited
        self._start, self._waited = now, 0.0
        return seconds, waited / seconds

    def leave_out(self, begin: float) -> None:
        """Takes all since `begin` (a `time.perf_counter()`) out of this lap: evaluations, sample answers, saves."""
        self._start += time.perf_counter() - begin


class Speedometer:
    """Tokens per second, MFU where the peak is known, and memory, of one run."""

    def __init__(self, *, matmul_params: int, attention_width: int) -> None:
        self._matmul_params, self._attention_width = matmul_params, attention_width
        peak = peak_flops(jax.devices()[0])
        self._peak = peak * jax.device_count() if peak else None

    def read(self, steps: Sequence[StepMetrics], watch: Stopwatch) -> dict[str, float]:
        """The figures of the steps since the last line; starts the next lap of the watch."""
        seconds, waited = watch.lap()
        tokens = sum(float(step.tokens) for step in steps)
        line = {
            "steps": len(steps),
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "trained_tokens_per_second": sum(float(step.sums.trained_tokens) for step in steps) / seconds,
            "data_wait_share": waited,
            "memory_gib": memory_gib(),
        }
        if self._peak:
            flops = train_flops(
                matmul_params=self._matmul_params,
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


class MetricsFile:
    """`metrics.jsonl`: one object per line, every line with its `step`; written by process 0 only."""

    def __init__(self, path: epath.Path, *, step: int) -> None:
        """Opens the file of a run that is at `step`; lines after it, of steps that will be done again, are dropped."""
        self._path = path
        self._lines: list[str] = []
        if jax.process_index() == 0 and path.exists():
            complete = [line for line in path.read_text().split("\n")[:-1]]
            self._lines = [line for line in complete if 0 < step >= json.loads(line)["step"]]
        self._rewrite()

    def totals(self) -> Totals:
        """Counts at the last line of training."""
        for line in map(json.loads, reversed(self._lines)):
            if "total_tokens" in line:
                return Totals(line["total_tokens"], line["total_trained_tokens"], line["skipped_steps"])
        return Totals()

    def write(self, line: dict[str, Any]) -> None:
        """Appends a line, on disk when this returns."""
        self._lines.append(json.dumps(line))
        if jax.process_index() != 0:
            return
        with self._path.open("a") as file:
            file.write(self._lines[-1] + "\n")

    def _rewrite(self) -> None:
        if jax.process_index() == 0:
            part = self._path.parent / (self._path.name + ".part")
            part.write_text("".join(line + "\n" for line in self._lines))
            part.replace(self._path)


def read_metrics(path: epath.Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last line cut off by a crash is left out."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


class Console:
    """What the user sees: a live bar on a terminal, plain lines elsewhere, nothing on processes other than 0."""

    def __init__(self) -> None:
        import rich.console

        self._quiet = jax.process_index() != 0
        self._console = rich.console.Console(quiet=self._quiet, highlight=False, emoji=False)
        self._bar: Any = None
        self._started: tuple[float, int] | None = None

    def say(self, text: str = "") -> None:
        """Prints a line, above the bar where there is one."""
        self._console.print(text, markup=False, soft_wrap=True)

    def step(self, step: int, num_steps: int, line: dict[str, float]) -> None:
        """Shows the metrics of a line: `step` of `num_steps` are done."""
        now = time.perf_counter()
        if self._started is None:
            self._started = (now - line["seconds"], step - int(line["steps"]))
        begin, first = self._started
        left = (now - begin) / max(step - first, 1) * (num_steps - step)
        shown = (
            f"loss {line['loss']:.4f}  accuracy {line['accuracy']:.1%}  {line['tokens_per_second']:,.0f} tokens/s"
            + (f"  MFU {line['mfu']:.1%}" if "mfu" in line else "")
            + f"  learning rate {line['learning_rate']:.2e}"
            + (f"  {line['skipped_steps']:.0f} STEPS SKIPPED (not finite)" if line["skipped_steps"] else "")
        )
        if not self._console.is_terminal:
            self.say(f"step {step}/{num_steps}  {shown}  left {_clock(left)}")
            return
        self._show_bar(step, num_steps, f"{shown}  left {_clock(left)}")

    def _show_bar(self, step: int, num_steps: int, text: str) -> None:
        import rich.progress

        if self._bar is None:
            columns = (
                rich.progress.TextColumn("step {task.completed}/{task.total}"),
                rich.progress.BarColumn(bar_width=24),
                rich.progress.TextColumn("{task.description}", markup=False),
            )
            self._bar = rich.progress.Progress(*columns, console=self._console, redirect_stdout=True)
            self._bar.add_task(text, total=num_steps)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=step, description=text)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
