"""What the user sees of a run: a live bar on a terminal, plain lines elsewhere; and the log of each process.

In: sentences, and the lines of metrics (`metrics.py`). Out: text on the terminal of process 0, and in the log of every
process.
"""

import time
from typing import Any

from jaxsft.hosts.logs import Log
from jaxsft.hosts.table import process_number


class Console:
    """What the user sees: a live bar on a terminal, plain lines elsewhere, nothing on processes other than 0.

    Args:
        log: of this process, whose lines are the same on all.
    """

    def __init__(self, log: Log) -> None:
        import rich.console

        self._log, self._quiet = log, process_number() != 0
        self._console = rich.console.Console(quiet=self._quiet, highlight=False, emoji=False)
        self._bar: Any = None
        self._started: tuple[float, int] | None = None

    def say(self, text: str = "") -> None:
        """Prints a line, above the bar where there is one."""
        self._log.write(text)
        self._console.print(text, markup=False, soft_wrap=True)

    def step(self, step: int, num_steps: int, line: dict[str, float]) -> None:
        """Shows the metrics of a line: `step` of `num_steps` are done."""
        now = time.perf_counter()
        if self._started is None:
            self._started = (now - line["seconds"], step - int(line["steps"]))
        begin, first = self._started
        left = (now - begin) / max(step - first, 1) * (num_steps - step)
        shown = (
            f"loss {line['loss']:.4f}"
            + (f"  objective {line['objective']:.4f}" if "objective" in line else "")
            + f"  accuracy {line['accuracy']:.1%}  {line['tokens_per_second']:,.0f} tokens/s"
            + (f"  MFU {line['mfu']:.1%}" if "mfu" in line else "")
            + f"  learning rate {line['learning_rate']:.2e}"
            + (f"  {line['skipped_steps']:.0f} STEPS SKIPPED (not finite)" if line["skipped_steps"] else "")
        )
        if not self._console.is_terminal:
            self.say(f"step {step}/{num_steps}  {shown}  left {_clock(left)}")
            return
        self._log.write(f"step {step}/{num_steps}  {shown}  left {_clock(left)}")
        self._show_bar(step, num_steps, f"{shown}  left {_clock(left)}")

    def _show_bar(self, step: int, num_steps: int, text: str) -> None:
        import rich.progress

        if self._bar is None:
            columns = (
                rich.progress.TextColumn("step {task.completed}/{task.total}"),
                rich.progress.BarColumn(bar_width=24),
                rich.progress.TextColumn("{task.description}", markup=False),
            )
            self._bar = rich.progress.Progress(*columns, console=self._console, redirect_stdout=True)
            self._bar.add_task(text, total=num_steps)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=step, description=text)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
