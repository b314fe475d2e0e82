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
TIMES_THE_LONGEST = 3.0
"""The same of the longest time that a batch was waited for, since windows of a stream come long after each other; and
of the first step with its compilation, until another one has been finished."""
LONG_SECONDS = 2 * 3600.0
"""How much longer all that is no step may take: compiling the first one, an evaluation, a save, the export."""
GRACE_SECONDS = 8.0
"""How much longer a process waits whose own step is under way: that waits for others, and the one that it waits for is
to say so first."""
LOOK_SECONDS = 1.0
STILL_SECONDS = 10.0
"""Between two looks, after which it was this process that stood still (Ctrl-Z, a paused machine): that time is not
counted."""


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
        """When the last step was finished, or what is no step."""
        self._finished = self._since
        """When the last step was finished, later by all that was no step since."""
        self._first = self._longest_wait = 0.0
        """Seconds until the first step was finished, and of the longest wait for a batch."""
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
    def waiting(self) -> Iterator[None]:
        """The next batch is waited for inside."""
        begin = time.monotonic()
        yield
        self._longest_wait = max(self._longest_wait, time.monotonic() - begin)

    @contextlib.contextmanager
    def busy(self, doing: str) -> Iterator[None]:
        """What is done inside is no step, and may take `LONG_SECONDS` more; `doing` names it."""
        begin = time.monotonic()
        with self._lock:
            self._look(begin)  # Of what is finished from now on it is not known how long it took.
            before, self._busy = self._busy, doing
        try:
            yield
        finally:
            with self._lock:
                self._busy, self._since = before, time.monotonic()
                self._finished += self._since - max(begin, self._finished)

    def close(self) -> None:
        self._closed.set()

    def limit(self) -> float:
        """Seconds without a finished step that are too many now."""
        limit = self._limit
        if limit is None:
            longest = self._longest_wait if self._seconds else max(self._longest_wait, self._first)
            median = statistics.median(self._seconds) if self._seconds else 0.0
            limit = max(LEAST_SECONDS, TIMES_THE_MEDIAN * median, TIMES_THE_LONGEST * longest)
        return limit + (LONG_SECONDS if self._busy else 0.0)

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._closed.wait(LOOK_SECONDS):
            with self._lock:
                before, looked = looked, time.monotonic()
                if looked - before > STILL_SECONDS:
                    self._since = min(self._since + looked - before, looked)
                    self._finished = min(self._finished + looked - before, looked)
                self._look(looked)
                seconds, limit = looked - self._since, self.limit()
                is_waiting = bool(self._pending) or self._is_launching
            if seconds <= limit + GRACE_SECONDS * (is_waiting and failure.is_one_of_several()):
                continue
            step = f"step {self._step + 1} was under way" if is_waiting else "the next batch was waited for"
            sys.stderr.flush()
            faulthandler.dump_traceback(sys.__stderr__ or sys.stderr)
            allowed = f"{limit:.0f} s allowed, see train.stall_timeout"
            text = f"no step was finished for {seconds:.0f} s ({allowed}), while {self._busy or step}"
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
                self._seconds.extend([max(now - self._finished, 0.0) / finished] * finished)
            if self._busy == "compiling the first step":
                self._busy, self._first = None, now - self._finished
            self._since = self._finished = now
