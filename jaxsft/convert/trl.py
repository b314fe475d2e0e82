"""TRL's SFT: `SFTConfig`, `ModelConfig` and `ScriptArguments`, as a YAML, a command line or a script has them.

Read on trl 1.16 with transformers 5.24, and older names (`max_seq_length`, `torch_dtype`, `evaluation_strategy`); also
the mixtures of the alignment handbook and open-r1, which use the same parser.
"""

from typing import Any

from jaxsft.config import ConfigError
from jaxsft.convert.conversion import Conversion, Taken
from jaxsft.convert.sources import hub_or_file, lost_keys, places_of, take_template
from jaxsft.convert.training import LORA_NAMES, convert_lora, convert_quantisation, convert_training

CALLED = {
    "lora_target_parameters": "lora_target_parameters target_parameters",
    "layers_to_transform": "peft_layers_to_transform layers_to_transform",
    "model_name_or_path": "model_name_or_path model model_id",
    "max_length": "max_length max_seq_length",
    "tokenizer_name": "tokenizer_name tokenizer_name_or_path",
    "dtype": "dtype torch_dtype",
    "eval_strategy": "eval_strategy evaluation_strategy",
    "gradient_checkpointing": "activation_checkpointing gradient_checkpointing",
}
DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "num_train_epochs": 3.0,
    "learning_rate": 2e-5,
    "lr_scheduler_type": "linear",
    "optim": "adamw_torch_fused",
    "max_grad_norm": 1.0,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "dataset_train_split": "train",
    "dataset_test_split": "test",
}
OTHER_METHODS = ("beta", "max_prompt_length", "reward_funcs", "num_generations", "reward_model_path", "rpo_alpha")
"""Keys that only configs of other methods have."""


def convert_trl(theirs: dict[str, Any]) -> Conversion:
    """Takes the keys of TRL's SFT.

    Raises:
        ConfigError: it is a config of another method.
    """
    if found := [name for name in OTHER_METHODS if theirs.get(name) is not None]:
        raise ConfigError(
            f"{found[0]}: that is of preferences or rewards; supervised fine-tuning alone is trained here"
        )
    c = Conversion("TRL", theirs, called=CALLED, defaults=DEFAULTS)
    convert_training(c, has_adapters=c.flag("use_peft"))
    if c.given("tokenizer_name") == c.given("model_name_or_path"):
        c.leave("tokenizer_name", why="it is the model's own, which is taken where model.tokenizer is left out")
    elif c.is_on("tokenizer_name"):
        c.take("model.tokenizer", str(c.given("tokenizer_name")), "tokenizer_name")
    _rows(c)
    _lengths(c)
    _masks(c)
    _adapters(c)
    return c


def _rows(c: Conversion) -> None:
    mixture = c.given("dataset_mixture")
    several = mixture.get("datasets") if isinstance(mixture, dict) else c.given("datasets")
    if isinstance(several, list) and several:
        name = "dataset_mixture" if isinstance(mixture, dict) else "datasets"
        size = mixture.get("test_split_size") if isinstance(mixture, dict) else None
        lost = ["its test_split_size is left out: give data.eval"] * bool(size)
        if isinstance(mixture, dict):
            lost += lost_keys(mixture, {"datasets", "test_split_size", "seed"}, name)
        _mixture(c, name, several, lost)
        c.leave("test_split_size", why="held-out rows are given here (data.eval), not drawn")
        c.leave("dataset_name", why="`datasets` goes before it, there as here")
        return
    if isinstance(mixer := c.given("dataset_mixer"), dict):
        splits = c.texts("dataset_splits")
        train = [split for split in splits if "test" not in split] or ["train"]
        notes = ["shares are `epochs` of each"]
        if left := [split for split in splits if "test" in split]:
            notes.append(f"of splits, {', '.join(left)} is left out: give data.eval")
        shares = {path: c.as_number(share, "dataset_mixer") for path, share in mixer.items()}
        mixed = [(place, share) for path, share in shares.items() for place in hub_or_file(path, split=train)]
        sources: list[dict[str, Any]] = [
            {"path": place.path} | ({} if share == 1 else {"epochs": share}) for place, share in mixed
        ]
        notes += dict.fromkeys(place.note for place, _ in mixed if place.note)
        c.take("data.train", sources, "dataset_mixer", "dataset_splits", note="; ".join(notes))
        return
    name = c.given("dataset_name")
    column = c.given("dataset_text_field")
    if name is None:
        c.missing.append("data.train: a file, folder, glob or hub org/name[@config][:split]")
        c.leave("dataset_text_field", why=f"a column of another name is columns: {{text: {column}}} of a source")
        return
    places = hub_or_file(name, c.given("dataset_config"), c.value("dataset_train_split"))
    columns = {} if column in (None, "text", "messages") else {"columns": {"text": str(column)}}
    names = ("dataset_name", "dataset_config", "dataset_train_split", *["dataset_text_field"] * bool(columns))
    c.leave("dataset_text_field", why="a column of this name is found by itself")
    sources = [{"path": place.path, **columns} for place in places]
    c.take("data.train", sources, *names, note="; ".join(place.note for place in places if place.note))
    if str(c.value("eval_strategy") or "no") != "no":
        held_out = hub_or_file(name, c.given("dataset_config"), c.value("dataset_test_split"))
        paths = [place.path for place in held_out]
        numbered: Any = paths[0] if len(paths) == 1 else {f"eval{at}": path for at, path in enumerate(paths)}
        note = "; ".join(place.note for place in held_out if place.note)
        c.take("data.eval", numbered, "dataset_test_split", "dataset_name", note=note)
    c.leave("dataset_test_split", why="nothing is evaluated without eval_strategy")
    if c.flag("dataset_streaming"):
        if c.is_taken("train.steps"):
            c.take("data.stream", True, "dataset_streaming")
        else:
            c.leave("dataset_streaming", why="a stream needs train.steps (max_steps); data are prepared before")


