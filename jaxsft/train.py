"""A whole run on one page: prepare, start or continue, train, evaluate, export.

`run(config)` reads top to bottom in the order in which things happen. Everything exact lives below it: which tokens are
trained in `chat/`, what a step computes in `training/step.py`, what a checkpoint promises in `training/checkpoint.py`.
"""

import collections
import contextlib
import functools
import math
import sys
import types
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import jax
import yaml
from jax.sharding import Mesh

from jaxsft.answers.evaluate import describe
from jaxsft.batch import Batch
from jaxsft.batches.loader import prefetch
from jaxsft.batches.stream import StreamLoader
from jaxsft.config import Config
from jaxsft.config_files import config_changes, dump_config
from jaxsft.disk.locks import Lock
from jaxsft.disk.writing import read_file, write_whole
from jaxsft.folders.export import export_problem
from jaxsft.folders.pretrained import export_model, load_weights
from jaxsft.hosts import failure
from jaxsft.hosts.agreement import agree_on_start, share, together
from jaxsft.hosts.logs import Log
from jaxsft.hosts.table import process_number
from jaxsft.hosts.watchdog import Watchdog
from jaxsft.mesh import ROW_AXES
from jaxsft.model.abstract import whole
from jaxsft.model.freezing import frozen_key
from jaxsft.preview.page import write_html
from jaxsft.report.card import data_facts
from jaxsft.report.picture import plot_run
from jaxsft.setup import Setup
from jaxsft.training.checkpoint import BEST, Checkpointer, sealed_steps
from jaxsft.training.console import Console
from jaxsft.training.events import Evaluated, Event, Finished, Line, Saved, Stopped
from jaxsft.training.logbook import Logbook
from jaxsft.training.memory import Bytes, describe_bytes, where_bytes_go
from jaxsft.training.metrics import Diverged, Speedometer
from jaxsft.training.out_of_memory import explained, memory_limit
from jaxsft.training.profile import Profiler, check_profile
from jaxsft.training.run_folder import check_progress, claim_run_folder
from jaxsft.training.step import (
    TrainState,
    abstract_state,
    evaluation_params,
    init_state,
    make_train_step,
    non_finite,
)
from jaxsft.training.stop import STOPPED, StopSignal
from jaxsft.training.summary import note_versions, start_summary
from jaxsft.training.writers import check_writers

DONE = 0


def train(config: Config, *, restart: bool = False) -> int:
    """Trains, or continues, the run that a config describes; returns the exit code. See `run` for all else."""
    (last,) = collections.deque(run(config, restart=restart), maxlen=1)
    return STOPPED if isinstance(last, Stopped) else DONE


