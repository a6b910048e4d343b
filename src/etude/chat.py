"""A run or a base, answering in the terminal: once (--prompt, a pipe) or as a conversation."""

import re
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from etude import console
from etude.config.loading import parse_override
from etude.config.schema import Generation
from etude.conversation.history import Conversation, load, save
from etude.data.calls import calls_of, tools_of
from etude.engine.generation import Response
from etude.errors import UserError, command, nearest, shortage
from etude.files import expanded, read_text
from etude.model import Model, sampling
from etude.models import gguf
from etude.runs import opening
from etude.terminal import Writer, piped_line, prompt_session, say, shown, typed_line

COMMANDS = {
    "help": "this list",
    "reset": "forget the conversation; system prompt and settings stay",
    "undo": "drop the last question and its answer",
    "retry": "drop the last answer and ask again",
    "system": "[TEXT] show the system prompt, or set it; - goes back to the run's own",
    "set": "KEY VALUE  change one of: "
    + ", ".join(key for key in Generation.model_fields if key != "thinking"),
    "show": "the model, the settings, how full the context window is",
    "save": "FILE  write the conversation as JSON",
    "load": "FILE  go on with a saved conversation",
    "exit": "leave; so do /quit and Ctrl-D",
}
KEYS = (
    "Enter sends, Alt-Enter begins a new line, Ctrl-C stops an answer. A message that begins with / "
    "is written with // instead."
)


@console.command
def chat(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN|MODEL] [KEY=VALUE]...",
            help="a run folder or a model name (default: the newest run), and settings",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="answer this once, on stdout")] = None,
    system: Annotated[str | None, typer.Option(help="the system prompt")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="base and tuned, in turn")] = False,
    tools: Annotated[
        str | None, typer.Option(metavar="FILE", help="functions it may call, as JSON schemas")
    ] = None,
) -> None:
    """Chat with a run or a model. Text from a pipe is one prompt, answered once."""
    name, overrides = console.split_arguments(arguments or [])
    if sys.stdout is None:
        raise UserError("stdout is closed, so no answer could be shown; leave it open")
    question = read_question(prompt)
    conversation = Conversation(system, tools=read_tools(tools) if tools else [])
    name = name or default_target(overrides)
    if question is None:
        say(f"Loading {name} ...")
    talk = Talk(opening.open_target(name, overrides), conversation, compare, question is not None)
    try:
        if question is None:
            interactive(talk)
        elif talk.ask(question).interrupted:
            raise KeyboardInterrupt
    except BrokenPipeError:  # the reader of a pipe left, e.g. `| head`
        sys.stdout = None


def read_question(prompt: str | None) -> str | None:
    """The one prompt of --prompt or of a pipe; None in a terminal, where a conversation begins."""
    where = "stdin" if prompt is None else "--prompt"
    if prompt is None and sys.stdin is None:
        raise UserError(f"{where} is closed; give a question: etude chat --prompt TEXT")
    if prompt is None and sys.stdin.isatty():
        return None
    try:
        # Bytes that are not UTF-8 arrive in arguments as lone surrogates, which do not encode.
        raw = sys.stdin.buffer.read() if prompt is None else prompt.encode()
        text = raw.decode().rstrip("\r\n")
    except UnicodeError as error:
        raise UserError(f"{where}: the prompt is not UTF-8 text: {error}") from None
    if not text.strip():
        raise UserError(f"{where}: the prompt is empty; give one: etude chat --prompt TEXT")
    return text


def read_tools(file: str) -> list[dict[str, Any]]:
    """The functions of a file: a JSON list of schemas, as in a row's column tools."""
    try:
        return tools_of(read_text(expanded(file)))
    except OSError as error:
        raise UserError(f"--tools: {file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(
            f"--tools: {file}: {error}; a JSON list of functions is expected: "
            '[{"name": "...", "description": "...", "parameters": {...}}]'
        ) from None


def default_target(overrides: Sequence[str]) -> str:
    """What to open when nothing is named: the newest run with an adapter, else the sample model."""
    named = [text.partition("=")[2] for text in overrides if text.startswith("model.name=")]
    if named:
        return named[-1]
    adapters = sorted(Path("runs").glob("*/adapter_config.json"), key=lambda p: p.stat().st_mtime)
    if adapters:
        folder = str(adapters[-1].parent)
        say(f"The newest run: {folder}")
        return folder
    say(f"No run under runs/ yet: this is the sample model, {gguf.SAMPLE}, untuned")
    return gguf.SAMPLE