def _mixture(c: Conversion, name: str, several: list[Any], lost: list[str]) -> None:
    sources: list[dict[str, Any]] = []
    for entry in c.entries(name, several):
        places, of_places = places_of(entry)
        known = {"path", "id", "name", "config", "split", "data_files", "data_dir", "fraction", "weight"}
        lost += [*of_places, *lost_keys(entry, known, str(entry.get("path") or entry.get("id")))]
        share, part = (entry.get(key) and c.as_number(entry[key], f"{name}: {key}") for key in ("fraction", "weight"))
        if share and len(places) > 1:
            lost.append(f"{entry.get('path') or entry.get('id')}: its fraction is shared out equally")
            share /= len(places)
        more = {"weight": share} if share else {"epochs": part} if part not in (None, 1) else {}
        sources += [{"path": place.path, **more} for place in places]
    if len(sources) == 1:
        sources[0].pop("weight", None)
    note = "a weight there is `epochs` of a source here" if any("epochs" in source for source in sources) else ""
    c.take("data.train", sources, name, note="; ".join([*[note] * bool(note), *dict.fromkeys(lost)]))


def _lengths(c: Conversion) -> None:
    length = c.whole("max_length")
    if length is None and "max_length" in c.theirs:
        c.missing.append("data.seq_len: there is no limit there; here rows have a length (2048 where left out)")
    else:
        c.take("data.seq_len", length or 1024, "max_length")
    strategy = str(c.given("packing_strategy") or "bfd")
    if c.flag("packing"):
        note = "" if strategy == "bfd" else "examples are fitted whole, and split where they are longer than a row"
        c.take("data.packing", True, "packing", "packing_strategy", note=note)
        c.leave("padding_free", why="packed rows have hardly any padding")
    elif c.flag("padding_free"):
        note = "padding_free has as many examples a step as unpacked rows; packed rows have more"
        c.take("data.packing", False, "packing", "padding_free", note=note)
    else:
        note = "one example per row, padded to seq_len; true is faster, then with fewer rows in train.batch_size"
        c.take("data.packing", False, "packing", note=note)
    overlong = "split" if strategy in ("bfd_split", "bfd-requeue", "wrapped") and c.flag("packing") else "truncate"
    c.take("data.overlong", overlong, "truncation_mode")
    c.leave("packing_strategy", why="only with packing")


def _masks(c: Conversion) -> None:
    only = c.given("completion_only_loss")
    if c.flag("assistant_only_loss"):
        c.take("data.train_on", "assistant", "assistant_only_loss", "completion_only_loss")
    elif only is not None and not c.flag("completion_only_loss"):
        c.take("data.train_on", "all", "completion_only_loss", "assistant_only_loss")
    else:
        note = "answers alone; there every token of `messages` is trained (data.train_on: all), of prompt and " + (
            "completion the completion"
        )
        c.taken.append(Taken("data.train_on", "assistant", c.names("completion_only_loss"), note))
    template = c.given("chat_template_path") or c.given("chat_template")
    if template is not None:
        take_template(c, template, "chat_template_path", "chat_template")
    if c.is_on("eos_token"):
        note = "the token by which the chat template ends an answer, whatever its name"
        c.take("data.set_eos", True, "eos_token", note=note)
    if c.given("loss_type") == "dft":
        c.take("loss.dft", True, "loss_type")
    elif c.given("loss_type") in ("nll", "chunked_nll"):
        c.leave("loss_type", why="the plain loss is what is minimised where loss.dft is left out")


def _adapters(c: Conversion) -> None:
    uses = c.flag("use_peft")
    if uses:
        convert_lora(c, targets=["q_proj", "v_proj"])
    else:
        c.leave(*LORA_NAMES, "lora_modules_to_save", why="it has no effect there without use_peft")
    kind = "nf4" if c.flag("load_in_4bit") else "int8" if c.flag("load_in_8bit") else None
    convert_quantisation(c, kind, "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", frozen=uses)
