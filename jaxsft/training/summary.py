"""What a run says before its first step: what is trained on what, the arithmetic behind it, and by which versions.

In: the config, the first state, the loader and the mesh. Out: lines for the terminal, and a file of versions in the run
folder.
"""

import importlib.metadata
import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from jaxsft import __version__
from jaxsft.batches.loader import Loader
from jaxsft.batches.stream import StreamLoader
from jaxsft.chat.turns import FOUND_BY
from jaxsft.config import Config
from jaxsft.disk.seal import read_object
from jaxsft.disk.writing import write_whole
from jaxsft.model.abstract import whole
from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.lora import of_files
from jaxsft.training.compiler_options import describe_options
from jaxsft.training.metrics import num_params
from jaxsft.training.step import TrainState


def start_summary(
    config: Config,
    state: TrainState,
    frozen: Any,
    loader: Loader | StreamLoader,
    mesh: Mesh,
    *,
    num_steps: int,
    decoder_config: DecoderConfig,
    attention: str,
    notes: Sequence[str] = (),
) -> str:
    """What the user should know before the first step, with the arithmetic behind it.

    Args:
        frozen: what is not trained.
        attention: what computes it, and why.
        notes: sentences about tokenizer, model and sources.
    """
    _, seq_len = loader.shape
    count, filling = num_params(of_files(whole(state.params, frozen)), decoder_config)
    trained, _ = num_params(state.params, decoder_config)
    filled = f", and {filling:,} that fill up its vocabulary" if filling else ""
    processes = f"{jax.process_count()} process{'es' * (jax.process_count() > 1)}"
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "1 device"
    lines = [
        (
            "model",
            f"{config.model.path}: {count:,} {config.model.weights} parameters in {config.model.param_dtype}{filled}",
        ),
        *([("trained", f"{trained:,} parameters, {trained / count:.2%} of these")] if trained < count else []),
        *(_stream_lines(loader, num_steps) if isinstance(loader, StreamLoader) else _data_lines(loader, num_steps)),
        (
            "devices",
            f"{jax.device_count()} x {jax.devices()[0].device_kind}, mesh {axes}, {processes}",
        ),
    ]
    lines.append(("attention", attention))
    if (options := describe_options(mesh)) is not None:
        lines.append(("compiler", options))
    longest = seq_len
    if isinstance(loader, Loader):
        longest = min(max(source.report["longest"]["tokens"] for source in loader.dataset.sources), seq_len)
    if longest > (made_for := decoder_config.max_position):
        lines.append(("WARNING", f"examples of up to {longest:,} tokens, but the model was made for {made_for:,}"))
    lines += [("note", note) for note in dict.fromkeys(notes)]
    if int(state.step):
        lines.append(("continuing", f"from step {int(state.step):,}"))
    return "\n".join(f"{name:<11}{text}" for name, text in lines)


def _data_lines(loader: Loader, num_steps: int) -> list[tuple[str, str]]:
    """What the rows came to, source by source, and what a step and an epoch are made of."""
    lines = []
    dataset = loader.dataset
    for source, size, draws in zip(dataset.sources, dataset.sizes, dataset.draws, strict=True):
        lines += _source_lines(source.report)
        if len(dataset.sources) > 1 or draws != size:
            share = float(draws / sum(dataset.draws))
            drawn = f"{float(draws):,.1f}".removesuffix(".0")
            lines.append(
                ("drawn", f"{drawn} per epoch ({share:.1%}), {float(draws / size):.4g} passes over the source")
            )
    rows, seq_len = loader.shape
    lines.append(
        (
            "packing",
            f"{loader.num_rows:,} rows of {seq_len:,} tokens, {loader.fill:.1%} full"
            + ("" if loader.is_packed else " (data.packing is off)"),
        )
    )
    per_epoch = f"{loader.steps_per_epoch:,} make {'an' if loader.is_same_each_epoch else 'the first'} epoch"
    lines.append(
        (
            "steps",
            f"{num_steps:,} of {rows} rows ({rows * seq_len:,} tokens); {per_epoch}, "
            f"{loader.epochs_done(num_steps):.4g} epochs",
        )
    )
    return lines


