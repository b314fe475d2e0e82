"""One run in 1, 2 and 4 processes: losses, exports, resumes on other topologies, and the bytes each one sums up.

Run as `python tests/faults/topologies.py bytes` (a minute) or `... runs [steps]` (10 minutes on 2 cores); `--into DIR`
keeps what was made. Processes are on this machine, on simulated devices of the CPU; 8 devices in all.

`bytes`: a checkpoint of about 300 MB, saved and restored by 1, 2 and 4 processes; the bytes that a process reads to
seal it, to verify it, and to restore it, the most of all processes. These are exact, and need no quiet machine.

`runs`: the same steps with evaluations, checkpoints and exports, in one go and resumed; the largest relative
difference of a loss to the run of one process, and whether exports of one checkpoint are equal to the byte.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEVICES = 8

CHILD = """
import json, os, pathlib, sys, threading
import jax
from jaxsft.hosts.start import start_processes
from jaxsft.mesh import make_mesh, partition_spec
if "JAX_COORDINATOR_ADDRESS" in os.environ:
    start_processes()
import jax.numpy as jnp
from etils import epath
from jax.sharding import NamedSharding
from jaxsft.config import CheckpointConfig, MeshConfig
from jaxsft.disk import seal
from jaxsft.training.checkpoint import Checkpointer

summed, lock, checksum = [0], threading.Lock(), seal.checksum

def counted(path):
    entry = checksum(path)
    with lock:
        summed[0] += entry.size
    return entry

seal.checksum = counted

def read():
    return int(pathlib.Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])

mesh = make_mesh(MeshConfig())
place = NamedSharding(mesh, partition_spec("l d f"))
make = jax.jit(lambda: {f"w{i}": jax.random.normal(jax.random.key(i), (4, 1024, 2048)) for i in range(9)},
               out_shardings={f"w{i}": place for i in range(9)})
abstract = {f"w{i}": jax.ShapeDtypeStruct((4, 1024, 2048), jnp.float32, sharding=place) for i in range(9)}
checkpointer = Checkpointer(epath.Path(sys.argv[2]), CheckpointConfig(), lambda text: None)
found = {}
if sys.argv[1] == "save":
    checkpointer.save(1, make())
    checkpointer.close()
    found["sealed"] = summed[0]
else:
    before = read()
    restored = checkpointer.restore(abstract)
    jax.block_until_ready(restored)
    found["verified"] = summed[0]
    found["restored"] = read() - before - summed[0]
    same = all(bool((a == b).all()) for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(make())))
    assert same
    checkpointer.close()
