"""transformers opens an export: its tokens, special ids, template, logits and greedy answers.

with_transformers.py EXPORT OUT               with transformers 5: what the other programs are held against
with_transformers.py EXPORT REFERENCE OUT     with another version: is it the same?
"""

import json
import pathlib
import sys
from typing import Any

import numpy as np
import torch
import transformers
from said import MAX_NEW_TOKENS, QUESTIONS, Checks, differing, load_reference


def look(export: pathlib.Path, prompts: list[list[int]] | None = None) -> tuple[dict[str, Any], np.ndarray]:
    """What there is to say of an export, and its logits after `prompts`; left out: after its own tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    model = transformers.AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    texts = [tokenizer.apply_chat_template(each, add_generation_prompt=True, tokenize=False) for each in QUESTIONS]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    logits, answers = [], []
    for each in prompts or ids:
        prompt = torch.tensor([each])
        with torch.no_grad():
            logits.append(model(prompt).logits[0, -1].numpy())
            asked = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": MAX_NEW_TOKENS, "do_sample": False}
            answers.append(model.generate(prompt, **asked)[0, len(each) :].tolist())
    stops = model.generation_config.eos_token_id
    said = {
        "texts": texts,
        "ids": ids,
        "answers": answers,
        "answer_texts": tokenizer.batch_decode(answers, skip_special_tokens=True),
        "plain_ids": [tokenizer(each[-1]["content"])["input_ids"] for each in QUESTIONS],
        "special": {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")},
        "stops": sorted(stops if isinstance(stops, list) else [stops]),
        "control": {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special},
        "tokens": len(tokenizer),
        "rows": model.get_input_embeddings().weight.shape[0],
        "config_ids": {name: getattr(model.config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")},
    }
    return said, np.stack(logits)


def compare(export: pathlib.Path, reference_file: pathlib.Path) -> Checks:
    reference = load_reference(reference_file)
    checks = Checks("transformers", "tokenizers", "torch")
    with checks.attempt("opens"):
        expected = reference.said
        said, logits = look(export, expected["ids"])
        for name in ("texts", "ids", "plain_ids"):
            problem = differing(said[name], expected[name])
            checks.add({"texts": "template", "ids": "tokens", "plain_ids": "plain text"}[name], not problem, problem)
        checks.same("special ids", [said["special"], said["config_ids"]], [expected["special"], expected["config_ids"]])
        checks.same("control tokens", said["control"], expected["control"])
        checks.same("stop tokens", said["stops"], expected["stops"])
        checks.near("logits", logits, reference.logits)
        problem = differing(said["answers"], expected["answers"])
        checks.add("answers", not problem, problem)
    return checks


if __name__ == "__main__":
    if len(sys.argv) == 3:
        found, found_logits = look(pathlib.Path(sys.argv[1]))
        pathlib.Path(sys.argv[2]).write_text(json.dumps(found, ensure_ascii=False, indent=1))
        np.save(pathlib.Path(sys.argv[2]).with_suffix(".npy"), found_logits)
    else:
        compare(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])).write(pathlib.Path(sys.argv[3]))
