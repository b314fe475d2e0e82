"""Curves of runs over steps or trained tokens, raw and smoothed, as panels; and their PNG.

In: `Run`s. Out: `Panel`s, which `svg.py` draws for the page and `plot` as a picture. No value is changed but by
`smoothed`; what cannot be shown is counted in a panel's notes.
"""

import io
import math
import statistics
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from etils import epath

from jaxsft.disk.pages import MAKER, write_page
from jaxsft.report.records import Run

Axis = Literal["step", "tokens"]
X_LABELS: dict[Axis, str] = {"step": "step", "tokens": "trained tokens"}

TITLES = {
    "loss": "Loss (nats per trained token)",
    "objective": "What is minimised in its place (nats per trained token)",
    "eval_loss": "Held-out loss (nats per trained token)",
    "grad_norm": "Gradient norm before clipping",
    "learning_rate": "Learning rate",
    "tokens_per_second": "Tokens per second",
    "trained_tokens_per_second": "Trained tokens per second",
    "memory_gib": "Peak memory so far (GiB)",
}
"""The panels, in their order."""
SMOOTHED = ("loss", "objective", "grad_norm", "tokens_per_second", "trained_tokens_per_second")
"""What is noisy from step to step; the others are shown as they are."""

COLOURS = ("#0072B2", "#D55E00", "#008A64", "#9C4A8B", "#7A6400", "#555B66")
"""On light ground: the hues of Okabe and Ito (2008), which colour-blind eyes tell apart, dark enough for thin lines."""
INK = "#222831"
DASHES = ((), (8, 5), (2, 2), (9, 3, 2, 3))
"""Dashes of the lines: they show a line that lies on another, and tell lines apart without their colours."""


class Curve(NamedTuple):
    """One run in one panel."""

    run: int
    """Its index in the report: colour and dash."""
    name: str
    x: tuple[float, ...]
    raw: tuple[float, ...]
    smooth: tuple[float, ...]
    """As `raw` where nothing is smoothed."""


class Panel(NamedTuple):
    """Curves of one metric, not empty."""

    key: str
    title: str
    by: Axis
    curves: tuple[Curve, ...]
    is_smoothed: bool
    is_log: bool
    notes: tuple[str, ...]


def smoothed(steps: Sequence[float], values: Sequence[float], window: float) -> list[float]:
    """Exponential moving mean over steps, without bias at the start, the same at every cadence.

    A point at step x_i stands for the steps since the one before, x_(i-1) < x <= x_i. Its weight is the integral of
    the kernel exp(-(x_n - x) / window) over them, so that at step x_n

        s_n = sum_i w_i y_i / sum_i w_i,   w_i = exp(-(x_n - x_i) / window) - exp(-(x_n - x_(i-1)) / window)

    and a run logged every 10 steps as means of 10 gets nearly the curve of one logged at each. The first point
    stands for as many steps as lie between two points, in the median.

    Example: window 1, points (1, 4) and (2, 2), the first standing for (0, 1]: weights at step 2 are e^-1 - e^-2 and
    1 - e^-1, so s = (4, (4 * 0.2325 + 2 * 0.6321) / 0.8647) = (4, 2.538).
    """
    if window <= 0 or len(steps) < 2:
        return list(values)
    gaps = [two - one for one, two in zip(steps, steps[1:], strict=False)]
    result = []
    total = weight = 0.0
    for gap, value in zip([statistics.median(gaps), *gaps], values, strict=True):
        keep = math.exp(-gap / window)
        total = total * keep + (1 - keep) * value
        weight = weight * keep + (1 - keep)
        result.append(total / weight if weight else value)
    return result


def default_window(runs: Sequence[Run]) -> int:
    """A fiftieth of the longest run, in steps; 0, which is none, where that is less than two lines."""
    last = max((run.lines[-1]["step"] for run in runs if run.lines), default=0)
    points = max((sum("loss" in line for line in run.lines) for run in runs), default=0)
    return round(last / 50) if points > 100 else 0


def tokens_at(run: Run) -> tuple[list[float], list[float]] | None:
    """Steps and trained tokens until then, from (0, 0); None where the run does not say."""
    pairs = [(line["step"], line["total_trained_tokens"]) for line in run.lines if "total_trained_tokens" in line]
    if not pairs:
        return None
    return [0.0, *(step for step, _ in pairs)], [0.0, *(tokens for _, tokens in pairs)]


def unaligned(runs: Sequence[Run]) -> tuple[str, ...]:
    """Names of runs that cannot be aligned by trained tokens."""
    return tuple(run.name for run in runs if tokens_at(run) is None)


def make_panels(runs: Sequence[Run], *, by: Axis, smooth: float, with_differences: bool = False) -> tuple[Panel, ...]:
    """The panels that any run has values for.

    Args:
        runs: in the order of their colours.
        by: what lies on the x axis; with "tokens", runs that do not count trained tokens are left out (`unaligned`).
        smooth: window in steps, 0 is none.
        with_differences: adds how far the losses lie from those of the first run.
    """
    panels = []
    for key, title in TITLES.items():
        found = [_curve(run, index, key, by, smooth if key in SMOOTHED else 0) for index, run in enumerate(runs)]
        curves = tuple(curve for curve, _ in found if curve is not None)
        if not curves:
            continue
        notes = tuple(f"{runs[i].name}: {left:,} points not finite" for i, (_, left) in enumerate(found) if left)
        panels.append(Panel(key, title, by, curves, smooth > 0 and key in SMOOTHED, False, notes))
        if key == "loss" and with_differences:
            apart = _differences(runs, by)
            if apart.curves:
                panels.append(apart)
            else:
                panels[-1] = panels[-1]._replace(notes=(*notes, *apart.notes))
    return tuple(panels)


