"""What a training will take in memory and time, before the weights are loaded; and its first pass, to see.

The plan is arithmetic on the model's shape. For the sample it is within 4 % of the bytes of the tensors
that PyTorch makes for a pass in float32, and within 12 % in bfloat16 or with checkpointing.

What allocators and compilers add to that is not derivable. HELD, COMPILED, LATER and COMPILER were
fitted to peaks (VmHWM) that benchmarks/memory.py measured: the sample model, float32, torch 2.13,
glibc 2.36, one thread, passes of up to 512 tokens, two steps. Other models and machines were not used
for it, and on a GPU nothing was measured: UNMEASURED is a guess. So `check` refuses a training on that
ground alone, and elsewhere warns.
"""

import heapq
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from etude import distributed
from etude.config.schema import Config
from etude.conversation.encoding import Example
from etude.engine import packing
from etude.engine.setup import Engine, configure_engine
from etude.errors import UserError
from etude.models import device, lora
from etude.models.device import Device
from etude.models.loading import Outline

log = logging.getLogger(__name__)

GB = 1e9
# Numbers that a decoder layer keeps of a token for its backward, for each output of its linear layers:
# with Llama's, (6 hidden + 3 intermediate) / (3 hidden + 2 keys and values + 2 intermediate). In
# 16 bits the norms keep float32 copies besides.
KEPT = {4: 1.57, 2: 1.84}
# The logits and their gradient, and what is computed of them in between.
LOGITS = {4: 2.4, 2: 3.5}
# Memory taken for each byte of a pass's tensors: passes differ in length, and glibc keeps the holes
# that the tensors of one leave and those of the next do not fill.
HELD = 1.62
COMPILED = 0.5  # that much of it with compiled layers: fewer tensors, made and freed together
UNMEASURED = 1.1  # in place of both on a GPU
LATER = 100e6  # bytes of what is imported and kept after the plan is made
COMPILER = 220e6  # bytes that torch.compile keeps in the process
LARGEST = 10 * 134_515_008  # parameters, ten times the sample's: up to there the plan may refuse
NF4 = 0.516  # bytes a weight: 4 bits, and the scales of its blocks, quantised themselves
# How fast a step is, against its products alone in the base's number format: by benchmarks/train.py.
EFFICIENCY = {"plain": 0.6, "compiled": 0.75, "int8": 0.9}
COMPILING = 40.0  # seconds on two cores
LOOKED_AT = 64  # steps, those with the most tokens, that are cut to find the largest pass
# A position at which logits are needed weighs about as much as that part of a token's activations:
# twice the vocabulary against some 20 times the hidden size a layer.
WEIGHT = 0.2


