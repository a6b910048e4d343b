"""config.yml is read and checked: presets and key=value settings over it, every fault reported at once."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError

from etude.config.schema import Config, Section
from etude.config.yaml import UNFIT, KeyPath, Layer, parse_yaml, read_yaml, scalar
from etude.errors import UserError, nearest


def load_config(
    path: str | Path | None, presets: Sequence[str] = (), overrides: Sequence[str] = ()
) -> Config:
    """Read config.yml, lay presets and ``key=value`` overrides over it, and check everything.

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
        _merge(values, layer.values)
        origin.update(layer.origin)
    return check_config(values, origin)


def check_config(values: dict[str, Any], origin: dict[KeyPath, str]) -> Config:
    """Validate plain values against the schema; `origin` tells where each key path was written.

    Raises:
        UserError: all faults of form and all contradictions between keys, one a line.
    """
    faults: dict[KeyPath, str] = {}
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        for item in error.errors():
            faults[tuple(item["loc"])] = _explain(
                tuple(item["loc"]), item["type"], item["msg"], item["input"]
            )
        # The keys at fault fall back to their defaults, so that contradictions elsewhere show too.
        config = Config.model_validate(_without(values, faults))
    bad_sections = {loc[:2] for loc in faults}
    for keys, message in _contradictions(config):
        if not bad_sections & {tuple(key.split(".")) for key in keys}:
            faults.setdefault(tuple(keys[0].split(".")), message)
    if not faults:
        return config
    # In the order of the file; `origin` was filled in that order.
    written = list(origin)
    places = {loc: _written(loc, origin) for loc in faults}
    lines = [
        f"{origin[place] + ': ' if place else ''}{'.'.join(map(str, loc))}: {faults[loc]}"
        for loc, place in sorted(
            places.items(), key=lambda at: written.index(at[1]) if at[1] else -1
        )
    ]
    raise UserError(
        f"The configuration has {len(lines)} {'fault' if len(lines) == 1 else 'faults'}:\n  "
        + "\n  ".join(lines)
        + "\nMend them and run again; `etude init` writes a config.yml that explains every key."
    )


def _contradictions(config: Config) -> Iterator[tuple[list[str], str]]:
    """Yield (the keys at odds, what is wrong, what to do) for values that cannot stand together."""
    training, dataset, evaluation = config.training, config.dataset, config.evaluation
    if training.fp16 and training.use_cpu:
        yield (
            ["training.fp16", "training.use_cpu"],
            (
                "float16 needs a GPU, and training.use_cpu is true; set fp16: false (CPU) or "
                "use_cpu: false (GPU)"
            ),
        )
    if training.fp16 and training.bf16:
        yield ["training.fp16", "training.bf16"], "fp16 and bf16 exclude each other; keep one"
    if config.model.quantization and config.lora.use_dora:
        yield (
            ["model.quantization", "lora.use_dora"],
            "DoRA needs the base's own weights; set quantization: null or use_dora: false",
        )
    if config.model.dtype == "float16" and training.use_cpu:
        yield (
            ["model.dtype", "training.use_cpu"],
            "float16 needs a GPU, and training.use_cpu is true; set dtype: auto or float32",
        )
    if training.max_steps and training.warmup_steps >= max(training.max_steps, 1):
        yield (
            ["training.warmup_steps", "training.max_steps"],
            (
                f"warm-up of {training.warmup_steps:g} steps is not shorter than the training "
                f"(max_steps {training.max_steps}); lower it, or give a share such as 0.03"
            ),
        )
    validated = bool(dataset.validation or dataset.validation_split)
    if training.early_stopping_patience and not validated:
        yield (
            ["training.early_stopping_patience", "dataset.validation", "dataset.validation_split"],
            (
                "early stopping needs validation data; set dataset.validation or "
                "dataset.validation_split"
            ),
        )
    if evaluation.fair_threshold > evaluation.good_threshold:
        yield (
            ["evaluation.fair_threshold", "evaluation.good_threshold"],
            (
                f"{evaluation.fair_threshold} is above good_threshold {evaluation.good_threshold}; "
                "good is the higher one"
            ),
        )
    for name in ("labels", "text"):
        if f"{{{name}}}" not in dataset.instruction:
            yield (
                ["dataset.instruction"],
                f"lacks {{{name}}}; an instruction needs {{labels}} and {{text}}",
            )
    if dataset.special_tokens == "parse" and dataset.format not in ("auto", "text"):
        yield (
            ["dataset.special_tokens", "dataset.format"],
            f"parse is for format text, and the format is {dataset.format}, whose control tokens the "
            "chat template writes; set special_tokens: text",
        )
    if dataset.labels and len(set(dataset.labels)) < len(dataset.labels):
        yield (
            ["dataset.labels"],
            f"duplicate label in {dataset.labels} (white space and accents are normalised)",
        )
    if dataset.labels and "" in dataset.labels:
        yield ["dataset.labels"], "a label is empty; name every class"
    if dataset.overlength == "split" and dataset.format not in ("auto", "text"):
        yield (
            ["dataset.overlength", "dataset.format"],
            f"split is for raw text, and the format is {dataset.format}; set truncate or drop",
        )
    if dataset.labels and dataset.format not in ("auto", "classification"):
        yield (
            ["dataset.labels", "dataset.format"],
            f"labels belong to format classification, and the format is {dataset.format}",
        )


