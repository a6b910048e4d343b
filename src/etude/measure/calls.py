"""Calls of tools: those that a model wrote, compared with those that were due."""

import json
from collections.abc import Sequence
from typing import Any

from etude.conversation.messages import Message
from etude.engine.generation import Response
from etude.measure.intervals import proportion


def call_metrics(
    conversations: Sequence[Sequence[Message]], responses: Sequence[Response], level: float
) -> dict[str, dict[str, float]]:
    """Shares over the rows with tools, each with its interval; empty where no row has any.

    Of the rows in which a call was due: right tool (the names are those of the reference), right
    arguments (calls equal to the reference's as JSON, in any order), missing calls. Of the rows in
    which a call was written: valid calls (they can be read). Of the rows in which none was due:
    calls where none was due.

    Args:
        conversations: each with the reference answer last.
        responses: what the model wrote in its place.
        level: coverage of the intervals, such as 0.95.
    """
    due: list[dict[str, bool]] = []
    valid: list[bool] = []
    undue: list[bool] = []
    for messages, response in zip(conversations, responses, strict=True):
        wanted = messages[-1].get("tool_calls", [])
        if offered(messages) is None:
            continue
        written = bool(response.calls) or response.malformed
        if written:
            valid.append(not response.malformed)
        if not wanted:
            undue.append(written)
            continue
        due.append(
            {
                "right tool": names(wanted) == names(response.calls),
                "right arguments": canonical(wanted) == canonical(response.calls),
                "missing calls": not written,
            }
        )
    found = {name: [row[name] for row in due] for name in due[0]} if due else {}
    found |= {"valid calls": valid, "calls where none was due": undue}
    return {
        name: proportion(sum(hits), len(hits), level=level) for name, hits in found.items() if hits
    }


def offered(messages: Sequence[Message]) -> list[dict[str, Any]] | None:
    """The tools of a conversation with a reference answer last; None if no call can be due."""
    tools = messages[0].get("tools", [])
    return tools if tools or messages[-1].get("tool_calls") else None


def functions(calls: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Name and arguments of each call."""
    return [call["function"] for call in calls]


def names(calls: Sequence[dict[str, Any]]) -> list[str]:
    """The tools that are called, sorted."""
    return sorted(function["name"] for function in functions(calls))


def canonical(calls: Sequence[dict[str, Any]]) -> list[str]:
    """The calls as texts that are equal where they are equal as JSON: 2.0 is 2, the order of keys is none."""

    def number(text: str) -> float | int:
        value = float(text)
        return int(value) if value.is_integer() else value

    texts = (
        json.dumps({"name": one["name"], "arguments": one["arguments"]}) for one in functions(calls)
    )
    return sorted(
        json.dumps(json.loads(text, parse_float=number), sort_keys=True) for text in texts
    )
