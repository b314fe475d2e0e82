"""Runs are read from files that their own writers wrote, with the values that stand there and the caveats they need."""

import csv
import json
import math
import os
import sys

import pytest

from jaxsft.config import ConfigError
from jaxsft.report.columns import KEYS, figures_of, our_key
from jaxsft.report.make import read_all
from jaxsft.report.readers import read_run, read_runs
from jaxsft.rows.strict import DataError

LINES = [
    {"step": 1, "loss": 3.5, "tokens": 100, "trained_tokens": 40, "total_tokens": 100, "total_trained_tokens": 40,
     "seconds": 10.0, "steps": 1, "memory_gib": 1.5},
    {"step": 3, "loss": 3.0, "tokens": 200, "trained_tokens": 60, "total_tokens": 300, "total_trained_tokens": 100,
     "seconds": 4.0, "steps": 2, "memory_gib": 2.5},
    {"step": 3, "eval_loss": 2.9, "eval_loss/maths": 3.3},
    {"step": 5, "loss": float("nan"), "tokens": 200, "trained_tokens": 80, "total_tokens": 500,
     "total_trained_tokens": 180, "seconds": 6.0, "steps": 2, "memory_gib": 2.0},
]  # fmt: skip


def write_ours(folder, *, end=""):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES) + end)
    (folder / "config.yaml").write_text("model:\n  path: somewhere\noptim:\n  learning_rate: 1.0e-3\n")
    return folder


def test_a_run_of_ours_keeps_its_lines_and_its_config(tmp_path):
    folder = write_ours(tmp_path / "first")
    for path in (folder, folder / "metrics.jsonl"):
        run = read_run(str(path))
        assert (run.name, run.kind, run.source) == ("first", "jaxsft", str(path))
        assert repr(run.lines) == repr(tuple(LINES))
        assert run.settings == {"model.path": "somewhere", "optim.learning_rate": 1e-3}
        assert run.caveats == ()


def test_speed_leaves_out_the_first_line_and_memory_is_the_largest(tmp_path):
    run = read_run(str(write_ours(tmp_path / "run")))
    assert run.figures == {
        "memory_gib": 2.5, "step_seconds": 10 / 4, "tokens_per_second": 40.0, "trained_tokens_per_second": 14.0,
    }  # fmt: skip
    alone, said = figures_of(LINES[:1])
    assert alone["tokens_per_second"] == 10 and "compilation" in said[0]


def test_a_line_that_was_cut_off_is_left_out_and_said(tmp_path):
    run = read_run(str(write_ours(tmp_path / "run", end='{"step": 7, "lo')))
    assert len(run.lines) == len(LINES) and "cut off" in run.caveats[0]


def test_the_facts_of_a_child_are_its_caveats_and_settings(tmp_path):
    folder = write_ours(tmp_path / "theirs")
    facts = {"settings": {"optim": "adamw"}, "caveats": ["a mean of means"], "startup_seconds": 3.5, "torch": "2"}
    (folder / "facts.json").write_text(json.dumps(facts))
    run = read_run(str(folder), name="torch")
    assert run.name == "torch" and run.caveats == ("a mean of means",)
    assert run.settings["optim"] == "adamw" and run.figures["startup_seconds"] == 3.5


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A real run of transformers' Trainer, its losses known: the learning rate is 0, so no step changes another's."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    model = LlamaForCausalLM(config)
    rows = []
    for trained in (11, 2, 5, 7, 1, 9, 3, 8, 4, 10, 6, 5):
        ids = torch.randint(0, 32, (12,))
        rows.append({"input_ids": ids, "labels": torch.where(torch.arange(12) < 12 - trained, -100, ids)})

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(rows)

    folder = tmp_path_factory.mktemp("trainer") / "out"
    logs = folder / "runs" / "now"
    backends = ["tensorboard"] if has_tensorboard() else []
    arguments = TrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=0.0,
        lr_scheduler_type="constant", logging_steps=2, eval_strategy="steps", eval_steps=2, save_steps=3,
        report_to=backends, disable_tqdm=True, use_cpu=True, include_num_input_tokens_seen="all",
        per_device_eval_batch_size=4,
    )  # fmt: skip
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(logs)
    trainer = InOrder(model, arguments, train_dataset=rows, eval_dataset=rows[:4])
    trainer.train()
    trainer.save_state()
    os.environ.pop("TENSORBOARD_LOGGING_DIR")
    with torch.no_grad():
        nll = []
        for row in rows:
            logits = model(input_ids=row["input_ids"][None]).logits[0, :-1]
            targets = row["labels"][1:]
            nll.append((torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item(),
                        int((targets != -100).sum())))  # fmt: skip
    return folder, nll


