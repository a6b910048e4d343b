"""transformers.Trainer with our passes and our loss plugged in."""

import json
import math
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from etude import batching
from etude.config import Config
from etude.conversation import Example
from etude.device import Device
from etude.errors import UserError
from etude.runs import CHECKPOINTS, METRICS

# transformers' "constant" is the one schedule without a warm-up; ours has one.
SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


class StepTrainer(Trainer):
    """Trains on whole steps: the loader yields a step's examples, and passes are cut from them here.

    The loss of a step is the mean over all its supervised tokens, L = sum(nll) / supervised. Each
    pass contributes its sum divided by the step's count, so how a step is cut (8x1, 4x2, 1x8, or
    packed) does not change what is learnt.
    """

    def __init__(self, *, cutter: batching.Cutter, **kwargs: Any) -> None:
        """Take the `cutter` of the model; the rest goes to Trainer."""
        super().__init__(data_collator=lambda examples: {"examples": examples}, **kwargs)
        self._cutter = cutter
        self.step_loss = math.nan
        self.tokens_seen = 0

    def training_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Forward and backward of every pass of the step; returns the step's loss in nats a token.

        Raises:
            UserError: the loss is not finite; nothing of it has reached the weights.
        """
        model.train()
        examples: list[Example] = inputs["examples"]
        supervised = sum(sum(example.supervised) for example in examples)
        loss = torch.zeros((), device=self.args.device)
        for batch in self._cutter(examples):
            with self.compute_loss_context_manager():
                part = batching.token_losses(model, batch).sum() / supervised
            self.accelerator.backward(part)
            loss += part.detach()
        self.step_loss = loss.item()
        self.tokens_seen += sum(map(len, examples))
        if not math.isfinite(self.step_loss):
            raise UserError(
                f"step {self.state.global_step + 1}: the loss is {self.step_loss}, so training was "
                "stopped and nothing saved. Lower training.learning_rate, or use float32 in place "
                "of float16"
            )
        return loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss over all supervised tokens of the validation set, in nats, and its exponential."""
        examples: Any = eval_dataset or self.eval_dataset
        model: Any = self.model
        was_training = model.training
        model.eval()
        total, count = 0.0, 0
        # Without gradients it would be another graph to compile, for a few passes.
        eager = torch.compiler.set_stance("force_eager")
        with eager, torch.no_grad(), self.compute_loss_context_manager():
            for batch in self._cutter(examples):
                total += float(batching.token_losses(model, batch).sum())
                count += len(batch.target)
        model.train(was_training)
        loss = total / count
        metrics = {
            f"{metric_key_prefix}_loss": loss,
            f"{metric_key_prefix}_perplexity": math.exp(min(loss, 700)),
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


class Recorder(TrainerCallback):
    """Writes metrics.jsonl and tells `show` of every step: (step, steps, loss, tokens a second, seconds left)."""

    def __init__(self, folder: Path, show: Any) -> None:
        self._file = folder / METRICS
        self._show = show
        self.trainer: StepTrainer | None = None
        self._started = time.perf_counter()
        self.first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock, at the step that a resumed training begins with."""
        self._started = time.perf_counter()
        self.first_step = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the step that has ended."""
        assert self.trainer is not None
        seconds = time.perf_counter() - self._started
        speed = self.trainer.tokens_seen / seconds
        left = (
            seconds / (state.global_step - self.first_step) * (state.max_steps - state.global_step)
        )
        self._show(state.global_step, state.max_steps, self.trainer.step_loss, speed, left)

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append one line to metrics.jsonl."""
        line = {
            "step": state.global_step,
            "seconds": round(time.perf_counter() - self._started, 2),
            **(logs or {}),
        }
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


def steps(config: Config, examples: int) -> int:
    """How many optimizer steps the training has: ceil(examples / rows a step) an epoch, or max_steps."""
    training = config.training
    rows = training.batch_size * training.gradient_accumulation_steps
    return training.max_steps or math.ceil(math.ceil(examples / rows) * training.num_epochs)


def arguments(config: Config, device: Device, folder: Path, validated: bool) -> TrainingArguments:
    """The TrainingArguments of a run; a step's examples are one batch of the Trainer's.

    Raises:
        UserError: a reporting library that is not installed.
    """
    training = config.training
    strategy = "steps" if training.eval_steps else "epoch"
    saving = strategy if validated else ("steps" if training.save_steps else "epoch")
    missing = [name for name in config.output.report_to if find_spec(name) is None]
    if missing:
        raise UserError(
            f"output.report_to: {', '.join(missing)} is not installed; pip install {' '.join(missing)}"
        )
    made = TrainingArguments(
        output_dir=str(folder / CHECKPOINTS),
        per_device_train_batch_size=training.batch_size * training.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        num_train_epochs=training.num_epochs,
        max_steps=training.max_steps or -1,
        lr_scheduler_type=SCHEDULERS[training.lr_scheduler],
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim="adamw_torch_fused",
        # Gradients through a float16 base vanish unless the loss is scaled, which fp16 does.
        fp16=training.fp16 or device.dtype == "float16",
        bf16=training.bf16,
        use_cpu=device.name == "cpu",
        activation_checkpointing=training.gradient_checkpointing,
        seed=training.seed,
        logging_steps=training.logging_steps,
        logging_first_step=True,
        eval_strategy=strategy if validated else "no",
        eval_steps=training.eval_steps,
        save_strategy=saving,
        save_steps=training.save_steps or training.eval_steps or 500,
        save_total_limit=training.save_total_limit,
        load_best_model_at_end=validated,
        metric_for_best_model="eval_loss" if validated else None,
        greater_is_better=False if validated else None,
        report_to=list(config.output.report_to) or "none",
        run_name=folder.name,
        remove_unused_columns=False,
        dataloader_pin_memory=device.name == "cuda",
        disable_tqdm=True,
    )
    # transformers would split a step over all GPUs it sees, and a pass cannot be split. Several GPUs
    # are one process each: torchrun. Reading the device first is what sets the count.
    if made.device.type == "cuda":
        made._n_gpu = 1
    return made
