"""Attention on a GPU through every contender: causal prefill, and decode over a cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from bench_records import NotRunError, first_line, log
from gpu_attention_contenders import DECODE, PREFILL, Prepare
from gpu_attention_problem import CACHE_BYTES, HEAD_DIM, RANK, VALUE_DIM, Step
from gpu_timing import REFUSALS, GpuContender, GpuRecord, Stopwatch, Work, run_case

PREFILL_STEPS = (
    Step(batch=4, num_heads=16, length=2048),
    Step(batch=2, num_heads=16, length=4096),
    Step(batch=1, num_heads=16, length=8192),
)
DECODE_STEPS = (
    Step(batch=1, length=1, past=2047),
    Step(batch=32, length=1, past=2047),
    Step(batch=32, length=1, past=8191),
)


def case_name(step: Step) -> str:
    """Name a case."""
    kind = "decode" if step.past else "prefill"
    return f"{kind} B{step.batch} H{step.num_heads} S{step.total}"


def work(step: Step) -> Work:
    """Return the least traffic and arithmetic.

    Decode reads the latent cache and works in the latent space; prefill reads and writes heads of
    64 and attends over each pair of a query and a key that is not later.
    """
    rows = step.batch * step.length * step.num_heads
    if step.past:
        return Work(
            num_bytes=step.batch * step.total * CACHE_BYTES + 2 * rows * (HEAD_DIM + VALUE_DIM),
            num_ops=2 * step.num_pairs * (2 * RANK + HEAD_DIM // 2),
        )
    return Work(num_bytes=2 * rows * 4 * HEAD_DIM, num_ops=2 * step.num_pairs * 2 * HEAD_DIM)


def run_attention(stopwatch: Stopwatch) -> Iterator[GpuRecord]:
    """Measure every case."""
    for steps, contenders in ((PREFILL_STEPS, PREFILL), (DECODE_STEPS, DECODE)):
        for step in steps:
            log(f"attention {case_name(step)}")
            yield from _run_step(step, contenders, stopwatch)
            torch.cuda.empty_cache()


@torch.inference_mode()
def _run_step(step: Step, contenders: dict[str, Prepare], stopwatch: Stopwatch) -> list[GpuRecord]:
    ready: dict[str, GpuContender | NotRunError] = {}
    for name, prepare in contenders.items():
        try:
            ready[name] = prepare(step, stopwatch)
        except NotRunError as reason:
            ready[name] = reason
        except REFUSALS as error:  # no memory, for one
            ready[name] = NotRunError(f"refuses: {first_line(error)}")
    return run_case(stopwatch, "attention", case_name(step), ready, work(step))
