"""Tiny models of every family, in transformers and here: what the tests of families compare."""

import dataclasses
import functools
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsft.answers.generate import Generator
from jaxsft.folders import hf
from jaxsft.folders.export import export_folder
from jaxsft.folders.weights import load as weights
from jaxsft.folders.weights.stored import open_folder
from jaxsft.mesh import shardings
from jaxsft.model.abstract import Model, abstract_model
from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.decoder import Decoder
from jaxsft.model.families.known import decoder_config, family
from jaxsft.training.loss import next_token_loss

TINY = pathlib.Path(__file__).parent / "tiny"
"""The config.json's of tiny models; a file is a variant of a family."""

LENGTHS = [[90], [9, 37, 30]]
"""Segments of the rows that are compared: one by itself, and several that are packed, with padding behind."""
ROW_LENGTH = 90
NUM_ROWS = 8
"""A mesh cuts them; those beyond LENGTHS are padding."""
PROMPTS = (11, 3)
NEW_TOKENS = 32


class Rows(NamedTuple):
    """Packed rows, leaves [B, T]."""

    tokens: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    loss_weights: np.ndarray


def make_rows(vocab_size: int) -> tuple[Rows, list[tuple[int, slice]]]:
    """The rows that are compared, and where their segments lie, shortest first."""
    rng = np.random.default_rng(0)
    shape = (NUM_ROWS, ROW_LENGTH)
    tokens = rng.integers(0, vocab_size, shape, dtype=np.int32)
    weights = (rng.random(shape) * (rng.random(shape) < 0.6)).astype(np.float32)
    segment_ids, positions, targets = (np.zeros(shape, np.int32) for _ in range(3))
    places = []
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for number, length in enumerate(lengths, start=1):
            at = slice(start, start + length)
            segment_ids[row, at], positions[row, at] = number, np.arange(length)
            targets[row, start : start + length - 1] = tokens[row, start + 1 : start + length]
            weights[row, start + length - 1] = 0.0
            places.append((row, at))
            start += length
    weights[segment_ids == 0] = 0.0
    places.sort(key=lambda place: place[1].stop - place[1].start)
    return Rows(tokens, segment_ids, positions, targets, weights), places


class Theirs(NamedTuple):
    """What transformers computes."""

    logits: np.ndarray
    """[B, T, V], zeros in padding."""
    loss_sum: float
    gradients: pathlib.Path
    """A folder that has them in place of weights, by the names and in the layouts of files."""
    answers: list[list[int]]


def make_theirs(config: dict[str, Any], folder: pathlib.Path) -> None:
    """Writes a random model of transformers, in which nothing is trivial."""
    import torch
    import transformers

    torch.manual_seed(0)
    hf_config = transformers.AutoConfig.for_model(**json.loads(json.dumps(config)))
    model = transformers.AutoModelForCausalLM.from_config(hf_config)
    std = hf_config.initializer_range
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or "norm" in name:  # norms and biases, which would be ones and zeros
            torch.nn.init.normal_(parameter, 0.8, 0.3)
        elif parameter.std() == 0 or not parameter.isfinite().all():  # some experts are left as they are allocated
            torch.nn.init.normal_(parameter, 0.0, std)
    for name, buffer in model.named_buffers():
        if "correction_bias" in name:
            torch.nn.init.normal_(buffer, 0.0, 0.2)
    model.save_pretrained(folder)
    # As on the hub: older spellings and all, which transformers would have rewritten.
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def load_theirs(folder: pathlib.Path) -> Any:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    # torch gives no gradient to the embedding of a pad token, which real text does not have.
    model.get_input_embeddings().padding_idx = None
    return model.eval()


