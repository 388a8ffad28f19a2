"""The contenders of one GEMM: ours through ONNX Runtime, and what else a CPU user could call.

Ours takes float32, norms, quantises, multiplies and scales. The rivals get what they want to be
given (float32, bfloat16, or int8 values that somebody else quantised) and leave the rest out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from bench_records import NotRunError, num_copies
from cpu_gemm_problem import EPS, GemmProblem, departure
from cpu_onnx import MICROSOFT, Array, Bound, make_session, native_library, op_model, value
from typing_extensions import override

from tinylm.packing import pack
from tinylm_export.ops import BIT_LINEAR, DOMAIN

Call = Callable[[], object]
_BLOCK = 128  # weights that share a scale in MatMulNBits


class GemmContender:
    """One way to multiply, over several copies of the weights.

    Args:
        problem: The data.
        cold_bytes: What the copies together exceed.

    Attributes:
        name: Shown in the tables.
        bits: Bits a weight takes in memory.
        limit: Largest departure from its reference, relative to a row's largest value.
        most_rows: Rows above which it is too slow to be of interest.
    """

    name: ClassVar[str]
    bits: ClassVar[float]
    limit: ClassVar[float]
    most_rows: ClassVar[int] = 1 << 30

    def __init__(self, problem: GemmProblem, cold_bytes: int) -> None:
        self.problem = problem
        self.num_copies = num_copies(int(problem.codes.size * self.bits / 8), cold_bytes)
        self.load()

    def load(self) -> None:
        """Make the copies of the weights.

        Raises:
            NotRunError: What it needs is missing.
        """
        raise NotImplementedError

    def bind(self, num_rows: int) -> tuple[Sequence[Call], Callable[[], Array]]:
        """Return a call for each copy, and what reads the last call's answer."""
        raise NotImplementedError

    def answer(self) -> Array:
        """Return the reference [M, N] of all rows."""
        raise NotImplementedError

    def prepare(self, num_rows: int) -> tuple[Sequence[Call], float]:
        """Return the calls and the departure from the reference, once that is found small enough.

        Raises:
            NotRunError: It does not take this size, or gives a wrong answer.
        """
        if num_rows > self.most_rows:
            raise NotRunError(f"slow: not of interest above M = {self.most_rows}")
        try:
            calls, read = self.bind(num_rows)
            errors = []
            for call in (calls[0], calls[-1]):
                call()
                errors.append(departure(read(), self.answer()[:num_rows]))
        except RuntimeError as error:
            raise NotRunError(f"refuses: {str(error)[:200]}") from error
        if max(errors) > self.limit:
            raise NotRunError(f"wrong answer: departs by {max(errors):.2g}, limit {self.limit:g}")
        return calls, max(errors)


class _Onnx(GemmContender):
    """A single-op model in as many sessions as there are copies."""

    domain: ClassVar[str] = ""
    op: ClassVar[str]
    native: Path | None = None

    @override
    def load(self) -> None:
        x, y = self.input(1), self.output(1)
        constants = self.constants()
        model = op_model(
            self.op,
            self.domain,
            names=["x", *constants],
            inputs={"x": x},
            constants=constants,
            outputs={"y": y},
            attributes=self.attributes(),
        )
        self._sessions = [make_session(model, native=self.native) for _ in range(self.num_copies)]

    @override
    def bind(self, num_rows: int) -> tuple[Sequence[Call], Callable[[], Array]]:
        x, y = value(self.input(num_rows)), value(self.output(num_rows))
        calls = [Bound(session, {"x": x}, {"y": y}).run for session in self._sessions]
        return calls, y.numpy

    def input(self, num_rows: int) -> Array:
        return self.problem.x[:num_rows]

    def output(self, num_rows: int) -> Array:
        return np.zeros((num_rows, len(self.problem.codes)), np.float32)

    def constants(self) -> dict[str, Array]:
        raise NotImplementedError

    def attributes(self) -> dict[str, Any]:
        return {}


class BitLinearBody(_Onnx):
    """Our op by its function body, as a stock ONNX Runtime runs it."""

    name = "ours, function body"
    op, domain = BIT_LINEAR.name, DOMAIN
    bits = 8.0  # it keeps the codes as int8
    limit = 1e-6  # the sums are exact; what is left are a few float32 roundings
    most_rows = 16

    @override
    def constants(self) -> dict[str, Array]:
        codes = self.problem.codes
        return {
            "weight": pack(torch.from_numpy(codes)).numpy(),
            "weight_scale": np.full(len(codes), self.problem.scale),
            "norm_weight": self.problem.norm_weight,
        }

    @override
    def attributes(self) -> dict[str, Any]:
        return {"activation": "int8", "eps": EPS}

    @override
    def answer(self) -> Array:
        return self.problem.bit_linear_answer


