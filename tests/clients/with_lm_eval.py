"""lm-eval asks an export the questions of a small task of our own, without network.

with_lm_eval.py EXPORT REFERENCE OUT
"""

import json
import os
import pathlib
import tempfile
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

import lm_eval
import lm_eval.models.huggingface
import lm_eval.tasks
import torch
import transformers
from said import MAX_NEW_TOKENS, QUESTIONS, Checks, Reference, arguments, differing

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
num_fewshot: 0
metadata: {{version: 1}}
"""
CHOICE = 'output_type: multiple_choice\ndoc_to_choice: ["slide", "blob"]\ndoc_to_target: 0\ntarget_delimiter: ""\n'
ANSWER = "output_type: generate_until\ndoc_to_target: ''\ngeneration_kwargs: {{max_gen_toks: {tokens}, until: []}}\n"
SINGLE = [n for n, question in enumerate(QUESTIONS) if len(question) == 1]
"""A task's question is one turn."""


def samples(model: Any, tasks: lm_eval.tasks.TaskManager, name: str) -> list[dict[str, Any]]:
    asked = {"tasks": [name], "task_manager": tasks, "apply_chat_template": True, "bootstrap_iters": 0}
    return lm_eval.simple_evaluate(model, **asked, log_samples=True)["samples"][name]


def log_probability(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return float(logits[range(len(answer)), answer].sum())


def evaluate(export: str, reference: Reference, folder: pathlib.Path, checks: Checks) -> None:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": QUESTIONS[n][-1]["content"]}) + "\n" for n in SINGLE))
    for name, kind in (("choice", CHOICE), ("answer", ANSWER.format(tokens=MAX_NEW_TOKENS))):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, rows=rows) + kind)
    tasks = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    model = lm_eval.models.huggingface.HFLM(pretrained=export, dtype="float32", device="cpu", batch_size=1)
    given, expected = [], []
    for n, sample in zip(SINGLE, samples(model, tasks, "choice"), strict=True):
        shown = reference.said["texts"][n]
        # Two habits of lm-eval: a bos token goes before what does not begin with one, and white space at the end of the
        # question counts as part of the answer.
        begins = {"add_special_tokens": not shown.startswith(model.tokenizer.bos_token or shown)}
        prompt = model.tokenizer(shown.rstrip(), **begins)["input_ids"]
        for text, (found, _) in zip(("slide", "blob"), sample["filtered_resps"], strict=True):
            whole = model.tokenizer(shown + text, **begins)["input_ids"]
            given.append(round(found, 3))
            expected.append(round(log_probability(model.model, whole[: len(prompt)], whole[len(prompt) :]), 3))
    problem = "" if all(abs(a - b) < 2e-3 for a, b in zip(given, expected, strict=True)) else f"{given}, not {expected}"
    checks.add("log-probabilities", not problem, problem)
    texts = [sample["filtered_resps"][0] for sample in samples(model, tasks, "answer")]
    problem = differing(texts, [reference.said["answer_texts"][n] for n in SINGLE])
    checks.add("answers", not problem, problem)


if __name__ == "__main__":
    export, reference, out = arguments()
    transformers.set_seed(0)
    checks = Checks("lm_eval", "transformers")
    with tempfile.TemporaryDirectory() as folder, checks.attempt("opens"):
        evaluate(str(export), reference, pathlib.Path(folder), checks)
    checks.write(out)
