"""The diffs of CONTRIBUTING.md apply to a copy of this checkout, and the tests that it names under them pass there."""

import os
import re
import shutil
import subprocess
import sys

import pytest

COPIED = ("jaxsft", "tests", "docs", "configs", "README.md", "run.py", "pyproject.toml")


@pytest.fixture(scope="module")
def guide(repo):
    return (repo / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def changed(repo, guide, tmp_path_factory):
    """A copy of the checkout with every diff applied."""
    if shutil.which("git") is None:
        pytest.skip("git applies the diffs")
    copy = tmp_path_factory.mktemp("changed")
    for name in COPIED:
        if (repo / name).is_dir():
            shutil.copytree(repo / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(repo / name, copy / name)
    diffs = re.findall(r"^````diff\n(.*?)^````$", guide, re.DOTALL | re.MULTILINE)
    assert len(diffs) == 4
    # Not as a part of the repository that the copy may lie in.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(copy.parent)}
    for diff in diffs:
        title = next(line for line in diff.splitlines() if line.startswith("diff --git"))
        command = ["git", "apply", "--whitespace=nowarn", "-"]
        done = subprocess.run(command, cwd=copy, env=environment, input=diff, capture_output=True, text=True)
        assert done.returncode == 0, f"CONTRIBUTING.md, the diff that begins with {title}: {done.stderr}"
    return copy


def test_the_tests_under_the_diffs_pass_with_them(guide, changed):
    examples = guide[guide.index("## A model family") :]
    commands = re.findall(r"^\.venv-test/bin/python -m pytest (\S+/(\w+)\.py) -k (\w+)$", examples, re.MULTILINE)
    assert len(commands) == 4
    chosen = " or ".join(f"({name} and {word})" for _, name, word in commands)
    command = [sys.executable, "-m", "pytest", "-v", "-v", "-n", "0", "-p", "no:cacheprovider", "-k", chosen]
    command += [file for file, _, _ in commands]
    environment = os.environ | {"PYTHONPATH": str(changed)}
    done = subprocess.run(command, cwd=changed, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for file, _, word in commands:
        assert re.search(rf"{file}::\S*{word}\S* PASSED", done.stdout), done.stdout
