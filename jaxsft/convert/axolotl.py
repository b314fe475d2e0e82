"""axolotl's YAML: its reference of July 2026 (version 0.17), with the older names that its examples still have."""

from typing import Any

from jaxsft.config import ConfigError
from jaxsft.convert.conversion import Conversion, as_list, brief
from jaxsft.convert.sources import hold_out, lost_keys, places_of, take_template
from jaxsft.convert.training import convert_lora, convert_quantisation, convert_training

CALLED = {
    "layers_to_transform": "peft_layers_to_transform layers_to_transform",
    "model_name_or_path": "base_model",
    "per_device_train_batch_size": "micro_batch_size",
    "num_train_epochs": "num_epochs",
    "optim": "optimizer",
    "lr_scheduler_type": "lr_scheduler",
    "max_length": "sequence_len max_packed_sequence_len",
    "packing": "sample_packing",
    "bf16": "bf16 bfloat16",
    "dtype": "torch_dtype",
    "eval_strategy": "eval_strategy evaluation_strategy",
    "use_rslora": "peft_use_rslora",
    "use_dora": "peft_use_dora",
    "use_peft": "adapter",
    "adam_epsilon": "adam_epsilon adam_eps",
    "neftune_noise_alpha": "neftune_noise_alpha noisy_embedding_alpha",
    "context_parallel_size": "context_parallel_size sequence_parallel_degree context_parapllel_size",
    "project": "wandb_project trackio_project_name",
}
DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "num_train_epochs": 1.0,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.03,
    "optim": "adamw_torch_fused",
    "max_grad_norm": 1.0,
    "max_length": 512,
}
FORMATS: dict[str, str] = {
    "alpaca": "alpaca",
    "chat_template": "",
    "sharegpt": "conversations",
    "completion": "text",
    "pretrain": "text",
    "oasst": "",
    "context_qa": "question_answer",
    "reflection": "reflection",
    "gpteacher": "instruction_response",
    "explainchoice": "",
    "summarizetldr": "article_summary",
}
"""`type` of a dataset, without what follows a dot or colon -> `format` of a source; "" is found from the columns."""

KNOWN_MESSAGES = ("messages", "conversations", "conversation")


def convert_axolotl(theirs: dict[str, Any]) -> Conversion:
    """Takes the keys of axolotl.

    Raises:
        ConfigError: it is a config of another method.
    """
    for name in ("rl", "reward_model", "process_reward_model", "ebft", "diffusion", "kd_trainer"):
        if theirs.get(name):
            raise ConfigError(f"{name}: {brief(theirs[name])}: supervised fine-tuning alone is trained here")
    if theirs.get("processor_type"):
        raise ConfigError("processor_type: images, audio and video are not trained on")
    c = Conversion("axolotl", theirs, called=CALLED, defaults=DEFAULTS)
    _trackers(c)
    convert_training(c, has_adapters=c.is_on("adapter"))
    _model(c)
    _rows(c)
    _lengths(c)
    _masks(c)
    _adapters(c)
    for name in ("evals_per_epoch", "saves_per_epoch"):
        ours = "eval.every" if name.startswith("evals") else "checkpoint.every"
        why = f"{ours} is in steps, and those of an epoch are known when data are prepared (`preview` says them)"
        c.leave(name, why=why)
    return c


def _trackers(c: Conversion) -> None:
    """Trackers are asked for by keys of their own."""
    to = [
        tracker
        for tracker, asks in (
            ("wandb", c.flag("use_wandb") or c.is_on("wandb_project")),
            ("tensorboard", c.flag("use_tensorboard")),
            ("trackio", c.flag("use_trackio") or c.is_on("trackio_project_name")),
        )
        if asks
    ]
    if to:
        names = ("use_wandb", "wandb_project", "use_tensorboard", "use_trackio", "trackio_project_name")
        c.take("log.to", to, *names)
        if set(to) & {"wandb", "trackio"} and c.is_on("project"):
            c.take("log.project", str(next(c.theirs[name] for name in c.names("project"))), "project")


def _model(c: Conversion) -> None:
    if c.is_on("tokenizer_config"):
        c.take("model.tokenizer", str(c.given("tokenizer_config")), "tokenizer_config")
    if c.flag("reinit_weights"):
        c.take("model.weights", "random", "reinit_weights")
    if c.is_on("unfrozen_parameters"):
        why = "theirs are regular expressions on names of transformers; train.only takes names as docs/lora.md has them"
        c.leave("unfrozen_parameters", why=why)
        c.missing.append("train.only: the weights that are trained; left out, all of them are")


