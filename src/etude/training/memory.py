"""What a training will take in memory and time, told before the weights are loaded.

The model is walked through its largest pass without numbers (`counting.walk`), which gives the bytes
of all its tensors and the operations of its matrix products; from those, with the machine's measured
speed, the time follows.

What allocators and compilers add to that is not derivable. HELD, COMPILED, LATER and COMPILER were
fitted to the peaks (VmHWM) of the 16 settings of benchmarks/memory.py that are marked so there: the
sample model, torch 2.13, glibc 2.36, one thread, passes of up to 512 tokens, two steps. Other models
and machines were not used for it, and on a GPU nothing was measured: UNMEASURED is a guess. So `check`
refuses a training on that ground alone (see `off_the_ground`), and elsewhere warns.
"""

import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

from etude.config.schema import Config
from etude.conversation.renderer import Example
from etude.data import dataset
from etude.engine import packing
from etude.engine.setup import configure_engine
from etude.errors import UserError, first_line
from etude.models import device, lora
from etude.models.device import Device
from etude.models.loading import Outline
from etude.training import counting

log = logging.getLogger(__name__)

GB = 1e9
# Memory taken for each byte of a pass's tensors: passes differ in length, and glibc keeps the holes
# that the tensors of one leave and those of the next do not fill.
HELD = 1.55
COMPILED = (
    0.5  # that much of it where the layers are compiled: fewer tensors, made and freed together
)
UNMEASURED = 1.1  # in place of both on a GPU
LATER = 60e6  # bytes of what is imported and kept after the plan is made
COMPILER = 250e6  # bytes that torch.compile keeps in the process
LARGEST = 10 * 134_515_008  # parameters, ten times the sample's: up to there the plan may refuse
NF4 = 0.516  # bytes a weight: 4 bits, and the scales of its blocks, quantised themselves
# Share of the time in which the products of a step run at the speed that they have alone, measured
# by benchmarks/train.py.
EFFICIENCY = {"plain": 0.6, "compiled": 0.75, "int8": 0.5}
COMPILING = 40.0  # seconds on two cores


@dataclass(frozen=True)
class Plan:
    """What a training takes: bytes, and seconds.

    Attributes:
        libraries: the interpreter and all libraries, as this process holds them.
        base: the frozen weights.
        loading: what reading and converting or quantising them takes for a moment, beside them.
        adapter: the trained weights.
        optimizer: AdamW's two moments of them.
        training: what the largest pass holds, forward and backward, their gradients included.
        validation: what the largest pass of the validation holds, without gradients.
        proof: what the new process takes that opens the run at the end: on the base in float, after
            nf4 on the 4-bit one.
        generation: what `etude evaluate` holds beside libraries, base and adapter to write answers:
            the keys and values of all tokens of its rows.
        parameters: of the base.
        tokens: tokens of the largest pass.
        seconds: of the whole training, about.
    """

    libraries: int
    base: int
    loading: int
    adapter: int
    optimizer: int
    training: int
    validation: int
    proof: int
    generation: int
    parameters: int
    tokens: int
    seconds: float

    @property
    def peak(self) -> int:
        """The most that the training process holds at any time."""
        steps = self.adapter + self.optimizer + max(self.training, self.validation)
        return self.libraries + self.base + max(self.loading, steps)

    @property
    def needed(self) -> int:
        """The most that the training takes from the machine, its proof in a new process included."""
        return max(self.peak, self.libraries + self.proof)

    def __str__(self) -> str:
        duration = f"{self.seconds / 60:.0f} min" if self.seconds > 90 else f"{self.seconds:.0f} s"
        return f"{_gb(self.peak)} at most, about {duration}"

    def rows(self) -> list[tuple[str, int, str]]:
        """The plan as a person reads it: what, bytes, a remark."""
        return [
            ("libraries", self.libraries, "Python, PyTorch and the rest"),
            ("base", self.base, f"{_gb(self.loading)} more for a moment while it is loaded"),
            ("adapter", self.adapter, "float32"),
            ("optimizer", self.optimizer, "AdamW's two moments"),
            ("training", self.training, f"the largest pass, {self.tokens} tokens, and gradients"),
            ("validation", self.validation, "the largest pass without gradients"),
            ("peak", self.peak, "of the training process"),
            ("proof", self.proof, "a new process, at the end, when this one's memory is free"),
            ("generation", self.generation, "in etude evaluate: cached keys and values"),
        ]


