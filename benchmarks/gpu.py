"""What only a GPU can tell, part by part: whether cuDNN's attention is right, how fast steps are, whether they repeat.

Run as `python benchmarks/gpu.py [PART ...] [--small]` on one H100 or H200 with JAX 0.11.2; all parts if none is named.
Needs no network and no files. Each case is a line of JSON with what was measured, why it was left out (`skipped`) or
what went wrong (`error`); a case that ends its process ends none of the others, and a part takes less than 8 minutes:
what does not fit is left out. On a CPU the half that is XLA's runs, with small shapes (`--small`, which is then given).

  numbers    cuDNN on packed rows against the formula in float32, beside our own attention in bfloat16
  speed      attention of one layer: ours, cuDNN, and cuDNN where a row is one example, which it need not be told
  step-135M, step-1.5B   steps of models of these sizes: time, memory, start-up
  loss       its loop over chunks, with a number of turns that follows from the rows and with a fixed one
  repeat     10 steps twice, and 5, a checkpoint and 5 more: the same to the bit?
  embed      the gradient of a table of embeddings where one token is frequent
"""

import argparse
import functools
import hashlib
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

BEGAN = time.perf_counter()
HERE = pathlib.Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

SECONDS_OF_A_PART = 450
AGAIN = 3
"""Exit code of a process whose GPU may be in disorder: the next case gets a new one."""
DETERMINISTIC = {"XLA_FLAGS": "--xla_gpu_deterministic_ops=true"}
TURNS = 5
"""Of which the median is taken."""


class Case(NamedTuple):
    """Something to be measured."""

    settings: dict[str, Any]
    """What its line begins with, and `run` is given."""
    run: Callable[..., dict[str, Any]]
    environment: dict[str, str] = {}
    is_alone: bool = False
    """In a process of its own, as the most memory that was ever used is measured."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--small", action="store_true", help="small shapes, to see whether it runs")
    parser.add_argument("--child", nargs=2, type=int, metavar=("FIRST", "STOP"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: unknown; parts are {', '.join(PARTS)}")
    if args.child:
        run_cases(args.parts[0], slice(*args.child), is_small=args.small)
        return
    platform = subprocess.run(
        [sys.executable, "-c", "import jax; print(jax.devices()[0].platform)"], capture_output=True, text=True
    ).stdout.strip()
    for part in args.parts or PARTS:
        with tempfile.TemporaryDirectory() as scratch:
            for line in run_part(part, is_small=args.small or platform != "gpu", scratch=scratch):
                print(line, flush=True)


# A part, case by case, in processes that may die.


def run_part(part: str, *, is_small: bool, scratch: str) -> Iterator[str]:
    """The lines of a part."""
    ends, at, cases = time.monotonic() + SECONDS_OF_A_PART, 0, PARTS[part](is_small)
    while at < len(cases):
        stop = at + 1
        while stop < len(cases) and not cases[at].is_alone and cases[stop][2:] == cases[at][2:]:
            stop += 1
        if (left := ends - time.monotonic()) < 10:
            for case in cases[at:]:
                yield as_line(part, case, {"skipped": f"the part has had its {SECONDS_OF_A_PART} seconds"})
            return
        code, tail = None, ""
        for line in (lines := child_lines(part, at, stop, cases[at], is_small=is_small, scratch=scratch, seconds=left)):
            if isinstance(line, str):
                yield line
                at += 1
            else:
                code, tail = line
        lines.close()
        if at < stop and code != AGAIN:
            yield as_line(part, cases[at], {"error": f"its process ended with {code}: {tail}"})
            at += 1


def child_lines(
    part: str, first: int, stop: int, case: Case, *, is_small: bool, scratch: str, seconds: float
) -> Iterator[str | tuple[int, str]]:
    """The lines of some cases, in a process of their own; then its exit code and the end of what it complained of."""
    command = [sys.executable, str(HERE), part, "--child", str(first), str(stop), *["--small"] * is_small]
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", "JAX_COMPILATION_CACHE_DIR": f"{scratch}/compiled"}
    environment |= os.environ | case.environment
    with tempfile.TemporaryFile("w+") as complaints:
        child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=complaints, text=True)
        timer = threading.Timer(seconds, child.kill)
        timer.start()
        assert child.stdout is not None
        yield from (line.rstrip("\n") for line in child.stdout if line.startswith("{"))
        code = child.wait()
        timer.cancel()
        complaints.seek(0)
        yield code, " ".join(complaints.read()[-600:].split())


def run_cases(part: str, chosen: slice, *, is_small: bool) -> None:
    """Runs some cases of a part and prints a line for each."""
    import jax

    from jaxsft.config import ConfigError, MeshConfig
    from jaxsft.mesh import make_mesh

    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    for case in PARTS[part](is_small)[chosen]:
        is_sound = True
        try:
            with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
                found = case.run(**case.settings)
        except ConfigError as error:
            found = {"skipped": str(error)}
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            found = {"error": f"{type(error).__name__}: {str(error)[:400]} ({where.filename}:{where.lineno})"}
            is_sound = not isinstance(error, jax.errors.JaxRuntimeError)
        print(as_line(part, case, found | about), flush=True)
        if not is_sound:
            os._exit(AGAIN)


def as_line(part: str, case: Case, found: dict[str, Any]) -> str:
    return json.dumps(plain({"part": part} | case.settings | case.environment | found))


def plain(value: Any) -> Any:
    """As JSON can hold it: what is no number as text."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def milliseconds(function: Callable[..., Any], *arrays: Any) -> float:
    """Of a call, in a row of some; compiled before."""
    import jax

    jax.block_until_ready(function(*arrays))
    at = time.perf_counter()
    jax.block_until_ready(function(*arrays))
    calls, found = max(1, min(20, int(0.3 / (time.perf_counter() - at)))), []
    for _ in range(TURNS):
        at = time.perf_counter()
        out = [function(*arrays) for _ in range(calls)]
        jax.block_until_ready(out)
        found.append((time.perf_counter() - at) / calls * 1e3)
    return statistics.median(found)


