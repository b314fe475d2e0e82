"""What an encoder trains of a conversation, as text to read."""

from typing import Any

import numpy as np

from jaxsft.chat.encoder import ChatEncoder, stop_ids
from jaxsft.chat.starts import MaskError
from jaxsft.chat.weighing import Encoded
from jaxsft.config import DataConfig
from jaxsft.rows.items import Conversation

Message = dict[str, Any]


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def system(content: str) -> Message:
    return {"role": "system", "content": content}


def assistant(content: str, **fields: Any) -> Message:
    return {"role": "assistant", "content": content, **fields}


def encoder_of(tokenizer: Any, **data: Any) -> ChatEncoder:
    stops = data.pop("stops", None)
    config = DataConfig.model_validate({"train": "rows", **data})
    return ChatEncoder(
        tokenizer, config, stop_ids(tokenizer) if stops is None else tokenizer.convert_tokens_to_ids(stops)
    )


def encoded(messages: list[Message], tokenizer: Any, *, tools: Any = None, kwargs: Any = None, **data: Any) -> Any:
    """The examples of one conversation, or the error that says why it has none."""
    (found,) = encoder_of(tokenizer, **data).encode([Conversation(messages, tools, kwargs or {}, origin="rows:1")])
    return found


def trained(messages: list[Message], tokenizer: Any, **options: Any) -> list[list[str]]:
    """Of each example the trained runs of tokens as text."""
    found = encoded(messages, tokenizer, **options)
    if isinstance(found, MaskError):
        raise found
    return [runs(one, tokenizer) for one in found]


def runs(one: Encoded, tokenizer: Any) -> list[str]:
    tokens, weights = one.example
    bounds = np.flatnonzero(np.diff(np.concatenate([[0], weights > 0, [0]]))).reshape(-1, 2)
    return [tokenizer.decode(tokens[start:end], clean_up_tokenization_spaces=False) for start, end in bounds]


def text_of(one: Encoded, tokenizer: Any) -> str:
    return tokenizer.decode(one.example.tokens, clean_up_tokenization_spaces=False)
