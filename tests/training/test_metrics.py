"""What a line of metrics says: sums that are divided once, FLOPs as XLA counts them, and what the host costs."""

import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import TO_READ
from etils import epath
from flax import nnx

from jaxsft.config import LoraConfig, ModelConfig
from jaxsft.folders.pretrained import decoder_maker
from jaxsft.model import attention
from jaxsft.model.abstract import abstract_model
from jaxsft.model.decoder import Decoder
from jaxsft.model.experts import RouterSums
from jaxsft.model.families.known import decoder_config, family
from jaxsft.report.picture import plot_run
from jaxsft.training.loss import LossSums
from jaxsft.training.metrics import (
    SkipWatch,
    StepMetrics,
    Stopwatch,
    Totals,
    from_json_line,
    matmul_params,
    num_params,
    summarise,
    to_json_line,
    train_flops,
)


def step(loss_sum, weight_sum, correct=0.0, tokens=10.0, skipped=0.0, router=None, objective=None):
    return StepMetrics(
        LossSums(loss_sum, weight_sum, correct, weight_sum), tokens, 0.0, 1.0, 0.5, skipped, objective, router
    )


def test_the_loss_of_a_line_is_over_all_its_tokens_not_a_mean_of_means():
    line, totals = summarise(
        [step(10.0, 1.0, 1.0), step(0.0, 9.0, 0.0, skipped=1.0)], Totals(5, 2, 0), batch_positions=20
    )
    assert line["loss"] == 1.0
    assert line["accuracy"] == pytest.approx(0.1)
    assert line["padding_share"] == 0.5
    assert totals == Totals(tokens=25, trained_tokens=12, skipped_steps=1)


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ({"loss": math.nan}, {"loss": "nan"}),
        ({"loss": math.inf, "grad_norm": -math.inf}, {"loss": "inf", "grad_norm": "-inf"}),
        ({"eval_perplexity": math.inf, "eval_loss/en": math.nan}, {"eval_perplexity": "inf", "eval_loss/en": "nan"}),
        ({}, None),
    ],
)
def test_a_line_is_json_and_says_what_was_no_number(lost, named):
    line = {"step": 3, "tokens": 4.0} | lost

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    text = to_json_line(line)
    strict = json.loads(text, parse_constant=refuse)
    assert strict.get("not_finite") == named and all(strict[key] is None for key in lost)
    again = from_json_line(text)
    assert again.keys() == line.keys() and all(repr(again[key]) == repr(line[key]) for key in line)


def skipped(pattern):
    return [step(1.0, 1.0, skipped=float(mark == "x")) for mark in pattern]


@pytest.mark.parametrize(
    ("num_steps", "share", "pattern", "said"),
    [
        (5000, 0.01, "." + "x" * 10, "10 steps in a row were skipped, up to step 11"),
        (5000, 1.0, "x" * 10, "10 steps in a row"),
        (5000, 0.01, "x" * 9 + "." + "x" * 9, None),
        (100, 0.01, "x.", None),
        (100, 0.01, "x.x", "2 steps were skipped, up to step 3, where optim.max_skipped (0.01 of 100 steps) allows 1"),
        (100, 0.0, "..x", "allows 0"),
        (100, 0.05, "x.x.x.x.x", None),
        (12, 0.01, ".xx", "allows 1"),
        (1, 0.01, "x", "all 1 steps of the run were skipped"),
        (3, 1.0, "xxx", "all 3 steps of the run were skipped"),
        (3, 1.0, "xx.", None),
    ],
)
def test_too_many_skipped_steps_end_a_run(num_steps, share, pattern, said):
    for size in (1, 4):  # however many steps a line covers
        watch = SkipWatch(num_steps=num_steps, max_skipped=share, first=0, skipped=0)
        steps, problem = skipped(pattern), None
        for at in range(0, len(steps), size):
            problem = problem or watch.see(steps[at : at + size])
        assert (problem is None) == (said is None) and (said or "") in (problem or ""), problem


