"""What BitLinear's training pass does around its matrix products, in PyTorch or in Triton.

Both follow :mod:`tinylm.quantization`. PyTorch's operators read and write memory once each, a dozen
times in all; torch.compile fuses them, and so do the kernels of :mod:`tinylm.triton_quantizers`
where nothing is compiled.
"""

from __future__ import annotations

import os
from typing import Protocol

import torch
from torch import Tensor

from tinylm.config import Activation
from tinylm.errors import ConfigError
from tinylm.quantization import quantize_activation, storage_dtype, ternarize


class QuantizerPasses(Protocol):
    """The passes over memory of one BitLinear."""

    def ternarize(self, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return codes [N, K] of ``dtype`` and their scale, a float32 scalar."""

    def quantize(
        self, x: Tensor, activation: Activation, dtype: torch.dtype, *, keep: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return q [..., K] in ``dtype``, q in one byte, and s, float32 [..., 1].

        The second is for a backward pass: None unless ``keep``.
        """

    def rescale(
        self, values: Tensor, scale: Tensor, s: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Return ``values * scale / s`` in ``dtype``, rounded once; ``values`` may be overwritten.

        ``scale`` is a float32 scalar or [N]; without ``s`` nothing is divided.
        """

    def dequantize(self, q: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``q / s`` [..., K] in ``dtype``."""


class TorchPasses:
    """PyTorch's operators: any device, and what torch.compile fuses."""

    def ternarize(self, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See :class:`QuantizerPasses`."""
        codes, scale = ternarize(weight)
        return codes.to(dtype), scale

    def quantize(
        self, x: Tensor, activation: Activation, dtype: torch.dtype, *, keep: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """See :class:`QuantizerPasses`."""
        q, s = quantize_activation(x, activation)
        return q.to(dtype), q.to(storage_dtype(activation)) if keep else None, s

    def rescale(
        self, values: Tensor, scale: Tensor, s: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """See :class:`QuantizerPasses`; in float32, or in float64 where that is wanted."""
        wide = values.to(torch.promote_types(dtype, torch.float32)).mul_(scale)
        return (wide if s is None else wide.div_(s)).to(dtype)

    def dequantize(self, q: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
        """See :class:`QuantizerPasses`."""
        return (q.float() / s).to(dtype)


TORCH_PASSES = TorchPasses()


def passes(quantizers: str, x: Tensor, activation: Activation) -> QuantizerPasses:
    """Return who does the passes over x: Triton if it was chosen and serves x.

    Args:
        quantizers: ``"torch"`` or ``"triton"``, see :func:`choose_quantizers`.
        x: The activations.
        activation: Their number format.
    """
    # What is compiled is fused by the compiler, together with what lies before and behind.
    if quantizers != "triton" or activation != "int8" or torch.compiler.is_compiling():
        return TORCH_PASSES
    if not torch.is_autocast_enabled(x.device.type):
        return TORCH_PASSES  # float32 training is for exactness, not for speed
    from tinylm.triton_quantizers import TRITON_PASSES

    return TRITON_PASSES


def choose_quantizers(name: str, device: torch.device) -> str:
    """Turn ``auto`` into ``triton`` on a GPU that has it, else into ``torch``.

    Args:
        name: One of :data:`tinylm.training_config.QUANTIZERS`.
        device: Of the model.

    Raises:
        ConfigError: Triton was asked for and can't run here.
    """
    if name == "torch":
        return name
    problem = _why_no_triton(device)
    if problem is None:
        return "triton"
    if name == "triton":
        raise ConfigError(f"quantizers triton: {problem}. Pass --quantizers torch.")
    return "torch"


def _why_no_triton(device: torch.device) -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return f"expected a CUDA device, found {device.type}"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"the package triton is missing ({error})"
    return None
