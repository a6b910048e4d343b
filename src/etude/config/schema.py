"""The typed schema of config.yml: the one home of every default, and of what excludes each other."""

import os
import re
import unicodedata
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Name = Annotated[str, Field(min_length=1)]


def normal_label(label: str) -> str:
    """A label as labels are compared: composed (NFC), single spaces, none around it."""
    return " ".join(unicodedata.normalize("NFC", label).split())


Label = Annotated[str, AfterValidator(normal_label)]


def _with_home(name: str | None) -> str | None:
    return name and os.path.expanduser(name)


class Section(BaseModel):
    """A section of config.yml: unknown keys and loose types are errors."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,  # what follows a key describes it, in config.yml too
        defer_build=True,  # `etude --help` reads no configuration
    )

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        # No file and no library takes NUL or half a character (a byte that is not UTF-8).
        if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
            raise ValueError("holds a NUL or half a character; write plain text")
        return value


class Model(Section):
    """The base: which pretrained model, and how it is held in memory."""

    name: Name = "Qwen/Qwen2-1.5B"
    """a Hub id, a folder, a .gguf file, or smollm2-135m (the bundled sample)"""
    revision: str | None = None
    """Hub commit, tag or branch; null takes the newest and records its commit"""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """auto | float32 | float16 | bfloat16; auto takes what the device does fast"""
    quantization: Literal["int8", "nf4"] | None = None
    """int8 | nf4 | null: train on an int8 base (faster, a quarter of the memory), or a 4-bit one (QLoRA, for a GPU)"""
    chat_template: str | None = None
    """a .jinja file in place of the tokenizer's own chat template"""
    _home = field_validator("name", "chat_template")(_with_home)


class Lora(Section):
    """The adapter: small trained matrices beside the frozen ones (LoRA, arXiv:2106.09685)."""

    r: Positive = 64
    """rank; 8-16 for simple tasks, 64 usual, 128-256 for complex ones"""
    alpha: Annotated[float, Field(gt=0)] = 128
    """strength: the update is scaled by alpha/r (alpha/sqrt(r) with use_rslora)"""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """share of the adapter's inputs dropped in training; 0.05-0.1 for little data"""
    target_modules: Annotated[list[str], Field(min_length=1)] = ["q_proj", "v_proj"]
    """which linear layers get an adapter; [all-linear] for all"""
    use_rslora: bool = False
    """scale by alpha/sqrt(r): steadier at high rank"""
    use_dora: bool = False
    """DoRA: learn magnitude apart from direction; slower"""


class Dataset(Section):
    """The data: files or Hub data sets, and how rows become examples."""

    train: Name = "data/tweets_sentiment.train.jsonl"
    """a .jsonl, .json, .csv or .parquet file, or a Hub data set (owner/name or owner/name:split)"""
    validation: str | None = None
    """the same for validation; null cuts validation_split from train"""
    test: str | None = None
    """the same, held out: only `etude evaluate` measures on it"""
    validation_split: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """share of train used for validation, by seed, when validation is null"""
    format: Literal[
        "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "classification", "text"
    ] = "auto"
    """auto | messages | sharegpt | alpaca | prompt_completion | classification | text"""
    columns: dict[str, str] = {}
    """the data's own column names, e.g. {text: review, label: stars}"""
    ignore: list[str] = []
    """columns, and keys of turns, to leave out although they matter, e.g. [score]"""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """stop | skip: what happens at rows that cannot be used; skipped ones are counted"""
    labels: Annotated[list[Label], Field(min_length=2)] | None = None
    """classification: the labels; null collects them from train"""
    instruction: str = "Classify the text as one of: {labels}.\n\nText: {text}"
    """classification: the prompt made of {labels} and {text}; {text} last is fastest"""
    system_prompt: str | None = None
    """put before conversations that have none; null leaves it to the template"""
    special_tokens: Literal["text", "parse"] | None = None
    """text | parse | null: raw text that spells control tokens stays text or becomes them; null asks where many do"""
    max_length: Annotated[int, Field(ge=8)] = 512
    """tokens an example may have"""
    overlength: Literal["truncate", "drop", "split"] | None = None
    """truncate | drop | split: what happens to longer ones; null splits raw text and truncates the rest"""
    train_on: Literal["all", "last"] = "all"
    """all | last: which answers of a conversation are learnt"""
    max_rows: Positive | None = None
    """draw that many rows of train by seed, before the validation is cut; null: all"""
    _home = field_validator("train", "validation", "test")(_with_home)

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: list[str] | None) -> list[str] | None:
        if labels and len(set(labels)) < len(labels):
            raise ValueError("has a duplicate label (white space and accents are normalised)")
        if labels and "" in labels:
            raise ValueError("has an empty label; name every class")
        return labels

    @field_validator("instruction")
    @classmethod
    def _whole(cls, instruction: str) -> str:
        missing = [part for part in ("{labels}", "{text}") if part not in instruction]
        if missing:
            raise ValueError(f"lacks {' and '.join(missing)}")
        return instruction


