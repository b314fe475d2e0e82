"""One run in PyTorch with transformers, step by step as the field writes it: `python -m jaxsft.baseline.hf FOLDER`.

In: FOLDER/request.json, FOLDER/model (a Hugging Face folder), with adapters FOLDER/adapter (PEFT's), and the examples
of each row. Out, in FOLDER/theirs: what
the model computes of one row, layer by layer; the gradients of the first step; the parameters after one step and
after the last; `metrics.jsonl` and `facts.json`. Nothing of jaxsft is imported: rows, shift, schedule, loss and
optimizer are built here once more, so that a mistake in ours shows.
"""

import json
import math
import pathlib
import platform
import resource
import sys
import time
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

IGNORED = -100
PLACES = ("_name_or_path", "transformers_version", "dtype")
"""Fields of a config that do not say what a model computes."""


class Rows(NamedTuple):
    """The packed rows of a step, leaves [B, T]; labels are not shifted, as transformers wants them."""

    tokens: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    """Weight of each token as a label."""
    segments: torch.Tensor
    """Number of the example within the row, from 1; 0 is padding."""
    positions: torch.Tensor


def main(folder: pathlib.Path) -> None:
    """The whole run of a request."""
    began = time.perf_counter()
    request = json.loads((folder / "request.json").read_text())
    theirs = folder / "theirs"
    theirs.mkdir(exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model = load_model(folder, request, device)
    optimizer = make_optimizer(model, request)
    examples = {key: np.load(folder / f"{key}.npy", mmap_mode="r") for key in ("tokens", "weights", "segments")}
    starts = np.searchsorted(examples["segments"][:, 0], np.arange(request["num_steps"] + 1))

    def rows_of(step: int) -> Rows:
        segments = examples["segments"][starts[step] : starts[step + 1]]
        return build_rows(segments, examples, request, device)

    look_inside(model, rows_of(0), request, theirs)
    (theirs / "facts.json").write_text(json.dumps(facts(model, request, device), default=str))
    batches, total_tokens, total_trained = [], 0.0, 0.0
    startup = time.perf_counter() - began
    with (theirs / "metrics.jsonl").open("w") as metrics:
        for step in range(request["num_steps"]):
            rows = rows_of(step)
            batches.append(as_arrays(rows))
            at = time.perf_counter()
            learning_rate = learning_rate_of(step, request)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.zero_grad(set_to_none=True)
            loss = backward(model, rows, request)
            if step == 0:
                save_tensors(model, {name: p.grad for name, p in model.named_parameters()}, theirs / "gradients")
            limit = request["clip_norm"]
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf if limit is None else limit)
            optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - at
            startup += seconds if step == 0 else 0.0
            tokens, trained = int((rows.segments > 0).sum()), int((rows.labels != IGNORED).sum())
            total_tokens, total_trained = total_tokens + tokens, total_trained + trained
            line: dict[str, Any] = {
                "step": step + 1,
                "loss": loss,
                "grad_norm": float(norm),
                "learning_rate": learning_rate,
                "tokens": tokens,
                "trained_tokens": trained,
                "total_tokens": total_tokens,
                "total_trained_tokens": total_trained,
                "seconds": seconds,
                "memory_gib": memory_gib(device),
            }
            lost = {key: str(float(value)) for key, value in line.items() if not math.isfinite(value)}
            line |= dict.fromkeys(lost) | ({"not_finite": lost} if lost else {})
            metrics.write(json.dumps(line) + "\n")
            metrics.flush()
            print(f"transformers: step {step + 1} of {request['num_steps']}, loss {loss:.4f}", flush=True)
            if step == 0:
                save_tensors(model, dict(model.named_parameters()), theirs / "params_first")
    save_tensors(model, dict(model.named_parameters()), theirs / "params_last")
    for leaf in batches[0]:
        np.save(theirs / f"{leaf}.npy", np.stack([batch[leaf] for batch in batches]))
    found = json.loads((theirs / "facts.json").read_text()) | {"startup_seconds": startup}
    (theirs / "facts.json").write_text(json.dumps(found))


