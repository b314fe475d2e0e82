"""The least time of a step: against figures worked out by hand, and messages against those of a compiled program."""

import json
import math

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from jaxsft.config_files import load_config
from jaxsft.mesh import AXES
from jaxsft.plan import compiling, topologies
from jaxsft.plan.compiling import mesh_of, open_planned, trace_step
from jaxsft.plan.costs import Flops, bound_of, count_flops, expected_collectives, link_seconds, memory_bytes
from jaxsft.plan.make import make_plan
from jaxsft.plan.topologies import read_topology
from jaxsft.training.matmuls import Matmul, read_matmuls
from jaxsft.training.program import Collective, total_bytes

WIDTH, LAYERS, VOCABULARY, LENGTH, ROWS, TOP_K = 256, 4, 1024, 512, 16, 2


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A model's config.json: of each layer 4 maps of 256 x 256 and 3 of 256 x 1,024, its table tied."""
    import transformers

    shape = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    path = tmp_path_factory.mktemp("shape") / "config.json"
    path.write_text(json.dumps(shape.to_dict()))
    return path


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """The config.json of a mixture: of each layer 8 experts, each 3 maps of 256 x 512, of which 2 are chosen."""
    import transformers

    shape = transformers.MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=TOP_K,
    )
    path = tmp_path_factory.mktemp("mixture") / "config.json"
    path.write_text(json.dumps(shape.to_dict()))
    return path


@pytest.fixture
def config(path):
    def make(*overrides):
        tree = {
            "model": {"path": str(path), "weights": "random", "compute_dtype": "bfloat16", "attention": "xla"},
            "data": {"train": "none", "seq_len": LENGTH},
            "train": {"batch_size": ROWS, "steps": 100},
        }
        return load_config(tree, overrides)

    return make


def mesh(**sizes):
    sizes = [sizes.get(axis, 1) for axis in AXES]
    return AbstractMesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


MATRICES = LAYERS * (4 * WIDTH**2 + 3 * WIDTH * 4 * WIDTH)
"""Numbers in the matrices of all layers."""


def test_flops_are_those_of_the_formula(config):
    run = config()
    model, structure, _ = open_planned(run, mesh(fsdp=4))
    forward = Matmul(2 * MATRICES * ROWS * LENGTH, "bfloat16", (), "layers", is_again=False, is_open=False, runs=1)
    matmuls = [
        forward._replace(flops=3 * forward.flops),
        forward._replace(is_again=True),
        forward._replace(flops=1000, name="layers/attention"),
        forward._replace(is_open=True, name="loss"),
    ]
    tiles = [forward._replace(is_open=True, name="layers/attention", is_again=is_again) for is_again in (False, True)]
    found = count_flops(matmuls, model, structure, run, mesh(fsdp=4).shape)
    assert (found.maps, found.again) == (8 * MATRICES * ROWS * LENGTH, 2 * MATRICES * ROWS * LENGTH)
    assert (found.attention, found.experts) == (1000, 0)
    pairs = LAYERS * ROWS * LENGTH * (LENGTH + 1) / 2
    in_tiles = count_flops([*matmuls, *tiles], model, structure, run, mesh(fsdp=4).shape)
    assert in_tiles.attention - found.attention == 16 * WIDTH * pairs
    assert in_tiles.again - found.again == 4 * WIDTH * pairs
    assert found.loss == 6 * VOCABULARY * WIDTH * ROWS * LENGTH
    assert found.needed == 6 * (MATRICES + VOCABULARY * WIDTH) * ROWS * LENGTH + 12 * WIDTH * pairs


@pytest.mark.parametrize(
    ("sizes", "overrides", "products"),
    [
        ({}, (), 11),
        ({"fsdp": 4, "expert": 2, "tensor": 2}, ("train.microbatch_size=8",), 11),
        ({"fsdp": 2, "context": 2}, ("model.remat=none",), 11),
        ({"data": 2, "fsdp": 2}, ("train.microbatch_size=8",), 11),
        ({"data": 2}, ("train.microbatch_size=4",), 11),
        # Gradients by weights are left out.
        ({"fsdp": 4}, ("lora.rank=4", "lora.targets=attention", "train.microbatch_size=4"), 8),
    ],
    ids=["one device", "expert, tensor", "context", "copies", "copies alone", "frozen"],
)
def test_of_experts_what_is_chosen_counts(mixture, config, sizes, overrides, products):
    """Three products forward and eight backward, in which gate and up are computed again."""
    run = config(f"model.path={mixture}", *overrides)
    planned = open_planned(run, mesh(**sizes))
    matmuls = read_matmuls(trace_step(run, planned))
    found = count_flops(matmuls, planned.model, planned.structure, run, planned.mesh.shape)
    assert found.experts == 2 * LAYERS * products * WIDTH * 2 * WIDTH * TOP_K * ROWS * LENGTH
    assert found.needed <= found.all - found.again
    attention = 4 * WIDTH**2 if "lora" not in str(overrides) else 0
    if attention:  # and routers; three products each, forward and backward
        again = 4 if "remat=none" not in str(overrides) else 3
        assert found.maps == pytest.approx(2 * LAYERS * again * (attention + 8 * WIDTH) * ROWS * LENGTH, rel=0.02)


