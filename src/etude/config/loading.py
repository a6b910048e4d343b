"""config.yml is read and checked: presets and key=value settings over it, every fault reported at once."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from etude.config.schema import SECTIONS, Config, Section, contradictions
from etude.config.yaml import KeyPath, Layer, parse_value, read_yaml, scalar
from etude.errors import UserError, nearest

# ``lora.r=8`` as typed, or settings by section as Python gives them: ``{"lora": {"r": 8}}``.
Override = str | Mapping[str, Any]


def load_config(
    path: str | Path | None, presets: Sequence[str] = (), overrides: Sequence[Override] = ()
) -> Config:
    """Read config.yml, apply presets and overrides on top, and check everything.

    Later layers win key by key. `path` None starts from the defaults.

    Raises:
        UserError: every fault at once, each with its place, value and what is allowed.
    """
    layers = [] if path is None else [read_yaml(Path(path))]
    layers += [read_yaml(preset_path(name)) for name in presets]
    layers += [
        parse_override(item) if isinstance(item, str) else Layer(dict(item), {})
        for item in overrides
    ]
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
        UserError: all faults of form, or else all contradictions between keys, one a line.
    """
    faults: list[tuple[KeyPath, str]]
    try:
        config = Config.model_validate(values)
        faults = [(tuple(key.split(".")), problem) for key, problem in contradictions(config)]
        if not faults:
            return config
    except ValidationError as error:
        faults = [(item["loc"], _explain(item)) for item in error.errors()]
    lines = []
    for loc, problem in faults:
        # Where the key was written, or the nearest one around it.
        written = [origin[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in origin]
        lines.append("  " + ": ".join([*written[:1], ".".join(map(str, loc)), problem]))
    count = "1 fault" if len(lines) == 1 else f"{len(lines)} faults"
    raise UserError(
        "\n".join([f"The configuration has {count}:", *lines])
        + "\nFix these and rerun; `etude init` writes a config.yml that explains every key."
    )


def _explain(item: ErrorDetails) -> str:
    """One sentence for one pydantic fault."""
    if item["type"] == "extra_forbidden":
        return _unknown(*map(str, item["loc"]))
    message = re.sub(r"Input (?=should)|Value error, | or instance of \w+", "", item["msg"])
    text = f"{item['input']!r:.60} {message}"
    if item["type"] == "literal_error":
        guess = nearest(str(item["input"]), re.findall(r"'([^']+)'", message))
        text += f"; did you mean {guess}?" if guess else ""
    return text


def _unknown(first: str, *rest: str) -> str:
    """What to say of an unknown section `first`, or of an unknown key in it."""
    name = rest[0] if rest else first
    # The same key in another section is a likelier slip than a look-alike beside it.
    guesses = [key for key in key_paths() if key.endswith(f".{name}")]
    near = nearest(name, SECTIONS[first].model_fields if rest else SECTIONS)
    if near and not guesses:
        guesses = [f"{first}.{near}" if rest else near]
    if guesses:
        return f"unknown key; did you mean {' or '.join(guesses)}?"
    known = SECTIONS[first].model_fields if rest else SECTIONS
    return f"unknown key; known here: {', '.join(known)}"


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

    The value of a key that takes text is that text as it stands, but null or nothing is null where the
    key may be null. Every other value is YAML.

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
    value: Any = written
    if field and field.annotation == (str | None) and written in ("", "null"):
        value = None
    elif field and field.annotation not in (str, str | None):
        value = parse_value(written, f"command line ({text:.200})", {})
    place = "command line"
    return Layer({section: {name: value}}, {(section,): place, (section, name): place})


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
    if name not in preset_names():
        raise UserError(
            f"command line: --preset {name}: no such preset; there are: {', '.join(preset_names())}; "
            "or give the path of a .yml file"
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
