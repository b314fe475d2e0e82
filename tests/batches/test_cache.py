"""Prepared data stand in a folder of our own: nothing of others is removed or written over, whoever dies when."""

import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from jaxsft.batches import cache
from jaxsft.batches.prepare import prepare
from jaxsft.chat.encoder import ChatEncoder, stop_ids
from jaxsft.config import ConfigError, DataConfig
from jaxsft.disk.writing import WriteError

HELPERS = pathlib.Path(__file__).parents[1] / "helpers"


@pytest.fixture
def setting(tmp_path, make_tokenizer):
    tokenizer = make_tokenizer()
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"question": f"{n}?", "answer": "x" * n}) + "\n" for n in range(1, 21)))

    def run(place=tmp_path / "cache", **options):
        config = DataConfig(train=str(source), cache=str(place), **options)
        encoder = ChatEncoder(tokenizer, config, stop_ids(tokenizer))
        said = run.said = []
        return prepare(config, config.train[0], encoder, tokenizer_files_key="t", say=said.append)

    run.cache, run.place, run.source = tmp_path / "cache", tmp_path / "cache" / "jaxsft-prepared", source
    return run


def tree(folder):
    """Every path below a folder, with what it holds."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if not path.is_symlink()
    }


def old(path):
    os.utime(path, (time.time() - 90 * 24 * 3600,) * 2)


def dead_building(place, id="0" * 32, host=None):
    """A folder that a process was making when it was killed."""
    code = f"""
import os, pathlib
from jaxsft.batches import cache
place = pathlib.Path({str(place)!r})
cache.claim(place)
with cache.building(place / ("f" * 64)) as made:
    (made / "tokens.bin").write_bytes(b"half")
    os.rename(made, place / ".building-ffffffffffffffff-{id}")
    os._exit(9)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    left = place / f".building-ffffffffffffffff-{id}"
    if host is not None:
        owner = json.loads((left / "building.lock").read_text())
        (left / "building.lock").write_text(json.dumps(owner | {"host": host, "boot": "another"}) + "\n")
    return left


def test_folders_of_others_in_the_cache_are_never_touched(setting):
    for name in (".oh-my-zsh", ".0123-abcd", ".building-0123", "f" * 64, "prepared"):
        (setting.cache / name / "inner").mkdir(parents=True)
        (setting.cache / name / "inner" / "tokens.bin").write_text("mine")
        old(setting.cache / name)
    before = tree(setting.cache)
    setting()
    setting(seq_len=500)
    after = tree(setting.cache)
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"jaxsft-prepared"}


def test_within_our_folder_only_what_is_ours_is_removed(setting):
    setting()
    names = (".building-notes", ".building-ffffffffffffffff-" + "1" * 32, ".old-1", "F" * 64, ".building-0-0")
    for name in names:
        (setting.place / name).mkdir()
        (setting.place / name / "notes.txt").write_text("mine")
        old(setting.place / name)
    left = dead_building(setting.place)
    (left / "notes.txt").write_text("mine")
    setting(seq_len=500)
    for name in (*names, left.name):
        assert tree(setting.place / name) == {"notes.txt": b"mine"}


def test_what_a_killed_preparation_left_goes_and_a_live_one_stays_whatever_its_age(setting):
    left = dead_building(setting.place)
    assert (left / "tokens.bin").exists()
    with cache.building(setting.place / ("e" * 64)) as alive:
        (alive / "tokens.bin").write_bytes(b"half")
        for path in (alive, alive / "tokens.bin", alive / "building.lock"):
            old(path)
        setting()
        assert not left.exists()
        assert (alive / "tokens.bin").read_bytes() == b"half"
    assert not alive.exists(), "its own maker removes it"


def test_what_another_host_makes_goes_only_after_its_lock_did_not_change_for_long(setting, monkeypatch):
    left = dead_building(setting.place, host="elsewhere")
    setting()
    assert left.exists(), "it may be alive"
    monkeypatch.setattr(cache, "DEAD_SECONDS", 0.2)
    with cache.building(setting.place / ("e" * 64)):
        time.sleep(0.3)
        owner = json.loads((left / "building.lock").read_text())
        (left / "building.lock").write_text(json.dumps(owner | {"renewals": 1}) + "\n")
    assert left.exists(), "it has written meanwhile"
    with cache.building(setting.place / ("e" * 64)):
        time.sleep(0.3)
    assert not left.exists()