@dataclass(frozen=True)
class Plan:
    """What a training takes: bytes, and seconds.

    Attributes:
        libraries: the interpreter and all libraries, as this process holds them.
        base: the frozen weights.
        loading: what reading and converting or quantising them takes for a moment, beside them.
        adapter: the trained weights.
        optimizer: AdamW's two moments of them.
        training: what the largest pass holds, forward and backward, and the gradients.
        proof: what the new process takes that opens the run at the end: on the base in float, after
            nf4 on the 4-bit one.
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
    proof: int
    parameters: int
    tokens: int
    seconds: float

    @property
    def peak(self) -> int:
        """The most that the training process holds at any time."""
        steps = self.adapter + self.optimizer + self.training
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
            ("peak", self.peak, "of the training process"),
            ("proof", self.proof, "a new process, at the end, when this one's memory is free"),
        ]


def _gb(size: float) -> str:
    return f"{size / GB:.2f} GB"


# --- the estimate --------------------------------------------------------------------------------


def largest_pass(
    settings: Config, cutter: packing.Cutter, examples: Sequence[Example]
) -> tuple[packing.Pass, float]:
    """The pass that holds most of those that this process has in the first epoch.

    Returns it, and the tokens computed for each token of the examples: fewer than one where packing
    shares beginnings, more with padding.
    """
    training = settings.training
    rows = packing.by_row(examples)
    every = packing.steps(training.seed, 0, len(rows), training.rows_per_step)
    steps = [
        [
            examples[at]
            for row in step[distributed.RANK :: distributed.WORLD] or step
            for at in rows[row]
        ]
        for step in every[: training.max_steps]
    ]
    looked_at = heapq.nlargest(
        LOOKED_AT, steps, key=lambda step: sum(len(e) + WEIGHT * e.targets for e in step)
    )
    largest, most, computed = None, 0.0, 0
    for batch in (batch for step in looked_at for batch in cutter(step)):
        computed += batch.input_ids.numel()
        weight = batch.input_ids.numel() + WEIGHT * len(batch.input_ids) * len(batch.keep)
        if weight > most:
            largest, most = batch, weight
    assert largest is not None
    return largest, computed / sum(len(example) for step in looked_at for example in step)


def pass_memory(model: Any, batch: packing.Pass, settings: Config, gradients: bool) -> int:
    """Bytes of the tensors that `model` (base and adapter) holds at once in a pass.

    Without `gradients` those of one layer and the logits; else those of all layers, or with
    checkpointing each layer's input and one layer's, and of the logits' gradient too.
    """
    from etude.engine import int8

    linears, config = int8.frozen_linears(model), model.config.get_text_config()
    vocabulary, hidden = model.get_input_embeddings().weight.shape
    size, layers = model.dtype.itemsize, config.num_hidden_layers
    # An adapted layer keeps its input for the gradient of A, in float32, and A's output. In float32
    # layers with one input keep it together.
    inputs = [
        (name.rsplit(".", 2)[0] if size == 4 else name, linear.in_features)
        for name, linear in linears.items()
        if name.endswith(".base_layer")
    ]
    widths = sum(width for _, width in set(inputs))
    adapted = 4 * (widths + settings.lora.r * len(inputs))
    outputs = sum(linear.out_features for linear in linears.values())
    token = KEPT[size] * size * outputs + adapted
    rows, columns = batch.input_ids.shape
    logits = rows * len(batch.keep) * vocabulary * size
    if not gradients:
        return int(rows * columns * token / layers + logits)
    if settings.training.gradient_checkpointing:
        token = token / layers + size * hidden * layers
    return int(rows * columns * (token + size * columns) + LOGITS[size] * logits)


def _base_size(settings: Config, frozen: int, linears: Sequence[Any]) -> int:
    """Bytes of a base of `frozen` bytes in float, as it is trained on: its linear layers quantised."""
    quantization = settings.model.quantization
    if quantization is None:
        return frozen
    weights = sum(linear.weight.numel() for linear in linears)
    scales = sum(2 * linear.out_features + linear.in_features for linear in linears)
    small = weights + 4 * scales if quantization == "int8" else NF4 * weights
    return int(frozen + small) - sum(_bytes(linear.weight) for linear in linears)


def _bytes(tensor: Any) -> int:
    size: int = tensor.numel() * tensor.element_size()
    return size


def estimate(
    settings: Config,
    outline: Outline,
    place: Device,
    examples: dict[str, list[Example]],
    steps: int,
) -> Plan:
    """What a training of `steps` steps on `examples` takes.

    Raises:
        UserError: target modules that the model does not have.
    """
    from etude.engine import int8

    quantization = settings.model.quantization
    model = lora.attach(outline.model(place.torch_dtype), settings.lora, outline.name)
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    adapter = sum(_bytes(p) for p in model.parameters() if p.requires_grad)
    count, in_float = sum(p.numel() for p in frozen), sum(map(_bytes, frozen))
    linears = list(int8.frozen_linears(model).values())
    base = _base_size(settings, in_float, linears)
    opened = base if quantization == "nf4" else in_float  # by the proof, evaluate and chat
    engine = configure_engine(model, settings, place, examples["train"], steps)
    batch, share = largest_pass(settings, engine.cutter, examples["train"])
    host = place.name != "cuda"
    held = HELD if host else UNMEASURED
    judging = int(held * pass_memory(model, batch, settings, gradients=False))
    stored = count * outline.stored.itemsize
    # The file's pages, unless they become the weights themselves.
    converts = quantization == "nf4" or outline.stored != place.torch_dtype
    loading = stored if host and converts else 0
    proof = opened + max(loading, adapter + judging)
    if engine.int8:  # both are held while layer by layer is quantised
        loading = stored + judging
    compiles = host and engine.compiled
    learning = pass_memory(model, batch, settings, gradients=True)
    bare = int(device.used_memory("cpu") + LATER) if host else 0
    return Plan(
        libraries=bare + compiles * int(COMPILER),
        base=base,
        loading=loading,
        adapter=adapter,
        optimizer=2 * adapter,
        training=int(held * (COMPILED if compiles else 1) * learning) + adapter,
        proof=bare + proof,
        parameters=count,
        tokens=batch.input_ids.numel(),
        seconds=_seconds(linears, place, engine, share * _tokens(settings, examples, steps)),
    )


def _tokens(settings: Config, examples: dict[str, list[Example]], steps: int) -> float:
    """How often a forward is computed of the examples' tokens, by the whole training.

    A backward costs as much as a forward, for frozen weights have no gradient.
    """
    training = settings.training
    learnt, judged = (sum(map(len, examples.get(one, []))) for one in ("train", "validation"))
    epoch = math.ceil(len(packing.by_row(examples["train"])) / training.rows_per_step)
    rounds = math.ceil(steps / (training.eval_steps or epoch))
    return (2 + training.gradient_checkpointing) * learnt * steps / epoch + judged * rounds


def _seconds(linears: Sequence[Any], place: Device, engine: Engine, tokens: float) -> float:
    """Seconds for forwards of `tokens`, by the speed of a product with the largest layer, measured shortly."""
    import torch

    weights = [layer.weight for layer in linears]
    if not weights:
        return 0.0
    shape = max(weights, key=lambda weight: weight.numel()).shape
    own, other = (
        torch.ones(size, dtype=place.torch_dtype, device=place.name)
        for size in ((packing.CPU_BUDGET, shape[1]), tuple(shape))
    )
    taken = []
    for _ in range(4):
        started = time.perf_counter()
        own @ other.t()
        if place.name == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    work = tokens * sum(weight.numel() for weight in weights) / (len(own) * shape.numel())
    how = "int8" if engine.int8 else "compiled" if engine.compiled else "plain"
    seconds: float = min(taken) * work / EFFICIENCY[how] + COMPILING * engine.compiled
    return seconds


# --- does it fit ---------------------------------------------------------------------------------


def check(
    plan: Plan,
    settings: Config,
    place: Device,
    again: Callable[[Config], Plan],
    force: bool = False,
) -> bool:
    """Compare the plan with the memory that is free; returns whether it fits.

    With `force`, and where the plan was not measured, what does not fit is a warning. `again` plans
    with other settings.

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
    for section, values in _alternatives(settings):
        part = getattr(settings, section).model_copy(update=values)
        needed = again(settings.model_copy(update={section: part})).needed
        if plan.needed - needed > 0.01 * plan.needed:
            keys = " ".join(
                f"{section}.{key}={str(value).lower()}" for key, value in values.items()
            )
            found.append((plan.needed - needed, keys, needed <= room))
    lines = [
        f"{keys}: saves {_gb(saved)}{', and it fits' if fits else ''}"
        for saved, keys, fits in sorted(found, reverse=True)
    ]
    problem = (
        f"This training does not fit in memory: by the plan it would take {_gb(plan.needed)}, and "
        f"{_gb(room)} are there for it. Change one or more of these:\n  "
        + "\n  ".join([*lines, "dataset.max_length: shorter rows", "model.name: a smaller model"])
        + "\nThen `etude validate` shows the plan again."
    )
    measured = place.name == "cpu" and plan.parameters <= LARGEST
    if measured and settings.model.quantization != "nf4" and not force:
        raise UserError(f"{problem} To train all the same: --force")
    why = (
        "--force"
        if force
        else "only a warning, for with such a training the plan was never compared"
    )
    log.warning("%s: %s", why, problem)
    return False


