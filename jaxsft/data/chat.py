"""Conversation and tokenizer to examples: the tokens of the chat template, and a weight on what the model must produce.

The conversation is rendered once, and the tokens are those of that text. Where an assistant turn begins is where the
prompt ends that the model is given at inference: `render(messages[:i], add_generation_prompt=True)`, which must be a
literal prefix of the text. It ends with the stop token that follows its content. A turn for which this cannot be
shown is an error and never a guess. The template may be any Jinja program; none of its markup is known here.

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
                                                          ^^^^^^^^^^^^^^^      trained
"""

import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxsft.batch import Example
from jaxsft.config import DataConfig
from jaxsft.data.formats import Conversation, Document, Message
from jaxsft.data.sources import DataError, bad_rows

Tokenizer = Any  # A fast transformers tokenizer; transformers is too slow to import for a type.


class MaskError(DataError):
    """It cannot be shown which tokens of a conversation the model must produce; says why, and what would help."""

    code = "mask"


WRITERS = ("template", "system", "user", "assistant", "tool", "other")
"""Who wrote the characters of a token."""


class Encoded(NamedTuple):
    """One example with what the report says about it."""

    example: Example
    writers: np.ndarray
    """uint8 [T]: who wrote each token, an index into `WRITERS`; the template where it shares a token with others."""
    turn_ends: np.ndarray
    """int32 [turns]: for each trained turn, the index after its stop token; ascending."""
    is_text: bool
    """Plain text, all of it trained."""
    origin: str
    """Of the row."""
    counts: dict[str, int]
    """What adds up over all examples, by name; only what is not zero."""


class ChatEncoder:
    """THIN VERSION, replaced soon: conversations to examples."""

    def __init__(self, tokenizer: Tokenizer, config: DataConfig, stops: Sequence[int]) -> None:
        self._tokenizer, self._train_on, self._stops = tokenizer, str(config.train_on), list(stops)
        self._vocabulary = _vocabulary(tokenizer, stops)
        self.notes: list[str] = []
        self.settings = {"train_on": config.train_on, "stops": list(stops), "chat_template": tokenizer.chat_template}

    def encode(self, items: Sequence[Conversation | Document]) -> list[list[Encoded] | MaskError]:
        results: list[list[Encoded] | MaskError] = []
        for item, found in zip(
            items, _encode_chunk(items, self._tokenizer, self._vocabulary, self._train_on), strict=True
        ):
            if isinstance(found, MaskError):
                results.append(found)
                continue
            weights = found.example.loss_weights
            ends = np.nonzero(np.isin(found.example.tokens, self._stops) & (weights > 0))[0] + 1
            results.append(
                [found._replace(turn_ends=ends.astype(np.int32), is_text=isinstance(item, Document))]
            )
        return results


