"""Which way to run does best: the border of what fits, and meshes in their order."""

import dataclasses
import json

import pytest

from jaxsft.config import ConfigError
from jaxsft.config_files import load_config
from jaxsft.plan import search, topologies
from jaxsft.plan.make import make_plan
from jaxsft.plan.search import describe_suggestions, largest_microbatch, suggest
from jaxsft.plan.topologies import read_topology

GIB = 2**30


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A model of 4 layers of width 1,024, and 64 rows of 2,048 a step."""
    import transformers

    shape = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    path = tmp_path_factory.mktemp("shape") / "config.json"
    path.write_text(json.dumps(shape.to_dict()))
    tree = {
        "model": {"path": str(path), "weights": "random"},
        "data": {"train": "none", "seq_len": 2048},
        "train": {"batch_size": 64, "microbatch_size": 32, "steps": 10},
    }
    return load_config(tree)


@pytest.fixture(autouse=True)
def without_compilers(monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)


def test_without_a_compiler_the_next_power_of_two_would_not_fit(config):
    topology = read_topology("v5e:2x2")
    found = largest_microbatch(config, topology, compiles=True, say=lambda text: None)
    assert found.rows == 2 * found.microbatch_rows and found.room_bytes >= 0
    more = make_plan(search.with_rows(config, 2 * found.microbatch_rows), topology)
    assert more.microbatch_rows == 2 * found.microbatch_rows and more.room_bytes < 0


@pytest.mark.parametrize("most", [4, 8, 64, 256])
def test_the_compiler_has_the_last_word(config, monkeypatch, most):
    """It says that other numbers of rows fit than were counted: fewer, as many, and more."""
    topology, said = read_topology("v5e:2x2"), []
    counted = make_plan(config, topology)

    def compiled(of_rows, topology):
        room = GIB if of_rows.train.microbatch_size <= most else -GIB
        one = dataclasses.replace(counted, microbatch_rows=of_rows.train.microbatch_size)
        return dataclasses.replace(one, counted=one.counted._replace(peak=int(topology.chip.memory_bytes - room)))

    monkeypatch.setattr(search, "make_plan", compiled)
    monkeypatch.setattr(search, "missing_compiler", lambda topology: None)
    found = largest_microbatch(config, topology, compiles=True, say=said.append)
    assert found.microbatch_rows == most
    assert any(f"{most} rows at once" in text and "fits" in text for text in said)
    assert any(f"{2 * most} rows at once" in text and "too much" in text for text in said)


def test_where_nothing_fits_the_largest_entry_is_named(config):
    huge = config.model_copy(update={"data": config.data.model_copy(update={"seq_len": 2**21})})
    with pytest.raises(ConfigError, match=r"4 rows, one for each device, need .* more than there is; most are "):
        largest_microbatch(huge, read_topology("v5e:2x2"), compiles=True, say=lambda text: None)
    with pytest.raises(ConfigError, match="not known how much memory"):
        largest_microbatch(config, read_topology("cpu:1"), compiles=True, say=lambda text: None)


def test_meshes_and_policies_are_ranked_by_their_bound(config):
    plans = suggest(config, read_topology("v5e:2x4"))
    assert all(plan.room_bytes >= 0 and plan.rows == 64 for plan in plans)
    assert {plan.remat for plan in plans} == {"none", "attention", "full", "offload"}
    assert {plan.mesh["tensor"] for plan in plans} == {1, 2, 4, 8}
    seconds = [plan.bound.seconds for plan in plans]
    assert seconds == sorted(seconds) and plans[0].remat == "none"
    again = {plan.remat: plan.flops.again for plan in plans}
    assert again["none"] < again["attention"] < again["full"] == again["offload"]
    lines = describe_suggestions(plans).splitlines()
    assert len(lines) == 12 and "counted, at most" in lines[-1]
