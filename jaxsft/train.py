"""A whole run on one page: prepare, start or continue, train, evaluate, export.

`train(config)` reads top to bottom in the order in which things happen. Everything exact lives below it: which tokens
are trained in `chat/`, what a step computes in `training/step.py`, what a checkpoint promises in
`training/checkpoint.py`.
"""

import contextlib
import datetime
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import yaml
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxsft.answers.evaluate import Examiner, HeldOut, describe, describe_questions, make_questions
from jaxsft.batch import Batch
from jaxsft.batches.loader import Loader, prefetch
from jaxsft.batches.mixture import Dataset, check_weights, make_dataset
from jaxsft.batches.overlap import check_overlap
from jaxsft.batches.prepare import prepare, read_items
from jaxsft.batches.stream import StreamLoader
from jaxsft.chat.encoder import ChatEncoder
from jaxsft.config import Config, ConfigError, SourceConfig
from jaxsft.config_files import config_changes, dump_config
from jaxsft.disk.writing import at_home, read_file, write_whole
from jaxsft.folders.export import export_problem
from jaxsft.folders.pretrained import (
    OpenTokenizer,
    Pretrained,
    check_positions,
    export_model,
    load_params,
    open_model,
    open_tokenizer,
)
from jaxsft.mesh import check_divisible, make_mesh
from jaxsft.preview.make import make_preview
from jaxsft.preview.page import write_html
from jaxsft.report.picture import plot_run
from jaxsft.rows.strict import DataError
from jaxsft.training.checkpoint import Checkpointer, sealed_steps
from jaxsft.training.console import Console
from jaxsft.training.metrics import (
    Diverged,
    SkipWatch,
    Speedometer,
    StepMetrics,
    Stopwatch,
    Totals,
    dump_steps,
    load_steps,
    matmul_params,
    summarise,
)
from jaxsft.training.metrics_file import MetricsFile
from jaxsft.training.profile import Profiler, check_profile
from jaxsft.training.run_folder import check_progress, claim_run_folder, template_date
from jaxsft.training.step import abstract_state, init_state, make_train_step, non_finite, put_batch
from jaxsft.training.stop import STOPPED, StopSignal
from jaxsft.training.summary import describe_lost, note_versions, start_summary
from jaxsft.training.writers import check_writers, open_writers

DONE = 0


def train(config: Config, *, restart: bool = False) -> int:
    """Trains, or continues, the run that a config describes; returns the exit code.

    Args:
        config: of the run.
        restart: move the run that is in its folder aside, and begin anew.

    Raises:
        ConfigError, DataError: mistakes of the user; before a weight is read where that is possible.
        SaveError, WriteError: a checkpoint or another file could not be written.
        Diverged: too many steps were skipped as their loss or gradient was not finite, or a parameter is not finite.
    """
    with StopSignal() as stop:
        return _train(config, stop, restart=restart)


