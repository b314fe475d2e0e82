"""Speed and memory of training, side by side: ours, transformers' `Trainer` and TRL's `SFTTrainer`.

Run as `python benchmarks/training.py [--model FOLDER] [--data FILE]`; needs `pip install 'jaxsft[compare]'`. Takes the
device as it finds it (float32 on CPU, bfloat16 with float32 parameters on a GPU) and no network; without arguments a
small random model and the quickstart's rows. `--lengths benchmarks/sharegpt_lengths.csv` takes random tokens in the
lengths of real conversations. Each run is a process of its own, all in turns; figures are medians over the rounds. All
train AdamW on the same examples, prepared once by us: the same tokens, the same ones trained. A first step is left out
of the speed.

Of a fixed shape, all on the very same packed rows ("equal"):
  jaxsft            as a run trains them
  Trainer           examples sealed off from each other, as positions that restart make transformers do
  Trainer, unsealed the rows as if each were one text: another result, but sdpa at its fastest
As each does by default, on about as many tokens in a step (examples all at once, as neither cuts its batch by itself):
  Trainer, padded   one example per row, filled up to the longest of the batch
  TRL               the same, as SFTTrainer does it
  TRL, packed       with `packing=True`

With `--lora RANK` all of them train adapters on all linear maps of a frozen model, theirs by PEFT.
"""

import argparse
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

BEGAN = time.perf_counter()
REPO = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

QUICKSTART = REPO / "configs" / "quickstart"
SMALL = dict(hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4)
IGNORED = -100
NUM_TOKENS = "num_tokens"
OURS, TRAINER, UNSEALED = "jaxsft", "Trainer", "Trainer, unsealed"
PADDED, TRL, TRL_PACKED = "Trainer, padded", "TRL", "TRL, packed"
SYSTEMS = [OURS, TRAINER, UNSEALED, PADDED, TRL, TRL_PACKED]
COLUMNS = {
    "tokens/s": ("tokens", ",.0f"),
    "trained tokens/s": ("trained", ",.0f"),
    "positions/s": ("positions", ",.0f"),
    "step s": ("step", ".3f"),
    "first step done after s": ("startup", ".1f"),
    "peak GiB": ("peak", ".2f"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--model", type=pathlib.Path, help="Hugging Face folder; left out: a small random model")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", type=pathlib.Path, default=QUICKSTART / "train.jsonl", help="rows, any known format")
    source.add_argument("--lengths", type=pathlib.Path, help="conversations as lengths, in place of --data")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4, help="packed rows in a step")
    parser.add_argument("--microbatch-size", type=int, help="packed rows at once; all if left out")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--remat", choices=["none", "full"], default="none", help="ours and Trainer's; TRL has its own")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train adapters of this rank on all linear maps")
    parser.add_argument("--unroll", action="store_true", help="compile our layers one by one")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--json", type=pathlib.Path, help="write all figures of all rounds there")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.microbatch_size = args.microbatch_size or args.batch_size
    if args.batch_size % args.microbatch_size:
        parser.error(f"--batch-size {args.batch_size} is no multiple of --microbatch-size {args.microbatch_size}")
    if args.child:
        run_child(args.child, args.folder)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        keys = ("seq_len", "batch_size", "microbatch_size", "steps", "remat", "unroll", "lora")
        settings = {key: getattr(args, key) for key in keys} | {"data": str(args.data.resolve())}
        settings["lengths"] = str(args.lengths.resolve()) if args.lengths else None
        settings["model"] = str(args.model.resolve() if args.model else folder / "model")
        settings["is_random"] = args.model is None
        (folder / "settings.json").write_text(json.dumps(settings))
        about = start("prepare", folder)
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in args.systems}
        for number in range(args.rounds):
            for name in args.systems:
                rounds[name].append(start(name, folder))
                print(f"round {number + 1} of {args.rounds}: {name}", file=sys.stderr, flush=True)
    if args.json:
        args.json.write_text(json.dumps({"about": about, "settings": settings, "rounds": rounds}, indent=1))
    print(table(args, about, rounds))


