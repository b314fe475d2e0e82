"""Lines of metrics arrive where they are sent, once each on a run that crashed, and a logger never ends a run."""

import json
import os
import struct
import subprocess
import sys

import pytest
from etils import epath

from jaxsft.config import ConfigError, LogConfig
from jaxsft.training.metrics_file import MetricsFile
from jaxsft.training.writers import Guarded, TensorBoard, check_writers, open_writers, run_id, tagged


def line(step, **values):
    return {"step": step, "loss": step / 8, "tokens_per_second": 100.0, "total_tokens": 10.0 * step} | values


FIRST = [{"step": 0, "eval_loss": 4.0, "eval_loss/en": 5.0}, line(1), line(2), line(3)]
AGAIN = [line(3, loss=0.5), line(4)]
"""After a crash, with the checkpoint of step 2 the newest."""


def test_values_are_grouped_for_charts():
    groups = tagged({"step": 3, "loss": 1.0, "eval_loss/en": 2.0, "mfu": 0.5, "stream_rows": 7, "epoch": 0.1})
    groups |= tagged({"rows_crc": 12345, "router_z": 0.1})
    assert set(groups) == {
        "train/loss",
        "eval/loss/en",
        "speed/mfu",
        "data/stream_rows",
        "data/epoch",
        "train/router_z",
    }


def test_a_run_keeps_its_id_and_another_folder_has_another(tmp_path):
    folders = [epath.Path(tmp_path) / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    ids = [run_id(folder) for folder in (*folders, *folders)]
    assert ids[:2] == ids[2:] and ids[0] != ids[1]


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """A run folder with the files of all three, written by two processes as a run that was killed and continued."""
    for name in ("tensorboard", "wandb", "trackio"):
        pytest.importorskip(name, reason="the loggers are optional: pip install 'jaxsft[tensorboard,wandb,trackio]'")
    folder = tmp_path_factory.mktemp("logged") / "run"
    folder.mkdir()
    program = """
import json, os, sys
from etils import epath
from jaxsft.config import LogConfig
from jaxsft.training.metrics_file import MetricsFile
from jaxsft.training.writers import check_writers, open_writers
folder, step, lines, is_killed = json.loads(sys.argv[1])
log = LogConfig(to=["tensorboard", "wandb", "trackio"], project="test")
check_writers(log, epath.Path(folder))
file = MetricsFile(epath.Path(folder) / "metrics.jsonl", step=step)
settings = {"seed": 7, "optim": {"beta1": 0.5}}
writers = open_writers(log, epath.Path(folder), step=step, file=file, settings=settings, say=print)
for line in lines:
    for writer in (file, *writers):
        writer.write(line)
if is_killed:
    import time
    time.sleep(2)  # trackio hands over what it has twice a second
    os._exit(9)
for writer in writers:
    writer.close()
import trackio
rows = trackio.SQLiteStorage.get_logs("test", trackio.Api().runs("test")[0].name)
print("ROWS", json.dumps([len(trackio.Api().runs("test")), rows], default=str))
"""
    environment = os.environ | {"WANDB_MODE": "offline", "TRACKIO_DIR": str(folder / "trackio"), "WANDB_SILENT": "true"}
    environment.pop("XLA_FLAGS", None)
    output = ""
    for arguments, code in (([str(folder), 0, FIRST, True], 9), ([str(folder), 2, AGAIN, False], 0)):
        process = subprocess.run(
            [sys.executable, "-c", program, json.dumps(arguments)], env=environment, capture_output=True, text=True
        )
        output = process.stdout
        assert process.returncode == code, process.stdout + process.stderr
    return folder, output


def test_tensorboard_shows_each_step_once_and_the_last_value(logged):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logged[0] / "tensorboard"))
    events.Reload()
    assert {"train/loss", "speed/tokens_per_second", "data/total_tokens", "eval/loss", "eval/loss/en"} == set(
        events.Tags()["scalars"]
    )
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (1, 0.125), (2, 0.25), (3, 0.5), (4, 0.5),
    ]  # fmt: skip
    assert [(event.step, event.value) for event in events.Scalars("eval/loss")] == [(0, 4.0)]