def run(config: Config, *, restart: bool = False) -> Iterator[Event]:
    """Trains, or continues, the run that a config describes, and yields what happens.

    The last event is `Finished`, or `Stopped` after SIGTERM or Ctrl-C. Leaving the loop early is a stop as well: the
    steps that were done are saved, and the same config goes on from there. Time spent on events counts as no training.

    Args:
        config: of the run.
        restart: move the run that is in its folder aside, and begin anew.

    Raises:
        ConfigError, DataError: mistakes of the user; before a weight is read where that is possible.
        SaveError, WriteError: a checkpoint or another file could not be written.
        OutOfMemory: a device has too little memory; says what would lower it.
        Diverged: too many steps were skipped as their loss or gradient was not finite, or a parameter is not finite.
    """
    with StopSignal() as stop, contextlib.ExitStack() as closing:
        log = closing.enter_context(Log(process_number()))
        failure.keep_log(log)
        console = Console(log)
        with together():
            agree_on_start(config.model_dump(mode="json"), say=console.say)

            # What is trained, and on what. Whatever can be wrong with it is found before a weight is read.
            setup = Setup(config, restart=restart, say=console.say)
            config, folder = setup.config, setup.folder
            _check(setup)
            closing.enter_context(contextlib.closing(setup.loader))

            # The folder is this run's, and this process's alone.
            lock = claim_run_folder(folder, setup.fingerprint, restart=restart, say=console.say)
            if lock is not None:
                closing.callback(lock.release)
            log.open(folder)
            held_out = {each.name: each.loader for each in setup.held_out}
            facts = data_facts(setup.loader, held_out)
            sealed = {"fingerprint": setup.fingerprint, "config": dump_config(config), "data": facts}
            checkpointer = Checkpointer(folder / "checkpoints", config.checkpoint, console.say, run=sealed)
            closing.enter_context(contextlib.closing(checkpointer))
            closing.enter_context(contextlib.closing(console))
            stop.can_save()
            if isinstance(setup.loader, StreamLoader):
                setup.loader.use_index(folder / "stream.jsonl", is_writer=jax.process_index() == 0)

            console.say(_memory(setup))

            # The state: where a former start of this run left off, or the weights to begin with.
            with _memory_advice(setup):
                state, frozen = _first_state(setup, checkpointer, stop, console)
            first = int(state.step)
            console.say(_summary(setup, state, frozen))
            logbook = _open_logbook(setup, first, checkpointer.progress, console, lock)
            export = folder / "export"
            is_done = first >= setup.num_steps or logbook.patience.is_over
            is_finished = is_done and share("looking for the export", export.exists(), all)
            if is_finished and checkpointer.exported_step() != _wanted_step(config, checkpointer, first):
                console.say(f"{export}: not, or not known to be, of the checkpoint that is asked for; exporting again")
                is_finished = False
            if is_finished and (problem := export_problem(export)) is not None:
                console.say(f"{export}: {problem}; exporting again, from checkpoint {first}")
                is_finished = False
            if not is_finished:
                _describe_run(setup, console)
                logbook.open()
                closing.enter_context(contextlib.closing(logbook))
        if is_done and first < setup.num_steps:
            console.say(_ended_at(first, setup, logbook))
        if is_finished:
            console.say(f"this run is finished; its model is in {export} (remove it to export anew)")
            yield Finished(first, export)
            return
        watchdog = closing.enter_context(contextlib.closing(Watchdog(config.train.stall_timeout)))
        if failure.is_program():
            watchdog.start()
        closing.push(failure.on_exit)
        closing.enter_context(_memory_advice(setup))

        last_state: TrainState | None = state
        if not is_done:
            last_state = yield from _steps(setup, state, frozen, logbook, checkpointer, watchdog, stop)
        if last_state is None:
            return
        if not is_done and (last := int(last_state.step)) < setup.num_steps:
            console.say(_ended_at(last, setup, logbook))
        stop.doing = "finishing the export"
        logbook.check()
        with watchdog.busy("the model was exported"):
            last, exported = int(last_state.step), last_state
            if config.checkpoint.export == BEST:
                exported = _best_state(setup, checkpointer, last_state)
            console.say(f"exporting {'' if last == int(exported.step) else f'checkpoint {exported.step} '}to {export}")
            weights = _weights(config, exported, frozen)
            card = setup.card(int(exported.step), facts) if jax.process_index() == 0 else None
            export_model(setup.pretrained, setup.tokenizer, weights, export, card=card, say=console.say)
            checkpointer.note_export(int(exported.step))
            if jax.process_index() == 0:
                console.say(f"loss curve: {plot_run(folder, say=console.say)}")
    kind = "adapters, ready for PEFT" if (export / "adapter_config.json").exists() else "model, ready for transformers"
    console.say(f"{kind}: {export}")
    if skipped := logbook.totals.skipped_steps:
        console.say(f"WARNING: {skipped:.0f} steps were skipped, as their loss or gradient was not finite")
    yield Finished(last, export)


