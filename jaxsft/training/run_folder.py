"""Whose run a folder holds, and whether it may go on there: the lock, the fingerprint, and what a run leaves behind.

    fingerprint.json   what must be equal for the run in this folder to be continued
    run.lock           which process works here; gone when none does

In: a folder, and the fingerprint of the run that wants it. Out: its lock, or an error that says why the run may not go
on there. What is sealed with a checkpoint is the truth; where a small file beside it is damaged, it is written again
from that.
"""

import contextlib
import datetime
import functools
import json
from collections.abc import Callable
from typing import Any

import yaml
from etils import epath

from jaxsft.config import ConfigError
from jaxsft.disk.locks import Lock
from jaxsft.disk.seal import read_object
from jaxsft.disk.writing import WriteError, aside_of, read_file, set_aside, write_whole, writing
from jaxsft.hosts.agreement import by_first, share
from jaxsft.hosts.disks import first_with
from jaxsft.hosts.table import num_processes
from jaxsft.hosts.words import processes
from jaxsft.training.checkpoint import PROGRESS, all_steps, newest_run, sealed_steps
from jaxsft.training.metrics_file import last_step

FINGERPRINT, LOCK = "fingerprint.json", "run.lock"

UNSAID = {"optim.name": "adamw"}
"""What is true of runs of earlier versions, and is not in their fingerprints."""


