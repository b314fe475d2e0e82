"""A model folder, opened: tokenizer and stop tokens, the structure of the model, and its parameters on a mesh.

In: the `model` section. Out: an `OpenTokenizer`, a `Pretrained` (the model without its weights), and parameters.
Commands that only look at data (`preview`) stop at the tokenizer; no weight is read before it is needed.
"""

import math
import os
import pathlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxsft.chat.stops import answer_end, stop_ids
from jaxsft.config import ConfigError, LoraConfig, ModelConfig
from jaxsft.folders import hf, special_tokens, tokenizer_files
from jaxsft.folders.config_words import describe_older_words, with_older_words
from jaxsft.folders.export import export_dtype, export_folder
from jaxsft.folders.gguf.model import is_gguf
from jaxsft.folders.gguf.model import notes as gguf_notes
from jaxsft.folders.gguf.tokenizer import check_gguf_tokens
from jaxsft.folders.merge import merged_tensors
from jaxsft.folders.peft.read import Adapter, read_adapter
from jaxsft.folders.peft.source import Source, find_source
from jaxsft.folders.peft.write import AdaptedModel, export_adapter
from jaxsft.folders.weights.check import check_weights
from jaxsft.folders.weights.layout import path_text
from jaxsft.folders.weights.load import load_params as read_weights
from jaxsft.folders.weights.stored import Stored
from jaxsft.mesh import shardings
from jaxsft.model.abstract import Model, abstract_model, random_weights
from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.decoder import Decoder
from jaxsft.model.families.known import decoder_config as read_decoder_config
from jaxsft.model.families.known import family as family_of
from jaxsft.model.freezing import train_only
from jaxsft.model.lora import add_adapters, not_of_files, of_files, with_magnitudes
from jaxsft.model.quantized_maps import describe_quantized, quantize_maps


class OpenTokenizer(NamedTuple):
    """A tokenizer with all that the data layer asks about it."""

    tokenizer: Any
    key: str
    """Changes when anything changes that determines the tokens."""
    stops: Sequence[int]
    """Ids that end an answer."""
    added_tokens: tuple[str, ...] = ()
    """Tokens that the chat template needs and the tokenizer lacked; the model's rows for them are new."""
    notes: tuple[str, ...] = ()
    """Sentences for the user."""


