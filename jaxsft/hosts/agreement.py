"""What all processes of a run must have in common, compared before the first step; and errors that all of them have.

In: facts by name, the same names on every process. Out: nothing where all have the same, else an error, the same on
all, that names what differs and the numbers of the processes. All of it goes through the table that they share
(`table.py`): no device takes part, and processes that do not fit each other can still say so.

Every process must call `share` and `agree` in the same order, as every process runs the same program.
"""

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax

from jaxsft import __version__
from jaxsft.config import ConfigError
from jaxsft.hosts import failure
from jaxsft.hosts.table import Table, num_processes, process_number
from jaxsft.hosts.words import processes

SAY_EVERY = 10.0
"""Seconds between two words on whom process 0 waits for."""
SAME_SECONDS = 5.0
"""How long a process that has failed waits to see whether all fail in the same way."""
MOST_SHOWN = 20

VERSIONS_OF = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers")

Say = Callable[[str], None]
T = TypeVar("T")


def share(what: str, mine: Any, combine: Callable[[list[Any]], Any], *, say: Say = lambda text: None) -> Any:
    """What `combine` makes of the values of all processes, the same on each of them.

    Args:
        what: in words, for whoever waits.
        mine: value of this process; plain JSON.
        combine: from the values, in the order of the processes, to plain JSON. Process 0 computes it.
        say: is told which processes are waited for.
    """
    if num_processes() == 1:
        return combine([json.loads(json.dumps(mine))])
    number = str(next(_numbers))
    table, results = Table(f"share/{number}"), Table("shared")
    entry = json.dumps([what, mine])
    if process_number() == 0:
        entries = [json.loads(text) for text in _gather(table, what, entry, say)]
        places = {place for place, _ in entries}
        result = combine([value for _, value in entries]) if len(places) == 1 else None
        results.put(number, json.dumps([sorted(places), result]))
    else:
        table.put(process_number(), entry)
    begin = said = time.monotonic()
    while (found := results.get(number, seconds=SAY_EVERY)) is None:
        if time.monotonic() - said > SAY_EVERY:
            said = time.monotonic()
            say(f"{what}: waiting for the other processes ({said - begin:.0f} s)")
    places, result = json.loads(found)
    assert places == [what], f"the processes are not at the same place of their program: {places}"
    return result


_numbers = itertools.count()


def _gather(table: Table, what: str, mine: str, say: Say) -> list[str]:
    begin = said = time.monotonic()
    pause = 0.01
    while len(found := table.all()) < num_processes() - 1:
        time.sleep(pause)
        pause = min(2 * pause, 0.5)
        if time.monotonic() - said > SAY_EVERY:
            said = time.monotonic()
            missing = {*range(1, num_processes())} - {int(number) for number in found}
            say(f"{what}: waiting for {processes(missing)} ({said - begin:.0f} s)")
    return [mine, *(found[str(number)] for number in range(1, num_processes()))]


def agree(
    what: str, facts: Mapping[str, Any], *, error: type[Exception] = ConfigError, say: Say = lambda text: None
) -> None:
    """Returns where all processes have the same facts.

    Args:
        what: in words, such as "the config".
        facts: by name; plain JSON.
        error: what is raised.
        say: is told which processes are waited for.

    Raises:
        error: names what differs, and which processes have what.
    """
    shown = {name: _shown(value) for name, value in facts.items()}
    key = hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()
    if share(what, key, lambda keys: len(set(keys)) == 1, say=say):  # A few bytes of each of a thousand processes.
        return
    if found := share(f"{what}: what differs", shown, differences):
        listed = "\n".join(f"  {each}" for each in found[:MOST_SHOWN])
        more = f"\n  and {len(found) - MOST_SHOWN} more" if len(found) > MOST_SHOWN else ""
        raise error(f"the processes of this run do not have the same {what}:\n{listed}{more}")


