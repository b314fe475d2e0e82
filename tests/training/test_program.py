"""What a compiled program sends, counted by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import AS_FOR_USERS, TO_READ
from jax.sharding import PartitionSpec

from jaxsft.config import MeshConfig
from jaxsft.mesh import make_mesh
from jaxsft.training.program import _axes, _groups, read_program, total_bytes

SIZES = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("data",)),
        ("replica_groups={}", ("data", "fsdp", "tensor")),
        ("replica_groups=[4,2]<=[8]", ("tensor",)),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", ("fsdp",)),
        ("replica_groups=[2,4]<=[2,4]T(0,1)", ("fsdp", "tensor")),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",)),
        ("replica_groups=mesh['a'=4,'b'=2] {'b'}", ("tensor",)),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", ("data", "fsdp")),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'c','a'}", ("data", "tensor")),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", ("tensor",)),
        ("source_target_pairs={{0,2},{2,0},{1,3},{3,1}}", ("fsdp",)),
    ],
)
def test_groups_are_along_the_axes_that_their_members_differ_in(text, axes):
    assert _axes(_groups(f"%x), channel_id=1, {text}, use_global_device_ids=true", SIZES), SIZES) == axes


def test_groups_in_an_unknown_form_are_no_guess():
    with pytest.raises(AssertionError, match="in no known form"):
        _groups("%x), replica_groups=new['a'=2] {'a'}", SIZES)


@functools.cache
def program():
    """A mesh of 8 devices, and a program for it with known collectives, lowered."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))

    def local(x):
        """x: float32 [4, 128] of [16, 256]."""
        with jax.named_scope("layers"):

            def body(i, x):
                gathered = jax.lax.all_gather(x, "fsdp", axis=0, tiled=True)  # [8, 128]: 4,096 bytes
                return jnp.sin(x) + jax.lax.psum_scatter(gathered, "fsdp", scatter_dimension=0, tiled=True)

            x = jax.lax.fori_loop(0, 5, body, x)
        with jax.named_scope("loss"):
            x = jnp.cos(x + jax.lax.psum(x, ("data", "tensor")))  # 2,048 bytes
            x = jax.lax.fori_loop(0, jnp.int32(x[0, 0]), lambda i, x: jax.lax.pmax(x, "tensor") + 1, x)
        return jnp.concatenate([x, jax.lax.ppermute(x, "data", [(0, 1), (1, 0)])])

    spec = PartitionSpec(("data", "fsdp"), "tensor")
    with jax.set_mesh(mesh):
        function = jax.jit(jax.shard_map(local, in_specs=spec, out_specs=spec, check_vma=False))
        return mesh, function.lower(jax.ShapeDtypeStruct((16, 256), jnp.float32))


@functools.cache
def report():
    mesh, lowered = program()
    return read_program(lowered.compile(TO_READ).as_text(), mesh.shape)


def test_what_tests_read_of_a_program_is_what_users_get():
    _, lowered = program()
    ours, theirs = lowered.compile(TO_READ), lowered.compile(AS_FOR_USERS)
    assert "fusion(" in ours.as_text() and ours.as_text() == theirs.as_text()
    assert ours.cost_analysis() == theirs.cost_analysis()
    assert ours.memory_analysis().temp_size_in_bytes == theirs.memory_analysis().temp_size_in_bytes


def test_collectives_are_counted_with_their_axes_and_bytes_and_the_turns_of_their_loops():
    assert total_bytes(report().collectives) == {
        ("layers", "all-gather", ("fsdp",)): (5, 5 * 4096),
        ("layers", "reduce-scatter", ("fsdp",)): (5, 5 * 4096),
        ("loss", "all-reduce", ("data", "tensor")): (1, 2048),
        # How often a loop runs whose end is computed is not known.
        ("loss", "all-reduce", ("tensor",)): (1, 2048),
        ("", "collective-permute", ("data",)): (1, 2048),
    }


def test_what_is_in_a_loop_whose_end_is_computed_says_so():
    assert {(each.scope, each.kind, each.axes) for each in report().collectives if each.is_open} == {
        ("loss", "all-reduce", ("tensor",))
    }


def test_the_largest_array_of_each_part_is_found():
    largest = {array.scope: array for array in report().arrays}
    assert largest["layers"].num_bytes == 4096 and largest["layers"].shape == "f32[8,128]"
    assert largest["loss"].num_bytes == 2048
    sizes = [array.num_bytes for array in report().arrays]
    assert sizes == sorted(sizes, reverse=True)


def test_what_a_fusion_makes_on_the_way_is_no_array():
    lowered = jax.jit(lambda x: jnp.sum(jnp.sin(x)[:, None] * jnp.cos(x))).lower(np.zeros(512, np.float32))
    (largest,) = read_program(lowered.compile(TO_READ).as_text(), {"data": 1}).arrays
    assert largest.num_bytes <= 4 * 512
