"""docs/from_trl.md and docs/from_axolotl.md: what a user of TRL or axolotl types first ends as the pages say."""

import io
import json
import re
import shlex
import shutil

import pytest

from jaxsft.cli import main

PAGES = {"from_trl.md": "sft.yaml", "from_axolotl.md": "config.yml"}


@pytest.fixture(scope="module")
def place(repo, tiny_data, tmp_path_factory):
    """A folder with a small model, weights and all, and rows."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("first")
    model = folder / "my-model"
    model.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(repo / "configs" / "quickstart" / name, model)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8}
    sizes |= {"num_key_value_heads": 8, "head_dim": 4}
    config = json.loads((repo / "configs" / "quickstart" / "config.json").read_text()) | sizes
    (model / "config.json").write_text(json.dumps(config))
    transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(model)).save_pretrained(model)
    (folder / "my-data").mkdir()
    shutil.copy(tiny_data / "train.jsonl", folder / "my-data")
    return folder


def commands(page):
    """Each command of the page, and the lines that it ends with."""
    (console,) = re.findall(r"^```console\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    for part in console.split("$ ")[1:]:
        command, *lines = part.splitlines()
        yield command, lines


@pytest.mark.parametrize("name", PAGES)
def test_the_first_commands_end_as_the_page_says(repo, place, name, monkeypatch, capsys):
    page = (repo / "docs" / name).read_text()
    folder = place / name.removesuffix(".md")
    folder.mkdir()
    for shared in ("my-model", "my-data"):
        (folder / shared).symlink_to(place / shared)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    (theirs,) = re.findall(r"^```yaml\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    (folder / PAGES[name]).write_text(theirs)
    tried = list(commands(page))
    assert len(tried) >= 10
    for command, lines in tried:
        assert command.startswith("python run.py ")
        monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
        code = main(shlex.split(command)[2:])
        out, err = capsys.readouterr()
        said = (out + err).replace(f"{folder}/", "")
        is_mistake = lines[0].startswith(("error: ", "  "))
        assert code == (1 if is_mistake else 0), said
        for line in lines:
            assert line in said.splitlines(), f"{command}: {said}"
        # What helps is no more than this, where it was a mistake: no usage, no traceback.
        assert not is_mistake or len(said.splitlines()) <= max(len(lines), 2), said


def test_the_numbers_in_the_headings_are_those_of_the_commands(repo):
    words = {"Ten": 10, "Eleven": 11, "Twelve": 12}
    for name in PAGES:
        page = (repo / "docs" / name).read_text()
        (number,) = re.findall(r"^## (\w+) first commands$", page, flags=re.MULTILINE)
        assert len(list(commands(page))) == words[number]
        assert len(page.splitlines()) <= 120
