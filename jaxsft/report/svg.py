"""A panel as inline SVG: raw faint and smoothed strong, axes with round numbers, colours by CSS.

In: a `Panel`. Out: markup whose classes `page.css` colours; it needs no script and no style attribute.
"""

import html
import math
from collections.abc import Sequence

from jaxsft.preview.pieces import visible
from jaxsft.report.curves import COLOURS, DASHES, X_LABELS, Curve, Panel

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 56, 10, 8, 40
MAX_POINTS = 2 * (WIDTH - LEFT - RIGHT)
"""Points of a line beyond which it is thinned: more than the eye can tell apart."""


def draw(panel: Panel) -> str:
    """The panel; what lies above a spike-proof top is counted in a note."""
    x_low, x_high = _range([x for curve in panel.curves for x in curve.x], from_zero=True)
    values = [y for curve in panel.curves for y in (*curve.raw, *curve.smooth)]
    y_low, y_high, above = (*_range(list(map(math.log10, values))), 0) if panel.is_log else _bounds(panel, values)
    parts = [_grid(panel, (x_low, x_high), (y_low, y_high))]
    for curve in panel.curves:
        place = _Place(x_low, x_high, y_low, y_high, panel.is_log)
        name = html.escape(visible(curve.name), quote=True)
        parts.append(f'<g class="run-{curve.run % len(COLOURS)}"><title>{name}</title>')
        if panel.is_smoothed:
            parts.append(f'<path class="raw" d="{_path(curve.x, curve.raw, place)}"/>')
        line = 'class="line thin"' if panel.is_log else _line(curve.run)
        parts.append(f'<path {line} d="{_path(curve.x, curve.smooth, place)}"/>')
        if panel.key == "eval_loss" or len(curve.x) == 1:
            parts.append(_dots(curve, place))
        parts.append("</g>")
    label = html.escape(visible(f"{panel.title} by {X_LABELS[panel.by]}"), quote=True)
    notes = [*panel.notes, *([f"{above:,} points lie above"] if above else [])]
    said = f'<p class="hint">{html.escape(visible("; ".join(notes)))}</p>' if notes else ""
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return f"{svg}{said}"


