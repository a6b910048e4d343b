"""The typed schema of config.yml: the one home of every default, and a strict loader for it."""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from etude.errors import UserError, nearest
from etude.strict_yaml import UNFIT, KeyPath, Layer, parse_yaml, read_yaml, scalar

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def normal_label(label: str) -> str:
    """A label as labels are compared: composed (NFC), single spaces, none around it."""
    return " ".join(unicodedata.normalize("NFC", label).split())


Label = Annotated[str, AfterValidator(normal_label)]


class Section(BaseModel):
    """A section of config.yml: unknown keys and loose types are errors."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


class Model(Section):
    """The base: which pretrained model, and how it is held in memory."""

    name: str = Field(
        "Qwen/Qwen2-1.5B",
        min_length=1,
        description="a Hub id, a folder, a .gguf file, or smollm2-135m (the bundled sample)",
    )
    revision: str | None = Field(
        None, description="Hub commit, tag or branch; null takes the newest and records its commit"
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto",
        description="auto | float32 | float16 | bfloat16; auto takes what the device does fast",
    )
    quantization: Literal["int8", "nf4"] | None = Field(
        None,
        description=(
            "int8 | nf4 | null: train on an int8 base (faster, a quarter of the memory), or a "
            "4-bit one (QLoRA, for a GPU)"
        ),
    )
    chat_template: str | None = Field(
        None, description="a .jinja file in place of the tokenizer's own chat template"
    )


class Lora(Section):
    """The adapter: small trained matrices beside the frozen ones (LoRA, arXiv:2106.09685)."""

    r: Positive = Field(
        64, description="rank; 8-16 for simple tasks, 64 usual, 128-256 for complex ones"
    )
    alpha: Annotated[float, Field(gt=0)] = Field(
        128, description="strength: the update is scaled by alpha/r (alpha/sqrt(r) with use_rslora)"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="share of the adapter's inputs dropped in training; 0.05-0.1 for little data",
    )
    target_modules: list[str] = Field(
        ["q_proj", "v_proj"],
        min_length=1,
        description="which linear layers get an adapter; [all-linear] for all",
    )
    use_rslora: bool = Field(False, description="scale by alpha/sqrt(r): steadier at high rank")
    use_dora: bool = Field(False, description="DoRA: learn magnitude apart from direction; slower")


class Dataset(Section):
    """The data: files or Hub data sets, and how rows become examples."""

    train: str = Field(
        "data/tweets_sentiment.train.jsonl",
        min_length=1,
        description=(
            "a .jsonl, .json, .csv or .parquet file, or a Hub data set (owner/name or "
            "owner/name:split)"
        ),
    )
    validation: str | None = Field(
        None, description="the same for validation; null cuts validation_split from train"
    )
    test: str | None = Field(
        None, description="the same, held out: only `etude evaluate` measures on it"
    )
    validation_split: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="share of train used for validation, by seed, when validation is null"
    )
    format: Literal[
        "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "classification", "text"
    ] = Field(
        "auto",
        description=(
            "auto | messages | sharegpt | alpaca | prompt_completion | classification | text"
        ),
    )
    columns: dict[str, str] = Field(
        {}, description="the data's own column names, e.g. {text: review, label: stars}"
    )
    ignore: list[str] = Field(
        [],
        description="columns, and keys of turns, to leave out although they matter, e.g. [score]",
    )
    on_bad_row: Literal["stop", "skip"] = Field(
        "stop",
        description="stop | skip: what happens at rows that cannot be used; skipped ones are counted",
    )
    labels: list[Label] | None = Field(
        None, min_length=2, description="classification: the labels; null collects them from train"
    )
    instruction: str = Field(
        "Classify the text as one of: {labels}.\n\nText: {text}",
        description=(
            "classification: the prompt made of {labels} and {text}; {text} last is fastest"
        ),
    )
    system_prompt: str | None = Field(
        None, description="put before conversations that have none; null leaves it to the template"
    )
    special_tokens: Literal["text", "parse"] | None = Field(
        None,
        description="text | parse | null: raw text that spells control tokens stays text or becomes "
        "them; null asks where many rows do",
    )
    max_length: Annotated[int, Field(ge=8)] = Field(512, description="tokens an example may have")
    overlength: Literal["truncate", "drop", "split"] | None = Field(
        None,
        description=(
            "truncate | drop | split: what happens to longer ones; null splits raw text and "
            "truncates the rest"
        ),
    )
    max_rows: Positive | None = Field(
        None,
        description="draw that many rows of train by seed, before the validation is cut; null: all",
    )


class Training(Section):
    """How the adapter is trained."""

    learning_rate: Annotated[float, Field(gt=0)] = Field(
        2e-4, description="peak; 1e-4 to 5e-4 is usual for LoRA"
    )
    batch_size: Positive = Field(
        1, description="full-length examples that fit in memory at once: 1 on a CPU, 4-8 on a GPU"
    )
    gradient_accumulation_steps: Positive = Field(
        8, description="a step learns from batch_size x this many examples"
    )
    num_epochs: Annotated[float, Field(gt=0)] = Field(3, description="passes over the data")
    max_steps: Positive | None = Field(
        None, description="stop after that many steps; null runs all epochs"
    )
    lr_scheduler: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="linear | cosine | constant: the learning rate after warm-up"
    )
    warmup_steps: Annotated[float, Field(ge=0)] = Field(
        0.03, description="learning rate rises over these steps; below 1: that share of all steps"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.0, description="AdamW's pull of the adapter towards zero"
    )
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(
        1.0, description="longer gradients are scaled down to it"
    )
    fp16: bool = Field(
        False, description="float16 mixed precision; GPU only, for GPUs before Ampere"
    )
    bf16: bool = Field(
        False, description="bfloat16 mixed precision; Ampere and later, or a CPU with bf16"
    )
    use_cpu: bool = Field(False, description="true stays on the CPU even where there is a GPU")
    compile: Literal["auto", True, False] = Field(
        "auto",
        description="auto | true | false: torch.compile; auto where a training is long enough",
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations: less memory, slower"
    )
    seed: Seed = Field(42, description="of the order of examples, the adapter's start, dropout")
    logging_steps: Positive = Field(10, description="steps between two lines of metrics.jsonl")
    eval_steps: Positive | None = Field(
        None, description="steps between validations; null: every epoch"
    )
    save_steps: Positive | None = Field(
        None, description="steps between checkpoints; null: one at each validation, or every epoch"
    )
    save_total_limit: Positive = Field(
        2, description="checkpoints kept; the best is always among them"
    )
    early_stopping_patience: Positive | None = Field(
        None, description="stop after that many validations without a better loss; null never"
    )


class Evaluation(Section):
    """How a model is measured."""

    method: Literal["likelihood", "generate"] = Field(
        "likelihood",
        description="likelihood | generate: score each label exactly, or write and parse an answer",
    )
    batch_size: Positive = Field(16, description="rows generated together")
    max_rows: Positive | None = Field(
        None, description="measure that many rows of the set, drawn by seed; null: all"
    )
    good_threshold: Share = Field(0.7, description="quality score from which a response is good")
    fair_threshold: Share = Field(
        0.4, description="quality score from which it is fair; below, poor"
    )
    bootstrap_samples: Annotated[int, Field(ge=100)] = Field(
        2000, description="resamples behind the intervals"
    )
    confidence: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.95, description="level of the confidence intervals"
    )


class Generation(Section):
    """How responses are sampled, in chat and in evaluation."""

    max_new_tokens: Positive = Field(256, description="longest response")
    temperature: Annotated[float, Field(ge=0)] = Field(
        0.7,
        description=(
            "0 is greedy; higher is more varied (evaluation of a data set is always greedy)"
        ),
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        0.9, description="sample among the tokens that hold this much"
    )
    top_k: Annotated[int, Field(ge=0)] = Field(
        50, description="sample among the k likeliest; 0 means all"
    )
    repetition_penalty: Annotated[float, Field(gt=0)] = Field(
        1.0, description="above 1 discourages repeated tokens"
    )
    seed: Seed | None = Field(None, description="the same answers each time; null varies")


class Output(Section):
    """Where results go."""

    dir: str = Field(
        "runs/default",
        min_length=1,
        description="the run's folder; an existing one is never overwritten",
    )
    report_to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(
        [], description="also report to: tensorboard, wandb, mlflow, trackio"
    )


class Config(Section):
    """config.yml as a whole."""

    model: Model = Model()  # type: ignore[call-arg]
    lora: Lora = Lora()  # type: ignore[call-arg]
    dataset: Dataset = Dataset()  # type: ignore[call-arg]
    training: Training = Training()  # type: ignore[call-arg]
    evaluation: Evaluation = Evaluation()  # type: ignore[call-arg]
    generation: Generation = Generation()  # type: ignore[call-arg]
    output: Output = Output()  # type: ignore[call-arg]


def load(
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
    return check(values, origin)


def check(values: dict[str, Any], origin: dict[KeyPath, str]) -> Config:
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


def value(config: Config, key: str) -> object:
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
