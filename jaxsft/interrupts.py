"""Ctrl-C that comes while a module is imported, and signals that a process was started to ignore.

Python raises KeyboardInterrupt wherever its main thread happens to be. Within an import that may be the set-up of a
library in C++, which then aborts, crashes, takes the exception for an error of its own, or drops it and goes on.
Nothing can be lost while modules are imported, so there the process ends at once; everywhere else the exception is
right.
"""

import os
import signal
import threading
from types import FrameType

INTERRUPTED = 1
"""Exit code of a command that Ctrl-C has ended."""


def end_imports_at_once() -> None:
    """From now on Ctrl-C ends this process at once where it imports, and raises KeyboardInterrupt where it does not.

    For programs alone: a notebook must outlive its imports. Whoever has set another handler keeps it.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_or_raise)


def is_importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported in this frame, or in one of those that have called it."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def heeded(*numbers: int) -> list[int]:
    """Those of some signals that this process is not to ignore, as `nohup` has it ignore SIGHUP.

    A handler would undo that, and a closed terminal would stop what was to go on without it.
    """
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


def _end_or_raise(number: int, frame: FrameType | None) -> None:
    if is_importing(frame):
        os.write(2, b"interrupted\n")  # print may be what was interrupted
        os._exit(INTERRUPTED)
    raise KeyboardInterrupt
