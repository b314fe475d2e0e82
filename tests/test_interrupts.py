"""Ctrl-C within an import ends the process; anywhere else it is an exception."""

import signal
import subprocess
import sys

import pytest

from jaxsft.cli import main

SWALLOWS = """
import os, signal
try:
    os.kill(os.getpid(), signal.{name})
    print("on its way")
except BaseException:
    print("dropped")
"""


def run(tmp_path, script, *, name="SIGINT"):
    """A program beside a module `swallows` that is sent a signal while it is imported, and drops what is raised."""
    (tmp_path / "swallows.py").write_text(SWALLOWS.format(name=name))
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{script}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


# A program that is started in the background of a script ignores Ctrl-C; so may these tests.
BY_DEFAULT = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
GUARDED = BY_DEFAULT + "from jaxsft.interrupts import end_imports_at_once; end_imports_at_once()\n"


def test_an_import_cannot_drop_it(tmp_path):
    assert run(tmp_path, GUARDED + "import swallows; print('went on')") == (1, "", "interrupted\n")


def test_nor_can_an_import_deep_in_a_call(tmp_path):
    script = GUARDED + "def load():\n    import swallows\n    print('went on')\n[load() for _ in range(1)]"
    assert run(tmp_path, script) == (1, "", "interrupted\n")


def test_elsewhere_it_is_an_exception(tmp_path):
    script = GUARDED + "exec(open(sys.path[0] + '/swallows.py').read()); print('went on')"
    assert run(tmp_path, script) == (0, "dropped\nwent on\n", "")


def test_a_handler_of_ones_own_is_kept():
    def mine(number, frame):
        pass

    from jaxsft.interrupts import end_imports_at_once

    before = signal.signal(signal.SIGINT, mine)
    try:
        end_imports_at_once()
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 1), ("SIGTERM", 75)])
def test_while_a_run_starts_as_well(tmp_path, name, code):
    script = "from jaxsft.training.stop import StopSignal\nwith StopSignal():\n    import swallows\nprint('went on')"
    returned, out, err = run(tmp_path, GUARDED + script, name=name)
    assert (returned, out) == (code, "") and f"{name}: stopping; nothing was begun" in err


def test_a_program_that_ignores_it_goes_on_to(tmp_path):
    script = GUARDED.replace("signal.default_int_handler", "signal.SIG_IGN") + "import swallows; print('went on')"
    assert run(tmp_path, script) == (0, "on its way\nwent on\n", "")


def test_the_command_is_guarded():
    script = BY_DEFAULT + "import sys; sys.argv = ['jaxsft', 'keys']\nfrom jaxsft.__main__ import main; main()"
    script += "; print(signal.getsignal(signal.SIGINT))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "_end_or_raise" in done.stdout.splitlines()[-1], done.stderr


def test_a_comparison_that_is_to_outlive_its_terminal_does(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # which the command sets
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)}
    try:
        for at_start, is_handled in ((signal.SIG_IGN, False), (signal.SIG_DFL, True)):
            signal.signal(signal.SIGHUP, at_start)
            assert main(["compare", str(tmp_path / "none.yaml"), "--baseline", "hf"]) == 1
            assert callable(signal.getsignal(signal.SIGTERM))
            assert (signal.getsignal(signal.SIGHUP) is not at_start) == is_handled
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
