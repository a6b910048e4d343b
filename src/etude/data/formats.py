"""Columns to fields to conversations: the six formats, and what other columns mean."""

import difflib
import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from etude.config.schema import Dataset, normal_label
from etude.config.yaml import scalar
from etude.conversation.messages import Message, dumps, strings
from etude.data import calls
from etude.errors import UserError, nearest

# What each format is recognised by, the most telling first: the fields that a row must have.
FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "classification": ("text", "label"),
    "text": ("text",),
}
# What says of a turn, or of a whole row, whether it is trained on.
TURN_FLAGS = ("weight", "train", "training", "loss")
ROW_FLAGS = ("weight", "train", "training")
OPTIONAL = {
    "messages": ("system", "tools", *ROW_FLAGS),
    "sharegpt": ("system", "tools", *ROW_FLAGS),
    "alpaca": ("input", "system", *ROW_FLAGS),
    "prompt_completion": ("quality", "system", *ROW_FLAGS),
    "classification": ROW_FLAGS,
    "text": ROW_FLAGS,
}
FIELDS = {form: FORMATS[form] + OPTIONAL[form] for form in FORMATS}
TURN_KEYS = ("role", "from", "content", "value")
REASONING = ("reasoning_content", "reasoning", "thinking")
OWN_KEYS = {"assistant": ("tool_calls", *REASONING), "tool": ("tool_call_id", "name")}
KNOWN_KEYS = {*TURN_KEYS, *(key for keys in OWN_KEYS.values() for key in keys)}
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "ipython": "tool",
}

# Other names that people give to a field, the likeliest first: proposed, never mapped unasked.
_ANSWERS = (
    "completion answer answers response responses output outputs reply assistant solution summary "
    "highlight translation generation chosen"
)
_TEXTS = (
    "text sentence review tweet comment content body document article passage post headline "
    "utterance message title"
)
_SYNONYMS = {
    "text": f"{_TEXTS} question query prompt input",
    "label": "label class classes category categories sentiment target topic intent emotion "
    "polarity stars rating score quality tag grade annotation verdict gold truth toxic toxicity "
    "spam y",
    "prompt": f"prompt question query input instruction user problem request {_TEXTS}",
    "completion": _ANSWERS,
    "output": _ANSWERS,
    "instruction": "instruction",
}