def _train(config: Config, stop: StopSignal, *, restart: bool) -> int:
    console = Console()
    folder = run_folder(config)
    config = resolve_date(config, None if restart else folder)
    mesh = make_mesh(config.mesh)
    check_writers(config.log)

    # What is trained, and on what.
    tokenizer = open_tokenizer(config.model, config.data.chat_template, set_eos=config.data.set_eos)
    pretrained = open_model(config.model, tokenizer)
    num_microbatches = check_batch(config, pretrained, mesh)
    encoder = make_encoder(config, tokenizer)
    loader = make_loader(config, tokenizer, encoder, say=console.say)
    num_steps = config.train.steps or loader.num_steps(config.train.epochs)
    check_profile(config.log, num_steps, folder / "profile")
    frozen: Any = nnx.State({})
    examiner = make_examiner(config, tokenizer, encoder, pretrained, mesh, trained=loader, say=console.say)
    with contextlib.ExitStack() as closing:
        closing.enter_context(contextlib.closing(loader))
        fingerprint = _fingerprint(config, loader, pretrained)
        lock = claim_run_folder(folder, fingerprint, restart=restart, say=console.say)
        if lock is not None:
            closing.callback(lock.release)
        run = {"fingerprint": fingerprint, "config": dump_config(config)}
        checkpointer = Checkpointer(folder / "checkpoints", config.checkpoint, console.say, run=run)
        closing.enter_context(contextlib.closing(checkpointer))
        closing.enter_context(contextlib.closing(console))
        stop.can_save()
        if isinstance(loader, StreamLoader):
            loader.use_index(folder / "stream.jsonl", is_writer=jax.process_index() == 0)

        # The state: where a former start of this run left off, or the weights to begin with.
        stop.doing = "reading the checkpoint, and stopping then"
        if steps := sealed_steps(folder / "checkpoints"):
            console.say(f"reading checkpoint {steps[-1]}, to the byte")
        state: Any = checkpointer.restore(abstract_state(pretrained.model.params, config.optim, mesh))
        if state is None:
            check_progress(folder)
            stop.doing = "loading the weights, saving then"
            console.say(f"loading {config.model.path} ({config.model.weights} weights)")
            state = init_state(load_params(pretrained, mesh, seed=config.seed), config.optim, mesh)
        checkpointer.tidy()
        first = int(state.step)
        notes = [*tokenizer.notes, *pretrained.notes, *encoder.notes, *_source_notes(loader, examiner)]
        decoder_config = pretrained.decoder_config
        console.say(
            start_summary(config, state, loader, mesh, num_steps=num_steps, decoder_config=decoder_config, notes=notes)
        )
        saved = checkpointer.progress
        metrics_file = MetricsFile(folder / "metrics.jsonl", step=first, sealed=saved.get("metrics"), say=console.say)
        if first >= num_steps and (folder / "export").exists():
            problem = export_problem(folder / "export")
            if problem is None:
                console.say(f"this run is finished; its model is in {folder / 'export'} (remove it to export anew)")
                return DONE
            console.say(f"{folder / 'export'}: {problem}; exporting again, from checkpoint {first}")
        _describe_run(folder, config, loader, tokenizer, console)

        train_step = make_train_step(
            pretrained.model, frozen, config.optim, num_steps=num_steps, num_microbatches=num_microbatches, mesh=mesh
        )
        profiler = Profiler(
            config.log.profile_steps, folder / "profile", first=first, num_steps=num_steps, say=console.say
        )
        writers = open_writers(
            config.log, folder, step=first, file=metrics_file, settings=config.model_dump(), say=console.say
        )
        closing.enter_context(contextlib.closing(profiler))
        for writer in writers:
            closing.enter_context(contextlib.closing(writer))
        totals = Totals(*saved["totals"]) if "totals" in saved else metrics_file.totals()
        best_loss = checkpointer.best_loss()
        window: list[StepMetrics] = load_steps(saved.get("window", []))
        skips = SkipWatch(
            num_steps=num_steps,
            max_skipped=config.optim.max_skipped,
            first=first - len(window),
            skipped=int(totals.skipped_steps),
            in_a_row=saved.get("skipped_in_a_row", 0),
        )
        lost: dict[str, int] = {}
        speedometer = Speedometer(**_flop_sizes(pretrained))
        watch = Stopwatch()

        def write(line: dict[str, Any]) -> None:
            if lock is not None:
                lock.check()
            metrics_file.write(line)
            for writer in writers:
                writer.write(line)

        def report(done: int) -> None:
            """One line of metrics, over the steps since the last one."""
            nonlocal totals, lost
            if not window:
                return
            steps = jax.device_get(window)
            watch.caught_up()
            window.clear()
            line, totals = summarise(steps, totals, batch_positions=math.prod(loader.shape))
            line |= speedometer.read(steps, watch) | {"rows_crc": loader.rows_crc(done - len(steps), done)}
            rows = loader.rows_so_far(done)
            write({"step": done, "epoch": loader.epochs_done(done)} | line | rows)
            console.step(done, num_steps, line)
            if lost != (lost := {name: count for name, count in rows.items() if "/" in name}):
                console.say(f"of {rows['stream_rows']:,} rows read: " + describe_lost(lost))
            if problem := skips.see(steps):
                raise _diverged(problem, checkpointer, first_bad=skips.first_of_row)

        def save(step: int, *, eval_loss: float = math.inf) -> None:
            """With all that a continued run must know, the steps that no line reports yet included."""
            if lock is not None:
                lock.check()
            progress = {
                "totals": list(totals),
                "metrics": metrics_file.state(),
                "window": dump_steps(jax.device_get(window)),
                "window_seconds": watch.so_far(),
                "skipped_in_a_row": skips.in_a_row,
            }
            checkpointer.save(step, state, eval_loss=eval_loss, progress=progress)

        def evaluate(step: int, params: Any) -> float:
            if examiner is None:
                return math.inf
            stop.doing = f"evaluating at step {step}, saving then"
            console.say(f"step {step}: evaluating on held-out rows")
            result = examiner.examine(params)
            write({"step": step} | result.metrics)
            console.say(f"step {step}  {describe(result)}")
            return result.metrics["eval_loss"]

        if first == 0:
            evaluate(0, state.params)
        make_batch = functools.partial(_place_batch, loader, mesh, pretrained.decoder_config.vocab_size)
        with contextlib.closing(prefetch(make_batch, first, num_steps)) as batches:
            watch.begin(saved.get("window_seconds", 0.0) if window else 0.0)
            for step in range(first, num_steps):
                if signal := stop.at(step):
                    save(step)
                    checkpointer.wait()
                    console.say(f"{signal}: saved step {step}; start the same command again to continue")
                    return STOPPED
                batch = watch.wait(batches)
                if step == first:
                    stop.doing = f"compiling and finishing step {step + 1}, saving"
                    console.say("compiling the train step")
                watch.launching()
                with jax.set_mesh(mesh), jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state, step_metrics = train_step(state, frozen, batch)
                watch.launched(step_metrics.grad_norm)
                window.append(step_metrics)
                done = step + 1

                is_last = done == num_steps
                is_evaluated = is_last or (config.eval.every is not None and done % config.eval.every == 0)
                is_saved = is_last or done % config.checkpoint.every == 0
                # Whatever is saved has its line, so that a run continued from it goes on with whole counts.
                if is_evaluated or is_saved or profiler.is_edge(done) or done % config.log.every == 0:
                    report(done)
                pause = time.perf_counter()
                profiler.stop_at(done, state, functools.partial(_compiled, train_step, state, frozen, batch, mesh))
                eval_loss = evaluate(done, state.params) if is_evaluated else math.inf
                if is_last and (names := non_finite(state.params)):
                    raise _diverged(f"not finite: {', '.join(names)}", checkpointer, first_bad=done)
                # Not while steps are skipped: what was good before must not make room for what may not be.
                if (is_saved or eval_loss < best_loss) and (is_last or not skips.in_a_row):
                    save(done, eval_loss=eval_loss)
                    best_loss = min(eval_loss, best_loss)
                profiler.start_at(done, state)
                watch.leave_out(pause)

        checkpointer.wait()
        stop.doing = "finishing the export"
        if lock is not None:
            lock.check()
        console.say(f"exporting to {folder / 'export'}")
        export_model(pretrained, tokenizer, state.params, folder / "export", say=console.say)
        if jax.process_index() == 0:
            console.say(f"loss curve: {plot_run(folder, say=console.say)}")
    console.say(f"model, ready for transformers: {folder / 'export'}")
    if totals.skipped_steps:
        console.say(f"WARNING: {totals.skipped_steps:.0f} steps were skipped, as their loss or gradient was not finite")
    return DONE


