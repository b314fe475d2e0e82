"""Whether someone asked this run to stop, and the answer that they get at once.

In: SIGTERM or Ctrl-C on any process. Out: before each step, whether the run should stop there, the same on all
processes. Saving what was done is left to `train.py`.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from jaxsft.hosts.exits import START_AGAIN
from jaxsft.hosts.table import num_processes
from jaxsft.interrupts import is_importing

STOPPED = START_AGAIN
"""Exit code of a run that goes on when it is started again."""
GRACE_SECONDS = 10.0
"""How long a second Ctrl-C waits for the main thread, which may be compiling, before it ends the process itself."""


class StopSignal:
    """SIGTERM (preemption) or Ctrl-C, on any of the processes.

    With several processes JAX catches SIGTERM itself and agrees on a step at which all of them stop, so `at` must be
    asked on every step by every process; Ctrl-C then ends at once, as a second one does in a single process.

    Python runs handlers between two of its own instructions, which a compilation keeps it from for minutes; so a thread
    that the system wakes says that the signal has come.
    """

    def __init__(self) -> None:
        self._received: str | None = None
        self._can_save = False
        self._previous: dict[int, Any] = {}
        self._interrupted = threading.Event()
        self._wakeup: tuple[socket.socket, socket.socket] | None = None
        self.doing = "starting"
        """What the run has to finish before it stops, told to whoever asked it to."""

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is not threading.main_thread():
            return self  # Python handles signals in the main thread only; elsewhere, in a notebook, that one decides.
        # Of several processes none touches a device before all agree; of one, handlers that come with devices come
        # before these.
        is_alone = num_processes() == 1 and jax.process_count() == 1
        signals = [signal.SIGINT, signal.SIGTERM] if is_alone else [signal.SIGINT]
        if is_alone:
            self._wakeup = reader, writer = socket.socketpair()
            writer.setblocking(False)
            self._previous[-1] = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._answer, args=(reader,), name="stop", daemon=True).start()
        self._previous |= {number: signal.signal(number, self._receive) for number in signals}
        return self

    def __exit__(self, *_: object) -> None:
        wakeup = self._previous.pop(-1, None)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._wakeup is not None and wakeup is not None:
            signal.set_wakeup_fd(wakeup)
            self._wakeup[1].close()  # ends the thread

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again, self._received = self._received, signal.Signals(number).name
        if not self._can_save or (again and number == signal.SIGINT):
            self._end(frame)

    def can_save(self) -> None:
        """From now on there is something to save: a first signal waits for `at`. Before, it ends all at once."""
        if self._received is not None:  # a library caught the exception
            self._end(None)
        self._can_save = True

    def _end(self, frame: FrameType | None) -> None:
        self._interrupted.set()
        if not self._can_save:
            # Written here, since the process may end before the thread has; and not by print, which the signal may have
            # interrupted.
            os.write(2, f"\n{self._received}: stopping; nothing was begun\n".encode())
        if self._received == "SIGTERM":
            if is_importing(frame):
                os._exit(STOPPED)
            raise SystemExit(STOPPED)  # nothing is lost: started again, it begins as now
        before = self._previous.get(signal.SIGINT)
        if callable(before):  # the program's own way, which ends it where a module is imported
            before(signal.SIGINT, frame)
        raise KeyboardInterrupt

    def _answer(self, reader: socket.socket) -> None:
        """Says what happens now, as soon as a signal has come."""
        num_asked = 0
        with contextlib.closing(reader):
            while data := reader.recv(1):
                name = signal.Signals(data[0]).name if data[0] in (signal.SIGINT, signal.SIGTERM) else ""
                if not name:
                    continue
                num_asked += 1
                if num_asked == 1 and self._can_save:
                    again = "; again to stop without saving" if name == "SIGINT" else ""
                    print(f"\n{name}: {self.doing}{again}", file=sys.stderr, flush=True)
                elif name == "SIGINT" and not self._interrupted.wait(GRACE_SECONDS):
                    print("interrupted", file=sys.stderr, flush=True)
                    os._exit(1)

    def at(self, step: int) -> str | None:
        """The name of the signal if the run should stop before this step, else None."""
        self.doing = f"finishing step {step + 1}, saving"
        if jax.process_count() > 1:
            if multihost_utils.reached_preemption_sync_point(step):
                return "SIGTERM"
            if self._received is not None:
                raise KeyboardInterrupt  # the other processes cannot be asked to stop at the same step
            return None
        return self._received
