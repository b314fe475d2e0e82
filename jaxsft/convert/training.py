"""What all trainers have: model, batch, optimizer, schedule, adapters, evaluations, checkpoints, log.

In: a `Conversion`. Out: it, with these keys taken. Names are those of transformers and TRL; `Conversion` knows what the
project calls them. Rows, masks and chat templates are each project's own.
"""

import re
from typing import Any

from jaxsft.convert.conversion import Conversion, brief

_OPTIMIZERS = {
    "adamw": "adamw adamw_torch adamw_torch_fused adamw_torch_xla adamw_torch_npu_fused adamw_hf adamw_apex_fused "
    "adamw_anyprecision paged_adamw_32bit paged_adamw adamw_bnb_32bit optimi_adamw flash_adamw",
    "adamw8bit": "adamw_8bit adamw_bnb_8bit adamw_torch_8bit paged_adamw_8bit ao_adamw_8bit",
    "adafactor": "adafactor",
    "lion": "lion lion_32bit lion_8bit paged_lion_32bit paged_lion_8bit flash_lion",
    "muon": "muon",
    "sgd": "sgd",
    "schedule_free_adamw": "schedule_free_adamw",
}
OPTIMIZERS = {theirs: ours for ours, names in _OPTIMIZERS.items() for theirs in names.split()}
"""Optimizer of theirs -> ours."""

SCHEDULES: dict[str, str] = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine",
    "cosine_warmup_with_min_lr": "cosine",
    "warmup_stable_decay": "wsd",
}
"""Schedule of theirs -> ours."""


def convert_training(c: Conversion, *, has_adapters: bool) -> None:
    """Takes all but rows, masks, templates and the adapters themselves."""
    _model(c, has_adapters=has_adapters)
    _batch(c)
    _optimizer(c)
    _schedule(c)
    _loss(c)
    _mesh(c)
    _cadences(c)


def _model(c: Conversion, *, has_adapters: bool) -> None:
    if name := c.given("model_name_or_path"):
        c.take("model.path", str(name), "model_name_or_path")
    else:
        c.missing.append("model.path: a Hugging Face folder or hub id")
    if str(c.given("bf16")).lower() == "auto":
        c.leave("bf16", why="model.compute_dtype left out is bfloat16 on accelerators, float32 on CPU")
    elif c.flag("bf16"):
        c.take("model.compute_dtype", "bfloat16", "bf16", note="of matmuls; trained weights are in model.param_dtype")
    given = c.given("dtype")
    dtype = "bfloat16" if given is True else str(given).removeprefix("torch.")
    if dtype in ("float32", "bfloat16") and not has_adapters:
        note = "of the trained weights; optim.stochastic_rounding helps small steps in bfloat16"
        c.take("model.param_dtype", dtype, "dtype", note=note if dtype == "bfloat16" else "")
    why = "adapters are in float32 as there, and frozen weights in model.compute_dtype" if has_adapters else (
        "trained weights are float32 or bfloat16 (model.param_dtype)"
    )  # fmt: skip
    c.leave("dtype", why=why)
    checkpointing = c.value("gradient_checkpointing")
    if c.flag("activation_offloading") or checkpointing == "offload":
        c.take("model.remat", "offload", "activation_offloading", "gradient_checkpointing")
    elif checkpointing is not None:  # what computes the same is not taken from their defaults
        c.take("model.remat", "full" if c.flag("gradient_checkpointing") else "none", "gradient_checkpointing")
    c.leave("attn_implementation", why="the kernel is chosen by devices and rows (model.attention)")
    if (seed := c.whole("seed")) is not None:
        c.take("seed", seed, "seed")


