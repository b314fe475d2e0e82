"""The lines of a run: steps go in one by one, and a line comes out for all of them since the last one.

In: `StepMetrics` as the steps are launched, results of evaluations. Out: lines in `metrics.jsonl`, on the terminal and
wherever else `log.to` says; and what a checkpoint must keep of it, so that a continued run writes the same lines.
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from jaxsft.batches.loader import Loader
from jaxsft.batches.stream import StreamLoader
from jaxsft.config import Config
from jaxsft.training.console import Console
from jaxsft.training.metrics import (
    SkipWatch,
    Speedometer,
    StepMetrics,
    Stopwatch,
    Totals,
    dump_steps,
    load_steps,
    summarise,
)
from jaxsft.training.metrics_file import MetricsFile
from jaxsft.training.patience import Patience
from jaxsft.training.summary import describe_lost
from jaxsft.training.writers import Writer, open_writers


class Logbook:
    """All that the lines of one run are made of, and all places that they go to."""

    problem: str | None = None
    """What makes it senseless to go on: too many steps were skipped."""

    def __init__(
        self,
        config: Config,
        folder: epath.Path,
        loader: Loader | StreamLoader,
        console: Console,
        speedometer: Speedometer,
        *,
        step: int,
        num_steps: int,
        saved: dict[str, Any],
        check: Callable[[], None] | None = None,
    ) -> None:
        """Opens `metrics.jsonl` of a run that is at `step`; `open` opens the rest.

        Args:
            config: of the run.
            folder: of the run.
            loader: of the run, which knows epochs and rows.
            console: where lines are shown.
            speedometer: of the model.
            step: steps done.
            num_steps: of the whole run.
            saved: what `progress` gave when this step was saved; nothing where the run begins.
            check: raises if this process may not write into the folder any more.
        """
        self._config, self._loader, self._console = config, loader, console
        self.folder = folder
        """Of the run."""
        self._num_steps, self._speedometer = num_steps, speedometer
        self._check, self.say = check, console.say
        self._file = MetricsFile(folder / "metrics.jsonl", step=step, sealed=saved.get("metrics"), say=console.say)
        self._writers: list[Writer] = []
        self._step = step
        self.totals = Totals(*saved["totals"]) if "totals" in saved else self._file.totals()
        self._window: list[StepMetrics] = load_steps(saved.get("window", []))
        self._window_seconds = saved.get("window_seconds", 0.0) if self._window else 0.0
        self.skips = SkipWatch(
            num_steps=num_steps,
            max_skipped=config.optim.max_skipped,
            first=step - len(self._window),
            skipped=int(self.totals.skipped_steps),
            in_a_row=saved.get("skipped_in_a_row", 0),
        )
        self.patience = Patience(config.eval.patience, saved.get("patience", {}))
        self._lost: dict[str, int] = {}
        self.watch = Stopwatch()

    def open(self) -> None:
        """Opens the other places where lines go.

        Raises:
            ConfigError: one of them cannot be opened.
        """
        self._writers = open_writers(
            self._config.log,
            self.folder,
            step=self._step,
            file=self._file,
            settings=self._config.model_dump(),
            say=self._console.say,
        )

    def begin(self) -> None:
        """Starts the clock."""
        self.watch.begin(self._window_seconds)

    def add(self, step: StepMetrics) -> None:
        """Takes a step that was launched; nothing waits for it."""
        self.watch.launched(step.grad_norm)
        self._window.append(step)

    def report(self, done: int) -> dict[str, Any] | None:
        """Writes the line of the steps since the last one, `done` of the run; None where there are none.

        Raises:
            WriteError: the line could not be written, or another process works in the folder.
        """
        if not self._window:
            return None
        steps = jax.device_get(self._window)
        self.watch.caught_up()
        self._window.clear()
        loader = self._loader
        line, self.totals = summarise(steps, self.totals, batch_positions=math.prod(loader.shape))
        line |= self._speedometer.read(steps, self.watch) | {"rows_crc": loader.rows_crc(done - len(steps), done)}
        rows = loader.rows_so_far(done)
        line = {"step": done, "epoch": loader.epochs_done(done)} | line | rows
        self.write(line)
        self._console.step(done, self._num_steps, line)
        if self._lost != (lost := {name: count for name, count in rows.items() if "/" in name}):
            self._lost = lost
            self._console.say(f"of {rows['stream_rows']:,} rows read: " + describe_lost(lost))
        self.problem = self.skips.see(steps)
        return line

    def write(self, line: dict[str, Any]) -> None:
        """Writes a line, which has its `step`, to all places.

        Raises:
            WriteError: it could not be written, or another process works in the folder.
        """
        self.check()
        self._file.write(line)
        for writer in self._writers:
            writer.write(line)

    def check(self) -> None:
        """To be called before anything is written into the run folder.

        Raises:
            WriteError: another process has taken this one for dead, and works in the folder now.
        """
        if self._check is not None:
            self._check()

    def progress(self) -> dict[str, Any]:
        """What a continued run must know, the steps that no line reports yet included; plain JSON."""
        return {
            "totals": list(self.totals),
            "metrics": self._file.state(),
            "window": dump_steps(jax.device_get(self._window)),
            "window_seconds": self.watch.so_far(),
            "skipped_in_a_row": self.skips.in_a_row,
            "patience": self.patience.state(),
        }

    def close(self) -> None:
        """Returns when all lines are where they belong."""
        with contextlib.ExitStack() as closing:
            for writer in self._writers:
                closing.callback(writer.close)
