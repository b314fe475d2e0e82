"""The whole path against transformers: training step by step, generation, export, held-out loss.

Two models on really prepared data: stories260K (pretrained, needs the material folder) and a random Llama of two layers
that transformers makes. The oracle is what one would write in plain PyTorch.
"""

import functools
import math
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsft import evaluate, hf
from jaxsft.config import DataConfig, EvalConfig, MeshConfig, ModelConfig, OptimConfig
from jaxsft.data.formats import load_conversations
from jaxsft.data.loader import Loader, Prepared, prepare
from jaxsft.generate import Generator, Sampling, draw
from jaxsft.mesh import check_divisible, make_mesh
from jaxsft.pretrained import OpenTokenizer, Pretrained, export_model, load_params, open_model, open_tokenizer
from jaxsft.step import init_state, make_eval_step, make_train_step, put_batch

torch = pytest.importorskip("torch", reason="the oracle is PyTorch")
transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
torch.set_num_threads(2)

NUM_STEPS = 50
WARMUP_RATIO, FINAL_RATIO = 0.09, 0.1
NOTHING: Any = nnx.State({})

TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {{- 'Answer: ' + message['content'] + eos_token -}}
    {%- else -%}
        {{- message['role'] + ': ' + message['content'] + '\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'Answer: ' -}}
{%- endif -%}
"""


class Setup(NamedTuple):
    """A model and its data, as `train` opens them."""

    tokenizer: OpenTokenizer
    pretrained: Pretrained
    data_config: DataConfig
    data: Prepared
    loader: Loader
    optim: OptimConfig


class Trained(NamedTuple):
    """What a run leaves: its parameters (ours) or model (theirs), and loss and gradient norm of each step."""

    result: Any
    losses: np.ndarray
    norms: np.ndarray


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def eight_devices():
    return make_mesh(MeshConfig(fsdp=4, tensor=2))


def open_setup(model: ModelConfig, data: DataConfig, *, limit: int, batch_size: int, learning_rate, clip_norm) -> Setup:
    tokenizer = open_tokenizer(model, data.chat_template)
    pretrained = open_model(model, tokenizer)
    prepared = prepare_source(data, data.train, tokenizer, limit)
    loader = Loader(prepared, seq_len=data.seq_len, batch_size=batch_size, seed=0, packing=True)
    optim = OptimConfig(
        learning_rate=learning_rate,
        schedule="cosine",
        warmup_ratio=WARMUP_RATIO,
        final_ratio=FINAL_RATIO,
        beta2=0.98,
        weight_decay=0.1,
        clip_norm=clip_norm,
    )
    return Setup(tokenizer, pretrained, data, prepared, loader, optim)


def prepare_source(data: DataConfig, source: str, tokenizer: OpenTokenizer, limit: int) -> Prepared:
    return prepare(
        data, source, tokenizer.tokenizer, tokenizer_files_key=tokenizer.key, stops=tokenizer.stops, limit=limit
    )


@pytest.fixture(scope="session")
def stories(material, tmp_path_factory) -> Setup:
    """stories260K on the shorter ones of 400 real instructions, with a template of our own; it stops on BOS as well."""
    folder = tmp_path_factory.mktemp("stories")
    model = folder / "model"
    shutil.copytree(material / "models" / "stories260K", model)
    (model / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": [2, 1]}')
    (folder / "template.jinja").write_text(TEMPLATE)
    data = DataConfig(
        train=str(material / "data" / "alpaca_en.json"),
        chat_template=str(folder / "template.jinja"),
        seq_len=256,
        cache=str(folder / "cache"),
    )
    return open_setup(ModelConfig(path=str(model)), data, limit=400, batch_size=4, learning_rate=1e-3, clip_norm=1.5)


@pytest.fixture(scope="session")
def llama(repo, tmp_path_factory) -> Setup:
    """A random Llama of transformers' making, untied, with biases and grouped queries, on the quickstart's data."""
    folder = tmp_path_factory.mktemp("llama")
    config = transformers.LlamaConfig(
        vocab_size=264,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        attention_bias=True,
        tie_word_embeddings=False,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=260,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # biases of 0 and norms of 1 would hide what is done to them
                parameter.copy_(0.1 * torch.randn(parameter.shape) + ("norm" in name))
    model.save_pretrained(folder / "model")
    quickstart = repo / "configs" / "quickstart"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(quickstart / name, folder / "model")
    data = DataConfig(
        train=str(quickstart / "train.jsonl"),
        eval=str(quickstart / "eval.jsonl"),
        seq_len=192,
        cache=str(folder / "cache"),
    )
    model = ModelConfig(path=str(folder / "model"), remat="none")
    return open_setup(model, data, limit=250, batch_size=4, learning_rate=5e-3, clip_norm=1.5)


@pytest.fixture(scope="session", params=["stories", "llama"])
def setup(request) -> Setup:
    return request.getfixturevalue(request.param)


# Training.


def train_ours(setup: Setup, *, num_microbatches: int) -> Trained:
    mesh, model = one_device(), setup.pretrained.model
    state = init_state(load_params(setup.pretrained, mesh, seed=0), setup.optim, mesh)
    train_step = make_train_step(
        model, NOTHING, setup.optim, num_steps=NUM_STEPS, num_microbatches=num_microbatches, mesh=mesh
    )
    metrics = []
    with jax.set_mesh(mesh):
        for step in range(NUM_STEPS):
            batch = put_batch(functools.partial(setup.loader.batch, step), setup.loader.shape, mesh)
            state, step_metrics = train_step(state, NOTHING, batch)
            metrics.append(jax.device_get(step_metrics))
    losses = np.array([each.sums.loss_sum / each.sums.weight_sum for each in metrics])
    return Trained(state.params, losses, np.array([each.grad_norm for each in metrics]))


def load_theirs(folder: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def their_logits(model: Any, batch: Any) -> Any:
    """Logits of packed rows: the mask of segments and the positions are spelt out for transformers."""
    segments = torch.tensor(batch.segment_ids)
    length = segments.shape[1]
    allowed = (segments[:, :, None] == segments[:, None, :]) & torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.where(allowed[:, None], 0.0, torch.finfo(torch.float32).min)
    positions = torch.tensor(batch.positions, dtype=torch.long)
    tokens = torch.tensor(batch.tokens, dtype=torch.long)
    return model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits


def their_learning_rate(step: int, peak: float) -> float:
    """From the schedule's docstring: (i + 1) / W in warm-up, then half a cosine from step W to the last one."""
    warmup = math.ceil(WARMUP_RATIO * NUM_STEPS)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / (NUM_STEPS - 1 - warmup)
    return peak * (FINAL_RATIO + (1 - FINAL_RATIO) * (1 + math.cos(math.pi * progress)) / 2)


def train_theirs(setup: Setup) -> Trained:
    model = load_theirs(setup.pretrained.folder).train()
    optim = setup.optim
    spared = [p for name, p in model.named_parameters() if "norm" in name or name.endswith("bias")]
    decayed = [p for name, p in model.named_parameters() if not ("norm" in name or name.endswith("bias"))]
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2), eps=optim.epsilon)
    losses, norms = [], []
    for step in range(NUM_STEPS):
        batch = setup.loader.batch(step)
        weights = torch.tensor(batch.loss_weights)
        targets = torch.tensor(batch.targets, dtype=torch.long)
        logits = their_logits(model, batch)
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        loss = (weights.flatten() * nll).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)))
        losses.append(float(loss))
        for group in optimizer.param_groups:
            group["lr"] = their_learning_rate(step, optim.learning_rate)
        optimizer.step()
    return Trained(model.eval(), np.array(losses), np.array(norms))