def has_tensorboard():
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        return False
    return True


def test_a_run_of_trainer_is_read_and_its_caveats_are_true(trained):
    folder, nll = trained
    run = read_run(str(folder))
    assert (run.name, run.kind) == ("out", "transformers")
    assert [line["step"] for line in run.lines if "loss" in line] == [2]
    assert [line["step"] for line in run.lines if "eval_loss" in line] == [2, 3]
    # One line for two steps of 4 rows each: a token mean within a step, each step counting the same.
    steps = [nll[:4], nll[4:8]]
    means = [sum(loss for loss, _ in step) / sum(count for _, count in step) for step in steps]
    loss = next(line["loss"] for line in run.lines if "loss" in line)
    assert loss == pytest.approx(sum(means) / 2, rel=1e-5)
    over_tokens = sum(loss for loss, _ in nll[:8]) / sum(count for _, count in nll[:8])
    assert abs(loss - over_tokens) > 1e-4
    said = " ".join(run.caveats)
    assert "mean over the 2 steps" in said and "num_items_in_batch" in said and "eval_loss" in said
    assert next(line["total_tokens"] for line in run.lines if "loss" in line) == 8 * 12
    assert "num_input_tokens_seen" in said and "total_trained_tokens" not in {key for line in run.lines for key in line}
    assert run.figures["step_seconds"] > 0 and run.settings["max_steps"] == 3
    assert "train_loss" not in run.lines[-1], "the mean over the run is no line"


def test_a_folder_of_checkpoints_is_read_from_its_last(trained, tmp_path):
    folder, _ = trained
    state = folder / "checkpoint-3" / "trainer_state.json"
    assert read_run(str(state)).name == "out"
    for step in (3, 12, 5):
        place = tmp_path / "again" / f"checkpoint-{step}"
        place.mkdir(parents=True)
        history = [{"step": step, "loss": 1.0, "num_tokens": 9.0, "mean_token_accuracy": 0.5}]
        (place / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    run = read_run(str(tmp_path / "again"))
    assert (run.name, run.kind) == ("again", "trl")
    assert run.lines == ({"step": 12, "loss": 1.0, "total_tokens": 9.0, "accuracy": 0.5},)


def test_tensorboard_says_the_same_as_trainer_state(trained):
    pytest.importorskip("tensorboard")
    folder, _ = trained
    run, state = read_run(str(folder / "runs")), read_run(str(folder))
    assert (run.name, run.kind) == ("now", "tensorboard")
    both = {line["step"]: line for line in run.lines}
    for line in state.lines:
        for key in ("loss", "eval_loss", "grad_norm", "learning_rate", "total_tokens"):
            if key in line:
                assert both[line["step"]][key] == pytest.approx(line[key], rel=1e-6)
    assert run.settings["gradient_accumulation_steps"] == 2, "Trainer writes its settings as text"
    assert {caveat for caveat in state.caveats if "time from start" not in caveat and "not read" not in caveat} < {
        *run.caveats
    }, "who wrote it is known"
    assert any("train/train_loss" in caveat for caveat in run.caveats), "what is not read is named"


@pytest.mark.parametrize("new_style", [False, True])
def test_event_files_of_a_summary_writer(tmp_path, new_style):
    pytest.importorskip("tensorboard")
    pytest.importorskip("torch", reason="its writer of event files")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "run")) as writer:
        for step in range(1, 6):
            writer.add_scalar("loss", 5 - step / 2, step, walltime=1000 + 2 * step, new_style=new_style)
            writer.add_scalar("total_trained_tokens", 50 * step, step, walltime=1000 + 2 * step, new_style=new_style)
            writer.add_scalar("custom/thing", step, step, new_style=new_style)
    (file,) = (tmp_path / "run").iterdir()
    for path in (file, tmp_path / "run", tmp_path):
        run = read_run(str(path))
        assert [(line["step"], line["loss"]) for line in run.lines] == [(step, 5 - step / 2) for step in range(1, 6)]
        assert run.figures == {"step_seconds": 2.0, "trained_tokens_per_second": 25.0}
        assert any("custom/thing" in caveat for caveat in run.caveats)


