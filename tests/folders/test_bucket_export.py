"""Exports in a bucket, whenever the one before was killed; and what is somebody's stays."""

import functools

import pytest
from etils import epath

from jaxsft.disk.buckets import BucketPath
from jaxsft.disk.locks import Lock
from jaxsft.disk.seal import checksums, problem_of, write_seal
from jaxsft.folders import bucket_export
from jaxsft.folders.bucket_export import MARK_TEXT, UNFINISHED_MARK, begun, partial_of, put_in_place, send


@pytest.fixture
def folder(monkeypatch):
    monkeypatch.setattr(bucket_export, "Lock", functools.partial(Lock, renew_seconds=0.01))
    above = BucketPath("memory://data/exports")
    yield above / "model"
    above.rmtree()


def export(folder, made, text, said=None):
    made.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        (made / name).write_text(f"{name} {text}")
    say = [].append if said is None else said.append
    with begun(folder, say):
        sums = checksums(epath.Path(made))
        send(made, partial_of(folder), sums)
        write_seal(partial_of(folder), sums)
        put_in_place(folder, say)


def names(folder):
    return sorted(str(each.relative_to(folder.parent)) for each in folder.parent.files())


WHOLE = ["model/config.json", "model/model.safetensors", "model/seal.json"]


def test_one_takes_the_place_of_another_and_nothing_else_is_left(folder, tmp_path):
    said = []
    for text in ("first", "second"):
        export(folder, tmp_path / "made", text, said)
        assert (folder / "config.json").read_text() == f"config.json {text}"
        assert names(folder) == WHOLE and problem_of(folder) is None and said == []


def test_one_that_was_all_in_place_when_it_was_killed_stays(folder, tmp_path):
    export(folder, tmp_path / "made", "first")
    (folder / UNFINISHED_MARK).write_bytes(MARK_TEXT)
    with begun(folder, print):
        assert problem_of(folder) is None and not (folder / UNFINISHED_MARK).exists()
    export(folder, tmp_path / "made", "second")
    assert names(folder) == WHOLE


def test_a_copy_that_was_cut_off_is_removed_and_what_stands_beside_it_is_not(folder, tmp_path):
    export(folder, tmp_path / "made", "first")
    (folder / "seal.json").unlink()
    (folder / UNFINISHED_MARK).write_bytes(MARK_TEXT)
    (folder / "mine.txt").write_bytes(b"mine")
    (partial_of(folder) / UNFINISHED_MARK).write_bytes(MARK_TEXT)
    write_seal(partial_of(folder), checksums(epath.Path(tmp_path / "made")))
    said = []
    export(folder, tmp_path / "made", "second", said)
    assert names(folder) == ["model.before-1/mine.txt", *WHOLE] and "(mine.txt)" in said[0]


def test_what_is_not_ours_where_it_would_be_sent_is_left_alone(folder, tmp_path):
    export(folder, tmp_path / "made", "first")
    (partial_of(folder) / "mine.txt").write_bytes(b"mine")
    with pytest.raises(OSError, match="is in the way and no unfinished export of jaxsft"):
        export(folder, tmp_path / "made", "second")
    assert names(folder) == [".model.jaxsft-partial/mine.txt", *WHOLE]
    assert (folder / "config.json").read_text() == "config.json first"
