"""Runs that train adapters: what they end with, going on from there, and the models that others make of it."""

import io
import json
import shutil

import adapters
import jax
import numpy as np
import pytest
import safetensors.numpy
from adapters import apart

import jaxsft
from jaxsft.answers.converse import converse
from jaxsft.answers.generate import Sampling
from jaxsft.cli import main
from jaxsft.config import ConfigError, LoraConfig, ModelConfig
from jaxsft.config_files import load_config
from jaxsft.folders.pretrained import export_model, load_weights, open_model, open_tokenizer
from jaxsft.train import train

pytest.importorskip("torch")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def base(tiny_model, tmp_path_factory):
    """A whole model folder, with random weights."""
    folder = tmp_path_factory.mktemp("base") / "model"
    config = ModelConfig(path=str(tiny_model), weights="random")
    tokenizer = open_tokenizer(config)
    pretrained = open_model(config, tokenizer)
    export_model(pretrained, tokenizer, load_weights(pretrained, adapters.one_device(), seed=0), folder)
    return folder


def config_of(tiny_config, model, run_dir, *overrides):
    given = [f"model.path={model}", "model.weights=pretrained", "train.steps=4", "checkpoint.every=2", "eval.every=2"]
    return load_config(tiny_config, [*given, "checkpoint.keep=9", f"run_dir={run_dir}", *overrides])


LORA = ("lora.rank=4", "lora.dropout=0.1")


@pytest.fixture(scope="module")
def lora_run(tiny_config, base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "lora"
    assert train(config_of(tiny_config, base, folder, *LORA)) == 0
    return folder


def eval_losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}


def logits(folder, tokens):
    """Of a folder, here."""
    model = jaxsft.load_model(folder)
    batch = jaxsft.batch.Batch(
        tokens, tokens, np.ones(tokens.shape, np.float32), np.ones_like(tokens), np.tile(np.arange(20), (8, 1))
    )
    with jax.set_mesh(model.mesh):
        return np.asarray(jax.jit(lambda p: model.logits(p, model.hidden(p, batch)))(model.params))


TOKENS = np.random.default_rng(0).integers(0, 256, (8, 20)).astype(np.int32)


def test_a_run_ends_with_a_folder_that_peft_opens_by_itself(lora_run, base, capsys):
    export = lora_run / "export"
    names = {path.name for path in export.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert not {"config.json", "model.safetensors"} & names
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(export).eval()
    assert apart(adapters.their_logits(theirs, TOKENS), logits(export, TOKENS)) < 1e-5
    assert apart(logits(base, TOKENS), logits(export, TOKENS)) > 1e-3
    assert main(["verify", str(lora_run)]) == 0 and main(["verify", str(export)]) == 0
    assert "DAMAGED" not in capsys.readouterr().out


def test_training_goes_on_from_an_adapter_as_it_is(lora_run, tiny_config, tmp_path, capsys):
    config = config_of(tiny_config, lora_run / "export", tmp_path / "more", "train.steps=2")
    assert train(config) == 0
    assert eval_losses(tmp_path / "more")[0] == pytest.approx(eval_losses(lora_run)[4], rel=1e-6)
    assert eval_losses(tmp_path / "more")[2] != eval_losses(lora_run)[4]
    settings = [
        json.loads((each / "export" / "adapter_config.json").read_text()) for each in (lora_run, tmp_path / "more")
    ]
    assert settings[0] == settings[1] and settings[0]["lora_dropout"] == 0.1
    # Started again, it finds that it is done.
    assert train(config) == 0
    assert "this run is finished" in capsys.readouterr().out


def test_an_adapter_is_evaluated_and_talked_to(lora_run, tiny_config, tmp_path, capsys, monkeypatch):
    arguments = [f"model.path={lora_run / 'export'}", "model.weights=pretrained", f"run_dir={tmp_path / 'none'}"]
    assert main(["evaluate", str(tiny_config), *arguments]) == 0
    assert f"{eval_losses(lora_run)[4]:.4f}" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    converse(str(lora_run / "export"), system=None, sampling=Sampling(0.0, 1.0, 0), max_new_tokens=4)
    assert "2 layers" in capsys.readouterr().out


def test_any_checkpoint_is_exported_with_its_adapter_beside_or_in_its_weights(lora_run, capsys, tmp_path):
    assert main(["export", str(lora_run), "--step", "2"]) == 0
    saved = lora_run / "export-step-2"
    assert (saved / "adapter_config.json").exists() and apart(
        logits(saved, TOKENS), logits(lora_run / "export", TOKENS)
    ) > 1e-4
    assert main(["export", str(lora_run), "--step", "best", "--out", str(tmp_path / "best")]) == 0
    losses = eval_losses(lora_run)
    best = min((2, 4), key=losses.__getitem__)
    expected = (saved if best == 2 else lora_run / "export") / "adapter_model.safetensors"
    assert (tmp_path / "best" / "adapter_model.safetensors").read_bytes() == expected.read_bytes()
    assert main(["export", str(lora_run), "--merge-lora"]) == 0
    merged = lora_run / "export-merged"
    theirs = adapters.their_logits(adapters.models.load_theirs(merged), TOKENS)
    assert apart(theirs, logits(lora_run / "export", TOKENS)) < 1e-5
    assert main(["export", str(lora_run), "--step", "3"]) == 1
    assert "no finished checkpoint of step 3; there are [2, 4]" in capsys.readouterr().err
    assert main(["export", str(tmp_path)]) == 1
    assert "not the folder of a run" in capsys.readouterr().err


def test_a_run_of_all_weights_is_exported_too_and_has_nothing_to_merge(tiny_config, base, tmp_path, capsys):
    assert train(config_of(tiny_config, base, tmp_path / "run", "train.steps=2", "data.eval={}", "eval={}")) == 0
    before = (tmp_path / "run" / "export" / "model.safetensors").read_bytes()
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert main(["export", str(tmp_path / "run"), "--merge-lora"]) == 1
    assert "has no adapters" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "run"), "--step", "best"]) == 1
    assert "no checkpoint has a held-out loss" in capsys.readouterr().err