@pytest.fixture(scope="session")
def ours(setup) -> Trained:
    return train_ours(setup, num_microbatches=1)


@pytest.fixture(scope="session")
def theirs(setup) -> Trained:
    return train_theirs(setup)


def assert_same_course(ours: Trained, theirs: Trained) -> None:
    np.testing.assert_allclose(ours.losses, theirs.losses, rtol=1e-4)
    np.testing.assert_allclose(ours.norms, theirs.norms, rtol=1e-3)


def test_the_parity_run_exercises_packing_padding_rows_warm_up_and_clipping(setup, theirs):
    batches = [setup.loader.batch(step) for step in range(NUM_STEPS)]
    assert sum(int(batch.segment_ids.max()) > 1 for batch in batches) == NUM_STEPS
    assert any((batch.segment_ids == 0).all(axis=1).any() for batch in batches)
    assert setup.loader.steps_per_epoch < NUM_STEPS
    assert 5 <= (theirs.norms > setup.optim.clip_norm).sum() <= NUM_STEPS - 5
    assert theirs.losses[-5:].mean() < 0.9 * theirs.losses[:5].mean()


def test_fifty_steps_lose_what_a_plain_pytorch_loop_loses(ours, theirs):
    assert_same_course(ours, theirs)


def test_fifty_steps_of_two_microbatches_lose_what_a_plain_pytorch_loop_loses(setup, theirs):
    assert_same_course(train_ours(setup, num_microbatches=2), theirs)


# Export.


@pytest.fixture(scope="session")
def exported(setup, ours, tmp_path_factory):
    """Our parameters after training, as the folder that a user gets."""
    folder = tmp_path_factory.mktemp("exported") / "export"
    export_model(setup.pretrained, setup.tokenizer, ours.result, folder)
    return folder


