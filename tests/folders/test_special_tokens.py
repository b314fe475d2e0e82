"""Control tokens of templates: which are added, what their rows begin as on any mesh, what the export says of them."""

import json
import shutil
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from jaxsft import cli
from jaxsft.chat.named_templates import NAMED_TEMPLATES
from jaxsft.config import ConfigError, MeshConfig, ModelConfig
from jaxsft.folders import hf, special_tokens
from jaxsft.folders.export import export_folder
from jaxsft.folders.pretrained import export_model, load_weights, open_model, open_tokenizer
from jaxsft.folders.weights import load as weights
from jaxsft.mesh import make_mesh
from jaxsft.model.decoder import Decoder
from jaxsft.model.families.known import decoder_config, family

STOP = "<|im_end|>"
WORDS = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(397))]
EMBEDDING, UNEMBEDDING = "model.embed_tokens.weight", "lm_head.weight"


def make_model(folder, *, vocab_size=300, words=300, tie=False, template=None, param_dtype="float32", change=None):
    """A model folder: 300 tokens, one for each word; random weights, which `change` may alter by tensor name."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    folder.mkdir(parents=True, exist_ok=True)
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: id for id, word in enumerate(WORDS[:words])}, unk_token="<unk>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )
    config = dict(
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        dtype=param_dtype,
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tie,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=2,
    )
    module = family(config)

    @jax.jit
    def params():
        options = dict(compute_dtype="float32", param_dtype=param_dtype, remat="none")
        return nnx.state(Decoder(decoder_config(config), **options, rngs=nnx.Rngs(0)))

    export_folder(
        folder,
        params(),
        family=module,
        hf_config=config,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        stop_ids=[2],
    )
    if change is not None:
        tensors = {name: value.copy() for name, value in tensors_of(folder).items()}
        change(tensors)
        safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tensors_of(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


def open_both(folder, template="chatml", **options):
    config = ModelConfig(path=str(folder), **options)
    tokenizer = open_tokenizer(config, template)
    return tokenizer, open_model(config, tokenizer)


def table(params, name):
    return np.asarray(jax.device_get(params[name]["weight"][...]))


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def template_file(tmp_path):
    def write(text):
        (tmp_path / "template.jinja").write_text(text)
        return str(tmp_path / "template.jinja")

    return write


# Which tokens are added.


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_a_named_template_adds_the_tokens_it_needs_and_each_is_one_id_then(name, base):
    tokenizer = open_tokenizer(ModelConfig(path=str(base)), name)
    assert tokenizer.added_tokens == NAMED_TEMPLATES[name].tokens
    for id, token in enumerate(tokenizer.added_tokens, start=300):
        assert tokenizer.tokenizer(f"w1{token}w2", add_special_tokens=False)["input_ids"] == [4, id, 5]
        assert tokenizer.tokenizer.added_tokens_decoder[id].special
        assert f"{token!r} ({id})" in tokenizer.notes[0]
    assert tokenizer.tokenizer.extra_special_tokens == list(tokenizer.added_tokens)
    stop = {"chatml": 301, "llama3": 302, "gemma": 301}.get(name)
    assert tokenizer.stops == [2] + [stop] * (stop is not None)


def test_the_tokenizer_s_key_covers_what_was_added(base):
    keys = [open_tokenizer(ModelConfig(path=str(base)), name).key for name in (None, "plain", "chatml", "gemma")]
    assert keys[0] == keys[1] and len(set(keys)) == 3


@pytest.mark.parametrize("name", ["smollm2", "qwen2.5", "qwen3"])
def test_nothing_is_added_that_a_tokenizer_has(name, material):
    tokenizer = hf.load_tokenizer(str(material / "tokenizers" / name), "chatml")
    size = len(tokenizer)
    assert special_tokens.add_missing_tokens(tokenizer, "chatml", own_template=None) == ()
    assert len(tokenizer) == size


def test_other_text_has_the_same_tokens_as_before(material):
    for name in ("llama-2", "mistral-nemo", "phi-3"):
        before = hf.load_tokenizer(str(material / "tokenizers" / name))
        after = hf.load_tokenizer(str(material / "tokenizers" / name), "chatml")
        assert special_tokens.add_missing_tokens(after, "chatml", own_template=None) == ("<|im_start|>", STOP)
        for text in ("user\nWhat is <b>this</b>? é 👩‍👩‍👧", " a  b\n\n\tc", "<|user|> [INST] <think>", ""):
            assert after(text)["input_ids"] == before(text)["input_ids"]
        ids = after(f"Hello{STOP}\nthere", add_special_tokens=False)["input_ids"]
        assert ids.count(after.convert_tokens_to_ids(STOP)) == 1


TEMPLATE = (
    "{% for m in messages %}<HEAD>{{ m.role }}\n{{ m.content }}<END>\n{% endfor %}"
    "{% if add_generation_prompt %}<HEAD>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("head", "end", "added"),
    [
        ("<|im_start|>", "<|im_end|>", ["<|im_start|>", "<|im_end|>"]),
        ("<|turn>", "<turn|>", ["<|turn>", "<turn|>"]),
        ("<｜User｜>", "<｜end▁of▁sentence｜>", ["<｜User｜>", "<｜end▁of▁sentence｜>"]),
        ("[|it|]", "[|endofturn|]", ["[|it|]", "[|endofturn|]"]),
        ("<start_of_turn>", "<end_of_turn>", ["<start_of_turn>", "<end_of_turn>"]),
        ("", " \n<|EOT|>", ["<|EOT|>"]),
        ("", "<eos>", ["<eos>"]),
        ("", "[EOT]", ["[EOT]"]),
        ("", "<seed:eos>", ["<seed:eos>"]),
        ("", "<sep>", ["<sep>"]),
        # Ordinary text, wherever it stands.
        ("[INST] <<SYS>>", "{{ eos_token }}", []),
        ("<think></think>", "</answer>{{ eos_token }}", []),
        ("### ", "</tool_call>", []),
        ("<s>", "<|end|>", ["<|end|>"]),
        ("[EOT]", "{{ eos_token }}", []),
        ("a | b <b> x <= y |> z", "{{ eos_token }}", []),
    ],
)
def test_of_a_file_s_template_what_looks_like_a_control_token_is_added(head, end, added, base, template_file):
    file = template_file(TEMPLATE.replace("<HEAD>", head).replace("<END>", end))
    tokenizer = open_tokenizer(ModelConfig(path=str(base)), file)
    assert list(tokenizer.added_tokens) == added
    if end.strip() in added:
        assert tokenizer.stops == [2, tokenizer.tokenizer.convert_tokens_to_ids(end.strip())]


def test_a_control_token_that_only_the_data_could_write_is_not_added(base, template_file):
    file = template_file("{% if messages[0].role == 'robot' %}<|robot|>{% endif %}{{ messages[0].content }}")
    assert open_tokenizer(ModelConfig(path=str(base)), file).added_tokens == ()


def test_what_the_tokenizer_s_own_template_writes_is_known_to_the_model_broken_up(tmp_path, template_file):
    own = TEMPLATE.replace("<HEAD>", "<|say|>").replace("<END>", "</s>")
    folder = make_model(tmp_path / "model", template=own)
    # Without data.chat_template nothing is added at all.
    tokenizer = open_tokenizer(ModelConfig(path=str(folder)))
    assert tokenizer.added_tokens == ()
    assert not any("added" in note for note in tokenizer.notes)
    # With a repaired copy of it, only what it did not write before.
    file = template_file(own.replace("</s>", "<|over|>"))
    tokenizer = open_tokenizer(ModelConfig(path=str(folder)), file)
    assert tokenizer.added_tokens == ("<|over|>",)
    # An end of turn must be one token, or the model could not stop.
    folder = make_model(tmp_path / "other", template=own.replace("</s>", "<|over|>"))
    tokenizer = open_tokenizer(ModelConfig(path=str(folder)), file)
    assert tokenizer.added_tokens == ("<|over|>",)


# What their rows begin as.


def expected_rows(folder, name, *, size, new):
    """The naive way: the whole table in float64."""
    old = tensors_of(folder)[name]
    rows = np.concatenate([old, np.zeros((size - len(old), old.shape[1]), old.dtype)])
    rows[list(new) + list(range(len(old), size))] = old.astype(np.float64).mean(axis=0).astype(np.float32)
    return rows


@pytest.mark.parametrize("tie", [False, True])
def test_a_vocabulary_that_is_full_grows_by_the_rows_that_are_missing_and_they_are_the_mean(tie, tmp_path):
    folder = make_model(tmp_path / "model", tie=tie)
    tokenizer, pretrained = open_both(folder)
    assert pretrained.hf_config["vocab_size"] == pretrained.decoder_config.vocab_size == 302
    assert "grows from 300 to 302 rows" in pretrained.notes[0]
    params = load_weights(pretrained, one_device(), seed=0)
    names = {"embed_tokens": EMBEDDING} | ({} if tie else {"lm_head": UNEMBEDDING})
    assert ("lm_head" in params) == (not tie)
    for ours, theirs in names.items():
        expected = expected_rows(folder, theirs, size=302, new=[300, 301])
        np.testing.assert_array_equal(table(params, ours)[:300], expected[:300])
        np.testing.assert_allclose(table(params, ours)[:302], expected, rtol=1e-6, atol=1e-7)
        # Filled up in memory, for any mesh; these rows are in no file.
        assert table(params, ours).shape == (384, 32) and not table(params, ours)[302:].any()


@pytest.mark.parametrize(("vocab_size", "grown"), [(301, 302), (302, 302), (320, 320)])
def test_rows_that_a_model_has_to_spare_are_used_before_it_grows(vocab_size, grown, tmp_path):
    folder = make_model(tmp_path / "model", vocab_size=vocab_size)
    _, pretrained = open_both(folder)
    assert pretrained.decoder_config.vocab_size == pretrained.hf_config["vocab_size"] == grown
    assert ("grows" if grown > vocab_size else "to spare") in pretrained.notes[0]
    params = load_weights(pretrained, one_device(), seed=0)
    expected = expected_rows(folder, EMBEDDING, size=grown, new=[300, 301])
    assert not table(params, "embed_tokens")[grown:].any()
    np.testing.assert_allclose(table(params, "embed_tokens")[:grown], expected, rtol=1e-6, atol=1e-7)
    untouched = [*range(300), *range(302, vocab_size)]
    np.testing.assert_array_equal(table(params, "embed_tokens")[untouched], expected[untouched])


@pytest.mark.parametrize(("words", "grown"), [(382, 384), (383, 385)])
def test_the_last_new_token_still_has_a_row(words, grown, tmp_path):
    folder = make_model(tmp_path / "model", vocab_size=words, words=words)
    tokenizer, pretrained = open_both(folder)
    assert pretrained.new_ids == (words, words + 1)
    assert pretrained.decoder_config.vocab_size == grown


def test_without_new_tokens_nothing_changes(base):
    _, pretrained = open_both(base, "plain")
    assert (pretrained.new_ids, pretrained.notes, pretrained.decoder_config.vocab_size) == ((), (), 300)
    params = load_weights(pretrained, one_device(), seed=0)
    np.testing.assert_array_equal(table(params, "embed_tokens")[:300], tensors_of(base)[EMBEDDING])


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_every_mesh_begins_with_the_same_rows_to_the_bit(param_dtype, base):
    _, pretrained = open_both(base, param_dtype=param_dtype)
    whole = load_weights(pretrained, one_device(), seed=0)
    for mesh in (MeshConfig(fsdp=8), MeshConfig(fsdp=4, tensor=2), MeshConfig(data=2, fsdp=4), MeshConfig(data=8)):
        cut = load_weights(pretrained, make_mesh(mesh), seed=0)
        jax.tree.map(np.testing.assert_array_equal, cut, whole)


class InMemory(NamedTuple):
    """A stored tensor without a file."""

    values: np.ndarray

    def read(self, rows, columns):
        return self.values[rows, columns]


def test_the_mean_does_not_depend_on_the_columns_that_are_read_with_it():
    rows = np.random.default_rng(0).normal(size=(3000, 24)).astype(ml_dtypes.bfloat16)

    def mean(first, last, **options):
        return weights._row_mean(InMemory(rows), slice(0, 3000), slice(first, last), **options)

    whole = mean(0, 24)
    np.testing.assert_allclose(whole, rows.astype(np.float64).mean(axis=0), rtol=1e-12)
    for width in (1, 2, 3, 8):
        parts = [mean(at, at + width) for at in range(0, 24, width)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_allclose(mean(0, 24, chunk=7), whole, rtol=1e-12)


def test_random_weights_have_rows_for_new_tokens_too(base):
    _, pretrained = open_both(base, weights="random")
    assert pretrained.decoder_config.vocab_size == 302
    assert load_weights(pretrained, one_device(), seed=0)["lm_head"]["weight"].shape == (384, 32)


def test_a_tokenizer_that_did_not_fit_before_is_still_refused(tmp_path):
    folder = make_model(tmp_path / "model", vocab_size=280)
    with pytest.raises(ConfigError, match="token 'w296' has id 299, but the model's vocab_size is 280"):
        open_both(folder)


def test_weights_that_do_not_fit_config_json_are_still_refused(base, tmp_path):
    folder = make_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 384}))
    with pytest.raises(ConfigError, match=r"embed_tokens.weight has shape \[300, 32\], but config.json asks for \[384"):
        open_both(folder)


# The export.


@pytest.mark.parametrize("tie", [False, True])
def test_an_export_with_new_tokens_is_whole_for_transformers_and_for_us(tie, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tokenizer, pretrained = open_both(make_model(tmp_path / "model", tie=tie))
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    params = load_weights(pretrained, mesh, seed=0)
    out = tmp_path / "export"
    export_model(pretrained, tokenizer, params, out)

    assert hf.load_hf_config(out)["vocab_size"] == len(tokenizer.tokenizer) == 302
    assert tensors_of(out)[EMBEDDING].shape == (302, 32)
    assert hf.load_generation_config(out)["eos_token_id"] == hf.load_hf_config(out)["eos_token_id"] == [2, 301]
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert theirs.eos_token == "</s>"
    assert theirs(f"w1{STOP}w2", add_special_tokens=False)["input_ids"] == [4, 301, 5]
    assert theirs.decode([4, 301], skip_special_tokens=True) == "w1"
    assert theirs.chat_template == tokenizer.tokenizer.chat_template

    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert model.get_input_embeddings().weight.shape == model.lm_head.weight.shape == (302, 32)
    assert model.generation_config.eos_token_id == [2, 301]
    tokens = np.array([[1, 300, 7, 8, 301, 300, 9, 299]])
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    decoder = nnx.merge(pretrained.model.graphdef, jax.device_get(params))
    hidden = decoder(tokens, np.ones_like(tokens), np.arange(8)[None]).hidden
    np.testing.assert_allclose(decoder.logits(hidden)[..., :302], expected, rtol=1e-4, atol=1e-4)

    # Opened again, with or without naming the template, nothing is left to add.
    for template in (None, "chatml", str(out / "chat_template.jinja")):
        again, reopened = open_both(out, template)
        assert (again.added_tokens, again.stops, again.key) == ((), [2, 301], tokenizer.key)
        assert reopened.new_ids == () and reopened.decoder_config == pretrained.decoder_config
        jax.tree.map(np.testing.assert_array_equal, load_weights(reopened, mesh, seed=0), params)


def test_a_base_model_learns_to_chat_and_to_stop(material, tmp_path):
    """The way of a user: a base model of 512 tokens, a template of ours, a run, and generation with transformers."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    question = [{"role": "user", "content": "Who is there?"}]
    row = {"messages": [*question, {"role": "assistant", "content": "It is Tim."}]}
    (tmp_path / "train.jsonl").write_text((json.dumps(row) + "\n") * 64)
    (tmp_path / "run.yaml").write_text(
        f"""
run_dir: {tmp_path}/run
model: {{path: {material}/models/stories260K, remat: none}}
data: {{train: {tmp_path}/train.jsonl, chat_template: chatml, seq_len: 64, packing: false, cache: {tmp_path}/cache}}
train: {{batch_size: 8, steps: 40}}
optim: {{learning_rate: 5e-3, warmup_steps: 2}}
"""
    )
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 0
    out = tmp_path / "run" / "export"
    assert hf.load_hf_config(out)["vocab_size"] == 514
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :].tolist()
    assert answer[-1] == tokenizer.convert_tokens_to_ids(STOP) == 513
    assert tokenizer.decode(answer, skip_special_tokens=True) == "It is Tim."


