"""Talking: the export of a run is found, and tools are shown, called and answered as the chat template has it."""

import io
import json
import os
import pathlib
import re
import shutil

import pytest
from adapters import one_device
from transformers import AutoTokenizer

from jaxsft.answers import converse as talk
from jaxsft.answers.calls import take_apart
from jaxsft.answers.generate import GREEDY
from jaxsft.cli import main
from jaxsft.config import ConfigError, ModelConfig
from jaxsft.folders.pretrained import export_model, load_weights, open_model, open_tokenizer
from jaxsft.rows.calls import read_tools

TOOL = {
    "name": "look_up",
    "description": "Says what a word means.",
    "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
}
CALL = {"name": "look_up", "arguments": {"word": "fern"}}


@pytest.fixture(scope="module")
def model(tiny_model, repo, tmp_path_factory):
    """A whole model folder whose template, ours, shows tools."""
    folder = tmp_path_factory.mktemp("talk") / "model"
    config = ModelConfig(path=str(tiny_model), weights="random")
    tokenizer = open_tokenizer(config)
    pretrained = open_model(config, tokenizer)
    export_model(pretrained, tokenizer, load_weights(pretrained, one_device(), seed=0), folder)
    shutil.copy(repo / "jaxsft/chat/templates/chatml.jinja", folder / "chat_template.jinja")
    return folder


class Scripted:
    """In the place of a model that has learnt to call tools: says what it is told to, and keeps prompts."""

    answers: list = []
    prompts: list = []

    def __init__(self, model, mesh, *, stop_ids):
        self.stop_ids = frozenset(stop_ids)

    def stream(self, weights, prompt, *, max_new_tokens, sampling):
        Scripted.prompts.append(prompt)
        yield from Scripted.answers.pop(0)
        yield next(iter(self.stop_ids))


def test_tools_are_called_and_their_results_go_back_to_the_model(model, tmp_path, monkeypatch, capsys):
    tokenizer = AutoTokenizer.from_pretrained(model)
    (tmp_path / "tools.json").write_text(json.dumps([TOOL]))
    (tmp_path / "system.txt").write_text("Be brief.\n")
    called = f"I look.\n<tool_call>\n{json.dumps(CALL)}\n</tool_call>"
    Scripted.answers = [tokenizer.encode(text, add_special_tokens=False) for text in (called, "A plant.", "Bye.")]
    Scripted.prompts = []
    monkeypatch.setattr(talk, "Generator", Scripted)
    monkeypatch.setattr("sys.stdin", io.StringIO("what is a fern?\nleaves, no flowers\nthanks\n"))
    command = ["chat", str(model), "--tools", str(tmp_path / "tools.json")]
    assert main([*command, "--system-file", str(tmp_path / "system.txt")]) == 0
    said = capsys.readouterr().out
    assert 'calls look_up({"word": "fern"})' in said and said.index("A plant.") > said.index("calls look_up")
    call = {"id": "call00001", "type": "function", "function": CALL}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "what is a fern?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [call]},
        {"role": "tool", "name": "look_up", "tool_call_id": "call00001", "content": "leaves, no flowers"},
        {"role": "assistant", "content": "A plant."},
        {"role": "user", "content": "thanks"},
    ]
    for prompt, count in zip(Scripted.prompts, (2, 4, 6), strict=True):
        expected = tokenizer.apply_chat_template(
            messages[:count], tools=[{"type": "function", "function": TOOL}], add_generation_prompt=True
        )
        assert prompt == list(getattr(expected, "input_ids", expected))
    # What the model has said is what it is shown of it.
    first, second, _ = Scripted.prompts
    assert second[: len(first)] == first
    assert tokenizer.decode(second[len(first) :]).startswith(called)


