"""The command that overlays runs: what it writes, what it says, what it leaves alone."""

import json
import shlex

import pytest

from jaxsft.cli import main
from jaxsft.report.records import from_json


@pytest.fixture
def paths(tmp_path):
    """A run of ours and one of Trainer."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir(), theirs.mkdir()
    lines = [{"step": step, "loss": 3 / step, "total_trained_tokens": 10 * step, "tokens": 50, "seconds": 0.5,
              "memory_gib": 1.25} for step in range(1, 5)]  # fmt: skip
    lines.append({"step": 4, "eval_loss": 0.875})
    lines.insert(0, {"step": 0, "eval_loss": 0.5})  # of the model that it begins with, none of its results
    (ours / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (ours / "config.yaml").write_text("data:\n  date: 2026-11-23\n")  # which YAML makes a date
    history = [{"step": step, "loss": 4 / step} for step in range(1, 5)]
    (theirs / "trainer_state.json").write_text(json.dumps({"log_history": history, "logging_steps": 1}))
    return [str(ours), str(theirs)]


def test_runs_are_overlaid_on_one_page_with_its_twin(paths, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["report", *paths, "--out", str(out), "--name", "JAX", "PyTorch"]) == 0
    said = capsys.readouterr().out
    table = [line.split() for line in said.splitlines()]
    assert ["JAX", "0.7500", "0.8750", "100", "–", "1.25"] in table
    assert ["PyTorch", "1.0000", "–", "–", "–", "–"] in table
    assert "to know: PyTorch: within a step" in said and f"page: {out}/report.html" in said
    page = (out / "report.html").read_text()
    assert "Overlay" in page and "2 runs side by side; nothing is judged." in page
    made = from_json(json.loads((out / "report.json").read_text()))
    assert [run.name for run in made.runs] == ["JAX", "PyTorch"] and made.passed is None
    words = ["python", "run.py", "report", *paths, "--name", "JAX", "PyTorch", "--by", "step", "--out", str(out)]
    assert shlex.split(made.command) == words
    assert made.runs[0].settings == {"data.date": "2026-11-23"}
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_is_written_again_and_its_runs_are_read_from_it(paths, tmp_path):
    out, other = str(tmp_path / "out"), str(tmp_path / "other")
    assert main(["report", *paths, "--out", out]) == 0
    assert main(["report", paths[0], "--out", out]) == 0
    assert main(["report", out, paths[1], "--out", other]) == 0
    made = from_json(json.loads((tmp_path / "other" / "report.json").read_text()))
    assert [run.name for run in made.runs] == ["ours", "theirs"]


@pytest.mark.parametrize(
    "more,message",
    [
        (["--out", "HERE/theirs"], "holds more than a report (trainer_state.json)"),
        (["--out", "HERE/ours/metrics.jsonl"], "a file is there"),
        (["--name", "one"], "1 names given, expected one for each of the 2 runs: ours, theirs"),
        (["--name", "one", "one"], "expected names that differ"),
        (["--columns", "loss"], "expected our key and their column"),
        (["--columns", "lss=loss"], "did you mean 'loss'?"),
    ],
)
def test_mistakes_are_one_message_and_nothing_is_written(paths, tmp_path, capsys, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    assert main(["report", *paths, *(text.replace("HERE", str(tmp_path)) for text in more)]) == 1
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert not (tmp_path / "report").exists()


def test_by_tokens_needs_a_run_that_counts_them(paths, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["report", paths[1], "--by", "tokens", "--out", out]) == 1
    assert "no run counts trained tokens (theirs); use --by step" in capsys.readouterr().err
    assert main(["report", *paths, "--by", "tokens", "--smooth", "2", "--out", out]) == 0
    assert 'data-by="tokens" data-curves="smoothed"' in (tmp_path / "out" / "report.html").read_text()