def wandb_records(path):
    """The messages of a `.wandb` file, a log of LevelDB after 7 bytes of its own; what a kill cut off is left out."""
    from wandb.proto import wandb_internal_pb2

    data, at, message = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no record begins in the last bytes of a block
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        message += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4) and at <= len(data):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            yield record
            message = b""


def test_a_continued_run_is_the_same_run_of_weights_and_biases_and_lacks_nothing(logged):
    folder = logged[0]
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    assert [path.name for path in files] == [f"run-{run_id(epath.Path(folder))}.wandb"] * 2
    starts = []
    for path in files:
        rows, config = {}, {}
        for record in wandb_records(path):
            if record.HasField("run"):
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
                assert (record.run.project, record.run.display_name) == ("test", "run")
            if record.HasField("history"):
                row = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                rows.setdefault(record.history.step.num, {}).update(row)
        assert not rows or (config["seed"] == 7 and config["optim"] == {"beta1": 0.5})
        starts.append({step: row.get("train/loss", row.get("eval/loss")) for step, row in rows.items()})
    # The killed process may have written nothing: the file of the next one is whole.
    assert starts[1] == {0: 4.0, 1: 0.125, 2: 0.25, 3: 0.5, 4: 0.5}


def test_a_continued_run_is_the_same_run_of_trackio_and_repeats_nothing(logged):
    found = next(text for text in logged[1].splitlines() if text.startswith("ROWS "))
    num_runs, rows = json.loads(found.removeprefix("ROWS "))
    assert num_runs == 1
    assert [(row["step"], row.get("train/loss")) for row in rows] == [
        (0, None), (1, 0.125), (2, 0.25), (3, 0.375), (4, 0.5),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_package_that_is_not_installed_is_named_with_what_to_install(monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, name, None)  # to Python, it is not there
    with pytest.raises(ConfigError, match=rf"log.to: {name} not installed: pip install 'jaxsft\[{name}\]'"):
        check_writers(LogConfig(to=[name]), epath.Path(tmp_path))


def test_without_a_key_for_weights_and_biases_a_run_ends_before_it_begins_and_asks_nothing(tiny_config, tmp_path, repo):
    pytest.importorskip("wandb")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_CONFIG_DIR": str(tmp_path / "none")}
    process = subprocess.run(
        [sys.executable, repo / "run.py", "train", tiny_config, f"run_dir={tmp_path}/run", "log.to=wandb"],
        env=environment, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.returncode == 1
    assert "no key for Weights & Biases here: run `wandb login`, or set WANDB_MODE=offline" in process.stderr
    assert "Traceback" not in process.stderr and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_what_a_logger_cannot_take_is_said_once_and_counted(tmp_path):
    pytest.importorskip("tensorboard")
    said = []
    writer = Guarded("tensorboard", TensorBoard(epath.Path(tmp_path) / "tb", step=0, lines=[]), said.append)
    for values in (line(1), line(2, loss="no number"), line(3, loss="nor this"), line(4)):
        writer.write(values)
    assert len(said) == 1 and "tensorboard: the line of step 2 was not logged (TypeError" in said[0]
    writer.close()
    assert said[1:] == ["WARNING: tensorboard: 2 of 4 lines were not logged"]


def test_a_logger_that_cannot_be_opened_is_an_error_before_training(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    with pytest.raises(ConfigError, match="log.to: tensorboard could not be opened: FileExistsError"):
        file = MetricsFile(epath.Path(tmp_path) / "metrics.jsonl", step=0)
        open_writers(LogConfig(to=["tensorboard"]), epath.Path(tmp_path), step=0, file=file, settings={}, say=print)


def test_a_logger_that_is_added_later_gets_the_lines_from_before(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = epath.Path(tmp_path)
    file = MetricsFile(folder / "metrics.jsonl", step=0)
    for each in FIRST:
        file.write(each)
    file = MetricsFile(folder / "metrics.jsonl", step=2)
    (writer,) = open_writers(LogConfig(to=["tensorboard"]), folder, step=2, file=file, settings={}, say=print)
    for each in AGAIN:
        writer.write(each)
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