def test_a_folder_of_our_name_that_is_somebody_elses_is_refused_and_left_alone(setting):
    setting.place.mkdir(parents=True)
    (setting.place / "thesis.txt").write_text("mine")
    for mark in (None, "not ours\n", ""):
        if mark is not None:
            (setting.place / "jaxsft.txt").write_text(mark)
        before = tree(setting.cache)
        with pytest.raises(ConfigError, match=r"jaxsft-prepared: exists and was not made by jaxsft.*data\.cache"):
            setting()
        assert tree(setting.cache) == before


def test_a_file_or_a_link_in_our_place_is_refused_and_left_alone(setting, tmp_path):
    setting.cache.mkdir()
    setting.place.write_text("mine")
    with pytest.raises(ConfigError, match="jaxsft-prepared: exists and was not made by jaxsft"):
        setting()
    assert setting.place.read_text() == "mine"
    setting.place.unlink()
    key = setting().key
    elsewhere = tmp_path / "elsewhere"
    (setting.place / key).rename(elsewhere)
    (elsewhere / "seal.json").write_text("[]")
    (setting.place / key).symlink_to(elsewhere)
    with pytest.raises(ConfigError, match=f"{key}: exists and was not made by jaxsft"):
        setting()
    assert (setting.place / key).is_symlink() and (elsewhere / "seal.json").read_text() == "[]"


def test_a_folder_that_was_made_but_not_marked_is_taken_up(setting):
    setting.place.mkdir(parents=True)
    (setting.place / f".jaxsft-{'a' * 32}.txt").write_text("Prep")
    setting()
    assert (setting.place / "jaxsft.txt").read_text() == cache.MARK_TEXT


def test_files_of_users_survive_in_damaged_data_that_are_prepared_anew(setting):
    first = setting()
    folder, expected = setting.place / first.key, np.array(first.tokens)
    (folder / "notes.txt").write_text("mine")
    (folder / "mine").mkdir()
    (folder / "mine" / "tokens.bin").write_text("mine")
    for damage in ("tokens.bin", "report.json", "seal.json"):
        (folder / damage).write_bytes(b"\0")
        again = setting()
        assert len(setting.said) == 1 and "damaged" in setting.said[0] and str(folder) in setting.said[0]
        np.testing.assert_array_equal(again.tokens, expected)
        setting()
        assert setting.said == [], "whole again"
    assert (folder / "notes.txt").read_text() == (folder / "mine" / "tokens.bin").read_text() == "mine"
    (folder / "tokens.bin").unlink()
    (folder / "tokens.bin").mkdir()
    with pytest.raises(ConfigError, match=r"tokens\.bin: exists and was not made by jaxsft"):
        setting()
    (folder / "tokens.bin").rmdir()
    os.mkfifo(folder / "tokens.bin")
    with pytest.raises(ConfigError, match=r"tokens\.bin: exists and was not made by jaxsft"):
        setting()


def test_prepared_data_of_before_are_left_where_they_are(setting):
    key = setting().key
    setting.place.rename(setting.cache / "before")
    (setting.cache / "before" / key).rename(setting.cache / key)
    before = tree(setting.cache / key)
    setting()
    assert tree(setting.cache / key) == before and (setting.place / key).is_dir()


