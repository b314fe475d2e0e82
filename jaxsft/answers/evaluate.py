"""Held-out loss and sample answers of a model.

In: a model, and sets of prepared held-out data with the conversations that they were made from. Out: token-weighted
loss, perplexity and accuracy, of each set and of all; answers to the turns of those conversations that are trained,
beside what was trained of them, both read from tokens in the same way.
"""

import functools
import json
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxsft.answers.generate import Generator
from jaxsft.batches.loader import Loader
from jaxsft.chat.control import control_tokens
from jaxsft.chat.encoder import ChatEncoder, MaskError
from jaxsft.chat.stops import token_text
from jaxsft.config import EvalConfig
from jaxsft.folders.pretrained import OpenTokenizer
from jaxsft.model.abstract import Model
from jaxsft.rows.items import Conversation, Item
from jaxsft.rows.messages import Message
from jaxsft.training.loss import LossSums
from jaxsft.training.metrics import divide
from jaxsft.training.step import make_eval_step, put_batch


class Question(NamedTuple):
    """A turn of the assistant in a held-out conversation, and all that stands before it."""

    prompt: str
    """what was said before, in a line."""
    tokens: list[int]
    """the whole prompt, as the model is given it."""
    expected: str
    """what is trained of the turn as text, see `as_text`."""
    expected_tokens: list[int]
    """the same, the stop token last: what the model must produce."""
    own_prompt: list[int] | None
    """see `TrainedTurn`."""


class Answer(NamedTuple):
    """What a model answered."""

    question: Question
    text: str
    """without the stop token and surrounding blanks."""
    stopped: bool
    """it ended by itself."""
    is_exact: bool
    """Right to the letter, and ended by itself as the turn ends."""
    note: str
    """Why it is not exact, where the text alone does not show that."""


class HeldOut(NamedTuple):
    """A set of held-out rows."""

    name: str
    loader: Loader
    questions: Sequence[Question]


class Result(NamedTuple):
    """What an evaluation found."""

    metrics: dict[str, float]
    """Over all sets; where there are several, those of each as well, as `eval_loss/NAME`."""
    samples: dict[str, list[Answer]]
    """By set."""


def held_out_sums(eval_step: Callable, weights: Any, loader: Loader, mesh: Mesh) -> np.ndarray:
    """`LossSums` over one pass, float64."""
    totals = np.zeros(len(LossSums._fields))
    for step in range(loader.steps_per_epoch):
        batch = put_batch(functools.partial(loader.batch, step), loader.shape, mesh)
        with jax.set_mesh(mesh):
            # Added up in float64 on the host: float32 cannot count beyond 2^24 tokens.
            totals += np.array(jax.device_get(eval_step(weights, batch)), np.float64)
    return totals


def held_out_loss(sums: np.ndarray) -> dict[str, float]:
    """Loss (nats per trained token, over all of them at once), perplexity and accuracy."""
    loss_sum, weight_sum, correct_sum, trained_tokens = map(float, sums)
    loss = divide(loss_sum, weight_sum)
    return {
        "eval_loss": loss,
        "eval_perplexity": math.exp(min(loss, 700.0)),  # e^700 is about as large as a float can be
        "eval_accuracy": divide(correct_sum, weight_sum),
        "eval_trained_tokens": trained_tokens,
    }


def make_questions(
    items: Iterable[Item],
    encoder: ChatEncoder,
    *,
    ask: Literal["last", "all"] = "last",
    most: int | None = None,
    seq_len: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Question]:
    """What the model is asked of conversations: turns of the assistant that are trained; plain text has none.

    What the template refuses is left out: the preparation of the same rows has counted it.

    Args:
        items: conversations, and what else rows may hold; read only until there are enough questions.
        encoder: of the model.
        ask: for the last of these turns in each conversation, or for all of them.
        most: so many questions at most.
        seq_len: turns that end behind so many tokens are left out, as their examples are.
        say: is told how many.
    """
    questions: list[Question] = []
    num_overlong = 0
    for conversation in items:
        if most is not None and len(questions) >= most:
            break
        if not isinstance(conversation, Conversation):
            continue
        try:
            turns = encoder.trained_turns(conversation)
        except MaskError:
            continue
        for turn in turns if ask == "all" else turns[-1:]:
            if not turn.prompt:
                continue  # The text begins with what is trained, so there is nothing to ask.
            if seq_len is not None and len(turn.prompt) + len(turn.answer) > seq_len:
                num_overlong += 1
                continue
            said = " | ".join(map(_said, conversation.messages[: turn.message]))
            expected = as_text(turn.answer[:-1], encoder.tokenizer)
            questions.append(Question(said, turn.prompt, expected, turn.answer, turn.own_prompt))
    if num_overlong:
        say(f"{num_overlong:,} turns do not end within data.seq_len={seq_len} tokens and are not asked")
    return questions[:most]


