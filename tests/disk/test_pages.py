"""Pages, pictures, reports and what comparisons leave: whole or as before, and never in the place of another's file."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest
from etils import epath

from jaxsft.cli import main
from jaxsft.compare.child import run_child
from jaxsft.compare.exchange import LOCK, NOTE, exchange
from jaxsft.config import ConfigError
from jaxsft.config_files import load_config
from jaxsft.disk.pages import MARKS, refuse_other_pages, write_page
from jaxsft.disk.writing import WriteError, refuse_others
from jaxsft.report.curves import make_panels, plot
from jaxsft.report.page import FILES, write_report
from jaxsft.report.picture import plot_run
from jaxsft.report.records import Report, Run, from_json

OTHERS = {
    "of a user": b"kept by a user",
    "empty": b"",
    "of another program": b'<html><meta name="generator" content="WordPress 6"><title>jaxsft</title>',
    "a picture of matplotlib's": b"\x89PNG\r\n\x1a\n\0\0\0:tEXtSoftware\0Matplotlib version3.10, https://matplotlib.org/",
    "JSON": b'{"version": 1, "made_by": "someone"}',
    "with the mark too late": b" " * 5000 + b'<meta name="generator" content="jaxsft 1">{"made_by": "jaxsft"',
}


def a_report():
    lines = tuple({"step": step, "loss": 3 / step} for step in range(1, 6))
    run = Run("ours", "jaxsft", "here", lines, {}, {}, ())
    return Report("a title", "a command", "a verdict", None, (), (run,), (), {}, {}, {})


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2)))
    return folder


@pytest.fixture
def preview_config(tiny_config, tmp_path):
    return [str(tiny_config), f"run_dir={tmp_path}/runs/name"]


def content(folder):
    return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir() if path.is_file()}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
@pytest.mark.parametrize("name", FILES)
def test_a_report_is_never_written_over_another_s_file(tmp_path, name, other):
    (tmp_path / name).write_bytes(other)
    with pytest.raises(ConfigError, match=f"{name}: exists and was not written by jaxsft"):
        write_report(a_report(), tmp_path)
    assert content(tmp_path) == {name: other}, "and nothing beside it"


def test_a_report_is_written_over_its_own_and_its_twin_is_still_read(tmp_path):
    for _ in range(2):
        write_report(a_report(), tmp_path)
        assert sorted(content(tmp_path)) == sorted(FILES)
    made = json.loads((tmp_path / "report.json").read_text())
    assert made["made_by"] == "jaxsft" and from_json(made).title == "a title"


def test_all_files_in_the_way_are_named_before_any_run_is_read(tmp_path, capsys):
    for name in FILES:
        (tmp_path / name).write_text("mine")
    assert main(["report", str(tmp_path / "no-such-run"), "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert all(str(tmp_path / name) in said for name in FILES) and "no-such-run" not in said
    assert set(content(tmp_path).values()) == {b"mine"}


def test_a_link_or_a_folder_of_the_name_stays_what_it_is(tmp_path):
    target = tmp_path / "elsewhere.html"
    write_page(target, MARKS[".html"][0])
    for place in (target, tmp_path / "gone"):
        link = tmp_path / "report.html"
        link.symlink_to(place)
        with pytest.raises(ConfigError, match="report.html: exists"):
            write_page(link, MARKS[".html"][0] + b"new")
        assert link.is_symlink()
        link.unlink()
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ConfigError, match="folder.json: exists"):
        refuse_other_pages([tmp_path / "folder.json"])


def test_pages_of_the_version_before_the_mark_are_known_by_their_titles(tmp_path):
    for kind in ("report", "preview"):
        path = tmp_path / f"{kind}.html"
        path.write_text(f'<!doctype html>\n<html lang="en">\n<head>\n<title>x · jaxsft {kind}</title>')
        refuse_other_pages([path])
    path.write_text("<title>notes on jaxsft preview</title>")
    with pytest.raises(ConfigError):
        refuse_other_pages([path])


def test_the_picture_of_a_run_bears_the_mark_and_goes_over_no_other(run_folder):
    path = plot_run(epath.Path(run_folder))
    drawn = path.read_bytes()
    assert MARKS[".png"][0] in drawn[:4096]
    plot_run(epath.Path(run_folder))
    path.write_bytes(OTHERS["a picture of matplotlib's"])
    said = []
    plot_run(epath.Path(run_folder), say=said.append)
    assert path.read_bytes() == drawn
    assert path.with_name("loss.png.before-1").read_bytes() == OTHERS["a picture of matplotlib's"]
    assert len(said) == 1 and "loss.png.before-1" in said[0]


def test_the_preview_goes_over_no_other_page_and_says_so_before_it_reads_the_data(preview_config, tmp_path, capsys):
    page = tmp_path / "runs" / "name.preview.html"
    page.parent.mkdir()
    page.write_text("mine")
    arguments = ["preview", *preview_config, "data.train=/no/such/file.jsonl"]
    assert main(arguments) == 1
    assert f"{page}: exists and was not written by jaxsft" in capsys.readouterr().err
    assert page.read_text() == "mine"
    page.unlink()
    for _ in range(2):
        assert main(["preview", *preview_config]) == 0
    assert MARKS[".html"][0] in page.read_bytes()[:4096]


@pytest.mark.parametrize("name", [*FILES, "log.txt", "ours.txt"])
def test_a_comparison_is_refused_before_it_begins_where_a_file_is_in_its_way(preview_config, tmp_path, capsys, name):
    out = tmp_path / "runs" / "name.compare-hf"
    out.mkdir(parents=True)
    (out / name).write_text("mine")
    began = time.monotonic()
    assert main(["compare", *preview_config, "--baseline", "hf", "--steps", "1"]) == 1
    assert f"{out / name}: exists and was not written by jaxsft" in capsys.readouterr().err
    assert time.monotonic() - began < 60
    assert content(out) == {name: b"mine"} and list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("name", ["profile/summary.txt", "profile/step.hlo.txt"])
def test_a_run_does_not_begin_where_its_profile_would_go_over_another_s(tiny_config, tmp_path, name):
    from jaxsft.train import train

    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(ConfigError, match=f"{path.name}: exists and was not written by jaxsft"):
        train(load_config(tiny_config, [f"run_dir={tmp_path}/run", "log.profile_steps=1"]))
    assert path.read_text() == "mine" and [each.name for each in path.parent.iterdir()] == [path.name]


# Scratch folders.

BEGIN = """
import os, sys, time
from pathlib import Path
from jaxsft.compare.exchange import exchange
with exchange(Path(sys.argv[1])) as folder:
    (folder / "weights").mkdir()
    (folder / "weights" / "a").write_text("a")
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def begun(tmp_path):
    """Another comparison with the same folder, and its scratch folder."""
    process = subprocess.Popen([sys.executable, "-c", BEGIN, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    yield process, pathlib.Path(process.stdout.readline().strip())
    process.kill()
    process.wait()


def test_the_scratch_folder_of_a_living_comparison_stays_and_that_of_a_killed_one_goes(begun, tmp_path):
    process, scratch = begun
    assert (scratch / NOTE).exists()
    with exchange(tmp_path / "out"):
        assert (scratch / "weights" / "a").exists()
    process.kill()
    process.wait()
    said = []
    with exchange(tmp_path / "out", said.append) as own:
        assert not scratch.exists() and own.exists()
    assert not own.exists() and any(str(scratch) in text and "removed" in text for text in said)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_only_has_the_name_of_one_stays(begun, tmp_path):
    process, scratch = begun
    process.kill()
    process.wait()
    strangers = [tmp_path / f".out.exchange-{name}" for name in ("999999-x", "notes", "empty", "linked", "other")]
    for each in strangers[:3]:
        each.mkdir()
    (strangers[0] / "a.txt").write_text("mine")
    (strangers[1] / NOTE).write_text('{"made_by": "someone"}')
    strangers[3].symlink_to(tmp_path / "kept")
    shutil.copytree(scratch, tmp_path / "kept")
    shutil.copytree(scratch, strangers[4])
    (strangers[4] / NOTE).write_text((scratch / NOTE).read_text().replace('"out"', '"another"'))
    with exchange(tmp_path / "out"):
        pass
    assert all(each.exists() for each in strangers) and (tmp_path / "kept" / "weights" / "a").exists()
    assert not scratch.exists()


def test_a_scratch_folder_that_was_half_removed_is_removed_by_the_next(begun, tmp_path):
    process, scratch = begun
    process.kill()
    process.wait()
    shutil.rmtree(scratch / "weights")
    (scratch / LOCK).unlink()
    with exchange(tmp_path / "out"):
        assert not scratch.exists()


def test_only_what_children_printed_is_kept_and_no_other_text_of_the_exchange(tmp_path):
    out = tmp_path / "out"
    for _ in range(2):  # and it is ours the second time
        with pytest.raises(ConfigError, match="No module named"), exchange(out) as folder:
            (folder / "model").mkdir()
            (folder / "model" / "vocab.txt").write_text("a")
            run_child("jaxsft.nosuchmodule", folder, say=print)
    assert sorted(content(out)) == ["log.txt"] and b"No module named" in content(out)["log.txt"]


# No room.

LIMITED = """
import json, resource, signal, sys
from pathlib import Path
from etils import epath
from jaxsft.cli import main
limit, arguments = int(sys.argv[1]), sys.argv[2:]
import matplotlib.font_manager  # which writes a cache of its own
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
if arguments[0] == "picture":
    from jaxsft.report.picture import plot_run
    try:
        plot_run(epath.Path(arguments[1]))
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
elif arguments[0] == "exchange":
    from jaxsft.compare.exchange import exchange
    try:
        with exchange(Path(arguments[1])) as folder:
            (folder / "weights").write_bytes(bytes(100_000))
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
else:
    sys.exit(main(arguments))
"""


def limited(limit, *arguments):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", LIMITED, str(limit), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def assert_refused_for_room(done, path):
    assert done.returncode == 74, done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"{path}: could not be written" in said and "bytes free" in said
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", FILES)
def test_without_room_a_report_is_one_error_and_the_old_files_are_whole(run_folder, tmp_path, name):
    out = tmp_path / "out"
    arguments = ["report", str(run_folder), "--out", str(out)]
    assert main(arguments) == 0
    before = content(out)
    # Those that are smaller are written again, the same.
    done = limited(len(before[name]) - 1, *arguments)
    first = next(
        each for each in ("report.json", "curves.png", "report.html") if len(before[each]) >= len(before[name])
    )
    assert_refused_for_room(done, out / first)
    assert "bytes needed" in done.stderr
    assert content(out) == before


def test_without_room_the_picture_of_a_run_is_one_error_and_the_old_one_is_whole(run_folder):
    path = run_folder / "loss.png"
    plot_run(epath.Path(run_folder))
    before = content(run_folder)
    assert_refused_for_room(limited(4096, "picture", str(run_folder)), path)
    assert content(run_folder) == before


def test_without_room_the_preview_is_one_error_and_the_old_page_is_whole(preview_config, tmp_path):
    page = tmp_path / "runs" / "name.preview.html"
    assert main(["preview", *preview_config]) == 0
    before = content(page.parent)
    assert_refused_for_room(limited(4096, "preview", *preview_config), page)
    assert content(page.parent) == before


def test_without_room_for_the_exchange_it_is_one_error_and_nothing_is_left(tmp_path):
    done = limited(50_000, "exchange", str(tmp_path / "out"))
    assert done.returncode == 74 and "Traceback" not in done.stderr
    assert f"error: {tmp_path}/.out.exchange-" in done.stderr
    assert "could not be written: File too large (" in done.stderr and "bytes free" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_child_that_ends_for_want_of_room_is_an_error_of_the_disk(tmp_path, monkeypatch):
    (tmp_path / "full.py").write_text("raise OSError(28, 'No space left on device')\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with pytest.raises(WriteError, match=r"No space left on device \(.* bytes free\)"):
        run_child("full", tmp_path, say=print)


def test_a_page_in_a_place_that_cannot_be_made_is_one_error(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WriteError, match="file/out: could not be written: Not a directory"):
        write_report(a_report(), tmp_path / "file" / "out")


def test_a_picture_of_curves_bears_the_mark(tmp_path):
    panels = make_panels(a_report().runs, by="step", smooth=0)
    path = epath.Path(tmp_path / "curves.png")
    plot(panels, path, title="x")
    refuse_others(path, *MARKS[".png"])
