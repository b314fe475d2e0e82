"""The start of the processes of a run: each finds the others, or says in a sentence who did not come.

In: the environment. Out: `jax.distributed`, initialized, where this is one of several processes.

jax's own start waits for all processes inside C++, and when one is missing it aborts without saying which. So there is
a roll call first, at the address of jax's own coordinator, before that is started: every process tells process 0 its
number, and hears from it who has not come.
"""

import contextlib
import json
import os
import selectors
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax._src import clusters  # Public jax tells nobody what it finds out about the cluster.

from jaxsft.hosts.words import processes, spans

BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SECONDS = "JAXSFT_START_SECONDS"
"""Of the environment: how long processes wait for each other."""
DEFAULT_SECONDS = 300.0
SAY_EVERY = 30.0
STRANGE_SECONDS = 20.0
"""How long something else may answer at the address: what is left of a former start is gone by then."""
_LONGEST_LINE = 2**16
_GREETING = b"jaxsft: start of processes\n"


class StartError(RuntimeError):
    """The processes did not find each other; its text is shown as it is."""

    def __init__(self, text: str, *, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


AGAIN, WRONG = 75, 1
"""Exit codes: whoever was absent may come the next time; what was started wrongly stays wrong."""


class Place(NamedTuple):
    """What a process is of a run."""

    address: str
    """host:port of process 0, where the others meet it."""
    num_processes: int
    process: int
    local_devices: Sequence[int] | None = None
    """Numbers of the devices of this host that are this process's; None for all."""


def start_processes(say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)) -> None:
    """Joins the other processes of this run when a cluster is detected; a single process goes on alone.

    `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` name the run by hand; otherwise SLURM, OpenMPI,
    GKE, Kubernetes and Cloud TPU are asked. Must run before anything touches a device.

    Args:
        say: is told by process 0 whom it waits for.

    Raises:
        StartError: processes are missing, or were started wrongly.
    """
    if jax.distributed.is_initialized():
        return
    seconds = _seconds()
    place = find_place(seconds)
    if place is None:
        return
    if place.num_processes > 1:
        roll_call(place, seconds=seconds, say=say)
    jax.distributed.initialize(
        place.address,
        place.num_processes,
        place.process,
        local_device_ids=place.local_devices,
        cluster_detection_method="deactivate",
    )


def find_place(seconds: float = DEFAULT_SECONDS) -> Place | None:
    """What this process is of a run; None where it is alone.

    Raises:
        StartError: a part of what must be known is missing, or no number.
    """
    address, num_processes, process = (os.environ.get(name) or None for name in BY_HAND)
    try:
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            address, _number(num_processes), _number(process), _local_devices(), None, int(seconds)
        )
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise StartError(f"the cluster does not say where process 0 is: {reason}", exit_code=AGAIN) from error
    known = dict(zip(BY_HAND, found, strict=False))
    if not any(value is not None for value in known.values()):
        return None
    if missing := [name for name, value in known.items() if value is None]:
        raise StartError(
            f"{' and '.join(missing)} of the environment: not given, and no cluster says it", exit_code=WRONG
        )
    place = Place(*found)  # type: ignore[arg-type]
    if not 0 <= place.process < place.num_processes:
        raise StartError(
            f"process {place.process} of {place.num_processes}: expected a number from 0 to {place.num_processes - 1}",
            exit_code=WRONG,
        )
    host, _, port = place.address.rpartition(":")
    if not (host and port.isdecimal()):
        raise StartError(f"address of process 0: {place.address} given, expected HOST:PORT", exit_code=WRONG)
    return place


def roll_call(place: Place, *, seconds: float, say: Callable[[str], None] = lambda text: None) -> None:
    """Returns when all processes of a run have come.

    Args:
        place: of this process.
        seconds: how long they wait for each other.
        say: is told by process 0 whom it waits for.

    Raises:
        StartError: names the processes that did not come and the address that they should have reached, or those that
            have the same number, or says why process 0 could not be reached. All processes have the same error.
    """
    if place.process == 0:
        _call(place, seconds, say)
    else:
        _answer(place, seconds)


class _Guest(NamedTuple):
    """A process that has told its number."""

    connection: socket.socket
    host: str


def _call(place: Place, seconds: float, say: Callable[[str], None]) -> None:
    """Process 0 listens until all have told their numbers, and tells all of them how it ended."""
    listener = _listen(place)
    begin = said = time.monotonic()
    with contextlib.closing(listener), _Guests(place, listener) as guests:
        while guests.problem is None and (absent := guests.absent()):
            waited = time.monotonic() - begin
            if waited > seconds:
                guests.problem = StartError(
                    f"{place.num_processes - len(absent)} of {place.num_processes} processes came within "
                    f"{seconds:.0f} s: missing {spans(absent)}; they should have reached process 0 "
                    f"({socket.gethostname()}) at {place.address}: see what they say, and whether their hosts can "
                    "reach that port",
                    exit_code=AGAIN,
                )
            elif time.monotonic() - said > SAY_EVERY:
                said = time.monotonic()
                say(f"{place.address}: waiting for {processes(absent)} ({waited:.0f} s)")
            guests.receive()
        guests.tell()
        if guests.problem is not None:
            raise guests.problem


