"""docs/recipes.md: its table is made of the headers of configs/*.yaml, and none is missing.

`python tests/test_recipes.py` writes the table anew.
"""

import pathlib
import re

REPO = pathlib.Path(__file__).resolve().parents[1]
PAGE = REPO / "docs" / "recipes.md"
TABLE = re.compile(r"^\|.*\|\n(?:^\|.*\|\n)+", re.MULTILINE)


def header(path):
    """What the comments at the top of a config say: a title, and texts by their names."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[1:].strip())
    said, name = {"title": ""}, "title"
    for line in lines:
        if found := re.match(r"([a-z]+): +(.*)", line):
            name, line = found.groups()
        said[name] = f"{said.get(name, '')} {line}".strip()
    return said


def table():
    """A row for each recipe."""
    rows = ["| recipe | what it does | hardware | time, or its bound |", "|---|---|---|---|"]
    for path in sorted((REPO / "configs").glob("*.yaml")):
        said = header(path)
        said.setdefault("time", said.get("bound", ""))  # of a plan, the least that a step takes
        assert all(said.get(name) for name in ("title", "hardware", "time")), f"{path.name}: a part of its header lacks"
        cells = (said[name].rstrip(".").replace("|", "\\|") for name in ("title", "hardware", "time"))
        rows.append(f"| [{path.name}](../configs/{path.name}) | {' | '.join(cells)} |")
    return "".join(f"{row}\n" for row in rows)


def with_table(page):
    return TABLE.sub(lambda _: table(), page, count=1)


def test_the_page_lists_every_recipe_as_its_header_says():
    page = PAGE.read_text()
    assert with_table(page) == page, "run `python tests/test_recipes.py` and read what has changed"
    assert set(re.findall(r"\(\.\./configs/(\w+\.yaml)\)", page)) == {
        path.name for path in (REPO / "configs").glob("*.yaml")
    }


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
