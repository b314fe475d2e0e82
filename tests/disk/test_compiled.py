"""Compiled programs on disk: found again, the same to the bit, and neither parts of them nor foreign files do harm."""

import os
import pathlib
import subprocess
import sys

import pytest

from jaxsft.disk import compiled

PROGRAM = """
import os, sys
from jaxsft.disk.compiled import VARIABLE, keep_compiled
keep_compiled(print)
import jax, jax.numpy as jnp
x = jnp.sin(jnp.arange(64 * 64, dtype=jnp.float32)).reshape(64, 64)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith("/cache_hits")))
product = jax.jit(lambda x: jnp.tanh(x @ x.T).sum())
print(float(product(x)).hex(), sum(hits), os.environ.get(VARIABLE), sep=";")
"""


@pytest.fixture
def environment(tmp_path):
    """Of a user who has set nothing, but for a low limit: these programs compile in less than a second."""
    kept = {name: value for name, value in os.environ.items() if name not in (compiled.VARIABLE, "XLA_FLAGS")}
    return kept | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


@pytest.fixture
def start(environment):
    """Starts the program; returns its result, how many programs it found, where, and what it said besides."""

    def start(**more):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment | more, capture_output=True, text=True, check=True
        )
        *said, last = done.stdout.splitlines()
        result, hits, folder = last.split(";")
        return result, int(hits), folder, said, done.stderr

    return start


def entries(folder):
    return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir() if path.name.endswith("-cache")}


