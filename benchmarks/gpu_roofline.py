"""What this GPU can do at best, measured in the same run: copy bandwidth and dense GEMMs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import torch
from bench_records import Record, find_record, first_line, log, median
from gpu_gemm_contenders import scaled_mm
from gpu_timing import REFUSALS, Call, GpuContender, GpuRecord, Stopwatch

from tinylm_export.bench_report import Spread

SECTION = "roofline"
COPY, INT8, BF16, FP8 = "device copy", "int8 GEMM", "bf16 GEMM", "fp8 GEMM"
_COPY_BYTES, _SIZE = 1 << 30, 8192


def run_roofline(stopwatch: Stopwatch) -> Iterator[GpuRecord]:
    """Measure the copy of 1 GiB, and square GEMMs of random data."""
    log("roofline")
    makers = {COPY: _copy, INT8: _int8, BF16: _bf16, FP8: _fp8}
    for case, make in makers.items():
        unit = "TB/s" if case == COPY else "TFLOPS"
        work = 2 * _COPY_BYTES if case == COPY else 2 * _SIZE**3
        record = GpuRecord(section=SECTION, case=case, contender="torch", unit=unit)
        try:
            contender = GpuContender(name=case, calls=make(), error=0.0)
        except REFUSALS as error:
            yield dataclasses.replace(record, not_run=f"refuses: {first_line(error)}")
            continue
        refused = stopwatch.time_in_turns([contender])
        if refused:
            yield dataclasses.replace(record, not_run=str(refused[case]))
            continue
        rates = [work / us / 1e6 for us in contender.micros]  # bytes or operations a us
        yield dataclasses.replace(record, spread=Spread.of(rates))
        del contender
        torch.cuda.empty_cache()


def peak(records: Sequence[Record], case: str) -> float | None:
    """Return bytes or operations a second that were measured, or None."""
    found = find_record([r for r in records if r.section == SECTION], case, "torch")
    return None if found is None else 1e12 * median(found)


def peak_8bit(records: Sequence[Record]) -> float | None:
    """Return operations a second of int8 or fp8, whichever was faster: they have one rate."""
    found = [rate for case in (INT8, FP8) if (rate := peak(records, case)) is not None]
    return max(found, default=None)


def floor_micros(record: GpuRecord, records: Sequence[Record]) -> float | None:
    """Return the least microseconds of a case on this GPU; None if that was not measured.

    Prefill attention computes in bfloat16; everything else could in 8 bits.
    """
    bandwidth = peak(records, COPY)
    ops = peak(records, BF16) if record.case.startswith("prefill") else peak_8bit(records)
    if bandwidth is None or ops is None or not record.num_bytes or not record.num_ops:
        return None
    return 1e6 * max(record.num_bytes / bandwidth, record.num_ops / ops)


def _copy() -> Sequence[Call]:
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device="cuda")
    return [functools.partial(torch.empty_like(source).copy_, source)]


def _int8() -> Sequence[Call]:
    a, b = (_integers().to(torch.int8) for _ in range(2))
    return [functools.partial(torch._int_mm, a, b.t())]


def _bf16() -> Sequence[Call]:
    a, b = (torch.randn(_SIZE, _SIZE, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return [functools.partial(torch.mm, a, b.t())]


def _fp8() -> Sequence[Call]:
    a, b = (_integers().to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device="cuda")
    return [functools.partial(scaled_mm, a, b.t(), one, one)]


def _integers() -> torch.Tensor:
    return torch.randint(-127, 128, (_SIZE, _SIZE), device="cuda")
