"""The runs of a sweep, trained one after the other, and what came of them.

    RUN_DIR/NAME/      the run folder of each combination of values
    RUN_DIR/report/    all of them on one page

In: `Trial`s. Out: their run folders, a table of held-out losses, and a report. Each run is a process of its own, so
that one that fails, or is killed for want of memory, takes no other with it, and leaves the accelerator as it was. What
the runs have in common they find where every run does: prepared data and compiled steps are kept in the user's cache.
"""

import contextlib
import datetime
import math
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import yaml
from etils import epath

from jaxsft.config import ConfigError
from jaxsft.config_files import config_changes
from jaxsft.disk.seal import problem_of
from jaxsft.disk.writing import place, read_file
from jaxsft.folders.export import CARD
from jaxsft.hosts.exits import BUG, START_AGAIN
from jaxsft.report.make import check_folder, report
from jaxsft.report.readers import read_run
from jaxsft.report.records import Run
from jaxsft.report.sections import best_eval_loss, last_loss, number
from jaxsft.rows.strict import DataError
from jaxsft.sweep.grid import Trial, describe, short_keys
from jaxsft.training.run_folder import FINGERPRINT, template_date

FINISHED, NOT_BEGUN = "finished", "not begun"
DONE = 0


class Outcome(NamedTuple):
    """What came of a run."""

    trial: Trial
    state: str
    """`FINISHED`, `NOT_BEGUN`, or how it ended otherwise."""
    run: Run | None
    """Its metrics, where there are any."""


def with_one_day(trials: Sequence[Trial]) -> list[Trial]:
    """The runs with one day that all templates see: that on which the first of them began, else today.

    A sweep that goes on tomorrow, or past midnight, trains all of its runs on the same tokens.
    """
    if trials[0].config.data.template_date is not None:
        return list(trials)
    began = (template_date(_folder(trial)) for trial in trials)
    day = next((found for found in began if found is not None), datetime.date.today()).isoformat()
    return [
        trial._replace(
            overrides=(*trial.overrides, f"data.template_date={day}"),
            config=trial.config.model_copy(
                update={"data": trial.config.data.model_copy(update={"template_date": day})}
            ),
        )
        for trial in trials
    ]


def sweep(
    trials: Sequence[Trial],
    *,
    start: Callable[[Trial], "Ended"],
    command: str,
    say: Callable[[str], None] = print,
) -> int:
    """Trains the runs that are not finished, writes the report, and returns the exit code.

    Args:
        trials: of one sweep.
        start: trains one run, or goes on with it; see `in_process`.
        command: what makes the report again.
        say: is told what begins and how it ended, and the table.

    Returns:
        0 where all runs are finished; 75 where the sweep was stopped; else that of the first run that failed, or 75
        where one asks to be started again.

    Raises:
        ConfigError: the folder of the sweep holds a run itself, or pages of others.
    """
    top = _folder(trials[0]).parent
    out = top / "report"
    if (top / FINGERPRINT).exists():
        raise ConfigError(
            f"run_dir: {top} holds a run itself; give the sweep a folder of its own, such as run_dir={_beside(top)}"
        )
    check_folder(out)
    states = [NOT_BEGUN] * len(trials)
    codes = []
    for at, trial in enumerate(trials):
        which = f"run {at + 1} of {len(trials)}: {describe(trial.settings)}"
        if is_finished(trial):
            states[at] = FINISHED
            say(f"{which}: was finished before")
            continue
        say(f"{which}  ({trial.config.run_dir})")
        ended = start(trial)
        states[at] = FINISHED if ended.code == DONE else ended.how
        if ended.code != DONE:
            codes.append(ended.code)
            say(f"{which}: {ended.how}")
        if ended.is_sweep_stopped:
            codes = [START_AGAIN]
            break
    outcomes = [Outcome(trial, state, _metrics(trial)) for trial, state in zip(trials, states, strict=True)]
    outcomes.sort(key=_rank)
    say(table(outcomes))
    shown = [outcome for outcome in outcomes if outcome.run is not None]
    if shown:
        report(
            [str(outcome.trial.config.run_dir) for outcome in shown],
            out=str(out),
            names=[describe(outcome.trial.settings) for outcome in shown],
            command=command,
            verdict=_verdict(outcomes),
        )
        say(f"page: {out / 'report.html'}")
    failed = [BUG if code < 0 else code for code in codes if code != START_AGAIN]
    return failed[0] if failed else START_AGAIN if codes else DONE


