"""`metrics.jsonl` holds each step once, whatever crashes did to it, and a file that was changed is noticed."""

import json

import pytest
from etils import epath

from jaxsft.training.metrics import Totals
from jaxsft.training.metrics_file import MetricsFile, metrics_problem, read_metrics


def test_lines_of_steps_that_are_done_again_and_a_torn_line_are_dropped(tmp_path):
    path = epath.Path(tmp_path) / "metrics.jsonl"
    file = MetricsFile(path, step=0)
    assert file.last_step == -1
    for number in (1, 2, 3):
        file.write({"step": number, "total_tokens": number, "total_trained_tokens": number, "skipped_steps": 0})
    with path.open("a") as torn:
        torn.write('{"step": 4, "los')
    again = MetricsFile(path, step=2)
    assert again.totals() == Totals(2, 2, 0) and again.last_step == 3
    again.write({"step": 3})
    assert [each["step"] for each in read_metrics(path)] == [1, 2, 3]


LINE = {"total_tokens": 1.0, "total_trained_tokens": 1.0, "skipped_steps": 0.0}


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content + b"\0" * 100 + b"\n",
        lambda content: content.replace(b'{"step": 2', b"\n" + b'{"step": 2'),
        lambda content: content + b"not json\n",
        lambda content: content + b"\xff\xfe\n",
        lambda content: content + b"[1, 2]\n",
        lambda content: content + b"[" * 100_000 + b"\n",
        lambda content: content + b'{"loss": 1}\n',
        lambda content: content + b'{"step": "3"}\n',
        lambda content: content + b'{"step": 2, "loss": "abc"}\n',
        lambda content: content + b'{"step": 2, "eval_loss": [1]}\n',
        lambda content: content + content,
        lambda content: content[60:],
        lambda content: content.replace(b"1.0", b"9.0", 1),
        lambda content: content.replace(b"\n", b"", 1),
        lambda content: b"",
    ],
)
def test_a_damaged_file_of_metrics_keeps_its_good_lines_and_a_copy(tmp_path, damage):
    path = epath.Path(tmp_path) / "metrics.jsonl"
    file = MetricsFile(path, step=0)
    for number in (1, 2):
        file.write({"step": number} | LINE)
    sealed = file.state()
    assert metrics_problem(path, step=2, sealed=sealed) is None
    path.write_bytes(damage(path.read_bytes()))
    damaged = path.read_bytes()
    assert metrics_problem(path, step=2, sealed=sealed) is not None
    said = []
    again = MetricsFile(path, step=2, sealed=sealed, say=said.append)
    assert len(said) == 1 and "metrics.jsonl is damaged" in said[0] and "metrics.jsonl.damaged-1" in said[0]
    assert (tmp_path / "metrics.jsonl.damaged-1").read_bytes() == damaged
    again.write({"step": 3} | LINE)
    assert [each["step"] for each in read_metrics(path)][-1] == 3
    MetricsFile(path, step=3)


def test_a_file_of_metrics_that_is_gone_is_said(tmp_path):
    path = epath.Path(tmp_path) / "metrics.jsonl"
    file = MetricsFile(path, step=0)
    file.write({"step": 1} | LINE)
    sealed = file.state()
    path.unlink()
    said = []
    MetricsFile(path, step=1, sealed=sealed, say=said.append)
    assert len(said) == 1 and "metrics.jsonl is gone: the lines up to step 1 are lost" in said[0]


def test_a_line_that_was_cut_off_is_said(tmp_path):
    path = epath.Path(tmp_path) / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1} | LINE) + '\n{"step": 2, "lo')
    said = []
    assert MetricsFile(path, step=1, say=said.append).totals() == Totals(1, 1, 0)
    assert said == [f"{path}: its last line was cut off, and is left out"]
