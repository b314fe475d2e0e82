"""A run whose folder, data, model and cache are in a bucket is the run that it is on a disk, whatever happens to it."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from compilation import xla_flags
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from object_store import download, start_store, upload

from jaxsft.cli import main
from jaxsft.config import CheckpointConfig
from jaxsft.config_files import load_config
from jaxsft.disk import buckets
from jaxsft.disk.buckets import BucketPath
from jaxsft.disk.writing import WriteError, write_whole
from jaxsft.folders.weights.stored import open_folder
from jaxsft.train import train
from jaxsft.training.checkpoint import Checkpointer, SaveError

ROOT = BucketPath("s3://data")
EXACT = ("step", "loss", "accuracy", "grad_norm", "learning_rate", "total_tokens", "rows_crc", "eval_loss")


@pytest.fixture(scope="module", autouse=True)
def store():
    yield from start_store()


@pytest.fixture(scope="module")
def model(tiny_config, tmp_path_factory):
    """A model folder with weights, in several files."""
    folder = tmp_path_factory.mktemp("model")
    assert train(load_config(tiny_config, [f"run_dir={folder}/model", "train.steps=1"])) == 0
    return folder / "model" / "export"  # which the card calls "model", as that in the bucket


@pytest.fixture(scope="module")
def on_disk(tiny_config, model, tmp_path_factory):
    """The run that nothing happened to, on a disk."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert (
        train(load_config(tiny_config, [f"run_dir={folder}", f"model.path={model}", "model.weights=pretrained"])) == 0
    )
    return folder


@pytest.fixture(scope="module")
def in_bucket(tiny_config, tiny_data, model, tmp_path_factory):
    """The same run with all that it reads and writes in a bucket; killed on its way, and started again."""
    upload(model, ROOT / "model")
    upload(tiny_data, ROOT / "rows")
    folder = tmp_path_factory.mktemp("started")
    overrides = [
        "run_dir=s3://data/runs/run",
        "model.path=s3://data/model",
        "model.weights=pretrained",
        "data.train=s3://data/rows/train.jsonl",
        "data.eval=s3://data/rows/eval.jsonl",
        "data.cache=s3://data/cache",
    ]
    repo = pathlib.Path(__file__).resolve().parents[1]
    environment = os.environ | {"XLA_FLAGS": xla_flags(8), "XDG_CACHE_HOME": str(folder), "PYTHONPATH": str(repo)}
    command = [sys.executable, str(repo / "run.py"), "train", str(tiny_config), *overrides]

    def start():
        log = (folder / "log").open("ab")
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)

    killed = start()
    while killed.poll() is None and not (ROOT / "runs/run/checkpoints/4/seal.json").exists():
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, (folder / "log").read_text()
    assert not (ROOT / "runs/run/export").exists()
    assert start().wait(timeout=300) == 0, (folder / "log").read_text()
    return ROOT / "runs/run", folder


def lines(path):
    found = [json.loads(line) for line in path.read_bytes().splitlines()]
    return [{key: line[key] for key in EXACT if key in line} for line in found]


def test_killed_and_continued_it_is_the_run_on_a_disk_to_the_bit(on_disk, in_bucket, tmp_path):
    folder, started = in_bucket
    assert "taken over from" in (started / "log").read_text()
    assert lines(folder / "metrics.jsonl") == lines(on_disk / "metrics.jsonl")
    names = sorted(json.loads((on_disk / "export" / "seal.json").read_bytes()))
    assert sorted(each.name for each in (folder / "export").iterdir()) == sorted([*names, "seal.json"])
    for name in [*names, "seal.json"]:
        assert (folder / "export" / name).read_bytes() == (on_disk / "export" / name).read_bytes(), name
    expected = ocp.StandardCheckpointer().restore(epath.Path(on_disk) / "checkpoints" / "12" / "state")
    meta = json.loads((folder / "checkpoints" / "12" / "meta.json").read_bytes())
    assert sorted(expected) == sorted(meta["arrays"])
    state = folder / "checkpoints" / "12" / "state" / "ocdbt.process_0"
    for number, name in enumerate(sorted(expected)):
        values = np.asarray(expected[name])
        parts = [each for each in state.iterdir() if each.name.startswith(f"{number}.")]
        for part in parts:
            bounds = [each.split("-") for each in part.name.partition(".")[2].split("_") if each]
            where = tuple(slice(int(first), int(last)) for first, last in bounds)
            assert part.read_bytes() == np.ascontiguousarray(values[where]).tobytes(), name
        assert sum(part.stat().length for part in parts) == values.nbytes


def test_nothing_of_it_is_on_the_disk_but_copies_in_the_cache(in_bucket):
    _, started = in_bucket
    assert sorted(path.name for path in started.iterdir()) == ["jaxsft", "log", "matplotlib"]
    assert not pathlib.Path("/s3:").exists()


def test_transformers_loads_its_export_after_a_download(in_bucket, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    folder = download(in_bucket[0] / "export", tmp_path / "export")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], return_tensors="pt", return_dict=True)
    assert torch.isfinite(model(**ids).logits).all()


