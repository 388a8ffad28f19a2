"""Cross entropy of the head, without the logits of a whole batch in memory.

Logits [B, S, V] and their float32 copy and gradient are the largest tensors of a training step: 16
x 2048 tokens and 32000 words make 4.2 GB each. So the head and the loss go through the tokens in
chunks, and each chunk's gradient is taken while its logits are there (Hsu et al., Liger Kernel,
2410.10989, section 3).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinylm.precision import matmul_dtype
from tinylm.training_config import DEFAULT_LOSS_CHUNK

IGNORED_LABEL = -100  # what torch's cross entropy leaves out

ChunkLoss = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]


def sum_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Add up the cross entropy over the labels that count.

    Args:
        logits: [..., V], any floating dtype; the loss is computed in float32 or wider.
        labels: int64 [...], the next token at each position; -100 is ignored.

    Returns:
        Scalar, float32 or wider, in nats.
    """
    return F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2),
        labels.flatten(),
        ignore_index=IGNORED_LABEL,
        reduction="sum",
    )


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    chunk: int = DEFAULT_LOSS_CHUNK,
    compiled: bool = False,
) -> Tensor:
    """Return ``sum_loss(hidden @ weight.T, labels)``, ``chunk`` tokens at a time.

    The weight's gradient is summed over the chunks in float32 or wider, whatever the dtype of the
    products.

    Args:
        hidden: [..., H].
        weight: The head's matrix [V, H].
        labels: int64 [...]; -100 is ignored.
        chunk: Tokens whose logits are in memory at a time.
        compiled: Whether torch.compile makes one kernel of what lies between the products.

    Returns:
        Scalar, float32 or wider, in nats.
    """
    rows, targets = hidden.flatten(0, -2), labels.flatten()
    chunk_loss = _compiled_chunk_loss() if compiled else _chunk_loss
    dtype = matmul_dtype(hidden)
    if torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad):
        loss: Tensor = _LinearCrossEntropy.apply(rows, weight, targets, dtype, chunk, chunk_loss)
        return loss
    with torch.autocast(rows.device.type, enabled=False):
        return _walk(rows, weight, targets, dtype, chunk, chunk_loss, (False, False))[0]


class _LinearCrossEntropy(torch.autograd.Function):
    """Ends the network, so that forward already knows the gradients but for a factor."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        chunk: int,
        chunk_loss: ChunkLoss,
    ) -> Tensor:
        needed = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        with torch.autocast(rows.device.type, enabled=False):
            loss, d_rows, d_weight = _walk(rows, weight, targets, dtype, chunk, chunk_loss, needed)
        ctx.save_for_backward(d_rows, d_weight)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        d_rows, d_weight = (
            None if gradient is None else gradient * factor.to(gradient.dtype)
            for gradient in ctx.saved_tensors
        )
        return d_rows, d_weight, None, None, None, None


def _walk(
    rows: Tensor,
    weight: Tensor,
    targets: Tensor,
    dtype: torch.dtype,
    chunk: int,
    chunk_loss: ChunkLoss,
    needed: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the loss, and the gradients [M, H] and [V, H] that are needed."""
    wide = torch.promote_types(dtype, torch.float32)
    matrix = weight.to(dtype)
    loss = torch.zeros((), dtype=wide, device=rows.device)
    d_rows = torch.empty_like(rows) if needed[0] else None
    d_weight = torch.zeros_like(weight, dtype=wide) if needed[1] else None
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk].to(dtype)  # [C, H]
        labels = targets[start : start + chunk]
        part_loss, d_logits = chunk_loss(part @ matrix.t(), labels, any(needed))
        loss += part_loss
        if d_rows is not None and d_logits is not None:
            d_rows[start : start + chunk] = d_logits @ matrix
        if d_weight is not None and d_logits is not None:
            d_weight += d_logits.t() @ part
    return loss, d_rows, None if d_weight is None else d_weight.to(weight.dtype)


def _chunk_loss(logits: Tensor, labels: Tensor, backward: bool) -> tuple[Tensor, Tensor | None]:
    """Return the summed loss of logits [C, V], and its gradient in their dtype."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ignored = labels == IGNORED_LABEL
    targets = labels.masked_fill(ignored, 0)[:, None]  # [C, 1]
    log_sum = wide.logsumexp(dim=-1, keepdim=True)
    loss = (log_sum - wide.gather(1, targets)).squeeze(1).masked_fill(ignored, 0.0).sum()
    if not backward:
        return loss, None
    is_target = torch.arange(logits.shape[1], device=logits.device) == targets
    gradient = (wide - log_sum).exp() - is_target.to(wide.dtype)
    return loss, gradient.masked_fill(ignored[:, None], 0.0).to(logits.dtype)


@functools.cache
def _compiled_chunk_loss() -> ChunkLoss:
    return torch.compile(_chunk_loss)
