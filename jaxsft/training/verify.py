"""Everything that a run or an export sealed, compared with what is there now; a table, and nothing is changed.

In: a run folder or an export. Out: a line for each thing that was sealed, and an exit code.
"""

import contextlib
import re
from collections.abc import Callable
from typing import NamedTuple

from etils import epath

from jaxsft.config import ConfigError
from jaxsft.disk.seal import SEAL, UNFINISHED, Entry, problem_of, read_object, read_seal, read_sealed_object
from jaxsft.disk.writing import place
from jaxsft.folders.export import CARD, UNFINISHED_MARK
from jaxsft.training.checkpoint import META, PROGRESS, all_steps, checkpoint_problem, newest_run
from jaxsft.training.metrics_file import metrics_problem
from jaxsft.training.run_folder import FINGERPRINT

SOUND, DAMAGED = 0, 1
EXPORTS = r"export(-best|-last|-step-[0-9]+)?(-merged)?"
"""Names of the folders that `train` and `export` write into a run folder."""


class Finding(NamedTuple):
    """One line of the table."""

    name: str
    num_files: int
    num_bytes: int
    problem: str | None
    """None where it is as it was written."""


def verify(path: str, *, say: Callable[[str], None]) -> int:
    """Prints what is whole and what is not; returns the exit code, 1 where anything is damaged.

    Raises:
        ConfigError: the path is neither a run folder nor an export.
    """
    folder = epath.Path(place(path))
    is_model = any((folder / name).exists() for name in ("config.json", "adapter_config.json"))
    if is_model and not (folder / SEAL).exists() and not (folder / UNFINISHED_MARK).exists():
        raise ConfigError(
            f"{path}: a model without {SEAL}: another program wrote it, or a version of jaxsft before there were "
            "seals, so that nothing says what it should hold"
        )
    if (folder / SEAL).exists() or is_model:
        findings = [_sealed(folder, folder.name, problem_of(folder, free=(CARD,)))]
    elif (folder / "checkpoints").exists() or (folder / FINGERPRINT).exists():
        findings = _run_findings(folder)
    else:
        raise ConfigError(f"{path}: neither the folder of a run nor an export")
    width = max(len(each.name) for each in findings)
    for each in findings:
        size = f"{each.num_files:>6,} files {each.num_bytes:>18,} bytes"
        say(f"{each.name:<{width}}  {size}  {'whole' if each.problem is None else 'DAMAGED: ' + each.problem}")
    damaged = [each for each in findings if each.problem is not None]
    for aside in _set_aside(folder):
        say(f"not looked at: {aside}, which was set aside; remove it if it is of no use any more")
    say(f"{len(findings) - len(damaged)} of {len(findings)} are whole")
    return DAMAGED if damaged else SOUND


def _run_findings(folder: epath.Path) -> list[Finding]:
    checkpoints = folder / "checkpoints"
    findings = []
    for step in all_steps(checkpoints):
        # An unfinished checkpoint is no damage: a continued run clears it away.
        if (problem := checkpoint_problem(checkpoints / str(step))) is not UNFINISHED:
            findings.append(_sealed(checkpoints / str(step), f"checkpoints/{step}", problem))
    exports = [each for each in sorted(folder.glob("export*")) if re.fullmatch(EXPORTS, each.name)]
    findings += [_sealed(each, each.name, problem_of(each, free=(CARD,))) for each in exports]
    findings.append(_file(folder / FINGERPRINT, _fingerprint_problem(folder)))
    if (folder / PROGRESS).exists() or newest_run(checkpoints):  # Earlier versions wrote none.
        findings.append(_file(folder / PROGRESS, _progress_problem(folder)))
    findings.append(_file(folder / "metrics.jsonl", _metrics_problem(folder)))
    return findings


def _set_aside(folder: epath.Path) -> list[str]:
    """What starts of this run have renamed, as it was damaged or in the way."""
    places = [place for place in (folder, folder / "checkpoints") if place.is_dir()]
    names = [str(each.relative_to(folder)) for place in places for each in place.iterdir()]
    return sorted(name for name in names if re.search(r"\.(before|damaged|passed-over)-[0-9]+$", name))


def _sealed(folder: epath.Path, name: str, problem: str | None) -> Finding:
    entries: list[Entry] = []
    with contextlib.suppress(OSError, ValueError):
        entries = list(read_seal(folder / SEAL).values())
    return Finding(name, len(entries), sum(each.size for each in entries), problem)


def _file(path: epath.Path, problem: str | None) -> Finding:
    return Finding(path.name, int(path.exists()), path.stat().length if path.exists() else 0, problem)


def _fingerprint_problem(folder: epath.Path) -> str | None:
    try:
        found = read_object(folder / FINGERPRINT)
    except (OSError, ValueError) as error:
        return " ".join(str(error).split())
    sealed = newest_run(folder / "checkpoints").get("fingerprint")
    return None if sealed in (None, found) else "it is not what the newest checkpoint has sealed"


def _progress_problem(folder: epath.Path) -> str | None:
    try:
        newest = read_object(folder / PROGRESS)["sealed"]
    except (OSError, ValueError, KeyError) as error:
        return " ".join(str(error).split())
    if newest is not None and newest not in all_steps(folder / "checkpoints"):
        return f"checkpoint {newest}, which it says was finished, is not there"
    return None


def _metrics_problem(folder: epath.Path) -> str | None:
    """Against what the newest checkpoint says of the lines up to it."""
    sealed, step = None, 0
    for step in reversed(all_steps(folder / "checkpoints")):
        try:
            sealed = read_sealed_object(folder / "checkpoints" / str(step), META)["progress"]["metrics"]
            break
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return metrics_problem(folder / "metrics.jsonl", step=step, sealed=sealed)
