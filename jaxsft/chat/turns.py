"""Which characters of a rendered conversation the model must produce, turn by turn, for any chat template.

In: a conversation whose characters are marked with the message that they come from. Out: `View`s: texts, each of which
becomes one example, with the stretches of it that are trained.

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

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxsft.chat.exchanges import last_exchange
from jaxsft.chat.habits import habits_of, writes_within
from jaxsft.chat.layout import Layout
from jaxsft.chat.likeness import header_end, similar_end, whole_length
from jaxsft.chat.lost import check_answer, check_shown
from jaxsft.chat.provenance import TEMPLATE, Traced
from jaxsft.chat.starts import Begin, MaskError, Question, find_begin, make_question
from jaxsft.chat.template import GENERATED, REASONING, ChatTemplate, TemplateError, Traceable
from jaxsft.chat.thinking import check_thinking, thinks
from jaxsft.rows.items import Conversation


class Turn(NamedTuple):
    """A trained turn in the text of a view, in characters."""

    message: int
    seam: int
    """Where the text of its prompt ends; a header that the prompt lacks comes behind it."""
    start: int
    content_end: int
    stop: tuple[int, int] | None
    """Where the text of its stop token stands; None where the template writes none."""
    weight: float
    seen_only: tuple[tuple[int, int], ...]
    """Parts that are not trained though they are the model's: reasoning, where only the answer is trained."""
    found_by: str
    """How its start was found, one of `FOUND_BY`."""
    appended: str | None = None
    """The stop token that it should have had: what the template writes after other answers; None where it writes
    none."""


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
    prompts: dict[int, str]
    """By message, the prompt that asks for it, where there is one."""

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
        self._template, self.name = template, name
        self._train_on, self._train_reasoning, self._unroll = train_on, train_reasoning, unroll
        longest_first = sorted(stop_texts, key=len, reverse=True)
        self.stop = re.compile("|".join(re.escape(text) for text in longest_first) or r"(?!)")
        self.habits = habits_of(template, longest_first)
        headers = {header for header in (self.habits.header, self.habits.past_header) if header.strip()}
        self.headers = sorted(headers, key=len, reverse=True)
        ends = [text for text in longest_first if not writes_within(self.habits, text)]
        self._part_end = re.compile("|".join(map(re.escape, ends)) or r"(?!)")
        """Stop tokens that end a part of a turn: not those that the template also writes behind reasoning."""
        self.closing = self.habits.after[: whole_length(self.habits.after, self.habits.between)]
        """What it writes after every answer, whatever comes next."""
        self.writes_stop = self.stop.search(self.habits.after) is not None
        self.usual_stop = self._stop_in(self.habits.between)
        """The stop token that it writes between an answer and the next question; None where there is none."""

    def views(self, conversation: Conversation, traceable: Traceable) -> tuple[list[View], int]:
        """The examples of a conversation as texts, and the number of turns that had to be left out (`unroll: never`).

        Raises:
            MaskError: the template refuses the messages or drops a part of them, or where a turn begins or ends cannot
                be shown.
        """
        weights = self._weights(conversation)
        full = self._layout(traceable, len(conversation.messages))
        if self._trains_all(conversation):
            views, left_out = [View(full, [self._whole(conversation, traceable, full)], False, [full], {})], 0
        else:
            views, left_out = self._turn_views(conversation, traceable, full, weights)
        check_shown(conversation, traceable, [full, *(view.layout for view in views)], name=self.name)
        return views, left_out

    def _turn_views(
        self, conversation: Conversation, traceable: Traceable, full: Layout, weights: dict[int, float]
    ) -> tuple[list[View], int]:
        together: list[Turn] = []
        alone: list[View] = []
        prompts: dict[int, str] = {}
        left_out = 0
        for index, weight in weights.items():
            if conversation.messages[index]["role"] != "assistant":
                together.append(self._spoken(index, full, weight))
                continue
            is_last = index == len(conversation.messages) - 1
            prompt = self._prompt(traceable, index)
            if prompt is not None:
                prompts[index] = prompt
            shown = full if is_last else self._shown(traceable, index, full)
            question = self._question(traceable, index, prompt, shown)
            if prompt is not None and thinks(traceable, index):
                check_thinking(index, shown, question.make_prompt_layout(), self.habits, name=self.name)
            turn = self._turn(traceable, question, weight)
            is_alone = turn.stop is None or turn.found_by == "moved" or self._unroll == "always"
            if shown is full and is_alone and not is_last:
                # Rendered again without the messages after it.
                shown = self._shown(traceable, index, None)
                turn = self._turn(traceable, self._question(traceable, index, prompt, shown), weight)
            check_answer(traceable, index, shown, with_reasoning=self._train_reasoning, name=self.name)
            if turn.found_by == "moved":
                later, view = None, self._joined(traceable, shown, turn, prompts)
            else:
                later = turn if shown is full else self._later(turn, shown, full)
                view = View(shown, [turn], True, [shown], prompts)
            if later is not None and self._unroll != "always":
                together.append(later)
            elif self._unroll == "never" and not is_last:
                left_out += 1
            else:
                alone.append(view)
        views = ([View(full, together, False, [full], prompts)] if together else []) + alone
        if not views:
            raise MaskError("no turn is left that can be trained in one render; data.unroll=auto trains all", "mask")
        return sorted(views, key=lambda view: view.turns[0].message), left_out

    def _joined(self, traceable: Traceable, shown: Layout, turn: Turn, prompts: dict[int, str]) -> View:
        """The turn behind its true prompt, where no render has both."""
        prompt = self._prompt_layout(traceable, turn.message)
        shift = len(prompt.text) - turn.seam
        layout = Layout(prompt.text + shown.text[turn.seam :], traceable, shown.num_messages)
        moved = turn._replace(
            seam=len(prompt.text),
            start=turn.start + shift,
            content_end=turn.content_end + shift,
            stop=turn.stop and (turn.stop[0] + shift, turn.stop[1] + shift),
            seen_only=tuple((start + shift, end + shift) for start, end in turn.seen_only),
        )
        return View(layout, [moved], True, [prompt, shown], prompts)

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
        if train_on == "last_exchange":
            since = last_exchange(conversation.messages)
            weights = {index: weight for index, weight in weights.items() if index >= since}
        if not weights:
            raise MaskError("no turn of this row is trained", "nothing-trained")
        return weights

    def _trains_all(self, conversation: Conversation) -> bool:
        return (conversation.train_on or self._train_on) == "all"

    def _whole(self, conversation: Conversation, traceable: Traceable, full: Layout) -> Turn:
        last = len(conversation.messages) - 1
        speech = full.speech(last)
        end = speech[1] if speech else len(full.text)
        is_answer = conversation.messages[last]["role"] == "assistant"
        stop = self._find_stop(full, end, last) if is_answer else (len(full.text), len(full.text))
        appended = None if stop else self._other_stop(traceable, last, full)
        return Turn(last, 0, 0, end, stop, conversation.weight, (), "all", appended)

    def _spoken(self, index: int, full: Layout, weight: float) -> Turn:
        """A trained turn of another role: what it says and, where the template ends it with one, its stop token."""
        speech = full.speech(index)
        if speech is None:
            raise MaskError(
                f"message {index + 1}: it is to be trained, but {self.name} shows nothing of it", "field-absent"
            )
        stop = self._find_stop(full, speech[1], index) or (speech[1], speech[1])
        return Turn(index, speech[0], speech[0], speech[1], stop, weight, (), "content")

    def _turn(self, traceable: Traceable, question: Question, weight: float) -> Turn:
        index, shown = question.message, question.shown
        speech = shown.speech(index)
        try:
            begin = find_begin(question)
            is_early = speech and speech[0] < begin.start
            if speech and not is_early and shown.end_before(index) > speech[0]:
                asked = [shown.speech(before) for before in range(index)]
                is_early = any(each and each[0] > speech[0] for each in asked)
            if is_early and begin.found_by != "prompt":
                raise MaskError(f"message {index + 1} (assistant): {self.name} shows it before what it answers")
        except MaskError:
            # The template's author may say what we cannot see.
            tagged = [start for start, end in shown.generated if speech and start <= speech[0] < end]
            if not tagged:
                raise
            begin = Begin(tagged[0], tagged[0], "tags")
        content_end = max(begin.start, speech[1]) if speech else begin.start
        lead = self.habits.lead.rstrip()
        if speech is None and lead and str.startswith(shown.text, lead, begin.start):
            content_end += len(lead)  # An empty thought is all that an empty answer says.
        seen_only = () if self._train_reasoning else shown.reasoning(index)
        seen_only += self._headers_within(index, shown)
        stop = self._find_stop(shown, content_end, index)
        turn = Turn(index, begin.seam, begin.start, content_end, stop, weight, seen_only, begin.found_by)
        return turn if stop else turn._replace(appended=self._other_stop(traceable, index, shown))

    def _headers_within(self, index: int, shown: Layout) -> tuple[tuple[int, int], ...]:
        """Headers inside of a turn that follow a stop token: the model ends there, and whoever goes on writes them.

        A call after words may stand in a section of its own. Behind reasoning the model goes on by itself.
        """
        found: list[tuple[int, int]] = []
        for (_, end, before), (start, _, _) in itertools.pairwise(shown.parts(index)):
            stop = self._part_end.search(shown.text, end, start) if before.field != REASONING else None
            if stop is not None:
                gap = str.__getitem__(shown.text, slice(stop.end(), start))
                length = next((at for header in self.headers if (at := _end_in(header, gap))), None)
                if length:
                    found.append((stop.end(), stop.end() + length))
        return tuple(found)

    def _other_stop(self, traceable: Traceable, index: int, shown: Layout) -> str | None:
        """What the template writes after the other answers of a conversation, or after answers in general.

        Calls may end with another token than words do.
        """
        full = self._layout(traceable, len(traceable.messages))
        is_call = shown.ends_with(index) == "tool call"
        for other in reversed(range(len(traceable.messages))):
            speech = full.speech(other)
            if other == index or traceable.messages[other]["role"] != "assistant" or speech is None:
                continue
            if (full.ends_with(other) == "tool call") == is_call:
                stop = self._stop_in(full.text[speech[1] : full.next_other(speech[1], other)])
                if stop is not None:
                    return stop
        return (self._stop_in(self.habits.after_call) if is_call else None) or self.usual_stop

    def _stop_in(self, text: Traced) -> str | None:
        """The first stop token's text, if the template writes all of it: a role's word in it is the next header's."""
        found = self.stop.search(text)
        if found is None or any(run[1] & ~GENERATED != TEMPLATE for run in text[found.start() : found.end()].runs):
            return None
        return found.group()

    def _question(self, traceable: Traceable, index: int, prompt: str | None, shown: Layout) -> Question:
        layout: list[Layout] = []

        def prompt_layout() -> Layout:
            if not layout:
                layout.append(self._prompt_layout(traceable, index))
            return layout[0]

        def headers() -> Iterator[str]:
            for other in range(1, len(traceable.messages)):
                if other != index and traceable.messages[other]["role"] == "assistant":
                    try:
                        asked = self._prompt_layout(traceable, other)
                    except TemplateError:
                        continue
                    tail = str.__getitem__(asked.text, slice(asked.data[-1][1] if asked.data else 0, None))
                    stop = self.stop.match(tail.lstrip())
                    yield tail.lstrip()[stop.end() :] if stop else tail

        return make_question(
            index,
            shown,
            prompt,
            make_prompt_layout=prompt_layout,
            make_headers=headers,
            habits=self.habits,
            name=self.name,
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
        except TemplateError as error:
            if full is None:
                raise MaskError(
                    f"message {index + 1} (assistant): {self.name} refuses the conversation that ends with it, and "
                    f"with what follows it cannot be trained: {error}",
                    "template-refuses",
                ) from error
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
        found = self.stop.search(layout.text, content_end, layout.next_other(content_end, message))
        return found.span() if found else None

    def _layout(self, traceable: Traceable, num_messages: int) -> Layout:
        try:
            return Layout(self._template.render(traceable, num_messages), traceable, num_messages)
        except TemplateError as error:
            raise MaskError(f"{self.name} refuses this conversation: {error}", "template-refuses") from error


def _end_in(header: str, gap: str) -> int | None:
    """Where in a text a header ends, or one like it of another role."""
    at = gap.rfind(header.strip())
    return header_end(header, gap, at) if at >= 0 else similar_end(header, gap)
