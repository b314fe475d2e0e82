"""LLaMA-Factory's YAML (version 0.9 of August 2026), and the shorter one of its v1 (`model`, `train_dataset`)."""

import json
import os
import pathlib
from typing import Any

import yaml

from jaxsft.config import ConfigError
from jaxsft.convert.conversion import Conversion, as_list, brief
from jaxsft.convert.sources import Place, hold_out, hub_or_file, lost_keys
from jaxsft.convert.training import convert_lora, convert_quantisation, convert_training

CALLED = {
    "layers_to_transform": "peft_layers_to_transform layers_to_transform",
    "model_name_or_path": "model_name_or_path model",
    "per_device_train_batch_size": "per_device_train_batch_size micro_batch_size",
    "batch_size": "global_batch_size",
    "max_length": "cutoff_len",
    "dtype": "pure_bf16",
    "eval_strategy": "eval_strategy evaluation_strategy",
    "lora_r": "lora_rank peft_config.r",
    "lora_alpha": "lora_alpha peft_config.lora_alpha",
    "lora_dropout": "lora_dropout peft_config.lora_dropout",
    "lora_target_modules": "lora_target peft_config.target_modules",
    "lora_modules_to_save": "additional_target",
    "lora_model_dir": "adapter_name_or_path peft_config.adapter_name_or_path",
    "use_peft": "finetuning_type peft_config.name",
    "early_stopping_patience": "early_stopping_steps early_stopping_patience",
    "router_aux_loss_coef": "moe_aux_loss_coef",
    "context_parallel_size": "context_parallel_size cp_size hyper_parallel_cp_size",
    "tensor_parallel_size": "tensor_model_parallel_size",
    "expert_parallel_size": "expert_model_parallel_size",
    "optim": "optim optim_config.name",
    "weight_decay": "weight_decay optim_config.wd optim_config.weight_decay",
    "momentum": "optim_config.momentum",
    "quantization_bit": "quantization_bit quant_config.quantization_bit",
}
DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "num_train_epochs": 3.0,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "optim": "adamw_torch",
    "max_grad_norm": 1.0,
    "lora_r": 8,
    "lora_target_modules": "all",
    "finetuning_type": "lora",
}
DEFAULTS_V1: dict[str, Any] = {"per_device_train_batch_size": 1, "learning_rate": 1e-4, "lr_scheduler_type": "constant"}
"""What v1 takes where it differs."""

TEMPLATES = {"llama3": "llama3", "gemma": "gemma", "gemma2": "gemma", "alpaca": "stanford_alpaca", "zephyr": "zephyr"}
"""`template` -> ours that writes the same turns, for models that have none."""


def convert_llama_factory(theirs: dict[str, Any], *, beside: pathlib.Path) -> Conversion:
    """Takes the keys of LLaMA-Factory.

    Args:
        theirs: key -> value.
        beside: the folder of the file, from which `dataset_info.json` is looked for.

    Raises:
        ConfigError: it is a config of another method, or of another command than training.
    """
    stage = str(theirs.get("stage") or "sft")
    if stage not in ("sft", "pt"):
        raise ConfigError(f"stage: {stage}: supervised fine-tuning (and plain text) alone is trained here")
    if theirs.get("export_dir"):
        raise ConfigError("export_dir: this is no config of a training; here `export RUN --merge-lora` does that")
    is_v1 = "train_dataset" in theirs or "model_class" in theirs
    muon = {"optim": "muon"} if theirs.get("use_muon") else {}
    defaults = DEFAULTS | (DEFAULTS_V1 if is_v1 else {}) | muon
    c = Conversion("LLaMA-Factory", _flat(theirs), called=CALLED, defaults=defaults)
    convert_training(c, has_adapters=_kind(c) == "lora")
    if muon:
        c.taken = [one._replace(names=("use_muon",)) if one.key == "optim.name" else one for one in c.taken]
    c.leave("stage", why="plain text is trained as a whole" if stage == "pt" else "sft is what is done here")
    if c.flag("disable_gradient_checkpointing"):
        c.take("model.remat", "none", "disable_gradient_checkpointing")
    _rows(c, beside, is_text=stage == "pt")
    _lengths(c, is_text=stage == "pt")
    _masks(c)
    _adapters(c)
    return c


def _flat(theirs: dict[str, Any]) -> dict[str, Any]:
    """Keys of v1's sections with the section before them."""
    flat: dict[str, Any] = {}
    for name, value in theirs.items():
        if name in ("peft_config", "quant_config", "optim_config") and isinstance(value, dict):
            flat |= {f"{name}.{key}": each for key, each in value.items()}
        else:
            flat[name] = value
    return flat


