"""Hugging Face folders: reading by slice, errors that name files and tensors, and what an export holds."""

import copy
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from jaxsft.chat.named_templates import template_text
from jaxsft.config import ConfigError, MeshConfig
from jaxsft.folders import export, hf
from jaxsft.folders.export import MARK_TEXT, TOKENIZER_FILES, ExportError, export_folder, export_problem
from jaxsft.folders.weights import load as weights
from jaxsft.folders.weights.stored import open_folder, read_whole
from jaxsft.mesh import make_mesh, shardings
from jaxsft.model.decoder import Decoder
from jaxsft.model.families.known import decoder_config, family

CONFIG = dict(
    model_type="llama",
    architectures=["LlamaForCausalLM"],
    dtype="float32",
    vocab_size=320,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=False,
    attention_bias=True,
    eos_token_id=1,
)
MODULE = family(CONFIG)


def make(param_dtype="float32", config=CONFIG):
    return Decoder(
        decoder_config(config), compute_dtype="float32", param_dtype=param_dtype, remat="none", rngs=nnx.Rngs(0)
    )


def abstract_state(param_dtype="float32", config=CONFIG):
    return nnx.state(jax.eval_shape(lambda: make(param_dtype, config)))


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def load(folder, *, mesh=None, param_dtype="float32", config=CONFIG):
    abstract = abstract_state(param_dtype, config)
    return weights.load_params(
        open_folder(folder),
        MODULE,
        abstract=abstract,
        shardings=shardings(mesh or one_device(), abstract),
        vocab_size=config["vocab_size"],
    )


@pytest.fixture(scope="module")
def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = ["<pad>", "</s>", "<s>", "<unk>", *(f"w{i}" for i in range(300))]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
    )


@pytest.fixture(scope="module")
def state():
    return jax.jit(lambda: nnx.state(make()))()


def write(folder, state, tokenizer, *, hf_config=CONFIG, stop_ids=(1,), **options):
    export_folder(
        folder,
        state,
        family=MODULE,
        hf_config=hf_config,
        vocab_size=hf_config["vocab_size"],
        tokenizer=tokenizer,
        stop_ids=list(stop_ids),
        **options,
    )
    return folder


@pytest.fixture
def folder(tmp_path, state, tokenizer):
    return write(tmp_path / "model", state, tokenizer)


def assert_equal(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


# Round trips.


def test_what_is_exported_is_imported_again_bit_by_bit(folder, state):
    assert_equal(load(folder), state)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_file_of_any_float_dtype_round_trips_to_the_bytes_that_safetensors_writes(dtype, folder, tmp_path, tokenizer):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors = {name: value.astype(dtype) for name, value in tensors.items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = load(folder)
    embedding = tensors["model.embed_tokens.weight"].astype(np.float32)
    np.testing.assert_array_equal(loaded["embed_tokens"]["weight"][:320], embedding)
    again = write(tmp_path / "again", loaded, tokenizer, dtype=np.dtype(dtype).name)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_parameters_are_cast_to_their_own_dtype(folder, state):
    loaded = load(folder, param_dtype="bfloat16")
    assert all(leaf.dtype == ml_dtypes.bfloat16 for leaf in jax.tree.leaves(loaded))
    assert_equal(loaded, jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), state))