def _batch(c: Conversion) -> None:
    rows, times = c.whole("per_device_train_batch_size") or 1, c.whole("gradient_accumulation_steps") or 1
    names = ["per_device_train_batch_size", "gradient_accumulation_steps"]
    if (whole := c.whole("batch_size")) is not None:
        times, names = max(1, whole // rows), [*names, "batch_size"]
    note = "rows per step over all devices; there it is per device: on N of them N times as many"
    c.take("train.batch_size", rows * times, *names, note=note)
    if times > 1:
        c.take("train.microbatch_size", rows, "per_device_train_batch_size", note="rows at once, likewise")
    steps = c.whole("max_steps")
    if steps is not None and steps > 0:
        c.take("train.steps", steps, "max_steps")
        c.leave("num_train_epochs", why="max_steps goes before it, there as here")
    else:
        if (epochs := c.number("num_train_epochs")) is not None:
            c.take("train.epochs", epochs, "num_train_epochs")
    if c.given("output_dir"):
        c.take("run_dir", str(c.given("output_dir")), "output_dir")


def _optimizer(c: Conversion) -> None:
    if (rate := c.number("learning_rate")) is not None:
        c.take("optim.learning_rate", rate, "learning_rate")
    else:
        c.missing.append("optim.learning_rate: they require it")
    theirs = str(c.value("optim"))
    ours = OPTIMIZERS.get(theirs)
    if ours is None:
        c.leave("optim", why=f"{theirs} is not one of ours (docs/optimizers.md); adamw is taken in its place")
        ours = "adamw"
    else:
        is_smaller = theirs in ("lion_8bit", "paged_lion_8bit")
        c.take("optim.name", ours, "optim", note="moments are not in 8 bits" if is_smaller else "")
    decay = c.number("weight_decay")
    c.take("optim.weight_decay", decay or 0.0, "weight_decay")
    momentum = c.number("momentum")
    if ours in ("sgd", "muon") and (momentum is not None or ours == "sgd"):
        c.take("optim.momentum", momentum or 0.0, "momentum")
    usual = {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}
    has = {"adafactor": (), "sgd": (), "lion": ("beta1", "beta2")}.get(ours, tuple(usual))
    for key, standard in usual.items():
        name = f"adam_{key}"
        if key not in has:
            c.leave(name, why=f"it has no effect with {ours}")
            continue
        value = c.number(name)
        if value is not None or (ours == "lion" and key == "beta2"):
            c.take(f"optim.{key}", standard if value is None else value, name)
    clip = c.number("max_grad_norm")
    c.take("optim.clip_norm", clip or None, "max_grad_norm")
    if (ratio := c.number("loraplus_lr_ratio")) is not None:
        note = "LoRA+: the rate of B as a multiple of that of A"
        c.take("optim.groups", [{"match": "lora_b", "learning_rate_factor": ratio}], "loraplus_lr_ratio", note=note)
    if (weight := c.number("router_aux_loss_coef")) is not None:
        c.take("optim.router_balance", weight, "router_aux_loss_coef", note="a mean over layers")


def _schedule(c: Conversion) -> None:
    theirs = str(c.value("lr_scheduler_type"))
    ours = SCHEDULES.get(theirs)
    further = c.given("lr_scheduler_kwargs")
    further = dict(further) if isinstance(further, dict) else {}
    if ours is None and theirs == "polynomial" and further.get("power", 1) == 1:
        ours = "linear"
    if ours is None:
        c.leave("lr_scheduler_type", why=f"{theirs} is not one of ours; cosine is taken in its place")
        ours = "cosine"
    else:
        c.take("optim.schedule", ours, "lr_scheduler_type")
    total = c.whole("max_steps")
    used = set()
    if ours != "constant":
        rate = c.number("learning_rate")
        least = next((key for key in ("min_lr_rate", "min_lr_ratio", "min_lr", "lr_end") if key in further), None)
        if (share := c.number("cosine_min_lr_ratio")) is not None:
            c.take("optim.final_ratio", share, "cosine_min_lr_ratio")
        elif least and rate and (value := c.as_number(further[least], f"lr_scheduler_kwargs: {least}")) is not None:
            share = value / (rate if least in ("min_lr", "lr_end") else 1)
            c.take("optim.final_ratio", round(share, 12), "lr_scheduler_kwargs")
            used.add(least)
    if ours == "wsd":
        used |= {"decay_type", "warmup_type", "num_decay_steps", "num_stable_steps", "power", "num_cycles"}
        decays = further.get("num_decay_steps")
        decay_steps = c.as_number(decays, "lr_scheduler_kwargs: num_decay_steps") if decays else None
        if decay_steps and total is not None and total > 0:
            note = f"a share of the steps; it decays linearly ({further.get('decay_type', 'cosine')} there)"
            c.take("optim.decay_ratio", decay_steps / total, "lr_scheduler_kwargs", note=note)
        else:
            c.missing.append("optim.decay_ratio: the share of the steps in which the rate decays (0.2 where left out)")
    if left := sorted(further.keys() - used - {"power"}):
        c.leave("lr_scheduler_kwargs", why=f"of these, {', '.join(left)} has no counterpart")
    elif further and not any("lr_scheduler_kwargs" in taken.names for taken in c.taken):
        c.leave("lr_scheduler_kwargs", why=f"nothing of it is needed for {ours}")
    steps, ratio = c.number("warmup_steps"), c.number("warmup_ratio")
    if theirs == "constant":
        c.take("optim.warmup_steps", 0, "warmup_steps", "warmup_ratio", note="`constant` has no warm-up there")
    elif steps and steps >= 1:
        c.take("optim.warmup_steps", int(steps), "warmup_steps")
        c.leave("warmup_ratio", why="warmup_steps goes before it")
    elif steps:
        c.take("optim.warmup_ratio", steps, "warmup_steps", note="below 1 it is a share of all steps")
    else:
        c.take("optim.warmup_ratio", ratio or 0.0, "warmup_ratio", "warmup_steps")


def _loss(c: Conversion) -> None:
    if (smoothing := c.number("label_smoothing_factor")) is not None:
        c.take("loss.label_smoothing", smoothing, "label_smoothing_factor")
    if (alpha := c.number("neftune_noise_alpha")) is not None:
        note = "scaled by the length of the example, there by that of the padded row"
        c.take("loss.neftune_alpha", alpha, "neftune_noise_alpha", note=note)


def _mesh(c: Conversion) -> None:
    for key, name in (
        ("tensor", "tensor_parallel_size"),
        ("context", "context_parallel_size"),
        ("data", "dp_replicate_size"),
        ("fsdp", "dp_shard_size"),
        ("expert", "expert_parallel_size"),
    ):
        if (size := c.whole(name)) is not None and size > 1:
            c.take(f"mesh.{key}", size, name)
        elif size is not None:
            c.leave(name, why="1 is not needed: sizes are 1 where left out, and mesh.fsdp all that is left")


def _cadences(c: Conversion) -> None:
    """What is counted in steps: evaluations, checkpoints, lines of the log."""
    strategy = str(c.value("eval_strategy") or ("steps" if c.given("eval_steps") else "no"))
    if strategy == "steps":
        _every(c, "eval.every", "eval_steps", "eval_strategy")
    elif strategy == "epoch":
        why = "eval.every is in steps, and those of an epoch are known when data are prepared; the end is evaluated"
        c.leave("eval_strategy", "eval_steps", why=why)
    else:
        c.leave("eval_strategy", "eval_steps", why="nothing is evaluated")
    _best(c)
    saving = str(c.value("save_strategy") or "steps")
    if saving == "steps":
        _every(c, "checkpoint.every", "save_steps", "save_strategy")
    else:
        why = "checkpoint.every is in steps (100 where left out); the end is always saved, the best one always kept"
        c.leave("save_strategy", "save_steps", why=why)
    if keep := c.whole("save_total_limit"):
        c.take("checkpoint.keep", keep, "save_total_limit")
    _every(c, "log.every", "logging_steps")
    to = [tracker for tracker in c.texts("report_to") if tracker not in ("none", "all")]
    known = [tracker for tracker in to if tracker in ("tensorboard", "wandb", "trackio")]
    if known:
        c.take("log.to", known, "report_to")
    c.leave(*(["report_to"] if not known else []), why="of trackers there are tensorboard, wandb and trackio (log.to)")
    if "trackio" in known and isinstance(c.given("project"), str):
        c.take("log.project", c.given("project"), "project")
    elif not c.is_taken("log.project"):
        c.leave("project", why="a project is trackio's there; log.to does not name it")


def _best(c: Conversion) -> None:
    """What becomes of the smallest held-out loss: when a run ends by it, and whether its checkpoint is the export."""
    names = ("early_stopping_patience", "load_best_model_at_end")
    if not c.is_taken("eval.every"):
        c.leave(*names, why="it goes by evaluations between steps, and eval.every is not known (eval_steps)")
        return
    patience = c.whole("early_stopping_patience")
    if patience is not None and patience > 0:
        note = "evaluations without a smaller held-out loss in a row, that before training included"
        c.take("eval.patience", patience, "early_stopping_patience", note=note)
    if c.flag("load_best_model_at_end"):
        metric = c.given("metric_for_best_model")
        note = "" if metric in (None, "loss", "eval_loss") else f"of the smallest held-out loss, not by {brief(metric)}"
        c.take("checkpoint.export", "best", "load_best_model_at_end", note=note)


def _every(c: Conversion, key: str, name: str, *others: str) -> None:
    """A number of steps, or below 1 a share of all of them."""
    every, total = c.number(name), c.whole("max_steps")
    if every is None:
        c.leave(*others, why=f"{key} is in steps, and {name} is not given")
        return
    if 0 < every < 1:
        if total is None or total < 1:
            c.leave(name, *others, why=f"a share of all steps, which are known when data are prepared; set {key}")
            return
        every = max(1, every * total)
    if every >= 1:
        c.take(key, round(every), name, *others)
    else:
        c.leave(name, *others, why="below 1 it is not set")


def convert_lora(c: Conversion, *, targets: Any) -> None:
    """Takes the keys of adapters.

    Args:
        targets: which maps get them there where none are named.
    """
    if c.texts("lora_model_dir"):
        taken = next((index for index, one in enumerate(c.taken) if one.key == "model.path"), None)
        if taken is not None:
            base = c.taken.pop(taken)
            for name in base.names:
                c.without[name] = "the adapter's folder names its base"
        c.missing = [sentence for sentence in c.missing if not sentence.startswith("model.path")]
        c.take("model.path", str(c.texts("lora_model_dir")[0]), "lora_model_dir", note="its adapters go on")
        why = "ranks, scales and targets are those of the adapter's folder"
        c.leave(*LORA_NAMES, why=why)
        return
    rank = c.whole("lora_r")
    if rank is None:
        c.missing.append("lora.rank: they require it")
    else:
        c.take("lora.rank", rank, "lora_r", "use_peft")
    if (alpha := c.number("lora_alpha")) is not None:
        c.take("lora.alpha", alpha, "lora_alpha")
    c.take("lora.dropout", c.number("lora_dropout") or 0.0, "lora_dropout")
    _targets(c, targets)
    for key in ("rank", "alpha"):
        if isinstance(pattern := c.given(f"lora_{key}_pattern"), dict):
            c.take(f"lora.{key}_pattern", pattern, f"lora_{key}_pattern")
    if c.flag("use_rslora"):
        c.take("lora.rslora", True, "use_rslora")
    if c.flag("use_dora"):
        c.take("lora.dora", True, "use_dora")
    if c.is_on("lora_modules_to_save"):
        tables = [name for name in c.texts("lora_modules_to_save") if name in ("embed_tokens", "lm_head")]
        hint = f"; to adapt them too: lora.targets [all_linear, {', '.join(tables)}]" if tables else ""
        c.leave("lora_modules_to_save", why=f"with adapters nothing else is trained{hint}")


LORA_NAMES = (
    "use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_linear", "use_rslora",
    "use_dora", "lora_rank_pattern", "lora_alpha_pattern",
)  # fmt: skip
"""Keys of adapters, by TRL's names."""

_ALL = ("all-linear", "all_linear", "all")


def _targets(c: Conversion, usual: Any) -> None:
    named = c.given("lora_target_modules")
    if c.flag("lora_target_linear") or named in (*_ALL, ["all-linear"], ["all"]):
        targets, names = ["all_linear"], ["lora_target_linear", "lora_target_modules"]
    else:
        names = ["lora_target_modules"]
        targets = usual if named is None else c.texts("lora_target_modules")
        if _is_regex(named):
            targets = [_whole_name(str(named))]
    if targets is None:
        c.missing.append("lora.targets: they require it; all_linear, attention, mlp or names such as q_proj")
        return
    notes = ["names are whole here and begin with layers, not with model.layers"] if _is_regex(named) else []
    if any("experts" in str(name) for name in c.texts("lora_target_parameters")) and targets != ["all_linear"]:
        targets, names = [*targets, "mlp"], [*names, "lora_target_parameters"]
        notes.append("experts are `mlp`")
    layers = c.given("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    if isinstance(layers, list) and all(isinstance(layer, int) for layer in layers) and layers:
        ends = ".*_proj" if targets == ["all_linear"] else f".*({'|'.join(re.escape(one) for one in targets)})"
        targets, names = [rf"layers\.({'|'.join(map(str, layers))})\.{ends}"], [*names, "layers_to_transform"]
    c.take("lora.targets", targets, *names, note="; ".join(notes))


def _is_regex(named: Any) -> bool:
    return isinstance(named, str) and re.fullmatch(r"[\w.,\s-]+", named) is None


def _whole_name(pattern: str) -> str:
    """PEFT's pattern for the name of a module, as one for a map of ours, whose names begin with layers."""
    return re.sub(
        r"\^?(\.\*\\?\.|base_model\\?\.|model\\?\.|language_model\\?\.|text_model\\?\.)+(?=layers)", "", pattern
    )


def convert_quantisation(c: Conversion, kind: str | None, *names: str, frozen: bool) -> None:
    """Takes how frozen weights lie in memory."""
    if kind is None:
        return
    if frozen:
        c.take("model.quantize", kind, *names)
    else:
        c.leave(*names, why="only frozen weights are quantised here, and without adapters all are trained")
