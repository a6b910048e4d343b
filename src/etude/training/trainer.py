"""transformers.Trainer with our passes and our loss plugged in."""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, TrainerState

from etude import distributed, files
from etude.config.schema import Config
from etude.conversation.encoding import Example
from etude.engine import packing
from etude.errors import UserError
from etude.measure import metrics as measures
from etude.models import lora
from etude.models.device import Device
from etude.runs.folder import CHECKPOINTS, METRICS
from etude.training import checkpoints, guards
from etude.training.order import StepSampler
from etude.training.reporter import OnStep, Step

# What is used of transformers beside its public interface, for want of a public way, as seen in
# 5.23.0: the member, and the reason. A test names the one that an upgrade moves.
PRIVATE = {
    "Trainer._save_checkpoint": "it writes with pickle, and in place; ours is written whole or not at all",
    "Trainer._load_from_checkpoint": "it takes what it finds; ours is checked, see `_restore`",
    "TrainingArguments._n_gpu": "it makes a batch one for all GPUs, and a pass cannot be split",
}
# transformers' "constant" is the one schedule without a warm-up; ours has one.
SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


@dataclass
class Tally:
    """What a training has counted, over all its sessions; its checkpoints hand it on.

    Attributes:
        step_loss: of the last step, in nats a supervised token.
        loss_since_log: the sum of the losses of the steps after `last_log`.
        last_log: the step of the last line of the log.
        began: when the training began, by the clock of the process and without what lay between sessions.
    """

    step_loss: float = math.nan
    tokens_seen: int = 0
    loss_since_log: float = 0.0
    last_log: int = 0
    began: float = field(default_factory=lambda: time.perf_counter())

    @property
    def seconds(self) -> float:
        """Seconds of training up to now."""
        return time.perf_counter() - self.began

    def add(self, loss: float, tokens: int) -> None:
        """Count a step."""
        self.step_loss = loss
        self.loss_since_log += loss
        self.tokens_seen += tokens

    def mean_loss(self, step: int) -> float:
        """The mean loss of the steps since the last line of the log, up to `step`, which has the next."""
        mean = self.loss_since_log / (step - self.last_log)
        self.loss_since_log, self.last_log = 0.0, step
        return mean

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {**vars(self), "began": -self.seconds}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        vars(self).update(state)
        self.began += time.perf_counter()