# Columns, and keys of a turn, that change what a row means and that are not supported.
_CONTEXT = (
    "the answer rests on it and the prompt would lack it; join it to the prompt (in format alpaca: "
    "dataset.columns: {input: its name})"
)
_VERDICT = (
    "a verdict on the answer is not used, so answers judged bad would be learnt like good ones; "
    "keep the good rows alone"
)
_REFUSED = {
    "tools tool_calls functions function_call tool_call_id": "calls of tools are read from messages "
    "(tool_calls of a turn, and a column tools)",
    "reasoning reasoning_content thinking thought": "reasoning is read from a turn of messages "
    "(reasoning_content), or as <think>...</think> at the beginning of the answer",
    "history chat_history conversation_history past_turns previous_turns": "earlier turns are read "
    "only as messages; write the whole conversation there",
    "context document passage knowledge evidence choices options premise hypothesis aspect text2 "
    "text_pair sentence2 question2": _CONTEXT,
    "image image_url audio video": "only text is trained on",
    "chosen rejected": "preferences are not trained on yet; to learn the chosen answers: "
    "dataset.columns: {completion: chosen}, or {messages: chosen}",
    "mask loss_mask loss_weight sample_weight train_detail training_detail": "what is trained on is "
    "read from weight or train (0 or 1) of a turn or a row alone",
    "system system_prompt system_message": "a system prompt is read from the column system: "
    "dataset.columns: {system: its name}",
}
_WHY = {name.replace("_", ""): why for names, why in _REFUSED.items() for name in names.split()}
_VERDICTS = (
    "label score rating verdict reward preference correct iscorrect accepted isaccepted isgood "
    "quality thumbsup thumbsdown liked"
)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data set in the common form.

    Attributes:
        line: its line in the file (its number, from 1, in formats without lines).
        messages: the conversation; empty for raw text.
        text: raw text, or the text to classify.
        label: the class, in classification sets.
        quality: a given judgement of the completion (good, fair, poor), where the data carries one.
        untrained: the answers, by their index in `messages`, that are not trained on (weight 0).
        unanswered: whether messages after the last answer were left out.
    """

    line: int
    messages: list[Message]
    text: str = ""
    label: str | None = None
    quality: str | None = None
    untrained: frozenset[int] = frozenset()
    unanswered: bool = False

    @property
    def key(self) -> str:
        """What makes two rows the same row."""
        # A digest: the texts themselves would be held a second time.
        written = dumps([self.text, self.messages])
        return hashlib.blake2b(written.encode(), digest_size=16).hexdigest()

    @property
    def answer(self) -> int:
        """The index of the last answer that is trained on; -1 in raw text."""
        answers = (at for at, message in enumerate(self.messages) if message["role"] == "assistant")
        return max((at for at in answers if at not in self.untrained), default=-1)


@dataclass(frozen=True)
class Columns:
    """The columns of one source, sorted by what becomes of them.

    Attributes:
        fields: the column of each field that the source has.
        refused: columns that change what a row means, and why a row with one cannot be used.
        unused: the others.
        ignored: columns, and keys of turns, that are left out on purpose, as `plain` writes them.
    """

    format: str
    fields: dict[str, str]
    refused: dict[str, str]
    unused: list[str]
    ignored: frozenset[str]


@lru_cache(maxsize=4096)
def plain(name: object) -> str:
    """A name as names are compared: caseless, without white space or a byte order mark around it."""
    return unicodedata.normalize("NFC", str(name)).replace("\ufeff", "").strip().casefold()


def filled(value: object) -> bool:
    """Whether a field holds anything: not null or NaN, nor an empty or blank text, list or object."""
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null")
    return value is not None and value == value and value not in ([], {})


def refusal(name: str, why: str) -> str:
    """The sentence about a column or key that is refused, with the two ways on."""
    left_out = scalar([name])
    return f"{name!r} is filled: {why}; remove it, or train without it: dataset.ignore: {left_out}"


# --- columns -------------------------------------------------------------------------------------


def assign(source: str, rows: Sequence[tuple[int, dict[str, Any]]], settings: Dataset) -> Columns:
    """Find the format and the column of each of its fields.

    A column is a field's by `dataset.columns`, or by its name without case and white space.

    Raises:
        UserError: no known format, a column named by `dataset.columns` that is absent, or two
            columns of one name.
    """
    ignored = frozenset(map(plain, settings.ignore))
    # A dict keeps the order of the file, a set would not.
    names = dict.fromkeys(name for _, values in rows for name in values)
    present = [name for name in names if plain(name) not in ignored]
    empty = set(present)
    for _, values in rows:
        if not empty:
            break
        empty -= {name for name in empty if filled(values.get(name))}
    found = _candidates(present, settings)
    proposal = _proposal(present, found, rows[0][1], settings)
    advice = f"Map your names with dataset.columns: {proposal or '{prompt: question, ...}'}"
    form: str = settings.format
    if form == "auto":
        form = _detect(f"{source}:{rows[0][0]}", found, present, advice)
        if form == "text":
            filled_columns = [name for name in present if name not in empty]
            _refuse_to_lose_answers(source, found["text"], filled_columns, advice)
    known = FIELDS[form]
    if stray := [name for name in settings.columns if name not in known]:
        raise UserError(
            f"dataset.columns: {', '.join(stray)}: no field of format {form}, which has "
            f"{', '.join(known)}"
        )
    needed = {*FORMATS[form], *settings.columns}
    if absent := [name for name in known if name in needed and name not in found]:
        columns = ", ".join(f"{settings.columns.get(name, name)} (for {name})" for name in absent)
        raise UserError(
            f"{source}: no row has a column {columns}; its columns are "
            f"{', '.join(map(str, present))}. The format is {form}. {advice}"
        )
    for field in known:
        if len(found.get(field, ())) > 1:
            raise UserError(
                f"{source}: the columns {', '.join(map(repr, found[field]))} have one name but for "
                f"case and white space; rename all but one, or name yours: dataset.columns: "
                f"{{{field}: ...}}"
            )
    fields = {field: found[field][0] for field in known if field in found}
    others = [name for name in present if name not in fields.values()]
    reasons = {name: _why(name, form, fields, settings) for name in others if name not in empty}
    refused = {name: why for name, why in reasons.items() if why}
    unused = [name for name in others if name not in refused]
    return Columns(form, fields, refused, unused, ignored)


def _candidates(present: Sequence[str], settings: Dataset) -> dict[str, list[str]]:
    """The columns that each field of any format could be, by `dataset.columns` or by its name."""
    every = {field: None for fields in FIELDS.values() for field in fields}
    if stray := [name for name in settings.columns if name not in every]:
        guess = nearest(stray[0], every)
        raise UserError(
            f"dataset.columns: {', '.join(stray)}: no format has such a field; "
            + (f"did you mean {guess}?" if guess else f"known: {', '.join(sorted(every))}")
        )
    alike = defaultdict(list)
    for column in present:
        alike[plain(column)].append(column)
    found: dict[str, list[str]] = {}
    for field, wanted in settings.columns.items():
        found[field] = [wanted] if wanted in present else alike[plain(wanted)]
    mapped = {column for columns in found.values() for column in columns}
    for field in every.keys() - found.keys():
        found[field] = [column for column in alike[field] if column not in mapped]
    return {field: columns for field, columns in found.items() if columns}


def _detect(where: str, found: Collection[str], present: Sequence[str], advice: str) -> str:
    for form, needed in FORMATS.items():
        if all(field in found for field in needed):
            return form
    shapes = "; ".join(f"{form} ({', '.join(needed)})" for form, needed in FORMATS.items())
    raise UserError(
        f"{where}: no known format has the columns {', '.join(map(str, present)) or '(none)'}. "
        f"Known: {shapes}. {advice}"
    )


def _refuse_to_lose_answers(
    source: str, text: Sequence[str], columns: Sequence[str], advice: str
) -> None:
    """Format text is the last resort: a label or an answer beside it would never be learnt."""
    for field, what in (("label", "a label"), ("completion", "an answer")):
        for column in columns:
            if column not in text and _likeness(column, field) is not None:
                raise UserError(
                    f"{source}: the column {column!r} beside {text[0]!r} looks like {what}, and "
                    f"raw text would leave it out. {advice}; or, for raw text, set "
                    "dataset.format: text"
                )


def _likeness(column: str, field: str) -> int | None:
    """How near a column's name is to those that people give to `field`: 0 the nearest, None not."""
    names = _SYNONYMS[field].split()
    if plain(column) in names:
        return names.index(plain(column))
    words = re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(column)).casefold())
    long = [name for name in names if len(name) > 4]
    if {*words, *(word.removesuffix("s") for word in words)} & {*names} or (
        difflib.get_close_matches(plain(column), long, n=1, cutoff=0.8)
    ):
        return len(names)
    return None