def _rows(c: Conversion, beside: pathlib.Path, *, is_text: bool) -> None:
    if c.is_on("train_dataset"):
        _rows_of_v1(c, str(c.given("train_dataset")), beside)
        return
    names = c.texts("dataset")
    if not names:
        c.missing.append("data.train: a file, folder, glob or hub org/name[@config][:split]")
        return
    folder = str(c.given("dataset_dir") or "data")
    info, at = _dataset_info(folder, beside)
    if info is None:
        c.leave("dataset", why=f"what these names stand for is in {folder}/dataset_info.json, which is not here")
        c.missing.append(f"data.train: the files or hub ids of {', '.join(names)}, from their dataset_info.json")
    else:
        named, notes = _named(names, info, at, is_text=is_text)
        sources = _weighted(c, named, notes)
        mixed = ["interleave_probs"] * any("weight" in source for source in sources)
        c.take("data.train", sources, "dataset", "dataset_dir", *mixed, note="; ".join(notes))
        held_out, notes = _named(c.texts("eval_dataset"), info, at, is_text=is_text)
        if held_out:
            evaluated = {}
            for name, several in held_out.items():
                for number, source in enumerate(several):
                    if source.pop("count", None):
                        notes.append(f"num_samples of {name} is left out: held-out rows are all examined once")
                    evaluated[name if len(several) == 1 else f"{name}{number}"] = source
            notes = [note for note in notes if note != COUNTED]
            c.take("data.eval", evaluated, "eval_dataset", note="; ".join(dict.fromkeys(notes)))
        hold_out(c, "val_size", [source["path"] for source in sources])
        for key, lost in (("train", [*names]), ("eval", c.texts("eval_dataset"))):
            if absent := [name for name in lost if name not in named.keys() | held_out.keys()]:
                c.missing.append(f"data.{key}: {', '.join(absent)}: not in {at / 'dataset_info.json'}")
    c.leave("eval_dataset", "val_size", why="held-out rows are given as data.eval")
    if c.flag("streaming"):
        if c.is_taken("train.steps"):
            c.take("data.stream", True, "streaming")
        c.leave("streaming", why="a stream needs train.steps (max_steps); data are prepared before")


def _dataset_info(folder: str, beside: pathlib.Path) -> tuple[dict[str, Any] | None, pathlib.Path]:
    """The table of datasets, from the working folder or one above the file, and the folder that it lies in."""
    for parent in (pathlib.Path(), beside, *beside.resolve().parents):
        path = parent / folder / "dataset_info.json"
        if path.is_file():
            try:
                info = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ConfigError(f"{path}: not readable as JSON: {error}") from None
            if isinstance(info, dict):
                return info, path.parent
    return None, pathlib.Path(folder)


COUNTED = "num_samples is `count` here: as many rows in every epoch, and not the same ones"

KNOWN = {
    "hf_hub_url", "ms_hub_url", "om_hub_url", "file_name", "cloud_file_name", "subset", "split", "folder",
    "num_samples", "formatting", "columns", "tags", "ranking",
}  # fmt: skip
"""Keys of an entry of `dataset_info.json` that are looked at."""


def _named(
    names: list[str], info: dict[str, Any], at: pathlib.Path, *, is_text: bool
) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """Name -> sources, of those that are in the table, and what is lost of them."""
    sources: dict[str, list[dict[str, Any]]] = {}
    notes: list[str] = []
    for name in names:
        entry = info.get(name)
        if not isinstance(entry, dict):
            continue
        if hub := entry.get("hf_hub_url"):
            places = hub_or_file(hub, entry.get("subset"), entry.get("split"))
        elif file := entry.get("file_name") or entry.get("cloud_file_name"):
            path = str(file) if "://" in str(file) else str(at / str(file))
            split = entry.get("split")
            lost = f"the split {split} of a local folder or file is not chosen" if split not in (None, "train") else ""
            places = [Place(path, lost)]
        else:
            continue
        notes += [f"{name}: {place.note}" for place in places if place.note]
        if entry.get("folder"):
            notes.append(f"{name}: folder {entry['folder']}: no part of a hub dataset is chosen; download it and give "
                         "its path")  # fmt: skip
        notes += lost_keys(entry, KNOWN, name)
        more = _renamed(entry, is_text=is_text)
        if (size := entry.get("num_samples")) is not None:
            if type(size) is int and size > 0 and len(places) == 1:
                more["count"] = size
                notes.append(COUNTED)
            else:
                notes.append(f"{name}: num_samples {brief(size)} is left out: `count` is a number of rows of one split")
        if entry.get("ranking"):
            notes.append(f"{name}: rows of preferences are not trained on")
        if media := sorted({"images", "videos", "audios"} & _mapping(entry, "columns").keys()):
            notes.append(f"{name}: {', '.join(media)} are not trained on, and such rows are refused")
        sources[name] = [{"path": place.path, **more} for place in places]
    return sources, list(dict.fromkeys(notes))