def _rows(c: Conversion) -> None:
    name = "datasets" if c.is_on("datasets") else "pretraining_dataset"
    if not c.is_on(name):
        c.missing.append("data.train: a file, folder, glob or hub org/name[@config][:split]")
        return
    notes: list[str] = []
    sources = [source for entry in c.entries(name, c.given(name)) for source in _sources(entry, notes)]
    c.take("data.train", sources, name, note="; ".join(dict.fromkeys(notes)))
    if c.is_on("test_datasets"):
        notes = []
        held_out = [
            source
            for entry in c.entries("test_datasets", c.given("test_datasets"))
            for source in _sources(entry, notes)
        ]
        numbered = {"eval" if len(held_out) == 1 else f"eval{at}": each for at, each in enumerate(held_out)}
        c.take("data.eval", numbered, "test_datasets", note="; ".join(dict.fromkeys(notes)))
    hold_out(c, "val_set_size", [source["path"] for source in sources])
    if name == "pretraining_dataset" or c.flag("streaming"):
        if c.is_taken("train.steps"):
            c.take("data.stream", True, name, "streaming")
        c.leave("streaming", why="a stream needs train.steps (max_steps); data are prepared before")


def _sources(entry: dict[str, Any], notes: list[str]) -> list[dict[str, Any]]:
    """The sources of one entry of `datasets`; what is lost of it goes to `notes`."""
    kind = entry.get("type")
    path = str(entry.get("path"))
    places, lost = places_of(entry)
    notes += lost
    more: dict[str, Any] = {}
    columns, keys = _columns(entry, kind if isinstance(kind, dict) else {})
    if isinstance(kind, dict):
        if kind.get("format") or kind.get("no_input_format"):
            notes.append(f"{path}: a prompt's `format` is the chat template's (data.chat_template) here")
    elif kind:
        base = str(kind).split(".")[0].split(":")[0]
        if base in FORMATS:
            more |= {"format": FORMATS[base]} if FORMATS[base] else {}
        else:
            notes.append(f"{path}: type {kind} is not known; the format is found from the columns")
    if columns:
        more["columns"] = columns
    if roles := _roles(entry.get("roles")):
        more["roles"] = roles
    if keys:
        more["keys"] = keys
    known = {
        "path", "type", "name", "split", "data_files", "data_dir", "ds_type", "field", "text_column", "roles",
        "chat_template",
        "field_messages", "field_tools", "field_thinking", "message_property_mappings", "message_field_role",
        "message_field_content", "message_field_training", "message_field_training_detail", "trust_remote_code",
        "roles_to_train", "train_on_eos", "train_on_eot", "template_thinking_key", "conversation",
        "chat_template_jinja",
    }  # fmt: skip
    notes += lost_keys(entry, known, path)
    return [{"path": place.path, **more} for place in places]


