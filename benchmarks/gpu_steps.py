"""Cases of `gpu.py` about whole steps of a model: time, memory and start-up, and whether they repeat."""

import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from gpu_cases import DETERMINISTIC, Case, room_for, rows_of, seconds_since_start

from jaxsft.batch import Batch
from jaxsft.config import CheckpointConfig
from jaxsft.config_files import load_config
from jaxsft.folders.pretrained import decoder_maker
from jaxsft.mesh import batch_sharding, make_mesh
from jaxsft.model.abstract import abstract_model, random_weights, with_attention
from jaxsft.model.attention import choose_kernel
from jaxsft.model.families.known import decoder_config, family
from jaxsft.training.checkpoint import Checkpointer
from jaxsft.training.chips import chip_of
from jaxsft.training.metrics import matmul_params, train_flops
from jaxsft.training.step import abstract_state, init_state, make_train_step, put_batch

SHAPES: dict[str, dict[str, Any]] = {
    "135M": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 32768,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
    "1.5B": {
        "model_type": "qwen2",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    },
}
"""Those of SmolLM2 135M and of Qwen2.5 1.5B."""
FEWER = {"num_hidden_layers": 2, "vocab_size": 4096}

TRAINED: dict[str, dict[str, Any]] = {"all": {}, "adapters": {"lora": {"rank": 16}}}
"""Name -> sections of a config that say which parameters are trained."""


def steps(shape: str, is_small: bool) -> list[Case]:
    """Policies of remat, rows and kernels, those first that matter most; then starts with the programs on disk."""
    length = 256 if is_small else 4096
    chosen = [("full", 1), ("full", 4), ("attention", 4), ("none", 1), ("full", 2), ("none", 4), ("offload", 4)]
    chosen += [("attention", 1), ("offload", 1), ("none", 2)]
    settings = [
        {"shape": shape, "kernel": kernel, "remat": remat, "rows": rows, "length": length, "trained": trained}
        for remat, rows in (chosen[:4] if is_small else chosen)
        for kernel in (("cudnn", "xla") if is_small or (remat, rows) in chosen[:2] else ("cudnn",))
        for trained in TRAINED
    ]
    again = [each | {"start": "cached"} for each in settings[:2]]
    return [
        Case(each | {"is_small": is_small}, step, is_alone=True)
        for each in [*(each | {"start": "cold"} for each in settings[:2]), *again, *settings[2:]]
    ]


class Built(NamedTuple):
    """A step and what it is given."""

    step: Any
    first_state: Callable[[], tuple[Any, Any]]
    """It, and what is not trained."""
    abstract_state: Any
    batch: Any
    structure: Any
    model: Any


def build(
    shape: str,
    kernel: str,
    remat: str,
    rows: int,
    length: int,
    trained: str,
    *,
    is_small: bool,
    device: Any | None = None,
) -> Built:
    """A step of a model of this shape on one device, that of this machine or one that is not there.

    Raises:
        ConfigError: the kernel cannot be had.
    """
    structure = decoder_config(SHAPES[shape] | (FEWER if is_small else {}))
    of_model = {"path": "none", "weights": "random", "remat": remat, "compute_dtype": "bfloat16"}
    config = load_config({"model": of_model, "data": {"train": "none"}} | TRAINED[trained], [])
    mesh, optim = make_mesh(config.mesh, [device or jax.devices()[0]]), config.optim
    ids, positions = rows_of("packed", rows, length)
    q, k = (
        jax.ShapeDtypeStruct((*ids.shape, heads, structure.head_dim), jnp.bfloat16)
        for heads in (structure.num_heads, structure.num_kv_heads)
    )
    make = decoder_maker(config.model, structure, family(SHAPES[shape]), config.lora)
    with jax.set_mesh(mesh):
        choose_kernel(kernel, q, k, num_segments=room_for(ids))  # type: ignore[arg-type]
    model = with_attention(abstract_model(make), kernel, num_segments=room_for(ids))  # type: ignore[arg-type]
    step = make_train_step(model, optim, num_steps=100, num_microbatches=1, mesh=mesh)
    tokens = np.random.default_rng(0).integers(0, structure.vocab_size, ids.shape).astype(np.int32)
    has_next = np.pad((ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] > 0), ((0, 0), (0, 1)))
    targets = np.where(has_next, np.roll(tokens, -1, axis=1), 0)
    # The second half of each hundred tokens is an answer.
    weights = (has_next & (positions % 100 >= 50)).astype(np.float32)
    host = Batch(tokens, targets, weights, ids, positions)
    if device is None:
        batch = put_batch(lambda part: Batch(*(leaf[part] for leaf in host)), ids.shape, mesh)
    else:
        batch = Batch(*(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh)) for x in host))

    def first_state() -> tuple[Any, Any]:
        params, frozen = model.split(random_weights(make, mesh, seed=0))
        return init_state(params, optim, mesh), frozen

    return Built(step, first_state, abstract_state(model.params, optim, mesh), batch, structure, model)