def start(name: str, folder: pathlib.Path) -> dict[str, Any]:
    """What a child found."""
    command = [sys.executable, __file__, "--child", name, "--folder", str(folder)]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(args: argparse.Namespace, about: dict[str, Any], rounds: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: a line of facts, the medians of each system, and the ratios of ours to each of the others."""
    versions = {key: value for found in rounds.values() for key, value in found[0]["versions"].items()}
    device = next(iter(rounds.values()))[0]["device"]
    facts = [
        about["model"],
        f"{(args.lengths or args.data).name}: {about['examples']:,} examples of {about['mean_length']:.0f} tokens on "
        f"average, {about['trained_share']:.0%} trained",
        "left out or cut: "
        + (", ".join(f"{count:,} {why}" for why, count in about["left_out_or_cut"].items()) or "none"),
        f"{args.batch_size} rows of {args.seq_len} ({args.microbatch_size} at once), or {about['examples_per_step']} "
        f"examples (all at once), padded {about['padded_fill']:.0%} full",
        f"remat {args.remat}" + ", unrolled" * args.unroll + (f", adapters of rank {args.lora}" if args.lora else ""),
        f"medians of {args.rounds} rounds of {args.steps} steps",
        device,
        ", ".join(f"{key} {value}" for key, value in versions.items()),
    ]
    lines = [
        "; ".join(facts),
        "",
        f"| system | {' | '.join(COLUMNS)} |\n" + "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for name, found in rounds.items():
        cells = [format(statistics.median(each[key] for each in found), form) for key, form in COLUMNS.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if OURS in rounds and len(rounds) > 1:
        lines += ["", f"| ours / theirs | {' | '.join(COLUMNS)} |\n" + "|---" * (len(COLUMNS) + 1) + "|"]
        for name, found in rounds.items():
            if name != OURS:
                pairs = list(zip(rounds[OURS], found, strict=True))
                ratios = [statistics.median(a[key] / b[key] for a, b in pairs) for key, _ in COLUMNS.values()]
                lines.append(f"| {name} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")
    return "\n".join(lines)


def run_child(name: str, folder: pathlib.Path) -> None:
    """One child; the last line that it prints is what it found."""
    settings = json.loads((folder / "settings.json").read_text())
    if name == "prepare":
        found = prepare(settings, folder)
    else:
        run: Callable[[str, dict[str, Any], pathlib.Path], dict[str, Any]] = run_ours if name == OURS else run_theirs
        found = run(name, settings, folder)
        seconds, counts = found.pop("seconds"), found.pop("counts")
        for key in ("tokens", "trained", "positions"):
            found[key] = sum(count[key] for count in counts[1:]) / sum(seconds[1:])
        found["step"] = statistics.median(seconds[1:])
    print("\n" + json.dumps(found))


def prepare(settings: dict[str, Any], folder: pathlib.Path) -> dict[str, Any]:
    """Writes the examples, the packed rows of all steps and, if asked for, a random model."""
    import numpy as np

    from jaxsft.config import Config
    from jaxsft.setup import Setup

    if settings["is_random"]:
        make_model(folder / "model")
    if settings["lengths"]:
        settings["data"] = str(folder / "rows.jsonl")
        write_rows(pathlib.Path(settings["lengths"]), pathlib.Path(settings["data"]), settings["model"])
    model = {"path": settings["model"]}
    data = {"train": settings["data"], "seq_len": settings["seq_len"], "overlong": "truncate", "on_bad_row": "skip"}
    data |= {"cache": str(folder / "cache"), "template_date": "2024-01-01"}
    tree = {"run_dir": str(folder / "run"), "model": model, "data": data}
    loader = Setup(Config.model_validate(tree | {"train": {"batch_size": settings["batch_size"]}})).loader
    num_steps = settings["steps"] + 1
    batches = [loader.batch(step) for step in range(num_steps)]
    packed = {key: np.stack([getattr(batch, key) for batch in batches]) for key in batches[0]._fields}
    np.savez(folder / "packed.npz", **packed)

    (report,) = (source.report for source in loader.dataset.sources)
    lost = {reason: each["examples"] for key in ("dropped", "cut") for reason, each in report[key].items()}

    # Enough examples for the steps of those who take them one by one or pack them, in an order of chance.
    lengths = loader.dataset.lengths
    tokens_per_step = settings["batch_size"] * settings["seq_len"]
    per_step = max(1, round(tokens_per_step / lengths.mean()))
    drawn = np.random.default_rng(1).choice(lengths, (1000, per_step))
    order = np.resize(np.random.default_rng(0).permutation(len(lengths)), max(len(lengths), 4 * num_steps * per_step))
    examples = [loader.dataset.example(index) for index in order[: 4 * num_steps * per_step]]
    np.savez(
        folder / "examples.npz",
        tokens=np.concatenate([example.tokens for example in examples]),
        weights=np.concatenate([example.loss_weights for example in examples]),
        lengths=[len(example.tokens) for example in examples],
    )
    (folder / "settings.json").write_text(json.dumps(settings | {"examples_per_step": per_step}))
    return {
        "model": "a small random model" if settings["is_random"] else pathlib.Path(settings["model"]).name,
        "examples": len(lengths),
        "left_out_or_cut": report["bad_rows"] | lost,
        "mean_length": float(lengths.mean()),
        "trained_share": float((packed["loss_weights"] > 0).sum() / (packed["segment_ids"] > 0).sum()),
        "examples_per_step": per_step,
        # of batches drawn at random, filled up to their longest: few steps may have others
        "padded_fill": float(drawn.sum() / (per_step * drawn.max(axis=1)).sum()),
    }


def write_rows(lengths: pathlib.Path, path: pathlib.Path, model: str) -> None:
    """Rows of random tokens: of each line of `lengths`, prompt, answer, prompt, answer, ...; answers are trained."""
    import numpy as np
    import transformers

    # Of the tokenizer, as a model's table may have spare rows, which no row may name.
    vocab_size, rng = len(transformers.AutoTokenizer.from_pretrained(model)), np.random.default_rng(0)
    with path.open("w") as file:
        for number, line in enumerate(lengths.read_text().splitlines(), start=1):
            if line.startswith("#"):
                continue
            cells = line.split(",")
            if not all(cell.isdecimal() for cell in cells):
                raise ValueError(f"{lengths}:{number}: expected whole numbers with commas between them, got {line!r}")
            turns = [int(cell) for cell in cells]
            tokens = rng.integers(0, vocab_size, sum(turns))
            is_trained = np.repeat(np.arange(len(turns)) % 2 == 1, turns)
            labels = np.where(is_trained, tokens, IGNORED)
            file.write(json.dumps({"input_ids": tokens.tolist(), "labels": labels.tolist()}) + "\n")


def make_model(folder: pathlib.Path) -> None:
    """A random model of the quickstart's kind, large enough that its matmuls matter."""
    import transformers

    shutil.copytree(QUICKSTART, folder, ignore=shutil.ignore_patterns("*.jsonl", "*.py"))
    config = json.loads((folder / "config.json").read_text()) | SMALL | {"max_position_embeddings": 8192}
    transformers.set_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**config))
    model.save_pretrained(folder)


