"""`compare --baseline hf`: two right runs agree, and a fault planted in one of them is found where it is."""

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors

from jaxsft.cli import main
from jaxsft.compare import ours
from jaxsft.compare.checks import _of_tensors
from jaxsft.compare.child import check_packages, run_child
from jaxsft.compare.exchange import exchange as new_exchange
from jaxsft.compare.hf import make_report, write_model, write_request
from jaxsft.config import ConfigError
from jaxsft.config_files import load_config
from jaxsft.disk import writing

pytest.importorskip("torch", reason="the baseline is PyTorch")

import jaxsft.baseline.hf as baseline

STEPS = 6


@pytest.fixture(scope="session")
def exchange(tiny_config, tiny_model, tmp_path_factory):
    """The folder of a comparison after both programs ran; two layers, a rope that is scaled, two microbatches."""
    folder = tmp_path_factory.mktemp("exchange")
    model = folder / "source"
    shutil.copytree(tiny_model, model)
    config = json.loads((model / "config.json").read_text())
    config["rope_scaling"] = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    (model / "config.json").write_text(json.dumps(config))
    overrides = [f"model.path={model}", f"run_dir={folder}/run", "train.microbatch_size=4"]
    overrides += ["mesh.tensor=2", "data.template_date=2026-01-01"]
    write_request(load_config(tiny_config, overrides), folder, num_steps=STEPS)
    run_child("jaxsft.compare.ours", folder, say=print, log="ours.txt")
    run_child("jaxsft.baseline.hf", folder, say=print)
    return folder


def planted(exchange, folder, plant):
    """The report where the baseline got something else."""
    shutil.copytree(exchange, folder, ignore=shutil.ignore_patterns("theirs"))
    plant(folder)
    baseline.main(folder)  # in this process, which has imported it
    return make_report(folder, title="planted")


def failed(report):
    return [check for check in report.checks if check.passed is False]


def test_two_right_programs_agree_in_every_check(exchange):
    report = make_report(exchange, title="tiny")
    assert report.passed and not failed(report), report.checks
    assert len(report.checks) == 12 and all(check.passed for check in report.checks)
    assert [len(run.lines) for run in report.runs] == [STEPS, STEPS]
    assert all(run.figures["tokens_per_second"] > 0 for run in report.runs)


def test_a_shifted_mask_is_found_at_its_first_position(exchange, tmp_path):
    def shift(folder):
        weights = np.load(folder / "weights.npy")
        np.save(folder / "weights.npy", np.roll(weights, -1))

    report = planted(exchange, tmp_path / "shifted", shift)
    first = failed(report)[0]
    assert first.name == "rows" and first.where.startswith("step 1, row 0, position ")
    assert "loss_weights" in first.where and "shift" in report.verdict
    # Where the mask differs, so does the loss, though the model does not.
    names = {check.name for check in failed(report)}
    assert "first loss" in names and not names & {"residual stream", "logits"}


def test_a_missing_rope_scaling_is_found_in_the_first_layer(exchange, tmp_path):
    def drop(folder):
        path = folder / "model" / "config.json"
        config = json.loads(path.read_text())
        config.pop("rope_scaling", None)
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
        path.write_text(json.dumps(config))

    report = planted(exchange, tmp_path / "unscaled", drop)
    first = failed(report)[0]
    assert first.name == "residual stream" and first.where.startswith("layer 1 of 2")
    ours, theirs = (run.settings["model.rope_parameters"] for run in report.runs)
    assert ours["rope_type"] == "llama3" and theirs["rope_type"] == "default"


def test_a_wrong_epsilon_of_a_norm_is_found_in_the_first_layer(exchange, tmp_path):
    def change(folder):
        path = folder / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-2}))

    first = failed(planted(exchange, tmp_path / "norm", change))[0]
    assert first.name == "residual stream" and first.where.startswith("layer 1 of 2")


def test_a_wrong_epsilon_of_the_optimizer_is_found_in_its_first_update(exchange, tmp_path):
    def change(folder):
        path = folder / "request.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"epsilon": 1e-5}))

    report = planted(exchange, tmp_path / "epsilon", change)
    first = failed(report)[0]
    assert first.name == "update of the first step" and first.where.endswith("weight")
    assert "optimizer" in report.verdict
    assert report.runs[1].settings["epsilon"] == 1e-5


@pytest.mark.parametrize("change", [{"beta2": 0.9}, {"weight_decay": 0.0}])
def test_a_setting_that_shows_after_some_steps_is_found_in_the_update_of_all(exchange, tmp_path, change):
    def plant(folder):
        path = folder / "request.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    report = planted(exchange, tmp_path / "later", plant)
    names = {check.name for check in failed(report)}
    assert "update of all steps" in names and not names & {"rows", "logits", "gradients of the first step"}
    assert "PARTS" not in report.verdict and report.verdict.startswith("The two runs part: ")


def test_a_weight_that_differs_is_found_in_its_layer(exchange, tmp_path):
    from safetensors.numpy import load_file, save_file

    name = "model.layers.1.mlp.up_proj.weight"

    def change(folder):
        path = folder / "model" / "model.safetensors"
        tensors = load_file(path)
        tensors[name] = tensors[name] * 1.01
        save_file(tensors, path, metadata={"format": "pt"})

    first = failed(planted(exchange, tmp_path / "weight", change))[0]
    assert first.name == "residual stream" and first.where.startswith("layer 2 of 2")


