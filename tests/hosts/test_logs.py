"""Logs of processes: an event is a line with time, process and host, also what was said before it had a folder."""

import re
import socket

import pytest

from jaxsft.config import ConfigError
from jaxsft.disk.buckets import BucketPath
from jaxsft.hosts.logs import Log, last_lines

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d process (\d+) (\S+)  (.*)")


def texts(folder, process):
    lines = [LINE.fullmatch(line) for line in (folder / "logs" / f"process-{process}.log").read_text().splitlines()]
    assert all(line[1] == str(process) and line[2] == socket.gethostname() for line in lines)
    return [line[3] for line in lines]


def test_every_event_is_a_line_and_the_next_start_goes_on(tmp_path):
    with pytest.raises(ConfigError), Log(3) as log:
        log.write("before there is a folder")
        assert not list(tmp_path.iterdir())
        log.open(tmp_path)
        log.write("two\nlines")
        raise ConfigError("optim: no")
    with pytest.raises(ZeroDivisionError), Log(3) as log:
        log.open(tmp_path)
        1 / 0  # noqa: B018
    found = texts(tmp_path, 3)
    assert found[:4] == ["before there is a folder", "two", "lines", "error: optim: no"]
    assert found[4].startswith("Traceback") and found[-1] == "ZeroDivisionError: division by zero"


def test_the_last_lines_of_a_log_can_be_had(tmp_path):
    assert last_lines(tmp_path, 0) == []
    with Log(0) as log:
        log.open(tmp_path)
        for number in range(2000):
            log.write(f"event {number}")
        assert [line.split()[-1] for line in last_lines(tmp_path, 0, 3)] == ["1997", "1998", "1999"]
        assert all(LINE.fullmatch(line) for line in last_lines(tmp_path, 0, 10**6))


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / "logs").write_text("mine")
    with Log(0) as log:
        log.open(tmp_path)
        log.write("lost")
    assert (tmp_path / "logs").read_text() == "mine"
    (tmp_path / "other" / "logs").mkdir(parents=True)
    (tmp_path / "other" / "logs" / "process-0.log").symlink_to(tmp_path / "logs")
    with Log(0) as log:
        log.open(tmp_path / "other")
        log.write("not through a link")
    assert (tmp_path / "logs").read_text() == "mine"


def test_in_a_bucket_a_log_is_written_whole():
    folder = BucketPath("memory://a-bucket/run")
    for text in ("first start", "second start"):
        with Log(1) as log:
            log.open(folder)
            log.write(text)
            log.write("the end")
    expected = ["first start", "the end", "second start", "the end"]
    assert [line.split("  ")[1] for line in last_lines(folder, 1)] == expected