class Pretrained(NamedTuple):
    """A model folder without its weights."""

    source: Source
    """Where it lies."""
    hf_config: dict[str, Any]
    """As it is exported: what the folder says, with a vocabulary that has grown and embeddings that were untied."""
    stored: Stored | None
    """Where the weights lie; None where they are random."""
    family: ModuleType
    decoder_config: DecoderConfig
    make_decoder: Callable[[nnx.Rngs], Decoder]
    model: Model
    config: ModelConfig
    lora: LoraConfig | None
    """Of the adapters that it has: as the config asks, or as the adapter in its folder is."""
    stored_vocab_size: int
    """Rows of the vocabulary in the folder; `decoder_config` has more where added tokens ask for them."""
    is_untied: bool = False
    """The folder has one table as embedding and output projection, of which the model has two."""
    new_ids: tuple[int, ...] = ()
    """Ids of added tokens, whose rows begin as the mean of the folder's."""
    adapter: Adapter | None = None
    """What a PEFT folder holds; its base model is all else here."""
    notes: tuple[str, ...] = ()
    """Sentences for the user."""

    @property
    def folder(self) -> pathlib.Path:
        """Of the model, or of the base of an adapter; or the GGUF file."""
        return self.source.folder

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Ids whose rows are not those of the folder: of added tokens, and those that an adapter brings along."""
        brought = self.source.adapter.token_ids if self.source.adapter is not None else ()
        return tuple(sorted({*self.new_ids, *brought, *range(self.stored_vocab_size, self.decoder_config.vocab_size)}))


def open_tokenizer(config: ModelConfig, chat_template: str | None = None, *, set_eos: bool = False) -> OpenTokenizer:
    """The tokenizer of a model, and the ids that end its answers.

    Args:
        config: where it lies.
        chat_template: a template of ours, or a file, in place of its own; what it needs is added to the tokenizer.
        set_eos: make the token that ends an answer the eos token.

    Raises:
        ConfigError: no tokenizer there, one that is not that of a GGUF model, no stop token at all, so that the model
            could never learn to stop, or none that could be the eos token.
    """
    source = find_source(config.path, weights=False)
    # Read before the tokenizer: where config.json is wrong, transformers would say that the tokenizer is.
    configured = [hf.load_generation_config(source.folder), hf.load_hf_config(source.folder)]
    if source.adapter is not None:
        configured.insert(0, hf.load_generation_config(source.adapter.folder))
    place = _tokenizer_folder(config, source)
    tokenizer, own_template = hf.load_tokenizer_and_own_template(str(place), chat_template)
    added: tuple[str, ...] = ()
    notes: list[str] = []
    if chat_template is not None:
        added = special_tokens.add_missing_tokens(tokenizer, chat_template, own_template=own_template)
        notes = special_tokens.describe_added(tokenizer, chat_template, added)
        notes += tokenizer_files.describe_sentencepiece(place, added)
    if place != source.folder and is_gguf(str(source.folder)):
        check_gguf_tokens(tokenizer, str(source.folder), where=str(place), added=added)
    stops = stop_ids(tokenizer, [each.get("eos_token_id") for each in configured])
    if not stops:
        raise ConfigError(
            f"{config.tokenizer or config.path}: no stop token: the tokenizer has no eos_token, and neither "
            "generation_config.json nor the chat template names one; set eos_token in tokenizer_config.json"
        )
    stop = answer_end(tokenizer, stops)
    if set_eos:
        note = special_tokens.set_eos(tokenizer, stop)
        notes += [note] if note else []
        # The tokenizer's own comes first, and no stop token is lost.
        stops = list(dict.fromkeys([tokenizer.eos_token_id, *stops]))
    notes += special_tokens.describe_stop(tokenizer, stop)
    notes += tokenizer_files.describe_known_words(place)
    return OpenTokenizer(tokenizer, hf.tokenizer_key(tokenizer), stops, added, tuple(notes))


def _tokenizer_folder(config: ModelConfig, source: Source) -> pathlib.Path:
    return source.tokenizer if config.tokenizer is None else hf.model_folder(config.tokenizer, weights=False)


def open_model(
    config: ModelConfig, tokenizer: OpenTokenizer, lora: LoraConfig | None = None, only: Sequence[str] | None = None
) -> Pretrained:
    """The structure of a model; its weight files are compared with it, but not read, except for a few rows.

    Where the tokenizer has got new tokens, they take the rows that the model has to spare; if these do not suffice, its
    vocabulary grows by the rows that are missing. It then has exactly the tokenizer's rows, from which some programs
    take their number; what fills the tables up in memory is in no file.

    Args:
        config: where it lies, and the dtypes of its numbers.
        tokenizer: opened before.
        lora: the adapters that it gets, which are then all that is trained.
        only: the weights that are trained (`train.only`); None: all of them.

    Raises:
        ConfigError: config.json is not understood, the tokenizer has more ids than the model, or weights are missing,
            extra, misshapen or truncated, or `lora` or `quantize` does not fit it.
    """
    source = find_source(config.path, weights=config.weights == "pretrained")
    _check_adapter_keys(config, source, lora, only)
    stored, hf_config = hf.open_source(source.folder)
    family = family_of(hf_config)
    decoder_config = read_decoder_config(hf_config)
    needed = {*tokenizer.stops, *special_tokens.template_ids(tokenizer.tokenizer)}
    brought = source.adapter.token_ids if source.adapter is not None else ()
    with_rows = {id: tokenizer.tokenizer.convert_ids_to_tokens(id) for id in brought}
    if unknown := [id for id, token in with_rows.items() if token is None and id >= decoder_config.vocab_size]:
        raise ConfigError(
            f"{config.path}: trainable_token_indices: {unknown[0]} is beyond the base's {decoder_config.vocab_size} "
            "rows, and no token of the tokenizer"
        )
    known = [*tokenizer.added_tokens, *with_rows.values()]
    notes = hf.check_vocabulary(tokenizer.tokenizer, decoder_config, needed=needed, added=known)
    stored_vocab_size = decoder_config.vocab_size
    new_ids = tuple(int(tokenizer.tokenizer.convert_tokens_to_ids(token)) for token in tokenizer.added_tokens)
    untied = _untied(config, decoder_config)
    largest = max((*new_ids, *brought), default=0)
    grown = {"vocab_size": largest + 1} if largest >= stored_vocab_size else {}
    if changes := untied | grown:
        hf_config = hf_config | changes
        decoder_config = read_decoder_config(hf_config)
    if config.export_dtype or config.weights == "random":
        export_dtype(hf_config, config.export_dtype)  # to fail now, and not after the training
    adapter = None
    if source.adapter is not None:
        base = nnx.merge(*abstract_model(decoder_maker(config, decoder_config, family)))
        tied = decoder_config.tie_embeddings or bool(untied)
        adapter = read_adapter(source.adapter, base, family, vocab_size=stored_vocab_size, base=stored, tied=tied)
        lora = adapter.lora
        notes += adapter.notes
    make_decoder = decoder_maker(config, decoder_config, family, lora, only)
    model = abstract_model(make_decoder)
    _check_new_rows(model, [*new_ids, *brought])
    notes += decoder_config.notes
    if config.quantize != "none":
        notes += describe_quantized(nnx.merge(*model), config.quantize)
    notes += describe_older_words(hf_config, *with_older_words(hf_config))
    if config.weights == "pretrained":
        notes += gguf_notes(source.folder) if is_gguf(str(source.folder)) else ()
        weights = of_files(model.weights)
        check_weights(stored, family, weights, vocab_size=stored_vocab_size, untied=bool(untied))
        vocab_size = decoder_config.vocab_size
        notes += _vocabulary_notes(stored, family, weights, tokenizer, stored_vocab_size, vocab_size, new_ids)
    return Pretrained(
        source,
        hf_config,
        stored if config.weights == "pretrained" else None,
        family,
        decoder_config,
        make_decoder,
        model,
        config,
        lora,
        stored_vocab_size=stored_vocab_size,
        is_untied=bool(untied),
        new_ids=new_ids,
        adapter=adapter,
        notes=tuple(notes),
    )


def _check_adapter_keys(
    config: ModelConfig, source: Source, lora: LoraConfig | None, only: Sequence[str] | None
) -> None:
    """Refuses what goes with no adapter folder.

    Raises:
        ConfigError: names the keys.
    """
    if source.adapter is None:
        return
    folder = source.adapter.folder
    if lora is not None:
        raise ConfigError(
            f"lora: given, but model.path {folder} is an adapter that is trained on as it is, its dropout included; "
            "leave lora out, or merge the adapter and begin a new one on the merged model"
        )
    if only is not None:
        raise ConfigError(f"train.only: given, but model.path {folder} is an adapter, which is all that is trained")
    if config.weights == "random":
        raise ConfigError(f"model.weights: random, but model.path {folder} is an adapter, which fits its base alone")


def _check_new_rows(model: Model, ids: Sequence[int]) -> None:
    """Refuses adapters on a table some of whose rows are not those of the base: PEFT has no file for both.

    Raises:
        ConfigError: names the table.
    """
    tables = [name for name in ("embed_tokens", "lm_head") if name in model.weights]
    if ids and (adapted := [name for name in tables if "adapter" in model.weights[name]]):
        raise ConfigError(
            f"lora.targets: {', '.join(adapted)} cannot have an adapter beside tokens that data.chat_template adds; "
            "leave it out, or begin with a model that has the tokens (an export of a run of all weights)"
        )


def decoder_maker(
    config: ModelConfig,
    decoder_config: DecoderConfig,
    family: ModuleType,
    lora: LoraConfig | None = None,
    only: Sequence[str] | None = None,
) -> Callable[[nnx.Rngs], Decoder]:
    """Makes the model with random weights, in the dtypes and with the memory savings that the config asks for.

    With adapters, or with the names of some weights in `only`, these alone are trained.

    Raises:
        ConfigError: when it is called: `lora` or `only` does not fit the model, or it was to be quantised though all of
            its weights are trained.
    """

    def make_decoder(rngs: nnx.Rngs) -> Decoder:
        decoder = Decoder(
            decoder_config,
            compute_dtype=compute_dtype(config),
            param_dtype=config.param_dtype,
            remat=config.remat,
            unroll=config.unroll,
            # cuDNN must be told of the rows first (`Setup.attention`).
            attention="auto" if config.attention == "cudnn" else config.attention,
            rngs=rngs,
        )
        if lora is not None:
            # Drawn after all weights, which are the same with and without adapters.
            add_adapters(decoder, lora, family, key=rngs.params())
        if only is not None:
            train_only(decoder, only, family.WEIGHTS)
        if config.quantize != "none":
            quantize_maps(decoder, config.quantize)
        return decoder

    return make_decoder


def compute_dtype(config: ModelConfig) -> str:
    """Dtype of activations and matmuls: as given, or what suits the device."""
    return config.compute_dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")


def _untied(config: ModelConfig, decoder_config: DecoderConfig) -> dict[str, Any]:
    """What `model.tie_embeddings` changes in config.json.

    Raises:
        ConfigError: it asks to tie two tables.
    """
    if config.tie_embeddings and not decoder_config.tie_embeddings:
        raise ConfigError(
            "model.tie_embeddings: true, but the model has an output projection of its own, which would be lost; "
            "leave it out"
        )
    is_untied = config.tie_embeddings is False and decoder_config.tie_embeddings
    return {"tie_word_embeddings": False} if is_untied else {}


def check_positions(decoder_config: DecoderConfig, seq_len: int) -> None:
    """Refuses rows that are longer than a model's table of positions; models without one only lose quality.

    Raises:
        ConfigError: with both numbers.
    """
    if decoder_config.learned_positions and seq_len > decoder_config.max_position:
        raise ConfigError(
            f"data.seq_len: {seq_len}, but the model has a table of {decoder_config.max_position} positions and knows "
            "no others"
        )


def _vocabulary_notes(
    stored: Stored,
    family: ModuleType,
    weights: nnx.State,
    tokenizer: OpenTokenizer,
    stored_vocab_size: int,
    vocab_size: int,
    new_ids: Sequence[int],
) -> list[str]:
    """What the user should know of the rows that the chat template's tokens have in the model."""
    notes = []
    if vocab_size > stored_vocab_size:
        notes.append(
            f"the model's vocabulary grows from {stored_vocab_size} to {vocab_size} rows, one for each of the "
            "tokenizer's tokens; the new rows begin as the mean of the old ones"
        )
    elif new_ids:
        notes.append(
            f"the {len(new_ids)} added tokens take rows that the model had to spare, beginning as the mean of all rows"
        )
    old_ids = [*tokenizer.stops, *special_tokens.template_ids(tokenizer.tokenizer)]
    untrained = special_tokens.untrained_tokens(
        stored,
        family,
        weights,
        tokenizer=tokenizer.tokenizer,
        ids=[id for id in old_ids if id not in new_ids],
    )
    return notes + special_tokens.describe_untrained(tokenizer.tokenizer, untrained)


