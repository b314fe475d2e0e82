"""The preview as one HTML page that needs nothing from elsewhere; readable in light and dark.

In: the `Preview`. Out: the page. The report stands in it as HTML; the examples as the JSON of `records.as_json`, from
which `page.js` shows one at a time. Every text of the data is escaped here, and a text node there.
"""

import json
import os
from collections.abc import Iterable
from importlib import resources
from typing import Any

from etils import epath

from jaxsft.disk.pages import write_page
from jaxsft.preview.document import document, escape
from jaxsft.preview.pieces import visible
from jaxsft.preview.records import Loss, Preview, as_json
from jaxsft.preview.reports import Fact, facts, headline, row_heading, source_facts


def write_html(preview: Preview, path: str | os.PathLike[str]) -> None:
    """Writes the page; `path` may be gs:// and the like.

    Raises:
        ConfigError: a page of this name is there that is not ours.
        WriteError: it cannot be written.
    """
    write_page(epath.Path(path), make_html(preview))


def make_html(preview: Preview) -> str:
    """The page; every text of the data is escaped."""
    files = resources.files("jaxsft.preview")
    style, script = ((files / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    tiles = "".join(
        f'<div class="tile"><b>{escape(fact.label)}</b><strong>{escape(fact.value)}</strong>'
        f"<span>{escape(fact.note)}</span></div>"
        for fact in headline(preview)
    )
    body = f"""<header><h1>{escape(preview.title)}</h1>
<p>What this run will train{", from the first window of its stream" * preview.stream}. Weights were traced back from the
batches that the devices get.</p></header>
<section class="tiles">{tiles}</section>
{_notes(preview)}
<section class="card viewer" id="viewer"><noscript>Examples are shown by a script of this page; it is switched off.
</noscript></section>
<section class="report">
<div class="card"><h2>Tokens per example</h2>{_histogram(preview)}
<h2>Steps</h2>{_facts(facts(preview))}</div>
<div class="card"><h2>Left out</h2>{_losses(preview)}{_counts(preview)}</div>
{_sources(preview)}
</section>
<footer>Made by jaxsft. The same as JSON: <code>preview --json</code>.</footer>
<script type="application/json" id="data">{_embedded(preview)}</script>"""
    return document(preview.title, "preview", body, style=style, script=script)


def _embedded(preview: Preview) -> str:
    """What the script needs, as JSON in which nothing ends the element or acts."""
    data = as_json(preview)
    headings = [row_heading(preview, index) for index in range(len(preview.rows))]
    paths = [source["path"] for source in data["sources"]]
    kept = {name: data[name] for name in ("writers", "examples", "rows")} | {"headings": headings, "sources": paths}
    text = json.dumps(_visible(kept), ensure_ascii=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _visible(value: Any) -> Any:
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {name: _visible(each) for name, each in value.items()}
    return [_visible(each) for each in value] if isinstance(value, list) else value


def _notes(preview: Preview) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in preview.notes)
    return f'<section class="notes"><b>To know</b><ul>{items}</ul></section>' if items else ""


def _facts(found: Iterable[Fact]) -> str:
    rows = "".join(
        f"<tr><th>{escape(fact.label)}</th><td>{escape(fact.value)} <small>{escape(fact.note)}</small></td></tr>"
        for fact in found
    )
    return f'<table class="facts">{rows}</table>'


def _sources(preview: Preview) -> str:
    several = len(preview.sources) > 1
    cards = []
    for number, source in enumerate(preview.sources, start=1):
        name = f"Source {number}" if several else "Source"
        table = _facts(source_facts(source, is_one_of_several=several))
        width = "" if several else " wide"
        cards.append(f'<div class="card{width}"><h2>{name} <small>{escape(source.path)}</small></h2>{table}</div>')
    return "".join(cards)


def _losses(preview: Preview) -> str:
    if not preview.losses:
        return '<p class="none">Nothing was left out.</p>'
    return (
        '<table class="losses"><thead><tr><th>what and why</th><th>number</th><th>tokens</th></tr></thead>'
        f"{''.join(map(_loss, preview.losses))}</table>"
    )


def _loss(loss: Loss) -> str:
    unit = ("row" if loss.kind == "bad" else "example") + "s" * (loss.amount != 1)
    tokens = "–" if loss.tokens is None else f"{loss.tokens:,}"
    return (
        f'<tr><td><b class="kind">{loss.kind}</b> {escape(loss.reason)}<br><small>{escape(loss.remedy)}</small></td>'
        f"<td>{loss.amount:,}<br><small>{unit}</small></td><td>{tokens}</td></tr>"
    )


def _counts(preview: Preview) -> str:
    rows = "".join(
        f"<tr><td>{escape(count.name.replace('_', ' '))}<br><small>{escape(count.meaning)}</small></td>"
        f"<td>{count.amount:,}</td></tr>"
        for count in preview.counts
    )
    return f'<h2>Counted</h2><table class="counts">{rows}</table>' if rows else ""


def _histogram(preview: Preview) -> str:
    """Bars upwards, as SVG; the last one, in red, is what was dropped."""
    bars, width, height, base = preview.lengths, 560, 220, 190
    most = max(bar.num_examples for bar in bars)
    step = min(width / len(bars), 60)
    every = -(-len(bars) // 8)
    parts = []
    for index, bar in enumerate(bars):
        tall = max(bar.num_examples / most * (base - 18), 2 * bool(bar.num_examples))
        name = f"{bar.first:,} to {bar.last:,}" if bar.last else f"over {preview.seq_len:,}, dropped"
        kind = "bar" if bar.last else "bar dropped"
        parts.append(
            f'<rect class="{kind}" x="{index * step + 1:.1f}" y="{base - tall:.1f}" width="{step - 2:.1f}" '
            f'height="{tall:.1f}" rx="1.5"><title>{name} tokens: {bar.num_examples:,}</title></rect>'
        )
        # The last label would run over the edge, so it ends where its bar ends.
        place = f'x="{(index + 0.5) * step:.1f}"' if bar.last else f'x="{(index + 1) * step - 1:.1f}" class="end"'
        if bar.num_examples == most or bar.last is None:
            parts.append(f'<text {place} y="{base - tall - 5:.1f}">{bar.num_examples:,}</text>')
        if bar.last is None or (index % every == every - 1 and (bars[-1].last or index < len(bars) - 2)):
            parts.append(f'<text {place} y="{base + 16}">{f"{bar.last:,}" if bar.last else "dropped"}</text>')
    parts.append(f'<line x1="0" x2="{width}" y1="{base}" y2="{base}"/>')
    label = "Histogram of tokens per example"
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
