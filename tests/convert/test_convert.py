"""Configs of others become ours: what each key becomes, that none is lost, and that nothing is written over."""

import dataclasses
import json
import math
import random
import re

import pytest
import yaml

from jaxsft import foreign_keys
from jaxsft.cli import _parser, main
from jaxsft.config import ConfigError
from jaxsft.config_files import config_keys, load_config
from jaxsft.convert.make import convert
from jaxsft.foreign_keys import COMMANDS, FOREIGN, OTHER_METHODS, SAME
from jaxsft.training.optim import make_schedule

TRL = {"model_name_or_path": "org/model", "dataset_name": "org/data", "max_length": 512}
AXOLOTL = {
    "base_model": "org/model",
    "datasets": [{"path": "org/data", "type": "chat_template"}],
    "sequence_len": 512,
    "learning_rate": 1e-4,
}
FACTORY = {"model_name_or_path": "org/model", "finetuning_type": "full", "dataset": "one", "template": "qwen3"}


@pytest.fixture
def made(tmp_path):
    """Converts a mapping."""

    def make(theirs, **more):
        (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(theirs, sort_keys=False))
        return convert(str(tmp_path / "theirs.yaml"), **more)

    return make


@pytest.fixture
def ours(made, tmp_path):
    """Converts a mapping to a `Config`."""

    def load(theirs):
        done = made(theirs)
        assert not done.missing, done.missing
        (tmp_path / "ours.yaml").write_text(done.text)
        return load_config(tmp_path / "ours.yaml")

    return load


@pytest.fixture(autouse=True)
def info(tmp_path):
    """LLaMA-Factory's table of datasets."""
    (tmp_path / "data").mkdir()
    table = {
        "one": {"file_name": "one.json"},
        "two": {
            "hf_hub_url": "org/two",
            "subset": "main",
            "split": "train",
            "formatting": "sharegpt",
            "columns": {"messages": "dialog", "system": "setting"},
            "tags": {"role_tag": "speaker", "content_tag": "says", "user_tag": "customer", "assistant_tag": "agent"},
        },
        "three": {"file_name": "three.jsonl", "columns": {"prompt": "question", "response": "answer"}},
    }
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(table))


def at(config, key):
    for part in key.split("."):
        config = config[int(part)] if part.isdigit() else getattr(config, part)
    return config


# The table.


def test_no_name_stands_twice_and_every_key_of_ours_exists():
    names = [name for row in foreign_keys._TAKEN for name in row[0].split()]
    names += [name for names in foreign_keys._NONE.values() for name in names.split()]
    assert len(names) == len(set(names)) == len(FOREIGN) > 1000
    sections = {"lora", "data.eval"}
    known = {key for key, *_ in config_keys()} | sections
    assert not [f.ours for f in FOREIGN.values() if f.ours and not set(f.ours.split(" and ")) <= known]
    assert all(f.ours or f.note for f in FOREIGN.values())


def test_every_field_of_trl_is_in_the_table():
    trl = pytest.importorskip("trl")
    for kind in (trl.SFTConfig, trl.ModelConfig, trl.ScriptArguments, trl.DatasetMixtureConfig):
        fields = {field.name for field in dataclasses.fields(kind)}
        assert fields <= FOREIGN.keys() | SAME, fields - FOREIGN.keys() - SAME


def test_the_json_of_an_sft_config_is_read_and_every_key_is_accounted_for(tmp_path):
    trl = pytest.importorskip("trl")
    config = trl.SFTConfig(
        output_dir="run", max_length=256, packing=True, assistant_only_loss=True, report_to="wandb", use_cpu=True,
        bf16=False, warmup_steps=0.1, neftune_noise_alpha=5,
    )  # fmt: skip
    (tmp_path / "args.json").write_text(config.to_json_string())
    done = convert(str(tmp_path / "args.json"))
    keys = json.loads(config.to_json_string()).keys()
    assert done.counts["unknown"] == 0 and sum(done.counts.values()) == len(keys)
    said = " ".join(done.report.split())
    assert not [name for name in keys if name not in said]
    assert [sentence.split(":")[0] for sentence in done.missing] == ["model.path", "data.train"]
    tree = yaml.safe_load(done.text)
    assert tree["data"] == {
        "seq_len": 256, "packing": True, "overlong": "truncate", "train_on": "assistant"
    }  # fmt: skip
    assert tree["loss"]["neftune_alpha"] == 5 and tree["log"]["to"] == ["wandb"]


# What each key becomes.


