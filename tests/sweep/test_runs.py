"""The runs of a sweep: one after the other, each once, and what is said of them; what they share."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import pytest
from compilation import xla_flags

from jaxsft.cli import main
from jaxsft.config import ConfigError
from jaxsft.disk.seal import problem_of
from jaxsft.report.records import from_json
from jaxsft.sweep.grid import make_trials
from jaxsft.sweep.runs import Ended, sweep, with_one_day

COMMAND = "python run.py sweep"


EVENTS = []
jax.monitoring.register_event_listener(lambda event, **_: EVENTS.append(event))


def compiled_since(number):
    """How many programs were not found compiled after so many events."""
    return EVENTS[number:].count("/jax/compilation_cache/cache_misses")


@pytest.fixture
def trials(tiny_config, tmp_path):
    """Three runs of two steps; the learning rate of the second one makes its loss infinite."""
    given = ["optim.learning_rate=1e-2,1e30,2e-2", "train.steps=2", "optim.max_skipped=0", "checkpoint.every=1"]
    return with_one_day(make_trials(str(tiny_config), [*given, f"run_dir={tmp_path}/s"]))


class Starts:
    """Trains in this process, and notes what it was asked to."""

    def __init__(self, source):
        self.source, self.names, self.prepared = source, [], []

    def __call__(self, trial):
        self.names.append(trial.name)
        code = main(["train", str(self.source), *trial.overrides])
        self.prepared.append(sorted(os.listdir(self.source.parent / "cache")))
        return Ended(code)


def test_a_run_that_fails_is_told_and_finished_ones_are_not_trained_again(trials, tiny_config, tmp_path):
    said, start = [], Starts(tiny_config)
    assert sweep(trials, start=start, command=COMMAND, say=said.append) == 1
    assert start.names == [trial.name for trial in trials]
    for trial in (trials[0], trials[2]):
        assert problem_of(tmp_path / "s" / trial.name / "export") is None
    assert "run 2 of 3: learning_rate=1e30: failed with exit code 1" in said
    assert start.prepared[0] and start.prepared[0] == start.prepared[1] == start.prepared[2]  # rows are prepared once

    # The table: by the held-out loss, those that failed last.
    (table,) = [text for text in said if text.startswith("learning_rate")]
    rows = [line.split() for line in table.splitlines()[1:]]
    metrics = {
        trial.settings["optim.learning_rate"]: [
            line["eval_loss"]
            for line in map(json.loads, (tmp_path / "s" / trial.name / "metrics.jsonl").read_text().splitlines())
            if "eval_loss" in line
        ]
        for trial in trials
    }
    best_first = sorted(("1e-2", "2e-2"), key=lambda rate: min(metrics[rate]))
    assert [row[0] for row in rows] == [*best_first, "1e30"] and "failed" in rows[2]
    for rate, last, best, *_ in rows[:2]:
        assert float(last) == pytest.approx(metrics[rate][-1], abs=1e-4)
        assert float(best) == pytest.approx(min(metrics[rate]), abs=1e-4)

    # The page has all three, under their settings.
    report = from_json(json.loads((tmp_path / "s" / "report" / "report.json").read_text()))
    assert [run.name for run in report.runs] == [f"learning_rate={rate}" for rate in [*best_first, "1e30"]]
    assert (
        f"with learning_rate={best_first[0]}." in report.verdict
        and "Not finished: learning_rate=1e30" in report.verdict
    )
    assert report.command == COMMAND and (tmp_path / "s" / "report" / "report.html").exists()

    # Again: only what is not finished is trained, whoever has looked at the folders meanwhile.
    again, said = Starts(tiny_config), []
    assert sweep(trials, start=again, command=COMMAND, say=said.append) == 1
    assert again.names == [trials[1].name]
    assert "run 1 of 3: learning_rate=1e-2: was finished before" in said

    # An export that is not as it was sealed is made again by `train`, and so is a run that is asked for more.
    (tmp_path / "s" / trials[0].name / "export" / "config.json").write_text("{}")
    third = Starts(tiny_config)
    sweep(trials[::2], start=third, command=COMMAND, say=said.append)
    assert third.names == [trials[0].name]


def test_learning_rate_schedule_decay_clipping_and_seed_do_not_compile_again(tiny_config, tmp_path):
    settings = [
        "optim.learning_rate=3e-2",
        "optim.clip_norm=0.5",
        "optim.warmup_steps=1",
        "optim.weight_decay=0.2",
        "optim.final_ratio=0.5",
        "seed=7",
    ]
    base = [str(tiny_config), "train.steps=2", f"run_dir={tmp_path}/0"]
    assert main(["train", *base]) == 0
    for number, setting in enumerate(settings, start=1):
        before = len(EVENTS)
        assert main(["train", *base[:-1], setting, f"run_dir={tmp_path}/{number}"]) == 0
        assert compiled_since(before) == 0, setting
        assert "/jax/compilation_cache/cache_hits" in EVENTS[before:]
    before = len(EVENTS)
    assert main(["train", *base[:-1], "optim.beta1=0.8", f"run_dir={tmp_path}/other"]) == 0
    assert compiled_since(before) == 1  # the step alone


@pytest.mark.parametrize(
    ("ends", "code", "last"),
    [
        ([Ended(0), Ended(65), Ended(1)], 65, "failed with exit code 1"),
        ([Ended(75), Ended(0), Ended(74)], 74, "failed with exit code 74"),
        ([Ended(75), Ended(0), Ended(0)], 75, ""),
        ([Ended(-9), Ended(0), Ended(0)], 1, ""),
        ([Ended(1), Ended(75, is_sweep_stopped=True)], 75, "not begun"),
        ([Ended(0, is_sweep_stopped=True)], 75, "not begun"),
        ([Ended(0), Ended(0), Ended(0)], 0, ""),
    ],
)
def test_the_exit_code_and_the_table_say_how_each_run_ended(trials, tmp_path, ends, code, last):
    said, given = [], iter(ends)
    assert sweep(trials, start=lambda trial: next(given), command=COMMAND, say=said.append) == code
    assert next(given, None) is None  # all of them were started, and none after a stop
    (table,) = [text for text in said if text.startswith("learning_rate")]
    assert sum(last in line for line in table.splitlines()[1:]) >= 1
    assert ("killed by SIGKILL, probably for want of memory" in table) == (Ended(-9) in ends)
    assert not (tmp_path / "s" / "report").exists()  # nothing was trained, so there is nothing to show


def test_what_stands_in_the_way_of_the_report_is_said_before_a_run_begins(trials, tiny_config, tmp_path):
    (tmp_path / "s" / "report").mkdir(parents=True)
    (tmp_path / "s" / "report" / "notes.txt").write_text("mine")
    start = Starts(tiny_config)
    with pytest.raises(ConfigError, match="holds more than a report"):
        sweep(trials, start=start, command=COMMAND)
    assert not start.names


def test_a_sweep_does_not_go_into_the_folder_of_a_run(trials, tiny_config, tmp_path):
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "fingerprint.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds a run itself; give the sweep a folder of its own"):
        sweep(trials, start=Starts(tiny_config), command=COMMAND)
    assert [path.name for path in folder.iterdir()] == ["fingerprint.json"]


def test_all_runs_of_a_sweep_see_the_day_of_the_first_one(trials, tiny_config, tmp_path):
    folder = tmp_path / "s" / trials[2].name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("data: {template_date: 2024-02-29}\n")
    given = ["optim.learning_rate=1e-2,1e30,2e-2", f"run_dir={tmp_path}/s"]
    dated = with_one_day(make_trials(str(tiny_config), given))
    assert {trial.config.data.template_date for trial in dated} == {"2024-02-29"}
    assert all("data.template_date=2024-02-29" in trial.overrides for trial in dated)


def test_a_sweep_that_is_stopped_saves_and_goes_on_where_it_was(tiny_config, tmp_path):
    """By processes, as a user starts it: SIGTERM to the sweep alone stops the run in it, and the sweep."""
    repo = pathlib.Path(__file__).resolve().parents[2]
    environment = os.environ | {"XLA_FLAGS": xla_flags(1)}
    given = ["optim.learning_rate=1e-2,2e-2", "train.steps=400", "checkpoint.every=400", f"run_dir={tmp_path}/s"]
    command = [sys.executable, "run.py", "sweep", str(tiny_config), *given]
    process = subprocess.Popen(
        command, cwd=repo, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    metrics = tmp_path / "s" / "learning_rate=1e-2" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and '"step": 3,' in metrics.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert "SIGTERM: saved step" in said and "stopped; the same command goes on with it" in said
    assert "not begun" in said and not (tmp_path / "s" / "learning_rate=2e-2").exists()
    steps = [int(path.name) for path in (metrics.parent / "checkpoints").iterdir() if path.name.isdigit()]
    assert steps and 0 < min(steps) < 400

    given[1] = f"train.steps={max(steps) + 2}"
    command = [sys.executable, "run.py", "sweep", str(tiny_config), *given]
    done = subprocess.run(command, cwd=repo, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"step {max(steps) + 2}" in done.stdout and "page: " in done.stdout
    assert "compiling the train step" in done.stdout
