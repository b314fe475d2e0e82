"""The tokens that end an answer, and the chat template that writes them, opened once it is known to be harmless.

In: a tokenizer with its chat template, and the ids of the model's configs. Out: every id that ends an answer, the one
by which the template ends it, and the opened template.
"""

import datetime
import json
import re
from collections.abc import Sequence
from typing import Any

from jaxsft.chat.control import Tokenizer
from jaxsft.chat.habits import Habits, habits_of, writes_within
from jaxsft.chat.probe import check_template
from jaxsft.chat.template import ChatTemplate
from jaxsft.rows.sources import DataError


def stop_ids(tokenizer: Tokenizer, configured: Sequence[int | list[int] | None] = ()) -> list[int]:
    """Every token that ends an answer: the tokenizer's eos, those of the model's configs, and the template's own.

    The template's own is the added token that directly follows an answer in a rendered probe, such as `<|im_end|>` of
    ChatML on a base model whose eos is `<|endoftext|>`. All of them belong into the export's generation_config.

    A token that the template also writes between the reasoning and the rest of one answer ends none, as long as there
    is another one that does: a model that stopped there would never get to its answer. The tokenizer's eos stays, since
    whoever asks a model stops at it anyway.

    Raises:
        DataError: the tokenizer's template is no program that can be run.
    """
    stops = [tokenizer.eos_token_id]
    added = tokenizer.added_tokens_decoder
    for ids in configured:
        # With a tokenizer that is not the model's own, its ids mean other tokens, words even.
        stops += [id for id in (ids if isinstance(ids, list) else [ids]) if type(id) is int and id in added]
    known = list(dict.fromkeys(int(stop) for stop in stops if stop is not None))
    habits = _habits(tokenizer, known)
    if habits is None:
        return known
    ends = _template_ends(tokenizer, habits)
    within = {id for id in {*known, *ends} if writes_within(habits, token_text(tokenizer, id))}
    ends = [end for end in ends if end not in within] or ends
    # The template's own is added only where it ends no answer with one that is known.
    found = known if set(ends) & set(known) else [*known, *ends[:1]]
    return [id for id in found if id not in within or id == tokenizer.eos_token_id] or found


def open_template(
    tokenizer: Tokenizer, *, today: datetime.date | None = None, template_kwargs: dict[str, Any] | None = None
) -> ChatTemplate | None:
    """The chat template of a tokenizer, once a process with limits has shown that it can be run; None if there is none.

    Raises:
        DataError: it is not Jinja, or takes too long or too much memory.
    """
    source = tokenizer.chat_template
    if not source:
        return None
    variables = {name: _plain(value) for name, value in tokenizer.special_tokens_map.items()}
    for text in [source] if isinstance(source, str) else source.values():
        if problem := check_template(text, json.dumps(variables, sort_keys=True)):
            raise DataError(f"{template_name(tokenizer)} {problem}")
    return ChatTemplate(source, variables | (template_kwargs or {}), today=today)


def template_name(tokenizer: Tokenizer) -> str:
    return f"the chat template of {tokenizer.name_or_path or 'the tokenizer'}"


def _plain(value: Any) -> Any:
    return [str(each) for each in value] if isinstance(value, list | tuple) else str(value)


def token_text(tokenizer: Tokenizer, id: int) -> str:
    """What a token is written as."""
    added = tokenizer.added_tokens_decoder.get(id)
    return added.content if added else tokenizer.decode([id])


def answer_end(tokenizer: Tokenizer, stops: Sequence[int]) -> int | None:
    """The token of `stops` by which the template ends an answer; None if it ends it with none of them.

    Raises:
        DataError: as `stop_ids`.
    """
    habits = _habits(tokenizer, stops)
    return next((end for end in _template_ends(tokenizer, habits) if end in stops), None) if habits else None


def _habits(tokenizer: Tokenizer, known: Sequence[int]) -> Habits | None:
    """What the template does in general, where `known` are stop tokens; None where there is none."""
    template = open_template(tokenizer)
    return None if template is None else habits_of(template, [token_text(tokenizer, id) for id in known])


def _template_ends(tokenizer: Tokenizer, habits: Habits) -> list[int]:
    """The tokens by which the template ends an answer, in their order.

    They are the added tokens that stand both after the last answer and between an answer and the next question. One
    that also stands between the header and the answer is no end: a model that stopped there would never answer.
    """
    added = {token.content: int(id) for id, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    pattern = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or r"(?!)")
    after = pattern.findall(habits.after)
    # A header that follows at once begins the next turn.
    if not after or not pattern.match(habits.after.lstrip()) or habits.header.lstrip().startswith(after[0]):
        return []
    return [added[text] for text in after if text not in habits.lead and (text in habits.between or not habits.between)]
