"""Files are whole or not there, and nothing of others is written over."""

import pathlib
import subprocess
import sys

import pytest
from etils import epath

from jaxsft.config import ConfigError
from jaxsft.disk.writing import WriteError, check_space, refuse_others, write_whole


@pytest.mark.parametrize("kind", [pathlib.Path, epath.Path])
def test_what_a_link_leads_to_is_never_written_into(tmp_path, kind):
    (tmp_path / "mine").write_text("important")
    for name in (".page.jaxsft-part", "page"):
        (tmp_path / name).symlink_to("mine")
    write_whole(kind(tmp_path) / "page", "new")
    assert (tmp_path / "page").read_text() == "new" and (tmp_path / "mine").read_text() == "important"


LIMITED = """
import resource, sys
from pathlib import Path
from jaxsft.disk.writing import write_whole
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
write_whole(Path(sys.argv[1]), b"new" * 1000)
"""


def test_where_there_is_no_room_the_old_file_stays_and_the_error_has_the_numbers(tmp_path):
    path = tmp_path / "page.html"
    write_whole(path, "old")
    done = subprocess.run([sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert f"{path}: could not be written" in last and "3,000 bytes needed" in last and "bytes free" in last
    assert path.read_text() == "old" and [each.name for each in tmp_path.iterdir()] == ["page.html"]


def test_what_will_not_fit_is_not_begun(tmp_path):
    with pytest.raises(WriteError, match=r"No space left on device \(1,000,000,000,000,000,000 bytes needed, .* free"):
        check_space(tmp_path / "not" / "there" / "yet", 10**18)
    check_space(tmp_path, 1)


def test_only_what_bears_our_mark_is_written_over(tmp_path):
    path = tmp_path / "report.html"
    refuse_others(path, b"ours")
    path.write_text("of a user")
    with pytest.raises(ConfigError, match="exists and was not written by jaxsft"):
        refuse_others(path, b"ours")
    path.write_text("<html>ours</html>")
    refuse_others(path, b"ours")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="exists and was not written by jaxsft"):
        refuse_others(tmp_path / "folder", b"ours")


def test_a_write_into_a_folder_that_is_not_there_names_the_file(tmp_path):
    with pytest.raises(WriteError, match="gone/a.json: could not be written: No such file"):
        write_whole(pathlib.Path(tmp_path / "gone" / "a.json"), "{}")