def _source_lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    bad = sum(report["bad_rows"].values())
    by_code = ", ".join(f"{count:,} {code}" for code, count in report["bad_rows"].items())
    lost = [
        f"{each['examples']:,} dropped as {reason} ({each['tokens']:,} tokens)"
        for reason, each in _items(report, "dropped")
    ]
    lost += [f"{each['examples']:,} {reason} ({each['tokens']:,} tokens)" for reason, each in _items(report, "cut")]
    longest = report["longest"]
    if lost:
        lost.append(f"the longest has {longest['tokens']:,} tokens, at {longest['origin']}")
    trained = report["trained_tokens"]
    lines = [("rows", f"{report['path']}: {report['rows']:,}, format {report['format']} ({report['format_reason']})")]
    if report["columns_ignored"]:
        lines.append(("ignored", f"columns {', '.join(report['columns_ignored'])}"))
    if report["keys_ignored"]:
        counted = ", ".join(f"{name} ({count:,})" for name, count in report["keys_ignored"].items())
        lines.append(("ignored", f"keys of messages {counted}"))
    if bad:
        lines.append(("WARNING", f"{bad:,} bad rows left out: {by_code}"))
    lines += [
        ("examples", f"{report['examples']:,} kept, {'; '.join(lost) or 'none dropped'}"),
        (
            "tokens",
            f"{report['tokens']:,}, of which {trained:,} are trained ({trained / report['tokens']:.1%}); "
            f"lengths {', '.join(f'{length:,} ({p}%)' for p, length in report['length_percentiles'].items())}",
        ),
    ]
    lines += [("counted", describe_count(*each)) for each in report["counts"].items() if each[0] != "turns_by_prompt"]
    return lines


def _stream_lines(loader: StreamLoader, num_steps: int) -> list[tuple[str, str]]:
    """What is known of rows before they are read."""
    lines = []
    for report in loader.described:
        lines.append(("stream", f"{report['path']}: format {report['format']} ({report['format_reason']})"))
        if report["columns_ignored"]:
            lines.append(("ignored", f"columns {', '.join(report['columns_ignored'])}"))
    rows, seq_len = loader.shape
    lines.append(("steps", f"{num_steps:,} of {rows} rows ({rows * seq_len:,} tokens)"))
    return lines


def describe_count(name: str, count: int) -> str:
    """A count of `Encoded.counts` in words."""
    how = name.removeprefix("turns_by_")
    return f"{count:,} {name.replace('_', ' ')}" if how == name else f"{count:,} turns: {FOUND_BY[how]}"


def describe_lost(lost: Mapping[str, int]) -> str:
    """What of a stream was left out so far, from `StreamLoader.rows_so_far`."""
    words = {
        "stream_bad_rows": "bad rows left out",
        "stream_dropped_examples": "examples dropped",
        "stream_cut_examples": "examples cut",
    }
    parts = [(name.partition("/"), count) for name, count in lost.items()]
    return ", ".join(f"{count:,} {words[kind]} ({reason})" for (kind, _, reason), count in parts)


def _items(report: dict[str, Any], key: str) -> Iterable[tuple[str, dict[str, int]]]:
    return report[key].items()


VERSIONS_OF = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
"""Packages that decide about the numbers of a run, to the bit."""


def note_versions(path: epath.Path, say: Callable[[str], None]) -> None:
    """Writes what the run is computed by; says what has changed since it began, as it may change the last bits."""
    versions = {"jaxsft": __version__, "python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in VERSIONS_OF}
    versions["devices"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    if path.exists():
        try:
            before = read_object(path)
        except (OSError, ValueError) as error:
            say(f"{path} is damaged, and written anew: what computed this run before is not known ({error})")
            before = versions
        for name in {**before, **versions}:
            if before.get(name) != versions.get(name):
                say(
                    f"changed since this run was last started: {name} {before.get(name)} -> {versions.get(name)}; it "
                    "goes on, but not to the bit as it would have"
                )
    write_whole(path, json.dumps(versions, indent=1) + "\n")
