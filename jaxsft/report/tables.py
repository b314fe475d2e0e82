"""CSV as W&B, TensorBoard, pandas and people write it.

In: a file. Out: a `Table` per run in it. An export of a W&B chart holds several runs, as columns `RUN - METRIC`, each
with `__MIN` and `__MAX` beside it; any other file holds one.
"""

import csv
import io
import re
from collections.abc import Sequence

from etils import epath

from jaxsft.report.caveats import BUCKETS, LOGGED, MEANING, SAMPLED, trainer_caveats
from jaxsft.report.columns import Table
from jaxsft.rows.strict import DataError


def read_csv(path: epath.Path) -> list[Table]:
    """The runs of a CSV file; cells that are empty are left out.

    Raises:
        DataError: no header, no rows, a column twice, or a row of another width.
    """
    text = path.read_text(encoding="utf-8-sig")
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    header = next(reader, [])
    rows = [(reader.line_num, cells) for cells in reader if cells]
    if not rows or not any(header):
        raise DataError(f"{path}: a header and rows expected, {len(rows)} rows found")
    if repeated := {name for name in header if name and header.count(name) > 1}:
        raise DataError(f"{path}: columns stand twice: {', '.join(sorted(repeated))}")
    for number, cells in rows:
        if len(cells) != len(header):
            raise DataError(f"{path}:{number}: {len(cells)} cells, expected {len(header)} as the header has")
    columns = [_column(name, index) for index, name in enumerate(header)]
    values: list[dict[str, float]] = []
    no_numbers: dict[str, str] = {}
    for number, cells in rows:
        row = {}
        for column, cell in zip(columns, cells, strict=True):
            if not cell.strip():
                continue
            try:
                row[column] = float(cell)
            except ValueError:
                no_numbers.setdefault(column, f"{path}:{number}: {cell!r} given")
        values.append(row)
    if runs := _runs_of_chart(columns):
        return [_of_chart(path, name, runs[name], runs, values, no_numbers) for name in runs]
    is_wandb = any(column in ("_step", "_runtime", "_timestamp") for column in columns)
    caveats = _meaning(columns) + (SAMPLED,) * is_wandb
    if is_wandb and not any("global_step" in column or column.lower() == "step" for column in columns):
        caveats += (LOGGED,)
    return [Table(path.stem, "csv", str(path), tuple(values), tuple(columns), no_numbers, caveats=caveats)]


def _column(name: str, index: int) -> str:
    return name.strip() or f"column {index + 1} (without a name)"


def _runs_of_chart(columns: list[str]) -> dict[str, dict[str, str]]:
    """Run -> column -> metric, where the columns are those of a W&B chart."""
    runs: dict[str, dict[str, str]] = {}
    for column in columns:
        found = re.fullmatch(r"(.+) - (.+)", column)
        base = re.sub(r"__(MIN|MAX)$", "", column)
        if found and f"{base}__MIN" in columns and f"{base}__MAX" in columns:
            runs.setdefault(found[1], {})[column] = found[2]
    return runs


def _of_chart(
    path: epath.Path,
    name: str,
    metrics: dict[str, str],
    runs: dict[str, dict[str, str]],
    values: list[dict[str, float]],
    no_numbers: dict[str, str],
) -> Table:
    """One run of a chart: the columns of its own and those that all share, such as `Step`."""
    others = {column for run, own in runs.items() if run != name for column in own}
    bounds = {column for column in metrics if re.search("__(MIN|MAX)$", column)}
    columns = list(dict.fromkeys(column for row in values for column in row if column not in others | bounds))
    columns += [column for column in no_numbers if column not in [*columns, *others, *bounds]]
    shared = [column for column in columns if column not in metrics]
    rows = []
    for row in values:
        own = {metrics[column]: row[column] for column in metrics if column in row and column not in bounds}
        if own:
            rows.append({column: row[column] for column in shared if column in row} | own)
    caveats = (*_meaning([*shared, *metrics.values()]), SAMPLED)
    ends = [(row.get(f"{c}__MIN"), row.get(f"{c}__MAX")) for row in values for c in metrics if f"{c}__MIN" in metrics]
    if any(least != most for least, most in ends):
        caveats += (BUCKETS,)
    if not any("step" in column.lower() for column in shared):
        caveats += (LOGGED,)
    names = tuple(metrics.get(column, column) for column in columns)
    texts = {metrics.get(column, column): text for column, text in no_numbers.items() if column in columns}
    return Table(name.removeprefix("Group: "), "csv", str(path), tuple(rows), names, texts, caveats=caveats)


def _meaning(columns: Sequence[str]) -> tuple[str, ...]:
    """Columns of transformers' Trainer are recognised by the name that it gives its steps."""
    return trainer_caveats(columns, logging_steps=None) if "train/global_step" in columns else (MEANING,)
