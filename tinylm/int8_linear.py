"""Int8Linear: a linear layer with int8 weights and int8 activations, for the head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tinylm.errors import ConfigError
from tinylm.quantization import accumulate_int8, dequantize, quantize_activation, quantize_rows

MAX_INPUTS = 65536  # K up to which int32 holds every sum


class Int8Linear(nn.Module):
    """Inference form of a linear layer without bias: int8 weights, one scale a row.

    The input is quantised per token as a BitLinear's is, and the sums are exact.

    Args:
        weight: int8 [N, K].
        weight_scale: float32 [N].

    Shape:
        x [..., K] -> y [..., N], in x's dtype.

    Raises:
        ConfigError: Wrong shapes or dtypes, or K above 65536.
    """

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, weight: Tensor, weight_scale: Tensor) -> None:
        super().__init__()
        if weight.dtype != torch.int8 or weight.ndim != 2 or weight.shape[1] > MAX_INPUTS:
            raise ConfigError(
                f"weight must be int8 [N, K] with K at most {MAX_INPUTS}, "
                f"found {weight.dtype} {list(weight.shape)}."
            )
        if weight_scale.dtype != torch.float32 or weight_scale.shape != weight.shape[:1]:
            raise ConfigError(
                f"weight_scale must be float32 [{weight.shape[0]}], "
                f"found {weight_scale.dtype} {list(weight_scale.shape)}."
            )
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, layer: nn.Linear) -> Int8Linear:
        """Quantise a linear layer, whose weight stays as it is.

        Raises:
            ConfigError: The layer has a bias.
        """
        if layer.bias is not None:
            raise ConfigError("Int8Linear has no bias, found a linear layer with one.")
        return cls(*quantize_rows(layer.weight.detach())).train(layer.training)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: [..., K] -> [..., N].

        Raises:
            ConfigError: In training mode; the layer has no gradients.
        """
        if self.training:
            raise ConfigError(
                "Int8Linear is for inference, found it in training mode. Call eval()."
            )
        with torch.autocast(x.device.type, enabled=False):
            q, s = quantize_activation(x, "int8")
            y = dequantize(accumulate_int8(q, self.weight).float(), self.weight_scale, s)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        """Describe the layer for ``print(model)``."""
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"
