"""The recipes say what their plans say; the table of the README, what they say; no run of others is above its bound."""

import contextlib
import importlib.util
import io
import json
import pathlib
import re

import pytest

from jaxsft.cli import main


def script(name):
    spec = importlib.util.spec_from_file_location(name, pathlib.Path(__file__).parents[2] / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


recipes, published = script("recipes"), script("published")
FOUND = recipes.recipes()


@pytest.fixture(scope="module")
def plans(repo):
    """Of each recipe, as counted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(repo)
        planned = {}
        for recipe in FOUND:
            with contextlib.redirect_stdout(io.StringIO()) as said:
                assert main(["plan", *recipe.plan_arguments, "--quick", "--json"]) == 0
            planned[recipe.path.name] = json.loads(said.getvalue())
    return planned


def test_every_config_but_the_quickstart_is_a_recipe(repo):
    assert {path.name for path in (repo / "configs").glob("*.yaml")} == {"quickstart.yaml"} | {
        recipe.path.name for recipe in FOUND
    }


@pytest.mark.parametrize("recipe", FOUND, ids=lambda recipe: recipe.path.stem)
def test_a_recipe_says_what_its_plan_says(recipe, plans):
    again = recipes.with_plan(recipe, plans[recipe.path.name])
    assert recipes.text_of(again) == recipe.path.read_text(), "run benchmarks/recipes.py"
    assert f"configs/{recipe.path.name}" in recipe.header["plan"]


@pytest.mark.parametrize("recipe", FOUND, ids=lambda recipe: recipe.path.stem)
def test_what_is_counted_is_near_to_what_was_compiled(recipe, plans):
    memory = plans[recipe.path.name]["memory"]
    assert memory["counted"]["peak"] / 2**30 == pytest.approx(float(recipe.compiled), rel=0.1)
    assert memory["left"] is None or memory["left"] > 0


def test_the_table_of_the_readme_is_current(repo, plans):
    page = (repo / "README.md").read_text()
    assert recipes.with_table(page, recipes.table(FOUND, plans)) == page, "run benchmarks/recipes.py"


def test_the_page_lists_every_recipe_as_its_header_says(repo):
    page = recipes.PAGE.read_text()
    assert recipes.with_table(page, recipes.page_table()) == page, "run benchmarks/recipes.py"
    assert set(re.findall(r"\(\.\./configs/(\w+\.yaml)\)", page)) == {
        path.name for path in (repo / "configs").glob("*.yaml")
    }


@pytest.mark.parametrize("run", published.RUNS, ids=lambda run: f"{run.name}, {run.topology}")
def test_no_published_run_is_above_its_bound(run, repo):
    plan = published.plan_of(run)
    share = published.share(run, plan)
    assert 0.3 < share < 1
    assert f"| {share:.2f} | {plan.bound.by} |" in (repo / "docs" / "plan.md").read_text()
