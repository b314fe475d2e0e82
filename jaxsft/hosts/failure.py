"""What ends one process of a run ends all of them, soon, and each says why.

In: an error in this process; what others write into the table that all share (`table.py`); and whether they are heard
of at all. Out: an end of this process whose last words are the first cause, such as
`process 3 on HOST failed: checkpoints/40: no space left on device`, and its exit code.

A process that fails tells the others before it ends, while they wait for it in a step. One that is killed or stands
still cannot: each process writes into the table every `BEAT_SECONDS` that it is there; process 0, which keeps the
table, looks for all of them, and they look for it. Nothing of this touches a device or takes part in a collective.
"""

import contextlib
import ctypes
import functools
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, NamedTuple, NoReturn

import jax

from jaxsft.hosts.exits import START_AGAIN, exit_code, is_bug, sentence
from jaxsft.hosts.logs import Log
from jaxsft.hosts.table import Table, num_processes, process_number
from jaxsft.interrupts import INTERRUPTED

BEAT_SECONDS = 2.0
SILENT_SECONDS = 30.0
"""How long nothing is heard of a process until it is taken for dead."""
SUSPECT_SECONDS = 10.0
"""The same, where an error says that a connection to some process has broken."""
WAIT_SECONDS = SILENT_SECONDS + 8.0
"""How long an error that may come of another process's end waits for the news of that."""
FAREWELL_SECONDS = 5.0
"""How long a process that ends waits for the others to have heard why."""
ABORT_SECONDS = 2.0
"""How long the table may take to answer, where JAX has called abort(), before it is taken for gone."""

LOG_SECONDS = 2.0
"""How long the log of a process that failed is waited for."""

OWN = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED", "FAILED_PRECONDITION")
"""What errors of JAX begin with of which no other process can be the reason."""
OF_CONNECTIONS = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED", "onnection", "Gloo", "NCCL")
"""Of these, each is in an error of JAX that says that another process does not answer."""


class Cause(NamedTuple):
    """Why a run ends."""

    process: int
    """Which one ended it, or is missed."""
    text: str
    """One sentence, which names the process."""
    code: int
    """What all others end with."""


def watch() -> None:
    """From now on this process, a program of its own, ends with the others of its run, and they with it."""
    global _watch, _is_program
    if not _is_program and jax.distributed.is_initialized() and num_processes() > 1:
        _watch = _Watch(process_number(), num_processes())
        _speak_before_aborts()
    _is_program = True


def is_program() -> bool:
    """Whether this process may be ended, since `watch` was called. A notebook must outlive its runs."""
    return _is_program


def fail(error: Exception) -> None:
    """Ends this process if it is one of several that watch each other, after telling them why; else returns.

    An error that may have come of another process's end waits until that is known.
    """
    if _watch is None:
        return
    is_lost = _is_of_others(error)
    if is_lost:
        _watch.patience = SUSPECT_SECONDS
        time.sleep(WAIT_SECONDS)  # Where another has ended, a thread ends this process meanwhile.
    # Of a compiler's error, or of memory that is full, starting again is no remedy.
    can_start_again = is_lost and any(word in str(each) for each in _chain(error) for word in OF_CONNECTIONS)
    _watch.fail(sentence(error), START_AGAIN if can_start_again else exit_code(error), own=_in_full(error))


def fail_alike(error: Exception) -> None:
    """`fail` for an error that all processes have: process 0 says it, and all end with its code."""
    if _watch is not None:
        _watch.fail_alike(_in_full(error), exit_code(error))


