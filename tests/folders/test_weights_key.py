"""The key by which hosts compare weights without reading them all."""

import shutil

import numpy as np
from safetensors.numpy import save_file

from jaxsft.folders.weights.key import TENSORS_READ, weights_key
from jaxsft.folders.weights.stored import open_folder


def test_copies_have_one_key_and_another_model_has_another(tmp_path):
    values = {f"layers.{n}.weight": np.full((6, 300), n, np.float32) for n in range(3 * TENSORS_READ)}
    values |= {"scalar": np.array(1, np.float32), "empty": np.zeros((0, 4), np.float32)}
    one, copy, other = (tmp_path / name for name in ("one", "copy", "other"))
    one.mkdir()
    save_file(values, one / "model.safetensors")
    shutil.copytree(one, copy)
    other.mkdir()
    save_file({name: np.asarray(value + 1, np.float32) for name, value in values.items()}, other / "model.safetensors")
    key = weights_key(open_folder(one))
    assert weights_key(open_folder(copy)) == key
    assert weights_key(open_folder(other)) != key
    save_file(values | {"scalar": np.zeros(2, np.float32)}, other / "model.safetensors")
    assert weights_key(open_folder(other)) != key
