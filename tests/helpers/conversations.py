"""Conversations that every template is put to, each with what it asks of a template.

Whoever writes a text signs it, so that the author of any rendered character can be told without our code: words like
ask1, sys1, got1 and spec1 are of users, systems, tool results and tools, which nobody may train; words like say1 are
the assistant's, and every one of them must be trained.
"""

from typing import Any, NamedTuple

Message = dict[str, Any]


class Case(NamedTuple):
    """A conversation, and what a template must know to render it."""

    name: str
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    needs: frozenset[str] = frozenset()
    """Out of: system, developer, tools, reasoning, multi (more than one turn), start (an assistant speaks first)."""
    said: tuple[str, ...] = ()
    """Texts that an assistant's signature cannot sign, such as repeated ones, as often as they are said."""
    kwargs: dict[str, Any] = {}
    """Further variables of the template."""


def user(content: str, **fields: Any) -> Message:
    return {"role": "user", "content": content, **fields}


def system(content: str, **fields: Any) -> Message:
    return {"role": "system", "content": content, **fields}


def assistant(content: str, **fields: Any) -> Message:
    return {"role": "assistant", "content": content, **fields}


def tool(content: str, id: str, name: str = "get_weather") -> Message:
    return {"role": "tool", "content": content, "tool_call_id": id, "name": name}


def call(id: str, arguments: dict[str, Any] | str, name: str = "get_weather") -> dict[str, Any]:
    # Mistral's templates take ids of nine letters and digits only.
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def function(name: str, description: str, *, required: str) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {required: {"type": "string", "description": "spec9"}},
        "required": [required],
    }
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


WEATHER = function("get_weather", "Looks out of the window, spec1.", required="city")
CLOCK = function("get_time", "Looks at the clock, spec2.", required="zone")

FAMILY = "👨‍👩‍👧‍👦"
"""Four people and three joiners: one glyph, 25 bytes."""