def _proposal(
    present: Sequence[str],
    found: dict[str, list[str]],
    first: dict[str, Any],
    settings: Dataset,
) -> str | None:
    """A value of dataset.columns with which the rows would have a format, as YAML; None for none."""

    def written(more: dict[str, str]) -> str:
        pairs = {**settings.columns, **more}.items()
        return "{" + ", ".join(scalar({field: name})[1:-1] for field, name in pairs) + "}"

    for column in present:
        turns = first.get(column)
        turn = turns[0] if isinstance(turns, list) and turns else None
        if isinstance(turn, dict) and turn.keys() & {"role", "from"} and "messages" not in found:
            return written({"messages": column})
    for form in ("alpaca", "prompt_completion", "classification", "text"):
        if settings.format not in ("auto", form):
            continue
        fields = {field: found[field][0] for field in FORMATS[form] if field in found}
        missing = [field for field in FORMATS[form] if field not in fields]
        for field in missing:
            free = [name for name in present if name not in fields.values()]
            near = [name for name in free if _likeness(name, field) is not None]
            if near:
                fields[field] = min(near, key=lambda name: _likeness(name, field) or 0)
        if missing and len(fields) == len(FORMATS[form]):
            return written({field: fields[field] for field in missing})
    return None


def _why(name: str, form: str, fields: dict[str, str], settings: Dataset) -> str | None:
    """Why a column beside those of a format is refused; None where it is only unused."""
    key = re.sub(r"[\W_]", "", plain(name))
    if settings.format == "text":  # asked for: the text, and nothing else
        return None
    if key == "rejected" and "chosen" in map(plain, fields.values()):
        return None
    if form not in ("classification", "text") and {key, key.removesuffix("s")} & set(
        _VERDICTS.split()
    ):
        return _VERDICT
    if form in ("classification", "prompt_completion") and key in ("instruction", "input"):
        return _CONTEXT
    return why_refused(name)


