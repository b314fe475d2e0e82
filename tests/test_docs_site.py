"""The docs as a site: it is built, its links lead somewhere, and a broken one is an error."""

import html.parser
import importlib.util
import pathlib
import shutil
import urllib.parse

import pytest

pytest.importorskip("zensical", reason="needs zensical: pip install -e '.[test]'")

REPO = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("build_docs", REPO / "docs" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build


@pytest.fixture(scope="module")
def site(build, tmp_path_factory):
    out = tmp_path_factory.mktemp("docs") / "site"
    assert build(out) == []
    return out


class Page(html.parser.HTMLParser):
    """The links of a page, and the names of its parts."""

    def __init__(self, path):
        super().__init__()
        self.links, self.names = [], set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name in ("id", "name"):
                self.names.add(value)


def test_every_page_and_every_link_leads_to_a_file_and_a_heading(site):
    pages = {path: Page(path) for path in site.rglob("*.html")}
    for name in (REPO / "docs").glob("*.md"):
        assert site / "docs" / f"{name.stem}.html" in pages
    broken, checked = [], 0
    for path, page in pages.items():
        for link in page.links if path.name != "404.html" else []:
            parts = urllib.parse.urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else path
            checked += 1
            if not target.is_file() or (
                parts.fragment and target in pages and parts.fragment not in pages[target].names
            ):
                broken.append((path.name, link))
    assert not broken and checked > 1000


def test_all_of_it_works_without_a_network(site):
    """Scripts, styles, fonts and pictures are its own, and the search has its index as a script."""
    for path in site.rglob("*.html"):
        text = path.read_text()
        for tag in ("<script src=", "<link rel=stylesheet href=", '<link rel="stylesheet" href=', "<img src="):
            assert f'{tag}"http' not in text and f"{tag}http" not in text, path
    assert "fonts.googleapis" not in (site / "index.html").read_text()
    index = (site / "search.js").read_text()
    assert "sharegpt" in index.lower() and "exit code 75" in index.lower()


SEARCH = """
const all = (what) => [document, ...[...document.querySelectorAll("*")].map((each) => each.shadowRoot)]
  .filter(Boolean).flatMap((root) => [...root.querySelectorAll(what)]);
setTimeout(() => document.querySelector(".md-search__button").click(), 800);
setTimeout(() => {
  const field = all("input[aria-label=Search]")[0];
  Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, "value").set.call(field, "warm-up");
  field.dispatchEvent(new Event("input", {bubbles: true}));
}, 1600);
setTimeout(() => {
  document.body.setAttribute("data-found", all("a[role=option]").map((each) => each.href).join(" "));
}, 5000);
"""


def test_the_search_works_in_a_page_that_is_opened_from_a_folder(site, browse):
    page = (site / "docs" / "masks.html").read_text()
    extra = ["--virtual-time-budget=9000", "--host-resolver-rules=MAP * ~NOTFOUND"]
    dom, _ = browse(page, script=SEARCH, extra=extra, beside=site / "docs")
    (site / "docs" / "page.html").unlink()
    found = dom.partition('data-found="')[2].partition('"')[0].split()
    assert len(found) > 2 and any("docs/sweep.html" in link for link in found), found


@pytest.fixture
def copy(tmp_path):
    """A checkout whose pages may be broken."""
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "constraints.txt"):
        shutil.copy(REPO / name, tmp_path)
    for name in ("docs", "benchmarks", "configs", "jaxsft", "tests", "findings"):
        (tmp_path / name).symlink_to(REPO / name)
    (tmp_path / "docs").unlink()
    shutil.copytree(REPO / "docs", tmp_path / "docs")
    return tmp_path


def test_links_to_files_that_are_not_there_are_told_together(build, copy, tmp_path):
    page = copy / "docs" / "masks.md"
    page.write_text(
        page.read_text() + "\n[a](nowhere.md) [b](../tests/no_test.py) ![c](no.png) [d](../tests) [e](/etc/hosts)\n"
    )
    (copy / "docs" / "orphan.md").write_text("# Nobody links here\n")
    (copy / "docs" / "sweep.md").unlink()
    problems = build(tmp_path / "out", copy)
    text = "\n".join(problems)
    for link in ("nowhere.md", "../tests/no_test.py", "no.png"):
        assert f"docs/masks.md: links to {link}, which is not there" in text
    assert "links to ../tests, which is a folder" in text and "links to /etc/hosts, which is outside" in text
    assert "docs/orphan.md is not in the nav" in text and "docs/sweep.md is in the nav and is not there" in text
    assert not (tmp_path / "out").exists()


def test_a_link_to_a_heading_that_is_not_there_is_an_error(build, copy, tmp_path):
    page = copy / "docs" / "masks.md"
    page.write_text(page.read_text() + "\n[a](formats.md#no-such-heading)\n")
    (problem,) = build(tmp_path / "out", copy)
    assert "anchor does not exist" in problem and "docs/masks.md" in problem
    assert not (tmp_path / "out").exists()


def test_a_folder_of_others_is_left_alone(build, tmp_path):
    (tmp_path / "index.html").write_text("mine")
    (problem,) = build(tmp_path)
    assert "holds no site" in problem and (tmp_path / "index.html").read_text() == "mine"
