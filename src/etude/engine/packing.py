"""Examples in, passes out: what one forward and backward computes.

A packed pass holds several examples in one row without padding, and every shared beginning
(system prompt, instruction) once. The examples form a tree of tokens: each token attends to its
own ancestors only, and its position is its depth. So the losses are those of the examples one by one,
with less work.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from etude.conversation.encoding import Example, common
from etude.errors import UserError, first_line
from etude.models import device

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
T = TypeVar("T")

# A pass holds at most about this many supervised tokens: each one's logits are as wide as the
# vocabulary, so 2,048 of Qwen2's are 1.2 GB in float32, and their gradient as much again.
SUPERVISED_BUDGET = 2048


@dataclass(frozen=True)
class Pass:
    """The tensors of one forward.

    Attributes:
        input_ids: [rows, tokens].
        position_ids: [rows, tokens], depth of each token in its own example.
        attention_mask: [rows, tokens] of 0/1, or additive [1, 1, tokens, tokens] of 0/-inf.
        keep: [kept], positions at which logits are needed.
        row, column: [targets], which row, and which entry of `keep`, predicts each target.
        target: [targets], the token ids to be predicted.
        owner: [targets], the index of the example that each target belongs to.
    """

    input_ids: "torch.Tensor"
    position_ids: "torch.Tensor"
    attention_mask: "torch.Tensor"
    keep: "torch.Tensor"
    row: "torch.Tensor"
    column: "torch.Tensor"
    target: "torch.Tensor"
    owner: "torch.Tensor"

    def to(self, device: str, dtype: "torch.dtype") -> "Pass":
        """The pass on `device`, an additive mask in the model's `dtype`."""
        moved = {name: value.to(device) for name, value in vars(self).items()}
        if self.attention_mask.is_floating_point():
            moved["attention_mask"] = self.attention_mask.to(device, dtype)
        return replace(self, **moved)


def pack(examples: Sequence[Example], budget: int) -> Iterator[Pass]:
    """Cut `examples` into packed passes of `budget` tokens each (one example may exceed it).

    A pass also ends at SUPERVISED_BUDGET supervised tokens.

    In lexicographic order of their ids, each example shares with its neighbour the longest
    beginning that it shares with any, so one look back finds every shared prefix, at all levels.
    """
    order = sorted(range(len(examples)), key=lambda index: examples[index].ids)
    chosen: list[tuple[int, int]] = []  # (example, tokens it shares with the one before)
    size, logits, before = 0, 0, None
    for index in order:
        ids, supervised = examples[index].ids, examples[index].targets
        shared = common(before, ids) if before is not None else 0
        full = size + len(ids) - shared > budget or logits + supervised > SUPERVISED_BUDGET
        if chosen and full:
            yield _packed(examples, chosen)
            chosen, size, logits, shared = [], 0, 0, 0
        chosen.append((index, shared))
        size += len(ids) - shared
        logits += supervised
        before = ids
    if chosen:
        yield _packed(examples, chosen)


def _packed(examples: Sequence[Example], chosen: Sequence[tuple[int, int]]) -> Pass:
    import numpy as np
    import torch

    total = sum(len(examples[index]) - shared for index, shared in chosen)
    ids = np.empty(total, np.int64)
    positions = np.empty(total, np.int64)
    visible = np.zeros((total, total), bool)
    path = np.empty(0, np.int64)  # where each token of the current example is in the row
    sources: list[np.ndarray[Any, np.dtype[np.int64]]] = []
    targets: list[list[int]] = []
    owners: list[int] = []
    size = 0
    for index, shared in chosen:
        example, own = examples[index], examples[index].ids
        new = len(own) - shared
        rows = slice(size, size + new)
        ids[rows] = own[shared:]
        positions[rows] = np.arange(shared, len(own))
        path = np.concatenate([path[:shared], np.arange(size, size + new)])
        visible[rows, path[:shared]] = True
        visible[rows, rows] = np.tri(new, dtype=bool)
        supervised = np.flatnonzero(example.supervised)
        sources.append(path[supervised - 1])  # the token before a target predicts it
        targets.append([own[at] for at in supervised])
        owners += [index] * len(supervised)
        size += new
    keep, column = np.unique(np.concatenate(sources), return_inverse=True)
    mask = torch.zeros(1, 1, total, total).masked_fill_(~torch.from_numpy(visible), float("-inf"))
    return Pass(
        input_ids=torch.from_numpy(ids)[None],
        position_ids=torch.from_numpy(positions)[None],
        attention_mask=mask,
        keep=torch.from_numpy(keep),
        row=torch.zeros(len(column), dtype=torch.int64),
        column=torch.from_numpy(column),
        target=torch.tensor([token for tokens in targets for token in tokens]),
        owner=torch.tensor(owners),
    )