def run_ours(_: str, settings: dict[str, Any], folder: pathlib.Path) -> dict[str, Any]:
    """Our step on the packed rows, which are put on the device within its time."""
    # As a run does (`cli.main`): transformers would import it, for nothing.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    import jax
    import numpy as np

    from jaxsft.batch import Batch
    from jaxsft.config import LoraConfig, MeshConfig, ModelConfig, OptimConfig
    from jaxsft.folders.pretrained import load_weights, open_model, open_tokenizer
    from jaxsft.mesh import make_mesh
    from jaxsft.training.step import init_state, make_train_step, put_batch

    section = ModelConfig(path=settings["model"], remat=settings["remat"], unroll=settings["unroll"])
    lora = LoraConfig(rank=settings["lora"]) if settings["lora"] else None
    pretrained, mesh = open_model(section, open_tokenizer(section), lora), make_mesh(MeshConfig(), jax.devices()[:1])
    model = pretrained.model
    params, frozen = model.split(load_weights(pretrained, mesh, seed=0))
    optim = OptimConfig(learning_rate=1e-5, schedule="constant", warmup_steps=0)
    state = init_state(params, optim, mesh)
    packed = dict(np.load(folder / "packed.npz"))
    num_microbatches = settings["batch_size"] // settings["microbatch_size"]
    step = make_train_step(model, optim, num_steps=1000, num_microbatches=num_microbatches, mesh=mesh)
    seconds, counts, startup = [], [], 0.0
    for number in range(settings["steps"] + 1):
        rows = Batch(**{key: leaf[number] for key, leaf in packed.items()})
        at = time.perf_counter()
        batch = put_batch(lambda part, rows=rows: Batch(*(leaf[part] for leaf in rows)), rows.tokens.shape, mesh)
        with jax.set_mesh(mesh):
            state, metrics = jax.block_until_ready(step(state, frozen, batch))
        seconds.append(time.perf_counter() - at)
        startup = startup or time.perf_counter() - BEGAN
        tokens, trained = float(metrics.tokens), float(metrics.sums.trained_tokens)
        counts.append({"tokens": tokens, "trained": trained, "positions": rows.tokens.size})
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "seconds": seconds,
        "counts": counts,
        "startup": startup,
        "peak": stats["peak_bytes_in_use"] / 2**30 if stats else resident_peak(),
        "device": f"{os.cpu_count()} CPU cores, {platform.machine()}" if not stats else jax.devices()[0].device_kind,
        "versions": {"jax": jax.__version__},
    }


