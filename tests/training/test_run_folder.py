"""Whose run a folder holds: refused to others, held by one process, never begun again over what was done."""

import contextlib
import json
import math
import os

import jax.numpy as jnp
import pytest
from etils import epath

from jaxsft.config import CheckpointConfig, ConfigError
from jaxsft.training.checkpoint import Checkpointer
from jaxsft.training.run_folder import check_progress, claim_run_folder, template_date

FINGERPRINT = {"seed": 1, "data": "abc"}
CONFIG = "data:\n  template_date: '2026-01-02'\n"
LINES = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2, 3))


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path) / "run"


@contextlib.contextmanager
def claimed(folder, fingerprint=None, **options):
    lock = claim_run_folder(folder, fingerprint or FINGERPRINT, **options)
    try:
        yield
    finally:
        lock.release()


def begin(folder):
    with claimed(folder):
        pass


def save(folder, *steps):
    run = {"fingerprint": FINGERPRINT, "config": CONFIG}
    with contextlib.closing(Checkpointer(folder / "checkpoints", CheckpointConfig(), print, run=run)) as checkpointer:
        for step in steps:
            checkpointer.save(step, {"w": jnp.float32(step)}, eval_loss=math.inf)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_run_folder_is_claimed_by_its_run_and_refused_to_others(folder):
    begin(folder)
    begin(folder)
    with pytest.raises(ConfigError, match="seed: 1 then, 2 now"), claimed(folder, {"seed": 2, "data": "abc"}):
        pass
    assert names(folder) == ["fingerprint.json", "progress.json"], "no lock is left behind"


def test_a_run_is_continued_by_its_own_optimizer_only_and_one_that_names_none_is_adamws(folder):
    begin(folder)
    with claimed(folder, FINGERPRINT | {"optim.name": "adamw"}):
        pass
    with pytest.raises(ConfigError, match="optim.name: 'adamw' then, 'muon' now"):
        claim_run_folder(folder, FINGERPRINT | {"optim.name": "muon"})


def test_two_runs_are_never_in_one_folder(folder):
    with (
        claimed(folder),
        pytest.raises(ConfigError, match=f"run: in use by process {os.getpid()} on .*, since 20"),
        claimed(folder),
    ):
        pass
    begin(folder)


