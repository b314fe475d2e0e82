"""What all our pages are made of: a head with a strict policy, a style sheet, and texts that are escaped.

In: a body of HTML. Out: a page that needs nothing from elsewhere; readable in light and dark.
"""

import base64
import hashlib
import html

from jaxsft.disk.pages import GENERATOR
from jaxsft.preview.pieces import visible


def document(title: str, kind: str, body: str, *, style: str, script: str = "", attributes: str = "") -> str:
    """A whole page, of which nothing runs but its own script.

    Args:
        title: plain text.
        kind: what page of ours it is: preview, report or plan.
        body: HTML.
        style: CSS.
        script: JavaScript, run at the end.
        attributes: HTML, of the body.
    """
    policy = f"default-src 'none'; style-src '{_hash(style)}'"
    if script:
        policy += f"; script-src '{_hash(script)}'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{GENERATOR}
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(title)} · jaxsft {kind}</title>
<style>{style}</style>
</head>
<body{attributes and " " + attributes}>
{body}
{f"<script>{script}</script>" * bool(script)}
</body>
</html>
"""


def escape(text: str) -> str:
    """Text as HTML that shows it, control characters made visible."""
    return html.escape(visible(text), quote=True)


def _hash(text: str) -> str:
    """What a content security policy calls a style or script that stands in the page."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