def test_a_preparation_that_is_killed_anywhere_leaves_what_the_next_one_puts_right(setting, make_tokenizer):
    """Killed when it has opened so many files for writing, or renamed one."""
    expected = np.array(setting(seq_len=77).tokens)
    code = f"""
import builtins, os, sys, pathlib
sys.path[:0] = [{str(HELPERS)!r}]
from tiny_tokenizer import make_tokenizer
from jaxsft.config import DataConfig
from jaxsft.chat.encoder import ChatEncoder, stop_ids
from jaxsft.batches.prepare import prepare
config = DataConfig(train={str(setting.source)!r}, cache=sys.argv[1], seq_len=77)
tokenizer = make_tokenizer()
encoder = ChatEncoder(tokenizer, config, stop_ids(tokenizer))
left = [0]
def watch(event, args):
    if event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir") or event == "open" and args[2] & os.O_CREAT:
        left[0] += 1
        if pid and left[0] > stop:
            os._exit(9)
sys.addaudithook(watch)
pid = 0
for stop in range(0, 60):
    read, pid = None, os.fork()
    if pid == 0:
        pid, left[0] = 1, 0
        prepare(config, config.train[0], encoder, tokenizer_files_key="t")
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    pid = 0
    print(stop, os.waitstatus_to_exitcode(status), flush=True)
    if status == 0:
        break
"""
    place = setting.cache.with_name("killed")
    done = subprocess.run([sys.executable, "-c", code, str(place)], capture_output=True, text=True, check=True)
    codes = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(codes) > 10 and set(codes[:-1]) == {9} and codes[-1] == 0, done.stdout + done.stderr
    again = setting(place=place, seq_len=77)
    np.testing.assert_array_equal(again.tokens, expected)
    names = [path.name for path in (place / "jaxsft-prepared").iterdir() if path.name != again.key]
    empty = [name for name in names if name.startswith(".building-")]
    assert all(not any((place / "jaxsft-prepared" / name).iterdir()) for name in empty), "nothing but empty folders"


def test_processes_that_prepare_the_same_at_once_all_get_it(setting, tmp_path):
    """Also where each finds damaged data there, and replaces them."""
    expected = np.array(setting().tokens)
    folder = setting.place / setting().key
    for damaged in (False, True):
        if damaged:
            (folder / "tokens.bin").write_bytes(b"\0")
            (folder / "notes.txt").write_text("mine")
        results = []

        def work(results=results):
            results.append(setting())

        threads = [threading.Thread(target=work) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 5 and all(np.array_equal(each.tokens, expected) for each in results)
    assert (folder / "notes.txt").read_text() == "mine"
    assert not [path for path in setting.place.iterdir() if path.name.startswith(".building")]


def test_what_another_process_removes_while_a_damaged_folder_is_looked_at_is_nobodys(setting, monkeypatch):
    expected = np.array(setting().tokens)
    folder = setting.place / setting().key
    (folder / "tokens.bin").write_bytes(b"\0")
    listed = pathlib.Path.iterdir

    def removed_behind_the_list(path):
        for each in [*listed(path)]:
            if path == folder:
                each.unlink()
            yield each

    with monkeypatch.context() as patched:
        patched.setattr(pathlib.Path, "iterdir", removed_behind_the_list)
        assert np.array_equal(setting().tokens, expected)
    assert any("damaged" in text for text in setting.said) and cache.load(folder) is not None
    (folder / "tokens.bin").unlink()
    (folder / "tokens.bin").symlink_to(setting.place / "nowhere")
    with pytest.raises(ConfigError, match="tokens.bin: exists and was not made by jaxsft"):
        setting()


def test_a_full_disk_is_one_clear_error_and_leaves_nothing_behind(setting):
    code = f"""
import resource, signal, sys, pathlib
sys.path[:0] = [{str(HELPERS)!r}]
from tiny_tokenizer import make_tokenizer
from jaxsft.config import DataConfig
from jaxsft.chat.encoder import ChatEncoder, stop_ids
from jaxsft.batches.prepare import prepare
from jaxsft.disk.writing import WriteError
config = DataConfig(train={str(setting.source)!r}, cache={str(setting.cache)!r})
tokenizer = make_tokenizer()
encoder = ChatEncoder(tokenizer, config, stop_ids(tokenizer))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for most in (100, 500, 1000, 2500):
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
    try:
        prepare(config, config.train[0], encoder, tokenizer_files_key="t")
    except WriteError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 4, done
    for line in lines:
        assert line.startswith(f"{setting.place}/.building-") and "could not be written: File too large" in line
        assert ("bytes needed" in line or "building.lock" in line) and "bytes free" in line
    assert os.listdir(setting.place) == ["jaxsft.txt"]


def test_a_cache_that_cannot_be_made_is_one_clear_error(setting, tmp_path):
    (tmp_path / "file").write_text("mine")
    for place, reason in ((tmp_path / "file", "Not a directory"), (pathlib.Path("/proc/jaxsft"), "No such file")):
        with pytest.raises(WriteError, match=f"{place}/jaxsft-prepared: could not be written: {reason}"):
            setting(place=place)
    assert (tmp_path / "file").read_text() == "mine"
