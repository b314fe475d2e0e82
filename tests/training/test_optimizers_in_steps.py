"""Every optimizer in the step of a run: cut over meshes, saved and continued, and left alone by what is not finite."""

import contextlib
import dataclasses
import functools
import json
import math
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import TO_READ
from etils import epath
from flax import nnx
from placing import place

import jaxsft
from jaxsft.batch import Batch
from jaxsft.cli import main
from jaxsft.config import KEYS_OF, CheckpointConfig, ConfigError, GroupConfig, MeshConfig, OptimConfig
from jaxsft.config_files import load_config
from jaxsft.folders.pretrained import load_weights
from jaxsft.mesh import make_mesh, partition_spec
from jaxsft.model.abstract import abstract_model
from jaxsft.model.architecture import LayerKind
from jaxsft.model.decoder import Decoder
from jaxsft.setup import Setup
from jaxsft.train import train
from jaxsft.training.checkpoint import Checkpointer
from jaxsft.training.optim import make_optimizer
from jaxsft.training.optimizers.params import by_path
from jaxsft.training.step import abstract_state, evaluation_params, init_state, make_train_step, put_batch

FROZEN = nnx.State({})
RATE = {"sgd": 0.5, "lion": 1e-3}


@pytest.fixture(scope="module")
def run(tiny_config, tiny_model, tmp_path_factory):
    """Setup of a mixture of experts with weights large enough for 8-bit codes, and its drawn parameters."""
    folder = tmp_path_factory.mktemp("mixture")
    for file in tiny_model.iterdir():
        shutil.copy(file, folder)
    config = json.loads((tiny_model / "config.json").read_text())
    keys = ("vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    mixtral = {"model_type": "mixtral", "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2}
    mixtral |= {key: config[key] for key in keys} | {"hidden_size": 32, "initializer_range": 0.1}
    (folder / "config.json").write_text(json.dumps(mixtral | {"architectures": ["MixtralForCausalLM"]}))
    setup = Setup(load_config(tiny_config, [f"model.path={folder}", "data.seq_len=64"]))
    setup.mesh = mesh_of(data=1)
    return setup, jax.device_get(load_weights(setup.pretrained, setup.mesh, seed=0))


def mesh_of(**sizes):
    return make_mesh(MeshConfig(**sizes), jax.devices()[: math.prod(sizes.values())])


def section(name, **keys):
    return OptimConfig(name=name, learning_rate=RATE.get(name, 1e-2), weight_decay=0.1, warmup_steps=2, **keys)


def batch_of(setup, step, mesh):
    return put_batch(functools.partial(setup.loader.batch, step), setup.loader.shape, mesh)


def save_and_restore(folder, state, abstract, name):
    """A state as a new process would find it."""
    run = {"fingerprint": {"optim.name": name}}
    saver = Checkpointer(epath.Path(folder) / "checkpoints", CheckpointConfig(), print, run=run)
    saver.save(int(state.step), state)
    saver.close()
    return Checkpointer(epath.Path(folder) / "checkpoints", CheckpointConfig(), print).restore(abstract)


@pytest.mark.parametrize("name", KEYS_OF)
def test_a_step_is_compiled_once_continued_to_the_bit_and_skipped_whole(run, tmp_path, name):
    setup, drawn = run
    mesh, optim = mesh_of(fsdp=2, tensor=2), section(name)
    model = setup.pretrained.model
    options = dict(num_steps=12, num_microbatches=1, mesh=mesh)
    step, abstract = make_train_step(model, optim, **options), abstract_state(model.params, optim, mesh)
    state, losses = init_state(place(drawn, mesh), optim, mesh), []
    with jax.set_mesh(mesh):
        batches = [batch_of(setup, number, mesh) for number in range(4)]
        for number in (0, 1):
            state, metrics = step(state, FROZEN, batches[number])
            losses.append(float(metrics.sums.loss_sum / metrics.sums.weight_sum))
        continued = save_and_restore(tmp_path, state, abstract, name)
        ends = []
        for each in (state, continued):
            for number in (2, 3):
                each, metrics = step(each, FROZEN, batches[number])
            losses.append(float(metrics.sums.loss_sum / metrics.sums.weight_sum))
            ends.append(each)
        jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, ends))
        assert losses[-1] < losses[0] - 0.05

        before = jax.device_get(ends[0])
        infinite = jax.tree.map(lambda x: x, batches[0])._replace(loss_weights=batches[0].loss_weights * jnp.inf)
        after, metrics = step(ends[0], FROZEN, jax.device_put(infinite, batches[0].tokens.sharding))
        assert float(metrics.skipped) == 1
        jax.tree.map(np.testing.assert_array_equal, before[1:], jax.device_get(after)[1:])
    assert step.program._cache_size() == 1
    for leaf, expected in zip(jax.tree.leaves(after), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)

    with pytest.raises(
        ConfigError, match=rf"another model or optimizer \(its optim.name is {name}\); \d+ arrays differ"
    ):
        other = abstract_state(model.params, section("sgd" if name != "sgd" else "lion"), mesh)
        Checkpointer(epath.Path(tmp_path) / "checkpoints", CheckpointConfig(), print).restore(other)