def test_steps_skipped_before_a_run_was_continued_count():
    watch = SkipWatch(num_steps=100, max_skipped=0.02, first=50, skipped=2)
    assert watch.see(skipped("..")) is None
    assert "3 steps were skipped, up to step 53" in watch.see(skipped("x"))
    assert watch.first_of_row == 52


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
    # Norms and looked-up tables count among all parameters; of each table, 28 rows only fill it up.
    tables = 1 if tied else 2
    experts_of_layer = 8 * 7 + 3 * 7 * 8 * 6
    expected = 3 * (attention + experts_of_layer + 2 * 8) + 8 + tables * 100 * 8
    assert num_params(params, config) == (expected, tables * 28 * 8)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_quantised_weights_count_as_what_they_stand_for(model_type, kind):
    """In all parameters, and in those that multiply a token: MFU is of the same model."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    of_experts = {"num_local_experts": 4, "num_experts_per_tok": 2} if model_type == "mixtral" else {}
    hf_config = (
        {"model_type": model_type, "vocab_size": 100, "num_key_value_heads": 2, "head_dim": 16} | sizes | of_experts
    )
    structure = decoder_config(hf_config)

    def counts(quantize):
        config = ModelConfig(path="model", quantize=quantize)
        model = abstract_model(decoder_maker(config, structure, family(hf_config), LoraConfig(rank=2), None))
        return [(num_params(tree, structure), matmul_params(tree, structure)) for tree in (model.params, model.frozen)]

    assert counts(kind) == counts("none") and counts("none")[1][1] > 3 * 64 * 128


def test_flops_of_a_worked_example():
    # 10 parameters, 4 tokens; one layer of width 3; a segment of 4 has 1 + 2 + 3 + 4 = 10 pairs
    assert train_flops(matmul_params=10, tokens=4, attention_width=3, attention_pairs=10) == 6 * 10 * 4 + 12 * 3 * 10


def test_the_picture_of_a_run_is_drawn_with_and_without_held_out_data(tmp_path):
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    for evaluation in ([], [{"step": 0, "eval_loss": 2.0, "eval_exact_match": 0.0}]):
        text = "".join(json.dumps(line) + "\n" for line in evaluation + lines)
        (tmp_path / "metrics.jsonl").write_text(text)
        assert plot_run(epath.Path(tmp_path)).read_bytes().startswith(b"\x89PNG")


def llama(*, head_dim, hidden_size):
    """A layer with 4 heads."""
    return decoder_config(
        {
            "model_type": "llama",
            "vocab_size": hidden_size,
            "hidden_size": hidden_size,
            "intermediate_size": 2 * hidden_size,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": head_dim,
            "tie_word_embeddings": True,
        }
    )


def xla_flops(config, *, num_tokens):
    """XLA's own count for loss and gradients of one row of one segment: unrolled, nothing recomputed, whole logits."""

    def make():
        return Decoder(
            config, compute_dtype="float32", param_dtype="float32", remat="none", unroll=True, rngs=nnx.Rngs(0)
        )

    graphdef, params = nnx.split(nnx.eval_shape(make))
    tokens = jax.ShapeDtypeStruct((1, num_tokens), jnp.int32)

    def loss(params, tokens):
        model = nnx.merge(graphdef, params)
        logits = model.logits(model(tokens, jnp.ones_like(tokens), jnp.arange(num_tokens)[None]).hidden)
        return -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1))

    compiled = jax.jit(jax.grad(loss)).lower(params, tokens).compile(TO_READ)
    return compiled.cost_analysis()["flops"], matmul_params(params, config)


def test_flops_are_those_that_xla_counts_where_matmuls_dominate():
    """XLA also counts what is no product: norms, activations, rotations, softmax; 0.4% here. It computes the scores of
    all pairs of a row, of which causal attention needs half: so it is given them all."""
    config, num_tokens = llama(head_dim=128, hidden_size=512), 64
    counted, num_params = xla_flops(config, num_tokens=num_tokens)
    ours = train_flops(
        matmul_params=num_params, tokens=num_tokens, attention_width=4 * 128, attention_pairs=num_tokens**2
    )
    assert 1 < counted / ours < 1.01


def test_flops_of_attention_are_those_that_xla_counts(monkeypatch):
    """What grows with the square of the length is attention: 12 per pair, head and head dim, and the softmax, whose
    part does not depend on the head dim. So two head dims tell them apart."""
    # What a CPU does depends on the rows, of which XLA's count knows nothing.
    monkeypatch.setattr(attention, "on_one_device", lambda: False)
    # Nor are scores to be computed again: XLA of jax 0.10 takes those of the forward pass after all, that of 0.12 does
    # what it is told, and counts 14 per pair.
    monkeypatch.setattr(jax, "checkpoint", lambda function, **_: function)

    def per_pair(head_dim):
        config = llama(head_dim=head_dim, hidden_size=64)
        short, long = (xla_flops(config, num_tokens=length)[0] for length in (48, 96))
        return (long - 2 * short) / (96**2 - 2 * 48**2)

    narrow, wide = per_pair(16), per_pair(64)
    ours = train_flops(matmul_params=0, tokens=0, attention_width=4 * (64 - 16), attention_pairs=1)
    assert wide - narrow == pytest.approx(ours, rel=1e-3)
    softmax = (narrow - train_flops(matmul_params=0, tokens=0, attention_width=4 * 16, attention_pairs=1)) / 4
    assert 20 < softmax < 35  # per score: mask, exponential, sums, and their gradients


def slow_step(seconds):
    """A compiled computation that takes at least so long, and its argument."""
    step = jax.jit(lambda x, times: jax.lax.fori_loop(0, times, lambda i, x: jnp.tanh(x @ x), x).sum())
    x, times, taken = jnp.ones((128, 128)), 500, 0.0
    step(x, times).block_until_ready()
    while taken < seconds:
        times *= 2
        begin = time.perf_counter()
        step(x, times).block_until_ready()
        taken = time.perf_counter() - begin
    return step, (x, times)


def test_the_time_of_the_host_counts_only_while_no_step_is_running():
    step, arguments = slow_step(1.0)

    def slow_batches():
        while True:
            time.sleep(0.2)
            yield None

    watch, batches = Stopwatch(), slow_batches()
    watch.lap()
    for _ in range(2):  # the first waits while nothing runs, the second while the first step does
        watch.wait(batches)
        watch.launching()
        result = step(*arguments)
        watch.launched(result)
    time.sleep(0.2)  # a step is running: the host is busy, and nothing is lost
    jax.block_until_ready(result)
    watch.caught_up()
    time.sleep(0.3)  # nothing is running
    seconds, waited, busy = watch.lap()
    assert 0.2 <= waited * seconds < 0.35
    assert 0.3 <= busy * seconds < 0.45
    with watch.paused():
        time.sleep(0.3)
    assert watch.lap()[0] < 0.2
