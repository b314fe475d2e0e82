"""`benchmarks/gpu.py` without a GPU: what its cases would say of a kernel that is right, and of one that is not."""

import json
import sys

import cudnn_by_hand
import jax
import jax.numpy as jnp
import pytest

from jaxsft.config import MeshConfig
from jaxsft.mesh import make_mesh
from jaxsft.model import attention, cudnn
from jaxsft.model.needed import Rule


@pytest.fixture(scope="module")
def gpu(repo):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repo / "benchmarks"))
        import gpu

        yield gpu
        for name in [name for name in sys.modules if name.startswith("gpu")]:
            del sys.modules[name]


@pytest.fixture
def on_h100(monkeypatch):
    cudnn_by_hand.install()
    monkeypatch.setattr(attention, "platform_and_kind", lambda: ("gpu", "NVIDIA H100 80GB HBM3"))
    monkeypatch.setattr(cudnn, "device_capability", lambda: (9, 0))
    monkeypatch.setattr(cudnn.fused, "check_cudnn_version", lambda: 91000)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        yield


@pytest.mark.parametrize("rows", ["packed", "eight and no padding"])
def test_a_kernel_that_is_right_is_called_right(rows, gpu, on_h100):
    found = gpu.numbers(True)[0].run(heads=(4, 2, 16), window=5, rows=rows, length=64)
    assert found["is_right"] and found["sealed"] and found["repeats"], found
    assert found["segments"] == (4 if rows == "packed" else 8) and max(found["cudnn"]) < 0.01


def leak(rule, q, k, v, segment_ids, *, num_segments):
    return cudnn.cudnn_attention(rule, q, k, v, jnp.where(segment_ids == 2, 1, segment_ids), num_segments=num_segments)


def longer_window(rule, q, k, v, segment_ids, *, num_segments):
    rule = Rule(rule.scale, rule.window + 1, None)
    return cudnn.cudnn_attention(rule, q, k, v, segment_ids, num_segments=num_segments)


@pytest.mark.parametrize(("fault", "is_sealed"), [(leak, False), (longer_window, True)])
def test_a_kernel_that_is_wrong_is_called_wrong(fault, is_sealed, gpu, on_h100, monkeypatch):
    monkeypatch.setattr(attention, "cudnn_attention", fault)
    found = gpu.numbers(True)[0].run(heads=(4, 2, 16), window=5, rows="packed", length=64)
    assert not found["is_right"] and found["sealed"] == is_sealed


@pytest.mark.parametrize("is_small", [True, False])
def test_every_part_has_cases_and_each_line_can_be_read(is_small, gpu):
    for part, make in gpu.PARTS.items():
        cases = make(is_small)
        lines = [gpu.as_line(part, case, {"apart": float("nan")}) for case in cases]
        assert len(set(lines)) == len(lines) > 3
        assert {json.loads(line)["apart"] for line in lines} == {"nan"}


def test_a_case_that_ends_its_process_ends_no_other(gpu, monkeypatch, tmp_path):
    """The compiler aborts at a flag that it does not know."""
    cases = gpu.PARTS["loss"](True)
    broken = [cases[0]._replace(environment={"XLA_FLAGS": "--no_such_flag=1"}), cases[1]]
    monkeypatch.setitem(gpu.PARTS, "loss", lambda is_small: broken)
    first, second = map(json.loads, gpu.run_part("loss", is_small=True, scratch=str(tmp_path)))
    assert first["error"].startswith("its process ended with ") and "no_such_flag" in first["error"]
    assert second["ms"] > 0 and second["turns"] == cases[1].settings["turns"]