def describe_questions(questions: Sequence[Question], encoder: ChatEncoder, *, max_new_tokens: int) -> list[str]:
    """What a user should know before reading shares of exact answers, in sentences."""
    if not questions:
        return ["there is no question: no held-out row is a conversation with a trained turn of the assistant"]
    notes, of_all = [], f"of {len(questions):,} questions"
    if long := [len(each.expected_tokens) for each in questions if len(each.expected_tokens) > max_new_tokens]:
        notes.append(
            f"{len(long):,} {of_all} cannot be answered exactly: what is expected has more tokens than "
            f"eval.max_new_tokens={max_new_tokens} (the longest {max(long):,})"
        )
    if cut := [each for each in questions if not encoder.stops.isdisjoint(each.expected_tokens[:-1])]:
        stop = next(token for token in cut[0].expected_tokens if token in encoder.stops)
        notes.append(
            f"{len(cut):,} {of_all} cannot be answered exactly: what is expected holds a stop token before its end, "
            f"{token_text(encoder.tokenizer, stop)!r}, at which every answer ends"
        )
    if odd := [each for each in questions if each.tokens != each.own_prompt]:
        first = next((each for each in odd if each.own_prompt), None)
        notes.append(f"{len(odd):,} {of_all} are asked as they are trained, which is not as the chat template asks")
        if first is not None and first.own_prompt:
            own, asked = _end(first.own_prompt, encoder.tokenizer), _end(first.tokens, encoder.tokenizer)
            same = ", the same text in other tokens" if own == asked else ""
            notes[-1] += f": its prompt ends with {own!r}, what stands before a trained turn with {asked!r}{same}"
    return notes


def as_text(tokens: Sequence[int], tokenizer: Any) -> str:
    """Tokens as the text that is compared and shown: control tokens are in it, blanks around it are not."""
    # Cleaning up would remove blanks before commas, so that different texts would look equal.
    text = tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text.strip()


def judge(question: Question, tokens: Sequence[int], tokenizer: Any, *, stop_ids: Collection[int]) -> Answer:
    """What the tokens that a model gave are worth as an answer.

    They are right if they read as those that are trained do, whatever pieces the words are made of, with the same
    control tokens (`<think>` spelt out is none), and end with the same stop token.

    Args:
        question: what was asked.
        tokens: all that the model produced, the stop token last if it stopped.
        tokenizer: of the model.
        stop_ids: those at which answers end.
    """
    expected = question.expected_tokens
    stopped = bool(tokens) and tokens[-1] in stop_ids
    said = list(tokens[:-1] if stopped else tokens)
    text = as_text(said, tokenizer)
    note = ""
    if not stopped:
        note = "did not stop"
    elif tokens[-1] != expected[-1]:
        note = f"ended with {token_text(tokenizer, tokens[-1])!r}, not with {token_text(tokenizer, expected[-1])!r}"
    elif text == question.expected and said != expected[:-1]:
        controls = control_tokens(tokenizer)
        if [id for id in said if id in controls] != [id for id in expected[:-1] if id in controls]:
            note = "control tokens differ from those expected"
        elif "\ufffd" in text:
            note = "holds other bytes that are no text"
    return Answer(question, text, stopped, text == question.expected and not note, note)


