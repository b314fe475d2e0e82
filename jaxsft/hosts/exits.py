"""Exit codes, and what is said of an error that ends a process.

In: an exception. Out: the code that the process ends with, and one sentence. Imports nothing, so that mistakes in a
command are said at once.
"""

BUG = 1
INPUT_OUTPUT = 74
START_AGAIN = 75
"""The same command, started again, goes on: the run was stopped, stood still, or lost one of its processes."""

LONGEST = 500
"""Letters of a sentence that is told to other processes."""


def is_bug(error: BaseException) -> bool:
    """Whether an error says nothing that a user could act on, so that its traceback is shown."""
    return not hasattr(error, "exit_code") and not isinstance(error, OSError)


def exit_code(error: BaseException) -> int:
    """Errors that say what the user can do carry their code."""
    return getattr(error, "exit_code", INPUT_OUTPUT if isinstance(error, OSError) else BUG)


def sentence(error: BaseException) -> str:
    """What an error says, in one line."""
    said = " ".join(str(error).split())
    return (f"{type(error).__name__}: {said}" if is_bug(error) else said)[:LONGEST]