def on_exit(kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
    """`fail` for an ExitStack: pushed last it comes first, before anything is closed that waits for other processes."""
    if isinstance(error, Exception):
        fail(error)
    if isinstance(error, KeyboardInterrupt) and _watch is not None:
        end("interrupted", INTERRUPTED)
    return False


def end(text: str, code: int) -> NoReturn:
    """Ends this process, which is a program, for a reason that is no exception; tells the others. From any thread."""
    if _watch is not None:
        _watch.fail(text, code)
    _last_words(f"error: {text}", code)


def is_one_of_several() -> bool:
    """Whether others would be told."""
    return _watch is not None


def part() -> None:
    """The end of a program that has done its part: returns when all others have, and watches them until then."""
    if _watch is not None:
        _watch.part()


class _Watch:
    """The threads by which one of several processes watches the others."""

    def __init__(self, process: int, num_processes: int) -> None:
        self._process, self._num_processes = process, num_processes
        self._host = socket.gethostname()
        self._causes, self._heard = Table("cause"), Table("heard")
        # All but process 0 look for that one alone, so that what is read grows with their number and not its square.
        self._mine, self._theirs = Table("beats" if process else "keeper"), Table("keeper" if process else "beats")
        self.patience = SILENT_SECONDS
        self._missed = dict.fromkeys([0] if process else range(1, num_processes), 0)
        """Process -> rounds in which nothing new was heard of it. Not counted by a clock: it may be this one that stood
        still."""
        self._beats: dict[int, str] = {}
        self._answered = self._ticked = time.monotonic()
        self._is_parting = self._has_parted = False
        self._ending = threading.Lock()
        for work in (self._beat, self._listen, self._tick):
            threading.Thread(target=work, name=f"watch{work.__name__}", daemon=True).start()

    def part(self) -> None:
        # Process 0 may have more to close than the five minutes that JAX would wait for it.
        done = Table("done")
        if self._process == 0:
            done.put(0, "")
        while done.get(0, seconds=10.0) is None:
            pass
        self._is_parting = True
        jax.distributed.shutdown()  # Returns when all have come to it.
        self._has_parted = True

    def fail(self, text: str, code: int, *, own: str = "") -> NoReturn:
        """Ends this process by its own fault, which it says in words of its own."""
        self._ending.acquire()  # Of several threads with a reason to end the first does; others wait here for the end.
        mine = Cause(self._process, f"process {self._process} on {self._host} failed: {text}", code)
        first = _within(FAREWELL_SECONDS, lambda: self._tell(mine)) or mine
        self._say_farewell(first)
        own = own or f"error: {text}"
        _last_words(own if first == mine else f"{own}\n{first.text}", first.code)

    def fail_alike(self, text: str, code: int) -> NoReturn:
        """Ends this process as all others end."""
        self._ending.acquire()
        self._say_farewell(Cause(0, text, code))
        _last_words(text, code, is_silent=self._process != 0)

    def aborted(self) -> None:
        """C++ ends this process: says why where the table is gone, and returns where it is something else."""
        if _within(ABORT_SECONDS, self._mine.all) is None:
            self._end(self._gone(), is_told=False)

    def _end(self, cause: Cause, *, is_told: bool) -> NoReturn:
        """Ends this process because of another."""
        self._ending.acquire()
        if is_told:
            self._say_farewell(cause)
        lines: list[str] = []
        if _log is not None and self._process == 0:  # whose console is the run's
            lines = _within(LOG_SECONDS, functools.partial(_log.last_of, cause.process)) or []
        quoted = [f"the last lines of process {cause.process}:", *lines] if lines else []
        _last_words("\n".join([*quoted, cause.text]), cause.code)

    def _tell(self, cause: Cause) -> Cause:
        """Writes down why all end, if nobody has before; the first cause."""
        return Cause(*json.loads(self._causes.put_first("first", json.dumps(cause))))

    def _say_farewell(self, cause: Cause) -> None:
        """Lets others know that this process has heard; the one that keeps the table stays until all have."""

        def farewell() -> None:
            self._heard.put(self._process, "")
            missing = {str(process) for process in range(self._num_processes)} - {str(cause.process)}
            while self._process == 0 and missing - self._heard.all().keys():
                time.sleep(0.05)

        _within(FAREWELL_SECONDS, farewell)

    # The threads.

    def _beat(self) -> None:
        """Says that this process is there, and looks for those that it has to look for."""
        count = 0
        with self._until_table_is_gone():
            while True:
                self._mine.put(self._process, f"{count} {self._host}")
                self._answered = time.monotonic()
                seen = {int(key): text for key, text in self._theirs.all().items()}
                for process in self._missed:
                    is_new = process in seen and seen[process] != self._beats.get(process)
                    self._missed[process] = 0 if is_new else self._missed[process] + 1
                self._beats |= seen
                for process, missed in self._missed.items():
                    if missed * BEAT_SECONDS > self.patience:
                        self._tell(self._no_answer(process, missed * BEAT_SECONDS))
                count += 1
                time.sleep(BEAT_SECONDS)

    def _listen(self) -> None:
        """Waits for the cause of the end."""
        with self._until_table_is_gone():
            while (text := self._causes.get("first", seconds=1e6)) is None:
                pass
            self._end(Cause(*json.loads(text)), is_told=True)

    def _tick(self) -> None:
        """Notices that the table does not answer, or that this process has stood still."""
        while not self._has_parted:
            time.sleep(1.0)
            if (seconds := time.monotonic() - self._ticked) > SILENT_SECONDS:
                self._end(self._stood_still(seconds), is_told=False)
            self._ticked = time.monotonic()
            if (seconds := self._ticked - self._answered) > self.patience:
                self._end(self._no_answer(0, seconds), is_told=False)

    @contextlib.contextmanager
    def _until_table_is_gone(self) -> Iterator[None]:
        """Ends this process where the table that is used inside is gone before all have parted."""
        try:
            yield
        except (jax.errors.JaxRuntimeError, AttributeError) as error:
            if isinstance(error, AttributeError) and not self._is_parting:  # The connection becomes None then.
                raise
            if self._is_parting:
                time.sleep(FAREWELL_SECONDS)
            if not self._has_parted:
                self._end(self._gone(), is_told=False)

    # What is said.

    def _no_answer(self, process: int, seconds: float) -> Cause:
        text = f"process {process}{self._where(process)} has not answered for {seconds:.0f} s"
        return Cause(process, text, START_AGAIN)

    def _gone(self) -> Cause:
        if (seconds := time.monotonic() - self._ticked) > SILENT_SECONDS:
            return self._stood_still(seconds)
        return Cause(0, f"process 0{self._where(0)} is gone", START_AGAIN)

    def _stood_still(self, seconds: float) -> Cause:
        text = f"process {self._process} on {self._host} stood still for {seconds:.0f} s; the others have ended"
        return Cause(self._process, text, START_AGAIN)

    def _where(self, process: int) -> str:
        return f" on {self._beats[process].partition(' ')[2]}" if process in self._beats else ""


_watch: _Watch | None = None
_is_program = False


def _is_of_others(error: BaseException | None) -> bool:
    """Whether an error may have come of the end of another process, as it came of one of JAX's own."""
    return any(isinstance(each, jax.errors.JaxRuntimeError) and not str(each).startswith(OWN) for each in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it came of."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(number: int) -> None:
    if _watch is not None:
        _watch.aborted()


def _speak_before_aborts() -> None:
    """Lets this process say why it ends before JAX ends it.

    JAX's own watch calls abort() in the moment in which process 0 is gone, having printed where in C++ it stood. Python
    would run a handler of its own only later, so the C library is told to call this one; after it, the abort goes on.
    """
    library = ctypes.CDLL(None)
    library.signal.argtypes, library.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    library.signal(signal.SIGABRT, ctypes.cast(_aborted, ctypes.c_void_p))


def _within(seconds: float, work: Callable[[], Any]) -> Any:
    """What some work gives, None where it fails or takes longer: the other side may be gone."""
    results: list[Any] = []

    def run() -> None:
        with contextlib.suppress(Exception):
            results.append(work())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


def _in_full(error: Exception) -> str:
    return "".join(traceback.format_exception(error)).rstrip() if is_bug(error) else f"error: {error}"


def _last_words(text: str, code: int, *, is_silent: bool = False) -> NoReturn:
    """Ends this process without closing anything: all that could be closed may wait for other processes."""
    _within(1.0, sys.stdout.flush)
    if _log is not None:
        _within(1.0, functools.partial(_log.close, text))
    # Threads of C++ have things to say of lost connections until the end, and would have the last word.
    console = 2
    with contextlib.suppress(OSError):
        console = os.dup(2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        time.sleep(0.05)  # for what they have begun to write
    if not is_silent:
        # On a terminal, a bar may stand in the last line, and has hidden the cursor.
        begin = "\x1b[?25h\n" if os.isatty(console) else ""
        with contextlib.suppress(OSError):
            os.write(console, f"{begin}{text}\n".encode(errors="replace"))
    os._exit(code)


_log: Log | None = None


def keep_log(log: Log) -> None:
    """The last words of this process go there as well, whatever thread has them."""
    global _log
    _log = log
