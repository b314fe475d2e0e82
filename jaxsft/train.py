"""A whole run on one page: prepare, start or continue, train, evaluate, export.

`train(config)` reads top to bottom in the order in which things happen. Everything exact lives below it: which tokens
are trained in `data/`, what a step computes in `step.py`, what a checkpoint promises in `checkpoint.py`.
"""

import contextlib
import functools
import hashlib
import json
import math
import time
from typing import Any

import jax
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from jaxsft.batch import Batch
from jaxsft.checkpoint import Checkpointer, StopSignal, claim_run_folder
from jaxsft.config import Config, ConfigError, config_changes, dump_config
from jaxsft.data.formats import load_conversations
from jaxsft.data.loader import Loader, Prepared, prefetch, prepare
from jaxsft.evaluate import Examiner, describe, make_questions
from jaxsft.mesh import check_divisible, make_mesh
from jaxsft.metrics import Console, MetricsFile, Speedometer, StepMetrics, Stopwatch, summarise
from jaxsft.pretrained import OpenTokenizer, Pretrained, export_model, load_params, open_model, open_tokenizer
from jaxsft.preview import make_preview
from jaxsft.preview_page import write_html
from jaxsft.report import plot_run, start_summary
from jaxsft.step import abstract_state, init_state, make_train_step, put_batch

DONE, STOPPED = 0, 75
"""Exit codes; a run that was stopped continues when it is started again."""


def train(config: Config) -> int:
    """Trains, or continues, the run that a config describes; returns the exit code.

    Raises:
        ConfigError, DataError: mistakes of the user; before a weight is read where that is possible.
        SaveError: a checkpoint could not be written.
    """
    console = Console()
    folder = run_folder(config)
    mesh = make_mesh(config.mesh)

    # What is trained, and on what.
    tokenizer = open_tokenizer(config.model, config.data.chat_template)
    pretrained = open_model(config.model, tokenizer)
    num_microbatches = _check_batch(config, pretrained, mesh)
    data = prepare_data(config, tokenizer, config.data.train)
    loader = make_loader(config, data)
    # Rounded first: 1.1 * 50 is a little more than 55 in floating point.
    num_steps = config.train.steps or math.ceil(round(config.train.epochs * loader.steps_per_epoch, 6))
    frozen: Any = nnx.State({})
    examiner = make_examiner(config, tokenizer, pretrained, mesh)
    claim_run_folder(folder, _fingerprint(config, data, pretrained))

    checkpointer = Checkpointer(folder / "checkpoints", config.checkpoint, console.say)
    with contextlib.closing(checkpointer), contextlib.closing(console), StopSignal() as stop:
        # The state: where a former start of this run left off, or the weights to begin with.
        state: Any = checkpointer.restore(abstract_state(pretrained.model.params, config.optim, mesh))
        if state is None:
            state = init_state(load_params(pretrained, mesh, seed=config.seed), config.optim, mesh)
        first = int(state.step)
        max_position = pretrained.decoder_config.max_position
        console.say(
            start_summary(config, state, loader, data.report, mesh, num_steps=num_steps, max_position=max_position)
        )
        if first >= num_steps and (folder / "export").exists():
            console.say(f"this run is finished; its model is in {folder / 'export'}")
            return DONE
        _describe_run(folder, config, loader, data, tokenizer, console)

        train_step = make_train_step(
            pretrained.model, frozen, config.optim, num_steps=num_steps, num_microbatches=num_microbatches, mesh=mesh
        )
        metrics_file = MetricsFile(folder / "metrics.jsonl", step=first)
        totals, best_loss = metrics_file.totals(), checkpointer.best_loss()
        speedometer = Speedometer(**_flop_sizes(pretrained))
        watch = Stopwatch()
        window: list[StepMetrics] = []

        def report(done: int) -> None:
            """One line of metrics, over the steps since the last one."""
            nonlocal totals
            if not window:
                return
            steps = jax.device_get(window)
            window.clear()
            line, totals = summarise(steps, totals, batch_positions=math.prod(loader.shape))
            line |= speedometer.read(steps, watch) | {"rows_crc": loader.rows_crc(done - len(steps), done)}
            metrics_file.write({"step": done, "epoch": done / loader.steps_per_epoch} | line)
            console.step(done, num_steps, line)

        def evaluate(step: int, params: Any) -> float:
            if examiner is None:
                return math.inf
            result = examiner.examine(params)
            metrics_file.write({"step": step} | result.metrics)
            console.say(f"step {step}  {describe(result)}")
            return result.metrics["eval_loss"]

        if first == 0:
            evaluate(0, state.params)
        make_batch = functools.partial(_place_batch, loader, mesh)
        with contextlib.closing(prefetch(make_batch, first, num_steps)) as batches:
            watch.lap()
            for step in range(first, num_steps):
                if signal := stop.at(step):
                    report(step)
                    checkpointer.save(step, state)
                    checkpointer.wait()
                    console.say(f"{signal}: saved step {step}; start the same command again to continue")
                    return STOPPED
                batch = watch.wait(batches)
                with jax.set_mesh(mesh):
                    state, step_metrics = train_step(state, frozen, batch)
                window.append(step_metrics)
                done = step + 1

                is_last = done == num_steps
                is_evaluated = is_last or (config.eval.every is not None and done % config.eval.every == 0)
                is_saved = is_last or done % config.checkpoint.every == 0
                # Whatever is saved has its line, so that a run continued from it goes on with whole counts.
                if is_evaluated or is_saved or done % config.train.log_every == 0:
                    report(done)
                pause = time.perf_counter()
                eval_loss = evaluate(done, state.params) if is_evaluated else math.inf
                if is_saved or eval_loss < best_loss:
                    checkpointer.save(done, state, eval_loss=eval_loss)
                best_loss = min(eval_loss, best_loss)
                watch.leave_out(pause)

        checkpointer.wait()
        export_model(pretrained, tokenizer, state.params, folder / "export")
    if jax.process_index() == 0:
        console.say(f"loss curve: {plot_run(folder)}")
    console.say(f"model, ready for transformers: {folder / 'export'}")
    if totals.skipped_steps:
        console.say(f"WARNING: {totals.skipped_steps:.0f} steps were skipped, as their loss or gradient was not finite")
    return DONE