@pytest.fixture(scope="module")
def adapted(tiny_config, tmp_path_factory):
    """The folder of a comparison of adapters on four bits with PEFT's on their values."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("adapted")
    lora = ["lora.rank=4", "lora.dora=true", "lora.exclude=[v_proj]", r"lora.rank_pattern={layers\.1\..*q_proj: 2}"]
    overrides = [f"run_dir={folder}/run", "model.quantize=nf4", *lora, "data.template_date=2026-01-01", "mesh.tensor=2"]
    write_request(load_config(tiny_config, overrides), folder, num_steps=STEPS)
    ours.main(folder)
    baseline.main(folder)
    return folder


def test_adapters_and_those_of_peft_agree_in_every_check(adapted):
    report = make_report(adapted, title="adapters")
    assert report.passed and not failed(report), report.checks
    assert len(report.checks) == 12
    with safetensors.safe_open(adapted / "ours" / "gradients" / "adapter_model.safetensors", "numpy") as gradients:
        names = list(gradients.keys())
        of_b = [np.abs(gradients.get_tensor(name)).max() for name in names if "lora_B" in name]
    assert "base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector" in names
    assert len(of_b) == 2 * 6 and min(of_b) > 0  # A has none before B is something


def test_another_scale_of_adapters_is_found_in_their_gradients(adapted, tmp_path):
    def rescale(folder):
        path = folder / "adapter" / "adapter_config.json"
        settings = json.loads(path.read_text())
        path.write_text(json.dumps(settings | {"lora_alpha": 2 * settings["lora_alpha"]}))

    first = failed(planted(adapted, tmp_path / "rescaled", rescale))[0]
    assert first.name == "gradients of the first step" and "lora_B" in first.where


def test_adapters_that_peft_trains_otherwise_are_refused(tiny_config, tmp_path):
    for keys, said in ((["lora.dropout=0.1"], "lora.dropout"), (["train.only=[norms]"], "train.only")):
        given = keys if "only" in keys[0] else ["lora.rank=2", *keys]
        with pytest.raises(ConfigError, match=said):
            write_request(load_config(tiny_config, given), tmp_path, num_steps=2)


def test_a_package_that_is_missing_or_old_is_named_with_the_remedy():
    with pytest.raises(ConfigError, match=r"nosuchpackage is not installed; numpy is .*pip install .jaxsft\[compare\]"):
        check_packages({"nosuchpackage": "1.0", "numpy": "999.0"})


def test_what_the_baseline_does_not_do_is_refused_all_at_once(tiny_config, tmp_path):
    overrides = ["data.stream=true", "model.param_dtype=bfloat16", "optim.moment_dtype=bfloat16"]
    with pytest.raises(
        ConfigError, match=r"--steps: 0.*\ndata\.stream: true.*\nmodel\.param_dtype.*\noptim\.moment_dtype"
    ):
        write_request(load_config(tiny_config, overrides), tmp_path, num_steps=0)


def test_what_two_programs_write_must_fit_before_they_begin(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "free_bytes", lambda path: 1000)
    for write in (lambda: write_request(load_config(tiny_config), tmp_path, 1),
                  lambda: write_model(load_config(tiny_config), tmp_path / "model")):  # fmt: skip
        with pytest.raises(writing.WriteError, match=r"No space left on device \([\d,]{5,} bytes needed, 1,000 "):
            write()
    assert not list(tmp_path.iterdir())


def test_a_number_that_is_none_is_named_and_fails():
    check = _of_tensors("gradients", {"a": 1e-9, "b": float("nan")}, 1e-3)
    assert check.where == "b" and check.passed is False


def test_the_exchange_goes_with_its_process_and_a_failed_child_leaves_its_words(tmp_path):
    out = tmp_path / "run.compare-hf"
    code = "import sys, os; from pathlib import Path; from jaxsft.compare.exchange import exchange\n"
    code += "with exchange(Path(sys.argv[1])) as folder: print(folder); sys.stdout.flush(); os.kill(os.getpid(), 9)"
    killed = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True)
    stale = pathlib.Path(killed.stdout.strip())
    assert killed.returncode == -9 and stale.is_dir() and stale.parent == tmp_path
    with (
        pytest.raises(ConfigError, match=r"exit code 1; the end of its output:\n.*No module named"),
        new_exchange(out) as folder,
    ):
        assert not stale.exists() and folder.parent == tmp_path
        run_child("jaxsft.nosuchmodule", folder, say=print)
    assert not folder.exists()
    assert "No module named" in (out / "log.txt").read_text()


def test_overrides_may_stand_behind_options(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "none.yaml", "--baseline", "hf", "--nosuch"])
    assert "unrecognized arguments: --nosuch" in capsys.readouterr().err
    assert main(["compare", "none.yaml", "--baseline", "hf", "train.steps=3"]) == 1
    assert "none.yaml: no such config file" in capsys.readouterr().err
