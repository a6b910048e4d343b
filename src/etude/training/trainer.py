"""transformers.Trainer with our passes and our loss plugged in."""

import json
import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from heapq import nlargest
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, TrainerState

from etude import distributed, files
from etude.config.schema import Config
from etude.conversation.renderer import Example
from etude.engine import packing
from etude.errors import UserError
from etude.measure import metrics as measures
from etude.models import loading, lora
from etude.models.device import Device
from etude.runs.folder import CHECKPOINTS, METRICS, read_started, record_file
from etude.training import checkpoints

log = logging.getLogger(__name__)

# transformers' "constant" is the one schedule without a warm-up; ours has one.
SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
RECENT = 50  # steps whose losses a new one is held against; half as many must be there
SPIKE = 8.0  # robust deviations above their median: warn


def _of_kind(value: Any, usual: Any) -> bool:
    """Whether a value of a saved TrainerState is of the kind that it has in a fresh one."""
    if usual is None:
        return value is None or isinstance(value, str | int | float)
    return isinstance(value, int | float if isinstance(usual, int) else type(usual))


class Order:
    """Which examples each step of an epoch learns from: a pure function of (seed, epoch, step).

    With several processes each takes every world-th example of the step, so that the steps are the
    same ones however many processes share them.
    """

    def __init__(self, examples: int, rows: int, trainer: "StepTrainer") -> None:
        """Order `examples` examples into steps of `rows` for one process of the trainer's."""
        self._examples, self._rows, self._trainer = examples, rows, trainer

    def __len__(self) -> int:
        return math.ceil(self._examples / self._rows)

    def __iter__(self) -> Iterator[list[int]]:
        args = self._trainer.args
        # Asked for when an epoch begins, or, on resume, in the middle of one.
        epoch = self._trainer.state.global_step // len(self)
        for step in packing.steps(args.seed, epoch, self._examples, self._rows):
            yield step[args.process_index :: args.world_size]


class Stopped(Exception):
    """A signal ended the training after a whole step, and its checkpoint is written."""


