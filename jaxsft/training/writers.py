"""Where the lines of metrics go: `metrics.jsonl`, the terminal, TensorBoard, Weights & Biases, trackio.

In: flat dicts of plain numbers with their `step`, in order. Out: files and a display, of process 0 only. A run that
goes on after a crash does some steps again: `metrics.jsonl` and TensorBoard forget the lines of those steps and get new
ones, W&B and trackio, which cannot forget, keep the ones they have. What a writer never got, it is sent from
`metrics.jsonl`.
"""

import contextlib
import importlib.util
import re
import secrets
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
from etils import epath

from jaxsft.config import ConfigError, LogConfig
from jaxsft.disk.writing import is_file, read_file, set_aside, write_whole, writing
from jaxsft.training.metrics import Totals, from_json_line, to_json_line

SPEED = {
    "steps", "seconds", "tokens_per_second", "trained_tokens_per_second", "data_wait_share", "host_share", "mfu",
    "memory_gib",
}  # fmt: skip
DATA = {"epoch", "tokens", "trained_tokens", "padding_share", "total_tokens", "total_trained_tokens"}
UNDRAWN = {"step", "rows_crc"}
"""The axis, and a checksum."""

FINISH_SECONDS = 300
"""How long the end of a run waits for W&B to take what it was sent."""


