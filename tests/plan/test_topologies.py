"""Topologies by their names, and what stands in the way of the others."""

import pytest

from jaxsft.config import ConfigError
from jaxsft.plan.topologies import read_topology


@pytest.mark.parametrize(
    ("name", "slices", "chip", "chips"),
    [("v6e:8x8", 1, "v6e", 64), ("v5p:8x8x4", 2, "v5p", 512), ("H100:16", 1, "h100", 16), ("h200:1", 1, "h200", 1)],
)
def test_a_topology_has_its_chips(name, slices, chip, chips):
    found = read_topology(name, num_slices=slices)
    assert found.chip.name == chip and found.num_chips == chips


def test_of_cpus_nothing_is_known():
    assert read_topology("cpu:4").chip is None and read_topology("cpu:4").num_chips == 4


@pytest.mark.parametrize(
    ("name", "slices", "said"),
    [
        ("v6:8x8", 1, "no such chip; did you mean v6e"),
        ("x100:8", 1, r"no such chip; did you mean .100\?"),
        ("tesla", 1, r"no such chip \(known: v4, v5e"),
        ("v6e", 1, "expected v6e: and sizes joined by x, such as 8x8"),
        ("v6e:8x", 1, "sizes joined by x"),
        ("v6e:0x8", 1, "sizes joined by x"),
        ("h100:2x4", 1, "expected h100: and a number of devices"),
        ("h100:12", 1, "more than one host of h100 has 8 each"),
        ("h100:8", 2, "only TPUs have slices; give h100:16"),
    ],
)
def test_what_is_no_topology_is_one_sentence(name, slices, said):
    with pytest.raises(ConfigError, match=said):
        read_topology(name, num_slices=slices)
