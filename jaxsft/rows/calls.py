"""Tool calls and tools, however they are spelt, in the one spelling that chat templates take.

In: a call or a list of tools as it stands in a row. Out: `{"type": "function", "function": {...}}`, arguments as an
object and never as the text of one, so that templates render both the same.
"""

from typing import Any

from jaxsft.rows.flags import SENSES
from jaxsft.rows.strict import BadRow, inner_json, kind_of, short

_ARGUMENTS = ("arguments", "parameters", "input", "args")


def read_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Tools given as a list, one object, or JSON text of either; bare functions get the usual wrapping."""
    if isinstance(tools, str):
        if not tools.strip():
            return None
        tools = inner_json(tools, "bad-tools", "tools: ")
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list):
        raise BadRow("bad-tools", f"tools: expected a list of objects, got {kind_of(tools)}")
    return [_read_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)] or None


def read_call(call: Any, where: str) -> dict[str, Any]:
    """One call in any usual shape: wrapped in `function` or bare, arguments an object or its JSON text.

    {"name": "f", "arguments": "{\\"a\\": 1}"} -> {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    """
    where = f"{where}: tool call: "
    if isinstance(call, str):
        call = inner_json(call, "bad-tool-call", where)
    if not isinstance(call, dict):
        reason = f"{where}expected an object with name and arguments, got {kind_of(call)}"
        raise BadRow("bad-tool-call", reason)
    call = {key: value for key, value in call.items() if value is not None}
    if flags := [key for key in SENSES if key in call]:
        reason = f"{where}{flags[0]} of one call; only turns, and parts of their text and reasoning, have flags"
        raise BadRow("train-detail", reason)
    function = call.pop("function", None)
    if isinstance(function, str) and function.lstrip().startswith("{"):
        function = inner_json(function, "bad-tool-call", f"{where}function: ")
    if isinstance(function, dict):
        function = {key: value for key, value in function.items() if value is not None}
    else:
        function = {key: call.pop(key) for key in ("name", *_ARGUMENTS) if key in call}
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        raise BadRow("bad-tool-call", f"{where}expected a name, got {short(name)}")
    given = [key for key in _ARGUMENTS if key in function]
    arguments = function[given[0]] if given else {}
    if isinstance(arguments, str):
        arguments = inner_json(arguments, "bad-tool-call", f"{where}arguments: ") if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise BadRow("bad-tool-call", f"{where}arguments must be an object or its JSON, got {kind_of(arguments)}")
    if not isinstance(call.get("id", ""), str):
        raise BadRow("bad-tool-call", f"{where}id must be text, got {short(call['id'])}")
    rest = {key: value for key, value in function.items() if key not in ("name", *_ARGUMENTS)}
    return {**call, "type": "function", "function": {"name": name, "arguments": arguments, **rest}}


def _read_tool(tool: Any, where: str) -> dict[str, Any]:
    if isinstance(tool, str):
        tool = inner_json(tool, "bad-tools", f"{where}: ")
    if not isinstance(tool, dict):
        raise BadRow("bad-tools", f"{where}: expected an object, got {kind_of(tool)}")
    tool = _decoded(tool, ("function",), where)
    if isinstance(tool.get("function"), dict):
        if not isinstance(tool["function"].get("name"), str):
            raise BadRow("bad-tools", f"{where}: function without a name")
        return {**tool, "function": _read_function(tool["function"], where)}
    if not isinstance(tool.get("name"), str):
        raise BadRow("bad-tools", f"{where}: expected a function with name and parameters, got {short(tool)}")
    function = {key: value for key, value in tool.items() if key not in ("type", "input_schema")}
    if "input_schema" in tool:
        function.setdefault("parameters", tool["input_schema"])
    return {"type": "function", "function": _read_function(function, where)}


def _read_function(function: dict[str, Any], where: str) -> dict[str, Any]:
    """A function whose schemas are objects: some write them as JSON text, so that a column has one type."""
    function = _decoded(function, ("parameters", "return", "returns"), where)
    if isinstance(function.get("parameters"), dict):
        function = {**function, "parameters": _decoded(function["parameters"], ("properties",), where)}
    return function


def _decoded(value: dict[str, Any], names: tuple[str, ...], where: str) -> dict[str, Any]:
    """A copy of the object in which, under some names, a text of JSON is replaced by the object that it spells."""
    found = {}
    for name in names:
        text = value.get(name)
        if isinstance(text, str) and text.lstrip().startswith("{"):
            found[name] = inner_json(text, "bad-tools", f"{where}: {name}: ")
    return value | found if found else value
