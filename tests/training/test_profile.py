"""A profile is a trace that others open, and a summary in which every moment of every device is counted once."""

import gzip
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import TO_READ
from etils import epath

from jaxsft.config_files import load_config
from jaxsft.train import train
from jaxsft.training.metrics_file import read_metrics
from jaxsft.training.profile import (
    KINDS,
    TRACED,
    Instruction,
    _divide,
    _Run,
    newest_trace,
    read_instructions,
    read_trace,
)


@pytest.fixture(scope="module")
def profiled(tiny_model, tiny_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiled")
    (folder / "run.yaml").write_text(
        f"""
model: {{path: {tiny_model}, weights: random, remat: none}}
data: {{train: {tiny_data}/train.jsonl, seq_len: 128, cache: {folder}/cache}}
train: {{batch_size: 8, steps: 6}}
log: {{every: 4, profile_steps: 2}}
"""
    )
    assert train(load_config(folder / "run.yaml", [f"run_dir={folder}/run"])) == 0
    return epath.Path(folder) / "run"


def test_a_run_leaves_a_trace_that_opens_and_a_summary(profiled):
    trace = newest_trace(profiled / "profile")
    assert any(plane.name == "/host:CPU" for plane in jax.profiler.ProfileData.from_file(str(trace)).planes)
    (for_perfetto,) = trace.parent.glob("*.trace.json.gz")
    assert json.loads(gzip.decompress(for_perfetto.read_bytes()))["traceEvents"]
    summary = (profiled / "profile" / "summary.txt").read_text()
    assert "profile of steps 4 to 5:" in summary
    assert all(f"CPU:{number} " in summary for number in range(8))


def test_the_shares_of_a_device_are_the_whole_time_and_each_part_of_the_step_has_one(profiled):
    folder = profiled / "profile"
    devices = read_trace(newest_trace(folder), (folder / "step.hlo.txt").read_text())
    assert len(devices) == 8
    for shares in devices:
        assert sum(shares.of_kind.values()) == pytest.approx(shares.seconds, rel=1e-9)
        assert sum(shares.operations.values()) + shares.of_kind["host"] == pytest.approx(shares.seconds, rel=1e-9)
        # Eight devices: parameters are gathered, gradients reduced.
        assert all(shares.of_kind[kind] > 0 for kind in KINDS)


def test_lines_of_metrics_begin_and_end_where_the_trace_does(profiled):
    steps = [line["step"] for line in read_metrics(profiled / "metrics.jsonl") if "loss" in line]
    assert steps == [3, 4, 5, 6]


def test_a_run_too_short_for_its_profile_does_not_start(tiny_config, tmp_path):
    config = load_config(tiny_config, [f"run_dir={tmp_path}/run", "log.profile_steps=10"])
    with pytest.raises(ValueError, match="log.profile_steps: 10 steps after the first 3 are more than the run's 12"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_instructions_are_known_by_the_scopes_of_the_program():
    def train_step(w, x):
        def gradients(w):
            with jax.named_scope("attention"):
                y = jax.nn.softmax(x @ w) @ w.T
            y = jax.lax.fori_loop(0, 3, lambda i, y: jnp.sin(y @ w), y)
            with jax.named_scope("loss"):
                return jnp.sum(jnp.exp(y @ w))

        with jax.named_scope("gradients"):
            value = gradients(w)
        return w - 0.1 * value

    shapes = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    text = jax.jit(train_step).lower(shapes, shapes).compile(TO_READ).as_text()
    instructions = read_instructions(text)
    kinds = {
        names: {each.kind for each in instructions.values() if re.search(names, each.op_name)}
        for names in (
            "attention/dot_general$",
            "while/body/[a-z_]+/dot_general$",  # jax 0.10 says closed_call, 0.12 eval_jaxpr
            "loss/dot_general$",
            r"train_step\)/sub$",
        )
    }
    assert list(kinds.values()) == [{"attention"}, {"matmul"}, {"loss"}, {"optimizer"}]
    (loop,) = [each for each in instructions.values() if each.is_container and each.op_name.endswith("/while")]
    assert loop.kind == "other"


def test_a_kernel_of_tpus_is_known_by_its_scope_though_it_takes_several_lines():
    text = """HloModule jit_train_step
ENTRY %main.1 (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %kernel.1 = (f32[8]{0}) custom-call(%p), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 128}"
}}, metadata={op_name="jit(train_step)/gradients/layers/attention/pallas_call"}
  ROOT %out.1 = f32[8]{0} get-tuple-element(%kernel.1), index=0, frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}
}
"""
    instructions = read_instructions(text)
    assert list(instructions) == ["p", "kernel.1", "out.1"]
    assert instructions["kernel.1"].kind == "attention"


def test_every_moment_goes_to_what_runs_in_it_as_counted_one_by_one():
    rng = np.random.default_rng(0)
    leaves = [Instruction(kind, False, "") for kind in ("matmul", "attention", "collectives")]
    loop = Instruction("other", True, "")
    runs = []
    for number in range(60):
        start = int(rng.integers(-20, 400))
        instruction = [*leaves, loop][rng.integers(4)]
        runs.append(_Run(f"op{number}", start, start + int(rng.integers(1, 12)), instruction))
    shares = _divide("CPU:0", runs, (0.0, 400.0))

    expected = dict.fromkeys(KINDS, 0.0)
    for moment in range(400):
        active = [run.instruction for run in runs if run.start <= moment < run.end]
        computing = [each for each in active if each.kind in ("matmul", "attention")]
        others = [each for each in active if each.kind == "collectives"] or active
        for each in computing or others:
            expected[each.kind] += 1 / len(computing or others)
        expected["host"] += not active
    assert {kind: spent * 1e9 for kind, spent in shares.of_kind.items()} == pytest.approx(expected)


@pytest.mark.parametrize("line", ["Stream #13(Compute)", "XLA Ops"])
def test_traces_of_accelerators_are_read(tmp_path, line):
    """Made by hand in the shape that GPUs and TPUs write: a plane for each device, a line for each stream or one of
    operations, beside lines that say the same once more."""
    text = f"""
planes {{ name: "/host:CPU" lines {{ name: "python" timestamp_ns: 1000
  events {{ metadata_id: 1 offset_ps: 0 duration_ps: 100000000 }} }}
  event_metadata {{ key: 1 value {{ id: 1 name: "{TRACED}" }} }} }}
planes {{ name: "/device:GPU:1"
  lines {{ name: "XLA Modules" timestamp_ns: 1000 events {{ metadata_id: 1 offset_ps: 0 duration_ps: 90000000 }} }}
  lines {{ name: "{line}" timestamp_ns: 1000
    events {{ metadata_id: 2 offset_ps: 10000000 duration_ps: 40000000
             stats {{ metadata_id: 1 str_value: "dot.1" }} stats {{ metadata_id: 2 str_value: "jit_train_step" }} }}
    events {{ metadata_id: 3 offset_ps: 50000000 duration_ps: 20000000 }}
    events {{ metadata_id: 4 offset_ps: 70000000 duration_ps: 5000000 }} }}
  event_metadata {{ key: 1 value {{ id: 1 name: "jit_train_step(123)" }} }}
  event_metadata {{ key: 2 value {{ id: 2 name: "sm90_xmma_something" }} }}
  event_metadata {{ key: 3 value {{ id: 3 name: "ncclDevKernel_AllReduce_Sum_f32" }} }}
  event_metadata {{ key: 4 value {{ id: 4 name: "%add.3 = f32[8]{{0}} add(%a, %b)" }} }}
  stat_metadata {{ key: 1 value {{ id: 1 name: "hlo_op" }} }}
  stat_metadata {{ key: 2 value {{ id: 2 name: "hlo_module" }} }} }}
"""
    path = epath.Path(tmp_path) / "made.xplane.pb"
    path.write_bytes(jax.profiler.ProfileData.text_proto_to_serialized_xspace(text))
    hlo = (
        "HloModule jit_train_step, is_scheduled=true\n\nENTRY %main (a: f32[8]) -> f32[8] {\n"
        '  %dot.1 = f32[8]{0} dot(%a, %b), metadata={op_name="jit(train_step)/gradients/dot_general"}\n'
        '  ROOT %add.3 = f32[8]{0} add(%a, %b), metadata={op_name="jit(train_step)/add"}\n}\n'
    )
    (shares,) = read_trace(path, hlo)
    assert shares.device == "GPU:1" and shares.seconds == pytest.approx(100e-6)
    expected = {"matmul": 40e-6, "collectives": 20e-6, "optimizer": 5e-6, "host": 35e-6}
    assert {kind: spent for kind, spent in shares.of_kind.items() if spent} == pytest.approx(expected)