def load_model(folder: pathlib.Path, request: dict[str, Any], device: torch.device) -> Any:
    """The model, without dropout; attention by sdpa, but where sdpa leaves out what the model asks for.

    With adapters, these alone are trained, by PEFT.
    """
    config = transformers.AutoConfig.from_pretrained(folder / "model")
    needs_eager = getattr(config, "attn_logit_softcapping", None) is not None or config.model_type == "gpt_oss"
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model",
        dtype=getattr(torch, request["param_dtype"]),
        attn_implementation="eager" if needs_eager else "sdpa",
    )
    # PyTorch gives the embedding of a pad token no gradient; where pad and stop token are one, it is trained.
    model.get_input_embeddings().padding_idx = None
    if (folder / "adapter").exists():
        import peft

        model = peft.PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)
    return model.to(device).eval()


def build_rows(
    segments: np.ndarray, examples: dict[str, np.ndarray], request: dict[str, Any], device: torch.device
) -> Rows:
    """Rows of one step from its examples.

    Args:
        segments: int64 [S, 5]: step, row, start in the row, first token of the example in `examples`, and its length.
        examples: `tokens` int32 and `weights` float32 of all examples, one after the other.
        request: batch_size, seq_len.
        device: where the rows go.
    """
    shape = (request["batch_size"], request["seq_len"])
    tokens, segment_ids, positions = (np.zeros(shape, np.int64) for _ in range(3))
    labels, weights = np.full(shape, IGNORED, np.int64), np.zeros(shape, np.float32)
    count = np.zeros(shape[0], np.int64)
    for _, row, start, first, length in segments:
        count[row] += 1
        at = slice(start, start + length)
        ids, wanted = (examples[key][first : first + length] for key in ("tokens", "weights"))
        # The first token of an example follows nothing that could predict it.
        wanted = np.where(np.arange(length) == 0, 0.0, wanted)
        tokens[row, at], segment_ids[row, at], positions[row, at] = ids, count[row], np.arange(length)
        weights[row, at], labels[row, at] = wanted, np.where(wanted != 0, ids, IGNORED)
    return Rows(*(torch.tensor(each, device=device) for each in (tokens, labels, weights, segment_ids, positions)))


def logits_of(model: Any, rows: Rows, request: dict[str, Any]) -> torch.Tensor:
    """float32 [B, T, V]. Positions that begin anew tell transformers where an example ends: it masks by them."""
    is_cast = request["compute_dtype"] != request["param_dtype"]
    masks = block_masks(model.config, rows) if model.config.model_type == "gpt_oss" else None
    with torch.autocast(rows.tokens.device.type, getattr(torch, request["compute_dtype"]), enabled=is_cast):
        out = model(input_ids=rows.tokens, attention_mask=masks, position_ids=rows.positions, use_cache=False)
        return out.logits.float()


def block_masks(config: Any, rows: Rows) -> dict[str, torch.Tensor]:
    """What each kind of layer may attend to, added to scores: for a model whose masks leave positions out."""
    at = torch.arange(rows.tokens.shape[1], device=rows.tokens.device)
    distance = at[:, None] - at[None, :]
    same = rows.segments[:, :, None] == rows.segments[:, None, :]
    allowed = {"full_attention": same & (distance >= 0)}
    allowed["sliding_attention"] = allowed["full_attention"] & (distance < config.sliding_window)
    lowest = torch.finfo(torch.float32).min
    return {kind: torch.where(each[:, None], 0.0, lowest) for kind, each in allowed.items()}


def backward(model: Any, rows: Rows, request: dict[str, Any]) -> float:
    """Adds the gradients of the step's loss, microbatch by microbatch; returns the loss, nats per trained token."""
    weight_sum = float(rows.weights.double().sum()) or 1.0
    count, total = request["num_microbatches"], 0.0
    for number in range(count):
        part = Rows(*(each[number::count] for each in rows))
        logits, labels = logits_of(model, part, request)[:, :-1], part.labels[:, 1:]
        loss = (negative_log_likelihood(logits, labels) * part.weights[:, 1:]).sum() / weight_sum
        loss.backward()
        total += loss.item()
    return total


