"""A conversation as it goes on: what was said, what of it fits the window, and its file."""

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from etude.conversation.renderer import Message, Renderer
from etude.errors import UserError
from etude.files import read_text, write_text


def fit(
    renderer: Renderer, messages: Sequence[Message], window: int | None, reserve: int
) -> tuple[list[Message], int]:
    """The messages that leave `reserve` tokens of `window` free, and how many turns were dropped.

    A turn is a user message with its answer. The oldest go first; a system message and the last
    user message always stay.

    Raises:
        UserError: the last user message alone does not fit.
    """
    head = [message for message in messages[:1] if message["role"] == "system"]
    turns = [index for index, message in enumerate(messages) if message["role"] == "user"]
    if window is None or not turns:
        return list(messages), 0
    room = window - reserve

    def size(dropped: int) -> int:
        return len(renderer.prompt([*head, *messages[turns[dropped] :]]))

    dropped = bisect_left(range(len(turns)), True, key=lambda dropped: size(dropped) <= room)
    if dropped == len(turns):
        raise UserError(
            f"The prompt has {size(dropped - 1):,} tokens, and {max(room, 0):,} fit: the model's "
            f"window of {window:,} less max_new_tokens {reserve:,}. Shorten it, or lower the latter"
        )
    return [*head, *messages[turns[dropped] :]], dropped


@dataclass
class Conversation:
    """What was said. User and assistant take turns; the last question may still be unanswered."""

    system: str | None = None
    messages: list[Message] = field(default_factory=list)

    @property
    def pending(self) -> bool:
        """Whether the last question has no answer yet."""
        return bool(self.messages) and self.messages[-1]["role"] == "user"

    def ask(self, text: str) -> None:
        """Add a question, in place of one that never got an answer."""
        if self.pending:
            self.messages.pop()
        self.messages.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        """Add the answer to the pending question."""
        self.messages.append({"role": "assistant", "content": text})

    def take_answer(self) -> str | None:
        """Drop the last answer and return it; None if the last question is still pending."""
        if not self.messages:
            raise UserError("Nothing was asked yet")
        return None if self.pending else self.messages.pop()["content"]

    def undo(self) -> str:
        """Drop the last question and its answer; return the question."""
        self.take_answer()
        return self.messages.pop()["content"]

    def sent(self) -> list[Message]:
        """The messages as the renderer takes them, a system prompt of this chat first."""
        if self.system is None:
            return list(self.messages)
        return [{"role": "system", "content": self.system}, *self.messages]


def save(conversation: Conversation, path: Path) -> None:
    """Write a conversation as JSON to a new file; one that exists is not touched."""
    if not path.name:
        raise UserError(f"{path} is no file name; for example: /save talk.json")
    try:
        data = json.dumps(asdict(conversation), ensure_ascii=False, indent=2)
        write_text(path, data, new=True)
    except FileExistsError:
        raise UserError(f"{path} exists and is not overwritten; choose another name") from None
    except (OSError, ValueError) as error:  # a name can hold what no file system takes
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be written: {reason}") from None


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
    for number, message in enumerate(messages, 1):
        role = "user" if number % 2 else "assistant"
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, str) or message != {"role": role, "content": content}:
            raise UserError(f'{path}: message {number}: role "{role}" with a content is expected')
    return Conversation(value.get("system"), messages)
