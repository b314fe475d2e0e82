"""Conversation and tokenizer to examples: the tokens of the chat template, and a weight on what the model must produce.

`turns.py` says which characters are trained, `control.py` which tokens they are; here both meet. For every conversation
the text is compared with what transformers renders, so that nothing rests on our rendering being right.
"""

import datetime
import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxsft.chat.control import ASSISTANT, TRUSTED, UNTRUSTED, ControlError, TextEncoder, Tokenizer
from jaxsft.chat.documents import Documents
from jaxsft.chat.exchanges import without_oldest
from jaxsft.chat.habits import fitted, writes_within
from jaxsft.chat.invariant import Given, free_spans
from jaxsft.chat.metered import TemplateHogs
from jaxsft.chat.named_templates import that_suit
from jaxsft.chat.parts import character_weights
from jaxsft.chat.provenance import TEMPLATE, UNKNOWN
from jaxsft.chat.skeletons import Skeletons
from jaxsft.chat.starts import MaskError
from jaxsft.chat.stops import open_template, stop_ids, template_name, token_text
from jaxsft.chat.template import GENERATED, Source, TemplateError, Traceable, number_sources
from jaxsft.chat.theirs import Theirs
from jaxsft.chat.thinking import ReasoningError, read_tags, without_reasoning
from jaxsft.chat.turns import TurnFinder, View
from jaxsft.chat.weighing import WRITERS, Drawn, Encoded, Weigher
from jaxsft.config import DataConfig
from jaxsft.rows.flags import OURS
from jaxsft.rows.items import Conversation, Document, Item, Tokenised
from jaxsft.rows.messages import Message

TRUSTED_ROLES = (
    "system", "developer", "user", "assistant", "tool",
    "environment", "function", "human", "ipython", "model", "observation",
)  # fmt: skip
"""Role words that may be part of a control token, as in `<|user|>`; another one can only be text."""


class TrainedTurn(NamedTuple):
    """A turn of the assistant as it is trained, taken apart: `prompt + answer` is how an example begins."""

    message: int
    """Of the conversation, from 0."""
    prompt: list[int]
    """All that stands before what is trained: what the model is given when it is asked."""
    answer: list[int]
    """What the model must produce then, the stop token last. Where parts of the turn are not trained (reasoning), what
    follows the last of them."""
    own_prompt: list[int] | None
    """What the chat template gives when it is asked for a prompt; None where it refuses. It differs where the template
    ignores add_generation_prompt, where the conversation lacks the end of the prompt, where that end and the beginning
    of the answer share a token, or where reasoning is seen only."""


