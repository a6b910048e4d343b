"""What computing a pass takes, counted without computing it: bytes of tensors and operations.

A model without numbers (PyTorch's fake tensors: shapes, types and storages alone) is walked through
a pass as it would be trained. Each tensor's bytes count from where it is made until nothing refers to
it any more, so attention, masks, the adapter, int8 and gradient checkpointing count as they are
computed, whatever the architecture.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from etude.engine import packing


@dataclass
class Walk:
    """What one pass was found to take: most bytes at once, bytes left at its end, operations."""

    peak: int
    left: int
    operations: float


def walk(model: Any, compute: Callable[[], Any]) -> Walk:
    """Count the tensors that `compute` makes, until each is gone, and its products' operations.

    What `model` holds is not counted, nor are views of it.

    A product [m, k] x [k, n] has 2 m k n operations; attention [tokens, size] two such.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    held = (*model.parameters(), *model.buffers())
    sizes = {tensor.untyped_storage()._cdata: 0 for tensor in held}
    found = Walk(0, 0, 0.0)

    def gone(key: int) -> None:
        found.left -= sizes.pop(key)

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            name = func.overloadpacket.__name__
            if name in ("mm", "bmm", "_int_mm"):
                found.operations += 2.0 * args[0].numel() * args[1].shape[-1]
            elif name == "addmm":
                found.operations += 2.0 * args[1].numel() * args[2].shape[-1]
            elif "scaled_dot_product" in name:
                at = 1 if "backward" in name else 0  # backward begins with the output's gradient
                query, key = args[at], args[at + 1]
                found.operations += 4.0 * (1 + at) * query.numel() * key.shape[-2]
            for tensor in result if isinstance(result, tuple | list) else (result,):
                with contextlib.suppress(AttributeError):  # no tensor
                    storage = tensor.untyped_storage()
                    if storage._cdata not in sizes:
                        sizes[storage._cdata] = storage.nbytes()
                        found.left += storage.nbytes()
                        found.peak = max(found.peak, found.left)
                        weakref.finalize(storage, gone, storage._cdata)
            return result

    counter: Any = Counter
    with counter():
        kept = compute()
    left = found.left  # with what `compute` returned
    del kept
    return replace(found, left=left)


def numberless(model: Any, gradients: bool = False) -> None:
    """Put fake tensors in place of the parameters and buffers of a model on the meta device.

    With `gradients` the trained ones have theirs already, which are then added to.
    On the CPU: what PyTorch would choose for meta, attention for one, is not what runs.
    """
    import torch

    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is None:
                continue
            if id(value) not in made:  # embeddings and head may be one
                new = torch.nn.Parameter(torch.empty(value.shape, dtype=value.dtype), False)
                if value.requires_grad:
                    new.requires_grad_()
                    new.grad = torch.empty_like(new) if gradients else None
                made[id(value)] = new
            module._parameters[name] = made[id(value)]
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = torch.empty(value.shape, dtype=value.dtype)


def size(tensors: Iterable[Any]) -> int:
    """Bytes of `tensors`, one that stands there twice (tied embeddings) once."""
    unique = {id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}
    return sum(unique.values())


def fake_pass(mode: Any, batch: packing.Pass, stateful: bool) -> packing.Pass:
    """`batch` without numbers; a mask of 0/1 as the one that attention layers make of it."""
    import torch

    faked = {name: mode.from_tensor(value) for name, value in vars(batch).items()}
    rows, tokens = batch.input_ids.shape
    if not batch.attention_mask.is_floating_point() and not stateful:
        faked["attention_mask"] = torch.empty(rows, 1, tokens, tokens, dtype=torch.bool)
    return packing.Pass(**faked)
