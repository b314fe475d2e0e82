"""Checkpoints: what is saved comes back, on any mesh; what is unfinished or damaged does not."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding

from jaxsft.checkpoint import Checkpointer, SaveError, StopSignal, claim_run_folder
from jaxsft.config import CheckpointConfig, ConfigError, MeshConfig
from jaxsft.mesh import make_mesh, partition_spec


def make_state(value, **mesh):
    sharding = NamedSharding(make_mesh(MeshConfig(**mesh)), partition_spec("d f"))
    array = jax.device_put(jnp.arange(64.0).reshape(8, 8) + value, sharding)
    return {"step": jnp.int32(value), "params": {"w": array}}


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def make_checkpointer(folder, said=None, **config):
    return Checkpointer(
        epath.Path(folder) / "checkpoints", CheckpointConfig(**config), (said if said is not None else []).append
    )


def steps(folder):
    return sorted(int(child.name) for child in (folder / "checkpoints").iterdir() if child.name.isdigit())


def save_steps(folder, losses, **config):
    checkpointer = make_checkpointer(folder, **config)
    for step, loss in losses.items():
        checkpointer.save(step, make_state(step), eval_loss=loss)
    checkpointer.close()


def flip_a_byte(folder, step):
    files = [path for path in (folder / "checkpoints" / str(step) / "state").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}, {"data": 8, "fsdp": 1}])
def test_a_state_comes_back_equal_on_any_mesh(tmp_path, mesh):
    save_steps(tmp_path, {3: math.inf})
    restored = make_checkpointer(tmp_path).restore(abstract(make_state(0, **mesh)))
    assert restored["params"]["w"].sharding == make_state(0, **mesh)["params"]["w"].sharding
    for ours, saved in zip(jax.tree.leaves(restored), jax.tree.leaves(make_state(3)), strict=True):
        np.testing.assert_array_equal(ours, saved)


def test_an_empty_folder_has_nothing_to_continue(tmp_path):
    assert make_checkpointer(tmp_path).restore(abstract(make_state(0))) is None


def test_a_damaged_checkpoint_is_passed_over_named_and_can_be_saved_again(tmp_path):
    save_steps(tmp_path, {1: math.inf, 2: math.inf})
    flip_a_byte(tmp_path, 2)
    said = []
    checkpointer = make_checkpointer(tmp_path, said)
    assert int(checkpointer.restore(abstract(make_state(0)))["step"]) == 1
    assert len(said) == 1 and "checkpoint 2" in said[0] and "differ from its seal" in said[0]
    checkpointer.save(2, make_state(2))
    checkpointer.close()
    assert int(make_checkpointer(tmp_path).restore(abstract(make_state(0)))["step"]) == 2


def test_when_all_are_damaged_nothing_is_continued_and_nothing_changed(tmp_path):
    save_steps(tmp_path, {1: math.inf})
    flip_a_byte(tmp_path, 1)
    with pytest.raises(ConfigError, match="every finished checkpoint is damaged"):
        make_checkpointer(tmp_path).restore(abstract(make_state(0)))
    assert steps(tmp_path) == [1]


def test_an_unfinished_checkpoint_is_passed_over(tmp_path):
    save_steps(tmp_path, {1: math.inf, 2: math.inf})
    (tmp_path / "checkpoints" / "2" / "seal.json").unlink()
    said = []
    assert int(make_checkpointer(tmp_path, said).restore(abstract(make_state(0)))["step"]) == 1
    assert said == ["passed over checkpoint 2: it was never finished"]


def test_the_newest_and_the_best_are_kept(tmp_path):
    save_steps(tmp_path, {1: 3.0, 2: 1.0, 3: math.nan, 4: 2.0, 5: math.inf, 6: 2.5}, keep=2)
    assert steps(tmp_path) == [2, 5, 6]
    assert make_checkpointer(tmp_path).best_loss() == 1.0


def test_another_dtype_or_shape_is_refused_by_name(tmp_path):
    save_steps(tmp_path, {1: math.inf})
    other = make_state(0)
    other["params"]["w"] = other["params"]["w"].astype(jnp.bfloat16)
    with pytest.raises(ConfigError, match=r"\['w'\]: float32\[8, 8\] then, bfloat16\[8, 8\] now"):
        make_checkpointer(tmp_path).restore(abstract(other))


def test_a_failed_save_is_an_error_and_leaves_the_former_one(tmp_path):
    save_steps(tmp_path, {1: math.inf})
    (tmp_path / "checkpoints" / "2").write_text("in the way")
    checkpointer = make_checkpointer(tmp_path)
    with pytest.raises(SaveError, match="checkpoints/2"):
        checkpointer.save(2, make_state(2))
        checkpointer.wait()
    assert int(checkpointer.restore(abstract(make_state(0)))["step"]) == 1


def test_a_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    checkpointer = make_checkpointer(tmp_path)
    state = make_state(1)
    checkpointer.save(1, state)
    jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)(state)
    checkpointer.close()
    restored = make_checkpointer(tmp_path).restore(abstract(make_state(0)))
    np.testing.assert_array_equal(restored["params"]["w"], make_state(1)["params"]["w"])


def test_a_run_folder_is_claimed_once_and_refused_to_others(tmp_path):
    folder = epath.Path(tmp_path) / "run"
    claim_run_folder(folder, {"seed": 1, "data": "abc"})
    claim_run_folder(folder, {"seed": 1, "data": "abc"})
    with pytest.raises(ConfigError, match="seed: 1 then, 2 now"):
        claim_run_folder(folder, {"seed": 2, "data": "abc"})


def test_a_damaged_fingerprint_is_an_error_that_names_it(tmp_path):
    folder = epath.Path(tmp_path) / "run"
    claim_run_folder(folder, {"seed": 1})
    (folder / "fingerprint.json").write_text("")
    with pytest.raises(ConfigError, match="fingerprint.json is damaged"):
        claim_run_folder(folder, {"seed": 1})


def test_an_older_checkpoint_that_is_damaged_does_not_stop_a_run(tmp_path):
    save_steps(tmp_path, {1: 3.0, 2: 2.0})
    (tmp_path / "checkpoints" / "1" / "meta.json").write_text("{")
    checkpointer = make_checkpointer(tmp_path)
    assert int(checkpointer.restore(abstract(make_state(0)))["step"]) == 2
    assert checkpointer.best_loss() == 2.0
    checkpointer.save(3, make_state(3))
    checkpointer.close()
    assert steps(tmp_path)[-1] == 3


def test_a_folder_of_something_else_is_never_claimed(tmp_path):
    (tmp_path / "thesis.tex").write_text("important")
    with pytest.raises(ConfigError, match="not a run of jaxsft"):
        claim_run_folder(epath.Path(tmp_path), {"seed": 1})
    assert [child.name for child in tmp_path.iterdir()] == ["thesis.tex"]


def test_sigterm_is_noticed_and_the_former_handler_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert stop.at(0) is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.at(1) == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before


SAVE_AND_LEAVE = """
import sys, jax.numpy as jnp, contextlib
from etils import epath
from jaxsft.checkpoint import Checkpointer
from jaxsft.config import CheckpointConfig
with contextlib.closing(Checkpointer(epath.Path(sys.argv[1]), CheckpointConfig(), print)) as checkpointer:
    checkpointer.save(7, {"w": jnp.zeros((1000, 1000))})
    if sys.argv[2] == "exception":
        raise RuntimeError("on the way out")
    if sys.argv[2] == "exit":
        sys.exit(3)
"""


@pytest.mark.parametrize("way_out", ["return", "exception", "exit"])
def test_the_last_save_is_not_lost_on_the_way_out(tmp_path, way_out, repo):
    subprocess.run([sys.executable, "-c", SAVE_AND_LEAVE, tmp_path / "checkpoints", way_out], cwd=repo, check=False)
    assert json.loads((tmp_path / "checkpoints" / "7" / "seal.json").read_text())


def test_saving_happens_in_the_background(tmp_path):
    checkpointer = make_checkpointer(tmp_path)
    checkpointer.save(1, {"w": jnp.zeros((3000, 3000))})
    unsealed = not (tmp_path / "checkpoints" / "1" / "seal.json").exists()
    begin = time.perf_counter()
    checkpointer.wait()
    assert unsealed and time.perf_counter() > begin
    assert (tmp_path / "checkpoints" / "1" / "seal.json").exists()
    checkpointer.close()