@pytest.mark.parametrize(
    ("base", "theirs", "expected"),
    [
        (
            TRL,
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8},
            {"train.batch_size": 16, "train.microbatch_size": 2, "train.epochs": 3.0, "optim.schedule": "linear"},
        ),
        (
            TRL,
            {},
            {"train.batch_size": 8, "optim.warmup_ratio": 0.0, "data.packing": False, "data.overlong": "truncate"},
        ),
        (TRL, {"max_steps": 50, "warmup_steps": 5}, {"train.steps": 50, "optim.warmup_steps": 5}),
        (TRL, {"max_steps": -1, "num_train_epochs": 2}, {"train.steps": None, "train.epochs": 2}),
        (TRL, {"optim": "paged_adamw_8bit", "adam_beta2": 0.95}, {"optim.name": "adamw8bit", "optim.beta2": 0.95}),
        (TRL, {"optim": "lion_32bit"}, {"optim.name": "lion", "optim.beta2": 0.999}),
        (TRL, {"optim": "adafactor", "adam_beta2": 0.95}, {"optim.name": "adafactor"}),
        (AXOLOTL, {"optimizer": "schedule_free_adamw"}, {"optim.schedule": "cosine"}),
        (TRL, {"optim": "sgd", "max_grad_norm": 0}, {"optim.momentum": 0.0, "optim.clip_norm": None}),
        (TRL, {"optim": "rmsprop"}, {"optim.name": "adamw"}),
        (TRL, {"lr_scheduler_type": "constant", "warmup_ratio": 0.1}, {"optim.warmup_steps": 0}),
        (
            TRL,
            {
                "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr": 1e-6},
                "learning_rate": "1e-5",
            },
            {"optim.schedule": "cosine", "optim.final_ratio": 0.1, "optim.learning_rate": 1e-5},
        ),
        (
            TRL,
            {"dataset_config": "main", "dataset_train_split": "train[:9%]"},
            {"data.train.0.path": "org/data@main:train[:9%]"},
        ),
        (TRL, {"eval_strategy": "steps", "eval_steps": 20}, {"eval.every": 20, "data.eval": "org/data:test"}),
        (TRL, {"save_steps": 0.5, "max_steps": 100}, {"checkpoint.every": 50}),
        (TRL, {"completion_only_loss": False}, {"data.train_on": "all"}),
        (TRL, {"use_peft": True}, {"lora.rank": 16, "lora.alpha": 32, "lora.targets": ["q_proj", "v_proj"]}),
        (TRL, {"use_peft": True, "lora_target_modules": "all-linear", "load_in_4bit": True}, {"model.quantize": "nf4"}),
        (TRL, {"lora_r": 4, "load_in_8bit": True}, {"lora": None, "model.quantize": "none"}),
        (TRL, {"dtype": "bfloat16"}, {"model.param_dtype": "bfloat16"}),
        (TRL, {"dtype": "bfloat16", "use_peft": True}, {"model.param_dtype": "float32"}),
        (TRL, {"loss_type": "dft", "label_smoothing_factor": 0.1}, {"loss.dft": True, "loss.label_smoothing": 0.0}),
        (TRL, {"report_to": ["wandb", "mlflow"]}, {"log.to": ["wandb"]}),
        (
            {"model_name_or_path": "org/model"},
            {
                "datasets": [
                    {"path": "org/a", "fraction": 0.3},
                    {"path": "json", "data_files": "b.jsonl", "fraction": 0.7},
                ]
            },
            {"data.train.0.weight": 0.3, "data.train.1.path": "b.jsonl", "data.seq_len": 1024},
        ),
        (
            {"model_name_or_path": "org/model"},
            {
                "dataset_mixture": {
                    "datasets": [{"id": "org/a", "config": "c", "weight": 0.5}, {"id": "org/b", "split": "x+y"}]
                }
            },
            {"data.train.0.path": "org/a@c", "data.train.0.epochs": 0.5, "data.train.2.path": "org/b:y"},
        ),
        (
            AXOLOTL,
            {"micro_batch_size": 4, "gradient_accumulation_steps": 2, "optimizer": "muon", "num_epochs": 4},
            {"train.batch_size": 8, "optim.name": "muon", "train.epochs": 4, "optim.schedule": "cosine"},
        ),
        (AXOLOTL, {"micro_batch_size": 4, "batch_size": 16}, {"train.batch_size": 16, "train.microbatch_size": 4}),
        (AXOLOTL, {}, {"optim.warmup_ratio": 0.03, "train.batch_size": 1, "data.train_on": "assistant"}),
        (
            AXOLOTL,
            {"val_set_size": 0.1},
            {"data.train.0.path": "org/data:train[:90%]", "data.eval": "org/data:train[90%:]"},
        ),
        (AXOLOTL, {"train_on_inputs": True, "sample_packing": True}, {"data.train_on": "all", "data.packing": True}),
        (AXOLOTL, {"excess_length_strategy": "raise"}, {"data.overlong": "error"}),
        (AXOLOTL, {"chat_template": "tokenizer_default_fallback_chatml"}, {"data.chat_template": "chatml"}),
        (AXOLOTL, {"chat_template": "jinja", "chat_template_jinja": "t.jinja"}, {"data.chat_template": "t.jinja"}),
        (AXOLOTL, {"special_tokens": {"eos_token": "<|im_end|>"}}, {"data.set_eos": True}),
        (AXOLOTL, {"datasets": [{"path": "org/data", "type": "alpaca"}]}, {"data.chat_template": "stanford_alpaca"}),
        (
            AXOLOTL,
            {
                "datasets": [
                    {
                        "path": "json",
                        "data_files": ["a.jsonl"],
                        "ds_type": "json",
                        "type": "chat_template",
                        "field_messages": "dialog",
                        "message_property_mappings": {"role": "speaker", "content": "value"},
                        "roles": {"assistant": ["gpt", "agent"], "user": ["customer"]},
                        "message_field_training": "keep",
                        "roles_to_train": ["agent", "tool"],
                        "train_on_eos": "last",
                    },
                    {"path": "org/text", "type": "completion", "field": "body", "name": "en", "split": "train"},
                    {"path": "org/own", "type": {"field_instruction": "q", "field_output": "a"}},
                ]
            },
            {
                "data.train.0.path": "a.jsonl",
                "data.train.0.columns": {"messages": "dialog"},
                "data.train.0.keys": {"speaker": "role", "keep": "train"},
                "data.train.0.roles": {"agent": "assistant", "customer": "user"},
                "data.train.1.path": "org/text@en",
                "data.train.1.format": "text",
                "data.train.1.columns": {"text": "body"},
                "data.train.2.columns": {"instruction": "q", "output": "a"},
                "data.train_on": ["agent", "tool"],
                "data.train_stop": "last",
            },
        ),
        (
            AXOLOTL,
            {
                "adapter": "qlora",
                "lora_r": 8,
                "lora_target_linear": True,
                "peft_use_dora": True,
                "loraplus_lr_ratio": 16,
            },
            {
                "model.quantize": "nf4",
                "lora.targets": ["all_linear"],
                "lora.dora": True,
                "optim.groups.0.learning_rate_factor": 16,
            },
        ),
        (
            AXOLOTL,
            {"adapter": "lora", "lora_r": 8, "lora_target_modules": r"model.layers.[\d]+.(mlp|self_attn).(up|q)_proj"},
            {"lora.targets": [r"layers.[\d]+.(mlp|self_attn).(up|q)_proj"]},
        ),
        (AXOLOTL, {"adapter": "lora", "lora_r": 8, "lora_model_dir": "./old"}, {"model.path": "./old", "lora": None}),
        (
            AXOLOTL,
            {"wandb_project": "p", "use_tensorboard": True},
            {"log.to": ["wandb", "tensorboard"], "log.project": "p"},
        ),
        (
            AXOLOTL,
            {"dp_replicate_size": 2, "tensor_parallel_size": 4, "dp_shard_size": 1},
            {"mesh.data": 2, "mesh.tensor": 4},
        ),
        (
            AXOLOTL,
            {"pretraining_dataset": [{"path": "org/web"}], "datasets": None, "max_steps": 9},
            {"data.stream": True},
        ),
        (FACTORY, {}, {"train.batch_size": 8, "optim.learning_rate": 5e-5, "data.seq_len": 2048, "lora": None}),
        (
            FACTORY,
            {"dataset": "two,three", "mix_strategy": "interleave_under", "interleave_probs": "0.5,0.5"},
            {
                "data.train.0.path": "org/two@main",
                "data.train.0.columns": {"messages": "dialog", "system": "setting"},
                "data.train.0.keys": {"speaker": "role", "says": "content"},
                "data.train.0.roles": {"customer": "user", "agent": "assistant"},
                "data.train.1.columns": {"instruction": "question", "output": "answer"},
                "data.train.1.weight": 0.5,
                "data.mixture_ends": "first",
            },
        ),
        (
            FACTORY,
            {"finetuning_type": "lora", "lora_target": "q_proj,v_proj"},
            {"lora.rank": 8, "lora.targets": ["q_proj", "v_proj"]},
        ),
        (
            FACTORY,
            {"finetuning_type": "lora", "quantization_bit": 4, "lora_alpha": 4},
            {"model.quantize": "nf4", "lora.alpha": 4},
        ),
        (FACTORY, {"mask_history": True, "neat_packing": True}, {"data.train_on": "last_turn", "data.packing": True}),
        (FACTORY, {"pure_bf16": True, "use_muon": True}, {"model.param_dtype": "bfloat16", "optim.name": "muon"}),
        (FACTORY, {"eval_dataset": "three", "eval_strategy": "steps", "eval_steps": 7}, {"eval.every": 7}),
        (
            {"model": "org/model", "model_class": "llm", "train_dataset": "org/data"},
            {"peft_config": {"name": "lora", "r": 4, "target_modules": "all"}, "quant_config": {"quantization_bit": 8}},
            {"lora.rank": 4, "model.quantize": "int8", "data.train.0.path": "org/data", "model.path": "org/model"},
        ),
    ],
)
def test_a_key_of_theirs_is_the_key_of_ours_that_says_the_same(ours, base, theirs, expected):
    config = ours(base | theirs)
    for key, value in expected.items():
        if key == "data.eval":
            assert config.data.eval["eval"].path == value
        else:
            assert at(config, key) == value, key