class Ended(NamedTuple):
    """How a run ended that was started."""

    code: int
    """Its exit code."""
    is_sweep_stopped: bool = False
    """Somebody asked the sweep to stop, not this run alone."""

    @property
    def how(self) -> str:
        """In words."""
        if self.code < 0:
            name = signal.Signals(-self.code).name
            return f"killed by {name}" + ", probably for want of memory" * (name == "SIGKILL")
        if self.code == START_AGAIN:
            return "stopped; the same command goes on with it"
        return f"failed with exit code {self.code}"


def in_process(trial: Trial, source: str) -> Ended:
    """Trains a run in a process of its own, on the same terminal; what asks the sweep to stop is handed on to it.

    It has a process group to itself: Ctrl-C reaches it once, from here, and it saves before it ends.
    """
    asked: list[int] = []
    process: subprocess.Popen | None = None

    def hand_on(number: int, _: object) -> None:
        asked.append(number)
        if process is not None:
            process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    sys.stdout.flush()
    with _handled(hand_on):
        command = [sys.executable, "-m", "jaxsft", "train", source, *trial.overrides]
        process = subprocess.Popen(command, process_group=0, stdin=subprocess.DEVNULL)
        if asked:  # before there was a process
            process.send_signal(signal.SIGTERM)
        code = process.wait()
    return Ended(code, is_sweep_stopped=bool(asked))


@contextlib.contextmanager
def _handled(handler: Callable[[int, object], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def is_finished(trial: Trial) -> bool:
    """Whether the run of exactly this config has ended, and its export is as it was sealed."""
    folder = _folder(trial)
    if not (folder / "config.yaml").exists():
        return False
    try:
        changes = config_changes(read_file(folder / "config.yaml").decode("utf-8"), trial.config)
    except (OSError, ValueError, yaml.YAMLError, AttributeError, RecursionError):
        return False  # It is damaged, and `train` says so.
    changes = [change for change in changes if not change.startswith("run_dir: ")]  # from where the sweep was started
    return not changes and problem_of(folder / "export", free=(CARD,)) is None


def table(outcomes: Sequence[Outcome]) -> str:
    """Held-out loss of each run, at its end and at its best, in the order that is given."""
    keys = list(outcomes[0].trial.settings)
    short = short_keys(keys)
    head = [*(short[key] for key in keys), "eval loss", "best", "at step", "last loss", ""]
    rows = [head]
    for trial, state, run in outcomes:
        evaluated = [line for line in run.lines if "eval_loss" in line] if run else []
        best = best_eval_loss(run) if run else None
        at = next((line["step"] for line in evaluated if line["eval_loss"] == best), None)
        figures = [
            number(evaluated[-1]["eval_loss"] if evaluated else None, "{:.4f}"),
            number(best, "{:.4f}"),
            number(at, "{:.0f}"),
            number(last_loss(run) if run else None, "{:.4f}"),
        ]
        rows.append([*(trial.settings[key] for key in keys), *figures, state if state != FINISHED else ""])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([*cells[:-1], row[-1]]).rstrip())
    return "\n".join(lines)


def _rank(outcome: Outcome) -> tuple[bool, float]:
    """Finished runs first, the lowest loss first: the best held-out one, and without held-out rows the last."""
    loss = None
    if outcome.run is not None:
        loss = best_eval_loss(outcome.run)
        loss = last_loss(outcome.run) if loss is None else loss
    return outcome.state != FINISHED, math.inf if loss is None or math.isnan(loss) else loss


def _verdict(outcomes: Sequence[Outcome]) -> str:
    """The first sentences of the page."""
    first, unfinished = outcomes[0], [each for each in outcomes if each.state != FINISHED]
    said = []
    best = best_eval_loss(first.run) if first.run is not None else None
    if first.state == FINISHED and best is not None and math.isfinite(best):
        said.append(f"Lowest held-out loss: {best:.4f}, with {describe(first.trial.settings)}.")
    if unfinished:
        listed = "; ".join(f"{describe(each.trial.settings)} ({each.state})" for each in unfinished)
        said.append(f"Not finished: {listed}.")
    return " ".join(said)


def _metrics(trial: Trial) -> Run | None:
    """What a run has written so far."""
    try:
        return read_run(str(trial.config.run_dir))
    except (ConfigError, DataError, OSError, ValueError, yaml.YAMLError):
        return None  # It has no line yet, or its files are damaged, which `train` says.


def _folder(trial: Trial) -> epath.Path:
    return epath.Path(place(str(trial.config.run_dir), "run_dir"))


def _beside(folder: epath.Path) -> str:
    return f"{folder}-sweep"