def test_a_mesh_loads_and_exports_the_same_weights(folder, state, tokenizer, tmp_path):
    loaded = load(folder, mesh=make_mesh(MeshConfig(fsdp=4, tensor=2)))
    assert_equal(loaded, state)
    weight = loaded["layers"]["self_attn"]["q_proj"]["weight"]
    assert weight.addressable_shards[0].data.shape == (3, 8, 2, 8)
    again = write(tmp_path / "again", loaded, tokenizer)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_small_shards_are_named_indexed_and_filled_as_transformers_does(folder, state, tokenizer, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    ours = write(tmp_path / "ours", state, tokenizer, max_shard_bytes=30_000)
    assert_equal(load(ours), state)

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=30_000)
    ours_index, theirs_index = (
        json.loads((tmp_path / each / "model.safetensors.index.json").read_text()) for each in ("ours", "theirs")
    )
    assert ours_index == theirs_index
    files = sorted(set(ours_index["weight_map"].values()))
    assert len(files) > 4
    for name in files:
        assert (ours / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()

    reloaded = transformers.AutoModelForCausalLM.from_pretrained(ours, dtype=torch.float32)
    for ours_weight, theirs_weight in zip(reloaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours_weight, theirs_weight)


# What else an export holds.


def test_an_export_carries_template_stop_ids_and_the_source_s_generation_keys(folder, state, tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    source = {"temperature": 0.6, "eos_token_id": 9, "_from_model_config": True}
    (folder / "generation_config.json").write_text(json.dumps(source))
    ours = write(tmp_path / "ours", state, tokenizer, stop_ids=[1, 7], source_folder=folder, dtype="bfloat16")

    expected = {"temperature": 0.6, "eos_token_id": [1, 7]}
    assert hf.load_generation_config(ours) == expected
    config = hf.load_hf_config(ours)
    assert config == {**CONFIG, "dtype": "bfloat16", "torch_dtype": "bfloat16", "eos_token_id": [1, 7]}
    assert transformers.GenerationConfig.from_pretrained(ours).eos_token_id == [1, 7]
    reloaded = hf.load_tokenizer(str(ours))
    assert reloaded.chat_template == tokenizer.chat_template
    assert hf.tokenizer_key(reloaded) == hf.tokenizer_key(tokenizer)


def test_configs_that_say_what_they_said_are_not_touched_and_others_keep_order_and_layout(
    folder, state, tokenizer, tmp_path
):
    config = (
        json.dumps({"zeta": 1.0, **CONFIG, "torch_dtype": "float32", "alpha": "ü"}, indent=3, ensure_ascii=False)
        + "\n\n"
    )
    generation = '{"eos_token_id":[1],"_from_model_config":true , "temperature": 0.60}'
    (folder / "config.json").write_text(config)
    (folder / "generation_config.json").write_text(generation)
    options = dict(hf_config=json.loads(config), stored=open_folder(folder), source_folder=folder)
    same = write(tmp_path / "same", load(folder), tokenizer, **options)
    assert (same / "config.json").read_text() == config
    assert (same / "generation_config.json").read_text() == generation
    assert (same / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()

    other = write(tmp_path / "other", load(folder), tokenizer, stop_ids=[1, 7], dtype="bfloat16", **options)
    expected = config.replace('"eos_token_id": 1', '"eos_token_id": [\n      1,\n      7\n   ]')
    assert (other / "config.json").read_text() == expected.replace('"float32"', '"bfloat16"').rstrip() + "\n"
    assert json.loads((other / "generation_config.json").read_text()) == {"eos_token_id": [1, 7], "temperature": 0.6}


def test_an_export_replaces_an_export_but_nothing_that_somebody_else_made_or_changed(
    folder, state, tokenizer, tmp_path
):
    write(folder, state, tokenizer)
    write(folder, state, tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "all of it was ours"
    assert export_problem(folder) is None

    (folder / "notes").mkdir()
    (folder / "notes" / "mine.md").write_text("what I found out")
    config = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(config.replace(b" ", b"\t", 1))  # of the same size
    said = []
    write(folder, state, tokenizer, say=said.append)
    assert (folder / "config.json").read_bytes() == config and not (folder / "notes").exists()
    beside = tmp_path / "model.before-1"
    kept = sorted(str(path.relative_to(beside)) for path in beside.rglob("*") if path.is_file())
    assert kept == ["config.json", "notes/mine.md"]
    assert len(said) == 1 and "model.before-1" in said[0]

    (folder / "seal.json").unlink()  # as if another program had written it
    write(folder, state, tokenizer, say=said.append)
    assert (tmp_path / "model.before-2" / "model.safetensors").exists()
    shutil.rmtree(beside)
    shutil.rmtree(tmp_path / "model.before-2")

    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="exists and is not an export"):
        write(precious, state, tokenizer)
    with pytest.raises(ConfigError, match="would replace the model"):
        write(folder, state, tokenizer, source_folder=folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "precious"]


def test_an_export_that_fails_leaves_the_earlier_one_and_no_rest(folder, state, tmp_path):
    class Broken:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(ExportError, match="model: could not be written: .*disk full") as error:
        write(folder, state, Broken())
    assert error.value.exit_code == 74
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_two_exports_to_one_place_do_not_disturb_each_other_and_a_killed_one_is_made_good(folder, state, tmp_path):
    class Slow:
        """While its export is being written, another is tried."""

        def __init__(self, tokenizer):
            self.tokenizer = tokenizer
            self.bos_token_id = self.pad_token_id = None

        def save_pretrained(self, folder):
            with pytest.raises(ExportError, match="another export is being written there"):
                write(tmp_path / "model", state, self.tokenizer)
            self.tokenizer.save_pretrained(folder)

    write(folder, state, Slow(hf.load_tokenizer(str(folder))))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

    # Killed after the earlier export was moved aside, and then there is no room for the next try.
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    folder.rename(tmp_path / ".model.jaxsft-replaced")
    (tmp_path / ".model.jaxsft-partial").mkdir()
    (tmp_path / ".model.jaxsft-partial" / "unfinished-export").write_bytes(MARK_TEXT)

    class Broken:
        def save_pretrained(self, folder):
            raise Exception("No space left on device (os error 28)")

    with pytest.raises(ExportError, match="tokenizer could not be written: No space left"):
        write(folder, state, Broken())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

    # Something else of that name is left alone.
    (tmp_path / ".model.jaxsft-partial").mkdir()
    (tmp_path / ".model.jaxsft-partial" / "mine").touch()
    (tmp_path / ".model.jaxsft-partial" / "seal.json").write_text("{}")
    with pytest.raises(ExportError, match="is in the way and no unfinished export"):
        write(folder, state, hf.load_tokenizer(str(folder)))
    assert (tmp_path / ".model.jaxsft-partial" / "mine").exists()


KILLED_AT = ["sealed", "removing the earlier one", "removing an unfinished one"]


@pytest.mark.parametrize("moment", KILLED_AT)
def test_a_kill_at_the_end_of_an_export_keeps_no_later_one_from_being_written(
    folder, state, tokenizer, tmp_path, moment
):
    left = {"removing the earlier one": ".model.jaxsft-replaced"}.get(moment, ".model.jaxsft-partial")
    shutil.copytree(folder, tmp_path / left)
    if moment == "sealed":
        (tmp_path / left / "unfinished-export").write_bytes(MARK_TEXT)
    else:
        (tmp_path / left / "seal.json").rename(tmp_path / left / "removing.json")
        (tmp_path / left / "config.json").unlink()
    write(folder, state, tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and export_problem(folder) is None


def test_an_export_is_known_as_unfinished_until_it_is_sealed(folder, state, tokenizer, tmp_path, monkeypatch):
    def killed(aside, _):
        assert (aside / "unfinished-export").read_bytes() == MARK_TEXT
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "seal_together", killed)
    monkeypatch.setattr(export.shutil, "rmtree", lambda *_, **__: None)  # A kill leaves what is there.
    with pytest.raises(KeyboardInterrupt):
        write(folder, state, tokenizer)
    monkeypatch.undo()
    assert (tmp_path / ".model.jaxsft-partial").exists()
    write(folder, state, tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and export_problem(folder) is None


def damage_truncate(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def damage_remove(folder):
    (folder / "model.safetensors").unlink()


def damage_flip(folder):
    content = bytearray((folder / "tokenizer.json").read_bytes())
    content[100] ^= 1
    (folder / "tokenizer.json").write_bytes(content)


def damage_all(folder):
    for path in folder.iterdir():
        path.unlink()


def damage_seal(folder):
    (folder / "seal.json").write_text("[]")


@pytest.mark.parametrize("damage", [damage_truncate, damage_remove, damage_flip, damage_all, damage_seal])
def test_a_damaged_export_is_known_as_such(folder, state, tokenizer, tmp_path, damage):
    out = write(tmp_path / "out", state, tokenizer)
    assert export_problem(out) is None
    (out / "README.md").write_text("of a user")
    assert export_problem(out) is None
    damage(out)
    assert export_problem(out) is not None


@pytest.mark.parametrize("name", ["qwen3", "llama-3.1", "smollm2", "gemma-2", "phi-3"])
def test_a_tokenizer_goes_out_in_the_files_that_it_came_in(name, material, state, tmp_path):
    source = material / "tokenizers" / name
    before = {path.name: path.read_bytes() for path in source.iterdir() if path.name in TOKENIZER_FILES}
    out = write(tmp_path / "same", state, hf.load_tokenizer(str(source)), tokenizer_folder=source)
    after = {path.name: path.read_bytes() for path in out.iterdir() if path.name in TOKENIZER_FILES}
    if name in ("smollm2", "phi-3"):
        # Of transformers 5 alone; the rest is as it was, in its order.
        config = json.loads(before["tokenizer_config.json"])
        assert config.pop("tokenizer_class") == "TokenizersBackend"
        kept = {key: value for key, value in config.items() if key not in ("backend", "is_local", "local_files_only")}
        again = json.loads(after["tokenizer_config.json"])
        assert again.pop("tokenizer_class") == "PreTrainedTokenizerFast" and list(again.items()) == list(kept.items())
        del before["tokenizer_config.json"], after["tokenizer_config.json"]
    assert after == before

    # Another template goes where transformers looks first; all else stays.
    other = hf.load_tokenizer(str(source), "plain")
    out = write(tmp_path / "other", state, other, tokenizer_folder=source)
    assert hf.load_tokenizer(str(out)).chat_template == template_text("plain")
    assert (out / "tokenizer.json").read_bytes() == before["tokenizer.json"]
    assert (out / "chat_template.jinja").read_bytes() == template_text("plain").encode()
    assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())

    # With a token more, it is under a class that other programs know, and the token is in their list.
    other.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    out = write(tmp_path / "more", state, other, tokenizer_folder=source)
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] != "TokenizersBackend" and "is_local" not in config
    assert "<|new|>" in config["additional_special_tokens"]
    again = hf.load_tokenizer(str(out))
    assert hf.is_same_tokenizer(again, other)


def test_numbers_that_float16_cannot_hold_are_refused(folder, state, tokenizer, tmp_path):
    large = jax.tree.map(lambda leaf: leaf + 1e5, state)
    with pytest.raises(ConfigError, match="has numbers that float16 cannot hold"):
        write(tmp_path / "other", large, tokenizer, dtype="float16")
    assert not (tmp_path / "other").exists()


# Chat templates.


def test_a_chat_template_is_one_of_ours_by_name_or_else_a_file(folder, tmp_path, monkeypatch):
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages[0].content }}")
    assert hf.load_tokenizer(str(folder), str(template)).chat_template == "{{ messages[0].content }}"
    assert hf.load_tokenizer(str(folder), "zephyr").chat_template == template_text("zephyr")
    # The name goes first, wherever the command is run.
    (tmp_path / "zephyr").write_text("another")
    monkeypatch.chdir(tmp_path)
    assert hf.read_chat_template("zephyr") == template_text("zephyr")
    assert hf.read_chat_template("./zephyr") == "another"


@pytest.mark.parametrize(
    ("name", "hint"),
    [("chatlm", "did you mean chatml"), ("Llama-3", "did you mean llama3"), ("a/b.jinja", "plain\\)$")],
)
def test_a_template_that_is_neither_is_refused_with_the_names_of_ours(name, hint, folder):
    with pytest.raises(ConfigError, match=f"{name}: not readable as a chat template.*one of ours .chatml, .*{hint}"):
        hf.load_tokenizer(str(folder), name)


def test_a_template_that_is_no_jinja_or_never_ends_is_refused_before_it_is_used(folder, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}")
    with pytest.raises(ConfigError, match="template.jinja: the chat template is not Jinja: line 1"):
        hf.load_tokenizer(str(folder), str(template))
    template.write_text("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
    with pytest.raises(ConfigError, match="template.jinja: the chat template takes far more time or memory than any"):
        hf.load_tokenizer(str(folder), str(template))


# Bad input.


def test_a_tokenizer_larger_than_the_vocabulary_is_refused_with_both_numbers(tokenizer):
    def check(vocab_size, needed=(), added=()):
        config = decoder_config({**CONFIG, "vocab_size": vocab_size})
        return hf.check_vocabulary(tokenizer, config, needed=needed, added=added)

    assert check(304) == []
    with pytest.raises(ConfigError, match="id 303, but the model's vocab_size is 300"):
        check(300)
    # Tokens that we added ourselves need no row yet.
    assert check(303, added=["w299"]) == []


def test_a_control_token_without_an_embedding_is_noted_unless_answers_need_it(tokenizer):
    """gemma-3-1b's tokenizer has an image token behind its vocabulary."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    config = decoder_config({**CONFIG, "vocab_size": 304})
    (note,) = hf.check_vocabulary(tokenizer, config, needed=[2, 5])
    assert "no embedding for 1 of the tokenizer's tokens" in note and "'<image>' (304)" in note
    with pytest.raises(ConfigError, match="'<image>' has id 304, but the model's vocab_size is 304"):
        hf.check_vocabulary(tokenizer, config, needed=[2, 304])


def test_a_tokenizer_s_key_changes_with_its_tokens_only(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    template = tmp_path / "other.jinja"
    template.write_text("{{ messages }}")
    other = hf.load_tokenizer(str(tmp_path), str(template))
    assert other.chat_template == "{{ messages }}"
    other(["w1", "w2 w3"], padding=True, truncation=True, max_length=4)
    assert hf.tokenizer_key(other) == hf.tokenizer_key(tokenizer) and hf.is_same_tokenizer(other, tokenizer)
    other.add_tokens(["new"])
    assert hf.tokenizer_key(other) != hf.tokenizer_key(tokenizer) and not hf.is_same_tokenizer(other, tokenizer)


def test_folders_that_are_not_there_and_files_that_are_not_readable_are_named(folder, tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        hf.model_folder(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="nobody/nothing: no such folder here, and the hub gave no model"):
        hf.model_folder("nobody/nothing")
    with pytest.raises(ConfigError, match="a file, but a model is a folder"):
        hf.model_folder(str(folder / "config.json"))
    with pytest.raises(ConfigError, match="config.json: no such file"):
        hf.load_hf_config(tmp_path)
    with pytest.raises(ConfigError, match="no tokenizer could be loaded"):
        hf.load_tokenizer(str(tmp_path))
    with pytest.raises(ConfigError, match="not readable as a chat template"):
        hf.load_tokenizer(str(folder), str(tmp_path / "none.jinja"))
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="config.json: not readable as JSON"):
        hf.load_hf_config(folder)


@pytest.mark.parametrize("model_type", ["llama", "minimax_m2", "ministral3"])
@pytest.mark.parametrize("method", ["fp8", "gptq", "compressed-tensors", "bitsandbytes"])
def test_numbers_of_fewer_bits_that_are_not_read_are_to_be_converted_first(model_type, method, tmp_path):
    sizes = {"model_type": model_type, "num_hidden_layers": 2}
    quantization = {"quant_method": method, "weight_block_size": [128, 128], "load_in_8bit": True}
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"quantization_config": quantization}))
    with pytest.raises(ConfigError) as error:
        hf.open_source(tmp_path)
    said = ["config.json: quantization_config", f"quant_method '{method}'", "Convert the files to bfloat16 first"]
    assert all(each in str(error.value) for each in said) and "remove it" not in str(error.value)
    assert ("FineGrainedFP8Config(dequantize=True)" in str(error.value)) == (method == "fp8")


def test_tensors_without_dims_and_without_numbers_are_read_whole_and_compared(tmp_path):
    tensors = {"one": np.float32(3.5), "none": np.zeros((2, 0), np.float32), "cube": np.ones((2, 3, 4), np.float32)}
    safetensors.numpy.save_file(
        {name: np.asarray(each) for name, each in tensors.items()}, tmp_path / "model.safetensors"
    )
    stored = open_folder(tmp_path).tensors
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(read_whole(stored[name]), tensor)
        assert read_whole(stored[name]).shape == np.shape(tensor)
    # A folder whose tables are no tables is reported, and not a crash.
    for table in (np.float32(1), np.zeros((320, 0), np.float32)):
        names = ("model.embed_tokens.weight", "lm_head.weight")
        safetensors.numpy.save_file({name: np.asarray(table) for name in names}, tmp_path / "model.safetensors")
        with pytest.raises(ConfigError, match=r"embed_tokens.weight has shape"):
            load(tmp_path, config=CONFIG | {"tie_word_embeddings": True})
