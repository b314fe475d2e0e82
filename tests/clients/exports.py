"""Exports of every kind that the clients open, each from a short run of jaxsft.

In: the material folder and a folder to work in. Out: for each kind the folder that `run.py train` exported. A model is
small, and random where the material has none; a few steps of training give every control token a row of its own and
make answers of it that are not one token over and over.
"""

import json
import pathlib
import shutil
import subprocess
import sys
from typing import Any, NamedTuple

REPO = pathlib.Path(__file__).resolve().parents[2]
ROWS = REPO / "configs" / "quickstart" / "train.jsonl"


class Kind(NamedTuple):
    """One sort of model and tokenizer."""

    name: str
    """Also its folder."""
    title: str
    """As the table has it."""
    tokenizer: str | None = None
    """Folder of the material; left out: that of the model."""
    model: str | None = None
    """Folder of the material; left out: a random model of `config`."""
    config: dict[str, Any] = {}
    template: str | None = None
    """`data.chat_template`; left out: the tokenizer's own."""
    gguf_of: str | None = None
    """The kind whose export, turned into GGUF by llama.cpp's converter, is trained on."""
    makes_tokenizer: str | None = None
    """The script that makes its tokenizer."""
    learning_rate: float = 3e-3
    steps: int = 30


SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "attention_bias": False, "dtype": "float32", "initializer_range": 0.2,
}  # fmt: skip


def _config(model_type: str, architecture: str, **others: Any) -> dict[str, Any]:
    return {"model_type": model_type, "architectures": [architecture], **SIZES, **others}


def _theta(theta: float) -> dict[str, Any]:
    """As transformers 5 writes it, and nothing else."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


KINDS = [
    Kind("llama", "llama, byte fallback, as it came", model="models/stories260K", template="alpaca", steps=150),
    Kind("llama_grown", "llama, byte fallback, grown", model="models/stories260K", template="chatml", steps=150),
    Kind(
        "llama_model_file",
        "llama, byte fallback, tokenizer.model, grown",
        makes_tokenizer="make_sentencepiece.py",
        config=_config("llama", "LlamaForCausalLM", vocab_size=600, tie_word_embeddings=False, **_theta(50000.0)),
        template="chatml",
        steps=60,
    ),
    Kind(
        "llama_2",
        "llama, Llama 2's tokenizer and template",
        "tokenizers/llama-2",
        config=_config("llama", "LlamaForCausalLM", vocab_size=32000, tie_word_embeddings=False, **_theta(50000.0)),
    ),
    Kind(
        "smollm2_tokenizer",
        "llama, SmolLM2's tokenizer and template",
        "tokenizers/smollm2",
        config=_config("llama", "LlamaForCausalLM", vocab_size=49152, tie_word_embeddings=True, **_theta(100000.0)),
    ),
    Kind(
        "qwen3",
        "qwen3",
        "tokenizers/qwen3",
        config=_config("qwen3", "Qwen3ForCausalLM", vocab_size=151936, tie_word_embeddings=True, **_theta(1000000.0)),
    ),
    Kind(
        "mixtral_grown",
        "mixtral, Llama 2's tokenizer, grown",
        "tokenizers/llama-2",
        config=_config(
            *("mixtral", "MixtralForCausalLM"),
            **{"vocab_size": 32000, "tie_word_embeddings": False, "num_local_experts": 4, "num_experts_per_tok": 2},
            **{"sliding_window": None, **_theta(1000000.0)},
        ),
        template="chatml",
    ),
    Kind(
        "qwen3_moe",
        "qwen3_moe, Qwen2.5's tokenizer",
        "tokenizers/qwen2.5",
        config=_config(
            *("qwen3_moe", "Qwen3MoeForCausalLM"),
            **{"vocab_size": 151936, "tie_word_embeddings": False, "num_experts": 4, "num_experts_per_tok": 2},
            **{"moe_intermediate_size": 64, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
            **_theta(1000000.0),
        ),
    ),
    Kind("from_gguf", "llama, imported from GGUF", gguf_of="smollm2_tokenizer"),
]
SMOLLM2 = Kind("smollm2", "SmolLM2-135M", learning_rate=2e-5, steps=6)
"""The real one, fetched and opened by the material's own script."""


def make_export(
    kind: Kind, material: pathlib.Path, work: pathlib.Path, *, given: pathlib.Path | None = None, reuse: bool = False
) -> pathlib.Path:
    """The export of a run of this kind.

    Args:
        given: what another program made for this kind: the GGUF to train, or the folder of its tokenizer.
        reuse: take the export of an earlier call, which may be that of other code.

    Raises:
        RuntimeError: jaxsft ended with an error; with the last thing that it said.
    """
    folder = work / kind.name
    export = folder / "run" / "export"
    if reuse and (export / "config.json").is_file():
        return export
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    settings = {
        "run_dir": folder / "run",
        "model.path": given if kind.gguf_of else _model_folder(kind, material, work, given),
        "model.weights": "random" if kind.config else "pretrained",
        "model.remat": "none",
        "data.cache": folder / "cache",
        "train.steps": kind.steps,
        "optim.learning_rate": kind.learning_rate,
    } | ({"data.chat_template": kind.template} if kind.template else {})
    rows = ROWS.read_text().splitlines(keepends=True)
    (folder / "rows.jsonl").write_text("".join(rows[:400]))
    (folder / "run.yaml").write_text(RUN.format(rows=folder / "rows.jsonl"))
    command = [sys.executable, "run.py", "train", str(folder / "run.yaml")]
    command += [f"{key}={value}" for key, value in settings.items()]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    (folder / "log.txt").write_text(done.stdout + done.stderr)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr).strip().splitlines()[-1][:300])
    return export


RUN = """
model: {{path: given on the command line}}
data: {{train: "{rows}", seq_len: 256}}
train: {{batch_size: 4}}
checkpoint: {{every: 1000, keep: 1}}
"""


def _model_folder(
    kind: Kind, material: pathlib.Path, work: pathlib.Path, tokenizer: pathlib.Path | None = None
) -> pathlib.Path:
    if kind is SMOLLM2:
        return work / "SmolLM2-135M"
    if kind.model is not None:
        return material / kind.model
    if kind.tokenizer is not None:
        tokenizer = material / kind.tokenizer
    assert tokenizer is not None
    model = work / kind.name / "model"
    shutil.copytree(tokenizer, model)
    (model / "config.json").write_text(json.dumps(kind.config, indent=2))
    return model


def missing(kind: Kind, material: pathlib.Path, work: pathlib.Path) -> str | None:
    """Why this kind cannot be made here; None where it can."""
    if kind is SMOLLM2:
        command = [sys.executable, str(material / "get_smollm2.py"), str(_model_folder(kind, material, work))]
        done = subprocess.run(command, capture_output=True, text=True)
        return None if done.returncode == 0 else f"not to be had: {(done.stderr.strip().splitlines() or [''])[-1]}"
    needed = [material / name for name in (kind.model, kind.tokenizer) if name]
    absent = [str(path.relative_to(material)) for path in needed if not path.is_dir()]
    return f"no {', '.join(absent)} in the material folder" if absent else None