def test_bytes_of_memory_and_adapters(config):
    whole = memory_bytes(
        open_planned(config(), mesh()).model, config(), mesh().shape, moments=1000, activations=100, itemsize=2
    )
    numbers = MATRICES + VOCABULARY * WIDTH + (2 * LAYERS + 1) * WIDTH
    # Read and written: parameters and gradients in float32, and moments; three times all of it in bfloat16.
    assert whole == numbers * 16 + 2000 + 3 * numbers * 2 + 200
    given = config("lora.rank=4", "train.microbatch_size=4", "model.remat=none")
    model = open_planned(given, mesh()).model
    adapters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model.params))
    found = memory_bytes(model, given, mesh().shape, moments=0, activations=100, itemsize=2)
    assert found == pytest.approx(adapters * 16 + 4 * (2 * (numbers + adapters) * 2 + 200), rel=1e-4)
    parts = memory_bytes(
        open_planned(config(), mesh(fsdp=4)).model, config(), mesh(fsdp=4).shape, moments=0, activations=0, itemsize=2
    )
    assert parts == pytest.approx(numbers / 4 * 16 + 3 * numbers * 2, rel=1e-2)  # norms are not cut


def test_messages_take_as_long_as_links_need(config):
    gather = Collective("all-gather", ("fsdp",), 8 * 10**9, 3, "", is_async=True, is_open=False)
    sizes = {"data": 2, "fsdp": 16}
    one_host = read_topology("h100:8")
    assert link_seconds([gather], {"fsdp": 8}, one_host) == pytest.approx(24e9 * 7 / 8 / 450e9)
    # Of 16 GPUs, 8 are joined by links: 7 parts of 16 come by them, 8 by the network.
    assert link_seconds([gather], sizes, read_topology("h100:32")) == pytest.approx(24e9 * (7 / 450e9 + 8 / 50e9) / 16)
    copies = gather._replace(kind="all-reduce", axes=("data",))
    slices = read_topology("v6e:4x4", num_slices=2)
    assert link_seconds([copies], sizes, slices) == pytest.approx(24e9 * 2 / 2 / 12.5e9)
    assert link_seconds([gather], sizes, slices) == pytest.approx(24e9 * 15 / 16 / 448e9)


def test_the_longest_of_three_is_the_bound(config):
    model, structure, _ = open_planned(config(), mesh())
    flops = Flops(maps=918e12 * 4, attention=0.0, experts=0.0, loss=0.0, again=0.0, needed=0.0)
    found = bound_of(flops, 1640e9 * 0.5, 0.25, read_topology("v6e:2x2"))
    assert (found.compute, found.memory, found.links) == pytest.approx((1.0, 0.5, 0.25))
    assert (found.by, found.seconds) == ("compute", pytest.approx(1.0))
    assert found._replace(links=3.0).by == "links"


@pytest.mark.parametrize("sizes", [{"fsdp": 4}, {"fsdp": 2, "tensor": 2}])
def test_expected_messages_are_of_the_size_of_those_compiled(config, sizes):
    """To 25% of all bytes: enough to compare meshes. With 4 microbatches, gathers dominate."""
    pytest.importorskip("libtpu", reason="libtpu, the compiler for TPUs, is not installed")
    given = config("train.microbatch_size=4", *(f"mesh.{axis}={size}" for axis, size in sizes.items()))
    planned = open_planned(given, mesh_of(given, read_topology("v5e:2x2")))
    compiled = compiling.compile_step(given, planned).report.collectives
    expected = expected_collectives(planned.model, planned.structure, given, dict(planned.mesh.shape), itemsize=2)
    bytes_of = [sum(number for _, number in total_bytes(each).values()) for each in (compiled, expected)]
    assert bytes_of[1] == pytest.approx(bytes_of[0], rel=0.25)


def test_without_a_compiler_the_plan_counts_and_says_what_to_install(config, monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    plan = make_plan(config(), read_topology("v6e:2x2"))
    assert plan.compiled is None and plan.missing == "libtpu" and plan.room_bytes > 0
    assert plan.mesh["fsdp"] == 4 and plan.tokens_per_second > 0 and 0 < plan.mfu < 1
    assert plan.hours == 100 * plan.bound.seconds / 3600