def test_the_next_start_finds_the_programs_and_computes_the_same_bits(start, environment, tmp_path):
    first, no_hits, folder, said, _ = start()
    assert no_hits == 0 and said == []
    assert pathlib.Path(folder) == tmp_path / "cache" / "jaxsft" / "compiled" / compiled.machine()
    assert pathlib.Path(folder).stat().st_mode & 0o077 == 0
    kept = entries(folder)
    assert kept
    assert start()[:4] == (first, 1, folder, []) and entries(folder) == kept
    without = {**environment, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    assert start(**without)[:2] == (first, 0)


def test_what_a_killed_process_or_a_full_disk_leaves_is_removed_and_compiled_once_more(start):
    """A write that is cut off leaves the beginning of a file; and one that was damaged cannot be unpacked."""
    first, _, folder, _, _ = start()
    kept = entries(folder)
    (name,) = [name for name in kept if "lambda" in name]
    packed, middle = kept[name], len(kept[name]) // 2
    parts = {f"jit_{number}-{'0' * 64}-cache": packed[:number] for number in (0, 1, 2, 64, len(packed) - 1)}
    if packed.startswith(b"\x78"):  # zlib, which has a checksum; zstd, where jax finds it, is packed without.
        damaged = packed[:middle] + bytes([packed[middle] ^ 4]) + packed[middle + 1 :]
        parts[f"jit_damaged-{'0' * 64}-cache"] = damaged
    for other, part in {**parts, name: packed[:middle]}.items():
        (pathlib.Path(folder) / other).write_bytes(part)
    result, hits, _, said, errors = start()
    assert (result, hits, said) == (first, 0, []) and "compilation cache" not in errors
    assert entries(folder).keys() == kept.keys()
    assert start()[:2] == (first, 1)


def test_only_programs_are_removed_and_only_from_a_folder_of_ours(start):
    _, _, folder, _, _ = start()
    folder = pathlib.Path(folder)
    others = ["notes.txt", "jit_f-cache", f"jit_f-{'0' * 64}-atime", ".lockfile"]
    for name in others:
        (folder / name).write_bytes(b"")
    outside = folder.parent / "outside"
    outside.write_bytes(b"")
    link = folder / f"jit_f-{'1' * 64}-cache"
    link.symlink_to(outside)
    part = folder / f"jit_f-{'2' * 64}-cache"
    part.write_bytes(b"")
    start()
    assert all((folder / name).exists() for name in others) and link.is_symlink() and not part.exists()

    (folder / compiled.MARK).unlink()
    part.write_bytes(b"")
    _, hits, variable, (said,), _ = start()
    assert part.exists() and hits == 0 and variable == "None"
    assert said == (
        f"compiled programs are not kept for the next start: {folder}: exists and was not made by jaxsft; move it away"
    )


def test_where_the_folder_cannot_be_made_or_is_open_to_others_the_run_goes_on_without(start, tmp_path):
    first, _, folder, _, _ = start()
    pathlib.Path(folder).chmod(0o777)
    result, hits, variable, (said,), _ = start()
    assert (result, hits, variable) == (first, 0, "None") and "not a folder that only this user writes into" in said
    (tmp_path / "file").write_text("")
    result, _, variable, (said,), _ = start(XDG_CACHE_HOME=str(tmp_path / "file"))
    assert (result, variable) == (first, "None")
    assert said.startswith("compiled programs are not kept for the next start: ") and "Not a directory" in said


def test_a_folder_that_the_user_gave_to_jax_is_taken_and_nothing_of_ours_is_made(start, tmp_path):
    part = tmp_path / "theirs" / f"jit_f-{'0' * 64}-cache"
    part.parent.mkdir()
    part.write_bytes(b"")
    _, _, folder, said, _ = start(JAX_COMPILATION_CACHE_DIR=str(part.parent))
    assert folder == str(part.parent) and said == []
    assert part.exists() and len(entries(folder)) > 1
    assert not (tmp_path / "cache").exists()
    assert start(JAX_COMPILATION_CACHE_DIR="")[1:4] == (0, "", [])  # None at all.
    assert not (tmp_path / "cache").exists()


def test_processes_that_start_at_once_get_along(environment, start):
    command = [sys.executable, "-c", PROGRAM]
    begun = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = [process.communicate()[0].strip().split(";") for process in begun]
    assert all(process.returncode == 0 for process in begun)
    assert len({(result, folder) for result, _, folder in said}) == 1
    assert start()[:3] == (said[0][0], 1, said[0][2])


def test_a_part_that_another_process_has_removed_meanwhile_is_nothing(tmp_path, monkeypatch):
    (tmp_path / compiled.MARK).write_text(compiled.MARK_TEXT)
    os.utime(tmp_path / compiled.MARK, (0, 0))
    parts = [tmp_path / f"jit_{number}-{'0' * 64}-cache" for number in range(3)]
    for part in parts:
        part.write_bytes(b"")
    listed = pathlib.Path.iterdir

    def removed_behind_the_list(path):
        for each in sorted(listed(path)):
            if each == parts[0]:
                each.unlink()
            yield each

    with monkeypatch.context() as patched:
        patched.setattr(pathlib.Path, "iterdir", removed_behind_the_list)
        compiled._remove_parts(tmp_path)
    assert not any(part.exists() for part in parts)


def test_a_program_is_looked_at_once(tmp_path):
    folder = tmp_path / "folder"
    compiled._claim(folder)
    part = folder / f"jit_f-{'0' * 64}-cache"
    part.write_bytes(b"")
    long_ago = (folder / compiled.MARK).stat().st_mtime - 2 * compiled._MARGIN
    os.utime(part, (long_ago, long_ago))
    compiled._remove_parts(folder)
    assert part.exists()
    os.utime(part)
    compiled._remove_parts(folder)
    assert not part.exists()


def test_a_run_with_programs_of_an_earlier_one_ends_with_the_same_weights_to_the_bit(
    environment, tiny_config, tmp_path
):
    ends = []
    for number in range(2):
        few = ["train.steps=3", "eval.samples=0", "eval.examples=2", f"run_dir={tmp_path}/run{number}"]
        command = [sys.executable, "-m", "jaxsft", "train", str(tiny_config), *few]
        subprocess.run(command, env=environment, capture_output=True, check=True)
        kept = {name for name in entries(tmp_path / "cache" / "jaxsft" / "compiled" / compiled.machine())}
        ends.append(((tmp_path / f"run{number}" / "export" / "model.safetensors").read_bytes(), kept))
    assert ends[0] == ends[1] and any(name.startswith("jit_train_step-") for name in ends[0][1])
