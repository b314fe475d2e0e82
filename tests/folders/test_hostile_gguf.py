"""GGUF files from strangers: counts, lengths, types and places that cannot be, and any damage at all, are one error."""

import os
import random
import resource
import signal
import struct
import time

import numpy as np
import pytest

from jaxsft.config import ConfigError
from jaxsft.folders.gguf.file import read_gguf
from jaxsft.folders.gguf.model import open_gguf
from jaxsft.folders.gguf.tokenizer import load_gguf_tokenizer
from jaxsft.folders.weights.check import check_weights
from jaxsft.model.abstract import abstract_model
from jaxsft.model.decoder import Decoder
from jaxsft.model.families.known import decoder_config, family
from jaxsft.rows.strict import DataError

pytest.importorskip("gguf")
pytest.importorskip("transformers")

SECONDS = 10
MEMORY_KB = 400_000
D, F, V, HEADS, KV = 16, 24, 8, 4, 2
TOKENS = ["a", "b", "c", "ab", "Ġ", "d", "<s>", "</s>"]
METADATA = {
    "general.architecture": ("s", "llama"),
    "llama.block_count": ("I", 2),
    "llama.embedding_length": ("I", D),
    "llama.feed_forward_length": ("I", F),
    "llama.attention.head_count": ("I", HEADS),
    "llama.attention.head_count_kv": ("I", KV),
    "llama.attention.layer_norm_rms_epsilon": ("f", 1e-5),
    "llama.context_length": ("I", 64),
    "llama.rope.freq_base": ("f", 10000.0),
    "tokenizer.ggml.model": ("s", "gpt2"),
    "tokenizer.ggml.pre": ("s", "gpt-2"),
    "tokenizer.ggml.tokens": ("as", TOKENS),
    "tokenizer.ggml.token_type": ("ai", [1] * 6 + [3, 3]),
    "tokenizer.ggml.merges": ("as", ["a b"]),
    "tokenizer.ggml.bos_token_id": ("I", 6),
    "tokenizer.ggml.eos_token_id": ("I", 7),
}
LAYER = {
    **{"attn_norm": (D,), "ffn_norm": (D,), "attn_q": (D, D), "attn_k": (D // 2, D), "attn_v": (D // 2, D)},
    **{"attn_output": (D, D), "ffn_gate": (F, D), "ffn_up": (F, D), "ffn_down": (D, F)},
}
SHAPES = {"token_embd.weight": (V, D), "output_norm.weight": (D,), "output.weight": (V, D)} | {
    f"blk.{layer}.{name}.weight": shape for layer in range(2) for name, shape in LAYER.items()
}
TYPES = {"B": 0, "b": 1, "H": 2, "h": 3, "I": 4, "i": 5, "f": 6, "?": 7, "Q": 10, "q": 11, "d": 12}


def text(value):
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def value_bytes(kind, value):
    if kind == "raw":
        return value
    if kind == "s":
        return struct.pack("<I", 8) + text(value)
    if kind == "as":
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
    if kind[0] == "a":
        return struct.pack(f"<IIQ{len(value)}{kind[1]}", 9, TYPES[kind[1]], len(value), *value)
    return struct.pack(f"<I{kind}", TYPES[kind], value)


def gguf_bytes(metadata=None, shapes=None, *, num_tensors=None, num_keys=None, entries=None):
    """A model; what is given replaces what is right, and None takes a key out."""
    keys = {key: each for key, each in (METADATA | (metadata or {})).items() if each is not None}
    shapes = SHAPES | (shapes or {})
    out = b"GGUF" + struct.pack("<IQQ", 3, len(shapes) if num_tensors is None else num_tensors, num_keys or len(keys))
    out += b"".join(text(key) + value_bytes(*each) for key, each in keys.items())
    data, offset = b"", 0
    for name, shape in shapes.items():
        own, dims = (entries or {}).get(name, offset), tuple(reversed(shape))
        out += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, 0, own)
        size = int(np.prod(shape)) * 4 if max(shape) < 2**20 else 0
        data += np.full(size // 4, 0.5, np.float32).tobytes()
        offset += size
    return out + bytes(-len(out) % 32) + data


def head_length():
    return len(gguf_bytes()) - sum(int(np.prod(shape)) * 4 for shape in SHAPES.values())


@pytest.fixture(autouse=True)
def in_bounded_time():
    def late(*_):
        raise TimeoutError("not refused in time")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def open_whole(path):
    """All that a run does with a model before it reads the weights, and then a part of each."""
    stored, hf_config = open_gguf(path)
    config = decoder_config(hf_config)
    options = dict(compute_dtype="float32", param_dtype="float32", remat="none", unroll=False)
    state = abstract_model(lambda rngs: Decoder(config, **options, rngs=rngs)).params
    check_weights(stored, family(hf_config), state, vocab_size=config.vocab_size)
    for tensor in stored.tensors.values():
        tensor.read(slice(0, 1), slice(0, tensor.shape[-1]))
    return load_gguf_tokenizer(path)("ab a")["input_ids"]


def refusal(tmp_path, content):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError) as caught:
        open_whole(path)
    assert time.monotonic() - began < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY_KB
    assert len(str(caught.value)) < 20_000
    return str(caught.value)


def test_the_whole_file_is_read(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes())
    assert open_whole(path) == [3, 4, 0]


@pytest.mark.parametrize("count", [2**60, 2**64 - 1, 2**32, 10**6])
def test_counts_that_no_file_holds_are_refused(tmp_path, count):
    assert "model.gguf" in refusal(tmp_path, gguf_bytes(num_tensors=count))
    assert "model.gguf" in refusal(tmp_path, gguf_bytes(num_keys=count))


ARRAY = struct.Struct("<IIQ")
VALUES = {
    "text of 2^60 bytes": struct.pack("<IQ", 8, 2**60),
    "2^60 texts": ARRAY.pack(9, 8, 2**60),
    "2^60 bytes": ARRAY.pack(9, 0, 2**60),
    "2^64 - 1 doubles": ARRAY.pack(9, 12, 2**64 - 1),
    "arrays in arrays": ARRAY.pack(9, 9, 1) * 1000,
    "of no type": struct.pack("<I", 13),
    "array of no type": ARRAY.pack(9, 77, 3),
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES.keys())
def test_a_value_of_the_metadata_that_cannot_be_is_refused(tmp_path, value):
    assert "corrupt" in refusal(tmp_path, gguf_bytes({"general.name": ("raw", value)}))


@pytest.mark.parametrize("kind", [0, 8, 12])
def test_an_array_is_no_longer_than_any_vocabulary_even_where_a_sparse_file_holds_it(tmp_path, kind):
    content = gguf_bytes({"zzz.array": ("raw", ARRAY.pack(9, kind, 2**33))})
    path = tmp_path / "sparse.gguf"
    at = content.index(b"zzz.array") + len("zzz.array") + ARRAY.size
    path.write_bytes(content[:at])
    with path.open("r+b") as file:
        file.truncate(2**40)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError, match="an array of 8,589,934,592 values"):
        read_gguf(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY_KB


def test_a_header_of_a_sparse_file_is_bounded_whatever_it_is_made_of(tmp_path):
    path = tmp_path / "sparse.gguf"
    path.write_bytes(gguf_bytes({"zzz.text": ("raw", struct.pack("<IQ", 8, 2**38))}))
    with path.open("r+b") as file:
        file.truncate(2**40)
    with pytest.raises(ConfigError, match="its header has more than"):
        read_gguf(path)


@pytest.mark.parametrize(
    "alignment", [("I", 0), ("I", 3), ("I", 2**31), ("i", -32), ("s", "32"), ("f", 32.0), ("?", 1)]
)
def test_an_alignment_that_is_none_is_refused(tmp_path, alignment):
    assert "alignment" in refusal(tmp_path, gguf_bytes({"general.alignment": alignment}))


@pytest.mark.parametrize("shape", [(2**62, 2**62), (2**63, 2), (2**40, 16), (0, 16), (2**47, 2**47, 2**47)])
def test_a_tensor_larger_than_its_file_is_refused(tmp_path, shape):
    assert "output.weight" in refusal(tmp_path, gguf_bytes(shapes={"output.weight": shape}))


@pytest.mark.parametrize("offset", [2**60, 2**64 - 1, 2**40, 10**6])
def test_a_tensor_that_lies_beyond_its_file_is_refused(tmp_path, offset):
    assert "output.weight" in refusal(tmp_path, gguf_bytes(entries={"output.weight": offset}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("block_count", value) for value in [("Q", 2**60), ("I", 10**9), ("I", 0), ("i", -1), ("s", "2"), ("?", 1)]),
        *(("attention.head_count", value) for value in [("I", 0), ("Q", 2**60), ("f", 4.0), ("ai", [4, 5])]),
        *(("attention.head_count_kv", value) for value in [("I", 0), ("I", 3), ("Q", 2**60)]),
        *(("embedding_length", value) for value in [("Q", 2**60), ("I", 0), ("I", 17)]),
        *(("attention.key_length", value) for value in [("I", 0), ("Q", 2**60), ("I", 5)]),
        *(("rope.dimension_count", value) for value in [("Q", 2**60), ("I", 2**31)]),
        *(("rope.freq_base", value) for value in [("f", float("nan")), ("d", 1e308), ("f", 0.0), ("f", float("inf"))]),
        *(("attention.layer_norm_rms_epsilon", value) for value in [("f", float("nan")), ("f", -1.0), ("s", "x")]),
        *(("context_length", value) for value in [("I", 0), ("Q", 2**60)]),
        *(("feed_forward_length", value) for value in [("I", 0), ("Q", 2**60)]),
        *(("expert_count", value) for value in [("Q", 2**60), ("s", "8")]),
    ],
)
def test_a_size_that_is_not_the_model_s_is_refused_at_once(tmp_path, key, value):
    message = refusal(tmp_path, gguf_bytes({f"llama.{key}": value}))
    assert "model" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("tokens", value) for value in [("I", 7), ("ai", [1] * 8), ("s", "a"), ("as", []), None]),
        *(("token_type", value) for value in [("I", 7), ("ai", [1] * 7), ("as", ["1"] * 8), ("af", [1.0] * 8)]),
        *(("merges", value) for value in [("I", 7), ("ai", [1]), ("as", ["a"]), ("as", ["x y"])]),
        *(("pre", value) for value in [("I", 7), ("as", ["gpt-2"]), ("s", "none")]),
        *(("model", value) for value in [("I", 7), ("as", ["gpt2"])]),
    ],
)
def test_a_vocabulary_that_is_none_is_refused(tmp_path, key, value):
    assert "model.gguf" in refusal(tmp_path, gguf_bytes({f"tokenizer.ggml.{key}": value}))


