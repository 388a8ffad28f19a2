"""BitLinear: a linear layer with ternary weights and 8-bit activations (BitNet b1.58)."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tinylm.config import Activation, ModelConfig
from tinylm.dense_linear import DenseLinear
from tinylm.packing import check_packed, pack, unpack
from tinylm.precision import matmul_dtype
from tinylm.quantization import accumulate, quantize_activation, ternarize
from tinylm.quantizer_passes import TORCH_PASSES, passes


def _output_dtype(x: Tensor) -> torch.dtype:
    return matmul_dtype(x) if torch.is_autocast_enabled(x.device.type) else x.dtype


class _TernaryLinear(torch.autograd.Function):
    """``y = dequantize(q(x) . codes(W))`` with straight-through gradients.

    Both quantisers count as the identity in the backward pass, so with ``x_hat = q / s`` and
    ``w_hat = codes * scale``: ``dx = dy . w_hat`` and ``dW = dy^T . x_hat``. What is kept for it
    takes one byte an activation, not four.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        activation: Activation,
        out_dtype: torch.dtype,
        quantizers: str,
    ) -> Tensor:
        dtype = matmul_dtype(x)
        work = passes(quantizers, x, activation)
        codes, scale = work.ternarize(weight, dtype)
        q, stored, s = work.quantize(x, activation, dtype, keep=True)
        with torch.autocast(x.device.type, enabled=False):
            accumulator = accumulate(q, codes, activation)
            y = work.rescale(accumulator, scale, s, out_dtype)
        # Half-precision codes are kept as the backward product takes them.
        kept = codes if dtype.itemsize == 2 else codes.to(torch.int8)
        ctx.save_for_backward(stored, s, kept, scale)
        ctx.dtype, ctx.x_dtype, ctx.weight_dtype, ctx.work = dtype, x.dtype, weight.dtype, work
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        stored, s, codes, scale = ctx.saved_tensors
        dtype, dx, dw = ctx.dtype, None, None
        with torch.autocast(dy.device.type, enabled=False):
            dy = dy.to(dtype)
            if ctx.needs_input_grad[0]:
                dx = ctx.work.rescale(dy @ codes.to(dtype), scale, None, ctx.x_dtype)  # [..., K]
            if ctx.needs_input_grad[1]:
                x_hat = ctx.work.dequantize(stored, s, dtype).reshape(-1, stored.shape[-1])
                dw = dy.reshape(-1, dy.shape[-1]).t() @ x_hat  # [N, M] [M, K]
                dw = dw.to(ctx.weight_dtype)
        return dx, dw, None, None, None


