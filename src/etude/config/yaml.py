"""YAML read strictly: plain values, every key once, and the line of each for messages."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from etude.errors import UserError, first_line
from etude.files import read_text

LIMIT = 2**18  # bytes of a file: a configuration has some thousands, and YAML is slow to read
KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Layer:
    """One source of values: a file, a preset, the command line; and where each key was written."""

    values: dict[str, Any]
    origin: dict[KeyPath, str]


def _place(mark: yaml.Mark) -> str:
    return f"{mark.name}:{mark.line + 1}"


class _StrictLoader(yaml.SafeLoader):
    """YAML with the scalars of 1.2: `no` is a string, 1e-5 a number, a date a string."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Read one node.

        Raises:
            UserError: it is an alias, or has a tag.
        """
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        alias = isinstance(event, yaml.AliasEvent)
        if alias or getattr(event, "tag", None):
            what = "aliases (*name)" if alias else f"tags ({event.tag})"
            raise UserError(
                f"{_place(event.start_mark)}: {what} are not supported; write the value out"
            )
        return super().compose_node(parent, index)


class _StrictDumper(yaml.SafeDumper):
    """Quotes every string that either version of YAML would read as something else."""


_SCALARS: dict[str, tuple[str, list[str]]] = {
    "bool": (r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    "null": (r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    "int": (r"^[-+]?[0-9]+$", list("-+0123456789")),
    "float": (
        r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$",
        list("-+0123456789."),
    ),
}
for _tag, (_form, _first) in _SCALARS.items():
    for _class in (_StrictLoader, _StrictDumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_form), _first)
# In YAML 1.2 a leading zero makes no octal number.
_StrictLoader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))


def read_yaml(path: Path) -> Layer:
    """Read one YAML mapping; no tags, no aliases, no duplicate keys.

    Raises:
        UserError: unreadable file or YAML that is not a plain mapping, with the line.
    """
    try:
        text = read_text(path, LIMIT)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `etude init` writes a config.yml here") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read as UTF-8 text: {reason}") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> Layer:
    """Parse the text of one YAML mapping; messages give `name` as the file's name.

    Raises:
        UserError: it is no such text.
    """
    origin: dict[KeyPath, str] = {}
    values = parse_value(text, name, origin)
    if not isinstance(values, dict | None):
        raise UserError(
            f"{name}: sections with keys are expected, not a {type(values).__name__}; see `etude "
            "init`"
        )
    # A section whose keys are all commented out means: its defaults.
    filled = {section: {} if keys is None else keys for section, keys in (values or {}).items()}
    return Layer(filled, origin)


def parse_value(text: str, name: str, origin: dict[KeyPath, str] | None = None) -> Any:
    """Parse any plain YAML value; the place of each key and list item goes into `origin`.

    Raises:
        UserError: it is not valid YAML, or not plain.
    """
    try:
        loader = _StrictLoader(text)
        loader.name = name
        root = loader.get_single_node()
        return None if root is None else _build(loader, root, (), {} if origin is None else origin)
    except RecursionError:
        raise UserError(f"{name}: nested too deeply; a configuration has three levels") from None
    except (yaml.YAMLError, ValueError) as error:  # a number of 5,000 digits is a ValueError
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or first_line(error)
        raise UserError(
            f"{_place(mark) if mark else name}: not valid YAML: {problem}; check the indentation, "
            "colons and quotes of that line"
        ) from None


def _build(loader: _StrictLoader, node: yaml.Node, loc: KeyPath, origin: dict[KeyPath, str]) -> Any:
    """The plain value of `node`, which is at `loc` in its file."""
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            origin[(*loc, index)] = _place(item.start_mark)
            items.append(_build(loader, item, (*loc, index), origin))
        return items
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        place = _place(key_node.start_mark)
        scalar_key = isinstance(key_node, yaml.ScalarNode)
        key = loader.construct_object(key_node) if scalar_key else None
        if not isinstance(key, str):
            raise UserError(f"{place}: {key_node.value!r:.60} is not a name; keys are plain words")
        path = (*loc, key)
        if key in result:
            dotted = ".".join(map(str, path))
            raise UserError(f"{place}: {dotted}: duplicate key (first at {origin[path]}); keep one")
        origin[path] = place
        result[key] = _build(loader, value_node, path, origin)
    return result


def scalar(value: object) -> str:
    """One value as YAML on one line, which `parse_value` reads back as the same value."""
    if isinstance(value, float):
        mantissa, _, exponent = f"{value:e}".partition("e")
        short = f"{float(mantissa):g}e{int(exponent)}" if 0 < abs(value) < 1e-3 else f"{value:g}"
        return short if float(short) == value else repr(value)
    options: dict[str, Any] = {"Dumper": _StrictDumper, "default_flow_style": True}
    options |= {"width": 10**9, "allow_unicode": True}
    text = str(yaml.dump(value, **options)).removesuffix("...\n").rstrip("\n")
    if text.isprintable():
        return text
    # Line breaks and the like: double quotes spell them out.
    return str(yaml.dump(value, default_style='"', **options)).rstrip("\n")