def run_theirs(folder: pathlib.Path, scratch: pathlib.Path) -> Theirs:
    """Logits, loss and gradients of the rows' segments one by one, and greedy answers of each prompt by itself."""
    import torch

    model = load_theirs(folder)
    vocab_size = model.config.vocab_size
    rows, places = make_rows(vocab_size)
    logits = np.zeros((*rows.tokens.shape, vocab_size), np.float32)
    loss_sum = torch.zeros((), dtype=torch.float64)
    for row, at in places:
        out = model(torch.tensor(rows.tokens[row, at], dtype=torch.long)[None]).logits[0]
        logits[row, at] = out.detach().numpy()
        targets = torch.tensor(rows.targets[row, at], dtype=torch.long)
        nll = torch.nn.functional.cross_entropy(out, targets, reduction="none")
        loss_sum = loss_sum + (torch.tensor(rows.loss_weights[row, at]) * nll).sum().double()
    loss_sum.backward()
    model.generation_config.eos_token_id = None
    answers = []
    # transformers' cache keeps keys as they were turned when they came, also where they would be turned otherwise now;
    # and dynamic angles remember the longest example that a model has seen.
    depends_on_length = any(rope.depends_on_length for rope in decoder_config(hf.load_hf_config(folder)).ropes)
    for prompt in prompts(vocab_size):
        ids = torch.tensor(prompt, dtype=torch.long)[None]
        answering = load_theirs(folder) if depends_on_length else model
        out = answering.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            use_cache=not depends_on_length,
            eos_token_id=None,
            pad_token_id=0,
        )
        answers.append(out[0, len(prompt) :].tolist())
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    model.save_pretrained(scratch)
    return Theirs(logits, float(loss_sum.detach()), scratch, answers)


def prompts(vocab_size: int) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, vocab_size, length).tolist() for length in PROMPTS]


@dataclasses.dataclass(frozen=True)
class Ours:
    """A model of this project that has the weights of a folder, on a mesh."""

    folder: pathlib.Path
    config: DecoderConfig
    model: Model
    params: Any
    """All weights, those that nobody trains among them."""
    stored: Any
    mesh: Any

    @classmethod
    def load(cls, folder: pathlib.Path, mesh: Any) -> "Ours":
        hf_config = hf.load_hf_config(folder)
        config = decoder_config(hf_config)
        # On a mesh, layers are computed again in the backward pass; on one device they are not, which compiles faster.
        remat = "none" if mesh.size == 1 else "full"
        make = functools.partial(Decoder, config, compute_dtype="float32", param_dtype="float32", remat=remat)
        model = abstract_model(lambda rngs: make(rngs=rngs))
        ours = cls(folder, config, model, None, open_folder(folder), mesh)
        return dataclasses.replace(ours, params=ours.read(folder))

    def read(self, folder: pathlib.Path) -> Any:
        """The tensors of a folder, as parameters."""
        return weights.load_params(
            open_folder(folder),
            family(hf.load_hf_config(self.folder)),
            abstract=self.model.weights,
            shardings=shardings(self.mesh, self.model.weights),
            vocab_size=self.config.vocab_size,
        )

    def run(self, rows: Rows) -> tuple[np.ndarray, float, Any]:
        """Logits, loss sum, and the gradients of the parameters."""
        params, frozen = self.model.split(self.params)

        def loss(params: Any, frozen: Any, rows: Rows) -> tuple[jax.Array, jax.Array]:
            model = nnx.merge(self.model.graphdef, params, frozen)
            hidden = model(rows.tokens, rows.segment_ids, rows.positions).hidden
            table, logits = model.unembedding, self.config.logits
            sums = next_token_loss(hidden, table, rows.targets, rows.loss_weights, logits=logits)
            return sums.loss_sum, model.logits(hidden)

        with jax.set_mesh(self.mesh):
            gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), out_shardings=None)
            (loss_sum, logits), gradients = gradient(params, frozen, jax.tree.map(jnp.asarray, rows))
        return np.asarray(logits)[..., : self.config.vocab_size], float(loss_sum), gradients

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """float32 [B, T, V] of tokens [B, T], each row one example."""
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        weights = np.ones(tokens.shape, np.float32)
        return self.run(Rows(tokens, np.ones_like(tokens), positions, tokens, weights))[0]

    def answers(self) -> list[list[int]]:
        generator = Generator(self.model, self.mesh, stop_ids=[])
        return generator.answers(self.params, prompts(self.config.vocab_size), max_new_tokens=NEW_TOKENS)

    def export(self, params: Any, folder: pathlib.Path) -> None:
        hf_config = hf.load_hf_config(self.folder)
        export_folder(
            folder,
            params,
            family=family(hf_config),
            hf_config=hf_config,
            vocab_size=self.config.vocab_size,
            tokenizer=NoTokenizer(),
            stop_ids=[2, 5],
            stored=self.stored,
        )


