"""config.yml is read and checked: presets and key=value settings over it, every fault reported at once."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from etude.config.schema import SECTIONS, Config, Section, contradictions
from etude.config.yaml import KeyPath, Layer, parse_value, read_yaml, scalar
from etude.errors import UserError, nearest


def load_config(
    path: str | Path | None, presets: Sequence[str] = (), overrides: Sequence[str] = ()
) -> Config:
    """Read config.yml, apply presets and ``key=value`` overrides on top, and check everything.

    Later layers win key by key. `path` None starts from the defaults.

    Raises:
        UserError: every fault at once, each with its place, value and what is allowed.
    """
    layers = [] if path is None else [read_yaml(Path(path))]
    layers += [read_yaml(preset_path(name)) for name in presets]
    layers += [parse_override(text) for text in overrides]
    values: dict[str, Any] = {}
    origin: dict[KeyPath, str] = {}
    for layer in layers:
        for section, keys in layer.values.items():
            both = isinstance(keys, dict) and isinstance(values.get(section), dict)
            values[section] = {**values[section], **keys} if both else keys
        origin.update(layer.origin)
    return check_config(values, origin)


def check_config(values: dict[str, Any], origin: dict[KeyPath, str]) -> Config:
    """Validate plain values against the schema; `origin` has the place where each key was written.

    Raises:
        UserError: all faults of form and all contradictions between keys, one a line.
    """
    faults: dict[KeyPath, str] = {}
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        faults = {tuple(item["loc"]): _explain(item) for item in error.errors()}
        # The keys at fault fall back to their defaults, so that contradictions elsewhere show too.
        config = Config.model_validate(_without(values, {loc[:2] for loc in faults}))
    wrong = {".".join(map(str, loc[:2])) for loc in faults}
    for keys, problem in contradictions(config):
        if not wrong.intersection(keys):
            faults.setdefault(tuple(keys[0].split(".")), problem)
    if not faults:
        return config
    # In the order of the file, in which `origin` was filled.
    order = {path: number for number, path in enumerate(origin)}
    places = sorted((order.get(_around(loc, origin), -1), loc) for loc in faults)
    raise UserError(
        f"The configuration has {len(faults)} {'fault' if len(faults) == 1 else 'faults'}:\n"
        + "".join(
            f"  {f'{origin[near]}: ' if (near := _around(loc, origin)) else ''}"
            f"{'.'.join(map(str, loc))}: {faults[loc]}\n"
            for _, loc in places
        )
        + "Fix these and rerun; `etude init` writes a config.yml that explains every key."
    )


def _without(values: dict[str, Any], bad: set[KeyPath]) -> dict[str, Any]:
    """A copy of the two-level `values` without the keys (or whole sections) that are `bad`."""
    return {
        section: {key: value for key, value in keys.items() if (section, key) not in bad}
        for section, keys in values.items()
        if (section,) not in bad
    }


def _around(loc: KeyPath, origin: dict[KeyPath, str]) -> KeyPath:
    """The key, or the nearest one around it, that was written somewhere; empty if none was."""
    return next((loc[:n] for n in range(len(loc), 0, -1) if loc[:n] in origin), ())


KINDS = {
    "bool_type": "is neither true nor false",
    "int_type": "is not a whole number",
    "float_type": "is not a number",
    "string_type": "is not text",
    "list_type": "is not a list; write [a, b]",
    "dict_type": "is not a mapping; write {a: b}",
}


def _explain(item: ErrorDetails) -> str:
    """One sentence for one pydantic fault."""
    kind, value = item["type"], item["input"]
    if kind == "extra_forbidden":
        return _unknown(*map(str, item["loc"]))
    shown = repr(value) if len(repr(value)) < 60 else f"{value!r:.57}..."
    if kind == "model_type":
        return f"a section with keys of its own is expected here, not {shown}"
    message = item["msg"].replace("Input should", "should").replace("Value error, ", "")
    text = f"{shown} {KINDS.get(kind, message)}".replace("True or False", "true or false")
    if kind in ("float_type", "int_type") and re.fullmatch(r"'[-+.\de]+'", shown):
        text += " (write it without quotes)"
    if kind == "literal_error" and isinstance(value, str):
        guess = nearest(value, re.findall(r"'([^']+)'", message))
        text += f"; did you mean {guess}?" if guess else ""
    return text


def _unknown(first: str, *rest: str) -> str:
    """What to say of an unknown section `first`, or of an unknown key in it."""
    name = rest[0] if rest else first
    keys = [key.split(".") for key in key_paths()]
    # The same key in another section is a likelier slip than a look-alike beside it.
    guesses = [f"{section}.{key}" for section, key in keys if key == name]
    known = {key: f"{section}.{key}" for section, key in keys if not rest or section == first}
    if not rest:
        known |= {section: section for section in SECTIONS}
    near = nearest(name, known)
    if near and not guesses:
        guesses = [known[near]]
    if guesses:
        return f"unknown key; did you mean {' or '.join(guesses)}?"
    return f"unknown key; known here: {', '.join(known if rest else SECTIONS)}"


def key_paths() -> Iterator[str]:
    """Every key of the schema, dotted: ``model.name``, ``lora.r``, ..."""
    for name, section in SECTIONS.items():
        for key in section.model_fields:
            yield f"{name}.{key}"


def value_at(config: Config, key: str) -> object:
    """The value of a dotted key."""
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


# --- the command line -------------------------------------------------------------------------


def parse_override(text: str) -> Layer:
    """Read one ``section.key=value`` from the command line.

    The value of a key that takes text is that text as it stands; only where the key may be null, null or
    nothing means that, and "null" in double quotes the word. Every other value is YAML.

    Raises:
        UserError: not of that form.
    """
    key, equals, written = text.partition("=")
    section, dot, name = key.strip().partition(".")
    if not (equals and dot and section and name):
        meant = [known for known in key_paths() if known.endswith(f".{section}")]
        raise UserError(
            f"command line: {text!r:.200} is neither a file or folder here nor a setting, which has "
            "the form section.key=value, for example lora.r=16"
            + (f"; did you mean {' or '.join(meant)}?" if meant else "")
        )
    field = SECTIONS[section].model_fields.get(name) if section in SECTIONS else None
    kinds = _kinds(field.annotation) if field else {str}  # an unknown key is the fault
    value: Any = written
    if not kinds <= {str, NoneType}:
        value = parse_value(written, f"command line ({text:.200})")
    elif NoneType in kinds:
        value = {"null": None, "": None, '"null"': "null"}.get(written, written)
    place = "command line"
    return Layer({section: {name: value}}, {(section,): place, (section, name): place})


def as_overrides(settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Settings given by section in Python, `{"lora": {"r": 8}}`, as ``section.key=value``.

    Raises:
        UserError: a section that is no mapping of keys to values.
    """
    for section, keys in settings.items():
        if not isinstance(keys, Mapping):
            raise UserError(
                f"{section}: settings are given by section, for example {section}={{...}}, "
                'as in lora={"r": 8}'
            )
    return [
        f"{section}.{key}={value if isinstance(value, str) else json.dumps(value)}"
        for section, keys in settings.items()
        for key, value in keys.items()
    ]


