"""Whole runs: stopped, killed, continued, on other devices, in several processes; and what a user sees of mistakes."""

import datetime
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from compilation import xla_flags
from etils import epath

from jaxsft.cli import main
from jaxsft.config_files import load_config
from jaxsft.hosts.logs import last_lines
from jaxsft.train import Due, due_after, run, train
from jaxsft.training.events import Saved

EXACT = ("loss", "accuracy", "grad_norm", "learning_rate", "total_tokens", "rows_crc")


def start(config, overrides, *, devices=8, **environment):
    """The command as a user starts it."""
    environment = os.environ | {"XLA_FLAGS": xla_flags(devices)} | environment
    command = [sys.executable, "run.py", "train", config, *overrides]
    repo = pathlib.Path(__file__).resolve().parents[1]
    return subprocess.Popen(
        command, cwd=repo, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process, timeout=240):
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def metrics(folder):
    """Metrics by step, of training and of evaluation."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return (
        {line["step"]: {key: line[key] for key in EXACT} for line in lines if "loss" in line},
        {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line},
    )


def arrays(folder, step=12):
    checkpointer = ocp.StandardCheckpointer()
    return checkpointer.restore(epath.Path(folder) / "checkpoints" / str(step) / "state")


def wait_for_step(folder, step, process):
    path = folder / "metrics.jsonl"
    while process.poll() is None:
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        time.sleep(0.01)
    raise AssertionError(process.communicate()[0])


@pytest.fixture(scope="module")
def whole_run(tiny_config, tmp_path_factory):
    """The run that nothing happened to, on 8 devices."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert train(load_config(tiny_config, [f"run_dir={folder}"])) == 0
    return folder


def assert_same_run(folder, whole, step=12):
    assert metrics(folder) == metrics(whole)
    ours, expected = arrays(folder, step), arrays(whole, step)
    assert ours.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(ours[name], expected[name], err_msg=name)


def test_a_run_writes_all_that_its_folder_should_hold(whole_run):
    names = {path.name for path in whole_run.iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "preview.html", "loss.png", "checkpoints", "export"}
    last = json.loads((whole_run / "metrics.jsonl").read_text().splitlines()[-2])
    assert last["step"] == 12
    assert last.keys() >= {"grad_norm", "learning_rate", "trained_tokens", "padding_share", "tokens_per_second"}
    assert last.keys() >= {"data_wait_share", "memory_gib", "epoch", "skipped_steps"}
    assert 0 <= last["data_wait_share"] < 1
    losses = [line["loss"] for line in metrics(whole_run)[0].values()]
    assert losses[-1] < losses[0]


def test_the_resolved_config_reproduces_the_run(whole_run, tmp_path):
    again = tmp_path / "again"
    assert train(load_config(whole_run / "config.yaml", [f"run_dir={again}"])) == 0
    assert_same_run(again, whole_run)


def test_a_finished_run_started_again_changes_nothing(whole_run, tiny_config):
    def contents():
        return {path: path.stat().st_mtime_ns for path in (whole_run / "export").iterdir()}

    before = contents()
    assert train(load_config(tiny_config, [f"run_dir={whole_run}"])) == 0
    assert contents() == before


