"""Which characters of a rendered conversation the model must produce, turn by turn, for any chat template.

Three renders say it, and nothing is known of any template's markup:

    prompt = messages[:i], add_generation_prompt      what the model is given before turn i
    shown  = messages[:i + 1]                         turn i as it is when it has just been said
    full   = all messages                             turn i as it is seen later

A turn is trained from where its prompt ends in `shown` through the stop token that follows its last character.
Where `full` begins with the same text, the turn is trained there, beside all others of which that holds. Where it does
not (thinking that is stripped) the turn is unrolled: `shown` becomes an example of its own. And where no render begins
with the prompt (a system text that only prompts show), the example is the prompt and, behind it, the answer.
The characters themselves name the message they come from (`provenance.py`), so what is compared is never searched for.

    prompt  <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n
    shown   <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
                                                                  ^^^^^^^^^^^^^^^      trained
"""

import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from jaxsft.data.formats import Conversation
from jaxsft.data.habits import habits_of, parting
from jaxsft.data.layout import SPEECH, Layout
from jaxsft.data.provenance import Traced
from jaxsft.data.sources import DataError
from jaxsft.data.template import REASONING, TOOLS, ChatTemplate, TemplateError, Traceable


class MaskError(DataError):
    """It cannot be shown which tokens of a row the model must produce; says why, and what would help."""

    def __init__(self, reason: str, code: str = "mask") -> None:
        super().__init__(reason)
        self.code = code


class Turn(NamedTuple):
    """A trained turn in the text of a view, in characters."""

    message: int
    start: int
    content_end: int
    stop: tuple[int, int] | None
    """Where the text of its stop token stands; None where the template writes none."""
    weight: float
    seen_only: tuple[tuple[int, int], ...]
    """Parts that are not trained though they are the model's: reasoning, where only the answer is trained."""
    found_by: str
    """How its start was found, one of `FOUND_BY`."""


FOUND_BY = {
    "prompt": "the text begins with the prompt",
    "header": "the prompt lacks the header that the template writes before an answer; the header was left out",
    "parting": "the prompt ends with text that the conversation lacks; trained from where the two part",
    "moved": "no render has the past as the prompt has it: the example is the prompt, and the answer behind it",
    "tags": "the template's own {% generation %}",
    "content": "there is no prompt to it (another role, or nothing precedes it): trained from its first character",
    "all": "everything is trained",
}


class View(NamedTuple):
    """One text of a conversation and the turns that are trained in it: one example."""

    layout: Layout
    turns: list[Turn]
    is_unrolled: bool
    renders: list[Layout]
    """What the text is made of: one render, or a prompt and the render that the answer to it is taken from."""

    @property
    def text(self) -> Traced:
        return self.layout.text


