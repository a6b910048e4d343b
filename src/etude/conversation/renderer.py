"""The one renderer: messages in, token ids and the mask of supervised tokens out.

Training, evaluation and chat all come through here; nothing else knows a chat token. Three
properties hold by construction and are tested token by token:

- An answer is trained in the context in which it will be generated: the template's own prompt over
  the messages before it, with the ids that the tokenizer gives for that prompt.
- Text of a message never becomes a control token, whatever it spells.
- What the model would have to write next is supervised, the end token included.

How: for each answer the template writes two texts, the prompt and the conversation with the answer
at its end; what the second has beyond the first is the answer's own text. Where the next prompt
begins with all of that, both are one example; where the template rewrites an earlier answer (drops
its reasoning, say), the next answer is an example by itself.
"""

import contextlib
import datetime
import hashlib
import json
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from etude.conversation import calling
from etude.conversation import messages as forms
from etude.conversation.encoding import Encoder, Example, RenderError, common
from etude.conversation.messages import ROLES, Message
from etude.errors import UserError, first_line

ANOTHER_WAY = "the template writes the prompt of an answer in another way once it is answered"
CALL = calling.call("look_up", place="Rome")
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks up a place.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "description": "the place"}},
            "required": ["place"],
        },
    },
}


class Parts(NamedTuple):
    """What a response is made of.

    Attributes:
        text: the answer, without calls.
        malformed: whether a call has begun that cannot be read; then it is in the text.
    """

    reasoning: str
    text: str
    calls: Sequence[dict[str, Any]] = ()
    malformed: bool = False


