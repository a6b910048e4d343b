"""The one renderer: messages in, token ids and the mask of supervised tokens out.

Training, evaluation and chat all come through here; nothing else knows a chat token. Three
properties hold by construction and are tested token by token:

- A clean conversation gets exactly the ids of the tokenizer's own chat template.
- Text of a message never becomes a control token, whatever it spells.
- The prompt of a chat is, bit for bit, the beginning of the same conversation in training.

How: the template is rendered to text as always, but control tokens are looked for only in the
parts that the template wrote. Each stretch of text between two of them is encoded with the
tokenizer's special tokens switched off, as it is encoded where it stands: SentencePiece puts a
mark before a text, and not before its later stretches. A stretch is also cut where an answer
begins, because there the model starts to write and no token may straddle the two.
"""

import contextlib
import datetime
import hashlib
import itertools
import json
import re
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypedDict

from etude.errors import UserError, first_line

ROLES = ("system", "user", "assistant")
UNTRAINED = -1  # in place of where an answer's content ends
REMEMBERED = 64  # characters of a text whose ids are kept


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


class _Packed:
    """A field of whole numbers: an array, of which each access makes a list."""

    def __init__(self, typecode: str) -> None:
        self._typecode = typecode

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object, owner: type) -> list[int]:
        if instance is None:  # the dataclass asks for a default
            raise AttributeError(self._name)
        values: array[int] = vars(instance)[self._name]
        return values.tolist()

    def __set__(self, instance: object, values: Iterable[int]) -> None:
        vars(instance)[self._name] = array(self._typecode, values)


@dataclass
class Example:
    """A conversation as token ids.

    Held in 5 bytes a token, where Python's lists take 36: `ids` and `supervised` are copies, made
    at each access, so a loop takes them once.

    Attributes:
        supervised: whether predicting token i counts in the loss.
        origin: where the row is from, ``file:line``, to name it by.
        part: which example of its row it is, from 0.
    """

    ids: _Packed = _Packed("i")
    supervised: _Packed = _Packed("b")
    origin: str = ""
    part: int = 0

    @property
    def targets(self) -> int:
        """How many tokens are supervised."""
        return sum(vars(self)["supervised"])

    def __len__(self) -> int:
        return len(vars(self)["ids"])


class RenderError(UserError):
    """A conversation that the template cannot render faithfully; the text says why."""


