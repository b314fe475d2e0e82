"""The plans in the headers of `configs/`, and the tables of them in the README and in docs/recipes.md.

    python benchmarks/recipes.py                              # counts all, and writes headers and tables
    python benchmarks/recipes.py --compile configs/NAME.yaml  # compiles the step, too, by the chips' own compiler

A recipe's header says by which command it is planned; what `run.py plan` counts and compiles is written around it. A
compiled figure stays until it is compiled again. A test counts all recipes, and fails where a header or a table says
something else.
"""

import argparse
import json
import pathlib
import re
import shlex
import subprocess
import sys
import textwrap
from typing import Any, NamedTuple

REPO = pathlib.Path(__file__).resolve().parents[1]
COMPILED = re.compile(r"([\d.]+) as compiled")
PAGE = REPO / "docs" / "recipes.md"
BEGIN, END = "<!-- recipes -->\n", "<!-- end of recipes -->\n"
GIB = 2**30


class Recipe(NamedTuple):
    """A config and its header."""

    path: pathlib.Path
    header: dict[str, str]
    """Key -> text in one line; the first line is `title`."""
    body: str

    @property
    def plan_arguments(self) -> list[str]:
        """What follows `run.py plan`."""
        return shlex.split(self.header["plan"].partition("run.py plan ")[2])

    @property
    def compiled(self) -> str | None:
        """GiB, as the header says."""
        found = COMPILED.search(self.header.get("memory", ""))
        return None if found is None else found[1]


def recipes() -> list[Recipe]:
    """Those of `configs/` that say how they are planned."""
    return [recipe for recipe in configs() if "plan" in recipe.header]


def configs() -> list[Recipe]:
    """All of `configs/`."""
    return [read(path) for path in sorted((REPO / "configs").glob("*.yaml"))]


def read(path: pathlib.Path) -> Recipe:
    """A config whose header is a title and lines of `# key:  text`, continued by `#` and more space."""
    lines = path.read_text().splitlines(keepends=True)
    count = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    header: dict[str, str] = {}
    key = "title"
    for line in lines[:count]:
        text = line[1:].rstrip()
        started = re.match(r" ([a-z]+): +(.*)", text)
        if started and header:
            key, text = started[1], started[2]
        header[key] = f"{header[key]}\n{text.strip()}" if key in header else text.strip()
    generated = ("memory", "bound", "plan")
    header = {key: text.replace("\n", " ") if key in generated else text for key, text in header.items()}
    return Recipe(path, header, "".join(lines[count:]))


def with_plan(recipe: Recipe, plan: dict[str, Any]) -> Recipe:
    """The recipe with what `run.py plan --json` says; where that compiled nothing, with the figure that is there."""
    memory, compiled = plan["memory"], recipe.compiled
    if memory["compiled"] is not None:
        compiled = f"{memory['compiled']['peak'] / GIB:.2f}"
    counted = {name: num_bytes / GIB for name, num_bytes in memory["counted"].items() if num_bytes >= 0.005 * GIB}
    peak = counted.pop("peak")
    parts = ", ".join(f"{name} {size:.2f}" for name, size in sorted(counted.items(), key=lambda part: -part[1]))
    as_compiled = "" if compiled is None else f", {compiled} as compiled"
    header = recipe.header | {"memory": f"{peak:.2f} GiB counted{as_compiled}: {parts}"}
    header.pop("bound", None)
    if plan["bound"] is not None:
        header["bound"] = (
            f"a step takes at least {plan['bound']['seconds']:.3g} s, by {plan['bound']['by']}: at most "
            f"{plan['tokens_per_second'] / plan['chips']:,.0f} tokens/s a chip, MFU {plan['mfu']:.1%}"
        )
    header["plan"] = header.pop("plan")  # the last
    return recipe._replace(header=header)


def text_of(recipe: Recipe) -> str:
    """The file's."""
    lines = [f"# {line}" for line in recipe.header["title"].splitlines()]
    for key, text in recipe.header.items():
        if key == "title":
            continue
        parts = [text] if key == "plan" else [part for line in text.splitlines() for part in _wrapped(line)]
        lines += [f"# {key + ':':<10}{parts[0]}", *(f"#           {part}" for part in parts[1:])]
    return "\n".join(lines) + "\n" + recipe.body


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, 108, break_on_hyphens=False, break_long_words=False)


def table(found: list[Recipe], plans: dict[str, dict[str, Any]]) -> str:
    """The README's table, by file."""
    lines = ["| config | on | GiB of a chip, of | at most, tokens/s a chip |", "|---|---|---|---|"]
    for recipe in found:
        plan = plans[recipe.path.name]
        used = recipe.compiled or f"{plan['memory']['counted']['peak'] / GIB:.2f} counted"
        left = plan["memory"]["left"]
        of = "" if left is None else f", {(left + plan['memory']['counted']['peak']) / GIB:.1f}"
        rate = plan["tokens_per_second"]
        bound = "" if rate is None else f"{rate / plan['chips']:,.0f} (MFU {plan['mfu']:.0%})"
        lines.append(
            f"| [{recipe.path.stem}](configs/{recipe.path.name}) | {plan['topology']} | {used}{of} | {bound} |"
        )
    return "\n".join(lines) + "\n"


def page_table() -> str:
    """The table of docs/recipes.md: all configs, by what their headers say."""
    lines = ["| recipe | what it does | hardware | time, or its bound |", "|---|---|---|---|"]
    for recipe in configs():
        header = recipe.header
        said = (header["title"], header["hardware"], header.get("time", header.get("bound")))
        assert all(said), f"{recipe.path.name}: a part of its header lacks"
        cells = " | ".join(" ".join(str(each).split()).rstrip(".").replace("|", "\\|") for each in said)
        lines.append(f"| [{recipe.path.name}](../configs/{recipe.path.name}) | {cells} |")
    return "\n".join(lines) + "\n"


def with_table(text: str, table: str) -> str:
    """A page with the table in place of that between the marks."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + table + END + rest.partition(END)[2]


def plan_of(recipe: Recipe, *options: str) -> dict[str, Any]:
    """By a process of its own, as compilers for several chips do not go together."""
    command = [sys.executable, "run.py", "plan", *recipe.plan_arguments, "--json", *options]
    return json.loads(subprocess.run(command, cwd=REPO, check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--compile", nargs="*", type=pathlib.Path, default=[], metavar="CONFIG", help="these steps")
    args = parser.parse_args()
    compiled = {path.name for path in args.compile}
    if unknown := compiled - {recipe.path.name for recipe in recipes()}:
        parser.error(f"no recipe: {', '.join(sorted(unknown))}")
    plans = {}
    for recipe in recipes():
        name = recipe.path.name
        plans[name] = plan_of(recipe, "--quick")
        if name in compiled:
            recipe = with_plan(recipe, plan_of(recipe))
        recipe = with_plan(recipe, plans[name])
        recipe.path.write_text(text_of(recipe))
        print(f"{name}: {recipe.header['memory']}", flush=True)
    readme = REPO / "README.md"
    readme.write_text(with_table(readme.read_text(), table(recipes(), plans)))
    PAGE.write_text(with_table(PAGE.read_text(), page_table()))


if __name__ == "__main__":
    main()