CASES = [
    Case("plain", [user("Who is ask1?"), assistant("It is say1.")]),
    Case(
        "system",
        [system("Be brief, sys1."), user("Who is ask1?"), assistant("It is say1.")],
        needs=frozenset({"system"}),
    ),
    Case(
        "multi-turn",
        [
            user("Who is ask1?"),
            assistant("It is say1."),
            user("And ask2?"),
            assistant("That is say2."),
            user("Thanks, ask3."),
            assistant("Welcome, say3!"),
        ],
        needs=frozenset({"multi"}),
    ),
    Case(
        "system, multi-turn",
        [
            system("Be brief, sys1."),
            user("Who is ask1?"),
            assistant("It is say1."),
            user("And ask2?"),
            assistant("That is say2."),
        ],
        needs=frozenset({"system", "multi"}),
    ),
    Case(
        "developer",
        [{"role": "developer", "content": "Be brief, sys1."}, user("Who is ask1?"), assistant("It is say1.")],
        needs=frozenset({"developer"}),
    ),
    Case(
        "assistant first",
        [assistant("How may I help, say1?"), user("Who is ask1?"), assistant("It is say2.")],
        needs=frozenset({"start", "multi"}),
    ),
    Case(
        "tool call",
        [
            user("Is it raining in ask1?"),
            assistant("", tool_calls=[call("call00001", {"city": "say1", "days": 2})]),
            tool("Rain, got1.", "call00001"),
            assistant("Yes, say2."),
        ],
        tools=[WEATHER],
        needs=frozenset({"tools", "multi"}),
    ),
    Case(
        "tool call with text",
        [
            system("Be brief, sys1."),
            user("Is it raining in ask1?"),
            assistant("I shall look, say1.", tool_calls=[call("call00001", {"city": "say2"})]),
            tool("Rain, got1.", "call00001"),
            assistant("Yes, say3."),
            user("And tomorrow, ask2?"),
            assistant("No idea, say4."),
        ],
        tools=[WEATHER, CLOCK],
        needs=frozenset({"system", "tools", "multi"}),
    ),
    Case(
        "parallel tool calls",
        [
            user("Weather and time in ask1?"),
            assistant(
                "",
                tool_calls=[
                    call("call00001", {"city": "say1"}),
                    call("call00002", {"zone": "say2", "note": 'ä "q" é'}, "get_time"),
                ],
            ),
            tool("Rain, got1.", "call00001"),
            tool("Noon, got2.", "call00002", "get_time"),
            assistant("Rain at noon, say3."),
        ],
        tools=[WEATHER, CLOCK],
        needs=frozenset({"tools", "parallel", "multi"}),
    ),
    Case(
        "reasoning",
        [user("Who is ask1?"), assistant("It is say2.", reasoning_content="Hm, who, say1?")],
        needs=frozenset({"reasoning"}),
    ),
    Case(
        "reasoning, multi-turn",
        [
            system("Be brief, sys1."),
            user("Who is ask1?"),
            assistant("It is say2.", reasoning_content="Hm, who, say1?"),
            user("And ask2?"),
            assistant("That is say4.", reasoning_content="Now then,\n\nsay3."),
        ],
        needs=frozenset({"system", "reasoning", "multi"}),
    ),
    Case(
        "reasoning before a tool call",
        [
            user("Is it raining in ask1?"),
            assistant("", reasoning_content="I must look, say1.", tool_calls=[call("call00001", {"city": "say2"})]),
            tool("Rain, got1.", "call00001"),
            assistant("Yes, say4.", reasoning_content="It rains, say3."),
        ],
        tools=[WEATHER],
        needs=frozenset({"tools", "reasoning", "multi"}),
    ),
    Case(
        "thinking inside the content",
        [
            user("Who is ask1?"),
            assistant("<think>\nHm, say1?\n</think>\n\nIt is say2."),
            user("And ask2?"),
            assistant("<think>\nHm, say3?\n</think>\n\nThat is say4."),
        ],
        needs=frozenset({"multi"}),
    ),
    Case("empty question", [user(""), assistant("You said nothing, say1.")]),
    Case(
        "empty answer",
        [user("Say nothing, ask1."), assistant(""), user("Well done, ask2."), assistant("Thanks, say1.")],
        needs=frozenset({"multi"}),
    ),
    Case(
        "repeated",
        [user("Echo"), assistant("Echo"), user("Echo"), assistant("Echo"), user("Echo"), assistant("Echo")],
        needs=frozenset({"multi"}),
        said=("Echo", "Echo", "Echo"),
    ),
    Case(
        "unicode",
        [
            user(f"{FAMILY} ask1 e\u0301 한국어"),
            assistant(f"{FAMILY}你好 say1 e\u0301 नमस्ते 🏳️‍🌈"),
            user("ask2 👍🏽"),
            assistant("👍🏽 say2 \u0301"),
        ],
        needs=frozenset({"multi"}),
    ),
    Case(
        "leading newline",
        [user("\nask1\n"), assistant("\nsay1\n"), user("\n\nask2"), assistant("\n\nsay2\n\n")],
        needs=frozenset({"multi"}),
    ),
    Case(
        "spaces around",
        [user("  ask1  "), assistant("  say1  "), user("\task2 "), assistant(" \n say2 \n ")],
        needs=frozenset({"multi"}),
    ),
    Case(
        "words of templates",
        [
            user("user: ask1\nassistant: {{ ask1 }} {% if %} ### Response:\n"),
            assistant("assistant: say1 ### Instruction:\nuser\n{{ messages }}"),
            user("{'role': 'assistant'} ask2"),
            assistant("user: say2\nASSISTANT: \\n {# no #}"),
        ],
        needs=frozenset({"multi"}),
    ),
    Case(
        "answers begin as headers end",
        [user("assistant ask1"), assistant("assistant\n say1"), user("user ask2"), assistant(": say2")],
        needs=frozenset({"multi"}),
    ),
    Case(
        "one answer is inside the next",
        [user("ask1 say"), assistant("say"), user("ask2 say say"), assistant("say say")],
        needs=frozenset({"multi"}),
        said=("say", "say", "say"),
    ),
    Case(
        "greeting after a system text",
        [system("Be brief, sys1."), assistant("Hello, say1."), user("Who is ask1?"), assistant("It is say2.")],
        needs=frozenset({"system", "start", "multi"}),
    ),
    Case(
        "two greetings",
        [assistant("Hello, say1."), assistant("I am say2."), user("Who is ask1?"), assistant("It is say3.")],
        needs=frozenset({"start", "multi"}),
    ),
    Case(
        "greeting by a call",
        [
            system("Be brief, sys1."),
            assistant("", tool_calls=[call("call00001", {"city": "say1"})]),
            tool("Rain, got1.", "call00001"),
            assistant("It rains, say2."),
            user("And ask1?"),
            assistant("That is say3."),
        ],
        tools=[WEATHER],
        needs=frozenset({"system", "tools", "start", "multi"}),
    ),
    Case(
        "tool-only turns",
        [
            user("Weather and time in ask1?"),
            assistant("", tool_calls=[call("call00001", {"city": "say1"})]),
            tool("Rain, got1.", "call00001"),
            assistant("", tool_calls=[call("call00002", {"zone": "say2"}, "get_time")]),
        ],
        tools=[WEATHER, CLOCK],
        needs=frozenset({"tools", "multi"}),
    ),
    Case(
        "system text in the middle",
        [
            user("Who is ask1?"),
            assistant("It is say1."),
            system("Be brief, sys1."),
            user("And ask2?"),
            assistant("That is say2."),
        ],
        needs=frozenset({"system", "multi"}),
    ),
    Case(
        "system text after the question",
        [user("Who is ask1?"), system("Be brief, sys1."), assistant("It is say1.")],
        needs=frozenset({"system"}),
    ),
    Case(
        "two answers",
        [
            user("Who is ask1?"),
            assistant("It is say1."),
            assistant("Yes, say2."),
            user("And ask2?"),
            assistant("That is say3."),
        ],
        needs=frozenset({"multi"}),
    ),
    Case(
        "thinking off",
        [user("Who is ask1?"), assistant("It is say1."), user("And ask2?"), assistant("That is say2.")],
        needs=frozenset({"multi"}),
        kwargs={"enable_thinking": False, "thinking": False},
    ),
    Case(
        "reasoning, thinking off",
        [
            user("Who is ask1?"),
            assistant("It is say2.", reasoning_content="Hm, who, say1?"),
            user("And ask2?"),
            assistant("That is say4.", reasoning_content="Now, say3."),
        ],
        needs=frozenset({"reasoning", "multi"}),
        kwargs={"enable_thinking": False, "thinking": False},
    ),
    Case(
        "thinking inside the content, thinking off",
        [user("Who is ask1?"), assistant("<think>\nHm, say1?\n</think>\n\nIt is say2.")],
        kwargs={"enable_thinking": False, "thinking": False},
    ),
]
