"""BitNet b1.58 numerics: the one definition that every backend is held to.

Source: microsoft/unilm, *The Era of 1-bit LLMs: Training Tips, Code and FAQ*; weights by absmean,
activations by per-token absmax. Rounding is half to even everywhere.

The sum ``q . code`` is exact in both formats, whatever the order of summation. For int8 it is an
integer below 2**24 for K up to 131072, which float32 holds. For fp8_e4m3 the values are split into
two parts whose sums float32 holds too (:func:`accumulate`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tinylm.config import ACTIVATIONS
from tinylm.errors import CheckpointError, ConfigError

MIN_SCALE = 1e-5
INT8_MAX = 127.0
FP8_MAX = 448.0  # largest finite float8_e4m3fn
_ROWS_AT_ONCE = 4096
MAX_EXACT_K = 2**24 // 448  # K up to which float32 holds every sum, in both formats


def ternarize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a weight matrix to ternary codes and one scale (absmean).

    Args:
        weight: Floating point [N, K].

    Returns:
        codes: float32 [N, K] holding exactly -1, 0 or 1.
        scale: float32 scalar, ``max(mean(|W|), 1e-5)``; ``codes * scale`` approximates ``weight``.
    """
    weight = weight.float()
    scale = scale_of_sum(abs_sum(weight), weight.numel())
    return ternary_codes(weight, scale), scale


def abs_sum(weight: Tensor, dim: tuple[int, ...] | None = None) -> Tensor:
    """Return ``sum(|W|)`` over ``dim`` or all; of a float32 weight in float64.

    A float32 sum depends on the number of threads, and with it the scale and codes near 1/2.
    """
    inner = torch.float32 if weight.device.type == "mps" else torch.float64
    return torch.linalg.vector_norm(weight, ord=1, dim=dim, dtype=inner)


def scale_of_sum(total: Tensor, count: int) -> Tensor:
    """Return the weight scale, float32: ``max(total / count, 1e-5)`` for ``count`` weights."""
    return (total / count).float().clamp_min(MIN_SCALE)


def ternary_codes(weight: Tensor, scale: Tensor) -> Tensor:
    """Return the codes of a float32 weight, or of a part of it, under a scale: -1, 0 or 1."""
    return (weight / scale).round_().clamp_(-1.0, 1.0)


def master_weight(codes: Tensor, scale: Tensor, name: str = "weight") -> Tensor:
    """Return a weight matrix that :func:`ternarize` turns into these codes and this scale.

    Every nonzero weight gets the magnitude that makes the mean the scale; what the rounding of
    that magnitude leaves over goes into one of them.

    Args:
        codes: [N, K] holding -1, 0 or 1.
        scale: float32 scalar, mean |W|.
        name: For the message.

    Returns:
        float32 [N, K]. All codes 0 give zeros, whose scale does not matter.

    Raises:
        CheckpointError: A code is not ternary, or the scale is below 1e-5 or not finite.
    """
    codes, scale = codes.float(), scale.float()
    if not bool(((codes == 0) | (codes.abs() == 1)).all()):
        raise CheckpointError(f"{name}: expected codes -1, 0 or 1, found another value.")
    if not bool(scale.isfinite()) or float(scale) < MIN_SCALE:
        raise CheckpointError(
            f"{name}: expected a scale of {MIN_SCALE} or more, found {float(scale)}."
        )
    num_nonzero = int(codes.count_nonzero())
    if num_nonzero == 0:
        return torch.zeros_like(codes)
    total = scale.double() * codes.numel()
    weight = codes * (total / num_nonzero).float()
    rest = total - torch.linalg.vector_norm(weight, ord=1, dtype=torch.float64)
    row, column = codes.nonzero()[0].tolist()
    weight[row, column] += (rest * codes[row, column]).float()
    return weight


