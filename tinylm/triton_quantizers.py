"""BitLinear's quantisers as Triton kernels: each reads its input once and writes its results once.

Every operation is the one of :mod:`tinylm.quantization`, rounding by rounding, so the codes are
equal in every bit. That needs division as IEEE has it (``div_rn``) and no fused multiply-add
between a product and the rounding behind it (``enable_fp_fusion=False``).
"""

# mypy reads the bodies of kernels as Python, which they are not.
# mypy: disallow_untyped_defs=False, disable-error-code="no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinylm.config import Activation
from tinylm.quantization import INT8_MAX, MIN_SCALE

_BLOCK = 4096
_MAX_PARTIALS = 256  # programs that add up a weight's magnitudes
_TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 * 2**23: float32 has no fraction from there on
_MIN_SCALE = tl.constexpr(MIN_SCALE)
_INT8_MAX = tl.constexpr(INT8_MAX)


@triton.jit
def _round_and_clamp(x, low: tl.constexpr, high: tl.constexpr):
    """Round half to even; keep NaN, which minimum and maximum would lose."""
    rounded = (x + _TO_INTEGER) - _TO_INTEGER
    clamped = tl.minimum(tl.maximum(rounded, low), high)
    return tl.where(x != x, x, clamped)


@triton.jit
def _sum_magnitudes(weight, partial, numel, BLOCK: tl.constexpr):  # noqa: N803
    """One float64 sum a program: ``partial[program]``."""
    total = tl.zeros([BLOCK], dtype=tl.float64)
    first = tl.program_id(0) * BLOCK
    for start in range(first, numel, tl.num_programs(0) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = tl.load(weight + at, mask=at < numel, other=0.0)
        total += tl.abs(values.to(tl.float32)).to(tl.float64)
    tl.store(partial + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def _ternarize(weight, partial, codes, scale, numel, PARTIALS: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    """``codes = clamp(round(W / scale), -1, 1)``, every program with the same scale."""
    total = tl.sum(tl.load(partial + tl.arange(0, PARTIALS)), axis=0)
    mean = (total / tl.cast(numel, tl.float64)).to(tl.float32)
    mean = tl.where(mean != mean, mean, tl.maximum(mean, _MIN_SCALE))
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    values = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    code = _round_and_clamp(tl.div_rn(values, mean), -1.0, 1.0)
    tl.store(codes + at, code.to(codes.dtype.element_ty), mask=inside)
    if tl.program_id(0) == 0:
        tl.store(scale, mean)


@triton.jit
def _quantize(x, q, stored, s, width, KEEP: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    """One row a program: absmax, then ``round(x * 127 / absmax)`` in one or two dtypes."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = row * width + column
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    absmax = tl.maximum(tl.max(tl.abs(values), axis=0), _MIN_SCALE)
    factor = tl.div_rn(tl.full([], _INT8_MAX, tl.float32), absmax)
    code = _round_and_clamp(values * factor, -128.0, 127.0)
    tl.store(q + at, code.to(q.dtype.element_ty), mask=inside)
    if KEEP:
        tl.store(stored + at, code.to(tl.int8), mask=inside)
    tl.store(s + row, factor)


@triton.jit
def _rescale(values, scale, s, out, width, HAS_S: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    """One row a program: ``values * scale / s`` with one scale for all."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = row * width + column
    result = tl.load(values + at, mask=inside, other=0.0).to(tl.float32) * tl.load(scale)
    if HAS_S:
        result = tl.div_rn(result, tl.load(s + row))
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _dequantize(stored, s, out, width, BLOCK: tl.constexpr):  # noqa: N803
    """One row a program: ``q / s``."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = row * width + column
    values = tl.load(stored + at, mask=inside, other=0).to(tl.float32)
    result = tl.div_rn(values, tl.load(s + row))
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


def _row_options(width: int) -> dict[str, int | bool]:
    block = triton.next_power_of_2(width)
    warps = 4 if block <= 2048 else 8
    return {"BLOCK": block, "num_warps": warps, "enable_fp_fusion": False}


class TritonPasses:
    """See :class:`tinylm.quantizer_passes.QuantizerPasses`."""

    def ternarize(self, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Two kernels: the sum of the magnitudes in float64, then the codes."""
        weight = weight.contiguous()
        numel = weight.numel()
        blocks = triton.cdiv(numel, _BLOCK)
        partials = min(_MAX_PARTIALS, triton.next_power_of_2(blocks))
        partial = torch.empty(partials, dtype=torch.float64, device=weight.device)
        codes = torch.empty_like(weight, dtype=dtype)
        scale = torch.empty((), dtype=torch.float32, device=weight.device)
        _sum_magnitudes[(partials,)](weight, partial, numel, BLOCK=_BLOCK)
        _ternarize[(blocks,)](
            weight,
            partial,
            codes,
            scale,
            numel,
            PARTIALS=partials,
            BLOCK=_BLOCK,
            enable_fp_fusion=False,
        )
        return codes, scale

    def quantize(
        self, x: Tensor, activation: Activation, dtype: torch.dtype, *, keep: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """One kernel."""
        x = x.contiguous()
        width = x.shape[-1]
        rows = x.numel() // width
        q = torch.empty_like(x, dtype=dtype)
        stored = torch.empty_like(x, dtype=torch.int8) if keep else None
        s = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
        if rows:
            _quantize[(rows,)](x, q, stored, s, width, KEEP=keep, **_row_options(width))
        return q, stored, s

    def rescale(
        self, values: Tensor, scale: Tensor, s: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """One kernel, in place where the dtype stays."""
        values = values.contiguous()
        width = values.shape[-1]
        rows = values.numel() // width
        out = values if values.dtype == dtype else torch.empty_like(values, dtype=dtype)
        if rows:
            _rescale[(rows,)](
                values,
                scale,
                s,
                out,
                width,
                HAS_S=s is not None,
                **_row_options(width),
            )
        return out

    def dequantize(self, q: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
        """One kernel."""
        width = q.shape[-1]
        out = torch.empty_like(q, dtype=dtype)
        if q.numel():
            _dequantize[(q.numel() // width,)](q, s, out, width, **_row_options(width))
        return out


TRITON_PASSES = TritonPasses()
