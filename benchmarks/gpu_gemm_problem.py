"""Random data for one GEMM shape on a GPU, and the float64 answers that contenders are held to."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

EPS = 1e-5
_MAXIMUM = {"int8": 127.0, "fp8_e4m3": 448.0}


class GpuGemmProblem:
    """Random data of one shape, for up to ``num_rows`` rows; fewer rows take the first ones.

    Nothing is shared with the code under test: norm, quantisers and product are written out here.

    Args:
        num_outputs: N.
        num_inputs: K.
        num_rows: M.
        device: Where it lies.

    Attributes:
        x: bfloat16 [M, K]; magnitudes vary by row, so that each row has its own scale.
        norm_weight: float32 [K].
        codes: int8 [N, K], ternary.
        scale: The weights' scale.
    """

    def __init__(
        self, num_outputs: int, num_inputs: int, num_rows: int, device: str = "cuda"
    ) -> None:
        generator = torch.Generator(device).manual_seed(num_outputs + num_inputs)
        options: dict[str, Any] = {"generator": generator, "device": device}
        x = torch.randn(num_rows, num_inputs, **options)
        sizes = torch.rand(num_rows, 1, **options) + 0.01
        self.x = (x * sizes).bfloat16()
        self.norm_weight = torch.rand(num_inputs, **options) + 0.5
        shape = (num_outputs, num_inputs)
        self.codes = torch.randint(-1, 2, shape, dtype=torch.int8, **options)
        self.scale = float(torch.tensor(num_inputs**-0.5))

    @functools.cached_property
    def dense(self) -> Tensor:
        """The weights as bfloat16 [N, K]."""
        return (self.codes.float() * self.scale).bfloat16()

    @functools.cached_property
    def normed(self) -> Tensor:
        """RMSNorm of x, float32 [M, K]: a float64 mean, else rounded to float32 step by step."""
        mean = self.x.double().square().mean(dim=1, keepdim=True)
        inverse = (1.0 / (mean + EPS).sqrt()).float()
        return self.x.float() * inverse * self.norm_weight

    def quantize(self, x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
        """Quantise rows.

        Args:
            x: float32 [M, K].
            activation: ``"int8"`` or ``"fp8_e4m3"``.

        Returns:
            q [M, K], int8 or float8_e4m3fn, and s float32 [M, 1].
        """
        s = _MAXIMUM[activation] / x.abs().amax(dim=1, keepdim=True).clamp_min(1e-5)
        if activation == "int8":
            return (x * s).round().clamp(-128, 127).to(torch.int8), s
        return (x * s).to(torch.float8_e4m3fn), s

    def quantized_answer(self, x: Tensor, activation: str) -> Tensor:
        """Quantise x, multiply by the codes and scale, in float64: [M, N]."""
        q, s = self.quantize(x, activation)
        return self.sums(q) * self.scale / s.double()

    def sums(self, q: Tensor) -> Tensor:
        """Return q . code, exact for int8 and fp8: float64 [M, N]."""
        return q.to(torch.float64) @ self.codes.double().t()

    @functools.cached_property
    def dense_answer(self) -> Tensor:
        """The product of x and the bfloat16 weights in float64: [M, N]."""
        return self.x.double() @ self.dense.double().t()