def answer_questions(
    questions: Sequence[Question], generator: Generator, weights: Any, tokenizer: Any, config: EvalConfig
) -> list[Answer]:
    """Greedy answers; to all questions where exact match is asked for, else to the samples that are shown."""
    questions = questions if config.exact_match else questions[: config.samples]
    found = generator.answers(weights, [q.tokens for q in questions], max_new_tokens=config.max_new_tokens)
    return [
        judge(question, tokens, tokenizer, stop_ids=generator.stop_ids)
        for question, tokens in zip(questions, found, strict=True)
    ]


def exact_match(answers: Sequence[Answer]) -> dict[str, float]:
    """Share of the answers that are exact, and how many there are; nothing when there are none."""
    if not answers:
        return {}
    return {"eval_exact_match": sum(a.is_exact for a in answers) / len(answers), "eval_questions": len(answers)}


class Examiner:
    """Examines states of one run: held-out loss, and answers to the same questions each time."""

    def __init__(
        self,
        config: EvalConfig,
        *,
        model: Model,
        mesh: Mesh,
        sets: Sequence[HeldOut],
        tokenizer: OpenTokenizer,
    ) -> None:
        self._config, self._mesh = config, mesh
        self.sets, self._tokenizer = sets, tokenizer.tokenizer
        self._eval_step = make_eval_step(model, mesh)
        self._generator = Generator(model, mesh, stop_ids=tokenizer.stops)

    def examine(self, weights: Any) -> Result:
        """Measures the loss and, where samples or exact match are asked for, answers questions greedily.

        `weights` are all of a state, trained or not.
        """
        all_sums, all_answers = np.zeros(len(LossSums._fields)), []
        each: dict[str, float] = {}
        samples = {}
        for name, loader, questions in self.sets:
            sums = held_out_sums(self._eval_step, weights, loader, self._mesh)
            answers = answer_questions(questions, self._generator, weights, self._tokenizer, self._config)
            all_sums += sums
            all_answers += answers
            each |= {f"{key}/{name}": value for key, value in self._metrics(sums, answers).items()}
            samples[name] = answers[: self._config.samples]
        return Result(self._metrics(all_sums, all_answers) | (each if len(self.sets) > 1 else {}), samples)

    def _metrics(self, sums: np.ndarray, answers: Sequence[Answer]) -> dict[str, float]:
        return held_out_loss(sums) | (exact_match(answers) if self._config.exact_match else {})


def describe(result: Result) -> str:
    """The lines that a user sees of an evaluation."""
    several = len(result.samples) > 1
    text = f"held-out {_figures(result.metrics, '')}"
    for name, answers in result.samples.items():
        if several:
            text += f"\n  {name}: {_figures(result.metrics, f'/{name}')}"
        for answer in answers:
            ending = f"  ({answer.note})" if answer.note else ""
            text += (
                f"\n  prompt    {_one_line(answer.question.prompt)}\n  answer    {_one_line(answer.text)}{ending}"
                f"\n  expected  {_one_line(answer.question.expected)}"
            )
    return text


def _figures(metrics: dict[str, float], suffix: str) -> str:
    text = (
        f"loss {metrics[f'eval_loss{suffix}']:.4f}  perplexity {metrics[f'eval_perplexity{suffix}']:.4g}  "
        f"accuracy {metrics[f'eval_accuracy{suffix}']:.1%}"
    )
    matched = f"eval_exact_match{suffix}"
    if matched in metrics:
        text += f"  exact match {metrics[matched]:.1%} of {metrics[f'eval_questions{suffix}']:,} answers"
    return text


def _said(message: Message) -> str:
    """A message in a line: reasoning, what is said, and calls."""
    parts = [f"<think>{message['reasoning_content']}</think>"] if message.get("reasoning_content") else []
    parts += [str(message["content"])] if message.get("content") else []
    for call in message.get("tool_calls") or []:
        function = call.get("function") or call
        parts.append(f"calls {function.get('name')}({json.dumps(function.get('arguments'), ensure_ascii=False)})")
    return f"{message['role']}: {' '.join(parts)}"


def _end(tokens: Sequence[int], tokenizer: Any) -> str:
    text = tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text[-30:]


def _one_line(text: str, width: int = 200) -> str:
    text = text.replace("\n", "\\n")
    half = width // 2
    return text if len(text) <= width else f"{text[:half]} ... {text[-half:]}"