@pytest.mark.parametrize("name", KEYS_OF)
def test_what_an_optimizer_keeps_of_a_parameter_is_cut_with_it(run, name):
    """Every letter of a moment is one of its parameter, but for blocks, and is cut over the same axes."""
    setup, _ = run
    mesh = mesh_of(expert=2, fsdp=2, tensor=2)
    params = setup.pretrained.model.params
    opt_state = abstract_state(params, section(name), mesh).opt_state
    kept = [leaf for leaf in jax.tree.leaves(opt_state, is_leaf=is_variable) if is_variable(leaf)]
    assert len(kept) >= len(by_path(params))
    for leaf in kept:
        axes = leaf.get_metadata("axes")
        assert leaf.get_value().sharding.spec == partition_spec(axes)
    at_most = {"adamw": 8, "adamw8bit": 4, "adafactor": 0.4, "lion": 4, "muon": 6, "sgd": 4, "schedule_free_adamw": 8}
    num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(opt_state))
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(opt_state))
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert num_bytes / num_params < at_most[name] + 0.01
    assert held < num_bytes * {"adafactor": 0.5, "adamw8bit": 0.15}.get(name, 0.14), "an eighth, but for what is small"


def is_variable(leaf):
    return isinstance(leaf, nnx.Variable)


def test_what_is_evaluated_is_the_average_where_there_is_one(run):
    setup, drawn = run
    mesh = mesh_of(fsdp=2)
    optim = section("schedule_free_adamw")
    state = init_state(place(drawn, mesh), optim, mesh)
    jax.tree.map(np.testing.assert_allclose, *jax.device_get((state.params, evaluation_params(optim, state))))
    z = jax.tree.map(lambda x: x + 1, state.opt_state.leaves)
    state = state._replace(opt_state=state.opt_state._replace(leaves=z))
    average = evaluation_params(optim, state)
    for ours, y in zip(jax.tree.leaves(average), jax.tree.leaves(state.params), strict=True):
        assert ours.sharding == y.sharding
        np.testing.assert_allclose(ours, np.asarray(y) - 1 / 9, atol=1e-6)  # y = 0.1 (y + 1) + 0.9 x
    state = init_state(place(drawn, mesh), section("lion"), mesh)
    assert evaluation_params(section("lion"), state) is state.params


def test_a_run_evaluates_and_exports_the_average_and_another_optimizer_may_not_continue_it(
    tiny_config, tmp_path, capsys
):
    folder = tmp_path / "run"
    overrides = [
        f"run_dir={folder}",
        "optim.name=schedule_free_adamw",
        "train.steps=4",
        "data.seq_len=64",
        "mesh.fsdp=8",
    ]
    config = load_config(tiny_config, [*overrides, "eval.examples=4"])
    assert train(config) == 0
    setup = Setup(config)
    abstract = abstract_state(setup.pretrained.model.params, config.optim, setup.mesh)
    with contextlib.closing(Checkpointer(epath.Path(folder) / "checkpoints", config.checkpoint, print)) as checkpointer:
        state = checkpointer.restore(abstract)
    average = evaluation_params(config.optim, state)
    exported = jaxsft.load_model(folder / "export").params
    for path, leaf in by_path(exported).items():
        np.testing.assert_array_equal(leaf.get_value(), by_path(average)[path].get_value(), err_msg=path)
    assert np.abs(jax.tree.leaves(exported)[0] - jax.tree.leaves(state.params)[0]).max() > 1e-4
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (measured,) = [line["eval_loss"] for line in lines if line["step"] == 4 and "eval_loss" in line]
    assert setup.examiner.examine(average).metrics["eval_loss"] == pytest.approx(measured, rel=1e-6)
    assert setup.examiner.examine(state.params).metrics["eval_loss"] != pytest.approx(measured, rel=1e-4)
    capsys.readouterr()
    assert main(["evaluate", str(tiny_config), *overrides, "eval.examples=4"]) == 0
    assert f"{measured:.4f}" in capsys.readouterr().out
    assert main(["train", str(tiny_config), *overrides, "optim.name=muon"]) == 1
    assert "optim.name: 'schedule_free_adamw' then, 'muon' now" in capsys.readouterr().err