def test_an_export_after_training_has_our_logits_in_transformers(setup, ours, exported):
    batch = setup.loader.batch(0)
    decoder = nnx.merge(setup.pretrained.model.graphdef, ours.result)
    logits = decoder.logits(decoder(batch.tokens, batch.segment_ids, batch.positions))
    with torch.no_grad():
        expected = their_logits(load_theirs(exported).eval(), batch).numpy()
    is_token = batch.segment_ids > 0
    np.testing.assert_allclose(np.asarray(logits)[is_token], expected[is_token], rtol=0, atol=1e-4)


def test_an_export_after_training_stops_where_we_stop_and_speaks_the_same_template(setup, exported):
    config = transformers.GenerationConfig.from_pretrained(exported)
    stops = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    assert stops == list(setup.tokenizer.stops)
    before, after = setup.tokenizer.tokenizer, transformers.AutoTokenizer.from_pretrained(exported)
    assert after.chat_template == before.chat_template
    assert hf.tokenizer_key(after) == setup.tokenizer.key
    conversations = load_conversations(setup.data_config.train, format=None, limit=20).conversations
    for conversation in conversations:
        for prompt, messages in ((True, conversation.messages[:-1]), (False, conversation.messages)):
            rendered = [
                each.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
                for each in (before, after)
            ]
            assert rendered[0] == rendered[1] and len(rendered[0]) > 5
            assert after.decode(rendered[1]) == before.decode(rendered[0])


# Generation.


def their_answer(model: Any, prompt: list[int], *, max_new_tokens: int, stop_ids: Any = None) -> list[int]:
    """Left out, `stop_ids` are what the model's own generation_config says."""
    tokens = torch.tensor([prompt])
    stops = {} if stop_ids is None else {"eos_token_id": list(stop_ids)}
    out = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=0,
        **stops,
    )
    return out[0, len(prompt) :].tolist()


STORIES = [
    "Once",
    "Lily and Tom went to the park. They saw a",
    "One day, a little",
    "The cat was sad. " * 12 + "Then",
    "Once upon a time, there was a big dog named Max. Max liked to play with his ball. One day",
]


def test_a_pretrained_model_answers_prompts_of_any_length_as_in_transformers(stories):
    tokenizer = stories.tokenizer.tokenizer
    prompts = [tokenizer(text)["input_ids"] for text in STORIES]
    assert len({len(prompt) for prompt in prompts}) == len(prompts) and max(map(len, prompts)) > 64
    mesh = one_device()
    params = load_params(stories.pretrained, mesh, seed=0)
    model = load_theirs(stories.pretrained.folder).eval()
    generator = Generator(stories.pretrained.model, mesh, stop_ids=[])
    answers = generator.answers(params, prompts, max_new_tokens=64)
    assert answers == [their_answer(model, prompt, max_new_tokens=64, stop_ids=[-1]) for prompt in prompts]
    assert all(len(answer) == 64 for answer in answers)


@pytest.fixture(scope="session")
def questions(setup) -> list[evaluate.Question]:
    source = setup.data_config.eval or setup.data_config.train
    conversations = load_conversations(source, format=None, limit=200).conversations
    found = evaluate.make_questions(conversations, setup.tokenizer.tokenizer)
    return sorted((q for q in found if len(q.tokens) < 150), key=lambda q: hash(tuple(q.tokens)))[:6]


@pytest.fixture(scope="session")
def unstopped(setup, ours, questions) -> list[list[int]]:
    generator = Generator(setup.pretrained.model, one_device(), stop_ids=[])
    return generator.answers(ours.result, [q.tokens for q in questions], max_new_tokens=24)


@pytest.fixture(scope="session")
def some_stops(setup, unstopped) -> list[int]:
    """Ids at which some of the answers stop, at different tokens, and some do not."""
    everywhere = set.intersection(*map(set, unstopped))
    late = [t for answer in unstopped for t in answer[3:] if t not in everywhere]
    assert late
    return [*setup.tokenizer.stops, late[0]]


def test_a_trained_model_stops_where_transformers_stops(setup, ours, exported, questions, unstopped, some_stops):
    generator = Generator(setup.pretrained.model, one_device(), stop_ids=some_stops)
    prompts = [question.tokens for question in questions]
    answers = generator.answers(ours.result, prompts, max_new_tokens=24)
    model = load_theirs(exported).eval()
    assert answers == [their_answer(model, p, max_new_tokens=24, stop_ids=some_stops) for p in prompts]
    print(setup.tokenizer.stops, some_stops, answers, unstopped)


def test_an_export_stops_by_itself_where_we_do(setup, ours, exported, questions):
    generator = Generator(setup.pretrained.model, one_device(), stop_ids=setup.tokenizer.stops)
    prompts = [question.tokens for question in questions[:3]]
    model = load_theirs(exported).eval()
    expected = [their_answer(model, prompt, max_new_tokens=40) for prompt in prompts]
    assert generator.answers(ours.result, prompts, max_new_tokens=40) == expected
    print(expected)
