"""A report as one HTML page that needs nothing from elsewhere, as JSON, and as a picture of its curves.

In: the `Report`. Out: a folder with `report.html`, `report.json` and `curves.png`. The page is whole without its
script, which only switches between curves that stand in it. Every text is escaped here. The preview's page is its
sister: what they share (colours, cards, tables, buttons) is in `preview/page.css`.
"""

import json
import pathlib
from collections.abc import Sequence
from importlib import resources

from etils import epath

from jaxsft.disk.pages import make_folder, refuse_other_pages, write_page
from jaxsft.preview.document import document, escape
from jaxsft.report.curves import Axis, default_window, make_panels, plot, unaligned
from jaxsft.report.records import Report, as_json
from jaxsft.report.sections import (
    card,
    caveats_card,
    checks_card,
    differences_card,
    differing,
    facts_card,
    figures_card,
    settings_card,
)
from jaxsft.report.svg import draw, swatch

FILES = ("report.html", "report.json", "curves.png")
"""What a report is made of."""


def write_report(
    report: Report, folder: pathlib.Path | epath.Path, *, by: Axis = "step", smooth: float | None = None
) -> epath.Path:
    """Writes the page, its JSON and the picture; returns the path of the page.

    Args:
        report: what to show.
        folder: made where it is not there; what else is in it stays.
        by: how the picture's curves are aligned, and the page's at first.
        smooth: window of the smoothing in steps, 0 is none; None takes a fiftieth of the run where lines are many.

    Raises:
        ConfigError: a file of such a name is there that is not ours.
        WriteError: one cannot be written.
    """
    place = epath.Path(folder)
    refuse_other_pages(place / name for name in FILES)
    make_folder(place)
    window = default_window(report.runs) if smooth is None else smooth
    text = json.dumps(as_json(report), ensure_ascii=False, allow_nan=False)
    write_page(place / "report.json", text + "\n")
    panels = make_panels(report.runs, by=by, smooth=window, with_differences=report.passed is not None)
    if panels:
        plot(panels, place / "curves.png", title=report.title)
    write_page(place / "report.html", make_html(report, by=by, smooth=window))
    return place / "report.html"


def make_html(report: Report, *, by: Axis = "step", smooth: float = 0) -> str:
    """The page; every text that is not ours is escaped."""
    shared = resources.files("jaxsft.preview") / "page.css"
    own = resources.files("jaxsft.report")
    style = shared.read_text(encoding="utf-8") + (own / "page.css").read_text(encoding="utf-8")
    script = (own / "page.js").read_text(encoding="utf-8")
    figures, settings = figures_card(report.runs), settings_card(report.runs)
    is_short = len(report.runs) <= 2 and 0 < len(differing(report.runs)) <= 12
    sections = [
        _verdict(report),
        checks_card(report.checks),
        f'<div class="report">{figures}{settings}</div>' if is_short else figures,
        _curves(report, by, smooth),
        differences_card(report),
        "" if is_short else settings,
        caveats_card(report.runs),
        facts_card(report),
    ]
    body = f"""<header><h1>{escape(report.title)}</h1></header>
{"".join(sections)}
<footer>Made by jaxsft with <code>{escape(report.command)}</code>. The same for machines: report.json.</footer>"""
    attributes = f'data-by="{by}" data-curves="{"smoothed" if smooth else "raw"}"'
    return document(report.title, "report", body, style=style, script=script, attributes=attributes)


def _verdict(report: Report) -> str:
    kind, word = {True: ("pass", "Passed"), False: ("fail", "Differs"), None: ("plain", "Overlay")}[report.passed]
    return f'<section class="verdict {kind}"><b>{word}</b><p>{escape(report.verdict)}</p></section>'


def _curves(report: Report, by: Axis, smooth: float) -> str:
    """Each panel by step and by trained tokens, smoothed and raw; the style sheet shows one of the four.

    Nothing where no run was made, as in a comparison of 0 steps.
    """
    if not report.runs:
        return ""
    views = []
    lacking = unaligned(report.runs)
    axes: list[Axis] = ["step"] if len(lacking) == len(report.runs) else ["step", "tokens"]
    for axis in axes:
        for window, name in ((smooth, "smoothed"), (0.0, "raw"))[not smooth :]:
            panels = make_panels(report.runs, by=axis, smooth=window, with_differences=report.passed is not None)
            drawn = "".join(
                f"<figure><figcaption>{escape(panel.title)}</figcaption>{draw(panel)}</figure>" for panel in panels
            )
            if panels:
                views.append(f'<div class="panels view {axis} {name}">{drawn}</div>')
    if not views:
        return card("Curves", '<p class="none">No run has a line with values.</p>')
    legend = "".join(f"<span>{swatch(index)} {escape(run.name)}</span>" for index, run in enumerate(report.runs))
    notes = []
    if smooth:
        notes.append(
            f"Smoothed: exponential mean over {smooth:,.0f} steps, without bias at the start and the same at every "
            "cadence of logging; raw values stand faintly behind."
        )
    if lacking:
        which = "no run" if len(axes) == 1 else ", ".join(lacking)
        verb = "counts" if len(axes) == 1 else "counts no" if len(lacking) == 1 else "count no"
        notes.append(f"By trained tokens: {which} {verb} trained tokens, so cannot be aligned so.")
    buttons = _buttons("by", [(axis, {"step": "by step", "tokens": "by trained tokens"}[axis]) for axis in axes], by)
    if smooth:
        buttons += _buttons("curves", [("smoothed", "smoothed"), ("raw", "raw")], "smoothed")
    return card(
        "Curves",
        f'<div class="controls" hidden>{buttons}</div><p class="legend">{legend}</p>{"".join(views)}'
        f'<p class="hint">{escape(" ".join(notes))}</p>',
    )


def _buttons(name: str, choices: Sequence[tuple[str, str]], chosen: str) -> str:
    if len(choices) < 2:
        return ""
    made = "".join(
        f'<button type="button" data-name="{name}" data-value="{value}" aria-pressed="{str(value == chosen).lower()}">'
        f"{text}</button>"
        for value, text in choices
    )
    return f'<div class="views" role="group">{made}</div>'
