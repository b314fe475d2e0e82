"""Model folders from strangers: whatever lies in one, it is read rightly or refused by one error that names the file.

Nothing is waited for, read without end, or built because a number says so.
"""

import json
import os
import random
import resource
import shutil
import signal
import socket
import struct
import time

import numpy as np
import pytest
import safetensors.numpy

from jaxsft.config import ConfigError, MeshConfig, ModelConfig
from jaxsft.disk.foreign import MOST_DEPTH, is_deep, read_json, read_regular
from jaxsft.folders import hf
from jaxsft.folders.pretrained import export_model, load_weights, open_model, open_tokenizer
from jaxsft.folders.weights.check import check_weights
from jaxsft.folders.weights.stored import INDEX_FILE, SINGLE_FILE, is_plain_name, open_folder
from jaxsft.mesh import make_mesh
from jaxsft.model.abstract import abstract_model
from jaxsft.model.families.known import decoder_config, family
from jaxsft.rows.strict import DataError

DEEP = "[" * 100_000
SECONDS = 10
"""Most that any case may take, on a slow machine."""
MEMORY = 3 * 2**30


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory):
    """Random weights."""
    folder = tmp_path_factory.mktemp("hostile") / "model"
    config = ModelConfig(path=str(tiny_model), weights="random")
    tokenizer = open_tokenizer(config)
    pretrained = open_model(config, tokenizer)
    export_model(pretrained, tokenizer, load_weights(pretrained, make_mesh(MeshConfig(data=8)), seed=0), folder)
    return folder


@pytest.fixture
def folder(model, tmp_path):
    return shutil.copytree(model, tmp_path / "model")


@pytest.fixture(autouse=True)
def in_bounded_time_and_memory():
    """What waits or grows without end fails the test, and does not hang it."""

    def late(*_):
        raise TimeoutError("not refused in time")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def open_both(folder):
    config = ModelConfig(path=str(folder))
    tokenizer = open_tokenizer(config)
    return open_model(config, tokenizer)


def refusal(folder):
    with pytest.raises(ConfigError) as caught:
        open_both(folder)
    return str(caught.value)


def make_fifo(path):
    os.mkfifo(path)


def make_socket(path):
    here = os.getcwd()
    os.chdir(path.parent)  # its name must be short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def make_device(path):
    path.symlink_to("/dev/zero")


def make_loop(path):
    path.symlink_to(path.name)


def make_folder(path):
    path.mkdir()


KINDS = {
    "a named pipe": make_fifo,
    "a socket": make_socket,
    "a device": make_device,
    "a folder": make_folder,
    "Too many levels of symbolic links": make_loop,
}
READ = (SINGLE_FILE, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*READ, "chat_template.jinja"])
def test_what_is_no_regular_file_is_named_and_never_waited_for(folder, name, kind):
    (folder / name).unlink()
    KINDS[kind](folder / name)
    if kind.startswith("Too many") and name in ("tokenizer_config.json", "chat_template.jinja"):
        return  # transformers takes it for missing, and does without
    message = refusal(folder)
    assert str(folder) in message
    assert kind in message and name in message or kind.startswith("Too many")


@pytest.mark.parametrize("kind", ["a named pipe", "a socket", "a device"])
@pytest.mark.parametrize("name", ["added_tokens.json", "special_tokens_map.json", "vocab.txt", "other.safetensors"])
def test_a_pipe_is_refused_under_every_name_that_transformers_may_open(folder, name, kind):
    KINDS[kind](folder / name)
    message = refusal(folder)
    assert f"{folder / name}: {kind}, expected a regular file" in message


@pytest.mark.parametrize("kind", ["a named pipe", "a socket", "a device", "a folder"])
def test_an_index_or_shard_that_is_no_regular_file_is_named(folder, kind):
    tensors = safetensors.numpy.load_file(folder / SINGLE_FILE)
    (folder / SINGLE_FILE).unlink()
    shard = "model-00001-of-00001.safetensors"
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, shard)}))
    KINDS[kind](folder / shard)
    assert f"{folder / shard}: {kind}" in str(open_folder(folder).problems)
    (folder / INDEX_FILE).unlink()
    KINDS[kind](folder / INDEX_FILE)
    with pytest.raises(ConfigError, match=f"{INDEX_FILE}: {kind}"):
        open_folder(folder)