def _renamed(entry: dict[str, Any], *, is_text: bool) -> dict[str, Any]:
    """`columns`, `keys` and `roles` of a source, where they are not those that are known."""
    is_chat = entry.get("formatting") in ("sharegpt", "openai")
    ours = {"prompt": "text" if is_text else "instruction", "query": "input", "response": "output"}
    ours = ({"messages": "messages"} if is_chat else ours) | {name: name for name in ("system", "tools", "history")}
    columns = {
        ours[key]: theirs
        for key, theirs in _mapping(entry, "columns").items()
        if key in ours and theirs != ours[key] and (key, theirs) != ("messages", "conversations")
    }
    tags = _mapping(entry, "tags")
    tags = {tag: str(theirs) for tag, theirs in tags.items()}
    keys = {tags[f"{key}_tag"]: key for key in ("role", "content") if f"{key}_tag" in tags}
    keys = {theirs: key for theirs, key in keys.items() if theirs not in (key, "from", "value")}
    roles = {tags[f"{role}_tag"]: role for role in ("user", "assistant", "system") if f"{role}_tag" in tags}
    roles = {theirs: role for theirs, role in roles.items() if theirs not in (role, "human", "gpt")}
    return {name: found for name, found in (("columns", columns), ("keys", keys), ("roles", roles)) if found}


def _mapping(entry: dict[str, Any], name: str) -> dict[str, Any]:
    found = entry.get(name)
    return found if isinstance(found, dict) else {}


def _weighted(c: Conversion, named: dict[str, list[dict[str, Any]]], notes: list[str]) -> list[dict[str, Any]]:
    """The sources, with the shares by which they are mixed; what is lost by that goes to `notes`."""
    if not c.is_on("interleave_probs") or len(named) < 2:
        c.leave("mix_strategy", why="without interleave_probs every row of all sources is in an epoch, in mixed order")
        return [source for several in named.values() for source in several]
    shares = [c.as_number(share, "interleave_probs") for share in as_list(c.given("interleave_probs"))]
    if len(shares) != len(named):
        c.problems.append(f"interleave_probs: {len(shares)} shares given, for {len(named)} datasets")
    ends = {"interleave_under": "first", "interleave_over": "all"}.get(str(c.given("mix_strategy")))
    if ends:
        c.take("data.mixture_ends", ends, "mix_strategy")
    weighted = []
    for (name, several), share in zip(named.items(), shares, strict=False):
        if len(several) > 1:
            notes.append(f"{name}: its share is shared out equally over its splits")
        if any(source.pop("count", None) for source in several):
            notes.append(f"num_samples of {name} is left out: a source has a weight or a count")
        weighted += [{**source, "weight": share and share / len(several)} for source in several]
    notes[:] = [note for note in notes if note != COUNTED or any("count" in one for one in weighted)]
    return weighted


def _rows_of_v1(c: Conversion, value: str, beside: pathlib.Path) -> None:
    """v1 names a dataset of the hub, or a YAML file with one entry for each source."""
    if not value.endswith((".yaml", ".yml")):
        places = hub_or_file(value)
        note = "; ".join(place.note for place in places if place.note)
        c.take("data.train", [{"path": place.path} for place in places], "train_dataset", note=note)
        return
    parents = (pathlib.Path(), beside, *beside.resolve().parents)
    root = next((parent for parent in parents if os.path.isfile(parent / value)), None)
    if root is None:
        c.leave("train_dataset", why=f"{value}, which names the rows, is not here")
        c.missing.append(f"data.train: what {value} names")
        return
    file = root / value
    try:
        entries = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"train_dataset: {file}: not readable as YAML: {' '.join(str(error).split())}") from None
    sources: list[dict[str, Any]] = []
    notes: list[str] = []
    for entry in entries.values() if isinstance(entries, dict) else []:
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            c.problems.append(f"train_dataset: {file}: {brief(entry)} given, expected a mapping with a path")
            continue
        path = entry["path"]
        if entry.get("source") == "local":
            # Under the folder under which the file was found; an absolute name of the file does not say which that is.
            under = [root, *(file.resolve().parents if os.path.isabs(value) else ())]
            path = str(next((one for one in under if os.path.exists(one / path)), root).resolve() / path)
        places = hub_or_file(path, entry.get("subset"), entry.get("split"))
        notes += [f"{entry['path']}: {place.note}" for place in places if place.note]
        notes += lost_keys(entry, {"path", "source", "subset", "split", "size", "converter"}, entry["path"])
        more = {}
        if (size := entry.get("size")) is not None:
            if type(size) is int and size > 0 and len(places) == 1:
                more["count"] = size
                notes.append("`size` is `count` here")
            else:
                notes.append(f"{path}: size {brief(size)} is left out: `count` is a number of rows of one split")
        sources += [{"path": place.path, **more} for place in places]
    c.take("data.train", sources, "train_dataset", note="; ".join(dict.fromkeys(notes)))


