"""A first config: it loads, fits, can be looked at and trained, and stands in nobody's place."""

import json
import shutil

import pytest
from adapters import one_device

from jaxsft import init as init_module
from jaxsft.cli import main
from jaxsft.config import ConfigError, ModelConfig
from jaxsft.config_files import load_config
from jaxsft.folders.pretrained import export_model, load_weights, open_model, open_tokenizer
from jaxsft.init import init
from jaxsft.rows.strict import DataError


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("init") / "a model"
    config = ModelConfig(path=str(tiny_model), weights="random")
    tokenizer = open_tokenizer(config)
    pretrained = open_model(config, tokenizer)
    export_model(pretrained, tokenizer, load_weights(pretrained, one_device(), seed=0), folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def test_the_config_of_a_model_and_a_file_is_previewed_and_trained(model, tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["init", "--model", str(model), "--data", str(tiny_data / "train.jsonl")]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "120 rows give 120 examples, the longest of 109 tokens" in said
    assert "`python run.py preview config.yaml`, then `python run.py train config.yaml`" in said
    config = load_config("config.yaml")
    assert (config.data.seq_len, config.train.batch_size, config.train.epochs) == (128, 8, 2)
    assert (config.run_dir, config.lora, config.optim.learning_rate) == ("runs/config", None, 2e-5)
    assert main(["preview", "config.yaml"]) == 0
    assert main(["train", "config.yaml", "train.steps=2"]) == 0
    assert (tmp_path / "runs/config/export/model.safetensors").exists()
    # It is never written over.
    before = (tmp_path / "config.yaml").read_bytes()
    assert main(command) == 1
    assert "config.yaml: exists already, and is left as it is" in capsys.readouterr().err
    assert (tmp_path / "config.yaml").read_bytes() == before


def test_four_questions_are_asked_and_asked_again_where_an_answer_is_of_no_use(model, tiny_data, tmp_path):
    answers = [
        "",
        str(tmp_path / "none"),
        str(model),
        "none.jsonl",
        str(tiny_data / "train.jsonl"),
        "",
        "lots",
        "lora 3",
    ]
    asked, said = [], []

    def ask(question):
        asked.append(question)
        return answers.pop(0)

    out = tmp_path / "mine.yaml"
    init(str(out), ask=ask, say=said.append)
    assert not answers and len(asked) == 8 and "[runs/mine]" in asked[5] and "[full 2]" in asked[6]
    for word in ("a model is needed", "no such folder", "no such file", "'lots' given, expected full or lora"):
        assert any(word in text for text in said), word
    config = load_config(out)
    assert config.lora.rank == 16 and config.train.epochs == 3 and config.optim.learning_rate == 2e-4
    assert config.run_dir == "runs/mine"


def test_what_is_given_is_not_asked(model, tiny_data, tmp_path):
    asked = []

    def ask(question):
        asked.append(question[:6])
        return str(tiny_data / "train.jsonl") if question.startswith("2") else ""

    init(str(tmp_path / "a.yaml"), model=str(model), ask=ask)
    assert asked == ["2 of 4", "3 of 4", "4 of 4"]


def test_without_a_terminal_what_is_missing_is_one_error(tmp_path, monkeypatch, capsys, model):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "--model", str(model)]) == 1
    assert "give --model and --data" in capsys.readouterr().err
    assert main(["init", "--model", str(model), "--data", "none.jsonl"]) == 65
    assert "none.jsonl: no such file" in capsys.readouterr().err
    assert main(["init", "--model", "./none", "--data", "none.jsonl"]) == 1
    assert not (tmp_path / "config.yaml").exists()


def test_a_tokenizer_without_a_template_gets_one_of_ours(model, tiny_data, tmp_path):
    bare = shutil.copytree(model, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    said = []
    init(str(tmp_path / "a.yaml"), model=str(bare), data=str(tiny_data / "train.jsonl"), say=said.append)
    assert "its tokenizer has no chat template, chatml is taken" in said[0]
    assert load_config(tmp_path / "a.yaml").data.chat_template == "chatml"


def test_a_model_that_does_not_fit_gets_adapters(model, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(init_module, "SHARE_OF_MEMORY", 1e-9)
    init(str(tmp_path / "a.yaml"), model=str(model), data=str(tiny_data / "train.jsonl"))
    assert load_config(tmp_path / "a.yaml").lora.rank == 16


def test_rows_of_a_few_long_examples_get_long_rows_within_what_the_model_knows(model, tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a " * 120}, {"role": "assistant", "content": "b"}]}]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
    init(str(tmp_path / "a.yaml"), model=str(model), data=str(tmp_path / "long.jsonl"))
    config = load_config(tmp_path / "a.yaml")
    assert config.data.seq_len == 256 and "3 of" not in (tmp_path / "a.yaml").read_text()
    rows[0]["messages"][0]["content"] = "a " * 300
    with (tmp_path / "long.jsonl").open("a") as file:
        file.write(json.dumps(rows[0]) + "\n")
    init(str(tmp_path / "b.yaml"), model=str(model), data=str(tmp_path / "long.jsonl"))
    assert json.loads((model / "config.json").read_text())["max_position_embeddings"] == 512
    assert (
        "seq_len: 512  # tokens of a row, which examples share; 1 of 4 are longer" in (tmp_path / "b.yaml").read_text()
    )
    (tmp_path / "long.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(DataError, match="the shortest example has 605 tokens, but rows of at most 512"):
        init(str(tmp_path / "c.yaml"), model=str(model), data=str(tmp_path / "long.jsonl"))


@pytest.mark.parametrize("answer", ["", "lora lora", "2 3", "0", "-1", "many"])
def test_an_answer_says_each_thing_once_at_most(answer):
    usual = init_module.How(is_lora=True, epochs=2.0)
    if not answer:
        assert init_module._how(answer, usual) == usual
        return
    with pytest.raises(ConfigError, match="expected full or lora and a number of epochs"):
        init_module._how(answer, usual)
