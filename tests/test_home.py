"""A user without a home: one clear error that says what to set, or a private folder, and no traceback."""

import os
import subprocess
import sys

import pytest

from jaxsft.batches import cache
from jaxsft.config import ConfigError, DataConfig
from jaxsft.disk.writing import at_home, user_cache
from jaxsft.folders import hf
from jaxsft.rows.sources import is_hub, source_files

NOBODY = "~nosuchuserhere"


def test_a_home_that_nobody_knows_is_an_error_that_names_the_key_and_the_path():
    asked = {
        "data.cache: ": lambda path: cache.folder(path),
        "model.path: ": lambda path: hf.model_folder(path),
        "data.chat_template: ": lambda path: hf.read_chat_template(path),
        "": lambda path: (source_files(path), is_hub(path)),
    }
    for key, ask in asked.items():
        with pytest.raises(ConfigError, match=rf"^{key}{NOBODY}/a\.jsonl: the folder of {NOBODY} is not known; give"):
            ask(f"{NOBODY}/a.jsonl")


def test_a_home_that_is_known_is_put_in_its_place(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert at_home("~/a/~b") == tmp_path / "a" / "~b"
    assert str(at_home("a/~/b")) == "a/~/b"
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert user_cache() == tmp_path / ".cache" / "jaxsft"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache.folder(DataConfig(train="-").cache) == tmp_path / "x" / "jaxsft" / "prepared"


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming a user that is in no list needs root")
def test_a_user_in_no_list_without_a_home_gets_a_private_folder_and_is_told_once(tmp_path):
    code = """
import os, pathlib, sys
from jaxsft.config import ConfigError
from jaxsft.disk.writing import at_home, user_cache
os.setgid(54321); os.setuid(54321)
print(user_cache(print)); print(user_cache(print))
try:
    at_home("~/runs", "run_dir")
except ConfigError as error:
    print(error)
"""
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents[:3]:
        parent.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    environment["TMPDIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    private = tmp_path / "jaxsft-54321"
    assert done.stdout.splitlines() == [
        f"{private}: prepared data go there, since HOME is not set; set HOME or data.cache to keep them elsewhere",
        str(private),
        str(private),
        "run_dir: ~/runs: the folder of ~ is not known; set HOME, or give the path in full",
    ]
    assert private.stat().st_mode & 0o777 == 0o700
    private.chmod(0o777)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "jaxsft.config.ConfigError" in done.stderr and "not a folder that only this user writes into" in done.stderr