def _kinds(annotation: Any) -> set[Any]:
    """The types that a value of `annotation` may have, those of Literal's values among them."""
    if get_origin(annotation) is Literal:
        return {type(value) for value in get_args(annotation)}
    if get_origin(annotation) in (Union, UnionType):
        return set().union(*map(_kinds, get_args(annotation)))
    return {annotation}


PRESETS = Path(__file__).parent / "presets"


def preset_names() -> list[str]:
    """The presets that ship with Etude."""
    return sorted(path.stem for path in PRESETS.glob("*.yml"))


def preset_path(name: str) -> Path:
    """The file of a preset: one that ships with Etude, by name, or any .yml file by path.

    Raises:
        UserError: no such preset, with those there are.
    """
    if name.endswith((".yml", ".yaml")):
        return Path(name)
    known = preset_names()
    if name not in known:
        guess = nearest(name, known)
        raise UserError(
            f"command line: --preset {name}: no such preset; "
            + (f"did you mean {guess}? " if guess else "")
            + f"There are: {', '.join(known)}; or give the path of a .yml file"
        )
    return PRESETS / f"{name}.yml"


# --- writing ---------------------------------------------------------------------------------


def to_yaml(config: Config) -> str:
    """Write `config` as YAML, each key under its section, with one comment each."""
    lines = ["# Etude's configuration. Every key is optional and has a default.", ""]
    for name in SECTIONS:
        section: Section = getattr(config, name)
        lines += [f"# {section.__doc__}", f"{name}:"]
        for key, field in type(section).model_fields.items():
            entry = f"  {key}: {scalar(getattr(section, key))}"
            if len(entry) + len(field.description or "") > 96:
                lines += [f"  # {field.description}", entry]
            else:
                lines.append(f"{entry}  # {field.description}")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def json_schema() -> str:
    """The JSON Schema of config.yml (draft 2020-12), as text."""
    return json.dumps(Config.model_json_schema(), indent=1, ensure_ascii=False) + "\n"
