"""What a wheel brings, and what it says of itself; `tests/test_quickstart.py` trains from it."""

import os
import subprocess
import sys
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from jaxsft.config_files import load_config


def test_the_quickstart_of_the_package_is_that_of_the_checkout(repo, installed):
    for path in (installed / "jaxsft" / "configs").rglob("*.*"):
        assert path.read_bytes() == (repo / path.relative_to(installed / "jaxsft")).read_bytes()
    config = load_config(repo / "configs" / "quickstart.yaml")
    for path in (config.model.path, config.data.train[0].path, config.data.eval["eval"].path):
        assert (repo / path).exists() and (installed / "jaxsft" / path).exists()


def test_on_windows_one_sentence_says_wsl(repo, installed):
    """With `sys.platform` as it is there, and without the modules and the signal that are not there."""
    code = """
import signal, sys
del signal.SIGHUP
sys.modules |= {name: None for name in ("fcntl", "grp", "pwd", "resource")}
sys.platform = "win32"
from jaxsft.__main__ import main
sys.exit(main())
"""
    for folder in (repo, installed):
        environment = os.environ | {"PYTHONPATH": str(folder)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("error: jaxsft needs Linux or macOS") and "WSL" in done.stderr
        assert done.stderr.count("\n") == 1
    script = tomllib.loads((repo / "pyproject.toml").read_text())["project"]["scripts"]["jaxsft"]
    assert script == "jaxsft.__main__:main"


def test_the_license_is_named_and_its_text_is_there(repo):
    project = tomllib.loads((repo / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0" and project["license-files"] == ["LICENSE"]
    text = (repo / "LICENSE").read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text


def test_the_constraints_are_of_versions_that_the_project_takes_and_the_readme_uses_them(repo):
    project = tomllib.loads((repo / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    lines = [line for line in (repo / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = [Requirement(line) for line in lines]
    for python in ("3.11", "3.13"):
        of_python = {"python_version": python}
        here = {
            canonicalize_name(each.name): each.specifier
            for each in pinned
            if not each.marker or each.marker.evaluate(of_python)
        }
        assert {"jax", "transformers"} <= here.keys() and len(here) > 100
        for requirement in map(Requirement, needed):
            if (name := canonicalize_name(requirement.name)) in here:
                (exactly,) = here[name]
                assert exactly.operator == "==" and exactly.version in requirement.specifier, requirement
            else:
                assert python == "3.13", f"constraints.txt: no version of {name}"
    readme = (repo / "README.md").read_text()
    commands = [line for line in readme.splitlines() if line.startswith("python3 -m venv")]
    assert len(commands) == 2 and all(" -c constraints.txt " in command for command in commands)
