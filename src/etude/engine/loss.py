"""The loss at supervised tokens, without ever copying rows that are as wide as the vocabulary."""

from typing import Any

import torch

# Rows of logits handled at a time: what is computed from them stays in the processor's cache.
CHUNK = 64


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, row: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        normaliser = torch.cat([part.float().logsumexp(-1) for part in logits.split(CHUNK)])
        ctx.save_for_backward(logits, normaliser, row, target)
        return normaliser[row] - logits[row, target].float()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, normaliser, row, target = ctx.saved_tensors
        weight = torch.zeros_like(normaliser).index_add_(0, row, grads[0])
        grad = torch.empty_like(logits)
        for start in range(0, len(logits), CHUNK):
            part = slice(start, start + CHUNK)
            probability = (logits[part].float() - normaliser[part, None]).exp_()
            grad[part] = probability.mul_(weight[part, None])
        # accumulate: two examples may share a position and a target.
        grad.index_put_((row, target), -grads[0].to(grad.dtype), accumulate=True)
        return grad, None, None


def cross_entropy(logits: torch.Tensor, row: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood in nats of `target` under row `row` of `logits`, [targets], float32.

    nll = logsumexp(z_row) - z_row[target], and its gradient is softmax(z_row) - onehot(target).
    Several targets may name one row: examples that share a beginning share its logits. PyTorch's
    own cross_entropy would need a copy of the row for each target, and takes several times as
    long on a CPU.

    Args:
        logits: [rows, vocabulary], any float format; computed in float32.
        row: [targets], which row of `logits` predicts each target.
        target: [targets], token ids.
    """
    result: torch.Tensor = _CrossEntropy.apply(logits, row, target)  # type: ignore[no-untyped-call]
    return result
