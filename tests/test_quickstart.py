"""The quickstart as a newcomer runs it: from random weights to a model that follows instructions and stops."""

import json
import os
import subprocess
import sys

import pytest

from jaxsft.answers.evaluate import make_questions
from jaxsft.chat.encoder import ChatEncoder
from jaxsft.config_files import load_config
from jaxsft.folders.pretrained import open_tokenizer
from jaxsft.rows.formats import load_items


@pytest.fixture(scope="module")
def quickstart(installed, tmp_path_factory):
    """The finished run folder and what was printed. It begins in an empty folder, with what a wheel brings."""
    folder = tmp_path_factory.mktemp("empty")
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(installed)
    command = [sys.executable, "-m", "jaxsft", "quickstart"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in folder.iterdir()] == ["runs"]
    assert f"path: {installed}" in (folder / "runs" / "quickstart" / "config.yaml").read_text()
    return folder / "runs" / "quickstart", done.stdout


def evaluations(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval_exact_match" in line]


def test_it_learns_to_follow_instructions(quickstart):
    folder, _ = quickstart
    first, *_, last = evaluations(folder)
    assert first["eval_exact_match"] < 0.02
    assert last["eval_exact_match"] >= 0.9
    assert last["eval_loss"] < first["eval_loss"] / 10


def test_it_shows_answers_before_and_after_and_draws_the_curve(quickstart):
    folder, output = quickstart
    assert output.count("  expected  ") >= 6
    assert "exact match 0.0%" in output
    assert (folder / "loss.png").stat().st_size > 10_000
    assert (folder / "preview.html").exists()


def test_transformers_gives_the_same_answers_and_they_stop(quickstart, repo):
    """The export, in a library that is not ours: right answers as often, each ended by itself."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder, _ = quickstart
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "export").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "export")
    config = load_config(repo / "configs" / "quickstart.yaml")
    (source,) = config.data.eval.values()
    conversations = load_items(source.model_copy(update={"path": str(repo / source.path)}), limit=64)
    ours = open_tokenizer(config.model.model_copy(update={"path": str(folder / "export")}))
    questions = make_questions(conversations, ChatEncoder(ours.tokenizer, config.data, ours.stops))
    right = 0
    for conversation, question in zip(conversations, questions, strict=True):
        prompt = tokenizer.apply_chat_template(
            conversation.messages[:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert prompt["input_ids"][0].tolist() == question.tokens
        with torch.no_grad():
            output = model.generate(**prompt, do_sample=False, max_new_tokens=config.eval.max_new_tokens)
        answer = output[0, len(question.tokens) :].tolist()
        stopped = answer[-1] in ours.stops
        right += stopped and tokenizer.decode(answer[:-1]).strip() == question.expected
    # On these 64 of all held-out prompts.
    assert right / 64 >= 0.85
