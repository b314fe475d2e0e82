"""The pieces of jaxsft for notebooks, and for those with a loss or a loop of their own; docs/api.md shows each at work.

In: a config. Out: batches on devices, a model with its parameters, and functions of both. `import jaxsft` offers all of
them under their names; nothing is imported before it is asked for.
"""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from jaxsft.answers.evaluate import Examiner, Result, as_text
from jaxsft.answers.generate import Generator, Sampling
from jaxsft.batch import Batch
from jaxsft.chat.encoder import ChatEncoder, asking_encoder
from jaxsft.config import Config, ConfigError, MeshConfig, ModelConfig
from jaxsft.config_files import dump_config
from jaxsft.disk.writing import place
from jaxsft.folders.pretrained import OpenTokenizer, Pretrained, export_model, load_weights, open_model, open_tokenizer
from jaxsft.mesh import make_mesh
from jaxsft.model.abstract import whole
from jaxsft.model.architecture import DecoderConfig
from jaxsft.rows.messages import Message
from jaxsft.setup import Setup
from jaxsft.training.loss import LossSums
from jaxsft.training.metrics import StepMetrics
from jaxsft.training.step import TrainState, forward_loss, make_train_step
from jaxsft.training.step import evaluation_params as params_to_evaluate
from jaxsft.training.step import init_state as make_state


class Batches:
    """The batches of a run: `batch(step)` is a pure function of the data, the seed and the step."""

    def __init__(self, setup: Setup) -> None:
        """Prepares the data. Use `prepare`."""
        self._setup = setup
        self.loader = setup.loader
        """Batches on the host (`loader.batch(step)`, NumPy arrays), what they are made of, and reports on the rows."""

    @property
    def num_steps(self) -> int:
        """Steps of the run: `train.steps`, or those of `train.epochs`."""
        return self._setup.num_steps

    def batch(self, step: int) -> Batch:
        """The batch of a step on the devices, leaves [B, T]; see `Batch`.

        Raises:
            DataError: a row has an id that the model does not know.
        """
        return self._setup.place_batch(step)

    def close(self) -> None:
        """Ends the reading of a stream; of prepared data there is nothing to end."""
        self.loader.close()


class LoadedModel:
    """A model with its parameters on a mesh, and its tokenizer."""

    def __init__(self, opened: OpenTokenizer, pretrained: Pretrained, mesh: Mesh, weights: Any) -> None:
        """Use `load_model`."""
        self._opened, self._pretrained = opened, pretrained
        self._params, self.frozen = pretrained.model.split(weights)
        """What is not trained: nothing, but where the config has `lora` or `train.only`."""
        self._examiners: dict[str, Examiner | None] = {}
        self._generator: Generator | None = None
        self._encoder: ChatEncoder | None = None
        self.mesh = mesh
        """Everything that computes with the parameters goes inside `with jax.set_mesh(model.mesh)`."""

    @property
    def params(self) -> Any:
        """The parameters as they were loaded: a pytree that `jax.grad` and optax take.

        Raises:
            ValueError: `init_state` has taken them over; those of its state are the ones to use now.
        """
        if self._params is None:
            raise ValueError("these parameters have become part of a train state: pass params=state.params")
        return self._params

    @property
    def config(self) -> DecoderConfig:
        """What the decoder computes: layers, sizes, positions."""
        return self._pretrained.decoder_config

    @property
    def tokenizer(self) -> Any:
        """transformers' tokenizer, with the chat template."""
        return self._opened.tokenizer

    def hidden(self, params: Any, batch: Batch) -> jax.Array:
        """Hidden states after the final norm, [B, T, D] in the compute dtype. Pure: for `jax.jit` and `jax.grad`."""
        decoder = nnx.merge(self._pretrained.model.graphdef, params, self.frozen)
        return decoder(batch.tokens, batch.segment_ids, batch.positions).hidden

    def logits(self, params: Any, hidden: jax.Array) -> jax.Array:
        """float32 logits [B, T, V] of hidden states [B, T, D], V the vocabulary without what fills up its table.

        They need B * T * V * 4 bytes, which `loss` never does. Pure.
        """
        decoder = nnx.merge(self._pretrained.model.graphdef, params, self.frozen)
        return decoder.logits(hidden)[..., : self.config.vocab_size]

    def loss(self, params: Any, batch: Batch) -> LossSums:
        """The sums of the masked next-token loss of a batch; `loss_sum / weight_sum` is the loss. Pure."""
        return forward_loss(self._pretrained.model.graphdef, self._whole(params), batch)[0]

    def _whole(self, params: Any) -> Any:
        return whole(self.params if params is None else params, self.frozen)


def prepare(config: Config) -> Batches:
    """The batches of a run; prepared once, then read from the cache.

    Raises:
        ConfigError, DataError: the rows, the tokenizer or the chat template are not usable.
    """
    return Batches(Setup(config, say=print))


