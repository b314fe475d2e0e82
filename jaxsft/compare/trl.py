"""The run of a config twice: ours, and TRL's SFTTrainer on the same source rows as a user runs it.

In: a config. Out: a `Report`. Both prepare the same conversations, each in its own way, and every token and weight that
differs is given a cause (`tokens.py`). TRL trains with its own order, packing and collator, so that the losses of the
steps are not of the same rows: what can be equal is its loss on rows that it prepared, and that is compared with ours.
"""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

from jaxsft.batch import Batch, Example
from jaxsft.batches.loader import Loader, make_batch
from jaxsft.batches.prepare import read_items
from jaxsft.compare import tokens
from jaxsft.compare.child import NEEDED, NEEDED_FOR_ADAPTERS, call_apart, check_packages, run_child
from jaxsft.compare.exchange import exchange
from jaxsft.compare.findings import NUM_CHECKED, Same, make_report
from jaxsft.compare.hf import ADAPTER, check_adapters, read_side, write_model
from jaxsft.compare.trl_rows import Prepared, habits_of, prepared_rows, trl_arguments, trl_rows
from jaxsft.config import Config, ConfigError
from jaxsft.config_files import dump_config
from jaxsft.folders.pretrained import compute_dtype, load_weights
from jaxsft.report.records import Report, Run
from jaxsft.setup import Setup
from jaxsft.training.step import divisor, put_batch, split_microbatches, summed_gradients

NEEDED_FOR_TRL = NEEDED | {"trl": "1.16"}
MOST_ROWS = 20_000
"""Rows that are compared and given to TRL, from the start of each source."""
TOLERANCES = {"float32": Same(1e-5, 1e-4), "bfloat16": Same(2e-2, 2e-2)}


