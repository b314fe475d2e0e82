"""Parts of a turn that are trained less than the rest, or not at all: from characters of the data to tokens.

In: a rendered text, whose characters know which character of the data they are, and messages that weigh ranges of
their content or reasoning. Out: a weight for every character of the text, and the weight of a token: the least of its
characters', so that a token that straddles two parts is trained as little as the lesser of them.

    content "bad good", the first four characters with weight 0
    text    <|im_start|>assistant\\nbad good<|im_end|>      weights of "bad good": 0 0 0 0 1 1 1 1
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxsft.chat.provenance import TEMPLATE, Traced
from jaxsft.chat.template import GENERATED, REASONING, Source
from jaxsft.rows.flags import CONTENT_WEIGHTS, REASONING_WEIGHTS

_FIELDS = {"content": CONTENT_WEIGHTS, REASONING: REASONING_WEIGHTS}


def character_weights(
    text: Traced, sources: Sequence[Source], messages: Sequence[dict[str, Any]], *, of_turns: bool = False
) -> np.ndarray | None:
    """float32 per character of a text: what its turn's weight is multiplied by; None where that is 1 throughout.

    What the template writes in the place of data that it does not show (`<think>` of a content that it takes apart) has
    the weight of that data.

    Args:
        text: a render of the messages.
        sources: of its characters.
        messages: those that were rendered, with the weights of their parts.
        of_turns: multiply what a turn says by its weight, too; for texts that are trained as a whole.
    """
    if not any(_weighs(message, of_turns=of_turns) for message in messages):
        return None
    by_source: dict[int, np.ndarray] = {}
    for number, source in enumerate(sources, start=1):
        if source.message < 0 or source.field == "role":
            continue
        message = messages[source.message]
        ranges = message.get(_FIELDS.get(source.field, ""), ())
        weight = message.get("weight", 1.0) if of_turns else 1.0
        if ranges or weight != 1:
            weights = np.full(len(source.text), weight, np.float32)
            for start, end, factor in ranges:
                weights[start:end] *= factor
            by_source[number] = weights
    found = np.ones(len(text), np.float32)
    is_template = np.ones(len(text), bool)
    at = end_of_data = 0
    ends: dict[int, tuple[int, int]] = {}
    for length, marked, offset in text.runs:
        number = marked & ~GENERATED
        if number != TEMPLATE:
            is_template[at : at + length] = False
        if number in by_source:
            weights = by_source[number]
            found[at : at + length] = weights[offset : offset + length]
            # What of this text is not shown before these characters, and what the template wrote since.
            before, since = ends.get(number, (0, end_of_data))
            if before < offset:
                between = found[since:at]
                between[is_template[since:at]] = weights[before:offset].min()
            ends[number] = offset + length, at + length
        if number != TEMPLATE:
            end_of_data = at + length
        at += length
    for number, (shown, since) in ends.items():
        rest = sources[number - 1].text[shown:]
        if rest.strip():
            following = np.flatnonzero(~is_template[since:])
            until = since + int(following[0]) if len(following) else len(text)
            found[since:until] = by_source[number][shown:].min()
    return found


def _weighs(message: dict[str, Any], *, of_turns: bool) -> bool:
    return CONTENT_WEIGHTS in message or REASONING_WEIGHTS in message or (of_turns and message.get("weight", 1) != 1)


def token_weights(weights: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each token, the least and the greatest weight of its characters, float32 each.

    token_weights([0, 0, 1, 1], starts=[0, 1, 3], ends=[1, 3, 4]) == [0, 0, 1], [0, 1, 1]
    """
    padded = np.append(weights, np.float32(1))
    bounds = np.stack([starts, np.maximum(ends, starts + 1)], axis=1).ravel()
    bounds = np.minimum(bounds, len(padded) - 1)
    return np.minimum.reduceat(padded, bounds)[::2], np.maximum.reduceat(padded, bounds)[::2]
