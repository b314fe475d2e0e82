"""From a model folder to the end of the first step: ours, layers scanned and unrolled, and transformers' in PyTorch.

Run as `python benchmarks/startup.py [--model FOLDER] [--rounds N]`; needs torch. Without a folder, a random model of
the shape of SmolLM2-135M is made up. Each start is a process of its own, in turns; "cold" compiles everything, "warm"
finds the compiled step in a cache on disk, as a second start of the same run does. All train in float32 on one row of
128 tokens with AdamW. Seconds are the medians of the rounds; later steps are the median of three.
"""

import argparse
import functools
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

REPO = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

SHAPE = dict(
    model_type="llama",
    architectures=["LlamaForCausalLM"],
    dtype="bfloat16",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)
STARTS = ["scanned, cold", "scanned, warm", "unrolled, cold", "unrolled, warm", "transformers"]
COLUMNS = ["imports", "load", "compile", "first step", "until the first step is done", "later step", "peak GB"]
BATCH, SEQ_LEN = 1, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--model", type=pathlib.Path, help="Hugging Face folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--start", choices=STARTS, help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start:
        run = start_theirs if args.start == "transformers" else start_ours
        print(json.dumps(run(args) | {"peak GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or make_model(pathlib.Path(scratch) / "model")
        found: dict[str, list[dict[str, float]]] = {name: [] for name in STARTS}
        for number in range(args.rounds):
            for name in STARTS:
                # The cold start of a round fills the cache that the warm one finds.
                cache = f"{scratch}/{number}-{name.split(',')[0]}"
                command = [sys.executable, __file__, "--start", name, "--model", str(folder), "--cache", cache]
                out = subprocess.run(command, capture_output=True, text=True, check=True)
                found[name].append(json.loads(out.stdout.splitlines()[-1]))
    print(f"{folder if args.model else 'random model of the shape of SmolLM2-135M'}, medians of {args.rounds} rounds")
    print("| start | " + " | ".join(COLUMNS) + " |\n" + "|---" * (len(COLUMNS) + 1) + "|")
    for name, rounds in found.items():
        cells = [f"{statistics.median(each[column] for each in rounds):.2f}" for column in COLUMNS]
        print(f"| {name} | " + " | ".join(cells) + " |")


def make_model(folder: pathlib.Path) -> pathlib.Path:
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(**SHAPE)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def start_ours(args: argparse.Namespace) -> dict[str, float]:
    began = time.perf_counter()
    times: dict[str, float] = {}
    # As a run does (`cli.main`): transformers would import it, for nothing.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    import jax
    import numpy as np

    jax.config.update("jax_compilation_cache_dir", args.cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    from jaxsft.batch import Batch
    from jaxsft.config import MeshConfig, OptimConfig
    from jaxsft.folders import hf
    from jaxsft.folders.weights import load as weights
    from jaxsft.folders.weights.stored import open_folder
    from jaxsft.mesh import make_mesh, shardings
    from jaxsft.model.abstract import abstract_model
    from jaxsft.model.decoder import Decoder
    from jaxsft.model.families.known import decoder_config, family
    from jaxsft.training.step import init_state, make_train_step, put_batch

    times["imports"] = time.perf_counter() - began
    at = time.perf_counter()
    hf_config = hf.load_hf_config(args.model)
    config = decoder_config(hf_config)
    make = functools.partial(
        Decoder,
        config,
        compute_dtype="float32",
        param_dtype="float32",
        remat="none",
        unroll=args.start.startswith("unrolled"),
    )
    model = abstract_model(lambda rngs: make(rngs=rngs))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    params = weights.load_params(
        open_folder(args.model),
        family(hf_config),
        abstract=model.params,
        shardings=shardings(mesh, model.params),
        vocab_size=config.vocab_size,
    )
    optim = OptimConfig(learning_rate=1e-5)
    state = jax.block_until_ready(init_state(params, optim, mesh))
    times["load"] = time.perf_counter() - at

    shape = (BATCH, SEQ_LEN)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape).astype(np.int32)
    ones = np.ones(shape, np.int32)
    positions = np.broadcast_to(np.arange(SEQ_LEN, dtype=np.int32), shape)
    rows = Batch(
        tokens=tokens,
        targets=np.roll(tokens, -1, axis=1),
        loss_weights=ones.astype(np.float32),
        segment_ids=ones,
        positions=positions,
    )
    batch = put_batch(lambda index: Batch(*(leaf[index] for leaf in rows)), shape, mesh)
    at = time.perf_counter()
    with jax.set_mesh(mesh):
        step = make_train_step(model, optim, num_steps=10, num_microbatches=1, mesh=mesh)
        compiled = step.lower(state, model.frozen, batch).compile()
        times["compile"] = time.perf_counter() - at
        at = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, model.frozen, batch, step.numbers))
        times["first step"] = time.perf_counter() - at
        times["until the first step is done"] = time.perf_counter() - began
        later = []
        for _ in range(3):
            at = time.perf_counter()
            state, _ = jax.block_until_ready(compiled(state, model.frozen, batch, step.numbers))
            later.append(time.perf_counter() - at)
    return times | {"later step": statistics.median(later)}


def start_theirs(args: argparse.Namespace) -> dict[str, float]:
    began = time.perf_counter()
    times: dict[str, float] = {"compile": 0.0}
    import torch
    import transformers

    times["imports"] = time.perf_counter() - began
    at = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    times["load"] = time.perf_counter() - at
    tokens = torch.randint(0, model.config.vocab_size, (BATCH, SEQ_LEN))

    def step() -> float:
        at = time.perf_counter()
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - at

    times["first step"] = step()
    times["until the first step is done"] = time.perf_counter() - began
    return times | {"later step": statistics.median(step() for _ in range(3))}


if __name__ == "__main__":
    main()