def run_theirs(name: str, settings: dict[str, Any], folder: pathlib.Path) -> dict[str, Any]:
    """A Trainer of transformers or TRL from its model to its last step; times are those between its own steps' ends."""
    import datasets
    import numpy as np
    import torch
    import transformers

    is_gpu, is_trl = torch.cuda.is_available(), name in (TRL, TRL_PACKED)
    by_example = name in (PADDED, TRL)
    tokenizer = transformers.AutoTokenizer.from_pretrained(settings["model"])
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    model = transformers.AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    if settings["lora"]:
        import peft

        rank = settings["lora"]
        lora = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, lora)
    accumulated = 1 if by_example else settings["batch_size"] // settings["microbatch_size"]
    shared: dict[str, Any] = dict(
        output_dir=str(folder / "out"),
        max_steps=settings["steps"] + 1,
        per_device_train_batch_size=settings["examples_per_step"] if by_example else settings["microbatch_size"],
        gradient_accumulation_steps=accumulated,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        bf16=is_gpu,
        use_cpu=not is_gpu,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    ends, counts, versions = [], [], {"torch": torch.__version__, "transformers": transformers.__version__}

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not ends:
                ends.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if is_gpu:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    def counted(collate: Callable) -> Callable:
        def of_rows(rows: list) -> dict[str, Any]:
            batch = collate([{key: row[key] for key in row if key != NUM_TOKENS} for row in rows])
            ids, labels = batch["input_ids"], batch["labels"]
            if NUM_TOKENS in rows[0]:
                tokens = sum(row[NUM_TOKENS] for row in rows)
            else:
                tokens = ids.numel() if "attention_mask" not in batch else int(batch["attention_mask"].sum())
            trained = int((labels[:, 1:] != IGNORED).sum())
            counts.append({"tokens": tokens, "trained": trained, "positions": ids.numel()})
            return batch

        return of_rows

    if is_trl:
        import trl

        versions["trl"] = trl.__version__
        extra: dict[str, Any] = {}
        if is_gpu and _is_installed("liger_kernel"):
            extra["use_liger_kernel"] = True
        options = trl.SFTConfig(max_length=settings["seq_len"], packing=name == TRL_PACKED, **extra, **shared)
        rows = datasets.Dataset.from_list(stored_examples(folder))
        trainer = trl.SFTTrainer(model, args=options, train_dataset=rows, processing_class=tokenizer)
        trainer.data_collator = counted(trainer.data_collator)
    else:
        if name != PADDED:  # the rows in the order in which ours takes them, each with its number of tokens
            shared |= {"train_sampling_strategy": "sequential", "remove_unused_columns": False}
        options = transformers.TrainingArguments(gradient_checkpointing=settings["remat"] == "full", **shared)
        if name == PADDED:
            rows = stored_examples(folder)
            padding = transformers.DataCollatorForSeq2Seq(_with_pad(tokenizer, pad))
            collate = counted(padding)
        else:
            rows = packed_rows(dict(np.load(folder / "packed.npz")), is_sealed=name == TRAINER)
            collate = counted(transformers.default_data_collator)
        trainer = transformers.Trainer(model, options, train_dataset=rows, data_collator=collate)
    trainer.add_callback(Clock())
    trainer.train()
    peak = torch.cuda.max_memory_allocated() / 2**30 if is_gpu else resident_peak()
    return {
        "seconds": [end - begin for begin, end in zip(ends, ends[1:], strict=False)],
        "counts": [total(counts[step * accumulated :][:accumulated]) for step in range(settings["steps"] + 1)],
        "startup": ends[1] - BEGAN,
        "peak": peak,
        "device": torch.cuda.get_device_name() if is_gpu else f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": versions,
    }


def total(counts: list[dict[str, float]]) -> dict[str, float]:
    """Of all microbatches of a step."""
    return {key: sum(count[key] for count in counts) for key in counts[0]}


def stored_examples(folder: pathlib.Path) -> list[dict[str, list[int]]]:
    """The examples as transformers wants them."""
    import numpy as np

    stored = np.load(folder / "examples.npz")
    bounds = np.cumsum(stored["lengths"])[:-1]
    parts = (np.split(stored[key], bounds) for key in ("tokens", "weights"))
    labelled = ((tokens, np.where(weights > 0, tokens, IGNORED)) for tokens, weights in zip(*parts, strict=True))
    return [{"input_ids": tokens.tolist(), "labels": labels.tolist()} for tokens, labels in labelled]


def packed_rows(packed: dict[str, Any], *, is_sealed: bool) -> list[dict[str, Any]]:
    """Our packed rows [A, B, T], one by one, with the unshifted labels that transformers wants."""
    import numpy as np

    tokens, weights = (packed[key].reshape(-1, packed[key].shape[-1]) for key in ("tokens", "loss_weights"))
    is_label = np.pad(weights[:, :-1] > 0, ((0, 0), (1, 0)))
    rows = {"input_ids": tokens, "labels": np.where(is_label, tokens, IGNORED)}
    if is_sealed:
        rows["position_ids"] = packed["positions"].reshape(tokens.shape)
    rows[NUM_TOKENS] = (packed["segment_ids"] > 0).reshape(tokens.shape).sum(axis=1)
    return [{key: leaf[row].tolist() for key, leaf in rows.items()} for row in range(len(tokens))]


def _with_pad(tokenizer: Any, pad: int) -> Any:
    tokenizer.pad_token_id = pad
    return tokenizer


def _is_installed(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


def resident_peak() -> float:
    """GiB of this process at their most; of its own pages, not of those of the process that started it."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30


if __name__ == "__main__":
    main()