def test_the_commands_take_a_run_in_a_bucket(in_bucket, tiny_config, tmp_path, monkeypatch, capsys):
    folder, _ = in_bucket
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert main(["verify", str(folder)]) == 0
    assert "DAMAGED" not in capsys.readouterr().out
    assert main(["report", str(folder), "--out", "s3://data/report"]) == 0
    assert {each.name for each in (ROOT / "report").iterdir()} == {"report.html", "report.json", "curves.png"}
    assert main(["preview", f"{folder}/config.yaml", f"run_dir={folder}"]) == 0
    assert (ROOT / "runs/run.preview.html").is_file()
    assert main(["export", str(folder), "--step", "12", "--out", "s3://data/again"]) == 0
    assert (ROOT / "again/model.safetensors").read_bytes() == (folder / "export/model.safetensors").read_bytes()
    assert main(["evaluate", f"{folder}/config.yaml"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]
    damaged = folder / "export" / "config.json"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-2])
    assert main(["verify", str(folder)]) == 1
    damaged.write_bytes(whole)


def test_prepared_data_are_fetched_by_the_next_host_and_not_made_again(
    in_bucket, tiny_config, tmp_path, monkeypatch, capsys
):
    folder, _ = in_bucket
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (prepared,) = [each for each in (ROOT / "cache/jaxsft-prepared").iterdir() if each.is_dir()][:1]
    assert main(["preview", f"{folder}/config.yaml", "run_dir=s3://data/runs/other"]) == 0
    assert f"fetching {prepared}" in capsys.readouterr().out
    tokens = prepared / "tokens.bin"
    whole = tokens.read_bytes()
    assert (tmp_path / "jaxsft" / "prepared" / prepared.name / "tokens.bin").read_bytes() == whole
    # What is damaged there is neither used nor left.
    tokens.write_bytes(whole[:-1] + b"x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "third"))
    assert main(["preview", f"{folder}/config.yaml", "run_dir=s3://data/runs/other"]) == 0
    assert "that are damaged; they are prepared anew" in capsys.readouterr().out
    assert tokens.read_bytes() == whole


def test_a_model_is_read_by_ranges_of_what_a_device_needs(model, monkeypatch):
    ours, asked = BucketPath("memory://data/model"), []
    upload(model, ours)
    stored, local = open_folder(ours), open_folder(model)
    assert not stored.problems and stored.tensors.keys() == local.tensors.keys()
    real = BucketPath.read_range
    monkeypatch.setattr(
        BucketPath, "read_range", lambda self, at, count: (asked.append(count), real(self, at, count))[1]
    )
    for span in (1 << 26, 100):
        monkeypatch.setattr("jaxsft.folders.weights.stored.SPAN_BYTES", span)
        for name, tensor in local.tensors.items():
            rows, columns = int(np.prod(tensor.shape[:-1])), tensor.shape[-1]
            for part in ((0, rows, 0, columns), (rows // 2, rows, 0, columns), (0, rows, columns // 2, columns)):
                where = slice(*part[:2]), slice(*part[2:])
                np.testing.assert_array_equal(stored.tensors[name].read(*where), tensor.read(*where))
    asked.clear()
    table = local.tensors["model.embed_tokens.weight"]
    stored.tensors["model.embed_tokens.weight"].read(slice(10, 14), slice(0, table.shape[1]))
    assert sum(asked) <= 4 * table.shape[1] * 4


def test_a_lost_connection_is_waited_for_and_given_up_with_one_error(store, monkeypatch):
    path = ROOT / "note"
    store.stop()
    back = threading.Timer(1.0, store.start)
    back.start()
    write_whole(path, b"before")  # tried again until the store is there
    back.join()
    monkeypatch.setattr(buckets, "DELAYS", (0.05, 0.1))
    folder, mesh = ROOT / "lost" / "checkpoints", jax.make_mesh((8,), ("x",))
    rows = jax.device_put(np.arange(64.0, dtype=np.float32), NamedSharding(mesh, PartitionSpec("x")))
    abstract = {"w": jax.ShapeDtypeStruct(rows.shape, rows.dtype, sharding=rows.sharding)}
    saver = Checkpointer(folder, CheckpointConfig(), print)
    saver.save(1, {"w": rows})
    saver.wait()
    store.stop()
    with pytest.raises(WriteError, match=r"note: could not be written: .*\(tried 3 times in 0 s\)"):
        write_whole(path, b"after")
    with pytest.raises(OSError):  # and not: there is none
        path.exists()
    with pytest.raises(SaveError, match="lost/checkpoints/2: could not be written"):
        saver.save(2, {"w": rows + 1})
        saver.wait()
    store.start()
    assert path.read_bytes() == b"before"
    saver.close()
    again = Checkpointer(folder, CheckpointConfig(), print)
    np.testing.assert_array_equal(again.restore(abstract)["w"], rows)
    again.close()
