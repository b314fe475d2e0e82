"""A first config, from a model and its data: a file with a comment at every key, to be read, changed and trained.

In: a model folder and a file of rows, as options or as answers to four questions. Out: a YAML file that loads and fits
the model, the rows and the devices that are here; never in the place of another.
"""

import json
import os
import pathlib
import re
import shlex
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import yaml

from jaxsft.config import Config, ConfigError, DataConfig, ModelConfig
from jaxsft.config_files import load_config
from jaxsft.disk.writing import at_home, place, write_new
from jaxsft.folders.pretrained import OpenTokenizer, Pretrained, open_model, open_tokenizer
from jaxsft.model.lora import of_files
from jaxsft.rows.strict import DataError
from jaxsft.setup import Setup
from jaxsft.training.metrics import num_params

LOOKED_AT = 2000
"""Rows of the data by which lengths are judged."""
LONGEST_LOOKED_AT = 2**20
LONGEST_ROW = 8192
"""Longest `data.seq_len` that is proposed: more is asked for by those who know that they have the memory."""
SHORTEST_ROW = 128
FEWEST_STEPS = 30
"""Steps that a run should have: with few rows, batches are smaller."""
BYTES_OF_FULL = 16
"""Of a parameter that is trained: itself, its gradient and two moments, in float32."""
SHARE_OF_MEMORY = 0.6
"""Of the devices' memory that these may take up; activations need the rest."""

USUAL_EPOCHS = 2.0

T = TypeVar("T")


class Model(NamedTuple):
    """The model that was chosen."""

    path: str
    tokenizer: OpenTokenizer
    pretrained: Pretrained
    template: str | None
    """Name of a chat template of ours, where its tokenizer has none."""

    @property
    def num_params(self) -> int:
        return num_params(of_files(self.pretrained.model.weights), self.pretrained.decoder_config)[0]


class Data(NamedTuple):
    """The rows that were chosen, and what the first of them came to."""

    path: str
    report: dict[str, Any]
    lengths: np.ndarray
    """Tokens of each example."""


class How(NamedTuple):
    """How long is trained, and what."""

    is_lora: bool
    epochs: float