def test_a_template_that_is_no_text_is_refused(tmp_path):
    assert "chat_template" in refusal(tmp_path, gguf_bytes({"tokenizer.chat_template": ("I", 7)}))


@pytest.mark.parametrize("name", ["model.gguf", "model-00001-of-00002.gguf"])
def test_a_pipe_and_a_device_are_refused_by_what_they_are(tmp_path, name):
    other = tmp_path / name.replace("00001-of", "00002-of")
    os.mkfifo(tmp_path / name)
    if other != tmp_path / name:
        other.write_bytes(gguf_bytes())
    with pytest.raises(ConfigError, match="a named pipe, expected a regular file"):
        read_gguf(tmp_path / name)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="a device, expected a regular file"):
        read_gguf(tmp_path / name)


@pytest.mark.parametrize(
    "name", ["model-00001-of-99999.gguf", "model-00002-of-00001.gguf", "model-00000-of-00000.gguf"]
)
def test_a_part_of_no_model_is_refused_in_one_short_error(tmp_path, name):
    (tmp_path / name).write_bytes(gguf_bytes())
    with pytest.raises(ConfigError) as caught:
        read_gguf(tmp_path / name)
    assert name in str(caught.value) and len(str(caught.value)) < 1000


def test_a_damaged_file_is_the_right_model_or_one_error(tmp_path):
    rng = random.Random(0)
    whole = gguf_bytes()
    head, right = head_length(), 0
    path = tmp_path / "model.gguf"
    for number in range(400):
        content = bytearray(whole)
        at, count = rng.randrange(head), rng.choice([1, 2, 8, 100])
        match number % 6:
            case 0:
                content[at] ^= 1 << rng.randrange(8)
            case 1:
                content[at : at + 8] = struct.pack("<Q", rng.choice([0, 2**64 - 1, 2**60, 2**32, 2**20]))
            case 2:
                del content[at : at + count]
            case 3:
                del content[rng.randrange(len(content)) :]
            case 4:
                content[rng.randrange(head, len(content))] ^= 1 << rng.randrange(8)
            case 5:
                content[at : at + 4] = struct.pack("<I", rng.randrange(16))
        path.write_bytes(content)
        began = time.monotonic()
        try:
            open_whole(path)
            right += 1
        except (ConfigError, DataError) as error:
            assert len(str(error)) < 20_000
        assert time.monotonic() - began < SECONDS, number
    assert 60 < right < 400
