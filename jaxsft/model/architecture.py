"""What a decoder computes, as data: one record that families fill in and `decoder.py` reads.

In: what a family read from a `config.json`. Out: a `DecoderConfig`. Nothing here is computed, and nothing knows Hugging
Face's names.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax

from jaxsft.model.experts import Routing
from jaxsft.model.layers import Logits, NormKind
from jaxsft.model.rope import Rope

PADDED_VOCAB_MULTIPLE = 128
"""Tables of the vocabulary are filled up to this: any usual mesh cuts them, and matmuls like it."""


Mixer = Literal["self_attn", "conv"]
"""What mixes the tokens of a layer, by the name of its part of `decoder.Layers`."""
MIXERS: tuple[Mixer, ...] = ("self_attn", "conv")


class LayerKind(NamedTuple):
    """In what one layer differs from another; models repeat a few of them in a fixed order."""

    window: int | None = None
    """A query attends to so many positions up to its own; None: to all of them."""
    rope: int | None = 0
    """Index into `DecoderConfig.ropes`; None: the layer is not told positions."""
    mixer: Mixer = "self_attn"


def period_of(kinds: Sequence[LayerKind]) -> int:
    """The smallest number of layers after which their kinds repeat."""
    return next(n for n in range(1, len(kinds) + 1) if all(kinds[i] == kinds[i % n] for i in range(len(kinds))))


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The mathematics of a decoder; made from a `config.json` by its family."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Width of the MLP; in a mixture, of one expert."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerKind, ...]
    """One for each layer."""
    ropes: tuple[Rope, ...]
    max_position: int
    """Positions that the model was made for; a row may hold more, but what it then computes was never trained."""
    norm: NormKind
    norms: tuple[Literal["pre_attention", "post_attention", "pre_mlp", "post_mlp"], ...]
    """Norms of a layer: of what enters attention and MLP, and of what they add."""
    activation: Callable[..., jax.Array]
    """Of (gate, up) if `gated`, else of (up); a function of a module, as configs are compared."""
    tie_embeddings: bool
    initializer_range: float
    """Standard deviation of random weights."""

    gated: bool = True
    parallel: bool = False
    """Attention and MLP read the same residual stream, and both are added to it."""
    qkv_bias: bool = False
    attention_bias: bool = False
    """On the output projection of attention."""
    mlp_bias: bool = False
    qk_norm: Literal["none", "head", "each head", "all heads"] = "none"
    """Norm of queries and keys: of each head, with one weight for all or with its own; or of all heads at once."""
    qk_norm_kind: NormKind | None = None
    """As `norm`, where left out."""
    qk_norm_after_rope: bool = False
    attention_scale: float | None = None
    """Scores are multiplied by it; left out: 1 / sqrt(head_dim)."""
    attention_soft_cap: float | None = None
    query_scale: Callable[[jax.Array], jax.Array] | None = None
    """Of positions [B, T]: what queries are multiplied by."""
    sinks: bool = False
    """Each head has a score for attending to nothing."""
    learned_positions: bool = False
    """A table of positions is added to the embeddings, and there are no others than its `max_position`."""
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    """What enters the first layer is normed, by the norm that ends the last one."""
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_soft_cap: float | None = None
    conv_width: int = 0
    """Tokens that a short convolution sees: the one at hand and those before it."""
    conv_bias: bool = False
    """On the convolution and on the maps around it."""
    routing: Routing | None = None
    """How tokens find their experts; None: the model is no mixture."""
    notes: tuple[str, ...] = ()
    """Sentences for the user: what config.json asks for and a trainer does without."""

    @property
    def sizes(self) -> dict[str, int]:
        """Letter of a dim to its size."""
        return {
            "l": len(self.layers),
            "v": -(-self.vocab_size // PADDED_VOCAB_MULTIPLE) * PADDED_VOCAB_MULTIPLE,
            "p": self.max_position,
            "d": self.hidden_size,
            "n": self.num_heads,
            "k": self.num_kv_heads,
            "h": self.head_dim,
            "f": self.intermediate_size,
            "m": self.hidden_size,
            "w": self.conv_width,
            "e": self.routing.num_experts if self.routing else 0,
        }

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        """Those that some layer has."""
        return tuple(mixer for mixer in MIXERS if any(kind.mixer == mixer for kind in self.layers))

    @property
    def windows(self) -> list[int | None]:
        """Of the layers with attention."""
        return [kind.window for kind in self.layers if kind.mixer == "self_attn"]

    def layers_of(self, path: str) -> tuple[int, ...]:
        """Numbers of the layers that have a weight of the layers, by its path, or by that of a map of it."""
        part = path.split(".")[1]
        return tuple(number for number, kind in enumerate(self.layers) if part not in MIXERS or kind.mixer == part)

    @property
    def period(self) -> int:
        """The smallest number of layers after which their kinds repeat."""
        return period_of(self.layers)

    @property
    def logits(self) -> Logits:
        """What becomes of hidden . unembedding."""
        return Logits(self.vocab_size, self.logit_scale, self.logit_soft_cap)
