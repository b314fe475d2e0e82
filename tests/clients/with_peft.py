"""peft puts a LoRA on an export, trains it for two steps, saves it, loads it and merges it.

with_peft.py EXPORT REFERENCE OUT
"""

import tempfile

import peft
import torch
import transformers
from said import Checks, Reference, arguments


def base(export: str) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)


def logits(model: torch.nn.Module, reference: Reference) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack([model(torch.tensor([ids])).logits[0, -1] for ids in reference.said["ids"]])


def adapt(export: str, reference: Reference, folder: str, checks: Checks) -> None:
    # By name: "all-linear" would take routers and experts of mixtures as well.
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base(export), lora)
    checks.near("logits before", logits(model, reference).numpy(), reference.logits)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        ids = torch.tensor([reference.said["ids"][0]])
        losses.append(model(ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    checks.add("loss falls", bool(losses[-1] < losses[0]), f"from {losses[0]:.4f} to {losses[-1]:.4f}")
    trained = logits(model, reference).numpy()
    model.save_pretrained(folder)
    loaded = peft.PeftModel.from_pretrained(base(export), folder)
    checks.near("saved and loaded", logits(loaded, reference).numpy(), trained)
    checks.near("merged", logits(loaded.merge_and_unload(), reference).numpy(), trained)
    by_name = peft.AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    checks.near("found by the adapter", logits(by_name, reference).numpy(), trained)


if __name__ == "__main__":
    export, reference, out = arguments()
    transformers.set_seed(0)
    checks = Checks("peft", "transformers")
    with tempfile.TemporaryDirectory() as folder, checks.attempt("opens"):
        adapt(str(export), reference, folder, checks)
    checks.write(out)
