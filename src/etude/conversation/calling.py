"""Calls of tools in what a model wrote, parsed by the format that its template itself writes.

The format is found out on calls whose name, keys and values are known. Three kinds cover the
templates of today: a JSON object that holds name and arguments (Hermes, Qwen2.5, Qwen3, Llama 3,
Mistral); a name, then the arguments as one object, in JSON or with bare keys (gpt-oss, DeepSeek,
Gemma 4); a name, then one parameter after another (Qwen3.5, Nemotron, GLM in tags, LFM2 as Python).
"""

import ast
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

NAME, OTHER = "find_place", "find_person"
ARGUMENTS: dict[str, Any] = {"city": "Rome", "count": 41}
RAW = 'a "b"\nc'  # a text that shows whether a format escapes
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Finds something.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "count": {"type": "integer"}},
            },
        },
    }
    for name in (NAME, OTHER)
]

Tools = Sequence[dict[str, Any]]
# Reads on where a call's start was found: its name, its arguments, and where they end.
Reader = Callable[["re.Match[str]", Tools], tuple[str, dict[str, Any], int]]


class Malformed(ValueError):
    """A call that has begun and cannot be read."""


@dataclass(frozen=True)
class Format:
    """How a template writes calls.

    Attributes:
        mark: the text that a call begins with.
        sign: where a call begins, rightly or not.
        opener: what is before the first call: up to its object, or up to its name.
        start: a call from its object, or its name, to where `read` goes on.
        end: what closes one call.
        gap: what is between two calls; None where the template writes one only.
        tail: what closes the last one.
    """

    mark: str
    sign: re.Pattern[str]
    opener: re.Pattern[str]
    start: re.Pattern[str]
    end: re.Pattern[str]
    gap: re.Pattern[str] | None
    tail: re.Pattern[str]
    read: Reader

    def parse(self, text: str, tools: Tools = ()) -> tuple[str, list[dict[str, Any]]]:
        """The text without calls, and the calls; `tools` give arguments without quotes their types.

        Raises:
            Malformed: a call has begun and cannot be read.
        """
        said: list[str] = []
        calls: list[dict[str, Any]] = []
        at = 0
        while sign := self.sign.search(text, at):
            said.append(text[at : sign.start()])
            opened: re.Match[str] | None = _demand(self.opener, text, sign.start())
            while opened:
                start = _demand(self.start, text, opened.end())
                try:
                    name, arguments, at = self.read(start, tools)
                    # As JSON has it; NaN and half a character cannot be written again.
                    written = json.dumps(arguments, allow_nan=False, ensure_ascii=False)
                    arguments = json.loads(written.encode())
                except (ValueError, TypeError, RecursionError, MemoryError) as error:
                    raise Malformed(str(error)) from None
                function = {"name": name, "arguments": arguments}
                calls.append({"type": "function", "function": function})
                if end := self.end.match(text, at):
                    at = end.end()
                opened = self.gap.match(text, at) if self.gap else None
            at = _demand(self.tail, text, at).end()
        return "".join([*said, text[at:]]), calls

    def begun(self, text: str) -> int:
        """Where in a text that is still being written a call may have begun; its length if nowhere."""
        found = self.sign.search(text)
        return found.start() if found else len(text)


def _demand(pattern: re.Pattern[str], text: str, at: int) -> re.Match[str]:
    found = pattern.match(text, at)
    if not found:
        raise Malformed(f"not a call: {text[at : at + 80]!r}")
    return found


def call(name: str, **arguments: Any) -> dict[str, Any]:
    """A call as a message has it."""
    return {
        "type": "function",
        "id": "call00001",
        "function": {"name": name, "arguments": arguments},
    }


def find_out(write: Callable[[Sequence[dict[str, Any]]], str | None]) -> Format | None:
    """The format of a template; None if it is none of the known kinds.

    `write` gives what the template writes as an answer with these calls, without what it writes
    around any answer; None where it refuses them.
    """
    one = write([call(NAME, **ARGUMENTS)])
    if not one or NAME not in one:
        return None
    two = write([call(NAME, **ARGUMENTS), call(OTHER, **ARGUMENTS)]) or ""
    quoted = re.search(r"city:(\S+?)Rome", one)
    decoders: list[Callable[[str, int], tuple[Any, int]]] = [_json]
    if quoted:
        decoders.append(partial(_bare, quoted[1]))
    for decode in decoders:
        for begin, end, value in _objects(one, decode):
            if value == ARGUMENTS and NAME in one[:begin]:
                return _named_object(one, two, begin, end, decode)
            keys = _keys(value)
            if keys:
                return _whole_object(one, two, begin, end, keys)
    return _parameters(one, two, write)


