"""A plan as one HTML page that needs nothing from elsewhere; readable in light and dark, on a phone and on paper.

In: the `Plan`s. Out: the page: one plan in full, or several as a table. What the preview's page looks like, this does,
too (`preview/page.css`). Every text is escaped.
"""

import os
from collections.abc import Iterable, Sequence
from importlib import resources

from etils import epath

from jaxsft.disk.pages import write_page
from jaxsft.plan.make import Plan, messages_by_kind
from jaxsft.preview.document import document, escape

GIB = 2**30
WORDS = {
    "parameters": "trained, as stored",
    "frozen": "not trained",
    "optimizer": "moments",
    "gradients": "and sums of them",
    "activations": "kept for the backward pass",
    "one layer": "computed again, and its gradients",
    "loss": "logits of a chunk",
}


def write_html(plans: Sequence[Plan], path: str | os.PathLike[str], *, command: str) -> None:
    """Writes the page of one plan, or of several.

    Raises:
        ConfigError: a page of this name is there that is not ours.
        WriteError: it cannot be written.
    """
    write_page(epath.Path(path), make_html(plans, command=command))


def make_html(plans: Sequence[Plan], *, command: str) -> str:
    """The page; `command` is how it was made."""
    sheets = (resources.files(f"jaxsft.{room}") / "page.css" for room in ("preview", "plan"))
    style = "".join(sheet.read_text(encoding="utf-8") for sheet in sheets)
    title = f"{plans[0].model} on {_topology(plans[0])}"
    body = _one(plans[0]) if len(plans) == 1 else _several(plans)
    content = f"""<header><h1>{escape(title)}</h1>
<p>What a run will need, before it is paid for. Times are bounds, not forecasts: no program that does this work on these
chips is faster.</p></header>
{body}
<footer>Made by jaxsft with <code>{escape(command)}</code>.</footer>"""
    return document(title, "plan", content, style=style)


def _one(plan: Plan) -> str:
    return "".join([_tiles(plan), _memory(plan), _time(plan), _flops(plan), _messages(plan), _facts(plan)])


def _tiles(plan: Plan) -> str:
    room = plan.room_bytes
    fits = "nothing is known of this processor's memory"
    if room is not None:
        fits = f"fits, {_gib(room)} to spare" if room >= 0 else f"does not fit: {_gib(-room)} too much"
    rate, hours = plan.tokens_per_second, plan.hours
    each = None if rate is None else rate / plan.topology.num_chips
    tiles = [
        ("Memory of a device", _gib(plan.peak_bytes), fits),
        ("A step takes at least", _seconds(plan.bound and plan.bound.seconds), plan.bound and f"by {plan.bound.by}"),
        ("At most", "–" if each is None else f"{each:,.0f}", "tokens/s a chip, if every token is trained"),
        (
            "The run",
            "–" if hours is None else f"{hours:,.2f} h",
            "" if hours is None else f"at least; {hours * plan.topology.num_chips:,.1f} chip-hours",
        ),
    ]
    return _tiles_of(tiles)


def _tiles_of(tiles: Iterable[tuple[str, str, str | None]]) -> str:
    made = "".join(
        f'<div class="tile"><b>{escape(label)}</b><strong>{escape(value)}</strong>'
        f"<span>{escape(note or '')}</span></div>"
        for label, value, note in tiles
    )
    return f'<section class="tiles">{made}</section>'


def _memory(plan: Plan) -> str:
    """What a device holds, as bars against what it has."""
    most = max(plan.counted.peak, plan.peak_bytes, plan.capacity_bytes or 0)
    rows = [
        _bar(term.name, WORDS[term.name], term.num_bytes, most, _gib(term.num_bytes))
        for term in plan.counted.terms
        if term.num_bytes
    ]
    rows.append(_bar("at once, counted", "less than all together", plan.counted.peak, most, _gib(plan.counted.peak)))
    if plan.compiled is not None:
        peak = plan.compiled.peak_bytes
        rows.append(_bar("at once, compiled", "by the chips' compiler", peak, most, _gib(peak)))
    if plan.capacity_bytes is not None:
        rows.append(_bar("there", "on a device", plan.capacity_bytes, most, _gib(plan.capacity_bytes)))
    largest = plan.counted.largest
    notes = f"Most are {largest.name}; fewer with {largest.lowered_by}."
    if plan.missing is not None:
        notes += f" Not compiled: pip install {plan.missing}."
    return _card(
        "Memory of one device", f'<table class="bars">{"".join(rows)}</table><p class="hint">{escape(notes)}</p>'
    )


