"""Seconds of a whole export beside transformers' `save_pretrained`, on the CPU, until all is on disk.

Run as `python benchmarks/export.py FOLDER [gigabytes] [rounds]`, with the folder of a model and its tokenizer; needs
torch. A second model, of random weights with that tokenizer, has so many gigabytes in several files. Ours is all that
stands at the end of a run: weights, tokenizer, seal, and the rename. Theirs is the model alone, and fsync of its files
and of their folder; with the tokenizer it is given beside that. Each measurement is a process of its own that exports
twice and gives the second time; both take turns. Medians are printed.
"""

import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from import_export import write_model  # noqa: E402

DTYPES = ["float32", "bfloat16"]
"""Of the weights in memory; they are exported in the dtype in which they came."""


def main() -> None:
    real = pathlib.Path(sys.argv[1])
    gigabytes = float(sys.argv[2]) if len(sys.argv) > 2 else 2.0
    rounds = int(sys.argv[3]) if len(sys.argv) > 3 else 3
    with tempfile.TemporaryDirectory() as place:
        made = write_model(pathlib.Path(place) / "random", gigabytes, "bfloat16", vocab_size=49152)
        for path in real.iterdir():
            if not (made / path.name).exists() and path.name != "model.safetensors":
                shutil.copy(path, made)
        models = {real.name: (real, "50GB"), f"random, {gigabytes:g} GB": (made, "500MB")}
        print(f"{rounds} rounds, medians; stored as bfloat16")
        print("model              in memory  theirs  with tokenizer    ours  ratio  ratios of the rounds")
        for name, (folder, shard_size) in models.items():
            for dtype in DTYPES:
                theirs, ours = [], []
                for _ in range(rounds):
                    theirs.append(run_child("transformers", folder, dtype, shard_size))
                    ours.append(run_child("jaxsft", folder, dtype, shard_size)["model"])
                model = statistics.median(each["model"] for each in theirs)
                both = statistics.median(each["model"] + each["tokenizer"] for each in theirs)
                ratios = [our / their["model"] for our, their in zip(ours, theirs, strict=True)]
                print(
                    f"{name:18} {dtype:9}  {model:5.2f} s  {both:12.2f} s {statistics.median(ours):5.2f} s "
                    f"{statistics.median(ratios):6.2f}  {' '.join(f'{each:.2f}' for each in ratios)}",
                    flush=True,
                )


def run_child(who: str, folder: pathlib.Path, dtype: str, shard_size: str) -> dict[str, float]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, "--child", who, str(folder), dtype, shard_size]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def sync_folder(folder: pathlib.Path) -> None:
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def measure_transformers(folder: pathlib.Path, dtype: str, shard_size: str, out: pathlib.Path) -> dict[str, float]:
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    for weight in model.parameters():  # in memory of its own, not in a map of the file
        weight.data = weight.data.clone()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = {}
    for _ in range(2):
        shutil.rmtree(out / "export", ignore_errors=True)
        os.sync()
        start = time.perf_counter()
        # What was trained in float32 is exported as it came.
        model.to(torch.bfloat16) if dtype != "bfloat16" else model
        model.save_pretrained(out / "export", max_shard_size=shard_size)
        sync_folder(out / "export")
        found["model"] = time.perf_counter() - start
        model.to(getattr(torch, dtype))
        start = time.perf_counter()
        tokenizer.save_pretrained(out / "export")
        sync_folder(out / "export")
        found["tokenizer"] = time.perf_counter() - start
    return found


def measure_jaxsft(folder: pathlib.Path, dtype: str, shard_size: str, out: pathlib.Path) -> dict[str, float]:
    import jax

    from jaxsft.config import MeshConfig, ModelConfig
    from jaxsft.folders.export import export_folder
    from jaxsft.folders.pretrained import load_weights, open_model, open_tokenizer
    from jaxsft.mesh import make_mesh

    config = ModelConfig(path=str(folder), param_dtype=dtype)
    tokenizer = open_tokenizer(config)
    pretrained = open_model(config, tokenizer)
    weights = load_weights(pretrained, make_mesh(MeshConfig()), seed=0)
    jax.block_until_ready(jax.tree.leaves(weights))
    stored = pretrained.stored if shard_size == "50GB" else None
    for _ in range(2):
        shutil.rmtree(out / "export", ignore_errors=True)
        os.sync()
        start = time.perf_counter()
        export_folder(
            out / "export",
            weights,
            family=pretrained.family,
            hf_config=pretrained.hf_config,
            vocab_size=pretrained.decoder_config.vocab_size,
            tokenizer=tokenizer.tokenizer,
            stop_ids=tokenizer.stops,
            stored=stored,
            source_folder=folder,
            tokenizer_folder=folder,
            max_shard_bytes=int(shard_size.removesuffix("MB").removesuffix("GB")) * 10**6,
        )
        seconds = time.perf_counter() - start
    return {"model": seconds}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        who, given, *options = sys.argv[2:]
        measure = measure_transformers if who == "transformers" else measure_jaxsft
        with tempfile.TemporaryDirectory() as place:
            print(json.dumps(measure(pathlib.Path(given), *options, pathlib.Path(place))))
    else:
        main()