class _Guests:
    """Those who have come to process 0, and their connections."""

    problem: StartError | None = None

    def __init__(self, place: Place, listener: socket.socket) -> None:
        self._place, self._listener = place, listener
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._lines: dict[socket.socket, bytes] = {}
        self._here: dict[int, _Guest] = {}

    def __enter__(self) -> "_Guests":
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._lines:
            connection.close()
        self._selector.close()

    def absent(self) -> list[int]:
        return [number for number in range(1, self._place.num_processes) if number not in self._here]

    def receive(self) -> None:
        """Takes in what has come, and waits a little for it."""
        for key, _ in self._selector.select(timeout=0.5):
            if key.fileobj is self._listener:
                with contextlib.suppress(OSError):
                    connection, _ = self._listener.accept()
                    connection.settimeout(5)
                    self._lines[connection] = b""
                    self._selector.register(connection, selectors.EVENT_READ)
                    connection.sendall(_GREETING)
            else:
                assert isinstance(key.fileobj, socket.socket)
                self._read(key.fileobj)

    def _read(self, connection: socket.socket) -> None:
        received = b""
        with contextlib.suppress(OSError):
            received = connection.recv(_LONGEST_LINE)
        line = self._lines[connection] = self._lines[connection] + received
        is_whole = b"\n" in line or len(line) > _LONGEST_LINE
        guest = _parsed(line, {"process": int, "of": int, "host": str}) if is_whole else {}
        if not received or guest is None:  # Gone, and may come again; or somebody else, who tries this port.
            self._selector.unregister(connection)
            connection.close()
            del self._lines[connection]
            self._here = {number: each for number, each in self._here.items() if each.connection is not connection}
        elif guest:
            self.problem = self.problem or _misfit(guest, self._place, self._here)
            self._here.setdefault(guest["process"], _Guest(connection, guest["host"]))

    def tell(self) -> None:
        """Tells all of them that all are here, or what is wrong."""
        problem = self.problem
        answer = {"problem": str(problem or ""), "exit_code": problem.exit_code if problem else 0}
        for connection in self._lines:
            with contextlib.suppress(OSError):
                connection.sendall(_line(answer))


def _misfit(guest: dict[str, Any], place: Place, here: dict[int, _Guest]) -> StartError | None:
    """What is wrong with a process that has come."""
    number, host = guest["process"], guest["host"]
    if guest["of"] != place.num_processes:
        text = f"process {number} ({host}) was started as one of {guest['of']} processes, process 0 as one of "
        return StartError(f"{text}{place.num_processes}", exit_code=WRONG)
    if number in here or number == 0:
        other = socket.gethostname() if number == 0 else here[number].host
        return StartError(
            f"two processes were started with the number {number}, on {other} and on {host}; each needs its own "
            f"({BY_HAND[2]})",
            exit_code=WRONG,
        )
    return None


def _answer(place: Place, seconds: float) -> None:
    """Tells process 0 this process's number, and hears who is missing."""
    begin, strange = time.monotonic(), None
    reason = "nobody answers"
    while (left := seconds - (time.monotonic() - begin)) > 0:
        try:
            answer = _ask(place, timeout=min(left, 10), seconds=seconds)
        except OSError as error:
            reason = str(error.strerror or error)
        else:
            if answer is not None and answer["problem"]:
                raise StartError(answer["problem"], exit_code=answer["exit_code"])
            if answer is not None:
                return
            reason = "what answers there is a run that has begun without this process, or another program"
            strange = strange or time.monotonic()
            if time.monotonic() - strange > STRANGE_SECONDS:
                break
        time.sleep(min(0.5, left))
    raise StartError(
        f"process {place.process} of {place.num_processes} ({socket.gethostname()}) did not find process 0 at "
        f"{place.address} in {time.monotonic() - begin:.0f} s: {reason}; see whether process 0 runs there, and whether "
        "this host can reach that port",
        exit_code=AGAIN,
    )


def _ask(place: Place, *, timeout: float, seconds: float) -> dict[str, Any] | None:
    """What process 0 says when it knows who has come; None where it is somebody else who answers."""
    host, _, port = place.address.rpartition(":")
    address = host.strip("[]"), int(port)
    with socket.create_connection(address, timeout=timeout) as connection, connection.makefile("rb") as lines:
        if lines.readline(_LONGEST_LINE) != _GREETING:
            return None
        hello = {"process": place.process, "of": place.num_processes, "host": socket.gethostname()}
        connection.sendall(_line(hello))
        connection.settimeout(seconds + 10)
        answer = _parsed(lines.readline(_LONGEST_LINE), {"problem": str, "exit_code": int})
        if answer is None:
            raise ConnectionError("it went away while it waited for others")
        return answer


def _listen(place: Place) -> socket.socket:
    """The socket of process 0, on all addresses of its host, as jax's own will be."""
    port, begin = int(place.address.rpartition(":")[2]), time.monotonic()
    while True:
        try:
            if socket.has_dualstack_ipv6():
                return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
            return socket.create_server(("", port), backlog=1024)
        except OSError as error:
            if time.monotonic() - begin > STRANGE_SECONDS:
                raise StartError(
                    f"process 0 ({socket.gethostname()}) cannot listen at port {port} of {place.address}: "
                    f"{error.strerror}; is another run using it?",
                    exit_code=AGAIN,
                ) from error
            time.sleep(1)


def _parsed(line: bytes, kinds: dict[str, type]) -> dict[str, Any] | None:
    """What a line of ours says; None of any other line."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(line.partition(b"\n")[0])
        if isinstance(found, dict) and all(type(found.get(name)) is kind for name, kind in kinds.items()):
            return found
    return None


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"


def _seconds() -> float:
    text = os.environ.get(SECONDS)
    if text is None:
        return DEFAULT_SECONDS
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) < float("inf"):
            return seconds
    raise StartError(f"{SECONDS} of the environment: {text} given, expected seconds", exit_code=WRONG)


def _local_devices() -> list[int] | None:
    text = os.environ.get("JAX_LOCAL_DEVICE_IDS")
    return [int(number) for number in text.split(",")] if text else None


def _number(text: str | None) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal()):
        raise StartError(f"{' and '.join(BY_HAND[1:])}: {text} given, expected a number", exit_code=WRONG)
    return int(text)