class Talk:
    """A model in conversation: what is said, how it is sampled, the terminal it is shown on.

    Attributes:
        quiet: whether stdout has the answer alone, and nothing is said about one that is whole.
        result: asks for the result of a call; None if there is none.
    """

    def __init__(
        self, target: opening.Target, conversation: Conversation, compare: bool, quiet: bool
    ) -> None:
        """Take the model to answer with."""
        if compare and target.adapter is None:
            raise UserError(
                f"--compare: {target.base.name} is a base; name a run: etude chat runs/NAME --compare"
            )
        # Unmerged, the adapter can be switched off.
        network = target.with_adapter() if compare else target.tuned()
        self.model, self.conversation, self.quiet = Model(target, network), conversation, quiet
        self.compare, self.settings = compare, target.config.generation
        self.result: Callable[[str], str | None] = piped_line

    def ask(self, text: str) -> Response:
        """Ask and show the answer."""
        self.conversation.ask(text)
        return self.answer()

    def retry(self) -> None:
        """Ask the last question again; its former answer comes back if there is no new one."""
        former = self.conversation.take_answer()
        try:
            self.answer()
        finally:
            if former and self.conversation.pending:
                self.conversation.take_answer()
                self.conversation.messages += former
                say("The former answer stays in the conversation.")

    def answer(self) -> Response:
        """Answer the pending question on stdout; if comparing, with the base first.

        The conversation goes on with the tuned answer, even one cut short. A call is shown, and its
        result asked for, until the model answers in words.

        Raises:
            KeyboardInterrupt: stopped before there was anything to keep.
            UserError: the question does not fit, or the chat template refuses it.
        """
        if self.compare:
            console.out.print("base:", style="bold")
            with self.model.network.disable_adapter():
                if self._write().interrupted:
                    raise KeyboardInterrupt
            console.out.print("\ntuned:", style="bold")
        while True:
            response = self._write()
            if response.interrupted and (response.calls or not response.text):
                raise KeyboardInterrupt
            self.conversation.answer(response.message)
            for call in response.calls:
                result = self.result(f"{call['function']['name']}> ")
                if result is None and self.quiet:  # the calls are the answer
                    print("\n".join(map(shown, response.calls)), flush=True)
                    return response
                if result is None:
                    raise KeyboardInterrupt
                self.conversation.give(call, result)
            if not response.calls:
                break
        if response.interrupted and not self.quiet:
            say("What is above stays in the conversation; /undo drops it, /retry asks again.")
        return response

    def _write(self) -> Response:
        started, writer = time.perf_counter(), Writer(self.quiet)
        response, dropped = self.model.respond(self.conversation.sent(), self.settings, writer)
        seconds = time.perf_counter() - started
        writer.end()
        for call in response.calls:
            say(shown(call), style="bold")
        if dropped:
            say(f"The window is full; turns at the beginning that were not sent: {dropped}")
        status = f"{response.tokens:,} token{'s'[: response.tokens != 1]}"
        if response.reasoning:
            tokenizer = self.model.target.base.tokenizer
            status += f", {len(tokenizer.tokenize(response.reasoning)):,} of them reasoning"
        status += f", {response.tokens / seconds:.1f} tokens/s"
        if response.interrupted:
            status += "; stopped by Ctrl-C"
        elif not response.finished:
            status += f"; stopped at max_new_tokens {self.settings.max_new_tokens:,}"
        status += "; a call that cannot be read" * response.malformed
        if not (self.quiet and response.finished and not response.malformed):
            say(status)
        return response


def interactive(talk: Talk) -> None:
    """Read lines and act on them until /exit or Ctrl-D; no error ends the conversation."""
    target = talk.model.target
    name = f"{target.adapter} on {target.base.name}" if target.adapter else target.base.name
    say(f"{name}, {target.base.device.name}. /help lists the commands, Ctrl-D leaves.")
    if target.config.dataset.labels:
        asking = command("etude", "evaluate", target.adapter or target.base.name, "--text", "TEXT")
        say(f"This run classifies: {asking} asks as in training.")
    session = prompt_session(COMMANDS)
    talk.result = lambda question: typed_line(session, question)
    while True:
        try:
            line = typed_line(session, "> ")
        except KeyboardInterrupt:
            say("Ctrl-D or /exit leaves.")
            continue
        if line is None:
            return
        try:
            if line and handle(talk, line):
                return
        except KeyboardInterrupt:
            say("\nstopped")
        except BrokenPipeError:  # nobody reads the answers
            raise
        except Exception as error:  # out of memory, say: what was said so far must not be lost
            kind = "" if isinstance(error, UserError) else f"\n{type(error).__name__}: "
            say(shortage(error) or f"{kind}{error}", style="red")
        else:
            continue
        if talk.conversation.pending:
            say("The question is kept: /retry asks it again, a new one takes its place.")