def compare_trl(config: Config, *, out: pathlib.Path, num_steps: int, say: Callable[[str], None]) -> Report:
    """Prepares the rows of a run twice, trains its first steps twice, and reports what differs and why.

    Args:
        config: of the run, its date resolved.
        out: folder beside which the exchange with the programs is kept while they run.
        num_steps: steps to train, at most; 0 compares the preparation alone.
        say: is told what happens.

    Raises:
        ConfigError: packages are missing, the config asks for what TRL does not do, or a program failed.
    """
    check_packages(NEEDED_FOR_TRL | ({} if config.lora is None else NEEDED_FOR_ADAPTERS))
    _check(config)
    setup = Setup(config, say=say)
    check_adapters(setup.pretrained)
    loader, encoder = setup.loader, setup.encoder
    assert isinstance(loader, Loader)
    items = [item for s in config.data.train for item in read_items(config.data, s, encoder, limit=MOST_ROWS)]
    schedule_steps = setup.num_steps
    num_steps = min(num_steps, schedule_steps)
    with exchange(out, say) as folder:
        rows = trl_rows(items, config)
        say(f"{len(rows.lines):,} rows go to TRL as {rows.shape}")
        lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in rows.lines]
        (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
        call_apart(write_model, config, folder / "model")
        found, runs = _run_trl(config, folder, rows.shape, num_steps=num_steps, schedule_steps=schedule_steps, say=say)
        if num_steps:
            say("jaxsft trains")
            runs.insert(0, _train_ours(config, folder, num_steps, schedule_steps, say))
        say("comparing")
        habits = habits_of(setup.tokenizer, config, rows.shape, found)
        compared = prepared_rows(items, encoder, setup.tokenizer, config, found)
        results = [tokens.compare(row, habits) for row in compared]
        of_first = call_apart(_of_first, config, found)
        reports = [source.report for source in loader.dataset.sources]
        facts = _facts(compared, found, reports, shape=rows.shape) | ({} if not num_steps else _versions(folder))
    return make_report(
        compared,
        results,
        habits,
        runs=runs,
        of_first=of_first,
        tolerances=TOLERANCES[compute_dtype(config.model)],
        refusal=found.about["refusal"],
        title=f"{pathlib.Path(config.run_dir or out).name}: jaxsft and TRL",
        facts=facts,
    )


def _run_trl(
    config: Config,
    folder: pathlib.Path,
    shape: str,
    *,
    num_steps: int,
    schedule_steps: int,
    say: Callable[[str], None],
) -> tuple[Prepared, list[Run]]:
    """What TRL makes of the rows, and its runs: packed as the config says, and unpacked, which is its default."""
    runs: list[Run] = []
    found: Prepared | None = None
    arguments = trl_arguments(config, shape, schedule_steps=schedule_steps)
    for packing in dict.fromkeys((config.data.packing, False)):
        if found is not None and not num_steps:
            break
        here = folder / f"trl-{'packed' if packing else 'unpacked'}"
        here.mkdir()
        request = {
            "rows": "../rows.jsonl",
            "model": "../model",
            "tokenizer": "../model",
            "adapter": f"../{ADAPTER}" if config.lora is not None else None,
            "param_dtype": config.model.param_dtype,
            "compute_dtype": compute_dtype(config.model),
            "arguments": arguments | {"packing": packing},
            "num_steps": num_steps,
            "prepares": found is None,
            "num_checked": NUM_CHECKED,
        }
        (here / "request.json").write_text(json.dumps(request, indent=1))
        say(f"TRL {'prepares' if found is None else 'trains unpacked'}")
        run_child("jaxsft.baseline.trl", here, say=say)
        name = "TRL" if found is None else "TRL, unpacked"
        found = found or Prepared.read(here / "theirs")
        if num_steps:
            run = read_side(here / "theirs", name)
            runs.append(run._replace(kind="trl", caveats=(*run.caveats, *_trl_caveats(run, found))))
    assert found is not None
    return found, runs


def _check(config: Config) -> None:
    """Refuses what has no counterpart in TRL."""
    if config.data.stream:
        raise ConfigError("data.stream: true, but only prepared rows can be compared; set it to false")
    if isinstance(config.data.train_on, list) or config.data.train_on == "last_exchange":
        raise ConfigError(
            f"data.train_on: {config.data.train_on} given, but TRL masks all roles or those of the assistant; compare "
            "with assistant, last_turn or all"
        )
    if config.data.train_stop == "last":
        raise ConfigError("data.train_stop: last, but TRL trains every stop token; compare with every")
    if config.optim.name != "adamw":
        raise ConfigError(f"optim.name: {config.optim.name}, but TRL is run with AdamW; compare with adamw")
    if config.train.only is not None:
        raise ConfigError("train.only: TRL trains all weights, or adapters; leave it out")
    if config.optim.groups or config.optim.stochastic_rounding:
        raise ConfigError("optim.groups, optim.stochastic_rounding: TRL has neither; leave them out")
    if refused := [key for key in ("router_balance", "router_z") if getattr(config.optim, key)]:
        raise ConfigError(f"{', '.join(f'optim.{key}' for key in refused)}: TRL computes another router loss; use 0")
    if asked := config.loss.asked:
        raise ConfigError(f"{', '.join(f'loss.{key}' for key in asked)}: compared is the plain loss; leave it out")


# Losses and runs.


def _of_first(config: Config, found: Prepared) -> tuple[Same, Same]:
    """Loss and gradient norm, ours and TRL's, of the same tokens and the same mask: those that TRL prepared."""
    setup = Setup(config)
    mesh, pretrained = setup.mesh, setup.pretrained
    weights = load_weights(pretrained, mesh, seed=config.seed)
    examples = []
    for index in found.first["examples"]:
        ids, trained = found.example(index)
        examples.append([Example(ids.astype(np.int32), trained.astype(np.float32))])
    # Rows and positions are filled up to numbers that the mesh can cut evenly.
    rows, multiple = -(-len(examples) // mesh.size) * mesh.size, 128 * mesh.shape["context"]
    seq_len = -(-max(len(each.tokens) for (each,) in examples) // multiple) * multiple
    batch = make_batch([*examples, *[[]] * (rows - len(examples))], seq_len)
    placed = put_batch(lambda part: jax.tree.map(lambda leaf: leaf[part], batch), batch.tokens.shape, mesh)

    @jax.jit
    def loss_and_norm(params: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        one = split_microbatches(batch, 1)
        sums = summed_gradients(pretrained.model.graphdef, params, frozen, one, optim=config.optim)
        weight = divisor(sums.loss.weight_sum)
        return sums.loss.loss_sum / weight, optax.tree.norm(sums.gradients) / weight

    with jax.set_mesh(mesh):
        ours = jax.device_get(loss_and_norm(*pretrained.model.split(weights), placed))
    return Same(*map(float, ours)), Same(found.first["loss"], found.first["grad_norm"])


def _train_ours(
    config: Config, folder: pathlib.Path, num_steps: int, schedule_steps: int, say: Callable[[str], None]
) -> Run:
    rows = config.train.microbatch_rows
    request = {
        "num_steps": num_steps,
        "schedule_steps": schedule_steps,
        "num_microbatches": config.train.batch_size // rows,
        "batch_size": config.train.batch_size,
        "seq_len": config.data.seq_len,
        "packing": config.data.packing,
        "looks_inside": False,
    }
    (folder / "request.json").write_text(json.dumps(request, indent=1))
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    run_child("jaxsft.compare.ours", folder, say=say, log="ours.txt")
    return read_side(folder / "ours", "jaxsft")


def _trl_caveats(run: Run, found: Prepared) -> list[str]:
    caveats = [
        "its loss is a token mean over the whole step (num_items_in_batch) of the tokens that TRL trains, in the order "
        "in which TRL draws rows: a step is not the same rows as ours",
        "its warm-up begins at 0 and reaches the peak one step after ours; the decay is the same",
        "seconds are of the step alone; rows are collated between steps",
    ]
    if found.about["refusal"]:
        caveats.insert(0, "TRL refused assistant_only_loss for this chat template, so it trains every token")
    if run.settings.get("padding_free"):
        caveats.append("packed rows of a batch are joined to one sequence (padding_free)")
    return caveats


def _versions(folder: pathlib.Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*/facts.json")) + sorted(folder.glob("*/theirs/facts.json")):
        facts = json.loads(path.read_text())
        found |= facts["versions"]
        found["device of jaxsft" if path.parent.name == "ours" else "device of the baseline"] = facts["device"]
    return found


def _facts(
    compared: Sequence[tokens.Row], found: Prepared, reports: Sequence[dict[str, Any]], *, shape: str
) -> dict[str, str]:
    """What was compared, and how much of it there is on each side."""
    ours = sum(int(np.count_nonzero(piece.weights[1:])) for row in compared for piece in row.pieces)
    theirs = sum(int(np.count_nonzero(row.trained[1:])) for row in compared)
    tokens_ours = sum(len(piece.tokens) for row in compared for piece in row.pieces)
    tokens_theirs = sum(len(row.theirs) for row in compared if row.theirs is not None)
    neither = sum(not row.pieces and row.theirs is None for row in compared)
    num_rows, num_bad = sum(each["rows"] for each in reports), sum(sum(each["bad_rows"].values()) for each in reports)
    is_part = any(each["rows"] > MOST_ROWS for each in reports)
    left = f" of {num_rows:,}: the first {MOST_ROWS:,} of each source" if is_part else ""
    return {
        "rows compared": f"{len(compared):,}{left}",
        "rows of which neither has an example": f"{neither:,}",
        "bad rows, left out by ours": f"{num_bad:,}",
        "rows go to TRL as": shape,
        "tokens, ours": f"{tokens_ours:,}",
        "tokens, TRL": f"{tokens_theirs:,}",
        "trained tokens, ours": f"{ours:,}",
        "trained tokens, TRL": f"{theirs:,}",
        "TRL masks by": "turns of the assistant"
        if found.about["assistant_only_loss"]
        else "completion"
        if found.about["completion_only_loss"]
        else "nothing",
        "TRL's training template": "patched" if found.about["training_template"] else "the template itself",
    }