@pytest.mark.parametrize(
    ("text", "content", "count"),
    [
        (json.dumps(CALL), "", 1),
        (f"[TOOL_CALLS][{json.dumps(CALL)}, {json.dumps(CALL)}]", "", 2),
        ('<|python_tag|>{"name": "look_up", "parameters": {"word": "fern"}}', "", 1),
        (f"So:\n```json\n{json.dumps(CALL)}\n```", "So:", 1),
        ('<tool_call>{"name": "look_up", "arguments": "{\\"word\\": \\"fern\\"}"}</tool_call>', "", 1),
        ('[TOOL_CALLS]look_up[CALL_ID]call00001[ARGS]{"word": "fern"}', "", 1),
        ('<|tool_call_begin|>functions.look_up:0<|tool_call_argument_begin|>{"word": "fern"}<|tool_call_end|>', "", 1),
        ('So: to=functions.look_up<|channel|>commentary json<|message|>{"word": "fern"}', "So:", 1),
        ("<tool_call>\n<function=look_up>\n<parameter=word>\nfern\n</parameter>\n</function>\n</tool_call>", "", 1),
        ('a<invoke name="look_up"><parameter name="word">fern</parameter></invoke>', "a", 1),
        ('look_up takes {"word": "fern"}', 'look_up takes {"word": "fern"}', 0),
        ('look_up[ARGS]{"other": 1}', 'look_up[ARGS]{"other": 1}', 0),
        ('{"name": "another", "arguments": {}}', '{"name": "another", "arguments": {}}', 0),
        ("{ {broken [1, 2] {}", "{ {broken [1, 2] {}", 0),
        ('{"name": "look_up", "arguments": 3}', '{"name": "look_up", "arguments": 3}', 0),
        ("{" * 5000, "{" * 5000, 0),
    ],
)
def test_calls_are_found_whatever_stands_around_them(text, content, count):
    said = take_apart(text, read_tools([TOOL]), first_id=7)
    assert said.content == content
    assert [call["function"] for call in said.calls] == [CALL] * count
    assert [call["id"] for call in said.calls] == [f"call{7 + number:05d}" for number in range(count)]


def test_the_calls_of_real_templates_are_found(material, make_tokenizer):
    """docs/clients.md says how many."""
    tools, asked = read_tools([TOOL]), [{"role": "user", "content": "q"}]
    called = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "id": "call00001", "function": CALL}],
    }
    shown = found = 0
    for path in sorted((material / "templates").iterdir()):
        tokenizer = make_tokenizer(path.read_text(encoding="utf-8"))

        def render(messages, tokenizer=tokenizer, **given):
            return tokenizer.apply_chat_template(messages, tokenize=False, **given)

        try:
            prompt = render(asked, tools=tools, add_generation_prompt=True)
            if prompt == render(asked, add_generation_prompt=True):
                continue
            whole = render([*asked, called], tools=tools)
        except Exception:  # whatever a template raises that takes no tools, or no such messages
            continue
        shown += 1
        begin = len(os.path.commonprefix([prompt, whole]))
        found += [call["function"] for call in take_apart(whole[begin:], tools).calls] == [CALL]
    page = (pathlib.Path(__file__).parents[2] / "docs" / "clients.md").read_text(encoding="utf-8")
    told = re.search(r"Of (\d+) real templates that show tools, (\d+) write calls", page)
    # Other versions of transformers refuse other templates.
    assert found >= int(told[2]) - 2 and abs(shown - int(told[1])) <= 2, (shown, found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "tools.json: not readable: No such file or directory"),
        ("[", "tools.json: no JSON"),
        ("[]", "tools.json: no tool in it"),
        ("[3]", "tools.json: tools[0]: expected an object"),
        ('{"name": 1}', "expected a function with name"),
    ],
)
def test_a_file_that_holds_no_tools_is_one_error(model, tmp_path, capsys, text, expected):
    if text is not None:
        (tmp_path / "tools.json").write_text(text)
    assert main(["chat", str(model), "--tools", str(tmp_path / "tools.json")]) == 1
    assert expected in capsys.readouterr().err


def test_a_template_that_shows_no_tools_is_told_before_weights_are_read(tiny_model, tmp_path, capsys):
    (tmp_path / "tools.json").write_text(json.dumps(TOOL))
    assert main(["chat", str(tiny_model), "--tools", str(tmp_path / "tools.json")]) == 1
    assert "its chat template shows no tools to the model" in capsys.readouterr().err


def test_a_run_is_talked_to_through_its_export(model, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    assert talk.model_of(str(model)) == str(model) and talk.model_of("org/name") == "org/name"
    assert talk.model_of(str(run)) == str(run)  # no run, and no model: whoever opens it says so
    (run / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match="no checkpoint yet"):
        talk.model_of(str(run))
    (run / "checkpoints" / "4").mkdir(parents=True)
    (run / "checkpoints" / "4" / "seal.json").write_text("{}")
    assert main(["chat", str(run)]) == 1
    assert f"`python run.py export {run}` writes one" in capsys.readouterr().err
    shutil.copytree(model, run / "export")
    assert talk.model_of(str(run)) == str(run / "export")


def test_a_random_model_is_talked_to(model, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n/new\nHo\n\nnever read\n"))
    talk.converse(str(model), system=None, sampling=GREEDY, max_new_tokens=3)
    assert "2 layers" in capsys.readouterr().out
