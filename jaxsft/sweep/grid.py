"""From `key=a,b,c` to the runs of a sweep: every combination of the values, each with its config and its folder.

In: a config file and overrides, some with several values. Out: the `Trial`s in the order in which they are trained, or
one error with all mistakes, before anything is.

Commas separate values, but for those within brackets, braces or quotes, which belong to a value as YAML has it:

    optim.learning_rate=1e-5,2e-5                 two values
    lora.targets=[q_proj,v_proj],[all_linear]     two values, each a list
    data.train='"a,b.jsonl"'                      one value
"""

import collections
import itertools
import json
import re
import zlib
from collections.abc import Sequence
from typing import NamedTuple

from jaxsft.config import Config, ConfigError
from jaxsft.config_files import check_config, mistakes

_CLOSING = {"[": "]", "{": "}", "(": ")"}
_PLAIN = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9._+-]{0,39}")
LONGEST_NAME = 150
"""Letters of a folder's name; file systems take 255 bytes, and others names are made of it."""


class Trial(NamedTuple):
    """One run of a sweep."""

    name: str
    """Of its folder, such as `learning_rate=1e-5,batch_size=8`."""
    settings: dict[str, str]
    """The keys that differ between the runs, with its values as they were given."""
    overrides: tuple[str, ...]
    """All of it that is to be said to `train` beside the config file."""
    config: Config
    """Its own, `run_dir` included."""


def make_trials(source: str, overrides: Sequence[str]) -> list[Trial]:
    """The runs of a sweep, the last key changing fastest.

    Args:
        source: path of the config file.
        overrides: `key=value` or `key=value,value,...`.

    Raises:
        ConfigError: all mistakes: keys that are unknown, given twice or without several values, values that the config
            does not take, and runs that are the same.
    """
    problems: list[str] = []
    values: dict[str, list[str]] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            problems.append(f"{override!r}: expected key=value or key=value,value,...")
            continue
        if key in values:
            problems.append(f"{key}: given twice; give all of its values in one, such as {key}=a,b")
        try:
            values[key] = split_values(text)
        except ValueError as error:
            problems.append(f"{override!r}: {error}")
            values[key] = [text]
    swept = {key: given for key, given in values.items() if len(given) > 1}
    if "run_dir" in swept:
        problems.append("run_dir: several values given, expected one: each run gets a folder of its own in it")
    for key, given in swept.items():
        twice = [value for value, count in collections.Counter(given).items() if count > 1]
        problems += [f"{key}: {value} is given twice" for value in twice]
    if not swept and not problems:
        problems.append("no key has several values; separate them by commas, such as optim.learning_rate=1e-5,2e-5")

    # All combinations are looked at, unless the keys are wrong already; a mistake that several have is told once.
    plain = [f"{key}={given[0]}" for key, given in values.items() if key not in swept]
    combinations = list(itertools.product(*swept.values())) if not problems else []
    found: list[tuple[Config, tuple[str, ...]]] = []
    for combination in combinations or [tuple(given[0] for given in swept.values())]:
        config, wrong = check_config(source, [*plain, *_overrides(swept, combination)])
        problems += [problem for problem in wrong if problem not in problems]
        if config is not None:
            found.append((config, combination))
    if problems:
        raise mistakes(f"sweep of {source}", problems)
    trials = [_trial(config, combination, swept, values) for config, combination in found]
    _check_apart(trials)
    return trials