def why_refused(name: object) -> str | None:
    """Why a column or a key of a turn that changes a row's meaning is refused; None for others."""
    key = re.sub(r"[\W_]", "", plain(name))
    return _WHY.get(key) or _WHY.get(key.removesuffix("s")) or _WHY.get(f"{key}s")


# --- the fields of one row, in the common form; ValueError says what is wrong ----------------------


def row_of(
    form: str, line: int, fields: dict[str, Any], ignored: Collection[str], unused: list[str]
) -> Row:
    """One row in the common form; adds the keys of its turns that have no use to `unused`.

    Raises:
        ValueError: what is wrong with it.
    """
    if form == "text":
        return Row(line, [], _text(fields["text"], "text"))
    if form == "classification":
        return Row(line, [], _text(fields["text"], "text"), _label(fields["label"]))
    system = fields.get("system")
    messages: list[Message] = []
    if filled(system):
        messages.append({"role": "system", "content": _text(system, "system")})
    if form in ("messages", "sharegpt"):
        (name,) = FORMATS[form]
        tools = calls.tools_of(fields["tools"]) if filled(fields.get("tools")) else []
        untrained = _add_turns(messages, fields[name], name, ignored, unused)
        if tools and messages:
            messages = calls.with_parsed_calls(messages, tools)
        calls.check(messages, tools)
        answers = [at for at, one in enumerate(messages, 1) if one["role"] == "assistant"]
        if not answers:
            raise ValueError(f"{name} has no turn of the assistant, which is what is learnt")
        kept = messages[: answers[-1]]
        for text in strings(kept):
            _check_characters(text, name)
        return Row(line, kept, untrained=frozenset(untrained), unanswered=len(kept) < len(messages))
    prompt, answer = (_text(fields[name], name) for name in FORMATS[form])
    if filled(fields.get("input")):
        prompt += "\n\n" + _text(fields["input"], "input")
    quality = fields.get("quality") if filled(fields.get("quality")) else None
    if quality not in ("good", "fair", "poor", None):
        raise ValueError(f"quality {quality!r} is not one of good, fair, poor")
    messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return Row(line, messages, quality=quality)


def trained(flags: dict[str, Any], where: str = "") -> bool:
    """Whether a turn or a row is trained on, by weight (0 or 1) and train (false or true).

    Raises:
        ValueError: another value, or two that contradict each other.
    """
    said: dict[str, bool] = {}
    for name, value in flags.items():
        if filled(value):
            word = str(value).strip().lower()
            if word not in ("0", "0.0", "false", "1", "1.0", "true"):
                raise ValueError(
                    f"{where}{name} {value!r:.40} is neither 0 (false) nor 1 (true); write one of "
                    f"them, or train as if it were not there: dataset.ignore: [{name}]"
                )
            said[name] = word in ("1", "1.0", "true")
    if len(set(said.values())) > 1:
        raise ValueError(f"{where}{' and '.join(said)} contradict each other; keep one of them")
    return all(said.values())