@pytest.mark.parametrize("name", ["thesis.tex", "checkpoints", "metrics.jsonl", ".oh-my-zsh", "export"])
def test_a_folder_of_something_else_is_never_claimed_nor_moved(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine").write_text("important")
    for restart in (False, True):
        with pytest.raises(ConfigError, match="not a run of jaxsft"), claimed(epath.Path(tmp_path), restart=restart):
            pass
    assert (tmp_path / name / "mine").read_text() == "important" and os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", ["progress.json", "run.lock"])
def test_names_alone_make_no_run(tmp_path, name):
    (tmp_path / name).write_text('{"chapter": 7}')
    with pytest.raises(ConfigError, match="not a run of jaxsft"), claimed(epath.Path(tmp_path)):
        pass
    assert (tmp_path / name).read_text() == '{"chapter": 7}' and os.listdir(tmp_path) == [name]


def test_a_start_that_was_killed_before_it_wrote_more_than_its_lock_is_begun_again(folder):
    folder.mkdir()
    (folder / "run.lock").write_text("")
    begin(folder)
    assert names(folder) == ["fingerprint.json", "progress.json"]
    (folder / "progress.json").unlink()  # killed between the two
    begin(folder)
    assert names(folder) == ["fingerprint.json", "progress.json"]


def test_a_file_is_no_run_folder(tmp_path):
    (tmp_path / "run").write_text("important")
    with pytest.raises(ConfigError, match="not a run of jaxsft"), claimed(epath.Path(tmp_path / "run")):
        pass
    assert (tmp_path / "run").read_text() == "important"


DAMAGES = [b"", b"[]", b"7", b'"text"', b"{", b"\xff\xfe\0\0", b"[" * 100_000, b'{"seed": 9}', None]


@pytest.mark.parametrize("content", DAMAGES, ids=lambda each: "gone" if each is None else str(each[:8]))
def test_a_fingerprint_is_made_good_from_the_newest_checkpoint(folder, content):
    begin(folder)
    save(folder, 4)
    path = folder / "fingerprint.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    said = []
    with claimed(folder, say=said.append):
        assert json.loads(path.read_text()) == FINGERPRINT
    assert len(said) == 1 and "fingerprint.json" in said[0] and "from the newest checkpoint" in said[0]
    with pytest.raises(ConfigError, match="seed: 1 then, 2 now"), claimed(folder, {"seed": 2, "data": "abc"}):
        pass


@pytest.mark.parametrize("content", DAMAGES[:-2], ids=lambda each: str(each[:8]))
def test_a_fingerprint_that_no_checkpoint_knows_is_one_error_with_a_way_out(folder, content):
    begin(folder)
    (folder / "fingerprint.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"fingerprint.json is damaged .*--restart"), claimed(folder):
        pass
    with claimed(folder, restart=True):
        pass
    begin(folder)


def lose_checkpoints(folder):
    (folder / "checkpoints").rmtree()


def lose_seals(folder):
    for path in (folder / "checkpoints").glob("*/seal.json"):
        path.unlink()


def lose_all_but_metrics(folder):
    lose_checkpoints(folder)
    (folder / "progress.json").unlink()
    (folder / "metrics.jsonl").write_text(LINES)


def lose_all_but_the_export(folder):
    lose_checkpoints(folder)
    (folder / "progress.json").unlink()
    (folder / "export").mkdir()


def lose_seals_and_progress(folder):
    lose_seals(folder)
    (folder / "progress.json").write_text("[]")


@pytest.mark.parametrize(
    ("lose", "says"),
    [
        (lose_checkpoints, "progress.json says that checkpoint 8 was finished"),
        (lose_seals, "checkpoints 4, 8 are there, without their seals"),
        (lose_all_but_metrics, "metrics.jsonl has lines up to step 3"),
        (lose_all_but_the_export, "export/ holds the model"),
        (lose_seals_and_progress, "without their seals"),
    ],
)
def test_a_run_that_was_further_is_never_begun_at_0_but_on_purpose(folder, lose, says):
    begin(folder)
    save(folder, 4, 8)
    lose(folder)
    before = names(folder)
    with claimed(folder), pytest.raises(ConfigError, match=says) as error:
        check_progress(folder)
    assert "--restart" in str(error.value) and "checkpoints" in str(error.value)
    assert names(folder) == before

    said = []
    with claimed(folder, restart=True, say=said.append):
        check_progress(folder)
        assert names(folder) == ["fingerprint.json", "progress.json", "run.lock"]
    assert names(folder.parent / "run.before-1") == before, "moved aside, not deleted"
    assert len(said) == 1 and "run.before-1" in said[0]


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_at_0_again(folder):
    begin(folder)
    (folder / "metrics.jsonl").write_text(LINES)
    begin(folder)
    check_progress(folder)
    # Killed while the first one was being saved.
    (folder / "checkpoints" / "4" / "state").mkdir(parents=True)
    (folder / "checkpoints" / "4" / "meta.json").write_text("{}")
    check_progress(folder)


def test_restart_of_nothing_moves_nothing(folder):
    with claimed(folder, restart=True):
        pass
    assert names(folder.parent) == ["run"]


@pytest.mark.parametrize("content", [b"", b"data: [", b"\xff\x00", b"[]", b"data:\n  template_date: '2026-01"])
def test_the_day_of_a_run_is_known_though_its_config_is_damaged(folder, content):
    begin(folder)
    assert template_date(folder) is None
    (folder / "config.yaml").write_text(CONFIG)
    assert template_date(folder).isoformat() == "2026-01-02"
    save(folder, 4)
    (folder / "config.yaml").write_bytes(content)
    assert template_date(folder).isoformat() == "2026-01-02"