def swatch(run: int) -> str:
    """The line of a run, for a legend."""
    line = f'<path {_line(run)} d="M1 6H27"/>'
    return f'<svg class="swatch run-{run % len(COLOURS)}" viewBox="0 0 28 12" aria-hidden="true">{line}</svg>'


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers within [low, high], at most `most` of them, a step of 1, 2 or 5 times a power of ten apart.

    Example: ticks(0, 23, 6) is [0, 5, 10, 15, 20].
    """
    power = 10.0 ** (math.floor(math.log10((high - low) / most)) - 1)
    for factor in (1, 2, 5, 10, 20, 50, 100, 200):
        step = factor * power
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            break
    return [index * step for index in range(first, last + 1)]


def tick_text(value: float, step: float) -> str:
    """A tick in as few characters as tell it from the next: 20k, 1.5M, 0.05, 2e-5."""
    if value == 0:
        return "0"
    size = max(abs(value), step)
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit and (step >= unit / 100 or size >= 10 * unit):
            return _short(value / unit, step / unit) + letter
    if size < 1e-3:
        power = math.floor(math.log10(abs(value)) + 1e-9)
        return f"{_short(value / 10**power, step / 10**power)}e{power}"
    return f"{value:,.{_decimals(step)}f}"


class _Place:
    """Values to places in the picture."""

    def __init__(self, x_low: float, x_high: float, y_low: float, y_high: float, is_log: bool) -> None:
        self._x, self._y, self._is_log = (x_low, x_high), (y_low, y_high), is_log

    def x(self, value: float) -> float:
        low, high = self._x
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self._y
        share = ((math.log10(value) if self._is_log else value) - low) / (high - low)
        # A value far above the top is drawn at one and a half heights: its line leaves the picture all the same.
        return HEIGHT - BOTTOM - min(share, 1.5) * (HEIGHT - TOP - BOTTOM)


def _range(values: Sequence[float], from_zero: bool = False) -> tuple[float, float]:
    low, high = min(values), max(values)
    if from_zero and 0 < low < 0.3 * high:
        low = 0.0
    if high - low <= 1e-12 * max(abs(high), abs(low)):
        low, high = low - (abs(low) or 1.0) * 0.05, high + (abs(high) or 1.0) * 0.05
    return low, high


def _bounds(panel: Panel, values: Sequence[float]) -> tuple[float, float, int]:
    """The y range with some air, and how many points lie above: rare spikes do not flatten all the rest."""
    low, high = _range(values, from_zero=panel.key not in ("loss", "eval_loss"))
    usual = sorted(values)[int(0.99 * (len(values) - 1))]
    top = max(usual, max(y for curve in panel.curves for y in curve.smooth)) if panel.is_smoothed else usual
    above = 0
    if high - low > 3 * (top - low) > 0:
        high = low + 1.3 * (top - low)
        above = sum(y > high for curve in panel.curves for y in curve.raw)
    air = 0.04 * (high - low)
    return (low if low == 0 else low - air), high + air, above


def _grid(panel: Panel, x: tuple[float, float], y: tuple[float, float]) -> str:
    place = _Place(*x, *y, False)
    parts = []
    for value, text in _log_marks(*y) if panel.is_log else _marks(*y):
        at = place.y(value)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="end" x="{LEFT - 6}" y="{at + 4:.1f}">{text}</text>')
    for value, text in _marks(*x):
        at = min(place.x(value), WIDTH - RIGHT - 3.5 * len(text))  # the last would run over the edge
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 17}">{text}</text>')
    parts.append(
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text class="end" x="{WIDTH - RIGHT}" y="{HEIGHT - 5}">{X_LABELS[panel.by]}</text>'
    )
    return "".join(parts)


def _marks(low: float, high: float) -> list[tuple[float, str]]:
    found = ticks(low, high, 6)
    step = found[1] - found[0] if len(found) > 1 else high - low
    return [(value, tick_text(value, step)) for value in found]


def _log_marks(low: float, high: float) -> list[tuple[float, str]]:
    """Powers of ten, given as logarithms; where the range holds fewer than two, values between them."""
    every = max(1, math.ceil((high - low) / 6))
    powers = [float(power) for power in range(math.ceil(low), math.floor(high) + 1) if power % every == 0]
    return (
        [(value, f"{10**value:.1e}") for value in ticks(low, high, 4)]
        if len(powers) < 2
        else [(power, f"1e{power:.0f}") for power in powers]
    )


def _path(x: Sequence[float], y: Sequence[float], place: _Place) -> str:
    points = _thinned([(place.x(one), place.y(two)) for one, two in zip(x, y, strict=True)])
    return "M" + "L".join(f"{one:.1f} {two:.1f}" for one, two in points)


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """The first, lowest, highest and last point of a long line in each column of pixels, so that spikes stay."""
    if len(points) <= MAX_POINTS:
        return points
    columns: dict[int, list[tuple[float, float]]] = {}
    for point in points:
        columns.setdefault(int(point[0]), []).append(point)
    kept = []
    for column in columns.values():
        heights = [height for _, height in column]
        chosen = {0, heights.index(min(heights)), heights.index(max(heights)), len(column) - 1}
        kept += [column[index] for index in sorted(chosen)]
    return kept


def _line(run: int) -> str:
    """The attributes of a run's line; the first is broad, so that one that lies on it does not hide it."""
    dash = DASHES[run % len(DASHES)]
    return ('class="line"' if run else 'class="line broad"') + (
        f' stroke-dasharray="{" ".join(map(str, dash))}"' * bool(dash)
    )


def _dots(curve: Curve, place: _Place) -> str:
    places = [(place.x(one), place.y(two)) for one, two in zip(curve.x, curve.smooth, strict=True)]
    return "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in places) if len(places) < 60 else ""


def _short(value: float, step: float) -> str:
    text = f"{value:.{_decimals(step)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _decimals(step: float) -> int:
    """Digits after the point that a multiple of `step` needs."""
    return max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 0
