"""SwiGLU, its RMSNorm and the quantiser behind it as one Triton kernel each way.

These are the widest activations of a layer and the longest chain on them. The forward kernel reads
gate and up once and writes what the down projection multiplies; the backward kernel computes the
rest again from gate and up and writes their gradients. In between all is float32, where
:class:`tinylm.model.FeedForward` rounds to bfloat16 after each operation under autocast.

With M tokens of width K, ``gate_up`` is [M, 2 K]: gate, then up. With ``scales`` (float32 [3]: of
gate, up and the gradient) it holds a ternary layer's sums, which ``scales[0 or 1] / s_in`` turns
into activations, and what is written are int8 codes; without, all are plain activations.

A row is two blocks, each a power of two wide, because one such block would be half empty: 2816
columns are 2048 and 1024, not 4096. A program goes through many rows, and where arithmetic and not
memory is the limit, as here, what counts is instructions an element.
"""

# mypy reads the bodies of kernels as Python, which they are not.
# mypy: disallow_untyped_defs=False, disable-error-code="no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinylm.triton_quantizers import _INT8_MAX, _MIN_SCALE, _TO_INTEGER

_PROGRAMS_PER_SM = 4
_CPU_PROGRAMS = 3  # in the interpreter: fewer than rows, so that programs take several


@triton.jit
def _block(weight, width, START: tl.constexpr, SIZE: tl.constexpr):  # noqa: N803
    """Return a block's columns, which of them there are, and the norm's weights."""
    column = START + tl.arange(0, SIZE)
    inside = column < width
    return column, inside, tl.load(weight + column, mask=inside, other=0.0)


@triton.jit
def _gated(gate_up, row, column, inside, width, gate_scale, up_scale):
    """Return gate and up of a row in float32, the gate's sigmoid, and ``silu(gate) * up``."""
    at = row * 2 * width + column
    gate = tl.load(gate_up + at, mask=inside, other=0.0).to(tl.float32) * gate_scale
    up = tl.load(gate_up + at + width, mask=inside, other=0.0).to(tl.float32) * up_scale
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    return gate, up, sigmoid, gate * sigmoid * up


@triton.jit
def _factors(s_in, scales, row, QUANTIZED: tl.constexpr):  # noqa: N803
    """Return what turns the sums of a row's gate and up into activations."""
    if QUANTIZED:
        s = tl.load(s_in + row)
        gate_scale, up_scale = tl.load(scales) / s, tl.load(scales + 1) / s
    else:
        gate_scale, up_scale = 1.0, 1.0
    return gate_scale, up_scale


@triton.jit
def _code(x, multiplier):
    """Return ``round(x * multiplier)``, half to even, in float32.

    It needs no clamp: ``multiplier`` is at most ``127 / max(abs(x))``, and NaN stays NaN.
    """
    return tl.fma(x, multiplier, _TO_INTEGER) - _TO_INTEGER


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
    FIRST: tl.constexpr,  # noqa: N803
    SECOND: tl.constexpr,  # noqa: N803
):
    """Some rows a program: activations, or int8 codes and their multiplier s; and r of the norm."""
    dtype = out.dtype.element_ty
    a, in_a, w_a = _block(weight, width, 0, FIRST)
    b, in_b, w_b = _block(weight, width, FIRST, SECOND)
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.zeros([], dtype=tl.int64) + index
        gate_scale, up_scale = _factors(s_in, scales, row, QUANTIZED)
        _, _, _, h_a = _gated(gate_up, row, a, in_a, width, gate_scale, up_scale)
        _, _, _, h_b = _gated(gate_up, row, b, in_b, width, gate_scale, up_scale)
        mean = (tl.sum(h_a * h_a, axis=0) + tl.sum(h_b * h_b, axis=0)) / width
        factor = 1.0 / tl.sqrt(mean + eps)
        x_a, x_b = h_a * factor * w_a, h_b * factor * w_b
        tl.store(r + row, factor)
        if QUANTIZED:
            absmax = tl.maximum(tl.max(tl.abs(x_a), axis=0), tl.max(tl.abs(x_b), axis=0))
            multiplier = _INT8_MAX / tl.maximum(absmax, _MIN_SCALE)
            x_a, x_b = _code(x_a, multiplier), _code(x_b, multiplier)
            tl.store(s + row, multiplier)
        tl.store(out + row * width + a, x_a.to(dtype), mask=in_a)
        tl.store(out + row * width + b, x_b.to(dtype), mask=in_b)