def handle(talk: Talk, line: str) -> bool:
    """Act on one line, a question or a command; True if it was the last one."""
    if not line.startswith("/") or line.startswith("//"):
        talk.ask(line[1:] if line.startswith("//") else line)
        return False
    name, rest = (*line[1:].split(maxsplit=1), "", "")[:2]
    conversation = talk.conversation
    if rest and name in ("help", "reset", "undo", "retry", "show", "exit", "quit"):
        raise UserError(f"/{name} takes nothing after it; // begins a message with a slash")
    if not rest and name in ("set", "save", "load"):
        raise UserError(f"usage: /{name} {COMMANDS[name]}")
    match name:
        case "help":
            say("\n".join(f"/{key:<7} {about}" for key, about in COMMANDS.items()) + f"\n{KEYS}")
        case "reset":
            conversation.messages.clear()
            say("The conversation is forgotten.")
        case "undo":
            say(f"Dropped: {textwrap.shorten(conversation.undo(), 70)}")
        case "retry":
            talk.retry()
        case "system":
            if rest:
                conversation.system = None if rest == "-" else rest
            say(f"system prompt: {system_prompt(talk)}")
        case "set":
            key, value = (*re.split(r"[\s=]+", rest, maxsplit=1), "")[:2]
            talk.settings = changed(talk.settings, key, value)
            say(f"{key} {getattr(talk.settings, key)}")
        case "show":
            say(overview(talk))
        case "save":
            save(conversation, expanded(rest))
            say(f"Saved to {rest}")
        case "load":
            talk.conversation = loaded(expanded(rest), conversation.tools)
            say(f"{len(talk.conversation.messages)} messages; system prompt: {system_prompt(talk)}")
        case "exit" | "quit":
            return True
        case _:
            guess = nearest(name, COMMANDS)
            hint = f"did you mean /{guess}?" if guess else "/help lists them;"
            raise UserError(f"/{name}: no such command; {hint} // begins a message with a slash")
    return False


def loaded(path: Path, tools: list[dict[str, Any]]) -> Conversation:
    """A saved conversation, its tools and calls checked; `tools` are offered where it has none."""
    conversation = load(path)
    try:
        conversation.tools = tools_of(conversation.tools) if conversation.tools else tools
        for message in conversation.messages:
            calls_of(message.get("tool_calls", []), f"{message['role']}: ")
    except ValueError as error:
        raise UserError(f"{path}: not a saved conversation: {error}") from None
    return conversation


def changed(settings: Generation, key: str, value: str) -> Generation:
    """The settings with one changed, checked by the schema of config.yml."""
    if not value:
        raise UserError(f"/set {key}: the value is missing; for example: /set temperature 0.7")
    return sampling(settings, parse_override(f"generation.{key}={value}").values["generation"])


def system_prompt(talk: Talk) -> str:
    """The system prompt in force, for a person to read."""
    own = talk.model.target.renderer.system_prompt or "(the chat template's own)"
    return own if talk.conversation.system is None else talk.conversation.system


def overview(talk: Talk) -> str:
    """What /show prints."""
    target, messages = talk.model.target, talk.conversation.messages
    tokens = len(target.renderer.prompt(talk.conversation.sent())) if messages else 0
    rows = {
        "model": f"{target.base.name}, {target.base.device.name}, {target.base.device.dtype}",
        "adapter": target.adapter or "none",
        "system": system_prompt(talk),
        **talk.settings.model_dump(),
        "history": f"{len(messages)} messages, {tokens:,} tokens"
        + (f" of a window of {talk.model.window:,}" if talk.model.window else ""),
    }
    return "\n".join(f"{key:<19} {value}" for key, value in rows.items())


if __name__ == "__main__":
    typer.run(chat)