def test_a_folder_of_tensorboard_runs_is_several_runs(tmp_path):
    pytest.importorskip("tensorboard")
    pytest.importorskip("torch", reason="its writer of event files")
    from torch.utils.tensorboard import SummaryWriter

    for name in ("one", "two"):
        with SummaryWriter(str(tmp_path / name)) as writer:
            writer.add_scalar("train/loss", 1.0, 1)
    assert [run.name for run in read_runs(str(tmp_path))] == ["one", "two"]
    with pytest.raises(ConfigError, match="one run expected, 2 found: one, two"):
        read_run(str(tmp_path))


def test_without_tensorboard_the_error_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "events.out.tfevents.1").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_accumulator", None)
    with pytest.raises(ConfigError, match=r"pip install 'jaxsft\[tensorboard\]'"):
        read_run(str(tmp_path))


def test_a_chart_of_wandb_holds_several_runs(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"Step": [10, 20, 30]})
    for run, losses, most in (
        ("playful-sun-17", [3.0, 2.0, None], [3.0, 2.5, None]),
        ("a - b", [None, 1.5, 1.0], None),
    ):
        frame[f"{run} - _step"] = [1, 2, 3]
        frame[f"{run} - _step__MIN"] = frame[f"{run} - _step__MAX"] = [1, 2, 3]
        frame[f"{run} - train/loss"] = losses
        frame[f"{run} - train/loss__MIN"], frame[f"{run} - train/loss__MAX"] = losses, most or losses
    frame.to_csv(tmp_path / "chart.csv", index=False, quoting=csv.QUOTE_ALL)
    first, second = read_runs(str(tmp_path / "chart.csv"))
    assert (first.name, first.lines) == ("playful-sun-17", ({"step": 10, "loss": 3.0}, {"step": 20, "loss": 2.0}))
    assert (second.name, second.lines) == ("a - b", ({"step": 20, "loss": 1.5}, {"step": 30, "loss": 1.0}))
    for run in (first, second):
        assert run.kind == "csv" and any("W&B samples" in caveat for caveat in run.caveats)
    assert any("__MAX differ" in caveat for caveat in first.caveats)
    assert not any("__MAX differ" in caveat for caveat in second.caveats)


def test_the_history_of_wandb_is_counted_in_updates_where_it_can_be(tmp_path):
    pandas = pytest.importorskip("pandas")
    history = {"_step": [0, 1, 2], "_runtime": [10.0, 14.0, 15.0], "train/global_step": [5, 10, 10]}
    history |= {"train/loss": [2.0, 1.5, None], "eval/loss": [None, None, 1.75], "train/num_tokens": [400, 800, None]}
    pandas.DataFrame(history).to_csv(tmp_path / "history.csv")
    run = read_run(str(tmp_path / "history.csv"))
    assert [line["step"] for line in run.lines] == [5, 10]
    assert run.lines[1]["loss"] == 1.5 and run.lines[1]["eval_loss"] == 1.75
    assert run.figures == {"step_seconds": 4 / 5, "tokens_per_second": 100.0}
    assert any("num_items_in_batch" in caveat for caveat in run.caveats), "Trainer is known by train/global_step"
    assert any("(without a name)" in caveat and "_step" in caveat for caveat in run.caveats)
    del history["train/global_step"]
    pandas.DataFrame(history).to_csv(tmp_path / "calls.csv", index=False)
    assert any("calls of the logger" in caveat for caveat in read_run(str(tmp_path / "calls.csv")).caveats)


