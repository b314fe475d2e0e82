"""Seconds and peak memory of importing and exporting a random Llama, beside transformers, on the CPU.

Run as `python benchmarks/import_export.py [gigabytes] [rounds]`; needs torch. Each measurement is a process of its own,
and all take turns, so that what else the machine does falls on all alike. Medians are printed.

transformers maps files whose dtype it keeps, and returns before it has read a weight. So it has three times: until
`from_pretrained` returns; until a byte of every page of the weights is read; and until one is written, when the weights
are in memory of their own, which a trainer needs. Ours are that, and transposed, when `load_params` returns: ratios are
to the last of the three.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

IMPORTS = [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]
"""Dtype stored, and dtype in memory."""
WHO = [("transformers", 1), ("jaxsft", 1), ("jaxsft", 8)]
"""And the number of simulated devices."""


def main() -> None:
    gigabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    with tempfile.TemporaryDirectory() as place:
        folders = {
            dtype: write_model(pathlib.Path(place) / dtype, gigabytes, dtype) for dtype in ("float32", "bfloat16")
        }
        results: dict[tuple, list[dict[str, float]]] = {}
        for _ in range(rounds):
            for stored, loaded in IMPORTS:
                for who, devices in WHO:
                    found = run_child(who, folders[stored], loaded, devices)
                    results.setdefault((stored, loaded, who, devices), []).append(found)
    medians = {
        key: {name: statistics.median(each[name] for each in found) for name in found[0]}
        for key, found in results.items()
    }
    print(f"{gigabytes:g} GB stored, {rounds} rounds, medians; memory is peak beyond what the imports of Python need")
    print(
        "stored    loaded    by                  returns    read     own  ratio  memory/arrays    export  ratio  memory"
    )
    for (stored, loaded, who, devices), found in medians.items():
        theirs = medians[stored, loaded, "transformers", 1]
        by = who if who == "transformers" else f"{who}, {devices} device{'s' * (devices > 1)}"
        print(
            f"{stored:9} {loaded:9} {by:18} {found['returns']:6.2f} s {found['read']:5.2f} s {found['own']:5.2f} s "
            f"{found['own'] / theirs['own']:6.2f}  {found['import_peak'] / found['held']:13.2f}  "
            f"{found['export']:6.2f} s {found['export'] / theirs['export']:6.2f}  {found['export_peak'] / 1e9:.2f} GB"
        )


def write_model(
    folder: pathlib.Path, gigabytes: float, dtype: str, *, width: int = 1536, vocab_size: int = 32000
) -> pathlib.Path:
    """A Llama of random weights."""
    import ml_dtypes
    import numpy as np
    import safetensors.numpy

    itemsize = 4 if dtype == "float32" else 2
    layers = max(2, round((gigabytes * 1e9 / itemsize - 2 * vocab_size * width) / (10 * width**2)))
    config = dict(
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        dtype=dtype,
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=width * 5 // 2,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=3,
        tie_word_embeddings=False,
    )
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    mlp, kv = config["intermediate_size"], width // 4
    shapes = {
        "model.embed_tokens.weight": (vocab_size, width),
        "lm_head.weight": (vocab_size, width),
        "model.norm.weight": (width,),
    }
    for layer in range(layers):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (width,),
                "post_attention_layernorm": (width,),
                "self_attn.q_proj": (width, width),
                "self_attn.k_proj": (kv, width),
                "self_attn.v_proj": (kv, width),
                "self_attn.o_proj": (width, width),
                "mlp.gate_proj": (mlp, width),
                "mlp.up_proj": (mlp, width),
                "mlp.down_proj": (width, mlp),
            }.items()
        }
    rng = np.random.default_rng(0)
    into = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
    tensors = {name: rng.random(shape, np.float32).astype(into) for name, shape in shapes.items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def run_child(who: str, folder: pathlib.Path, dtype: str, devices: int) -> dict[str, float]:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, __file__, "--child", who, str(folder), dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def peak() -> int:
    """Largest bytes of memory so far; getrusage would begin with those of the process that started this one."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def measure_transformers(folder: pathlib.Path, dtype: str, out: pathlib.Path) -> dict[str, float]:
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(folder)
    # What is imported only when it is needed is no part of the measurement.
    for key, size in dict(num_hidden_layers=1, hidden_size=24, intermediate_size=8, vocab_size=8, head_dim=2).items():
        setattr(config, key, size)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(out / "tiny")
    transformers.AutoModelForCausalLM.from_pretrained(out / "tiny")

    before, start = peak(), time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    returns = time.perf_counter() - start
    pages = [weight.detach().view(-1)[:: 4096 // weight.element_size()] for weight in model.parameters()]
    for page in pages:
        page.sum().item()
    read = time.perf_counter() - start
    for page in pages:
        page.mul_(1)
    own, loaded = time.perf_counter() - start, peak()
    start = time.perf_counter()
    model.save_pretrained(out / "model")
    return {
        "returns": returns,
        "read": read,
        "own": own,
        "import_peak": loaded - before,
        "export": time.perf_counter() - start,
        "export_peak": peak() - loaded,
        "held": sum(weight.numel() * weight.element_size() for weight in model.parameters()),
    }


def measure_jaxsft(folder: pathlib.Path, dtype: str, out: pathlib.Path) -> dict[str, float]:
    import jax

    from jaxsft.config import MeshConfig
    from jaxsft.folders import hf
    from jaxsft.folders.weights import load as weights
    from jaxsft.folders.weights.save import write_weights
    from jaxsft.mesh import make_mesh, shardings
    from jaxsft.model.abstract import abstract_model
    from jaxsft.model.decoder import Decoder
    from jaxsft.model.families.known import decoder_config, family

    mesh = make_mesh(MeshConfig())

    def load(folder: pathlib.Path) -> tuple:
        stored, hf_config = hf.open_source(folder)
        config = decoder_config(hf_config)
        abstract = abstract_model(
            lambda rngs: Decoder(config, compute_dtype=dtype, param_dtype=dtype, remat="none", rngs=rngs)
        ).params
        params = weights.load_params(
            stored,
            family(hf_config),
            abstract=abstract,
            shardings=shardings(mesh, abstract),
            vocab_size=config.vocab_size,
        )
        return params, stored, hf_config

    # What is imported only when it is needed is no part of the measurement.
    load(write_model(out / "tiny", 0, dtype, width=24, vocab_size=8))

    before, start = peak(), time.perf_counter()
    params, stored, hf_config = load(folder)
    seconds, loaded = time.perf_counter() - start, peak()
    start = time.perf_counter()
    write_weights(
        out,
        params,
        family(hf_config),
        vocab_size=decoder_config(hf_config).vocab_size,
        dtype=None,
        stored=stored,
        max_shard_bytes=10**12,
    )
    return {
        "returns": seconds,
        "read": seconds,
        "own": seconds,
        "import_peak": loaded - before,
        "export": time.perf_counter() - start,
        "export_peak": peak() - loaded,
        "held": sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards),
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        who, folder, dtype = sys.argv[2:]
        measure = measure_transformers if who == "transformers" else measure_jaxsft
        with tempfile.TemporaryDirectory() as out:
            print(json.dumps(measure(pathlib.Path(folder), dtype, pathlib.Path(out))))
    else:
        main()
