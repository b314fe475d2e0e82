"""Checkpoints: what is saved comes back, on any mesh; what is unfinished or damaged does not."""

import asyncio
import gc
import json
import math
import os
import shutil
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

from jaxsft.config import CheckpointConfig, ConfigError, MeshConfig
from jaxsft.disk import writing
from jaxsft.disk.seal import seal
from jaxsft.disk.writing import WriteError
from jaxsft.mesh import make_mesh, partition_spec
from jaxsft.training import arrays
from jaxsft.training.checkpoint import Checkpointer, SaveError
from jaxsft.training.stop import StopSignal


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
    (tmp_path / "progress.json").write_text('{"sealed": 1}')
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


def test_an_older_checkpoint_that_is_damaged_does_not_stop_a_run(tmp_path):
    save_steps(tmp_path, {1: 3.0, 2: 2.0})
    (tmp_path / "checkpoints" / "1" / "meta.json").write_text("{")
    checkpointer = make_checkpointer(tmp_path)
    assert int(checkpointer.restore(abstract(make_state(0)))["step"]) == 2
    assert checkpointer.best_loss() == 2.0
    checkpointer.save(3, make_state(3))
    checkpointer.close()
    assert steps(tmp_path)[-1] == 3


# Damage: what is not as it was sealed is passed over and named, whatever it is.


def reseal(folder):
    (folder / "seal.json").unlink()
    seal(epath.Path(folder))


def damage_seal(content):
    return lambda folder: (folder / "seal.json").write_bytes(content)


def damage_meta(folder):
    (folder / "meta.json").write_text("{}")
    reseal(folder)


def damage_names(folder):
    (folder / "seal.json").write_text(json.dumps({"../../1/meta.json": {"size": 1, "crc32": 1}}))


def damage_pipe(folder):
    (folder / "meta.json").unlink()
    os.mkfifo(folder / "meta.json")


DAMAGES = {
    "seal empty": damage_seal(b""),
    "seal a list": damage_seal(b"[]"),
    "seal a number": damage_seal(b"7"),
    "seal of nothing": damage_seal(b"{}"),
    "seal deep": damage_seal(b"[" * 100_000),
    "seal binary": damage_seal(b"\xff\x00"),
    "seal with other values": damage_seal(b'{"meta.json": [1, 2]}'),
    "seal names files elsewhere": damage_names,
    "meta empty and sealed again": damage_meta,
    "a pipe": damage_pipe,
    "state gone": lambda folder: shutil.rmtree(folder / "state"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_whatever_is_damaged_the_one_before_is_taken_and_the_step_can_be_saved_again(tmp_path, damage):
    save_steps(tmp_path, {1: math.inf, 2: math.inf})
    damage(tmp_path / "checkpoints" / "2")
    said = []
    checkpointer = make_checkpointer(tmp_path, said)
    assert int(checkpointer.restore(abstract(make_state(0)))["step"]) == 1
    assert len(said) == 1 and said[0].startswith("passed over checkpoint 2: ")
    assert steps(tmp_path) == [1, 2], "restoring changes nothing"
    checkpointer.tidy()
    assert (tmp_path / "checkpoints" / "2.passed-over-1").exists()
    checkpointer.save(2, make_state(2))
    checkpointer.close()
    assert int(make_checkpointer(tmp_path).restore(abstract(make_state(0)))["step"]) == 2


def test_a_copy_under_another_name_is_not_taken_for_that_step(tmp_path):
    save_steps(tmp_path, {1: math.inf, 2: math.inf})
    shutil.copytree(tmp_path / "checkpoints" / "2", tmp_path / "checkpoints" / "50")
    said = []
    assert int(make_checkpointer(tmp_path, said).restore(abstract(make_state(0)))["step"]) == 2
    assert said == ["passed over checkpoint 50: it is a copy of checkpoint 2"]


def test_only_our_way_to_write_numbers_makes_a_folder_a_step(tmp_path):
    save_steps(tmp_path, {1: math.inf})
    for name in ("²", "007", "+5", "1_0", "٣", "-4"):
        (tmp_path / "checkpoints" / name).mkdir()
    said = []
    checkpointer = make_checkpointer(tmp_path, said)
    assert int(checkpointer.restore(abstract(make_state(0)))["step"]) == 1 and not said
    checkpointer.tidy()
    checkpointer.save(9, make_state(9))
    checkpointer.close()
    assert (tmp_path / "checkpoints" / "²").exists()


def test_a_file_in_the_place_of_all_checkpoints_is_one_error(tmp_path):
    (tmp_path / "checkpoints").write_text("a note")
    with pytest.raises(ConfigError, match="checkpoints: a file, where a run has its folder"):
        make_checkpointer(tmp_path).restore(abstract(make_state(0)))


def test_what_was_half_saved_or_half_removed_is_cleared_away(tmp_path):
    save_steps(tmp_path, {1: math.inf, 2: math.inf, 3: math.inf}, keep=5)
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "3" / "seal.json").unlink()  # killed while it was saved
    (tmp_path / "progress.json").write_text('{"sealed": 2}')
    (checkpoints / "1" / "seal.json").rename(checkpoints / "1" / "removing.json")  # killed while it was removed
    (checkpoints / "1" / "meta.json").unlink()
    (checkpoints / "9").mkdir()  # killed before anything was in it
    (checkpoints / "8").mkdir()
    (checkpoints / "8" / "mine.txt").write_text("of somebody else")
    checkpointer = make_checkpointer(tmp_path)
    assert int(checkpointer.restore(abstract(make_state(0)))["step"]) == 2
    checkpointer.tidy()
    checkpointer.close()
    assert sorted(path.name for path in checkpoints.iterdir()) == ["2", "8.passed-over-1"]


def test_a_checkpoint_that_lost_its_seal_or_holds_more_than_ours_is_not_removed(tmp_path):
    save_steps(tmp_path, {1: math.inf, 2: math.inf, 3: math.inf}, keep=5)
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "3" / "seal.json").unlink()
    (checkpoints / "2" / "seal.json").unlink()
    (checkpoints / "2" / "notes.txt").write_text("mine")
    said = []
    checkpointer = make_checkpointer(tmp_path, said)
    assert int(checkpointer.restore(abstract(make_state(0)))["step"]) == 1
    assert said[0] == "passed over checkpoint 3: it was finished, but its seal.json is gone"
    checkpointer.tidy()
    checkpointer.close()
    assert sorted(path.name for path in checkpoints.iterdir()) == ["1", "2.passed-over-1", "3.passed-over-1"]
    assert (checkpoints / "2.passed-over-1" / "notes.txt").read_text() == "mine"


