"""The model card of an export: README.md with the front matter that the hub reads.

In: what a run was, and the lines of its metrics. Out: the text, which is the same for the same run wherever it was
trained: no dates, no speeds, no folders of this machine. Of local files and folders only the names are told.
"""

import importlib.metadata
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import yaml
from etils import epath

from jaxsft import __version__
from jaxsft.batches.loader import Loader
from jaxsft.batches.stream import StreamLoader
from jaxsft.config import Config
from jaxsft.config_files import dump_config
from jaxsft.disk.seal import read_object
from jaxsft.disk.writing import read_file
from jaxsft.folders.export import CARD
from jaxsft.rows.sources import is_hub
from jaxsft.training.metrics_file import read_metrics
from jaxsft.training.summary import VERSIONS_OF

MOST_POINTS = 12
"""Lines of the table that is the curve."""
MOST_CARD_BYTES = 2**20
TRAINING = "training"
COUNTED = ("rows", "examples", "tokens", "trained_tokens")
LICENSE_KEYS = ("license", "license_name", "license_link")

HIDDEN = (
    "run_dir", "model.path", "model.tokenizer", "data.train", "data.eval", "data.cache", "data.template_date",
    "train.stall_timeout", "mesh", "log", "checkpoint",
)  # fmt: skip
"""Keys of places, machines and days, which say nothing about the model."""
ALWAYS = (
    "seed", "data.seq_len", "train.batch_size", "train.epochs", "train.steps", "optim.name", "optim.learning_rate",
    "optim.schedule",
)  # fmt: skip
"""Keys that are shown also where they have their defaults."""


class Base(NamedTuple):
    """The model that a run began with."""

    name: str
    """Hub id, or the path of a folder."""
    folder: pathlib.Path
    """Where it lies."""
    is_random: bool
    """Only its structure was taken."""


def data_facts(loader: Loader | StreamLoader, held_out: Mapping[str, Loader]) -> list[dict[str, Any]]:
    """What the data of a run came to, source by source; plain JSON, which checkpoints keep for the card."""
    if isinstance(loader, StreamLoader):
        reports = [(TRAINING, report) for report in loader.described]
    else:
        reports = [(TRAINING, source.report) for source in loader.dataset.sources]
    for name, each in held_out.items():
        reports += [(f"held-out: {name}", source.report) for source in each.dataset.sources]
    return [_facts(name, report) for name, report in reports]


def _facts(name: str, report: Mapping[str, Any]) -> dict[str, Any]:
    path = str(report["path"])
    source = path if is_hub(path) else _last_part(path)
    counts = {key: report[key] for key in COUNTED if key in report}
    return {"set": name, "source": source, "is_hub": is_hub(path)} | counts


def card_of_run(
    folder: epath.Path, config: Config, base: Base, *, step: int, is_adapter: bool, data: Sequence[Mapping[str, Any]]
) -> str:
    """The card of a checkpoint of a run.

    Args:
        folder: of the run, with its metrics.jsonl and versions.json.
        config: of the run.
        base: the model that it began with.
        step: of the checkpoint.
        is_adapter: the export is an adapter beside its base.
        data: what `data_facts` gave.
    """
    try:
        lines = read_metrics(folder / "metrics.jsonl")
    except (OSError, ValueError):
        lines = []
    try:
        versions = {name: str(text) for name, text in read_object(folder / "versions.json").items()}
    except (OSError, ValueError):
        versions = {"jaxsft": __version__} | {name: importlib.metadata.version(name) for name in VERSIONS_OF}
    return model_card(config, base, lines, step=step, is_adapter=is_adapter, data=data, versions=versions)