@pytest.mark.parametrize(
    ("theirs", "name"),
    [
        (r"model.layers.[\d]+.(mlp|self_attn).(up|q)_proj", "layers.3.mlp.up_proj"),
        (r"(model\.language_model\.layers\.\d+\.(mlp|self_attn)\.(up|down)_proj)", "layers.12.mlp.down_proj"),
        (r".*\.layers\.(3|7)\.self_attn\.(q|v)_proj", "layers.7.self_attn.v_proj"),
        (r"^language_model.model.layers.*q_proj$", "layers.0.self_attn.q_proj"),
    ],
)
def test_a_pattern_for_names_of_transformers_becomes_one_for_ours(ours, theirs, name):
    """PEFT holds it against the whole name, behind `model.` or `model.language_model.`; ours has nothing before it."""
    (pattern,) = ours(AXOLOTL | {"adapter": "lora", "lora_r": 8, "lora_target_modules": theirs}).lora.targets
    before = ["model.", "model.language_model.", "language_model.model."]
    assert any(re.fullmatch(theirs, f"{begin}{name}") for begin in before)
    assert re.fullmatch(pattern, name) and not re.fullmatch(pattern, name.replace("layers", "towers"))


def test_layers_and_experts_that_get_adapters_are_in_the_targets(ours):
    lora = AXOLOTL | {"adapter": "lora", "lora_r": 8, "lora_target_modules": ["q_proj"]}
    (pattern,) = ours(lora | {"peft_layers_to_transform": [0, 11]}).lora.targets
    names = [f"layers.{layer}.self_attn.{name}" for layer in (0, 1, 11, 110) for name in ("q_proj", "k_proj")]
    assert [name for name in names if re.fullmatch(pattern, name)] == [names[0], names[4]]
    assert ours(lora | {"lora_target_parameters": ["mlp.experts.down_proj"]}).lora.targets == ["q_proj", "mlp"]


@pytest.mark.parametrize(
    "theirs",
    [
        {"lr_scheduler_type": "linear", "warmup_steps": 3},
        {"lr_scheduler_type": "cosine", "warmup_steps": 0.1},
        {"lr_scheduler_type": "constant"},
        {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 4},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.2}},
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1e-5, "power": 1}, "warmup_steps": 2},
        {
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {"num_decay_steps": 10, "decay_type": "linear", "min_lr_ratio": 0.1},
        },
    ],
    ids=lambda theirs: theirs["lr_scheduler_type"],
)
def test_after_the_warm_up_the_rate_is_that_of_transformers_in_every_step(ours, theirs):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    steps = 40
    config = ours(TRL | theirs | {"learning_rate": 1e-4, "max_steps": steps})
    warmup = theirs.get("warmup_steps", 0)
    warmup = math.ceil(warmup * steps) if warmup < 1 else warmup
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    scheduler = transformers.get_scheduler(
        theirs["lr_scheduler_type"],
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=steps,
        scheduler_specific_kwargs=theirs.get("lr_scheduler_kwargs", {}),
    )
    schedule = make_schedule(config.optim, steps)
    for step in range(steps):
        if step >= warmup:
            assert float(schedule(step)) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-5, abs=1e-11), step
        optimizer.step()
        scheduler.step()


def test_what_we_tell_trl_in_a_comparison_comes_back_as_it_was(ours, tmp_path):
    from jaxsft.compare.trl_rows import MESSAGES, trl_arguments

    text = """
    model: {path: org/model}
    data: {train: org/data, seq_len: 512, packing: false, overlong: truncate}
    train: {batch_size: 12, microbatch_size: 4, steps: 50}
    optim: {learning_rate: 3.0e-4, schedule: wsd, decay_ratio: 0.3, final_ratio: 0.1, warmup_steps: 7, beta2: 0.95,
            weight_decay: 0.1, clip_norm: null}
    seed: 5
    """
    (tmp_path / "before.yaml").write_text(text)
    before = load_config(tmp_path / "before.yaml")
    names = {"model_name_or_path": "org/model", "dataset_name": "org/data"}
    after = ours(names | trl_arguments(before, MESSAGES, schedule_steps=50))
    ignored = {"run_dir"}
    assert after.model_dump(exclude=ignored) == before.model_dump(exclude=ignored)