class StepTrainer(Trainer):
    """Trains on whole steps: the loader yields a step's examples, and passes are cut from them here.

    The loss of a step is the mean over all its supervised tokens, L = sum(nll) / supervised. Each
    pass contributes its sum divided by the step's count, so how a step is cut (8x1, 4x2, 1x8,
    packed, or over several processes) does not change what is learnt.
    """

    def __init__(self, *, cutter: packing.Cutter, **kwargs: Any) -> None:
        """Take the `cutter` of the model; the rest goes to Trainer."""
        super().__init__(data_collator=lambda examples: {"examples": examples}, **kwargs)
        self._cutter = cutter
        self.step_loss = math.nan
        self.tokens_seen = 0
        self.stop = False  # set from outside: stop after this step, with a checkpoint
        self._saved_step = -1
        self._resumed: dict[str, Any] | None = None
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._zero_told = False
        # Seconds and steps of the sessions before this one, and when this one began.
        self._before: tuple[float, int] = (0.0, 0)
        self._began = time.perf_counter()
        self._first_step = 0

    @property
    def seconds(self) -> float:
        """Seconds of training up to now: of this session, and of those before it up to its checkpoint."""
        return self._before[0] + time.perf_counter() - self._began

    @property
    def timed_steps(self) -> int:
        """How many steps `seconds` is for: all, or those since a checkpoint that gives no time."""
        return self._before[1] + self.state.global_step - self._first_step

    def run(self, checkpoint: Path | None) -> None:
        """Train, from `checkpoint` on if there is one; the best adapter is in the model at the end.

        Raises:
            UserError: the checkpoint with the best adapter was damaged in the meantime.
        """
        progress = checkpoints.read_progress(checkpoint) if checkpoint else None
        if checkpoint and progress:
            with checkpoints.reading(checkpoint):
                state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
                wrong = [
                    key
                    for key, usual in vars(TrainerState()).items()
                    if not _of_kind(getattr(state, key), usual)
                ]
                if wrong or state.global_step != progress["step"]:
                    raise ValueError(f"{TRAINER_STATE_NAME}: {', '.join(wrong) or 'global_step'}")
            self._before = progress.get("seconds", 0.0), progress.get("timed_steps", 0)
            self._first_step = progress["step"]
        self._began = time.perf_counter()
        if checkpoint and progress and progress["ended"]:
            lora.restore(self.model, checkpoint)
            self.state = state
            self.step_loss = progress["step_loss"]
            if self.args.should_save:
                self._retain()  # the kill may have come before or amid it
        else:
            resuming = (
                checkpoints.reading(checkpoint, self._blamed) if checkpoint else nullcontext()
            )
            with resuming:
                self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        best = self.state.best_global_step
        # The first process writes the result, and another machine may not see the checkpoints.
        if distributed.FIRST and best and best != self.state.global_step:
            chosen = Path(str(self.args.output_dir)) / checkpoints.name(best)
            reason = checkpoints.why_not(chosen)
            if reason:
                raise UserError(f"{chosen}, which holds the best adapter: {reason}; train again")
            lora.restore(self.model, chosen)

    def _blamed(self, error: Exception) -> bool:
        """Whether the checkpoint is at fault: its values are used up to the end of the first step."""
        kinds = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
        return isinstance(error, kinds) and self.state.global_step <= self._first_step + 1

    def get_train_dataloader(self) -> Any:
        """A loader of whole steps in the order of `Order`."""
        examples: Any = self.train_dataset
        rows = self.args.train_batch_size * self.args.world_size
        order: Any = Order(len(examples), rows, self)
        return torch.utils.data.DataLoader(
            examples, batch_sampler=order, collate_fn=self.data_collator
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
        supervised = self._sum(sum(example.targets for example in examples))
        own, self._cutter = packing.fitting(
            self._cutter,
            len(examples),
            lambda cutter: self._passes(cutter(examples), len(examples), supervised),
            f"step {self.state.global_step + 1}: ",
        )
        loss = self._sum(own.sum()) / supervised
        self.step_loss = loss.item()
        self.tokens_seen += int(self._sum(sum(map(len, examples))))
        if not math.isfinite(self.step_loss):
            raise self._not_finite("loss", examples)
        self._check_gradients(examples)
        self._watch(own, examples)
        return loss

    def _passes(
        self, passes: Iterator[packing.Pass], count: int, supervised: torch.Tensor
    ) -> torch.Tensor:
        """Accumulate the gradients of the step; the summed nll of each of `count` examples, in nats."""
        model: Any = self.model
        model.zero_grad()  # of an attempt for which memory did not suffice
        own = torch.zeros(count, device=self.args.device)
        for batch in passes:
            with self.compute_loss_context_manager():
                losses = packing.token_losses(self.model, batch)
            self.accelerator.backward(losses.sum() / supervised)
            own.index_add_(0, batch.owner, losses.detach())
        if distributed.WORLD > 1:
            for parameter in self._trained():
                if parameter.grad is None:  # no example of this step fell to this process
                    parameter.grad = torch.zeros_like(parameter)
                torch.distributed.all_reduce(parameter.grad)
        return own

    def _trained(self) -> list[torch.nn.Parameter]:
        model: Any = self.model
        return [parameter for parameter in model.parameters() if parameter.requires_grad]

    def _sum(self, value: Any) -> torch.Tensor:
        return distributed.total(value, self.args.device)

    def _check_gradients(self, examples: list[Example]) -> None:
        """Hold the gradients of the step to what can be learnt from."""
        grads = [parameter.grad for parameter in self._trained() if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads))
        # With float16 the loss is scaled until it overflows: then the scaler skips the step itself.
        if not math.isfinite(norm) and self.accelerator.scaler is None:
            raise self._not_finite("gradient", examples)
        if norm == 0 and not self._zero_told:
            self._zero_told = True
            log.warning(
                "step %d: all gradients are zero, so nothing is learnt from it",
                self.state.global_step + 1,
            )

    def _not_finite(self, what: str, examples: list[Example]) -> UserError:
        """What to say when the step's loss or gradient is not a number, with the rows it came from."""
        guilty = packing.culprits(self.model, self._cutter, examples)
        # What is not finite is so for all processes; the rows may be another's.
        found, every = (
            [origin for own in distributed.gather(part) for origin in own]
            for part in (guilty, [example.origin for example in examples])
        )
        rows = ", ".join(found or every)
        advice = (
            "Look at them, lower training.learning_rate, or use float32 in place of float16; then go "
            "on from the last checkpoint, if one was made"
        )
        return UserError(
            f"step {self.state.global_step + 1}: the {what} is not a finite number, so the training was "
            f"stopped; the weights are those of step {self.state.global_step}. "
            + (f"Rows whose own loss is not finite: {rows}. " if found else f"Its rows: {rows}. ")
            + (loading.broken_weights(self.model) or advice)
        )

    def _watch(self, own: torch.Tensor, examples: list[Example]) -> None:
        """Warn of a loss that lies far above those before it: z = (loss - median) / (1.4826 MAD)."""
        if len(self._recent) >= RECENT // 2:
            median = statistics.median(self._recent)
            spread = 1.4826 * statistics.median(abs(loss - median) for loss in self._recent)
            if self.step_loss - median > SPIKE * max(spread, 0.01 * abs(median)):
                means = [
                    (float(total) / example.targets, example.origin)
                    for total, example in zip(own, examples, strict=True)
                ]
                means = [item for own in distributed.gather(means) for item in own]
                worst = ", ".join(f"{origin} ({mean:.2f})" for mean, origin in nlargest(3, means))
                log.warning(
                    "step %d: the loss jumped to %.4f, from about %.4f; highest in: %s",
                    self.state.global_step + 1,
                    self.step_loss,
                    median,
                    worst,
                )
        self._recent.append(self.step_loss)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss over all supervised tokens of the validation set, in nats, and its exponential.

        Raises:
            UserError: a loss that is not finite.
        """
        examples: Any = eval_dataset or self.eval_dataset
        model: Any = self.model
        was_training = model.training
        model.eval()
        share = examples[self.args.process_index :: self.args.world_size]

        def losses(cutter: packing.Cutter) -> tuple[float, int]:
            total, count = 0.0, 0
            # Without gradients it would be another graph to compile, for a few passes.
            eager = torch.compiler.set_stance("force_eager")
            with eager, torch.no_grad(), self.compute_loss_context_manager():
                for batch in cutter(share):
                    total += float(packing.token_losses(model, batch).sum())
                    count += len(batch.target)
            return total, count

        (total, count), self._cutter = packing.fitting(
            self._cutter, len(share), losses, f"validation at step {self.state.global_step}: "
        )
        # float64: the same sum on every process, and no rounding of what is compared later.
        sums = self._sum(torch.tensor([total, count], dtype=torch.float64))
        loss = float(sums[0] / sums[1])
        if not math.isfinite(loss):
            found = packing.culprits(model, self._cutter, share)
            found = [origin for own in distributed.gather(found) for origin in own]
            rows = f" (rows: {', '.join(found[:10])}{', ...' * (len(found) > 10)})" if found else ""
            advice = "Lower training.learning_rate, or use float32 in place of float16"
            raise UserError(
                f"step {self.state.global_step}: the validation loss is {loss}{rows}, so the training "
                f"was stopped. {loading.broken_weights(model) or advice}"
            )
        model.train(was_training)
        metrics = {f"{metric_key_prefix}_loss": loss}
        perplexity = measures.perplexity(loss, 1)
        if perplexity is not None:
            metrics[f"{metric_key_prefix}_perplexity"] = perplexity
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    # --- checkpoints: what transformers would write with pickle, see checkpoints.py ---------------

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        stopping = bool(self._sum(int(self.stop)))  # one process's signal stops all
        # The best adapter must be among the checkpoints, so each validation makes one.
        self.control.should_save |= self.control.should_evaluate or stopping
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if stopping:
            # None leaves before the first one has written: torchrun ends all when one has ended.
            self._sum(0)
            raise Stopped

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        if step == self._saved_step:  # the end of an epoch may fall on a step that was saved
            return
        values, tensors = checkpoints.random_state()
        if distributed.WORLD > 1:
            every = distributed.gather(tensors)
            tensors = {key: torch.stack([own[key] for own in every]) for key in tensors}
        if self.args.should_save:
            optimizer: Any = self.optimizer
            scheduler: Any = self.lr_scheduler
            groups, moments = checkpoints.split_optimizer(optimizer.state_dict())
            scaler = self.accelerator.scaler
            states: Any = self.state.stateful_callbacks
            for callback in (*self.callback_handler.callbacks, self.control):
                if isinstance(callback, ExportableState):
                    states[type(callback).__name__] = callback.state()
            progress = {
                "step": step,
                "ended": self.control.should_training_stop,
                "processes": self.args.world_size,
                "step_loss": self.step_loss,
                "tokens_seen": self.tokens_seen,
                "seconds": self.seconds,
                "timed_steps": self.timed_steps,
                "loss_since_log": float(self._tr_loss),
                "last_log": self._globalstep_last_logged,
                "groups": groups,
                "scheduler": scheduler.state_dict(),
                "scaler": scaler.state_dict() if scaler else None,
                "random": values,
            }
            home = Path(str(self.args.output_dir))
            if read_started(home.parent):
                record_file(home.parent, f"{CHECKPOINTS}/{checkpoints.name(step)}")
            with checkpoints.writing(home / checkpoints.name(step)) as work:
                lora.save(self.model, work)
                self.state.save_to_json(str(work / TRAINER_STATE_NAME))
                checkpoints.save_state(work, progress, tensors | moments)
            self._retain()
        self._saved_step = step

    def _retain(self) -> None:
        state, keep = self.state, self.args.save_total_limit or 1
        home = Path(str(self.args.output_dir))
        facts = read_started(home.parent)
        own = facts and [name.rpartition("/")[2] for name in facts["written"]]
        checkpoints.retain(home, state.global_step, keep, state.best_global_step, own)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        lora.restore(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        progress, tensors = checkpoints.load_state(Path(checkpoint))
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        with checkpoints.reading(Path(checkpoint)):
            optimizer.load_state_dict(checkpoints.join_optimizer(progress["groups"], tensors))
            scheduler.load_state_dict(progress["scheduler"])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(progress["scaler"])
        self.step_loss, self.tokens_seen = progress["step_loss"], progress["tokens_seen"]
        self._saved_step = progress["step"]
        self._resumed = progress

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Loaded with the optimizer."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            progress, tensors = checkpoints.load_state(Path(checkpoint))
            if progress["processes"] > 1:
                # With --force there may be more processes now. Cloned: torch reads a generator's state
                # from the beginning of its storage.
                own = self.args.process_index % progress["processes"]
                for key in ("random.cpu", "random.cuda"):
                    if key in tensors:
                        tensors[key] = tensors[key][own].clone()
            with checkpoints.reading(Path(checkpoint)):
                checkpoints.set_random_state(progress["random"], tensors)

    def restore_log(self) -> None:
        """Take up the sum of losses since the last log line, which Trainer begins anew."""
        if self._resumed is not None:
            self._tr_loss += self._resumed["loss_since_log"]
            self._globalstep_last_logged = self._resumed["last_log"]


class Recorder(TrainerCallback):
    """Writes metrics.jsonl and tells `show` of every step: (step, steps, loss, tokens a second, seconds left)."""

    def __init__(self, folder: Path, show: Any) -> None:
        self._file = folder / METRICS
        self._show = show
        self.trainer: StepTrainer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note where this session begins; a resumed training begins with a later step."""
        assert self.trainer is not None
        self.trainer.restore_log()
        self._started = self.trainer.seconds
        self._first_step = state.global_step
        self._first_tokens = self.trainer.tokens_seen

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the step that has ended."""
        assert self.trainer is not None
        seconds = self.trainer.seconds - self._started
        speed = (self.trainer.tokens_seen - self._first_tokens) / seconds
        left = (
            seconds / (state.global_step - self._first_step) * (state.max_steps - state.global_step)
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
        """Append one line to metrics.jsonl; the summary at the end stands in the manifest."""
        assert self.trainer is not None
        if not state.is_world_process_zero or not {"loss", "eval_loss"} & set(logs or {}):
            return
        line = {
            "step": state.global_step,
            "seconds": round(self.trainer.seconds, 2),
            # A norm is infinite where float16 overflowed and the scaler left the step out.
            **{key: value if math.isfinite(value) else None for key, value in (logs or {}).items()},
        }
        files.append(self._file, json.dumps(line, allow_nan=False) + "\n")


def steps(config: Config, examples: int) -> int:
    """How many optimizer steps the training has: ceil(examples / rows a step) an epoch, or max_steps."""
    training = config.training
    rows = training.batch_size * training.gradient_accumulation_steps
    return training.max_steps or math.ceil(math.ceil(examples / rows) * training.num_epochs)


def arguments(
    config: Config, device: Device, folder: Path, examples: int, validated: bool
) -> TrainingArguments:
    """The TrainingArguments of a run; a step's examples are one batch of the Trainer's.

    Raises:
        UserError: a reporting library that is not installed, or a step that the processes cannot share.
    """
    training = config.training
    rows = training.batch_size * training.gradient_accumulation_steps
    processes = distributed.WORLD
    if rows % processes:
        raise UserError(
            f"training: a step has {rows} rows (batch_size x gradient_accumulation_steps), which "
            f"{processes} processes cannot share evenly; make it a multiple of {processes}"
        )
    epoch = math.ceil(examples / rows)  # steps; whole steps alone can be resumed exactly
    missing = [name for name in config.output.report_to if find_spec(name) is None]
    if missing:
        raise UserError(
            f"output.report_to: {', '.join(missing)} is not installed; pip install {' '.join(missing)}"
        )
    with distributed.joining():  # here the processes meet, if there are several
        made = TrainingArguments(
            output_dir=str(folder / CHECKPOINTS),
            per_device_train_batch_size=rows // processes,
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
            ddp_timeout=distributed.WAIT,
            remove_unused_columns=False,
            dataloader_pin_memory=device.name == "cuda",
            disable_tqdm=True,
        )
        place = made.device.type
    # transformers would split a step over all GPUs it sees, and a pass cannot be split. Several GPUs
    # are one process each: torchrun. Reading the device first is what sets the count.
    if place == "cuda":
        made._n_gpu = 1
    return made
