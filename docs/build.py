"""The docs as a site that opens without a server: `python docs/build.py [OUT]`; OUT is build/docs where it is left out.

In: docs/mkdocs.yml, whose `nav` names the pages. Out: the site. Pages stand where they stand in the checkout, the
README among them, and so do the files that they link to, so that links are the same there and here. Links to what is
not there, or to no heading of a page, are errors, as are pages of docs/ that the nav does not name. Needs zensical,
which comes with `pip install -e '.[test]'`.
"""

import html.parser
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
from collections.abc import Iterator

import markdown

REPO = pathlib.Path(__file__).resolve().parents[1]
THEIRS = "https://unpkg.com/iframe-worker/shim"
"""What zensical lets pages load that are opened from a folder; docs/worker.js does the same."""
MARK = "jaxsft.txt"
"""By which a site is known that may be written anew."""
PAGE = re.compile(r"[\w/.*-]+\.md$", re.MULTILINE)


class _Links(html.parser.HTMLParser):
    """What a page links to, pictures included."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if name in ("href", "src") and value]


def build(out: pathlib.Path, repo: pathlib.Path = REPO) -> list[str]:
    """Builds the site of a checkout; returns what is wrong, a line each, and then has written nothing.

    Args:
        out: a folder that is not there, or holds a site that was built before.
        repo: the checkout.
    """
    if out.exists() and not (out / MARK).exists():
        return [f"{out}: is there and holds no site; move it away or name another folder"]
    nav = _with_pages((repo / "docs" / "mkdocs.yml").read_text(encoding="utf-8"), repo)
    pages = [repo / name for name in re.findall(PAGE, nav.partition("\nnav:")[2])]
    missing = sorted(set((repo / "docs").glob("*.md")) - set(pages))
    problems = [f"docs/mkdocs.yml: {page.relative_to(repo)} is not in the nav" for page in missing]
    files = set(pages)
    for page in pages:
        if not page.is_file():
            problems.append(f"docs/mkdocs.yml: {page.relative_to(repo)} is in the nav and is not there")
            continue
        for link in _links(page):
            target = pathlib.Path(os.path.normpath(page.parent / link))  # links of the file system are kept
            where = f"{page.relative_to(repo)}: links to {link},"
            if not target.is_relative_to(repo):
                problems.append(f"{where} which is outside of the checkout")
            elif not target.is_file():
                problems.append(f"{where} which is {'a folder' if target.is_dir() else 'not there'}")
            elif target.suffix == ".md" and target not in pages:
                problems.append(f"{where} which is no page of the nav")
            files.add(target)
    if problems:
        return problems
    with tempfile.TemporaryDirectory() as name:
        staging = pathlib.Path(name)
        for file in files:
            copy = staging / "pages" / file.relative_to(repo)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
        (staging / "mkdocs.yml").write_text(nav, encoding="utf-8")
        command = [sys.executable, "-m", "zensical", "build", "--strict", "-f", str(staging / "mkdocs.yml")]
        done = subprocess.run(command, cwd=staging, capture_output=True, text=True)
        if done.returncode != 0:
            return [re.sub(r"\x1b\[[\d;]*m", "", done.stdout + done.stderr)]
        _keep_at_home(staging / "site", repo)
        if out.exists():
            shutil.rmtree(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        (staging / "site" / MARK).write_text("The site of jaxsft's docs, made by docs/build.py, which may remove it.\n")
        shutil.copytree(staging / "site", out)
    return []


def _keep_at_home(site: pathlib.Path, repo: pathlib.Path) -> None:
    """Has the pages take from the site what zensical would have them take from a server of others."""
    own = site / "assets" / "javascripts" / "worker.js"
    shutil.copy(repo / "docs" / "worker.js", own)
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        path = os.path.relpath(own, page.parent).replace(os.sep, "/")
        page.write_text(text.replace(THEIRS, path), encoding="utf-8")


def _with_pages(config: str, repo: pathlib.Path) -> str:
    """The config with a line for each page that a * stands for."""

    def lines(match: re.Match[str]) -> str:
        found = sorted(path.relative_to(repo).as_posix() for path in repo.glob(match[2]))
        return "".join(f"{match[1]}{path}\n" for path in found)

    return re.sub(r"^( *- )(\S*\*\S*\.md)\n", lines, config, flags=re.MULTILINE)


def _links(page: pathlib.Path) -> Iterator[str]:
    """Files that a page links to, as it writes them."""
    text = markdown.markdown(page.read_text(encoding="utf-8"), extensions=["tables", "pymdownx.superfences"])
    links = _Links()
    links.feed(text)
    for link in dict.fromkeys(links.found):
        parts = urllib.parse.urlsplit(link)
        if not parts.scheme and not parts.netloc and parts.path:
            yield urllib.parse.unquote(parts.path)


def main() -> int:
    out = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else REPO / "build" / "docs")
    problems = build(out)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if not problems:
        print(f"site: {out / 'index.html'}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
