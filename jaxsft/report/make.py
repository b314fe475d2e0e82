"""The overlay of runs: what stands at some paths, as one report.

In: paths of runs of any kind, and how to name and align them. Out: a `Report` that judges nothing, and its folder.
"""

import platform
import shlex
from collections.abc import Mapping, Sequence

from etils import epath

import jaxsft
from jaxsft.config import ConfigError
from jaxsft.disk.pages import refuse_other_pages
from jaxsft.disk.writing import place
from jaxsft.report.columns import as_run, check_columns
from jaxsft.report.curves import Axis, unaligned
from jaxsft.report.page import FILES, write_report
from jaxsft.report.readers import open_path, unique_names
from jaxsft.report.records import Report, Run
from jaxsft.report.sections import best_eval_loss, last_loss, number


def report(
    paths: Sequence[str],
    *,
    out: str,
    align: Axis = "step",
    smooth: float | None = None,
    columns: Mapping[str, str] | None = None,
    names: Sequence[str] = (),
    command: str = "",
    verdict: str = "",
) -> Report:
    """Reads the runs and writes their overlay into the folder `out`.

    Args:
        paths: of runs; see `readers.EXPECTED`.
        out: a new or empty folder, or one that holds a report.
        align: what lies on the x axis at first.
        smooth: window in steps, 0 is none; None chooses one.
        columns: our key to their column, for files that have it.
        names: of the runs, as many as there are, or none.
        command: what makes it again; made from the paths where it is empty.
        verdict: the first sentences of the page; that nothing is judged, where it is empty.

    Raises:
        ConfigError: a path that is no run, a number of names that is not that of the runs, a folder that is taken, or
            nothing that can be aligned by tokens.
    """
    folder = epath.Path(place(out, "--out"))
    check_folder(folder)
    runs = read_all(paths, names=names, columns=columns or {})
    lacking = unaligned(runs)
    if align == "tokens" and len(lacking) == len(runs):
        raise ConfigError(f"--by tokens: no run counts trained tokens ({', '.join(lacking)}); use --by step")
    made = Report(
        title=" and ".join(run.name for run in runs) if len(runs) < 4 else f"{len(runs)} runs",
        command=command or f"python run.py report {shlex.join(paths)}",
        verdict=verdict or f"{len(runs)} run{'s' * (len(runs) != 1)} side by side; nothing is judged.",
        passed=None,
        checks=(),
        runs=runs,
        differences=(),
        difference_counts={},
        explanations={},
        facts={"jaxsft": jaxsft.__version__, "python": platform.python_version()},
    )
    write_report(made, folder, by=align, smooth=smooth)
    return made


def read_all(paths: Sequence[str], *, names: Sequence[str], columns: Mapping[str, str]) -> tuple[Run, ...]:
    """The runs of all paths, each with a name of its own."""
    opened = [open_path(path) for path in paths]
    check_columns(columns, [table for tables, _ in opened for table in tables])
    runs = [run for tables, ready in opened for run in (*ready, *(as_run(table, columns) for table in tables))]
    if names and len(names) != len(runs):
        found = ", ".join(run.name for run in runs)
        raise ConfigError(f"--name: {len(names)} names given, expected one for each of the {len(runs)} runs: {found}")
    if len(set(names)) != len(names):
        raise ConfigError(f"--name: {', '.join(names)} given, expected names that differ")
    return (
        tuple(run._replace(name=name) for run, name in zip(runs, names, strict=True)) if names else unique_names(runs)
    )


def check_folder(folder: epath.Path) -> None:
    """Raises ConfigError where a folder is there that is not one of a report of ours, which is left alone."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"--out {folder}: a file is there, expected a folder")
    if others := sorted(each.name for each in folder.iterdir() if each.name not in FILES):
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        raise ConfigError(f"--out {folder}: holds more than a report ({shown}); name a new folder with --out")
    refuse_other_pages(folder / name for name in FILES)


def text_table(runs: Sequence[Run]) -> str:
    """Loss, speed and memory for the terminal."""
    head = ("run", "last loss", "best eval loss", "tokens/s", "trained tokens/s", "memory GiB")
    rows = [
        (
            run.name,
            number(last_loss(run), "{:.4f}"),
            number(best_eval_loss(run), "{:.4f}"),
            number(run.figures.get("tokens_per_second"), "{:,.0f}"),
            number(run.figures.get("trained_tokens_per_second"), "{:,.0f}"),
            number(run.figures.get("memory_gib"), "{:.2f}"),
        )
        for run in runs
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for name, *cells in (head, *rows):
        right = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append(f"{name.ljust(widths[0])}  {right}")
    return "\n".join(lines)
