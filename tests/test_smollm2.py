"""SmolLM2-135M, real pretrained weights: its answers are those of transformers, token by token."""

import functools
import json

import jax
from compilation import AS_FOR_USERS

from jaxsft.answers.generate import Generator
from jaxsft.config import MeshConfig, ModelConfig
from jaxsft.folders.pretrained import load_weights, open_model, open_tokenizer
from jaxsft.mesh import make_mesh

NUM_PROMPTS, NEW_TOKENS = 20, 48


def test_twenty_greedy_answers_are_those_of_transformers_token_by_token(smollm2, material, monkeypatch):
    import torch
    import transformers

    config = ModelConfig(path=str(smollm2))
    tokenizer = open_tokenizer(config)
    rows = (material / "data" / "gsm8k_test.jsonl").read_text().splitlines()[: NUM_PROMPTS // 2]
    questions = [json.loads(row)["question"] for row in rows]
    questions += [each["instruction"] for each in json.loads((material / "data" / "alpaca_en.json").read_text())][
        : NUM_PROMPTS - len(questions)
    ]
    prompts = [
        tokenizer.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in questions
    ]
    # Many steps of a real model: made fast, they take a third of the time.
    monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=AS_FOR_USERS))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    pretrained = open_model(config, tokenizer)
    generator = Generator(pretrained.model, mesh, stop_ids=[])
    ours = generator.answers(load_weights(pretrained, mesh, seed=0), prompts, max_new_tokens=NEW_TOKENS)

    # Greedy, token by token: of all that stands before each token of an answer, it is the most likely next one.
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    for prompt, answer in zip(prompts, ours, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0]
        theirs = logits[len(prompt) - 1 : -1].argmax(dim=-1).tolist()
        assert len(answer) == NEW_TOKENS and answer == theirs, tokenizer.tokenizer.decode(prompt)
    print(tokenizer.tokenizer.decode(ours[0]))
    assert len({tuple(answer) for answer in ours}) == NUM_PROMPTS
