"""The terminal of a chat: answers as they are written, lines and results as they are typed."""

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from etude import console
from etude.conversation.messages import dumps
from etude.models import gguf

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession


class Writer:
    """Shows an answer piece by piece: no control characters, no white space around it.

    Reasoning comes first, dimmed in a terminal; on stderr where stdout is for the answer alone.
    """

    def __init__(self, quiet: bool = False) -> None:
        """Begin an answer; `quiet` keeps stdout for the answer alone."""
        self._quiet, self._held, self._begun, self._reasoning = quiet, "", False, False

    def __call__(self, piece: str, reasoning: bool) -> None:
        """Write `piece`, but for white space that nothing has followed yet."""
        stream = sys.stderr if reasoning and self._quiet else sys.stdout
        if self._reasoning and not reasoning:
            print("\n", file=sys.stderr if self._quiet else sys.stdout, flush=True)
            self._held, self._begun = "", False
        self._reasoning = reasoning
        text = self._held + console.printable(piece)
        text = text if self._begun else text.lstrip()
        visible = text.rstrip()
        self._begun, self._held = self._begun or bool(visible), text[len(visible) :]
        dim = reasoning and stream.isatty()
        print(f"\x1b[2m{visible}\x1b[22m" if dim else visible, end="", file=stream, flush=True)

    def end(self) -> None:
        """End the line that is begun, if any."""
        if self._reasoning or self._begun:
            print(file=sys.stderr if self._reasoning and self._quiet else sys.stdout, flush=True)


def shown(call: dict[str, Any]) -> str:
    """A call for a person to read."""
    function = call["function"]
    return f"{function['name']} {dumps(function['arguments'])}"


def say(text: str, style: str = "dim") -> None:
    """A notice to the person, on stderr."""
    console.err.print(console.printable(text), style=style, markup=False)


def typed_line(session: "PromptSession[str]", question: str) -> str | None:
    """A line as it is typed; None at Ctrl-D."""
    try:
        # Bytes that are no UTF-8 come in as lone surrogates, which neither file nor model takes.
        return session.prompt([("bold", question)]).rstrip().encode(errors="replace").decode()
    except EOFError:
        return None


def piped_line(question: str) -> str | None:
    """The next line of stdin, where stdout is for the answer alone; None if there is no more."""
    if sys.stdin is None:
        return None
    if sys.stdin.isatty():
        say(question)
    return sys.stdin.readline().rstrip("\r\n") or None


def prompt_session(commands: Iterable[str]) -> "PromptSession[str]":
    """The line editor: history on disk, several lines, commands completed by Tab."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    file, history = gguf.cache_folder() / "history", None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        history = FileHistory(file)
    except OSError:  # a read-only home: the arrow keys still work within this chat
        pass
    return PromptSession(
        history=history,
        key_bindings=keys,
        prompt_continuation="  ",
        completer=WordCompleter([f"/{name}" for name in commands], sentence=True),
        complete_while_typing=False,
    )
