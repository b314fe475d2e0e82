"""Files that a thread writes are the bytes that were given, and what goes wrong is told when they are closed."""

import pathlib

import numpy as np
import pytest
from etils import epath

from jaxsft.disk.seal import checksum
from jaxsft.folders.weights.beside import BLOCK_BYTES, file_beside


def test_it_holds_the_bytes_of_all_arrays_and_knows_their_sum(tmp_path):
    numbers = np.random.default_rng(0).integers(0, 255, BLOCK_BYTES + 3, dtype=np.uint8)
    pieces = [numbers, np.array(3.5), np.zeros((3, 0)), np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1)]
    with file_beside(tmp_path / "file") as out:
        for piece in pieces:
            out.write(piece)
    assert (tmp_path / "file").read_bytes() == b"".join(piece.tobytes() for piece in pieces)
    assert out.entry == checksum(epath.Path(tmp_path / "file"))


@pytest.mark.parametrize(("path", "reason"), [("/none/here", "No such file"), ("/dev/full", "No space left")])
def test_who_writes_is_never_held_up_by_what_fails(path, reason):
    given = 0
    with pytest.raises(OSError, match=reason), file_beside(pathlib.Path(path)) as out:
        for _ in range(20):
            out.write(np.zeros(10, np.uint8))
            given += 1
    assert given == 20