class Renderer:
    """A tokenizer's chat template, with what it takes to render and to stop.

    Attributes:
        template: the Jinja text in use.
        system_prompt: put before conversations that have no system message, or None.
        date: the day that a template which asks for it writes; None for the clock's own.
        end_of_turn: id of the control token that ends an answer.
        stop_ids: ids at which generation ends: `end_of_turn` and the tokenizer's own end token.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str | None = None,
        system_prompt: str | None = None,
        date: datetime.date | None = None,
    ) -> None:
        """Take the tokenizer's own template unless one is given; check it on a small conversation.

        Raw text (`text`) needs no template, so one that is missing, or whose ids cannot be
        reproduced or masked, is an error of the first conversation.
        """
        self.tokenizer = tokenizer
        if template is None:
            with contextlib.suppress(ValueError):  # it has none
                template = str(tokenizer.get_chat_template())
        self.template = template
        self.system_prompt = system_prompt
        dated = _dated(template, date) if template and date else template
        # A call with a format that is computed cannot be replaced: then the clock's date stays.
        self.date = date if dated != template and "strftime_now(" not in (dated or "") else None
        self._jinja = dated if self.date else template
        special = {i: token for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._control = {token.content: index for index, token in special.items()}
        # Some take the white space before or after them in.
        self._strips = {t.content: (t.lstrip, t.rstrip) for t in special.values()}
        longest_first = sorted(self._control, key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._frame = lru_cache(maxsize=256)(self._frame_uncached)
        self._backend: Any = None
        self._find_out_the_tokenizer()
        self._probe_ids: list[int] = []
        # What the template writes around an answer: ids up to the last control token before it,
        # then text; text after it.
        self._opening: tuple[list[int], str] = ([], "")
        self._closing = ""
        self.end_of_turn: int | None = tokenizer.eos_token_id
        self._fault: UserError | None = None  # why no conversation can be rendered
        if template is None:
            self._fault = UserError(
                "The tokenizer of this model has no chat template, so conversations cannot be "
                "rendered. Take an instruct model, or give the template: "
                "model.chat_template: FILE.jinja"
            )
        else:
            try:
                self._check()
            except UserError as error:
                self._fault = error
        self.stop_ids = sorted({self.end_of_turn, tokenizer.eos_token_id} - {None})

    def _check(self) -> None:
        """Render a small conversation, compare it with the tokenizer's own way, note its end token."""
        probe: list[Message] = [
            {"role": "user", "content": "One, two?"},
            {"role": "assistant", "content": "Three."},
            {"role": "user", "content": "Four?"},
            {"role": "assistant", "content": "Five, six."},
        ]
        try:
            example, prompt = self.render(probe), self.prompt(probe[:-1])
        except RenderError as error:
            raise UserError(
                f"The chat template cannot be used for training: {error}. Give another: "
                "model.chat_template: FILE.jinja"
            ) from None
        official = self.tokenizer.apply_chat_template(
            self._with_system(probe), chat_template=self._jinja, return_dict=False
        )
        if example.ids != official:
            raise UserError(
                "The chat template of this model gives other token ids than its tokenizer by "
                "itself, so its prompts would not be the ones that the model knows. Please report "
                "the model's name; nothing was trained"
            )
        self._probe_ids = example.ids
        last = max(index for index, counts in enumerate(example.supervised) if counts)
        self.end_of_turn = example.ids[last]
        answer = example.ids[len(prompt) : last]
        controls = [at for at, token in enumerate(answer, 1) if token in self._control.values()]
        head = answer[: max(controls, default=0)]
        written = str(self.tokenizer.decode(answer[len(head) :], skip_special_tokens=True))
        tail, found, closing = written.partition(probe[-1]["content"])
        if found:
            self._opening, self._closing = (head, tail.strip()), closing.strip()

    def answer_text(self, ids: Sequence[int]) -> str:
        """The text of a response, without what the template itself writes around an answer.

        Some templates open every answer with more than the generation prompt, such as an empty
        block of thoughts or the name of a channel, and a model trained with them writes it. Rendering
        adds it again. Of a response that does not begin with it nothing is taken off; of one that is
        still being written, what may become it is held back.
        """
        ids = list(ids)
        finished = bool(ids) and ids[-1] in self.stop_ids
        whole = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        head, tail = self._opening
        if not finished and len(ids) < len(head) and head[: len(ids)] == ids:
            return ""
        text = whole
        if ids[: len(head)] == head:
            inner = str(self.tokenizer.decode(ids[len(head) :], skip_special_tokens=True))
            begun = inner.lstrip()
            if begun.startswith(tail):
                text = begun[len(tail) :] if tail else inner
            elif not finished and tail.startswith(begun):
                return ""
        written = text.rstrip()
        for size in range(len(self._closing), 0, -1):
            if written.endswith(self._closing[:size]):
                return written[:-size]
            if finished:
                break
        return text

    def render(self, messages: Sequence[Message], untrained: Collection[int] = ()) -> Example:
        """Turn a conversation into ids, with every assistant turn and its end token supervised.

        The answers whose index is in `untrained` are not supervised; the ids stay the same.

        Raises:
            RenderError: unknown role, or a template that refuses, alters or drops a message.
        """
        added = len(self._with_system(messages)) - len(messages)
        messages = self._with_system(messages)
        text = self._apply(messages)
        spans = self._content_spans(messages, text)
        starts = {}
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                start = self._answer_start(messages, index, text, spans)
                if start is None or spans[index][0] < start:
                    raise RenderError(
                        f"message {index + 1}: the template writes the prompt before this answer "
                        "in another way than it does in a chat"
                    )
                counts = index - added not in untrained
                starts[start] = spans[index][1] if counts else UNTRAINED
        return self._encode(text, spans, starts)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to where the model's next answer begins.

        Raises:
            RenderError: as `render`.
        """
        messages = self._with_system(messages)
        text = self._apply(messages, generation_prompt=True)
        spans = self._content_spans(messages, text, generation_prompt=True)
        starts = {
            start: spans[index][1]
            for index, message in enumerate(messages)
            if message["role"] == "assistant"
            and (start := self._answer_start(messages, index, text, spans)) is not None
        }
        return self._encode(text, spans, starts).ids

    def spelled(self, text: str) -> set[str]:
        """The control tokens that a text spells."""
        return {match[0] for match in self._control_pattern.finditer(text)}

    def text(self, text: str, parse: bool = False) -> Example:
        """Plain text without a template, all supervised; the tokenizer's end token ends it.

        With `parse`, what spells a control token becomes it; a beginning or end that the text has
        itself is not added again.
        """
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        # With the tokenizer's own beginning (BOS), which models that have one were trained with.
        if parse:
            ids = self.tokenizer(text, split_special_tokens=False, verbose=False).input_ids
            ids = ids[1:] if ids[:2] == [bos, bos] else ids
            ended = text.rstrip().endswith(self.tokenizer.eos_token)
        else:
            ids, ended = self._ids(text, add_special_tokens=True), False
        if not (ended or ids[-1:] == [eos]):
            ids = [*ids, eos]
        # The first token has nothing before it from which it could be predicted.
        return Example(ids, [False] + [True] * (len(ids) - 1))

    def state(self) -> dict[str, Any]:
        """What a later loader must agree on: template, system prompt, stop tokens, probe ids."""
        return {
            "template": self.template,
            "system_prompt": self.system_prompt,
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

    # --- inside ------------------------------------------------------------------------------

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        if self.system_prompt is None or (messages and messages[0]["role"] == "system"):
            return list(messages)
        return [{"role": "system", "content": self.system_prompt}, *messages]

    def _apply(self, messages: Sequence[Message], generation_prompt: bool = False) -> str:
        if self._fault:
            raise self._fault
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages),
                    chat_template=self._jinja,
                    add_generation_prompt=generation_prompt,
                    tokenize=False,
                )
            )
        except Exception as error:  # a template can divide by zero, recurse, or say why it refuses
            roles = ", ".join(message["role"] for message in messages) or "no message"
            raise RenderError(
                f"the template refuses the roles ({roles}): {first_line(error):.300}"
            ) from None

    def _frame_uncached(self, roles: tuple[str, ...], generation_prompt: bool) -> list[str]:
        """The template's own text before, between and after the messages' contents."""
        # Private-use characters: no template treats them specially.
        marks = [f"\ue000{index}\ue001" for index in range(len(roles))]
        marked: list[Message] = [
            {"role": r, "content": m} for r, m in zip(roles, marks, strict=True)
        ]
        rest = self._apply(marked, generation_prompt)
        frame = []
        for index, mark in enumerate(marks):
            before, found, rest = rest.partition(mark)
            if not found or mark in rest:
                raise RenderError(
                    f"the template {'repeats' if found else 'leaves out'} message {index + 1} "
                    f"({roles[index]})"
                )
            frame.append(before)
        return [*frame, rest]

    def _content_spans(
        self, messages: Sequence[Message], text: str, generation_prompt: bool = False
    ) -> list[tuple[int, int]]:
        """Character range of each message's content in the rendered text.

        The frame is rebuilt around the contents (as they are, or stripped as some templates do)
        and must give the rendered text again, so content that imitates the template shifts nothing.
        In a prompt, the template may keep only the last part of an earlier answer: those of
        reasoning models drop the thoughts.
        """
        for message in messages:
            if message["role"] not in ROLES:
                raise RenderError(f"unknown role {message['role']!r}; allowed: {', '.join(ROLES)}")
        frame = self._frame(tuple(message["role"] for message in messages), generation_prompt)
        spans: list[tuple[int, int]] = []
        position = len(frame[0]) if text.startswith(frame[0]) else len(text) + 1
        for message, after in zip(messages, frame[1:], strict=True):
            content = message["content"]
            forms: Iterable[str] = (content, content.strip(), content.lstrip(), content.rstrip())
            if generation_prompt and message["role"] == "assistant":
                forms = itertools.chain(forms, _endings(content.rstrip(), text, position))
            form = next((form for form in forms if text.startswith(form + after, position)), None)
            if form is None:
                break
            spans.append((position, position + len(form)))
            position += len(form) + len(after)
        if position != len(text) or len(spans) != len(messages):
            raise RenderError(
                "the template alters the text of a message, so it cannot be told from the "
                "template's own"
            )
        return spans

    def _answer_start(
        self, messages: Sequence[Message], index: int, text: str, spans: list[tuple[int, int]]
    ) -> int | None:
        """Where in `text` the prompt of the answer `messages[index]` ends; None if `text` begins otherwise."""
        before = messages[:index]
        if any(message["content"] != message["content"].strip() for message in before):
            # A template may strip a message in one text and not in the other.
            prompt = self._apply(before, generation_prompt=True)
        else:
            begin, *after = self._frame(tuple(message["role"] for message in before), True)
            contents = (text[start:end] for start, end in spans[:index])
            prompt = begin + "".join(map("".join, zip(contents, after, strict=True)))
        return len(prompt) if text.startswith(prompt) else None

    def _control_tokens(
        self, text: str, spans: list[tuple[int, int]]
    ) -> list[tuple[int, int, int]]:
        """Begin, end and id of each control token that lies wholly in the template's own text.

        With the white space that it takes in, as some do, which can be of a message.
        """
        found = []
        position = 0
        for begin, end in [*spans, (len(text), len(text))]:
            for match in self._control_pattern.finditer(text, position, begin):
                left, right = self._strips[match[0]]
                start, stop = match.span()
                if left:
                    start = len(text[:start].rstrip())
                if right:
                    stop = len(text) - len(text[stop:].lstrip())
                found.append((start, stop, self._control[match[0]]))
            position = end
        return found

    def _encode(self, text: str, spans: list[tuple[int, int]], starts: dict[int, int]) -> Example:
        """Encode rendered text; `starts` maps where an answer begins to where its content ends."""
        ids: list[int] = []
        supervised = bytearray()
        position, content_end, answering = 0, 0, False
        encode = self._begins
        cuts = [(start, start, -1) for start in starts]
        end_of_text = (len(text), len(text), -1)
        for begin, end, control in sorted(
            [*self._control_tokens(text, spans), *cuts, end_of_text], key=lambda cut: cut[:2]
        ):
            if begin > position:
                new = encode(text[position:begin])
                ids += new
                supervised += bytes([answering]) * len(new)
                encode = self._continues
            if control >= 0:
                ids.append(control)
                supervised.append(answering)
                if end > content_end:
                    answering = False
                encode = self._follows
            elif begin in starts:
                content_end, answering = starts[begin], starts[begin] != UNTRAINED
            position = max(position, end)
        if answering:
            raise RenderError(
                "the template does not end an answer with a special token, so it could never stop"
            )
        if supervised:
            supervised[0] = False  # nothing is before it from which it could be predicted
        return Example(ids, supervised)

    # --- text in which nothing is a control token: where a text begins, after a control token,
    # --- and after other text

    def _find_out_the_tokenizer(self) -> None:
        """Choose how stretches are encoded, by what the tokenizer itself does with a few."""
        probe = "One, two? Three:\n\n  4"
        # Its own call does more than the library's beneath it only to serve other purposes.
        expected = self._ids(probe)
        self._backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if self._backend is not None and self._ids(probe) != expected:
            self._backend = None
        self._begins = _remembering(self._ids)
        self._continues = _remembering(self._guarded)
        # After a control token, some begin anew: SentencePiece with its mark, others as anywhere.
        end, alone = self.tokenizer.eos_token or "", self._ids("a")
        after = self.tokenizer(f"{end}a", add_special_tokens=False, verbose=False).input_ids
        self._follows = self._begins if after[-len(alone) :] == alone else self._continues

    def _ids(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of a text by itself."""
        if self._backend is None:
            encoded = self.tokenizer(
                text,
                add_special_tokens=add_special_tokens,
                split_special_tokens=True,
                verbose=False,
            )
            ids: list[int] = encoded.input_ids
            return ids
        self._backend.encode_special_tokens = True  # the tokenizer's own calls switch it
        (made,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(made.ids)

    def _guarded(self, text: str) -> list[int]:
        """Ids of a text that goes on another: encoded after a guard, whose own ids are left out."""
        for guard in ("\n", "\ue000", "."):
            ids, own = self._ids(guard + text), self._ids(guard)
            if ids[: len(own)] == own:
                return ids[len(own) :]
        raise RenderError("the tokenizer encodes no text as the continuation of another")


def _remembering(encode: Callable[[str], list[int]]) -> Callable[[str], list[int]]:
    """`encode`, once for each short text: a template and labels have few, and long texts differ."""
    remembered = lru_cache(maxsize=4096)(encode)
    return lambda text: remembered(text) if len(text) <= REMEMBERED else encode(text)


def _endings(content: str, text: str, position: int) -> Iterator[str]:
    """The proper endings of `content` that are in `text` at `position`, the longest first."""
    for start in range(1, len(content) + 1):
        # The first characters first: most endings go without being copied.
        if text.startswith(content[start : start + 16], position):
            yield content[start:]


def _dated(template: str, date: datetime.date) -> str:
    """`template` with `date` written in place of each call of `strftime_now`."""
    call = r"strftime_now\(\s*(?:format\s*=\s*)?(['\"])(.*?)\1\s*\)"
    return re.sub(call, lambda found: json.dumps(date.strftime(found[2])), template)
