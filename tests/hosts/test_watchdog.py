"""A run that stands still is ended; one whose steps are finished, however slow at first, is let be."""

import statistics
import time

import jax.numpy as jnp
import pytest

from jaxsft.hosts import watchdog
from jaxsft.hosts.watchdog import LEAST_SECONDS, LONG_SECONDS, TIMES_THE_MEDIAN, Watchdog


@pytest.fixture
def looked_often(monkeypatch):
    """The thread of a watchdog looks a hundred times a second."""
    monkeypatch.setattr(watchdog, "LOOK_SECONDS", 0.01)


def train(dog, num_steps, seconds):
    """Steps, each of which is finished so many seconds after the one before."""
    for step in range(num_steps):
        dog.launching(step)
        time.sleep(seconds)
        dog.launched(jnp.zeros(()).block_until_ready())


def wait_for(ends, seconds=5.0):
    until = time.monotonic() + seconds
    while not ends and time.monotonic() < until:
        time.sleep(0.01)
    return ends


def test_a_run_whose_steps_stop_is_ended_once_with_all_stacks_and_what_it_waited_for(looked_often, capfd):
    ends = []
    dog = Watchdog(0.5, end=lambda *end: ends.append(end))
    dog.start()
    train(dog, 10, 0.1)
    assert not ends
    ((text, code),) = wait_for(ends)
    assert code == 75 and "no step was finished for" in text and text.endswith("the next batch was waited for")
    time.sleep(0.7)
    assert len(ends) == 1
    stacks = capfd.readouterr().err
    assert "in test_a_run_whose_steps_stop" in stacks and "in _watch" in stacks


def test_the_step_that_is_under_way_is_named(looked_often):
    ends = []
    dog = Watchdog(0.3, end=lambda *end: ends.append(end))
    dog.start()
    train(dog, 3, 0.05)
    time.sleep(0.1)
    dog.launching(3)
    assert wait_for(ends)[0][0].endswith("step 4 was under way")


def test_what_is_no_step_may_take_long_and_then_time_runs_anew(looked_often):
    ends = []
    dog = Watchdog(0.4, end=lambda *end: ends.append(end))
    dog.start()
    time.sleep(0.8)  # compiling
    train(dog, 3, 0.05)
    with dog.busy("the model was saved"):
        time.sleep(0.8)
    time.sleep(0.1)
    assert not ends
    assert wait_for(ends)
    dog.close()


def test_the_limit_follows_the_median_step_and_not_the_slowest(looked_often):
    dog = Watchdog(None)
    assert dog.limit() == LEAST_SECONDS + LONG_SECONDS  # the first step compiles
    dog.start()
    train(dog, 5, 0.05)
    time.sleep(0.1)
    assert dog.limit() == LEAST_SECONDS
    dog.close()
    dog._seconds.extend([8.0] * 20 + [500.0] * 5)
    assert dog.limit() == TIMES_THE_MEDIAN * 8.0


def test_the_length_of_a_step_is_known_also_where_its_line_is_waited_for(monkeypatch):
    monkeypatch.setattr(watchdog, "LOOK_SECONDS", 60.0)  # so that all looks fall into other work
    dog = Watchdog(None)
    dog.start()
    for step in range(4):
        train(dog, 1, 0.1)
        with dog.busy("the model was evaluated or saved"):
            time.sleep(0.3 if step == 2 else 0)
    dog.close()
    assert len(dog._seconds) == 3 and 0.1 <= statistics.median(dog._seconds) < 0.3


def test_a_batch_that_was_waited_for_long_and_a_long_first_step_may_be_followed_by_others():
    dog = Watchdog(None)
    dog._busy, dog._first = None, 100.0
    assert dog.limit() == 300.0
    dog._seconds.extend([1.0, 1.0])
    assert dog.limit() == LEAST_SECONDS
    with dog.waiting():
        time.sleep(0.05)
    assert 0.05 <= dog._longest_wait < 1
    dog._longest_wait = 60.0
    assert dog.limit() == 180.0


def test_time_in_which_the_process_itself_stood_still_is_not_counted(monkeypatch):
    monkeypatch.setattr(watchdog, "STILL_SECONDS", 0.3)
    ends = []
    dog = Watchdog(0.5, end=lambda *end: ends.append(end))
    train(dog, 3, 0.01)
    dog._busy = None
    looks = iter([0.02, 2.0])
    dog._closed.wait = lambda seconds: time.sleep(next(looks, 0.02)) or False
    dog.start()
    time.sleep(2.2)
    assert not ends
    assert wait_for(ends)
