"""Copies on local disks: used where newer and whole, ignored where they are not, removed where they are ours."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding

from jaxsft.config import CheckpointConfig, MeshConfig
from jaxsft.mesh import make_mesh, partition_spec
from jaxsft.training.checkpoint import Checkpointer


def make_state(value, **mesh):
    place = make_mesh(MeshConfig(**mesh))
    cut, whole = NamedSharding(place, partition_spec("d f")), NamedSharding(place, partition_spec(""))
    array = jax.device_put(jnp.arange(64.0).reshape(8, 8) + value, cut)
    return {"step": jax.device_put(jnp.int32(value), whole), "params": {"w": array.astype(jnp.bfloat16), "v": array}}


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


@pytest.fixture
def make(tmp_path):
    """A checkpointer of the run in `run`, whose copies are in `disk`."""

    def make(said=None, run="run"):
        config = CheckpointConfig(every=10, local_every=1, local_dir=str(tmp_path / "disk"))
        return Checkpointer(
            epath.Path(tmp_path / run / "checkpoints"), config, (said if said is not None else []).append
        )

    return make


def copies(tmp_path):
    return sorted(int(path.parent.name) for path in (tmp_path / "disk").glob("*/process-0/*/seal.json"))


def save(checkpointer, *, local=(), checkpoints=()):
    for step in sorted([*local, *checkpoints]):
        if step in local:
            checkpointer.save_local(step, make_state(step), progress={"at": step})
        else:
            checkpointer.save(step, make_state(step))
    checkpointer.close()


def restored_step(checkpointer, state=None):
    found = checkpointer.restore(abstract(make_state(0) if state is None else state), local=True)
    return None if found is None else int(found["step"])


def test_the_newest_copy_comes_back_bitwise_with_what_was_saved_beside_it(make, tmp_path):
    save(make(), checkpoints=[1], local=[2, 3])
    assert copies(tmp_path) == [3], "a former one is removed when the next is sealed"
    said = []
    checkpointer = make(said)
    found = checkpointer.restore(abstract(make_state(0)), local=True)
    for ours, saved in zip(jax.tree.leaves(found), jax.tree.leaves(make_state(3)), strict=True):
        assert ours.sharding == saved.sharding and ours.dtype == saved.dtype
        np.testing.assert_array_equal(ours, saved)
    assert checkpointer.progress == {"at": 3}
    assert said == ["going on from the local copies of step 3; the newest checkpoint is 1"]
    # What was donated or changed after the copy was taken is not in it; what comes back may be donated.
    jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(found)
    checkpointer.save(3, make_state(3))  # a run that is stopped at once has its checkpoint
    checkpointer.close()
    assert (tmp_path / "run" / "checkpoints" / "3" / "seal.json").exists()
    assert copies(tmp_path) == [], "a checkpoint that is as new makes them useless"
    assert make().restore(abstract(make_state(0))) is not None


def test_a_state_may_be_donated_as_soon_as_its_copy_is_begun(make):
    checkpointer, state = make(), make_state(2)
    checkpointer.save_local(2, state)
    jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)(state)
    checkpointer.close()
    np.testing.assert_array_equal(
        make().restore(abstract(make_state(0)), local=True)["params"]["v"], make_state(2)["params"]["v"]
    )


def test_copies_are_for_training_and_not_for_those_who_read_a_run(make):
    save(make(), checkpoints=[1], local=[2])
    assert int(make().restore(abstract(make_state(0)))["step"]) == 1


def test_older_copies_are_ignored_and_damaged_ones_and_those_of_another_mesh_are_said(make, tmp_path):
    save(make(), local=[2])
    shutil.copytree(tmp_path / "disk", tmp_path / "kept")
    save(make(), checkpoints=[3])
    assert copies(tmp_path) == []
    shutil.rmtree(tmp_path / "disk")
    shutil.copytree(tmp_path / "kept", tmp_path / "disk")
    said = []
    assert restored_step(make(said)) == 3 and said == []
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "3")
    (tmp_path / "run" / "progress.json").unlink()
    assert restored_step(make(said)) == 2
    assert restored_step(make(said), make_state(0, fsdp=2, tensor=4)) is None
    assert said[-1] == "passed over the local copies of step 2: they are of another mesh"
    (arrays,) = (tmp_path / "disk").glob("*/process-0/2/arrays.bin")
    content = bytearray(arrays.read_bytes())
    content[len(content) // 2] ^= 1
    arrays.write_bytes(content)
    assert restored_step(make(said)) is None
    assert said[-1].startswith("passed over the local copies of step 2: process 0: 1 files differ from its seal")


def test_copies_of_a_former_run_in_the_same_folder_are_never_used_and_are_removed(make, tmp_path):
    save(make(), local=[7])
    shutil.rmtree(tmp_path / "run")
    assert restored_step(make()) is None
    save(make(), local=[2])
    assert copies(tmp_path) == [2]
    assert restored_step(make()) == 2


def test_only_what_is_ours_is_removed_and_a_copy_that_was_cut_off_is_ours(make, tmp_path):
    save(make(), local=[1])
    (folder,) = (tmp_path / "disk").glob("*/process-0")
    (folder / "1" / "seal.json").unlink()  # killed before it was sealed
    (folder / "2").mkdir()  # killed before anything was in it
    for name in ("9", "notes"):
        (folder / name).mkdir()
        (folder / name / "mine.txt").write_text("of somebody else")
    (folder / "8").mkdir()
    (folder / "8" / "seal.json").write_text(json.dumps({"../../9/mine.txt": {"size": 16, "crc32": 1}}))
    assert restored_step(make()) is None
    save(make(), local=[2, 3])
    assert sorted(path.name for path in folder.iterdir()) == ["3", "8", "9", "notes"]
    assert (folder / "9" / "mine.txt").exists() and (folder / "8" / "seal.json").exists()


def test_a_copy_for_which_there_is_no_room_is_said_and_the_former_one_kept(make, tmp_path, monkeypatch):
    save(make(), local=[1])
    monkeypatch.setattr("jaxsft.disk.writing.free_bytes", lambda path: 100)
    said = []
    save(make(said), local=[2])
    assert len(said) == 1 and said[0].startswith("WARNING: no local copy of step 2: process 0: ")
    assert "No space left" in said[0] and copies(tmp_path) == [1]
    assert restored_step(make()) == 1


def test_a_copy_after_a_best_checkpoint_that_was_never_finished_is_passed_over(make):
    said = []
    checkpointer = make()
    checkpointer.save(5, make_state(5))
    for step, best in ((7, 5), (9, 8)):
        checkpointer.wait()
        checkpointer.save_local(step, make_state(step), progress={"patience": {"best_step": best}})
    checkpointer.close()
    assert restored_step(make(said)) == 5
    assert "passed over the local copies of step 9: checkpoint 8, which was the best by then, was not finished" in said