class MetricsFile:
    """`metrics.jsonl`: one object per line, every line with its `step`; written by process 0 only."""

    last_step: int
    """Of the last line before this start, dropped or not; -1 where there was none."""

    def __init__(
        self,
        path: epath.Path,
        *,
        step: int,
        sealed: dict[str, Any] | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Opens the file of a run that is at `step`; lines after it, of steps that will be done again, are dropped.

        What is no line of metrics is left out and said, and the file with it kept under another name.

        Args:
            path: of the file.
            step: steps done.
            sealed: what `state` said when the checkpoint of this step was saved, so that a changed line is noticed.
            say: is told what was wrong with the file.
        """
        self._path = path
        self._lines: list[str] = []
        self.last_step = -1
        content = None
        if jax.process_index() == 0 and path.exists() and not is_file(path):
            say(f"{path} is no file: renamed to {set_aside(path, 'damaged').name}")
        if jax.process_index() == 0 and path.exists():
            content = path.read_bytes()
            lines, problems, torn = _parse_lines(content)
            self._lines = [text for at, text in lines if 0 < step >= at]
            self.last_step = max((at for at, _ in lines), default=-1)
            if torn:
                say(f"{path}: its last line was cut off, and is left out")
            if step and sealed and self.state() != sealed and not problems:
                problems = ["its lines are not those that were there when this step was saved"]
            if problems:
                aside = set_aside(path, "damaged")
                say(f"{path} is damaged, the rest is kept, and the file as it was in {aside.name}: {problems[0]}")
        elif jax.process_index() == 0 and step and sealed and sealed["bytes"]:
            say(f"{path} is gone: the lines up to step {step} are lost; the counts go on from the checkpoint")
        if jax.process_index() == 0 and (self._content() != content or not path.exists()):
            write_whole(path, self._content())

    def state(self) -> dict[str, int]:
        """What tells these lines from others: bytes and CRC-32."""
        return _state(self._content())

    def totals(self) -> Totals:
        """Counts at the last line of training."""
        for line in map(from_json_line, reversed(self._lines)):
            if "total_tokens" in line:
                return Totals(line["total_tokens"], line["total_trained_tokens"], line["skipped_steps"])
        return Totals()

    def lines(self) -> list[dict[str, Any]]:
        """All that the file holds."""
        return [from_json_line(line) for line in self._lines]

    def write(self, line: dict[str, Any]) -> None:
        """Appends a line, on disk when this returns.

        Raises:
            WriteError: there is no room for it.
        """
        self._lines.append(to_json_line(line))
        if jax.process_index() != 0:
            return
        data = (self._lines[-1] + "\n").encode()
        with writing(self._path, len(data)), self._path.open("ab") as file:
            file.write(data)

    def _content(self) -> bytes:
        return "".join(line + "\n" for line in self._lines).encode()


def read_metrics(path: epath.Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last line cut off by a crash, and what is no line of metrics, are left out."""
    return [from_json_line(text) for _, text in _parse_lines(path.read_bytes())[0]]


def metrics_problem(path: epath.Path, *, step: int, sealed: dict[str, Any] | None) -> str | None:
    """What is wrong with a `metrics.jsonl`, None if nothing is.

    Args:
        path: of the file, which need not be there where nothing was sealed.
        step: of a checkpoint.
        sealed: what `MetricsFile.state` was when it was saved; None where that is not known.
    """
    if not is_file(path):
        return "it is not there" if sealed and sealed["bytes"] else None
    lines, problems, torn = _parse_lines(path.read_bytes())
    if problems:
        return problems[0]
    if sealed and _state("".join(text + "\n" for at, text in lines if at <= step).encode()) != sealed:
        return f"its lines up to step {step} are not those that were there when that checkpoint was saved"
    return "its last line was cut off" if torn else None


def _state(content: bytes) -> dict[str, int]:
    return {"bytes": len(content), "crc32": zlib.crc32(content)}


def last_step(path: epath.Path) -> int:
    """Of the last line of a `metrics.jsonl`; -1 where there is none."""
    return max((at for at, _ in _parse_lines(path.read_bytes())[0]), default=-1) if is_file(path) else -1


def _parse_lines(content: bytes) -> tuple[list[tuple[int, str]], list[str], bool]:
    """The lines of metrics with their steps; what is wrong with others; and whether the last one was cut off."""
    *complete, rest = content.split(b"\n")
    lines: list[tuple[int, str]] = []
    problems = []
    for number, line in enumerate(complete, start=1):
        try:
            text = line.decode("utf-8")
            found = from_json_line(text)
            if not isinstance(found, dict) or type(found.get("step")) is not int:
                raise ValueError("no object with a step")
            if other := [key for key, value in found.items() if not isinstance(value, int | float | None)]:
                raise ValueError(f"{other[0]} is no number")
            if lines and found["step"] < lines[-1][0]:
                raise ValueError(f"step {found['step']} after step {lines[-1][0]}")
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            problems.append(f"line {number} is no line of metrics ({' '.join(str(error).split())[:80]})")
        else:
            lines.append((found["step"], text))
    return lines, problems, bool(rest)


class Writer(Protocol):
    """Somewhere else where lines go."""

    def write(self, line: dict[str, Any]) -> None:
        """Takes one line; those of a step come together."""

    def close(self) -> None:
        """Returns when all lines are where they belong."""


def check_writers(log: LogConfig) -> None:
    """What can be known without a run: that every package is there, and that W&B would let us in.

    Raises:
        ConfigError: says what to install or to do.
    """
    missing = [name for name in log.to if importlib.util.find_spec(name) is None]
    if missing:
        extras = ",".join(missing)
        raise ConfigError(f"log.to: {', '.join(missing)} not installed: pip install 'jaxsft[{extras}]'")
    if "wandb" in log.to and jax.process_index() == 0:
        import wandb

        # Else it would ask on the terminal for a key, and training would wait for an answer.
        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
            raise ConfigError(
                "log.to: wandb: no key for Weights & Biases here: run `wandb login`, or set WANDB_MODE=offline and send"
                " the run later with `wandb sync`"
            )


def open_writers(
    log: LogConfig,
    folder: epath.Path,
    *,
    step: int,
    file: MetricsFile,
    settings: dict[str, Any],
    say: Callable[[str], None],
) -> list[Writer]:
    """The writers that `log.to` names; none on processes other than 0.

    What fails later is said once and counted, and training goes on.

    Args:
        log: of the config.
        folder: of the run; its name is the run's name.
        step: steps done.
        file: of the run, opened at this step.
        settings: the resolved config, shown beside the curves.
        say: is told of failures.

    Raises:
        ConfigError: a writer cannot be opened.
    """
    if jax.process_index() != 0:
        return []
    writers: list[Writer] = []
    for name in log.to:
        try:
            writer: Writer
            if name == "tensorboard":
                writer = TensorBoard(folder / "tensorboard", step=step, lines=file.lines())
            elif name == "wandb":
                writer = WeightsAndBiases(log.project, folder, lines=file.lines(), settings=settings)
            else:
                writer = Trackio(log.project, folder, last_step=file.last_step, settings=settings)
        except Exception as error:  # whatever a package raises where it has no disk, network or permission
            for writer in writers:
                writer.close()
            raise ConfigError(f"log.to: {name} could not be opened: {type(error).__name__}: {error}") from error
        writers.append(Guarded(name, writer, say))
    return writers


class Guarded:
    """A writer whose failures are said and counted, but end nothing."""

    def __init__(self, name: str, writer: Writer, say: Callable[[str], None]) -> None:
        self._name, self._writer, self._say = name, writer, say
        self._written = self._failed = 0

    def write(self, line: dict[str, Any]) -> None:
        self._written += 1
        try:
            self._writer.write(line)
        except Exception as error:
            self._failed += 1
            if self._failed == 1:
                text = f"{type(error).__name__}: {error}"
                self._say(f"WARNING: {self._name}: the line of step {line['step']} was not logged ({text}); goes on")

    def close(self) -> None:
        try:
            self._writer.close()
        except Exception as error:
            self._say(f"WARNING: {self._name}: could not be closed ({type(error).__name__}: {error})")
        if self._failed:
            self._say(f"WARNING: {self._name}: {self._failed} of {self._written} lines were not logged")


def tagged(line: dict[str, Any]) -> dict[str, float]:
    """The values of a line that are drawn, in groups: {"loss": 1, "eval_loss": 2} is {"train/loss": 1, "eval/loss": 2}.

    A group is a section of charts in all three.
    """
    return {_tag(key): value for key, value in line.items() if key not in UNDRAWN}


def _tag(key: str) -> str:
    if key.startswith("eval_"):
        return f"eval/{key.removeprefix('eval_')}"
    if key in SPEED:
        return f"speed/{key}"
    return f"data/{key}" if key in DATA or key.startswith("stream_") else f"train/{key}"


class TensorBoard:
    """Event files for TensorBoard, by its own package: neither TensorFlow nor PyTorch is needed."""

    def __init__(self, folder: epath.Path, *, step: int, lines: Sequence[dict[str, Any]]) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        is_new = not folder.exists()
        self._writer = EventFileWriter(str(folder))
        # A start of a session makes TensorBoard forget what earlier files have from this step on.
        log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.add_event(self._event(wall_time=time.time(), step=step + 1 if step else 0, session_log=log))
        for line in lines if is_new else ():
            self.write(line)

    def write(self, line: dict[str, Any]) -> None:
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in tagged(line).items()]
        summary = self._summary(value=values)
        self._writer.add_event(self._event(wall_time=time.time(), step=line["step"], summary=summary))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, which a later start of the same run folder continues.

    A process that is killed may take with it what it had not sent or put on disk yet. Offline, it is not known what was
    lost, so each start leaves a file of the whole run; W&B drops the steps that it has when the files are sent.
    """

    def __init__(
        self, project: str, folder: epath.Path, *, lines: Sequence[dict[str, Any]], settings: dict[str, Any]
    ) -> None:
        import wandb

        self._run = wandb.init(
            project=project,
            dir=str(folder),
            id=run_id(folder),
            name=folder.name,
            resume="allow",
            config=settings,
            # The terminal stays as it is, and no end of a run waits for ever.
            settings=wandb.Settings(console="off", finish_timeout=FINISH_SECONDS, finish_timeout_raises=True),
        )
        self._first_step = self._run.starting_step
        for line in lines:
            self.write(line)

    def write(self, line: dict[str, Any]) -> None:
        if line["step"] >= self._first_step:
            self._run.log(tagged(line), step=line["step"])

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of trackio, in its database on this machine or wherever its own settings say."""

    def __init__(self, project: str, folder: epath.Path, *, last_step: int, settings: dict[str, Any]) -> None:
        import trackio

        self._last_step = last_step
        self._run = trackio.init(
            project,
            # It knows runs by their names.
            name=f"{folder.name}-{run_id(folder)}",
            config=settings,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def write(self, line: dict[str, Any]) -> None:
        if line["step"] > self._last_step:
            self._run.log(tagged(line), step=line["step"])

    def close(self) -> None:
        self._run.finish()


def run_id(folder: epath.Path) -> str:
    """What names a run where runs of many folders meet: drawn once, kept in the folder, gone with it."""
    path = folder / "run_id"
    with contextlib.suppress(FileNotFoundError):
        found = read_file(path, most=100).strip() if is_file(path) or not path.exists() else b"no file"
        if re.fullmatch(rb"[0-9a-f]{8}", found):
            return found.decode()
        raise ConfigError(
            f"{path}: holds {found[:20]!r}, expected 8 hexadecimal digits; put back those that W&B or trackio show for "
            "this run, or remove the file to log it as a new one"
        )
    write_whole(path, secrets.token_hex(4) + "\n")
    return run_id(folder)


class Console:
    """What the user sees: a live bar on a terminal, plain lines elsewhere, nothing on processes other than 0."""

    def __init__(self) -> None:
        import rich.console

        self._quiet = jax.process_index() != 0
        self._console = rich.console.Console(quiet=self._quiet, highlight=False, emoji=False)
        self._bar: Any = None
        self._started: tuple[float, int] | None = None

    def say(self, text: str = "") -> None:
        """Prints a line, above the bar where there is one."""
        self._console.print(text, markup=False, soft_wrap=True)

    def step(self, step: int, num_steps: int, line: dict[str, float]) -> None:
        """Shows the metrics of a line: `step` of `num_steps` are done."""
        now = time.perf_counter()
        if self._started is None:
            self._started = (now - line["seconds"], step - int(line["steps"]))
        begin, first = self._started
        left = (now - begin) / max(step - first, 1) * (num_steps - step)
        shown = (
            f"loss {line['loss']:.4f}  accuracy {line['accuracy']:.1%}  {line['tokens_per_second']:,.0f} tokens/s"
            + (f"  MFU {line['mfu']:.1%}" if "mfu" in line else "")
            + f"  learning rate {line['learning_rate']:.2e}"
            + (f"  {line['skipped_steps']:.0f} STEPS SKIPPED (not finite)" if line["skipped_steps"] else "")
        )
        if not self._console.is_terminal:
            self.say(f"step {step}/{num_steps}  {shown}  left {_clock(left)}")
            return
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
