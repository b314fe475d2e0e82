"""A chat template in a process of its own: whether it is a program that ends, in little memory, before it is used.

In: the text of a template. Out: None, or a sentence that says what is wrong with it. The renders of rows are bounded
later on by `metered.py`.
"""

import contextlib
import functools
import json
import subprocess
import sys
from typing import Any

import jinja2
import jinja2.nodes

from jaxsft.chat.metered import Metered, TemplateHogs
from jaxsft.chat.template import EXTENSIONS, ChatTemplate, TemplateError, number_sources

_SECONDS, _BYTES = 10, 2**30

_LONG = "A longer text, with more than a few words in it, <think>and a thought</think> of its own. " * 20
_CALLS = [{"id": "call00001", "type": "function", "function": {"name": "look_up", "arguments": {"word": "tree"}}}]

_PROBES: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "a question"}]},
    {"messages": [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "the answer"}]},
    {
        "messages": [
            {"role": "system", "content": "a rule"},
            {"role": "user", "content": "a question"},
            {"role": "assistant", "content": "the answer"},
            {"role": "user", "content": "and another"},
        ],
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "look_up",
                    "description": "Looks a word up.",
                    "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
                },
            }
        ],
    },
    {
        "messages": [
            {"role": "system", "content": _LONG},
            *[
                {"role": "user", "content": _LONG},
                {"role": "assistant", "content": "", "tool_calls": _CALLS},
                {"role": "tool", "content": _LONG, "tool_call_id": "call00001", "name": "look_up"},
                {"role": "assistant", "content": _LONG, "reasoning_content": _LONG},
            ]
            * 3,
        ],
        "tools": [{"type": "function", "function": {"name": "look_up", "description": _LONG, "parameters": {}}}],
    },
]


@functools.lru_cache(maxsize=256)
def check_template(source: str, variables_json: str) -> str | None:
    """Compiles and renders a template in a child process with at most 10 s and 1 GiB; returns what is wrong with it.

    A template may refuse a conversation: that is not reported here, but for the rows that it refuses.
    """
    task = json.dumps({"source": source, "variables": json.loads(variables_json)})
    command = [sys.executable, "-m", "jaxsft.chat.probe"]
    try:
        done = subprocess.run(command, input=task, capture_output=True, text=True, timeout=3 * _SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"does not end within {3 * _SECONDS} seconds"
    if done.returncode == 0:
        return done.stdout.strip() or None
    if "MemoryError" in done.stderr:
        return f"needs more than {_BYTES >> 30} GiB of memory"
    if done.returncode < 0:
        return (
            f"takes more than {_SECONDS} seconds or {_BYTES >> 30} GiB of memory (ended by signal {-done.returncode})"
        )
    return f"cannot be run: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}"


def _probe() -> None:
    """The child process: reads a template, sets itself limits, and prints what is wrong, if anything."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    except (ImportError, ValueError, OSError):
        pass  # Not on this system; the time limit of the parent remains.
    task = json.loads(sys.stdin.read())
    if _has_huge_constant(task["source"]):
        print("computes a constant of millions of characters or digits")
        return
    template = ChatTemplate(task["source"], task["variables"])
    for probe in _PROBES:
        for prompt in (False, True):
            conversation = number_sources(probe["messages"], probe.get("tools"), {})
            try:
                template.render(conversation, len(probe["messages"]), prompt=prompt)
            except TemplateHogs:
                print("takes far more time or memory than any template should: its loops hardly end, or its texts do")
                return
            except TemplateError as error:
                if isinstance(error.__cause__, MemoryError):
                    raise
                if isinstance(error.__cause__, jinja2.TemplateSyntaxError):
                    print(f"is not Jinja: line {error.__cause__.lineno}: {error.__cause__.message}")
                    return


class _Folding(Metered):
    """Computes constants when a template is compiled, as Jinja does it for transformers, whatever rows may follow."""

    intercepted_binops = frozenset()


def _has_huge_constant(source: str) -> bool:
    environment = _Folding(trim_blocks=True, lstrip_blocks=True, extensions=EXTENSIONS)
    environment.meter()
    # Jinja computes constants by these functions, and leaves those that raise an error for later. Replacing them
    # changes Jinja for the whole process, which does nothing else.
    for operator in ("*", "**", "%"):
        jinja2.nodes._binop_to_func[operator] = functools.partial(environment.call_binop, None, operator)
    with contextlib.suppress(jinja2.TemplateError):  # the first render says it
        environment.from_string(source)
    return environment.left < 0


if __name__ == "__main__":
    _probe()
