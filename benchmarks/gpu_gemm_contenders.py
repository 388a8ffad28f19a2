"""The contenders of one GEMM on a GPU: our kernels, and what else a PyTorch user could call.

Ours takes bfloat16, norms, quantises, multiplies and scales. None of the rivals norms; those whose
name ends in ``a8`` quantise within the timed call, the others are given what they multiply.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from bench_records import NotRunError, first_line
from gpu_gemm_problem import GpuGemmProblem
from gpu_timing import REFUSALS, Call, GpuContender, Stopwatch, check
from torch import Tensor
from typing_extensions import override

from tinylm_export import cuda_kernels

_INT_MM_ROWS = 32  # ``torch._int_mm`` wants more than 16 rows


class GpuGemmContender:
    """One way to multiply, over several copies of the weights.

    Args:
        problem: The data.
        stopwatch: Says how many copies it takes.

    Attributes:
        name: Shown in the tables.
        bits: Bits a weight takes in memory.
        limit: Largest departure from its reference, relative to a row's largest value.
        note: What a reader should know of how it runs.
    """

    name: ClassVar[str]
    bits: ClassVar[float]
    limit: ClassVar[float]
    note: ClassVar[str] = ""

    def __init__(self, problem: GpuGemmProblem, stopwatch: Stopwatch) -> None:
        self.problem = problem
        self.num_copies = stopwatch.copies(int(problem.codes.numel() * self.bits / 8))
        self.load()

    def load(self) -> None:
        """Make the copies of the weights; may raise any of ``REFUSALS``."""
        raise NotImplementedError

    def bind(self, num_rows: int) -> Sequence[Call]:
        """Return a call for each copy, which gives [M, N]."""
        raise NotImplementedError

    def answer(self) -> Tensor:
        """Return the reference of all rows: float64 [M, N]."""
        raise NotImplementedError

    def prepare(self, num_rows: int) -> GpuContender:
        """Return the calls once their answer is found right.

        Raises:
            NotRunError: It does not take this size, or gives a wrong answer.
        """
        try:
            calls = self.bind(num_rows)
        except REFUSALS as error:
            raise NotRunError(f"refuses: {first_line(error)}") from error
        return check(self.name, calls, self.answer()[:num_rows], self.limit, self.note)


class OursInt8(GpuGemmContender):
    """``tinylm::BitLinear``: norm, quantise, multiply and scale."""

    name = "ours int8"
    bits = 2.0
    limit = 1e-2  # the output's 8 bits, and a quantised activation that rounds the other way
    activation: ClassVar[str] = "int8"

    @override
    def load(self) -> None:
        packed = cuda_kernels.pack(self.problem.codes)
        self._copies = [packed.clone() for _ in range(self.num_copies)]
        num_outputs = len(self.problem.codes)
        self._scale = torch.full((num_outputs,), self.problem.scale, device="cuda")

    @override
    def bind(self, num_rows: int) -> Sequence[Call]:
        x = self.problem.x[:num_rows].contiguous()
        out = torch.empty(num_rows, len(self.problem.codes), dtype=x.dtype, device="cuda")
        workspace = cuda_kernels.bit_linear_workspace(num_rows, x.shape[1], self.activation)
        return [
            functools.partial(
                cuda_kernels.bit_linear,
                *(x, packed, self._scale, self.problem.norm_weight),
                activation=self.activation,
                out=out,
                workspace=workspace,
            )
            for packed in self._copies
        ]

    @override
    def answer(self) -> Tensor:
        return self.problem.quantized_answer(self.problem.normed, self.activation)


class OursFp8(OursInt8):
    """The same with e4m3 activations."""

    name = "ours fp8"
    activation = "fp8_e4m3"
    limit = 3e-2  # fp8 tensor cores keep some 14 bits of a sum; 2.1e-2 was found at K 8192


class TorchBfloat16(GpuGemmContender):
    """``F.linear`` in bfloat16."""

    name = "torch bf16"
    bits = 16.0
    limit = 2e-2  # 8 bits of the output

    @override
    def load(self) -> None:
        self._copies = [self.problem.dense.clone() for _ in range(self.num_copies)]

    @override
    def bind(self, num_rows: int) -> Sequence[Call]:
        x = self.problem.x[:num_rows].contiguous()
        return [functools.partial(F.linear, x, weight) for weight in self._copies]

    @override
    def answer(self) -> Tensor:
        return self.problem.dense_answer


class TorchIntMm(GpuGemmContender):
    """``torch._int_mm``: int8 by int8, to int32."""

    name = "torch _int_mm"
    bits = 8.0
    limit = 0.0
    note = f"fewer than {_INT_MM_ROWS} rows are padded to {_INT_MM_ROWS}, before it is timed"

    @override
    def load(self) -> None:
        self._copies = [self.problem.codes.clone().t() for _ in range(self.num_copies)]

    @override
    def bind(self, num_rows: int) -> Sequence[Call]:
        q, _ = self.problem.quantize(self.problem.normed[:num_rows], "int8")
        q = F.pad(q, (0, 0, 0, max(0, _INT_MM_ROWS - num_rows)))
        return [functools.partial(_multiply, q, weight, num_rows) for weight in self._copies]

    @override
    def answer(self) -> Tensor:
        return self.problem.sums(self.problem.quantize(self.problem.normed, "int8")[0])


def _multiply(q: Tensor, weight: Tensor, num_rows: int) -> Tensor:
    return torch._int_mm(q, weight)[:num_rows]


class TorchScaledMm(GpuGemmContender):
    """``torch._scaled_mm``: e4m3 by e4m3, one scale a tensor, fast accumulation."""

    name = "torch _scaled_mm fp8"
    bits = 8.0
    limit = 3e-2  # fast accumulation keeps some 14 bits

    @override
    def load(self) -> None:
        weight = self.problem.codes.to(torch.float8_e4m3fn)
        self._copies = [weight.clone().t() for _ in range(self.num_copies)]
        self._one = torch.ones((), device="cuda")
        self._scale = torch.full((), self.problem.scale, device="cuda")

    @override
    def bind(self, num_rows: int) -> Sequence[Call]:
        q = self._quantized()[:num_rows].contiguous()
        return [functools.partial(self._call, q, weight) for weight in self._copies]

    @override
    def answer(self) -> Tensor:
        return self.problem.sums(self._quantized()) * self.problem.scale

    def _quantized(self) -> Tensor:
        return self.problem.quantize(self.problem.normed, "fp8_e4m3")[0]

    def _call(self, q: Tensor, weight: Tensor) -> Tensor:
        return scaled_mm(q, weight, self._one, self._scale)


class TorchScaledMmA8(TorchScaledMm):
    """The same, which also quantises each row with PyTorch's own operations."""

    name = "torch _scaled_mm fp8 a8"
    note = "quantises each row with four operations of PyTorch, in the timed call"

    @override
    def bind(self, num_rows: int) -> Sequence[Call]:
        x = self.problem.x[:num_rows].contiguous()
        self._row_scale = self._scale.expand(1, len(self.problem.codes)).contiguous()
        return [functools.partial(self._call, x, weight) for weight in self._copies]

    @override
    def answer(self) -> Tensor:
        return self.problem.quantized_answer(self.problem.x.float(), "fp8_e4m3")

    def _call(self, x: Tensor, weight: Tensor) -> Tensor:
        inverse = x.abs().amax(dim=1, keepdim=True).float().clamp_min(1e-5) / 448.0
        q = (x / inverse).to(torch.float8_e4m3fn)
        return scaled_mm(q, weight, inverse, self._row_scale)


def scaled_mm(q: Tensor, weight: Tensor, scale_a: Tensor, scale_b: Tensor) -> Tensor:
    """Multiply e4m3 [M, K] by e4m3 [K, N], to bfloat16."""
    return torch._scaled_mm(
        q,
        weight,
        scale_a=scale_a,
        scale_b=scale_b,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
