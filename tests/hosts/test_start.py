"""The start of processes: who is missing, who has whose number, and what answers at the address, each in a sentence.

Threads stand for processes: the roll call knows nothing of jax.
"""

import concurrent.futures
import socket
import threading
import time

import pytest

from jaxsft.hosts import start
from jaxsft.hosts.start import Place, StartError, find_place, roll_call
from jaxsft.hosts.words import processes, spans


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def outcomes(places, seconds, said=None):
    """What each process ends with: nothing, or its error."""

    def outcome(place):
        try:
            roll_call(place, seconds=seconds, say=said.append if said is not None else print)
        except StartError as error:
            return str(error), error.exit_code
        return None

    with concurrent.futures.ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(outcome, places))


def run(numbers, of):
    address = f"localhost:{free_port()}"
    return [Place(address, of, number) for number in numbers]


def test_all_find_each_other_in_whatever_order_they_come():
    places = run([3, 1, 0, 2], of=4)
    assert outcomes(places, 10) == [None] * 4
    # The port is free again at once, for jax's own service.
    socket.create_server(("localhost", int(places[0].address.split(":")[1]))).close()


def test_who_is_missing_is_named_to_all(monkeypatch):
    monkeypatch.setattr(start, "SAY_EVERY", 0.4)
    said = []
    places = run([0, 1, 2, 5], of=8)
    found = outcomes(places, 3, said)
    assert len(set(found)) == 1
    text, code = found[0]
    assert text.startswith("4 of 8 processes came within 3 s: missing 3, 4, 6 and 7;") and places[0].address in text
    assert code == 75
    assert said and said[-1].startswith(f"{places[0].address}: waiting for processes 3, 4, 6 and 7 (")


def test_a_process_that_dies_while_it_waits_may_come_again():
    places = run([0, 1, 2, 3], of=4)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        waiting = pool.submit(outcomes, places[:2], 20)
        connection = None
        while connection is None:
            try:
                connection = socket.create_connection(("localhost", int(places[0].address.split(":")[1])))
            except OSError:
                time.sleep(0.05)
        connection.sendall(b'{"process": 2, "of": 4, "host": "h"}\n')
        connection.close()
        time.sleep(0.5)
        assert not waiting.done()
        assert outcomes(places[2:], 20) == [None] * 2
        assert waiting.result() == [None, None]


@pytest.mark.parametrize(
    ("numbers", "of", "words"),
    [
        ([0, 1, 1], [4, 4, 4], "two processes were started with the number 1, on"),
        ([0, 1], [3, 4], "was started as one of 4 processes, process 0 as one of 3"),
    ],
)
def test_what_was_started_wrongly_is_said_at_once(numbers, of, words):
    address = f"localhost:{free_port()}"
    begin = time.monotonic()
    found = outcomes([Place(address, many, number) for number, many in zip(numbers, of, strict=True)], 60)
    assert len(set(found)) == 1 and words in found[0][0] and found[0][1] == 1
    assert time.monotonic() - begin < 10


def test_an_address_where_nobody_is_or_somebody_else_is_named(monkeypatch):
    (alone,) = run([1], of=2)
    ((text, code),) = outcomes([alone], 1)
    assert f"did not find process 0 at {alone.address} in 1 s: Connection refused" in text and code == 75
    ((text, _),) = outcomes([Place("no-such-host.invalid:1234", 2, 1)], 1)
    assert "at no-such-host.invalid:1234" in text

    monkeypatch.setattr(start, "STRANGE_SECONDS", 0.5)
    server = socket.create_server(("localhost", 0))

    def serve():
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            connection.close()

    threading.Thread(target=serve, daemon=True).start()
    port = server.getsockname()[1]
    begin = time.monotonic()
    ((text, code),) = outcomes([Place(f"localhost:{port}", 2, 1)], 60)
    assert "a run that has begun without this process, or another program" in text and code == 75
    ((text, _),) = outcomes([Place(f"localhost:{port}", 2, 0)], 60)
    assert f"cannot listen at port {port}" in text
    assert time.monotonic() - begin < 10
    server.close()


def test_a_place_given_by_hand_is_whole(monkeypatch):
    for name in start.BY_HAND:
        monkeypatch.delenv(name, raising=False)
    assert find_place() is None
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "h:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    with pytest.raises(StartError, match=r"^JAX_PROCESS_ID of the environment: not given"):
        find_place()
    monkeypatch.setenv("JAX_PROCESS_ID", "4")
    with pytest.raises(StartError, match="expected a number from 0 to 3"):
        find_place()
    monkeypatch.setenv("JAX_PROCESS_ID", "3")
    assert find_place() == Place("h:1", 4, 3)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "h")
    with pytest.raises(StartError, match="h given, expected HOST:PORT"):
        find_place()


def test_processes_in_words():
    assert processes([2]) == "process 2"
    assert processes([3, 0, 1]) == "processes 0, 1 and 3"
    assert spans([0, 1, 2, 3, 8, 10, 11, 12]) == "0 to 3, 8 and 10 to 12"
    assert spans(range(0, 40, 2), most=3) == "0, 2, 4 and more, 20 in all"