def load_weights(pretrained: Pretrained, mesh: Mesh, *, seed: int) -> Any:
    """All weights to begin with, each shard on its device: read from the folder, or drawn from `seed`.

    Adapters are drawn, and add nothing yet. `pretrained.model.split` parts what is trained from what is not.

    Raises:
        ConfigError: what is stored is not the model, or the sizes in config.json are beyond the devices' memory.
    """
    check_memory(pretrained.model.weights, mesh)
    weights = _loaded(pretrained, mesh, seed=seed)
    return weights if pretrained.adapter is not None else _finished(weights, pretrained, mesh)


def load_frozen(pretrained: Pretrained, mesh: Mesh, *, seed: int) -> Any:
    """The weights that are not trained, as in `load_weights`; no others are read or drawn. Nothing where all are.

    Raises:
        ConfigError: as `load_weights`.
    """
    model = pretrained.model
    if not jax.tree.leaves(model.frozen):
        return model.frozen
    check_memory(model.frozen, mesh)
    return _loaded(pretrained, mesh, seed=seed, only=lambda state: model.split(state)[1])


def _loaded(pretrained: Pretrained, mesh: Mesh, *, seed: int, only: Callable[[Any], Any] = lambda state: state) -> Any:
    """A part of all weights, without what follows from others."""
    if pretrained.stored is None:
        return random_weights(pretrained.make_decoder, mesh, seed=seed, only=only)
    abstract = of_files(pretrained.model.weights)
    weights = read_weights(
        pretrained.stored,
        pretrained.family,
        abstract=abstract,
        shardings=shardings(mesh, abstract),
        vocab_size=pretrained.decoder_config.vocab_size,
        stored_vocab_size=pretrained.stored_vocab_size,
        mean_rows=pretrained.new_ids,
        untied=pretrained.is_untied,
        only=only,
    )
    if pretrained.lora is None:
        return weights
    others = random_weights(pretrained.make_decoder, mesh, seed=seed, only=lambda state: only(not_of_files(state)))
    weights = nnx.merge_state(weights, others)
    return weights if pretrained.adapter is None else _with_adapter(weights, pretrained.adapter)


