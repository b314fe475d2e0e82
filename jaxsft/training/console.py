"""What the user sees of a run: a live bar on a terminal, plain lines elsewhere; and the log of each process.

In: sentences, and the lines of metrics (`metrics.py`). Out: text on the terminal of process 0, and in the log of every
process.
"""

import time
from typing import Any

from jaxsft.hosts.logs import Log
from jaxsft.hosts.table import process_number

BAR_WIDTH, SHORTEST_BAR = 24, 8
LEAST = ("rate", "mfu", "accuracy", "objective", "speed", "left", "skipped")
"""Figures in the order in which they are left out where a terminal has no room for all of them."""


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
        self._columns: Any = None
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
        parts = {
            "loss": f"loss {line['loss']:.4f}",
            "objective": f"objective {line['objective']:.4f}" if "objective" in line else "",
            "accuracy": f"accuracy {line['accuracy']:.1%}",
            "speed": f"{line['tokens_per_second']:,.0f} tokens/s",
            "mfu": f"MFU {line['mfu']:.1%}" if "mfu" in line else "",
            "rate": f"learning rate {line['learning_rate']:.2e}",
            "skipped": f"{line['skipped_steps']:.0f} STEPS SKIPPED (not finite)" if line["skipped_steps"] else "",
            "left": f"left {_clock(left)}",
        }
        parts = {name: text for name, text in parts.items() if text}
        whole = f"step {step}/{num_steps}  {'  '.join(parts.values())}"
        if not self._console.is_terminal:
            self.say(whole)
            return
        self._log.write(whole)
        self._show_bar(step, num_steps, parts)

    def _show_bar(self, step: int, num_steps: int, parts: dict[str, str]) -> None:
        import rich.progress
        import rich.table

        if self._bar is None:
            # Neither column gives way: what has no room is left out before.
            texts = (
                rich.progress.TextColumn(text, markup=False, table_column=rich.table.Column(no_wrap=True))
                for text in ("{task.description}", "{task.fields[figures]}")
            )
            self._columns = next(texts), rich.progress.BarColumn(), next(texts)
            self._bar = rich.progress.Progress(*self._columns, console=self._console, redirect_stdout=True)
            self._bar.add_task("", total=num_steps, figures="")
            self._bar.start()
        at = f"step {step}/{num_steps}"
        bar, figures = fitting(parts, self._console.width - len(at) - 1)
        text, drawn, other = self._columns
        drawn.bar_width = bar
        self._bar.columns = (text, drawn, other) if bar else (text, other)
        self._bar.update(self._bar.task_ids[0], completed=step, description=at, figures=figures)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def fitting(parts: dict[str, str], width: int) -> tuple[int, str]:
    """The width of a bar, 0 for none, and the figures beside it that have room in so many columns.

    A bar goes first, then the figures in the order of `LEAST`.
    """
    kept = dict(parts)
    for name in LEAST:
        text = "  ".join(kept.values())
        if len(text) <= width:
            break
        kept.pop(name, None)
    text = "  ".join(kept.values())
    bar = min(BAR_WIDTH, width - len(text) - 1) if kept == parts else 0
    return (bar if bar >= SHORTEST_BAR else 0), text


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
