"""Pages, pictures and their like, which others may have too under the same names: each bears a mark of its maker.

In: what to write, and where. Out: files that are whole, and never in the place of one without the mark. Whoever writes
such files asks `refuse_other_pages` before the work that they show, and `write_page` asks once more.
"""

from collections.abc import Iterable

from etils import epath

import jaxsft
from jaxsft.config import ConfigError
from jaxsft.disk.writing import Path, refuse_others, write_whole, writing

MAKER = f"jaxsft {jaxsft.__version__}"
"""In a picture's Software."""
GENERATOR = f'<meta name="generator" content="{MAKER}">'
"""In the head of a page."""
MADE_BY = {"made_by": "jaxsft"}
"""The first key of a JSON file."""

MARKS: dict[str, tuple[bytes, ...]] = {
    ".html": (
        b'<meta name="generator" content="jaxsft ',
        # Versions up to 0.1 wrote pages without a mark; they are known by the end of their titles.
        " · jaxsft report</title>".encode(),
        " · jaxsft preview</title>".encode(),
    ),
    ".json": (b'{"made_by": "jaxsft"',),
    ".png": (b"tEXtSoftware\0jaxsft ",),
    ".txt": (b"jaxsft: output of jaxsft.", b"jaxsft: summary of a profile\n"),
}
"""Ending of a file -> marks by which one of ours is known; one of them stands in its first 4 KiB."""


def refuse_other_pages(paths: Iterable[Path]) -> None:
    """Refuses to write over files that are not ours.

    Raises:
        ConfigError: all of them, in one.
    """
    problems = []
    for path in paths:
        try:
            refuse_others(path, *MARKS[epath.Path(path).suffix])
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))


def write_page(path: Path, content: str | bytes) -> None:
    """Writes a file that bears the mark of its kind.

    Raises:
        ConfigError: another one of that name is there.
        WriteError: it cannot be written; what was there before is whole.
    """
    data = content.encode() if isinstance(content, str) else content
    marks = MARKS[epath.Path(path).suffix]
    assert any(mark in data[:4096] for mark in marks), path
    refuse_others(path, *marks)
    write_whole(path, data)


def make_folder(path: Path) -> None:
    """A folder with its parents, where there is none.

    Raises:
        WriteError: it cannot be made.
    """
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
