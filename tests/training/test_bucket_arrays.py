"""Arrays in a bucket come back as they were, on any mesh, and each device's part is read and no more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxsft.disk.buckets import BucketPath
from jaxsft.training.bucket_arrays import BucketArrays


def arrays(mesh, cuts):
    values = {
        "matrix": jnp.arange(64 * 32, dtype=jnp.float32).reshape(64, 32),
        "stack": jnp.arange(6 * 8 * 4, dtype=jnp.bfloat16).reshape(6, 8, 4),
        "copies": jnp.linspace(0, 1, 8, dtype=jnp.float32),
        "number": jnp.int32(7),
        "nothing": jnp.zeros((0, 4)),
        "four bits": jnp.arange(8).astype(jnp.int4),
    }
    return {
        name: jax.device_put(value, NamedSharding(mesh, cuts.get(name, PartitionSpec())))
        for name, value in values.items()
    }


def abstract(leaves):
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for name, leaf in leaves.items()}


@pytest.fixture
def saved():
    folder = BucketPath("memory://data/arrays/state")
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    cuts = {
        "matrix": PartitionSpec("a", "b"),
        "stack": PartitionSpec(None, "a", "b"),
        "four bits": PartitionSpec("a"),
    }
    leaves = arrays(mesh, cuts)
    saver = BucketArrays()
    saver.save(folder, leaves)
    saver.wait()
    yield folder, leaves, saver
    saver.close()
    folder.rmtree()


def test_they_come_back_on_the_same_mesh_on_another_and_on_one_device(saved):
    folder, leaves, saver = saved
    other = jax.make_mesh((2, 4), ("a", "b"))
    cuts = {"matrix": PartitionSpec("b"), "stack": PartitionSpec(None, "b", "a")}
    alone = jax.make_mesh((1,), ("a",), devices=jax.devices()[:1])
    for target in (leaves, arrays(other, cuts), arrays(alone, {})):
        found = saver.restore(folder, abstract(target))
        for name, leaf in leaves.items():
            assert found[name].dtype == leaf.dtype and found[name].sharding == target[name].sharding
            np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(leaf), err_msg=name)


def test_of_copies_one_is_written_and_of_parts_what_is_needed_is_read(saved, monkeypatch):
    folder, leaves, saver = saved
    assert sum(each.stat().length for each in folder.files()) == sum(
        np.asarray(leaf).nbytes for leaf in leaves.values()
    )
    read = []
    real = BucketPath.read_range

    def read_range(self, start, count):
        read.append(count)
        return real(self, start, count)

    monkeypatch.setattr(BucketPath, "read_range", read_range)
    saver.restore(folder, abstract(leaves))
    assert sum(read) == sum(np.asarray(leaf).nbytes for leaf in leaves.values())


def test_a_part_that_is_gone_or_short_is_an_error(saved):
    folder, leaves, saver = saved
    part = next(each for each in folder.files() if each.name == "1.0-16_16-32" or each.name.endswith(".16-32_0-16"))
    whole = part.read_bytes()
    part.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="bytes from 0 on, expected"):
        saver.restore(folder, abstract(leaves))
    part.unlink()
    with pytest.raises(ValueError, match="numbers of 256 are there at"):
        saver.restore(folder, abstract(leaves))


def test_what_is_saved_is_a_copy(saved):
    folder, _, saver = saved
    value = jax.device_put(np.zeros(2**20, np.float32))
    saver.save(folder / "more", {"x": value})
    value.delete()  # as a step does that it is donated to
    saver.wait()
    assert sum(each.stat().length for each in (folder / "more").files()) == 2**22