def test_a_damaged_export_is_found_and_made_again_from_the_checkpoint(whole_run, tiny_config, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    assert main(["verify", str(folder)]) == 0
    table = capsys.readouterr().out
    assert "checkpoints/12" in table and "export" in table and "DAMAGED" not in table
    weights = folder / "export" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    for path in (folder, folder / "export"):
        assert main(["verify", str(path)]) == 1
        assert "1 files differ from its seal, first model.safetensors" in capsys.readouterr().out
    assert main(["train", str(tiny_config), f"run_dir={folder}"]) == 0
    assert "differ from its seal, first model.safetensors" in capsys.readouterr().out
    assert weights.read_bytes() == whole
    assert (folder / "export.before-1" / "model.safetensors").read_bytes() == whole[:-1]


@pytest.mark.parametrize("target", ["checkpoints/12/state", "metrics.jsonl", "fingerprint.json", "progress.json"])
def test_verify_finds_what_is_damaged_and_changes_nothing(whole_run, tmp_path, capsys, target):
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    path = folder / target
    path = max((each for each in path.rglob("*") if each.is_file()), key=os.path.getsize) if path.is_dir() else path
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    before = {each: each.read_bytes() for each in folder.rglob("*") if each.is_file()}
    assert main(["verify", str(folder)]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "DAMAGED" in line]
    assert line.startswith("/".join(target.split("/")[:2]))
    assert {each: each.read_bytes() for each in folder.rglob("*") if each.is_file()} == before


def test_verify_of_neither_a_run_nor_an_export_is_one_error(tmp_path, capsys):
    for path in (tmp_path, tmp_path / "nowhere"):
        assert main(["verify", str(path)]) == 1
        assert capsys.readouterr().err == f"error: {path}: neither the folder of a run nor an export\n"


def test_verify_of_the_model_of_another_program_says_that_nothing_was_sealed(tiny_model, capsys):
    assert main(["verify", str(tiny_model)]) == 1
    error = capsys.readouterr().err
    assert (
        error.startswith(f"error: {tiny_model}: a model without seal.json: another program wrote it")
        and error.count("\n") == 1
    )


def test_verify_names_what_was_set_aside(whole_run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    for name in ("export.before-1", "metrics.jsonl.damaged-2", "checkpoints/8.passed-over-1", "mine.txt"):
        (folder / name).mkdir()
    assert main(["verify", str(folder)]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not looked at: ")]
    names = [line.split()[3].strip(",") for line in told]
    assert names == ["checkpoints/8.passed-over-1", "export.before-1", "metrics.jsonl.damaged-2"]


def test_a_run_whose_checkpoints_are_gone_is_refused_until_it_is_begun_anew_on_purpose(
    whole_run, tiny_config, tmp_path, capsys
):
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    (folder / "checkpoints").rename(tmp_path / "elsewhere")
    lines = (folder / "metrics.jsonl").read_bytes()
    assert main(["train", str(tiny_config), f"run_dir={folder}"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "export/ holds the model" in error and "--restart" in error
    assert (folder / "metrics.jsonl").read_bytes() == lines
    (tmp_path / "elsewhere").rename(folder / "checkpoints")
    assert main(["train", str(tiny_config), f"run_dir={folder}"]) == 0


def test_other_settings_are_said_when_a_run_is_continued(tiny_config, tmp_path, capsys):
    overrides = [f"run_dir={tmp_path}/run", "eval.samples=0"]
    assert train(load_config(tiny_config, [*overrides, "train.steps=4"])) == 0
    assert train(load_config(tiny_config, [*overrides, "train.steps=5", "optim.learning_rate=2e-2"])) == 0
    output = capsys.readouterr().out
    assert "changed since this run began: optim.learning_rate: 0.01 -> 0.02" in output
    assert "changed since this run began: train.steps: 4 -> 5" in output


def stop_at(step, config, overrides):
    """A run in this process that is left when it has saved a step."""
    for event in run(load_config(config, [*overrides, f"checkpoint.every={step}"])):
        if isinstance(event, Saved):
            assert event.step == step
            break


def test_counts_are_whole_when_a_run_is_continued_off_the_cadence_of_its_lines(whole_run, tiny_config, tmp_path):
    folder = tmp_path / "counted"
    overrides = [f"run_dir={folder}", "log.every=5"]
    stop_at(7, tiny_config, overrides)
    assert main(["train", str(tiny_config), *overrides]) == 0
    ours, expected = metrics(folder)[0], metrics(whole_run)[0]
    assert ours[12]["total_tokens"] == expected[12]["total_tokens"]


@pytest.mark.parametrize("trial", range(3))
def test_killed_at_random_and_continued_equals_never_killed_bitwise(whole_run, tiny_config, tmp_path, trial):
    folder = tmp_path / "killed"
    overrides = [f"run_dir={folder}", "checkpoint.every=2"]
    chance = random.Random(trial)
    process = start(tiny_config, overrides)
    wait_for_step(folder, chance.randint(1, 11), process)
    time.sleep(chance.random() * 0.2)
    process.kill()
    process.communicate()
    # Here and below a run goes on in this process, as the calm one ran: what it starts from is in its folder alone.
    assert main(["train", str(tiny_config), *overrides]) == 0
    assert_same_run(folder, whole_run)


def test_sigterm_saves_exits_with_75_and_the_same_command_continues(whole_run, tiny_config, tmp_path):
    folder = tmp_path / "stopped"
    overrides = [f"run_dir={folder}", "checkpoint.every=100"]
    process = start(tiny_config, overrides)
    wait_for_step(folder, 3, process)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == 75, output
    (saved,) = (int(path.name) for path in (folder / "checkpoints").iterdir())
    assert 3 <= saved <= 12
    assert f"SIGTERM: saved step {saved}" in output
    assert (folder / "loss.png").exists()
    assert main(["train", str(tiny_config), *overrides]) == 0
    assert_same_run(folder, whole_run)


def test_a_run_continued_on_another_device_count_sees_the_same_rows(whole_run, tiny_config, tmp_path):
    folder = tmp_path / "moved"
    overrides = [f"run_dir={folder}"]
    stop_at(5, tiny_config, overrides)
    code, output = finish(start(tiny_config, overrides, devices=2))
    assert code == 0, output
    ours, expected = metrics(folder)[0], metrics(whole_run)[0]
    assert [line["rows_crc"] for line in ours.values()] == [line["rows_crc"] for line in expected.values()]
    for step in expected:
        np.testing.assert_allclose(ours[step]["loss"], expected[step]["loss"], rtol=1e-5)


def in_processes(config, overrides, number, *, devices=8):
    """The same command once for each process of a run, together with so many devices; what they printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    cluster = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(number),
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    started = [
        start(config, overrides, devices=devices // number, JAX_PROCESS_ID=str(process), **cluster)
        for process in range(number)
    ]
    results = [finish(process) for process in started]
    assert [code for code, _ in results] == [0] * number, "\n".join(output for _, output in results)
    return [output for _, output in results]


def assert_nearly_same_run(folder, whole):
    """Same rows, and losses within 1e-6."""
    (ours, ours_eval), (expected, expected_eval) = metrics(folder), metrics(whole)
    assert ours.keys() == expected.keys()
    for step in expected:
        assert ours[step]["rows_crc"] == expected[step]["rows_crc"]
        np.testing.assert_allclose(ours[step]["loss"], expected[step]["loss"], rtol=1e-6)
        np.testing.assert_allclose(ours[step]["grad_norm"], expected[step]["grad_norm"], rtol=1e-5)
    np.testing.assert_allclose(list(ours_eval.values()), list(expected_eval.values()), rtol=1e-6)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_processes_give_the_losses_of_one(whole_run, tiny_config, tmp_path):
    folder = tmp_path / "two"
    outputs = in_processes(tiny_config, [f"run_dir={folder}"], 2)
    assert_nearly_same_run(folder, whole_run)
    assert contents(folder / "export").keys() == contents(whole_run / "export").keys()
    assert "step 12" in outputs[0]
    assert "step 12" not in outputs[1]  # one process speaks
    assert all(any("step 12" in line for line in last_lines(folder, number, 20)) for number in (0, 1))  # both write


def test_four_processes_on_another_mesh_go_on_where_one_was_stopped_and_export_what_one_does(
    whole_run, tiny_config, tmp_path
):
    folder = tmp_path / "four"
    stop_at(4, tiny_config, [f"run_dir={folder}"])
    in_processes(tiny_config, [f"run_dir={folder}", "mesh.tensor=2", "mesh.data=2"], 4)
    assert_nearly_same_run(folder, whole_run)
    assert main(["verify", str(folder)]) == 0
    assert main(["export", str(folder), "--out", str(tmp_path / "by_one")]) == 0
    assert contents(folder / "export") == contents(tmp_path / "by_one")


def test_a_run_killed_between_two_checkpoints_goes_on_from_its_local_copies_bitwise(
    whole_run, tiny_config, tmp_path, capsys
):
    folder = tmp_path / "killed"
    overrides = [f"run_dir={folder}", "checkpoint.every=100", "checkpoint.local_every=2"]
    overrides.append(f"checkpoint.local_dir={tmp_path}/disk")
    process = start(tiny_config, overrides)
    wait_for_step(folder, 7, process)
    process.kill()
    process.communicate()
    assert not list((folder / "checkpoints").glob("*/seal.json"))
    assert main(["train", str(tiny_config), *overrides]) == 0
    assert "going on from the local copies of step" in capsys.readouterr().out
    assert_same_run(folder, whole_run)
    assert not [path for path in (tmp_path / "disk").rglob("*") if path.is_file()], "they are of no use any more"


# Mixtures and held-out sets.


@pytest.mark.parametrize(
    "overrides",
    [
        ["lora.rank=4", "lora.dropout=0.2", "optim.name=adamw8bit"],
        ["lora.rank=4", "model.quantize=nf4", "optim.name=muon"],
        ["train.only=[norms, embeddings]", "loss.neftune_alpha=5", "optim.name=schedule_free_adamw"],
    ],
    ids=lambda overrides: overrides[-1].split("=")[1],
)
def test_whatever_is_trained_continued_equals_never_stopped_bitwise(tiny_config, tmp_path, overrides):
    """Of whole runs; each optimizer by itself is in tests/training."""
    if "optim.name=schedule_free_adamw" in overrides:
        overrides = [*overrides, "optim.schedule=constant"]
    overrides = [*overrides, "train.steps=4", "checkpoint.keep=4"]
    whole, stopped = ([*overrides, f"run_dir={tmp_path}/{name}"] for name in ("whole", "stopped"))
    assert main(["train", str(tiny_config), *whole, "checkpoint.every=2"]) == 0
    stop_at(2, tiny_config, stopped)
    assert main(["train", str(tiny_config), *stopped, "checkpoint.every=2"]) == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "whole", step=4)
    first, last = arrays(tmp_path / "whole", 2), arrays(tmp_path / "whole", 4)
    assert any(np.any(first[name] != last[name]) for name in first if "params" in name)


@pytest.fixture(scope="module")
def mixed(tiny_data, tmp_path_factory):
    """Overrides for a run on two sources, whose draws differ in each epoch, with two held-out sets."""
    folder = tmp_path_factory.mktemp("mixed")
    lines = (tiny_data / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "few.jsonl").write_text("".join(lines[:15]))
    (folder / "many.jsonl").write_text("".join(lines[15:]))
    sources = f"[{{path: {folder}/few.jsonl, weight: 1}}, {{path: {folder}/many.jsonl, weight: 2}}]"
    held_out = f"{{known: {folder}/few.jsonl, new: {tiny_data}/eval.jsonl}}"
    options = ["eval.every=6", "train.steps=24", "data.allow_overlap=true"]
    return [f"data.train={sources}", f"data.eval={held_out}", *options]


@pytest.fixture(scope="module")
def mixed_run(tiny_config, mixed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "mixed"
    assert train(load_config(tiny_config, [*mixed, f"run_dir={folder}"])) == 0
    return folder


def test_each_held_out_set_is_reported_and_all_together_by_their_tokens(mixed_run, tiny_config, capsys):
    lines = [json.loads(line) for line in (mixed_run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in lines] == [0, 6, 12, 18, 24]
    for line in lines:
        tokens = [line[f"eval_trained_tokens/{name}"] for name in ("known", "new")]
        losses = [line[f"eval_loss/{name}"] for name in ("known", "new")]
        assert losses[0] != losses[1] and sum(tokens) == line["eval_trained_tokens"]
        np.testing.assert_allclose(line["eval_loss"], np.average(losses, weights=tokens), rtol=1e-6)
    steps = {int(path.name) for path in (mixed_run / "checkpoints").iterdir()}
    assert min(lines[1:], key=lambda line: line["eval_loss"])["step"] in steps
    assert main(["evaluate", str(mixed_run / "config.yaml")]) == 0
    output = capsys.readouterr().out
    for text in (f"held-out loss {lines[-1]['eval_loss']:.4f}", f"known: loss {lines[-1]['eval_loss/known']:.4f}"):
        assert text in output


def test_a_mixture_killed_and_continued_equals_never_killed_bitwise(mixed_run, tiny_config, mixed, tmp_path, capsys):
    overrides = [*mixed, f"run_dir={tmp_path}/killed", "checkpoint.every=5"]
    process = start(tiny_config, overrides)
    wait_for_step(tmp_path / "killed", 17, process)
    process.kill()
    process.communicate()
    assert main(["train", str(tiny_config), *overrides]) == 0
    output = capsys.readouterr().out
    assert "per epoch (33.3%)" in output and "continuing" in output
    assert_same_run(tmp_path / "killed", mixed_run, step=24)


# Streams.


@pytest.fixture(scope="module")
def streamed(tiny_data, tmp_path_factory):
    """Overrides for a run that streams rows, one of them bad and one too long, more than once."""
    source = tmp_path_factory.mktemp("streamed") / "rows.jsonl"
    lines = (tiny_data / "train.jsonl").read_text().splitlines(keepends=True)
    long = json.dumps({"messages": [{"role": role, "content": "x" * 99} for role in ("user", "assistant")]})
    source.write_text("".join([*lines[:30], "{\n", *lines[30:60], long + "\n", *lines[60:]]))
    stream = ["data.stream=true", "data.shuffle_buffer=32", "data.on_bad_row=skip"]
    return [f"data.train={source}", *stream, "train.steps=16"]


@pytest.fixture(scope="module")
def streamed_run(tiny_config, streamed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "streamed"
    assert train(load_config(tiny_config, [*streamed, f"run_dir={folder}"])) == 0
    return folder


def test_what_a_stream_leaves_out_is_counted_in_the_metrics(streamed_run):
    last = json.loads((streamed_run / "metrics.jsonl").read_text().splitlines()[-2])
    assert last["stream_rows"] >= 200 and last["epoch"] == last["stream_rows"] // 122
    assert last["stream_bad_rows/bad-json"] == (last["stream_rows"] - 31) // 122 + 1
    assert last["stream_dropped_examples/longer than seq_len"] == (last["stream_rows"] - 62) // 122 + 1


@pytest.mark.parametrize(("trial", "with_index"), [(0, True), (1, True), (2, False)])
def test_a_stream_killed_and_continued_equals_never_killed_bitwise(
    streamed_run, tiny_config, streamed, tmp_path, capsys, trial, with_index
):
    folder = tmp_path / "killed"
    overrides = [*streamed, f"run_dir={folder}", "checkpoint.every=2"]
    chance = random.Random(trial)
    process = start(tiny_config, overrides)
    wait_for_step(folder, chance.randint(3, 15), process)
    time.sleep(chance.random() * 0.2)
    process.kill()
    process.communicate()
    if not with_index:
        (folder / "stream.jsonl").unlink()
    assert main(["train", str(tiny_config), *overrides]) == 0
    assert "bad-json" in capsys.readouterr().out
    assert_same_run(folder, streamed_run, step=16)


def test_the_day_of_a_template_is_that_on_which_the_run_began(tiny_config, tiny_model, tmp_path, capsys):
    template = (tiny_model / "chat_template.jinja").read_text()
    (tmp_path / "t.jinja").write_text("{{ strftime_now('%Y-%m-%d') }}" + template)
    overrides = [f"run_dir={tmp_path}/run", f"data.chat_template={tmp_path}/t.jinja", "train.steps=2"]
    began = "data.template_date=2020-02-29"
    assert train(load_config(tiny_config, [*overrides, began])) == 0
    # On any other day that day holds, whatever became of the config beside the checkpoint.
    (tmp_path / "run" / "config.yaml").write_bytes(b"\xff")
    assert main(["train", str(tiny_config), *overrides]) == 0
    assert "it sees 2020-02-29" in capsys.readouterr().out
    assert main(["preview", str(tiny_config), *overrides]) == 0
    assert "2020-02-29" in capsys.readouterr().out
    # Another day is other data.
    assert main(["train", str(tiny_config), *overrides, "data.template_date=2020-03-01"]) == 1
    assert "data: template_date" in capsys.readouterr().err
    assert main(["train", str(tiny_config), *overrides, "--restart"]) == 0
    assert f"it sees {datetime.date.today()}" in capsys.readouterr().out
    assert (tmp_path / "run.before-1" / "export").exists()


# Mistakes of the user: (overrides, exit code, what the one message says).
MISTAKES = {
    "unknown key": (["optim.learnin_rate=1"], 1, ["optim.learnin_rate: unknown key; did you mean optim.learning_rate"]),
    "wrong type": (["train.batch_size=many"], 1, ["train.batch_size: 'many' given"]),
    "missing data file": (["data.train=nowhere.jsonl"], 65, ["nowhere.jsonl"]),
    "missing model folder": (["model.path=./nowhere"], 1, ["./nowhere: no such folder"]),
    "missing weights": (
        ["model.weights=pretrained"],
        1,
        ["neither model.safetensors nor model.safetensors.index.json"],
    ),
    "all too long": (["data.seq_len=8"], 65, ["no example is left", "data.seq_len=8"]),
    "too long as an error": (["data.seq_len=48", "data.overlong=error"], 65, ["data.seq_len is 48", "train.jsonl:"]),
    "a stream and no steps": (["data.stream=true", "train.steps=null"], 1, ["data.stream", "give train.steps"]),
    "an epoch of a stream": (["data.stream=true", "data.train.0.epochs=2"], 1, ["data.train.0.epochs: no meaning"]),
    "weights of some": (["data.train=[{path: a, weight: 1}, {path: b}]"], 1, ["data.train.1: no `weight`"]),
    "prepared, then streamed": (["data.stream=true"], 1, ["data: stream: None then"]),
    "another mixture": (["data.train.0.count=50"], 1, ["data: examples per epoch: None then, '50' now"]),
    "mesh and devices": (["mesh.tensor=3"], 1, ["tensor 3 does not fit 8 devices"]),
    "mesh and heads": (["mesh.tensor=8"], 1, ["number of key/value heads is 4, not a multiple of 8 (mesh.tensor 8)"]),
    "mesh and rows": (["train.batch_size=4"], 1, ["train.batch_size: number of rows is 4, not a multiple of 8"]),
    "another dtype": (["model.param_dtype=bfloat16"], 1, ["float32[384, 32] then, bfloat16[384, 32] now"]),
    "no bucket": (["run_dir=hdfs://bucket/run"], 1, ["hdfs:// is not known"]),
    "another run": (["seed=5", "train.batch_size=16"], 1, ["seed: 0 then, 5 now", "train.batch_size: 8 then, 16 now"]),
    "another template": (["data.train_on=last_turn"], 1, ["data: train_on: '\"assistant\"' then, '\"last_turn\"' now"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_in_one_clear_error_and_harms_nothing(whole_run, tiny_config, capsys, name):
    overrides, expected_code, texts = MISTAKES[name]

    def contents():
        paths = whole_run.rglob("*")
        return {path: path.stat().st_mtime_ns for path in paths if path.parent.name != "logs"}

    before = contents()
    code = main(["train", str(tiny_config), f"run_dir={whole_run}", *overrides])
    error = capsys.readouterr().err
    assert code == expected_code, error
    assert error.startswith("error: ")
    assert "Traceback" not in error
    for text in texts:
        assert text in error
    assert contents() == before


BAD_ROWS = {
    "not JSON": ('{"messages": [', "bad.jsonl:1"),
    "no assistant turn": ('{"messages": [{"role": "user", "content": "Hi"}]}', "no assistant turn"),
    "unknown role": ('{"messages": [{"role": "wizard", "content": "Hi"}]}', "the role 'wizard' is not known"),
    "unknown columns": ('{"colour": "blue"}', "no known format has the columns colour"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_named_by_file_and_line(tiny_config, tmp_path, capsys, name):
    line, text = BAD_ROWS[name]
    (tmp_path / "bad.jsonl").write_text(line + "\n")
    code = main(["train", str(tiny_config), f"run_dir={tmp_path}/run", f"data.train={tmp_path}/bad.jsonl"])
    error = capsys.readouterr().err
    assert code == 65, error
    assert text in error
    assert not (tmp_path / "run").exists()


def test_held_out_rows_that_are_trained_are_refused_unless_the_config_allows_them(
    tiny_config, tiny_data, tmp_path, capsys
):
    lines = (tiny_data / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "held.jsonl").write_text("".join(lines[:3]) + (tiny_data / "eval.jsonl").read_text())
    overrides = [f"run_dir={tmp_path}/run", f"data.eval={tmp_path}/held.jsonl", "train.steps=1"]
    assert main(["train", str(tiny_config), *overrides]) == 65
    assert "3 of 15 held-out rows of data.eval.eval are in data.train as well" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main(["train", str(tiny_config), *overrides, "data.allow_overlap=true"]) == 0
    assert "3 of 15 held-out rows" in capsys.readouterr().out


def test_a_template_that_fails_is_reported_with_its_own_words(tiny_config, tmp_path, capsys):
    (tmp_path / "t.jinja").write_text("{{ raise_exception('only on Sundays') }}")
    overrides = [f"run_dir={tmp_path}/run", f"data.chat_template={tmp_path}/t.jinja"]
    assert main(["train", str(tiny_config), *overrides]) == 65
    assert "only on Sundays" in capsys.readouterr().err


def test_a_template_that_is_no_jinja_is_one_error_and_not_one_for_each_row(tiny_config, tmp_path, capsys):
    (tmp_path / "t.jinja").write_text("{% for m in messages %}\n{{ m.content }\n{% endfor %}")
    overrides = [f"run_dir={tmp_path}/run", f"data.chat_template={tmp_path}/t.jinja"]
    assert main(["train", str(tiny_config), *overrides]) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path}/t.jinja: the chat template is not Jinja: line 2" in error
    assert error.count("\n") == 1


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tiny_config, tiny_model, tmp_path, capsys):
    folder = tmp_path / "small"
    folder.mkdir()
    for path in tiny_model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 64}
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["train", str(tiny_config), f"run_dir={tmp_path}/run", f"model.path={folder}"]) == 1
    assert "vocab_size is 64" in capsys.readouterr().err


def test_evaluate_and_preview_work_on_a_run(whole_run, tiny_config, capsys):
    assert main(["evaluate", str(tiny_config), f"run_dir={whole_run}"]) == 0
    output = capsys.readouterr().out
    assert "evaluating checkpoint 12" in output
    assert f"held-out loss {metrics(whole_run)[1][12]:.4f}" in output
    assert main(["preview", str(tiny_config), f"run_dir={whole_run}"]) == 0
    assert (whole_run.parent / "whole.preview.html").exists()


def test_chat_answers_what_is_asked(whole_run, repo):
    command = [sys.executable, "run.py", "chat", str(whole_run / "export"), "--max-new-tokens", "5"]
    done = subprocess.run(command, input="Hi\n/new\nHo\n", capture_output=True, text=True, cwd=repo, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 3


def test_keys_lists_every_key(capsys):
    assert main(["keys"]) == 0
    output = capsys.readouterr().out
    assert "optim.learning_rate" in output
    assert "Peak learning rate." in output


def strict_lines(folder):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        # The first step ruins the weights, whatever follows is not finite.
        (["optim.learning_rate=1e30", "optim.max_skipped=1"], "10 steps in a row were skipped, up to step 11"),
        (["optim.learning_rate=1e30", "log.every=5"], "optim.max_skipped (0.01 of 12 steps) allows 1"),
        # The last step does: nothing comes behind it that would be skipped.
        (["optim.learning_rate=1e39", "train.steps=1"], "not finite: "),
    ],
)
def test_a_run_that_diverges_ends_in_an_error_and_exports_nothing(tiny_config, tmp_path, capsys, overrides, said):
    folder = tmp_path / "run"
    assert main(["train", str(tiny_config), f"run_dir={folder}", "optim.warmup_steps=0", *overrides]) == 1
    error = capsys.readouterr().err
    assert "the run has diverged" in error and said in error and "no checkpoint was saved before that" in error
    assert not (folder / "export").exists()
    assert any("not_finite" in line for line in strict_lines(folder)) or "not finite" in said


def test_the_checkpoint_from_before_a_run_diverged_is_kept_and_named(tiny_config, tmp_path, capsys):
    folder = tmp_path / "run"
    command = ["train", str(tiny_config), f"run_dir={folder}", "checkpoint.every=1", "optim.schedule=constant"]
    assert main([*command, "train.steps=3"]) == 0
    shutil.rmtree(folder / "export")
    assert main([*command, "train.steps=40", "optim.learning_rate=1e30", "optim.max_skipped=1"]) == 1
    good = folder / "checkpoints" / "3"
    assert f"the last good checkpoint is {good} " in capsys.readouterr().err
    # Step 4 was taken, and ruined the weights; what came after it was not saved, or checkpoint 3 would be gone.
    assert good.exists() and {path.name for path in good.parent.iterdir()} == {"3", "4"}
    assert not (folder / "export").exists()


def test_a_run_of_one_step_learns(tiny_config, tmp_path):
    folder = tmp_path / "run"
    assert train(load_config(tiny_config, [f"run_dir={folder}", "train.steps=1", "optim.warmup_steps=0"])) == 0
    evaluated = [line["eval_loss"] for line in strict_lines(folder) if "eval_loss" in line]
    assert evaluated[1] < evaluated[0]


def test_what_computes_a_run_is_written_down_and_a_change_is_said(tiny_config, tmp_path, capsys):
    folder = tmp_path / "run"
    assert train(load_config(tiny_config, [f"run_dir={folder}", "train.steps=2"])) == 0
    versions = json.loads((folder / "versions.json").read_text())
    assert versions["jax"] == jax.__version__ and versions.keys() >= {"jaxlib", "flax", "devices", "python"}
    (folder / "versions.json").write_text(json.dumps(versions | {"jax": "0.9.0", "flax": "0.1"}))
    assert "versions" not in capsys.readouterr().out
    assert train(load_config(tiny_config, [f"run_dir={folder}", "train.steps=3"])) == 0
    output = capsys.readouterr().out
    for name, before in (("jax", "0.9.0"), ("flax", "0.1")):
        assert f"changed since this run was last started: {name} {before} -> {versions[name]}" in output
    assert json.loads((folder / "versions.json").read_text()) == versions


def test_the_parameters_said_are_those_of_the_model_without_what_fills_up_its_vocabulary(repo, tmp_path, capsys):
    """As README says of the quickstart."""
    overrides = [f"run_dir={tmp_path}/run", "train.steps=1", "eval.samples=0", "eval.exact_match=false"]
    assert train(load_config(repo / "configs" / "quickstart.yaml", [*overrides, "eval.examples=8"])) == 0
    assert "362,112 random parameters in float32, and 15,360 that fill up its vocabulary" in capsys.readouterr().out
    assert "A model of 362,112 parameters" in (repo / "README.md").read_text()


def test_what_is_due_after_a_step_is_what_the_config_says_and_all_of_it_at_the_end(tiny_config):
    keys = ["checkpoint.every=4", "eval.every=6", "log.every=5", "train.steps=13"]
    config = load_config(tiny_config, keys)
    found = {done: tuple(due_after(done, 13, config)) for done in range(1, 14)}
    report, evaluate, save = ({done for done, due in found.items() if due[at]} for at in range(3))
    assert (report, evaluate, save) == ({4, 5, 6, 8, 10, 12, 13}, {6, 12, 13}, {4, 8, 12, 13})
    config = load_config(tiny_config, ["checkpoint.every=100", "log.every=100"])
    nothing, everything = Due(False, False, False, False), Due(True, True, True, False)
    assert [due_after(done, 3, config) for done in (1, 3)] == [nothing, everything]
    config = load_config(tiny_config, ["checkpoint.every=4", "checkpoint.local_every=2", "log.every=100"])
    found = {done: due_after(done, 9, config) for done in range(1, 10)}
    assert {done for done, due in found.items() if due.save_local} == {2, 6}, "where no checkpoint is due"
    assert {done for done, due in found.items() if due.report} == {2, 4, 6, 8, 9}, "each with its line"