def _steps(
    setup: Setup,
    state: TrainState,
    frozen: Any,
    logbook: Logbook,
    checkpointer: Checkpointer,
    watchdog: Watchdog,
    stop: StopSignal,
) -> Generator[Event, None, TrainState | None]:
    """The loop: returns the state after the last step, or None where the run was asked to stop before that."""
    config, mesh, num_steps = setup.config, setup.mesh, setup.num_steps
    first = done = int(state.step)
    model, num_microbatches = setup.pretrained.model, config.train.num_microbatches
    train_step = make_train_step(
        model,
        config.optim,
        num_steps=num_steps,
        num_microbatches=num_microbatches,
        mesh=mesh,
        loss=config.loss,
        seed=config.seed,
    )
    traced, say = config.log.profile_steps, logbook.say
    profiler = Profiler(traced, setup.folder / "profile", first=first, num_steps=num_steps, say=say)
    best_loss = checkpointer.best_loss()
    if first == 0 and (evaluated := _evaluate(0, _weights(config, state, frozen), setup, logbook, stop)):
        yield evaluated
    with contextlib.closing(profiler), contextlib.closing(prefetch(setup.place_batch, first, num_steps)) as batches:
        logbook.begin()
        try:
            for step in range(first, num_steps):
                if signal := stop.at(step):
                    with watchdog.busy("the last checkpoint was saved"):
                        _save_and_wait(step, state, logbook, checkpointer, f"{signal}: saved")
                    yield Stopped(step, signal)
                    return None
                with watchdog.waiting():
                    batch = logbook.watch.wait(batches)
                if step == first:
                    stop.doing = f"compiling and finishing step {step + 1}, saving"
                    say("compiling the train step")
                logbook.watch.launching()
                watchdog.launching(step)
                with jax.set_mesh(mesh), jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state, metrics = train_step(state, frozen, batch)
                logbook.add(metrics)
                watchdog.launched(metrics.grad_norm)
                checkpointer.check()
                done = step + 1

                due = due_after(done, num_steps, config)
                line = logbook.report(done) if due.report or profiler.is_edge(done) else None
                if logbook.problem is not None:
                    with watchdog.busy("the last checkpoint was saved"):
                        raise _diverged(logbook.problem, checkpointer, first_bad=logbook.skips.first_of_row)
                with logbook.watch.paused(), watchdog.busy("the model was evaluated or saved"):
                    profiler.stop_at(done, state, functools.partial(_compiled, train_step, state, frozen, batch, mesh))
                    if line is not None:
                        yield Line(done, line)
                    evaluated = None
                    if due.evaluate:
                        evaluated = _evaluate(done, _weights(config, state, frozen), setup, logbook, stop)
                    if evaluated is not None:
                        yield evaluated
                    is_last = done == num_steps or logbook.patience.is_over
                    if is_last and (names := non_finite(state.params)):
                        raise _diverged(f"not finite: {', '.join(names)}", checkpointer, first_bad=done)
                    eval_loss = logbook.patience.loss_at(done)
                    # Not while steps are skipped: what was good before must not make room for what may not be.
                    if (due.save or is_last or eval_loss < best_loss) and (is_last or not logbook.skips.in_a_row):
                        best_loss = min(best_loss, eval_loss)  # in this order, as eval_loss may be NaN
                        yield _save(done, state, logbook, checkpointer)
                    elif due.save_local and not logbook.skips.in_a_row:
                        checkpointer.save_local(done, state, progress=logbook.progress())
                    profiler.start_at(done, state)
                if is_last:
                    break
        except Exception as error:
            failure.fail(_explained(error, setup))  # Before the batch in the making is waited for.
            raise
        except GeneratorExit:  # Whoever reads the events has enough of them.
            if done > first and not sys.is_finalizing():
                _save_and_wait(done, state, logbook, checkpointer, "left: saved")
            raise
    with watchdog.busy("the last checkpoint was saved"):
        checkpointer.wait()
    return state


def _ended_at(step: int, setup: Setup, logbook: Logbook) -> str:
    return f"ended after step {step} of {setup.num_steps}: {logbook.patience.describe()}"


def _wanted_step(config: Config, checkpointer: Checkpointer, last: int) -> int:
    """That of the checkpoint of which a run that ended after `last` steps has its export."""
    return checkpointer.best_step() if config.checkpoint.export == BEST else last