def test_what_is_exported_of_a_schedule_free_run_is_what_it_evaluates(tiny_config, base, tmp_path):
    keys = ("optim.name=schedule_free_adamw", "optim.schedule=constant", "data.eval={}", "eval={}")
    assert train(config_of(tiny_config, base, tmp_path / "run", *keys)) == 0
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    ended, again = (folder / "model.safetensors" for folder in (tmp_path / "run" / "export", tmp_path / "out"))
    assert ended.read_bytes() == again.read_bytes()


def test_adapters_go_on_and_out_beside_the_weights_that_they_were_trained_on_alone(tiny_config, base, tmp_path, capsys):
    model, run = tmp_path / "model", tmp_path / "run"
    shutil.copytree(base, model)
    assert train(config_of(tiny_config, model, run, *LORA, "train.steps=2")) == 0
    tensors = safetensors.numpy.load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    safetensors.numpy.save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="beside other frozen weights"):
        train(config_of(tiny_config, model, run, *LORA))
    for words in (["--merge-lora"], []):
        assert main(["export", str(run), *words, "--out", str(tmp_path / "out")]) == 1
        assert "beside other frozen weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_adapter_folder_goes_with_no_choice_of_weights(lora_run):
    config = ModelConfig(path=str(lora_run / "export"))
    with pytest.raises(ConfigError, match="train.only: given"):
        open_model(config, open_tokenizer(config), only=["norms"])


def opened(folder, lora=None, *, chat_template=None, **model):
    config = ModelConfig(path=str(folder), remat="none", **model)
    tokenizer = open_tokenizer(config, chat_template)
    return tokenizer, open_model(config, tokenizer, lora)


def test_adapters_on_random_weights_are_exported_in_them(tiny_model, tmp_path):
    tokenizer, pretrained = opened(tiny_model, LoraConfig(rank=2), weights="random")
    weights = adapters.random_adapters(pretrained)
    export_model(pretrained, tokenizer, weights, tmp_path / "out")
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    theirs = adapters.their_logits(adapters.models.load_theirs(tmp_path / "out"), TOKENS)
    assert apart(theirs, adapters.our_logits(pretrained, weights, TOKENS)) < 1e-5


@pytest.mark.parametrize("vocab_size", [264, 261])
def test_tokens_that_a_template_adds_come_with_their_rows(vocab_size, base, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": vocab_size}
    (folder / "config.json").write_text(json.dumps(config))
    stored = safetensors.numpy.load_file(folder / "model.safetensors")
    stored["model.embed_tokens.weight"] = stored["model.embed_tokens.weight"][:vocab_size]
    safetensors.numpy.save_file(stored, folder / "model.safetensors", {"format": "pt"})

    tokenizer, pretrained = opened(folder, LoraConfig(rank=2), chat_template="chatml")
    weights = adapters.random_adapters(pretrained)
    export = tmp_path / "export"
    export_model(pretrained, tokenizer, weights, export)
    ids = json.loads((export / "adapter_config.json").read_text())["trainable_token_indices"]["embed_tokens"]
    assert len(ids) == 2
    tokens = TOKENS.copy()
    tokens[:, ::3], tokens[:, 1::5] = ids
    ours = adapters.our_logits(pretrained, weights, tokens)
    theirs = adapters.their_logits(peft.AutoPeftModelForCausalLM.from_pretrained(export).eval(), tokens)
    assert apart(theirs[..., : ours.shape[-1]], ours) < 1e-5
    export_model(pretrained, tokenizer, weights, tmp_path / "merged", merge=True)
    assert apart(adapters.their_logits(adapters.models.load_theirs(tmp_path / "merged"), tokens), ours) < 1e-5

    # It goes on without a word of the template, which is in the folder.
    again, imported = opened(export)
    assert again.tokenizer.chat_template == tokenizer.tokenizer.chat_template and again.stops == tokenizer.stops
    adapters.assert_same_state(load_weights(imported, adapters.one_device(), seed=9), weights)
    with pytest.raises(ConfigError, match=r"embed_tokens.*tokens that data.chat_template adds"):
        opened(folder, LoraConfig(rank=2, targets=["embed_tokens"]), chat_template="chatml")