def prompt_tokens(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    tools: list[dict[str, Any]] | None = None,
    template_kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """Tokens of the prompt that asks for the next assistant turn, as at inference.

    Raises:
        DataError: no chat template, or the template refuses the messages.
    """
    conversation = Conversation(list(messages), tools, template_kwargs or {})
    return tokenizer(_render(conversation, len(messages), tokenizer, prompt=True), **_PLAIN)["input_ids"]


def stop_ids(tokenizer: Tokenizer, configured: Sequence[int | list[int] | None] = ()) -> list[int]:
    """Every token that ends an answer: the tokenizer's eos, those of the model's configs, and the template's own.

    The template's own is the added token that directly follows an answer in a rendered probe, such as `<|im_end|>` of
    ChatML on a base model whose eos is `<|endoftext|>`. All of them belong into the export's generation_config.
    """
    stops = [tokenizer.eos_token_id]
    for ids in configured:
        stops += ids if isinstance(ids, list) else [ids]
    stops.append(_template_stop(tokenizer))
    return list(dict.fromkeys(int(stop) for stop in stops if stop is not None))


def make_examples(
    conversation: Conversation | Document, tokenizer: Tokenizer, *, train_on: str, stops: Sequence[int]
) -> list[Example]:
    """The examples of one conversation.

    Args:
        conversation: messages, or plain text.
        tokenizer: with its chat template.
        train_on: "assistant" (every assistant turn), "last_turn" or "all" (every token).
        stops: what `stop_ids` says.

    Raises:
        MaskError: the mask cannot be established, or text of the data spells a control token.
    """
    vocabulary = _vocabulary(tokenizer, stops)
    encoded = _encode_chunk([conversation], tokenizer, vocabulary, train_on)[0]
    if isinstance(encoded, MaskError):
        raise encoded
    return [encoded.example]


def prepare_examples(
    conversations: Iterable[Conversation | Document], tokenizer: Tokenizer, *, train_on: str, stops: Sequence[int]
) -> Iterator[Encoded]:
    """The examples of all conversations, in order.

    Raises:
        DataError: after the last conversation, all whose mask cannot be established together: the first 10 with file,
            line, turn and reason, and how many there are.
    """
    vocabulary = _vocabulary(tokenizer, stops)
    problems: list[tuple[str, str]] = []
    conversations = iter(conversations)
    while chunk := list(itertools.islice(conversations, 1024)):
        for conversation, encoded in zip(chunk, _encode_chunk(chunk, tokenizer, vocabulary, train_on), strict=True):
            if isinstance(encoded, MaskError):
                problems.append((conversation.origin, str(encoded)))
            else:
                yield encoded
    if problems:
        raise bad_rows(problems, "unusable")


# The text of a template holds its own special tokens; the tokenizer must not add its own to them.
_PLAIN: dict[str, Any] = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}


class _Vocabulary(NamedTuple):
    """What a tokenizer's added tokens and stop tokens are, worked out once."""

    stops: np.ndarray
    size: int
    forbidden_to_others: re.Pattern[str] | None
    """Texts that no user, system or tool may write: every added token."""
    forbidden_to_assistant: re.Pattern[str] | None
    """Texts that no assistant may write: special tokens and stop tokens; `<think>` and the like it may."""


class _Turn(NamedTuple):
    """An assistant turn in the rendered text, in characters; it is trained from `start` to the end of a stop token."""

    name: str
    start: int
    content_end: int
    limit: int
    """The stop token is looked for from `content_end` up to here."""


def _vocabulary(tokenizer: Tokenizer, stops: Sequence[int]) -> _Vocabulary:
    if not tokenizer.is_fast:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path} has no tokenizer.json, so characters cannot be traced to tokens; "
            f"give a folder that has one as model.tokenizer"
        )
    # Runs of whitespace are added tokens of some tokenizers (Gemma, GPT-NeoX); they control nothing.
    added = {id: token for id, token in tokenizer.added_tokens_decoder.items() if token.content.strip(" ▁\t\r\n")}
    strict = [token.content for id, token in added.items() if token.special or id in stops]
    return _Vocabulary(
        np.array(stops, np.int64),
        max(tokenizer.get_vocab().values()) + 1,
        _any_of([token.content for token in added.values()]),
        _any_of(strict),
    )


def _any_of(texts: Sequence[str]) -> re.Pattern[str] | None:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(re.escape(text) for text in longest_first)) if texts else None


