"""Tools in a row: the functions that may be called, the calls, and their results, checked."""

import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

from etude.conversation.messages import Message, with_tools

# A call as Hermes and Qwen write it into the text of an answer.
WRITTEN = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


def tools_of(value: object) -> list[dict[str, Any]]:
    """The functions of a row's column tools, each as ``{"type": "function", "function": {...}}``.

    Raises:
        ValueError: what is wrong with it.
    """
    tools = _parsed(value, "tools")
    if not isinstance(tools, list):
        raise ValueError(f"tools must be a list of JSON schemas, not {type(tools).__name__}")
    found = []
    for number, tool in enumerate(tools, 1):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"tools, {number}: must be an object with a function's name")
        # Templates ask for these without looking.
        lacking = {"description": "", "parameters": {"type": "object", "properties": {}}}
        whole = {"name": function["name"], **lacking, **function}
        whole.pop("type", None)  # of a flat schema, as newer APIs have it
        found.append({"type": "function", "function": whole})
    return found


def calls_of(value: object, where: str) -> list[dict[str, Any]]:
    """Calls as ``{"type": "function", "id", "function": {"name", "arguments"}}``, arguments as an object.

    Raises:
        ValueError: what is wrong with them.
    """
    given = _parsed(value, f"{where}tool_calls")
    found = []
    for call in given if isinstance(given, list) else [given]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(
                f"{where}a call must be an object with a function's name and arguments"
            )
        name = function["name"]
        given = function.get("arguments", function.get("parameters"))
        arguments = _parsed(given, f"{where}arguments of {name!r}")
        arguments = {} if arguments in (None, "") else arguments
        if not isinstance(arguments, dict):
            raise ValueError(f"{where}arguments of {name!r} must be an object of names and values")
        made = {"type": "function", "function": {"name": name, "arguments": arguments}}
        if isinstance(call.get("id"), str):
            made["id"] = call["id"]
        found.append(made)
    return found


def with_parsed_calls(messages: list[Message], tools: list[dict[str, Any]]) -> list[Message]:
    """The messages with the tools on the first; calls in the text of an answer become calls.

    A system prompt that announces tools itself (Hermes) keeps its way: then both stay text.
    """
    first = messages[0]
    if first["role"] == "system" and "<tools>" in first["content"]:
        return messages
    return with_tools([_parsed_answer(message) for message in messages], tools)


def _parsed_answer(message: Message) -> Message:
    content = message["content"]
    if message["role"] == "tool":
        return {**message, "content": re.sub(r"(\s*</?tool_response>\s*)+", "\n", content).strip()}
    written = WRITTEN.findall(content) if message["role"] == "assistant" else []
    if not written or "tool_calls" in message:
        return message
    made = [call for text in written for call in calls_of(text, "")]
    return {**message, "content": WRITTEN.sub("", content).strip(), "tool_calls": made}


def check(messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> None:
    """Check calls and results, and give every call an id and every result its call's.

    Raises:
        ValueError: a call of a tool that is not listed, one that is not JSON, a result without a call.
    """
    names = [tool["function"]["name"] for tool in tools]
    every = [call for message in messages for call in message.get("tool_calls", [])]
    given = {call.get("id") for call in every}
    free = (name for name in (f"call{n:05}" for n in itertools.count(1)) if name not in given)
    open_calls: list[dict[str, Any]] = []
    for number, message in enumerate(messages, 1):
        where = f"message {number}: "
        if message["role"] == "assistant":
            open_calls = list(message.get("tool_calls", []))
            # Without tools a text about such calls is a text.
            texts = WRITTEN.findall(message["content"]) if names else []
            for call in [*open_calls, *(one for text in texts for one in calls_of(text, where))]:
                name = call["function"]["name"]
                if names and name not in names:
                    raise ValueError(
                        f"{where}calls {name!r}, which is not in tools ({', '.join(names):.200})"
                    )
            for call in open_calls:
                if "id" not in call:
                    call["id"] = next(free)
        elif message["role"] == "tool":
            own = [call for call in open_calls if call["id"] == message.get("tool_call_id")]
            if not own and "tool_call_id" not in message:
                own = open_calls[:1]  # in the order of the calls
            written = any(WRITTEN.search(one["content"]) for one in messages[: number - 1])
            if not own and not written:
                raise ValueError(f"{where}a tool's result without a call before it")
            for call in own:
                open_calls.remove(call)
                message["tool_call_id"] = call["id"]
                message["name"] = call["function"]["name"]
        elif message["role"] == "user":
            open_calls = []


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no value of JSON")


def _parsed(value: object, name: str) -> Any:
    """`value`, read as JSON where it is a text."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value, parse_constant=_no_constant)
    except ValueError as error:
        raise ValueError(f"{name}: not JSON: {error}") from None