# Nothing is lost.


def test_datasets_that_a_table_lacks_are_to_be_filled_in(made):
    done = made(FACTORY | {"dataset": "one,four", "eval_dataset": "five,three"})
    assert [sentence.split(": not in")[0] for sentence in done.missing] == ["data.train: four", "data.eval: five"]
    data = yaml.safe_load(done.text)["data"]
    assert data["train"].endswith("/data/one.json") and list(data["eval"]) == ["three"]
    nowhere = made(FACTORY | {"dataset_dir": "nowhere"})
    assert nowhere.missing == ["data.train: the files or hub ids of one, from their dataset_info.json"]


def test_a_key_that_nobody_knows_is_said_and_one_without_a_counterpart_too(made):
    done = made(AXOLOTL | {"full_finetune": True, "liger_rope": True, "flash_attention": None})
    assert "not known, and not taken:\n  full_finetune\n" in done.report
    assert "liger_rope: XLA fuses the step" in done.report and "not set, or off:\n  flash_attention" in done.report
    assert (done.counts["unknown"], done.counts["without"], done.counts["idle"]) == (1, 1, 1)


def taken(done, key="train"):
    """The sources of a config, each by its keys."""
    sources = yaml.safe_load(done.text)["data"][key]
    return [
        {"path": one} if isinstance(one, str) else one for one in ([sources] if isinstance(sources, str) else sources)
    ]


def said(done):
    return " ".join(done.report.split())


@pytest.fixture
def factory(made, tmp_path):
    """Converts with one dataset whose entry in `dataset_info.json` is this."""

    def make(entry, **more):
        (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"one": {"hf_hub_url": "org/one"} | entry}))
        return made(FACTORY | more)

    return make


def test_of_llama_factory_s_table_all_that_chooses_rows_is_taken_or_said(factory):
    done = factory({"split": "train+extra"}, eval_dataset="one")
    assert taken(done) == [{"path": "org/one"}, {"path": "org/one:extra"}]
    assert yaml.safe_load(done.text)["data"]["eval"] == {"one0": {"path": "org/one"}, "one1": {"path": "org/one:extra"}}
    done = factory({"num_samples": 100, "folder": "part", "script_url": "x.py"}, eval_dataset="one")
    assert taken(done) == [{"path": "org/one", "count": 100}]
    assert "num_samples is `count` here" in said(done) and "one: folder part: no part of a hub dataset" in said(done)
    assert "one: script_url of a dataset has no counterpart" in said(done)
    assert "num_samples of one is left out: held-out rows are all examined once" in said(done)
    done = factory({"num_samples": 100, "split": "a+b"})
    assert "num_samples 100 is left out" in said(done) and len(taken(done)) == 2
    done = factory({"hf_hub_url": None, "file_name": "one.json", "split": "train[:9]"})
    assert "the split train[:9] of a local folder or file is not chosen" in said(done)
    assert "datasets of the hub are named org/name here" in said(factory({"hf_hub_url": "gsm8k"}))


def test_shares_and_counts_do_not_meet_in_one_source(made, tmp_path):
    table = {"one": {"hf_hub_url": "org/one", "split": "a+b"}, "two": {"hf_hub_url": "org/two", "num_samples": 5}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(table))
    done = made(FACTORY | {"dataset": "one,two", "mix_strategy": "interleave_under", "interleave_probs": "0.6,0.4"})
    assert [source["weight"] for source in taken(done)] == [0.3, 0.3, 0.4]
    assert "num_samples of two is left out" in said(done) and "`count` here" not in said(done)


@pytest.mark.parametrize(
    ("base", "entry", "paths", "expected"),
    [
        (TRL, {"data_dir": "part"}, ["org/d"], "org/d: data_dir part: no part of a hub dataset is chosen"),
        (TRL, {"data_files": ["a.json", "b.json"]}, ["org/d"], "org/d: data_files a.json, b.json: no part"),
        (TRL, {"revision": "v2", "columns": ["a"]}, ["org/d"], "org/d: columns, revision of a dataset has no counter"),
        (TRL, {"path": "json", "data_dir": "rows", "data_files": "a.json"}, ["rows/a.json"], ""),
        (TRL, {"path": "json", "data_files": {"train": "a.json", "test": "b.json"}}, ["a.json"], "data_files of test"),
        (TRL, {"path": "json", "data_files": "a.json", "split": "train[:9]"}, ["a.json"], "the split train[:9] of a"),
        (TRL, {"path": "gsm8k", "name": "main"}, ["gsm8k"], "and the config main is left out"),
        (TRL, {"split": "a+b", "fraction": 0.5}, ["org/d:a", "org/d:b"], "its fraction is shared out equally"),
        (AXOLOTL, {"data_dir": "part"}, ["org/d"], "org/d: data_dir part: no part of a hub dataset is chosen"),
        (AXOLOTL, {"name": ["x", "y"], "split": "a"}, ["org/d@x:a", "org/d@y:a"], ""),
        (AXOLOTL, {"name": [], "split": []}, ["org/d"], ""),
        (AXOLOTL, {"shards": 4}, ["org/d"], "org/d: shards of a dataset has no counterpart"),
        (AXOLOTL, {"path": "./rows", "split": "b"}, ["./rows"], "the split b of a local folder or file"),
    ],
)
def test_of_a_list_of_datasets_all_that_chooses_rows_is_taken_or_said(made, base, entry, paths, expected):
    done = made(base | {"datasets": [{"path": "org/d"} | entry]})
    assert [source["path"] for source in taken(done)] == paths
    assert expected in said(done)


