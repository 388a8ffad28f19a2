"""RMSNorm without bias (Zhang and Sennrich, 1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tinylm.config import float32
from tinylm.precision import inner_dtype


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, inner: torch.dtype = torch.float64
) -> Tensor:
    """Normalise by the root mean square: ``(x * r) * weight``, ``r = 1 / sqrt(mean(x^2) + eps)``.

    Args:
        x: Floating point [..., K].
        weight: [K].
        eps: Added to the mean square.
        inner: dtype in which r is computed, see :mod:`tinylm.precision`.

    Returns:
        float32 [..., K].
    """
    r = (x.to(inner).square().mean(dim=-1, keepdim=True) + eps).sqrt().reciprocal()
    return x.float() * r.float() * weight.float()


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension, computed in float32 or wider.

    Args:
        size: K.
        eps: Added to the mean square.
    """

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.eps = float32(eps)
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., K]; the result has x's dtype."""
        inner = inner_dtype(x, training=self.training)
        return rms_norm(x, self.weight, self.eps, inner=inner).to(x.dtype)

    def extra_repr(self) -> str:
        """Describe the layer for ``print(model)``."""
        return f"{self.weight.numel()}, eps={self.eps}"
