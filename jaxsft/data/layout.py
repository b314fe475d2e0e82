"""Where in a rendered text which message stands, and what of a message is not in it."""

from jaxsft.data.provenance import TEMPLATE, UNKNOWN, Traced
from jaxsft.data.template import GENERATED, REASONING, Traceable

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
        at = 0
        for length, marked, offset in text.runs:
            source = marked & ~GENERATED
            if marked & GENERATED:
                self.generated.append((at, at + length))
            if source not in (TEMPLATE, UNKNOWN):
                self.data.append((at, at + length, source))
                self.shown.setdefault(source, []).append((offset, offset + length))
            at += length

    def speech(self, message: int) -> tuple[int, int] | None:
        """From the first to behind the last character of what a message says; None if it says nothing."""
        parts = [part for part in self.data if self._is_speech(part[2], message)]
        return (parts[0][0], parts[-1][1]) if parts else None

    def ends_with(self, message: int) -> str:
        """The field that the last character of what a message says is of."""
        fields = [self._sources[source - 1].field for _, _, source in self.data if self._is_speech(source, message)]
        return fields[-1] if fields else "content"

    def reasoning(self, message: int) -> tuple[tuple[int, int], ...]:
        """(start, end) of each part of a message's reasoning."""
        return tuple(
            (start, end)
            for start, end, source in self.data
            if self._sources[source - 1].message == message and self._sources[source - 1].field == REASONING
        )

    def end_before(self, message: int) -> int:
        """Behind the last character that any earlier message gave to the text."""
        return max((end for _, end, source in self.data if 0 <= self._sources[source - 1].message < message), default=0)

    def next_other(self, position: int, message: int) -> int:
        """Where the first character that another message or the tools say stands, from `position` on."""
        others = (
            start
            for start, _, source in self.data
            if start >= position
            and self._sources[source - 1].message != message
            and self._sources[source - 1].field != "role"  # A word of the next header, which may be a stop: <|user|>.
        )
        return next(others, len(self.text))

    def missing(self, source: int) -> str:
        """The first part of a source that the text does not show; blanks, and what the template writes instead, aside.

        A template may take `<think>a</think>b` apart and write the tags itself.
        """
        text = self._sources[source - 1].text
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

    def _is_speech(self, source: int, message: int) -> bool:
        each = self._sources[source - 1]
        return each.message == message and each.field in SPEECH
