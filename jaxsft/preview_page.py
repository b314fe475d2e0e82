"""A preview as one HTML page, without scripts and without anything from elsewhere; readable in light and dark.

In: the `Preview` of `preview.py`. Out: the page; every text of the data is escaped.
"""

import html
import itertools
import os

from etils import epath

from jaxsft.preview import Piece, Preview, PreviewRow, Segment, row_heading, segment_heading, visible


def write_html(preview: Preview, path: str | os.PathLike[str]) -> None:
    """Writes the page; `path` may be gs:// and the like."""
    epath.Path(path).write_bytes(make_html(preview).encode())


def make_html(preview: Preview) -> str:
    """The page; every text of the data is escaped."""
    tiles = "".join(
        f'<div class="tile"><b>{_escape(fact.label)}</b><strong>{_escape(fact.value)}</strong>'
        f"<span>{_escape(fact.note)}</span></div>"
        for fact in preview.headline
    )
    facts = "".join(
        f"<tr><th>{_escape(fact.label)}</th><td>{_escape(fact.value)} <small>{_escape(fact.note)}</small></td></tr>"
        for fact in preview.facts
    )
    rows = "".join(_html_row(row, preview) for row in preview.rows)
    shown = sum(len(row.segments) for row in preview.rows)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{_escape(preview.title)} · jaxsft preview</title>