class Training(Section):
    """How the adapter is trained."""

    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """peak; 1e-4 to 5e-4 is usual for LoRA"""
    batch_size: Positive = 1
    """full-length examples that fit in memory at once: 1 on a CPU, 4-8 on a GPU"""
    gradient_accumulation_steps: Positive = 8
    """a step learns from batch_size x this many examples"""
    num_epochs: Annotated[float, Field(gt=0)] = 3
    """passes over the data"""
    max_steps: Positive | None = None
    """stop after that many steps; null runs all epochs"""
    lr_scheduler: Literal["linear", "cosine", "constant"] = "linear"
    """linear | cosine | constant: the learning rate after warm-up"""
    warmup_steps: Annotated[float, Field(ge=0)] = 0.03
    """learning rate rises over these steps; below 1: that share of all steps"""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's pull of the adapter towards zero"""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """longer gradients are scaled down to it"""
    fp16: bool = False
    """float16 mixed precision; GPU only, for GPUs before Ampere"""
    bf16: bool = False
    """bfloat16 mixed precision; Ampere and later, or a CPU with bf16"""
    use_cpu: bool = False
    """true stays on the CPU even where there is a GPU"""
    compile: Literal["auto", True, False] = "auto"
    """auto | true | false: torch.compile; auto where a training is long enough"""
    gradient_checkpointing: bool = False
    """recompute activations: less memory, slower"""
    seed: Seed = 42
    """of the order of examples, the adapter's start, dropout"""
    logging_steps: Positive = 10
    """steps between two lines of metrics.jsonl"""
    eval_steps: Positive | None = None
    """steps between validations; null: every epoch"""
    save_steps: Positive | None = None
    """steps between checkpoints; null: one at each validation, or every epoch"""
    save_total_limit: Positive = 2
    """checkpoints kept; the best is always among them"""
    early_stopping_patience: Positive | None = None
    """stop after that many validations without a better loss; null never"""

    @property
    def rows_per_step(self) -> int:
        """Examples that an optimizer step learns from, over all processes."""
        return self.batch_size * self.gradient_accumulation_steps


class Evaluation(Section):
    """How a model is measured."""

    method: Literal["likelihood", "generate"] = "likelihood"
    """likelihood | generate: score each label exactly, or write and parse an answer"""
    batch_size: Positive = 16
    """rows generated together"""
    max_rows: Positive | None = None
    """measure that many rows of the set, drawn by seed; null: all"""
    good_threshold: Share = 0.7
    """quality score from which a response is good"""
    fair_threshold: Share = 0.4
    """quality score from which it is fair; below, poor"""
    bootstrap_samples: Annotated[int, Field(ge=100)] = 2000
    """resamples behind the intervals"""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """level of the confidence intervals"""


class Generation(Section):
    """How responses are sampled, in chat and in evaluation."""

    max_new_tokens: Positive = 256
    """longest response"""
    temperature: Annotated[float, Field(ge=0)] = 0.7
    """0 is greedy; higher is more varied (evaluation of a data set is always greedy)"""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    """sample among the tokens that hold this much"""
    top_k: Annotated[int, Field(ge=0)] = 50
    """sample among the k likeliest; 0 means all"""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """above 1 discourages repeated tokens"""
    seed: Seed | None = None
    """the same answers each time; null varies"""
    thinking: Literal["auto", True, False] = "auto"
    """auto | true | false: the switch of templates that know one (in training too); auto: their default"""


class Output(Section):
    """Where results go."""

    dir: Name = "runs/default"
    """the run's folder; an existing one is never overwritten"""
    _home = field_validator("dir")(_with_home)
    report_to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = []
    """also report to: tensorboard, wandb, mlflow, trackio"""


class Config(Section):
    """config.yml as a whole."""

    model: Model = Field(default_factory=Model)
    lora: Lora = Field(default_factory=Lora)
    dataset: Dataset = Field(default_factory=Dataset)
    training: Training = Field(default_factory=Training)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    generation: Generation = Field(default_factory=Generation)
    output: Output = Field(default_factory=Output)


SECTIONS: dict[str, type[Section]] = {
    name: cast(type[Section], field.annotation) for name, field in Config.model_fields.items()
}


def contradictions(config: Config) -> Iterator[tuple[str, str]]:
    """Yield (a key, what is wrong with it beside another one, and what to do)."""
    data, training, evaluation = config.dataset, config.training, config.evaluation
    if config.model.quantization and config.lora.use_dora:
        yield (
            "lora.use_dora",
            "DoRA needs the base's own weights; set model.quantization: null or use_dora: false",
        )
    if training.fp16 and training.bf16:
        yield "training.fp16", "fp16 and bf16 exclude each other; keep one"
    if training.max_steps and training.warmup_steps >= training.max_steps:
        yield (
            "training.warmup_steps",
            f"warm-up of {training.warmup_steps:g} steps is not shorter than the training "
            f"(max_steps {training.max_steps}); lower it, or give a share such as 0.03",
        )
    if training.early_stopping_patience and not (data.validation or data.validation_split):
        yield (
            "training.early_stopping_patience",
            "early stopping needs validation data; set dataset.validation or validation_split",
        )
    if data.labels and data.format not in ("auto", "classification"):
        yield (
            "dataset.labels",
            f"labels belong to format classification, and the format is {data.format}",
        )
    if evaluation.fair_threshold > evaluation.good_threshold:
        yield (
            "evaluation.fair_threshold",
            f"{evaluation.fair_threshold} is above good_threshold {evaluation.good_threshold}; "
            "good is the higher one",
        )
