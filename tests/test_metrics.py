"""What a line of metrics says, and that no line is lost or doubled by a crash."""

import json

import pytest
from etils import epath

from jaxsft.loss import LossSums
from jaxsft.metrics import MetricsFile, StepMetrics, Totals, summarise, train_flops
from jaxsft.report import plot_run


def step(loss_sum, weight_sum, correct=0.0, tokens=10.0, skipped=0.0):
    return StepMetrics(LossSums(loss_sum, weight_sum, correct, weight_sum), tokens, 0.0, 1.0, 0.5, skipped)


def test_the_loss_of_a_line_is_over_all_its_tokens_not_a_mean_of_means():
    line, totals = summarise(
        [step(10.0, 1.0, 1.0), step(0.0, 9.0, 0.0, skipped=1.0)], Totals(5, 2, 0), batch_positions=20
    )
    assert line["loss"] == 1.0
    assert line["accuracy"] == pytest.approx(0.1)
    assert line["padding_share"] == 0.5
    assert totals == Totals(tokens=25, trained_tokens=12, skipped_steps=1)


def test_a_line_without_trained_tokens_is_zero_not_nan():
    line, _ = summarise([step(0.0, 0.0)], Totals(), batch_positions=10)
    assert line["loss"] == 0 and line["accuracy"] == 0


def test_flops_of_a_worked_example():
    # 10 parameters, 4 tokens; one layer of width 3; a segment of 4 has 1 + 2 + 3 + 4 = 10 pairs
    assert train_flops(matmul_params=10, tokens=4, attention_width=3, attention_pairs=10) == 6 * 10 * 4 + 12 * 3 * 10


def test_lines_of_steps_that_are_done_again_and_a_torn_line_are_dropped(tmp_path):
    path = epath.Path(tmp_path) / "metrics.jsonl"
    file = MetricsFile(path, step=0)
    for number in (1, 2, 3):
        file.write({"step": number, "total_tokens": number, "total_trained_tokens": number, "skipped_steps": 0})
    with path.open("a") as torn:
        torn.write('{"step": 4, "los')
    again = MetricsFile(path, step=2)
    assert again.totals() == Totals(2, 2, 0)
    again.write({"step": 3})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_the_picture_of_a_run_is_drawn_with_and_without_held_out_data(tmp_path):
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    for evaluation in ([], [{"step": 0, "eval_loss": 2.0, "eval_exact_match": 0.0}]):
        text = "".join(json.dumps(line) + "\n" for line in evaluation + lines)
        (tmp_path / "metrics.jsonl").write_text(text)
        assert plot_run(epath.Path(tmp_path)).read_bytes().startswith(b"\x89PNG")
