"""Names of metrics: from what others call a column to the keys of our `metrics.jsonl`.

In: a `Table` as a reader found it, and what the user says of its columns. Out: a `Run`. No value is changed here; what
is not taken is named in the run's caveats.
"""

import difflib
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxsft.config import ConfigError
from jaxsft.report.records import Run
from jaxsft.rows.strict import DataError


class Table(NamedTuple):
    """One run as its file has it, columns under their own names."""

    name: str
    kind: str
    source: str
    rows: tuple[dict[str, float], ...]
    columns: tuple[str, ...]
    """All of them, those without a number among them."""
    no_numbers: dict[str, str]
    """Columns with a cell that is no number: where it stands and what it is."""
    settings: dict[str, Any] = {}
    figures: dict[str, float] = {}
    caveats: tuple[str, ...] = ()


KEYS = (
    "step", "epoch", "time", "loss", "objective", "accuracy", "grad_norm", "learning_rate", "tokens", "trained_tokens",
    "padding_share", "total_tokens", "total_trained_tokens", "skipped_steps", "steps", "seconds", "tokens_per_second",
    "trained_tokens_per_second", "data_wait_share", "memory_gib", "mfu", "eval_loss", "eval_accuracy",
    "eval_perplexity", "eval_exact_match", "eval_questions",
)  # fmt: skip
"""What a column can be: the keys of `metrics.jsonl`, and `time`, in seconds since any moment."""

ALIASES = {
    "global_step": "step",
    "_step": "step",
    "iteration": "step",
    "_timestamp": "time",
    "_runtime": "time",
    "wall_time": "time",
    "relative_time_(process)": "time",
    "train_loss": "loss",
    "training_loss": "loss",
    "val_loss": "eval_loss",
    "valid_loss": "eval_loss",
    "validation_loss": "eval_loss",
    "lr": "learning_rate",
    "gradient_norm": "grad_norm",
    "mean_token_accuracy": "accuracy",
    "num_tokens": "total_tokens",
    "num_input_tokens_seen": "total_tokens",
}

STEP_COLUMNS = ("train/global_step", "trainer/global_step", "global_step", "step", "iteration", "_step")
"""Where a table has several, the first of these: W&B's own `_step` counts calls of its logger, not updates."""


def our_key(column: str) -> str | None:
    """The key that a column is by its name, None where it says nothing to us.

    `train/loss` and `Loss` are `loss`; `eval/loss` and `val_loss` are `eval_loss`. `train/train_loss`, which Trainer
    writes once at its end and which is a mean over the run, is none.
    """
    name = re.sub(r"[\s-]+", "_", column.strip().lower())
    part, _, rest = name.rpartition("/")
    if part in ("train", "training", "trainer"):
        key = None if rest.startswith("train_") else ALIASES.get(rest, rest)
    elif part in ("eval", "val", "valid", "validation"):
        key = f"eval_{ALIASES.get(rest, rest)}"
    elif part == "eval_loss":  # one of our held-out sets
        return column
    elif part:
        key = None
    else:
        held_out = name.removeprefix("eval_")
        key = ALIASES.get(name, name) if held_out == name else f"eval_{ALIASES.get(held_out, held_out)}"
    return key if key in KEYS else None


def as_run(table: Table, columns: Mapping[str, str]) -> Run:
    """The run of a table.

    Args:
        table: as its reader made it.
        columns: our key to their column, where the name alone does not say it; those that the table lacks are left.

    Raises:
        ConfigError: two columns are one key, or none is `step`; names them and the remedy.
        DataError: a cell of a column that is one of our keys is no number.
    """
    names = _names(table, columns)
    for column, key in names.items():
        if column in table.no_numbers:
            raise DataError(f"{table.no_numbers[column]}; column {column!r} is read as {key}, expected a number")
    unread = [column for column in table.columns if column not in names]
    renamed = [{names[column]: value for column, value in row.items() if column in names} for row in table.rows]
    lines, caveats = _by_step(renamed, table) if table.kind != "jaxsft" else (tuple(renamed), ())
    caveats = (*table.caveats, *caveats)
    if unread:
        shown = ", ".join(unread[:30]) + (f" and {len(unread) - 30} more" if len(unread) > 30 else "")
        caveats += (f"columns that were not read: {shown} (`--columns OURS=THEIRS` reads one)",)
    figures, said = figures_of(lines)
    if figures.keys() - table.figures.keys():
        caveats += said
    return Run(table.name, table.kind, table.source, lines, figures | table.figures, table.settings, caveats)


def check_columns(columns: Mapping[str, str], tables: Sequence[Table]) -> None:
    """Refuses a mapping to no key of ours, and from a column that no table has."""
    problems = []
    found = list(dict.fromkeys(column for table in tables for column in table.columns))
    for ours, theirs in columns.items():
        if ours not in KEYS and not ours.startswith("eval_loss/"):
            problems.append(f"--columns {ours}={theirs}: {ours} is none of our keys{_close(ours, KEYS)}")
        elif theirs not in found:
            problems.append(f"--columns {ours}={theirs}: no file has a column {theirs!r}{_close(theirs, found)}")
    if problems:
        problems.append(f"our keys: {', '.join(KEYS)}\ncolumns: {', '.join(found)}")
        raise ConfigError("\n".join(problems))