def negative_log_likelihood(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Nats of each label [B, T] under logits [B, T, V]; of ignored ones, those of token 0.

    By logsumexp, as `cross_entropy` sums up a large vocabulary's exponentials less exactly on a CPU: in float32 each
    label of 151,936 came out 4.7e-6 nats too small on average, by logsumexp 6e-8 (49,152: 8e-7 and 1e-8; AVX-512).
    """
    chosen = logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return torch.logsumexp(logits, -1) - chosen


def make_optimizer(model: Any, request: dict[str, Any]) -> torch.optim.Optimizer:
    """AdamW; norms and biases are not decayed."""
    decayed: list[Any] = []
    spared: list[Any] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # Norms of heads have a dim for the heads in some models.
        is_spared = parameter.ndim < 2 or name.endswith("bias") or "norm" in name.split(".")[-2]
        (spared if is_spared else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": request["weight_decay"]}, {"params": spared, "weight_decay": 0.0}]
    betas = (request["beta1"], request["beta2"])
    return torch.optim.AdamW(groups, lr=request["learning_rate"], betas=betas, eps=request["epsilon"])


def learning_rate_of(step: int, request: dict[str, Any]) -> float:
    """Learning rate of a step, counted from 0.

    Warm-up reaches the peak with its last step; the decay ends at `final_ratio` of the peak after the last step of all,
    as transformers' schedules do.
    """
    peak, warmup, end = request["learning_rate"], request["warmup_steps"], request["schedule_steps"]
    if step < warmup:
        return peak * (step + 1) / warmup
    begin = warmup
    if request["schedule"] == "wsd":
        begin = max(warmup, end - round(request["decay_ratio"] * end))
    progress = min(max((step - begin) / max(end - begin, 1), 0.0), 1.0)
    fall = {
        "constant": 0.0,
        "linear": progress,
        "wsd": progress,
        "cosine": (1 - math.cos(math.pi * progress)) / 2,
    }[request["schedule"]]
    return peak * (1 - (1 - request["final_ratio"]) * fall)


def look_inside(model: Any, rows: Rows, request: dict[str, Any], folder: pathlib.Path) -> None:
    """What one row of the first step becomes: the residual stream before and after each layer, and the logits."""
    row = request["looked_row"]
    first = Rows(*(each[row : row + 1] for each in rows))
    seen: list[torch.Tensor] = []

    def before(_: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if not seen:
            seen.append(args[0] if args else kwargs["hidden_states"])

    def after(_: Any, __: tuple, out: Any) -> None:
        seen.append(out[0] if isinstance(out, tuple) else out)

    layers = layers_of(model)
    hooks = [layers[0].register_forward_pre_hook(before, with_kwargs=True)]
    hooks += [layer.register_forward_hook(after) for layer in layers]
    with torch.no_grad():
        logits = logits_of(model, first, request)
    for hook in hooks:
        hook.remove()
    at = torch.tensor(request["looked_at"], device=logits.device)
    residuals = torch.stack([each[0, at] for each in seen]).float().cpu().numpy()
    save_file({"residuals": residuals, "logits": logits[0, at].cpu().numpy()}, folder / "first_row.safetensors")


def layers_of(model: Any) -> Any:
    """The list of layers, whatever the family calls it."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [each for each in model.modules() if isinstance(each, torch.nn.ModuleList) and len(each) == count]
    return lists[0]


def save_tensors(model: Any, tensors: dict[str, Any], folder: pathlib.Path) -> None:
    """Tensors that belong to the parameters of a model, under the names that its checkpoints have; float32."""
    parameters = dict(model.named_parameters())
    state = {
        name: (torch.zeros_like(parameters[name]) if tensor is None else tensor).detach().float().cpu()
        for name, tensor in tensors.items()
    }
    # PEFT would save the whole table beside the adapter of an embedding.
    options = {} if isinstance(model, transformers.PreTrainedModel) else {"save_embedding_layers": False}
    model.save_pretrained(folder, state_dict=state, **options)


def as_arrays(rows: Rows) -> dict[str, np.ndarray]:
    """What this step trains, as inputs and targets: position t predicts token t + 1."""
    tokens, labels, weights, segments, positions = (each.cpu().numpy() for each in rows)
    shift = [(0, 0), (0, 1)]
    return {
        "tokens": tokens.astype(np.int32),
        "targets": np.pad(np.where(labels[:, 1:] == IGNORED, 0, labels[:, 1:]), shift).astype(np.int32),
        "loss_weights": np.pad(weights[:, 1:], shift),
        "segment_ids": segments.astype(np.int32),
        "positions": positions.astype(np.int32),
    }


def facts(model: Any, request: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Versions and the settings that were really used."""
    settings = {key: value for key, value in request.items() if not key.startswith("look")}
    known = {key: value for key, value in model.config.to_dict().items() if key not in PLACES}
    settings |= {f"model.{key}": value for key, value in known.items()}
    return {
        "versions": {
            "Python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
        "attention": model.config._attn_implementation,
        "settings": settings,
        "caveats": ["dropout is off", "memory and start-up include looking inside the first step"],
    }


def memory_gib(device: torch.device) -> float:
    """Largest use so far: of the device, or of this process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