def test_a_template_that_is_given_as_a_pipe_or_a_device_is_refused(folder, tmp_path):
    for kind in ("a named pipe", "a device", "a folder"):
        path = tmp_path / f"{kind.split()[-1]}.jinja"
        KINDS[kind](path)
        with pytest.raises(ConfigError, match=kind):
            hf.read_chat_template(str(path))


JSON = {
    "nested": DEEP,
    "nested and closed": DEEP + "]" * 100_000,
    "nested, not so deep": '{"a": ' + "[" * 500 + "]" * 500 + "}",
    "objects nested": '{"a": ' * 10_000 + "1" + "}" * 10_000,
    "a list": "[]",
    "a number": "7",
    "a long number": "9" * 5000,
    "null": "null",
    "empty": "",
    "NUL": "\0" * 100,
    "half": '{"model_type": "llama", ',
    "Latin-1": b'{"model_type": "\xe4"}',
    "UTF-16": '{"model_type": "llama"}'.encode("utf-16"),
    "large": b" " * (1 << 25) + b"{}",
}


@pytest.mark.parametrize("content", JSON.values(), ids=JSON.keys())
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_json_that_is_none_is_one_error_that_names_the_file(folder, name, content):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert str(folder / name) in refusal(folder)


@pytest.mark.parametrize("content", list(JSON.values())[:-1], ids=list(JSON)[:-1])
def test_an_index_that_is_none_is_one_error_that_names_the_file(folder, content):
    (folder / SINGLE_FILE).unlink()
    (folder / INDEX_FILE).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert str(folder / INDEX_FILE) in refusal(folder)


@pytest.mark.parametrize("content", [DEEP, "[]", "", "\0" * 9, b"\xff\xfe", '{"model": {"type": "BPE", "vocab": 7}}'])
def test_a_tokenizer_that_is_none_is_one_error_that_names_the_folder(folder, content):
    (folder / "tokenizer.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert str(folder) in refusal(folder)


def test_depth_is_counted_in_lists_and_objects_alike():
    value = 1
    for level in range(MOST_DEPTH):
        value = [value] if level % 2 else {"a": value, "b": 7}
    assert not is_deep(value) and is_deep([value])
    assert not is_deep(7) and not is_deep([]) and not is_deep({"a": [[], {}]})


def test_a_file_that_is_larger_than_it_may_be_is_not_read(tmp_path):
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ConfigError, match="1,099,511,627,776 bytes, expected at most 1,000"):
        read_regular(path, most=1000)
    with pytest.raises(ConfigError, match="large.json: 1,099,511,627,776 bytes"):
        read_json(path)


# Headers of safetensors.