def _encode_chunk(
    chunk: Sequence[Conversation | Document], tokenizer: Tokenizer, vocabulary: _Vocabulary, train_on: str
) -> list[Encoded | MaskError]:
    """Renders one by one, tokenises all at once (which is where the tokenizer is fast), then weighs one by one."""
    results: list[Encoded | MaskError | None] = [None] * len(chunk)
    chats: list[tuple[int, str, list[_Turn]]] = []
    documents: list[tuple[int, str]] = []
    for index, conversation in enumerate(chunk):
        if isinstance(conversation, Document):
            # Plain text may carry control tokens of its own, such as a conversation that was rendered before.
            documents.append((index, conversation.text))
            continue
        try:
            _refuse_control_tokens(conversation, vocabulary)
            text = _render(conversation, len(conversation.messages), tokenizer)
            chats.append((index, text, _turns(conversation, text, tokenizer, train_on)))
        except MaskError as error:
            results[index] = error
    if chats:
        encodings = tokenizer([text for _, text, _ in chats], return_offsets_mapping=True, **_PLAIN)
        parts = zip(chats, encodings["input_ids"], encodings["offset_mapping"], strict=True)
        for (index, text, turns), tokens, offsets in parts:
            try:
                example, straddling = _weigh(text, turns, tokens, offsets, tokenizer, vocabulary, train_on)
                results[index] = _thin(example, chunk[index].origin, straddling)
            except MaskError as error:
                results[index] = error
    if documents:
        encodings = tokenizer([text for _, text in documents], return_attention_mask=False, verbose=False)
        for (index, _), tokens in zip(documents, encodings["input_ids"], strict=True):
            try:
                results[index] = _thin(_document_example(tokens, tokenizer, vocabulary), chunk[index].origin, 0)
            except MaskError as error:
                results[index] = error
    return [result for result in results if result is not None]


def _thin(example: Example, origin: str, straddling: int) -> Encoded:
    writers = np.zeros(len(example.tokens), np.uint8)
    return Encoded(
        example, writers, np.zeros(0, np.int32), False, origin, {"straddling_tokens": straddling} if straddling else {}
    )


def _render(conversation: Conversation, num_messages: int, tokenizer: Tokenizer, *, prompt: bool = False) -> str:
    """The text of the first messages, as a prompt for the next assistant turn or not."""
    if not tokenizer.chat_template:
        raise DataError(f"the tokenizer {tokenizer.name_or_path} has no chat template; give one as data.chat_template")
    try:
        return tokenizer.apply_chat_template(
            conversation.messages[:num_messages],
            tools=conversation.tools,
            add_generation_prompt=prompt,
            tokenize=False,
            **conversation.template_kwargs,
        )
    except Exception as error:  # A template is a program of someone else's and may raise anything.
        part = f"messages 1 to {num_messages}" if num_messages > 1 else "message 1 alone"
        raise MaskError(f"{_template(tokenizer)} refuses {part}: {type(error).__name__}: {error}") from error


