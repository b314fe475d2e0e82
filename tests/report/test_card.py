"""The model card: what the hub reads of it, the same for the same run, and nothing of this machine."""

import re

import pytest
from huggingface_hub import ModelCard

from jaxsft.config_files import load_config
from jaxsft.report.card import Base, model_card

DATA = [
    {"set": "training", "source": "org/rows@one:train", "is_hub": True, "rows": 3, "examples": 2, "tokens": 9},
    {"set": "training", "source": "a|`b`.jsonl", "is_hub": False, "rows": 1000},
    {"set": "held-out: eval", "source": "org/others", "is_hub": True, "rows": 4},
]
LINES = [
    {"step": 0, "eval_loss": 4.0},
    *({"step": step, "loss": 4 - step / 10} for step in range(1, 31)),
    {"step": 10, "eval_loss": 2.0},
    {"step": 20, "eval_loss": 1.0},
    {"step": 30, "eval_loss": 1.5},
]
CONFIG = {"model": {"path": "/secret/m"}, "data": {"train": "/secret/d.jsonl", "chat_template": "/secret/t.jinja"}}


def card(tmp_path, *, name="org/base", is_random=False, is_adapter=False, config=CONFIG, lines=LINES, readme=None):
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    base = Base(name, tmp_path, is_random=is_random)
    given = load_config({**config, "run_dir": "/secret/run"})
    return model_card(
        given,
        base,
        lines,
        step=30,
        is_adapter=is_adapter,
        data=DATA,
        versions={"jaxsft": "1", "jax": "2", "other": "3"},
    )


def front(text):
    return ModelCard(text).data.to_dict()


def test_the_hub_reads_base_data_library_and_license(tmp_path):
    found = front(card(tmp_path, readme="---\nlicense: apache-2.0\nlicense_link: [x]\ntags: [y]\n---\n# Base"))
    assert found == {
        "base_model": "org/base",
        "datasets": ["org/rows"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["jaxsft", "sft"],
    }
    found = front(card(tmp_path, is_adapter=True))
    assert (found["library_name"], found["tags"]) == ("peft", ["jaxsft", "sft", "lora"])


@pytest.mark.parametrize("readme", [None, "# Base", "---\n[\n---\n", "---\n- a\n---\n", "---\nlicense: 3\n---\n"])
def test_a_license_that_is_not_stated_is_left_out(tmp_path, readme):
    assert "license" not in front(card(tmp_path, readme=readme))


@pytest.mark.parametrize("name", ["/secret/base", "gs://secret/base/", "/secret/base.gguf", "/secret/base/export-best"])
def test_a_base_that_is_not_on_the_hub_is_told_by_its_last_name_alone(tmp_path, name):
    text = card(tmp_path, name=name)
    assert "base_model" not in front(text) and "secret" not in text and "# base" in text
    assert "t.jinja" in text


def test_random_weights_have_no_base(tmp_path):
    text = card(tmp_path, is_random=True, readme="---\nlicense: mit\n---\n")
    assert not {"base_model", "license"} & front(text).keys() and "trained from random weights" in text


def test_losses_curve_and_data_are_those_of_the_run(tmp_path):
    text = card(tmp_path)
    for row in (
        "| held-out loss before training | 4.0000 |", "| held-out loss of this checkpoint (30) | 1.5000 |",
        "| best held-out loss (step 20) | 1.0000 |", "| training loss at step 30 | 1.0000 |",
        "| training | org/rows@one:train | 3 | 2 | 9 | streamed |", "| training | a\\|\\`b\\`.jsonl | 1,000 |",
        "| 0 |  | 4.0000 |", "| 20 | 2.0000 | 1.0000 |", "jaxsft 1, jax 2\n",
    ):  # fmt: skip
        assert row in text, row
    assert re.findall(r"^\| (\d+) \|", text, re.MULTILINE) == ["0", "10", "20", "30"]
    lines = [line for line in LINES if "loss" in line]
    steps = [int(step) for step in re.findall(r"^\| (\d+) \|", card(tmp_path, lines=lines), re.MULTILINE)]
    assert len(steps) == 12 and steps[0] == 1 and steps[-1] == 30
    bare = card(tmp_path, lines=[{"step": 1, "loss": float("nan")}])
    assert "Results" not in bare and "Curve" not in bare


def test_settings_are_those_that_were_chosen_and_a_few_more(tmp_path):
    config = {**CONFIG, "train": {"steps": 5}, "lora": {"rank": 4}, "mesh": {"tensor": 2}, "checkpoint": {"every": 7}}
    text = card(tmp_path, config=config)
    assert "lora.rank: 4\n" in text and "train.steps: 5\n" in text and "optim.name: adamw\n" in text
    for word in ("mesh", "checkpoint.every", "epsilon", "run_dir", "template_date"):
        assert word not in text, word