def test_of_splits_none_is_lost(made):
    done = made(TRL | {"dataset_test_split": "a+b", "eval_strategy": "steps", "eval_steps": 5})
    assert yaml.safe_load(done.text)["data"]["eval"] == {"eval0": "org/data:a", "eval1": "org/data:b"}
    done = made(
        {"model_name_or_path": "m", "dataset_mixer": {"o/a": 1}, "dataset_splits": ["train_a", "train_b", "test_a"]}
    )
    assert [source["path"] for source in taken(done)] == ["o/a:train_a", "o/a:train_b"]
    assert "of splits, test_a is left out: give data.eval" in said(done)


@pytest.mark.parametrize("name", ["../ds.yaml", "ABSOLUTE", "part/ds.yaml"])
def test_v1_s_rows_are_under_the_folder_under_which_their_file_was_found(tmp_path, monkeypatch, name):
    work = tmp_path / "work"
    (work / "part").mkdir(parents=True)
    monkeypatch.chdir(work)
    (work / "rows.jsonl").write_text("{}")
    file = tmp_path / "ds.yaml" if name == "ABSOLUTE" else work / name
    several = {
        "a": {"path": "rows.jsonl", "source": "local", "size": 7, "split": "train[:9]"},
        "b": {"path": "o/b", "split": "x+y", "weight": 2.0},
    }
    file.write_text(yaml.safe_dump(several))
    (work / "v1.yaml").write_text(
        yaml.safe_dump({"model": "org/model", "train_dataset": str(file) if name == "ABSOLUTE" else name})
    )
    done = convert("v1.yaml")
    assert taken(done) == [{"path": str(work / "rows.jsonl"), "count": 7}, {"path": "o/b:x"}, {"path": "o/b:y"}]
    assert "the split train[:9] of a local" in said(done) and "o/b: weight of a dataset has no counterpart" in said(
        done
    )


def test_whatever_stands_in_an_entry_of_a_dataset_it_is_taken_or_one_error_says_why(made, factory):
    draw = random.Random(3)
    names = (
        "path", "name", "split", "data_files", "data_dir", "type", "roles", "columns", "tags", "subset", "folder",
        "num_samples", "file_name", "hf_hub_url", "fraction", "weight", "message_property_mappings", "field_messages",
    )  # fmt: skip
    nested = (*JUNK, {"user": [["x"]]}, {"role_tag": [1], "user_tag": {"a": 1}}, {"train": None}, {5: [None]})
    refused = 0
    for at in range(150):
        entry = {draw.choice(names): draw.choice(nested) for _ in range(4)}
        try:
            if at % 3 == 2:
                factory(json.loads(json.dumps(entry)))
            else:
                made((TRL, AXOLOTL)[at % 3] | {"datasets": [{"path": "org/d"} | entry]})
        except ConfigError:
            refused += 1
    assert refused < 140


def test_roles_that_are_no_texts_are_compared_as_texts(ours):
    config = ours(AXOLOTL | {"datasets": [{"path": "org/d", "roles": {"user": [["x"]], "assistant": [5]}}]})
    assert config.data.train[0].roles == {"['x']": "user", "5": "assistant"}


EARLY = {"early_stopping_patience": 3, "load_best_model_at_end": True}


@pytest.mark.parametrize(
    ("base", "theirs"),
    [
        (TRL, EARLY | {"eval_strategy": "steps", "eval_steps": 5}),
        (AXOLOTL, EARLY | {"eval_steps": 5, "val_set_size": 0.1}),
        (
            FACTORY,
            {"early_stopping_steps": 3, "load_best_model_at_end": True, "eval_dataset": "three", "eval_steps": 5},
        ),
    ],
)
def test_the_end_by_the_held_out_loss_and_the_best_checkpoint_are_taken(ours, made, base, theirs):
    config = ours(base | theirs)
    assert (config.eval.every, config.eval.patience, config.checkpoint.export) == (5, 3, "best")
    without = made(
        base | {name: value for name, value in theirs.items() if name not in ("eval_steps", "eval_strategy")}
    )
    tree = yaml.safe_load(without.text)
    assert "patience" not in tree.get("eval", {}) and "export" not in tree.get("checkpoint", {})
    assert "eval.every is not known" in said(without)
    no_rows = {name: value for name, value in theirs.items() if name not in ("val_set_size", "eval_dataset")}
    if base is not TRL:
        assert "export" not in yaml.safe_load(made(base | no_rows).text).get("checkpoint", {})


JUNK = (
    5, -1, 0, 1.5, "x", "", True, False, [], {}, [None], [5], [[]], {"a": 1}, [{"path": None}], [{"path": 5}], "{}",
    "nan", float("inf"), float("nan"), 10**400, "1e400", [["a"]], {"datasets": [5]}, {"datasets": 5}, "a,b",
    [{"path": "a/b", "type": {"field_input": 5}, "roles": 5, "message_property_mappings": 5, "data_files": 5}],
)  # fmt: skip


@pytest.mark.parametrize("base", [TRL, AXOLOTL, FACTORY], ids=["trl", "axolotl", "llama-factory"])
def test_whatever_stands_behind_any_key_each_is_accounted_for_or_one_error_says_why(made, base):
    draw = random.Random(len(base))
    names = sorted({*FOREIGN, *SAME} - {"model", "data"})
    refused = 0
    for _ in range(150):
        theirs = base | {draw.choice(names): draw.choice(JUNK) for _ in range(8)}
        try:
            done = made(theirs)
        except ConfigError:
            refused += 1
        else:
            # LLaMA-Factory's sections count by their keys.
            sections = [theirs[name] for name in ("peft_config", "quant_config", "optim_config") if name in theirs]
            inner = sum(len(one) - 1 for one in sections if isinstance(one, dict) and base is FACTORY)
            assert sum(done.counts.values()) == len(theirs) + inner
            assert isinstance(yaml.safe_load(done.text), dict)
    assert refused < 140


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        (TRL | {"beta": 0.1}, "beta: that is of preferences or rewards"),
        (AXOLOTL | {"rl": "dpo"}, "rl: dpo: supervised fine-tuning alone is trained here"),
        (FACTORY | {"stage": "dpo"}, "stage: dpo: supervised fine-tuning"),
        (FACTORY | {"finetuning_type": "oft"}, "finetuning_type: oft: full, LoRA and freezing"),
        (FACTORY | {"export_dir": "out"}, "export_dir: this is no config of a training"),
        (AXOLOTL | {"learning_rate": "fast"}, "learning_rate: fast given, expected a number"),
        (
            AXOLOTL | {"learning_rate": -1},
            "optim.learning_rate: -1 given; input should be greater than 0 (from learning_r",
        ),
        (AXOLOTL | {"micro_batch_size": 1.5}, "micro_batch_size: 1.5 given, expected a whole number"),
        (
            FACTORY | {"dataset": "one,two", "mix_strategy": "interleave_over", "interleave_probs": "0.5"},
            "interleave_probs: 1 shares given, for 2 datasets",
        ),
        (AXOLOTL | {"datasets": [5]}, "datasets: 5 given, expected a mapping with a path"),
        ({"compute_environment": "LOCAL_MACHINE"}, "a config of accelerate or DeepSpeed, of which nothing is needed"),
        ({"foo": 1, "bar": 2}, "no key of TRL, axolotl or LLaMA-Factory is in it; its keys are: bar, foo"),
        ({"seed": 1, "bf16": True}, "does not follow from its keys (bf16, seed): give --from trl or axolotl or"),
        ({"model": {"path": "m"}, "data": {"train": "d"}}, "this is a config of ours already: python run.py train"),
    ],
)
def test_what_is_no_config_of_a_fine_tuning_is_one_error(made, theirs, expected):
    with pytest.raises(ConfigError, match="theirs.yaml") as error:
        made(dict(sorted(theirs.items())))
    assert expected in str(error.value) and "\n" not in str(error.value)


