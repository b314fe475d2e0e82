"""Conversations of one shape are drawn once: what is found out about the first holds for all, but for their contents.

In: conversations of roles and contents alone. Out: their texts and trained turns, put together from those of another
conversation with the same roles, where it is proven that the template and all that looks at its text do the same with
both; and None where it is not: then all is found out anew (`turns.py`).

    of    user "Hi", assistant "Yo"      <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nYo<|im_end|>\\n
    to    user "A?", assistant "No."     <|im_start|>user\\nA?<|im_end|>\\n<|im_start|>assistant\\nNo.<|im_end|>\\n

The proof. `symbols.py` renders the first conversation and tells which contents the text consists of, how they were
trimmed, and what the template asked about them: it does the same with every conversation that gives the same answers.
Where a turn begins and ends is then found in what stands between contents (`gaps`), by comparing prompts with texts; so
the prompt of each turn must be what the text begins with, content by content, and a render that is not must differ in a
gap. All else (other ways to begin, reasoning, calls, tools, parts, tokens to be appended) is not for a skeleton. The
text of every row is still compared with what transformers renders, and its weights get the same last look.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxsft.chat.metered import PASSES, TemplateHogs, allowance
from jaxsft.chat.symbols import Guard, Symbol, Watch, Watched, WatchingEnvironment, watched
from jaxsft.chat.template import ChatTemplate, TemplateError, Traceable
from jaxsft.chat.thinking import USUAL_TAGS
from jaxsft.chat.turns import Turn, View
from jaxsft.chat.weighing import Drawn
from jaxsft.rows.items import Conversation
from jaxsft.rows.messages import Message

Shape = tuple[Any, ...]
"""All of a conversation but its contents."""

_MOST = 512
"""Shapes that are kept; conversations with many turns have as many shapes as there are of them."""


class Place(NamedTuple):
    """A place in a text: behind so many contents, and so many characters of what stands between them."""

    contents: int
    characters: int


class _Pieces(NamedTuple):
    """A text: a gap, a content, a gap, a content, ..., a gap."""

    gaps: list[str]
    symbols: list[Symbol]

    def begins(self, other: "_Pieces") -> bool:
        """Whether the other text begins with this one, whatever the contents are."""
        last = len(self.symbols)
        return (
            self.symbols == other.symbols[:last]
            and self.gaps[:-1] == other.gaps[:last]
            and other.gaps[last].startswith(self.gaps[-1])
        )

    def parts_from(self, other: "_Pieces") -> Place | None:
        """Where two texts differ first, whatever the contents are; None where that depends on them."""
        before = 0
        for at, (mine, theirs) in enumerate(zip(self.gaps, other.gaps, strict=False)):
            same = next((i for i, (one, two) in enumerate(zip(mine, theirs, strict=False)) if one != two), None)
            if same is not None:
                return Place(at, before + same)
            if mine != theirs or self.symbols[at : at + 1] != other.symbols[at : at + 1]:
                return None
            before += len(mine)
        return None


class _Example(NamedTuple):
    """One text of the conversations of a shape."""

    num_messages: int
    parts: list[str]
    """Gaps, and between them places for the contents."""
    symbols: list[int]
    """Which of the skeleton's symbols go there."""
    trust: list[bytes]
    """As `parts`, of each character; of contents that of each of their characters."""
    writers: list[bytes]
    turns: list[tuple[Turn, tuple[Place, ...]]]
    """Trained turns, and where each has its seam, its start, the end of its content, and its stop token."""
    free: list[tuple[Place, Place]] | None
    is_unrolled: bool


class _Skeleton(NamedTuple):
    symbols: list[tuple[int, Symbol]]
    """With the index of the message that each is the content of."""
    guards: list[tuple[int, Guard]]
    examples: list[_Example]
    last_message: int