def run_folder(config: Config) -> epath.Path:
    """The folder of a run, absolute.

    Raises:
        ConfigError: a bucket, which cannot hold an export yet.
    """
    assert config.run_dir is not None, "load_config fills it in"
    if "://" in config.run_dir:
        raise ConfigError(f"run_dir: {config.run_dir}: only folders that are mounted on the hosts can be used so far")
    return epath.Path(config.run_dir).expanduser().resolve()


def make_examiner(config: Config, tokenizer: OpenTokenizer, pretrained: Pretrained, mesh: Mesh) -> Examiner | None:
    """What examines the states of this run on `data.eval`; None where there is none.

    Raises:
        DataError: the held-out rows are not usable.
    """
    if config.data.eval is None:
        return None
    data = prepare_data(config, tokenizer, config.data.eval, limit=config.eval.examples)
    conversations = load_conversations(config.data.eval, format=config.data.format, limit=config.eval.examples)
    rows = config.train.microbatch_size or config.train.batch_size
    return Examiner(
        config.eval,
        model=pretrained.model,
        frozen=nnx.State({}),
        mesh=mesh,
        loader=Loader(
            data,
            seq_len=config.data.seq_len,
            batch_size=rows,
            seed=config.seed,
            packing=config.data.packing,
            shuffle=False,
        ),
        questions=make_questions(conversations.conversations, tokenizer.tokenizer),
        tokenizer=tokenizer,
    )


def prepare_data(config: Config, tokenizer: OpenTokenizer, source: str, *, limit: int | None = None) -> Prepared:
    return prepare(
        config.data,
        source,
        tokenizer.tokenizer,
        tokenizer_files_key=tokenizer.key,
        stops=tokenizer.stops,
        limit=limit,
    )


def make_loader(config: Config, data: Prepared) -> Loader:
    return Loader(
        data,
        seq_len=config.data.seq_len,
        batch_size=config.train.batch_size,
        seed=config.seed,
        packing=config.data.packing,
    )


def _place_batch(loader: Loader, mesh: Mesh, step: int) -> Batch:
    return put_batch(functools.partial(loader.batch, step), loader.shape, mesh)


def _check_batch(config: Config, pretrained: Pretrained, mesh: Mesh) -> int:
    """Refuses a mesh that the model or the batch does not fit; returns the number of microbatches."""
    rows = config.train.microbatch_size or config.train.batch_size
    key = "train.microbatch_size" if config.train.microbatch_size else "train.batch_size"
    check_divisible(mesh, pretrained.model.params, {f"{key} (b)": rows, "data.seq_len (t)": config.data.seq_len})
    return config.train.batch_size // rows


def _fingerprint(config: Config, data: Prepared, pretrained: Pretrained) -> dict[str, Any]:
    """What must be equal for a run to be continued: the data in its order, and the model."""
    model = json.dumps(pretrained.hf_config, sort_keys=True).encode()
    return {f"data: {name}": value for name, value in data.report["fingerprint"].items()} | {
        "seed": config.seed,
        "data.packing": config.data.packing,
        "train.batch_size": config.train.batch_size,
        "model.weights": config.model.weights,
        "model: config.json": hashlib.sha256(model).hexdigest()[:16],
    }


def _describe_run(
    folder: epath.Path, config: Config, loader: Loader, data: Prepared, tokenizer: OpenTokenizer, console: Console
) -> None:
    """Writes the resolved config and the preview of the first batch; says what a continued run does otherwise now."""
    if jax.process_index() != 0:
        return
    path = folder / "config.yaml"
    if path.exists():
        for change in config_changes(path.read_text(encoding="utf-8"), config):
            console.say(f"changed since this run began: {change}")
    path.write_text(dump_config(config), encoding="utf-8")
    preview = make_preview(loader, data, tokenizer.tokenizer, stops=tokenizer.stops, title=folder.name)
    write_html(preview, folder / "preview.html")


def _flop_sizes(pretrained: Pretrained) -> dict[str, int]:
    """What `metrics.train_flops` needs to know of a model."""
    config = pretrained.decoder_config
    leaves = jax.tree.leaves(pretrained.model.params)
    matmul_params = sum(leaf.size for leaf in leaves if leaf.ndim > 1)
    if not config.tie_embeddings:
        matmul_params -= config.vocab_size * config.hidden_size  # the embedding table is looked up, not multiplied
    return {
        "matmul_params": matmul_params,
        "attention_width": config.num_layers * config.num_heads * config.head_dim,
    }