class ChatEncoder:
    """Conversations to examples, for one tokenizer and one set of options; picklable."""

    def __init__(self, tokenizer: Tokenizer, config: DataConfig, stops: Sequence[int]) -> None:
        """
        Args:
            tokenizer: a fast one, with its chat template.
            config: the data section.
            stops: what `stop_ids` says.

        Raises:
            DataError: the tokenizer is not fast, or its template is no program that can be run.
        """
        self.tokenizer, self.stops = tokenizer, frozenset(map(int, stops))
        self._tokenizer, self._stops = tokenizer, np.array(stops, np.int64)
        self._policy = config.control_tokens
        self._train_reasoning, self._keeps_reasoning = config.train_reasoning, config.reasoning == "error"
        self._reasoning_tags = [(opening, closing) for opening, closing in config.reasoning_tags]
        self._stop_texts = [token_text(tokenizer, id) for id in stops]
        self._text_encoder = TextEncoder(tokenizer, stops=stops, policy=config.control_tokens)
        self._trusted_roles = {*TRUSTED_ROLES, *(role for source in _sources(config) for role in source.roles.values())}
        today = datetime.date.fromisoformat(config.template_date) if config.template_date else None
        self._template = open_template(tokenizer, today=today, template_kwargs=config.chat_template_kwargs)
        self._clock = None
        if self._template is not None and self._template.asks_for_date:
            self._clock = open_template(tokenizer, template_kwargs=config.chat_template_kwargs)
        self._finder = None
        if self._template is not None:
            self._finder = TurnFinder(
                self._template,
                stop_texts=self._stop_texts,
                train_on=config.train_on,
                train_reasoning=config.train_reasoning,
                unroll=config.unroll,
                name=template_name(tokenizer),
            )
        self._theirs = Theirs(tokenizer, config.chat_template_kwargs)
        self._skeletons = None
        # Where the text depends on the day, or reasoning is taken out of contents, nothing is known beforehand.
        if self._template is not None and self._clock is None and not self._reasoning_tags:
            self._skeletons = Skeletons(self._template, stop_texts=self._stop_texts, unroll=config.unroll)
        self._most_tokens = config.seq_len if config.overlong == "drop_oldest" else None
        self._weigher = Weigher(
            stops=stops,
            stop_texts=self._stop_texts,
            closing=self._finder.closing if self._finder is not None else "",
            every_stop=config.train_stop == "every",
            text_encoder=self._text_encoder,
            tokenizer_name=tokenizer.name_or_path,
            template_name=template_name(tokenizer),
        )
        self._documents = Documents(tokenizer, self._text_encoder, self._weigher)
        self.template_keys = _keys_read(tokenizer.chat_template)
        """Keys that the template may read of a message."""
        self.notes = self._make_notes(config)
        self.settings = {
            "chat_template": tokenizer.chat_template,
            "chat_template_kwargs": config.chat_template_kwargs,
            "template_date": config.template_date if self._clock else None,
            "stops": list(map(int, stops)),
            "train_on": config.train_on,
            "train_reasoning": config.train_reasoning,
            "reasoning": config.reasoning,
            "reasoning_tags": config.reasoning_tags,
            "train_stop": config.train_stop,
            "unroll": config.unroll,
            "control_tokens": config.control_tokens,
            "trusted_roles": sorted(self._trusted_roles - {*TRUSTED_ROLES}),
        }

    def _make_notes(self, config: DataConfig) -> list[str]:
        """What a user should know about the template, in sentences."""
        if self._finder is None:
            return []
        habits, notes = self._finder.habits, []
        if habits.ignores_prompt and habits.header.strip():
            notes.append(
                f"the chat template ignores add_generation_prompt; its header {habits.header!r} is not trained and "
                f"must be given to the model by whoever asks it"
            )
        if not self._finder.writes_stop:
            stop = self._finder.usual_stop or (self._stop_texts[0] if self._stop_texts else "none")
            notes.append(f"the chat template writes no stop token after an answer; {stop!r} is appended and trained")
        if within := [stop for stop in self._stop_texts if writes_within(habits, stop)]:
            notes.append(
                f"the chat template writes {within[0]!r} between the reasoning and the rest of an answer, and it is a "
                f"stop token: the model is trained to go on there, and whoever asks may not stop it after its reasoning"
            )
        if self._clock is not None:
            notes.append(f"the chat template asks for the date; it sees {config.template_date or 'that of today'}")
        if habits.takes_blocks:
            notes.append("the chat template takes content as a list of text blocks, and is given that")
        if habits.takes_json_arguments:
            notes.append("the chat template takes the arguments of tool calls as JSON text, and is given that")
        return notes

    def prompt(
        self,
        messages: Sequence[Message],
        *,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: dict[str, Any] | None = None,
    ) -> list[int]:
        """Tokens of the prompt that asks for the next assistant turn, as the training has it.

        Raises:
            MaskError: no chat template, or the template refuses the messages.
        """
        if self._finder is None or self._template is None:
            raise _no_template(self._tokenizer)
        traceable = number_sources(fitted(_shown(messages), self._finder.habits), tools, template_kwargs or {})
        try:
            text = self._template.render(traceable, len(messages), prompt=True)
        except TemplateError as error:
            raise self._refused(error) from error
        except TemplateHogs as error:
            raise self._stopped(error) from error
        trust, _ = self._characters(text.runs, traceable.sources, messages)
        try:
            return self._text_encoder.encode(text, trust).ids.tolist()
        except ControlError as error:
            raise MaskError(str(error), "control-token") from error

    def trained_turns(self, conversation: Conversation) -> list[TrainedTurn]:
        """The turns of the assistant that `encode` trains, in order, each as the model is asked for it.

        Where every token is trained (`train_on: all`), those that stand in the example as they were said.

        Raises:
            MaskError: as `encode` has it, or no turn of the assistant is trained.
        """
        drawn = self._draw(conversation)
        encoded = self._examples(conversation.origin, drawn)
        if drawn[0].turns[0].found_by == "all":
            whole = encoded[0].example.tokens.tolist()
            turns = self.trained_turns(conversation._replace(train_on="assistant"))
            return [turn for turn in turns if whole[: len(turn.prompt) + len(turn.answer)] == turn.prompt + turn.answer]
        conversation, _ = self._without_stops(conversation)
        turns = []
        for each, (example, _, turn_ends, *_) in zip(drawn, encoded, strict=True):
            for turn, before, end in zip(each.turns, [0, *turn_ends], turn_ends, strict=False):
                # Where the stop token is not trained, no answer can be expected to end.
                if conversation.messages[turn.message]["role"] == "assistant" and example.loss_weights[end - 1] > 0:
                    seen = np.flatnonzero(example.loss_weights[before:end] == 0)
                    start = int(before + seen[-1] + 1) if len(seen) else int(before)
                    prompt, answer = example.tokens[:start].tolist(), example.tokens[start:end].tolist()
                    own_prompt = self._own_prompt(conversation, turn.message)
                    turns.append(TrainedTurn(turn.message, prompt, answer, own_prompt))
        if not turns:
            raise MaskError("no turn of the assistant is trained", "nothing-trained")
        return sorted(turns, key=lambda turn: turn.message)

    def _own_prompt(self, conversation: Conversation, message: int) -> list[int] | None:
        """What the template gives before a message when it is asked for a prompt; None where it refuses."""
        before, tools = conversation.messages[:message], conversation.tools
        try:
            return self.prompt(before, tools=tools, template_kwargs=conversation.template_kwargs)
        except MaskError:
            return None

    def encode(self, items: Sequence[Item]) -> list[list[Encoded] | MaskError]:
        """The examples of each item, several where a conversation is unrolled; or why it has none.

        Texts are tokenised all at once, which is where a tokenizer is fast: give some hundred items at a time.
        """
        results: dict[int, list[Encoded] | MaskError] = {}
        drawn: dict[int, list[Drawn]] = {}
        others: dict[int, Document | Tokenised] = {}
        for at, item in enumerate(items):
            if isinstance(item, Conversation):
                try:
                    drawn[at] = self._draw(item)
                except MaskError as error:
                    results[at] = error
            else:
                others[at] = item
        origins = [items[at].origin for at, views in drawn.items() for _ in views]
        weighed = self._weighed(origins, [each for views in drawn.values() for each in views])
        begin = 0
        for at, views in drawn.items():
            end = begin + len(views)
            try:
                results[at] = self._fitting(items[at], _together(weighed[begin:end]))
            except MaskError as error:
                results[at] = error
            begin = end
        for at, found in zip(others, self._documents.encode([*others.values()]), strict=True):
            results[at] = found if isinstance(found, MaskError) else [found]
        return [results[at] for at in range(len(items))]

    def _fitting(self, item: Item, encoded: list[Encoded]) -> list[Encoded]:
        """Under `data.overlong: drop_oldest`, the examples of as many of the last exchanges as are short enough."""
        if self._most_tokens is None:
            return encoded
        shorter, num_dropped, found = item, 0, encoded
        while max(len(each.example.tokens) for each in found) > self._most_tokens:
            assert isinstance(shorter, Conversation), "it was encoded as one"
            without = without_oldest(shorter)
            if without is None:
                return encoded  # One exchange alone is too long.
            shorter, num_dropped = without, num_dropped + 1
            try:
                found = self._examples(item.origin, self._draw(shorter))
            except MaskError:
                return encoded  # Nothing that is trained is left, or the template refuses it.
        if num_dropped:
            before, after = (sum(len(each.example.tokens) for each in some) for some in (encoded, found))
            found[0].counts.update(dropped_exchanges=num_dropped, dropped_exchange_tokens=before - after)
        return found

    def _examples(self, origin: str, drawn: Sequence[Drawn]) -> list[Encoded]:
        """The examples of one conversation; raises MaskError."""
        return _together(self._weighed([origin] * len(drawn), drawn))

    def _weighed(self, origins: Sequence[str], drawn: Sequence[Drawn]) -> list[Encoded | MaskError]:
        if not drawn:
            return []
        found = self._text_encoder.encode_all([each.text for each in drawn], [each.trust for each in drawn])
        return self._weigher.weigh(origins, drawn, *found)

    def _stopped(self, error: TemplateHogs) -> MaskError:
        return MaskError(f"{template_name(self._tokenizer)}: {error}", "template-hogs")

    def _refused(self, error: TemplateError) -> MaskError:
        return MaskError(f"{template_name(self._tokenizer)} refuses this conversation: {error}", "template-refuses")

    def _draw(self, conversation: Conversation) -> list[Drawn]:
        """The texts of a conversation, with the trust and the writer of each character.

        Raises:
            MaskError: it cannot be masked, or the template refuses it.
        """
        try:
            return self._drawn(conversation)
        except TemplateError as error:
            raise self._refused(error) from error
        except TemplateHogs as error:
            raise self._stopped(error) from error

    def _drawn(self, conversation: Conversation) -> list[Drawn]:
        if self._finder is None:
            raise _no_template(self._tokenizer)
        shape = self._skeletons.shape(conversation) if self._skeletons is not None else None
        if self._skeletons is None or shape is None:
            return self._found_out(conversation)[0]
        look = functools.partial(self._look, conversation)
        drawn = self._skeletons.draw(shape, conversation, look)
        if drawn is not None and self._is_theirs(conversation, drawn):
            return [each for _, each in drawn]
        is_wanted = self._skeletons.wants(shape)
        found, traceable, views = self._found_out(conversation)
        if is_wanted:
            self._skeletons.learn(shape, traceable, views, found)
        return found

    def _look(self, conversation: Conversation, number: int) -> Given:
        """What the last look is told of an example of a conversation that was drawn by a skeleton."""
        return self._found_out(conversation)[0][number].look()

    def _is_theirs(self, conversation: Conversation, drawn: Sequence[tuple[int, Drawn]]) -> bool:
        """Whether texts by a skeleton are transformers' texts; where they are not, all is found out anew."""
        assert self._finder is not None, "there is a template"
        messages = conversation.messages
        if self._finder.habits.takes_blocks or max(map(len, messages)) > 2:
            messages = fitted(messages, self._finder.habits)
        try:
            return all([self._theirs.render_plain(messages[:number]) == each.text for number, each in drawn])
        except Exception:  # A template may raise anything.
            return False

    def _found_out(self, conversation: Conversation) -> tuple[list[Drawn], Traceable, list[View]]:
        """The texts of a conversation, with all that is known of them, from renders of its own."""
        kwargs = conversation.template_kwargs
        conversation, num_stripped = self._without_stops(conversation)
        if self._reasoning_tags:
            apart = [read_tags(message, self._reasoning_tags) for message in conversation.messages]
            conversation = conversation._replace(messages=apart)
        num_thoughtless = 0
        try:
            messages, traceable, views, left_out = self._views(conversation)
        except ReasoningError:
            if self._keeps_reasoning:
                raise
            conversation, num_thoughtless = without_reasoning(conversation, self._reasoning_tags)
            messages, traceable, views, left_out = self._views(conversation)
        self._compare(messages, conversation.tools, kwargs, views)
        answers = frozenset(at for at, each in enumerate(conversation.messages) if each["role"] == "assistant")
        last_message = max(turn.message for view in views for turn in view.turns)
        changed = {
            "left_out_turns": left_out,
            "stripped_stops": num_stripped,
            "dropped_reasoning": num_thoughtless,
        }
        drawn: list[Drawn] = []
        for view in views:
            trust, writers = self._characters(view.text.runs, traceable.sources, conversation.messages)
            is_whole = view.turns[0].found_by == "all"
            parts = character_weights(view.text, traceable.sources, conversation.messages, of_turns=is_whole)
            given = self._given(view, traceable, answers)
            drawn.append(
                Drawn(
                    str.__str__(view.text),
                    view.turns,
                    view.is_unrolled,
                    trust,
                    writers,
                    {} if drawn else changed,
                    parts,
                    last_message,
                    None if is_whole else free_spans(given),
                    functools.partial(_itself, given),
                )
            )
        return drawn, traceable, views

    def _given(self, view: View, traceable: Traceable, answers: frozenset[int]) -> Given:
        """What the last look is told of an example: nothing of how its weights come about."""
        assert self._finder is not None, "it found them"
        return Given(
            view.layout,
            traceable.sources,
            frozenset(turn.message for turn in view.turns),
            answers,
            view.prompts,
            self._finder.headers,
            self._finder.stop,
            not self._train_reasoning,
        )

    def _views(self, conversation: Conversation) -> tuple[list[Message], Traceable, list[View], int]:
        """The messages as the template takes them, their strings, the examples, and how many turns were left out."""
        assert self._finder is not None, "there is a template"
        messages = fitted(_shown(conversation.messages), self._finder.habits)
        traceable = number_sources(messages, conversation.tools, conversation.template_kwargs)
        return messages, traceable, *self._finder.views(conversation, traceable)

    def _without_stops(self, conversation: Conversation) -> tuple[Conversation, int]:
        """Some data end their answers with the text of a stop token (T0's with `<|endoftext|>`).

        The template writes that token itself; as ordinary text, the model would learn to spell it before it stops.
        """
        messages, num_stripped = [], 0
        for message in conversation.messages:
            content = message.get("content")
            if message["role"] == "assistant" and isinstance(content, str):
                stripped = content.rstrip()
                text = next((text for text in self._stop_texts if stripped.endswith(text)), None)
                if text is not None and self._policy == "split":
                    message = {**message, "content": stripped.removesuffix(text)}
                    num_stripped += 1
            messages.append(message)
        return conversation._replace(messages=messages), num_stripped

    def _compare(self, messages: list[Message], tools: Any, kwargs: dict[str, Any], views: Sequence[View]) -> None:
        """Our text is transformers' text; else the mask would be of another conversation.

        Transformers renders without any limit, so only what we have rendered before, with the same day.
        """
        for layout in {id(layout): layout for view in views for layout in view.renders}.values():
            ours: str = layout.text
            if self._clock is not None:  # Theirs is of today.
                traceable = number_sources(messages, tools, kwargs)
                ours = self._clock.render(traceable, layout.num_messages, prompt=layout.is_prompt)
            try:
                theirs = self._theirs.render(
                    messages[: layout.num_messages], tools=tools, kwargs=kwargs, prompt=layout.is_prompt
                )
            except Exception as error:  # A template may raise anything.
                raise self._refused(TemplateError(" ".join(str(error).split())[:300])) from error
            if theirs != ours:
                raise MaskError(f"{template_name(self._tokenizer)}: rendered otherwise here than by transformers")

    def _characters(
        self, runs: Iterable[tuple[int, int, int]], sources: Sequence[Source], messages: Sequence[Message]
    ) -> tuple[bytes, bytes]:
        """Trust and writer of each character."""
        known = {TEMPLATE: (bytes([TRUSTED]), b"\0"), UNKNOWN: (bytes([UNTRUSTED]), bytes([WRITERS.index("other")]))}
        trusts, writers = [], []
        for length, marked, _ in runs:
            source = marked & ~GENERATED
            if source not in known:
                trust, writer = self._standing(sources[source - 1], messages)
                known[source] = bytes([trust]), bytes([writer])
            trust_byte, writer_byte = known[source]
            trusts.append(trust_byte * length)
            writers.append(writer_byte * length)
        return b"".join(trusts), b"".join(writers)

    def _standing(self, source: Source, messages: Sequence[Message]) -> tuple[int, int]:
        """How far text of the data is trusted, and who wrote it."""
        if source.message < 0:
            return UNTRUSTED, WRITERS.index("tool" if source.field == "tools" else "other")
        if source.field == "role" and source.text in self._trusted_roles:
            return TRUSTED, 0  # One of a few known words.
        role = messages[source.message]["role"]
        writer = {"developer": "system"}.get(role, role)
        number = WRITERS.index(writer) if writer in WRITERS else WRITERS.index("other")
        is_answer = role == "assistant" and source.field != "role"
        return ASSISTANT if is_answer else UNTRUSTED, number


