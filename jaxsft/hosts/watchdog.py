"""Notices that a run stands still although every process is alive, and ends it.

In: the steps of a run as they are launched, and what it does between them. Out: nothing as long as they are finished in
time; else the stacks of all threads on stderr, and the end of this process and all others, to be started again.

No step waits for this: a thread looks once a second which results have come.
"""

import collections
import contextlib
import faulthandler
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from jaxsft.hosts import failure
from jaxsft.hosts.exits import START_AGAIN

LEAST_SECONDS = 45.0
TIMES_THE_MEDIAN = 10.0
"""A step may take so many times as long as half of them do, and at least `LEAST_SECONDS`."""
LONG_SECONDS = 2 * 3600.0
"""How much longer all that is no step may take: compiling the first one, an evaluation, a save, the export."""
GRACE_SECONDS = 8.0
"""How much longer a process waits whose own step is under way: that waits for others, and the one that it waits for is
to say so first."""
LOOK_SECONDS = 1.0


class Watchdog:
    """Watches over one run, from `start` to `close`.

    Args:
        limit: seconds without a finished step that are too many; None: derived from those that were finished.
        end: is called, by a thread, with a sentence and an exit code when there were too many.
    """

    def __init__(self, limit: float | None, *, end: Callable[[str, int], Any] = failure.end) -> None:
        self._limit, self._end = limit, end
        self._pending: collections.deque[Any] = collections.deque()
        self._seconds: collections.deque[float] = collections.deque(maxlen=101)
        """Of the last steps. Those that are finished between two looks share the time evenly."""
        self._step = 0
        self._is_launching = False
        self._busy: str | None = "compiling the first step"
        self._since = time.monotonic()
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def start(self) -> None:
        """Begins to watch. To be left out where the process must not be ended, as that of a notebook."""
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def launching(self, step: int) -> None:
        """Step `step`, counted from 0, is about to be started."""
        self._step, self._is_launching = step, True

    def launched(self, result: Any) -> None:
        """It was started, and will give `result`, an array."""
        with self._lock:
            self._pending.append(result)
            self._is_launching = False

    @contextlib.contextmanager
    def busy(self, doing: str) -> Iterator[None]:
        """What is done inside is no step, and may take `LONG_SECONDS` more; `doing` names it."""
        before, self._busy = self._busy, doing
        try:
            yield
        finally:
            with self._lock:
                self._busy, self._since = before, time.monotonic()

    def close(self) -> None:
        self._closed.set()

    def limit(self) -> float:
        """Seconds without a finished step that are too many now."""
        median = statistics.median(self._seconds) if self._seconds else 0.0
        limit = self._limit if self._limit is not None else max(LEAST_SECONDS, TIMES_THE_MEDIAN * median)
        return limit + (LONG_SECONDS if self._busy else 0.0)

    def _watch(self) -> None:
        while not self._closed.wait(LOOK_SECONDS):
            with self._lock:
                self._look(time.monotonic())
                seconds, limit = time.monotonic() - self._since, self.limit()
                is_waiting = bool(self._pending) or self._is_launching
            if seconds <= limit + GRACE_SECONDS * (is_waiting and failure.is_one_of_several()):
                continue
            step = f"step {self._step + 1} was under way" if is_waiting else "the next batch was waited for"
            sys.stderr.flush()
            faulthandler.dump_traceback(sys.__stderr__ or sys.stderr)
            text = f"no step was finished for {seconds:.0f} s ({limit:.0f} s allowed), while {self._busy or step}"
            self._end(text, START_AGAIN)
            return

    def _look(self, now: float) -> None:
        """Takes note of the steps that were finished since the last look."""
        finished = 0
        while self._pending and self._pending[0].is_ready():
            self._pending.popleft()
            finished += 1
        if finished:
            if self._busy is None:
                self._seconds.extend([(now - self._since) / finished] * finished)
            self._since = now
            if self._busy == "compiling the first step":
                self._busy = None