def test_the_bytes_on_the_page_are_those_of_the_states(run, repo):
    """Of the shapes of SmolLM2-135M and Llama 3.1 8B."""
    shapes = [
        dict(hidden_size=576, intermediate_size=1536, num_heads=9, num_kv_heads=3, head_dim=64, vocab_size=49152),
        dict(hidden_size=4096, intermediate_size=14336, num_heads=32, num_kv_heads=8, head_dim=128, vocab_size=128256),
    ]
    shapes = [shapes[0] | {"layers": (LayerKind(),) * 30}, shapes[1] | {"layers": (LayerKind(),) * 32}]
    counted = {name: [] for name in KEYS_OF}
    for shape, is_tied in zip(shapes, (True, False), strict=True):
        config = dataclasses.replace(run[0].pretrained.decoder_config, tie_embeddings=is_tied, routing=None, **shape)
        options = dict(compute_dtype="float32", param_dtype="float32", remat="full")
        params = abstract_model(
            lambda rngs, config=config, options=options: Decoder(config, **options, rngs=rngs)
        ).params
        num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
        for name in KEYS_OF:
            state = jax.eval_shape(make_optimizer(OptimConfig(name=name)).init, params)
            num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
            counted[name].append(num_bytes / num_params)
    page = (repo / "docs" / "optimizers.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \|[^|]*\| ([\d.]+), ([\d.]+) \|", page, flags=re.MULTILINE)
    assert {name: [float(small), float(large)] for name, small, large in listed} == {
        name: [round(each, 3) for each in found] for name, found in counted.items()
    }


def test_a_pattern_of_a_group_that_no_parameter_has_is_found_before_weights_are_read(run):
    optim = section("adamw", groups=[GroupConfig(match=["lora_b"], learning_rate_factor=16.0)])
    setup = Setup(run[0].config.model_copy(update={"optim": optim}))
    with pytest.raises(ConfigError, match=r"(?s)'lora_b' is found in no trained parameter.*layers.self_attn.q_proj"):
        setup.check_fit()


@pytest.mark.parametrize("name", ["adamw8bit", "muon", "schedule_free_adamw"])
def test_beside_the_state_a_step_holds_no_floats_of_all_layers_but_the_gradients(run, name):
    """Of a model whose weights are much larger than its activations; adamw is held to the same in test_step.py."""
    sizes = dict(hidden_size=256, intermediate_size=2048, layers=(LayerKind(),) * 4, routing=None)
    config = dataclasses.replace(run[0].pretrained.decoder_config, **sizes)
    decoder = functools.partial(Decoder, config, compute_dtype="float32", param_dtype="float32", remat="full")
    model, mesh, optim = abstract_model(lambda rngs: decoder(rngs=rngs)), mesh_of(data=1), OptimConfig(name=name)
    rows = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    batch = Batch(rows, rows, jax.ShapeDtypeStruct(rows.shape, jnp.float32), rows, rows)
    with jax.set_mesh(mesh):
        step = make_train_step(model, optim, num_steps=12, num_microbatches=1, mesh=mesh)
        state = abstract_state(model.params, optim, mesh)
        memory = step.lower(state, FROZEN, batch).compile(TO_READ).memory_analysis()
    num_bytes, of_params = (sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(t)) for t in (state, state.params))
    assert memory.alias_size_in_bytes >= num_bytes - 64  # parameters and moments are written where they lie
    assert memory.temp_size_in_bytes < 1.5 * of_params
