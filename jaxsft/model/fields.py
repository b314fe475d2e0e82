"""The fields of a model's `config.json`, as its family reads them: each one read, or known to say nothing, or refused.

In: a `config.json` as it was read. Out: `Fields`, of which a family makes a `DecoderConfig`; or one `ConfigError` with
all that this program does not compute.

transformers' config classes fill in what a file leaves out and bring older spellings to one form (`rope_parameters`,
`layer_types`), so a family reads the values that transformers would compute with.
"""

import copy
import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Any

from jaxsft.config import ConfigError
from jaxsft.model.architecture import LayerKind, Mixer
from jaxsft.model.bounds import problems_of
from jaxsft.model.layers import ACTIVATIONS, NormKind
from jaxsft.model.rope import Rope

HARMLESS = frozenset([
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "cache_implementation", "chunk_size_feed_forward",
    "classifier_dropout", "custom_pipelines", "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype",
    "early_stopping", "eos_token_id", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "id2label",
    "is_decoder", "is_encoder_decoder", "is_llama_config", "keys_to_ignore", "label2id", "length_penalty",
    "max_length", "max_sequence_length", "min_length", "model_max_length", "model_type", "name_or_path",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions", "output_hidden_states",
    "output_router_logits", "pad_token_id", "prefix", "pretraining_tp", "problem_type", "repetition_penalty",
    "return_dict", "router_aux_loss_coef", "sep_token_id", "seq_length", "summary_activation",
    "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj", "task_specific_params",
    "temperature", "tokenizer_class", "top_k", "top_p", "torch_dtype", "transformers.js_config",
    "transformers_version", "typical_p", "unk_token_id", "unsloth_fixed", "unsloth_version", "use_cache",
    "use_flash_attn",
])  # fmt: skip
"""Fields that say nothing about the model's mathematics."""

LAYER_TYPES = frozenset(["full_attention", "sliding_attention"])

DROPOUTS = frozenset(
    [
        *("attention_dropout", "attn_pdrop", "embd_pdrop", "embedding_dropout", "hidden_dropout", "resid_pdrop"),
        "residual_dropout",
    ]
)
"""Fields that ask for dropout in training. We train without, and say so."""