def pad(examples: Sequence[Example], rows: int) -> Iterator[Pass]:
    """Cut `examples`, sorted by length, into right-padded passes of `rows` rows; any model can."""
    import torch

    order = sorted(range(len(examples)), key=lambda index: len(examples[index]))
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        tokens = max(len(examples[index]) for index in chosen)
        input_ids = torch.zeros(len(chosen), tokens, dtype=torch.int64)
        mask = torch.zeros(len(chosen), tokens, dtype=torch.int64)
        where: list[tuple[int, int, int, int]] = []
        for row, index in enumerate(chosen):
            ids = examples[index].ids
            input_ids[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
            where += [
                (row, at - 1, ids[at], index)
                for at, yes in enumerate(examples[index].supervised)
                if yes
            ]
        row_of, source, target, owner = torch.tensor(where).T
        keep, column = torch.unique(source, return_inverse=True)
        positions = torch.arange(tokens).expand(len(chosen), tokens)
        yield Pass(input_ids, positions, mask, keep, row_of, column, target, owner)


def token_losses(model: Any, batch: Pass) -> "torch.Tensor":
    """Negative log-likelihood in nats of each target, [targets], float32; differentiable.

    Logits are computed at the positions in `batch.keep` only: a vocabulary of 150,000 makes them
    the largest tensor of a pass otherwise.
    """
    from etude.engine.loss import cross_entropy

    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        logits_to_keep=batch.keep,
        use_cache=False,
    ).logits
    if logits.shape[1] != len(batch.keep):  # an architecture that ignores logits_to_keep
        logits = logits[:, batch.keep]
    flat = batch.row * len(batch.keep) + batch.column
    return cross_entropy(logits.flatten(0, 1), flat, batch.target)


# On a CPU a dense mask pays up to about this many tokens; longer passes attend to mostly nothing.
CPU_BUDGET = 512
# The mask of a pass grows with the square of its tokens: 268 MB in float32 at this many.
GPU_BUDGET = 8192
PROVEN = 16  # tokens of an example's end on which packing is proven


def by_row(examples: Sequence[Example]) -> list[list[int]]:
    """The indices of the examples that each row is learnt from, in one step."""
    rows: list[list[int]] = []
    for index, example in enumerate(examples):
        if example.joined:
            rows[-1].append(index)
        else:
            rows.append([index])
    return rows


def steps(seed: int, epoch: int, rows: int, size: int) -> list[list[int]]:
    """Which of `rows` rows each step of an epoch learns from, `size` at a time."""
    import numpy as np

    order: list[int] = np.random.default_rng([seed, epoch]).permutation(rows).tolist()
    return [order[start : start + size] for start in range(0, rows, size)]


