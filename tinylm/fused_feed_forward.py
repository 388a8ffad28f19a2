"""The feed-forward's training pass around :mod:`tinylm.triton_swiglu`: three products, two kernels.

Gate and up are one product over both weights, forward and backward, and the sums of a ternary
layer go into the kernel as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylm.bitlinear import BitLinear
from tinylm.dense_linear import DenseLinear
from tinylm.precision import matmul_dtype
from tinylm.quantization import accumulate
from tinylm.quantizer_passes import passes


def _kernels() -> Any:
    from tinylm import triton_swiglu  # needs Triton, which a CPU's PyTorch may lack

    return triton_swiglu


class _TernaryFeedForward(torch.autograd.Function):
    """``down(quantise(norm(silu(gate) * up)))``, quantisers as in :mod:`tinylm.bitlinear`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_weight: Tensor,
        up_weight: Tensor,
        norm_weight: Tensor,
        down_weight: Tensor,
        eps: float,
    ) -> Tensor:
        dtype = matmul_dtype(x)
        work = passes("triton", x, "int8")
        rows = x.reshape(-1, x.shape[-1])  # [M, H]
        with torch.autocast(x.device.type, enabled=False):
            gate_codes, gate_scale = work.ternarize(gate_weight, dtype)
            up_codes, up_scale = work.ternarize(up_weight, dtype)
            down_codes, down_scale = work.ternarize(down_weight, dtype)
            codes = torch.cat((gate_codes, up_codes))  # [2 K, H]
            scales = torch.stack((gate_scale, up_scale, down_scale))
            q, stored, s_in = work.quantize(rows, "int8", dtype, keep=True)
            gate_up = accumulate(q, codes, "int8")  # [M, 2 K]
            s_in = s_in.flatten()
            q, r, s = _kernels().swiglu_norm(gate_up, s_in, scales, norm_weight, eps)
            y = work.rescale(accumulate(q, down_codes, "int8"), down_scale, s[:, None], dtype)
        ctx.save_for_backward(stored, s_in, codes, scales, gate_up, norm_weight, r, s, down_codes)
        ctx.dtype, ctx.x_dtype, ctx.work = dtype, x.dtype, work
        ctx.weight_dtype = gate_weight.dtype
        return y.reshape(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        stored, s_in, codes, scales, gate_up, norm_weight, r, s, down_codes = ctx.saved_tensors
        dtype, wide = ctx.dtype, ctx.weight_dtype
        with torch.autocast(dy.device.type, enabled=False):
            rows = dy.to(dtype).reshape(-1, dy.shape[-1])
            d_gate_up, x_hat, d_norm = _kernels().swiglu_norm_backward(
                rows @ down_codes, gate_up, s_in, scales, norm_weight, r, s
            )
            d_down = (rows.t() @ x_hat).to(wide)
            # The kernel has multiplied with the scales of gate and up already.
            dx = (d_gate_up @ codes).to(ctx.x_dtype).reshape(*dy.shape[:-1], codes.shape[1])
            x_in = ctx.work.dequantize(stored, s_in[:, None], dtype)
            d_gate, d_up = (d_gate_up.t() @ x_in).to(wide).chunk(2)
            d_gate, d_up = d_gate / scales[0], d_up / scales[1]
        return dx, d_gate, d_up, d_norm, d_down, None


class _SwigluNorm(torch.autograd.Function):
    """``norm(silu(gate) * up)`` of [M, 2 K]."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, r, s = _kernels().swiglu_norm(gate_up, None, None, weight, eps)
        ctx.save_for_backward(gate_up, weight, r, s)
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, Tensor, None]:
        gate_up, weight, r, s = ctx.saved_tensors
        d_gate_up, _, d_weight = _kernels().swiglu_norm_backward(
            dx, gate_up, None, None, weight, r, s
        )
        return d_gate_up, d_weight, None


def ternary_feed_forward(
    x: Tensor, gate: Tensor, up: Tensor, norm: Tensor, down: Tensor, eps: float
) -> Tensor:
    """Apply a feed-forward of BitLinear layers with int8 activations.

    Args:
        x: Normed input [..., H].
        gate: float32 [K, H].
        up: float32 [K, H].
        norm: float32 [K].
        down: float32 [H, K].
        eps: The norm's.

    Returns:
        [..., H] in autocast's dtype.
    """
    y: Tensor = _TernaryFeedForward.apply(x, gate, up, norm, down, eps)
    return y


def dense_feed_forward(
    x: Tensor, gate: Tensor, up: Tensor, norm: Tensor, down: Tensor, eps: float
) -> Tensor:
    """Apply a feed-forward of plain layers; see :func:`ternary_feed_forward`."""
    gate_up = F.linear(x, torch.cat((gate, up)))
    normed = _SwigluNorm.apply(gate_up.flatten(0, -2), norm, eps)
    return F.linear(normed, down).unflatten(0, x.shape[:-1])


FeedForwardPass = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]


def fused_feed_forward(layer: nn.Module, x: Tensor) -> FeedForwardPass | None:
    """Return what trains a feed-forward of such layers on x, or None where the kernels don't.

    They serve training under bfloat16 autocast; float16 doesn't hold the sums of int8 codes.

    Args:
        layer: One of its projections.
        x: The input.
    """
    kind = x.device.type
    if not torch.is_grad_enabled() or not torch.is_autocast_enabled(kind):
        return None
    if torch.get_autocast_dtype(kind) != torch.bfloat16:
        return None
    if isinstance(layer, DenseLinear):
        return dense_feed_forward
    if isinstance(layer, BitLinear) and layer.activation == "int8":
        return ternary_feed_forward
    return None
