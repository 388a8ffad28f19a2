"""One GEMM on a GPU through every contender, for each shape and number of rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from bench_records import NotRunError, first_line, log
from gpu_gemm_contenders import (
    GpuGemmContender,
    OursFp8,
    OursInt8,
    TorchBfloat16,
    TorchIntMm,
    TorchScaledMm,
    TorchScaledMmA8,
)
from gpu_gemm_problem import GpuGemmProblem
from gpu_humming import KINDS, compile_all
from gpu_timing import REFUSALS, GpuContender, GpuRecord, Stopwatch, Work, run_case

# Those of tinylm-300m (o, q | kv_a, up, gate | up, down), and two of larger models: N, K.
MODEL_SHAPES = ((1024, 1024), (1312, 1024), (2816, 1024), (5632, 1024), (1024, 2816))
SHAPES = (*MODEL_SHAPES, (4096, 4096), (8192, 8192))
ROWS = (1, 16, 64, 256, 2048)
CONTENDERS: tuple[type[GpuGemmContender], ...] = (
    OursInt8,
    OursFp8,
    TorchBfloat16,
    TorchIntMm,
    TorchScaledMm,
    TorchScaledMmA8,
    *KINDS,
)
_COMPILE_SECONDS = 60.0


def case_name(num_outputs: int, num_inputs: int, num_rows: int) -> str:
    """Name a case."""
    return f"{num_outputs}x{num_inputs} M={num_rows}"


def work(num_outputs: int, num_inputs: int, num_rows: int) -> Work:
    """Return the least traffic and arithmetic: 2-bit weights, bfloat16 input and output."""
    rows = 2 * num_rows * (num_inputs + num_outputs)
    return Work(
        num_bytes=num_outputs * num_inputs / 4 + rows,
        num_ops=2 * num_rows * num_outputs * num_inputs,
    )


def run_gemm(stopwatch: Stopwatch) -> Iterator[GpuRecord]:
    """Measure every shape."""
    left_out = compile_all(SHAPES, ROWS, _COMPILE_SECONDS)
    for shape in SHAPES:
        log(f"gemm {shape[0]}x{shape[1]}")
        reasons = {(name, m): why for (name, where, m), why in left_out.items() if where == shape}
        yield from _run_shape(GpuGemmProblem(*shape, max(ROWS)), stopwatch, reasons)
        torch.cuda.empty_cache()


@torch.inference_mode()
def _run_shape(
    problem: GpuGemmProblem,
    stopwatch: Stopwatch,
    left_out: dict[tuple[str, int], NotRunError],
) -> list[GpuRecord]:
    loaded: dict[str, GpuGemmContender | NotRunError] = {}
    for kind in CONTENDERS:
        try:
            reasons = [left_out[kind.name, m] for m in ROWS if (kind.name, m) in left_out]
            if len(reasons) == len(ROWS):
                raise reasons[0]
            loaded[kind.name] = kind(problem, stopwatch)
        except NotRunError as reason:
            loaded[kind.name] = reason
        except REFUSALS as error:
            loaded[kind.name] = NotRunError(f"refuses: {first_line(error)}")
    records = []
    num_outputs, num_inputs = problem.codes.shape
    for num_rows in ROWS:
        ready: dict[str, GpuContender | NotRunError] = {}
        for name, found in loaded.items():
            try:
                if isinstance(found, NotRunError):
                    raise found
                if (name, num_rows) in left_out:
                    raise left_out[name, num_rows]
                ready[name] = found.prepare(num_rows)
            except NotRunError as reason:
                ready[name] = reason
        case = case_name(num_outputs, num_inputs, num_rows)
        least = work(num_outputs, num_inputs, num_rows)
        records += run_case(stopwatch, "gemm", case, ready, least)
    return records
