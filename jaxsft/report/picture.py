"""The picture of one run: `loss.png` beside its `metrics.jsonl`.

In: a run folder. Out: its picture, in the place of an earlier one of ours.
"""

import io
from collections.abc import Callable
from typing import Any

from etils import epath

from jaxsft.config import ConfigError
from jaxsft.disk.pages import MAKER, write_page
from jaxsft.disk.writing import set_aside
from jaxsft.training.metrics_file import read_metrics

PICTURE = "loss.png"
INK, TRAINED, HELD_OUT, RIGHT = "#333333", "#4878a8", "#c44e52", "#4c9a5b"


def plot_run(folder: epath.Path, *, say: Callable[[str], None] = lambda text: None) -> epath.Path:
    """Draws `loss.png` of a run folder: training and held-out loss by step and, where measured, exact match.

    Args:
        folder: of the run.
        say: is told where another picture of this name went.

    Raises:
        WriteError: it cannot be written.
    """
    # Without pyplot, which would want a screen, or change what draws a notebook's own pictures.
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    lines = read_metrics(folder / "metrics.jsonl")
    matches = _series(lines, "eval_exact_match")
    figure = Figure(figsize=(7, 5.4 if matches[0] else 3.6))
    axes = figure.subplots(2 if matches[0] else 1, 1, sharex=True, squeeze=False)
    loss = axes[0, 0]
    loss.plot(*_series(lines, "loss"), color=TRAINED, linewidth=1.2, label="training")
    held_out = _series(lines, "eval_loss")
    if held_out[0]:
        loss.plot(*held_out, color=HELD_OUT, marker="o", markersize=4, label="held-out")
    for name in dict.fromkeys(key.removeprefix("eval_loss/") for line in lines for key in line if "eval_loss/" in key):
        points = _series(lines, f"eval_loss/{name}")
        loss.plot(*points, marker=".", markersize=4, linewidth=0.8, alpha=0.8, label=f"held-out: {name}")
    loss.set_ylabel("loss (nats per trained token)")
    loss.set_ylim(bottom=0)
    loss.legend(frameon=False)
    if matches[0]:
        match = axes[1, 0]
        match.plot(*matches, color=RIGHT, marker="o", markersize=4)
        match.set_ylabel("held-out exact match")
        match.set_ylim(0, 1.02)
        match.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes[-1, 0].set_xlabel("step")
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=INK)
    figure.suptitle(folder.name, color=INK)
    figure.tight_layout()
    path = folder / PICTURE
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120, format="png", metadata={"Software": MAKER})
    try:
        write_page(path, drawn.getvalue())
    except ConfigError:  # A damaged picture must not be the reason for which a run fails at its end.
        say(f"{path} is not a picture of ours: renamed to {set_aside(path).name}")
        write_page(path, drawn.getvalue())
    return path


def _series(lines: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the lines that have `key`."""
    points = [(line["step"], line[key]) for line in lines if key in line]
    return [step for step, _ in points], [value for _, value in points]
