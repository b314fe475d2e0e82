"""Who speaks: the names that trainers and data sets give to the five roles, and which of them are ours.

In: the role of a turn as it stands in a row. Out: system, developer, user, assistant, tool, or `function_call` (the
assistant's, with calls for a text); or a role that the config declares, to the letter. Any other is refused: a template
that prints every role would show such a turn as context, and nobody would notice that it is not trained.
"""

import re
from collections.abc import Mapping
from typing import Any

from jaxsft.rows.strict import BadRow, short

CALLER = "function_call"
"""A turn of the assistant whose text is the JSON of its calls."""

NAMES: dict[str, tuple[str, ...]] = {
    "system": ("sys",),
    "developer": (),
    "user": ("human", "prompter"),
    "assistant": (
        "gpt", "chatgpt", "bot", "chatbot", "model", "ai", "llm", "bing", "bard", "claude", "gemini",
    ),
    "tool": (
        "tools", "function", "functions", "observation", "observations", "ipython", "environment",
        *(f"{what}_{gives}" for what in ("function", "tool")
          for gives in ("response", "responses", "result", "results", "output", "outputs")),
    ),
    CALLER: ("tool_call", "tool_calls", "function_calls"),
}  # fmt: skip
"""Ours -> theirs, in small letters, `_` for `-` and blanks."""

ALIASES = {name: ours for ours, names in NAMES.items() for name in (ours, *names)}
"""Theirs -> ours."""

_ROLE = re.compile(r"[^\W\d_][\w.-]{0,63}")


def read_role(role: Any, where: str, declared: Mapping[str, str]) -> str:
    """The role that is meant.

    Args:
        role: as it stands in the row.
        where: for the error.
        declared: theirs -> ours, from the config; looked up before the names that are known anyway.

    Raises:
        BadRow: no role, one that could forge a turn, or one that nobody knows.
    """
    if role is None:
        raise BadRow("missing-role", f"{where}: no role; expected `role` (or `from`)")
    if isinstance(role, str):
        if role in declared:
            return check_role(declared[role], where)
        known = ALIASES.get(role) or ALIASES.get(re.sub(r"[- ]", "_", role.lower()))
        if known is not None:
            return known
    role = check_role(role, where)
    if role in declared.values():
        return role
    raise BadRow(
        "unknown-role",
        f"{where}: the role {role!r} is not known; say by `roles` (theirs: ours) whose it is, such as "
        f"{{{role}: assistant}}, or {{{role}: {role}}} where the chat template knows that name",
    )


def check_role(role: Any, where: str) -> str:
    """A role is one plain word: a template writes it between its marks, where anything else could forge a turn."""
    if not isinstance(role, str):
        raise BadRow("wrong-type", f"{where}: role must be text, got {short(role)}")
    if not _ROLE.fullmatch(role):
        reason = f"{where}: {short(role)} is no role: expected one word of letters, digits, . _ -"
        raise BadRow("forged-role" if role.strip() else "missing-role", reason)
    return role
