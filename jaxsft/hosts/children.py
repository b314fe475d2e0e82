"""Processes that we start, which end when we do, however that is.

In: a module of ours and its arguments. Out: the command of a process that runs it and, on Linux, gets SIGTERM when the
process that has started it is gone, killed for want of memory or by a signal that nobody can handle. Where the system
cannot do that, it is the command alone.
"""

import ctypes
import os
import signal
import sys

from jaxsft.hosts.exits import START_AGAIN

PR_SET_PDEATHSIG = 1
"""Of Linux: which signal this process gets when its parent has ended; an exec leaves it set."""


def child_command(module: str, *arguments: str) -> list[str]:
    """The command of `python -m MODULE ARGUMENTS`, for a child of this process, to be started by its main thread.

    The child sets the signal itself: code of ours between fork and exec is not safe beside the threads of JAX.
    """
    return [sys.executable, "-m", "jaxsft.hosts.children", str(os.getpid()), module, *arguments]


def end_with_parent(parent: int) -> None:
    """From now on this process gets SIGTERM when its parent, the process of that number, ends; or ends now, where that
    is gone already."""
    if sys.platform == "linux" and (prctl := getattr(ctypes.CDLL(None), "prctl", None)) is not None:
        prctl(PR_SET_PDEATHSIG, *(ctypes.c_ulong(number) for number in (signal.SIGTERM, 0, 0, 0)))
        if os.getppid() != parent:
            os._exit(START_AGAIN)


if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]))
    os.execv(sys.executable, [sys.executable, "-m", *sys.argv[2:]])