# --- a JSON object of name and arguments --------------------------------------------------------


def _keys(value: Any) -> tuple[str, str] | None:
    """Under which keys an object of the probe has the name and the arguments."""
    found = {repr(inner): key for key, inner in value.items()} if isinstance(value, dict) else {}
    keys = found.get(repr(NAME)), found.get(repr(ARGUMENTS))
    return keys if all(keys) else None  # type: ignore[return-value]


def _whole_object(one: str, two: str, begin: int, end: int, keys: tuple[str, str]) -> Format:
    name_key, arguments_key = keys

    def read(start: "re.Match[str]", tools: Tools) -> tuple[str, dict[str, Any], int]:
        value, end = _json(start.string, start.end())
        name, arguments = value.get(name_key), value.get(arguments_key)
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise Malformed(f"no {name_key} with {arguments_key}")
        return name, arguments, end

    starts = [found[0] for found in _objects(two, _json) if _has(found[2], OTHER)]
    after = two[end : starts[0]] if starts else None
    whole = () if one[:begin].strip() else keys
    return _format(one[:begin], r"(?=\{)", one[end:], after, read, whole)


def _has(value: Any, name: str) -> bool:
    return isinstance(value, dict) and name in value.values()


# --- a name, then an object of arguments ---------------------------------------------------------


def _named_object(
    one: str, two: str, begin: int, end: int, decode: Callable[[str, int], tuple[Any, int]]
) -> Format:
    def read(start: "re.Match[str]", tools: Tools) -> tuple[str, dict[str, Any], int]:
        arguments, end = decode(start.string, start.end())
        return start["name"], arguments, end

    at = one.index(NAME)
    between = _literal(one[at + len(NAME) : begin], NAME)
    after = two[end : two.index(OTHER)] if OTHER in two else None
    return _format(one[:at], rf"{_NAME}{between}(?=\{{)", one[end:], after, read)


# --- a name, then one parameter after another ------------------------------------------------------

_NAME = r"(?P<name>[^\s<>{}\"'(),|]+?)"
_KEY = r"(?P<key>[^\s<>{}\"'(),=]+?)"


def _parameters(
    one: str, two: str, write: Callable[[Sequence[dict[str, Any]]], str | None]
) -> Format | None:
    name = one.index(NAME)
    found = re.compile("city(.+?)Rome(.+?)count(.+?)41", re.DOTALL).search(one, name)
    bare = write([call(NAME)]) or ""
    if not found or NAME not in bare:
        return None
    quote = found[1].removeprefix(found[3])
    separator = found[2].removeprefix(quote)
    after = two[found.end() : two.index(OTHER)] if OTHER in two else None
    end, gap, tail = _split(one[found.end() :], after)
    empty = bare[bare.index(NAME) + len(NAME) :].removesuffix(tail)
    escapes = RAW not in (write([call(NAME, city=RAW)]) or "")
    # A value goes on to what surely follows it.
    following = "|".join(_literal(text) for text in (gap, tail) if text) if tail else ""
    closed = f"{_literal(end, before=True)}(?={following})"
    middle = _literal(found[3].rstrip()) + _edge(found[3][len(found[3].rstrip()) :])
    mark = re.escape(quote)
    # In quotes or brackets, what looks like the next parameter may be part of the value.
    value = rf"(?P<value>{mark}.*?{mark}|\[.*?\]|\{{.*?\}}|.*?)" if quote else "(?P<value>.*?)"
    key = _KEY.replace("?P<key>", "?:") + middle
    more = f"(?P<more>{_literal(separator, before=True)})(?={key})"
    pair = re.compile(f"{_KEY}{middle}{value}(?:{more}|{closed})", re.DOTALL)

    def read(start: "re.Match[str]", tools: Tools) -> tuple[str, dict[str, Any], int]:
        types = _types(start["name"], tools)
        arguments: dict[str, Any] = {}
        at = start.end()
        while start["empty"] is None:
            found = _demand(pair, start.string, at)
            typed = _typed(found["value"], types.get(found["key"], {}), quote, escapes)
            arguments[found["key"]] = typed
            at = found.end()
            if found["more"] is None:
                break
        return start["name"], arguments, at

    begin = _literal(one[name + len(NAME) : found.start()], NAME)
    start = f"{_NAME}(?:(?P<empty>{_literal(empty, NAME)})|{begin}(?={key}))"
    return _format(one[:name], start, one[found.end() :], after, read)