def load_model(source: Config | str | os.PathLike[str]) -> LoadedModel:
    """A model with its weights on the devices.

    Args:
        source: the config of a run, whose model, mesh and seed are taken; or a Hugging Face folder such as an export, a
            GGUF file or a hub id, which is cut over all devices.

    Raises:
        ConfigError: it is no usable model.
    """
    if isinstance(source, Config):
        setup = Setup(source)
        setup.check_fit()
        opened, pretrained, mesh, seed = setup.tokenizer, setup.pretrained, setup.mesh, source.seed
    else:
        config = ModelConfig(path=os.fspath(source), remat="none")
        opened, seed = open_tokenizer(config), 0
        pretrained, mesh = open_model(config, opened), make_mesh(MeshConfig())
    return LoadedModel(opened, pretrained, mesh, load_weights(pretrained, mesh, seed=seed))


def init_state(config: Config, model: LoadedModel) -> TrainState:
    """The state before the first step: step, parameters and moments. It takes the parameters of `model` over."""
    params, model._params = model.params, None
    return make_state(params, config.optim, model.mesh)


def evaluation_params(config: Config, state: TrainState) -> Any:
    """The parameters of a state that are to be evaluated, asked and exported.

    With most optimizers `state.params`; with schedule_free_adamw an average, made anew at each call.
    """
    return params_to_evaluate(config.optim, state)


def train_step(
    config: Config, model: LoadedModel, *, num_steps: int
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """The step that `train` does, compiled at its first call: loss, gradients, clipping and optimizer of `config`.

    The state that it is given is used up. `metrics.sums` has the sums of the loss; where loss or gradient is not
    finite, the state comes back as it was, and `metrics.skipped` is 1.

    Args:
        config: `optim`, `loss`, `seed`, `train.batch_size` and `train.microbatch_size` are taken.
        model: whose structure is trained.
        num_steps: steps of the whole run, for the schedule.
    """
    step = make_train_step(
        model._pretrained.model,
        config.optim,
        num_steps=num_steps,
        num_microbatches=config.train.num_microbatches,
        mesh=model.mesh,
        loss=config.loss,
        seed=config.seed,
    )

    def run(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        with jax.set_mesh(model.mesh):
            return step(state, model.frozen, batch)

    return run


def evaluate(config: Config, model: LoadedModel, params: Any = None) -> Result:
    """Held-out loss and sample answers on `data.eval`; `result.metrics["eval_loss"]`, `result.samples`.

    Args:
        config: with `data.eval`; its model is not looked at.
        model: the model.
        params: of it, where they are not those that were loaded.

    Raises:
        ConfigError, DataError: there are no held-out rows, or they are not usable.
    """
    key = dump_config(config)
    if key not in model._examiners:
        setup = Setup(config, say=print)
        # The model that is asked, whatever the config's own is.
        setup.mesh, setup.tokenizer, setup.pretrained = model.mesh, model._opened, model._pretrained
        model._examiners[key] = setup.examiner
    examiner = model._examiners[key]
    if examiner is None:
        raise ConfigError("data.eval: required to evaluate, not given")
    return examiner.examine(model._whole(params))


def generate(
    model: LoadedModel,
    conversations: Sequence[Sequence[Message]],
    params: Any = None,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """The answers to conversations, all at once: the text of the assistant's next turn, without its stop token.

    Args:
        model: the model.
        conversations: each a list of messages `{"role": ..., "content": ...}`, the user's last.
        params: of the model, where they are not those that were loaded.
        max_new_tokens: the longest answer.
        temperature: 0 takes the most likely token.
        top_p: draws from the likeliest tokens that sum to this.
        seed: of what is drawn.

    Raises:
        DataError: the chat template refuses a conversation.
        ValueError: the conversations are no lists of messages, or a number is out of range.
    """
    for number, messages in enumerate(conversations):
        if (
            not isinstance(messages, list | tuple)
            or not messages
            or not all(isinstance(each, dict) for each in messages)
        ):
            raise ValueError(
                f"conversations[{number}]: {str(messages)[:80]!r} given, expected a list of messages such as "
                '[{"role": "user", "content": "hi"}]'
            )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} given, expected 1 or more")
    if not (temperature >= 0 and 0 < top_p <= 1 and math.isfinite(temperature)):
        raise ValueError(f"temperature {temperature} and top_p {top_p} given, expected 0 or more, and up to 1")
    if model._generator is None:
        model._generator = Generator(model._pretrained.model, model.mesh, stop_ids=model._opened.stops)
    if model._encoder is None:
        model._encoder = asking_encoder(model.tokenizer)
    generator, encoder = model._generator, model._encoder
    answers = generator.answers(
        model._whole(params),
        [encoder.prompt(messages) for messages in conversations],
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_p, seed),
    )
    return [
        as_text(answer[:-1] if answer and answer[-1] in generator.stop_ids else answer, model.tokenizer)
        for answer in answers
    ]


def export(model: LoadedModel, folder: str | os.PathLike[str], params: Any = None, *, merge: bool = False) -> None:
    """Writes a folder that transformers opens: weights, config, tokenizer, chat template, generation_config.

    Of a model with adapters, it is one that PEFT opens.

    Args:
        model: the model.
        folder: where to; an export of ours that is there is replaced, what is not ours is kept beside it.
        params: of the model, where they are not those that were loaded.
        merge: write the whole model, its adapters in its weights.

    Raises:
        ConfigError, WriteError: it cannot be written there.
    """
    export_model(model._pretrained, model._opened, model._whole(params), place(folder), merge=merge, say=print)