class StepTrainer(Trainer):
    """Trains on whole steps: the loader yields a step's examples, and passes are cut from them here.

    The loss of a step is the mean over all its supervised tokens, L = sum(nll) / supervised. Each
    pass contributes its sum divided by the step's count, so how a step is cut (8x1, 4x2, 1x8,
    packed, or over several processes) does not change what is learnt.
    """

    def __init__(
        self, *, cutter: packing.Cutter, tally: Tally, checkpoint: Path | None = None, **kwargs: Any
    ) -> None:
        """Take the model's `cutter`, the `tally` to count in, and what to go on from; the rest goes to Trainer."""
        super().__init__(data_collator=lambda examples: {"examples": examples}, **kwargs)
        self.tally = tally
        self._cutter, self._checkpoint = cutter, checkpoint
        self._watch = guards.StepWatch()

    def run(self) -> None:
        """Train, from the checkpoint on if there is one; the best adapter is in the model at the end.

        Raises:
            UserError: the checkpoint is of another version, or the one with the best adapter was damaged.
        """
        self.tally.began = time.perf_counter()
        checkpoint = self._checkpoint
        if checkpoint and checkpoints.read_progress(checkpoint)["ended"]:
            self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            self._restore(checkpoint)
            self._retain()  # the kill may have come before or amid it
        else:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        best = self.state.best_global_step
        # The first process writes the result, and another machine may not see the checkpoints.
        if distributed.FIRST and best and best != self.state.global_step:
            chosen = Path(str(self.args.output_dir)) / checkpoints.name(best)
            reason = checkpoints.why_not(chosen)
            if reason:
                raise UserError(f"{chosen}, which holds the best adapter: {reason}; train again")
            lora.restore(self.model, chosen)

    def get_train_dataloader(self) -> Any:
        """A loader of whole steps in the order of `StepSampler`."""
        examples: Any = self.train_dataset
        rows = self.args.train_batch_size * self.args.world_size
        sampler: Any = StepSampler(
            packing.by_row(examples), rows, self.args.seed, lambda: self.state.global_step
        )
        # A generator of its own: it draws a number each epoch, and dropout's are to go on unmoved.
        return torch.utils.data.DataLoader(
            examples,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            generator=torch.Generator(),
        )

    def training_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Forward and backward of every pass of the step; returns the step's loss in nats a token.

        Where memory runs out the passes are halved, for good, and the step begins again.

        Raises:
            UserError: a loss or gradient that is not finite, which has not reached the weights; or no
                memory for even one example.
        """
        model.train()
        examples: list[Example] = inputs["examples"]
        done = self.state.global_step
        device = self.args.device
        supervised = distributed.total(sum(example.targets for example in examples), device)
        sums, self._cutter = packing.fitting(
            self._cutter,
            len(examples),
            lambda cutter: self._passes(cutter(examples), len(examples), supervised),
            f"step {done + 1}: ",
        )
        loss = distributed.total(sums.sum(), device) / supervised
        value = loss.item()
        grads = [parameter.grad for parameter in self._trained() if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads))
        # With float16 the loss is scaled until it overflows: then the scaler skips the step itself.
        scaled = self.accelerator.scaler is not None
        if not math.isfinite(value) or not (math.isfinite(norm) or scaled):
            what = f"step {done + 1}: the {'gradient' if math.isfinite(value) else 'loss'}"
            raise guards.not_finite(what, done, model, self._cutter, examples)
        self._watch.gradients(done + 1, norm)
        self._watch.loss(done + 1, value, sums, examples)
        self.tally.add(value, int(distributed.total(sum(map(len, examples)), device)))
        return loss

    def _passes(
        self, passes: Iterator[packing.Pass], count: int, supervised: torch.Tensor
    ) -> torch.Tensor:
        """Accumulate the gradients of the step; the summed nll of each of `count` examples, in nats."""
        model: Any = self.model
        model.zero_grad()  # of an attempt for which memory did not suffice
        sums = torch.zeros(count, device=self.args.device)
        for batch in passes:
            with self.compute_loss_context_manager():
                losses = packing.token_losses(model, batch)
            self.accelerator.backward(losses.sum() / supervised)
            sums.index_add_(0, batch.owner, losses.detach())
        if distributed.WORLD > 1:
            for parameter in self._trained():
                if parameter.grad is None:  # no example of this step fell to this process
                    parameter.grad = torch.zeros_like(parameter)
                torch.distributed.all_reduce(parameter.grad)
        return sums

    def _trained(self) -> list[torch.nn.Parameter]:
        model: Any = self.model
        return [parameter for parameter in model.parameters() if parameter.requires_grad]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss over all supervised tokens of the validation set, in nats, and its exponential.

        Raises:
            UserError: a loss that is not finite.
        """
        examples: Any = eval_dataset or self.eval_dataset
        model: Any = self.model
        model.eval()
        share = examples[self.args.process_index :: self.args.world_size]
        done = self.state.global_step

        def losses(cutter: packing.Cutter) -> tuple[float, int]:
            with self.compute_loss_context_manager():
                return packing.total_loss(model, cutter(share))

        (total, count), self._cutter = packing.fitting(
            self._cutter, len(share), losses, f"validation at step {done}: "
        )
        # float64: the same sum on every process, and no rounding of what is compared later.
        sums = distributed.total(
            torch.tensor([total, count], dtype=torch.float64), self.args.device
        )
        loss = float(sums[0] / sums[1])
        if not math.isfinite(loss):
            what = f"step {done}: the validation loss"
            raise guards.not_finite(what, done, model, self._cutter, share)
        metrics = {f"{metric_key_prefix}_loss": loss}
        perplexity = measures.perplexity(loss, 1)
        if perplexity is not None:
            metrics[f"{metric_key_prefix}_perplexity"] = perplexity
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as Trainer does, with the mean loss since the last line by our own count.

        Trainer's begins anew with each session.
        """
        if "loss" in logs:
            logs["loss"] = self.tally.mean_loss(self.state.global_step)
        super().log(logs, start_time)

    # --- checkpoints: what transformers would write with pickle, see checkpoints.py ---------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step, random = self.state.global_step, checkpoints.random_state()
        if not self.args.should_save:
            return
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        scaler = self.accelerator.scaler
        groups, moments = checkpoints.split_optimizer(optimizer.state_dict())
        states: Any = self.state.stateful_callbacks
        for callback in (*self.callback_handler.callbacks, self.control):
            if isinstance(callback, ExportableState):
                states[type(callback).__name__] = callback.state()
        progress = {
            "step": step,
            "ended": self.control.should_training_stop,
            "processes": self.args.world_size,
            "tally": self.tally.state(),
            "groups": groups,
            "scheduler": scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
        }
        home = Path(str(self.args.output_dir))
        with checkpoints.writing(home / checkpoints.name(step)) as work:
            lora.save(self.model, work)
            self.state.save_to_json(str(work / TRAINER_STATE_NAME))
            checkpoints.save_state(work, progress, random | moments)
        self._retain()

    def _retain(self) -> None:
        """Delete the checkpoints that are not kept."""
        if self.args.should_save:
            state, keep = self.state, self.args.save_total_limit or 1
            home = Path(str(self.args.output_dir))
            checkpoints.retain(home, state.global_step, keep, state.best_global_step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Left to `_restore`."""

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the scheduler, the last thing to be made before the first step, and restore all if resumed."""
        made = super().create_scheduler(num_training_steps, optimizer)
        if self._checkpoint:
            self._restore(self._checkpoint)
        return made

    def _restore(self, checkpoint: Path) -> None:
        """Put the training where it was when `checkpoint` was made, bit for bit."""
        lora.restore(self.model, checkpoint)
        with checkpoints.reading(checkpoint):
            progress, tensors = checkpoints.load_state(checkpoint)
            self.tally.restore(progress["tally"])
            optimizer: Any = self.optimizer
            scheduler: Any = self.lr_scheduler
            if scheduler is None:  # it had ended: nothing more is learnt
                return
            optimizer.load_state_dict(checkpoints.join_optimizer(progress["groups"], tensors))
            scheduler.load_state_dict(progress["scheduler"])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(progress["scaler"])
            checkpoints.set_random_state(tensors)


class Recorder(TrainerCallback):
    """Writes metrics.jsonl, and calls `on_step` with every step that has ended."""

    def __init__(self, folder: Path, tally: Tally, on_step: OnStep | None = None) -> None:
        """Record the training in `folder`, which counts in `tally`."""
        self._file = folder / METRICS
        self._tally = tally
        self._on_step = on_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the step that has ended."""
        if self._on_step:
            tally, done, steps = self._tally, state.global_step, state.max_steps
            seconds = tally.seconds
            left = seconds / done * (steps - done)
            self._on_step(Step(done, steps, tally.step_loss, tally.tokens_seen / seconds, left))

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append one line to metrics.jsonl; the summary at the end is in the manifest."""
        if not state.is_world_process_zero or not {"loss", "eval_loss"} & set(logs or {}):
            return
        line = {
            "step": state.global_step,
            "seconds": round(self._tally.seconds, 2),
            # A norm is infinite where float16 overflowed and the scaler left the step out.
            **{key: value if math.isfinite(value) else None for key, value in (logs or {}).items()},
        }
        files.append(self._file, json.dumps(line, allow_nan=False) + "\n")


def fit(
    model: Any,
    settings: Config,
    device: Device,
    examples: dict[str, list[Example]],
    folder: Path,
    cutter: packing.Cutter,
    checkpoint: Path | None = None,
    on_step: OnStep | None = None,
) -> dict[str, Any]:
    """Train `model` in place and return the results; the best adapter by validation loss is in it at the end.

    Raises:
        UserError: a loss that is not finite, or whatever else ends a training.
        Stopped: a signal came.
    """
    validation = examples.get("validation")
    tally, saves = Tally(), guards.SavePoints(folder)
    callbacks: list[Any] = [Recorder(folder, tally, on_step)]
    if settings.training.early_stopping_patience and validation:
        callbacks.append(EarlyStoppingCallback(settings.training.early_stopping_patience))
    args = arguments(
        settings, device, folder, len(packing.by_row(examples["train"])), bool(validation)
    )
    loop = StepTrainer(
        cutter=cutter,
        tally=tally,
        checkpoint=checkpoint,
        model=model,
        args=args,
        train_dataset=examples["train"],
        eval_dataset=validation,
        callbacks=[*callbacks, saves],
    )
    loop.remove_callback(PrinterCallback)
    lost = guards.naming_lost_process(folder, lambda: loop.state.global_step)
    with distributed.on_signals(saves.handle), lost:
        distributed.agree(
            {
                "lora and training": (settings.lora, settings.training),
                "the base": str(model.peft_config["default"].revision),
                "the examples": examples,
                "the checkpoint": checkpoint.name if checkpoint else "none",
            }
        )
        loop.run()
        seconds = tally.seconds
    rows = settings.training.rows_per_step
    return {
        "steps": loop.state.global_step,
        # Of all sessions, where the training was interrupted.
        "seconds": round(seconds, 1),
        "examples_per_second": round(loop.state.global_step * rows / seconds, 2),
        "train_loss": tally.step_loss,
        "eval_loss": loop.state.best_metric,
    }


def arguments(
    config: Config, device: Device, folder: Path, rows: int, validated: bool
) -> TrainingArguments:
    """The TrainingArguments of a run; a step's examples are one batch of the Trainer's.

    Raises:
        UserError: a reporting library that is not installed.
    """
    training = config.training
    epoch = math.ceil(
        rows / training.rows_per_step
    )  # steps; whole steps alone can be resumed exactly
    missing = [name for name in config.output.report_to if find_spec(name) is None]
    if missing:
        raise UserError(
            f"output.report_to: {', '.join(missing)} is not installed; pip install {' '.join(missing)}"
        )
    made = TrainingArguments(
        output_dir=str(folder / CHECKPOINTS),
        per_device_train_batch_size=training.rows_per_step // distributed.WORLD,
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
        eval_strategy="steps" if validated else "no",
        eval_steps=training.eval_steps or epoch,
        save_strategy="steps",
        save_steps=training.save_steps or training.eval_steps or epoch,
        save_total_limit=training.save_total_limit,
        restore_callback_states_from_checkpoint=True,
        metric_for_best_model="eval_loss" if validated else None,
        greater_is_better=False if validated else None,
        report_to=list(config.output.report_to) or "none",
        run_name=folder.name,
        remove_unused_columns=False,
        dataloader_pin_memory=device.name == "cuda",
        disable_tqdm=True,
    )
    # Several GPUs are one process each: torchrun. Reading the device first is what sets the count.
    if made.device.type == "cuda":
        made._n_gpu = 1
    return made