def _lengths(c: Conversion, *, is_text: bool) -> None:
    c.take("data.seq_len", c.whole("max_length") or 2048, "max_length")
    c.take("data.overlong", "split" if is_text else "truncate")
    is_packed = c.flag("packing") if c.names("packing") else is_text
    if c.flag("neat_packing"):
        c.take("data.packing", True, "neat_packing", "packing")
    elif is_packed:
        c.take("data.packing", True, "packing", note="examples of a row never see each other, as with neat_packing")
    else:
        note = "one example per row, padded to seq_len; true is faster, then with fewer rows in train.batch_size"
        c.take("data.packing", False, "packing", "neat_packing", note=note)


def _masks(c: Conversion) -> None:
    if c.flag("train_on_prompt"):
        c.take("data.train_on", "all", "train_on_prompt", note="every token, also of headers and system texts")
    elif c.flag("mask_history"):
        c.take("data.train_on", "last_turn", "mask_history")
    else:
        c.take("data.train_on", "assistant", "train_on_prompt", "mask_history")
    name = str(c.given("template") or "")
    if name in TEMPLATES:
        note = "of ours, which a model without a template needs; leave it out where the tokenizer has its own"
        c.take("data.chat_template", TEMPLATES[name], "template", note=note)
    elif name in ("default", "empty", "vicuna", "fewshot"):
        c.leave("template", why="none of ours; the tokenizer's own chat template is taken, or give data.chat_template")
    else:
        why = f"the tokenizer's own chat template is taken, which is mostly that of `{name}`; `preview` shows it"
        c.leave("template", why=why)
    if name and c.given("enable_thinking") is not None and "qwen3" in name:
        thinking = {"enable_thinking": c.flag("enable_thinking")}
        c.take("data.chat_template_kwargs", thinking, "enable_thinking")
    if c.flag("use_dft_loss"):
        c.take("loss.dft", True, "use_dft_loss")


def _kind(c: Conversion) -> str:
    """Which weights are trained: lora, full, freeze or another word of theirs."""
    return str(c.given("use_peft") or ("full" if "train_dataset" in c.theirs else c.value("finetuning_type")))


def _adapters(c: Conversion) -> None:
    kind = _kind(c)
    if kind == "lora":
        convert_lora(c, targets=as_list(c.value("lora_target_modules")))
        c.leave("use_peft", why="the section lora says it")
    elif kind == "freeze":
        why = "train.only has names: the last two layers of 32 are layers\\.(30|31)\\..*"
        c.leave(*[name for name in c.theirs if "freeze_" in name], why=why)
        c.missing.append("train.only: the weights that are trained; left out, all of them are")
        c.leave("use_peft", why="train.only says which weights are trained")
    elif kind == "full":
        c.leave("use_peft", why="all weights are trained where there is no section lora")
        names = [name for name in c.theirs if name.startswith(("lora_", "loraplus_"))]
        c.leave(*names, why="it has no effect there with finetuning_type full")
    else:
        raise ConfigError(f"finetuning_type: {kind}: full, LoRA and freezing (train.only) are what is trained here")
    bits = c.whole("quantization_bit")
    if bits is not None:
        method = str(c.given("quantization_method") or c.given("quant_config.name") or "bnb")
        if bits not in (4, 8) or method not in ("bnb", "bitsandbytes", "auto"):
            c.leave("quantization_bit", why="frozen weights lie in nf4 or int8 (model.quantize)")
        else:
            quantised = {4: "nf4", 8: "int8"}[bits]
            bitsandbytes = ("quantization_bit", "quantization_method", "quantization_type", "double_quantization",
                     "quant_config.name")  # fmt: skip
            convert_quantisation(c, quantised, *bitsandbytes, frozen=kind == "lora")
