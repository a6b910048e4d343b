"""The typed schema of config.yml: the one home of every default, and a strict loader for it."""

import unicodedata
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

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

    @property
    def rows_per_step(self) -> int:
        """Examples that an optimizer step learns from, over all processes."""
        return self.batch_size * self.gradient_accumulation_steps


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
