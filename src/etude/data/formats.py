"""Columns to fields to conversations: the six formats, and what other columns mean."""

import difflib
import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from etude.config.schema import Dataset, normal_label
from etude.config.yaml import scalar
from etude.conversation.renderer import Message
from etude.errors import UserError, nearest

# What each format is recognised by, the most telling first: the columns that a row must have.
FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "classification": ("text", "label"),
    "text": ("text",),
}
OPTIONAL = {
    "messages": ("system",),
    "sharegpt": ("system",),
    "alpaca": ("input", "system"),
    "prompt_completion": ("quality", "system"),
}
FIELDS = {name for part in (FORMATS, OPTIONAL) for names in part.values() for name in names}
# What says of a turn, or of a whole row, whether it is trained on.
TURN_FLAGS = ("weight", "train", "training", "loss")
ROW_FLAGS = ("weight", "train", "training")

# Other names that people give to a field, the likeliest first: proposed, never mapped unasked.
_ANSWERS = (
    "completion answer answers response responses output outputs reply assistant solution summary "
    "highlight translation generation chosen"
)
_TEXTS = (
    "text sentence review tweet comment content body document article passage post headline "
    "utterance message title"
)
_ALIKE = {
    field: names.split()
    for field, names in {
        "text": f"{_TEXTS} question query prompt input",
        "label": (
            "label class classes category categories sentiment target topic intent emotion "
            "polarity stars rating score quality tag grade annotation verdict gold truth toxic "
            "toxicity spam y"
        ),
        "prompt": f"prompt question query input instruction user problem request {_TEXTS}",
        "completion": _ANSWERS,
        "output": _ANSWERS,
        "instruction": "instruction",
    }.items()
}

# Columns, and keys of a turn, that change what a row means and that are not supported.
_TOOLS = "calls of tools are not trained on yet"
_REASONING = (
    "reasoning beside the answer is not trained on yet; to learn it, write it into the answer"
)
_HISTORY = "earlier turns are read only as messages; write the whole conversation there"
_CONTEXT = (
    "the answer rests on it and the prompt would lack it; join it to the prompt (in format alpaca: "
    "dataset.columns: {input: its name})"
)
_MEDIA = "only text is trained on"
_PREFERENCE = (
    "preferences are not trained on yet; to learn the chosen answers: dataset.columns: "
    "{completion: chosen}, or {messages: chosen}"
)
_MASK = "what is trained on is read from weight or train (0 or 1) of a turn or a row alone"
_SYSTEM = "a system prompt is read from the column system: dataset.columns: {system: its name}"
_VERDICT = (
    "a verdict on the answer is not used, so answers judged bad would be learnt like good ones; "
    "keep the good rows alone"
)
_MEANING = {
    name: why
    for names, why in {
        "tools tool_calls functions function_call tool_call_id": _TOOLS,
        "reasoning reasoning_content thinking thought": _REASONING,
        "history chat_history conversation_history past_turns previous_turns": _HISTORY,
        (
            "context document passage knowledge evidence choices options premise hypothesis aspect "
            "text2 text_pair sentence2 question2"
        ): _CONTEXT,
        "image image_url audio video": _MEDIA,
        "chosen rejected": _PREFERENCE,
        "mask loss_mask loss_weight sample_weight train_detail training_detail": _MASK,
        "system system_prompt system_message": _SYSTEM,
    }.items()
    for name in names.replace("_", "").split()
}
_VERDICTS = (
    "label score rating verdict reward preference correct iscorrect accepted isaccepted isgood "
    "quality thumbsup thumbsdown liked"
)