def claim_run_folder(
    folder: epath.Path,
    fingerprint: dict[str, Any],
    *,
    restart: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Lock | None:
    """Makes the folder of a run, or recognises it as the same run's; changes nothing in a folder of anything else.

    Args:
        folder: the run folder.
        fingerprint: what must be equal for a run to be continued, by name; plain JSON values.
        restart: move the run that is there aside and begin anew.
        say: is told what was made good, moved or taken over.

    Returns:
        the lock of the folder, to be released when the run ends; None on processes other than 0.

    Raises:
        ConfigError: the folder holds another run (the differing fields are named), or something that is no run, or
            another process works in it, or not all processes of this run see it. On all processes.
        WriteError: it cannot be made. On all processes.
    """
    fingerprint = json.loads(json.dumps(fingerprint))
    claim = functools.partial(_claim, folder, fingerprint, restart=restart, say=say)
    lock = by_first("taking the run folder", claim, errors=(ConfigError, WriteError))
    try:
        _check_shared(folder)
    except BaseException:
        if lock is not None:
            lock.release()
        raise
    return lock


def _check_shared(folder: epath.Path) -> None:
    """Raises ConfigError, the same on all processes, where they do not all see the folder that process 0 has."""
    if num_processes() == 1:
        return
    first = None
    with contextlib.suppress(WriteError):
        first = first_with(folder)
    apart = share(
        "whether all see the run folder", first, lambda found: [n for n, each in enumerate(found) if each != 0]
    )
    if apart:
        does = "does" if len(apart) == 1 else "do"
        raise ConfigError(
            f"run_dir: {processes(apart)} {does} not see {folder} as process 0 has it; expected a folder that all "
            "hosts share and can write into"
        )


def _claim(folder: epath.Path, fingerprint: dict[str, Any], *, restart: bool, say: Callable[[str], None]) -> Lock:
    path = folder / FINGERPRINT
    if folder.exists() and not _is_run(folder):
        raise ConfigError(f"run_dir: {folder} exists and is not a run of jaxsft; choose another run_dir")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(folder / LOCK)
    lock.acquire(say)
    try:
        if restart and (path.exists() or _evidence(folder)):
            lock = _move_aside(folder, lock, say)
        saved = _saved_fingerprint(folder, say)
        if saved is None:
            write_whole(path, json.dumps(fingerprint, indent=1) + "\n")
        if not (folder / PROGRESS).exists() and not _evidence(folder):
            write_whole(folder / PROGRESS, json.dumps({"sealed": None}) + "\n")
        if saved is None:
            return lock
        saved, fingerprint = UNSAID | saved, UNSAID | fingerprint
        fields = [name for name in {**saved, **fingerprint} if saved.get(name) != fingerprint.get(name)]
        if fields:
            listed = "\n".join(f"  {f}: {saved.get(f)!r} then, {fingerprint.get(f)!r} now" for f in fields)
            raise ConfigError(
                f"run_dir: {folder} holds another run, begun with other settings:\n{listed}\n"
                "set these back to continue it, choose another run_dir, or start anew with --restart, which moves it "
                "aside"
            )
    except BaseException:
        lock.release()
        raise
    return lock


def _is_run(folder: epath.Path) -> bool:
    """Whether a folder is empty, or was made by a run."""
    if not folder.is_dir():
        return False
    others = {child.name for child in folder.iterdir()} - {aside_of(folder / FINGERPRINT).name}
    if LOCK in others and Lock(folder / LOCK).is_lock():
        others.remove(LOCK)  # Left by a start that was killed before it wrote anything else.
    return not others or FINGERPRINT in others or bool(newest_run(folder / "checkpoints"))


def _saved_fingerprint(folder: epath.Path, say: Callable[[str], None]) -> dict[str, Any] | None:
    """The fingerprint of the run that is there, None where there is none; its file is made good where it is not.

    Raises:
        ConfigError: the file is damaged or gone, and no checkpoint knows better.
    """
    path, found, problem = folder / FINGERPRINT, None, "is missing"
    if path.exists():
        try:
            found, problem = read_object(path), ""
        except (OSError, ValueError) as error:
            problem = f"is damaged ({error})"
    sealed = newest_run(folder / "checkpoints").get("fingerprint")
    if isinstance(sealed, dict):
        if found != sealed:
            say(f"{path} {problem or 'is not as it was written'}: written again, from the newest checkpoint")
            write_whole(path, json.dumps(sealed, indent=1) + "\n")
        return sealed
    if found is None and (path.exists() or _evidence(folder)):
        raise ConfigError(
            f"run_dir: {path} {problem}, and no checkpoint says what it held; choose another run_dir, or start anew "
            "with --restart, which moves this run aside"
        )
    return found


def check_progress(folder: epath.Path) -> None:
    """Refuses to begin at step 0 where something says that the run was further; changes nothing.

    To be called where no finished checkpoint was found. A run that was killed before its first one began at 0 as well.

    Raises:
        ConfigError: says what is there, what is missing, and what to do.
    """

    def check() -> None:
        if evidence := _evidence(folder):
            listed = "\n".join(f"  {each}" for each in evidence)
            raise ConfigError(
                f"run_dir: {folder} has no finished checkpoint to go on from, but the run was further:\n{listed}\n"
                f"bring {folder / 'checkpoints'} back as it was (is its disk mounted?), or start anew with --restart, "
                "which moves this run aside"
            )

    by_first("looking at the run folder", check, errors=(ConfigError,))


def _evidence(folder: epath.Path) -> list[str]:
    """What says that a run has saved something, in sentences."""
    found = []
    sealed, is_known = None, False
    with contextlib.suppress(OSError, ValueError):
        sealed = read_object(folder / PROGRESS).get("sealed", "")
        is_known = sealed is None or type(sealed) is int
    if is_known and sealed is not None:
        found.append(f"{PROGRESS} says that checkpoint {sealed} was finished")
    if (folder / "export").exists():
        found.append("export/ holds the model that it ended with")
    steps = all_steps(folder / "checkpoints")
    if finished := sealed_steps(folder / "checkpoints"):
        found.append(f"checkpoints/{finished[-1]} was finished")
    elif len(steps) > 1 or (steps and not is_known):
        found.append(f"checkpoints {', '.join(map(str, steps))} are there, without their seals")
    if not is_known and (last := last_step(folder / "metrics.jsonl")) > 0:
        found.append(f"metrics.jsonl has lines up to step {last}, and {PROGRESS} is missing")
    return found


def _move_aside(folder: epath.Path, lock: Lock, say: Callable[[str], None]) -> Lock:
    """Renames a run that is there; returns the lock of the new, empty folder."""
    lock.release()
    aside = set_aside(folder)
    with writing(folder):
        folder.mkdir()
    say(f"--restart: the run that was in {folder} is in {aside} now")
    fresh = Lock(folder / LOCK)
    fresh.acquire(say)
    return fresh


def template_date(folder: epath.Path) -> datetime.date | None:
    """The day on which the run in a folder began, as its templates see it; None where there is no run."""
    sealed = newest_run(folder / "checkpoints").get("config")
    texts = [sealed] if isinstance(sealed, str) else []
    with contextlib.suppress(OSError, ValueError):
        texts.append(read_file(folder / "config.yaml").decode("utf-8"))
    for text in texts:
        with contextlib.suppress(yaml.YAMLError, KeyError, TypeError, ValueError, RecursionError):
            return datetime.date.fromisoformat(str(yaml.safe_load(text)["data"]["template_date"]))
    return None