def write_header(folder, header, data=b"", *, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    content = struct.pack("<Q", len(text) if length is None else length) + text + data
    (folder / SINGLE_FILE).write_bytes(content)


def one(dtype="F32", shape=(2,), first=0, last=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


HEADERS = {
    "begins before it ends": ({"a": one(first=8, last=0)}, "corrupt header"),
    "negative": ({"a": one(first=-8, last=0)}, "corrupt header"),
    "beyond the file": ({"a": one(shape=[2**20], last=2**22)}, "truncated"),
    "overflow": ({"a": one(shape=[2**40, 2**40], last=8)}, "more numbers than any file holds"),
    "overflow, then nothing": ({"a": one(shape=[2**63, 2**63, 0], last=0)}, "more numbers than any file holds"),
    "wraps to what is there": ({"a": one(shape=[2**32 + 1, 2**32], last=8)}, "more numbers than any file holds"),
    "thousands of sizes": ({"a": one(shape=[10**18] * 100_000)}, "more numbers than any file holds"),
    "no 64 bits": ({"a": one(shape=[10**30])}, "corrupt header"),
    "a size that is no number": ({"a": one(shape=["2"])}, "corrupt header"),
    "a size that is true": ({"a": one(shape=[True, 2])}, "corrupt header"),
    "a float": ({"a": one(shape=[2.0])}, "corrupt header"),
    "a dtype that is a list": ({"a": one(dtype=["F32"])}, "dtype"),
    "a dtype that is not known": ({"a": one(dtype="F33")}, "dtype 'F33'"),
    "a hole": ({"a": one(), "b": one(first=12, last=20)}, "begins at byte"),
    "an overlap": ({"a": one(), "b": one(first=4, last=12)}, "begins at byte"),
    "the same place": ({"a": one(), "b": one()}, "begins at byte"),
    "a name twice": (b'{"a": %s, "a": %s}' % ((json.dumps(one()).encode(),) * 2), "'a' stands twice"),
    "a key twice": (b'{"a": {"dtype": "F32", "dtype": "F16", "shape": [2], "data_offsets": [0, 8]}}', "twice"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "a": one()}, "__metadata__"),
    "metadata of a list": ({"__metadata__": [1], "a": one()}, "corrupt header"),
    "a list": ([one()], "corrupt header"),
    "nested": (DEEP.encode(), "corrupt header"),
    "nested in an entry": (b'{"a": ' + DEEP.encode(), "nested too deeply"),
    "not UTF-8": (b'{"\xff": 1}', "corrupt header"),
    "an entry that is none": ({"a": 7}, "corrupt header"),
    "three offsets": ({"a": one() | {"data_offsets": [0, 4, 8]}}, "corrupt header"),
}


@pytest.mark.parametrize(("header", "expected"), HEADERS.values(), ids=HEADERS.keys())
def test_a_header_that_is_wrong_is_one_short_problem_that_names_the_file(tmp_path, header, expected):
    write_header(tmp_path, header, bytes(8))
    began = time.monotonic()
    (problem,) = open_folder(tmp_path).problems
    assert time.monotonic() - began < SECONDS
    assert str(tmp_path / SINGLE_FILE) in problem and expected in problem and len(problem) < 500


def test_a_header_larger_than_safetensors_have_is_not_read(tmp_path):
    path = tmp_path / SINGLE_FILE
    path.write_bytes(struct.pack("<Q", 3 * 2**30))
    with path.open("r+b") as file:
        file.truncate(4 * 2**30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (problem,) = open_folder(tmp_path).problems
    assert "a header of 3,221,225,472 bytes" in problem and "at most 100,000,000" in problem
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB
    with pytest.raises(safetensors.SafetensorError, match="header too large"):
        safetensors.safe_open(path, "numpy")


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**40, 10**9])
def test_a_header_longer_than_its_file_is_refused(tmp_path, length):
    write_header(tmp_path, b"{}", length=length)
    assert "truncated" in str(open_folder(tmp_path).problems)


OUTSIDE = ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "a\0b", "a\\b", "a\nb", "./model"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_names_files_of_its_own_folder_only(tmp_path, name):
    assert not is_plain_name(name)
    (tmp_path / "model").mkdir()
    safetensors.numpy.save_file({"a": np.zeros(2, np.float32)}, tmp_path / SINGLE_FILE)
    (tmp_path / "model" / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": name}}))
    stored = open_folder(tmp_path / "model")
    assert not stored.tensors and "is not a file of this folder" in str(stored.problems)


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "größe.safetensors", "..model", "a b"])
def test_plain_names_are_plain(name):
    assert is_plain_name(name)


# Sizes.


@pytest.mark.parametrize("weights", ["random", "pretrained"])
@pytest.mark.parametrize(
    ("key", "size"),
    [
        *(("vocab_size", size) for size in (10**15, 2**24, 0, -1, True, "7")),
        *(("num_hidden_layers", size) for size in (10**9, 0)),
        *(("hidden_size", size) for size in (2**18, 10**12)),
        ("intermediate_size", 2**21),
    ],
)
def test_a_size_that_is_not_the_model_s_is_refused_before_anything_of_it_is_built(folder, weights, key, size):
    config = json.loads((folder / "config.json").read_text())
    large = {"num_hidden_layers": 1024, "hidden_size": 2**16} if size in (2**24, 2**21, 2**18) else {}
    (folder / "config.json").write_text(json.dumps(config | large | {key: size}))
    options = ModelConfig(path=str(folder), weights=weights)
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError) as caught:
        load_weights(open_model(options, open_tokenizer(options)), make_mesh(MeshConfig(data=8)), seed=0)
    assert time.monotonic() - began < 3 * SECONDS
    assert "config.json" in str(caught.value)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


