"""A model folder in a bucket and its mirror on this disk."""

import pytest

from jaxsft.disk.buckets import BucketPath
from jaxsft.folders.mirror import ORIGIN, mirror, origin_of


@pytest.fixture
def bucket():
    folder = BucketPath("memory://data/model")
    (folder / "config.json").write_bytes(b"{}")
    yield folder
    folder.rmtree()


def test_only_the_note_of_a_mirror_of_ours_says_where_weights_lie(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = mirror(bucket)
    assert (found / "config.json").read_bytes() == b"{}" and str(origin_of(found)) == str(bucket)
    other = tmp_path / "from the hub"
    other.mkdir()
    (other / ORIGIN).write_text("memory://data/model")
    assert origin_of(other) == other
