"""A model folder, opened: tokenizer and stop tokens, the structure of the model, and its parameters on a mesh.

Commands that only look at data (`preview`) stop at the tokenizer; none of them reads a weight before it must.
"""

import pathlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh

from jaxsft import hf
from jaxsft.config import ConfigError, ModelConfig
from jaxsft.data import chat
from jaxsft.mesh import shardings
from jaxsft.model.decoder import Decoder, DecoderConfig
from jaxsft.model.families import family as family_of
from jaxsft.step import Model, abstract_model, random_params
from jaxsft.weights import check_weights
from jaxsft.weights import load_params as read_params


class OpenTokenizer(NamedTuple):
    """A tokenizer with all that the data layer asks about it."""

    tokenizer: Any
    key: str
    """Changes when anything changes that determines the tokens."""
    stops: Sequence[int]
    """Ids that end an answer."""


class Pretrained(NamedTuple):
    """A model folder without its weights."""

    folder: pathlib.Path
    hf_config: dict[str, Any]
    family: ModuleType
    decoder_config: DecoderConfig
    make_decoder: Callable[[nnx.Rngs], Decoder]
    model: Model
    config: ModelConfig


def open_tokenizer(config: ModelConfig, chat_template: str | None = None) -> OpenTokenizer:
    """The tokenizer of a model, and the ids that end its answers.

    Raises:
        ConfigError: no tokenizer there, or no stop token at all, so that the model could never learn to stop.
    """
    tokenizer = hf.load_tokenizer(config.tokenizer or config.path, chat_template)
    folder = hf.model_folder(config.path, weights=False)
    configured = [hf.load_generation_config(folder), hf.load_hf_config(folder)]
    stops = chat.stop_ids(tokenizer, [each.get("eos_token_id") for each in configured])
    if not stops:
        raise ConfigError(
            f"{config.tokenizer or config.path}: no stop token: the tokenizer has no eos_token, and neither "
            "generation_config.json nor the chat template names one; set eos_token in tokenizer_config.json"
        )
    return OpenTokenizer(tokenizer, hf.tokenizer_key(tokenizer), stops)


def open_model(config: ModelConfig, tokenizer: OpenTokenizer) -> Pretrained:
    """The structure of a model; its weight files are compared with it, but not read.

    Raises:
        ConfigError: config.json is not understood, the tokenizer has more ids than the model, or weights are missing,
            extra, misshapen or truncated.
    """
    folder = hf.model_folder(config.path, weights=config.weights == "pretrained")
    hf_config = hf.load_hf_config(folder)
    family = family_of(hf_config)
    decoder_config = family.decoder_config(hf_config)
    hf.check_vocabulary(tokenizer.tokenizer, decoder_config)
    hf.export_dtype(hf_config, config.export_dtype)  # not to be found out after the training
    compute_dtype = config.compute_dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")

    def make_decoder(rngs: nnx.Rngs) -> Decoder:
        return Decoder(
            decoder_config,
            compute_dtype=compute_dtype,
            param_dtype=config.param_dtype,
            remat=config.remat,
            rngs=rngs,
        )

    model = abstract_model(make_decoder)
    if config.weights == "pretrained":
        check_weights(folder, family, model.params)
    return Pretrained(folder, hf_config, family, decoder_config, make_decoder, model, config)


def load_params(pretrained: Pretrained, mesh: Mesh, *, seed: int) -> Any:
    """The parameters to begin with, each shard on its device: read from the folder, or drawn from `seed`."""
    if pretrained.config.weights == "random":
        return random_params(pretrained.make_decoder, mesh, seed=seed)
    abstract = pretrained.model.params
    return read_params(pretrained.folder, pretrained.family, abstract=abstract, shardings=shardings(mesh, abstract))


def export_model(pretrained: Pretrained, tokenizer: OpenTokenizer, params: Any, folder: pathlib.Path) -> None:
    """Writes the model as a folder that transformers opens."""
    hf.export(
        folder,
        params,
        family=pretrained.family,
        hf_config=pretrained.hf_config,
        tokenizer=tokenizer.tokenizer,
        stop_ids=tokenizer.stops,
        dtype=pretrained.config.export_dtype,
        source_folder=pretrained.folder,
    )
