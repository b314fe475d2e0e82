"""The rows of a run as TRL takes them, and what both made of each.

In: the items of our sources, and a config. Out: lines for TRL's program, and the SFTConfig that matches the config;
then, from what that program leaves, each row as both prepared it, for `tokens.py`.
"""

import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxsft.batches.lengths import fit_length
from jaxsft.chat.encoder import WRITERS, ChatEncoder, MaskError
from jaxsft.chat.weighing import Encoded
from jaxsft.compare import tokens
from jaxsft.config import Config, ConfigError
from jaxsft.folders.pretrained import OpenTokenizer
from jaxsft.rows.items import Conversation, Document, Item
from jaxsft.rows.messages import Message
from jaxsft.training.optim import warmup_steps

MESSAGES, PROMPTS, TEXTS = "messages", "prompt_completion", "text"
CHUNK = 500


class Rows(NamedTuple):
    """The rows as TRL takes them."""

    shape: str
    """MESSAGES, PROMPTS or TEXTS."""
    lines: list[dict[str, Any]]


def trl_rows(items: Sequence[Item], config: Config) -> Rows:
    """The rows in the shape that TRL has for them.

    Where every conversation is trained only from some message on (one answer to one question, or the config asks for
    the last turn), that is a prompt with its completion, which TRL masks with any chat template. Else it is messages.

    Raises:
        ConfigError: rows of kinds that TRL does not take, or not together.
    """
    if all(isinstance(item, Document) and item.trained is None for item in items):
        return Rows(TEXTS, [{"text": item.text} for item in items if isinstance(item, Document)])
    conversations = [item for item in items if isinstance(item, Conversation)]
    if len(conversations) != len(items):
        raise ConfigError(
            "data.train: TRL takes conversations, or plain text, but not both, nor rows of tokens or of segments"
        )
    variables = [config.data.chat_template_kwargs | each.template_kwargs for each in conversations]
    starts = [completion_start(each, config.data.train_on) for each in conversations]
    lines: list[dict[str, Any]] = []
    for item, start in zip(conversations, starts, strict=True):
        messages = plain_messages(item.messages)
        lines.append(
            {"messages": messages} if None in starts else {"prompt": messages[:start], "completion": messages[start:]}
        )
        if any(each.tools for each in conversations):
            # As text, so that the tools of different rows do not get each other's keys.
            lines[-1]["tools"] = json.dumps(item.tools, ensure_ascii=False) if item.tools else None
    for line, each in zip(lines, variables, strict=True):
        if any(variables):
            line["chat_template_kwargs"] = each
    return Rows(MESSAGES if None in starts else PROMPTS, lines)


def completion_start(item: Conversation, train_on: Any) -> int | None:
    """Index of the first message of the completion, if all of the assistant's before it are not trained."""
    if train_on == "all":
        return None
    answers = [index for index, message in enumerate(item.messages) if message["role"] == "assistant"]
    if item.trained_from:
        return item.trained_from
    if answers != [len(item.messages) - 1] and (train_on != "last_turn" and item.train_on != "last_turn"):
        return None
    return answers[-1] if answers and answers[-1] == len(item.messages) - 1 and answers[-1] else None


def plain_messages(messages: Sequence[Message]) -> list[Message]:
    """Without what is only ours."""
    return [{key: value for key, value in each.items() if key not in ("weight", "train")} for each in messages]


def trl_arguments(config: Config, shape: str, *, schedule_steps: int) -> dict[str, Any]:
    """Fields of SFTConfig that say what the config says, as far as TRL has words for it."""
    optim, rows = config.optim, config.train.microbatch_rows
    warmup = warmup_steps(optim, schedule_steps)
    decay = round(optim.decay_ratio * schedule_steps)
    names: dict[str, tuple[str, dict[str, Any]]] = {
        "constant": ("constant_with_warmup", {}),
        "linear": ("polynomial", {"power": 1.0, "lr_end": optim.learning_rate * optim.final_ratio})
        if optim.final_ratio
        else ("linear", {}),
        "cosine": ("cosine_with_min_lr", {"min_lr_rate": optim.final_ratio}) if optim.final_ratio else ("cosine", {}),
        "wsd": (
            "warmup_stable_decay",
            {
                "num_decay_steps": decay,
                "num_stable_steps": max(schedule_steps - warmup - decay, 0),
                "decay_type": "linear",
                "min_lr_ratio": optim.final_ratio,
            },
        ),
    }
    scheduler, scheduler_kwargs = names[optim.schedule]
    return {
        "max_length": config.data.seq_len,
        "assistant_only_loss": shape == MESSAGES and config.data.train_on != "all",
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": config.train.batch_size // rows,
        "max_steps": schedule_steps,
        "seed": config.seed,
        "learning_rate": optim.learning_rate,
        "lr_scheduler_type": scheduler,
        "lr_scheduler_kwargs": scheduler_kwargs,
        "warmup_steps": warmup,
        "adam_beta1": optim.beta1,
        "adam_beta2": optim.beta2,
        "adam_epsilon": optim.epsilon,
        "weight_decay": optim.weight_decay,
        "max_grad_norm": optim.clip_norm or 0.0,
        "gradient_checkpointing": config.model.remat != "none",
    }


