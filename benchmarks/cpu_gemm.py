"""One GEMM through every contender, in one process a number of threads."""

from __future__ import annotations

import gc

import torch
from bench_records import NotRunError, Record, log
from cpu_gemm_contenders import CONTENDERS, GemmContender
from cpu_gemm_problem import GemmProblem
from cpu_onnx import share_threads
from cpu_timing import Contender, Settings, micros, time_in_turns

SHAPES = ((1024, 1024), (2816, 1024), (1024, 2816), (4096, 4096))  # N, K
ROWS = (1, 16, 128, 512)


def case_name(num_outputs: int, num_inputs: int, num_rows: int) -> str:
    """Name a case."""
    return f"{num_outputs}x{num_inputs} M={num_rows}"


def run_gemm(settings: Settings, num_threads: int) -> list[Record]:
    """Measure every shape; for a process of its own."""
    share_threads(num_threads)
    torch.set_num_threads(num_threads)
    records = []
    with torch.inference_mode():
        for num_outputs, num_inputs in SHAPES:
            log(f"gemm {num_outputs}x{num_inputs}, {num_threads} threads")
            problem = GemmProblem(num_outputs, num_inputs, max(ROWS))
            records += _run_shape(problem, settings, num_threads)
            gc.collect()
    return records


def _run_shape(problem: GemmProblem, settings: Settings, num_threads: int) -> list[Record]:
    loaded: dict[str, GemmContender | NotRunError] = {}
    for kind in CONTENDERS:
        try:
            loaded[kind.name] = kind(problem, settings.cold_bytes)
        except NotRunError as error:
            loaded[kind.name] = error
    records = []
    num_outputs, num_inputs = problem.codes.shape
    for num_rows in ROWS:
        case = case_name(num_outputs, num_inputs, num_rows)
        ready: dict[str, Contender | NotRunError] = {}
        for name, found in loaded.items():
            try:
                if isinstance(found, NotRunError):
                    raise found
                calls, departure = found.prepare(num_rows)
                ready[name] = Contender(name=name, calls=calls, error=departure)
            except NotRunError as reason:
                ready[name] = reason
        running = [c for c in ready.values() if isinstance(c, Contender)]
        time_in_turns(running, repeats=settings.repeats, num_threads=num_threads)
        records += [micros("gemm", case, n, num_threads, c) for n, c in ready.items()]
    return records
