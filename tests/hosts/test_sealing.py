"""Seals over what several processes write: shares of about as many bytes, that all of them agree on."""

import pytest
from etils import epath

from jaxsft.disk.seal import Entry, checksums, problem_of, seal
from jaxsft.hosts.exchange import done_by_first, first_text, gather_texts
from jaxsft.hosts.sealing import problem_together, seal_together, shares


def test_shares_hold_each_file_once_and_about_as_many_bytes():
    entries = {f"file{number}": Entry(size, 0) for number, size in enumerate([50, 40, 30, 30, 20, 20, 5, 5, 0])}
    for count in (1, 2, 4, 20):
        found = shares(entries, count)
        assert len(found) == count and sorted(sum(found, [])) == sorted(entries)
        assert found == shares(dict(reversed(entries.items())), count), "in whatever order the seal has them"
    assert [sum(entries[name].size for name in share) for share in shares(entries, 4)] == [50, 50, 50, 50]


def test_one_process_seals_as_before_and_finds_the_same(tmp_path):
    for name in ("a", "b/c", "b/d"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(name.encode() * 1000)
    folder = epath.Path(tmp_path)
    seal(folder)
    before = (tmp_path / "seal.json").read_bytes()
    seal_together(folder, lambda: checksums(folder, within="b") | checksums(folder, but=["b"]))
    assert (tmp_path / "seal.json").read_bytes() == before
    assert problem_together(folder) is None
    (tmp_path / "b" / "c").write_bytes(b"other")
    assert problem_together(folder) == problem_of(folder) != None  # noqa: E711
    (tmp_path / "b" / "c").unlink()
    assert "nothing found" in problem_together(folder)


def test_what_goes_wrong_on_process_0_is_raised_as_it_is(tmp_path):
    def fail():
        raise FileExistsError(17, "is in the way")

    with pytest.raises(FileExistsError, match="is in the way"):
        done_by_first("test", fail)
    assert gather_texts("test", "alone") == ["alone"] and first_text("test", "") == ""