def step(*, is_small: bool, start: str = "cold", **settings: Any) -> dict[str, Any]:
    """Time of a step, what it makes of the device, memory beside what the compiler said, and the time to the first."""
    built = build(**settings, is_small=is_small)
    state, frozen = built.first_state()
    at = time.perf_counter()
    compiled = built.step.lower(state, frozen, built.batch).compile()
    compiling, seconds = time.perf_counter() - at, []
    began: float | None = None
    for _ in range(3 if is_small else 12):
        at = time.perf_counter()
        state, metrics = jax.block_until_ready(compiled(state, frozen, built.batch, built.step.numbers))
        seconds.append(time.perf_counter() - at)
        began = began or seconds_since_start()
    taken, tokens = statistics.median(seconds[2:]), float(metrics.tokens)
    memory, stats, device = compiled.memory_analysis(), jax.devices()[0].memory_stats() or {}, jax.devices()[0]
    needed = train_flops(
        matmul_params=matmul_params(built.model.params, built.structure),
        frozen_matmul_params=matmul_params(built.model.frozen, built.structure),
        tokens=tokens,
        attention_width=built.structure.num_heads * built.structure.head_dim,
        attention_pairs=float(metrics.attention_pairs),
    )
    chip = chip_of(device)
    peak = chip.flops if chip else None
    return {
        "step_ms": taken * 1e3,
        "tokens_per_second": tokens / taken,
        "mfu": needed / taken / peak if peak else None,
        "peak_gib": stats["peak_bytes_in_use"] / 2**30 if stats else None,
        "compiled_peak_gib": memory.peak_memory_in_bytes / 2**30,
        "compiled_arguments_and_temporary_gib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30,
        "compile_s": compiling,
        "first_step_done_after_s": began,
        "loss": float(metrics.sums.loss_sum / metrics.sums.weight_sum),
    }


def repeat(is_small: bool) -> list[Case]:
    """Both kernels, with operations that XLA promises to repeat and with those it takes by itself."""
    return [
        Case({"kernel": kernel, "length": 128 if is_small else 4096, "is_small": is_small}, repeated, environment, True)
        for environment in ({}, DETERMINISTIC)
        for kernel in ("xla", "cudnn")
    ]


def repeated(*, kernel: str, length: int, is_small: bool) -> dict[str, Any]:
    """Whether parameters and moments are the same to the bit after 10 steps, and after 5, a checkpoint and 5."""

    def taken(state: Any, count: int) -> Any:
        for _ in range(count):
            state, _ = built.step(state, frozen, built.batch)
        return jax.block_until_ready(state)

    def digest(state: Any) -> str:
        found = hashlib.sha256()
        for leaf in jax.tree.leaves(jax.device_get(state)):
            found.update(np.asarray(leaf).tobytes())
        return found.hexdigest()[:16]

    built = build("135M", kernel, "full", 2, length, "all", is_small=is_small)
    state, frozen = built.first_state()
    whole = digest(taken(state, 10))
    state, _ = jax.block_until_ready(built.first_state())
    at = time.perf_counter()
    state = taken(state, 10)
    step_ms = (time.perf_counter() - at) * 100
    again = digest(state)
    with tempfile.TemporaryDirectory() as folder:
        checkpointer = Checkpointer(epath.Path(folder) / "checkpoints", CheckpointConfig(), lambda text: None)
        checkpointer.save(5, taken(built.first_state()[0], 5))
        checkpointer.wait()
        restored = checkpointer.restore(built.abstract_state)
        checkpointer.close()
        continued = digest(taken(restored, 5))
    return {"same": whole == again, "same_continued": whole == continued, "step_ms": step_ms}
