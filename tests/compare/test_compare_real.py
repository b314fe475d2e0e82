"""`compare --baseline hf` on the quickstart, on stories260K and on SmolLM2: a planted fault is found, and where it is.

All three models get a rope scaling, to be missing in one of the two programs. Ours runs once per model.
"""

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from compilation import xla_flags
from one_device import process_of_one_device

from jaxsft.compare import ours
from jaxsft.compare.hf import make_report, write_request
from jaxsft.config_files import load_config
from jaxsft.report.records import Check, Report

pytest.importorskip("torch", reason="the baseline is PyTorch")

import jaxsft.baseline.hf as baseline


class Case(NamedTuple):
    config: pathlib.Path
    overrides: list[str]
    num_steps: int
    num_layers: int
    xla_flags: str | None
    """Of our run; None is as for users."""


def quickstart(request, folder) -> Case:
    configs = request.getfixturevalue("repo") / "configs"
    (folder / "train.jsonl").write_text(_first_lines(configs / "quickstart" / "train.jsonl", 400))
    model = _scaled(configs / "quickstart", folder / "source")
    overrides = [f"model.path={model}", f"data.train={folder}/train.jsonl", "train.batch_size=4"]
    return Case(configs / "quickstart.yaml", overrides, num_steps=2, num_layers=2, xla_flags=xla_flags(1))


def stories260k(request, folder) -> Case:
    material = request.getfixturevalue("material")
    rows = json.loads((material / "data" / "alpaca_en.json").read_text())[:100]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = _scaled(material / "models" / "stories260K", folder / "source")
    (folder / "stories.yaml").write_text(
        f"""
model: {{path: {model}}}
data: {{train: {folder}/train.jsonl, chat_template: plain, seq_len: 256}}
train: {{batch_size: 4, microbatch_size: 2, steps: 100}}
optim: {{learning_rate: 1e-3, warmup_steps: 10, weight_decay: 0.1}}
"""
    )
    return Case(folder / "stories.yaml", [], num_steps=2, num_layers=5, xla_flags=xla_flags(1))


def smollm2(request, folder) -> Case:
    material = request.getfixturevalue("material")
    (folder / "train.jsonl").write_text(_first_lines(material / "data" / "gsm8k_train.jsonl", 100))
    model = _scaled(request.getfixturevalue("smollm2"), folder / "source")
    config = request.getfixturevalue("repo") / "configs" / "smollm2_gsm8k.yaml"
    overrides = [f"model.path={model}", f"data.train={folder}/train.jsonl", "data.seq_len=160", "train.batch_size=2"]
    return Case(config, overrides, num_steps=1, num_layers=30, xla_flags=None)


def _first_lines(path: pathlib.Path, count: int) -> str:
    return "".join(path.read_text().splitlines(keepends=True)[:count])


def _scaled(source: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """The model with a rope scaling; its weights are linked."""
    shutil.copytree(source, folder, copy_function=_link_weights)
    config = json.loads((folder / "config.json").read_text())
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config["rope_parameters"] |= scaling | {"original_max_position_embeddings": 64}
    _write(folder / "config.json", config)
    return folder


def _link_weights(source: str, target: str) -> None:
    if source.endswith(".safetensors"):
        pathlib.Path(target).symlink_to(pathlib.Path(source).resolve())
    else:
        shutil.copyfile(source, target)


def _write(path: pathlib.Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content))


def _change(path: pathlib.Path, **changes: Any) -> None:
    _write(path, json.loads(path.read_text()) | changes)


@pytest.fixture(scope="module", params=[quickstart, stories260k, smollm2], ids=lambda case: case.__name__)
def case(request, tmp_path_factory) -> Case:
    return request.param(request, tmp_path_factory.mktemp("case"))


@pytest.fixture(scope="module")
def exchange(case, tmp_path_factory):
    """The folder of a comparison after ours ran, on one device, which need not cut the rows."""
    folder = tmp_path_factory.mktemp("exchange")
    overrides = [
        *case.overrides,
        f"data.cache={folder}/cache",
        f"run_dir={folder}/run",
        "data.template_date=2026-01-01",
    ]
    config = load_config(case.config, overrides)
    with process_of_one_device(xla_flags=case.xla_flags) as pool:
        pool.submit(write_request, config, folder, num_steps=case.num_steps).result()
        pool.submit(ours.main, folder).result()
    yield folder
    shutil.rmtree(folder)  # gigabytes