def test_a_checkpoint_of_step_0_that_was_finished_is_not_removed_either(tmp_path):
    save_steps(tmp_path, {0: math.inf})
    (tmp_path / "checkpoints" / "0" / "seal.json").unlink()
    checkpointer = make_checkpointer(tmp_path)
    checkpointer.tidy()
    checkpointer.save(0, make_state(0))
    checkpointer.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["0", "0.passed-over-1"]


def test_no_link_is_followed_when_an_old_checkpoint_is_removed(tmp_path):
    project = tmp_path / "project"
    for name in ("empty/inner", ".git/refs/tags"):
        (project / name).mkdir(parents=True)
    save_steps(tmp_path, {1: math.inf})
    (tmp_path / "checkpoints" / "1" / "project").symlink_to(project)
    (tmp_path / "checkpoints" / "1" / "mine").mkdir()
    save_steps(tmp_path, {2: math.inf, 3: math.inf}, keep=1)
    assert (project / "empty" / "inner").is_dir() and (project / ".git" / "refs" / "tags").is_dir()
    assert sorted(path.name for path in (tmp_path / "checkpoints" / "1").iterdir()) == ["mine", "project"]


def test_an_old_checkpoint_is_removed_without_what_somebody_put_into_it(tmp_path):
    save_steps(tmp_path, {1: math.inf})
    (tmp_path / "checkpoints" / "1" / "note.txt").write_text("the good one")
    save_steps(tmp_path, {2: math.inf, 3: math.inf, 4: math.inf}, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints" / "1").iterdir()] == ["note.txt"]
    assert steps(tmp_path) == [1, 4]
    assert int(make_checkpointer(tmp_path).restore(abstract(make_state(0)))["step"]) == 4


def test_what_is_saved_beside_the_state_comes_back_with_it(tmp_path):
    progress = {"totals": [1.5, 2.0, 0.0], "window": [[1.0, [2.0]]]}
    checkpointer = make_checkpointer(tmp_path)
    checkpointer.save(3, make_state(3), progress=progress)
    checkpointer.close()
    again = make_checkpointer(tmp_path)
    again.restore(abstract(make_state(0)))
    assert again.progress == progress
    assert json.loads((tmp_path / "progress.json").read_text()) == {"sealed": 3}


def test_a_checkpoint_that_will_not_fit_is_not_begun(tmp_path, monkeypatch):
    save_steps(tmp_path, {1: math.inf})
    monkeypatch.setattr(writing, "free_bytes", lambda path: 100)
    checkpointer = make_checkpointer(tmp_path)
    with pytest.raises(
        WriteError, match=r"checkpoints/2: could not be written: No space left .* 100 bytes free"
    ) as error:
        checkpointer.save(2, make_state(2))
    assert error.value.exit_code == 74 and steps(tmp_path) == [1]


FILL = """
import resource, signal, sys, jax, jax.numpy as jnp
from etils import epath
from jaxsft.training.checkpoint import Checkpointer
from jaxsft.config import CheckpointConfig
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
checkpointer = Checkpointer(epath.Path(sys.argv[1]), CheckpointConfig(), print)
try:
    checkpointer.save(7, {f"w{i}": jax.random.normal(jax.random.key(i), (100, 1000)) for i in range(10)})
    checkpointer.wait()
except Exception as error:
    print(type(error).__name__, error.exit_code, error)
"""


@pytest.mark.parametrize("most_bytes", [100, 50_000, 1_000_000])
def test_a_disk_that_fills_up_is_one_line_with_the_numbers_and_leaves_nothing(tmp_path, repo, most_bytes):
    command = [sys.executable, "-c", FILL, tmp_path / "checkpoints", str(most_bytes)]
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True, check=True)
    assert "Traceback" not in done.stderr
    (line,) = done.stdout.splitlines()
    assert "Error 74 " in line and "checkpoints/7" in line and "could not be written: File too large (" in line
    assert "bytes needed" in line and "bytes free" in line
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize(("words", "is_said"), [("Failed: No space [os_error_code='28']", False), ("of ours", True)])
def test_of_several_writes_that_fail_those_that_nobody_waits_for_are_not_told_again(caplog, words, is_said):
    arrays._quieten()

    async def leave() -> None:
        asyncio.get_running_loop().create_future().set_exception(ValueError(words))
        gc.collect()

    asyncio.run(leave())
    assert ["never retrieved" in record.getMessage() for record in caplog.records] == [True] * is_said