def model_card(
    config: Config,
    base: Base,
    lines: Sequence[Mapping[str, Any]],
    *,
    step: int,
    is_adapter: bool,
    data: Sequence[Mapping[str, Any]],
    versions: Mapping[str, str],
) -> str:
    """The text of README.md; arguments as of `card_of_run`, and:

    Args:
        lines: of metrics.jsonl.
        versions: of packages, by name.
    """
    name = base.name if _is_hub_id(base.name) else _name_of_folder(base.name)
    how = "an adapter (LoRA) for" if is_adapter else "trained from random weights with the structure of"
    how = how if is_adapter or base.is_random else "a fine-tuned"
    of = ", ".join(f"{each} {versions[each]}" for each in ("jaxsft", *VERSIONS_OF) if each in versions)
    parts = [
        f"---\n{_front_matter(base, data, is_adapter=is_adapter)}---",
        f"# {name}, {'trained' if base.is_random else 'fine-tuned'}",
        f"This is {how} {name}: checkpoint {step} of a supervised fine-tuning with jaxsft.",
        _results(lines, step),
        _data(data, lines),
        f"## Settings\n\nThose that are not the defaults, and a few that are.\n\n{_fenced(_settings(config))}",
        _curve(lines),
        f"## Versions\n\n{of}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(base: Base, data: Sequence[Mapping[str, Any]], *, is_adapter: bool) -> str:
    """What the hub reads; it takes no path for a base model, and no file for a dataset."""
    of_hub = [each["source"] for each in data if each["is_hub"] and each["set"] == TRAINING]
    datasets = [re.split("[@:]", source)[0] for source in of_hub]
    found: dict[str, Any] = {}
    if _is_hub_id(base.name) and not base.is_random:
        found["base_model"] = base.name
    if datasets:
        found["datasets"] = list(dict.fromkeys(datasets))
    found["library_name"] = "peft" if is_adapter else "transformers"
    found |= {} if base.is_random else _license(base.folder)
    found["pipeline_tag"] = "text-generation"
    found["tags"] = ["jaxsft", "sft", *["lora"] * is_adapter]
    return yaml.safe_dump(found, sort_keys=False, allow_unicode=True)


def _license(folder: pathlib.Path) -> dict[str, str]:
    """What the card of the base says of its license; {} where it says nothing."""
    try:
        text = read_file(folder / CARD, most=MOST_CARD_BYTES).decode("utf-8")
        head = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
        stated = yaml.safe_load(head[1]) if head else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    if not isinstance(stated, dict):
        return {}
    return {key: stated[key] for key in LICENSE_KEYS if isinstance(stated.get(key), str)}


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not name.endswith(".gguf")


def _name_of_folder(path: str) -> str:
    """Of a model; the export of a run is called as the run."""
    above, _, last = path.rstrip("/").rpartition("/")
    return _last_part(above if above and re.fullmatch("export(-.*)?", last) else path)


def _last_part(path: str) -> str:
    return " ".join(path.rstrip("/").rsplit("/", 1)[-1].split())


def _results(lines: Sequence[Mapping[str, Any]], step: int) -> str:
    """The losses of this checkpoint, of the best one and before training."""
    held_out = {line["step"]: line["eval_loss"] for line in lines if _is_number(line.get("eval_loss"))}
    losses = {line["step"]: line["loss"] for line in lines if _is_number(line.get("loss"))}
    if not (losses or held_out):
        return ""
    rows = []
    if held_out:
        best = min(held_out, key=held_out.__getitem__)
        rows += [("held-out loss before training", held_out[0])] if 0 in held_out else []
        rows += [(f"held-out loss of this checkpoint ({step})", held_out[step])] if step in held_out else []
        rows += [(f"best held-out loss (step {best})", held_out[best])]
    if losses:
        last = max((each for each in losses if each <= step), default=min(losses))
        rows += [(f"training loss at step {last}", losses[last])]
    table = "\n".join(f"| {name} | {value:.4f} |" for name, value in rows)
    return f"## Results\n\nNats per trained token.\n\n| | |\n|---|---|\n{table}"


def _data(data: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]]) -> str:
    if not data:
        return ""
    table = ["| set | source | rows | examples | tokens | trained |", "|---|---|---:|---:|---:|---:|"]
    for each in data:
        name = re.sub(r"([|\\`])", r"\\\1", each["source"])
        cells = [f"{each[key]:,}" if key in each else "streamed" for key in COUNTED]
        table.append(f"| {each['set']} | {name} | {' | '.join(cells)} |")
    read = [line["stream_rows"] for line in lines if "stream_rows" in line]
    said = f"\n\n{read[-1]:,} rows of the stream were read." if read else ""
    return "## Data\n\n" + "\n".join(table) + said


def _settings(config: Config) -> str:
    """The keys that make the model, as YAML."""
    default = _flat(
        yaml.safe_load(dump_config(Config.model_validate({"model": {"path": ""}, "data": {"train": "", "eval": ""}})))
    )
    shown = {}
    for key, value in _flat(yaml.safe_load(dump_config(config))).items():
        is_hidden = any(key == each or key.startswith(f"{each}.") for each in HIDDEN)
        if is_hidden or value is None or (value == default.get(key) and key not in ALWAYS):
            continue
        shown[key] = pathlib.PurePath(value).name if key == "data.chat_template" else value
    return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        found |= _flat(value, f"{key}.") if isinstance(value, dict) and value else {key: value}
    return found


def _fenced(text: str) -> str:
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
    return f"{fence}yaml\n{text}{fence}"


def _curve(lines: Sequence[Mapping[str, Any]]) -> str:
    """A few points of the curve: evaluations where there are several, else lines; first, last and best among them."""
    by_step: dict[int, dict[str, Any]] = {}
    for line in lines:
        by_step.setdefault(line["step"], {}).update(
            {key: line[key] for key in ("loss", "eval_loss") if _is_number(line.get(key))}
        )
    held_out = [step for step, found in by_step.items() if "eval_loss" in found]
    steps = held_out if len(held_out) > 2 else [step for step, found in by_step.items() if found]
    if len(steps) < 2:
        return ""
    spacing = (len(steps) - 1) / (min(len(steps), MOST_POINTS) - 1)
    chosen = {steps[round(number * spacing)] for number in range(min(len(steps), MOST_POINTS))}
    if held_out:
        chosen |= {held_out[0], held_out[-1], min(held_out, key=lambda step: by_step[step]["eval_loss"])}
    rows = []
    for step in sorted(chosen):
        found = by_step[step]
        cells = [f"{found[key]:.4f}" if key in found else "" for key in ("loss", "eval_loss")]
        rows.append(f"| {step} | {' | '.join(cells)} |")
    return "## Curve\n\n| step | training loss | held-out loss |\n|---:|---:|---:|\n" + "\n".join(rows)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
