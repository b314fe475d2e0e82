"""TRL's SFTTrainer on the rows of a run, as a user runs it: `python -m jaxsft.baseline.trl FOLDER`.

In: FOLDER/request.json, and the rows, the model and the tokenizer that it names. Out, in FOLDER/theirs: what TRL makes
of each row (`prepared.npz`, `prepared.json`), its loss on the first of them (`first.json`), and of the training
`metrics.jsonl` and `facts.json`. Whatever prepares, masks, packs, pads and computes here is TRL's own; this file only
writes down what it did. Nothing of jaxsft is imported.
"""

import json
import os
import pathlib
import platform
import resource
import sys
import time
from collections.abc import Iterable
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import numpy as np
import torch
import transformers
import trl

IGNORED = -100
NOT_TRAINABLE = "training-compatible"
"""Words of the error by which TRL refuses to mask with a chat template that it does not know."""


def main(folder: pathlib.Path) -> None:
    """All that a request asks for."""
    request = json.loads((folder / "request.json").read_text())
    theirs = folder / "theirs"
    theirs.mkdir(exist_ok=True)
    if request["prepares"]:
        prepare(request, folder, theirs)
    if request["num_steps"]:
        train(request, folder, theirs)


def prepare(request: dict[str, Any], folder: pathlib.Path, theirs: pathlib.Path) -> None:
    """What TRL makes of each row, before rows are packed; and its loss on the first few."""
    trainer, refusal = make_trainer(request, folder, {"packing": False})
    prepared = trainer.train_dataset
    tokens, labels = prepared["input_ids"], prepared["labels"]
    lengths = [len(each) for each in tokens]
    np.savez(
        theirs / "prepared.npz",
        tokens=_joined(tokens, np.int32),
        trained=_joined(labels, np.int64) != IGNORED,
        offsets=np.cumsum([0, *lengths]),
        rows=np.array(prepared["row"], np.int64),
    )
    found = {
        "refusal": refusal,
        "training_template": trainer.chat_template,
        "assistant_only_loss": trainer.args.assistant_only_loss,
        "completion_only_loss": bool(trainer.completion_only_loss),
        "rows_changed": rows_changed(request, folder),
    }
    (theirs / "prepared.json").write_text(json.dumps(found))
    at = [index for index in range(len(lengths)) if lengths[index] > 1][: request["num_checked"]]
    features = [{"input_ids": tokens[index], "labels": labels[index]} for index in at]
    inputs = trainer._prepare_inputs(trainer.data_collator(features))
    model = trainer.model.eval()
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(model, inputs)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([each.grad for each in model.parameters() if each.grad is not None])
    first = {"examples": at, "loss": loss.item(), "grad_norm": norm.item()}
    (theirs / "first.json").write_text(json.dumps(first))


def train(request: dict[str, Any], folder: pathlib.Path, theirs: pathlib.Path) -> None:
    """Trains so many steps, and writes a line for each."""
    began = time.perf_counter()
    trainer, refusal = make_trainer(request, folder, {})
    recorder = Recorder(trainer, theirs / "metrics.jsonl", num_steps=request["num_steps"])
    trainer.train()
    settings = {key: value for key, value in trainer.args.to_dict().items() if key in request["arguments"]}
    settings |= {key: getattr(trainer.args, key) for key in SETTINGS}
    settings["padding_free"] = trainer.padding_free
    facts = {
        "versions": versions(),
        "device": _device(trainer.args.device),
        "startup_seconds": recorder.first_step_done - began,
        "attention": trainer.model.config._attn_implementation,
        "settings": settings | {"attn_implementation": trainer.model.config._attn_implementation},
        "refusal": refusal,
        "steps_trained": trainer.state.global_step,
        "caveats": [],
    }
    (theirs / "facts.json").write_text(json.dumps(facts, default=str))


SETTINGS = ("assistant_only_loss", "bf16", "use_cpu", "dataloader_num_workers", "loss_type", "optim")
"""Fields of SFTConfig that are reported beside those that were asked for."""


