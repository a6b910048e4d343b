"""Text to token ids, where some of it is the template's own and some a person's.

Control tokens are looked for only where the template writes. Each stretch of text between two of
them is encoded with the tokenizer's special tokens switched off, as it is encoded where it stands:
SentencePiece puts a mark before a text, and not before its later stretches.

Before the template sees a message, the first character of every control token that the message
spells is replaced by a stand-in, which is put back once the template's own tokens are found. So
templates may strip, split, escape and reorder what they get.
"""

import re
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from etude.conversation import messages as forms
from etude.errors import UserError

REMEMBERED = 64  # characters of a text whose ids are kept long
STAND_INS = range(0xE000, 0xF8FF)  # private use: no template treats these characters specially


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
        joined: whether a step that learns from the example before it learns from this one too.
    """

    ids: _Packed = _Packed("i")
    supervised: _Packed = _Packed("b")
    origin: str = ""
    part: int = 0
    joined: bool = False

    @property
    def targets(self) -> int:
        """How many tokens are supervised."""
        return sum(vars(self)["supervised"])

    def __len__(self) -> int:
        return len(vars(self)["ids"])


class RenderError(UserError):
    """A conversation that the template cannot render faithfully; the text says why."""


class Encoder:
    """A tokenizer, with the control tokens that it has.

    Attributes:
        control: id of each control token, by its text.
        pattern: finds control tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Find out how the tokenizer encodes text where it begins, and after other text."""
        self.tokenizer = tokenizer
        special = {i: token for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.control = {token.content: index for index, token in special.items()}
        # Some take the white space before or after them in.
        self._strips = {t.content: (t.lstrip, t.rstrip) for t in special.values()}
        longest_first = sorted(self.control, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        # Where any of them begins, one inside another too.
        self._spelled = re.compile(f"(?={self.pattern.pattern})(.)", re.DOTALL)
        self._backend: Any = None
        self._find_out_the_tokenizer()

    def spelled(self, text: str) -> set[str]:
        """The control tokens that a text spells."""
        return {match[0] for match in self.pattern.finditer(text)}

    def shield(self, value: Any) -> tuple[Any, dict[int, str]]:
        """`value`, of JSON, with stand-ins in the control tokens that its texts spell; what each stands for."""
        written = "\0".join(forms.strings(value))
        found = {match[1] for match in self._spelled.finditer(written)}
        if not found:
            return value, {}
        free = (chr(code) for code in STAND_INS if chr(code) not in written)
        stand_ins = dict(zip(sorted(found), free, strict=False))

        def changed(text: str) -> str:
            return self._spelled.sub(lambda match: stand_ins[match[1]], text)

        return forms.map_strings(value, changed), {ord(s): c for c, s in stand_ins.items()}

    def without_control(self, text: str) -> str:
        """`text` without its control tokens."""
        return self.pattern.sub("", text)

    def start(self, text: str, originals: dict[int, str]) -> list[int]:
        """Ids of what a template wrote, from its beginning; stand-ins become `originals`."""
        return self._encode(text, self._begins, originals)

    def go_on(self, before: str, text: str, originals: dict[int, str]) -> list[int]:
        """Ids of `text` as what a model would write after `before`: no token straddles the two."""
        controls = self._control_tokens(before)
        ended = controls and controls[-1][1] == len(before)
        return self._encode(text, self._follows if ended else self._continues, originals)

    def raw(self, text: str, parse: bool = False) -> Example:
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

    def _control_tokens(self, text: str) -> list[tuple[int, int, int]]:
        """Begin, end and id of each control token, with the white space that some take in."""
        found = []
        for match in self.pattern.finditer(text):
            left, right = self._strips[match[0]]
            start, stop = match.span()
            if left:
                start = len(text[:start].rstrip())
            if right:
                stop = len(text) - len(text[stop:].lstrip())
            found.append((start, stop, self.control[match[0]]))
        return found

    def _encode(
        self, text: str, encode: Callable[[str], list[int]], originals: dict[int, str]
    ) -> list[int]:
        """Ids of what the template wrote, its first stretch by `encode`; stand-ins become `originals`."""
        ids: list[int] = []
        position = 0
        for begin, end, control in [*self._control_tokens(text), (len(text), len(text), -1)]:
            if begin > position:
                stretch = text[position:begin]
                ids += encode(stretch.translate(originals) if originals else stretch)
                encode = self._continues
            if control >= 0:
                ids.append(control)
                encode = self._follows
            position = max(position, end)
        return ids

    # --- a stretch without control tokens: where a text begins, after one, and after other text

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
    """`encode`, once for a text: templates have few short ones, a conversation repeats its long ones."""
    short, long = lru_cache(maxsize=4096)(encode), lru_cache(maxsize=64)(encode)
    return lambda text: short(text) if len(text) <= REMEMBERED else long(text)


def common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Length of the longest common beginning."""
    for length, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return length
    return min(len(first), len(second))