class NoTokenizer:
    """Weights are what these tests look at; `tests/folders/test_hf.py` exports a real tokenizer."""

    bos_token_id = pad_token_id = None

    def save_pretrained(self, folder: pathlib.Path) -> None:
        pass


LOOSER = {}
"""Variant -> how near logits are, relative to the largest, where 1e-5 is not reached; and why."""


def compare(name: str, folder: pathlib.Path, theirs: Theirs, mesh: Any, scratch: pathlib.Path) -> dict[str, float]:
    """Holds a tiny model of ours, on a mesh, against transformers; returns the largest differences.

    Logits, loss and gradients on rows that are packed and not, greedy answers with the cache, the bytes that are
    exported, and the logits of transformers with them.
    """
    import torch

    ours = Ours.load(folder, mesh)
    rows, places = make_rows(ours.config.vocab_size)
    logits, loss_sum, gradients = ours.run(rows)
    is_token = rows.segment_ids > 0
    differences = {
        "logits": np.abs(logits - theirs.logits)[is_token].max() / np.abs(theirs.logits).max(),
        "logits, absolute": np.abs(logits - theirs.logits)[is_token].max(),
        "loss": abs(loss_sum - theirs.loss_sum) / abs(theirs.loss_sum),
    }
    # A gradient that is zero by its mathematics (of biases of keys) is noise: measured by the others.
    expected = ours.model.split(ours.read(theirs.gradients))[0]
    norms = jax.tree.map(lambda each: np.linalg.norm(np.asarray(each)), expected)
    floor = 1e-4 * max(jax.tree.leaves(norms))
    by_leaf = jax.tree.map(
        lambda ours, theirs, norm: float(np.linalg.norm(np.asarray(ours) - np.asarray(theirs)) / max(norm, floor)),
        gradients,
        expected,
        norms,
    )
    leaves = jax.tree_util.tree_flatten_with_path(by_leaf)[0]
    differences |= {f"gradient of {jax.tree_util.keystr(path)}": value for path, value in leaves}
    print(name, {key: f"{value:.1e}" for key, value in differences.items() if "gradient" not in key})
    worst = max((key for key in differences if "gradient" in key), key=differences.__getitem__)
    print(f"  {worst}: {differences[worst]:.1e}")
    assert differences["logits, absolute"] < 1e-4
    assert differences["logits"] < LOOSER.get(name, (1e-5,))[0]
    assert all(value < 1e-3 for key, value in differences.items() if "logits" not in key), differences

    assert ours.answers() == theirs.answers

    ours.export(ours.params, scratch / "ours")
    exported, imported = ((each / "model.safetensors").read_bytes() for each in (scratch / "ours", folder))
    assert exported == imported
    with torch.no_grad():
        row, at = places[-1]
        tokens = torch.tensor(rows.tokens[row, at], dtype=torch.long)[None]
        again = load_theirs(scratch / "ours")(tokens).logits[0].numpy()
    np.testing.assert_array_equal(again, theirs.logits[row, at])
    return differences


@pytest.fixture(scope="session")
def compare_family(tmp_path_factory):
    """`compare_family(variant, mesh)` is `compare` on the tiny model of that name."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")

    def check(name: str, mesh: Any) -> dict[str, float]:
        folder = tmp_path_factory.mktemp(name)
        make_theirs(json.loads((TINY / f"{name}.json").read_text()), folder / "theirs")
        theirs = run_theirs(folder / "theirs", folder / "gradients")
        return compare(name, folder / "theirs", theirs, mesh, folder)

    return check


@pytest.fixture(scope="session")
def load_decoder():
    """`load_decoder(folder, mesh)`: a model of ours with the weights of a folder."""
    return Ours.load