TURN_KEYS = {"messages": ("role", "content"), "sharegpt": ("from", "value")}
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
}
TOOL_ROLES = ("tool", "function", "ipython", "observation", "function_call", "function_response")
TEXT_LIMIT = (
    10**6
)  # characters of one text, many times any window; a tokenizer takes seconds for it


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
    """

    line: int
    messages: list[Message]
    text: str = ""
    label: str | None = None
    quality: str | None = None
    untrained: frozenset[int] = frozenset()

    @property
    def key(self) -> str:
        """What makes two rows the same row."""
        parts = [self.text, *(m[part] for m in self.messages for part in ("role", "content"))]
        # Contents hold no NUL. A digest: the texts themselves would be held a second time.
        return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()

    @property
    def answer(self) -> int:
        """The index of the last answer that is trained on; -1 in raw text."""
        turns = range(len(self.messages) - 1, -1, -1)
        answers = (at for at in turns if self.messages[at]["role"] == "assistant")
        return next((at for at in answers if at not in self.untrained), -1)


@dataclass(frozen=True)
class Columns:
    """The columns of one source, sorted by what becomes of them.

    Attributes:
        own: the column of each field that the source has.
        refused: columns that change what a row means, and why a row with one cannot be used.
        flags: columns that say whether a row is trained on, by their names in `ROW_FLAGS`.
        unused: the others.
    """

    format: str
    own: dict[str, str]
    refused: dict[str, str]
    flags: dict[str, str]
    unused: list[str]


def plain(name: object) -> str:
    """A name as names are compared: caseless, without white space or a byte order mark around it."""
    return unicodedata.normalize("NFC", str(name)).replace("\ufeff", "").strip().casefold()


def filled(value: object) -> bool:
    """Whether a field holds anything: not null or NaN, nor an empty or blank text, list or object."""
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null")
    return value is not None and value == value and value not in ([], {})


def why_refused(name: object) -> str | None:
    """Why a column or a key of a turn that changes a row's meaning is refused; None for others."""
    key = re.sub(r"[\W_]", "", plain(name))
    return _MEANING.get(key) or _MEANING.get(key.removesuffix("s")) or _MEANING.get(f"{key}s")


def refusal(name: str, why: str) -> str:
    """The sentence about a column or key that is refused, with the two ways on."""
    left_out = scalar([name])
    return f"{name!r} is filled: {why}; remove it, or train without it: dataset.ignore: {left_out}"


