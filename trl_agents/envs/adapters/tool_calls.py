# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Tool calls as text: what a model writes -> a name and arguments, and what it is told about the tools."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


_LONGEST = 100_000  # characters; longer ones are no calls, and reading them takes long
_AROUND = re.compile(r"\A(?:<tool_call>|```\w*)\s*|\s*(?:</tool_call>|```)\Z")


class ToolCall(NamedTuple):
    """A call as it was written: positional arguments only in the form of Python."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def read_call(text: str) -> ToolCall:
    """
    Reads a call in one of three forms: `guess(word="crane")`, a name alone, or JSON as chat templates write it,
    `{"name": "guess", "arguments": {"word": "crane"}}`, with or without `<tool_call>` around it.

    Raises `ValueError` with a message for the model if it is none.
    """
    if len(text) > _LONGEST:
        raise ValueError("The call is too long.")
    text = _AROUND.sub("", _AROUND.sub("", text.strip()))
    try:
        return _read_json(text) if text.startswith("{") else _read_python(text)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        reason = str(error) if type(error) is ValueError else "that is no call"
        raise ValueError(f'{reason}. Write a call such as tool(name="value"), with literal values.') from error


def _read_json(text: str) -> ToolCall:
    call = json.loads(text)
    call = call.get("function", call)
    name, arguments = call.get("name"), call.get("arguments", call.get("parameters")) or {}
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError("a call in JSON has a name and arguments")
    return ToolCall(name, (), arguments)


def _read_python(text: str) -> ToolCall:
    node = ast.parse(text, mode="eval").body
    if isinstance(node, ast.Name):
        return ToolCall(node.id, (), {})
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise ValueError("that is no call of one tool")
    if any(keyword.arg is None for keyword in node.keywords):
        raise ValueError("** is not allowed in a call")
    args = tuple(ast.literal_eval(argument) for argument in node.args)
    return ToolCall(node.func.id, args, {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords})


def describe_tools(tools: Mapping[str, Callable[..., Any]]) -> str:
    """The tools as a model reads them: signature and docstring of each."""
    parts = []
    for name, tool in tools.items():
        doc = inspect.getdoc(tool) or ""
        parts.append("\n".join([f"{name}{_signature(tool)}", *(f"    {line}".rstrip() for line in doc.splitlines())]))
    return "\n".join(parts)


def _signature(tool: Callable[..., Any]) -> str:
    signature = inspect.signature(tool)
    plain = [parameter.replace(annotation=_plain(parameter.annotation)) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))


def _plain(annotation: Any) -> Any:
    """A string annotation (`from __future__ import annotations`) as the type it names: printed without quotes."""
    return type(annotation, (), {"__module__": "builtins"}) if isinstance(annotation, str) else annotation


def as_text(result: Any) -> str:
    """What a tool returned, as a model reads it."""
    if result is None:
        return ""
    if isinstance(result, str):
        return result
    if isinstance(result, list) and result and all(isinstance(part, Mapping) and "type" in part for part in result):
        return "\n".join(str(part.get("text", "")) for part in result if part["type"] == "text")
    try:
        return json.dumps(result, ensure_ascii=False)
    except (TypeError, ValueError):
        return str(result)
