"""The page of a plan: all that the plan says stands in it, escaped, and it takes nobody's place."""

import json

import pytest

from jaxsft.cli import main
from jaxsft.config_files import load_config
from jaxsft.plan.make import make_plan
from jaxsft.plan.page import make_html
from jaxsft.plan.topologies import read_topology


@pytest.fixture(scope="module")
def config(repo, tmp_path_factory):
    """Of a model's config.json in a folder whose name is not for HTML."""
    folder = tmp_path_factory.mktemp("a") / "<b>&"
    folder.mkdir()
    (folder / "config.json").write_text((repo / "configs" / "quickstart" / "config.json").read_text())
    path = folder / "run.yaml"
    tree = {
        "model": {"path": str(folder / "config.json"), "weights": "random"},
        "data": {"train": "none", "seq_len": 256},
        "train": {"batch_size": 8, "steps": 10},
    }
    path.write_text(json.dumps(tree))
    return path


def test_all_of_it_stands_there(config):
    plan = make_plan(load_config(config), read_topology("h100:8"), compiles=False)
    page = make_html([plan], command="plan <x>")
    assert "<b>&/" not in page and "&lt;b&gt;&amp;/config.json on h100:8" in page and "plan &lt;x&gt;" in page
    for term in plan.counted.terms:
        assert (f"<th>{term.name}<br>" in page) == bool(term.num_bytes)
        assert f"{term.num_bytes / 2**30:,.2f} GiB" in page
    for each in ("compute", "memory", "links"):
        assert f"{getattr(plan.bound, each):.3g} s" in page
    assert f"{plan.num_trained:,}" in page and "all-gather" in page and f"by {plan.bound.by}" in page
    assert "<script" not in page and "style=" not in page  # as its policy says


def test_several_stand_in_a_table_and_of_a_cpu_no_time(config):
    plan = make_plan(load_config(config), read_topology("h100:8"), compiles=False)
    assert make_html([plan, plan], command="").count("<td>fsdp 8</td>") == 2
    cpu = make_plan(load_config(config), read_topology("cpu:1"), compiles=False)
    assert "nothing is known of this processor" in make_html([cpu], command="")


def test_it_is_written_where_there_is_none_of_others(config, tmp_path, capsys):
    path = tmp_path / "plan.html"
    command = ["plan", str(config), "--topology", "h100:8", "--quick", "--page", str(path)]
    assert main(command) == 0 and main(command) == 0
    assert f"page: {path}" in capsys.readouterr().out
    path.write_text("mine")
    assert main(command) == 1
    said = capsys.readouterr().err
    assert str(path) in said and path.read_text() == "mine"
    assert main([*command[:-1], "plan.txt"]) == 1
    assert "--page: plan.txt given, expected a file whose name ends in .html" in capsys.readouterr().err
