"""Chat templates of ours, for models that come without one: each by name, with the tokens that it cannot do without.

In: the name that `data.chat_template` gives. Out: the Jinja text, and the control tokens that a tokenizer must hold as
one token each (`special_tokens.py` adds what it lacks). What each template writes is shown in docs/templates_named.md.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple


class NamedTemplate(NamedTuple):
    """A template of ours."""

    tokens: tuple[str, ...]
    """Control tokens that it writes itself; the tokenizer's bos_token and eos_token are not among them."""
    about: str
    """For the documentation."""
    input_heading: str = ""
    """What stands before the `input` of Alpaca's rows, where that is no mere paragraph of the instruction."""


NAMED_TEMPLATES: dict[str, NamedTemplate] = {
    "chatml": NamedTemplate(
        ("<|im_start|>", "<|im_end|>"),
        "The turns of Qwen, Hermes, SmolLM2 and many more, and the only one of ours with tools and reasoning. Calls "
        "stand in `<tool_call>` as JSON, results in `<tool_response>` in a user turn, as the parsers of serving stacks "
        "for Hermes and Qwen expect. Reasoning stands in `<think>` before the answer and stays in every turn.",
    ),
    "zephyr": NamedTemplate(
        (),
        "The turns of Zephyr: every turn ends with the eos token and a newline. The markers are ordinary text, so that "
        "nothing is added to the tokenizer.",
    ),
    "tulu": NamedTemplate(
        (),
        "The turns of Tulu and OLMo: only answers end with the eos token. The markers are ordinary text.",
    ),
    "llama3": NamedTemplate(
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "The turns of Llama 3, without the dates and the tools that Llama 3.1 writes into the system turn. Texts are "
        "trimmed, as there.",
    ),
    "gemma": NamedTemplate(
        ("<start_of_turn>", "<end_of_turn>"),
        "The turns of Gemma 2 and 3: the assistant is called `model`, and a system text, which must come first, stands "
        "before the first user's text. Texts are trimmed, as there.",
    ),
    "alpaca": NamedTemplate(
        (),
        "The headings of Stanford Alpaca. Its preamble is not made up: a system text, which must come first, stands in "
        "its place. All but the eos token is ordinary text.",
    ),
    "stanford_alpaca": NamedTemplate(
        (),
        "The prompt of Stanford Alpaca to the letter, with the one of its two preambles that fits: rows of Alpaca's "
        "format have their `input` under `### Input:`. The answer follows `### Response:` without a newline. A system "
        "text, which must come first, stands in place of the preamble.",
        input_heading="### Input:\n",
    ),
    "plain": NamedTemplate(
        (),
        "The texts and nothing else, a newline between them, for text-to-text data: the model is not told who speaks. "
        "An answer ends with the eos token.",
    ),
}
"""Name -> template."""


SPEAKERS = ("system", "developer", "user", "assistant")
"""Roles whose texts all templates of ours show."""


def that_show(role: str, field: str) -> tuple[str, ...]:
    """Templates of ours that show a field of a role's messages: texts of people all, calls and reasoning chatml."""
    return tuple(NAMED_TEMPLATES) if field == "content" and role in SPEAKERS else ("chatml",)


def that_suit(has_token: Callable[[str], bool]) -> str:
    """Templates of ours for a tokenizer, in words: first those whose control tokens it has.

    Args:
        has_token: whether the tokenizer holds a text as one token.
    """
    there: list[str] = []
    none: list[str] = []
    added: list[str] = []
    for name, template in NAMED_TEMPLATES.items():
        kind = added if not all(map(has_token, template.tokens)) else there if template.tokens else none
        kind.append(name)
    parts = [f"{listed(there)}, whose control tokens it has"] if there else []
    parts.append(f"{listed(none)}, which need no tokens of their own")
    parts += [f"{listed(added)}, whose tokens are added to it"] if added else []
    return "; ".join(parts)


def listed(names: Sequence[str]) -> str:
    """`a, b or c`."""
    return " or ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def template_text(name: str) -> str:
    """The Jinja text of a template of ours."""
    return (pathlib.Path(__file__).parent / "templates" / f"{name}.jinja").read_bytes().decode()
