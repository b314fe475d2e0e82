"""Numbers of a model's files that nobody trains (a router's correction, constants of an activation): runs keep them;
and experts for all tokens, which have adapters and four bits like any MLP."""

import json

import adapters
import numpy as np
import pytest
import safetensors.numpy

from jaxsft.config import LoraConfig, ModelConfig, OptimConfig
from jaxsft.config_files import load_config
from jaxsft.folders.pretrained import load_frozen, load_weights, open_model, open_tokenizer
from jaxsft.folders.weights.stored import SafeTensor
from jaxsft.train import train
from jaxsft.training.memory import where_bytes_go

pytest.importorskip("torch")
pytest.importorskip("transformers")

KEPT = {"minimax_m2": ("e_score_correction_bias",), "apertus": ("act_fn.beta", "act_fn.eps")}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SIZES = {"hidden_size": 64, "intermediate_size": 64, "max_position_embeddings": 512}
SHARED = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 128, "num_attention_heads": 8}


@pytest.fixture(scope="module")
def make_folder(tiny_model, tmp_path_factory):
    """`make_folder(name, **changes)`: a random model of transformers, with the tokenizer of the tiny model."""

    def make(name, **changes):
        folder = tmp_path_factory.mktemp(name) / "model"
        vocab_size = json.loads((tiny_model / "config.json").read_text())["vocab_size"]
        adapters.make_base(name, folder, vocab_size=vocab_size, **SIZES, **changes)
        for file in TOKENIZER_FILES:
            if (tiny_model / file).exists():
                (folder / file).write_bytes((tiny_model / file).read_bytes())
        return folder

    return make


def export_of(model, tiny_config, run_dir, *overrides):
    given = [f"model.path={model}", "model.weights=pretrained", f"run_dir={run_dir}", "train.steps=2", *overrides]
    assert train(load_config(tiny_config, given)) == 0
    return run_dir / "export"


@pytest.mark.parametrize("name", KEPT)
def test_a_run_of_all_weights_exports_them_unchanged_and_nothing_else(name, make_folder, tiny_config, tmp_path):
    model = make_folder(name)
    before, after = (
        safetensors.numpy.load_file(folder / "model.safetensors")
        for folder in (model, export_of(model, tiny_config, tmp_path / "run"))
    )
    assert before.keys() == after.keys()
    same = {tensor for tensor in before if np.array_equal(before[tensor], after[tensor])}
    assert same and same == {tensor for tensor in before if tensor.endswith(KEPT[name])}


def test_an_expert_for_all_tokens_has_adapters_beside_codes_of_four_bits(make_folder, tiny_config, tmp_path):
    options = ["lora.rank=2", "model.quantize=nf4"]
    export = export_of(make_folder("qwen2_moe", **SHARED), tiny_config, tmp_path / "run", *options)
    trained = safetensors.numpy.load_file(export / "adapter_model.safetensors")
    of_shared = {name: each for name, each in trained.items() if "shared_expert" in name and "lora_B" in name}
    assert len(of_shared) == 2 * 3 and all(np.any(each) for each in of_shared.values())


OF_RUNS = {
    "all trained": ({}, {}),
    "random": ({}, {"weights": "random"}),
    "adapters": ({"lora": {"rank": 2, "targets": ["attention"], "dora": True}}, {}),
    "adapters on four bits": ({"lora": {"rank": 2, "targets": ["attention"]}}, {"quantize": "nf4"}),
    "last layer": ({"only": [r"layers\.1\..*"]}, {}),
}


@pytest.mark.parametrize("run", OF_RUNS)
@pytest.mark.parametrize("name", KEPT)
def test_a_resumed_run_reads_what_is_not_trained_and_no_more(name, run, make_folder, monkeypatch):
    trained, options = OF_RUNS[run]
    config = ModelConfig(path=str(make_folder(name)), remat="none", **options)
    lora = LoraConfig(**trained["lora"]) if "lora" in trained else None
    pretrained = open_model(config, open_tokenizer(config), lora, trained.get("only"))
    _, expected = pretrained.model.split(load_weights(pretrained, adapters.one_device(), seed=3))
    read = set()
    whole_read = SafeTensor.read

    def counted(tensor, rows, columns):
        read.add(tensor.offset)
        return whole_read(tensor, rows, columns)

    monkeypatch.setattr(SafeTensor, "read", counted)
    adapters.assert_same_state(load_frozen(pretrained, adapters.one_device(), seed=3), expected)
    if run == "all trained":
        tensors = pretrained.stored.tensors
        assert read == {tensors[each].offset for each in tensors if each.endswith(KEPT[name])}
        assert len(read) == len(KEPT[name]) * len(pretrained.decoder_config.layers)


@pytest.mark.parametrize("name", KEPT)
def test_adapters_are_advised_though_some_numbers_are_never_trained(name, make_folder):
    config = ModelConfig(path=str(make_folder(name)))
    for lora in (None, LoraConfig(rank=2)):
        model = open_model(config, open_tokenizer(config), lora).model
        table = where_bytes_go(model, OptimConfig(), adapters.one_device(), rows=2, length=16, num_microbatches=1)
        advised = {term.name: term.lowered_by for term in table.terms}
        assert ("lora.rank" in advised["optimizer"]) == (lora is None)
        assert ("model.quantize" in advised["frozen"]) == (lora is not None)