@dataclass(frozen=True)
class Cutter:
    """Cuts examples into the passes of one model: packed where that is proven, else padded.

    Attributes:
        rows: examples in a padded pass.
        budget: tokens of a packed pass: what `rows` full examples would hold, up to the device's cap.
        why_padded: None for packed passes, else why they are padded.
    """

    rows: int
    budget: int
    why_padded: str | None
    device: str
    dtype: "torch.dtype"

    @classmethod
    def of(
        cls,
        model: Any,
        rows: int,
        max_length: int,
        examples: Sequence[Example],
        device: str | None = None,
    ) -> "Cutter":
        """The cutter for `model`, whose `examples` have up to `max_length` tokens.

        `device` is where the passes are computed, the model's own by default.
        """
        device = device or str(model.device)
        cap = CPU_BUDGET if device.startswith("cpu") else GPU_BUDGET
        why_padded = why_not_packed(model, max_length, examples)
        return cls(rows, min(rows * max_length, cap), why_padded, device, model.dtype)

    @property
    def size(self) -> str:
        """How much a pass holds, in words."""
        return f"{self.rows} rows" if self.why_padded else f"{self.budget} tokens"

    def smaller(self) -> "Cutter | None":
        """A cutter whose passes hold half as much; None where they can hold no less."""
        left = self.rows if self.why_padded else self.budget
        if left < 2:
            return None
        return replace(self, rows=max(1, self.rows // 2), budget=self.budget // 2)

    def __call__(self, examples: Sequence[Example]) -> Iterator[Pass]:
        """The passes of a step or of a whole data set."""
        padded = self.why_padded is not None
        cut = pad(examples, self.rows) if padded else pack(examples, self.budget)
        return (batch.to(self.device, self.dtype) for batch in cut)


def fitting(
    cutter: Cutter, examples: int, run: Callable[[Cutter], T], where: str = ""
) -> tuple[T, Cutter]:
    """What `run` returns with `cutter`, or, where memory runs out, with one of smaller passes; and which.

    `run` cuts `examples` examples: a single one cannot be cut smaller.

    Raises:
        UserError: not even the smallest pass fits; `where` begins the sentence.
    """
    while True:
        try:
            return run(cutter), cutter
        except RuntimeError as error:
            if not device.out_of_memory(error):
                raise
        smaller = cutter.smaller()
        if smaller is None or examples < 2:
            raise UserError(
                f"{where}not even one example fits in memory. Lower dataset.max_length or lora.r, set "
                "training.gradient_checkpointing: true or model.quantization: int8, or take a smaller "
                "model.name"
            )
        cutter = smaller
        device.free_memory()  # only here: the error kept its frames' tensors
        log.warning("%sout of memory; the passes are halved to %s", where, cutter.size)


def why_not_packed(model: Any, max_length: int, examples: Sequence[Example]) -> str | None:
    """None if packed passes give `model`'s own losses, else the reason why they do not.

    Proven on the model itself: the ends of a few `examples` after one beginning, packed and one
    by one. A model whose layers carry state along the row (Mamba) or that ignores a given mask
    differs by about a nat a token, one that counts positions along the row by a tenth, 16-bit
    rounding by hundredths. On random tokens rounding would hide such mistakes.
    """
    import torch

    settings = model.config.get_text_config()
    window = getattr(settings, "sliding_window", None)
    sliding = "sliding" in str(getattr(settings, "layer_types", "sliding"))
    if window and sliding and max_length > window:
        return f"its layers look back {window} tokens, and dataset.max_length is {max_length}"
    if model.device.type == "meta":  # a shape, which computes nothing
        return "its layers carry state along the row" if model._is_stateful else None
    first = examples[0].ids
    beginning = first[-2 * PROVEN : -PROVEN] or first[:1]
    texts = [beginning, *(beginning + one.ids[-PROVEN:] for one in examples[:4])]
    short = [Example(ids, [False] + [True] * (len(ids) - 1)) for ids in texts if len(ids) > 1]

    def by_target(passes: Iterator[Pass]) -> torch.Tensor:
        on_device = [batch.to(str(model.device), model.dtype) for batch in passes]
        losses = torch.cat([token_losses(model, batch) for batch in on_device])
        return losses[torch.cat([batch.owner for batch in on_device]).argsort(stable=True)]

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            packed, plain = by_target(pack(short, CPU_BUDGET)), by_target(pad(short, 1))
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        return f"it does not accept a custom mask: {first_line(error)}"
    finally:
        model.train(was_training)
    if not bool(plain.isfinite().all()):
        return "its losses are not finite numbers"
    deviation = float((packed - plain).abs().mean())
    exact = model.dtype == torch.float32 and not getattr(model, "is_quantized", False)
    if not deviation <= (1e-3 if exact else 0.1):
        return f"packed losses would differ by {deviation:.2g} nats a token"
    return None


def sum_by_example(model: Any, passes: Iterator[Pass], count: int) -> "torch.Tensor":
    """Summed negative log-likelihood of each of `count` examples' targets, in nats, [count].

    `passes` are on the model's device, as a Cutter makes them.
    """
    import torch

    losses = torch.zeros(count)
    for batch in passes:
        losses.index_add_(0, batch.owner.cpu(), token_losses(model, batch).cpu())
    return losses


def total_loss(model: Any, passes: Iterator[Pass]) -> tuple[float, int]:
    """Summed negative log-likelihood of all targets in nats, and how many there are; no gradients.

    In eager mode: compiled layers would compile another graph, for a few passes.
    """
    import torch

    total, count = 0.0, 0
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        for batch in passes:
            total += float(token_losses(model, batch).sum())
            count += len(batch.target)
    return total, count


def culprits(model: Any, cutter: Cutter, examples: Sequence[Example]) -> list[str]:
    """The origins of examples whose own loss is not finite; a pass shares its numbers."""
    import torch

    single = replace(cutter, rows=1, why_padded="one by one")
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        sums = sum_by_example(model, single(examples), len(examples))
    finite = sums.isfinite().tolist()
    return [one.origin for one, sound in zip(examples, finite, strict=True) if not sound]