def init(
    out: str,
    *,
    model: str | None = None,
    data: str | None = None,
    ask: Callable[[str], str] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Writes a config.

    Args:
        out: the file.
        model: folder or hub id.
        data: file, folder or hub id of rows.
        ask: puts a question to the user and returns the answer; without it, `model` and `data` must be given, and with
            both of them nothing is asked.
        say: is told what was found.

    Raises:
        ConfigError, DataError: the file is there already, or model or data are not usable.
    """
    path = at_home(out)
    if path.exists() or path.is_symlink():
        raise ConfigError(f"{out}: exists already, and is left as it is; give another name as -o")
    if ask is None and (model is None or data is None):
        raise ConfigError("init: give --model and --data; on a terminal, what is not given is asked")
    if model is not None and data is not None:
        ask = None
    chosen = _asked("1 of 4  The model to begin with: a folder or hub id", model, "", ask, _model, say)
    say(_describe_model(chosen))
    rows = _asked(
        "2 of 4  The training rows: a file, folder or hub id", data, "", ask, lambda answer: _data(answer, chosen), say
    )
    say(_describe_data(rows))
    usual = f"runs/{path.stem}"
    run_dir = _asked("3 of 4  The folder of the run", usual if ask is None else None, usual, ask, _run_dir, say)
    usual_how = How(not _fits_whole(chosen), USUAL_EPOCHS)
    usual = f"{'lora' if usual_how.is_lora else 'full'} {USUAL_EPOCHS:g}"
    how = _asked(
        "4 of 4  All weights (full) or adapters (lora), and how many epochs",
        usual if ask is None else None,
        usual,
        ask,
        lambda answer: _how(answer, usual_how),
        say,
    )
    text = _text(path, chosen, rows, run_dir, how)
    Setup(load_config(yaml.safe_load(text))).check_fit()
    write_new(path, text)


def _asked(
    question: str,
    given: str | None,
    usual: str,
    ask: Callable[[str], str] | None,
    read: Callable[[str], T],
    say: Callable[[str], None],
) -> T:
    """What was given, or else answered; asked again where it is of no use."""
    if given is not None:
        return read(given)
    assert ask is not None
    while True:
        try:
            answer = ask(f"{question}{f' [{usual}]' if usual else ''}: ").strip() or usual
        except EOFError:
            raise ConfigError("init: the answers ended, and nothing was written") from None
        try:
            return read(answer)
        except (ConfigError, DataError) as error:
            say(f"{error}")


def _model(path: str) -> Model:
    if not path:
        raise ConfigError("a model is needed, such as a folder with config.json, safetensors and a tokenizer")
    config = ModelConfig(path=path)
    tokenizer = open_tokenizer(config)
    template = None
    if not tokenizer.tokenizer.chat_template:
        template = "chatml"
        tokenizer = open_tokenizer(config, template)
    return Model(path, tokenizer, open_model(config, tokenizer), template)


def _data(path: str, model: Model) -> Data:
    if not path:
        raise ConfigError("training rows are needed, such as a JSONL file with messages")
    # All lengths are looked at, also those beyond what the model knows.
    data = {"train": path, "seq_len": LONGEST_LOOKED_AT, "chat_template": model.template}
    config = Config(model=ModelConfig(path=model.path), data=DataConfig.model_validate(data))
    setup = Setup(config)
    (source,) = setup.prepared(config.data.train, limit=LOOKED_AT).sources
    found = Data(path, source.report, np.diff(source.offsets))
    if (shortest := found.lengths.min()) > (most := _most(model)):
        raise DataError(
            f"{path}: the shortest example has {shortest:,} tokens, but rows of at most {most:,} are proposed"
        )
    return found


def _most(model: Model) -> int:
    """Longest rows that are proposed."""
    return min(LONGEST_ROW, model.pretrained.decoder_config.max_position)


def _run_dir(path: str) -> str:
    place(path, "run_dir")
    return path


def _how(answer: str, usual: How) -> How:
    """Of "lora 3", "full" or "1.5"; what is not said is as usual."""
    kinds, numbers = [], []
    for word in answer.lower().replace(",", " ").split():
        if word in ("full", "lora"):
            kinds.append(word)
        elif re.fullmatch(r"\d{1,4}(\.\d+)?", word) and float(word) > 0:
            numbers.append(float(word))
        else:
            kinds += [word, word]
    if len(kinds) > 1 or len(numbers) > 1:
        raise ConfigError(f"{answer!r} given, expected full or lora and a number of epochs, such as: lora 2")
    return How(kinds == ["lora"] if kinds else usual.is_lora, numbers[0] if numbers else usual.epochs)


def _fits_whole(model: Model) -> bool:
    """Whether all weights can be trained on the devices that are here."""
    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if limit is None else limit * jax.device_count()
    return model.num_params * BYTES_OF_FULL <= there * SHARE_OF_MEMORY


def _describe_model(model: Model) -> str:
    has_none = f"; its tokenizer has no chat template, {model.template} is taken" if model.template else ""
    return f"{model.path}: {model.num_params:,} parameters{has_none}"


def _describe_data(data: Data) -> str:
    found = data.report
    more = " first" * (found["rows"] >= LOOKED_AT)
    return (
        f"{data.path}: format {found['format']}; the{more} {found['rows']:,} rows give {found['examples']:,} examples, "
        f"the longest of {data.lengths.max():,} tokens"
    )


def _seq_len(model: Model, data: Data) -> int:
    """The next power of two that holds the longest example, within what the model knows."""
    most = _most(model)
    length = SHORTEST_ROW
    while length < data.lengths.max() and length < most:
        length *= 2
    return min(length, most)


def _batch_size(data: Data, seq_len: int, epochs: float) -> int:
    """32, or fewer where the rows are few; a multiple of the devices."""
    wanted = 32
    if data.report["rows"] < LOOKED_AT:
        rows = data.lengths.sum() / seq_len * epochs
        while wanted > 4 and rows / wanted < FEWEST_STEPS:
            wanted //= 2
    devices = jax.device_count()
    return -(-wanted // devices) * devices


def _text(path: pathlib.Path, model: Model, data: Data, run_dir: str, how: How) -> str:
    seq_len = _seq_len(model, data)
    longer = int((data.lengths > seq_len).sum())
    room = f"{longer:,} of {len(data.lengths):,} are longer" if longer else f"the longest has {data.lengths.max():,}"
    size = f"{model.num_params * BYTES_OF_FULL / 2**30:,.3g} GiB"
    name = shlex.quote(str(path))
    lines = [
        "# A first config, written by `run.py init`; `run.py keys` lists what else there is.",
        f"# look:   python run.py preview {name}",
        f"# train:  python run.py train {name}",
        "",
        f"run_dir: {json.dumps(run_dir, ensure_ascii=False)}  # checkpoints, metrics and, at the end, export/",
        "model:",
        f"  path: {json.dumps(model.path, ensure_ascii=False)}  # {model.num_params:,} parameters",
        "data:",
        f"  train: {json.dumps(data.path, ensure_ascii=False)}  # format {data.report['format']}",
        '  # eval: "held_out.jsonl"  # rows that are not trained: their loss, and answers to read, before and after',
        f"  seq_len: {seq_len}  # tokens of a row, which examples share; {room}",
    ]
    if model.template:
        lines.append(f"  chat_template: {model.template}  # the tokenizer has none; docs/templates_named.md has others")
    lines += [
        "train:",
        f"  epochs: {how.epochs:g}  # passes over the rows",
        f"  batch_size: {_batch_size(data, seq_len, how.epochs)}  # rows per step",
        "  # microbatch_size: 4  # rows at once: fewer need less memory, and give the same",
    ]
    if how.is_lora:
        lines += [
            "lora:",
            f"  rank: 16  # adapters on all linear maps; all weights, with gradients and moments, would need {size}",
        ]
    else:
        lines += [
            f"# All weights need {size} with gradients and moments. Adapters need little, and ten times the rate:",
            "# lora: {rank: 16}",
        ]
    lines += [
        "optim:",
        f"  learning_rate: {'2.0e-4' if how.is_lora else '2.0e-5'}  # after warm-up, from where it falls as a cosine",
        "checkpoint:",
        "  every: 100  # steps; a run that is stopped goes on from its newest checkpoint",
    ]
    return "\n".join(lines) + "\n"