# Files.

COMMAND = r"""
#!/bin/bash
export CUDA_VISIBLE_DEVICES=0
accelerate launch --config_file zero3.yaml trl/scripts/sft.py \
    --model_name_or_path org/model --dataset_name=org/data \
    --packing --use_peft --lora_target_modules q_proj v_proj \
    --learning-rate 2.0e-4 --eos_token '<|im_end|>' --no_remove_unused_columns  # and so on
"""
SCRIPT = """
import torch
from trl import SFTConfig, SFTTrainer
from peft import LoraConfig
NAME = "org/model"
rows = load_dataset("json", data_files="rows.jsonl", split="train")
arguments = SFTConfig(output_dir="out", max_length=LENGTH, packing=True, model_init_kwargs={"dtype": torch.bfloat16})
trainer = SFTTrainer(model=NAME, args=arguments, peft_config=LoraConfig(r=4, target_modules="all-linear"))
"""


def test_a_saved_command_line_is_read(tmp_path):
    (tmp_path / "run.sh").write_text(COMMAND)
    done = convert(str(tmp_path / "run.sh"))
    tree = yaml.safe_load(done.text)
    assert tree["model"]["path"] == "org/model" and tree["data"]["train"] == "org/data" and tree["data"]["set_eos"]
    assert tree["lora"] == {"rank": 16, "alpha": 32, "dropout": 0.05, "targets": ["q_proj", "v_proj"]}
    assert tree["optim"]["learning_rate"] == 2e-4 and not done.missing and sum(done.counts.values()) == 8


def test_a_command_line_goes_before_the_file_that_it_names(tmp_path):
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(TRL | {"learning_rate": 1e-4}))
    (tmp_path / "run.sh").write_text("trl sft --config sft.yaml --max_length 256")
    tree = yaml.safe_load(convert(str(tmp_path / "run.sh")).text)
    assert tree["data"]["seq_len"] == 256 and tree["optim"]["learning_rate"] == 1e-4
    (tmp_path / "run.sh").write_text("trl sft --config nowhere.yaml --max_length 256")
    with pytest.raises(ConfigError, match=r"run\.sh: --config .*nowhere\.yaml: no such file"):
        convert(str(tmp_path / "run.sh"))


