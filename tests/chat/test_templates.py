"""Every tokenizer and every template of the material over many conversations, against oracles that are not ours.

What is expected comes from transformers and from texts marked by hand; of our code only the encoder under test is
asked. `python tests/chat/test_templates.py --write` writes docs/templates.md.
"""

import contextlib
import copy
import datetime
import functools
import itertools
import json
import os
import pathlib
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "helpers"))  # For --write, without pytest.

import fetched
from conversations import CASES, Case, Message
from goldens import GOLDENS, Golden

from jaxsft.chat.encoder import ChatEncoder, MaskError, stop_ids
from jaxsft.config import DataConfig
from jaxsft.rows.items import Conversation


@functools.cache
def load(folder: pathlib.Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def make_encoder(tokenizer: Any, stops: Sequence[int] | None = None, **data: Any) -> ChatEncoder:
    # transformers, whose renders ours are compared with, shows templates the real date.
    config = {"train": "unused.jsonl", "template_date": datetime.date.today().isoformat(), **data}
    return ChatEncoder(tokenizer, DataConfig.model_validate(config), stop_ids(tokenizer) if stops is None else stops)


def conversation_of(messages: list[Message], tools: Any = None, kwargs: dict[str, Any] | None = None) -> Conversation:
    return Conversation(messages, tools, kwargs or {}, origin="test:1")


# Characters to tokens, without the tokenizer's offsets: the bytes of the tokens, one after another, are the text.


class Tokens(NamedTuple):
    """Tokens of a text, and where the bytes begin and end that each stands for, in the text as bytes."""

    ids: list[int]
    starts: np.ndarray
    ends: np.ndarray


def _byte_of_letter() -> dict[str, int]:
    """The alphabet of byte-level vocabularies: printable bytes stand for themselves, the others follow from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


BYTE_OF_LETTER = _byte_of_letter()


@functools.cache
def is_byte_level(backend: Any) -> bool:
    return b"ByteLevel" in backend.decoder.__getstate__()


@functools.cache
def lacking_bytes(backend: Any) -> frozenset[int]:
    if not is_byte_level(backend):
        return frozenset()
    return frozenset(byte for letter, byte in BYTE_OF_LETTER.items() if backend.token_to_id(letter) is None)


def bytes_of(ids: Iterable[int], tokenizer: Any) -> list[bytes]:
    """What each token stands for."""
    added, backend = added_tokens(tokenizer), tokenizer.backend_tokenizer
    return [_bytes_of_added(added[id]) if id in added else _bytes_of(id, backend) for id in ids]


def _bytes_of_added(text: str) -> bytes:
    return (text if text.strip("▁") else text.replace("▁", " ")).encode()  # Gemma has runs of spaces.


@functools.cache
def _bytes_of(id: int, backend: Any) -> bytes:
    piece = backend.id_to_token(id)
    if is_byte_level(backend):
        return bytes(BYTE_OF_LETTER[letter] for letter in piece)
    if len(piece) == 6 and piece.startswith("<0x"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


def added_tokens(tokenizer: Any) -> dict[int, str]:
    return _added_tokens(tokenizer.backend_tokenizer, len(tokenizer))


@functools.cache
def _added_tokens(backend: Any, size: int) -> dict[int, str]:
    return {id: token.content for id, token in backend.get_added_tokens_decoder().items()}


def normalise(text: str, tokenizer: Any) -> str:
    """The text as the tokenizer's vocabulary spells it: Qwen composes letters and accents."""
    return unicodedata.normalize("NFC", text) if composes(tokenizer.backend_tokenizer) else text


@functools.cache
def composes(backend: Any) -> bool:
    return backend.normalizer is not None and b'"NFC"' in backend.normalizer.__getstate__()


def tokenise(text: str, tokenizer: Any) -> Tokens:
    """Tokens of a normalised text, laid side by side over its bytes.

    The space that SentencePiece writes before a text, and after each control token, is nowhere in the text: such a
    token, or part of one, stands for no byte. Bytes that a cut vocabulary lacks (llama-3-tiny) have no token.
    """
    lacking = lacking_bytes(tokenizer.backend_tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    spelled, at, starts, ends = text.encode(), 0, [], []
    added = added_tokens(tokenizer)
    for id, piece in zip(ids, bytes_of(ids, tokenizer), strict=True):
        while not spelled.startswith(piece, at) and at < len(spelled) and spelled[at] in lacking:
            at += 1
        if id in added and spelled.startswith(b" " + piece, at):
            piece = b" " + piece  # ChatGLM3's control tokens are looked for with a space before them.
        if not spelled.startswith(piece, at):
            assert piece[:1] == b" " and spelled.startswith(piece[1:], at), (text, spelled[at : at + 20], piece)
            piece = piece[1:]
        starts.append(at)
        at += len(piece)
        ends.append(at)
    assert lacking.issuperset(spelled[at:]), f"the tokens of {text!r} end before {spelled[at:]!r}"
    return Tokens(ids, np.array(starts, int), np.array(ends, int))


def weigh(tokens: Tokens, spans: Iterable[tuple[int, int]]) -> list[float]:
    """1 for every token that has a byte in a span, or stands for none inside of one."""
    trained = np.zeros(len(tokens.ids), bool)
    for start, end in spans:
        empty = tokens.starts == tokens.ends
        trained |= (tokens.ends > start) & (tokens.starts < end) & ~empty
        trained |= (tokens.starts >= start) & (tokens.ends < end) & empty
    return trained.astype(float).tolist()


def read_marks(marked: str, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """A text without its brackets, normalised, and the bytes between them.

    read_marks("a⟦b c⟧d", tokenizer) == ("ab cd", [(1, 4)])
    """
    text, spans = "", []
    for index, part in enumerate(re.split("[⟦⟧]", marked)):
        begin = len(text.encode())
        text += normalise(part, tokenizer)
        if index % 2:
            spans.append((begin, len(text.encode())))
    return text, spans


# Goldens.


def examples_of(encoded: Any) -> list[tuple[list[int], list[float]]]:
    """Tokens and weights of each example, in an order of their own."""
    if isinstance(encoded, MaskError):
        raise encoded
    return sorted((one.example.tokens.tolist(), one.example.loss_weights.tolist()) for one in encoded)


@pytest.mark.parametrize("golden", GOLDENS, ids=[f"{golden.tokenizer}: {golden.name}" for golden in GOLDENS])
def test_tokens_and_weights_are_those_marked_by_hand(material, golden: Golden):
    tokenizer = load(material / "tokenizers" / golden.tokenizer)
    expected = []
    for marked in golden.texts:
        text, spans = read_marks(marked, tokenizer)
        tokens = tokenise(text, tokenizer)
        expected.append((tokens.ids, weigh(tokens, spans)))
    encoder = make_encoder(tokenizer)
    (encoded,) = encoder.encode([conversation_of(golden.messages, golden.tools, golden.kwargs)])
    found = examples_of(encoded)
    assert [marked_text(*one, tokenizer) for one in found] == [marked_text(*one, tokenizer) for one in sorted(expected)]
    assert found == sorted(expected)


def marked_text(ids: list[int], weights: list[float], tokenizer: Any) -> str:
    """Tokens as text to read, what is trained in brackets."""
    parts = itertools.groupby(zip(ids, weights, strict=True), key=lambda pair: pair[1] > 0)
    texts = [(trained, decode([id for id, _ in pairs], tokenizer)) for trained, pairs in parts]
    return "".join(f"⟦{text}⟧" if trained else text for trained, text in texts)


def decode(ids: Sequence[int], tokenizer: Any) -> str:
    """The bytes of the tokens; the tokenizer's own decoder may trim the first space."""
    return b"".join(bytes_of(map(int, ids), tokenizer)).decode(errors="replace")


@pytest.mark.parametrize("name", sorted({golden.tokenizer for golden in GOLDENS}))
def test_the_goldens_are_what_the_templates_render(material, name):
    tokenizer = load(material / "tokenizers" / name)
    for golden in GOLDENS:
        if golden.tokenizer != name:
            continue
        ends = [index + 1 for index, message in enumerate(golden.messages) if message["role"] == "assistant"]
        renders = [
            tokenizer.apply_chat_template(golden.messages[:end], tools=golden.tools, tokenize=False, **golden.kwargs)
            for end in ends
        ]
        texts = [re.sub("[⟦⟧]", "", text) for text in golden.texts]
        if golden.differs:
            texts = [text.removesuffix(tokenizer.eos_token) for text in texts]
            prompts = [
                tokenizer.apply_chat_template(golden.messages[: end - 1], tokenize=False, add_generation_prompt=True)
                for end in ends
            ]
            assert all(text.startswith(prompt) for text, prompt in zip(texts, prompts, strict=True))
        else:
            assert set(texts) <= set(renders) and renders[-1] in texts
            answers = [answer for text in golden.texts for answer in re.findall("⟦(.*?)⟧", text, re.DOTALL)]
            assert len(answers) == len(ends), "every answer is trained once"


# The matrix: every template on a tokenizer that fits it.

CONTROL = re.compile(
    r"<\|[^<>|\s'\"{}]+\|?>|<[^<>|\s'\"{}/]+\|>|<｜[^<>｜'\"{}]+｜>|"  # <|im_end|> <|turn> <turn|> <｜User｜>
    r"\[\|[a-z]+\|\]|\[/?[A-Z_]{3,}\]|\]~!?b[\]\[]|\[e~\[|</?s>|"
    r"<seed:[a-z]+>|<e[a-z]*_of_[a-z]+>|<start_of_[a-z]+>|<sep>"
)
"""What looks like a control token in the text of a template, of any house."""
WRITTEN = re.compile(r"</?think>|</?tool_call>|</?tool_response>")
"""Tokens that are not special: an assistant may write them."""

STAND_ALONE = {"qwen2.5", "qwen3", "smollm2", "llama-2", "llama-3.1", "phi-3", "gemma-2", "mistral-nemo", "deepseek-v3"}
"""Tokenizers to put templates on: llama-3-tiny loses letters that it has no token for, chatglm3 its control tokens."""


class Fitted(NamedTuple):
    """A template on a tokenizer."""

    name: str
    tokenizer: Any
    base: str
    """The material's name of the tokenizer."""


@functools.cache
def fit_templates(material: pathlib.Path) -> list[Fitted]:
    """Each tokenizer with its own template, then each template with the tokenizer that has most of what it writes.

    Control tokens that the tokenizer lacks are added to a copy of it, once for all its templates.
    """
    from transformers import AutoTokenizer

    folders = sorted((material / "tokenizers").iterdir())
    fitted = [Fitted(f"({folder.name})", load(folder), folder.name) for folder in folders]
    bases = {folder.name: load(folder) for folder in folders if folder.name in STAND_ALONE}
    known = {name: set(added_tokens(base).values()) for name, base in bases.items()}
    chosen: dict[pathlib.Path, str] = {}
    lacking: dict[str, set[str]] = {name: set() for name in bases}
    for path in sorted((material / "templates").glob("*.jinja")):
        source = path.read_text()
        written = set(CONTROL.findall(source)) | set(WRITTEN.findall(source))
        best = max(bases, key=lambda name: (len(written & known[name]), name == "smollm2", name))
        chosen[path] = best
        lacking[best] |= written - known[best]
    copies = {}
    for name, texts in lacking.items():
        copies[name] = AutoTokenizer.from_pretrained(material / "tokenizers" / name, trust_remote_code=False)
        copies[name].add_tokens(sorted(text for text in texts if not WRITTEN.fullmatch(text)), special_tokens=True)
        copies[name].add_tokens(sorted(text for text in texts if WRITTEN.fullmatch(text)))
    for path, name in chosen.items():
        tokenizer = copy.copy(copies[name])
        tokenizer.chat_template = path.read_text()
        fitted.append(Fitted(path.stem, tokenizer, name))
    return fitted


class NotRendered(Exception):
    """The template itself refuses the conversation."""


class Absent(Exception):
    """The template renders the conversation without some text of it."""


class NoOracle(Exception):
    """Where the answer begins is no simple matter: only what holds for every template is checked."""


SIGNED = re.compile(r"\b(?:ask|sys|got|say)\d+\b")
SAID = re.compile(r"\bsay\d+\b")
FOREIGN = re.compile(r"\b(?:ask|sys|got|spec)\d+\b")


def with_text_arguments(messages: list[Message]) -> list[Message]:
    """Tool arguments as the JSON text that OpenAI's API gives, which some templates want."""
    changed = copy.deepcopy(messages)
    for message in changed:
        for one in message.get("tool_calls", []):
            one["function"]["arguments"] = json.dumps(one["function"]["arguments"], ensure_ascii=False)
    return changed


@functools.cache
def shows_strings(template: str, tokenizer: Any) -> bool:
    """Whether the template takes content as text at all."""
    try:
        return "It is say1" in tokenizer.apply_chat_template(CASES[0].messages, chat_template=template, tokenize=False)
    except Exception:
        return "['text']" not in template and "[0]" not in template and ".text" not in template


def with_blocks(messages: list[Message]) -> list[Message]:
    """Content as a list of one block of text, as templates of models want it that see images."""
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


class Rendered(NamedTuple):
    """What transformers makes of a conversation."""

    messages: list[Message]
    form: list[Message]
    """The messages as the template takes them."""
    full: str
    shown: dict[int, str]
    """By assistant turn: the conversation up to it, inclusive."""
    prompts: dict[int, str]
    """By assistant turn but the first message: the prompt that asks for it."""
    bare: dict[int, str]
    """The same without asking."""


def render(tokenizer: Any, case: Case) -> list[Rendered]:
    """The conversation in each form that the template shows whole.

    Raises:
        NotRendered, Absent: there is none.
    """
    reason: Exception = NotRendered()
    forms = [case.messages if shows_strings(tokenizer.chat_template, tokenizer) else with_blocks(case.messages)]
    if any(message.get("tool_calls") for message in case.messages):
        forms.append(with_text_arguments(case.messages))
    whole = []
    for messages in forms:
        try:
            rendered = _render(tokenizer, case, messages)
        except Exception as error:  # A template may raise anything.
            reason = NotRendered(str(error)) if isinstance(reason, NotRendered) else reason
            continue
        if lost := lost_texts(rendered, case):
            reason = Absent(", ".join(lost))
        else:
            whole.append(rendered)
    if not whole:
        raise reason
    return whole


def _render(tokenizer: Any, case: Case, form: list[Message]) -> Rendered:
    turns = [index for index, message in enumerate(form) if message["role"] == "assistant"]
    apply = functools.partial(tokenizer.apply_chat_template, tools=case.tools, tokenize=False, **case.kwargs)
    full = apply(form)
    shown, prompts, bare = dict.fromkeys(turns, full), {}, {}
    for index in turns:
        # Some cannot be the last message, and for some no prompt can be made.
        with contextlib.suppress(Exception):
            shown[index] = apply(form[: index + 1])
        with contextlib.suppress(Exception):
            asked, before = apply(form[:index], add_generation_prompt=True), apply(form[:index])
            if index:
                prompts[index], bare[index] = asked, before
    return Rendered(case.messages, form, full, shown, prompts, bare)


def arguments_of(message: Message) -> Iterator[str]:
    for one in message.get("tool_calls", []):
        arguments = one["function"]["arguments"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        yield one["function"]["name"]
        yield from (str(value) for value in arguments.values() if SIGNED.search(str(value)))


def texts_of(message: Message, shown: str = "") -> list[str]:
    """What a message says, in its order; thinking inside a content that is not shown as it is comes apart."""
    content = message["content"].strip()
    whole = content in shown or "</think>" not in content
    contents = [content] if whole else content.removeprefix("<think>").split("</think>")
    texts = [message.get("reasoning_content") or "", *contents, *arguments_of(message)]
    return [text.strip() for text in texts if text.strip()]


def lost_texts(rendered: Rendered, case: Case) -> list[str]:
    """Signed words that no answer's prompt or render has where it should."""
    lost = []
    for index in rendered.shown:
        text = rendered.shown[index]
        lost += [one for one in texts_of(rendered.messages[index], text) if one not in text]
    seen = "".join([*rendered.shown.values(), *rendered.prompts.values()])
    for message in rendered.messages:
        if message["role"] != "assistant" and message["content"].strip():
            words = SIGNED.findall(message["content"])
            lost += [word for word in words if word not in seen]
    spoken = Counter(message["content"].strip() for message in rendered.messages)
    unsigned = {text: times for text, times in spoken.items() if text and not SIGNED.search(text)}
    lost += [text for text, times in unsigned.items() if rendered.full.count(text) < times]
    asked = next(iter(rendered.prompts.values()), "")  # Before anything is called.
    asked += rendered.full if "start" in case.needs else ""  # Some have tools in the last question only.
    lost += [name for tool in case.tools or [] if (name := tool["function"]["name"]) not in asked]
    return lost


class Answer(NamedTuple):
    """One turn to be trained: the tokens that the model has read and written through the stop, and where it began."""

    tokens: tuple[int, ...]
    start: int


def expected_answers(rendered: Rendered, tokenizer: Any, stops: Sequence[int]) -> set[Answer]:
    """The answers that are to be trained, told from prefixes of renders alone.

    Raises:
        NoOracle: an answer that neither begins where its prompt ends nor has words of its own to begin with.
    """
    return {_expected_answer(rendered, index, tokenizer, stops) for index in rendered.shown}


def _expected_answer(rendered: Rendered, index: int, tokenizer: Any, stops: Sequence[int]) -> Answer:
    shown = rendered.shown[index]
    if index not in rendered.prompts:
        raise NoOracle("there is no prompt to the answer")
    shown, start = _answer_start(rendered, index, tokenizer)
    end = start
    for text in texts_of(rendered.messages[index], shown):
        end = max(end, position(text, shown, start) + len(text))
    tokens = tokenise(normalise(shown, tokenizer), tokenizer)
    first, last = (len(normalise(shown[:at], tokenizer).encode()) for at in (start, end))
    ids = tuple(tokens.ids)
    if last == first:  # Prompt and render may part inside of a token, which then is the answer's first, or all of it.
        first = last = min([first, *tokens.starts[(tokens.starts < first) & (tokens.ends > first)]])
    stop = next((at for at, id in enumerate(ids) if id in stops and tokens.starts[at] >= last), None)
    if stop is None:  # The template forgets it, so it is appended.
        ids, stop, size = (*ids, _other_stop(rendered, index, tokenizer, stops)), len(ids), int(tokens.ends[-1])
        tokens = Tokens(list(ids), np.append(tokens.starts, size), np.append(tokens.ends, size + 1))
    weights = weigh(tokens, [(first, int(tokens.ends[stop]))])
    return Answer(ids[: stop + 1], weights.index(1.0))


def _other_stop(rendered: Rendered, index: int, tokenizer: Any, stops: Sequence[int]) -> int:
    """The stop token that follows another answer, in as far as one does; else the tokenizer's."""
    for other in reversed(rendered.shown):
        texts = texts_of(rendered.messages[other], rendered.full)
        at = rendered.full.find(texts[-1]) if texts and other != index else -1
        rest = rendered.full[at + len(texts[-1]) :].lstrip() if at >= 0 else ""
        if found := [id for id in stops if rest.startswith(added_tokens(tokenizer).get(id, " "))]:
            return found[0]
    return tokenizer.eos_token_id


def _answer_start(rendered: Rendered, index: int, tokenizer: Any) -> tuple[str, int]:
    """The text of a turn with its context, and where in it the model begins to write."""
    prompt, shown, message = rendered.prompts[index], rendered.shown[index], rendered.messages[index]
    bare, texts = rendered.bare[index], texts_of(message, shown)
    if shown.startswith(prompt):
        header = shown[len(prompt) : position(texts[0], shown, len(prompt))] if texts else ""
        if prompt != bare:
            return shown, len(prompt)
        if not texts or (header.strip() and texts[0] != message["content"].strip()):
            raise NoOracle("add_generation_prompt is ignored, and no content to tell where a header ends")
        content = message["content"] if message["content"] in shown[len(prompt) :] else texts[0]
        return shown, position(content, shown, len(prompt)) if header.strip() else len(prompt)
    if SIGNED.findall(prompt) != SIGNED.findall(shown)[: len(SIGNED.findall(prompt))]:
        # The prompt shows the past as no render of the answered conversation does; the model answers the prompt.
        return _answer_after_prompt(prompt, prompt.removeprefix(bare), shown, texts)
    parted = len(os.path.commonprefix([prompt, shown]))
    if not texts or position(texts[0], shown, min(parted, len(bare))) != parted:
        raise NoOracle("prompt and render part elsewhere than at the answer")
    return shown, parted


def _answer_after_prompt(prompt: str, header: str, shown: str, texts: Sequence[str]) -> tuple[str, int]:
    answer = shown.rfind(texts[0]) if texts else -1
    if answer < 0:
        raise NoOracle("another past, and no answer to be found in the render")
    if header and header != prompt:
        start = shown.rfind(header, 0, answer) + len(header)
    else:
        start = len(shown[:answer].rstrip())
        if not shown[:start].endswith(prompt[-1]):
            raise NoOracle("another past, and something before the answer")
    return prompt + shown[start:], len(prompt)


def position(text: str, shown: str, start: int = 0) -> int:
    if (at := shown.find(text, start)) < 0:
        raise NoOracle(f"{text!r} stands elsewhere than in its turn")
    return at


def found_answers(encoded: Sequence[Any], stops: Sequence[int]) -> list[Answer]:
    """The answers that are trained: each ends where the weights do, or with a stop."""
    answers = []
    for one in encoded:
        ids, weights = one.example.tokens.tolist(), one.example.loss_weights
        start = None
        for at, id in enumerate(ids):
            if weights[at] and start is None:
                start = at
            if start is not None and (not weights[at] or id in stops):
                answers.append(Answer(tuple(ids[: at + bool(weights[at])]), start))
                start = None
        if start is not None:
            answers.append(Answer(tuple(ids), start))
    return answers


CONFIGURED_STOPS = {
    "cohere": ("<|END_OF_TURN_TOKEN|>",),
    "command": ("<|END_OF_TURN_TOKEN|>",),
    "aya": ("<|END_OF_TURN_TOKEN|>",),
    "gemma4": ("<turn|>", "<|tool_response>"),
    "gemma-4": ("<turn|>", "<|tool_response>"),
    "diffusion_gemma": ("<turn|>", "<|tool_response>"),
    "gpt-oss": ("<|return|>", "<|call|>"),
    "gptoss": ("<|return|>", "<|call|>"),
    "glm4moe": ("<|user|>", "<|observation|>"),
    "kimi-k3": ("<|end_of_msg|>",),
}
"""What the generation_config of the models has, by a part of the template's name, where one token does not do."""


def stops_of(fitted: Fitted) -> list[int]:
    names = [name for part, stops in CONFIGURED_STOPS.items() if part in fitted.name.lower() for name in stops]
    known = fitted.tokenizer.get_added_vocab()
    return stop_ids(fitted.tokenizer, [[known[name] for name in names if name in known]])


class Outcome(NamedTuple):
    """What came of a conversation on a template."""

    kind: str
    """trained, refused, "not rendered", absent (the template leaves some of the text out), or contradicted (an answer
    thinks although its prompt has closed the thought)."""
    why: str = ""
    examples: int = 0
    has_oracle: bool = False
    problems: tuple[str, ...] = ()
    stops: frozenset[str] = frozenset()
    how: frozenset[str] = frozenset()
    """How the beginnings of the answers were found, in the encoder's words."""


def try_case(fitted: Fitted, encoder: ChatEncoder | Exception, stops: Sequence[int], case: Case) -> Outcome:
    tokenizer = fitted.tokenizer
    try:
        forms, absent = render(tokenizer, case), ""
    except NotRendered as error:
        return Outcome("not rendered", str(error))
    except Absent as error:
        forms, absent = [], str(error)
    if isinstance(encoder, Exception):
        return Outcome("absent" if absent else "refused", absent or str(encoder))
    (encoded,) = encoder.encode([conversation_of(case.messages, case.tools, case.kwargs)])
    if isinstance(encoded, MaskError) and encoded.code == "reasoning":
        return Outcome("contradicted", str(encoded), problems=() if case.kwargs or absent else (str(encoded),))
    if absent:
        problems = () if isinstance(encoded, MaskError) else (f"{absent}: not rendered, and yet not refused",)
        return Outcome("absent", absent, problems=problems)
    if isinstance(encoded, MaskError):
        return Outcome("refused", str(encoded))
    judged = [judge(rendered, tokenizer, encoded, stops) for rendered in forms]
    has_oracle, problems = min(judged, key=lambda one: len(one[1]))
    return Outcome(
        "trained",
        examples=len(encoded),
        has_oracle=has_oracle,
        problems=(*problems, *trained_problems(encoded, tokenizer, stops, case)),
        stops=frozenset(decode(answer.tokens[-1:], tokenizer) for answer in found_answers(encoded, stops)),
        how=frozenset(key.replace("_", " ") for one in encoded for key in one.counts if key.startswith("turns_by")),
    )


def judge(
    rendered: Rendered, tokenizer: Any, encoded: Sequence[Any], stops: Sequence[int]
) -> tuple[bool, tuple[str, ...]]:
    """Whether the answers could be told from prefixes, and what is wrong."""
    problems = token_problems(rendered, tokenizer, encoded, stops)
    if any("split_control_tokens" in one.counts for one in encoded):
        return False, tuple(problems)
    found = set(found_answers(encoded, stops))
    try:
        expected = expected_answers(rendered, tokenizer, stops)
    except NoOracle:
        return False, (*problems, *header_problems(found, tokenizer))
    return True, tuple(problems if found == expected else [*problems, *describe(expected, found, tokenizer)])


OPENINGS = set(
    [
        "[TOOL_CALLS]",
        "[ARGS]",
        "[CALL_ID]",
        "[THINK]",
        "<|tool_call>",
        '<|"|>',
        "<|channel>",
        "<|channel|>",
        "<|message|>",
        "<|content|>",
        "<|START_RESPONSE|>",
        "<|START_ACTION|>",
        "<|START_THINKING|>",
        "<|open|>",
        "<|sep|>",
        "<|close|>",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁sep｜>",
    ]
)
"""What models write themselves before the words of a call, a thought or an answer; no header has them."""


def header_problems(found: Iterable[Answer], tokenizer: Any) -> Iterator[str]:
    """Control tokens that are trained before the first word of an answer, which a header would be made of."""
    for answer in found:
        words = SAID.search(decode(answer.tokens[answer.start :], tokenizer))
        first = answer.start
        while (
            words
            and first < len(answer.tokens)
            and not SAID.search(decode(answer.tokens[answer.start : first + 2], tokenizer))
        ):
            first += 1
        before = decode(answer.tokens[answer.start : first], tokenizer)
        if set(CONTROL.findall(before)) - OPENINGS:
            yield f"trains {before!r} before the first word"


def token_problems(rendered: Rendered, tokenizer: Any, encoded: Sequence[Any], stops: Sequence[int]) -> list[str]:
    """Every example must be the tokens of a render, whole; eos may follow where the render ends without a stop.

    Or those of a prompt and its answer, where no render of the answered conversation shows what the prompt does.
    """

    def tokens(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    renders = {tokens(text) for text in [rendered.full, *rendered.shown.values()]}
    for index in rendered.prompts:
        with contextlib.suppress(NoOracle):
            renders.add(tokens(_answer_start(rendered, index, tokenizer)[0]))
    problems = []
    for one in encoded:
        ids = tuple(one.example.tokens.tolist())
        appended = ids[-1] in stops and ids[:-1] in renders
        # What an assistant writes in the words of a special token is split, so tokens differ and the text does not.
        split = "split_control_tokens" in one.counts and decode(ids, tokenizer) in {
            decode(render, tokenizer) for render in renders
        }
        if ids not in renders and not appended and not split:
            problems.append(f"tokens of no render: {decode(ids, tokenizer)!r}")
    return problems


def trained_problems(encoded: Sequence[Any], tokenizer: Any, stops: Sequence[int], case: Case) -> list[str]:
    """Whatever the template: all that the assistant says is trained once and ends with a stop, and nobody else's."""
    problems = []
    found = found_answers(encoded, stops)
    trained = "\n".join(decode(answer.tokens[answer.start :], tokenizer) for answer in found)
    said = Counter(
        word
        for message in case.messages
        if message["role"] == "assistant"
        for text in texts_of(message)
        for word in SAID.findall(text)
    )
    lossy = bool(lacking_bytes(tokenizer.backend_tokenizer))  # Digits are among the bytes that llama-3-tiny lacks.
    if foreign := FOREIGN.findall(trained):
        problems.append(f"trains {foreign}")
    if Counter(SAID.findall(trained)) != said and not lossy:
        problems.append(f"trains {sorted(Counter(SAID.findall(trained)).items())} instead of {sorted(said.items())}")
    for word in set(case.said):
        if trained.count(word) < case.said.count(word):
            problems.append(f"trains {word!r} {trained.count(word)} times instead of {case.said.count(word)}")
    num_turns = sum(message["role"] == "assistant" for message in case.messages)
    if len(found) != num_turns or sum(len(one.turn_ends) for one in encoded) != num_turns:
        problems.append(f"trains {len(found)} answers of {num_turns}")
    for answer in found:
        if answer.tokens[-1] not in stops:
            problems.append(f"an answer ends with {decode(answer.tokens[-3:], tokenizer)!r}")
    return problems


def describe(expected: set[Answer], found: set[Answer], tokenizer: Any) -> list[str]:
    def show(answers: set[Answer]) -> list[str]:
        return sorted(
            f"...{decode(answer.tokens[: answer.start], tokenizer)[-40:]}⟦"
            f"{decode(answer.tokens[answer.start :], tokenizer)}⟧"
            for answer in answers
        )

    lacking, surplus = show(expected - found), show(found - expected)
    if lacking == surplus:
        return ["answers differ in their context"]
    return [f"expected {lacking}, found {surplus}"]


DAY = re.compile(r"\d{4}-\d\d-\d\d")
NOTES: dict[str, list[str]] = defaultdict(list)


@functools.cache
def outcomes(material: pathlib.Path) -> dict[str, dict[str, Outcome]]:
    """By template and conversation."""
    results: dict[str, dict[str, Outcome]] = {}
    for fitted in fit_templates(material):
        encoder: ChatEncoder | Exception
        stops: list[int] = []
        try:
            stops = stops_of(fitted)
            encoder = make_encoder(fitted.tokenizer, stops)
            NOTES[fitted.name] = [DAY.sub("today", re.sub(r"/\S*/", "", note)) for note in encoder.notes]
        except Exception as error:
            encoder = error
        results[fitted.name] = {case.name: try_case(fitted, encoder, stops, case) for case in CASES}
    return results


def test_every_template_trains_the_answers_and_nothing_else(material):
    problems = [
        f"{template}: {case}: {problem}"
        for template, by_case in outcomes(material).items()
        for case, outcome in by_case.items()
        for problem in outcome.problems
        if (template, case) not in LISTED
    ]
    assert not problems, f"{len(problems)}:\n" + "\n".join(problems)


AFTER_TOOLS = "prompts after a tool's result end without the header that the answer then gets, which is not trained"
AFTER_ANSWER = (
    "the answer before it is the last message of the prompt, and shown otherwise there: the prompt is the context"
)
HEADER_ONCE = "a prompt after an answer has no header, and the one before the next answer is not trained"
LISTED: dict[tuple[str, str], str] = (
    {
        (template, "two answers"): AFTER_ANSWER
        for template in ("(qwen3)", "ollama-automap__qwen3-next_80b", "unsloth__unsloth-chat_templates-22")
    }
    | {
        (template, "two answers"): HEADER_ONCE
        for template in (
            "ollama-automap__qwen_0.5b",
            "vllm__template_chatglm",
            "vllm__template_chatglm2",
            "vllm__tool_chat_template_glm4",
        )
    }
    | {
        (template, case): AFTER_TOOLS
        for template in ("nemo-automodel__dllm_sft-diffusion_gemma_chat_template", "trl__diffusion_gemma")
        for case in ("tool call", "tool call with text", "parallel tool calls", "reasoning before a tool call")
    }
    | {
        (
            "llamacpp__Bielik-11B-v3.0-Instruct",
            case,
        ): "a tool's result ends with <|im_end|> in the prompt and in no render: the prompt is the context"
        for case in ("tool call with text", "greeting by a call")
    }
    | {
        (
            "hfjs__CohereLabs_command-a-reasoning-08-2025",
            "reasoning before a tool call",
        ): "the template spells the letters of a tool's result one by one, so all of it is there, but not as a word"
    }
    | {
        (
            "RL__nemo_rl-algorithms-utils-1",
            case.name,
        ): "no stop token, and words after the answer: eos stands before them"
        for case in CASES
    }
)
"""By template and conversation: why the outcome is right although the oracle says otherwise."""


def test_few_templates_are_refused_that_render_the_conversation(material, capsys):
    table = outcomes(material)
    with capsys.disabled():
        print(f"\n{summary(table)}")
    kinds = {name: Counter(outcome.kind for outcome in by_case.values()) for name, by_case in table.items()}
    rendered = sum(kind["trained"] + kind["refused"] for kind in kinds.values())
    refused = sum(kind["refused"] for kind in kinds.values())
    assert refused < 0.05 * rendered, f"{refused} of {rendered} conversations"
    some = [name for name, kind in kinds.items() if kind["trained"] + kind["refused"]]
    wholly = [name for name in some if not kinds[name]["trained"]]
    partly = [name for name in some if kinds[name]["refused"]]
    assert len(wholly) < 0.05 * len(some), wholly
    assert len(partly) < 0.05 * len(some), partly


def test_the_oracle_knows_most_of_what_is_trained(material):
    trained = [one for by_case in outcomes(material).values() for one in by_case.values() if one.kind == "trained"]
    assert len(CASES) >= 12 and sum(one.has_oracle for one in trained) > 0.8 * len(trained) > 0


def summary(table: dict[str, dict[str, Outcome]]) -> str:
    kinds = Counter(outcome.kind for by_case in table.values() for outcome in by_case.values())
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return f"{len(table)} templates x {len(CASES)} conversations: {counts}"


# Templates that mark what is to be trained by themselves.


TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


def tagged(messages: list[Message], tools: Any, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The render, and the characters between the tags."""
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, ranges = render_jinja_template(
        [messages],
        tools=tools,
        chat_template=tokenizer.chat_template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return texts[0], ranges[0]


def tag_differences(fitted: Fitted, encoder: ChatEncoder, stops: Sequence[int]) -> tuple[Counter[tuple[str, str]], int]:
    """What only the tags train ("tag") or only we ("ours"), as text; and how many turns are alike."""
    tokenizer, differences, alike = fitted.tokenizer, Counter[tuple[str, str]](), 0
    for case in CASES:
        try:
            rendered = render(tokenizer, case)[0]
        except (NotRendered, Absent):
            continue
        if case.kwargs:
            continue
        (encoded,) = encoder.encode([conversation_of(case.messages, case.tools)])
        if isinstance(encoded, MaskError):
            continue
        found = found_answers(encoded, stops)
        for index in rendered.shown:
            if index and index not in rendered.prompts:
                continue
            try:
                text, ranges = tagged(rendered.form[: index + 1], case.tools, tokenizer)
            except Exception:  # A template may raise anything.
                continue
            earlier = tagged(rendered.form[:index], case.tools, tokenizer)[1] if index else []
            tokens = tokenise(normalise(text, tokenizer), tokenizer)
            spans = [
                tuple(len(normalise(text[:at], tokenizer).encode()) for at in span) for span in ranges[len(earlier) :]
            ]
            theirs = weigh(tokens, spans)
            # The answer that this render ends with; one in another context is for the other test to judge.
            past = os.path.commonprefix([rendered.bare.get(index, ""), text])
            behind = len(normalise(past, tokenizer).encode())
            held = [
                one
                for one in found
                if one.tokens == tuple(tokens.ids[: len(one.tokens)]) and tokens.ends[len(one.tokens) - 1] > behind
            ]
            if not held:
                continue
            ours = [0.0] * len(tokens.ids)
            last = max(held, key=lambda one: one.start)
            ours[last.start : len(last.tokens)] = [1.0] * (len(last.tokens) - last.start)
            alike += ours == theirs
            whose = [
                ("tag" if a > b else "ours" if b > a else "", id)
                for a, b, id in zip(theirs, ours, tokens.ids, strict=True)
            ]
            for side, group in itertools.groupby(whose, key=lambda pair: pair[0]):
                if side:
                    differences[side, decode([id for _, id in group], tokenizer)] += 1
    return differences, alike


class Difference(NamedTuple):
    """Between what the tags of a template mark and what is trained."""

    whose: str
    """The side that trains it alone: tag or ours."""
    text: str
    """A regular expression."""
    why: str


AFTER_THE_STOP = "stands after the stop token, which ends the generation"
HEADER = "the prompt ends with it, so the model never writes it"
CALLS = "the model writes its calls, and what it thinks before them"
TAG_DIFFERENCES: dict[str, list[Difference]] = {
    "nemo-automodel__dllm_sft-diffusion_gemma_chat_template": [
        Difference("tag", r"\n", AFTER_THE_STOP),
        Difference("ours", r"(<\|channel>thought\n.*\n<channel\|>)?<\|tool_call>.*<tool_call\|>", CALLS),
        Difference("ours", r"<\|channel>thought\n.*\n<channel\|>", "the model writes its thoughts"),
    ],
    "nemo-automodel__gemma4_31B-gemma4_coderforge_chat_template": [Difference("tag", r"\n", AFTER_THE_STOP)],
    "nemo-automodel__gpt-oss-20b-chat_template": [
        Difference("tag", r"<\|start\|> assistant", HEADER),
        Difference("ours", r".* to=functions.get_(weather|time).*<\|call\|>", CALLS),
    ],
    "trl__gemma3_training": [Difference("tag", r"\n", AFTER_THE_STOP)],
    "trl__gptoss_training": [Difference("tag", r"<\|start\|> assistant", HEADER)],
    "trl__idefics3_training": [Difference("tag", r"\n", AFTER_THE_STOP)],
    "trl__llava_next_training": [Difference("tag", " ", AFTER_THE_STOP)],
    "trl__qwen2_5_training": [Difference("tag", r"\n", AFTER_THE_STOP)],
    "trl__qwen3_6_training": [
        Difference("tag", r"\n", AFTER_THE_STOP),
        Difference("tag", r"<think>(\n)?", HEADER),
    ],
}


def test_tags_and_weights_agree_but_for_what_is_listed(material):
    num_alike, num_tagged = 0, 0
    for fitted in fit_templates(material):
        if not TAG.search(fitted.tokenizer.chat_template):
            continue
        stops = stops_of(fitted)
        found, alike = tag_differences(fitted, make_encoder(fitted.tokenizer, stops), stops)
        listed = TAG_DIFFERENCES.get(fitted.name, [])
        explained = {
            (whose, text): one
            for whose, text in found
            for one in listed
            if one.whose == whose and re.fullmatch(one.text, text, re.DOTALL)
        }
        assert set(found) == set(explained), f"{fitted.name}: {sorted(set(found) - set(explained))}"
        assert set(listed) == set(explained.values()), f"{fitted.name}: no longer there"
        assert found or alike, f"{fitted.name}: nothing was compared"
        num_alike, num_tagged = num_alike + alike, num_tagged + 1
    assert num_tagged >= 10 and num_alike > 50


# Text of the data that spells a control token.


def control_texts(tokenizer: Any) -> dict[str, int]:
    """Every added token but runs of whitespace, which control nothing."""
    return {text: id for id, text in added_tokens(tokenizer).items() if text.strip(" ▁\t\r\n")}


def forgeries(words: Sequence[str]) -> dict[str, tuple[list[Message], Any]]:
    """Conversations in which others than the assistant write the words, in each place that they can write to."""
    text = "".join(f"{word}x{word} " for word in words)
    spoken = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    called = {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "call00001", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "here"}}}
        ],
    }
    result = {"role": "tool", "tool_call_id": "call00001", "name": "get_weather", "content": text}
    tool = {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": text,
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": text}}},
        },
    }
    return {
        "user": ([{"role": "user", "content": text}, spoken[1], {"role": "user", "content": text}, spoken[1]], None),
        "system": ([{"role": "system", "content": text}, *spoken], None),
        "tool result": ([spoken[0], called, result, spoken[1]], None),
        "tools": (list(spoken), [tool]),
        "roles": ([spoken[0], *({"role": word, "content": "Hm"} for word in words), spoken[1]], None),
    }


@pytest.mark.parametrize(
    "name",
    sorted(
        path
        for path in (
            "chatglm3",
            "deepseek-v3",
            "gemma-2",
            "llama-2",
            "llama-3-tiny",
            "llama-3.1",
            "mistral-nemo",
            "phi-3",
            "qwen2.5",
            "qwen3",
            "smollm2",
        )
    ),
)
def test_nobody_but_the_template_and_the_assistant_writes_control_tokens(material, name):
    tokenizer = load(material / "tokenizers" / name)
    controls = control_texts(tokenizer)
    encoder = make_encoder(tokenizer)
    forged, harmless = forgeries(list(controls)), forgeries(["word"] * len(controls))
    tried = []
    for place in forged:
        results = encoder.encode([conversation_of(*forged[place]), conversation_of(*harmless[place])])
        if any(isinstance(one, MaskError) for one in results):
            assert isinstance(results[0], MaskError), f"{place}: the harmless one is refused: {results[1]}"
            # Only where the template itself does not take it.
            assert place != "user", results[0]
            continue
        tried.append(place)
        counts = [Counter(id for one in result for id in one.example.tokens.tolist()) for result in results]
        for text, id in controls.items():
            assert counts[0][id] == counts[1][id], f"{place}: {text!r} became a token"
        if place != "roles":
            seen = decode(results[0][-1].example.tokens.tolist(), tokenizer)
            lost = [text for text in controls if text not in seen]
            assert not lost or lacking_bytes(tokenizer.backend_tokenizer), f"{place}: {lost[:5]} are no longer there"
    assert "user" in tried and len(tried) >= LEAST_PLACES.get(name, 2), tried


LEAST_PLACES = {"gemma-2": 1, "phi-3": 1, "mistral-nemo": 2}
"""Of the five: Gemma 2 takes no system, tools or other roles, Phi 3 writes users and assistants only."""


# docs/templates.md


def doc_page(table: dict[str, dict[str, Outcome]], notes: dict[str, list[str]], bases: dict[str, str]) -> str:
    lines = [
        "# Chat templates that were tried",
        "",
        f"{summary(table)}. A template in brackets is the tokenizer's own; every other one was put on the tokenizer",
        "that knows most of its control tokens. *Absent*: the template leaves text of the conversation out, so",
        "that the row is refused. *Not rendered*: the template itself refuses the roles or their order.",
        "*Contradicted*: an answer reasons although its prompt has closed the thought, and is refused. *Unrolled*:",
        "conversations that become several examples, because a turn is shown otherwise once it is in the past.",
        "Written by `python tests/chat/test_templates.py --write`.",
        "",
        "| template | tokenizer | trained | spans | unrolled | stop | refused |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, by_case in table.items():
        kinds = Counter(outcome.kind for outcome in by_case.values())
        how = Counter(key for one in by_case.values() for key in one.how)
        unrolled = [case for case, outcome in by_case.items() if outcome.examples > 1]
        stops = sorted({stop for outcome in by_case.values() for stop in outcome.stops})
        # Not where it lies on this machine.
        why = {case: re.sub(r"(the chat template) of \S+", r"\1", one.why)[:120] for case, one in by_case.items()}
        refused = [f"{case}: {why[case]}" for case, one in by_case.items() if one.kind == "refused"]
        refused += [f"{count} {kind}" for kind in ("absent", "not rendered", "contradicted") if (count := kinds[kind])]
        spans = "; ".join([*(f"{key} ({count})" for key, count in how.most_common()), *notes[name]])
        rest = f"{len(unrolled)} of {len(by_case)}: {', '.join(unrolled)}"
        cells = [
            name,
            bases[name],
            f"{kinds['trained']}/{len(by_case)}",
            spans,
            rest if unrolled else "",
            " ".join(f"`{stop}`" for stop in stops),
            "; ".join(refused),
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join([*lines, *fetched.page()]) + "\n"


def current_page(material: pathlib.Path) -> str:
    bases = {fitted.name: fitted.base for fitted in fit_templates(material)}
    return doc_page(outcomes(material), NOTES, bases)


def test_the_page_of_templates_is_up_to_date(material, repo):
    assert (repo / "docs" / "templates.md").read_text() == current_page(material), "run this file with --write"


if __name__ == "__main__":
    assert sys.argv[1:] == ["--write"], "usage: python tests/chat/test_templates.py --write"
    root = pathlib.Path(__file__).parents[2]
    (root / "docs" / "templates.md").write_text(
        current_page(pathlib.Path(os.environ.get("JAXSFT_MATERIAL", root.parent / "shared" / "material")))
    )
