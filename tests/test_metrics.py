"""What a line of metrics says, and that no line is lost or doubled by a crash."""

import json

import numpy as np
import pytest
from etils import epath
from flax import nnx

from jaxsft.loss import LossSums
from jaxsft.metrics import MetricsFile, StepMetrics, Totals, matmul_params, summarise, train_flops
from jaxsft.model.decoder import Decoder
from jaxsft.model.experts import RouterSums
from jaxsft.model.families import decoder_config
from jaxsft.report import plot_run


def step(loss_sum, weight_sum, correct=0.0, tokens=10.0, skipped=0.0, router=None):
    return StepMetrics(LossSums(loss_sum, weight_sum, correct, weight_sum), tokens, 0.0, 1.0, 0.5, skipped, router)


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


def test_what_routers_did_is_in_the_lines_of_mixtures_only():
    """Two layers of two experts, one choice per token, two steps of 10 tokens."""
    sums = [
        RouterSums(np.array([[5, 5], [8, 2]]), np.array([[5, 5], [9, 1]]), np.array([10, 30])),
        RouterSums(np.array([[5, 5], [6, 4]]), np.array([[3, 7], [7, 3]]), np.array([20, 60])),
    ]
    line, _ = summarise([step(1.0, 1.0, router=each) for each in sums], Totals(), batch_positions=10)
    balances = [2 * (0.5 + 0.9 * 0.8 + 0.1 * 0.2) / 2, 2 * (0.5 + 0.7 * 0.6 + 0.3 * 0.4) / 2]
    assert line["router_balance"] == pytest.approx(sum(balances) / 2)
    assert line["router_z"] == pytest.approx((2 + 4) / 2)
    assert line["router_max_share"] == pytest.approx(2 * 16 / 20)  # the first expert of the second layer
    assert not any("router" in key for key in summarise([step(1.0, 1.0)], Totals(), batch_positions=10)[0])


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_that_multiply_a_token_are_those_of_its_own_experts(tied):
    config = decoder_config(
        {
            "model_type": "mixtral",
            "vocab_size": 100,
            "hidden_size": 8,
            "intermediate_size": 6,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 6,
            "num_local_experts": 7,
            "num_experts_per_tok": 2,
            "tie_word_embeddings": tied,
        }
    )

    def make():
        return Decoder(config, compute_dtype="float32", param_dtype="float32", remat="none", rngs=nnx.Rngs(0))

    params = nnx.split(nnx.eval_shape(make))[1]
    attention, experts = 2 * (4 + 2) * 6 * 8, 8 * 7 + 2 * 3 * 8 * 6
    # The head multiplies, the table of embeddings is looked up; ids that fill up the vocabulary are nobody's.
    assert matmul_params(params, config) == 3 * (attention + experts) + 100 * 8


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