def make_trainer(request: dict[str, Any], folder: pathlib.Path, other: dict[str, Any]) -> tuple[Any, str | None]:
    """The trainer of a request; where TRL refuses to mask with this chat template, one that trains every token.

    Returns the trainer, and the words of the refusal.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / request["tokenizer"])
    on_cpu = not torch.cuda.is_available()
    compute = request["compute_dtype"] or ("float32" if on_cpu else "bfloat16")
    options = {
        "output_dir": str(folder / "trainer"),
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": on_cpu,
        "bf16": compute == "bfloat16",
        "model_init_kwargs": {"dtype": request["param_dtype"]},
        **request["arguments"],
        **other,
    }
    dataset = read_rows(request, folder)
    adapter = folder / request["adapter"] if request["adapter"] is not None else None

    def make(options: dict[str, Any]) -> Any:
        return trl.SFTTrainer(
            model=str(folder / request["model"]),
            args=trl.SFTConfig(**options),
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=adapter_config(adapter) if adapter is not None else None,
        )

    refusal = None
    try:
        trainer = make(options)
    except ValueError as error:
        if not options["assistant_only_loss"] or NOT_TRAINABLE not in str(error):
            raise
        refusal = str(error)
    if refusal is not None:
        trainer = make(options | {"assistant_only_loss": False})
    if adapter is not None:
        begin_with(trainer.model, adapter)
    return trainer, refusal


def adapter_config(folder: pathlib.Path) -> Any:
    """What a user gives TRL as `peft_config`, of a folder of adapters."""
    import peft

    config = peft.PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False
    return config


def begin_with(model: Any, folder: pathlib.Path) -> None:
    """Gives the adapters that TRL made the values that ours begin with."""
    import peft

    found: Any = peft.set_peft_model_state_dict(model, peft.load_peft_weights(str(folder), device="cpu"))
    missing = [name for name in found.missing_keys if "lora_" in name]
    if found.unexpected_keys or missing:
        raise ValueError(f"TRL's model has other adapters than {folder}: {[*found.unexpected_keys, *missing][:3]}")


def read_rows(request: dict[str, Any], folder: pathlib.Path) -> Any:
    """The rows as a user reads a file of them; `row` is the number of each."""
    path = folder / request["rows"]
    dataset = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder / "datasets"))
    return dataset.add_column("row", list(range(len(dataset))))


def rows_changed(request: dict[str, Any], folder: pathlib.Path) -> list[int]:
    """Rows that `datasets` did not give as the file has them."""
    lines = (folder / request["rows"]).read_text(encoding="utf-8").split("\n")[:-1]
    changed = []
    for line, seen in zip(lines, read_rows(request, folder), strict=True):
        row = json.loads(line)
        if any(seen[key] != row.get(key) for key in seen if key != "row"):
            changed.append(seen["row"])
    return changed


class Recorder(transformers.TrainerCallback):
    """Writes a line for each step, in the words of our metrics.

    The loss is what TRL computes and backpropagates, summed over the microbatches of the step: TRL logs the same,
    averaged over the steps between two logs.
    """

    def __init__(self, trainer: Any, path: pathlib.Path, *, num_steps: int) -> None:
        self.trainer, self.num_steps = trainer, num_steps
        self.began = self.first_step_done = 0.0
        self.loss = 0.0
        self.grad_norm = self.learning_rate = float("nan")
        self.tokens = self.trained = self.total_tokens = self.total_trained = 0
        self.lines = path.open("w")
        self.training_step, self.clip = trainer.training_step, trainer.accelerator.clip_grad_norm_
        trainer.training_step, trainer.accelerator.clip_grad_norm_ = self.counted_step, self.clipped
        trainer.add_callback(self)

    def counted_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        labels = inputs["labels"]
        # Padding apart; the first label of a row is not predicted.
        self.tokens += int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else labels.numel()
        self.trained += int((labels[:, 1:] != IGNORED).sum())
        loss = self.training_step(model, inputs, num_items_in_batch)
        self.loss += loss.item()
        return loss

    def clipped(self, *given: Any) -> Any:
        norm = self.clip(*given)
        self.grad_norm = float(norm)
        return norm

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()
        self.loss, self.tokens, self.trained = 0.0, 0, 0

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.learning_rate = self.trainer.lr_scheduler.get_last_lr()[0]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.perf_counter()
        self.first_step_done = self.first_step_done or now
        self.total_tokens += self.tokens
        self.total_trained += self.trained
        line = {
            "step": state.global_step,
            "loss": self.loss,
            "grad_norm": self.grad_norm,
            "learning_rate": self.learning_rate,
            "tokens": self.tokens,
            "trained_tokens": self.trained,
            "total_tokens": self.total_tokens,
            "total_trained_tokens": self.total_trained,
            "seconds": now - self.began,
            "memory_gib": memory_gib(args.device),
        }
        self.lines.write(json.dumps({key: each for key, each in line.items() if each == each}) + "\n")
        self.lines.flush()
        print(f"TRL: step {state.global_step} of {self.num_steps}, loss {self.loss:.4f}", flush=True)
        # The schedule is that of the whole run.
        control.should_training_stop |= state.global_step >= self.num_steps


def _joined(lists: Iterable[list[int]], dtype: Any) -> np.ndarray:
    return np.concatenate([np.array(each, dtype) for each in lists] or [np.zeros(0, dtype)])


def versions() -> dict[str, str]:
    return {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
        "datasets": datasets.__version__,
    }


def memory_gib(device: torch.device) -> float:
    """Largest use so far: of the device, or of this process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