class Prepared(NamedTuple):
    """What TRL made of the rows."""

    tokens: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray
    index_of: dict[int, int]
    """Row -> example."""
    about: dict[str, Any]
    first: dict[str, Any]
    """Its loss on some of the examples."""

    @classmethod
    def read(cls, folder: pathlib.Path) -> "Prepared":
        arrays = np.load(folder / "prepared.npz")
        index_of = {row: index for index, row in enumerate(arrays["rows"].tolist())}
        about, first = (json.loads((folder / name).read_text()) for name in ("prepared.json", "first.json"))
        return cls(arrays["tokens"], arrays["trained"], arrays["offsets"], index_of, about, first)

    def example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        span = slice(self.offsets[index], self.offsets[index + 1])
        return self.tokens[span], self.trained[span]


def habits_of(tokenizer: OpenTokenizer, config: Config, shape: str, found: Prepared) -> tokens.Habits:
    """What holds for all rows."""
    inner = tokenizer.tokenizer
    control = {int(id) for id, each in inner.added_tokens_decoder.items() if each.content.strip()}
    masks = "assistant" if found.about["assistant_only_loss"] else "completion"
    if masks == "completion" and not found.about["completion_only_loss"]:
        masks = "all"
    return tokens.Habits(
        max_length=config.data.seq_len,
        stops=frozenset(map(int, tokenizer.stops)),
        control=frozenset(control),
        begin=inner.bos_token_id,
        masks=masks,
        decode=functools.partial(inner.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False),
    )


def prepared_rows(
    items: Sequence[Item], encoder: ChatEncoder, tokenizer: OpenTokenizer, config: Config, found: Prepared
) -> list[tokens.Row]:
    """Each row as both prepared it."""
    rows = []
    changed = set(found.about["rows_changed"])
    for begin in range(0, len(items), CHUNK):
        chunk = items[begin : begin + CHUNK]
        for number, (item, encoded) in enumerate(zip(chunk, encoder.encode(chunk), strict=True), start=begin):
            row = _our_side(item, encoded, config)
            if number in found.index_of:
                theirs, trained = found.example(found.index_of[number])
                row = row._replace(theirs=theirs, trained=trained)
            if row.theirs is None or len(row.pieces) != 1 or not np.array_equal(row.pieces[0].tokens, row.theirs):
                row = row._replace(
                    rendered=render(item, tokenizer, config),
                    patched=render(item, tokenizer, config, template=found.about["training_template"]),
                )
            rows.append(row._replace(is_changed=number in changed))
    return rows


def _our_side(item: Item, encoded: list[Encoded] | MaskError, config: Config) -> tokens.Row:
    if isinstance(encoded, MaskError):
        return tokens.Row(item.origin, (), None, np.zeros(0, bool), is_refused=True)
    pieces, is_cut = [], False
    for each in encoded:
        fitted = fit_length(each, config.data.seq_len, config.data.overlong)
        is_cut |= bool(fitted.dropped or fitted.cut)
        writers = [WRITERS[number] for number in each.writers.tolist()]
        for start, end in fitted.spans:
            kept, weights = each.example.tokens[start:end], each.example.loss_weights[start:end]
            pieces.append(tokens.Piece(kept, weights, tuple(writers[start:end])))
    is_unrolled = any("unrolled_examples" in each.counts for each in encoded)
    return tokens.Row(item.origin, tuple(pieces), None, np.zeros(0, bool), is_unrolled=is_unrolled, is_cut=is_cut)


def render(item: Item, tokenizer: OpenTokenizer, config: Config, *, template: str | None = "") -> np.ndarray | None:
    """What transformers makes of a row, with another template where one is given; None for none, or a refusal."""
    inner = tokenizer.tokenizer
    if template is None:
        return None
    if isinstance(item, Document):
        text = item.text if item.text.endswith(inner.eos_token) else item.text + inner.eos_token
        return np.array(inner(text)["input_ids"], np.int64)
    if not isinstance(item, Conversation):
        return None
    options: dict[str, Any] = config.data.chat_template_kwargs | item.template_kwargs
    if template:
        options["chat_template"] = template
    import jinja2

    try:
        messages = plain_messages(item.messages)
        ids = inner.apply_chat_template(messages, tools=item.tools, tokenize=True, return_dict=False, **options)
    except (jinja2.TemplateError, TypeError, ValueError):
        return None
    return np.array(ids, np.int64)
