"""Where the lines of metrics also go: TensorBoard, Weights & Biases, trackio.

In: flat dicts of plain numbers with their `step`, in order. Out: event files, or lines sent, from process 0 only. A run
that goes on after a crash does some steps again: TensorBoard forgets the lines of those steps and gets new ones; W&B
and trackio, which cannot forget, keep the lines that they have. Lines that a writer never got are sent to it from
`metrics.jsonl` (`metrics_file.py`).
"""

import contextlib
import importlib.util
import re
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
from etils import epath

from jaxsft.config import ConfigError, LogConfig
from jaxsft.disk.buckets import is_bucket
from jaxsft.disk.writing import is_file, read_file, write_whole
from jaxsft.training.metrics_file import MetricsFile

SPEED = {
    "steps", "seconds", "tokens_per_second", "trained_tokens_per_second", "data_wait_share", "host_share", "mfu",
    "memory_gib",
}  # fmt: skip
"""Numbers of a line that are drawn in the group `speed`."""
DATA = {"epoch", "tokens", "trained_tokens", "padding_share", "total_tokens", "total_trained_tokens"}
"""Numbers of a line that are drawn in the group `data`."""
UNDRAWN = {"step", "rows_crc"}
"""Not drawn: the horizontal axis, and a checksum."""

FINISH_SECONDS = 300
"""How long the end of a run waits for W&B to take what it was sent."""


class Writer(Protocol):
    """Somewhere else where lines go."""

    def write(self, line: dict[str, Any]) -> None:
        """Takes one line; those of a step come together."""

    def close(self) -> None:
        """Returns when all lines are where they belong."""


def check_writers(log: LogConfig, folder: epath.Path) -> None:
    """Checks what can be known before the run: that every package is there, and that W&B knows a key.

    Args:
        log: of the config.
        folder: of the run.

    Raises:
        ConfigError: says what to install or to do.
    """
    missing = [name for name in log.to if importlib.util.find_spec(name) is None]
    if missing:
        extras = ",".join(missing)
        raise ConfigError(f"log.to: {', '.join(missing)} not installed: pip install 'jaxsft[{extras}]'")
    of_disks = [name for name in log.to if name in ("tensorboard", "wandb")]
    if of_disks and is_bucket(folder):
        raise ConfigError(f"log.to: {', '.join(of_disks)} writes to a disk, and run_dir {folder} is a bucket")
    if "wandb" in log.to and jax.process_index() == 0:
        import wandb

        # Without a key, wandb would ask for one on the terminal, and training would wait for the answer.
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
