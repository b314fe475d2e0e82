"""Meshes over TPU topologies, by what the TPU's own library says of them; no TPU is there, and nothing is compiled."""

import functools
import itertools
import math
import random

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from meshes import factorisations

from jaxsft.config import ConfigError, MeshConfig
from jaxsft.mesh import (
    AXES,
    TOKEN_AXES,
    check_divisible,
    constrain,
    free_axes,
    make_mesh,
    mesh_shape,
    partition_spec,
    slices_of,
)

FLAT = ["2x2", "2x4", "2x8", "2x16", "4x4", "4x8", "4x16", "8x8", "8x16", "16x16"]
CUBES = [
    "x".join(map(str, sides))
    for sides in itertools.combinations_with_replacement((1, 2, 4, 8, 16), 3)
    if sides[1] > 1 and math.prod(sides) <= 256
]
NAMES = [f"{kind}:{shape}" for kind in ("v5e", "v6e") for shape in FLAT]
NAMES += [f"{kind}:{shape}" for kind in ("v4", "v5p", "tpu7x") for shape in CUBES]


@pytest.fixture(scope="module")
def topology():
    """The devices of a topology, such as `v6e:8x8`, over a number of slices."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    def devices(name, num_slices=1):
        options = {} if num_slices == 1 else {"num_slices": num_slices}
        return topologies.get_topology_desc(platform="tpu", topology_name=_known(name), **options).devices

    with pytest.MonkeyPatch.context() as patch:
        # It asks no server who it is, and may be loaded by several processes of the tests.
        for variable in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
            patch.setenv(variable, "1")
        yield devices


def _known(name):
    """The name with its sides as the library takes them: the 1 of a flat cube stands last."""
    kind, _, sides = name.partition(":")
    return f"{kind}:{'x'.join(sorted(sides.split('x'), key=lambda side: (side == '1', int(side))))}"


def mesh_of(devices, shape):
    return make_mesh(MeshConfig(**dict(zip(AXES, shape, strict=True))), devices).devices


def assert_all_there(mesh, devices, shape):
    assert mesh.shape == tuple(shape)
    assert sorted(device.id for device in mesh.flat) == sorted(device.id for device in devices)


@pytest.mark.parametrize("name", NAMES)
def test_every_topology_takes_axes_of_every_size(topology, name):
    """Each pair of axes in every size, and twenty other factorisations."""
    devices = topology(name)
    shapes = list(factorisations(len(devices), 5))
    pairs = [shape for shape in shapes if sum(size > 1 for size in shape) <= 2]
    chance = random.Random(name)
    for shape in [*pairs, *chance.sample(shapes, min(20, len(shapes)))]:
        assert_all_there(mesh_of(devices, shape), devices, shape)


@pytest.mark.parametrize("name", ["v6e:8x8", "v5p:4x4x4", "v4:2x4x4"])
def test_a_topology_takes_every_factorisation(topology, name):
    devices = topology(name)
    for shape in factorisations(len(devices), 5):
        assert_all_there(mesh_of(devices, shape), devices, shape)


@pytest.mark.parametrize("name", ["v4:2x4x4", "tpu7x:2x4x4"])
@pytest.mark.parametrize("axes", [{"tensor": 4}, {"context": 8}, {"expert": 2, "tensor": 2}, {}], ids=str)
def test_the_two_devices_of_a_chip_are_neighbours_along_the_innermost_axis(topology, name, axes):
    mesh = make_mesh(MeshConfig(**axes), topology(name)).devices
    inner = max(axis for axis, size in enumerate(mesh.shape) if size > 1)
    pairs = np.moveaxis(mesh, inner, -1).reshape(-1, 2)
    assert all(one.coords == other.coords and one.core_on_chip < other.core_on_chip for one, other in pairs)


@pytest.mark.parametrize(("name", "num_slices"), [("v5e:4x4", 2), ("v5p:2x2x4", 4), ("v4:2x2x2", 2), ("v6e:2x2", 3)])
def test_slices_are_crossed_by_the_data_axis_alone_where_it_is_left_out(topology, name, num_slices):
    devices = topology(name, num_slices)
    for axes in ({}, {"tensor": 2}, {"context": 2, "tensor": 2}):
        mesh = make_mesh(MeshConfig(**axes), devices)
        assert mesh.shape["data"] == num_slices
        for copy in mesh.devices:
            assert len({device.slice_index for device in copy.flat}) == 1
    for shape in factorisations(len(devices), 5):
        assert_all_there(mesh_of(devices, shape), devices, shape)


def test_without_copies_the_next_axis_crosses_the_slices_and_the_inner_ones_stay_in_theirs(topology):
    devices = topology("v5e:4x4", 2)
    whole = make_mesh(MeshConfig(data=1, tensor=4), devices).devices
    assert whole.shape == (1, 8, 1, 1, 4)
    assert [[device.slice_index for device in row[0, 0]] for row in whole[0]] == [[0] * 4] * 4 + [[1] * 4] * 4
    given = make_mesh(MeshConfig(fsdp=32), devices)
    assert dict(given.shape) == {"data": 1, "fsdp": 32, "expert": 1, "context": 1, "tensor": 1}


def test_slices_of_different_sizes_are_refused_by_name(topology):
    devices = topology("v5e:4x4", 2)
    with pytest.raises(ConfigError, match="slice 0 has 16, slice 1 has 15 devices; expected as many in each slice"):
        slices_of(devices[:-1])


def test_sizes_that_do_not_fit_are_refused_with_those_that_do():
    with pytest.raises(ConfigError, match=r"tensor 3 does not fit 8 devices: .* each is one of 1, 2, 4, 8 \("):
        mesh_shape(MeshConfig(tensor=3), 8)
    with pytest.raises(ConfigError, match="tensor 16 does not fit 8 devices"):
        mesh_shape(MeshConfig(tensor=16), 8)
    with pytest.raises(ConfigError, match="fsdp 4 does not fit 8 devices"):
        mesh_shape(MeshConfig(fsdp=4), 8)
    assert mesh_shape(MeshConfig(fsdp=4), 8, num_slices=2)["data"] == 2


def test_axes_that_are_under_way_by_hand_are_named_no_more():
    seen = {}

    def look(x, name):
        seen[name] = free_axes(TOKEN_AXES), partition_spec("b t d"), partition_spec("v d", over=("tensor",))
        return constrain(x, "b t")

    def both(x):
        inside = functools.partial(look, name="inside")
        spec = PartitionSpec("data")
        return jax.shard_map(inside, in_specs=spec, out_specs=spec, axis_names={"data"})(look(x, "outside"))

    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        jax.jit(both).lower(jax.ShapeDtypeStruct((8, 4), np.float32))
    table = PartitionSpec("tensor", None)
    rows = PartitionSpec(("data", "fsdp", "expert"), "context", None)
    assert seen["outside"] == (("data", "fsdp", "expert", "context"), rows, table)
    rows = PartitionSpec(("fsdp", "expert"), "context", None)
    assert seen["inside"] == (("fsdp", "expert", "context"), rows, table)


def test_a_mesh_axis_cuts_one_dim_of_a_weight_and_no_other():
    width = ("fsdp", "expert", "context")
    assert partition_spec("l d n h") == PartitionSpec(None, width, "tensor", None)
    assert partition_spec("v d") == PartitionSpec("tensor", width)
    assert partition_spec("l e d f") == PartitionSpec(None, "expert", ("fsdp", "context"), "tensor")
    assert partition_spec("l e f d") == PartitionSpec(None, "expert", "tensor", ("fsdp", "context"))
    assert partition_spec("l d e") == PartitionSpec(None, width, None)


def test_widths_are_refused_by_the_axes_that_cut_them():
    """Of experts, `expert` cuts the number: so a width of 12 fits, which it does not elsewhere."""

    def weight(axes, *shape):
        return nnx.Param(jax.ShapeDtypeStruct(shape, np.float32), axes=axes)

    mesh = make_mesh(MeshConfig(fsdp=2, expert=4))
    experts = {"up": weight("l e d f", 2, 16, 12, 3)}
    check_divisible(mesh, experts, {})
    with pytest.raises(ConfigError) as refused:
        check_divisible(mesh, experts | {"q": weight("l d n h", 2, 12, 1, 5)}, {"train.batch_size (b)": 4})
    assert str(refused.value).splitlines()[1:] == [
        "  q: model width is 12, not a multiple of 8 (mesh.fsdp 2 x mesh.expert 4)",
        "  train.batch_size: number of rows is 4, not a multiple of 8 (mesh.fsdp 2 x mesh.expert 4)",
    ]
