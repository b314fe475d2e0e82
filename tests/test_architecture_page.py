"""docs/architecture.md: its code is run, its printed values are those of the code, and its layers are the real ones.

`python tests/test_architecture_page.py` writes the values anew.
"""

import ast
import contextlib
import io
import os
import pathlib
import re

REPO = pathlib.Path(__file__).resolve().parents[1]
PAGE = REPO / "docs" / "architecture.md"
CODE = re.compile(r"```python\n(.*?)```\n(?:\n```text\n.*?```\n)?", re.DOTALL)


def with_values(page):
    """The page with what each block of code prints under it."""
    names = {}

    def run(block):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block[1], str(PAGE), "exec"), names)
        return f"```python\n{block[1]}```\n\n```text\n{printed.getvalue()}```\n"

    return CODE.sub(run, page)


def test_the_values_on_the_page_are_those_that_its_code_prints(monkeypatch):
    monkeypatch.chdir(REPO)
    page = PAGE.read_text()
    assert with_values(page) == page, "run `python tests/test_architecture_page.py` and read what has changed"


def test_the_layers_on_the_page_are_those_of_the_program():
    """The list that `test_imports.py` holds the imports against."""
    tree = ast.parse((REPO / "tests" / "test_imports.py").read_text())
    (layers,) = [node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "LAYERS"]
    lines = re.findall(r"^\| (\d+) \| ([^|]*) \|", PAGE.read_text(), flags=re.MULTILINE)
    assert [int(number) for number, _ in lines] == list(range(1, len(lines) + 1))
    assert [set(re.findall(r"`(\w+)`", rooms)) for _, rooms in lines] == ast.literal_eval(layers)


def test_the_modules_and_pages_that_it_names_exist():
    page = PAGE.read_text()
    modules = re.findall(r"`([\w/]+\.py)`", page)
    assert len(modules) > 10
    rooms = [REPO / "jaxsft", *(REPO / "jaxsft").iterdir(), REPO]
    assert not [name for name in modules if not any((room / name).is_file() for room in rooms)]
    assert not [name for name in re.findall(r"\]\(([\w.]+)\)", page) if not (PAGE.parent / name).is_file()]


if __name__ == "__main__":
    os.chdir(REPO)
    PAGE.write_text(with_values(PAGE.read_text()))