class Skeletons:
    """What is known of the shapes of conversations, for one template; picklable."""

    def __init__(self, template: ChatTemplate, *, stop_texts: Sequence[str], unroll: str) -> None:
        """
        Args:
            template: of the conversations.
            stop_texts: of tokens that end an answer: a content that ends with one is not taken as it is.
            unroll: of the config.
        """
        self._template, self._stop_texts, self._unroll = template, tuple(stop_texts), unroll
        self._known: dict[Shape, _Skeleton | None] = {}
        self._seen: set[Shape] = set()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_known": {}, "_seen": set()}

    def shape(self, conversation: Conversation) -> Shape | None:
        """All of a conversation but its contents; None where it is more than roles and contents."""
        if conversation.tools is not None or conversation.template_kwargs:
            return None
        shape: list[Any] = [conversation.trained_from, conversation.weight, conversation.train_on]
        for message in conversation.messages:
            role, content = message["role"], message.get("content")
            if type(content) is not str or not content:
                return None
            if len(message) > 2:
                if not message.keys() <= _SIMPLE:
                    return None
                shape.append((role, message.get("weight"), message.get("train")))
            else:
                shape.append(role)
            if role == "assistant" and (USUAL_TAGS[1] in content or content.rstrip().endswith(self._stop_texts)):
                return None
        return tuple(shape)

    def wants(self, shape: Shape) -> bool:
        """Whether a skeleton is to be made of a shape: not at its first conversation, which may be the only one."""
        if shape in self._known:
            return False
        if shape in self._seen:
            return True
        if len(self._seen) >= 8 * _MOST:
            self._seen.clear()
        self._seen.add(shape)
        return False

    def draw(
        self, shape: Shape, conversation: Conversation, look: Callable[[int], Any]
    ) -> list[tuple[int, Drawn]] | None:
        """The examples of a conversation, each with how many messages are in it; None where it has to be found out.

        Args:
            shape: of the conversation.
            conversation: what is drawn.
            look: finds out what the last look is told of one of the examples, by its number.
        """
        skeleton = self._known.get(shape)
        if skeleton is None:
            return None
        values = []
        for message, symbol in skeleton.symbols:
            value = conversation.messages[message]["content"]
            for method, chars in symbol.trims:
                value = getattr(value, method)(chars)
            if not value:
                return None
            values.append(value)
        for at, guard in skeleton.guards:
            if bool(getattr(values[at], guard.method)(*guard.arguments)) != guard.answer:
                return None
        return [
            (each.num_messages, _filled(each, values, skeleton.last_message, functools.partial(look, number)))
            for number, each in enumerate(skeleton.examples)
        ]

    def learn(self, shape: Shape, traceable: Traceable, views: Sequence[View], drawn: Sequence[Drawn]) -> None:
        """Makes a skeleton of a conversation that was drawn, or remembers that there is none of its shape."""
        if len(self._known) >= _MOST:
            self._known.clear()
        try:
            self._known[shape] = self._made(traceable, views, drawn)
        except (TemplateError, TemplateHogs):
            self._known[shape] = None

    def _made(self, traceable: Traceable, views: Sequence[View], drawn: Sequence[Drawn]) -> _Skeleton | None:
        watch = Watch()
        messages = _watched_messages(traceable, watch)
        num_messages = len(messages)

        @functools.cache
        def pieces(number: int, prompt: bool) -> _Pieces | None:
            return self._pieces(messages[:number], watch, prompt=prompt)

        if not all(len(view.renders) == 1 and not view.layout.is_prompt for view in views):
            return None
        full = pieces(num_messages, False)
        contents = {number for number, source in enumerate(traceable.sources, 1) if source.field == "content"}
        if full is None or contents - {symbol.source for symbol in full.symbols}:
            return None
        examples = []
        for view, each in zip(views, drawn, strict=True):
            own = pieces(view.layout.num_messages, False)
            if own is None or not all(self._is_plain(turn, view, own, full, pieces, traceable) for turn in view.turns):
                return None
            example = _example(view, each, own, traceable, watch)
            if example is None:
                return None
            examples.append(example)
        if not watch.is_followed:
            return None
        return _Skeleton(
            [(traceable.sources[symbol.source - 1].message, symbol) for symbol in watch.symbols],
            [(watch.symbols.index(guard.symbol), guard) for guard in watch.guards],
            examples,
            drawn[0].last_message,
        )

    def _pieces(self, messages: list[Message], watch: Watch, *, prompt: bool) -> _Pieces | None:
        """What a render consists of; None where that cannot be followed, or where it takes long."""
        passes = watch.num_passes
        # What it costs beside the contents fits into the least allowance, and how often they are passed on into what
        # each of their characters is allowed: so it fits into that of any conversation of the shape.
        text = self._template.render_with(WatchingEnvironment, messages, allowance=allowance(0, 0), prompt=prompt)
        if not watch.is_followed or not isinstance(text, Watched) or watch.num_passes - passes > PASSES:
            return None
        return _pieces_of(text, watch)

    def _is_plain(
        self,
        turn: Turn,
        view: View,
        own: _Pieces,
        full: _Pieces,
        pieces: Callable[[int, bool], _Pieces | None],
        traceable: Traceable,
    ) -> bool:
        """Whether a turn is found in the same way whatever the contents are."""
        if turn.seen_only or turn.stop is None or turn.appended is not None:
            return False
        is_answer = traceable.messages[turn.message]["role"] == "assistant"
        if turn.found_by == "all" or not is_answer:
            return own is full  # Found by what follows it in its gap.
        prompt, shown = pieces(turn.message, True), pieces(turn.message + 1, False)
        is_asked = turn.found_by == "prompt" and turn.seam == turn.start == len(view.prompts.get(turn.message, ""))
        if not is_asked or prompt is None or shown is None or not prompt.begins(own):
            return False
        if shown is full or shown.begins(full):
            return own is full or (own is shown and self._unroll == "always")
        parting = shown.parts_from(full)
        if parting is None or own not in (shown, full):
            return False
        # The whole conversation shows the turn as it was said if they part behind it, and not if they part before.
        lengths = [0, *itertools.accumulate(map(len, _values(own.symbols, traceable)))]
        is_behind = lengths[parting.contents] + parting.characters >= turn.stop[1]
        return is_behind == (own is full)