class BitLinear(nn.Module):
    """Linear layer without bias, with ternary weights and 8-bit activations.

    The input is expected to be RMS-normed. The float32 master weight is quantised in each forward
    pass; gradients pass straight through both quantisers. In evaluation mode without gradients the
    codes are kept until the weight changes; a change through ``weight.data`` is not seen until the
    layer is switched to training mode.

    Args:
        in_features: K, a multiple of 4.
        out_features: N.
        activation: Number format of the activations.

    Shape:
        x [..., K] -> y [..., N], in x's dtype (autocast's dtype under autocast).
    """

    def __init__(
        self, in_features: int, out_features: int, *, activation: Activation = "int8"
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.activation = activation
        self.quantizers = "torch"  # who quantises activations: see quantizer_passes
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        # Of the ternary codes only the scale depends on this; but the optimiser's steps are as long
        # as the learning rate says, and against smaller weights they would flip codes too often.
        nn.init.normal_(self.weight, std=in_features**-0.5)
        # Off where the weight is sharded: kept codes of all layers would be the whole model.
        self.keeps_codes = True
        # What weight_codes() keeps: the weight, its version and the dtype, then codes and scale.
        self._codes: tuple[weakref.ref[Tensor], Any, Tensor, Tensor] | None = None

    def forward(self, x: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
        """Apply the layer: [..., K] -> [..., N], in ``out_dtype`` if that is given."""
        out_dtype = out_dtype or _output_dtype(x)
        if self.training or torch.is_grad_enabled():
            return _TernaryLinear.apply(x, self.weight, self.activation, out_dtype, self.quantizers)
        dtype = matmul_dtype(x)
        codes, scale = self.weight_codes(dtype)
        work = passes(self.quantizers, x, self.activation)
        q, _, s = work.quantize(x, self.activation, dtype, keep=False)
        with torch.autocast(x.device.type, enabled=False):
            accumulator = accumulate(q, codes, self.activation)
            return work.rescale(accumulator, scale, s, out_dtype)

    def train(self, mode: bool = True) -> BitLinear:
        """Switch between training and evaluation; training drops the kept codes."""
        if mode:
            self._codes = None
        return super().train(mode)

    @torch.no_grad()
    def weight_codes(self, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
        """Return the ternary codes, [N, K] of ``dtype``, and their scale, a float32 scalar."""
        # Inference tensors count no versions.
        if self.training or not self.keeps_codes or self.weight.is_inference():
            codes, scale = ternarize(self.weight)
            return codes.to(dtype), scale
        key = (self.weight._version, dtype)
        if self._codes is not None and self._codes[0]() is self.weight and self._codes[1] == key:
            return self._codes[2], self._codes[3]
        with torch.inference_mode(False):  # what is kept must serve outside of it too
            codes, scale = ternarize(self.weight)
            codes = codes.to(dtype)
        # A weak reference and no address, because a new weight may lie where the old one did.
        self._codes = (weakref.ref(self.weight), key, codes, scale)
        return codes, scale

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BitLinear:
        self._codes = None  # a change of dtype or device does not count as a new version
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_codes": None}

    def extra_repr(self) -> str:
        """Describe the layer for ``print(model)``."""
        return f"{self.in_features}, {self.out_features}, activation={self.activation}"


class PackedBitLinear(nn.Module):
    """Inference form of :class:`BitLinear`: 2-bit weights, the same output bit for bit in float32.

    Attributes:
        weight: uint8 [N, K / 4], see :mod:`tinylm.packing`.
        weight_scale: float32 [N], one scale a row, so that layers can be fused along N.
    """

    weight: Tensor
    weight_scale: Tensor

    def __init__(
        self, weight: Tensor, weight_scale: Tensor, *, activation: Activation = "int8"
    ) -> None:
        super().__init__()
        check_packed(weight, "weight")
        self.activation = activation
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)

    @classmethod
    def from_bit_linear(cls, layer: BitLinear) -> PackedBitLinear:
        """Pack a trained layer."""
        codes, scale = layer.weight_codes()
        rows = scale.expand(layer.out_features).contiguous()
        return cls(pack(codes), rows, activation=layer.activation)

    def weight_codes(self, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
        """Return the ternary codes, [N, K] of ``dtype``, and their scales, float32 [N]."""
        return unpack(self.weight, dtype), self.weight_scale

    def forward(self, x: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
        """Apply the layer: [..., K] -> [..., N], in ``out_dtype`` if that is given."""
        out_dtype = out_dtype or _output_dtype(x)
        q, s = quantize_activation(x, self.activation)
        codes, scale = self.weight_codes(torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            accumulator = accumulate(q, codes, self.activation)
            return TORCH_PASSES.rescale(accumulator, scale, s, out_dtype)


def make_linear(
    in_features: int,
    out_features: int,
    config: ModelConfig,
    *,
    activation: Activation | None = None,
) -> BitLinear | DenseLinear:
    """Make a linear layer of a model: a BitLinear, or a plain one in a dense twin.

    Args:
        in_features: K.
        out_features: N.
        config: The model's.
        activation: Number format of the activations. Default: the config's.
    """
    if config.dense:
        return DenseLinear(in_features, out_features)
    return BitLinear(in_features, out_features, activation=activation or config.activation)