@pytest.mark.parametrize(
    "said",
    [
        "OUT_OF_RANGE: Error writing \"x\": Failed to write 9 bytes to file 7: File too large [os_error_code='27']",
        # Which attributes there are, and in which order, depends on which of many writers fails first.
        "Failed to write 9 bytes: File too large [tensorstore_spec='{\"a\":{\"b\": true}}'] [os_error_code='27']",
        "Failed to write 9 bytes: File too large [os_error_code='27'] [source locations='x.cc:12']",
    ],
)
def test_of_what_the_library_says_only_the_words_of_the_system_are_told(said):
    assert arrays.reason(said) == "File too large"


def test_sigterm_is_noticed_and_the_former_handler_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        stop.can_save()
        assert stop.at(0) is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.at(1) == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before


ASK = """
import os, signal, sys, time
from jaxsft.training.stop import StopSignal
with StopSignal() as stop:
    stop.can_save()
    stop.at(11)
    print("ready", flush=True)
    sum(range(10**8))  # one call of C, in which Python runs no handler
    print("done", stop.at(12), flush=True)
    sys.stdin.readline()
    print("over", flush=True)
"""


def test_ctrl_c_is_answered_at_once_and_a_second_one_stops(repo):
    process = subprocess.Popen(
        [sys.executable, "-c", ASK],
        cwd=repo,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "\n"
    assert process.stderr.readline() == "SIGINT: finishing step 12, saving; again to stop without saving\n"
    assert process.stdout.readline() == "done SIGINT\n", "it goes on to where it can stop"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) != 0
    assert "KeyboardInterrupt" in process.stderr.read()


EARLY = """
import os, signal, sys
from jaxsft.training.stop import StopSignal
with StopSignal() as stop:
    try:
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    except BaseException:
        if sys.argv[2] == "raised":
            raise
    stop.can_save()
    print("went on")
"""


@pytest.mark.parametrize("way", ["raised", "taken by a library"])
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGINT", 130)])
def test_a_signal_before_there_is_something_to_save_ends_the_run_whoever_takes_the_exception(repo, name, code, way):
    done = subprocess.run([sys.executable, "-c", EARLY, name, way], cwd=repo, capture_output=True, text=True)
    assert done.returncode in (code, -signal.SIGINT if name == "SIGINT" else code) and "went on" not in done.stdout
    assert f"{name}: stopping; nothing was begun" in done.stderr


SAVE_AND_LEAVE = """
import sys, jax.numpy as jnp, contextlib
from etils import epath
from jaxsft.training.checkpoint import Checkpointer
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