# Rows.


def rows_of(kind: str, num_rows: int, length: int) -> tuple[Any, Any]:
    """Segment ids and positions, int32 [rows, length]: of examples of some lengths, the last part padding."""
    import numpy as np
    from attention_pairs import pack

    if kind == "packed":
        mean = min(600, length // 4)
        drawn = np.random.default_rng(0).lognormal(np.log(mean) - 0.32, 0.8, 40 * num_rows * length // mean)
        return pack(drawn.astype(int) + 1, length, most=num_rows)
    lengths = {
        "one example": [length],
        "padded": [length // 3, length // 5, length // 7],
        "of one token": [1] * (length // 4) + [length // 2],
        "eight and no padding": [length // 2 - 7, *[1] * 5, 2, length // 2],
    }[kind]
    padding = length - sum(lengths)
    ids = np.repeat([*range(1, len(lengths) + 1), 0], [*lengths, padding])
    positions = np.concatenate([np.arange(each) for each in [*lengths, padding]])
    return tuple(np.tile(each.astype(np.int32), (num_rows, 1)) for each in (ids, positions))


def room_for(segment_ids: Any) -> int:
    from jaxsft.batch import count_segments
    from jaxsft.model.cudnn import room_for_segments

    return room_for_segments(int(count_segments(segment_ids).max()))


# numbers


def numbers(is_small: bool) -> list[Case]:
    """Heads, their width, the window and the rows."""
    length = 128 if is_small else 1024
    heads = [(8, 8, 64), (8, 4, 128), (8, 2, 128), (8, 1, 64), (9, 3, 64), (4, 2, 256), (8, 2, 96), (8, 4, 192)]
    kinds = ["packed", "one example", "padded", "of one token", "eight and no padding"]
    chosen = [(each, window, "packed") for each in heads for window in (None, length // 8)]
    chosen += [((8, 2, 128), window, kind) for kind in kinds[1:] for window in (None, 1, length // 8)]
    return [
        Case({"heads": each, "window": window, "rows": kind, "length": length}, apart)
        for each, window, kind in chosen[:: 4 if is_small else 1]
    ]


def apart(*, heads: tuple[int, int, int], window: int | None, rows: str, length: int) -> dict[str, Any]:
    """Root of the mean square, and the largest, of what output and gradients are apart from the formula, relative."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxsft.config import ConfigError
    from jaxsft.model.attention import attention
    from jaxsft.model.kernel_check import formula
    from jaxsft.model.needed import Rule

    num_heads, num_kv_heads, head_dim = heads
    ids, positions = rows_of(rows, 2, length)
    keys = jax.random.split(jax.random.key(0), 4)
    of_heads = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    q, k, v, g = (
        jax.random.normal(key, (*ids.shape, n, head_dim), jnp.bfloat16) for key, n in zip(keys, of_heads, strict=True)
    )
    is_token = jnp.asarray(ids > 0)[..., None, None]

    @functools.partial(jax.jit, static_argnums=0)
    def with_gradients(attend: Callable[..., Any], q: Any, k: Any, v: Any, g: Any) -> Any:
        out, vjp = jax.vjp(lambda *x: jnp.where(is_token, attend(*x), 0), q, k, v)
        return [out, *vjp(jnp.where(is_token, g, 0))]

    def by(kernel: Any) -> Callable[..., Any]:
        return functools.partial(
            attention,
            q_segment_ids=jnp.asarray(ids),
            kv_segment_ids=jnp.asarray(ids),
            q_positions=jnp.asarray(positions),
            kv_positions=jnp.asarray(positions),
            window=window,
            kernel=kernel,
            num_segments=room_for(ids),
        )

    rule = Rule(head_dim**-0.5, window, None)
    exact = with_gradients(
        lambda *x: formula(rule, ids, positions, *x, None), *(x.astype(jnp.float32) for x in (q, k, v, g))
    )

    def errors(found: list[Any]) -> list[list[float]]:
        """Relative, but where it must be 0, as of queries that see themselves alone: there to 0.1."""
        pairs = [(np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in zip(found, exact, strict=True)]
        return [
            [float(np.sqrt(np.square(x - y).mean() / max(np.square(y).mean(), 1e-2))) for x, y in pairs],
            [float(np.abs(x - y).max() / max(np.abs(y).max(), 1e-1)) for x, y in pairs],
        ]

    def same(one: list[Any], other: list[Any]) -> bool:
        return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(one, other, strict=True))

    ours = with_gradients(by("xla"), q, k, v, g)
    line: dict[str, Any] = {"segments": room_for(ids), "apart": "output, gradients by queries, keys, values"}
    line["ours"], line["ours_largest"] = errors(ours)
    line["ours_repeats"] = same(ours, with_gradients(by("xla"), q, k, v, g))
    try:
        theirs = with_gradients(by("cudnn"), q, k, v, g)
    except ConfigError as error:
        return line | {"skipped": str(error)}
    line["cudnn"], line["cudnn_largest"] = errors(theirs)
    line["repeats"] = same(theirs, with_gradients(by("cudnn"), q, k, v, g))
    # Other tokens in one segment: whoever is in another one must not notice, to the bit.
    others = (ids != 1)[..., None, None]
    changed = with_gradients(by("cudnn"), *(jnp.where(others, x, 3 - x) for x in (q, k, v, g)))
    line["sealed"] = same(*([np.where(others, np.asarray(x), 0) for x in each] for each in (theirs, changed)))
    for name in ("cudnn", "cudnn_largest"):
        pairs = zip(line[name], line[name.replace("cudnn", "ours")], strict=True)
        line[f"{name}_to_ours"] = max(their / max(mine, 1e-4) for their, mine in pairs)
    line["is_right"] = line["sealed"] and max(line["cudnn_to_ours"], line["cudnn_largest_to_ours"]) <= 1.5
    return line


# speed


def speed(is_small: bool) -> list[Case]:
    """Rows of 4,096 and 16,384, of the heads of Llama 3 8B and of SmolLM2 135M."""
    sizes = [(2, 256)] if is_small else [(4, 4096), (1, 16384)]
    heads = [(4, 2, 64)] if is_small else [(32, 8, 128), (9, 3, 64)]
    return [
        Case({"by": by, "heads": each, "rows": kind, "num_rows": num_rows, "length": length, "room": room}, timed)
        for each in heads
        for num_rows, length in sizes
        for kind in ("one example", "packed")
        for by, room in (("xla", 1), ("cudnn", 1), ("cudnn", 4), ("cudnn, not packed", 1))
        if (by, room) != ("cudnn", 4) or kind == "packed"
    ]


def timed(*, by: str, heads: tuple[int, int, int], rows: str, num_rows: int, length: int, room: int) -> dict[str, Any]:
    """Milliseconds forward, and forward and backward; `room` times as many segments as there need be."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxsft.config import ConfigError
    from jaxsft.model.attention import attention

    num_heads, num_kv_heads, head_dim = heads
    ids, positions = rows_of(rows, num_rows, length)
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (*ids.shape, n, head_dim), jnp.bfloat16)
        for key, n in zip(keys, (num_heads, num_kv_heads, num_kv_heads), strict=True)
    )
    num_segments = room * room_for(ids)
    places = jnp.asarray(ids), jnp.asarray(positions)

    def attend(q: Any, k: Any, v: Any, ids: Any, positions: Any) -> Any:
        if by == "cudnn, not packed":
            if jax.default_backend() != "gpu":
                raise ConfigError("cuDNN runs on NVIDIA GPUs")
            return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
        return attention(
            q,
            k,
            v,
            q_segment_ids=ids,
            kv_segment_ids=ids,
            q_positions=positions,
            kv_positions=positions,
            kernel=by,  # type: ignore[arg-type]
            num_segments=num_segments,
        )

    def loss(q: Any, k: Any, v: Any, *places: Any) -> Any:
        return attend(q, k, v, *places).astype(jnp.float32).sum()

    pairs = (positions + 1.0)[ids > 0].sum() if by != "cudnn, not packed" else np.float64(ids.size * (length + 1) / 2)
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v, *places).compile()
    forward, both = (milliseconds(each, q, k, v, *places) for each in (jax.jit(attend), compiled))
    flops = 4 * pairs * num_heads * head_dim
    return {
        "segments": num_segments,
        "forward_ms": forward,
        "both_ms": both,
        "forward_tflops": float(flops / forward / 1e9),
        "both_tflops": float(3.5 * flops / both / 1e9),
        "temporary_gib": compiled.memory_analysis().temp_size_in_bytes / 2**30,
    }


# step

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

TRAINED: dict[str, dict[str, Any]] = {"all": {}}
"""Which parameters are trained, by name, and what that changes in the config; adapters get a line here."""


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
    first_state: Callable[[], Any]
    abstract_state: Any
    batch: Any
    structure: Any
    frozen: Any


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
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from jaxsft.batch import Batch
    from jaxsft.config import MeshConfig, ModelConfig, OptimConfig
    from jaxsft.folders.pretrained import decoder_maker
    from jaxsft.mesh import batch_sharding, make_mesh
    from jaxsft.model.abstract import abstract_model, random_params, with_attention
    from jaxsft.model.attention import choose_kernel
    from jaxsft.model.families.known import decoder_config
    from jaxsft.training.step import abstract_state, init_state, make_train_step, put_batch

    structure = decoder_config(SHAPES[shape] | (FEWER if is_small else {}))
    config = ModelConfig(path="", weights="random", remat=remat, **TRAINED[trained])  # type: ignore[arg-type]
    config = config.model_copy(update={"compute_dtype": "bfloat16"})
    mesh, optim, frozen = make_mesh(MeshConfig(), [device or jax.devices()[0]]), OptimConfig(), nnx.State({})
    ids, positions = rows_of("packed", rows, length)
    q, k = (
        jax.ShapeDtypeStruct((*ids.shape, heads, structure.head_dim), jnp.bfloat16)
        for heads in (structure.num_heads, structure.num_kv_heads)
    )
    make = decoder_maker(config, structure)
    with jax.set_mesh(mesh):
        choose_kernel(kernel, q, k, num_segments=room_for(ids))  # type: ignore[arg-type]
    model = with_attention(abstract_model(make), kernel, num_segments=room_for(ids))  # type: ignore[arg-type]
    step = make_train_step(model, frozen, optim, num_steps=100, num_microbatches=1, mesh=mesh)
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
    return Built(
        step,
        lambda: init_state(random_params(make, mesh, seed=0), optim, mesh),
        abstract_state(model.params, optim, mesh),
        batch,
        structure,
        frozen,
    )


def step(*, is_small: bool, start: str = "cold", **settings: Any) -> dict[str, Any]:
    """Time of a step, what it makes of the device, memory beside what the compiler said, and the time to the first."""
    import jax

    from jaxsft.training.metrics import matmul_params, peak_flops, train_flops

    built = build(**settings, is_small=is_small)
    state = built.first_state()
    at = time.perf_counter()
    compiled = built.step.lower(state, built.frozen, built.batch).compile()
    compiling, seconds = time.perf_counter() - at, []
    began = 0.0
    for _ in range(3 if is_small else 12):
        at = time.perf_counter()
        state, metrics = jax.block_until_ready(compiled(state, built.frozen, built.batch))
        seconds.append(time.perf_counter() - at)
        began = began or time.perf_counter() - BEGAN
    taken, tokens = statistics.median(seconds[2:]), float(metrics.tokens)
    memory, stats, device = compiled.memory_analysis(), jax.devices()[0].memory_stats() or {}, jax.devices()[0]
    needed = train_flops(
        matmul_params=matmul_params(built.abstract_state.params, built.structure),
        tokens=tokens,
        attention_width=built.structure.num_heads * built.structure.head_dim,
        attention_pairs=float(metrics.attention_pairs),
    )
    peak = peak_flops(device)
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


# loss


def loss(is_small: bool) -> list[Case]:
    """Shares of trained tokens, and whether the loop's turns are those that they need or always the same."""
    sizes = [(256, 64, 4096)] if is_small else [(16384, 1536, 151936), (16384, 576, 49152)]
    return [
        Case({"tokens": tokens, "width": width, "vocabulary": vocabulary, "trained_share": share, "turns": turns}, lost)
        for tokens, width, vocabulary in sizes
        for share in (1.0, 0.4)
        for turns in ("as needed", "fixed", "as many as needed, fixed")
    ]


def lost(*, tokens: int, width: int, vocabulary: int, trained_share: float, turns: str) -> dict[str, Any]:
    """Milliseconds of the loss and its gradients."""
    import jax
    import jax.numpy as jnp

    from jaxsft.model.layers import Logits
    from jaxsft.training import loss as module
    from jaxsft.training.chunks import trained_first

    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (1, tokens, width), jnp.bfloat16)
    table = 0.02 * jax.random.normal(keys[1], (vocabulary, width), jnp.float32)
    targets = jax.random.randint(keys[2], (1, tokens), 0, vocabulary)
    weights = (jax.random.uniform(keys[3], (1, tokens)) < trained_share).astype(jnp.float32)
    num_trained = int(weights.sum())

    def fixed(weights: Any, vocab_size: int) -> Any:
        chunks = trained_first(weights, vocab_size)
        count = weights.size if turns == "fixed" else num_trained
        return chunks._replace(number=-(-count // chunks.size))

    logits = Logits(vocab_size=vocabulary)

    def total(hidden: Any, table: Any) -> Any:
        return module.next_token_loss(hidden, table, targets, weights, logits=logits).loss_sum

    with mock.patch.object(module, "trained_first", trained_first if turns == "as needed" else fixed):
        taken = milliseconds(jax.jit(jax.value_and_grad(total, (0, 1))), hidden, table)
    return {"ms": taken, "tflops": 6 * num_trained * width * vocabulary / taken / 1e9}


# repeat


def repeat(is_small: bool) -> list[Case]:
    """Both kernels, with operations that XLA promises to repeat and with those it takes by itself."""
    return [
        Case({"kernel": kernel, "length": 128 if is_small else 4096, "is_small": is_small}, repeated, environment, True)
        for environment in ({}, DETERMINISTIC)
        for kernel in ("xla", "cudnn")
    ]


def repeated(*, kernel: str, length: int, is_small: bool) -> dict[str, Any]:
    """Whether parameters and moments are the same to the bit after 10 steps, and after 5, a checkpoint and 5."""
    import jax
    import numpy as np
    from etils import epath

    from jaxsft.config import CheckpointConfig
    from jaxsft.training.checkpoint import Checkpointer

    def taken(state: Any, count: int) -> Any:
        for _ in range(count):
            state, _ = built.step(state, built.frozen, built.batch)
        return jax.block_until_ready(state)

    def digest(state: Any) -> str:
        found = hashlib.sha256()
        for leaf in jax.tree.leaves(jax.device_get(state)):
            found.update(np.asarray(leaf).tobytes())
        return found.hexdigest()[:16]

    built = build("135M", kernel, "full", 2, length, "all", is_small=is_small)
    whole = digest(taken(built.first_state(), 10))
    state = jax.block_until_ready(built.first_state())
    at = time.perf_counter()
    state = taken(state, 10)
    step_ms = (time.perf_counter() - at) * 100
    again = digest(state)
    with tempfile.TemporaryDirectory() as folder:
        checkpointer = Checkpointer(epath.Path(folder) / "checkpoints", CheckpointConfig(), lambda text: None)
        checkpointer.save(5, taken(built.first_state(), 5))
        checkpointer.wait()
        restored = checkpointer.restore(built.abstract_state)
        checkpointer.close()
        continued = digest(taken(restored, 5))
    return {"same": whole == again, "same_continued": whole == continued, "step_ms": step_ms}


# embed


def embed(is_small: bool) -> list[Case]:
    """Tables, how frequent the most frequent token is, and the order in which rows are added up."""
    sizes = [(512, 64, 4096)] if is_small else [(16384, 1536, 151936), (16384, 576, 49152)]
    return [
        Case(
            {"tokens": tokens, "width": width, "vocabulary": vocabulary, "frequent": share, "order": order},
            embedded,
            environment,
        )
        for environment in ({}, DETERMINISTIC)
        for tokens, width, vocabulary in sizes
        for share in (0.0, 0.07, 1.0)
        for order in ("as they come", "sorted")
    ]


def embedded(*, tokens: int, width: int, vocabulary: int, frequent: float, order: str) -> dict[str, Any]:
    """Milliseconds of the gradient, how far the frequent token's is from a sum in float64, and whether it repeats."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxsft.model.embedding import _look_up

    rng = np.random.default_rng(0)
    drawn = np.where(rng.random(tokens) < frequent, 7, rng.integers(0, vocabulary, tokens)).astype(np.int32)
    ids, table = jnp.asarray(drawn)[None], jnp.zeros((vocabulary, width), jnp.float32)
    gradient = jax.random.normal(jax.random.key(0), (1, tokens, width), jnp.bfloat16) + 1

    @jax.jit
    def of_table(ids: Any, gradient: Any) -> Any:
        if order == "sorted":
            by_id = jnp.argsort(ids[0])
            ids, gradient = ids[:, by_id], gradient[:, by_id]
        _, vjp = jax.vjp(lambda table: _look_up("v d", jnp.dtype("bfloat16"), table, ids), table)
        return vjp(gradient)[0]

    found = np.asarray(of_table(ids, gradient))
    exact = np.asarray(gradient, np.float64)[0][drawn == 7].sum(axis=0)
    return {
        "ms": milliseconds(of_table, ids, gradient),
        "apart": float(np.abs(found[7] - exact).max() / max(np.abs(exact).max(), 1e-30)),
        "repeats": found.tobytes() == np.asarray(of_table(ids, gradient)).tobytes(),
    }


PARTS: dict[str, Callable[[bool], list[Case]]] = {
    "numbers": numbers,
    "speed": speed,
    "step-135M": functools.partial(steps, "135M"),
    "step-1.5B": functools.partial(steps, "1.5B"),
    "loss": loss,
    "repeat": repeat,
    "embed": embed,
}

if __name__ == "__main__":
    main()
