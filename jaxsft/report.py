"""What a run says about itself: the arithmetic before its first step, and pictures from its `metrics.jsonl`."""

import math
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from jaxsft.config import Config
from jaxsft.data.loader import Loader
from jaxsft.metrics import read_metrics
from jaxsft.step import TrainState

INK, TRAINED, HELD_OUT, RIGHT = "#333333", "#4878a8", "#c44e52", "#4c9a5b"


def start_summary(
    config: Config,
    state: TrainState,
    loader: Loader,
    report: dict[str, Any],
    mesh: Mesh,
    *,
    num_steps: int,
    max_position: int,
) -> str:
    """What the user should know before the first step, with the arithmetic behind it."""
    rows, seq_len = loader.shape
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    state_bytes = sum(_shard_bytes(leaf) for leaf in jax.tree.leaves(state))
    gradient_bytes = sum(_shard_bytes(leaf) // leaf.dtype.itemsize * 4 for leaf in jax.tree.leaves(state.params))
    processes = f"{jax.process_count()} process{'es' * (jax.process_count() > 1)}"
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "1 device"
    fill = report["tokens"] / (loader.num_rows * seq_len)
    dropped = (
        f"{report['overlong_examples']:,} of more than {seq_len:,} tokens dropped "
        f"({report['overlong_tokens']:,} tokens; the longest, {report['longest']['tokens']:,}, at "
        f"{report['longest']['origin']})"
        if report["overlong_examples"]
        else "none dropped"
    )
    lines = [
        (
            "model",
            f"{config.model.path}: {num_params:,} {config.model.weights} parameters in {config.model.param_dtype}",
        ),
        ("rows", f"{config.data.train}: {report['rows']:,}, format {report['format']} ({report['format_reason']})"),
        ("examples", f"{report['examples']:,} kept, {dropped}"),
        (
            "tokens",
            f"{report['tokens']:,}, of which {report['trained_tokens']:,} are trained "
            f"({report['trained_tokens'] / report['tokens']:.1%})",
        ),
        (
            "packing",
            f"{loader.num_rows:,} rows of {seq_len:,} tokens, {fill:.1%} full"
            + ("" if config.data.packing else " (data.packing is off)"),
        ),
        (
            "steps",
            f"{num_steps:,} of {rows} rows ({rows * seq_len:,} tokens); {loader.steps_per_epoch:,} make an epoch, "
            f"{num_steps / loader.steps_per_epoch:.4g} epochs",
        ),
        (
            "devices",
            f"{jax.device_count()} x {jax.devices()[0].device_kind}, mesh {axes}, {processes}",
        ),
        (
            "memory",
            f"{state_bytes / 2**20:,.0f} MiB of parameters and optimizer state, {gradient_bytes / 2**20:,.0f} MiB of "
            "gradients per device, activations besides",
        ),
    ]
    if report["columns_ignored"]:
        lines.insert(2, ("ignored", f"columns {', '.join(report['columns_ignored'])}"))
    longest = min(report["longest"]["tokens"], seq_len)
    if longest > max_position:
        lines.append(("WARNING", f"examples of up to {longest:,} tokens, but the model was made for {max_position:,}"))
    if int(state.step):
        lines.append(("continuing", f"from step {int(state.step):,}"))
    return "\n".join(f"{name:<11}{text}" for name, text in lines)


def _shard_bytes(leaf: jax.Array) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def plot_run(folder: epath.Path) -> epath.Path:
    """Draws `loss.png` of a run folder: training and held-out loss by step and, where measured, exact match."""
    import matplotlib

    matplotlib.use("Agg")  # there may be no screen
    from matplotlib import pyplot

    lines = read_metrics(folder / "metrics.jsonl")
    matches = _series(lines, "eval_exact_match")
    figure, axes = pyplot.subplots(
        2 if matches[0] else 1, 1, figsize=(7, 5.4 if matches[0] else 3.6), sharex=True, squeeze=False
    )
    loss = axes[0, 0]
    loss.plot(*_series(lines, "loss"), color=TRAINED, linewidth=1.2, label="training")
    held_out = _series(lines, "eval_loss")
    if held_out[0]:
        loss.plot(*held_out, color=HELD_OUT, marker="o", markersize=4, label="held-out")
    loss.set_ylabel("loss (nats per trained token)")
    loss.set_ylim(bottom=0)
    loss.legend(frameon=False)
    if matches[0]:
        match = axes[1, 0]
        match.plot(*matches, color=RIGHT, marker="o", markersize=4)
        match.set_ylabel("held-out exact match")
        match.set_ylim(0, 1.02)
        match.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(xmax=1))
    axes[-1, 0].set_xlabel("step")
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=INK)
    figure.suptitle(folder.name, color=INK)
    figure.tight_layout()
    path = folder / "loss.png"
    with path.open("wb") as file:
        figure.savefig(file, dpi=120, format="png")
    pyplot.close(figure)
    return path


def _series(lines: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the lines that have `key`."""
    points = [(line["step"], line[key]) for line in lines if key in line]
    return [step for step, _ in points], [value for _, value in points]