def test_a_script_is_read_and_what_is_computed_in_it_is_said(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    done = convert(str(tmp_path / "train.py"))
    tree = yaml.safe_load(done.text)
    assert tree["model"]["path"] == "org/model" and tree["data"]["train"] == "rows.jsonl"
    assert tree["lora"]["rank"] == 4 and tree["lora"]["targets"] == ["all_linear"]
    assert done.missing == ["SFTConfig(max_length=LENGTH): no value that stands in the script"]


TRAINED = 'SFTTrainer(model="org/model", args=SFTConfig(output_dir="out"), train_dataset=rows)\n'


@pytest.mark.parametrize(
    ("line", "paths", "expected"),
    [
        (
            'rows = load_dataset("org/d", data_files="a.json", data_dir="part")',
            ["org/d"],
            "data_files a.json and data_dir",
        ),
        ('rows = load_dataset("org/d", revision="v1")', ["org/d"], "org/d: revision of a dataset has no counterpart"),
        ('rows = load_dataset("json", None, "part", "a.json")', ["part/a.json"], ""),
        (
            'rows = load_dataset("json", data_files="a.json", split="train[:9]")',
            ["a.json"],
            "split train[:9] of a local",
        ),
        ('rows = load_dataset("org/d", split="train").select(range(100))', ["org/d"], "rows by .select(range(100))"),
        ('rows = load_dataset("org/d")\nrows = rows.filter(keep)', ["org/d"], "rows by .filter(keep)"),
        ('rows = load_dataset("org/d")["extra"]', ["org/d:extra"], ""),
        ('rows = load_dataset("org/d", "c", split="a+b", token="hf_SECRET")', ["org/d@c:a", "org/d@c:b"], ""),
        ('rows = load_dataset("org/d")\nmore = load_dataset("org/e", split="x")', ["org/d"], "left out: org/e:x"),
    ],
)
def test_of_a_script_s_rows_all_that_chooses_them_is_taken_or_said(tmp_path, line, paths, expected):
    (tmp_path / "train.py").write_text(f"{line}\n{TRAINED}")
    done = convert(str(tmp_path / "train.py"))
    assert [source["path"] for source in taken(done)] == paths
    assert expected in said(done) and "SECRET" not in done.report + done.text


@pytest.mark.parametrize(
    "lines",
    [
        'tok = AutoTokenizer.from_pretrained("org/tok")\nmodel = AutoModelForCausalLM.from_pretrained("org/model")',
        'p = AutoProcessor.from_pretrained("org/p")\ntok = transformers.LlamaTokenizerFast.from_pretrained("org/tok")\n'
        'model = FastLanguageModel.from_pretrained(model_name="org/model")',
        'g = GenerationConfig.from_pretrained("org/g")\ntok = AutoTokenizer.from_pretrained("org/tok")\n'
        'teacher = AutoModel.from_pretrained("org/x")\n'
        'model = transformers.AutoModelForCausalLM.from_pretrained("org/model")',
    ],
)
def test_a_script_s_model_is_what_a_model_was_made_of_and_its_tokenizer_what_a_tokenizer_was(tmp_path, lines):
    (tmp_path / "a.py").write_text(f'{lines}\nSFTTrainer(model=model, args=SFTConfig(output_dir="out"))')
    model = yaml.safe_load(convert(str(tmp_path / "a.py")).text)["model"]
    assert model["path"] == "org/model" and model["tokenizer"] == "org/tok"


def test_a_tokenizer_alone_is_no_model(tmp_path):
    (tmp_path / "a.py").write_text('AutoTokenizer.from_pretrained("org/tok")\nSFTConfig("out", packing=True)')
    done = convert(str(tmp_path / "a.py"))
    tree = yaml.safe_load(done.text)
    assert tree["model"] == {"tokenizer": "org/tok"} and tree["run_dir"] == "out"
    assert done.missing[0].startswith("model.path: ")


@pytest.mark.parametrize(
    ("callback", "patience"), [("early_stopping_patience=3", 3), ("4", 4), ("", 1), ("early_stopping_threshold=0.1", 1)]
)
def test_a_script_s_early_stopping_is_eval_patience(tmp_path, callback, patience):
    (tmp_path / "a.py").write_text(
        f"ScriptArguments(dataset_name='org/d', dataset_test_split='test')\n"
        f"a = SFTConfig(output_dir='out', eval_strategy='steps', eval_steps=5)\n"
        f"SFTTrainer(model='org/m', args=a, callbacks=[EarlyStoppingCallback({callback})])"
    )
    assert yaml.safe_load(convert(str(tmp_path / "a.py")).text)["eval"] == {"every": 5, "patience": patience}


@pytest.mark.parametrize(
    ("word", "expected"), [("2025-30-12", "2025-30-12"), ("2025-12-30", "2025-12-30"), ("'? [a]'", "? [a]")]
)
def test_a_word_of_a_command_that_is_no_value_of_yaml_is_text(tmp_path, word, expected):
    (tmp_path / "run.sh").write_text(f"trl sft --model_name_or_path m --output_dir {word}")
    assert yaml.safe_load(convert(str(tmp_path / "run.sh")).text)["run_dir"] == expected


@pytest.mark.parametrize(
    "text", ["trl sft --config run.sh", "trl sft --config run.sh --x 'a: b: ['", "trl sft --config b.sh"]
)
def test_a_command_that_names_a_command_as_its_config_is_one_error(tmp_path, text):
    (tmp_path / "run.sh").write_text(text)
    (tmp_path / "b.sh").write_text("trl sft --config run.sh")
    with pytest.raises(ConfigError, match=r"(run|b)\.sh: (a mapping of keys is expected|not readable as YAML)"):
        convert(str(tmp_path / "run.sh"))


# Tokens.


def test_no_token_is_repeated(made, tmp_path):
    secret = {"hf_token": "hf_SECRET", "wandb_api_key": "SECRET", "my_password": "SECRET", "odd": "SECRET"}
    done = made(TRL | secret | {"datasets": [{"path": "org/d", "token": "hf_SECRET"}]})
    assert "SECRET" not in done.report + done.text
    assert "not known, and not taken: my_password, odd" in said(done)
    assert "hf_token, wandb_api_key: log in by" in said(done)
    with pytest.raises(ConfigError) as error:
        made(TRL | {"datasets": [{"hub_token": "hf_SECRET"}]})
    assert "SECRET" not in str(error.value)
    (tmp_path / "bad.yaml").write_text("base_model: m\nhf_token: hf_SECRET: x\n")
    with pytest.raises(ConfigError, match="not readable as YAML: .* in line 2, column 20") as error:
        convert(str(tmp_path / "bad.yaml"))
    assert "SECRET" not in str(error.value)
    (tmp_path / "a.py").write_text("SFTConfig(output_dir='o', hub_token=login('SECRET'), **{'a': get('SECRET')})")
    done = convert(str(tmp_path / "a.py"))
    assert "SECRET" not in done.report + done.text and "SFTConfig(hub_token=...)" in done.missing[-2]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.yaml", b"", "a mapping of keys is expected, but this file holds nothing"),
        ("a.yaml", b"- 1\n", "a mapping of keys is expected, but this file holds a list"),
        ("a.yaml", b"a: [", "not readable as YAML"),
        ("a.yaml", b"\xff\xfe\x00", "not readable as text"),
        ("a.json", b'{"a": ', "not readable as YAML"),
        ("a.yaml", b"a: " + b"[" * 5000, "not readable as YAML"),
        ("a.sh", b"echo hello", "no `trl sft` and no `...sft.py` in this command line"),
        ("a.sh", b"llamafactory-cli train x.yaml", "in this command line; give x.yaml itself"),
        ("a.yaml", b"a: &a [*a]", "its aliases stand for more values than a config has"),
        (
            "a.yaml",
            b"base_model: m\na0: &a0 [x,x,x,x,x,x,x,x,x]\n"
            + b"".join(b"a%d: &a%d [%s]\n" % (n, n, b",".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 9)),
            "its aliases stand for more values than a config has",
        ),
        ("a.sh", b"trl sft 'x", "not readable as a command line"),
        ("a.py", b"def f(:", "not readable as Python"),
        ("a.py", b"print(1)", "no SFTConfig, TrainingArguments or LoraConfig"),
        ("a.py", b"DPOConfig(beta=1)", "DPOConfig: supervised fine-tuning alone is trained here"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_error(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as error:
        convert(str(tmp_path / name))
    assert str(error.value).startswith(str(tmp_path / name)) and expected in str(error.value)


def test_of_a_key_that_is_given_twice_the_last_one_counts_and_it_is_said(tmp_path):
    (tmp_path / "a.yml").write_text(yaml.safe_dump(AXOLOTL) + "learning_rate: 3e-4\n")
    done = convert(str(tmp_path / "a.yml"))
    assert yaml.safe_load(done.text)["optim"]["learning_rate"] == 3e-4
    assert "learning_rate is given twice; the last one counts" in done.report


def test_no_file_is_written_over_and_a_template_is_written_beside_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(TRL | {"chat_template": template}))
    assert main(["convert", "sft.yaml", "-o", "new/run.yaml"]) == 0
    assert load_config("new/run.yaml").data.chat_template == "new/run.jinja"
    assert (tmp_path / "new/run.jinja").read_text() == template
    before = (tmp_path / "new/run.yaml").read_text()
    capsys.readouterr()
    assert main(["convert", "sft.yaml", "-o", "new/run.yaml"]) == 1
    assert capsys.readouterr().err == "error: new/run.yaml: exists, and is not written over; give another name as -o\n"
    (tmp_path / "other.jinja").symlink_to("nowhere")
    assert main(["convert", "sft.yaml", "-o", "other.yaml"]) == 1
    assert "other.jinja: exists" in capsys.readouterr().err
    assert (tmp_path / "new/run.yaml").read_text() == before and not (tmp_path / "other.yaml").exists()


def test_without_a_place_the_config_is_on_stdout_and_the_report_on_stderr(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump({"model_name_or_path": "org/model", "lora_r": 8}))
    assert main(["convert", "sft.yaml"]) == 1
    out, err = capsys.readouterr()
    assert yaml.safe_load(out)["model"]["path"] == "org/model" and "# to fill in: data.train: a file" in out
    assert "error: 1 to fill in before this can be trained: data.train" in err
    assert all(len(line) <= 80 for line in err.splitlines() if not line.startswith("error"))


# The errors of the loader, and of arguments.


def test_no_command_of_ours_is_taken_for_one_of_others():
    for name in {*COMMANDS, *OTHER_METHODS}:
        with pytest.raises(SystemExit):
            _parser().parse_args([name])


OURS = {"model": {"path": "m"}, "data": {"train": "d"}}


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("optim.lr", "here it is optim.learning_rate"),
        ("datasets", "here it is data.train (a path"),
        ("data.max_seq_length", "here it is data.seq_len"),
        ("max_length", "here it is data.seq_len"),
        ("train.per_device_train_batch_size", "here it is train.batch_size (rows per step over all devices)"),
        ("gradient_accumulation_steps", "here it is train.batch_size and train.microbatch_size"),
        ("logging_steps", "here it is log.every (in steps)"),
        ("save_steps", "here it is checkpoint.every"),
        ("output_dir", "here it is run_dir"),
        ("bf16", "here it is model.compute_dtype"),
        ("report_to", "here it is log.to"),
        ("lora_r", "here it is lora.rank"),
        ("lora_alpha", "here it is lora.alpha"),
        ("num-train-epochs", "here it is train.epochs"),
        ("Warmup_Ratio", "did you mean optim.warmup_ratio?"),
        ("learning-rate", "did you mean optim.learning_rate?"),
        ("deepspeed", "no such key here: parameters, optimizer and rows are cut over all devices"),
        ("trust_remote_code", "no such key here: code that comes with a model is never run"),
        ("data.train_on_inputs", "here it is data.train_on (all;"),
        ("data.seqlen", "did you mean data.seq_len"),
        ("nosuchthing", "`python run.py keys` lists them all"),
    ],
)
def test_an_unknown_key_is_answered_in_the_words_of_ours(key, expected):
    with pytest.raises(ConfigError) as error:
        load_config(OURS, [f"{key}=1"])
    (line,) = str(error.value).splitlines()[1:]
    assert line.startswith(f"  {key}: unknown key; ") and expected in line