def _best_state(setup: Setup, checkpointer: Checkpointer, last_state: TrainState) -> TrainState:
    """That of the checkpoint with the smallest held-out loss; the last one is let go, where it is another."""
    best = checkpointer.best_step()
    if best == int(last_state.step):
        return last_state
    for leaf in jax.tree.leaves(last_state):
        leaf.delete()  # two of them might not lie on the devices
    found = checkpointer.restore(abstract_state(setup.pretrained.model.params, setup.config.optim, setup.mesh), best)
    assert found is not None
    return found


def _weights(config: Config, state: TrainState, frozen: Any) -> Any:
    """What is evaluated and exported of a state."""
    return whole(evaluation_params(config.optim, state), frozen)


class Due(NamedTuple):
    """What is to be done after a step."""

    report: bool
    """A line of metrics. Whatever is saved or evaluated has its line, so that a continued run goes on with whole
    counts."""
    evaluate: bool
    save: bool
    save_local: bool


def due_after(done: int, num_steps: int, config: Config) -> Due:
    """What is to be done after `done` of `num_steps` steps: all of it after the last one.

    With checkpoint.every 4, eval.every 6 and log.every 5: after step 5 a line, after 6 a line and an evaluation, after
    8 a line and a checkpoint, after 12 all three.
    """
    is_last = done == num_steps
    evaluate = is_last or (config.eval.every is not None and done % config.eval.every == 0)
    save = is_last or done % config.checkpoint.every == 0
    local_every = config.checkpoint.local_every
    save_local = not save and local_every is not None and done % local_every == 0
    return Due(evaluate or save or save_local or done % config.log.every == 0, evaluate, save, save_local)


def _check(setup: Setup) -> None:
    """Opens all that the run needs but weights, in the order in which mistakes are found soonest."""
    check_writers(setup.config.log, setup.folder)
    setup.agree_on_model()
    setup.check_fit()
    _ = setup.attention  # a kernel is checked before a weight is read, and is that of all that follows
    check_profile(setup.config.log, setup.num_steps, setup.folder / "profile")
    setup.check_overlap()
    setup.agree_on_batches()


def _first_state(
    setup: Setup, checkpointer: Checkpointer, stop: StopSignal, console: Console
) -> tuple[TrainState, Any]:
    """The state of the newest checkpoint, or that before step 0; and what is not trained."""
    config, mesh = setup.config, setup.mesh
    stop.doing = "reading the checkpoint, and stopping then"
    if steps := sealed_steps(setup.folder / "checkpoints"):
        console.say(f"reading checkpoint {steps[-1]}, to the byte")
    state = checkpointer.restore(abstract_state(setup.pretrained.model.params, config.optim, mesh), local=True)
    if state is None:
        check_progress(setup.folder)
        stop.doing = "loading the weights, saving then"
        console.say(f"loading {config.model.path} ({config.model.weights} weights)")
        weights = load_weights(setup.pretrained, mesh, seed=config.seed)
        params, frozen = setup.pretrained.model.split(weights)
        state = init_state(params, config.optim, mesh)
    else:
        frozen = setup.load_frozen()
    checkpointer.beside(frozen_key(frozen))
    checkpointer.tidy()
    return state, frozen


def _summary(setup: Setup, state: TrainState, frozen: Any) -> str:
    return start_summary(
        setup.config,
        state,
        frozen,
        setup.loader,
        setup.mesh,
        num_steps=setup.num_steps,
        decoder_config=setup.pretrained.decoder_config,
        attention=setup.attention,
        notes=setup.notes,
    )


def _bytes_of(setup: Setup, rows: int) -> Bytes:
    """Where the bytes of a device go with so many rows at once."""
    train = setup.config.train
    return where_bytes_go(
        setup.pretrained.model,
        setup.config.optim,
        setup.mesh,
        rows=rows,
        length=setup.config.data.seq_len,
        num_microbatches=train.batch_size // rows,
    )


def _memory(setup: Setup) -> str:
    """The table, before a weight is read."""
    return describe_bytes(_bytes_of(setup, setup.config.train.microbatch_rows), limit=memory_limit())