class TurnFinder:
    """Finds the trained turns of conversations for one template."""

    def __init__(
        self,
        template: ChatTemplate,
        *,
        stop_texts: Sequence[str],
        train_on: str | Sequence[str],
        train_reasoning: bool,
        unroll: str,
        name: str,
    ) -> None:
        self._template, self._name = template, name
        self._train_on, self._train_reasoning, self._unroll = train_on, train_reasoning, unroll
        longest_first = sorted(stop_texts, key=len, reverse=True)
        self._stop = re.compile("|".join(re.escape(text) for text in longest_first) or r"(?!)")
        self.habits = habits_of(template)
        self.closing = os.path.commonprefix([self.habits.after, self.habits.between])
        """What it writes after every answer, whatever comes next."""
        self.writes_stop = self._stop.search(self.habits.after) is not None

    def views(self, conversation: Conversation, traceable: Traceable) -> tuple[list[View], int]:
        """The examples of a conversation as texts, and the number of turns that had to be left out (`unroll: never`).

        Raises:
            MaskError: the template refuses the messages or drops a part of them, or where a turn begins or ends cannot
                be shown.
        """
        weights = self._weights(conversation)
        full = self._layout(traceable, len(conversation.messages))
        if self._trains_all(conversation):
            views, left_out = [View(full, [self._whole(conversation, full)], False, [full])], 0
        else:
            views, left_out = self._turn_views(conversation, traceable, full, weights)
        self._check_shown(conversation, traceable, [full, *(view.layout for view in views)])
        return views, left_out

    def _turn_views(
        self, conversation: Conversation, traceable: Traceable, full: Layout, weights: dict[int, float]
    ) -> tuple[list[View], int]:
        together: list[Turn] = []
        alone: list[View] = []
        left_out = 0
        for index, weight in weights.items():
            if conversation.messages[index]["role"] != "assistant":
                together.append(self._spoken(index, full, weight))
                continue
            is_last = index == len(conversation.messages) - 1
            prompt = self._prompt(traceable, index)
            shown = full if is_last else self._shown(traceable, index, full)
            turn = self._turn(traceable, index, prompt, shown, weight)
            is_alone = turn.stop is None or turn.found_by == "moved" or self._unroll == "always"
            if shown is full and is_alone and not is_last:
                # Without what comes after it.
                shown = self._shown(traceable, index, None)
                turn = self._turn(traceable, index, prompt, shown, weight)
            self._check_answer(traceable, index, shown)
            if turn.found_by == "moved":
                later, view = None, self._joined(traceable, shown, turn)
            else:
                later = turn if shown is full else self._later(turn, shown, full)
                view = View(shown, [turn], True, [shown])
            if later is not None and self._unroll != "always":
                together.append(later)
            elif self._unroll == "never" and not is_last:
                left_out += 1
            else:
                alone.append(view)
        views = ([View(full, together, False, [full])] if together else []) + alone
        if not views:
            raise MaskError("no turn is left that can be trained in one render; data.unroll=auto trains all", "mask")
        return sorted(views, key=lambda view: view.turns[0].message), left_out

    def _joined(self, traceable: Traceable, shown: Layout, turn: Turn) -> View:
        """The turn behind its true prompt, where no render has both."""
        prompt = self._prompt_layout(traceable, turn.message)
        shift = len(prompt.text) - turn.start
        layout = Layout(prompt.text + shown.text[turn.start :], traceable, shown.num_messages)
        moved = turn._replace(
            start=len(prompt.text),
            content_end=turn.content_end + shift,
            stop=turn.stop and (turn.stop[0] + shift, turn.stop[1] + shift),
            seen_only=tuple((start + shift, end + shift) for start, end in turn.seen_only),
        )
        return View(layout, [moved], True, [prompt, shown])

    def _weights(self, conversation: Conversation) -> dict[int, float]:
        """Index and weight of each message that is trained, in order."""
        train_on = conversation.train_on or self._train_on
        roles = ("assistant",) if isinstance(train_on, str) else tuple(train_on)
        weights = {}
        for index, message in enumerate(conversation.messages):
            is_trained = message.get("train", message["role"] in roles)
            weight = float(is_trained) * message.get("weight", 1.0) * conversation.weight
            if weight > 0 and index >= conversation.trained_from:
                weights[index] = weight
        if train_on == "last_turn":
            last = max((i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"), default=-1)
            weights = {last: weights[last]} if last in weights else {}
        if not weights:
            raise MaskError("no turn of this row is trained", "nothing-trained")
        return weights

    def _trains_all(self, conversation: Conversation) -> bool:
        return (conversation.train_on or self._train_on) == "all"

    def _whole(self, conversation: Conversation, full: Layout) -> Turn:
        last = len(conversation.messages) - 1
        speech = full.speech(last)
        end = speech[1] if speech else len(full.text)
        is_answer = conversation.messages[last]["role"] == "assistant"
        stop = self._find_stop(full, end, last) if is_answer else (len(full.text), len(full.text))
        return Turn(last, 0, end, stop, conversation.weight, (), "all")

    def _spoken(self, index: int, full: Layout, weight: float) -> Turn:
        """A trained turn of another role: what it says and, where the template ends it with one, its stop token."""
        speech = full.speech(index)
        if speech is None:
            raise MaskError(
                f"message {index + 1}: it is to be trained, but {self._name} shows nothing of it", "field-absent"
            )
        stop = self._find_stop(full, speech[1], index) or (speech[1], speech[1])
        return Turn(index, speech[0], speech[1], stop, weight, (), "content")

    def _turn(self, traceable: Traceable, index: int, prompt: str | None, shown: Layout, weight: float) -> Turn:
        speech = shown.speech(index)
        try:
            start, found_by = self._start(traceable, index, prompt, shown)
            if speech and speech[0] < start and found_by != "prompt":
                raise MaskError(f"message {index + 1} (assistant): {self._name} shows it before what it answers")
        except MaskError:
            # The template's author may say what we cannot see.
            tagged = [start for start, end in shown.generated if speech and start <= speech[0] < end]
            if not tagged:
                raise
            start, found_by = tagged[0], "tags"
        content_end = max(start, speech[1]) if speech else start
        seen_only = () if self._train_reasoning else shown.reasoning(index)
        return Turn(index, start, content_end, self._find_stop(shown, content_end, index), weight, seen_only, found_by)

    def _start(self, traceable: Traceable, index: int, prompt: str | None, shown: Layout) -> tuple[int, str]:
        """Where the text of a turn's prompt ends in `shown`."""
        speech = shown.speech(index)
        text = str.__str__(shown.text)
        past = shown.end_before(index)
        header = self.habits.header
        start, found_by = past, "header"
        if prompt is not None and text.startswith(prompt):
            start, found_by = len(prompt), "prompt"
        elif prompt is not None:
            # What follows the past in the prompt, and what follows it here: the end of that message, and the header.
            end = self._prompt_layout(traceable, index).end_before(index)
            tail = prompt[end:]
            gap = text[past : speech[0]] if speech else text[past:]
            start = past + parting(tail, gap)
            gap = text[start : speech[0]] if speech else text[start:]
            if header.strip() and header in gap:  # The end of the message before it differs, too.
                start += gap.rindex(header) + len(header)
            # The same past but for blanks, and only the prompt has more of it: thinking that it begins, for instance.
            is_same = "".join(prompt.split()).startswith("".join(text[:start].split()))
            found_by = "parting" if is_same else "moved"
        gap = text[start : speech[0]] if speech else text[start:]
        if found_by == "prompt" and header.strip() and gap.startswith(header):
            return start + len(header), "header"  # A prompt after this kind of message has none.
        if not gap.strip() or not (self.habits.ignores_prompt or prompt is None):
            return start, found_by
        # The header is not in the prompt: what the template writes before an answer in general is the header here.
        if header.strip() and header in gap:
            return start + gap.rindex(header) + len(header), "header"
        if header.strip() and (same := len(os.path.commonprefix([header, gap]))):
            return start + same, "header" if found_by == "prompt" else found_by
        if prompt is not None and not header.strip():
            return start, found_by
        if prompt is None and speech is not None:
            return speech[0], "content"
        raise MaskError(
            f"message {index + 1} (assistant): where it begins cannot be told: {self._name} writes {gap[-60:]!r} "
            f"before it, which is neither in the prompt nor its usual header {header!r}"
        )

    def _prompt(self, traceable: Traceable, index: int) -> str | None:
        """The prompt of a turn; None where there is none to render, as before the first message."""
        if index == 0:
            return None
        try:
            return self._template.render_plain(traceable, index, prompt=True)
        except TemplateError:
            return None

    def _prompt_layout(self, traceable: Traceable, index: int) -> Layout:
        return Layout(self._template.render(traceable, index, prompt=True), traceable, index, prompt=True)

    def _shown(self, traceable: Traceable, index: int, full: Layout | None) -> Layout:
        """The turn as the last message; `full` itself where that begins with the very same text."""
        try:
            if full is not None:
                text = self._template.render_plain(traceable, index + 1)
                speech = full.speech(index)
                if full.text.startswith(text) and (speech is None or speech[1] <= len(text)):
                    return full
            return Layout(self._template.render(traceable, index + 1), traceable, index + 1)
        except TemplateError:
            if full is None:
                raise
            return full  # It cannot be the last message: then the only way in which it is ever shown is this.

    def _later(self, turn: Turn, shown: Layout, full: Layout) -> Turn | None:
        """The turn as it stands in the whole conversation; None where that is not as it was said."""
        end = turn.stop[1] if turn.stop else turn.content_end
        if shown.text[:end] != full.text[:end]:
            return None
        stop = turn.stop or self._find_stop(full, turn.content_end, turn.message)
        return turn._replace(stop=stop) if stop else None

    def _find_stop(self, layout: Layout, content_end: int, message: int) -> tuple[int, int] | None:
        """The first stop token's text behind a turn, before anything of another message."""
        found = self._stop.search(layout.text, content_end, layout.next_other(content_end, message))
        return found.span() if found else None

    def _layout(self, traceable: Traceable, num_messages: int) -> Layout:
        try:
            return Layout(self._template.render(traceable, num_messages), traceable, num_messages)
        except TemplateError as error:
            raise MaskError(f"{self._name} refuses this conversation: {error}", "template-refuses") from error

    def _check_shown(self, conversation: Conversation, traceable: Traceable, layouts: Sequence[Layout]) -> None:
        """Refuses what the template drops: nobody could learn from it, and nobody would notice.

        Answers are checked where they are trained; later they may be shown in part.
        """
        for number, source in enumerate(traceable.sources, start=1):
            if source.message >= 0 and source.field == "content":
                role = conversation.messages[source.message]["role"]
                # The whole conversation shows nearly all of it.
                if role != "assistant" and layouts[0].missing(number):
                    missing = min((layout.missing(number) for layout in layouts), key=len)
                    if missing:
                        raise self._dropped(f"message {source.message + 1} ({role})", "content", missing)
        wanted = [str((tool.get("function") or tool).get("name") or "") for tool in conversation.tools or []]
        shown = {number for layout in layouts for number in layout.shown}
        names = {source.text for n, source in enumerate(traceable.sources, 1) if source.message == TOOLS and n in shown}
        for name in wanted:
            if name and name not in names:
                raise self._dropped("tools", "function", name)

    def _check_answer(self, traceable: Traceable, index: int, shown: Layout) -> None:
        for number, source in enumerate(traceable.sources, start=1):
            if source.message != index or source.field not in SPEECH:
                continue
            if source.field == REASONING and not self._train_reasoning:
                continue
            if missing := shown.missing(number):
                raise self._dropped(f"message {index + 1} (assistant)", source.field, missing)

    def _dropped(self, where: str, field: str, missing: str) -> MaskError:
        return MaskError(
            f"{where}: {self._name} does not show its {field} ({missing[:60]!r} is not in the text); give a template "
            f"that does as data.chat_template, or rows without it",
            "field-absent",
        )
