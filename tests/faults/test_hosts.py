"""Two processes, and five ways in which one of them fails: both end soon, each with the cause as its last words.

The table of docs/reliability.md, with more processes and trials, is made by hosts.py.
"""

import concurrent.futures
import importlib.util
import pathlib

import pytest

SPEC = importlib.util.spec_from_file_location("fault_hosts", pathlib.Path(__file__).with_name("hosts.py"))
assert SPEC is not None and SPEC.loader is not None
hosts = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(hosts)

pytestmark = pytest.mark.faults

TRIALS = {
    "stopped": (1, False, ()),
    "stuck": (1, False, ("train.stall_timeout=10",)),
    "kill": (0, True, ()),
    "disk-full": (1, True, ()),
    "exception": (1, False, ()),
}
"""Fault -> the process that has it, whether the run is then continued, and what else the command says."""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return hosts.make_config(tmp_path_factory.mktemp("hosts"))


def test_a_fault_in_one_of_two_processes_ends_both_with_the_cause_and_the_run_goes_on_bitwise(config, tmp_path):
    expected = hosts.calm_result(config, tmp_path / "calm", 2)

    def tried(name):
        rank, is_continued, overrides = TRIALS[name]
        place = tmp_path / name
        return hosts.trial(
            name,
            config,
            place,
            expected,
            num_processes=2,
            rank=rank,
            is_continued=is_continued,
            overrides=overrides,
        )

    # One of two waits most of the time.
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        trials = list(pool.map(tried, TRIALS))
    print("\n" + hosts.table(trials))
    assert not (problems := [f"{trial.fault}: {trial.problem}" for trial in trials if trial.problem]), "\n".join(
        problems
    )


def test_a_process_alone_that_stands_still_ends_with_all_stacks_and_exit_code_75(config, tmp_path):
    place, stuck = tmp_path / "alone", hosts.FAULTS["stuck"]
    hosts.make_data(place)
    (process,) = hosts.start(config, place, 1, {0: stuck.script}, "train.stall_timeout=8")
    try:
        assert hosts.wait([process], 200) < 200
    finally:
        process.kill()
    output = hosts.said(place, 0)
    assert process.wait() == 75, output
    assert output.rstrip().splitlines()[-1].endswith("while the next batch was waited for")
    assert "in batch" in output.partition("FAULT")[2]  # the stack of the thread that stood still
