"""Why float32 inference carries some sums in float64.

An int8 quantiser turns a difference of one float32 rounding into a whole step wherever a value
lies near the middle between two steps, and the layers behind it multiply such steps: two correct
float32 implementations of the same network differ by 1e-2 in the logits. So in float32 inference
everything between two quantisers that depends on the order of summation or on a library's exp,
sin or cos is computed in float64 and rounded to float32 once. Then PyTorch, ONNX Runtime and the
native kernels agree in every bit but about one in 1e8, and the quantised activations agree too.

Training, autocast and half precision use the ordinary, faster float32 arithmetic.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

_wide_inference = True


@contextlib.contextmanager
def ordinary_float32() -> Iterator[None]:
    """Use ordinary float32 arithmetic in inference too, to measure what the wide one is worth."""
    global _wide_inference
    _wide_inference = False
    try:
        yield
    finally:
        _wide_inference = True


def matmul_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of a product with x: autocast's if it is on, else float32 or wider."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return torch.promote_types(x.dtype, torch.float32)


def inner_dtype(x: Tensor, *, training: bool) -> torch.dtype:
    """Return the dtype for sums and transcendental functions on x: float64 in float32 inference.

    Args:
        x: The activations.
        training: Whether the module is in training mode.
    """
    kind = x.device.type
    wide = _wide_inference and not training and x.dtype == torch.float32
    if not wide or torch.is_autocast_enabled(kind) or kind == "mps":  # mps has no float64
        return torch.float32
    return torch.float64
