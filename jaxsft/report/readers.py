"""Metrics of a run, whoever wrote them: ours, transformers and TRL, TensorBoard, W&B and any CSV.

In: a file or folder, which may be in a bucket. Out: `Run`s with our keys, and the caveats without which their
numbers mislead.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml
from etils import epath

from jaxsft.config import ConfigError
from jaxsft.disk.buckets import is_bucket
from jaxsft.disk.writing import place
from jaxsft.report.caveats import TENSORBOARD, WHOLE_TIME, trainer_caveats
from jaxsft.report.columns import Table, as_run, check_columns
from jaxsft.report.records import Run, from_json
from jaxsft.report.tables import read_csv
from jaxsft.rows.strict import DataError
from jaxsft.training.metrics import from_json_line

EXPECTED = (
    "a run folder of ours or its metrics.jsonl, a report.json, trainer_state.json or a folder of transformers' Trainer "
    "or TRL, TensorBoard event files or their folder, or a CSV file"
)


def read_runs(path: str, *, name: str | None = None, columns: Mapping[str, str] | None = None) -> tuple[Run, ...]:
    """The runs of a file or folder: one, but for a CSV of several, a folder of TensorBoard runs, and a report of ours.

    Args:
        path: see `EXPECTED`.
        name: of the run; its folder's or file's name where it is None.
        columns: our key to their column, where a name does not say it.

    Raises:
        ConfigError: nothing there that can be read, or a choice that is the user's; says what was found.
        DataError: a file that is not what its name says.
    """
    tables, runs = open_path(path)
    check_columns(columns or {}, tables)
    found = (*runs, *(as_run(table, columns or {}) for table in tables))
    if name is not None and len(found) > 1:
        raise ConfigError(f"{path}: holds {len(found)} runs, one name given ({name})")
    return found if name is None else (found[0]._replace(name=name),)


def read_run(path: str, *, name: str | None = None, columns: Mapping[str, str] | None = None) -> Run:
    """The one run of a file or folder; see `read_runs`."""
    runs = read_runs(path, columns=columns)
    if len(runs) > 1:
        raise ConfigError(f"{path}: one run expected, {len(runs)} found: {', '.join(run.name for run in runs)}")
    return runs[0] if name is None else runs[0]._replace(name=name)


def open_path(path: str) -> tuple[list[Table], list[Run]]:
    """What stands at a path, recognised by its names: tables to be named, or runs that are ready."""
    found = epath.Path(place(path))
    if not found.exists():
        raise ConfigError(f"{path}: no such file or folder; expected {EXPECTED}")
    file = _file_of(found)
    if file is None:
        return _event_tables(found), []
    if file.name == "report.json":
        return [], _runs_of_report(file)
    if file.suffix == ".jsonl":
        return [_ours(file, path)], []
    if file.suffix == ".json":
        return [_trainer(file, path)], []
    if file.suffix in (".csv", ".tsv"):
        return [table._replace(source=path) for table in read_csv(file)], []
    if "tfevents" in file.name:
        return [_events(file, file.parent, path)], []
    raise ConfigError(f"{path}: cannot be read; expected {EXPECTED}")


def _file_of(folder: epath.Path) -> epath.Path | None:
    """The file that holds a folder's metrics; None where TensorBoard's files do."""
    if not folder.is_dir():
        return folder
    for name in ("metrics.jsonl", "report.json", "trainer_state.json"):
        if (folder / name).exists():
            return folder / name
    states = {
        file.parent.name.removeprefix("checkpoint-"): file for file in folder.glob("checkpoint-*/trainer_state.json")
    }
    if steps := [step for step in states if step.isdigit()]:
        return states[max(steps, key=int)]
    if _event_folders(folder):
        return None
    inside = sorted(each.name + "/" * each.is_dir() for each in folder.iterdir())
    shown = ", ".join(inside[:12]) + (f" and {len(inside) - 12} more" if len(inside) > 12 else "")
    raise ConfigError(f"{folder}: no metrics in this folder ({shown or 'it is empty'}); expected {EXPECTED}")


def _ours(file: epath.Path, source: str) -> Table:
    """A `metrics.jsonl`, the settings of `config.yaml` or `facts.json` beside it; a line cut off by a crash is left."""
    *complete, rest = file.read_text().split("\n")
    rows = [_json(text, f"{file}:{number}", from_json_line) for number, text in enumerate(complete, start=1)]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not isinstance(row.get("step"), int | float):
            raise DataError(f"{file}:{number}: an object with a step expected, as a line of metrics.jsonl is")
    if not rows:
        raise DataError(f"{file}: no line is complete yet")
    settings: dict[str, Any] = {}
    if (config := file.parent / "config.yaml").exists():
        settings = _flat(yaml.safe_load(config.read_text()))
    facts_file = file.parent / "facts.json"
    facts = _json(facts_file.read_text(), str(facts_file)) if facts_file.exists() else {}
    settings |= facts.get("settings", {})
    figures = {"startup_seconds": facts["startup_seconds"]} if "startup_seconds" in facts else {}
    caveats = tuple(facts.get("caveats", ()))
    if rest:
        caveats += ("its last line was cut off, by a crash or because it still runs",)
    numbers = [{key: value for key, value in row.items() if _is_number(value)} for row in rows]
    columns = tuple(dict.fromkeys(key for row in numbers for key in row))
    name = file.parent.resolve().name if file.name == "metrics.jsonl" else file.stem
    return Table(name, "jaxsft", source, tuple(numbers), columns, {}, settings, figures, caveats)


def _trainer(file: epath.Path, source: str) -> Table:
    """A `trainer_state.json`: `log_history`, whose last entry of training is of the whole run."""
    state = _json(file.read_text(), str(file))
    if not isinstance(state, dict) or not isinstance(state.get("log_history"), list):
        raise DataError(f"{file}: no log_history in it, which trainer_state.json has; expected {EXPECTED}")
    history: list[dict[str, Any]] = state["log_history"]
    end: dict[str, Any] = next((entry for entry in reversed(history) if "train_loss" in entry), {})
    rows = [{key: value for key, value in entry.items() if _is_number(value)} for entry in history if entry is not end]
    columns = tuple(dict.fromkeys(key for row in rows for key in row))
    kind = "trl" if "num_tokens" in columns or "mean_token_accuracy" in columns else "transformers"
    caveats = trainer_caveats(columns, logging_steps=int(state.get("logging_steps") or 1))
    counted = "num_tokens" if "num_tokens" in columns else "num_input_tokens_seen"
    figures: dict[str, float] = {}
    if end.get("train_runtime") and end.get("step"):
        figures["step_seconds"] = end["train_runtime"] / end["step"]
        totals = [row[counted] for row in rows if counted in row]
        if totals:
            figures["tokens_per_second"] = max(totals) / end["train_runtime"]
        caveats += (WHOLE_TIME,)
    names = ("max_steps", "num_train_epochs", "train_batch_size", "logging_steps", "eval_steps", "save_steps")
    settings = {name: state[name] for name in names if state.get(name) is not None}
    if counted in columns and "num_input_tokens_seen" in columns and counted == "num_tokens":
        rows = [{key: value for key, value in row.items() if key != "num_input_tokens_seen"} for row in rows]
        columns = tuple(column for column in columns if column != "num_input_tokens_seen")
    folder = file.parent.resolve()
    folder = folder.parent if folder.name.startswith("checkpoint-") else folder
    return Table(folder.name, kind, source, tuple(rows), columns, {}, settings, figures, caveats)


def _event_folders(top: epath.Path) -> list[epath.Path]:
    """Folders with event files, as deep as Trainer puts them (`runs/DATE_HOST/`)."""
    files = [file for pattern in ("*tfevents*", "*/*tfevents*", "*/*/*tfevents*") for file in top.glob(pattern)]
    return sorted({file.parent for file in files})


def _event_tables(top: epath.Path) -> list[Table]:
    folders = _event_folders(top)
    tables = [_events(folder, folder, str(top if len(folders) == 1 else folder)) for folder in folders]
    tables = [table for table in tables if table.rows]
    if not tables:
        raise DataError(f"{top}: its event files hold no scalars")
    return tables


def _events(target: epath.Path, folder: epath.Path, source: str) -> Table:
    """The scalars of event files, one row per step and time."""
    if is_bucket(target):
        raise ConfigError(f"{source}: TensorBoard's event files are read from a disk only; download them first")
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from tensorboard.util.tensor_util import make_ndarray
    except ImportError:
        raise ConfigError(
            f"{source}: reading TensorBoard's event files needs tensorboard: pip install 'jaxsft[tensorboard]'"
        ) from None
    accumulator = EventAccumulator(str(target), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    rows: dict[float, dict[str, float]] = {}
    points = [(tag, event, event.value) for tag in accumulator.Tags()["scalars"] for event in accumulator.Scalars(tag)]
    settings: dict[str, Any] = {}
    for tag in accumulator.Tags()["tensors"]:
        for event in accumulator.Tensors(tag):
            value = make_ndarray(event.tensor_proto)
            if value.dtype.kind == "f" and value.size == 1:
                points.append((tag, event, float(value.reshape(()))))
            elif tag == "args/text_summary":  # Trainer's own settings
                settings = _json(value.reshape(-1)[0].decode(), f"{source}: {tag}")
    for tag, event, number in sorted(points, key=lambda point: point[1].wall_time):
        row = rows.setdefault(event.step, {"step": event.step})
        row[tag] = number
        if tag in ("loss", "train/loss"):
            row["wall_time"] = event.wall_time
    ordered = tuple(rows[step] for step in sorted(rows))
    columns = tuple(dict.fromkeys(key for row in ordered for key in row))
    caveats: tuple[str, ...] = TENSORBOARD
    if settings:
        caveats += trainer_caveats(columns, logging_steps=settings.get("logging_steps"))
    return Table(folder.resolve().name, "tensorboard", source, ordered, columns, {}, settings, caveats=caveats)


def _runs_of_report(file: epath.Path) -> list[Run]:
    return list(from_json(_json(file.read_text(), str(file))).runs)


def _json(text: str, where: str, read: Callable[[str], Any] = json.loads) -> Any:
    """JSON with the NaN that Python's writers put into it."""
    try:
        return read(text)
    except ValueError as error:
        raise DataError(f"{where}: not readable as JSON: {error}") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Keys joined by dots, as overrides are written."""
    if not isinstance(tree, dict):
        return {}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        found |= _flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return found


def unique_names(runs: Sequence[Run]) -> tuple[Run, ...]:
    """The runs with names that differ: those that are the same get the folder above, then a number."""
    names = [run.name for run in runs]
    for index, run in enumerate(runs):
        if [other.name for other in runs].count(run.name) > 1 and run.kind != "csv":
            source = epath.Path(place(run.source)).resolve()
            above = source.parent.name if source.name == run.name else source.parent.parent.name
            names[index] = f"{above}/{run.name}"
    seen: dict[str, int] = {}
    for index, name in enumerate(names):
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:
            names[index] = f"{name} ({seen[name]})"
    return tuple(run._replace(name=name) for run, name in zip(runs, names, strict=True))