class Renderer:
    """A tokenizer's chat template, with what it takes to render and to stop.

    Attributes:
        template: the Jinja text in use.
        system_prompt: put before conversations that have no system message, or None.
        date: the day that a template which asks for it writes; None for the clock's own.
        thinking: handed to a template that knows such a switch: true, false, or auto for its default.
        end_of_turn: id of the control token that ends an answer.
        stop_ids: ids at which generation ends: those that end an answer or a call, and the tokenizer's own.
        lacks: of "system", "reasoning" and "tools", what the template does not know.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str | None = None,
        system_prompt: str | None = None,
        date: datetime.date | None = None,
        thinking: bool | str = "auto",
    ) -> None:
        """Take the tokenizer's own template unless one is given; check it on small conversations.

        Raw text (`text`) needs no template, so one that is missing, or whose ids cannot be
        reproduced, is an error of the first conversation.
        """
        self.tokenizer = tokenizer
        if template is None:
            with contextlib.suppress(ValueError):  # it has none
                template = str(tokenizer.get_chat_template())
        self.template = template
        self.system_prompt = system_prompt
        self.thinking = thinking
        dated = _dated(template, date) if template and date else template
        # A call with a format that is computed cannot be replaced: then the clock's date stays.
        self.date = date if dated != template and "strftime_now(" not in (dated or "") else None
        self._jinja = dated if self.date else template
        self.encoder = Encoder(tokenizer)
        self.lacks: set[str] = set()
        self._switch = {} if thinking == "auto" else {"enable_thinking": thinking}
        self._thinks_if_asked = False  # its prompt is without thoughts, but for thinking: true
        self._call_form = 0  # see `_official`
        self._end = ""  # the control token after an answer
        # Where there is none: what begins the next turn, after an answer in words and after a call.
        self._after = ["", ""]
        self._opened = ""  # the end of the prompt, where answers that are given lack it
        # What is written before and after an answer; before a thought, and between it and its answer.
        self._opening, self._closing = "", ""
        self._thought: tuple[str, str] | None = None
        self._calls: calling.Format | None = None
        self._probe_ids: list[int] = []
        self._fault: UserError | None = None  # why no conversation can be rendered
        ends = set[int]()
        if template is None:
            self._fault = UserError(
                "The tokenizer of this model has no chat template, so conversations cannot be "
                "rendered. Take an instruct model, or give the template: "
                "model.chat_template: FILE.jinja"
            )
        else:
            try:
                ends = self._check()
            except UserError as error:
                self._fault = UserError(
                    f"The chat template cannot be used for training: {error}. Give another: "
                    "model.chat_template: FILE.jinja"
                )
        self.end_of_turn: int | None = self.encoder.control.get(self._end, tokenizer.eos_token_id)
        self.stop_ids = sorted({self.end_of_turn, tokenizer.eos_token_id, *ends} - {None})

    # --- messages to ids -----------------------------------------------------------------------

    def render(self, messages: Sequence[Message], untrained: Collection[int] = ()) -> list[Example]:
        """Turn a conversation into examples, with every assistant turn and its end token supervised.

        One example, unless the template writes an earlier answer otherwise than it was generated.
        The answers whose index is in `untrained` are not supervised, nor is one without a message
        before it for which the template has no prompt.

        Raises:
            RenderError: unknown role, or a template that refuses, alters or drops a message.
        """
        answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        examples: list[Example] = []
        ids: list[int] = []
        supervised = bytearray()
        for at in answers:
            try:
                prompt, target = self._turn(messages[: at + 1])
            except RenderError:
                if at != answers[0] or any(m["role"] == "user" for m in messages[:at]):
                    raise
                continue
            if prompt[: len(ids)] != ids:  # the template rewrites what came before
                if any(supervised):
                    examples.append(Example(ids, supervised))
                supervised = bytearray()
                ids = []
            supervised += bytes(len(prompt) - len(ids))
            supervised += bytes([at not in untrained]) * len(target)
            ids = prompt + target
        if any(supervised) or not examples:
            examples.append(Example(ids, supervised))
        return examples

    def answer(self, messages: Sequence[Message]) -> Example:
        """A conversation as ids with its last message, an answer, supervised.

        Raises:
            RenderError: as `render`.
        """
        prompt, target = self._turn(messages)
        return Example(prompt + target, bytes(len(prompt)) + b"\1" * len(target))

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to where the model's next answer begins.

        Raises:
            RenderError: as `render`.
        """
        messages, originals = self._shielded(messages)
        text = self._text(messages, generation_prompt=True)
        self._check_kept(messages, text)
        return self.encoder.start(text, originals)

    def _turn(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """The ids of the prompt of the last message, an answer, and those that the model is to write."""
        messages, originals = self._shielded(messages)
        before = messages[:-1]
        if self._thinks_if_asked and "reasoning_content" in messages[-1]:
            raise RenderError(
                "the template's prompt asks for an answer without reasoning; set "
                "generation.thinking: true to train it, false to leave it out"
            )
        prompt = self._text(before, generation_prompt=True)
        self._check_kept(before, prompt)
        target = self._ended(self._target(messages, prompt), messages)
        names = [call["function"]["name"] for call in messages[-1].get("tool_calls", [])]
        dropped = any(target.count(name) < names.count(name) for name in names)
        parts = (messages[-1]["content"], messages[-1].get("reasoning_content", ""))
        if dropped or any(part.strip() not in target for part in parts):
            raise RenderError(
                f"the template alters or leaves out message {len(messages)} (assistant)"
            )
        start = self.encoder.start(prompt, originals)
        return start, self.encoder.go_on(prompt, target, originals)

    def _target(self, messages: Sequence[Message], prompt: str) -> str:
        """What the template writes of the last message beyond `prompt`, with all that follows it."""
        whole, answer = self._text(messages), messages[-1]
        if whole.startswith(prompt):
            return whole[len(prompt) :]
        begin = prompt.removesuffix(self._opened)
        if whole.startswith(begin):
            rest = whole[len(begin) :]
            if begin != prompt and prompt.rstrip().endswith("<think>") and "</think>" not in rest:
                # The template opens thoughts in the prompt, and drops them from answers.
                return f"{answer.get('reasoning_content', '')}\n</think>\n\n{rest}"
            return rest
        # What was before is written otherwise once it is answered: only the last question counts.
        asked = [at for at, message in enumerate(messages[:-1]) if message["role"] == "user"]
        alone = [*messages[asked[-1] : asked[-1] + 1], answer] if asked else messages
        if len(alone) < len(messages):
            return self._target(alone, self._text(alone[:-1], generation_prompt=True))
        raise RenderError(ANOTHER_WAY)

    def _ended(self, target: str, messages: Sequence[Message]) -> str:
        """`target` up to the control token that ends it."""
        answer = messages[-1]
        calls = answer.get("tool_calls", [])
        parts = [answer["content"].strip(), *forms.strings([call["function"] for call in calls])]
        # An answer can be a sign that is in a control token, too.
        bare = self.encoder.pattern.sub(lambda match: "\0" * len(match[0]), target)
        last = max((bare.rfind(part) for part in parts if part), default=-1)
        found = [match for match in self.encoder.pattern.finditer(target) if match.end() > last]
        ends = [match for match in found if match[0] == self._end] or found
        if ends:
            return target[: ends[-1].end()]
        following = self._after[bool(calls)]
        if not following:
            raise RenderError(
                "the template does not end an answer with a special token, so it could never stop"
            )
        return target + following

    def _shielded(self, messages: Sequence[Message]) -> tuple[list[Message], dict[int, str]]:
        """The messages as the template takes them, and what its output's stand-ins stand for."""
        for message in messages:
            if message["role"] not in ROLES:
                raise RenderError(f"unknown role {message['role']!r}; allowed: {', '.join(ROLES)}")
        return self.encoder.shield(self._adapted(messages))

    def _adapted(self, messages: Sequence[Message], system: bool = True) -> list[Message]:
        """The messages with what the template lacks written into their contents.

        `system`: with the system prompt, where they have none.
        """
        adapted = list(messages)
        prompted = system and self.system_prompt is not None
        if prompted and (not adapted or adapted[0]["role"] != "system"):
            first: Message = {"role": "system", "content": str(self.system_prompt)}
            tools = adapted[0].get("tools", []) if adapted else []
            adapted = forms.with_tools([first, *adapted], tools)
        if "reasoning" in self.lacks:
            adapted = [forms.join_reasoning(message) for message in adapted]
        else:
            adapted = [
                forms.separate_reasoning(message) if message["role"] == "assistant" else message
                for message in adapted
            ]
            if self.thinking is False:
                adapted = [forms.without(message, "reasoning_content") for message in adapted]
        if "tools" in self.lacks:
            adapted = forms.join_tools(adapted)
        return forms.join_system(adapted) if "system" in self.lacks else adapted

    def _text(self, messages: Sequence[Message], generation_prompt: bool = False) -> str:
        """What the template writes."""
        if self._fault:
            raise self._fault
        tools = messages[0].get("tools") if messages else None
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [_official(message, self._call_form) for message in messages],
                    tools=tools,
                    chat_template=self._jinja,
                    add_generation_prompt=generation_prompt,
                    tokenize=False,
                    **self._switch,
                )
            )
        except Exception as error:  # a template can divide by zero, recurse, or say why it refuses
            roles = ", ".join(message["role"] for message in messages) or "no message"
            raise RenderError(
                f"the template refuses the roles ({roles}): {first_line(error):.300}"
            ) from None

    def _check_kept(self, messages: Sequence[Message], text: str) -> None:
        """Raise RenderError where a message is not in the text as it is."""
        for number, message in enumerate(messages, 1):
            content = message["content"].strip()
            # Some write a tool's result as JSON. Of an earlier answer a template may keep a part.
            if message["role"] != "assistant" and not (
                content in text or forms.dumps(content)[1:-1] in text
            ):
                raise RenderError(
                    f"the template alters or leaves out message {number} ({message['role']})"
                )

    @property
    def writes_empty_thoughts(self) -> bool:
        """Whether the template writes a block of thoughts before an answer that has none."""
        return bool(self._thought and self._thought[1] and self._opening.endswith(self._thought[1]))

    def state(self) -> dict[str, Any]:
        """What a later loader must agree on: template, system prompt, stop tokens, probe ids."""
        return {
            "template": self.template,
            "system_prompt": self.system_prompt,
            "thinking": self.thinking,
            "stop_tokens": self.tokenizer.convert_ids_to_tokens(self.stop_ids),
            "date": self.date.isoformat() if self.date else None,
            # Where no date was fixed, one that writes it gives other ids tomorrow: no mismatch.
            "probe_sha256": None
            if "strftime_now" in (self.template or "") and self.date is None
            else hashlib.sha256(json.dumps(self._probe_ids).encode()).hexdigest(),
        }

    def check_state(self, stored: dict[str, Any], where: str) -> None:
        """Compare with the state stored beside an adapter.

        Raises:
            UserError: what differs; the adapter would see other prompts than it was trained on.
        """
        mine = self.state()
        stored = {"thinking": "auto", **stored}
        differing = [key for key in mine if mine[key] != stored.get(key)]
        if differing:
            shown = "; ".join(
                f"{key}: trained {stored.get(key)!r:.80}, now {mine[key]!r:.80}"
                for key in differing
            )
            raise UserError(
                f"{where}: the chat format differs from the one that this adapter was trained with "
                f"({shown}). Use the same base and tokenizer as in training, or train again"
            )

    # --- for other programs ----------------------------------------------------------------------

    def portable_template(self) -> str | None:
        """The template for other programs, which know no run: with its date, system prompt and thinking in it."""
        if self._jinja is None:
            return None
        head = ""
        if self.thinking != "auto":
            value = str(self.thinking).lower()
            head += (
                "{%- if enable_thinking is not defined %}"
                f"{{%- set enable_thinking = {value} %}}{{%- endif %}}"
            )
        if self.system_prompt is not None:
            text = forms.dumps(self.system_prompt)
            if "system" in self.lacks:
                test = (
                    "messages and messages[0]['role'] == 'user' "
                    f"and not messages[0]['content'].startswith({text})"
                )
                first = f"{{'role': 'user', 'content': {text} + '\\n\\n' + messages[0]['content']}}"
                rest = "messages[1:]"
            else:
                test = "not messages or messages[0]['role'] != 'system'"
                first, rest = f"{{'role': 'system', 'content': {text}}}", "messages"
            head += f"{{%- if {test} %}}{{%- set messages = [{first}] + {rest} %}}{{%- endif %}}"
        # A line break right after a block is no part of what is written.
        return f"{head}\n{self._jinja}" if head else self._jinja

    def request(self, messages: Sequence[Message]) -> dict[str, Any]:
        """A prompt's messages and tools, as another program gives them to `portable_template`."""
        # Tools that the template lacks are written into the system message, which then is there.
        written = "tools" in self.lacks and bool(messages[0].get("tools"))
        adapted = self._adapted(messages, system=written)
        official = [_official(message, self._call_form) for message in adapted]
        return {"messages": official, "tools": adapted[0].get("tools")}

    # --- what the template and the tokenizer do, found out on small conversations ------------------

    def _check(self) -> set[int]:
        """Find out what the template lacks, how it ends an answer, and that its prompts are exact.

        Returns the ids of all tokens that end an answer or a call.
        """
        if self.thinking != "auto" and "enable_thinking" not in (self._jinja or ""):
            raise UserError(
                f"generation.thinking is {str(self.thinking).lower()}, and the template has no "
                "such switch (enable_thinking); set generation.thinking: auto"
            )
        ask, reply, again = _user("One, two?"), _assistant("Three."), _user("Four?")
        system: Message = {"role": "system", "content": "Be brief."}
        if not self._writes([system, ask], "Be brief."):
            self.lacks.add("system")
        self._note_end(ask, reply, again)
        thinking: Message = {**_assistant("Five, six."), "reasoning_content": "Seven or eight."}
        if self.thinking is not False and not self._reasons(ask, thinking):
            default, self._switch = self._switch, {"enable_thinking": True}
            self._thinks_if_asked = self._reasons(ask, thinking)
            self._switch = default
            if not self._thinks_if_asked:
                self.lacks.add("reasoning")
        ends = [self._end, self._after[0].strip()]
        call: Message = {**_assistant(""), "tool_calls": [CALL]}
        result: Message = {
            "role": "tool", "content": "Cloudy.", "name": "look_up", "tool_call_id": CALL["id"],
        }  # fmt: skip
        using: Message = {**ask, "tools": [TOOL]}
        for self._call_form in range(4):
            if self._writes([using, call, result], "Looks up a place.", "Rome", "Cloudy."):
                break
        else:
            self.lacks.add("tools")
            self._call_form = 0
        if "tools" not in self.lacks:
            with contextlib.suppress(RenderError):
                self._after[1] = self._next_control([using, call], result)
            with contextlib.suppress(RenderError):
                ends.append(self.encoder.pattern.findall(self._turn_text([using, call]))[-1])
        self._probe([ask, reply, again, _assistant("Five, six.")])
        self._find_parts([ask, thinking])
        self._calls = calling.find_out(self._write_calls)
        return {self.encoder.control[end] for end in ends if end in self.encoder.control}

    def _writes(self, messages: list[Message], *parts: str) -> bool:
        """Whether the template takes the messages, and writes all `parts`."""
        return self._knows(lambda: self._text(messages, generation_prompt=True), *parts)

    def _knows(self, write: Callable[[], str], *parts: str) -> bool:
        try:
            text = write()
        except RenderError:
            return False
        return all(part in text for part in parts)

    def _reasons(self, ask: Message, thinking: Message) -> bool:
        """Whether the template writes the reasoning of an answer after its prompt."""
        reasoning = thinking["reasoning_content"]
        return self._knows(lambda: self._turn_text([ask, thinking]), reasoning)

    def _turn_text(self, messages: Sequence[Message]) -> str:
        """The text that the model is to write as the last message."""
        adapted = self._adapted(messages)
        prompt = self._text(adapted[:-1], generation_prompt=True)
        return self._ended(self._target(adapted, prompt), adapted)

    def _note_end(self, ask: Message, reply: Message, again: Message) -> None:
        """Note the control token after an answer; where there is none, what begins the next turn."""
        content = reply["content"]
        adapted = self._adapted([ask, reply])
        prompt = self._text(adapted[:-1], generation_prompt=True)
        self._opened = prompt[common(prompt, self._text(adapted)) :]
        target = self._target(adapted, prompt)
        if target.count(content) != 1:
            raise RenderError(
                f"it {'repeats' if content in target else 'leaves out'} the text of an answer"
            )
        if self._opened and not target.lstrip().startswith((content, "</think>")):
            raise RenderError(ANOTHER_WAY)
        found = self.encoder.pattern.search(target, target.index(content) + len(content))
        if found:
            self._end = found[0]
        else:
            self._after[0] = self._next_control(adapted, again)

    def _next_control(self, messages: list[Message], following: Message) -> str:
        """What the template writes after `messages`, up to the first control token of the next one."""
        whole, longer = self._text(messages), self._text([*messages, following])
        found = self.encoder.pattern.search(longer, len(whole))
        return longer[len(whole) : found.end()] if found and longer.startswith(whole) else ""

    def _probe(self, probe: list[Message]) -> None:
        """Compare the ids of two prompts with those of the tokenizer itself; note those of the whole."""
        for count in (1, 3):
            adapted = self._adapted(probe[:count])
            text = self._text(adapted, generation_prompt=True)
            official = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            if self.prompt(probe[:count]) != official:
                raise UserError(
                    "its prompts get other token ids from its tokenizer than from Etude, so they "
                    "would not be the ones that the model knows; please report the model's name"
                )
        self.render(probe)
        self._probe_ids = self.encoder.start(self._text(self._adapted(probe)), {})

    def _find_parts(self, thinking: list[Message]) -> None:
        """Note what the template writes around an answer, and around the thoughts before it."""
        ask, reply = thinking
        plain = forms.without(reply, "reasoning_content")
        head, _, tail = self._turn_text([ask, plain]).partition(reply["content"])
        self._opening, self._closing = head.strip(), self.encoder.without_control(tail).strip()
        if self._reasons(ask, reply):
            written = self._turn_text(thinking)
            before, _, rest = written.partition(reply["reasoning_content"])
            between = rest.partition(reply["content"])[0].strip()
            # What only an answer in words begins with is not of the thought: a call has none.
            self._thought = (before.strip(), between.removesuffix(self._opening).strip() or between)

    def _write_calls(self, calls: Sequence[dict[str, Any]]) -> str | None:
        """What the template writes as an answer of nothing but calls; None where it refuses them."""
        using: Message = {**_user("Well?"), "tools": calling.TOOLS}
        try:
            text = self._turn_text([using, {**_assistant(""), "tool_calls": list(calls)}])
        except RenderError:
            return None
        *_, end = self.encoder.pattern.finditer(text)
        begun = text[: end.start()].lstrip()
        return begun.removeprefix(self._opening) if self._opening else text[: end.start()]

    # --- ids to an answer ----------------------------------------------------------------------

    def parts_of(
        self, ids: Sequence[int], tools: calling.Tools | None = None, writing: bool = False
    ) -> Parts:
        """Reasoning, answer and calls in a response, without what the template writes around them.

        `tools` are those that could be called; with None, a call is text. Of a response that has not
        ended, what may become the template's own is held back; while it is still being written
        (`writing`), what may become a call too.
        """
        ids = list(ids)
        finished = bool(ids) and ids[-1] in self.stop_ids
        text = str(self.tokenizer.decode(ids[: len(ids) - finished], skip_special_tokens=False))
        more = not finished
        begun, thought = text.lstrip(), ""
        opening, closing = self._opening, self._closing
        if self._thought:
            before, between = self._thought
            if begun.startswith(before):
                thought, closed, rest = begun[len(before) :].partition(between)
                if not closed:
                    thought = _held_back(thought.lstrip(), between) if more else thought.lstrip()
                    return Parts(self.encoder.without_control(thought), "")
                text = rest.lstrip()
                opening = "" if opening.endswith(between) else opening
            elif more and before.startswith(begun):
                return Parts("", "")
        begun = text.lstrip()
        if opening and begun.startswith(opening):
            text = begun[len(opening) :].lstrip()
        elif opening and more and opening.startswith(begun):
            return Parts("", "")
        text, calls, malformed = self._without_calls(text, tools, writing and more)
        text = text if more or not closing else text.rstrip()
        text = _held_back(text, closing) if more else text.removesuffix(closing)
        thought, text = (
            self.encoder.without_control(thought).strip(),
            self.encoder.without_control(text),
        )
        return Parts(thought, text, calls, malformed)

    def _without_calls(
        self, text: str, tools: calling.Tools | None, writing: bool
    ) -> tuple[str, list[dict[str, Any]], bool]:
        """The text without calls, the calls, and whether one is malformed."""
        if self._calls is None or tools is None:
            return text, [], False
        if writing:
            return _held_back(text[: self._calls.begun(text)], self._calls.mark), [], False
        try:
            return *self._calls.parse(text, tools), False
        except calling.Malformed:
            return text, [], True


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _official(message: Message, call_form: int) -> dict[str, Any]:
    """The message as templates take it: under every name that they know.

    `call_form`: with calls, content is null where it is empty (0, 2) or text (1, 3), and arguments
    are an object (0, 1) or JSON in a text (2, 3).
    """
    official: dict[str, Any] = {**message}
    official.pop("tools", None)
    if "reasoning_content" in message:
        official["reasoning"] = official["thinking"] = message["reasoning_content"]
    if "tool_calls" in message:
        if call_form in (0, 2):
            official["content"] = message["content"] or None
        if call_form in (2, 3):
            official["tool_calls"] = [
                {**call, "function": {
                    **call["function"], "arguments": forms.dumps(call["function"]["arguments"])
                }}
                for call in message["tool_calls"]
            ]  # fmt: skip
    return official


def _held_back(text: str, ending: str) -> str:
    """`text` without what may become `ending` when more is written."""
    written = text.rstrip()
    for size in range(len(ending), 0, -1):
        if written.endswith(ending[:size]):
            return written[:-size]
    return text


def _dated(template: str, date: datetime.date) -> str:
    """`template` with `date` written in place of each call of `strftime_now`."""
    call = r"strftime_now\(\s*(?:format\s*=\s*)?(['\"])(.*?)\1\s*\)"
    return re.sub(call, lambda found: json.dumps(date.strftime(found[2])), template)