def without(values: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """A row without the columns, and its turns without the keys, that are called `names`."""
    left_out = {plain(name) for name in names}

    def kept(fields: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in fields.items() if plain(name) not in left_out}

    return {
        name: [kept(item) if isinstance(item, dict) else item for item in value]
        if isinstance(value, list)
        else value
        for name, value in kept(values).items()
    }


def trained(fields: dict[str, Any], names: Iterable[str], of: str = "") -> bool:
    """Whether a turn or a row is trained on, by weight (0 or 1) and train (false or true).

    Raises:
        ValueError: another value, or two that contradict each other.
    """
    said: dict[str, bool] = {}
    for name in names:
        value = fields.get(name)
        if filled(value):
            word = str(value).strip().lower()
            if word not in ("0", "0.0", "false", "1", "1.0", "true"):
                raise ValueError(
                    f"{of}{name} {value!r:.40} is neither 0 (false) nor 1 (true); write one of "
                    f"them, or train as if it were not there: dataset.ignore: [{name}]"
                )
            said[name] = word in ("1", "1.0", "true")
    if len(set(said.values())) > 1:
        raise ValueError(f"{of}{' and '.join(said)} contradict each other; keep one of them")
    return all(said.values())


def assign(source: str, rows: Sequence[tuple[int, dict[str, Any]]], settings: Dataset) -> Columns:
    """Find the format and the column of each of its fields.

    A column is a field's own by `dataset.columns`, or by its name without case and white space.

    Raises:
        UserError: no known format, a column named by `dataset.columns` that is absent, or two
            columns of one name.
    """
    # A dict keeps the order of the file, a set would not.
    present = list(dict.fromkeys(name for _, values in rows for name in values))

    def holds(column: str) -> bool:
        return any(filled(values.get(column)) for _, values in rows)

    alike = defaultdict(list)
    for column in present:
        alike[plain(column)].append(column)
    found = _of_fields(alike, present, settings)
    proposal = _proposal(present, found, rows[0][1], settings)
    form: str = settings.format
    if form == "auto":
        form = _detect(source, rows[0], found, present, holds, proposal)
    known = FORMATS[form] + OPTIONAL.get(form, ())
    stray = [name for name in settings.columns if name not in known]
    if stray:
        raise UserError(
            f"dataset.columns: {', '.join(stray)}: no field of format {form}, which has "
            f"{', '.join(known)}"
        )
    absent = [name for name in known if name not in found]
    absent = [name for name in absent if name in FORMATS[form] or name in settings.columns]
    if absent:
        names = ", ".join(f"{settings.columns.get(name, name)} (for {name})" for name in absent)
        raise UserError(
            f"{source}: no row has a column {names}; its columns are {', '.join(present)}. "
            f"The format is {form}: see dataset.format, and map your names with dataset.columns"
            + (f": {proposal}" if proposal else "")
        )
    for field in known:
        if len(found.get(field, ())) > 1:
            shown = ", ".join(map(repr, found[field]))
            raise UserError(
                f"{source}: the columns {shown} have one name but for case and white space; "
                f"rename all but one, or name yours: dataset.columns: {{{field}: ...}}"
            )
    own = {field: found[field][0] for field in known if field in found}
    flags = _flags(source, alike, set(own.values()))
    refused = {}
    for column in present:
        if column not in own.values() and column not in flags:
            why = _why(column, form, own, settings)
            if why and holds(column):
                refused[column] = why
    unused = [name for name in present if name not in {*own.values(), *flags, *refused}]
    return Columns(form, own, refused, flags, unused)


def _flags(source: str, alike: Mapping[str, list[str]], own: set[str]) -> dict[str, str]:
    """The columns that say whether a row is trained on: column -> the flag's name."""
    flags: dict[str, str] = {}
    for name in ROW_FLAGS:
        columns = [column for column in alike.get(name, ()) if column not in own]
        if len(columns) > 1:
            raise UserError(
                f"{source}: the columns {', '.join(map(repr, columns))} have one name but for "
                f"case and white space, and say what is trained on; remove all but one {name!r}"
            )
        flags |= dict.fromkeys(columns, name)
    return flags


def _of_fields(
    alike: defaultdict[str, list[str]], present: Sequence[str], settings: Dataset
) -> dict[str, list[str]]:
    """The columns that each field of any format could be, by `dataset.columns` or by its name."""
    stray = [name for name in settings.columns if name not in FIELDS]
    if stray:
        guess = nearest(stray[0], FIELDS)
        raise UserError(
            f"dataset.columns: {', '.join(stray)}: no format has such a field; "
            + (f"did you mean {guess}?" if guess else f"known: {', '.join(sorted(FIELDS))}")
        )
    found: dict[str, list[str]] = {}
    for field, wanted in settings.columns.items():
        found[field] = [wanted] if wanted in present else alike[plain(wanted)]
    mapped = {column for columns in found.values() for column in columns}
    for field in FIELDS - found.keys():
        found[field] = [column for column in alike[plain(field)] if column not in mapped]
    return {field: columns for field, columns in found.items() if columns}


def _why(column: str, form: str, own: dict[str, str], settings: Dataset) -> str | None:
    """Why a column beside those of a format is refused; None where it is only unused."""
    if settings.format == "text":  # asked for: the text, and nothing else
        return None
    key = re.sub(r"[\W_]", "", plain(column))
    if key == "rejected" and "chosen" in map(plain, own.values()):
        return None
    if form not in ("classification", "text") and {key, key.removesuffix("s")} & set(
        _VERDICTS.split()
    ):
        return _VERDICT
    if form in ("classification", "prompt_completion") and key in ("instruction", "input"):
        return _CONTEXT
    return why_refused(column)


def _detect(
    source: str,
    first: tuple[int, dict[str, Any]],
    found: dict[str, list[str]],
    present: list[str],
    holds: Callable[[str], bool],
    proposal: str | None,
) -> str:
    for name, needed in FORMATS.items():
        if not set(needed) <= found.keys():
            continue
        if name == "text":
            _refuse_to_lose_answers(source, found, present, holds, proposal)
        return name
    shapes = "; ".join(f"{name} ({', '.join(needed)})" for name, needed in FORMATS.items())
    raise UserError(
        f"{source}:{first[0]}: no known format has the columns "
        f"{', '.join(sorted(map(str, first[1]))) or '(none)'}. "
        f"Known: {shapes}. Map your names with dataset.columns"
        + (f": {proposal}" if proposal else ", e.g. {prompt: question, completion: answer}")
    )


def _refuse_to_lose_answers(
    source: str,
    found: dict[str, list[str]],
    present: list[str],
    holds: Callable[[str], bool],
    proposal: str | None,
) -> None:
    """Format text is the last resort: a label or an answer beside it would never be learnt."""
    for column in present:
        is_label = _like(column, "label")
        likely = is_label or _like(column, "completion")
        if likely and column not in found["text"] and holds(column):
            raise UserError(
                f"{source}: beside {found['text'][0]!r} stands {column!r}, which looks like "
                f"{'a label' if is_label else 'an answer'}, and raw text would leave it out. "
                "Map it with dataset.columns"
                + (f": {proposal}" if proposal else "")
                + "; or, for raw text, set dataset.format: text"
            )


def _like(column: str, field: str) -> bool:
    """Whether a column's name, or a word of it, is one that people give to `field`, or nearly so."""
    words = re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", column).casefold())
    names = _ALIKE[field]
    return any(word in names or word.removesuffix("s") in names for word in words) or bool(
        difflib.get_close_matches(plain(column), [n for n in names if len(n) > 4], n=1, cutoff=0.8)
    )


def _proposal(
    present: list[str],
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
        if isinstance(turns, list) and turns and isinstance(turns[0], dict):
            for field, keys in (
                ("messages", {"role", "content"}),
                ("conversations", {"from", "value"}),
            ):
                if keys <= turns[0].keys() and field not in found:
                    return written({field: column})
    for form in ("alpaca", "prompt_completion", "classification", "text"):
        if settings.format not in ("auto", form):
            continue
        taken: dict[str, str] = {}
        for field in FORMATS[form]:
            free = [name for name in present if name not in taken.values()]
            near = found.get(field) or [name for name in free if _like(name, field)]
            likely = [name for word in _ALIKE[field] for name in near if plain(name) == word]
            if near:
                taken[field] = (likely + near)[0]
        more = {field: name for field, name in taken.items() if field not in found}
        if len(taken) == len(FORMATS[form]) and more:
            return written(more)
    return None


def unused_keys(turns: list[dict[str, Any]], role: str, content: str) -> Iterator[str]:
    """Keys of turns without a use; a weight counts only in the assistant's."""
    for turn in turns:
        if len(turn) > 2:
            answer = turn.get(role) in ("assistant", "gpt")
            used = (role, content, *(TURN_FLAGS if answer else ()))
            for name, value in turn.items():
                if plain(name) not in used and filled(value):
                    said = plain(name) in TURN_FLAGS
                    # To leave out of training what never is trained on, needs no word.
                    if not said or trained({"": value}, [""]):
                        yield f"{name} of a turn" + " that is no answer" * said


def _string(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, not {type(value).__name__} ({value!r:.40})")
    if not value.strip():
        raise ValueError(f"{name} is empty")
    if "\0" in value:
        raise ValueError(f"{name} holds a NUL character (at {value.index(chr(0)) + 1}); remove it")
    if len(value) > TEXT_LIMIT:
        raise ValueError(
            f"{name} has {len(value):,} characters, and at most {TEXT_LIMIT:,} are taken; split it"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair, and no tokenizer takes it.
        raise ValueError(
            f"{name} holds half a character ({value[error.start]!r}); write the whole one"
        ) from None
    return value


def _content(value: object, name: str) -> str:
    """The text of a turn; OpenAI writes it as a list of parts too, of which one of text is read."""
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        if len(value) == 1 and value[0].get("type") == "text":
            return _string(value[0].get("text"), name)
        kinds = ", ".join(str(part.get("type")) for part in value)
        raise ValueError(
            f"{name} has {len(value)} parts ({kinds:.80}), and only text is trained on; write it "
            "as one text"
        )
    return _string(value, name)


def _turns(
    value: object,
    name: str,
    role_key: str,
    content_key: str,
    roles: dict[str, str],
    system: object = None,
) -> tuple[list[Message], frozenset[int]]:
    """The messages, after the system prompt of the row's own column, and those not trained on."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} must be a list of turns with {role_key!r} and {content_key!r}")
    messages = _system(system)
    untrained = set()
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, dict):
            raise ValueError(
                f"{name}, turn {number}: must be an object with {role_key!r} and {content_key!r}"
            )
        role = turn.get(role_key)
        other = "conversations" if "from" in turn else "messages"
        if role_key not in turn and ("from" in turn or "role" in turn):
            raise ValueError(
                f"{name}, turn {number}: no {role_key!r}, it has {', '.join(turn)}; such turns are "
                f"read with dataset.columns: {{{other}: {name}}}"
            )
        if not isinstance(role, str) or role not in roles:
            raise ValueError(
                f"{name}, turn {number}: {role_key} {role!r:.40} is not one of {', '.join(roles)}"
                + "; calls of tools are not trained on yet" * (role in TOOL_ROLES)
            )
        # Keys beside the two come first: an answer of tool calls alone has no content.
        counts = len(turn) == 2 or _trained_turn(turn, f"{name}, turn {number}: ")
        content = turn.get(content_key)
        if roles[role] == "system" and not filled(content):
            continue  # as good as none
        if roles[role] == "assistant" and not counts:
            untrained.add(len(messages))
        if roles[role] == "system" and messages and messages[0]["role"] == "system":
            raise ValueError(
                f"{name}, turn {number}: a second system prompt, beside "
                f"{'the column system' if filled(system) else 'an earlier turn'}; keep one"
            )
        messages.append(
            {"role": roles[role], "content": _content(content, f"turn {number}, {content_key}")}
        )
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError(
            f"{name}: the last turn must be the assistant's, for that is what is learnt"
        )
    return messages, frozenset(untrained)


def _trained_turn(turn: dict[str, Any], where: str) -> bool:
    """Whether a turn with more than its two keys is trained on."""
    for key, value in turn.items():
        why = why_refused(key)
        if why and filled(value):
            raise ValueError(f"{where}{refusal(key, why)}")
    flags = {plain(key): value for key, value in turn.items()}
    return trained(flags, TURN_FLAGS, where)


def _from_messages(line: int, fields: dict[str, Any]) -> Row:
    roles = {"system": "system", "user": "user", "assistant": "assistant"}
    messages, untrained = _turns(
        fields["messages"], "messages", "role", "content", roles, fields.get("system")
    )
    return Row(line, messages, untrained=untrained)


def _from_sharegpt(line: int, fields: dict[str, Any]) -> Row:
    messages, untrained = _turns(
        fields["conversations"],
        "conversations",
        "from",
        "value",
        SHAREGPT_ROLES,
        fields.get("system"),
    )
    return Row(line, messages, untrained=untrained)


def _system(value: object) -> list[Message]:
    """The system prompt that a row carries in a column of its own, if any."""
    return [{"role": "system", "content": _string(value, "system")}] if filled(value) else []


def _pair(line: int, prompt: str, answer: str, quality: str | None = None) -> Row:
    messages: list[Message] = [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": answer},
    ]
    return Row(line, messages, quality=quality)


def _from_alpaca(line: int, fields: dict[str, Any]) -> Row:
    prompt = _string(fields["instruction"], "instruction")
    if filled(fields.get("input")):
        prompt += "\n\n" + _string(fields["input"], "input")
    row = _pair(line, prompt, _string(fields["output"], "output"))
    return replace(row, messages=[*_system(fields.get("system")), *row.messages])


def _from_prompt_completion(line: int, fields: dict[str, Any]) -> Row:
    quality = fields.get("quality") if filled(fields.get("quality")) else None
    if quality is not None and quality not in ("good", "fair", "poor"):
        raise ValueError(f"quality {quality!r} is not one of good, fair, poor")
    row = _pair(
        line,
        _string(fields["prompt"], "prompt"),
        _string(fields["completion"], "completion"),
        quality,
    )
    return replace(row, messages=[*_system(fields.get("system")), *row.messages])


def _from_classification(line: int, fields: dict[str, Any]) -> Row:
    label = fields["label"]
    if isinstance(label, float) and label.is_integer():
        label = int(label)  # pandas writes whole numbers so, where one of them is missing
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise ValueError(
            f"label must be text or a whole number, not {type(label).__name__} ({label!r:.40})"
        )
    label = normal_label(str(label))
    if not label.isprintable():
        raise ValueError(f"label {label!r:.40} holds control characters")
    return Row(line, [], _string(fields["text"], "text"), _string(label, "label"))


def _from_text(line: int, fields: dict[str, Any]) -> Row:
    return Row(line, [], _string(fields["text"], "text"))


CONVERT: dict[str, Callable[[int, dict[str, Any]], Row]] = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "prompt_completion": _from_prompt_completion,
    "classification": _from_classification,
    "text": _from_text,
}
