"""Objects in a bucket behave as files do on a disk, wherever the bucket is, and what fails is one error."""

import itertools
import logging
import os
import pathlib
import pickle
import re
import socket
import sys

import pytest
from etils import epath
from object_store import start_store

from jaxsft.cli import main
from jaxsft.config import ConfigError
from jaxsft.config_files import config_keys
from jaxsft.disk import buckets
from jaxsft.disk.buckets import BucketError, BucketPath
from jaxsft.disk.locks import Lock
from jaxsft.disk.seal import problem_of, remove_sealed, seal
from jaxsft.disk.writing import WriteError, append, place, refuse_others, set_aside, write_whole

NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def s3():
    for _ in start_store():
        yield "s3://data"


@pytest.fixture(scope="module")
def gs():
    pytest.importorskip("gcsfs", reason="needs jaxsft[buckets]")
    server = pytest.importorskip("gcp_storage_emulator.server", reason="needs gcp-storage-emulator")
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it has no credentials, and needs none here
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = server.create_server("127.0.0.1", port, in_memory=True, default_bucket="data")
    running.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        yield "gs://data"
    running.stop()


@pytest.fixture(params=["memory", "s3", "gs", "file"])
def folder(request, tmp_path):
    """A place where nothing is yet, in each kind of store."""
    if request.param == "file":
        return place(f"file://{tmp_path}/run")
    root = "memory://data" if request.param == "memory" else request.getfixturevalue(request.param)
    return place(f"{root}/run{next(NUMBERS)}")


def test_a_path_in_a_bucket_is_taken_apart_and_put_together_as_one_on_a_disk():
    path = BucketPath("s3://data/run") / "a" / "b.txt"
    assert str(path) == os.fspath(path) == "s3://data/run/a/b.txt"
    assert (path.name, path.suffix, str(path.parent)) == ("b.txt", ".txt", "s3://data/run/a")
    assert str(path.relative_to(BucketPath("s3://data/run"))) == "a/b.txt"
    assert str(path.with_name("c")) == "s3://data/run/a/c"
    assert BucketPath("s3://data", "run", "a/b.txt") == path == epath.Path(path) == pickle.loads(pickle.dumps(path))
    assert len({path, BucketPath(str(path))}) == 1 and path != BucketPath("gs://data/run/a/b.txt")
    assert path.resolve() == path and path.is_absolute() and not path.is_symlink()


def test_objects_are_written_read_listed_renamed_and_removed(folder, tmp_path):
    assert not folder.exists() and not folder.is_dir()
    folder.mkdir(parents=True)
    write_whole(folder / "a.txt", "one\n")
    append(folder / "a.txt", b"two\n")
    append(folder / "sub.log", b"first\n")
    large = os.urandom(buckets.SMALL_BYTES + 10)
    (folder / "sub").mkdir()
    (folder / "sub" / "large.bin").write_bytes(large)
    assert (folder / "a.txt").read_text() == "one\ntwo\n" and folder.is_dir() and (folder / "a.txt").is_file()
    assert sorted(each.name for each in folder.iterdir()) == ["a.txt", "sub", "sub.log"]
    assert [each.name for each in folder.glob("a*")] == ["a.txt"]
    with (folder / "sub" / "large.bin").open("rb") as file:
        file.seek(buckets.SMALL_BYTES)
        assert file.read() == large[-10:] and file.read() == b""
        file.seek(5)
        assert file.read(7) == large[5:12]
    with pytest.raises(FileExistsError):
        folder.mkdir()
    with pytest.raises(FileNotFoundError):
        (folder / "none").read_bytes()
    aside = set_aside(folder)
    assert aside.name == f"{folder.name}.before-1" and not folder.exists()
    assert (aside / "sub" / "large.bin").read_bytes() == large
    (aside / "a.txt").replace(aside / "sub" / "b.txt")
    assert sorted(each.name for each in (aside / "sub").iterdir()) == ["b.txt", "large.bin"]
    (aside / "none").unlink(missing_ok=True)
    with pytest.raises(ConfigError, match="was not written by jaxsft"):
        refuse_others(aside / "sub.log", b"a mark")


def test_a_seal_finds_a_changed_object_and_removes_no_other(folder):
    folder.mkdir(parents=True)
    for name in ("a", "b"):
        (folder / name).write_bytes(name.encode() * 1000)
    seal(epath.Path(folder))
    assert problem_of(epath.Path(folder)) is None
    (folder / "b").write_bytes(b"b" * 999 + b"c")
    (folder / "other").write_bytes(b"")
    assert "first b: 1,000 bytes" in problem_of(epath.Path(folder))
    remove_sealed(epath.Path(folder), to_the_byte=True)
    assert sorted(each.name for each in folder.iterdir()) == ["b", "other"]


def test_a_lock_in_a_bucket_keeps_others_out_until_it_is_given_back():
    path = BucketPath(f"memory://data/run{next(NUMBERS)}/run.lock")
    first, second = (Lock(path, renew_seconds=0.05, dead_seconds=0.4) for _ in range(2))
    first.acquire()
    with pytest.raises(ConfigError, match="in use by process"):
        second.acquire()
    first.check()
    first.release()
    assert not path.exists()
    second.acquire()
    second.release()