KINDS = {
    "bool_type": "is neither true nor false",
    "int_type": "is not a whole number",
    "float_type": "is not a number",
    "string_type": "is not text",
    "list_type": "is not a list; write [a, b]",
    "dict_type": "is not a mapping; write {a: b}",
}


def _explain(loc: KeyPath, kind: str, message: str, value: object) -> str:
    """One sentence for one pydantic fault."""
    if kind == "extra_forbidden":
        known = list(key_paths())
        dotted = ".".join(map(str, loc))
        # The same key in another section is a likelier slip than a look-alike beside it.
        same = [key for key in known if key.split(".")[-1] == loc[-1]]
        sections = list(Config.model_fields)
        beside = [key.split(".")[1] for key in known if key.startswith(f"{loc[0]}.")]
        names = sections if len(loc) == 1 else beside
        if len(loc) == 1:
            near = nearest(dotted, known + sections)
        else:
            # The last names alone: the section before them would make all its keys look alike.
            last = nearest(str(loc[-1]), beside)
            near = last and f"{loc[0]}.{last}"
        guess = " or ".join(same) or near
        return "unknown key; " + (
            f"did you mean {guess}?" if guess else f"known here: {', '.join(names)}"
        )
    shown = repr(value) if len(repr(value)) < 60 else repr(value)[:57] + "..."
    text = f"{shown} {KINDS.get(kind) or message.replace('Input should', 'should')}"
    if kind == "float_type" or kind == "int_type":
        text += " (write it without quotes)" if isinstance(value, str) and _number(value) else ""
    if kind == "literal_error" and isinstance(value, str):
        guess = nearest(value, re.findall(r"'([^']+)'", message))
        text = text.replace("True or False", "true or false")
        text += f"; did you mean {guess}?" if guess else ""
    if kind == "model_type":
        text = f"a section with keys of its own is expected here, not {shown}"
    return text


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def key_paths() -> Iterator[str]:
    """Every key of the schema, dotted: ``model.name``, ``lora.r``, ..."""
    for section, field in Config.model_fields.items():
        for key in field.default.__class__.model_fields:
            yield f"{section}.{key}"


def value_at(config: Config, key: str) -> object:
    """The value of a dotted key."""
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def _written(loc: KeyPath, origin: dict[KeyPath, str]) -> KeyPath | None:
    """The key path itself or the nearest one around it that was written somewhere."""
    return next((loc[:n] for n in range(len(loc), 0, -1) if loc[:n] in origin), None)


def _without(values: dict[str, Any], faults: dict[KeyPath, str]) -> dict[str, Any]:
    """A copy of the two-level `values` without the keys (or whole sections) at fault."""
    bad = {loc[:2] for loc in faults}
    return {
        section: {key: value for key, value in keys.items() if (section, key) not in bad}
        for section, keys in values.items()
        if (section,) not in bad and isinstance(keys, dict)
    }


def _merge(into: dict[str, Any], layer: dict[str, Any]) -> None:
    """Lay `layer` over `into`, section by section; a key's whole value is replaced."""
    for section, keys in layer.items():
        if isinstance(keys, dict) and isinstance(into.get(section), dict):
            into[section] = {**into[section], **keys}
        else:
            into[section] = keys


# --- the command line -------------------------------------------------------------------------


def parse_override(text: str) -> Layer:
    """Read one ``section.key=value`` from the command line.

    The value of a key that takes text is that text as it stands; only where the key may be null, null or
    nothing means that, and "null" in double quotes the word. Every other value is YAML.

    Raises:
        UserError: not of that form.
    """
    key, equals, value = text.partition("=")
    section, dot, name = key.strip().partition(".")
    if not (equals and dot and section and name):
        raise UserError(
            f"command line: {text!r} is not of the form section.key=value, for example lora.r=16"
        )
    return Layer(
        {section: {name: _value(section, name, value, f"command line ({text:.200})")}},
        {(section,): "command line", (section, name): "command line"},
    )


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


def _value(section: str, name: str, written: str, where: str) -> Any:
    """What `written` on the command line is for the key section.name."""
    field = Config.model_fields.get(section)
    known = field and type(field.default).model_fields.get(name)
    kinds = (
        _kinds(known.annotation) if known else {str}
    )  # an unknown key is the fault, not its value
    if kinds <= {str, type(None)}:
        if unfit := UNFIT.search(written):
            raise UserError(f"{where}: {unfit[0]!r} is a NUL or half a character; write plain text")
        words = {"null": None, "": None, '"null"': "null"} if type(None) in kinds else {}
        return words.get(written, written)
    # Two levels deep, as in a file, where a bare null on the first level is an empty section.
    values = parse_yaml(f"s:\n v: {written}", where).values
    if values.keys() != {"s"} or values["s"].keys() != {"v"}:
        raise UserError(f"{where}: more than one value; give each key a setting of its own")
    return values["s"]["v"]


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
    for section in Config.model_fields:
        part: Section = getattr(config, section)
        lines += [f"# {part.__doc__}", f"{section}:"]
        for key, field in type(part).model_fields.items():
            entry = f"  {key}: {scalar(getattr(part, key))}"
            if len(entry) + len(field.description or "") > 96:
                lines += [f"  # {field.description}", entry]
            else:
                lines.append(f"{entry}  # {field.description}")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"