def _gb(size: float) -> str:
    return f"{size / GB:.2f} GB"


# --- the estimate --------------------------------------------------------------------------------


def _stateful(model: Any) -> bool:
    return bool(getattr(model.get_base_model(), "_is_stateful", False))


def estimate(
    settings: Config,
    outline: Outline,
    place: Device,
    examples: dict[str, list[Example]],
    steps: int,
) -> Plan | None:
    """What a training of `steps` steps on `examples` takes; None for a model that cannot be walked.

    Raises:
        UserError: target modules that the model does not have.
    """
    try:
        return _estimate(settings, outline, place, examples, steps)
    except UserError:
        raise
    except Exception as error:  # an architecture that computes with the numbers themselves
        log.debug("plan", exc_info=error)
        log.warning(
            "no plan of memory and time for this model: %s: %.200s",
            type(error).__name__,
            first_line(error),
        )
        return None


class _Work(NamedTuple):
    """What a training computes: its largest pass, that of its validation, and all its tokens."""

    batch: packing.Pass
    tokens: int
    several: bool  # whether a step has more than one pass
    checked: packing.Pass
    checked_tokens: int  # of all rounds of validation


def _work(
    settings: Config, cutter: packing.Cutter, examples: dict[str, list[Example]], steps: int
) -> _Work:
    looked_at = list(packing.first_steps(settings, examples["train"]))
    batch, tokens = packing.largest(batch for step in looked_at for batch in cutter(step))
    several = any(sum(1 for _ in cutter(step)) > 1 for step in looked_at[:8])
    held_out = examples.get("validation", [])
    checked, checked_tokens = batch, 0
    if held_out:
        longest = packing.longest(held_out)
        checked, checked_tokens = packing.largest(cutter(longest))
        checked_tokens = checked_tokens * sum(map(len, held_out)) // sum(map(len, longest))
    epoch = math.ceil(len(examples["train"]) / settings.training.rows_per_step)
    checked_tokens *= math.ceil(steps / (settings.training.eval_steps or epoch))
    return _Work(batch, tokens * steps // len(looked_at), several, checked, checked_tokens)


def _int8_size(model: Any) -> int:
    """Bytes of a base in int8: what is frozen, and the buffers of its int8 layers."""
    from etude.engine import int8

    buffers = (
        buffer
        for module in model.modules()
        if isinstance(module, int8.Int8Linear)
        for buffer in module.buffers(recurse=False)
    )
    frozen = (parameter for parameter in model.parameters() if not parameter.requires_grad)
    return counting.size(frozen) + counting.size(buffers)


def _walk(
    model: Any, settings: Config, work: _Work, train: Sequence[Example]
) -> tuple[counting.Walk, counting.Walk, int]:
    """What the largest passes hold, with gradients and without, and what generation caches; on fake tensors."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    stateful, mixed = _stateful(model), device.mixed_precision(settings.training, "cpu")
    with FakeTensorMode() as mode:
        # Steps of several passes: the gradients of those before are there when the next begins.
        counting.numberless(model, gradients=work.several)
        learnt = counting.fake_pass(mode, work.batch, stateful)
        seen = counting.fake_pass(mode, work.checked, stateful)
        model.train()
        if settings.training.gradient_checkpointing:
            model.activation_checkpointing_enable()

        def forward_and_backward() -> None:
            with mixed:
                losses = packing.token_losses(model, learnt)
            losses.sum().backward()

        step = counting.walk(model, forward_and_backward)
        model.eval()
        with torch.no_grad(), mixed:
            judged = counting.walk(model, lambda: packing.token_losses(model, seen))
            return step, judged, _generation(model, settings, train, stateful)


def _estimate(
    settings: Config,
    outline: Outline,
    place: Device,
    examples: dict[str, list[Example]],
    steps: int,
) -> Plan:
    from etude.engine import int8

    quantization = settings.model.quantization
    model = lora.attach(outline.model(place.torch_dtype), settings.lora, outline.name)
    # Of the float model, before it is quantised: what is loaded first.
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    adapter = counting.size(p for p in model.parameters() if p.requires_grad)
    count = sum({id(parameter): parameter.numel() for parameter in frozen}.values())
    base = opened = counting.size(frozen)  # opened: by the proof, as by evaluate and chat
    linears = [linear.weight for linear in int8.frozen_linears(model).values()]
    engine = configure_engine(model, settings, place, examples["train"], steps)
    work = _work(settings, engine.cutter, examples, steps)
    if engine.int8:
        base = _int8_size(model)
    elif quantization == "nf4":
        base += int(sum(NF4 * w.numel() - w.numel() * w.element_size() for w in linears))
        opened = base
    step, judged, cache = _walk(model, settings, work, examples["train"])
    # nf4 makes one layer's weights again for each product.
    widest = max((w.numel() * w.element_size() for w in linears), default=0)
    extra = widest if quantization == "nf4" else 0
    host = place.name != "cuda"
    held = HELD if host else UNMEASURED
    factor = held * (COMPILED if engine.compiled and host else 1)
    stored = count * outline.stored.itemsize
    # The file's pages, unless they become the weights themselves.
    converts = quantization == "nf4" or outline.stored != place.torch_dtype
    reading = stored if host and converts else 0
    if engine.int8:  # both are held while layer by layer is quantised
        loading = stored + int(held * judged.peak)
    else:
        loading = reading
    bare = int(device.used_memory("cpu") + LATER) if host else 0
    libraries = bare + (int(COMPILER) if host and engine.compiled else 0)
    validation = int(held * judged.peak) + extra
    return Plan(
        libraries=libraries,
        base=base,
        loading=max(0, loading),
        adapter=adapter,
        optimizer=2 * adapter,
        training=int(factor * step.peak) + (adapter if work.several else 0) + extra,
        validation=validation,
        proof=bare + opened + max(reading, adapter + validation),
        generation=cache,
        parameters=count,
        tokens=work.batch.input_ids.numel(),
        seconds=_seconds(
            step.operations / work.batch.input_ids.numel() * work.tokens
            + judged.operations / work.checked.input_ids.numel() * work.checked_tokens,
            max(linears, key=lambda w: w.numel(), default=None),
            place,
            "int8" if engine.int8 else "compiled" if engine.compiled else "plain",
        )
        + (COMPILING if engine.compiled else 0),
    )


def _generation(model: Any, settings: Config, examples: Sequence[Example], stateful: bool) -> int:
    """Bytes of the keys and values of `evaluation.batch_size` answers to the longest prompt."""
    import torch

    rows, prompt = settings.evaluation.batch_size, max(map(len, examples))
    total = prompt + settings.generation.max_new_tokens
    kind = torch.int64 if stateful else torch.bool
    shape = (rows, prompt) if stateful else (rows, 1, prompt, prompt)
    found = counting.walk(
        model,
        lambda: model(
            input_ids=torch.empty(rows, prompt, dtype=torch.int64),
            attention_mask=torch.empty(shape, dtype=kind),
            logits_to_keep=1,
            use_cache=True,
        ),
    )
    return int(max(found.peak, found.left * total / prompt))


def _seconds(operations: float, shape: Any, place: Device, engine: str) -> float:
    """Seconds for `operations` at the speed of a product with the largest layer, measured shortly."""
    import torch

    if shape is None:
        return 0.0
    size = (packing.CPU_BUDGET, shape.shape[1])
    if engine == "int8":
        x = torch.ones(size, dtype=torch.int8)
        w = torch.ones(tuple(shape.shape), dtype=torch.int8)
        product: Any = lambda: torch._int_mm(x, w.t())  # noqa: E731
    else:
        own, other = (
            torch.ones(s, dtype=place.torch_dtype, device=place.name)
            for s in (size, tuple(shape.shape))
        )
        product = lambda: own @ other.T  # noqa: E731
    taken = []
    for _ in range(4):
        started = time.perf_counter()
        product()
        if place.name == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    speed: float = 2 * size[0] * shape.numel() / min(taken)
    return operations / speed / EFFICIENCY[engine]


# --- does it fit ---------------------------------------------------------------------------------


def off_the_ground(plan: Plan, settings: Config, place: Device) -> str:
    """On what the plan was never compared with a real training; empty where it was."""
    if place.name != "cpu":
        return "on a GPU"
    if settings.model.quantization == "nf4":
        return "with a 4-bit base"
    return f"on models of more than {LARGEST / 1e9:.1f}e9 parameters" * (plan.parameters > LARGEST)


def check(
    plan: Plan,
    settings: Config,
    outline: Outline,
    place: Device,
    examples: dict[str, list[Example]],
    steps: int,
    force: bool = False,
) -> bool:
    """Compare the plan with the memory that is free; returns whether it fits.

    With `force`, and where the plan was not measured, what does not fit is a warning.

    Raises:
        UserError: too little; with the keys to change, and what each would save.
    """
    free = device.available(place.name)
    # What this process holds already is no longer free; several on one machine share what is.
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if place.name == "cpu" else 1
    here = device.used_memory("cpu") if place.name != "cuda" else 0
    room = here + free // processes
    if plan.needed <= room:
        return True
    found = []
    for keys, changed, shorter in _alternatives(settings, examples):
        other = estimate(changed, outline, place, shorter, steps)
        if other and plan.needed - other.needed > 0.01 * plan.needed:
            found.append((plan.needed - other.needed, keys, other.needed <= room))
    lines = [
        f"{keys}: saves {_gb(saved)}{', and it fits' if fits else ''}"
        for saved, keys, fits in sorted(found, reverse=True)
    ]
    problem = (
        f"This training does not fit in memory: by the plan it would take {_gb(plan.needed)}, and "
        f"{_gb(room)} are there for it. Change one or more of these:\n  "
        + "\n  ".join([*lines, "model.name: a smaller model"])
        + "\nThen `etude validate` shows the plan again."
    )
    unsure = off_the_ground(plan, settings, place)
    if not force and not unsure:
        raise UserError(f"{problem} To train all the same: --force")
    why = "--force" if force else f"only a warning, because {unsure} the plan was never measured"
    log.warning("%s: %s", why, problem)
    return False


def _alternatives(
    settings: Config, examples: dict[str, list[Example]]
) -> Iterator[tuple[str, Config, dict[str, list[Example]]]]:
    """Changes that save memory: the keys as one would write them, the settings, the examples."""
    model, training, length = settings.model, settings.training, settings.dataset.max_length
    rows = training.batch_size

    def changed(section: str, **values: Any) -> Config:
        part = getattr(settings, section).model_copy(update=values)
        return settings.model_copy(update={section: part})

    if model.quantization is None and not settings.lora.use_dora:
        yield "model.quantization=int8", changed("model", quantization="int8"), examples
    if model.quantization != "nf4" and find_spec("bitsandbytes"):
        yield "model.quantization=nf4", changed("model", quantization="nf4"), examples
    if not training.gradient_checkpointing:
        yield (
            "training.gradient_checkpointing=true",
            changed("training", gradient_checkpointing=True),
            examples,
        )
    if rows > 1:
        accumulated = training.rows_per_step  # a step stays what it is
        yield (
            f"training.batch_size=1 training.gradient_accumulation_steps={accumulated}",
            changed("training", batch_size=1, gradient_accumulation_steps=accumulated),
            examples,
        )
    if length >= 64:
        half = length // 2
        cut = {
            split: [dataset.truncate(e, half) if len(e) > half else e for e in part]
            for split, part in examples.items()
        }
        cut = {split: [e for e in part if e.targets] for split, part in cut.items()}
        if cut["train"]:
            yield f"dataset.max_length={half}", changed("dataset", max_length=half), cut
    if settings.lora.r > 8:
        yield "lora.r=8", changed("lora", r=8), examples
    if training.compile is not False:
        yield "training.compile=false", changed("training", compile=False), examples
