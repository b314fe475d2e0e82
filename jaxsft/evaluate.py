"""Held-out loss and sample answers of a model.

In: a model, and sets of prepared held-out data with the conversations that they were made from. Out: token-weighted
loss, perplexity and accuracy, of each set and of all; answers to the prompts that those conversations end with, beside
the answers expected.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxsft.config import EvalConfig
from jaxsft.data.chat import ChatEncoder, MaskError
from jaxsft.data.formats import Conversation, Item
from jaxsft.data.loader import Loader
from jaxsft.generate import Generator
from jaxsft.loss import LossSums
from jaxsft.metrics import divide
from jaxsft.pretrained import OpenTokenizer
from jaxsft.step import Model, make_eval_step, put_batch


class Question(NamedTuple):
    """A prompt whose answer is known: a held-out conversation without its last turn."""

    prompt: str
    """what was said before, in a line."""
    tokens: list[int]
    """the whole prompt, as the model is given it."""
    expected: str


class Answer(NamedTuple):
    """What a model answered."""

    question: Question
    text: str
    """without the stop token and surrounding blanks."""
    stopped: bool
    """it ended by itself."""

    @property
    def is_exact(self) -> bool:
        """Right to the letter, and ended by itself."""
        return self.stopped and self.text == self.question.expected


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


def held_out_sums(eval_step: Callable, params: Any, frozen: Any, loader: Loader, mesh: Mesh) -> np.ndarray:
    """`LossSums` over one pass, float64."""
    totals = np.zeros(len(LossSums._fields))
    for step in range(loader.steps_per_epoch):
        batch = put_batch(functools.partial(loader.batch, step), loader.shape, mesh)
        with jax.set_mesh(mesh):
            # Added up in float64 on the host: float32 cannot count beyond 2^24 tokens.
            totals += np.array(jax.device_get(eval_step(params, frozen, batch)), np.float64)
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
    items: Iterable[Item], encoder: ChatEncoder, *, most: int | None = None, seq_len: int | None = None
) -> list[Question]:
    """The prompts of those conversations that end with text of the assistant; plain text has none.

    What the template refuses is left out: the preparation of the same rows has counted it.

    Args:
        items: conversations, and what else rows may hold; read only until there are enough questions.
        encoder: of the model.
        most: so many questions at most.
        seq_len: prompts of as many tokens are left out, as their examples are.
    """
    questions: list[Question] = []
    for conversation in items:
        if len(questions) == most:
            break
        if not isinstance(conversation, Conversation):
            continue
        *earlier, last = conversation.messages
        if last["role"] != "assistant" or not last.get("content") or not earlier:
            continue
        try:
            tokens = encoder.prompt(earlier, tools=conversation.tools, template_kwargs=conversation.template_kwargs)
        except MaskError:
            continue
        if seq_len is not None and len(tokens) >= seq_len:
            continue
        said = " | ".join(f"{message['role']}: {message.get('content') or ''}" for message in earlier)
        questions.append(Question(said, tokens, last["content"].strip()))
    return questions


def answer_questions(
    questions: Sequence[Question], generator: Generator, params: Any, tokenizer: Any, config: EvalConfig
) -> list[Answer]:
    """Greedy answers; to all questions where exact match is asked for, else to the samples that are shown."""
    questions = questions if config.exact_match else questions[: config.samples]
    found = generator.answers(params, [q.tokens for q in questions], max_new_tokens=config.max_new_tokens)
    answers = []
    for question, tokens in zip(questions, found, strict=True):
        stopped = tokens[-1] in generator.stop_ids
        text = tokenizer.decode(tokens[:-1] if stopped else tokens, skip_special_tokens=False)
        answers.append(Answer(question, text.strip(), stopped))
    return answers


def exact_match(answers: Sequence[Answer]) -> dict[str, float]:
    """Share of the answers that are right to the letter and ended by themselves; nothing when there are none."""
    return {"eval_exact_match": sum(a.is_exact for a in answers) / len(answers)} if answers else {}


class Examiner:
    """Examines states of one run: held-out loss, and answers to the same questions each time."""

    def __init__(
        self,
        config: EvalConfig,
        *,
        model: Model,
        frozen: Any,
        mesh: Mesh,
        sets: Sequence[HeldOut],
        tokenizer: OpenTokenizer,
    ) -> None:
        self._config, self._frozen, self._mesh = config, frozen, mesh
        self.sets, self._tokenizer = sets, tokenizer.tokenizer
        self._eval_step = make_eval_step(model, frozen, mesh)
        self._generator = Generator(model, mesh, stop_ids=tokenizer.stops)

    def examine(self, params: Any) -> Result:
        """Measures the loss and, where samples or exact match are asked for, answers questions greedily."""
        all_sums, all_answers = np.zeros(len(LossSums._fields)), []
        each: dict[str, float] = {}
        samples = {}
        for name, loader, questions in self.sets:
            sums = held_out_sums(self._eval_step, params, self._frozen, loader, self._mesh)
            answers = answer_questions(questions, self._generator, params, self._tokenizer, self._config)
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
            ending = "" if answer.stopped else "  (did not stop)"
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
    return text + (f"  exact match {metrics[matched]:.1%}" if matched in metrics else "")


def _one_line(text: str, width: int = 200) -> str:
    text = text.replace("\n", "\\n")
    half = width // 2
    return text if len(text) <= width else f"{text[:half]} ... {text[-half:]}"