<style>{_CSS}</style>
</head>
<body>
<header><h1>{_escape(preview.title)}</h1>
<p>What this run will train, read from the batch of its first step.</p></header>
<section class="tiles">{tiles}</section>
<section class="report">
<div class="card"><h2>Data</h2><table class="facts">{facts}</table></div>
<div class="card"><h2>Tokens per example</h2>{_html_histogram(preview)}<h2>Dropped</h2>{_html_drops(preview)}</div>
</section>
<section>
<h2>Step 0, token by token
<small>{shown} examples in the order trained; point at a token for its id, position and weight</small></h2>
<p class="legend"><span><i class="t trained">trained</i> the model learns to write it</span>
<span><i class="t trained stop">stop</i> trained, ends the answer</span>
<span><i class="t special">special</i> control token</span>
<span><i class="t">context</i> read, not trained</span></p>
{rows}
</section>
<footer>Made by jaxsft. Weights were traced back from the batch's targets and checked against the examples.</footer>
</body>
</html>
"""


def _escape(text: str) -> str:
    return html.escape(visible(text), quote=True)


def _html_row(row: PreviewRow, preview: Preview) -> str:
    strip = "".join(_html_strip(row, segment) for segment in row.segments)
    for size in row.hidden:
        strip += f'<span class="hidden" style="flex:{size}" title="not shown: {size:,} tokens"></span>'
    if row.num_padding:
        strip += f'<span class="padding" style="flex:{row.num_padding}" title="{row.num_padding:,} of padding"></span>'
    segments = "".join(
        f'<article id="{_anchor(row, segment)}"><h4><b>{segment.number}</b> example {segment.example:,}'
        f"<span>{segment.num_tokens:,} tokens, {segment.num_trained:,} trained</span></h4>"
        f"<pre>{''.join(map(_html_piece, segment.pieces))}</pre></article>"
        for segment in row.segments
    )
    more = f'<p class="hint">{len(row.hidden)} more in this row, not shown</p>' if row.hidden else ""
    heading = _escape(row_heading(row, preview))
    return f'<details open><summary>{heading}</summary><nav class="strip">{strip}</nav>{segments}{more}</details>'


def _anchor(row: PreviewRow, segment: Segment) -> str:
    return f"row{row.number}-segment{segment.number}"


def _html_strip(row: PreviewRow, segment: Segment) -> str:
    """A segment to scale, with its trained stretches."""
    runs = ""
    for trained, pieces in itertools.groupby(segment.pieces, lambda piece: piece.weight != 0):
        size = sum(len(piece.tokens) for piece in pieces)
        runs += f'<i class="{"on" if trained else "off"}" style="flex:{size}"></i>'
    title = _escape(segment_heading(segment))
    return f'<a href="#{_anchor(row, segment)}" style="flex:{segment.num_tokens}" title="{title}">{runs}</a>'


def _html_piece(piece: Piece) -> str:
    flags = {
        "trained": piece.weight != 0,
        "special": piece.is_special,
        "stop": piece.is_stop,
        "multi": len(piece.tokens) > 1,
    }
    classes = " ".join(["t", *(name for name, flag in flags.items() if flag)])
    name = piece.text.replace("\n", "\\n").replace("\t", "\\t")
    ids = " ".join(map(str, piece.tokens))
    weight = f"trained, weight {piece.weight:g}" if piece.weight else "context, weight 0"
    last = f" to {piece.position + len(piece.tokens) - 1}" if len(piece.tokens) > 1 else ""
    title = f"“{name}” · id {ids} · position {piece.position}{last} · {weight}" + ", stop token" * piece.is_stop
    text = _escape(piece.text).replace("\n", '<i class="nl"></i>\n').replace("\t", '<i class="tab"></i>\t')
    count = f' data-n="{len(piece.tokens)}"' if len(piece.tokens) > 1 else ""
    return f'<span class="{classes}"{count} title="{_escape(title)}">{text}</span>'


def _html_drops(preview: Preview) -> str:
    if not preview.drops:
        return '<p class="none">Nothing was dropped.</p>'
    rows = "".join(
        f"<tr><td>{_escape(drop.reason)}<br><small>{_escape(drop.remedy)}</small></td>"
        f"<td>{drop.examples:,}</td><td>{drop.tokens:,}</td></tr>"
        for drop in preview.drops
    )
    return f'<table class="drops"><tr><th>reason</th><th>examples</th><th>tokens</th></tr>{rows}</table>'


def _html_histogram(preview: Preview) -> str:
    """Bars upwards, as SVG; the last one, in red, is what was dropped."""
    bars, width, height, base = preview.lengths, 560, 220, 190
    most = max(bar.num_examples for bar in bars)
    step = min(width / len(bars), 60)
    every = -(-len(bars) // 8)
    parts = []
    for index, bar in enumerate(bars):
        tall = bar.num_examples / most * (base - 18)
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


_CSS = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1d2330; --soft: #667085; --line: #e1e5ec;
  --trained: #c6f0d2; --trained-ink: #0a4a22; --mark: #22a355; --stop: #d0312d; --stop-ink: #fff; --special: #e9e7fb;
  --special-ink: #4a3fb0; --bar: #5b7fd6; --off: #cfd6e2; --cut: rgba(20, 30, 50, .10); }
@media (prefers-color-scheme: dark) {
  :root { --page: #0f131a; --card: #171c26; --ink: #e4e8f0; --soft: #98a2b5; --line: #2a3240;
    --trained: #1a5232; --trained-ink: #b9f5cd; --mark: #3fc777; --stop: #e5534b; --stop-ink: #fff; --special: #2b2950;
    --special-ink: #bdb5ff; --bar: #6d8fe6; --off: #3c4658; --cut: rgba(255, 255, 255, .11); } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 28px 24px 60px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { margin: 0; font-size: 24px; overflow-wrap: anywhere; } h2 { margin: 0 0 10px; font-size: 16px; }
header p, footer, .hint, small { color: var(--soft); } header p { margin: 2px 0 20px; }
h2 small { margin-left: 8px; font-size: 13px; font-weight: 400; }
section { margin-bottom: 26px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 14px; }
.tile, .card, details { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 12px 16px; } .tile b { display: block; color: var(--soft); font-size: 13px; font-weight: 500; }
.tile strong { display: block; font-size: 26px; line-height: 1.25; } .tile span { color: var(--soft); font-size: 13px; }
.report { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 14px; }
.card { padding: 16px; min-width: 0; }
table { width: 100%; border-collapse: collapse; font-size: 14px; }
th, td { padding: 5px 0; text-align: left; vertical-align: top; border-top: 1px solid var(--line);
  overflow-wrap: anywhere; }
tr:first-child > * { border-top: 0; } th { color: var(--soft); font-weight: 500; }
.facts th { width: 145px; padding-right: 12px; overflow-wrap: normal; }
.drops :is(th, td):not(:first-child) { width: 90px; text-align: right; font-variant-numeric: tabular-nums; }
.none { margin: 0; color: var(--soft); }
svg { display: block; width: 100%; margin-bottom: 14px; } svg text { fill: var(--soft); font-size: 12px;
  text-anchor: middle; } svg .end { text-anchor: end; } svg line { stroke: var(--line); } .bar { fill: var(--bar); }
.bar.dropped { fill: var(--stop); }
.legend { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 0 0 12px;
  padding: 9px 0; background: var(--page); font-size: 13px; color: var(--soft); }
.legend span { display: inline-flex; align-items: center; gap: 6px; } footer { font-size: 13px; }
.legend .t { font-style: normal; } .legend .t:not(.trained, .special) { color: var(--ink); }
details { margin-bottom: 16px; padding: 0 16px 16px; }
summary { padding: 12px 0; cursor: pointer; font-weight: 600; }
.strip { display: flex; height: 20px; gap: 2px; margin-bottom: 14px; }
.strip > * { display: flex; min-width: 0; border-radius: 3px; overflow: hidden; } .strip i { height: 100%; }
.strip .on { background: var(--mark); } .strip .off, .strip .hidden { background: var(--off); }
.strip .hidden { opacity: .45; }
.strip .padding { background: repeating-linear-gradient(135deg, var(--off) 0 1px, transparent 1px 6px);
  border: 1px solid var(--off); }
.strip a:hover { outline: 2px solid var(--bar); }
article { margin-top: 12px; border: 1px solid var(--line); border-radius: 8px; overflow: hidden;
  scroll-margin-top: 48px; }
article:target { border-color: var(--bar); box-shadow: 0 0 0 1px var(--bar); }
h4 { display: flex; align-items: center; gap: 8px; margin: 0; padding: 5px 10px; font-size: 13px; font-weight: 500;
  color: var(--soft); border-bottom: 1px solid var(--line); }
h4 b { min-width: 22px; padding: 0 6px; border-radius: 11px; background: var(--off); color: var(--ink);
  text-align: center; } h4 span { margin-left: auto; }
pre { margin: 0; padding: 10px 12px; white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; }
pre, .legend .t { font: 13.5px/1.75 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.t { padding: 2px 0; box-shadow: inset 1px 0 var(--cut); } pre .t:hover { outline: 2px solid var(--bar); }
.trained { background: var(--trained); color: var(--trained-ink); }
.special { margin: 0 1px; padding: 1px 5px; border-radius: 5px; background: var(--special); color: var(--special-ink);
  font-size: 12px; box-shadow: none; } .special.trained { background: var(--trained); color: var(--trained-ink); }
.trained.stop { margin: 0 1px; padding: 1px 5px; border-radius: 5px; background: var(--stop); color: var(--stop-ink);
  font-size: 12px; font-weight: 600; box-shadow: none; } .trained.stop::after { content: " \\25A0"; }
.multi::after { content: attr(data-n); vertical-align: sub; font-size: 9px; opacity: .65; }
.nl::before { content: "\\21B5"; opacity: .45; font-style: normal; } .tab::before { content: "\\21E5"; opacity: .45; }
.legend .t { padding: 1px 5px; border-radius: 4px; } .hint { font-size: 13px; }
@media (max-width: 520px) { .report { grid-template-columns: 1fr; } }
"""