def figures_of(lines: Sequence[Mapping[str, float]]) -> tuple[dict[str, float], tuple[str, ...]]:
    """Speed and memory of a whole run from its lines, and what must be known of them.

    Where lines carry `seconds`, sums over all but the first of them, which holds the compilation. Where there is only
    a clock, the median from line to line, which evaluations and saves do not move.
    """
    figures: dict[str, float] = {}
    memory = [line["memory_gib"] for line in lines if "memory_gib" in line]
    if memory:
        figures["memory_gib"] = max(memory)
    timed = [line for line in lines if line.get("seconds", 0) > 0]
    if timed:
        kept = timed[1:] or timed
        seconds = sum(line["seconds"] for line in kept)
        figures["step_seconds"] = seconds / sum(line.get("steps", 1) for line in kept)
        for key in ("tokens", "trained_tokens"):
            if all(key in line for line in kept):
                figures[f"{key}_per_second"] = sum(line[key] for line in kept) / seconds
        alone = "its first line, which holds the compilation, is all there is of its speed"
        return figures, () if timed[1:] else (alone,)
    for key in ("tokens_per_second", "trained_tokens_per_second"):
        if values := [line[key] for line in lines if key in line]:
            figures[key] = statistics.median(values)
    clocked = [line for line in lines if "time" in line and "loss" in line]
    pairs = [(one, two) for one, two in zip(clocked, clocked[1:], strict=False) if two["time"] > one["time"]]
    steps = [(two["time"] - one["time"]) / (two["step"] - one["step"]) for one, two in pairs]
    if not steps:
        return figures, ()
    figures.setdefault("step_seconds", statistics.median(steps))
    for key in ("tokens", "trained_tokens"):
        total = f"total_{key}"
        both = [(one, two) for one, two in pairs if total in one and total in two]
        if rates := [(two[total] - one[total]) / (two["time"] - one["time"]) for one, two in both]:
            figures.setdefault(f"{key}_per_second", statistics.median(rates))
    return figures, ("its speed is the median from line to line by the clock, evaluations and saves between them",)


def _names(table: Table, columns: Mapping[str, str]) -> dict[str, str]:
    """Column to key, each key once."""
    names = {theirs: ours for ours, theirs in columns.items() if theirs in table.columns}
    rest = [column for column in table.columns if column not in names]
    taken = set(names.values())
    candidates: dict[str, list[str]] = {}
    for column in rest:
        key = our_key(column) if table.kind != "jaxsft" else column
        if key is not None and key not in taken:
            candidates.setdefault(key, []).append(column)
    if "step" in candidates:
        order = {name: rank for rank, name in enumerate(STEP_COLUMNS)}
        candidates["step"] = sorted(candidates["step"], key=lambda name: order.get(name.lower(), len(order)))[:1]
    problems = [
        f"{key} may be any of the columns {', '.join(map(repr, found))}; say which: --columns {key}={_shell(found[0])}"
        for key, found in candidates.items()
        if len(found) > 1
    ]
    if "step" not in candidates and "step" not in taken:
        problems.append("no column counts steps; say which does: --columns step=NAME")
    if problems:
        shown = ", ".join(table.columns)
        raise ConfigError("\n".join(f"{table.source}: {problem}" for problem in problems) + f"\ncolumns: {shown}")
    return names | {found[0]: key for key, found in candidates.items()}


def _by_step(rows: Sequence[Mapping[str, float]], table: Table) -> tuple[tuple[dict[str, float], ...], tuple[str, ...]]:
    """One line per step, in order; of a value that was logged twice for a step, the later."""
    lines: dict[float, dict[str, float]] = {}
    twice = stepless = 0
    for row in rows:
        if len(row) < 2:
            continue
        if "step" not in row:
            stepless += 1
            continue
        if not math.isfinite(row["step"]):
            raise DataError(f"{table.source}: step {row['step']} given, expected a number of steps")
        line = lines.setdefault(row["step"], {})
        twice += any(key in line and line[key] != row[key] for key in row.keys() - {"step", "time", "epoch"})
        # The clock of the first row of a step: a later one was logged after an evaluation.
        line.update({key: value for key, value in row.items() if key != "time" or "time" not in line})
    if not lines:
        raise DataError(f"{table.source}: no row holds a step and a value; columns: {', '.join(table.columns)}")
    caveats = []
    if twice:
        caveats.append(f"{twice:,} rows repeat a step with other values, as a continued run does; the later are shown")
    if stepless:
        caveats.append(f"{stepless:,} rows without a step were left out")
    return tuple(lines[step] for step in sorted(lines)), tuple(caveats)


def _close(name: str, names: Sequence[str]) -> str:
    found = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {found[0]!r}?" if found else ""


def _shell(name: str) -> str:
    return f"'{name}'" if re.search(r"[^\w/.]", name) else name