def _time(plan: Plan) -> str:
    bound, chip = plan.bound, plan.topology.chip
    if bound is None or chip is None:
        return _card("Time of a step", '<p class="none">No bound: nothing is known of this processor.</p>')
    rates = {
        "compute": f"{chip.flops / 1e12:,.0f} TFLOP/s a chip",
        "memory": f"{chip.memory_rate / 1e9:,.0f} GB/s a chip",
        "links": f"{chip.link_rate / 1e9:,.0f} GB/s into a chip",
    }
    rows = [
        _bar(name, rate, getattr(bound, name), bound.seconds, _seconds(getattr(bound, name)))
        for name, rate in rates.items()
    ]
    notes = f"The three may go on at once; the longest is the bound. MFU bound {plan.mfu:.1%}. Rates: {chip.source}."
    return _card(
        "Time of a step, at least", f'<table class="bars">{"".join(rows)}</table><p class="hint">{escape(notes)}</p>'
    )


def _flops(plan: Plan) -> str:
    flops = plan.flops
    parts = {name: getattr(flops, name) for name in ("maps", "attention", "experts", "loss")}
    rows = [_bar(name, "", value, flops.all, f"{value / 1e12:,.1f} T") for name, value in parts.items() if value]
    if flops.again:
        rows.append(
            _bar("of these again", "for the backward pass", flops.again, flops.all, f"{flops.again / 1e12:,.1f} T")
        )
    return _card("FLOPs of a step, all chips", f'<table class="bars">{"".join(rows)}</table>')


def _messages(plan: Plan) -> str:
    if not plan.collectives:
        return ""
    rows = "".join(
        f"<tr><td>{escape(kind)}</td><td>{escape(', '.join(axes) or 'one device')}</td><td>{number:,}</td>"
        f"<td>{_gib(num_bytes)}</td></tr>"
        for kind, axes, number, num_bytes in messages_by_kind(plan.collectives)
    )
    source = "in the compiled program" if plan.compiled is not None else "expected; no compiler was asked"
    head = "<thead><tr><th>kind</th><th>along</th><th>a step</th><th>bytes</th></tr></thead>"
    return _card(f"Messages of one device, {source}", _table(head + f"<tbody>{rows}</tbody>"))


def _facts(plan: Plan) -> str:
    facts = {
        "trained parameters": f"{plan.num_trained:,}",
        "frozen parameters": f"{plan.num_frozen:,}",
        "mesh": _mesh(plan),
        "rows of a step": f"{plan.rows:,} of {plan.seq_len:,} tokens, {plan.microbatch_rows:,} at once",
        "remat": plan.remat,
        "steps": "–" if plan.num_steps is None else f"{plan.num_steps:,}",
        "a checkpoint": f"{plan.checkpoint_bytes / 1e9:,.1f} GB",
        "the export": f"{plan.export_bytes / 1e9:,.1f} GB",
    }
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.items())
    return _card("The run", f'<table class="facts">{rows}</table>')


def _several(plans: Sequence[Plan]) -> str:
    """The plans of `--suggest`, best first."""
    rows = "".join(
        f"<tr><td>{escape(_mesh(plan))}</td><td>{plan.remat}</td><td>{plan.microbatch_rows:,}</td>"
        f"<td>{_gib(plan.peak_bytes)}</td><td>{_seconds(plan.bound and plan.bound.seconds)}</td>"
        f"<td>{plan.tokens_per_second or 0:,.0f}</td><td>{plan.bound.by if plan.bound else ''}</td></tr>"
        for plan in plans
    )
    heads = ("mesh", "remat", "rows at once", "memory", "a step", "tokens/s", "bound by")
    head = "".join(f"<th>{name}</th>" for name in heads)
    hint = '<p class="hint">Counted, at most, if every token is trained; plan one of them to have it compiled.</p>'
    return _card("Ways that fit, best first", _table(f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>") + hint)


def _bar(name: str, note: str, value: float, most: float, text: str) -> str:
    # The widths are attributes, as the page's policy allows no style of an element.
    width = 0.0 if not most else 100 * value / most
    drawn = (
        f'<svg viewBox="0 0 100 8" preserveAspectRatio="none"><rect class="bar" width="{width:.2f}" height="8"/></svg>'
    )
    about = f"<br><small>{escape(note)}</small>" if note else ""
    return f"<tr><th>{escape(name)}{about}</th><td>{drawn}</td><td>{escape(text)}</td></tr>"


def _card(title: str, content: str) -> str:
    return f'<section class="card"><h2>{escape(title)}</h2>{content}</section>'


def _table(content: str) -> str:
    return f'<div class="scroll-x"><table class="numbers">{content}</table></div>'


def _topology(plan: Plan) -> str:
    slices = f" x {plan.topology.num_slices} slices" if plan.topology.num_slices > 1 else ""
    return f"{plan.topology.name}{slices}"


def _mesh(plan: Plan) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:,.2f} GiB"


def _seconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds:.3g} s"