def _diverged(problem: str, checkpointer: Checkpointer, *, first_bad: int) -> Diverged:
    checkpointer.wait()
    good = checkpointer.newest_before(first_bad)
    where = "no checkpoint was saved before that"
    if good is not None:
        where = f"the last good checkpoint is {good} (to train on from it, move those after it away)"
    return Diverged(
        f"the run has diverged: {problem}; nothing was exported; {where}; optim.learning_rate may be too high, or rows "
        "and weights hold extreme values"
    )


def run_folder(config: Config) -> epath.Path:
    """The folder of a run, absolute.

    Raises:
        ConfigError: a bucket, which cannot hold an export yet.
    """
    assert config.run_dir is not None, "load_config fills it in"
    if "://" in config.run_dir:
        raise ConfigError(f"run_dir: {config.run_dir}: only folders that are mounted on the hosts can be used so far")
    return epath.Path(at_home(config.run_dir, "run_dir")).resolve()


def resolve_date(config: Config, folder: epath.Path | None) -> Config:
    """The config with the day that templates see: that on which the run in `folder` began, else today, for all."""
    if config.data.template_date is not None:
        return config
    began = template_date(folder) if folder is not None else None
    today = began or datetime.date.today()
    if jax.process_count() > 1:  # it may be midnight between two of them
        today = datetime.date.fromordinal(int(multihost_utils.broadcast_one_to_all(today.toordinal())))
    data = config.data.model_copy(update={"template_date": today.isoformat()})
    return config.model_copy(update={"data": data})


