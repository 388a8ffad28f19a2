"""Random data for one GEMM shape, and the exact answers that every contender is held to."""

from __future__ import annotations

import functools

import numpy as np
from cpu_onnx import Array

EPS = float(np.float32(1e-5))


class GemmProblem:
    """Random data of one shape, for up to ``num_rows`` rows; fewer rows take the first ones.

    Nothing is shared with the code under test: norm, quantiser and product are written out here.

    Args:
        num_outputs: N.
        num_inputs: K.
        num_rows: M.

    Attributes:
        x: float32 [M, K]; magnitudes vary by row, so that each row has its own scale.
        norm_weight: float32 [K].
        codes: int8 [N, K], ternary.
        scale: The weights' scale.
    """

    def __init__(self, num_outputs: int, num_inputs: int, num_rows: int) -> None:
        rng = np.random.default_rng(num_outputs + num_inputs)
        x = rng.standard_normal((num_rows, num_inputs), dtype=np.float32)
        self.x: Array = x * (rng.exponential(1.0, (num_rows, 1)).astype(np.float32) + 0.01)
        self.norm_weight: Array = rng.uniform(0.5, 1.5, num_inputs).astype(np.float32)
        self.codes: Array = rng.integers(-1, 2, (num_outputs, num_inputs), dtype=np.int8)
        self.scale = np.float32(num_inputs**-0.5)

    @functools.cached_property
    def dense(self) -> Array:
        """The weights as float32 [N, K]."""
        return self.codes.astype(np.float32) * self.scale

    @functools.cached_property
    def quantized(self) -> tuple[Array, Array]:
        """RMSNorm and the int8 quantiser: q int8 [M, K] and s float32 [M, 1].

        The mean square is a float64 sum; everything else is rounded to float32 step by step.
        """
        mean = np.mean(np.square(self.x.astype(np.float64)), axis=1, keepdims=True)
        inverse = (1.0 / np.sqrt(mean + EPS)).astype(np.float32)
        normed = self.x * inverse * self.norm_weight
        absmax = np.maximum(np.abs(normed).max(axis=1, keepdims=True), np.float32(1e-5))
        s = np.float32(127) / absmax
        return np.clip(np.rint(normed * s), -128, 127).astype(np.int8), s

    @functools.cached_property
    def integer_answer(self) -> Array:
        """The sums q . code, exact: int64 [M, N]."""
        q, _ = self.quantized
        # Sums of integers below 2**53 are exact in float64, and its product is much the faster.
        return (q.astype(np.float64) @ self._codes_t).astype(np.int64)

    @functools.cached_property
    def unsigned_answer(self) -> Array:
        """The sums (q + 128) . code, exact: int64 [M, N]."""
        return self.integer_answer + 128 * self.codes.sum(axis=1, dtype=np.int64)

    @functools.cached_property
    def bit_linear_answer(self) -> Array:
        """The whole op, scaled in float64: [M, N]."""
        return self.integer_answer * float(self.scale) / self.quantized[1].astype(np.float64)

    @functools.cached_property
    def dense_answer(self) -> Array:
        """The product of x and the weights, without norm and quantiser, in float64: [M, N]."""
        return self.x.astype(np.float64) @ self.dense.T.astype(np.float64)

    @functools.cached_property
    def _codes_t(self) -> Array:
        return self.codes.T.astype(np.float64)


def departure(found: Array, expected: Array) -> float:
    """Return the largest difference of a row's values, relative to the row's largest one."""
    difference = np.abs(found.astype(np.float64) - expected).max(axis=1)
    return float((difference / np.maximum(np.abs(expected).max(axis=1), 1e-30)).max())