def _types(name: str, tools: Tools) -> dict[str, Any]:
    """The JSON schemas of the parameters of the tool called `name`."""
    for tool in tools:
        if tool["function"]["name"] == name:
            schemas = tool["function"].get("parameters", {}).get("properties", {})
            return schemas if isinstance(schemas, dict) else {}
    return {}


def _typed(text: str, schema: dict[str, Any], quote: str, escapes: bool) -> Any:
    """The value that a parameter's text stands for."""
    if quote and text.startswith(quote) and text.endswith(quote) and len(text) > len(quote):
        inner = text[len(quote) : -len(quote)]
        return _literally(text, inner) if escapes else inner
    if not quote and (schema.get("type") == "string" or text in schema.get("enum", [])):
        return text
    try:
        return _DECODER.decode(text)
    except ValueError:
        return _literally(text, text)


def _literally(text: str, otherwise: str) -> Any:
    """`text` as Python reads it: True, None, 'a'."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        return otherwise


# --- what they share -------------------------------------------------------------------------------


def _format(
    opener: str, start: str, ending: str, after: str | None, read: Reader, whole: Sequence[str] = ()
) -> Format:
    """The patterns from what the probes have before a call, after the last, and between two."""
    end, gap, tail = _split(ending, after)
    opening, start = rf"\s*{_literal(opener)}", rf"\s*{start}"
    if whole:  # nothing but the object itself shows that it is a call
        mark, sign = f'{{"{whole[0]}"', rf'\A\s*(?=\{{\s*"(?:{"|".join(whole)})")'
    elif tag := re.match(r"\s*(<[^<>\s]+>|\[\w+\])", opener):
        mark, sign = tag[1], re.escape(tag[1])
    else:  # other text than a tag begins a call only where it begins the answer
        mark, sign = opener.strip(), rf"\A{opening}"
    between = rf"{_literal(gap)}(?={start})"
    texts = (sign, opening, start, _literal(end), _literal(tail), between)
    signs, openings, starts, ends, tails, gaps = (re.compile(text, re.DOTALL) for text in texts)
    return Format(mark, signs, openings, starts, ends, None if gap is None else gaps, tails, read)


def _split(ending: str, after: str | None) -> tuple[str, str | None, str]:
    """What closes each call, what is between two of them, and what closes the last."""
    if after is None:
        return ending, None, ""
    pairs = zip(ending, after, strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return ending[:same], after[same:], ending[same:]


def _literal(text: str | None, name: str = "", before: bool = False) -> str:
    """A pattern of `text` in which white space may be missing or other; `name` is the call's again.

    `before`: the text ends a value, whose own white space must stay.
    """
    text = text or ""
    stripped = text.lstrip()
    edge = _edge(text[: len(text) - len(stripped)]) if before else ""
    words = [re.escape(word) for word in re.split(r"\s+", stripped if before else text)]
    pattern = edge + r"\s*".join(words)
    return pattern.replace(re.escape(name), "(?P=name)") if name else pattern


def _edge(space: str) -> str:
    return f"(?:{re.escape(space)})?" if space else ""


def _objects(
    text: str, decode: Callable[[str, int], tuple[Any, int]]
) -> Iterator[tuple[int, int, Any]]:
    """Begin, end and value of what reads as an object in `text`, also one in another."""
    for brace in re.finditer(r"\{", text):
        try:
            value, end = decode(text, brace.start())
        except ValueError:
            continue
        yield brace.start(), end, value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise Malformed(f"no number: {text:.20}")
    return number


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_finite)


def _json(text: str, at: int) -> tuple[Any, int]:
    """The JSON value at a position of the text, and where it ends."""
    return _DECODER.raw_decode(text, at)


def _bare(quote: str, text: str, at: int) -> tuple[Any, int]:
    """The same for an object with bare keys, whose texts are between `quote` as they are."""
    depth, within, end = 0, False, at
    for found in re.compile(rf"{re.escape(quote)}|[{{}}]").finditer(text, at):
        if found[0] == quote:
            within = not within
        elif not within:
            depth += 1 if found[0] == "{" else -1
        end = found.end()
        if depth == 0:
            break
    else:
        raise Malformed("an object that does not end")
    pieces = text[at:end].split(quote)
    for index, piece in enumerate(pieces):
        if index % 2:
            pieces[index] = json.dumps(piece)
        else:
            keyed = re.sub(r"([{,]\s*)([^\s{}\[\],:\"]+)(\s*:)", r'\1"\2"\3', piece)
            pieces[index] = re.sub(r"\bNone\b", "null", keyed)
    value, _ = _json("".join(pieces), 0)
    return value, end
