"""The messages of a conversation, and how they are written for a template that lacks a part of them.

Some templates have no system role, no tools, or no reasoning. What they lack is written into the
contents that they do have, the same in training, evaluation and chat.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Required, TypedDict

ROLES = ("system", "user", "assistant", "tool")

# How Qwen2.5 and Hermes announce tools: what most open models have seen.
TOOLS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


class Message(TypedDict, total=False):
    """One turn of a conversation.

    Attributes:
        reasoning_content: the thoughts before an answer.
        tool_calls: of an assistant: ``{"type": "function", "function": {"name", "arguments"}}``.
        tool_call_id: of a tool's result: the call that it belongs to.
        name: of a tool's result: the tool.
        tools: on the first message: the functions that may be called, as JSON schemas.
    """

    role: Required[str]
    content: Required[str]
    reasoning_content: str
    tool_calls: list[dict[str, Any]]
    tool_call_id: str
    name: str
    tools: list[dict[str, Any]]


def strings(value: Any) -> Iterator[str]:
    """Every text in a value of JSON, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """`value`, of JSON, with every text in it changed, keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): map_strings(inner, change) for key, inner in value.items()}
    if isinstance(value, list):
        return [map_strings(inner, change) for inner in value]
    return value


def separate_reasoning(message: Message) -> Message:
    """The message with a think block at the beginning of its content as its reasoning."""
    content = message["content"].lstrip()
    if "reasoning_content" in message or not content.startswith("<think>"):
        return message
    thought, closed, answer = content.removeprefix("<think>").partition("</think>")
    if not closed:
        return message
    return {**message, "reasoning_content": thought.strip("\n"), "content": answer.lstrip("\n")}


def join_reasoning(message: Message) -> Message:
    """The message with its reasoning as a think block of its content."""
    if "reasoning_content" not in message:
        return message
    content = f"<think>\n{message['reasoning_content']}\n</think>\n\n{message['content']}"
    return without({**message, "content": content}, "reasoning_content")


def join_system(messages: Sequence[Message]) -> list[Message]:
    """The messages with the system prompt in front of the first user message."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return list(messages)
    system, user, *rest = messages
    joined: Message = {**user, "content": f"{system['content']}\n\n{user['content']}"}
    return with_tools([joined, *rest], system.get("tools", []))


def join_tools(messages: Sequence[Message]) -> list[Message]:
    """The messages with tools, calls and results written into the contents, as Qwen2.5 does."""
    joined: list[Message] = []
    before = ""  # the role of the message before
    for message in messages:
        if calls := message.get("tool_calls"):
            texts = [f"<tool_call>\n{dumps(call['function'])}\n</tool_call>" for call in calls]
            content = "\n".join([message["content"]] * bool(message["content"]) + texts)
            joined.append(without({**message, "content": content}, "tool_calls"))
        elif message["role"] == "tool":
            content = f"<tool_response>\n{message['content']}\n</tool_response>"
            if before == "tool":  # the results of one answer are one turn
                content = f"{joined.pop()['content']}\n{content}"
            joined.append({"role": "user", "content": content})
        else:
            joined.append(message)
        before = message["role"]
    tools = joined[0].get("tools") if joined else None
    if not tools:
        return joined
    text = TOOLS.format(tools="\n".join(map(dumps, tools)))
    first, *rest = [without(joined[0], "tools"), *joined[1:]]
    if first["role"] == "system":
        return [{**first, "content": f"{first['content']}\n\n{text}"}, *rest]
    return [{"role": "system", "content": text}, first, *rest]


def with_tools(messages: list[Message], tools: list[dict[str, Any]]) -> list[Message]:
    """The messages with the tools on the first."""
    return [{**messages[0], "tools": tools}, *messages[1:]] if messages and tools else messages


def without(message: Message, key: str) -> Message:
    """A copy of the message without one of its keys."""
    return {name: value for name, value in message.items() if name != key}  # type: ignore[return-value]


def dumps(value: Any) -> str:
    """`value` as templates write JSON: in one line, letters as they are."""
    return json.dumps(value, ensure_ascii=False)
