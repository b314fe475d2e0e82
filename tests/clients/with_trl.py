"""TRL trains an export further: two steps each of DPO, Reward and GRPO.

with_trl.py EXPORT REFERENCE OUT
"""

import pathlib
import tempfile
from typing import Any

import datasets
import torch
import transformers
import trl
from said import QUESTIONS, Checks, Reference, arguments

PAIRS = [
    {
        "prompt": question,
        "chosen": [{"role": "assistant", "content": "s-l-i-d-e"}],
        "rejected": [{"role": "assistant", "content": "I do not know."}],
    }
    for question in QUESTIONS[:1] + QUESTIONS[2:]
] * 2


def settings(folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder, "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3,
        "report_to": "none", "save_strategy": "no", "logging_steps": 1, "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False, "disable_tqdm": True,
    }  # fmt: skip


def train(trainer: Any) -> list[float]:
    """The losses; an error unless they are numbers and the weights moved."""
    name, weight = next(each for each in trainer.model.named_parameters() if each[1].requires_grad)
    before = weight.detach().clone()
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    if len(losses) != 2 or not all(torch.isfinite(torch.tensor(losses))):
        raise ValueError(f"losses {losses}")
    if torch.equal(before, weight):
        raise ValueError(f"{name} has not moved")
    return losses


def dpo(export: str, reference: Reference, folder: str) -> None:
    """Trained answers end as jaxsft trained them to."""
    arguments = trl.DPOConfig(**settings(folder), max_length=256, model_init_kwargs={"dtype": "float32"})
    trainer = trl.DPOTrainer(export, args=arguments, train_dataset=datasets.Dataset.from_list(PAIRS))
    row = trainer.train_dataset[0]
    tail = (row["prompt_ids"] + row["chosen_ids"])[-3:]
    if not set(tail) & set(reference.said["stops"]):
        raise ValueError(f"the chosen answer ends with {tail}, none of the stop tokens {reference.said['stops']}")
    train(trainer)


def reward(export: str, reference: Reference, folder: str) -> None:
    arguments = trl.RewardConfig(**settings(folder), max_length=256, model_init_kwargs={"dtype": "float32"})
    train(trl.RewardTrainer(export, args=arguments, train_dataset=datasets.Dataset.from_list(PAIRS)))


def grpo(export: str, reference: Reference, folder: str) -> None:
    """Generated answers end at every stop token."""
    asked = {"num_generations": 2, "max_completion_length": 16, "model_init_kwargs": {"dtype": "float32"}}
    trainer = trl.GRPOTrainer(
        export,
        args=trl.GRPOConfig(**settings(folder), **asked),
        train_dataset=datasets.Dataset.from_list([{"prompt": pair["prompt"]} for pair in PAIRS]),
        reward_funcs=lambda completions, **_: [
            float(len(each[0]["content"]) + n) for n, each in enumerate(completions)
        ],
    )
    stops = trainer.generation_config.eos_token_id
    if not set(reference.said["stops"]) <= set(stops if isinstance(stops, list) else [stops]):
        raise ValueError(f"stops at {stops}, not at all of {reference.said['stops']}")
    train(trainer)


if __name__ == "__main__":
    export, reference, out = arguments()
    transformers.set_seed(0)
    checks = Checks("trl", "transformers")
    for name, method in (("DPO", dpo), ("Reward", reward), ("GRPO", grpo)):
        with tempfile.TemporaryDirectory() as folder, checks.attempt(name):
            method(str(export), reference, folder)
    checks.write(pathlib.Path(out))