def _with_adapter(weights: Any, adapter: Adapter) -> Any:
    """With the values and rows that an adapter's folder holds."""

    def filled(path: tuple[Any, ...], variable: nnx.Variable) -> nnx.Variable:
        value, name = variable.get_value(), path_text(path)
        if (ours := adapter.values.get(name)) is not None:
            return variable.replace(_placed(ours.astype(value.dtype), value.sharding))
        if (rows := adapter.rows.get(name)) is not None:
            return variable.replace(_with_rows(value, jnp.array(rows.ids), rows.values))
        return variable

    return jax.tree_util.tree_map_with_path(filled, weights, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _placed(values: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def _with_rows(table: jax.Array, ids: jax.Array, rows: Any) -> jax.Array:
    put = jax.jit(lambda table: table.at[ids].set(rows.astype(table.dtype)), out_shardings=table.sharding)
    return put(table)


def _finished(weights: Any, pretrained: Pretrained, mesh: Mesh) -> Any:
    """With what follows from the weights: the magnitudes of DoRA."""
    if pretrained.lora is None or not pretrained.lora.dora:
        return weights
    with jax.set_mesh(mesh):
        of_weights = shardings(mesh, pretrained.model.weights)
        return jax.jit(with_magnitudes, in_shardings=(of_weights,), out_shardings=of_weights, donate_argnums=0)(weights)


def check_memory(params: Any, mesh: Mesh) -> None:
    """Refuses parameters that cannot lie on the devices, however they are cut: nobody's model, or another machine's.

    Raises:
        ConfigError: with the bytes that they need and those that there are.
    """
    needed = sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(params))
    device = mesh.local_mesh.devices.flat[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None and device.platform == "cpu":  # whose devices share the host's memory
        hosts = len({each.process_index for each in mesh.devices.flat})
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * hosts
    else:
        there = limit * mesh.size if limit is not None else needed
    if needed > there:
        raise ConfigError(
            f"the model's config.json: its sizes make parameters of {needed:,} bytes, but all devices have {there:,}; "
            "check its sizes, or train on more devices"
        )


def adapted_model(pretrained: Pretrained, weights: Any) -> AdaptedModel:
    """All that an adapter's folder is made of, of a model with adapters whose base lies in files."""
    assert pretrained.lora is not None and pretrained.stored is not None
    return AdaptedModel(
        nnx.merge(*pretrained.model),
        pretrained.family,
        pretrained.lora,
        weights,
        vocab_size=pretrained.decoder_config.vocab_size,
        stored=pretrained.stored,
        base=pretrained.source.name,
        revision=pretrained.source.revision,
        token_ids=pretrained.token_ids,
        is_tied=pretrained.decoder_config.tie_embeddings or pretrained.is_untied,
    )


def is_exported_as_adapter(pretrained: Pretrained, *, merge: bool = False) -> bool:
    """Whether an export is an adapter beside its base, and not a whole model."""
    return pretrained.lora is not None and pretrained.stored is not None and not merge


def export_model(
    pretrained: Pretrained,
    tokenizer: OpenTokenizer,
    params: Any,
    folder: pathlib.Path,
    *,
    merge: bool = False,
    card: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Writes the model as a folder that transformers opens, or its adapters as one that PEFT opens.

    Args:
        pretrained: the model.
        tokenizer: of it.
        params: all its weights, trained or not.
        folder: where to.
        merge: write a model with its adapters in its weights; so are those of a model that began with random weights,
            which lie nowhere else.
        card: text of README.md, on process 0; None: it has none.
        say: is told what of an earlier export was not ours.
    """
    sources = [pretrained.folder]
    sources += [pretrained.source.adapter.folder] if pretrained.source.adapter is not None else []
    tokenizer_folder = _tokenizer_folder(pretrained.config, pretrained.source)
    if is_exported_as_adapter(pretrained, merge=merge):
        export_adapter(
            folder,
            adapted_model(pretrained, params),
            hf_config=pretrained.hf_config,
            tokenizer=tokenizer.tokenizer,
            stop_ids=tokenizer.stops,
            source_folders=sources,
            tokenizer_folder=tokenizer_folder,
            card=card,
            say=say,
        )
        return
    merge_with, kept = None, params
    if pretrained.lora is not None:
        _check_mergeable(pretrained)
        kept = of_files(params)
        merge_with = merged_tensors(
            params,
            pretrained.family,
            stored=pretrained.stored,
            vocab_size=pretrained.decoder_config.vocab_size,
            stored_vocab_size=pretrained.stored_vocab_size,
            token_ids=pretrained.token_ids,
            untied=pretrained.is_untied,
        )
    export_folder(
        folder,
        kept,
        family=pretrained.family,
        hf_config=pretrained.hf_config,
        vocab_size=pretrained.decoder_config.vocab_size,
        tokenizer=tokenizer.tokenizer,
        stop_ids=tokenizer.stops,
        dtype=pretrained.config.export_dtype,
        stored=pretrained.stored,
        source_folder=pretrained.folder,
        tokenizer_folder=tokenizer_folder,
        merge=merge_with,
        has_new_rows=bool(pretrained.token_ids),
        card=card,
        say=say,
    )


def _check_mergeable(pretrained: Pretrained) -> None:
    """Refuses adapters that cannot be in the weights.

    Raises:
        ConfigError: that of an embedding would be in the output projection too, which is the same table.
    """
    if pretrained.decoder_config.tie_embeddings and "adapter" in pretrained.model.weights["embed_tokens"]:
        raise ConfigError(
            "the adapter of embed_tokens cannot be merged: the table is the output projection as well, which has none; "
            "model.tie_embeddings: false parts them"
        )
