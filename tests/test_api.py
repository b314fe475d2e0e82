"""From Python: the examples of docs/api.md run as they stand there, and events tell what a run does."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import jaxsft
from jaxsft.config import ConfigError
from jaxsft.training.checkpoint import sealed_steps


@pytest.fixture
def place(tmp_path, repo, tiny_model, monkeypatch):
    """A folder with the configs of the checkout, as the current one; the quickstart's model is a tiny one."""
    shutil.copytree(repo / "configs", tmp_path / "configs")
    shutil.copy(tiny_model / "config.json", tmp_path / "configs" / "quickstart")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config_of(tiny_config, tmp_path, *overrides):
    return jaxsft.load_config(tiny_config, [f"run_dir={tmp_path}/run", *overrides])


def hashes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def whole(tiny_config, tmp_path_factory):
    """A run from its beginning to its end: its folder, and the events that it told."""
    folder = tmp_path_factory.mktemp("whole")
    events = list(jaxsft.run(config_of(tiny_config, folder, "eval.every=6")))
    return folder / "run", events


def test_the_examples_of_the_docs_run_as_they_stand(place, repo, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (repo / "docs" / "api.md").read_text(), re.DOTALL)
    assert len(blocks) == 4
    names = {}
    for block in blocks:
        exec(compile(block, "docs/api.md", "exec"), names)
    assert len(names["losses"]) == 6 and isinstance(names["event"], jaxsft.Finished)
    assert (place / "runs" / "notebook" / "export" / "model.safetensors").exists()
    assert (place / "runs" / "own-loop" / "model.safetensors").exists()
    assert int(names["state"].step) == 5 and names["result"].metrics["eval_loss"] > 0
    assert len(names["answers"]) == 2 and all(isinstance(answer, str) for answer in names["answers"])


def test_what_the_docs_show_is_what_is_offered(repo):
    text = (repo / "docs" / "api.md").read_text()
    for name in jaxsft._MODULE_OF:
        assert hasattr(jaxsft, name) and name in dir(jaxsft)
        assert name in text or name in ("Batches", "LoadedModel", "Config"), name
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        jaxsft.trian  # noqa: B018


def test_nothing_is_imported_before_it_is_asked_for(repo):
    code = "import sys, jaxsft; print(sorted(m for m in sys.modules if m in ('jax', 'transformers', 'pydantic')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=repo)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("before", ["", "import jaxsft.train; ", "from jaxsft.train import run; "])
def test_train_can_be_called_whoever_has_imported_its_module(repo, tiny_config, tmp_path, before):
    # Refused once it has looked at the devices, which is long after it was called.
    config = f"jaxsft.load_config({str(tiny_config)!r}, ['run_dir={tmp_path}/run', 'mesh.tensor=3'])"
    code = f"{before}import jaxsft; print(jaxsft.train({config}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=repo)
    assert "ConfigError: mesh: tensor 3 does not fit" in done.stderr.splitlines()[-1], done.stderr


def test_events_tell_what_the_files_of_the_run_hold(whole, tiny_config):
    folder, events = whole
    kinds = [(type(event).__name__, event.step) for event in events]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    told = [event for event in events if isinstance(event, jaxsft.Line | jaxsft.Evaluated)]
    assert [event.step for event in told] == [line["step"] for line in lines]
    assert [event.metrics.get("loss") for event in told] == [line.get("loss") for line in lines]
    assert kinds[0] == ("Evaluated", 0) and kinds[-1] == ("Finished", 12)
    assert [step for kind, step in kinds if kind == "Evaluated"] == [0, 6, 12]
    saved = [event for event in events if isinstance(event, jaxsft.Saved)]
    assert {4, 8, 12} <= {event.step for event in saved} and all(
        event.folder.name == str(event.step) for event in saved
    )
    assert events[-1].export == folder / "export"
    again = list(jaxsft.run(config_of(tiny_config, folder.parent, "eval.every=6")))
    assert again == [jaxsft.Finished(12, folder / "export")]


@pytest.mark.parametrize("leave_at", [("Evaluated", 0), ("Line", 1), ("Line", 6), ("Saved", 8), ("Evaluated", 12)])
def test_who_leaves_the_loop_stops_the_run_and_it_goes_on_as_if_it_had_not(whole, tiny_config, tmp_path, leave_at):
    kind, step = leave_at
    config = config_of(tiny_config, tmp_path / "left")
    for event in jaxsft.run(config):
        if (type(event).__name__, event.step) == leave_at:
            break
    left = tmp_path / "left" / "run"
    assert sealed_steps(left / "checkpoints")[-1:] == [step] * (step > 0)
    assert not (left / "run.lock").exists() and not (left / "export").exists()
    assert jaxsft.train(config) == 0
    assert hashes(left / "export") == hashes(whole[0] / "export")


