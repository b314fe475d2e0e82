"""Adapter folders against PEFT, on the tiny model of every family: ours in PEFT, PEFT's here, and merged models."""

import json
import re
import shutil

import adapters
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from adapters import TINY, TOKENIZER, apart, assert_same_state, one_device, open_ours, random_adapters, some_tokens

from jaxsft.config import ConfigError
from jaxsft.folders.pretrained import export_model, load_weights
from jaxsft.folders.weights.layout import variables_of
from jaxsft.model.families.known import FAMILIES

pytest.importorskip("torch")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TYPES = {name: json.loads(path.read_text())["model_type"] for name, path in TINY.items()}
ONE_OF_EACH = {FAMILIES[type]: name for name, type in reversed(TYPES.items())}
VARIANTS = sorted({*ONE_OF_EACH.values(), "gpt2_untied", "glm4_tied", "qwen3_moe_biases"})

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
THEIR_TARGETS = {
    "gpt2": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    "gpt_neox": {"target_modules": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]},
    "phi3": {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]},
    "glm": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]},
    **dict.fromkeys(
        ("mixtral", "qwen3_moe", "olmoe", "minimax_m2"),
        {
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "target_parameters": [*EXPERTS, "mlp.gate.weight"],
        },
    ),
    "qwen2_moe": {
        "target_modules": [*ATTENTION, "gate_proj", "up_proj", "down_proj"],
        "target_parameters": [*EXPERTS, "mlp.gate.weight"],
    },
    "hunyuan_v1_moe": {
        "target_modules": ATTENTION,
        "target_parameters": [
            *(*EXPERTS, "mlp.gate.wg.weight"),
            *(f"mlp.shared_mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
        ],
    },
    **dict.fromkeys(
        ("granitemoe", "granitemoeshared"),
        {
            "target_modules": [*ATTENTION, "input_linear", "output_linear"],
            "target_parameters": [
                *("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"),
                "block_sparse_moe.router.weight",
            ],
        },
    ),
    "starcoder2": {"target_modules": [*ATTENTION, "c_fc", "c_proj"]},
    "nanochat": {"target_modules": [*ATTENTION, "fc1", "fc2"]},
    "gpt_oss": {"target_modules": ATTENTION, "target_parameters": [*EXPERTS, "mlp.router.weight"]},
}
THEIR_TARGETS["glm4"] = THEIR_TARGETS["glm"]
USUAL = {"target_modules": [*ATTENTION, "gate_proj", "up_proj", "down_proj"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """`base(name)`: the folder of a tiny model."""
    made = {}

    def get(name, **changes):
        key = (name, *sorted(changes.items()))
        if key not in made:
            made[key] = adapters.make_base(name, tmp_path_factory.mktemp(name) / "base", **changes)
        return made[key]

    return get


def peft_adapter(base, out, *, seed=1, **options):
    """An adapter that PEFT makes and saves, all of whose tensors are random; and PEFT's model with it."""
    import torch

    config = peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 3, "lora_alpha": 6, **options})
    model = peft.get_peft_model(adapters.models.load_theirs(base), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "trainable_tokens_delta" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = name.endswith("magnitude_vector.default.weight")
            parameter.data = parameter.data * (1 + 0.2 * noise) if is_scale else 0.15 * noise
    model.save_pretrained(out)
    return model.eval()


def exported(pretrained, weights, out, **options):
    export_model(pretrained, TOKENIZER, weights, out, **options)
    return out


def settings(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def tensors(folder):
    return safetensors.numpy.load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("name", VARIANTS)
def test_peft_computes_what_we_do_and_we_what_peft_does_and_so_does_the_merged_model(name, base, tmp_path):
    folder = base(name)
    is_mixture = "target_parameters" in THEIR_TARGETS.get(TYPES[name], {})
    targets = ["all_linear", "router"] if is_mixture else ["all_linear"]
    pretrained = open_ours(folder, {"rank": 3, "targets": targets})
    weights = random_adapters(pretrained)
    tokens = some_tokens(pretrained.decoder_config.vocab_size)
    ours = adapters.our_logits(pretrained, weights, tokens)

    out = exported(pretrained, weights, tmp_path / "ours")
    assert apart(adapters.their_logits(adapters.with_peft(folder, out), tokens), ours) < 1e-5
    again = open_ours(out)
    assert again.lora == pretrained.lora.model_copy(update={"targets": again.lora.targets, "alpha": 6.0})
    assert_same_state(load_weights(again, one_device(), seed=9), weights)

    merged = exported(pretrained, weights, tmp_path / "merged", merge=True)
    assert apart(adapters.their_logits(adapters.models.load_theirs(merged), tokens), ours) < 1e-5

    theirs = peft_adapter(folder, tmp_path / "theirs", **THEIR_TARGETS.get(TYPES[name], USUAL))
    imported = open_ours(tmp_path / "theirs")
    found = adapters.our_logits(imported, load_weights(imported, one_device(), seed=9), tokens)
    expected = adapters.their_logits(theirs, tokens)
    assert apart(found, expected) < 1e-5 and apart(expected, ours) > 1e-2


UNEVEN = {
    "rank": 3,
    "alpha": 5.0,
    "targets": ["all_linear"],
    "exclude": [r"layers\.0\.self_attn\.v_proj"],
    "rank_pattern": {"k_proj": 5, r"layers\.1\..*up_proj": 2},
    "alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 9.0},
}


@pytest.mark.parametrize(
    ("name", "rslora"),
    [("llama", True), ("phi3", False), ("gpt_neox", True), ("gpt2", False), ("mixtral", True), ("gpt_oss", True)],
)
def test_layers_of_other_ranks_and_scales_keep_them(name, rslora, base, tmp_path):
    folder = base(name)
    pretrained = open_ours(folder, UNEVEN | {"rslora": rslora})
    weights = random_adapters(pretrained)
    tokens = some_tokens(pretrained.decoder_config.vocab_size)
    out = exported(pretrained, weights, tmp_path / "ours")
    theirs = adapters.their_logits(adapters.with_peft(folder, out), tokens)
    assert apart(adapters.our_logits(pretrained, weights, tokens), theirs) < 1e-5
    assert settings(out)["use_rslora"] == rslora

    again = open_ours(out)
    read = load_weights(again, one_device(), seed=9)
    if name == "llama":  # no module holds several maps, so nothing had to change
        assert_same_state(read, weights)
    twice = exported(again, read, tmp_path / "twice")
    assert settings(twice) == settings(out)
    np.testing.assert_equal(tensors(twice), tensors(out))


@pytest.mark.parametrize("name", ["phi3", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("targets", [["attention"], ["q_proj", r"layers\.1\.self_attn\.v_proj"]])
def test_magnitudes_are_those_of_peft_also_of_maps_that_share_a_module_with_others(name, targets, base, tmp_path):
    folder = base(name)
    pretrained = open_ours(folder, {"rank": 3, "targets": targets, "dora": True})
    weights = random_adapters(pretrained)
    tokens = some_tokens(pretrained.decoder_config.vocab_size)
    out = exported(pretrained, weights, tmp_path / "ours")
    ours = adapters.our_logits(pretrained, weights, tokens)
    assert apart(adapters.their_logits(adapters.with_peft(folder, out), tokens), ours) < 1e-5
    assert open_ours(out).lora.dora
    merged = exported(pretrained, weights, tmp_path / "merged", merge=True)
    assert apart(adapters.their_logits(adapters.models.load_theirs(merged), tokens), ours) < 1e-5


def test_magnitudes_that_peft_trained_are_read(base, tmp_path):
    theirs = peft_adapter(base("phi3"), tmp_path / "theirs", use_dora=True, target_modules=["qkv_proj", "o_proj"])
    imported = open_ours(tmp_path / "theirs")
    tokens = some_tokens(imported.decoder_config.vocab_size)
    found = adapters.our_logits(imported, load_weights(imported, one_device(), seed=9), tokens)
    assert apart(found, adapters.their_logits(theirs, tokens)) < 1e-5


@pytest.mark.parametrize("name", ["llama_untied", "gpt2", "gpt_neox"])
def test_adapters_of_the_embedding_and_the_output_projection(name, base, tmp_path):
    folder = base(name)
    is_tied = "lm_head" not in open_ours(folder).model.weights
    targets = ["q_proj", "embed_tokens"] + ["lm_head"] * (not is_tied)
    pretrained = open_ours(folder, {"rank": 3, "targets": targets})
    weights = random_adapters(pretrained)
    tokens = some_tokens(pretrained.decoder_config.vocab_size)
    ours = adapters.our_logits(pretrained, weights, tokens)
    out = exported(pretrained, weights, tmp_path / "ours")
    assert apart(adapters.their_logits(adapters.with_peft(folder, out), tokens), ours) < 1e-5
    assert_same_state(load_weights(open_ours(out), one_device(), seed=9), weights)
    if is_tied:
        with pytest.raises(ConfigError, match=r"embed_tokens cannot be merged.*tie_embeddings: false"):
            exported(pretrained, weights, tmp_path / "merged", merge=True)
    else:
        merged = exported(pretrained, weights, tmp_path / "merged", merge=True)
        assert apart(adapters.their_logits(adapters.models.load_theirs(merged), tokens), ours) < 1e-5

    # PEFT saves the table of the base beside an embedding's adapter, if it is called so; that changes nothing.
    target = {"llama_untied": "embed_tokens", "gpt2": "wte", "gpt_neox": "embed_in"}[name]
    theirs = peft_adapter(folder, tmp_path / "theirs", target_modules=[target])
    is_saved = any(each.endswith("base_layer.weight") for each in tensors(tmp_path / "theirs"))
    assert is_saved == (target == "embed_tokens")
    imported = open_ours(tmp_path / "theirs")
    found = adapters.our_logits(imported, load_weights(imported, one_device(), seed=9), tokens)
    assert apart(found, adapters.their_logits(theirs, tokens)) < 1e-5


def test_a_tied_model_that_is_parted_has_an_adapter_on_its_output_projection_alone(base, tmp_path):
    folder = base("qwen2")
    pretrained = open_ours(folder, {"rank": 3, "targets": ["embed_tokens", "lm_head"]}, tie_embeddings=False)
    weights = random_adapters(pretrained)
    tokens = some_tokens(pretrained.decoder_config.vocab_size)
    ours = adapters.our_logits(pretrained, weights, tokens)
    out = exported(pretrained, weights, tmp_path / "ours")
    assert apart(adapters.their_logits(adapters.with_peft(folder, out), tokens), ours) < 1e-5
    merged = exported(pretrained, weights, tmp_path / "merged", merge=True)
    assert apart(adapters.their_logits(adapters.models.load_theirs(merged), tokens), ours) < 1e-5


def test_rows_of_tokens_that_peft_trained_are_read_kept_and_written_again(base, tmp_path):
    theirs = peft_adapter(
        base("llama"), tmp_path / "theirs", target_modules=["q_proj"], trainable_token_indices=[3, 11, 60]
    )
    imported = open_ours(tmp_path / "theirs")
    weights = load_weights(imported, one_device(), seed=9)
    tokens = np.tile(np.array([[1, 3, 11, 60, 7, 60, 2, 3]], np.int32), (2, 1))
    expected = adapters.their_logits(theirs, tokens)
    assert apart(adapters.our_logits(imported, weights, tokens), expected) < 1e-5
    out = exported(imported, weights, tmp_path / "ours")
    delta = next(name for name in tensors(out) if "delta" in name)
    np.testing.assert_array_equal(tensors(out)[delta], tensors(tmp_path / "theirs")[delta])
    assert apart(adapters.their_logits(adapters.with_peft(base("llama"), out), tokens), expected) < 1e-5
    merged = exported(imported, weights, tmp_path / "merged", merge=True)
    assert apart(adapters.their_logits(adapters.models.load_theirs(merged), tokens), expected) < 1e-5


@pytest.mark.parametrize("rslora", [False, True])
def test_files_of_mixtures_from_before_transformers_5_name_each_expert(rslora, base, tmp_path):
    """PEFT's loader takes rsLoRA's scale of gate and up in such a file sqrt(2) too large, so the formula decides."""
    folder = base("mixtral")
    pretrained = open_ours(folder)
    config = pretrained.decoder_config
    sizes, rng = config.sizes, np.random.default_rng(0)
    out = tmp_path / "old"
    out.mkdir()
    saved, deltas = {}, {}
    shapes = {"w1": (sizes["f"], sizes["d"]), "w2": (sizes["d"], sizes["f"]), "w3": (sizes["f"], sizes["d"])}
    for layer in range(len(config.layers)):
        for expert in range(sizes["e"]):
            for word, (num_out, num_in) in shapes.items():
                name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{word}"
                a, b = rng.normal(size=(4, num_in)), rng.normal(size=(num_out, 4))
                saved |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
                deltas[f"{name}.weight"] = b @ a * (6 / (2 if rslora else 4))
    saved = {name: (0.2 * each).astype(np.float32) for name, each in saved.items()}
    safetensors.numpy.save_file(saved, out / "adapter_model.safetensors")
    given = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "use_rslora": rslora, "target_modules": ["w1", "w2", "w3"]}
    (out / "adapter_config.json").write_text(json.dumps(given | {"base_model_name_or_path": str(folder)}))
    imported = open_ours(out)
    merged = exported(imported, load_weights(imported, one_device(), seed=9), tmp_path / "merged", merge=True)
    before, after = (safetensors.numpy.load_file(each / "model.safetensors") for each in (folder, merged))
    assert before.keys() == after.keys() and deltas.keys() <= after.keys()
    for name, weight in after.items():
        np.testing.assert_allclose(weight, before[name] + 0.04 * deltas.get(name, 0), rtol=1e-5, atol=1e-5)
    if not rslora:
        tokens = some_tokens(config.vocab_size)
        ours = adapters.our_logits(imported, load_weights(imported, one_device(), seed=9), tokens)
        assert apart(adapters.their_logits(adapters.with_peft(folder, out), tokens), ours) < 1e-5


def test_tensors_without_dims_are_merged_in_another_dtype(base, tmp_path):
    folder = base("apertus")
    pretrained = open_ours(folder, {"rank": 2, "targets": ["up_proj"]}, export_dtype="bfloat16")
    merged = exported(pretrained, random_adapters(pretrained), tmp_path / "merged", merge=True)
    before, after = (safetensors.numpy.load_file(each / "model.safetensors") for each in (folder, merged))
    scalars = [name for name, tensor in before.items() if tensor.shape == ()]
    assert scalars and before.keys() == after.keys()
    for name in scalars:
        assert after[name].dtype == ml_dtypes.bfloat16 and after[name].shape == ()
        assert after[name] == before[name].astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_a_merged_weight_is_rounded_once_from_the_stored_one_whatever_is_in_memory(compute_dtype, base, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(base("llama_untied"), folder)
    stored = safetensors.numpy.load_file(folder / "model.safetensors")
    # bfloat16 but for one matrix, which keeps all its digits
    kept = "model.layers.0.self_attn.q_proj.weight"
    stored = {name: each if name == kept else each.astype(ml_dtypes.bfloat16) for name, each in stored.items()}
    safetensors.numpy.save_file(stored, folder / "model.safetensors", {"format": "pt"})
    pretrained = open_ours(folder, {"rank": 3, "targets": ["q_proj", "down_proj"]}, compute_dtype=compute_dtype)
    weights = random_adapters(pretrained)
    merged = safetensors.numpy.load_file(
        exported(pretrained, weights, tmp_path / "merged", merge=True) / "model.safetensors"
    )
    saved = tensors(exported(pretrained, weights, tmp_path / "adapter"))
    assert all(each.dtype == np.float32 for each in saved.values())
    for name, before in stored.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" not in saved:
            assert merged[name].tobytes() == before.tobytes()
            continue
        delta = 2.0 * saved[f"{stem}.lora_B.weight"].astype(np.float64) @ saved[f"{stem}.lora_A.weight"]
        exact = before.astype(np.float64) + delta
        assert merged[name].dtype == before.dtype
        error = np.abs(merged[name].astype(np.float64) - exact)
        if before.dtype == ml_dtypes.bfloat16:  # half a unit in the last place
            error -= 2.0 ** (np.floor(np.log2(np.abs(exact))) - 8)
        assert error.max() < 1e-6  # and what float32 rounds


def test_adapters_beside_quantised_weights_go_out_as_beside_others_and_into_the_weights_of_the_files(base, tmp_path):
    folder = base("llama", hidden_size=64, intermediate_size=128, num_attention_heads=4)
    files = []
    for kind in ("none", "nf4"):
        pretrained = open_ours(folder, {"rank": 3}, quantize=kind)
        weights = random_adapters(pretrained)
        out = exported(pretrained, weights, tmp_path / kind)
        merged = exported(pretrained, weights, tmp_path / f"{kind}-merged", merge=True)
        files.append([(out / "adapter_model.safetensors").read_bytes(), (merged / "model.safetensors").read_bytes()])
    assert files[0] == files[1]
    assert files[0][1] != (folder / "model.safetensors").read_bytes()


def test_what_the_config_says_is_short_and_names_the_base(base, tmp_path):
    folder = base("gpt2")
    pretrained = open_ours(folder, {"rank": 3, "targets": ["all_linear"]})
    found = settings(exported(pretrained, random_adapters(pretrained), tmp_path / "ours"))
    assert found["base_model_name_or_path"] == str(folder) and found["revision"] is None
    assert found["target_modules"] == ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]
    assert (found["r"], found["lora_alpha"], found["fan_in_fan_out"]) == (3, 6, True)
    assert found["rank_pattern"] == {"c_attn": 9} and found["alpha_pattern"] == {"c_attn": 18}
    folder = base("mixtral")
    pretrained = open_ours(folder, {"rank": 3, "targets": ["mlp", r"layers\.1\.self_attn\.q_proj"]})
    found = settings(exported(pretrained, random_adapters(pretrained), tmp_path / "mixtral"))
    assert found["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    assert found["target_parameters"] == EXPERTS
    assert found["rank_pattern"] == {re.escape(EXPERTS[0]): 6}


def test_a_snapshot_of_the_hub_is_named_with_its_commit(base, tmp_path):
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / "0123abcd"
    shutil.copytree(base("llama"), snapshot)
    pretrained = open_ours(snapshot, {"rank": 2})
    found = settings(exported(pretrained, random_adapters(pretrained), tmp_path / "ours"))
    assert (found["base_model_name_or_path"], found["revision"]) == (str(snapshot), "0123abcd")


def test_a_base_on_the_hub_is_named_by_its_id_and_commit_and_asked_for_by_them(base, tmp_path, monkeypatch):
    import huggingface_hub

    snapshot, asked = tmp_path / "models--org--tiny" / "snapshots" / "0123abcd", []
    shutil.copytree(base("llama"), snapshot)

    def download(name, *, revision=None, **_):  # the hub is not there
        asked.append((name, revision))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    pretrained = open_ours("org/tiny", {"rank": 2})
    out = exported(pretrained, random_adapters(pretrained), tmp_path / "ours")
    assert (settings(out)["base_model_name_or_path"], settings(out)["revision"]) == ("org/tiny", "0123abcd")
    asked.clear()
    imported = open_ours(out)
    assert imported.folder == snapshot and set(asked) == {("org/tiny", "0123abcd")}


# What is refused.


@pytest.fixture(scope="module")
def sound(base, tmp_path_factory):
    """An adapter of the tiny Llama as PEFT makes it."""
    folder = tmp_path_factory.mktemp("sound") / "adapter"
    peft_adapter(base("llama"), folder, target_modules=["q_proj", "down_proj"])
    return folder


@pytest.fixture
def damaged(sound, tmp_path):
    """`damaged(tensors={...}, **fields)`: that adapter with other fields and tensors; None takes one out."""

    def make(tensors=None, **fields):
        folder = tmp_path / "adapter"
        shutil.copytree(sound, folder, dirs_exist_ok=True)
        changed = settings(sound) | fields
        changed = {key: value for key, value in changed.items() if value != "absent"}
        (folder / "adapter_config.json").write_text(json.dumps(changed))
        held = safetensors.numpy.load_file(sound / "adapter_model.safetensors") | (tensors or {})
        held = {name: each for name, each in held.items() if each is not None}
        safetensors.numpy.save_file(held, folder / "adapter_model.safetensors")
        return folder

    return make


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type: 'IA3' given"),
        ({"bias": "all"}, "bias: 'all' given"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: .*merge the adapter with PEFT"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa' given, which changes the base"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights: 'olora'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights: 'loftq'"),
        ({"lora_bias": True}, "lora_bias: 'True' given, which is not known here"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"invented_later": {"a": 1}}, "invented_later: .* not known here"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying"),
        ({"r": 0}, "r: '0' given"),
        ({"r": "absent"}, "r: not given"),
        ({"lora_alpha": -2}, "lora_alpha: '-2' given"),
        ({"target_modules": "q_(proj"}, "target_modules: .* no regular expression"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern: .* no regular expression"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path: 'None' given"),
        ({"base_model_name_or_path": "/nowhere/base"}, "base_model_name_or_path: /nowhere/base: no such folder"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
        ({"trainable_token_indices": [3, 10**12]}, "trainable_token_indices"),
        ({"trainable_token_indices": {"wpe": [3]}}, "'wpe' is no table of this model"),
    ],
)
def test_fields_that_ask_for_what_is_not_computed_here_are_refused_by_name(fields, said, damaged):
    with pytest.raises(ConfigError, match=said):
        open_ours(damaged(**fields))


def test_all_fields_that_are_wrong_are_told_at_once(damaged):
    with pytest.raises(ConfigError) as error:
        open_ours(damaged(bias="all", lora_bias=True, r=0))
    assert all(f"\n  {key}: " in str(error.value) for key in ("bias", "lora_bias", "r"))


def test_all_tensors_that_are_wrong_are_told_at_once_before_weights_are_read(damaged, base, tmp_path):
    folder = damaged(
        {
            f"{Q0}.lora_A.weight": None,
            f"{Q0}.lora_B.weight": np.zeros((7, 3), np.float32),
            "base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight": np.zeros((3, 48), np.float32),
            "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight": np.full((3, 36), np.nan, np.float32),
        }
    )
    with pytest.raises(ConfigError) as error:
        open_ours(folder)
    said = str(error.value)
    assert re.search(rf"{folder}/adapter_model.safetensors: {Q0}.lora_A.weight is missing, expected with shape", said)
    assert re.search(rf"{Q0}.lora_B.weight has shape \[7, 3\], expected \[\d+, 3\]", said)
    assert "layers.1.self_attn.k_proj.lora_A.weight [3, 48] is extra" in said


def test_numbers_that_are_none_are_refused_with_their_place(damaged):
    name = f"{Q0}.lora_B.weight"
    held = tensors(damaged())[name]
    held[2, 1] = np.inf
    with pytest.raises(ConfigError, match=re.escape(f"{name} holds inf at [2, 1]")):
        open_ours(damaged({name: held}))


def test_another_rank_than_the_config_gives_is_refused(damaged):
    with pytest.raises(ConfigError, match=r"has shape \[3, \d+\], expected \[4, \d+\] \(adapter_config.json gives"):
        open_ours(damaged(r=4))


def test_an_adapter_of_another_model_is_refused_with_all_that_does_not_fit(sound, base, damaged):
    with pytest.raises(ConfigError, match="does not fit its base model") as error:
        open_ours(damaged(base_model_name_or_path=str(base("gpt2"))))
    assert "its targets name nothing in this model" in str(error.value) and "is extra" in str(error.value)


def test_layers_and_exclusions_are_those_of_peft(base, tmp_path):
    options = {
        "target_modules": r".*\.(q_proj|v_proj|down_proj)",
        "exclude_modules": r".*layers\.0\.mlp.*",
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 5},
        "alpha_pattern": {"v_proj": 11},
    }
    for number, given in enumerate(
        (options, {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"})
    ):
        theirs = peft_adapter(base("llama"), tmp_path / str(number), **given)
        imported = open_ours(tmp_path / str(number))
        tokens = some_tokens(imported.decoder_config.vocab_size)
        found = adapters.our_logits(imported, load_weights(imported, one_device(), seed=9), tokens)
        assert apart(found, adapters.their_logits(theirs, tokens)) < 1e-5


def test_a_table_that_was_trained_whole_is_refused(damaged, base):
    table = safetensors.numpy.load_file(base("llama") / "model.safetensors")["model.embed_tokens.weight"] + 1
    with pytest.raises(ConfigError, match="embed_tokens.weight .* is not the base's table"):
        open_ours(damaged({"base_model.model.model.embed_tokens.weight": table}))


def test_lora_and_random_weights_go_with_no_adapter_folder(sound):
    with pytest.raises(ConfigError, match=r"lora: given, but model.path .* is an adapter"):
        open_ours(sound, {"rank": 2})
    with pytest.raises(ConfigError, match=r"model.weights: random, but model.path .* is an adapter"):
        open_ours(sound, weights="random")


def test_an_adapter_is_no_base(sound, damaged):
    with pytest.raises(ConfigError, match="base_model_name_or_path: .* an adapter itself"):
        open_ours(damaged(base_model_name_or_path=str(sound)))


def test_pickled_and_broken_files_are_refused(damaged):
    folder = damaged()
    (folder / "adapter_model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ConfigError, match="adapter_model.safetensors"):
        open_ours(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match="adapter_model.safetensors: no such file"):
        open_ours(folder)
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match="pickled"):
        open_ours(folder)


def test_an_export_replaces_neither_its_base_nor_the_adapter_that_it_was_read_from(sound, base):
    imported = open_ours(sound)
    weights = load_weights(imported, one_device(), seed=9)
    for target in (sound, base("llama")):
        with pytest.raises(ConfigError, match="would replace the model"):
            exported(imported, weights, target)


def test_dropout_is_that_of_the_file_where_all_its_maps_can_have_one(base, tmp_path):
    peft_adapter(base("llama_untied"), tmp_path / "one", target_modules=["q_proj"], lora_dropout=0.25)
    assert open_ours(tmp_path / "one").lora.dropout == 0.25
    peft_adapter(base("llama_untied"), tmp_path / "two", target_modules=["q_proj", "lm_head"], lora_dropout=0.25)
    opened = open_ours(tmp_path / "two")
    assert opened.lora.dropout == 0 and any("lora_dropout 0.25" in note for note in opened.notes)


def test_padded_ranks_stay_zero_when_an_adapter_is_read(base, tmp_path):
    pretrained = open_ours(base("llama"), UNEVEN)
    weights = random_adapters(pretrained)
    again = load_weights(open_ours(exported(pretrained, weights, tmp_path / "ours")), one_device(), seed=9)
    a = np.asarray(variables_of(again)["layers.mlp.up_proj.adapter.a"][...])
    assert a.shape[-1] == 3 and a[0].all() and a[1, ..., :2].all() and not a[1, ..., 2:].any()
