"""Where in a rendered text which message stands, and what of a message is not in it.

In: a text whose characters know which part of the data they come from (`provenance.py`). Out: a `Layout`, which answers
such questions by places in the text. Which characters are trained is left to `turns.py`.
"""

from jaxsft.chat.provenance import TEMPLATE, UNKNOWN, Traced
from jaxsft.chat.template import GENERATED, REASONING, TOOLS, Source, Traceable

SPEECH = ("content", REASONING, "tool call")
"""Fields of a message that somebody says; the others (role, name, ids) are about it."""


class Layout:
    """Where in a rendered text which message stands."""

    def __init__(self, text: Traced, conversation: Traceable, num_messages: int, *, prompt: bool = False) -> None:
        self.text, self.num_messages, self.is_prompt = text, num_messages, prompt
        self._sources = conversation.sources
        self.data: list[tuple[int, int, int]] = []
        """(start, end, source) of everything that is not the template's, in order."""
        self.generated: list[tuple[int, int]] = []
        """What stands inside `{% generation %}`."""
        self.shown: dict[int, list[tuple[int, int]]] = {}
        """By source, the parts of it that are shown: (first character, end) in the source."""
        self._spoken: dict[int, list[tuple[int, int, Source]]] = {}
        at = 0
        for length, marked, offset in text.runs:
            source = marked & ~GENERATED
            if marked & GENERATED:
                self.generated.append((at, at + length))
            if source not in (TEMPLATE, UNKNOWN):
                self.data.append((at, at + length, source))
                self.shown.setdefault(source, []).append((offset, offset + length))
                each = self._sources[source - 1]
                if each.field in SPEECH:
                    self._spoken.setdefault(each.message, []).append((at, at + length, each))
            at += length

    def speech(self, message: int) -> tuple[int, int] | None:
        """From the first to behind the last character of what a message says; None if it says nothing."""
        parts = self._spoken.get(message)
        return (parts[0][0], parts[-1][1]) if parts else None

    def ends_with(self, message: int) -> str:
        """The field that the last character of what a message says is of."""
        parts = self.parts(message)
        return parts[-1][2].field if parts else "content"

    def reasoning(self, message: int) -> tuple[tuple[int, int], ...]:
        """(start, end) of each part of a message's reasoning."""
        return tuple((start, end) for start, end, source in self.parts(message) if source.field == REASONING)

    def end_before(self, message: int) -> int:
        """Behind the last character that any earlier message gave to the text."""
        return max((end for _, end, source in self.data if 0 <= self._sources[source - 1].message < message), default=0)

    def others_before(self, message: int, position: int) -> int:
        """Behind the last character before `position` that others, the tools included, gave to the text."""
        others = (
            end for start, end, source in self.data if start < position and self._sources[source - 1].message != message
        )
        return max(others, default=0)

    def owners(self) -> list[tuple[int, int, int]]:
        """(message or TOOLS, start, end) of each piece of what messages contain and tools are, in order."""
        return [
            (each.message, start, end)
            for start, end, source in self.data
            if (each := self._sources[source - 1]).message >= TOOLS and each.field in ("content", "tools")
        ]

    def parts(self, message: int) -> list[tuple[int, int, Source]]:
        """(start, end, source) of each piece of what a message says, in order."""
        return self._spoken.get(message, [])

    def next_other(self, position: int, message: int) -> int:
        """Where the first character that another message or the tools say stands, from `position` on."""
        others = (
            start
            for start, _, source in self.data
            if start >= position
            and self._sources[source - 1].message != message
            and self._sources[source - 1].field != "role"  # in a header, such as <|user|>, which may be a stop
        )
        return next(others, len(self.text))

    def missing(self, source: int) -> str:
        """The first part of a source that the text does not show; blanks, and what the template writes instead, aside.

        A template may take `<think>a</think>b` apart and write the tags itself.
        """
        text = self._sources[source - 1].text
        if self.shown.get(source) == [(0, len(text))]:
            return ""
        at, pieces = 0, []
        for start, end in sorted(self.shown.get(source, [])):
            pieces.append(text[at:start])
            at = max(at, end)
        pieces.append(text[at:])
        pieces = [piece.strip() for piece in pieces if piece.strip()]
        if not pieces:
            return ""
        written = self._written()
        return next((piece for piece in pieces if at == 0 or piece not in written), "")

    def _written(self) -> str:
        """What the template itself wrote."""
        parts, at = [], 0
        for start, end, _ in self.data:
            parts.append(str.__getitem__(self.text, slice(at, start)))
            at = end
        return "\0".join([*parts, str.__getitem__(self.text, slice(at, None))])
