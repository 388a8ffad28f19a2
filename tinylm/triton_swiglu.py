"""SwiGLU, its RMSNorm and the quantiser behind it as one Triton kernel each way.

These are the widest activations of a layer and the longest chain on them. The forward kernel reads
gate and up once and writes what the down projection multiplies; the backward kernel computes the
rest again from gate and up and writes their gradients. The forward one rounds where
:class:`tinylm.model.FeedForward` does under autocast, but sums in another order; gradients are
rounded once where autocast does so after each operation.

With M tokens of width K, ``gate_up`` is [M, 2 K]: gate, then up. With ``scales`` (float32 [3]: of
gate, up and the gradient) it holds a ternary layer's sums, which ``scales[0 or 1] / s_in`` turns
into activations, and what is written are int8 codes; without, all are plain activations.
"""

# mypy reads the bodies of kernels as Python, which they are not.
# mypy: disallow_untyped_defs=False, disable-error-code="no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinylm.triton_quantizers import _INT8_MAX, _MIN_SCALE, _round_and_clamp

_PROGRAMS_PER_SM = 4
_CPU_PROGRAMS = 3  # in the interpreter: fewer than rows, so that programs take several


@triton.jit
def _load(gate_up, s_in, scales, row, column, width, QUANTIZED: tl.constexpr):  # noqa: N803
    """Return a row of gate and up, rounded as the layers before round them."""
    dtype = gate_up.dtype.element_ty
    inside = column < width
    at = row * 2 * width + column
    gate = tl.load(gate_up + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + width, mask=inside, other=0.0).to(tl.float32)
    if QUANTIZED:
        s = tl.load(s_in + row)
        gate = (gate * tl.div_rn(tl.load(scales), s)).to(dtype).to(tl.float32)
        up = (up * tl.div_rn(tl.load(scales + 1), s)).to(dtype).to(tl.float32)
    return gate, up


@triton.jit
def _gated(gate, up, dtype: tl.constexpr):
    """Return ``silu(gate) * up`` with both roundings, and the sigmoid."""
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = (gate * sigmoid).to(dtype).to(tl.float32)
    return (silu * up).to(dtype).to(tl.float32), sigmoid