class Flaky:
    """A store whose first calls fail as those over a bad connection do."""

    def __init__(self, failures):
        self.failures, self.calls = failures, 0

    def __call__(self):
        self.calls += 1
        if self.calls <= self.failures:
            raise ConnectionResetError(104, "Connection reset by peer")
        return "done"


def test_a_call_that_fails_is_tried_again_and_then_is_one_error(monkeypatch):
    waits = []
    monkeypatch.setattr(buckets.time, "sleep", waits.append)
    assert buckets._tried("s3://here/x", flaky := Flaky(len(buckets.DELAYS))) == "done"
    assert flaky.calls == len(buckets.DELAYS) + 1 and waits == list(buckets.DELAYS)
    with pytest.raises(BucketError, match=r"Connection reset by peer \(tried 7 times in 0 s\)"):
        buckets._tried("s3://here/x", Flaky(100))
    # Until it answers, each further thing is asked once.
    with pytest.raises(BucketError):
        buckets._tried("s3://here/y", once := Flaky(100))
    assert once.calls == 1
    assert buckets._tried("s3://here/y", Flaky(0)) == buckets._tried("s3://here/y", Flaky(3)) == "done"
    with pytest.raises(PermissionError):
        buckets._tried("s3://here/x", lambda: (_ for _ in ()).throw(PermissionError("no")))


TAKEN = {
    "run_dir": ["train"],
    "model.path": ["train", "model.path={}"],
    "model.tokenizer": ["train", "model.tokenizer={}"],
    "data.train.N.path": ["train", "data.train={}"],
    "data.eval.path": ["train", "data.eval={}"],
    "data.chat_template": ["train", "data.chat_template={}"],
    "data.cache": ["train", "data.cache={}"],
    "CONFIG of train": ["train {}"],
    "CONFIG of preview": ["preview {}"],
    "CONFIG of evaluate": ["evaluate {}"],
    "CONFIG of plan": ["plan {} --topology h100:1 --quick"],
    "run_dir of preview": ["preview"],
    "run_dir of evaluate": ["evaluate"],
    "MODEL of chat": ["chat {}"],
    "RUN of export": ["export {}"],
    "PATH of report": ["report {}"],
    "--out of report": ["report RUN --out {}"],
    "PATH of verify": ["verify {}"],
}
"""All that takes a path: config keys and arguments of commands."""


def command(words, address, tiny_config, tmp_path):
    verb, *overrides = words
    verb, *arguments = [word.replace("{}", address).replace("RUN", str(tmp_path)) for word in verb.split()]
    if verb in ("train", "preview", "evaluate") and not arguments:
        arguments = [str(tiny_config), f"run_dir={address}"] if not overrides else [str(tiny_config), "run_dir=run"]
    return [verb, *arguments, *(each.replace("{}", address) for each in overrides)]


def test_every_key_that_takes_a_path_is_in_the_table():
    words = r"folder|file\b|hub\b|bucket"
    takes = {key for key, kind, _, meaning in config_keys() if "str" in kind and re.search(words, meaning.lower())}
    assert takes - {"checkpoint.local_dir"} == {key for key in TAKEN if " " not in key}


@pytest.mark.parametrize("what", TAKEN)
def test_what_is_no_known_place_is_refused_in_a_sentence_and_nothing_is_made(
    what, tiny_config, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "s3fs", None)  # to Python, it is not there
    for address, reason in (
        ("hdfs://host/x", "hdfs:// is not known; expected a path on a disk, or one of gs://, s3://, file://"),
        ("s3://data/x", "s3:// needs the package s3fs: pip install 'jaxsft[buckets]'"),
        ("gs://", "names no bucket; expected gs://BUCKET/FOLDER"),
    ):
        assert main(command(TAKEN[what], address, tiny_config, tmp_path)) == 1
        (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert address in error and reason in error
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}
    assert not pathlib.Path("/s3:").exists() and not pathlib.Path("/hdfs:").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["train", "CONFIG", "run_dir=memory://data/x", "log.to=tensorboard"], "tensorboard writes to a disk"),
        (["train", "CONFIG", "run_dir=memory://data/x", "log.profile_steps=2"], "traces are written to a disk"),
        (["train", "CONFIG", "run_dir=x", "model.path=memory://data/m.gguf"], "no model folder there"),
        (["compare", "CONFIG", "run_dir=memory://data/x", "--baseline", "hf"], "on a disk only"),
        (["train", "CONFIG", "checkpoint.local_every=2", "checkpoint.local_dir=memory://data/x"], "is in a bucket"),
    ],
)
def test_what_no_bucket_can_hold_is_refused_before_anything_is_written(
    words, reason, tiny_config, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main([word.replace("CONFIG", str(tiny_config)) for word in words]) == 1
    assert reason in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [] and not BucketPath("memory://data/x").exists()


def test_a_write_that_fails_for_good_names_the_path_and_the_reason(monkeypatch):
    monkeypatch.setattr(buckets, "_filesystem", lambda scheme: None)
    monkeypatch.setattr(buckets, "DELAYS", ())

    def fail(self, call):
        raise BucketError(5, "no answer (tried 7 times in 32 s)", str(self))

    monkeypatch.setattr(BucketPath, "_tried", fail)
    with pytest.raises(WriteError, match=r"s3://data/a: could not be written: no answer \(tried 7 times in 32 s\)"):
        write_whole(BucketPath("s3://data/a"), b"")