def _alternatives(settings: Config) -> Iterator[tuple[str, dict[str, Any]]]:
    """Changes that may save memory: the section, and its keys with their values."""
    model, training = settings.model, settings.training
    if model.quantization is None and not settings.lora.use_dora:
        yield "model", {"quantization": "int8"}
    if model.quantization != "nf4" and find_spec("bitsandbytes"):
        yield "model", {"quantization": "nf4"}
    yield "training", {"gradient_checkpointing": True}
    # A step stays what it is.
    yield "training", {"batch_size": 1, "gradient_accumulation_steps": training.rows_per_step}
    yield "training", {"compile": False}
    yield "lora", {"r": 8}


# --- the rehearsal -------------------------------------------------------------------------------


def rehearse(
    model: Any, cutter: packing.Cutter, examples: Sequence[Example], settings: Config
) -> packing.Cutter:
    """Compute the largest pass forward and backward before the training begins, to see whether memory suffices.

    Returns the cutter, or where memory runs out, one whose passes are small enough. Leaves no trace:
    weights, gradients and random numbers are those before.

    Raises:
        UserError: not even the smallest pass fits.
    """
    import torch

    if settings.training.gradient_checkpointing:
        model.activation_checkpointing_enable()

    def compute(smaller: packing.Cutter) -> None:
        batch, _ = largest_pass(settings, smaller, examples)
        with torch.random.fork_rng():
            with device.mixed_precision(settings.training, model.device.type):
                losses = packing.token_losses(model, batch)
            losses.sum().backward()

    was_training = model.training
    model.train()
    try:
        return packing.fitting(cutter, len(examples), compute)[1]
    finally:
        model.zero_grad()
        model.train(was_training)
