"""The CPU speed targets, judged by the records of one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cpu_attention
from bench_records import Record, Verdict, find_record, median, not_measured
from cpu_model_process import OURS, OURS_INT8

RIVAL_MODEL = "llama.cpp TQ2_0"
_OWN_GEMM = ("ours", "ours, function body")


def judge(records: Sequence[Record], threads: Sequence[int]) -> list[Verdict]:
    """Return a verdict for every target and number of threads."""
    verdicts = []
    for count in threads:
        mine = [record for record in records if record.threads == count]
        verdicts += [
            _model_ratio(mine, count, "decode 128", 1.3),
            *([_decode_speed(mine, count)] if count == 2 else []),
            _model_ratio(mine, count, "prefill 512", 3.0),
            _gemm(mine, count, "one GEMM, M = 1: at or below every column", lambda m: m == 1),
            _gemm(mine, count, "one GEMM, M >= 16: at or below every column", lambda m: m >= 16),
            _attention(mine, count),
        ]
    return verdicts


def _best_of_ours(records: Sequence[Record], case: str) -> Record | None:
    found = [find_record(records, case, name) for name in (OURS, OURS_INT8)]
    there = [r for r in found if r is not None]
    return max(there, key=median, default=None)


def _model_ratio(records: Sequence[Record], count: int, case: str, wanted: float) -> Verdict:
    target = f"300M {case}: >= {wanted:g}x {RIVAL_MODEL}"
    case_records = [r for r in records if r.section == "model" and r.case == case]
    ours, rival = _best_of_ours(case_records, case), find_record(case_records, case, RIVAL_MODEL)
    if ours is None or rival is None:
        return not_measured(target, case_records, (OURS, OURS_INT8, RIVAL_MODEL), count)
    ratio = median(ours) / median(rival)
    return Verdict(
        target=target,
        threads=count,
        measured=f"{median(ours):.0f} / {median(rival):.0f} = {ratio:.2f}x ({ours.contender})",
        holds=ratio >= wanted,
        outcome="holds" if ratio >= wanted else f"{wanted / ratio:.2f}x too slow",
    )


def _decode_speed(records: Sequence[Record], count: int) -> Verdict:
    target, wanted = "300M decode 128: above 150 tokens/s", 150.0
    case_records = [r for r in records if r.section == "model" and r.case == "decode 128"]
    ours = _best_of_ours(case_records, "decode 128")
    if ours is None:
        return not_measured(target, case_records, (OURS, OURS_INT8), count)
    speed = median(ours)
    return Verdict(
        target=target,
        threads=count,
        measured=f"{speed:.1f} tokens/s ({ours.contender})",
        holds=speed > wanted,
        outcome="holds" if speed > wanted else f"{wanted / speed:.2f}x too slow",
    )


def _gemm(
    records: Sequence[Record], count: int, target: str, rows: Callable[[int], bool]
) -> Verdict:
    """Compare ours with the fastest rival of every shape."""
    gemm = [r for r in records if r.section == "gemm" and rows(num_rows(r.case))]
    ratios = {}
    for case in dict.fromkeys(r.case for r in gemm):
        ours = find_record(gemm, case, "ours")
        rivals = [r for r in gemm if r.case == case and r.spread is not None]
        rivals = [r for r in rivals if r.contender not in _OWN_GEMM]
        if ours is None or not rivals:
            return not_measured(target, [r for r in gemm if r.case == case], ("ours",), count)
        best = min(rivals, key=median)
        ratios[case] = median(ours) / median(best), best.contender
    if not ratios:
        return not_measured(target, [], ("ours",), count)
    held = sum(ratio <= 1.0 for ratio, _ in ratios.values())
    worst = max(ratios, key=lambda case: ratios[case][0])
    ratio, rival = ratios[worst]
    return Verdict(
        target=target,
        threads=count,
        measured=f"{held} of {len(ratios)} shapes; {worst}: {ratio:.2f}x the time of {rival}",
        holds=ratio <= 1.0,
        outcome="holds" if ratio <= 1.0 else f"{ratio:.2f}x too slow at the worst shape",
    )


def _attention(records: Sequence[Record], count: int) -> Verdict:
    target = "decode attention, 2048 cached: <= 1/4 of GroupQueryAttention"
    mine = [r for r in records if r.section == "attention"]
    case = cpu_attention.CASE
    ours = find_record(mine, case, cpu_attention.OURS)
    rival = find_record(mine, case, cpu_attention.RIVAL)
    if ours is None or rival is None:
        return not_measured(target, mine, (cpu_attention.OURS, cpu_attention.RIVAL), count)
    ratio = median(ours) / median(rival)
    return Verdict(
        target=target,
        threads=count,
        measured=f"{median(ours):.0f} us / {median(rival):.0f} us = {ratio:.3f}",
        holds=ratio <= 0.25,
        outcome="holds" if ratio <= 0.25 else f"{4 * ratio:.2f}x too slow",
    )


def num_rows(case: str) -> int:
    """Return M of a GEMM's case."""
    return int(case.rpartition("=")[2])