def _together(results: Sequence[Encoded | MaskError]) -> list[Encoded]:
    """The examples of one conversation; raises what is wrong with any of them."""
    encoded = []
    for each in results:
        if isinstance(each, MaskError):
            raise each
        encoded.append(each)
    if len(encoded) > 1:
        lengths = [len(each.example.tokens) for each in encoded]
        encoded[-1].counts["repeated_tokens"] = sum(lengths) - max(lengths)
    return encoded


def _itself(given: Given) -> Given:
    return given


def asking_encoder(tokenizer: Tokenizer) -> ChatEncoder:
    """An encoder for talking to a model: its `prompt` asks for the next assistant turn, as of today.

    Raises:
        DataError: the chat template cannot be used.
    """
    return ChatEncoder(tokenizer, DataConfig.model_validate({"train": "-"}), stop_ids(tokenizer))


def _shown(messages: Sequence[Message]) -> list[Message]:
    """Messages as templates get them: without what says how they are trained."""
    return [
        message if _OURS.isdisjoint(message) else {key: message[key] for key in message if key not in _OURS}
        for message in messages
    ]


_OURS = frozenset(OURS)


def _keys_read(template: Any) -> tuple[str, ...]:
    """Names that a template takes of a message or of anything else: `m.prefix`, `m['prefix']`, `m.get('prefix')`."""
    text = "\n".join(template.values()) if isinstance(template, dict) else template or ""
    own = {"loop", *re.findall(r"(\w+)\s*=\s*namespace\(", text)}
    found = {name for owner, name in re.findall(r"(\w+)\.(\w+)", text) if owner not in own}
    found |= set(re.findall(r"(?:\[|get\()\s*['\"](\w+)['\"]", text))
    return tuple(sorted(found))


def _sources(config: DataConfig) -> list[Any]:
    return [*config.train, *config.eval.values()]


def _no_template(tokenizer: Tokenizer) -> MaskError:
    known = tokenizer.get_vocab()
    return MaskError(
        f"the tokenizer {tokenizer.name_or_path} has no chat template; give one as data.chat_template: a Jinja file, "
        f"or one of ours by its name: {that_suit(known.__contains__)} (docs/templates_named.md shows what they write)",
        "no-template",
    )