# The token that ends an answer, for others.


def test_an_eos_token_that_does_not_end_answers_is_said_or_set_and_the_export_agrees(tmp_path):
    folder = make_model(tmp_path / "model")
    model = ModelConfig(path=str(folder))
    kept = open_tokenizer(model, "chatml")
    assert kept.tokenizer.eos_token == "</s>" and kept.stops == [2, 301]
    assert any("'<|im_end|>' (301)" in note and "data.set_eos" in note for note in kept.notes)

    tokenizer = open_tokenizer(model, "chatml", set_eos=True)
    assert tokenizer.tokenizer.eos_token_id == 301 and sorted(tokenizer.stops) == [2, 301]
    assert tokenizer.stops[0] == 301 and tokenizer.key != kept.key
    assert any("'<|im_end|>' (301) is the tokenizer's eos token now, in place of '</s>'" in n for n in tokenizer.notes)
    assert not any("would not stop there" in note for note in tokenizer.notes)
    pretrained = open_model(model, tokenizer)
    out = tmp_path / "out"
    export_model(pretrained, tokenizer, load_weights(pretrained, one_device(), seed=0), out)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        assert json.loads((out / name).read_text())["eos_token"] == "<|im_end|>"
    for name in ("config.json", "generation_config.json"):
        assert sorted(json.loads((out / name).read_text())["eos_token_id"]) == [2, 301]
    # Nothing is left to set.
    again = open_tokenizer(ModelConfig(path=str(out)), set_eos=True)
    assert again.key == tokenizer.key and not any("data.set_eos" in note for note in again.notes)