def quantize_activation(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Quantise activations per token (absmax over the last dimension).

    int8: ``s = 127 / max(|x|max, 1e-5)``, ``q = clamp(round(x * s), -128, 127)``.
    fp8_e4m3: ``s = 448 / max(|x|max, 1e-5)``, ``q = e4m3(x * s)``.

    Args:
        x: Floating point [..., K].
        activation: ``"int8"`` or ``"fp8_e4m3"``.

    Returns:
        q: float32 [..., K] holding values that int8 or float8_e4m3fn represents exactly.
        s: float32 [..., 1], the multiplier; ``q / s`` approximates ``x``.

    Raises:
        ConfigError: Unknown activation format.
    """
    x = x.float()
    absmax = x.abs().amax(dim=-1, keepdim=True).clamp_min(MIN_SCALE)  # [..., 1]
    if activation == "int8":
        s = torch.full_like(absmax, INT8_MAX).div_(absmax)  # 127 / tensor would round twice
        return (x * s).round_().clamp_(-128.0, INT8_MAX), s
    if activation == "fp8_e4m3":
        s = torch.full_like(absmax, FP8_MAX).div_(absmax)
        # The product may round to just above 448, which float8_e4m3fn would turn into NaN.
        q = (x * s).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        return q.float(), s
    raise ConfigError(f"activation must be one of {', '.join(ACTIVATIONS)}, found {activation!r}.")


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a weight matrix to int8 with one scale a row (absmax), for :class:`Int8Linear`.

    ``scale_n = max(|W_n|max, 1e-5) / 127``, ``code = clamp(round(W_n / scale_n), -127, 127)``.

    Args:
        weight: Floating point [N, K].

    Returns:
        codes: int8 [N, K]; -128 does not occur.
        scale: float32 [N]; ``codes * scale[:, None]`` approximates ``weight``.
    """
    weight = weight.float()
    absmax = weight.abs().amax(dim=1).clamp_min(MIN_SCALE)  # [N]
    scale = absmax.div(torch.full_like(absmax, INT8_MAX))  # tensor / 127 may round twice
    codes = (weight / scale[:, None]).round_().clamp_(-INT8_MAX, INT8_MAX)
    return codes.to(torch.int8), scale


def accumulate_int8(q: Tensor, codes: Tensor) -> Tensor:
    """Compute ``q . code`` for int8 codes, exactly.

    float32 holds such sums only up to 2**24, which K = 1024 may reach; float64 holds all.

    Args:
        q: int8 values in float32 [..., K].
        codes: int8 [N, K], K at most 65536, so that int32 holds every sum.

    Returns:
        int32 [..., N].
    """
    wide = q.double()
    parts = [
        F.linear(wide, rows.double()).to(torch.int32)  # not all of codes at once in float64
        for rows in codes.split(_ROWS_AT_ONCE)
    ]
    return torch.cat(parts, dim=-1)


def storage_dtype(activation: str) -> torch.dtype:
    """Return the dtype that holds quantised activations without loss."""
    return torch.int8 if activation == "int8" else torch.float8_e4m3fn


def accumulate(q: Tensor, codes: Tensor, activation: str) -> Tensor:
    """Compute ``q . code``, exactly where the dtype is float32.

    Every float8_e4m3fn value is an integer of at most 448 plus a multiple of 2**-9 of at most 1/2.
    The sums of either part are exact in float32 for K up to 37449, so that adding the two rounds
    once: the result is the exact sum rounded to float32.

    Args:
        q: Quantised activations [..., K] in float32, or in a dtype that holds them without loss.
        codes: Ternary codes [N, K] in the same dtype.
        activation: ``"int8"`` or ``"fp8_e4m3"``.

    Returns:
        [..., N] in the dtype of ``q``.
    """
    if activation == "fp8_e4m3" and q.dtype == torch.float32:
        whole = q.round()
        return F.linear(whole, codes) + F.linear(q - whole, codes)
    return F.linear(q, codes)


def dequantize(accumulator: Tensor, weight_scale: Tensor, s: Tensor) -> Tensor:
    """Turn ``q . code`` into the layer's output: ``accumulator * weight_scale / s``.

    Args:
        accumulator: [..., N].
        weight_scale: float32 scalar or [N].
        s: float32 [..., 1], the activation multiplier.

    Returns:
        [..., N] in float32, or in the accumulator's dtype where that is wider.
    """
    return accumulator * weight_scale / s
