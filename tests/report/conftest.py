"""A browser for the tests of the page; the flags are those of tests/test_preview_page.py."""

import re
import shutil
import subprocess

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
    "--virtual-time-budget=3000", "--enable-logging=stderr", "--disable-dev-shm-usage",
]  # fmt: skip


@pytest.fixture(scope="session")
def browse(tmp_path_factory):
    """Opens a page in a browser; returns its DOM afterwards, and what the browser said."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"needs a browser, one of {', '.join(BROWSERS)}")
    folder = tmp_path_factory.mktemp("browser")

    def browse(page, *, script="", is_dark=False, width=1280, screenshot=None, extra=()):
        path = folder / "page.html"
        if script:  # In this copy only: the page itself lets no other script run.
            page = re.sub(r"<meta http-equiv=[^>]*>", "", page).replace(
                "</body>", f"<script>{{{script}}}</script></body>"
            )
        path.write_text(page, encoding="utf-8")
        what = f"--screenshot={screenshot}" if screenshot else "--dump-dom"
        command = [browser, *FLAGS, *extra, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},2400"]
        # 0 is dark, 1 is light.
        command += [what, f"--blink-settings=preferredColorScheme={int(not is_dark)}", f"file://{path}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout, done.stderr

    return browse
