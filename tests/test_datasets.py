"""Every real dataset of the material goes through `preview` and a short training, with nothing said about it."""

import json

import pytest
from compilation import TO_RUN_LONG

from jaxsft.cli import main

FILES = [
    "alpaca_en.json", "flan_cot_strategyqa.tsv", "glaive_toolcall_en.json", "gsm8k_test.jsonl", "gsm8k_train.jsonl",
    "oasst_trees_en.jsonl", "reason_tool_use.jsonl", "sharegpt_dummy.json", "superni_predictions.jsonl",
    "t0_adversarial_qa.jsonl",
]  # fmt: skip
COLUMNS = {"flan_cot_strategyqa.tsv": ["data.train.0.columns={question: 1, answer: 2, rationale: 3}"]}
"""A file without a header names no columns."""
LONG = ("glaive_toolcall_en.json", "reason_tool_use.jsonl")
"""Tool definitions fill more than the 512 tokens that keep the other trainings short; the default is 2,048."""


@pytest.fixture(scope="module")
def config(material, tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets")
    (folder / "base.yaml").write_text(
        f"model: {{path: {material}/models/stories260K, remat: none}}\n"
        f"data: {{train: nothing.jsonl, chat_template: chatml, seq_len: 512, cache: {folder}/cache}}\n"
        "train: {batch_size: 8, steps: 2}\nlog: {every: 2}\n"
    )
    return folder / "base.yaml"


def test_the_list_of_datasets_is_whole(material):
    assert sorted(path.name for path in (material / "data").iterdir()) == FILES


@pytest.mark.parametrize("name", FILES)
def test_a_real_dataset_is_previewed_and_trained(material, config, tmp_path, name, capsys, monkeypatch):
    # One program for all of them, whose rows are long.
    monkeypatch.setattr("jaxsft.training.step.compiler_options", lambda mesh: TO_RUN_LONG)
    overrides = [f"data.train.0.path={material}/data/{name}", *COLUMNS.get(name, []), f"run_dir={tmp_path}/run"]
    overrides += ["data.seq_len=1024"] if name in LONG else []
    assert main(["preview", str(config), *overrides]) == 0
    assert name in capsys.readouterr().out
    assert main(["train", str(config), *overrides]) == 0
    (line,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert line["step"] == 2 and 0 < line["loss"] < 12
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()