def _curve(run: Run, index: int, key: str, by: Axis, smooth: float) -> tuple[Curve | None, int]:
    """The curve, and how many points are not finite and not in it."""
    points = [(line["step"], line[key]) for line in run.lines if key in line]
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    steps, values = [step for step, _ in finite], [value for _, value in finite]
    x = _x(run, steps, by)
    if not finite or x is None:
        return None, len(points) - len(finite)
    curve = Curve(index, run.name, tuple(x), tuple(values), tuple(smoothed(steps, values, smooth)))
    return curve, len(points) - len(finite)


def _x(run: Run, steps: Sequence[float], by: Axis) -> list[float] | None:
    if by == "step":
        return list(steps)
    found = tokens_at(run)
    return None if found is None else np.interp(steps, *found).tolist()


def _differences(runs: Sequence[Run], by: Axis) -> Panel:
    """|loss - loss of the first run| / loss of the first run, where both have the step; without curves if all are 0."""
    first = {line["step"]: line["loss"] for line in runs[0].lines if "loss" in line}
    curves, notes = [], []
    for index, run in enumerate(runs[1:], start=1):
        both = [(line["step"], line["loss"]) for line in run.lines if "loss" in line and first.get(line["step"])]
        apart = [(step, abs(loss - first[step]) / abs(first[step])) for step, loss in both]
        shown = [(step, value) for step, value in apart if math.isfinite(value) and value > 0]
        if equal := sum(value == 0 for _, value in apart):
            notes.append(f"{run.name}: equal in {equal:,} of {len(apart):,} steps")
        steps = [step for step, _ in shown]
        x = _x(run, steps, by)
        if shown and x is not None:
            values = tuple(value for _, value in shown)
            curves.append(Curve(index, run.name, tuple(x), values, values))
    title = f"Loss: relative difference from {runs[0].name}"
    return Panel("difference", title, by, tuple(curves), False, True, tuple(notes))


def plot(panels: Sequence[Panel], path: epath.Path, *, title: str) -> None:
    """Draws the panels, at least one, into a PNG, two in a row."""
    import matplotlib

    matplotlib.use("Agg")  # there may be no screen
    from matplotlib import pyplot

    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    names = {curve.run: curve.name for panel in panels for curve in panel.curves}
    head = 0.25 + 0.22 * -(-len(names) // 4)  # inches: the title, and four names on a line
    size = (5.6 * columns, 2.9 * rows + head)
    # The name of a run is text, and never a formula.
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 9, "text.color": INK, "axes.labelcolor": INK}):
        figure, grid = pyplot.subplots(rows, columns, figsize=size, squeeze=False)
        for axes, panel in zip(grid.flat, panels, strict=False):
            _plot_panel(axes, panel)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_visible(False)
        handles = [pyplot.Line2D([], [], label=" " + names[run], **_style(run)) for run in sorted(names)]
        place = (0.01, 1 - 0.32 / size[1])
        figure.legend(handles=handles, loc="upper left", bbox_to_anchor=place, ncols=4, frameon=False)
        figure.suptitle(title, x=0.015, y=1 - 0.1 / size[1], ha="left", va="top", fontsize=11, fontweight="bold")
        figure.tight_layout(rect=(0, 0, 1, 1 - head / size[1]))
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=130, format="png", facecolor="white", metadata={"Software": MAKER})
        pyplot.close(figure)
    write_page(path, drawn.getvalue())


def _plot_panel(axes: Any, panel: Panel) -> None:
    for curve in panel.curves:
        _plot_curve(axes, curve, panel)
    axes.set_title(panel.title, loc="left", fontsize=10)
    axes.set_xlabel(X_LABELS[panel.by])
    if panel.is_log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-"))
        axes.yaxis.set_minor_formatter(lambda value, _: "")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if panel.notes:
        axes.text(0.99, 0.97, "\n".join(panel.notes), transform=axes.transAxes, ha="right", va="top", size=7.5)


def _plot_curve(axes: Any, curve: Curve, panel: Panel) -> None:
    style = _style(curve.run)
    if panel.is_smoothed:
        axes.plot(curve.x, curve.raw, color=style["color"], alpha=0.25, linewidth=0.8)
    marker = "o" if len(curve.x) == 1 or panel.key == "eval_loss" else ""
    if panel.is_log:
        style |= {"linestyle": "solid", "linewidth": 0.9}
    axes.plot(curve.x, curve.smooth, marker=marker, markersize=3, **style)


def _style(run: int) -> dict[str, Any]:
    """The first line is broad, so that one that lies on it does not hide it."""
    dash = DASHES[run % len(DASHES)]
    style = (0, dash) if dash else "solid"
    return {"color": COLOURS[run % len(COLOURS)], "linewidth": 1.5 if run else 2.4, "linestyle": style}