def _add_turns(
    messages: list[Message], turns: object, name: str, ignored: Collection[str], unused: list[str]
) -> set[int]:
    """Add the turns to `messages`; returns the answers that are not trained on, by their index."""
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{name} must be a list of turns with 'role' and 'content'")
    untrained = set()
    given_system = "the column system" if messages else "an earlier turn"
    for number, turn in enumerate(turns, 1):
        where = f"{name}, turn {number}: "
        if not isinstance(turn, dict):
            raise ValueError(f"{where}must be an object with 'role' and 'content'")
        turn = {
            plain(key) if plain(key) in KNOWN_KEYS else key: value
            for key, value in turn.items()
            if plain(key) not in ignored
        }
        key = "role" if "role" in turn else "from"
        given = turn.get(key)
        role = ROLES.get(given) if isinstance(given, str) else None
        if role is None:
            raise ValueError(f"{where}{key} {given!r:.40} is not one of {', '.join(ROLES)}")
        counts = len(turn) == 2 or _trained_turn(turn, role, where, unused)
        content = turn.get("content", turn.get("value"))
        if role == "system" and not filled(content):
            continue  # as good as none
        if role == "system" and messages and messages[0]["role"] == "system":
            raise ValueError(f"{where}a second system prompt, beside {given_system}; keep one")
        if role == "assistant" and not counts:
            untrained.add(len(messages))
        messages.append(_message(turn, str(given), role, content, where))
    return untrained


def _message(turn: dict[str, Any], given: str, role: str, content: object, where: str) -> Message:
    """One turn in the common form."""
    name = f"{where}content"
    if given == "function_call":
        return {"role": role, "content": "", "tool_calls": calls.calls_of(content, where)}
    made = calls.calls_of(turn.get("tool_calls"), where) if filled(turn.get("tool_calls")) else []
    if (made or role == "tool") and not filled(content):
        message: Message = {"role": role, "content": ""}
    elif role == "tool" and not isinstance(content, str | list):
        message = {"role": role, "content": dumps(content)}  # a result as an object
    else:
        message = {"role": role, "content": _content(content, name)}
    if role == "tool":
        for key in ("tool_call_id", "name"):
            if filled(turn.get(key)):
                message[key] = _text(turn[key], f"{where}{key}")
    if role == "assistant":
        if made:
            message["tool_calls"] = made
        thoughts = {_text(turn[key], where + key) for key in REASONING if filled(turn.get(key))}
        if len(thoughts) > 1:
            raise ValueError(f"{where}{', '.join(REASONING)}: two different reasonings; keep one")
        if thoughts:
            message["reasoning_content"] = thoughts.pop()
    return message


def _trained_turn(turn: dict[str, Any], role: str, where: str, unused: list[str]) -> bool:
    """Whether a turn with more than its two keys is trained on; refuses keys that change its meaning."""
    known = {*TURN_KEYS, *OWN_KEYS.get(role, ())}
    others = {key: value for key, value in turn.items() if key not in known and filled(value)}
    flags = {plain(key): value for key, value in others.items() if plain(key) in TURN_FLAGS}
    for key in others:
        if why := why_refused(key):
            raise ValueError(where + refusal(key, why))
        if plain(key) not in flags:
            unused.append(f"{key} of a turn")
    counts = trained(flags, where)
    # To leave out of training what never is trained on, needs no word.
    if role != "assistant" and counts:
        unused += [f"{key} of a turn that is no answer" for key in flags]
    return counts


def _content(value: object, name: str) -> str:
    """The text of a turn; OpenAI writes it as a list of parts too, whose texts are joined."""
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        others = {str(part.get("type")) for part in value} - {"text"}
        if others:
            raise ValueError(
                f"{name} has a part of type {', '.join(sorted(others)):.80}, and only text is "
                "trained on; remove it"
            )
        return "".join(_text(part.get("text"), name) for part in value)
    return _text(value, name)


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, not {type(value).__name__} ({value!r:.40})")
    if not value.strip():
        raise ValueError(f"{name} is empty")
    _check_characters(value, name)
    return value


def _check_characters(value: str, name: str) -> None:
    if "\0" in value:
        raise ValueError(f"{name} holds a NUL character (at {value.index(chr(0)) + 1}); remove it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair, and no tokenizer takes it.
        raise ValueError(
            f"{name} holds half a character ({value[error.start]!r}); write the whole one"
        ) from None


def _label(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas writes whole numbers so, where one of them is missing
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(
            f"label must be text or a whole number, not {type(value).__name__} ({value!r:.40})"
        )
    label = _text(normal_label(str(value)), "label")
    if not label.isprintable():
        raise ValueError(f"label {label!r:.40} holds control characters")
    return label