print("RESULT", json.dumps(found))
"""


def cluster(number: int) -> list[dict[str, str]]:
    """The environment of each process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "JAX_NUM_PROCESSES": str(number)}
    shared |= {"XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": str(DEVICES // number)}
    if number > 1:
        shared |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    return [shared | {"JAX_PROCESS_ID": str(process)} for process in range(number)]


def run_all(command: list[str], environments: list[dict[str, str]]) -> list[str]:
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    processes = [subprocess.Popen(command, env=each, **pipes) for each in environments]
    outputs = [process.communicate(timeout=500)[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("\n".join(outputs))
    return outputs


def count_bytes(place: pathlib.Path) -> None:
    print("saved by  read by   MB: whole   sealed  verified  restored   (the most of any process)")
    for number in (1, 2, 4):
        folder = place / f"by-{number}"
        command = [sys.executable, "-c", CHILD, "save", str(folder)]
        sealed = max(result["sealed"] for result in results(run_all(command, cluster(number))))
        whole = sum(path.stat().st_size for path in (folder / "1").rglob("*") if path.name != "seal.json")
        for readers in {1, 2, 4} if number == 1 else {number, 1}:
            command[3:] = ["restore", str(folder)]
            found = results(run_all(command, cluster(readers)))
            verified, restored = (max(each[name] for each in found) for name in ("verified", "restored"))
            print(
                f"{number:8}  {readers:7}   {whole / 1e6:9.1f} {sealed / 1e6:8.1f} {verified / 1e6:9.1f} "
                f"{restored / 1e6:9.1f}",
                flush=True,
            )


def results(outputs: list[str]) -> list[dict[str, int]]:
    return [json.loads(re.search(r"RESULT (.*)", output)[1]) for output in outputs]


def losses(folder: pathlib.Path) -> dict[str, float]:
    """Every loss, and what tells the rows, by step and name."""
    found = {}
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        names = ("loss", "eval_loss", "rows_crc")
        found |= {f"{line['step']} {name}": line[name] for name in names if name in line}
    return found


def compare_runs(place: pathlib.Path, steps: int) -> None:
    config = write_config(place, steps)

    def train(name: str, number: int, mesh: dict[str, int], *, after: pathlib.Path | None = None) -> pathlib.Path:
        folder = place / name
        if after is not None:
            resume_at(after, folder, steps // 3)
        overrides = [f"run_dir={folder}", *(f"mesh.{axis}={size}" for axis, size in mesh.items())]
        begin = time.perf_counter()
        environments = cluster(number)
        run_all([sys.executable, "run.py", "train", str(config), *overrides], environments)
        ours, expected = losses(folder), losses(place / "whole")
        assert ours.keys() == expected.keys(), ours.keys() ^ expected.keys()
        assert all(ours[key] == expected[key] for key in ours if "rows_crc" in key), "other rows"
        worst = max(abs(ours[key] / expected[key] - 1) for key in ours if "rows_crc" not in key)
        print(
            f"{name:28} {number} processes, mesh {mesh or 'fsdp 8'}: {len(ours)} values, same rows, losses within "
            f"{worst:.1e}  ({time.perf_counter() - begin:.0f} s)",
            flush=True,
        )
        return folder

    whole = train("whole", 1, {})
    four = train("four", 4, {})
    command = [sys.executable, "run.py", "export", str(four), "--out", str(place / "by-one")]
    run_all(command, cluster(1)[:1])
    by_four, by_one = (
        {path.name: path.read_bytes() for path in folder.iterdir()} for folder in (four / "export", place / "by-one")
    )
    print(f"export of four processes equals that of one to the byte: {by_four == by_one}", flush=True)
    train("1 then 4", 4, {"tensor": 2}, after=whole)
    train("4 then 1", 1, {"data": 2, "tensor": 2}, after=four)
    two = train("1 then 2", 2, {"data": 2}, after=whole)
    train("2 then 4", 4, {"fsdp": 2, "context": 4}, after=two)


def resume_at(run: pathlib.Path, folder: pathlib.Path, step: int) -> None:
    """A copy of a run as if it had been killed after this checkpoint."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("export", "run.lock"))
    for checkpoint in (folder / "checkpoints").iterdir():
        if checkpoint.is_dir() and int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)
    (folder / "progress.json").write_text(json.dumps({"sealed": step}))


def write_config(place: pathlib.Path, steps: int) -> pathlib.Path:
    """A model of two layers on the quickstart's data, whatever mesh cuts it."""
    source, model = ROOT / "configs" / "quickstart", place / "model"
    model.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(source / name, model)
    config = json.loads((source / "config.json").read_text())
    config |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8}
    config |= {"num_key_value_heads": 4, "head_dim": 4, "initializer_range": 0.1}
    (model / "config.json").write_text(json.dumps(config))
    path = place / "run.yaml"
    path.write_text(
        f"model: {{path: {model}, weights: random, remat: none}}\n"
        f"data: {{train: {source}/train.jsonl, eval: {source}/eval.jsonl, seq_len: 128, cache: {place}/cache}}\n"
        f"train: {{batch_size: 8, steps: {steps}}}\n"
        f"log: {{every: 1}}\n"
        f"eval: {{every: {steps // 3}, samples: 0, examples: 16, exact_match: false}}\n"
        f"checkpoint: {{every: {steps // 3}, keep: 9}}\n"
    )
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("bytes", "runs"))
    parser.add_argument("steps", nargs="?", type=int, default=30)
    parser.add_argument("--into", type=pathlib.Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        into = args.into or pathlib.Path(temporary)
        into.mkdir(parents=True, exist_ok=True)
        count_bytes(into) if args.what == "bytes" else compare_runs(into, args.steps)
