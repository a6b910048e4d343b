"""The frozen linear layers of a base in int8: a quarter of the memory, and faster products.

One int8 weight serves both directions. With W / smooth ~ scale[:, None] * Wq:

    forward   y  = (x * smooth) @ (W / smooth).T = s_x * (xq @ Wq.T - z * sum(Wq)) * scale
    backward  dx = ((dy * scale) @ Wq) * smooth, with dy * scale in int8 as well, one scale a token

Activations get a scale s_x and a zero point z per token (dynamically), gradients a scale. `smooth`
moves outlier channels of the activations into the weights, where they harm less.
Sources: Dettmers et al., LLM.int8(), arXiv:2208.07339; Xiao et al., SmoothQuant, arXiv:2211.10438.
"""

import contextlib
import ctypes
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from etude.engine.packing import Pass, token_losses
from etude.errors import first_line
from etude.models.device import free_memory

M_MMAP_THRESHOLD = -3  # malloc.h


def quantize_symmetric(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [n, k] as int8 [n, k] and scales [n, 1] with x ~ q * scale."""
    # 1e-30, for a row of zeros, is written out: torch.compile would lift a global as an input.
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return (x / scale).round().to(torch.int8), scale


def quantize_asymmetric(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows [n, k] as int8 [n, k], scales and zero points [n, 1] with x ~ (q - zero) * scale."""
    low = x.amin(1, keepdim=True).clamp(max=0)
    high = x.amax(1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=1e-30)
    zero = (-low / scale).round() - 128
    return ((x / scale).round() + zero).clamp(-128, 127).to(torch.int8), scale, zero


class _Product(torch.autograd.Function):
    """x [tokens, in] times an int8 weight [out, in], products in int8 in both directions."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        sums: torch.Tensor,
        smooth: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(weight, scale, smooth)
        q, token_scale, zero = quantize_asymmetric(x.float() * smooth)
        product = torch._int_mm(q, weight.t()).float()
        return ((product - zero * sums) * token_scale * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        weight, scale, smooth = ctx.saved_tensors
        q, token_scale = quantize_symmetric(grad.float() * scale)
        product = torch._int_mm(q, weight).float()
        return (product * token_scale * smooth).to(grad.dtype), None, None, None, None


class Int8Linear(nn.Module):
    """A frozen nn.Linear in int8.

    Attributes:
        weight: int8 [out, in], of weight / smooth.
        scale: float32 [out].
        sums: float32 [out], the sum of each row of the int8 weight: what a zero point adds.
        smooth: float32 [in], what the input is multiplied by.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    sums: torch.Tensor
    smooth: torch.Tensor

    def __init__(self, linear: nn.Linear, largest: torch.Tensor) -> None:
        """Quantise `linear`, whose input channels reach the absolute values `largest` [in].

        SmoothQuant with alpha = 0.5: smooth_j = sqrt(max|W_j| / max|x_j|).
        """
        super().__init__()
        weight = linear.weight.detach().float()
        largest = largest.float()
        # A channel that was small in the few rows seen may get larger later.
        floor = 0.1 * largest.mean() + 1e-5
        smooth = (weight.abs().amax(0).clamp(min=1e-5) / largest.clamp(min=floor)).sqrt()
        weight = weight / smooth
        self.in_features, self.out_features = linear.in_features, linear.out_features
        q, scale = quantize_symmetric(weight)
        self.register_buffer("weight", q)
        self.register_buffer("scale", scale[:, 0])
        self.register_buffer("sums", q.sum(1).float())
        self.register_buffer("smooth", smooth)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., in] to [..., out]."""
        flat: torch.Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            x.reshape(-1, self.in_features), self.weight, self.scale, self.sums, self.smooth
        )
        y = flat.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def frozen_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The frozen linear layers of `model` by name, the output head aside: it decides the loss."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and not module.weight.requires_grad
    }


def quantize(model: nn.Module, passes: Iterable[Pass], dtype: torch.dtype) -> None:
    """Put the frozen linear layers of `model` in int8, in place; its other weights become `dtype`.

    `passes` (a few dozen rows of the data are enough) show how large each layer's inputs get.
    """
    # Tensors from 2 MB on are mapped by themselves, and unmapped when they are freed. glibc would raise
    # the limit to 32 MB, and keep holes of each layer's float weight and of activations of all lengths.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 2 << 20)
    largest: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            seen = inputs[0].detach().flatten(0, -2).abs().amax(0)
            largest[name] = torch.maximum(largest[name], seen) if name in largest else seen

        return hook

    model.eval()
    linears = frozen_linears(model)
    hooks = [linear.register_forward_pre_hook(watch(name)) for name, linear in linears.items()]
    with torch.no_grad():
        for batch in passes:
            token_losses(model, batch)
    for hook in hooks:
        hook.remove()
    for name in largest:  # a layer that no pass reached stays in float
        model.set_submodule(name, Int8Linear(linears.pop(name), largest[name]))
    # Copied: what was loaded is a view of the mapped file, all of which stays in memory with it.
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype, copy=True)
    free_memory()


def why_not(model: nn.Module, device: str) -> str | None:
    """None if `model` has layers to quantise and `device` int8 products, else what is missing."""
    if not frozen_linears(model):
        return "the model has no frozen linear layers"
    square = torch.ones(32, 32, dtype=torch.int8, device=device)
    try:
        torch._int_mm(square, square)
    except RuntimeError as error:
        return f"{device} has no int8 product: {first_line(error)}"
    return None
