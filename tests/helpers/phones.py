"""A page in a frame as wide as a phone, since browsers without a screen make no window narrower than 500 pixels."""

import html
import re

PHONE = 360
_TOLD = "<script>parent.document.body.append(`WIDTH${document.documentElement.scrollWidth}/${innerWidth}END`)</script>"


def in_frame(page: str, width: int = PHONE) -> str:
    """A page that shows another one in a frame; widths are read off it by `widths`."""
    inner = re.sub(r"<meta http-equiv=[^>]*>", "", page).replace("</body>", f"{_TOLD}</body>")
    frame = f'<iframe style="border: 0" width="{width}" height="4000" srcdoc="{html.escape(inner)}"></iframe>'
    return f'<!doctype html><html><head><meta charset="utf-8"></head><body>{frame}</body></html>'


def widths(dom: str) -> tuple[int, int]:
    """Of the page in the frame: how wide it is, and how wide the frame is."""
    scroll, inner = map(int, re.search(r"WIDTH(\d+)/(\d+)END", dom).groups())  # type: ignore[union-attr]
    return scroll, inner