@pytest.mark.parametrize("config", [{"model_type": "llama"}, {"model_type": "gemma3", "text_config": {}}])
def test_a_tokenizer_of_its_own_folder_brings_no_number_of_layers_either(model, folder, config):
    part = config.get("text_config", config)
    part["num_hidden_layers"] = 10**9
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="num_hidden_layers: 1000000000; expected a whole number from 1 to 1,024"):
        open_tokenizer(ModelConfig(path=str(model), tokenizer=str(folder)))


# Anything.


def mutated(content, rng):
    """A file with one damage."""
    content = bytearray(content)
    at = rng.randrange(len(content)) if content else 0
    count = rng.choice([1, 2, 8, 100])
    match rng.choice(["flip", "truncate", "delete", "append", "list", "swap", "number", "word"]):
        case "flip":
            for _ in range(count):
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        case "truncate":
            del content[at:]
        case "delete":
            del content[at : at + count]
        case "append":
            content += bytes(rng.randrange(256) for _ in range(count))
        case "list":
            return rng.choice([b"[]", b"", b"7", b"{}", b"\0" * 16, b"[" * 100_000])
        case "swap":
            other = rng.randrange(len(content))
            content[at], content[other] = content[other], content[at]
        case "number":
            digits = [place for place, byte in enumerate(content[:20_000]) if chr(byte).isdigit()]
            if digits:
                place = rng.choice(digits)
                content[place : place + 1] = rng.choice([b"-", b"0", b"9" * 15, b"1e308", b"true", b"[]", b"null"])
        case "word":
            value = rng.choice([0, 2**64 - 1, 2**63, 2**32 - 1, 2**20])
            content[at : at + 8] = struct.pack("<Q", value)
    return bytes(content)


@pytest.mark.parametrize("name", [SINGLE_FILE, "config.json"])
def test_a_damaged_folder_is_the_right_model_or_one_error(model, folder, name):
    rng = random.Random(name)
    whole = (model / name).read_bytes()
    # Mostly of what says how to read the rest.
    head = 8 + int.from_bytes(whole[:8], "little") if name == SINGLE_FILE else len(whole)
    right = 0
    for number in range(150):
        content = mutated(whole[:head], rng) + whole[head:] if number % 4 else mutated(whole, rng)
        (folder / name).write_bytes(content)
        began = time.monotonic()
        try:
            stored, hf_config = hf.open_source(folder)
            config = decoder_config(hf_config)
            check_weights(stored, family(hf_config), shapes(config), vocab_size=config.vocab_size)
            for tensor in stored.tensors.values():
                columns = (tensor.shape or (1,))[-1]
                tensor.read(slice(0, int(np.prod(tensor.shape[:-1]))), slice(0, columns))
            right += 1
        except (ConfigError, DataError) as error:
            assert len(str(error)) < 20_000
        assert time.monotonic() - began < SECONDS, content[:200]
    assert 0 < right < 150


def shapes(config):
    """The state that a model would have."""
    from jaxsft.model.decoder import Decoder

    options = dict(compute_dtype="float32", param_dtype="float32", remat="none", unroll=False)
    return abstract_model(lambda rngs: Decoder(config, **options, rngs=rngs)).params


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_damaged_tokenizer_is_one_that_encodes_or_one_error(model, folder, name):
    rng = random.Random(name)
    whole = (model / name).read_bytes()
    for _ in range(60):
        (folder / name).write_bytes(mutated(whole, rng))
        began = time.monotonic()
        try:
            opened = open_tokenizer(ModelConfig(path=str(folder)))
            assert isinstance(opened.tokenizer("some text")["input_ids"], list)
        except (ConfigError, DataError) as error:
            assert len(str(error)) < 20_000
        assert time.monotonic() - began < 3 * SECONDS