def make_encoder(config: Config, tokenizer: OpenTokenizer) -> ChatEncoder:
    """What makes examples of rows, for training and held-out ones alike.

    Raises:
        DataError: the chat template cannot be trained on; says why, and what would help.
    """
    return ChatEncoder(tokenizer.tokenizer, config.data, tokenizer.stops)


def make_loader(
    config: Config,
    tokenizer: OpenTokenizer,
    encoder: ChatEncoder,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> Loader | StreamLoader:
    """The batches of the run, prepared or streamed.

    Args:
        config: of the run.
        tokenizer: of the run.
        encoder: of the run.
        say: is told how far a long preparation is.

    Raises:
        DataError, ConfigError: the training rows are not usable.
    """
    if config.data.stream:
        return StreamLoader(
            config.data,
            encoder,
            tokenizer_files_key=tokenizer.key,
            batch_size=config.train.batch_size,
            seed=config.seed,
        )
    check_weights(config.data.train)  # before all of it is prepared
    return Loader(
        prepare_data(config, tokenizer, encoder, config.data.train, say=say),
        seq_len=config.data.seq_len,
        batch_size=config.train.batch_size,
        seed=config.seed,
        packing=config.data.packing,
    )


def make_examiner(
    config: Config,
    tokenizer: OpenTokenizer,
    encoder: ChatEncoder,
    pretrained: Pretrained,
    mesh: Mesh,
    *,
    trained: Loader | StreamLoader | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Examiner | None:
    """What examines the states of this run on each set of `data.eval`; None where there is none.

    Raises:
        DataError: the held-out rows are not usable, or some of them are in `trained`.
    """
    sets = []
    for name, source in config.data.eval.items():
        limit = config.eval.examples
        loader = Loader(
            prepare_data(config, tokenizer, encoder, [source], limit=limit, say=say),
            seq_len=config.data.seq_len,
            batch_size=config.train.microbatch_size or config.train.batch_size,
            seed=config.seed,
            packing=config.data.packing,
            shuffle=False,
        )
        if trained is not None:
            sources = None if isinstance(trained, StreamLoader) else trained.dataset.sources
            check_overlap(config.data, name, loader.dataset.sources, sources, say=say)
        num_questions = None if config.eval.exact_match else config.eval.samples
        items = read_items(config.data, source, encoder, limit=limit) if num_questions != 0 else []
        notes: list[str] = []
        questions = make_questions(
            items, encoder, ask=config.eval.ask, most=num_questions, seq_len=config.data.seq_len, say=notes.append
        )
        if config.eval.exact_match:
            notes += describe_questions(questions, encoder, max_new_tokens=config.eval.max_new_tokens)
        for note in notes:
            say(f"held-out {name}: {note}")
        sets.append(HeldOut(name, loader, questions))
    if not sets:
        return None
    return Examiner(
        config.eval, model=pretrained.model, frozen=nnx.State({}), mesh=mesh, sets=sets, tokenizer=tokenizer
    )


def _source_notes(loader: Loader | StreamLoader, examiner: Examiner | None) -> list[str]:
    """What a user should know of the sources, those that are trained and those that are held out."""
    trained = loader.described if isinstance(loader, StreamLoader) else [s.report for s in loader.dataset.sources]
    held_out = [s.report for each in examiner.sets for s in each.loader.dataset.sources] if examiner else []
    return [note for report in (*trained, *held_out) for note in report["notes"]]


def prepare_data(
    config: Config,
    tokenizer: OpenTokenizer,
    encoder: ChatEncoder,
    sources: Sequence[SourceConfig],
    *,
    limit: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Dataset:
    """Some sources of the config as one dataset, each with at most `limit` rows."""
    prepared = [
        prepare(config.data, source, encoder, tokenizer_files_key=tokenizer.key, limit=limit, say=say)
        for source in sources
    ]
    return make_dataset(prepared, sources, ends=config.data.mixture_ends)


def _place_batch(loader: Loader | StreamLoader, mesh: Mesh, vocab_size: int, step: int) -> Batch:
    """The batch of a step on the devices, where an id without an embedding would be taken for another."""

    def rows_of(rows: slice) -> Batch:
        batch = loader.batch(step, rows)
        if batch.tokens.size and (largest := int(batch.tokens.max())) >= vocab_size:
            raise DataError(f"step {step}: a row has token {largest}, but the model knows ids 0 to {vocab_size - 1}")
        return batch

    return put_batch(rows_of, loader.shape, mesh)


def check_batch(config: Config, pretrained: Pretrained, mesh: Mesh) -> int:
    """Refuses a mesh that the model or the batch does not fit; returns the number of microbatches."""
    rows = config.train.microbatch_size or config.train.batch_size
    key = "train.microbatch_size" if config.train.microbatch_size else "train.batch_size"
    check_positions(pretrained.decoder_config, config.data.seq_len)
    router_losses = [key for key in ("router_balance", "router_z") if getattr(config.optim, key)]
    if router_losses and pretrained.decoder_config.routing is None:
        keys = ", ".join(f"optim.{key}" for key in router_losses)
        raise ConfigError(f"{keys}: no effect on {config.model.path}, which is no mixture of experts")
    check_divisible(mesh, pretrained.model.params, {f"{key} (b)": rows, "data.seq_len (t)": config.data.seq_len})
    return config.train.batch_size // rows


def _fingerprint(config: Config, loader: Loader | StreamLoader, pretrained: Pretrained) -> dict[str, Any]:
    """What must be equal for a run to be continued: the data in its order, and the model."""
    model = json.dumps(pretrained.hf_config, sort_keys=True).encode()
    return loader.fingerprint | {
        "seed": config.seed,
        "data.packing": config.data.packing,
        "train.batch_size": config.train.batch_size,
        "model.weights": config.model.weights,
        "model: config.json": hashlib.sha256(model).hexdigest()[:16],
    }


def _describe_run(
    folder: epath.Path, config: Config, loader: Loader | StreamLoader, tokenizer: OpenTokenizer, console: Console
) -> None:
    """Writes the resolved config and the preview of the first batch; says what a continued run does otherwise now."""
    if jax.process_index() != 0:
        return
    path = folder / "config.yaml"
    if path.exists():
        try:
            changes = config_changes(read_file(path).decode("utf-8"), config)
        except (OSError, ValueError, yaml.YAMLError, AttributeError, RecursionError) as error:
            console.say(f"{path} is damaged, and written anew ({' '.join(str(error).split())[:80]})")
            changes = []
        for change in changes:
            console.say(f"changed since this run began: {change}")
    write_whole(path, dump_config(config))
    note_versions(folder / "versions.json", console.say)
    if (folder / "preview.html").exists():
        return  # of the first batch, which a stream would have to make again
    preview = make_preview(
        loader, loader.dataset, tokenizer.tokenizer, stops=tokenizer.stops, title=folder.name, notes=tokenizer.notes
    )
    write_html(preview, folder / "preview.html")


def _compiled(train_step: Any, state: Any, frozen: Any, batch: Batch, mesh: Mesh) -> str:
    """The text of the program that a step runs, compiled already."""
    with jax.set_mesh(mesh):
        return train_step.lower(state, frozen, batch).compile().as_text()


def _flop_sizes(pretrained: Pretrained) -> dict[str, int]:
    """What `metrics.train_flops` needs to know of a model."""
    config = pretrained.decoder_config
    return {
        "matmul_params": matmul_params(pretrained.model.params, config),
        "attention_width": config.num_heads * config.head_dim,
    }