@triton.jit
def _forward(
    gate_up,
    s_in,
    scales,
    weight,
    out,
    r,
    s,
    rows,
    width,
    eps,
    QUANTIZED: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Some rows a program: activations, or int8 codes and their multiplier s; and r of the norm."""
    dtype = gate_up.dtype.element_ty
    column = tl.arange(0, BLOCK)
    inside = column < width
    w = tl.load(weight + column, mask=inside, other=0.0)
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.zeros([], dtype=tl.int64) + index
        gate, up = _load(gate_up, s_in, scales, row, column, width, QUANTIZED)
        hidden, _ = _gated(gate, up, dtype)
        mean = tl.sum(hidden * hidden, axis=0) / width
        factor = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
        x = (hidden * factor * w).to(dtype).to(tl.float32)
        tl.store(r + row, factor)
        if QUANTIZED:
            absmax = tl.maximum(tl.max(tl.abs(x), axis=0), _MIN_SCALE)
            multiplier = tl.div_rn(tl.full([], _INT8_MAX, tl.float32), absmax)
            x = _round_and_clamp(x * multiplier, -128.0, 127.0)
            tl.store(s + row, multiplier)
        tl.store(out + row * width + column, x.to(dtype), mask=inside)


@triton.jit
def _backward(
    d_out,
    gate_up,
    s_in,
    scales,
    weight,
    r,
    s,
    d_gate_up,
    x_hat,
    partial,
    rows,
    width,
    QUANTIZED: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Some rows a program: gradients, ``codes / s``, and a sum for the norm's weight a program."""
    dtype = gate_up.dtype.element_ty
    column = tl.arange(0, BLOCK)
    inside = column < width
    w = tl.load(weight + column, mask=inside, other=0.0)
    d_weight = tl.zeros([BLOCK], dtype=tl.float32)
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.zeros([], dtype=tl.int64) + index
        gate, up = _load(gate_up, s_in, scales, row, column, width, QUANTIZED)
        hidden, sigmoid = _gated(gate, up, dtype)
        d = tl.load(d_out + row * width + column, mask=inside, other=0.0).to(tl.float32)
        if QUANTIZED:
            d = d * tl.load(scales + 2)
        factor = tl.load(r + row)
        normed = hidden * factor
        d_weight += d * normed
        weighted = d * w
        mean = tl.sum(weighted * normed, axis=0) / width
        d_hidden = factor * (weighted - normed * mean)
        d_up = d_hidden * (gate * sigmoid)
        d_gate = d_hidden * up * (sigmoid * (1.0 + gate * (1.0 - sigmoid)))
        if QUANTIZED:
            d_gate = d_gate * tl.load(scales)
            d_up = d_up * tl.load(scales + 1)
            multiplier = tl.load(s + row)
            x = (normed * w).to(dtype).to(tl.float32)
            code = _round_and_clamp(x * multiplier, -128.0, 127.0)
            x = code * tl.div_rn(1.0, multiplier)
            tl.store(x_hat + row * width + column, x.to(dtype), mask=inside)
        at = row * 2 * width + column
        tl.store(d_gate_up + at, d_gate.to(dtype), mask=inside)
        tl.store(d_gate_up + at + width, d_up.to(dtype), mask=inside)
    tl.store(partial + tl.program_id(0) * width + column, d_weight, mask=inside)


def _num_programs(x: Tensor) -> int:
    if x.device.type != "cuda":
        return min(len(x), _CPU_PROGRAMS)
    properties = torch.cuda.get_device_properties(x.device)
    return min(len(x), _PROGRAMS_PER_SM * properties.multi_processor_count)


def _options(width: int) -> dict[str, int | bool]:
    block = triton.next_power_of_2(width)
    # 8 elements a thread; a product that is rounded must not be fused with the sum behind it.
    return {
        "BLOCK": block,
        "num_warps": max(1, min(16, block // 256)),
        "enable_fp_fusion": False,
    }


@torch.library.custom_op("tinylm::swiglu_norm", mutates_args=())
def swiglu_norm(
    gate_up: Tensor, s_in: Tensor | None, scales: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``norm(silu(gate) * up)`` [M, K], or its int8 codes, both in ``gate_up``'s dtype.

    Args:
        gate_up: float16 or bfloat16 [M, 2 K].
        s_in: float32 [M], the multiplier of the input that ``gate_up`` are sums of, or None.
        scales: float32 [3], or None; see the module's head.
        weight: float32 [K], the norm's.
        eps: The norm's.

    Returns:
        The result [M, K]; r, float32 [M], of the norm; s, float32 [M], of the codes, or empty.
    """
    rows, width = len(gate_up), weight.numel()
    out, r, s = _outputs(gate_up, weight, scales)
    if rows:
        _forward[(_num_programs(gate_up),)](
            gate_up.contiguous(),
            r if s_in is None else s_in,
            r if scales is None else scales,
            weight,
            out,
            r,
            s,
            rows,
            width,
            eps,
            QUANTIZED=scales is not None,
            **_options(width),
        )
    return out, r, s


@swiglu_norm.register_fake
def _(
    gate_up: Tensor, s_in: Tensor | None, scales: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(gate_up, weight, scales)


def _outputs(
    gate_up: Tensor, weight: Tensor, scales: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = gate_up.shape[0], weight.numel()
    r = gate_up.new_empty(rows, dtype=torch.float32)
    s = gate_up.new_empty(0 if scales is None else rows, dtype=torch.float32)
    return gate_up.new_empty(rows, width), r, s


@torch.library.custom_op("tinylm::swiglu_norm_backward", mutates_args=())
def swiglu_norm_backward(
    d_out: Tensor,
    gate_up: Tensor,
    s_in: Tensor | None,
    scales: Tensor | None,
    weight: Tensor,
    r: Tensor,
    s: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of :func:`swiglu_norm`'s ``gate_up`` and ``weight``, and ``codes / s``.

    The quantiser's gradient is the identity. With ``scales``, ``d_out`` is still to be multiplied
    with ``scales[2]``, and the gradients of gate and up come multiplied with ``scales[:2]``, as
    the product with the codes of both takes them.

    Args:
        d_out: [M, K] in ``gate_up``'s dtype.
        gate_up: As in the forward pass.
        s_in: As in the forward pass.
        scales: As in the forward pass.
        weight: As in the forward pass.
        r: What the forward pass returned.
        s: What the forward pass returned.

    Returns:
        d_gate_up [M, 2 K]; ``codes / s`` [M, K], empty without ``scales``; d_weight, float32 [K].
    """
    rows, width = len(gate_up), weight.numel()
    d_gate_up, x_hat = _gradients(gate_up, weight, scales)
    if not rows:
        return d_gate_up, x_hat, torch.zeros_like(weight)
    programs = _num_programs(gate_up)
    partial = weight.new_empty(programs, width)
    _backward[(programs,)](
        d_out.contiguous(),
        gate_up.contiguous(),
        r if s_in is None else s_in,
        r if scales is None else scales,
        weight,
        r,
        s,
        d_gate_up,
        x_hat,
        partial,
        rows,
        width,
        QUANTIZED=scales is not None,
        **_options(width),
    )
    return d_gate_up, x_hat, partial.sum(dim=0)


@swiglu_norm_backward.register_fake
def _(
    d_out: Tensor,
    gate_up: Tensor,
    s_in: Tensor | None,
    scales: Tensor | None,
    weight: Tensor,
    r: Tensor,
    s: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return *_gradients(gate_up, weight, scales), torch.empty_like(weight)


def _gradients(gate_up: Tensor, weight: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor]:
    rows, width = gate_up.shape[0], weight.numel()
    x_hat = gate_up.new_empty(0) if scales is None else gate_up.new_empty(rows, width)
    return gate_up.new_empty(gate_up.shape), x_hat
