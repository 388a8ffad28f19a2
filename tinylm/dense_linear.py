"""DenseLinear: what BitLinear is measured against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DenseLinear(nn.Module):
    """A linear layer without bias and without quantisers, in the place of a BitLinear.

    It begins with the same random weights as :class:`tinylm.bitlinear.BitLinear`, so a model and
    its dense twin with the same seed differ in nothing but the quantisers.

    Args:
        in_features: K.
        out_features: N.

    Shape:
        x [..., K] -> y [..., N], in x's dtype (autocast's dtype under autocast).
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.normal_(self.weight, std=in_features**-0.5)

    def forward(self, x: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
        """Apply the layer: [..., K] -> [..., N], in ``out_dtype`` if that is given."""
        y = F.linear(x, self.weight)
        return y if out_dtype is None else y.to(out_dtype)

    @torch.no_grad()
    def weight_codes(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the weight as [N, K] of ``dtype``, and the scale 1: what absorbed decode reads."""
        return self.weight.to(dtype), torch.ones((), device=self.weight.device)

    def extra_repr(self) -> str:
        """Describe the layer for ``print(model)``."""
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"