def _columns(entry: dict[str, Any], kind: dict[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """`columns` (ours: theirs) and `keys` (theirs: ours) of a source."""
    columns, keys = {}, {}
    text = entry.get("field") or entry.get("text_column")
    if text and text != "text":
        columns["text"] = str(text)
    messages = entry.get("field_messages")
    if messages and messages not in KNOWN_MESSAGES:
        columns["messages"] = str(messages)
    if (tools := entry.get("field_tools")) and tools != "tools":
        columns["tools"] = str(tools)
    for ours in ("instruction", "input", "output", "system"):
        if (theirs := kind.get(f"field_{ours}")) and theirs != ours:
            columns[ours] = str(theirs)
    mapped = {"role": entry.get("message_field_role"), "content": entry.get("message_field_content")}
    mappings = entry.get("message_property_mappings")
    mapped |= mappings if isinstance(mappings, dict) else {}
    for ours, theirs in mapped.items():
        if theirs and theirs != ours and (ours, theirs) not in (("role", "from"), ("content", "value")):
            keys[str(theirs)] = str(ours)
    thinking = entry.get("field_thinking")
    if thinking and thinking not in ("thinking", "reasoning", "reasoning_content"):
        keys[str(thinking)] = "reasoning_content"
    training = entry.get("message_field_training")
    if training and training not in ("train", "training"):
        keys[str(training)] = "train"
    return columns, keys


def _roles(roles: Any) -> dict[str, str]:
    usual = {
        "human": "user", "gpt": "assistant", "tool": "tool", "function": "tool", "system": "system",
        "model": "assistant",
    }  # fmt: skip
    return {
        str(theirs): str(ours)
        for ours, several in (roles.items() if isinstance(roles, dict) else [])
        for theirs in as_list(several or [])
        if str(theirs) != str(ours) and usual.get(str(theirs)) != ours
    }


def _lengths(c: Conversion) -> None:
    if (length := c.whole("max_length")) is not None:
        c.take("data.seq_len", length, "max_length")
    if c.flag("packing"):
        c.take("data.packing", True, "packing")
    else:
        note = "one example per row, padded to seq_len; true is faster, then with fewer rows in train.batch_size"
        c.take("data.packing", False, "packing", note=note)
    strategy = str(c.given("excess_length_strategy") or "drop")
    overlong = {"drop": "drop", "truncate": "truncate", "raise": "error"}.get(strategy)
    if overlong is None:
        c.leave(
            "excess_length_strategy", why="data.overlong: drop, truncate, truncate_turns, drop_oldest, split, error"
        )
    elif c.names("excess_length_strategy"):
        c.take("data.overlong", overlong, "excess_length_strategy")
    if c.is_on("dataset_prepared_path"):
        why = "what they prepared is not read; data are prepared anew, into data.cache or the user's cache"
        c.leave("dataset_prepared_path", why=why)


def _masks(c: Conversion) -> None:
    entries = c.entries("datasets", c.given("datasets") or [])
    roles = {tuple(map(str, as_list(entry["roles_to_train"]))) for entry in entries if entry.get("roles_to_train")}
    stops = {str(entry["train_on_eos"]) for entry in entries if entry.get("train_on_eos")}
    if c.flag("train_on_inputs"):
        c.take("data.train_on", "all", "train_on_inputs", note="every token, also of headers and system texts")
    elif len(roles) == 1 and roles != {("assistant",)} and roles != {("gpt",)}:
        c.take("data.train_on", list(roles.pop()), "datasets", note="for all sources alike")
    elif len(roles) > 1:
        c.missing.append("data.train_on: roles_to_train differs between datasets; here it is one for all")
    else:
        c.take("data.train_on", "assistant", "train_on_inputs")
    if stops == {"last"}:
        c.take("data.train_stop", "last", "datasets")
    elif stops & {"none", "all"}:
        c.missing.append("data.train_stop: every or last; train_on_eos all and none have no counterpart")
    templates = [c.given("chat_template"), *(entry.get("chat_template") for entry in entries)]
    jinja = [c.given("chat_template_jinja"), *(entry.get("chat_template_jinja") for entry in entries)]
    named = [str(name) for name in templates if name and str(name) not in ("tokenizer_default", "jinja")]
    if text := next((text for text in jinja if text), None):
        take_template(c, text, "chat_template_jinja", "chat_template")
    elif named:
        name = named[0].removeprefix("tokenizer_default_fallback_")
        take_template(c, name, *(["chat_template"] if c.is_on("chat_template") else ["datasets"]))
    elif any(str(entry.get("type")).startswith("alpaca") for entry in entries):
        note = "their alpaca rows have this prompt and no chat template; theirs ends with one more newline"
        c.take("data.chat_template", "stanford_alpaca", "datasets", note=note)
    c.leave("chat_template", why="the tokenizer's own template is taken")
    if isinstance(kwargs := c.given("chat_template_kwargs"), dict) and kwargs:
        c.take("data.chat_template_kwargs", kwargs, "chat_template_kwargs")
    tokens = c.given("special_tokens")
    if isinstance(tokens, dict):
        others = sorted(name for name, token in tokens.items() if token and name not in ("eos_token", "pad_token"))
        why = "padding needs no token, and stop tokens are found from template and model folder"
        if others:
            why += f"; {', '.join(others)}: set in the tokenizer before"
        if tokens.get("eos_token"):
            note = "the token by which the chat template ends an answer, whatever its name"
            c.take("data.set_eos", True, "special_tokens", note=note)
        else:
            c.leave("special_tokens", why=why)


def _adapters(c: Conversion) -> None:
    adapter = str(c.given("adapter") or "")
    if adapter in ("lora", "qlora"):
        convert_lora(c, targets=None)
    elif adapter:
        c.missing.append(f"lora: {adapter} is no LoRA")
    else:
        names = [name for name in c.theirs if name.startswith(("lora_", "peft_", "loraplus_"))]
        c.leave(*names, why="it has no effect there without `adapter`")
    if adapter == "qlora" and c.flag("gptq"):
        raise ConfigError("gptq: weights of other quantisations are not read; give the original model (model.quantize)")
    kind = "nf4" if c.flag("load_in_4bit") or adapter == "qlora" else "int8" if c.flag("load_in_8bit") else None
    convert_quantisation(
        c, kind, "load_in_4bit", "load_in_8bit", *["adapter"] * (adapter == "qlora"), frozen=bool(adapter)
    )
