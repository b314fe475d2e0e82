"""What becomes of each key of theirs: the one record that all parts of a conversion write into.

In: the keys of a config of another trainer, and how that trainer calls what all of them have. Out: our keys with their
values, and for every key of theirs a line that says what became of it.
"""

import contextlib
from typing import Any, NamedTuple

import yaml

from jaxsft.config import USUAL, Config, ConfigError
from jaxsft.foreign_keys import SAME, is_secret, of_others

IDLE: tuple[Any, ...] = (None, "", "none", "no", "None", "passive", [], {})
"""Values by which nothing is asked for, beside false and 0."""


_BY_OPTIMIZER = {f"optim.{key}" for keys in USUAL.values() for key in keys}


class Taken(NamedTuple):
    """A key of ours, and what it came from."""

    key: str
    value: Any
    names: tuple[str, ...]
    """Of theirs; none where it is a default of theirs."""
    note: str
    """What it means here, where that is something else; empty: the same."""


class Conversion:
    """Keys of theirs, and what has become of them so far."""

    def __init__(self, project: str, theirs: dict[str, Any], *, called: dict[str, str], defaults: dict[str, Any]):
        """Begins with nothing taken.

        Args:
            project: its name.
            theirs: key -> value.
            called: what all projects have, by the name that transformers gives it -> names here, parted by blanks.
            defaults: by transformers' names, what the project takes where nothing is given.
        """
        self.project = project
        self.theirs = theirs
        self.taken: list[Taken] = []
        self.without: dict[str, str] = {}
        """Name -> why it has no counterpart."""
        self.missing: list[str] = []
        """What must be given before the config means what theirs did, a sentence each."""
        self.problems: list[str] = []
        """Values that cannot be read."""
        self.template: str | None = None
        """The text of a chat template, where theirs stands in the config itself."""
        self.template_file = "chat_template.jinja"
        """The file into which it is to be written."""
        self._called = called
        self._defaults = defaults

    def names(self, *canonical: str) -> tuple[str, ...]:
        """Those of their keys by these names that are given."""
        every = [name for one in canonical for name in self._called.get(one, one).split()]
        return tuple(name for name in every if self.theirs.get(name) is not None)

    def given(self, canonical: str) -> Any:
        """The value by this name; None: not given."""
        found = self.names(canonical)
        return self.theirs[found[0]] if found else None

    def value(self, canonical: str) -> Any:
        """The value by this name, or what they take where it is not given."""
        given = self.given(canonical)
        return self._defaults.get(canonical) if given is None else given

    def number(self, canonical: str) -> float | None:
        """As `value`, of a number, which others also read from text."""
        value = self.value(canonical)
        return None if value is None else self.as_number(value, *self.names(canonical)[:1])

    def as_number(self, value: Any, name: str = "") -> float | None:
        """A value of this key, or of a part of it, as a number; what is none is a problem."""
        number = value
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                number = float(value.replace("_", ""))
        if isinstance(number, int | float) and not isinstance(number, bool) and abs(number) < 1e18:
            return number
        self.problems.append(f"{name}: {brief(value)} given, expected a number")
        return None

    def whole(self, canonical: str) -> int | None:
        """As `number`, of a whole one."""
        number = self.number(canonical)
        if number is not None and number != int(number):
            self.problems.append(f"{self.names(canonical)[0]}: {number} given, expected a whole number")
            return None
        return None if number is None else int(number)

    def flag(self, canonical: str) -> bool:
        """As `value`, of true or false, also as text; what is neither counts as true."""
        value = self.value(canonical)
        return value.lower() not in ("false", "no", "none", "0", "") if isinstance(value, str) else bool(value)

    def is_on(self, canonical: str) -> bool:
        """Whether this name asks for something."""
        return any(not self._asks_nothing(name) for name in self.names(canonical))

    def take(self, key: str, value: Any, *canonical: str, note: str = "") -> None:
        """A key of ours gets a value that comes from these; a default of theirs only where ours is another.

        What ours is where it is left out may depend on the optimizer; such a key is always written.
        """
        names = self.names(*canonical)
        if names or value != our_default(key) or key in _BY_OPTIMIZER:
            self.taken.append(Taken(key, value, names, note))

    def leave(self, *canonical: str, why: str) -> None:
        """These have no counterpart, those of them that ask for something."""
        for name in self.names(*canonical):
            if not self._asks_nothing(name):
                self.without.setdefault(name, why)

    def is_taken(self, key: str) -> bool:
        """Whether this key of ours has its value."""
        return any(taken.key == key for taken in self.taken)

    def texts(self, canonical: str) -> list[str]:
        """As `given`, of names: several, or one text with commas; nothing where none are given."""
        given = self.given(canonical)
        listed = [] if given is None else as_list(given)
        if wrong := [one for one in listed if not isinstance(one, str)]:
            name = self.names(canonical)[0]
            self.problems.append(f"{name}: {brief(wrong[0])} given, expected text, or a list of texts")
        return [one for one in listed if isinstance(one, str)]

    def entries(self, name: str, value: Any) -> list[dict[str, Any]]:
        """The datasets that stand in a value of this key, each a mapping, where a path alone is one as well."""
        several = value if isinstance(value, list) else [value]
        entries = [{"path": one} if isinstance(one, str) else one for one in several]
        for one in entries:
            path = (one.get("path") or one.get("id")) if isinstance(one, dict) else None
            if not isinstance(path, str) or len(path) > 1000:
                self.problems.append(f"{name}: {brief(one)} given, expected a mapping with a path")
        return [one for one in entries if isinstance(one, dict) and isinstance(one.get("path") or one.get("id"), str)]

    # What is left in the end.

    def idle(self) -> list[str]:
        """Names that ask for nothing, and of which nothing came."""
        return [name for name in self._left() if self._asks_nothing(name)]

    def close(self) -> list[str]:
        """Gives every key that nobody has looked at its reason from the table; returns those that are not in it.

        Raises:
            ConfigError: values that could not be read.
        """
        if self.problems:
            raise ConfigError("\n".join(dict.fromkeys(self.problems)))
        for name in self._names_taken():
            self.without.pop(name, None)
        unknown = []
        for name in self._left():
            if self._asks_nothing(name):
                continue
            foreign = of_others(name)
            if foreign is not None:
                self.without[name] = foreign.note if not foreign.ours else f"not taken; {foreign.told()}"
            elif name in SAME:
                self.without[name] = f"{self.project} has no such key"
            else:
                unknown.append(name)
        return unknown

    def _names_taken(self) -> set[str]:
        return {name for taken in self.taken for name in taken.names}

    def _asks_nothing(self, name: str) -> bool:
        """Whether nothing is asked for by this key."""
        value = self.theirs[name]
        if isinstance(value, int | float) and (value == 0 or (value == -1 and name in ("max_steps", "local_rank"))):
            return True
        if value == f"<{name.upper()}>":  # in the JSON of transformers, what stands for a token
            return True
        return any(type(value) is type(idle) and value == idle for idle in IDLE)

    def _left(self) -> list[str]:
        seen = self._names_taken() | self.without.keys()
        return [name for name in self.theirs if name not in seen]


def our_default(key: str) -> Any:
    """What a key of ours is where it is left out; None as well for what has no default."""
    section: Any = Config
    *sections, leaf = key.split(".")
    for name in sections:
        annotation = section.model_fields[name].annotation
        section = next(kind for kind in (annotation, *getattr(annotation, "__args__", ())) if isinstance(kind, type))
    field = section.model_fields[leaf]
    return None if field.is_required() else field.default


def brief(value: Any) -> str:
    """A value as it is shown, on one line and not too long, and without tokens that stand in it."""
    text = "null" if value is None else flow(_without_secrets(value))
    return text if len(text) <= 60 else f"{text[:56]} ..."


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: "..." if is_secret(str(name)) else _without_secrets(one) for name, one in value.items()}
    return [_without_secrets(one) for one in value] if isinstance(value, list) else value


def flow(value: Any) -> str:
    """A value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def as_list(value: Any) -> list[Any]:
    """One, several, or several in one text with commas."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return list(value) if isinstance(value, list | tuple) else [value]