def test_an_error_in_the_loop_of_a_user_is_a_stop_as_well(tiny_config, tmp_path):
    def go():
        for event in jaxsft.run(config_of(tiny_config, tmp_path)):
            if isinstance(event, jaxsft.Line) and event.step == 3:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        go()
    assert sealed_steps(tmp_path / "run" / "checkpoints") == [3] and not (tmp_path / "run" / "run.lock").exists()


def test_a_loop_by_hand_does_what_train_does(whole, tiny_config, tmp_path):
    run, _ = whole
    config = config_of(tiny_config, tmp_path)
    data, model = jaxsft.prepare(config), jaxsft.load_model(config)
    step = jaxsft.train_step(config, model, num_steps=data.num_steps)
    state = jaxsft.init_state(config, model)
    for number in range(data.num_steps):
        state, metrics = step(state, data.batch(number))
    jaxsft.export(model, tmp_path / "by-hand", state.params)
    assert hashes(tmp_path / "by-hand") == hashes(run / "export")
    with pytest.raises(ValueError, match="pass params=state.params"):
        jaxsft.generate(model, [[{"role": "user", "content": "hi"}]])
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-2])
    assert float(metrics.sums.loss_sum / metrics.sums.weight_sum) == pytest.approx(last["loss"], rel=1e-6)
    result = jaxsft.evaluate(config, model, state.params)
    final = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert result.metrics["eval_loss"] == final["eval_loss"]
    exported = jaxsft.load_model(run / "export")
    assert jaxsft.evaluate(config, exported).metrics["eval_loss"] == final["eval_loss"]  # of the model that is given


def test_logits_give_the_loss_that_the_chunked_one_gives(tiny_config):
    config = jaxsft.load_config(tiny_config)
    data, model = jaxsft.prepare(config), jaxsft.load_model(config)
    with jax.set_mesh(model.mesh):
        batch = data.batch(0)
        logits = jax.device_get(jax.jit(lambda p, b: model.logits(p, model.hidden(p, b)))(model.params, batch))
        sums = jax.device_get(jax.jit(model.loss)(model.params, batch))
    logits = logits.astype(np.float64)
    nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, np.asarray(batch.targets)[..., None], -1)[..., 0]
    assert logits.shape[-1] == model.config.vocab_size
    assert float(sums.loss_sum) == pytest.approx(float((nll * np.asarray(batch.loss_weights)).sum()), rel=1e-5)


def test_answers_of_a_folder_are_those_of_its_tokens(tiny_config, tmp_path, repo):
    config = config_of(tiny_config, tmp_path)
    model = jaxsft.load_model(config)
    jaxsft.export(model, tmp_path / "model")
    asked = [[{"role": "user", "content": f"{word}: please spell it."}] for word in ("blob", "clot", "a")]
    again = jaxsft.load_model(tmp_path / "model")
    assert jaxsft.generate(again, asked, max_new_tokens=5) == jaxsft.generate(model, asked, max_new_tokens=5)
    drawn = [
        jaxsft.generate(again, asked, max_new_tokens=5, temperature=1.0, top_p=0.9, seed=seed) for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(ValueError, match="top_p 0 given"):
        jaxsft.generate(again, asked, top_p=0)
    with pytest.raises(ValueError, match=r"conversations\[0\]: .* given, expected a list of messages such as"):
        jaxsft.generate(again, asked[0])
    with pytest.raises(ValueError, match="max_new_tokens 0 given, expected 1 or more"):
        jaxsft.generate(again, asked, max_new_tokens=0)


def test_a_dict_is_a_config_like_a_file_and_needs_a_folder_only_for_a_run(place):
    tree = {
        "model": {"path": "configs/quickstart", "weights": "random"},
        "data": {"train": "configs/quickstart/train.jsonl", "seq_len": 128, "cache": str(place / "cache")},
        "train": {"batch_size": 8, "steps": 2},
    }
    config = jaxsft.load_config(tree, ["train.steps=3"])
    assert config.train.steps == 3 and tree["train"]["steps"] == 2 and jaxsft.prepare(config).num_steps == 3
    with pytest.raises(ConfigError, match="run_dir: required for a run whose config is no file"):
        jaxsft.train(config)
    with pytest.raises(ConfigError, match=r"config: 1 mistake in the config:\n  train.stepz: unknown key"):
        jaxsft.load_config({**tree, "train": {"stepz": 1}})
    with pytest.raises(ConfigError, match="does not fit this model and batch"):
        jaxsft.load_model(jaxsft.load_config(tree, ["train.batch_size=7"]))
    assert not os.path.exists(pathlib.Path("runs"))