@triton.jit
def _store_gradients(
    d_gate_up,
    x_hat,
    row,
    column,
    inside,
    width,
    gate,
    up,
    sigmoid,
    normed,
    weighted,
    w,
    factor,
    mean,
    multiplier,
    gate_scale,
    up_scale,
    QUANTIZED: tl.constexpr,  # noqa: N803
):
    """Write a block's gradients, and ``codes / s``."""
    dtype = d_gate_up.dtype.element_ty
    d_hidden = factor * (weighted - normed * mean)
    scaled = d_hidden * sigmoid
    d_up = scaled * gate
    d_gate = scaled * up * (1.0 + gate * (1.0 - sigmoid))
    if QUANTIZED:
        d_gate, d_up = d_gate * gate_scale, d_up * up_scale
        x = _code(normed * w, multiplier) * (1.0 / multiplier)
        tl.store(x_hat + row * width + column, x.to(dtype), mask=inside)
    at = row * 2 * width + column
    tl.store(d_gate_up + at, d_gate.to(dtype), mask=inside)
    tl.store(d_gate_up + at + width, d_up.to(dtype), mask=inside)


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
    FIRST: tl.constexpr,  # noqa: N803
    SECOND: tl.constexpr,  # noqa: N803
):
    """Some rows a program: gradients, ``codes / s``, and a sum for the norm's weight a program."""
    a, in_a, w_a = _block(weight, width, 0, FIRST)
    b, in_b, w_b = _block(weight, width, FIRST, SECOND)
    sum_a = tl.zeros([FIRST], dtype=tl.float32)
    sum_b = tl.zeros([SECOND], dtype=tl.float32)
    d_scale, d_gate_scale, d_up_scale = 1.0, 1.0, 1.0
    if QUANTIZED:
        d_gate_scale, d_up_scale = tl.load(scales), tl.load(scales + 1)
        d_scale = tl.load(scales + 2)
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.zeros([], dtype=tl.int64) + index
        gate_scale, up_scale = _factors(s_in, scales, row, QUANTIZED)
        g_a, u_a, o_a, h_a = _gated(gate_up, row, a, in_a, width, gate_scale, up_scale)
        g_b, u_b, o_b, h_b = _gated(gate_up, row, b, in_b, width, gate_scale, up_scale)
        d_a = tl.load(d_out + row * width + a, mask=in_a, other=0.0).to(tl.float32) * d_scale
        d_b = tl.load(d_out + row * width + b, mask=in_b, other=0.0).to(tl.float32) * d_scale
        factor = tl.load(r + row)
        multiplier = factor
        if QUANTIZED:
            multiplier = tl.load(s + row)
        n_a, n_b = h_a * factor, h_b * factor
        sum_a += d_a * n_a
        sum_b += d_b * n_b
        d_a, d_b = d_a * w_a, d_b * w_b
        mean = (tl.sum(d_a * n_a, axis=0) + tl.sum(d_b * n_b, axis=0)) / width
        _store_gradients(
            d_gate_up, x_hat, row, a, in_a, width, g_a, u_a, o_a, n_a, d_a, w_a,
            factor, mean, multiplier, d_gate_scale, d_up_scale, QUANTIZED,
        )  # fmt: skip
        _store_gradients(
            d_gate_up, x_hat, row, b, in_b, width, g_b, u_b, o_b, n_b, d_b, w_b,
            factor, mean, multiplier, d_gate_scale, d_up_scale, QUANTIZED,
        )  # fmt: skip
    tl.store(partial + tl.program_id(0) * width + a, sum_a, mask=in_a)
    tl.store(partial + tl.program_id(0) * width + b, sum_b, mask=in_b)


def _num_programs(x: Tensor) -> int:
    if x.device.type != "cuda":
        return min(len(x), _CPU_PROGRAMS)
    properties = torch.cuda.get_device_properties(x.device)
    return min(len(x), _PROGRAMS_PER_SM * properties.multi_processor_count)


def _options(width: int) -> dict[str, int | bool]:
    """Return the two blocks, the second as small as it can be, and the warps."""
    first = max(16, triton.next_power_of_2(width // 2 + 1))
    second = max(16, triton.next_power_of_2(max(1, width - first)))
    most = 8 if first <= 4096 else 16  # wider rows would spill
    return {
        "FIRST": first,
        "SECOND": second,
        "num_warps": max(1, min(most, first // 256)),
        "enable_fp_fusion": True,  # Triton's default is about to change
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
            s_in,
            scales,
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