@pytest.mark.parametrize("name", ["zephyr", "llama3", "gemma"])
def test_what_a_named_template_ends_with_becomes_the_eos_token(name, base):
    tokenizer = open_tokenizer(ModelConfig(path=str(base)), name, set_eos=True)
    expected = {"zephyr": "</s>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}[name]
    assert tokenizer.tokenizer.eos_token == expected


def test_an_eos_token_is_not_set_where_the_template_would_write_another_text_or_ends_with_no_token(base, template_file):
    file = template_file(TEMPLATE.replace("<HEAD>", "{{ eos_token }}").replace("<END>", "<|end|>"))
    with pytest.raises(ConfigError, match="data.set_eos: true, but the chat template writes the eos token .'</s>'"):
        open_tokenizer(ModelConfig(path=str(base)), file, set_eos=True)
    file = template_file(TEMPLATE.replace("<HEAD>", "").replace("<END>", ""))
    with pytest.raises(ConfigError, match="data.set_eos: true, but the chat template does not end answers with one"):
        open_tokenizer(ModelConfig(path=str(base)), file, set_eos=True)


def test_a_pad_token_that_is_missing_or_ends_answers_is_said(base):
    tokenizer = open_tokenizer(ModelConfig(path=str(base)), "chatml")
    assert tokenizer.tokenizer.pad_token is None and any("has no pad token" in note for note in tokenizer.notes)

    def pads(folder):
        tokenizer = open_tokenizer(ModelConfig(path=str(folder)))
        return [note for note in tokenizer.notes if "pad token" in note]

    config = json.loads((base / "tokenizer_config.json").read_text())
    for pad, said in (("</s>", ["also ends texts"]), ("<unk>", [])):
        folder = base.parent / f"pad{len(said)}"
        shutil.copytree(base, folder)
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": pad}))
        assert [words in note for words, note in zip(said, pads(folder), strict=True)] == [True] * len(said)


# Rows that were never trained.


def spoil(tensors):
    tensors[EMBEDDING][1] = 0
    tensors[EMBEDDING][2] *= 1e-3
    tensors[UNEMBEDDING][[2, 301, 302, 305]] = tensors[UNEMBEDDING][2]
    tensors[EMBEDDING][7] = 0  # an ordinary word, which nobody asked about


def test_rows_that_look_untrained_are_named_with_their_tensor_and_why(tmp_path):
    folder = make_model(tmp_path / "model", vocab_size=310, change=spoil)
    tokenizer, pretrained = open_both(folder, "plain")
    found = special_tokens.untrained_tokens(
        pretrained.stored,
        pretrained.family,
        pretrained.model.params,
        tokenizer=tokenizer.tokenizer,
        ids=[1, 2, 5, 9999],
    )
    assert [(each.tensor, each.id, each.reason.split(" ")[0]) for each in found] == [
        (EMBEDDING, 1, "all"),
        (EMBEDDING, 2, "norm"),
        (UNEMBEDDING, 2, "equal"),
    ]
    assert "3 other rows" in found[2].reason
    embedding, unembedding = pretrained.notes
    assert embedding.startswith(EMBEDDING) and "'<s>' (1: all zeros), '</s>' (2: norm" in embedding
    assert unembedding.startswith(UNEMBEDDING) and "'</s>' (2: equal" in unembedding and "LoRA" in unembedding


def test_added_tokens_are_not_reported_as_untrained_rows_for_they_begin_as_the_mean(tmp_path):
    def empty(tensors):
        tensors[EMBEDDING][300:] = 0

    folder = make_model(tmp_path / "model", vocab_size=310, change=empty)
    _, pretrained = open_both(folder, "chatml")
    assert [note for note in pretrained.notes if "never" in note] == []
    params = load_weights(pretrained, one_device(), seed=0)
    assert np.all(np.any(table(params, "embed_tokens")[300:302] != 0, axis=1))
    assert not np.any(table(params, "embed_tokens")[302:])


def test_no_row_of_a_model_that_was_trained_looks_untrained(base, material):
    for folder in (base, material / "models" / "stories260K"):
        tokenizer, pretrained = open_both(folder, None)
        assert not any("never" in note for note in pretrained.notes)
        found = special_tokens.untrained_tokens(
            pretrained.stored,
            pretrained.family,
            pretrained.model.params,
            tokenizer=tokenizer.tokenizer,
            ids=range(pretrained.stored_vocab_size),
        )
        assert found == []