def split_values(text: str) -> list[str]:
    """The values of `a,b,c`. `[1,2],[3]` gives `[1,2]` and `[3]`, and `'a,b',c` gives `'a,b'` and `c`.

    Raises:
        ValueError: a value is empty, or a bracket or quote is not closed; says which.
    """
    if "," not in text:
        return [text]
    values, begin, at = [], 0, 0
    open_brackets: list[str] = []
    starts = True  # Where a quote begins a quoted text; elsewhere, as in it's, it is a letter.
    while at < len(text):
        letter = text[at]
        if letter in "\"'" and starts:
            end = _end_of_quote(text, at)
            if end is None:
                raise ValueError(f"the quote {letter} is not closed")
            at, starts = end, False
            continue
        if letter in _CLOSING:
            open_brackets.append(_CLOSING[letter])
        elif letter in _CLOSING.values():
            if not open_brackets or open_brackets.pop() != letter:
                raise ValueError(f"the bracket {letter} was not opened; quote a value that holds one by itself")
        elif letter == "," and not open_brackets:
            values.append(text[begin:at])
            begin = at + 1
        starts = letter in ",[{" or letter == ":" or (starts and letter == " ")
        at += 1
    if open_brackets:
        raise ValueError(f"a bracket is not closed, {open_brackets[-1]} expected; quote a value that holds one alone")
    values = [value.strip() for value in [*values, text[begin:]]]
    if len(values) > 1 and "" in values:
        raise ValueError("a value between commas is empty; null is written null, and quotes keep commas in a value")
    return values


def _end_of_quote(text: str, at: int) -> int | None:
    """Behind the quoted text that begins at `at`, as YAML has it: `\\"` and `''` are letters of it."""
    pattern = r'"(?:[^"\\]|\\.)*"' if text[at] == '"' else r"'(?:[^']|'')*'"
    found = re.compile(pattern, re.DOTALL).match(text, at)
    return found.end() if found else None


def _overrides(swept: dict[str, list[str]], combination: Sequence[str]) -> list[str]:
    return [f"{key}={value}" for key, value in zip(swept, combination, strict=True)]


def _trial(
    config: Config, combination: Sequence[str], swept: dict[str, list[str]], given: dict[str, list[str]]
) -> Trial:
    settings = dict(zip(swept, combination, strict=True))
    short = short_keys(list(swept))
    name = ",".join(f"{_part(short[key])}={_part(value)}" for key, value in settings.items())
    if len(name) > LONGEST_NAME:
        name = f"{name[:LONGEST_NAME]}-{zlib.crc32(name.encode()):08x}"
    run_dir = f"{str(config.run_dir).rstrip('/')}/{name}"
    said = [f"{key}={settings.get(key, values[0])}" for key, values in given.items() if key != "run_dir"]
    is_plain = re.fullmatch(r"[\w./~][\w./:=,+~-]*", run_dir)
    said.append(f"run_dir={run_dir if is_plain else json.dumps(run_dir)}")
    return Trial(name, settings, tuple(said), config.model_copy(update={"run_dir": run_dir}))


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Each key without its section, where that leaves no two the same."""
    leaves = [key.rpartition(".")[2] for key in keys]
    return {
        key: key if leaves.count(leaf) > 1 or leaf.isdigit() else leaf for key, leaf in zip(keys, leaves, strict=True)
    }


def _part(text: str) -> str:
    """A key or value as a part of a folder's name: as it is, or what is left of it and a sum."""
    if _PLAIN.fullmatch(text):
        return text
    left = re.sub(r"[^A-Za-z0-9_+-]+", "-", text).strip("-")[:30]
    return f"{left}-{zlib.crc32(text.encode()):08x}"


def _check_apart(trials: Sequence[Trial]) -> None:
    """Raises ConfigError where two runs would do the same, or have the same folder."""
    problems = []
    names: dict[str, Trial] = {}
    contents: dict[str, Trial] = {}
    for trial in trials:
        content = trial.config.model_copy(update={"run_dir": None}).model_dump_json()
        # Some file systems take names for one that differ in capitals alone.
        if (other := names.setdefault(trial.name.casefold(), trial)) is not trial:
            problems.append(
                f"{describe(other.settings)} and {describe(trial.settings)}: both would be called {other.name}"
            )
        elif (other := contents.setdefault(content, trial)) is not trial:
            problems.append(f"{describe(other.settings)} and {describe(trial.settings)}: both are the same run")
    if problems:
        raise ConfigError("sweep: " + "; ".join(problems[:3]) + (" ..." if len(problems) > 3 else ""))


def describe(settings: dict[str, str]) -> str:
    """`learning_rate=1e-5, batch_size=8`."""
    short = short_keys(list(settings))
    return ", ".join(f"{short[key]}={value}" for key, value in settings.items())