def report_of(exchange: pathlib.Path, folder: pathlib.Path, plant: Callable[[pathlib.Path], Any]) -> Report:
    """The report where the baseline got something else."""
    shutil.copytree(exchange, folder, copy_function=_link_weights)
    plant(folder)
    baseline.main(folder)
    report = make_report(folder, title="planted")
    shutil.rmtree(folder)
    print(report.verdict, *report.checks, sep="\n")
    return report


def failed(report: Report) -> list[Check]:
    return [check for check in report.checks if check.passed is False]


def test_without_a_fault_every_check_holds(case, exchange, tmp_path):
    report = report_of(exchange, tmp_path / "right", lambda folder: None)
    assert report.passed and not failed(report), report.verdict
    num_checks = 12 if case.num_steps > 1 else 10  # with one step, the last is the first
    assert len(report.checks) == num_checks and all(check.passed for check in report.checks)
    assert [len(run.lines) for run in report.runs] == [case.num_steps] * 2


def test_the_shifted_mask_of_one_example_is_found_at_its_step_row_and_position(case, exchange, tmp_path):
    step, row, start, first, length = (int(each) for each in np.load(exchange / "segments.npy")[-1])
    assert (step, row) == (case.num_steps - 1, json.loads((exchange / "request.json").read_text())["batch_size"] - 1)
    weights = np.load(exchange / "weights.npy")
    of_example = weights[first : first + length]
    # The weight of the first trained token comes one token early, and a token is predicted at the one before it.
    position = start + int((of_example != 0).argmax()) - 2
    of_example[:] = np.roll(of_example, -1)

    report = report_of(exchange, tmp_path / "mask", lambda folder: np.save(folder / "weights.npy", weights))
    first_failed, *others = failed(report)
    assert first_failed.name == "rows"
    assert first_failed.where == f"step {step + 1}, row {row}, position {position}: loss_weights 0.0 and 1.0"
    assert "mask" in report.verdict
    # The loss differs from that step on, the model nowhere.
    wheres = {check.name: check.where for check in others}
    assert wheres["loss of every step"].startswith(f"step {step + 1}: ")
    assert not wheres.keys() & {"learning rates", "residual stream", "logits"}


def test_a_missing_rope_scaling_is_found_in_the_first_layer(case, exchange, tmp_path):
    def drop(folder):
        path = folder / "model" / "config.json"
        theta = json.loads(path.read_text())["rope_parameters"]["rope_theta"]
        _change(path, rope_parameters={"rope_type": "default", "rope_theta": theta}, rope_scaling=None)

    report = report_of(exchange, tmp_path / "rope", drop)
    first = failed(report)[0]
    assert first.name == "residual stream" and first.where == f"layer 1 of {case.num_layers} (before it 0.0e+00)"
    assert "ropes" in report.verdict
    mine, other = (run.settings["model.rope_parameters"] for run in report.runs)
    assert mine["rope_type"] == "llama3" and other["rope_type"] == "default"


def test_a_wrong_epsilon_of_the_norms_is_found_in_the_first_layer(case, exchange, tmp_path):
    def change(folder):
        # What transformers takes where a config is silent.
        _change(folder / "model" / "config.json", rms_norm_eps=1e-6)

    report = report_of(exchange, tmp_path / "norm", change)
    first = failed(report)[0]
    assert first.name == "residual stream" and first.where == f"layer 1 of {case.num_layers} (before it 0.0e+00)"
    assert "epsilons" in report.verdict
    mine, other = (run.settings["model.rms_norm_eps"] for run in report.runs)
    assert mine == pytest.approx(1e-5) and other == 1e-6


def test_a_wrong_epsilon_of_adam_is_found_in_the_first_update(exchange, tmp_path):
    report = report_of(exchange, tmp_path / "adam", lambda folder: _change(folder / "request.json", epsilon=1e-6))
    first = failed(report)[0]
    assert first.name == "update of the first step" and first.where.endswith(".weight")
    assert "epsilon" in report.verdict
    assert [run.settings["epsilon"] for run in report.runs] == [1e-8, 1e-6]