class BitLinearNative(BitLinearBody):
    """Our op by its native kernel."""

    name = "ours"
    bits = 2.0
    most_rows = GemmContender.most_rows

    @override
    def load(self) -> None:
        self.native = native_library()
        super().load()


class MatMulNBits(_Onnx):
    """ONNX Runtime's 2-bit product, float32 activations, accuracy left to it."""

    name = "ORT MatMulNBits"
    op, domain = "MatMulNBits", MICROSOFT
    bits = 2.0 + 32 / _BLOCK
    limit = 1e-5  # float32 sums
    accuracy_level = 0

    @override
    def constants(self) -> dict[str, Array]:
        num_outputs, num_inputs = self.problem.codes.shape
        # Without zero points a stored value v stands for v - 2.
        stored = pack(torch.from_numpy(self.problem.codes)).numpy() + np.uint8(0b01010101)
        num_blocks = num_inputs // _BLOCK
        return {
            "b": stored.reshape(num_outputs, num_blocks, _BLOCK // 4),
            "scales": np.full((num_outputs, num_blocks), self.problem.scale),
        }

    @override
    def attributes(self) -> dict[str, Any]:
        num_outputs, num_inputs = self.problem.codes.shape
        sizes = {"K": num_inputs, "N": num_outputs, "bits": 2, "block_size": _BLOCK}
        return {**sizes, "accuracy_level": self.accuracy_level}

    @override
    def answer(self) -> Array:
        return self.problem.dense_answer


class MatMulNBitsInt8(MatMulNBits):
    """The same with activations quantised to int8 inside, blockwise."""

    name = "ORT MatMulNBits int8"
    limit = 3e-2  # steps of 1/127 of a block's largest value, over a random walk of K terms
    accuracy_level = 4


class MatMulInteger(_Onnx):
    """ONNX Runtime's 8-bit product of uint8 and constant int8, which its kernels like best."""

    name = "ORT MatMulInteger"
    op = "MatMulInteger"
    bits = 8.0
    limit = 0.0

    @override
    def input(self, num_rows: int) -> Array:
        q = self.problem.quantized[0][:num_rows]
        return (q.astype(np.int16) + 128).astype(np.uint8)

    @override
    def output(self, num_rows: int) -> Array:
        return np.zeros((num_rows, len(self.problem.codes)), np.int32)

    @override
    def constants(self) -> dict[str, Array]:
        return {"b": np.ascontiguousarray(self.problem.codes.T)}

    @override
    def answer(self) -> Array:
        return self.problem.unsigned_answer


class TorchFloat32(GemmContender):
    """``F.linear`` in float32."""

    name = "torch float32"
    dtype = torch.float32
    bits = 32.0
    limit = 1e-5  # float32 sums

    @override
    def load(self) -> None:
        weight = torch.from_numpy(self.problem.dense).to(self.dtype)
        self._copies = [weight.clone() for _ in range(self.num_copies)]

    @override
    def bind(self, num_rows: int) -> tuple[Sequence[Call], Callable[[], Array]]:
        x = torch.from_numpy(self.problem.x[:num_rows]).to(self.dtype)
        calls = [functools.partial(F.linear, x, weight) for weight in self._copies]
        return calls, lambda: calls[-1]().float().numpy()

    @override
    def answer(self) -> Array:
        return self.problem.dense_answer


class TorchBfloat16(TorchFloat32):
    """``F.linear`` in bfloat16."""

    name = "torch bfloat16"
    dtype = torch.bfloat16
    bits = 16.0
    limit = 2e-2  # 8 bits of every input, weight and output


class TorchIntMm(GemmContender):
    """``torch._int_mm``: int8 by int8."""

    name = "torch _int_mm"
    bits = 8.0
    limit = 0.0

    @override
    def load(self) -> None:
        weight = torch.from_numpy(self.problem.codes)
        self._copies = [weight.clone().t() for _ in range(self.num_copies)]

    @override
    def bind(self, num_rows: int) -> tuple[Sequence[Call], Callable[[], Array]]:
        q = torch.from_numpy(self.problem.quantized[0][:num_rows])
        out = torch.zeros(num_rows, len(self.problem.codes), dtype=torch.int32)
        calls = [functools.partial(torch._int_mm, q, w, out=out) for w in self._copies]
        return calls, out.numpy

    @override
    def answer(self) -> Array:
        return self.problem.integer_answer


CONTENDERS: tuple[type[GemmContender], ...] = (
    BitLinearNative,
    MatMulNBits,
    MatMulNBitsInt8,
    MatMulInteger,
    TorchIntMm,
    TorchBfloat16,
    TorchFloat32,
    BitLinearBody,
)