def _explained(error: Exception, setup: Setup) -> Exception:
    """The error, or where memory is exhausted, one that says what would lower it."""
    train, sizes = setup.config.train, setup.mesh.shape
    shares = math.prod(sizes[axis] for axis in ROW_AXES)
    count = functools.partial(_bytes_of, setup)
    return explained(error, count, batch_size=train.batch_size, rows=train.microbatch_rows, shares=shares)


@contextlib.contextmanager
def _memory_advice(setup: Setup) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        found = _explained(error, setup)
        if found is error:
            raise
        raise found from error


def _open_logbook(setup: Setup, step: int, saved: dict[str, Any], console: Console, lock: Lock | None) -> Logbook:
    return Logbook(
        setup.config,
        setup.folder,
        setup.loader,
        console,
        Speedometer(setup.pretrained.model, setup.pretrained.decoder_config),
        step=step,
        num_steps=setup.num_steps,
        saved=saved,
        check=lock.check if lock is not None else None,
    )


def _evaluate(step: int, weights: Any, setup: Setup, logbook: Logbook, stop: StopSignal) -> Evaluated | None:
    """Looks at the held-out rows, if there are any."""
    if setup.examiner is None:
        return None
    stop.doing = f"evaluating at step {step}, saving then"
    logbook.say(f"step {step}: evaluating on held-out rows")
    result = setup.examiner.examine(weights)
    logbook.write({"step": step} | result.metrics)
    logbook.patience.see(step, result.metrics["eval_loss"])
    logbook.say(f"step {step}  {describe(result)}")
    return Evaluated(step, result.metrics, result.samples)


def _save(step: int, state: TrainState, logbook: Logbook, checkpointer: Checkpointer) -> Saved:
    """Begins to save a state, with all that a continued run must know."""
    logbook.check()
    eval_loss = logbook.patience.loss_at(step)
    checkpointer.save(step, state, eval_loss=eval_loss, progress=logbook.progress())
    return Saved(step, checkpointer.folder / str(step))


def _save_and_wait(step: int, state: TrainState, logbook: Logbook, checkpointer: Checkpointer, what: str) -> None:
    _save(step, state, logbook, checkpointer)
    checkpointer.wait()
    logbook.say(f"{what} step {step}; start the same command again to continue")
    if jax.process_index() == 0 and (logbook.folder / "metrics.jsonl").exists():
        try:
            plot_run(logbook.folder, say=logbook.say)
        except Exception as error:  # All that counts is saved, and the exit code says so.
            logbook.say(f"no loss curve: {error}")


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


def _describe_run(setup: Setup, console: Console) -> None:
    """Writes the resolved config and the preview of the first batch; says what a continued run does otherwise now."""
    if jax.process_index() != 0:
        return
    folder = setup.folder
    path = folder / "config.yaml"
    if path.exists():
        try:
            changes = config_changes(read_file(path).decode("utf-8"), setup.config)
        except (OSError, ValueError, yaml.YAMLError, AttributeError, RecursionError) as error:
            console.say(f"{path} is damaged, and written anew ({' '.join(str(error).split())[:80]})")
            changes = []
        for change in changes:
            console.say(f"changed since this run began: {change}")
    write_whole(path, dump_config(setup.config))
    note_versions(folder / "versions.json", console.say)
    if (folder / "preview.html").exists():
        return  # of the first batch, which a stream would have to make again
    write_html(setup.preview(), folder / "preview.html")


def _compiled(train_step: Any, state: TrainState, frozen: Any, batch: Batch, mesh: Mesh) -> str:
    """The text of the program that a step runs, compiled already."""
    with jax.set_mesh(mesh):
        return train_step.lower(state, frozen, batch).compile().as_text()


class _Page(types.ModuleType):
    """`jaxsft.train` names this module as well as its function: who calls the one means the other."""

    def __call__(self, config: Config, *, restart: bool = False) -> int:
        return train(config, restart=restart)


sys.modules[__name__].__class__ = _Page
