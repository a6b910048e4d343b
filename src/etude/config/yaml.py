"""YAML read strictly: plain values, every key once, and the line of each for messages."""

import re
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from etude.errors import UserError
from etude.files import read_text

KEYS_LIMIT = 2000
KeyPath = tuple[str | int, ...]
DEPTH_LIMIT = 20  # a configuration has three levels
# No file name, no prompt and no library takes them: NUL, and half a character.
UNFIT = re.compile("[\0\ud800-\udfff]")
LIMIT = 2**18  # bytes of a file: a configuration has some thousands, and YAML is slow to read


@dataclass(frozen=True)
class Layer:
    """One source of values: a file, a preset, the command line; and where each key stands in it."""

    values: dict[str, Any]
    origin: dict[KeyPath, str]


class _StrictLoader(yaml.SafeLoader):
    """YAML with the scalars of 1.2: `no` is a string, 1e-5 a number, a date a string."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse what nests without end here, before Python's own stack does."""
        if self.depth == DEPTH_LIMIT:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


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
    """Read one YAML mapping; no tags, no aliases, no key twice.

    Raises:
        UserError: unreadable file or YAML that is not a plain mapping, with the line.
    """
    try:
        layer = parse_yaml(read_text(path, LIMIT), str(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `etude init` writes a config.yml here") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read as UTF-8 text: {reason}") from None
    # A section whose keys are all commented out means: its defaults.
    values = {section: {} if keys is None else keys for section, keys in layer.values.items()}
    return Layer(values, layer.origin)


def parse_yaml(text: str, name: str) -> Layer:
    """Parse the text of one YAML mapping; `name` stands in messages as the file's name."""
    origin: dict[KeyPath, str] = {}
    faults: list[str] = []
    seen: set[int] = set()

    def build(node: yaml.Node, loc: KeyPath) -> Any:
        place = f"{name}:{node.start_mark.line + 1}"
        if id(node) in seen:
            # The node's own place is the anchor's; the key's place is where the alias stands.
            alias = origin.get(loc, place)
            faults.append(f"{alias}: aliases (*name) are not supported; write the value out")
            return None
        seen.add(id(node))
        if loc:
            origin.setdefault(loc, place)
        if node.tag.rpartition(":")[2] not in ("map", "seq", "str", "int", "float", "bool", "null"):
            faults.append(
                f"{place}: {'.'.join(map(str, loc))}: the tag {node.tag} is not allowed; plain "
                "values only"
            )
            return None
        if isinstance(node, yaml.MappingNode):
            result: dict[Hashable, Any] = {}
            for key_node, value_node in node.value:
                key = build(key_node, ()) if isinstance(key_node, yaml.ScalarNode) else None
                key_place = f"{name}:{key_node.start_mark.line + 1}"
                if not isinstance(key, str):
                    faults.append(
                        f"{key_place}: {key_node.value!r} is not a name; keys are plain words"
                    )
                    continue
                if key in result:
                    faults.append(
                        f"{key_place}: {'.'.join(map(str, (*loc, key)))} stands twice (first at "
                        f"{origin[(*loc, key)]}); keep one"
                    )
                    continue
                origin[(*loc, key)] = key_place
                result[key] = build(value_node, (*loc, key))
            return result
        if isinstance(node, yaml.SequenceNode):
            return [build(item, (*loc, index)) for index, item in enumerate(node.value)]
        try:
            value = loader.construct_object(node)
        except (yaml.YAMLError, ValueError, KeyError):  # an explicit tag, such as !!int x
            faults.append(f"{place}: {node.value!r:.60} is not a {node.tag.rpartition(':')[2]}")
            return None
        if isinstance(value, str) and UNFIT.search(value):
            faults.append(
                f"{place}: {value!r:.60} holds a NUL or half a character; write plain text"
            )
        return value

    try:
        loader = _StrictLoader(text)
        root = loader.get_single_node()
        values = {} if root is None else build(root, ())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(
            f"{where}: not valid YAML: {problem}; check the indentation, colons and quotes of that "
            "line"
        ) from None
    if len(origin) > KEYS_LIMIT:
        raise UserError(
            f"{name}: {len(origin):,} keys and list items, and at most {KEYS_LIMIT:,} are read; "
            "see `etude init` for the keys there are"
        )
    if not faults and not isinstance(values, dict):
        faults.append(
            f"{name}: sections with keys are expected, not a {type(values).__name__}; see `etude "
            "init`"
        )
    if faults:
        raise UserError("The configuration cannot be read:\n  " + "\n  ".join(faults))
    return Layer(values, origin)


def scalar(value: object) -> str:
    """One value as YAML on one line, which `_StrictLoader` reads back as the same value."""
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