def test_a_section_that_is_given_as_a_value_is_shown_as_one():
    with pytest.raises(ConfigError) as error:
        load_config({"model": "org/model", "data": "rows.jsonl", "lora": True})
    assert str(error.value).splitlines()[1:] == [
        "  model: 'org/model' given, expected a section, such as model: {path: ./my-model}",
        "  data: 'rows.jsonl' given, expected a section, such as data: {train: ./train.jsonl}",
        "  lora: True given, expected a section, such as lora: {rank: 16}",
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--learning-rate", "1e-4"], "--learning-rate 1e-4: write optim.learning_rate=1e-4"),
        (["--learning_rate=1e-4"], "--learning_rate=1e-4: write optim.learning_rate=1e-4"),
        (["--optim.learning_rate", "1e-4"], "--optim.learning_rate 1e-4: write optim.learning_rate=1e-4"),
        (["-lr", "1e-4"], "-lr 1e-4: write optim.learning_rate=1e-4"),
        (["--output_dir", "out"], "--output_dir out: write run_dir=out"),
        (["--bf16"], "--bf16: write model.compute_dtype=... (left out: bfloat16 on accelerators)"),
        (["--push_to_hub"], "--push_to_hub: no such key here: a run sends nothing to the hub; `run.py push RUN"),
        (["--max_length", "9", "--nosuch"], "  --nosuch: no such key; keys are written key=value"),
    ],
)
def test_arguments_as_others_write_them_are_answered_with_ours(words, expected, capsys):
    assert main(["train", "run.yaml", *words]) == 1
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["train", "c.yaml", "--hub_token", "hf_SECRET"],
        ["train", "c.yaml", "--hub_token=hf_SECRET"],
        ["train", "c.yaml", "--hf-token", "hf_SECRET", "--learning_rate", "1"],
        ["train", "c.yaml", "--learning_rate", "1", "--nosuch=hf_SECRET", "--other", "hf_SECRET"],
        ["train", "c.yaml", "--nosuch", "hf_SECRET"],
        ["train", "c.yaml", "--nosuch=hf_SECRET"],
        ["train", "hf_token=hf_SECRET", "c.yaml"],
        ["doctor", "--nosuch", "hf_SECRET"],
    ],
)
def test_values_of_keys_that_are_none_of_ours_are_not_repeated(words, capsys):
    try:
        assert main(words) == 1
    except SystemExit as end:
        assert end.code == 2
    err = capsys.readouterr().err
    assert "SECRET" not in err and re.search(r"nosuch|hub_token|hf.token", err)
