"""A conversation as it goes on: what was said, what of it fits the window, and its file."""

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from etude.conversation.messages import Message, with_tools
from etude.conversation.renderer import Renderer
from etude.errors import UserError, first_line
from etude.files import read_text, write_text


def fit(
    renderer: Renderer, messages: Sequence[Message], window: int | None, reserve: int
) -> tuple[list[Message], int]:
    """The messages that leave `reserve` tokens of `window` free, and how many turns were dropped.

    A turn is a user message with its answer, calls and their results included. The oldest go first;
    a system message and the last user message always stay.

    Raises:
        UserError: the last user message alone does not fit.
    """
    head = [message for message in messages[:1] if message["role"] == "system"]
    turns = [index for index, message in enumerate(messages) if message["role"] == "user"]
    if window is None or not turns:
        return list(messages), 0
    room = window - reserve
    tools = messages[0].get("tools", [])

    def kept(dropped: int) -> list[Message]:
        return with_tools([*head, *messages[turns[dropped] :]], tools)

    def size(dropped: int) -> int:
        return len(renderer.prompt(kept(dropped)))

    dropped = bisect_left(range(len(turns)), True, key=lambda dropped: size(dropped) <= room)
    if dropped == len(turns):
        raise UserError(
            f"The prompt has {size(dropped - 1):,} tokens, and {max(room, 0):,} fit: the model's "
            f"window of {window:,} less max_new_tokens {reserve:,}. Shorten it, or lower the latter"
        )
    return kept(dropped), dropped


@dataclass
class Conversation:
    """What was said: questions, and answers in words or by calls and their results.

    Attributes:
        tools: the functions that may be called.
    """

    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)

    @property
    def pending(self) -> bool:
        """Whether the last question has no answer in words yet."""
        last = self.messages[-1:]
        return bool(last) and (last[0]["role"] != "assistant" or "tool_calls" in last[0])

    def ask(self, text: str) -> None:
        """Add a question, in place of one that never got an answer."""
        if self.pending:
            self.undo()
        self.messages.append({"role": "user", "content": text})

    def answer(self, message: Message) -> None:
        """Add the answer to the pending question; its calls get their ids."""
        count = sum(len(earlier.get("tool_calls", [])) for earlier in self.messages)
        for number, call in enumerate(message.get("tool_calls", []), count + 1):
            call["id"] = f"call{number:05}"
        self.messages.append(message)

    def give(self, call: dict[str, Any], result: str) -> None:
        """Add the result of a call."""
        self.messages.append(
            {
                "role": "tool",
                "content": result,
                "tool_call_id": call["id"],
                "name": call["function"]["name"],
            }
        )

    def take_answer(self) -> list[Message]:
        """Drop what followed the last question, and return it."""
        asked = [at for at, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            raise UserError("Nothing was asked yet")
        answer = self.messages[asked[-1] + 1 :]
        del self.messages[asked[-1] + 1 :]
        return answer

    def undo(self) -> str:
        """Drop the last question and its answer; return the question."""
        self.take_answer()
        return self.messages.pop()["content"]

    def sent(self) -> list[Message]:
        """The messages as the renderer takes them: a system prompt of this chat first, the tools."""
        system: list[Message] = []
        if self.system is not None:
            system = [{"role": "system", "content": self.system}]
        return with_tools([*system, *self.messages], self.tools)


# Which roles may follow one in a saved conversation.
FOLLOWING = {"user": ["assistant"], "assistant": ["user"], "tool": ["assistant", "tool"]}


def save(conversation: Conversation, path: Path) -> None:
    """Write a conversation as JSON to a new file; one that exists is not touched."""
    try:
        write_text(path, json.dumps(asdict(conversation), ensure_ascii=False, indent=2), new=True)
    except FileExistsError:
        raise UserError(f"{path} exists and is not overwritten; choose another name") from None
    except (OSError, ValueError) as error:  # a name can hold what no file system takes
        raise UserError(f"{path}: cannot be written: {first_line(error)}") from None


def load(path: Path) -> Conversation:
    """Read a conversation that `save` wrote, and check its form."""
    try:
        value = json.loads(read_text(path))
        json.dumps(value, ensure_ascii=False).encode()  # JSON can spell half a character
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a saved conversation: {error}") from None
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(messages, list) or not isinstance(value.get("system"), str | None):
        raise UserError(
            f'{path}: not a saved conversation: an object with "system" (text or null) and '
            '"messages" is expected'
        )
    allowed = ["user"]
    for number, message in enumerate(messages, 1):
        known = isinstance(message, dict) and message.keys() <= Message.__annotations__.keys()
        if (
            not known
            or message.get("role") not in allowed
            or not isinstance(message.get("content"), str)
        ):
            role = " or ".join(f'"{role}"' for role in allowed)
            raise UserError(f"{path}: message {number}: role {role} with a content is expected")
        allowed = FOLLOWING[message["role"]]
        if message.get("tool_calls"):
            allowed = ["tool", "user"]
    return Conversation(value.get("system"), messages, value.get("tools") or [])
