"""A campaign of faults: the first trials of it, or as many as fit into FAULTS_MINUTES.

    FAULTS_MINUTES=30 FAULTS_SEED=1 python -m pytest -n 0 -s tests/faults

docs/reliability.md has the table of a long one.
"""

import importlib.util
import os
import pathlib
import random
import shutil
import time

import jax
import pytest

SPEC = importlib.util.spec_from_file_location("campaign", pathlib.Path(__file__).with_name("campaign.py"))
assert SPEC is not None and SPEC.loader is not None
campaign = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(campaign)

MINUTES = float(os.environ.get("FAULTS_MINUTES", "0"))
PROCESS_TRIALS, DAMAGES = 5, 20
"""At least: in every run of the tests the same, however fast the machine is."""
SEED = int(os.environ.get("FAULTS_SEED", "0"))

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def calm(tiny_config, tmp_path_factory):
    """The run that nothing happened to: its folder, what it left, and how long it took."""
    place = tmp_path_factory.mktemp("calm")
    process = campaign.start(tiny_config, campaign.overrides_of(place))
    begin = time.monotonic()
    code, err = campaign.finish(process)
    assert code == 0, err
    return place, campaign.result_of(place / "run"), time.monotonic() - begin


STOP_AT = """
import os, signal, sys
from jaxsft.cli import main
from jaxsft.training.stop import StopSignal

at = StopSignal.at

def at_seven(self, step):
    if step == 7:
        os.kill(os.getpid(), signal.SIGTERM)
    return at(self, step)

StopSignal.at = at_seven
sys.exit(main())
"""


@pytest.fixture(scope="module")
def stopped(tiny_config, tmp_path_factory):
    """A run that got SIGTERM between two lines of its metrics, and has two checkpoints."""
    place = tmp_path_factory.mktemp("stopped")
    code, err = campaign.finish(campaign.start(tiny_config, campaign.overrides_of(place), script=STOP_AT))
    assert code == campaign.STOPPED and campaign.has_open_window(place / "run"), f"exit code {code}: {err}"
    assert sorted(each.name for each in (place / "run" / "checkpoints").iterdir()) == ["4", "7"]
    return place


def report(outcomes, begin):
    print("\n" + campaign.table(outcomes, time.monotonic() - begin, SEED))
    failed = [each.ended for each in outcomes if not each.held]
    assert not failed, f"{len(failed)} of {len(outcomes)} trials: " + "\n".join(failed[:5])


def test_a_stopped_run_that_goes_on_leaves_every_line_of_the_calm_one(tiny_config, calm, stopped, tmp_path):
    place = tmp_path / "again"
    shutil.copytree(stopped, place)
    code, _, err = campaign.run_here(tiny_config, campaign.overrides_of(place))
    assert code == 0, err
    assert campaign.difference(campaign.result_of(place / "run"), calm[1]) == ""


def test_killed_stopped_and_on_full_disks_runs_end_as_the_calm_one(tiny_config, calm, tmp_path):
    _, expected, seconds = calm
    begin, outcomes, number = time.monotonic(), [], 0
    chance = random.Random(SEED)
    while time.monotonic() - begin < 60 * MINUTES * 0.55 or number < PROCESS_TRIALS:
        place = tmp_path / str(number)
        if number % 5 == 1:
            outcomes.append(campaign.disk_trial(tiny_config, expected, place, chance, largest=2_000_000))
        elif number % 5 == 2:
            outcomes.append(campaign.together_trial(tiny_config, expected, place))
        else:
            outcomes.append(campaign.kill_trial(tiny_config, expected, place, chance, seconds))
        number += 1
        shutil.rmtree(place, ignore_errors=True)
    report(outcomes, begin)


def test_whatever_file_is_damaged_the_result_is_right_or_there_is_one_error(tiny_config, calm, stopped, tmp_path):
    begin, outcomes, number = time.monotonic(), [], 0
    chance = random.Random(SEED)
    while time.monotonic() - begin < 60 * MINUTES * 0.35 or number < DAMAGES:
        base = calm[0] if number % 3 else stopped
        outcomes.append(campaign.damage_trial(tiny_config, base, calm[1], tmp_path / str(number), chance))
        number += 1
        if number % 50 == 0:
            jax.clear_caches()
    report(outcomes, begin)