def test_any_csv_is_read_with_the_columns_that_the_user_names(tmp_path):
    (tmp_path / "mine.csv").write_text("n;nll (train);when\n2;1.5;mon\n1;2.5;sun\n2;1.25;tue\n")
    run = read_run(str(tmp_path / "mine.csv"), columns={"step": "n", "loss": "nll (train)"})
    assert run.lines == ({"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.25})
    assert any("1 rows repeat a step" in caveat for caveat in run.caveats)
    assert any("not read: when" in caveat for caveat in run.caveats)


BAD = [
    ("step,loss,train/loss\n1,2,3\n", "loss may be any of the columns 'loss', 'train/loss'.*--columns loss=loss"),
    ("loss,other\n2,3\n", "no column counts steps.*--columns step=NAME"),
    ("step,loss\n1,2\n2,high\n", r"bad.csv:3: 'high' given; column 'loss' is read as loss, expected a number"),
    ("step,loss\n1,2,3\n", "bad.csv:2: 3 cells, expected 2"),
    ("step,loss,loss\n1,2,3\n", "columns stand twice: loss"),
    ("step,loss\n", "a header and rows expected, 0 rows found"),
    ("step,loss\nnan,2\n", "step nan given"),
    ("", "a header and rows expected"),
]


@pytest.mark.parametrize("text,message", BAD)
def test_a_bad_csv_is_one_clear_error(tmp_path, text, message):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises((ConfigError, DataError), match=f"(?s){message}") as caught:
        read_run(str(tmp_path / "bad.csv"))
    assert str(tmp_path / "bad.csv") in str(caught.value)


@pytest.mark.parametrize(
    "columns,message",
    [
        ({"los": "train/nll"}, "los is none of our keys; did you mean 'loss'"),
        ({"loss": "train/nl"}, "no file has a column 'train/nl'; did you mean 'train/nll'"),
    ],
)
def test_a_mapping_that_maps_nothing_is_an_error(tmp_path, columns, message):
    (tmp_path / "a.csv").write_text("step,train/nll\n1,2\n")
    with pytest.raises(ConfigError, match=message):
        read_run(str(tmp_path / "a.csv"), columns=columns)


def test_a_mapping_is_for_the_files_that_have_the_column(tmp_path):
    (tmp_path / "a.csv").write_text("step,nll\n1,2\n")
    (tmp_path / "b.csv").write_text("step,loss\n1,3\n")
    runs = read_all([str(tmp_path / "a.csv"), str(tmp_path / "b.csv")], names=(), columns={"loss": "nll"})
    assert [run.lines[0]["loss"] for run in runs] == [2, 3]


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no such file or folder"):
        read_run(str(tmp_path / "nowhere"))
    (tmp_path / "thing").mkdir()
    with pytest.raises(ConfigError, match="it is empty"):
        read_run(str(tmp_path / "thing"))
    (tmp_path / "thing" / "ours").mkdir()
    with pytest.raises(ConfigError, match="no metrics in this folder .ours/"):
        read_run(str(tmp_path / "thing"))
    for name, text, message in (
        ("metrics.jsonl", '{"step": 1}\n{"ste\n', r"metrics.jsonl:2: not readable as JSON"),
        ("metrics.jsonl", '{"loss": 1}\n', r"metrics.jsonl:1: an object with a step expected"),
        ("metrics.jsonl", "", "no line is complete"),
        ("trainer_state.json", "{}", "no log_history"),
        ("report.json", "{}", "no report of jaxsft"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=message):
            read_run(str(tmp_path / name))
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(ConfigError, match="cannot be read; expected a run folder"):
        read_run(str(tmp_path / "model.safetensors"))


def test_names_are_taken_for_what_they_say():
    same = {
        "loss": ["loss", "Loss", "train/loss", "training_loss"],
        "eval_loss": ["eval/loss", "val_loss", "eval_loss"],
    }
    same |= {"learning_rate": ["lr", "train/lr", "learning rate"], "total_tokens": ["train/num_tokens", "num_tokens"]}
    same |= {"eval_accuracy": ["eval/mean_token_accuracy", "eval_mean_token_accuracy"], "step": ["train/global_step"]}
    for key, names in same.items():
        assert {our_key(name) for name in names} == {key}
    assert all(our_key(key) == key for key in KEYS)
    assert {our_key(name) for name in ("train/train_loss", "test/loss", "rewards/x", "train/epoch_x", "")} == {None}


def test_runs_of_one_name_are_told_apart(tmp_path):
    paths = [str(write_ours(tmp_path / name / "run")) for name in ("a", "b")]
    assert [run.name for run in read_all(paths, names=(), columns={})] == ["a/run", "b/run"]
    assert [run.name for run in read_all(paths * 2, names=(), columns={})] == [
        "a/run",
        "b/run",
        "a/run (2)",
        "b/run (2)",
    ]
    assert [run.name for run in read_all(paths, names=["x", "y"], columns={})] == ["x", "y"]
    with pytest.raises(ConfigError, match="1 names given, expected one for each of the 2 runs: run, run"):
        read_all(paths, names=["x"], columns={})
    assert math.isnan(read_run(paths[0]).lines[-1]["loss"])