def differences(facts: list[dict[str, Any]]) -> list[str]:
    """What differs between the facts of processes, a sentence for each.

    With `[{"seed": 1}, {"seed": 1}, {"seed": 2}]`: `processes 0 and 1 have seed 1, process 2 has 2`.
    """
    found = []
    for name in dict.fromkeys(name for each in facts for name in each):
        having: dict[str, list[int]] = {}
        for number, each in enumerate(facts):
            having.setdefault(_shown(each[name]) if name in each else "none", []).append(number)
        if len(having) > 1:
            (text, numbers), *others = sorted(having.items(), key=lambda group: (-len(group[1]), group[1]))
            parts = [f"{_have(numbers)} {name} {text}", *(f"{_have(numbers)} {text}" for text, numbers in others)]
            found.append(", ".join(parts))
    return found


def _have(numbers: list[int]) -> str:
    return f"{processes(numbers)} {'has' if len(numbers) == 1 else 'have'}"


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    if len(text) <= 80 and text.isprintable():
        return text
    return f"{' '.join(text[:40].split())}... ({hashlib.sha256(text.encode()).hexdigest()[:12]})"


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings and lists of such by their keys, as in `data.train.0.path`."""
    if isinstance(tree, list) and tree and all(isinstance(each, Mapping) for each in tree):
        tree = {str(number): each for number, each in enumerate(tree)}
    if not (isinstance(tree, Mapping) and tree):
        return {prefix: tree}
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return leaves


def agree_on_start(config: Mapping[str, Any], *, say: Say = lambda text: None) -> None:
    """Looks whether all processes run the same program with the same config on devices of one kind.

    Args:
        config: the resolved one; plain JSON.
        say: is told which processes are waited for.

    Raises:
        ConfigError: they do not, on all of them; or they have not found each other.
    """
    if num_processes() == 1:
        if jax.process_count() > 1:  # A pod of TPUs knows its hosts by itself, and they have no table.
            raise ConfigError(
                f"this is one of {jax.process_count()} processes that have not found each other: call "
                "jaxsft.hosts.start.start_processes(), or jax.distributed.initialize(), before anything else"
            )
        return
    agree("program", program(), say=say)
    agree("config", flat(config), say=say)
    # Last, since nobody has devices before all processes have come to this.
    devices = jax.local_devices()
    agree("devices", {"devices": f"{len(devices)} x {devices[0].device_kind}"}, say=say)


def program() -> dict[str, str]:
    """What computes: versions, and a key of this program's own code."""
    package = pathlib.Path(__file__).parents[1]
    code = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        code.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    versions = {name: importlib.metadata.version(name) for name in VERSIONS_OF}
    ours = {"jaxsft": __version__, "code of jaxsft": code.hexdigest()[:16]}
    return versions | ours


def by_first(what: str, work: Callable[[], T], *, errors: tuple[type[Exception], ...]) -> T | None:
    """What process 0 makes of some work that it does for all; None on the others, when it is done.

    Args:
        what: in words, for whoever waits.
        work: what only process 0 does.
        errors: kinds of errors, made of one text, that are raised on all processes.
    """
    result, problem = None, None
    if process_number() == 0:
        try:
            result = work()
        except errors as error:
            if num_processes() == 1:
                raise
            problem = error
    # Of a kind that was given: others know nothing of those that are made from it.
    told = [[kind.__name__, str(problem)] for kind in errors if isinstance(problem, kind)][:1]
    for name, text in share(what, told, lambda values: values[0]):
        raise problem or next(kind for kind in errors if kind.__name__ == name)(text)
    return result


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What all processes do before the first step: an error ends all; one that all have is said once, by process 0."""
    try:
        yield
    except Exception as error:
        if failure.is_one_of_several():
            end = failure.fail_alike if _have_all(error) else failure.fail
            end(error)
        raise  # In a notebook, which is not ended.


def _have_all(error: Exception) -> bool:
    """Whether all processes come here with the same error, within a few seconds."""
    table, text = Table("errors"), f"{type(error).__name__}: {error}"
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # The table is gone.
        table.put(process_number(), hashlib.sha256(text.encode()).hexdigest())
        until = time.monotonic() + SAME_SECONDS
        while len(found := set(table.all().items())) < num_processes() and time.monotonic() < until:
            time.sleep(0.05)
        return len(found) == num_processes() and len({key for _, key in found}) == 1
    return False
