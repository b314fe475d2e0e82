"""What processes must have in common: facts, folders, errors. Two processes, which share most of what is held here."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest
from compilation import xla_flags

sys.path.append(str(pathlib.Path(__file__).parent))
import trials

from jaxsft.hosts.agreement import agree, differences, flat, share
from jaxsft.hosts.logs import last_lines


def test_what_differs_is_named_with_the_numbers_of_the_processes():
    facts = [{"optim.learning_rate": 1e-5, "seed": 1}] * 4
    assert differences(facts) == []
    facts[2] = {"optim.learning_rate": 2e-5, "seed": 1}
    assert differences(facts) == ["processes 0, 1 and 3 have optim.learning_rate 1e-05, process 2 has 2e-05"]
    assert differences([{"a": [1]}, {}, {"a": [2]}]) == ["process 0 has a [1], process 1 has none, process 2 has [2]"]
    long = differences([{"template": "x" * 500 + end} for end in "ab"])[0]
    assert len(long) < 200 and long.count("xxx...") == 2  # told apart by their hashes
    assert len(set(long.split("(")[1:])) == 2


def test_nested_keys_are_as_a_config_has_them():
    tree = {"data": {"train": [{"path": "a", "weight": None}], "roles": {}}, "seed": 1, "log": {"to": ["file"]}}
    assert flat(tree) == {
        "data.train.0.path": "a",
        "data.train.0.weight": None,
        "data.roles": {},
        "seed": 1,
        "log.to": ["file"],
    }


def test_one_process_agrees_with_itself():
    agree("config", {"seed": 1})
    assert share("numbers", 3, list) == [3]


CHILD = """
import json, pathlib, sys
from jaxsft.hosts.start import start_processes
start_processes()
import jax
from jax._src import xla_bridge
from jaxsft.config import ConfigError
from jaxsft.disk.writing import WriteError
from jaxsft.hosts import agreement, disks, doctor
from jaxsft.hosts.table import process_number
me, shared, own = process_number(), pathlib.Path(sys.argv[1]), pathlib.Path("/proc/self/cwd")
out = {}

def error_of(work):
    try:
        return ["", work()]
    except (ConfigError, WriteError, AssertionError) as error:
        return [type(error).__name__, str(error)]

out["share"] = agreement.share("numbers", 10 * me, list)
out["same"] = error_of(lambda: agreement.agree("config", {"a.b": 1}))
out["other"] = error_of(lambda: agreement.agree("config", {"a.b": me, "c": 1}))
out["first"] = error_of(lambda: agreement.by_first("work", lambda: "done", errors=(ConfigError,)))

def fail():
    raise ConfigError("no")

out["first fails"] = error_of(lambda: agreement.by_first("work", fail, errors=(WriteError, ConfigError)))
class Kind(ConfigError):  # of this the other process knows nothing
    pass

def fail_so():
    raise Kind("so")

out["first fails so"] = error_of(lambda: agreement.by_first("work", fail_so, errors=(WriteError, ConfigError)))
out["places"] = error_of(lambda: agreement.share(f"place {me}", 0, list))
out["folders"] = [disks.first_with(shared), disks.first_with(own)]
out["unwritable"] = error_of(lambda: disks.first_with(shared if me == 0 else shared / "not there"))

made = []
def once(folder):
    path = folder / "made.txt"
    def make():
        made.append(str(folder))
        path.write_text("made")
        return path.read_text()
    find = lambda: path.read_text() if path.exists() else None
    return disks.once_per_disk(folder, "making", find=find, claim=lambda: None, make=make)

out["once"] = [once(shared), once(own), once(shared)]
out["made"] = made
out["untouched"] = not xla_bridge.backends_are_initialized()

try:
    with agreement.together():
        raise ConfigError("all have this")
except ConfigError as error:
    out["alike"] = agreement._have_all(error)

doctor.REDUCE_SECONDS = 0.2
out["doctor"] = doctor.examine({"run_dir": shared, "cache": own})
(shared / f"{me}.json").write_text(json.dumps(out))
jax.distributed.shutdown()
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes found out."""
    place = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for number in range(2):
        (place / str(number)).mkdir()
        environment = os.environ | {
            "XLA_FLAGS": xla_flags(2),
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(number),
            "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
            "PYTHONPATH": str(trials.REPO),
        }
        command = [sys.executable, "-c", CHILD, str(place)]
        children.append(subprocess.Popen(command, cwd=place / str(number), env=environment))
    assert [child.wait(120) for child in children] == [0, 0]
    return [json.loads((place / f"{number}.json").read_text()) for number in range(2)], place


def test_facts_and_errors_are_those_of_all(two):
    found, place = two
    for each in found:
        assert each["share"] == [0, 10]
        assert each["same"] == ["", None]
        kind, text = each["other"]
        assert kind == "ConfigError" and "\n  process 0 has a.b 0, process 1 has 1" in text and " c " not in text
        assert each["first fails"] == ["ConfigError", "no"]
        assert each["places"][0] == "AssertionError"  # and nobody waits for ever
        assert each["alike"]
        assert each["untouched"]  # devices are there only when all processes have come
    assert [each["first fails so"] for each in found] == [["Kind", "so"], ["ConfigError", "so"]]
    assert [each["first"] for each in found] == [["", "done"], ["", None]]


def test_a_folder_that_is_shared_is_told_from_one_of_each_host(two):
    found, place = two
    assert [each["folders"] for each in found] == [[0, 0], [0, 1]]
    assert found[0]["unwritable"] == ["", 0]
    assert found[1]["unwritable"][0] == "WriteError"
    assert not [path for path in place.rglob(".jaxsft-*") if path.is_file()]


def test_work_is_done_once_for_each_disk(two):
    found, place = two
    assert all(each["once"] == ["made"] * 3 for each in found)
    assert [each["made"] for each in found] == [[str(place), "/proc/self/cwd"], ["/proc/self/cwd"]]


def test_the_doctor_sees_all_hosts(two):
    found, place = two
    assert found[0]["doctor"] == found[1]["doctor"]
    problems, table = found[0]["doctor"]
    named = [problem for problem in problems if "are free" not in problem and "available" not in problem]
    assert named == ["cache: process 1 does not see /proc/self/cwd as process 0 has it"]
    assert [row.split()[0] for row in table[:3]] == ["process", "0", "1"]
    assert "2 x cpu" in table[2] and "as process 0" in table[1]
    assert "on each of 4 devices" in table[-1]


def test_a_run_whose_processes_do_not_have_the_same_does_not_start(tmp_path):
    """The other cases are measured by hand: `trials.py`."""
    case = trials.CASES["data"]
    ended = trials.run_all(trials.make_config(tmp_path), tmp_path, case, num_processes=2)
    assert not trials.problem_of(case, ended, 2), ended
    assert "error:" not in ended.said[1]  # said once
    assert not (tmp_path / "run").exists()


def test_process_0_quotes_the_log_of_the_one_that_failed(tmp_path):
    case = trials.CASES["failure"]
    ended = trials.run_all(trials.make_config(tmp_path), tmp_path, case, num_processes=2)
    assert not trials.problem_of(case, ended, 2), ended
    quoted, last = ended.said[0].split("the last lines of process 1:\n")[1].rstrip().rsplit("\n", 1)
    assert last.endswith("failed: KeyError: 'planted'")
    assert all(f"process 1 {socket.gethostname()}  " in line for line in quoted.splitlines())
    assert "KeyError: 'planted'" in "".join(last_lines(tmp_path / "run", 1))
