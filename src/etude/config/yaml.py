"""YAML read strictly: plain values, every key once, and the line of each for messages."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import yaml

from etude.errors import UserError, first_line
from etude.files import read_text

KeyPath = tuple[str | int, ...]


class Layer(NamedTuple):
    """One source of values: a file, a preset, the command line; and where each key was written."""

    values: dict[str, Any]
    origin: dict[KeyPath, str]


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of 1.2: `no` is a string, 1e-5 a number, a date a string."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]


for _tag, _form, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("int", r"^[-+]?[0-9]+$", "-+0123456789"),
    (
        "float",
        r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$",
        "-+0123456789.",
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_form), list(_first))
# In YAML 1.2 a leading zero makes no octal number.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))


def read_yaml(path: Path) -> Layer:
    """Read one YAML mapping; no tags, no aliases, no duplicate keys.

    Raises:
        UserError: unreadable file or YAML that is not a plain mapping, with the line.
    """
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `etude init` writes a config.yml here") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> Layer:
    """Parse the text of one YAML mapping; messages give `name` as the file's name.

    Raises:
        UserError: it is no such text.
    """
    origin: dict[KeyPath, str] = {}
    values = parse_value(text, name, origin)
    if not isinstance(values, dict | None):
        kind = type(values).__name__
        raise UserError(f"{name}: sections with keys are expected, not a {kind}; see `etude init`")
    # A section whose keys are all commented out means: its defaults.
    filled = {section: {} if keys is None else keys for section, keys in (values or {}).items()}
    return Layer(filled, origin)


def parse_value(text: str, name: str, origin: dict[KeyPath, str]) -> Any:
    """Parse any plain YAML value; the place of each key goes into `origin`.

    Raises:
        UserError: it is not valid YAML, or not plain.
    """
    try:
        for token in yaml.scan(text):
            if isinstance(token, yaml.TagToken | yaml.AliasToken):
                problem = "tags (!name) and aliases (*name) are not supported; write the value out"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=token.start_mark)
        loader = _Loader(text)
        root = loader.get_single_node()
        for path, line in _keys(root, ()):
            place = f"{name}:{line}"
            if origin.setdefault(path, place) is not place:
                first, dotted = origin[path], ".".join(map(str, path))
                raise UserError(f"{place}: {dotted}: duplicate key (first at {first}); keep one")
        return root and loader.construct_document(root)
    # A number of 5,000 digits is a ValueError, 1,000 brackets are a RecursionError.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{name}:{mark.line + 1}" if mark else name
        problem = getattr(error, "problem", None) or first_line(error)
        raise UserError(f"{place}: not valid YAML: {problem}; correct that line") from None


def _keys(node: yaml.Node | None, loc: KeyPath) -> Iterator[tuple[KeyPath, int]]:
    """Every key in the mapping `node`, which is at `loc`, and in those within it, with its line."""
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        path = (*loc, str(key.value))
        yield path, key.start_mark.line + 1
        yield from _keys(value, path)


# Words that need no quotes; what either version of YAML reads as true, false or null does.
PLAIN = re.compile(r"(?!(?:true|false|null|yes|no|on|off|y|n)$)[^\W\d][\w./ -]*(?<! )", re.I)


def scalar(value: object) -> str:
    """One value as YAML on one line, which `parse_value` reads back as the same value."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{scalar(key)}: {scalar(value[key])}" for key in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(scalar, value)) + "]"
    if isinstance(value, float):
        mantissa, _, exponent = f"{value:e}".partition("e")
        short = f"{float(mantissa):g}e{int(exponent)}" if 0 < abs(value) < 1e-3 else f"{value:g}"
        return short if float(short) == value else repr(value)
    if not isinstance(value, str):
        return json.dumps(value)  # a whole number, true, false or null
    if PLAIN.fullmatch(value):
        return value
    return str(yaml.dump(value, default_style='"', width=10**9, allow_unicode=True)).rstrip("\n")
