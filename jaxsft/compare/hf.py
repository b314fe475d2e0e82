"""The run of a config twice: ours, and in PyTorch with transformers, on the very same rows and weights.

In: a config. Out: a `Report`. A folder beside the run is written for both programs (`write_request`), each runs as a
process of its own, and `checks.py` holds what they leave against each other.
"""

import json
import math
import pathlib
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from jaxsft.batches.loader import Loader
from jaxsft.compare.checks import check_runs, verdict
from jaxsft.compare.child import NEEDED, NEEDED_FOR_ADAPTERS, call_apart, check_packages, run_child
from jaxsft.compare.exchange import exchange
from jaxsft.config import Config, ConfigError
from jaxsft.config_files import dump_config
from jaxsft.disk.writing import check_space
from jaxsft.folders.peft.write import fused_maps
from jaxsft.folders.pretrained import Pretrained, compute_dtype, export_model, load_weights
from jaxsft.folders.weights.stored import open_folder
from jaxsft.model.lora import of_files
from jaxsft.report.columns import figures_of
from jaxsft.report.records import Report, Run
from jaxsft.setup import Setup
from jaxsft.training.metrics import from_json_line
from jaxsft.training.optim import warmup_steps

ADAPTER = "adapter"
"""Folder of the exchange with the adapters that both begin with, where there are some."""

MOST_LOOKED_AT, MOST_LOGITS = 256, 2**26
"""Positions of one row whose residual stream and logits are compared, and numbers in their logits."""


def compare_hf(config: Config, *, out: pathlib.Path, num_steps: int, say: Callable[[str], None]) -> Report:
    """Trains the first steps of a run twice and reports where the two part, if they do.

    Args:
        config: of the run, its date resolved.
        out: folder beside which the exchange with the two programs is kept while they run.
        num_steps: steps to train, at most; the schedule is that of the whole run.
        say: is told what happens.

    Raises:
        ConfigError: packages are missing, the config asks for what the baseline does not do, or a program failed.
    """
    check_packages(NEEDED | ({} if config.lora is None else NEEDED_FOR_ADAPTERS))
    _check_comparable(config, num_steps)
    title = f"{pathlib.Path(config.run_dir or out).name}: jaxsft and transformers"
    with exchange(out, say) as folder:
        say(f"writing the weights and the rows for both, into {folder} for the time being")
        call_apart(write_request, config, folder, num_steps)
        say("transformers trains")
        run_child("jaxsft.baseline.hf", folder, say=say)
        say("jaxsft trains")
        run_child("jaxsft.compare.ours", folder, say=say, log="ours.txt")
        return make_report(folder, title=title)


def write_request(config: Config, folder: pathlib.Path, num_steps: int) -> None:
    """Writes what both programs need: settings, config, weights to begin with, and the examples of each row.

    Raises:
        ConfigError: the config asks for what the baseline does not do.
        WriteError: there is no room for what the two programs write.
    """
    _check_comparable(config, num_steps)
    setup = Setup(config)
    setup.check_fit()
    pretrained = setup.pretrained
    # The weights, and of each program the gradients and the parameters after the first and the last step.
    check_space(folder, 7 * _num_bytes(pretrained))
    check_adapters(pretrained)
    if config.lora is not None and config.lora.dropout:
        raise ConfigError("lora.dropout: PyTorch drops other inputs; compare with 0")
    loader, schedule_steps = setup.loader, setup.num_steps
    assert isinstance(loader, Loader)
    num_steps = min(num_steps, schedule_steps)
    row, positions = _looked_at(loader, pretrained.decoder_config.vocab_size)
    request = {
        "num_steps": num_steps,
        "schedule_steps": schedule_steps,
        "num_microbatches": config.train.num_microbatches,
        "batch_size": config.train.batch_size,
        "seq_len": config.data.seq_len,
        "param_dtype": config.model.param_dtype,
        "compute_dtype": compute_dtype(config.model),
        "learning_rate": config.optim.learning_rate,
        "schedule": config.optim.schedule,
        "warmup_steps": warmup_steps(config.optim, schedule_steps),
        "decay_ratio": config.optim.decay_ratio,
        "final_ratio": 1.0 if config.optim.schedule == "constant" else config.optim.final_ratio,
        "beta1": config.optim.beta1,
        "beta2": config.optim.beta2,
        "epsilon": config.optim.epsilon,
        "weight_decay": config.optim.weight_decay,
        "clip_norm": config.optim.clip_norm,
        "looked_row": row,
        "looked_at": positions,
        "looks_inside": True,
    }
    (folder / "request.json").write_text(json.dumps(request, indent=1))
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    _write_examples(loader, num_steps, folder)
    write_model(config, folder / "model")


def write_model(config: Config, folder: pathlib.Path) -> None:
    """The weights that a run begins with, for programs in PyTorch: in the dtype that ours are held in.

    Of quantised weights these are their values, and not what they were made of. Adapters go into a folder of their own
    beside it, for PEFT.
    """
    setup = Setup(config)
    check_space(folder, _num_bytes(setup.pretrained))
    # Ours reads the source; what we export must be the same model to transformers.
    exported = setup.pretrained._replace(
        config=config.model.model_copy(update={"export_dtype": config.model.param_dtype})
    )
    weights = load_weights(setup.pretrained, setup.mesh, seed=config.seed)
    stored = exported.stored if config.model.quantize == "none" else None
    export_model(exported._replace(lora=None, stored=stored), setup.tokenizer, of_files(weights), folder)
    if setup.pretrained.lora is not None:
        with_base = setup.pretrained._replace(stored=open_folder(folder))
        export_model(with_base, setup.tokenizer, weights, folder.with_name(ADAPTER))