_SIMPLE = {"role", "content", "weight", "train"}


def _watched_messages(traceable: Traceable, watch: Watch) -> list[Message]:
    """The messages, with contents that tell what is done to them."""
    numbers = {source.message: at for at, source in enumerate(traceable.sources, start=1) if source.field == "content"}

    def content(index: int, text: str) -> Watched:
        return watched(str.__str__(text), Symbol(numbers[index], ()), watch)

    found = []
    for index, message in enumerate(traceable.messages):
        inner = message["content"]
        if isinstance(inner, list):  # Blocks of text, which some templates take.
            inner = [{**block, "text": content(index, block["text"])} for block in inner]
        else:
            inner = content(index, inner)
        found.append({**message, "content": inner})
    return found


def _pieces_of(text: Watched, watch: Watch) -> _Pieces:
    plain, gaps, symbols, at = str.__str__(text), [""], [], 0
    for length, source, _ in text.runs:
        symbol = watch.symbol(source)
        if symbol is None:
            gaps[-1] += plain[at : at + length]
        else:
            symbols.append(symbol)
            gaps.append("")
        at += length
    return _Pieces(gaps, symbols)


def _values(symbols: Sequence[Symbol], traceable: Traceable) -> list[str]:
    """Contents as they are shown."""
    found = []
    for symbol in symbols:
        value = traceable.sources[symbol.source - 1].text
        for method, chars in symbol.trims:
            value = getattr(value, method)(chars)
        found.append(value)
    return found


def _example(view: View, drawn: Drawn, own: _Pieces, traceable: Traceable, watch: Watch) -> _Example | None:
    """What a text of the shape is made of; None where it is more than a skeleton can say."""
    values = _values(own.symbols, traceable)
    parts = _between(own.gaps, values)
    if "".join(parts) != drawn.text or drawn.parts is not None or any(drawn.counts.values()):
        return None
    bounds = [0, *itertools.accumulate(map(len, parts))]
    lengths = [0, *itertools.accumulate(map(len, values))]

    def place(at: int) -> Place | None:
        """None inside of a content, where no turn begins or ends by what is written around it."""
        gaps = zip(bounds[::2], bounds[1::2], lengths, strict=True)
        return next((Place(i, at - before) for i, (start, end, before) in enumerate(gaps) if start <= at <= end), None)

    turns = []
    for turn in drawn.turns:
        assert turn.stop is not None
        turns.append((turn, tuple(map(place, (turn.seam, turn.start, turn.content_end, *turn.stop)))))
    free = None if drawn.free is None else [(place(start), place(end)) for start, end in drawn.free]
    if any(None in places for _, places in turns) or any(None in places for places in free or ()):
        return None
    trust, writers = (
        [each[start:end] if at % 2 == 0 else each[start : start + 1] for at, (start, end) in enumerate(pairs)]
        for each in (drawn.trust, drawn.writers)
        for pairs in [list(itertools.pairwise(bounds))]
    )
    numbers = [watch.symbols.index(symbol) for symbol in own.symbols]
    return _Example(
        view.layout.num_messages,
        parts,
        numbers,
        trust,
        writers,
        turns,  # type: ignore[arg-type]  # none of the places is None
        free,  # type: ignore[arg-type]
        drawn.is_unrolled,
    )


def _between(gaps: Sequence[Any], contents: Sequence[Any]) -> list[Any]:
    """A gap, a content, a gap, a content, ..., a gap."""
    parts: list[Any] = [""] * (len(gaps) + len(contents))
    parts[::2], parts[1::2] = gaps, contents
    return parts


def _filled(example: _Example, values: Sequence[str], last_message: int, look: Callable[[], Any]) -> Drawn:
    """The example of the shape with these contents."""
    own = [values[at] for at in example.symbols]
    sizes = [len(value) for value in own]
    before = [0, *itertools.accumulate(sizes)]
    parts, trust, writers = example.parts.copy(), example.trust.copy(), example.writers.copy()
    parts[1::2] = own
    trust[1::2] = map(operator.mul, trust[1::2], sizes)
    writers[1::2] = map(operator.mul, writers[1::2], sizes)
    turns = []
    for turn, places in example.turns:
        seam, start, content_end, stop_start, stop_end = [before[j] + at for j, at in places]
        stop = stop_start, stop_end
        turns.append(Turn(turn.message, seam, start, content_end, stop, turn.weight, (), turn.found_by))
    free = None
    if example.free is not None:
        free = [(before[i] + start, before[j] + end) for (i, start), (j, end) in example.free]
    return Drawn(
        "".join(parts),
        turns,
        example.is_unrolled,
        b"".join(trust),
        b"".join(writers),
        {},
        None,
        last_message,
        free,
        look,
    )
