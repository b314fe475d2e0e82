"""Rows to portions, in this process or in several, with equal results in equal order.

In: rows, and the recipe by which they are encoded. Out: portions (`portions.py`), in the order of the rows.

Starting a process takes seconds, so work begins here and moves once it has taken a while. Workers are programs of
their own (not forks: JAX has threads; not `multiprocessing`, which imports the caller's main module anew): they never
import jax, read pickles from their stdin, and end when that ends, however this process may have ended.
"""

import contextlib
import gc
import os
import pickle
import select
import signal
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from jaxsft.batches.portions import Portion, Recipe, encode_rows
from jaxsft.rows.sources import Problem, Row

PATIENCE = 4.0
"""Seconds of work in this process before others are started."""
CHUNK = 512
"""Rows that are encoded together."""

Task = tuple[int, Sequence[Row | Problem]]
"""Which recipe, and the rows."""


class Workers:
    """Makes portions by one of several recipes."""

    def __init__(self, recipes: Sequence[Recipe]) -> None:
        self._recipes = recipes
        self._seconds = 0.0
        self._processes: list[_Worker] = []

    def map(self, tasks: Iterable[Task]) -> Iterator[Portion]:
        """A portion for each task, in order."""
        pending: deque[_Worker] = deque()
        turn = 0
        try:
            for task in tasks:
                if not self._are_ready():
                    begin = time.perf_counter()
                    portion = encode_rows(self._recipes[task[0]], task[1])
                    self._seconds += time.perf_counter() - begin
                    yield portion
                    continue
                # In turns: the worker whose turn it is holds the oldest result, so order needs no bookkeeping. It is
                # sent nothing before that is read, so that no two processes ever wait to write to each other.
                worker = self._processes[turn]
                turn = (turn + 1) % len(self._processes)
                if pending and pending[0] is worker:
                    yield pending.popleft().receive()
                worker.send(task)
                pending.append(worker)
            while pending:
                yield pending.popleft().receive()
        finally:
            for worker in pending:  # abandoned half-way: nobody may read these as the results of other tasks
                worker.receive()

    def start(self) -> None:
        """Starts one process per core, if there are several and they were not started yet."""
        if not self._processes and num_cores() > 1:
            self._processes = [_Worker(self._recipes) for _ in range(num_cores())]

    def close(self) -> None:
        for worker in self._processes:
            worker.close()
        self._processes = []

    def _are_ready(self) -> bool:
        if not self._processes and self._seconds > PATIENCE:
            self.start()
        # Until all have read their recipes, work goes on here.
        return bool(self._processes) and all([worker.is_ready() for worker in self._processes])


@contextlib.contextmanager
def seldom_collected() -> Iterator[None]:
    """While rows are encoded, Python looks for garbage after some windows of them, and not a hundred times in each.

    What is there already, some hundred thousand objects of imported libraries, does not become garbage meanwhile: to
    look at all of it again and again takes longer than to weigh the tokens.
    """
    first, *others = gc.get_threshold()
    # Never, or as seldom already: of threads that do this at once, one does it. What others have frozen stays so.
    if first == 0 or first >= _GARBAGE or gc.get_freeze_count():
        yield
        return
    gc.freeze()
    gc.set_threshold(_GARBAGE, *others)
    try:
        yield
    finally:
        gc.set_threshold(first, *others)
        gc.unfreeze()


_GARBAGE = 100_000
"""Objects that are made before garbage is looked for."""


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_READY = "ready"


class _Worker:
    def __init__(self, recipes: Sequence[Recipe]) -> None:
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        settings = {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
        environment = os.environ | {"PYTHONPATH": paths} | settings
        command = [sys.executable, "-c", "from jaxsft.batches.workers import serve; serve()"]
        self._process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self._poll = select.poll()  # select.select knows no file whose number is 1,024 or more.
        self._poll.register(self._process.stdout, select.POLLIN)
        self._is_ready = False
        self.send(recipes)

    def is_ready(self) -> bool:
        if not self._is_ready and self._poll.poll(0):
            said = self.receive()
            assert said == _READY, said
            self._is_ready = True
        return self._is_ready

    def send(self, value: Any) -> None:
        assert self._process.stdin is not None
        try:
            pickle.dump(value, self._process.stdin, pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None

    def receive(self) -> Any:
        assert self._process.stdout is not None
        try:
            value = pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError):
            raise self._died() from None
        if isinstance(value, BaseException):
            raise value
        return value

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # it has ended already
                pipe.close()
        self._process.wait()

    def _died(self) -> RuntimeError:
        code = self._process.wait()
        return RuntimeError(f"a worker process that prepared data ended with code {code} (killed for its memory?)")


def serve() -> None:
    """What a worker does: reads recipes, then tasks, and writes portions."""
    # Whoever stops the program decides when we end: with our stdin.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # seconds to import, for nothing
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no result
    try:
        recipes = pickle.load(sys.stdin.buffer)
        _write(results, _READY)
        with seldom_collected():
            while True:
                at, rows = pickle.load(sys.stdin.buffer)
                _write(results, encode_rows(recipes[at], rows))
    except EOFError:
        return
    except BrokenPipeError:
        os._exit(0)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
            _write(results, error)
        except Exception:
            _write(results, RuntimeError(traceback.format_exc()))


def _write(file: Any, value: Any) -> None:
    pickle.dump(value, file, pickle.HIGHEST_PROTOCOL)
    file.flush()