def check_adapters(pretrained: Pretrained) -> None:
    """Refuses adapters that PEFT trains otherwise.

    Raises:
        ConfigError: names the maps.
    """
    if pretrained.lora is None:
        return
    decoder, vocab_size = nnx.merge(*pretrained.model), pretrained.decoder_config.vocab_size
    if fused := fused_maps(decoder, pretrained.family, pretrained.lora, vocab_size=vocab_size):
        raise ConfigError(
            f"lora.targets: {', '.join(fused[:3])}: in these tensors lie several maps, which PEFT trains as one with "
            "one A; leave them out to compare"
        )


def _num_bytes(pretrained: Pretrained) -> int:
    """Bytes of all parameters in float32, in which they are exchanged."""
    return 4 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(pretrained.model.weights))


def _check_comparable(config: Config, num_steps: int) -> None:
    """Raises a ConfigError with all that transformers has nothing to hold against."""
    problems = []
    if num_steps < 1:
        problems.append("--steps: 0 given, expected at least 1 (0 compares the preparation alone, with --baseline trl)")
    problems += [
        f"optim.{key}: transformers computes another router loss, or none; compare with 0"
        for key in ("router_balance", "router_z")
        if getattr(config.optim, key)
    ]
    if config.optim.name != "adamw":
        problems.append(f"optim.name: {config.optim.name}, but PyTorch's loop has AdamW alone; compare with adamw")
    if config.optim.groups or config.optim.stochastic_rounding:
        problems.append("optim.groups, optim.stochastic_rounding: PyTorch's loop has neither; leave them out")
    problems += [f"loss.{key}: compared is the plain loss; leave it out" for key in config.loss.asked]
    if config.train.only is not None:
        problems.append("train.only: PyTorch's loop trains all weights; leave it out")
    if config.data.stream:
        problems.append("data.stream: true, but only prepared rows can be compared; set it to false")
    dtypes = {"model.param_dtype": config.model.param_dtype, "optim.moment_dtype": config.optim.moment_dtype}
    problems += [
        f"{key}: {dtype}, but PyTorch rounds such numbers otherwise; compare with float32"
        for key, dtype in dtypes.items()
        if dtype != "float32"
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def _looked_at(loader: Loader, vocab_size: int) -> tuple[int, list[int]]:
    """The row of the first step with the most examples, and positions spread over its tokens."""
    segments = loader.batch(0).segment_ids
    row = int(segments.max(axis=1).argmax())
    count = int((segments[row] > 0).sum())
    most = min(MOST_LOOKED_AT, max(MOST_LOGITS // vocab_size, 1), count)
    return row, sorted({int(at) for at in np.linspace(0, count - 1, most)})


def _write_examples(loader: Loader, num_steps: int, folder: pathlib.Path) -> None:
    """The examples of each row, as they were before they were packed and shifted; see `baseline/hf.py`."""
    segments, tokens, weights = [], [], []
    first = 0
    for step in range(num_steps):
        for row, row_id in enumerate(loader.row_ids(step)):
            start = 0
            for index in loader.examples_in_row(int(row_id)):
                example = loader.dataset.example(int(index))
                length = len(example.tokens)
                segments.append((step, row, start, first, length))
                tokens.append(example.tokens)
                weights.append(example.loss_weights)
                start, first = start + length, first + length
    np.save(folder / "segments.npy", np.array(segments, np.int64))
    np.save(folder / "tokens.npy", np.concatenate(tokens).astype(np.int32))
    np.save(folder / "weights.npy", np.concatenate(weights).astype(np.float32))


def make_report(folder: pathlib.Path, *, title: str) -> Report:
    """What both programs left, as a report."""
    request = json.loads((folder / "request.json").read_text())
    checks = check_runs(folder, compute_dtype=request["compute_dtype"])
    passed = all(check.passed is not False for check in checks)
    return Report(
        title=title,
        command="",
        verdict=verdict(checks, num_steps=request["num_steps"]),
        passed=passed,
        checks=tuple(checks),
        runs=(read_side(folder / "ours", "jaxsft"), read_side(folder / "theirs", "transformers")),
        differences=(),
        difference_counts={},
        explanations={},
        facts=_facts(folder),
    )


def read_side(folder: pathlib.Path, name: str) -> Run:
    """One of the two runs, from its metrics and facts."""
    lines = [from_json_line(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    facts = json.loads((folder / "facts.json").read_text())
    figures, caveats = figures_of(lines)
    return Run(
        name=name,
        kind=name,
        source=folder.name,
        lines=tuple(lines),
        figures=figures | {"startup_seconds": facts["startup_seconds"]},
        settings=facts["settings"],
        caveats=(*facts["caveats"], *caveats),
    )


def _facts(folder: pathlib.Path) -> dict[str, str]:
    """Versions and devices of both."""
    found: dict[str, str] = {}
    for side in ("ours", "theirs"):
        facts = json.loads((folder / side / "facts.json").read_text())
        found |= facts["versions"]
        found["device of jaxsft" if side == "ours" else "device of the baseline"] = facts["device"]
    return found