class Fields:
    """A `config.json`, canonical; `hf("key")` reads a field, and `finish` refuses what no one has read."""

    def __init__(self, raw: dict[str, Any]):
        """Brings a config.json of a known model_type to its canonical form.

        Raises:
            ConfigError: transformers refuses it, it lacks a size, or a number cannot be meant.
        """
        import transformers

        self.model_type = raw["model_type"]
        config_class = transformers.CONFIG_MAPPING[self.model_type]
        needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        keys = {config_class.attribute_map.get(key, key): key for key in needed}
        given = {key: raw.get(key, raw.get(alias)) for key, alias in keys.items()}
        problems = [f"{key}: missing" for key, size in given.items() if size is None] + problems_of(raw)
        if problems:
            raise refusal(problems)
        level = logging.getLogger("transformers").level
        logging.getLogger("transformers").setLevel(logging.ERROR)  # its hints are for those who write configs
        try:
            config = config_class.from_dict(copy.deepcopy(raw))
        except Exception as error:  # it raises whatever its validators raise
            raise refusal([f"transformers refuses it: {' '.join(str(error).split())[:1000]}"]) from None
        finally:
            logging.getLogger("transformers").setLevel(level)
        self._values = {key: value for key, value in config.to_dict().items() if key not in HARMLESS}
        self._declared = {field.name for field in dataclasses.fields(config_class)}
        self._unread = set(self._values)
        self._problems: list[str] = []
        notes = [
            f"config.json asks for dropout in training ({key} {value}); this trainer has none"
            for key, value in sorted(self._values.items())
            if key in DROPOUTS and value
        ]
        if raw.get("output_router_logits"):
            asked = raw.get("router_aux_loss_coef", getattr(config, "router_aux_loss_coef", None))
            notes.append(f"config.json asks for a router loss in training: set optim.router_balance to {asked}")
        self.notes = tuple(notes)
        self._unread -= DROPOUTS

    def __call__(self, key: str, default: Any = None) -> Any:
        """The value of a field, `default` where the model's config class has no such field."""
        self._unread.discard(key)
        return self._values.get(key, default)

    def own(self, key: str) -> Any:
        """The value of a field if the model's own config class has it. If not, transformers computes nothing with it:
        the field stays unread, and is refused where it asks for something."""
        return self(key) if key in self._declared else None

    def number(self, key: str) -> Any:
        """The value of a field that is a number and must be there."""
        value = self(key)
        if value is None:
            self.problem(f"{key}: missing")
            return 1
        return value

    def problem(self, text: str) -> None:
        """Notes what cannot be computed; `finish` reports all of it together."""
        self._problems.append(text)

    def only(self, key: str, *values: Any) -> None:
        """Reads a field that must have one of these values, or be absent, null, false, 0 or empty."""
        value = self(key)
        if value and value not in values:
            computed = ", ".join(repr(each) for each in values) or "nothing"
            self.problem(f"{key}: {value!r}; only {computed} is computed")

    def activation(self, key: str = "hidden_act") -> str:
        """The name of an activation that `layers.ACTIVATIONS` has."""
        name = self(key)
        if name not in ACTIVATIONS:
            self.problem(f"{key}: {name!r}; computed are {', '.join(ACTIVATIONS)}")
            return "silu"
        return name

    def sizes(self) -> dict[str, Any]:
        """What almost every family spells alike: arguments of `DecoderConfig`, but for the layers."""
        num_heads, hidden_size = self("num_attention_heads"), self("hidden_size")
        num_kv_heads = self("num_key_value_heads") or num_heads
        head_dim = self("head_dim") or hidden_size // num_heads
        if num_heads % num_kv_heads:
            self.problem(f"num_key_value_heads: {num_kv_heads} does not divide num_attention_heads {num_heads}")
        return dict(
            vocab_size=self("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=self.number("intermediate_size"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_position=self.number("max_position_embeddings"),
            tie_embeddings=bool(self("tie_word_embeddings")),
            initializer_range=self.number("initializer_range"),
            notes=self.notes,
        )

    def rms_norm(self, **kind: Any) -> NormKind:
        """The RMS norm with the config's eps."""
        return NormKind(self.number("rms_norm_eps"), **kind)

    def rope(
        self,
        layer_type: str | None = None,
        *,
        interleaved: bool = False,
        partial: bool = False,
        fixed_alpha: bool = False,
    ) -> Rope:
        """The rope of all layers, or that of one layer type where `rope_parameters` has one for each.

        Args:
            layer_type: which.
            interleaved: pairs are neighbours.
            partial: the family reads `partial_rotary_factor` of an unscaled rope, too; all read that of a scaled one.
            fixed_alpha: the family stretches theta once and for all where rope_type "dynamic" has an `alpha`.
        """
        fields = self._rope_fields(layer_type)
        kind: Any = fields("rope_type") or "default"
        fields("type")
        dim = self._rotated_dims(fields, kind, partial=partial)
        theta = float(fields("rope_theta"))
        if fixed_alpha and kind == "dynamic" and fields("alpha"):
            # It has no effect what else Hunyuan's files say there.
            for key in ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
                fields(key)
            fields.finish()
            return Rope(dim, theta * fields.number("alpha") ** (dim / (dim - 2)), interleaved=interleaved)
        if kind not in list(ROPE_SCALINGS):
            known = ", ".join(ROPE_SCALINGS)
            self.problem(f"{fields.where}.rope_type: {kind!r}; computed are {known}")
            return Rope(dim, 1e4)
        values = ROPE_SCALINGS[kind](self, fields, dim)
        if kind in ("yarn", "longrope", "llama3"):
            # Older configs have this field outside of the dict of rope parameters.
            beside = self("original_max_position_embeddings")
            if beside not in (None, values["original_max_position"]):
                original = values["original_max_position"]
                self.problem(f"original_max_position_embeddings: {beside}, but {fields.where} has {original}")
        fields.finish()
        return Rope(dim, theta, interleaved=interleaved, scaling=kind, **values)

    def _rope_fields(self, layer_type: str | None) -> "_RopeFields":
        """The dict of rope parameters of all layers, or of one layer type where each has its own."""
        parameters, where = dict(self("rope_parameters")), "rope_parameters"
        # transformers reads `truncate` from the outer dict only, even where each layer type has a dict of its own.
        truncate = parameters.get("truncate", True)
        if layer_type is not None and layer_type in parameters:
            for key in parameters.keys() - LAYER_TYPES - {"truncate"}:
                self.problem(f"{where}.{key}: {parameters[key]!r} stands beside layer types, where it has no effect")
            parameters, where = dict(parameters[layer_type]), f"{where}.{layer_type}"
        return _RopeFields(self, where, parameters, truncate=truncate)

    def _rotated_dims(self, fields: "_RopeFields", kind: Any, *, partial: bool) -> int:
        """How many dims of a head are rotated: an even number."""
        head_dim = self("head_dim") or self("hidden_size") // self("num_attention_heads")
        share = fields("partial_rotary_factor", 1.0)
        share = 1.0 if share is None else share
        where = fields.where
        if share != 1.0 and kind == "default" and not partial:
            self.problem(f"{where}.partial_rotary_factor: {share}; model_type {self.model_type} rotates whole heads")
            share = 1.0
        dim = int(head_dim * share)
        if dim % 2 or dim < 2:
            self.problem(f"{where}: {dim} of {head_dim} dims of a head would be rotated; their number must be even")
        return dim

    def layers(
        self, *, ropes: dict[str, int | None] | None = None, mixers: dict[str, Mixer] | None = None
    ) -> tuple[LayerKind, ...]:
        """The layers of a config with `layer_types`, or with none: full attention, or all with `sliding_window`.

        Args:
            ropes: index of the rope of each layer type, where not all have the first.
            mixers: layer types without attention, and what mixes tokens there.
        """
        window = self.own("sliding_window")
        usual = ["sliding_attention" if window else "full_attention"] * self("num_hidden_layers")
        types = self.own("layer_types") or usual
        if (given := self("layer_types")) and "layer_types" not in self._declared and list(given) != usual:
            self.problem(
                f"layer_types: transformers passes over it for model_type {self.model_type} and has "
                f"{usual[0]} in every layer; remove it"
            )
        if len(types) != self("num_hidden_layers"):
            self.problem(f"layer_types: {len(types)} entries, but num_hidden_layers is {self('num_hidden_layers')}")
        without_attention, known_types = mixers or {}, LAYER_TYPES | (mixers or {}).keys()
        if unknown := sorted(set(types) - known_types):
            known = ", ".join(sorted(known_types))
            self.problem(f"layer_types: {', '.join(map(repr, unknown))}; computed are {known}")
        if "sliding_attention" in types and not window:
            self.problem("sliding_window: missing, but layer_types has sliding_attention")
        of_type = ropes or {}
        return tuple(
            LayerKind(rope=None, mixer=without_attention[each])
            if each in without_attention
            else LayerKind(window=window if each == "sliding_attention" else None, rope=of_type.get(each, 0))
            for each in types
        )

    def finish(self) -> None:
        """Refuses the problems noted, and every field that was not read and asks for something.

        Raises:
            ConfigError: all of them, each with its key and value.
        """
        # Absent, null, false, 0, empty: a field that is switched off asks for nothing.
        self._problems += [
            f"{key}: {self._values[key]!r} is not known for model_type {self.model_type} (remove it if it does not "
            "change the model)"
            for key in sorted(self._unread)
            if self._values[key] and not key.startswith("_")
        ]
        if self._problems:
            raise refusal(self._problems)


class _RopeFields:
    """One dict of rope parameters, read like `Fields`."""

    def __init__(self, hf: Fields, where: str, values: dict[str, Any], *, truncate: bool):
        self._hf, self._values, self._unread = hf, values, set(values)
        self.where = where
        """Path of the dict in config.json, for messages."""
        self.truncate = truncate

    def __call__(self, key: str, default: Any = None) -> Any:
        self._unread.discard(key)
        return self._values.get(key, default)

    def number(self, key: str) -> float:
        value = self(key)
        if not isinstance(value, int | float):
            self._hf.problem(f"{self.where}.{key}: {value!r}; rope_type {self._values['rope_type']!r} needs a number")
            return 1.0
        return float(value)

    def finish(self) -> None:
        for key in sorted(self._unread):
            if self._values[key]:
                self._hf.problem(f"{self.where}.{key}: {self._values[key]!r} is not known")


def _unscaled(hf: Fields, fields: _RopeFields, dim: int) -> dict[str, Any]:
    fields("original_max_position_embeddings"), fields("factor")
    return {}


def _linear(hf: Fields, fields: _RopeFields, dim: int) -> dict[str, Any]:
    fields("original_max_position_embeddings")
    return dict(factor=fields.number("factor"))


def _dynamic(hf: Fields, fields: _RopeFields, dim: int) -> dict[str, Any]:
    return _linear(hf, fields, dim) | dict(original_max_position=hf("max_position_embeddings"))


def _llama3(hf: Fields, fields: _RopeFields, dim: int) -> dict[str, Any]:
    numbers = {key: fields.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor")}
    return numbers | dict(original_max_position=int(fields.number("original_max_position_embeddings")))


def _yarn(hf: Fields, fields: _RopeFields, dim: int) -> dict[str, Any]:
    original = int(fields.number("original_max_position_embeddings"))
    factor = fields("factor") or hf("max_position_embeddings") / original
    fields("truncate")
    return dict(
        factor=float(factor),
        original_max_position=original,
        attention_factor=_yarn_attention_factor(fields, factor),
        beta_fast=float(fields("beta_fast") or 32),
        beta_slow=float(fields("beta_slow") or 1),
        truncate=fields.truncate,
    )


def _yarn_attention_factor(fields: _RopeFields, factor: float) -> float:
    """As given, else 0.1 ln(factor) + 1 (Peng et al., 2023, eq. 22), or the ratio of two of them (DeepSeek)."""
    given, mscale, mscale_all_dim = (fields(key) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is not None:
        return float(given)

    def of(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    return of(mscale) / of(mscale_all_dim) if mscale and mscale_all_dim else of(1.0)


def _longrope(hf: Fields, fields: _RopeFields, dim: int) -> dict[str, Any]:
    original = int(fields.number("original_max_position_embeddings"))
    factor = fields("factor") or hf("max_position_embeddings") / original
    attention_factor = fields("attention_factor")
    if attention_factor is None:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    factors = {f"{name}s": tuple(map(float, fields(name) or ())) for name in ("short_factor", "long_factor")}
    for name, numbers in factors.items():
        if len(numbers) != dim // 2:
            hf.problem(f"{fields.where}.{name[:-1]}: {len(numbers)} numbers, but {dim // 2} pairs are rotated")
    return dict(original_max_position=original, attention_factor=float(attention_factor), **factors)


ROPE_SCALINGS: dict[str, Callable[[Fields, _RopeFields, int], dict[str, Any]]] = {
    "default": _unscaled,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}
"""`rope_type` to what reads its parameters: arguments of `Rope`, for so many rotated dims."""


def refusal(problems: list[str]) -> ConfigError:
    """One error of all problems with a config.json."""
    return ConfigError("the model's config.json:\n" + "\n".join(f"  {problem}" for problem in problems))