def _turns(conversation: Conversation, full: str, tokenizer: Tokenizer, train_on: str) -> list[_Turn]:
    """The assistant turns to train; all that can be said before the text is tokenised is verified."""
    turns = [index for index, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    turns = [index for index in turns if index >= conversation.trained_from]
    if train_on == "assistant":
        return [_turn(conversation, index, full, tokenizer) for index in turns]
    if train_on == "last_turn":
        return [_turn(conversation, turns[-1], full, tokenizer)]
    # Every token is trained; it remains to be shown that a stop token follows the last answer.
    message = conversation.messages[turns[-1]]
    content = (message.get("content") or "").strip()
    return [_Turn(_turn_name(turns[-1]), 0, max(full.rfind(content), 0) + len(content), len(full))]


def _turn(conversation: Conversation, index: int, full: str, tokenizer: Tokenizer) -> _Turn:
    name = _turn_name(index)
    start = _turn_start(conversation, index, full, tokenizer)
    shown = full if index + 1 == len(conversation.messages) else _render(conversation, index + 1, tokenizer)
    # While this turn is the last it may be followed by other text than here; through its stop token both must agree.
    limit = len(shown) if full.startswith(shown) else len(os.path.commonprefix([shown, full]))
    content_end = start
    for field, text in _texts(conversation.messages[index]):
        at = full.find(text, content_end, limit)
        at = at if at >= 0 else full.find(text, start, limit)
        if at < 0 and not full.startswith(shown):
            raise MaskError(
                f"{name}: {_template(tokenizer)} rewrites earlier turns: while this one is the last it is shown "
                f"otherwise, {_difference(shown, full)}; data.train_on=last_turn avoids it"
            )
        if at < 0:
            raise MaskError(f"{name}: {_template(tokenizer)} does not show its {field} ({text[:60]!r}) as it is")
        if field == "content":
            _refuse_header(conversation, index, full[start:at], tokenizer)
        content_end = max(content_end, at + len(text))
    return _Turn(name, start, content_end, limit)


def _turn_start(conversation: Conversation, index: int, full: str, tokenizer: Tokenizer) -> int:
    """Where the prompt of an assistant turn ends in the text."""
    if index > 0:
        prompt = _render(conversation, index, tokenizer, prompt=True)
        if full.startswith(prompt):
            return len(prompt)
        # Either the past is shown otherwise in the prompt, or only the end of the prompt, the header, is not there.
        past_is_kept = full.startswith(_render(conversation, index, tokenizer))
        reason = "adds text to the prompt that the conversation lacks" if past_is_kept else "rewrites earlier turns"
        raise MaskError(f"{_turn_name(index)}: {_template(tokenizer)} {reason}: {_difference(prompt, full)}")
    # Nothing precedes this turn, so there is no prompt to render: look for the header that a prompt adds elsewhere.
    probe = conversation._replace(messages=_PROBE[:1])
    without, prompt = _render(probe, 1, tokenizer), _render(probe, 1, tokenizer, prompt=True)
    header = prompt[len(without) :] if prompt.startswith(without) else ""
    at = full.find(header) if header else -1
    content = (conversation.messages[0].get("content") or "").strip()
    if at < 0 or full.find(content) < at + len(header):
        raise MaskError(
            f"{_turn_name(0)}: nothing precedes this assistant turn and its header was not found in the text of "
            f"{_template(tokenizer)}; begin the row with a system or user turn"
        )
    return at + len(header)


def _refuse_header(conversation: Conversation, index: int, gap: str, tokenizer: Tokenizer) -> None:
    """A template that ignores add_generation_prompt leaves the turn's header to be trained: not what we promise.

    Llama-2 and Mistral ignore it too, but have no header: nothing but whitespace stands before the content.
    """
    if index == 0 or not gap.strip() or conversation.messages[index].get("reasoning_content"):
        return
    if _render(conversation, index, tokenizer) == _render(conversation, index, tokenizer, prompt=True):
        raise MaskError(
            f"{_turn_name(index)}: {_template(tokenizer)} ignores add_generation_prompt, so that the header {gap!r} "
            f"would be trained; give a template that honours it as data.chat_template"
        )


def _texts(message: Message) -> list[tuple[str, str]]:
    """What an assistant turn says, by field; templates may trim it but must show it."""
    texts = [(field, (message.get(field) or "").strip()) for field in ("reasoning_content", "content")]
    for call in message.get("tool_calls") or []:
        texts.append(("tool call", str((call.get("function") or call).get("name") or "")))
    return [(field, text) for field, text in texts if text]


def _weigh(
    text: str,
    turns: Sequence[_Turn],
    tokens: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    tokenizer: Tokenizer,
    vocabulary: _Vocabulary,
    train_on: str,
) -> tuple[Example, int]:
    """Character spans to weights of tokens.

    A token is trained if it shares a character with a span; tokens that share one character (the bytes of an emoji)
    are trained together. Returns the example and how many trained tokens begin before their span.
    """
    ids = np.array(tokens, np.int32)
    starts, ends = _extents(offsets)
    weights = np.zeros(len(ids), np.float32)
    num_straddling = 0
    is_stop = np.isin(ids, vocabulary.stops)
    for turn in turns:
        (found,) = np.nonzero(is_stop & (starts >= turn.content_end) & (ends <= turn.limit))
        if not len(found):
            after = text[turn.content_end : turn.limit]
            raise MaskError(f"{turn.name}: {_no_stop_reason(after, tokenizer, vocabulary)}")
        stop = found[0]
        inside = (ends > turn.start) | ((starts == ends) & (starts >= turn.start))
        inside[stop + 1 :] = False
        num_straddling += int(np.sum(inside & (starts < turn.start)))
        weights[inside] = 1.0
    if train_on == "all":
        weights[:] = 1.0
    return Example(_checked_ids(ids, tokenizer, vocabulary), weights), num_straddling


def _extents(offsets: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """First and last character of each token, int64 [T] each, so that the tokens tile the text.

    Some tokenizers (`trim_offsets`) leave the whitespace at a token's start out of its offsets. It is what no token
    before it covers, so each token is made to begin where the ones before it end at the latest:

        "a\\n b" as tokens "a", "\\n", " b" has offsets (0, 1) (2, 2) (3, 4) and extents (0, 1) (1, 2) (2, 4)
    """
    starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    covered = np.concatenate([[0], np.maximum.accumulate(ends)[:-1]]) if len(ends) else ends
    return np.minimum(starts, covered), ends


def _document_example(tokens: list[int], tokenizer: Tokenizer, vocabulary: _Vocabulary) -> Example:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise MaskError(f"the tokenizer {tokenizer.name_or_path} has no eos token, so a text would have no end")
    if tokens[-1:] != [eos]:
        tokens = [*tokens, eos]
    ids = _checked_ids(np.array(tokens, np.int32), tokenizer, vocabulary)
    return Example(ids, np.ones(len(ids), np.float32))


def _checked_ids(ids: np.ndarray, tokenizer: Tokenizer, vocabulary: _Vocabulary) -> np.ndarray:
    if len(ids) and not (ids.min() >= 0 and ids.max() < vocabulary.size):
        raise MaskError(f"the tokenizer {tokenizer.name_or_path} gave token {ids.max()}, outside its {vocabulary.size}")
    return ids


def _refuse_control_tokens(conversation: Conversation, vocabulary: _Vocabulary) -> None:
    """Text of the data that spells a control token would become one: a forged turn, or a stop in mid-sentence."""

    def refuse(where: str, value: Any, forbidden: re.Pattern[str] | None) -> None:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        if forbidden and (match := forbidden.search(text)):
            raise MaskError(f"{where} spells the control token {match[0]!r}, which would be read as one")

    if conversation.tools:
        refuse("tools", conversation.tools, vocabulary.forbidden_to_others)
    for index, message in enumerate(conversation.messages):
        assistant = message["role"] == "assistant"
        for field, value in message.items():
            if field == "role":
                continue  # One of a few known words.
            forbidden = vocabulary.forbidden_to_assistant if assistant else vocabulary.forbidden_to_others
            refuse(f"message {index + 1} ({message['role']}): {field}", value, forbidden)


_PROBE: list[Message] = [
    {"role": "user", "content": "a question"},
    {"role": "assistant", "content": "the answer"},
]


def _template_stop(tokenizer: Tokenizer) -> int | None:
    """The added token that directly follows an answer in the text of the template, if there is one."""
    try:
        text = _render(Conversation(_PROBE), len(_PROBE), tokenizer)
    except DataError:
        return None  # The template asks for more than the probe has, or there is none; eos has to do.
    encoding = tokenizer(text, return_offsets_mapping=True, **_PLAIN)
    answer = text.rfind("the answer")
    if answer < 0:
        return None
    after = answer + len("the answer")
    for token, start, end in zip(encoding["input_ids"], *_extents(encoding["offset_mapping"]), strict=True):
        if start >= after and text[start:end].strip():
            return token if token in tokenizer.added_tokens_decoder else None
    return None


def _no_stop_reason(after: str, tokenizer: Tokenizer, vocabulary: _Vocabulary) -> str:
    known = ", ".join(f"{tokenizer.convert_ids_to_tokens(int(id))!r} ({id})" for id in vocabulary.stops) or "none"
    return (
        f"{_template(tokenizer)} puts no stop token after the answer but {after[:40]!r}, so the model would never "
        f"learn to stop (stop tokens: {known}); give a template that ends the turn with one as data.chat_template"
    )


def _template(tokenizer: Tokenizer) -> str:
    return f"the chat template of {tokenizer.name_or_path or 'the tokenizer'}"


def _turn_name(index: int) -> str:
    return f"message {index + 1} (assistant)"


def _difference(shown: str, full: str) -> str:
    at = len(os.path.commonprefix([shown, full]))
    begin = max(at - 20, 0)
    return f"{shown[begin : at + 30]!r} against {full[begin : at + 30]!r} in the whole conversation"
