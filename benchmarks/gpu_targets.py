"""The GPU speed targets, judged by the records of one run; stretch figures beside them."""

from __future__ import annotations

from collections.abc import Sequence

import gpu_attention
import gpu_attention_contenders as attention
import gpu_gemm
from bench_records import Record, Verdict, find_record, median, not_measured
from gpu_roofline import floor_micros
from gpu_timing import GpuRecord

INT8, FP8 = "ours int8", "ours fp8"
_OURS_GEMM = (INT8, FP8)
_SCALED_MM, _TORCH_BF16 = "torch _scaled_mm fp8", "torch bf16"
_MODEL_OURS, _MODEL_DENSE = "ours", "dense engine"
_LARGE = ((4096, 4096), (8192, 8192))
_PREFILL = [gpu_attention.case_name(step) for step in gpu_attention.PREFILL_STEPS]
_ONE, _, _MANY = (gpu_attention.case_name(step) for step in gpu_attention.DECODE_STEPS)


def judge(records: Sequence[GpuRecord]) -> list[Verdict]:
    """Return a verdict for every target of the sections that were run."""
    verdicts: list[Verdict] = []
    sections = {record.section for record in records}
    if "gemm" in sections:
        verdicts += _judge_gemm(records)
    if "attention" in sections:
        verdicts += _judge_attention(records)
    if "model" in sections:
        verdicts += _judge_model(records)
    return verdicts


def _judge_gemm(records: Sequence[GpuRecord]) -> list[Verdict]:
    gemm = [record for record in records if record.section == "gemm"]
    largest, large = (gpu_gemm.case_name(n, k, 1) for n, k in reversed(_LARGE))
    model = [gpu_gemm.case_name(n, k, 1) for n, k in gpu_gemm.MODEL_SHAPES]
    middle = [gpu_gemm.case_name(n, k, m) for n, k in gpu_gemm.SHAPES for m in (64, 256)]
    many = [gpu_gemm.case_name(n, k, 2048) for n, k in gpu_gemm.SHAPES]
    return [
        _at_most(gemm, [largest], INT8, 7.5),
        _times_faster(gemm, largest, INT8, _TORCH_BF16, 6.0),
        _times_faster(gemm, largest, INT8, None, 1.9),
        _of_roofline(records, [largest], INT8, 0.8),
        _at_most(gemm, [large], INT8, 3.5),
        _at_most(gemm, [large], INT8, 2.5, stretch=True),
        _at_most(gemm, model, INT8, 2.2, what="the 300m model's shapes, M=1"),
        _no_slower(gemm, model, INT8, None, what="the 300m model's shapes, M=1"),
        _at_most(gemm, model, INT8, 1.6, what="the 300m model's shapes, M=1", stretch=True),
        _sixteen_rows(gemm),
        _no_slower(gemm, middle, INT8, None, what="M=64 and 256"),
        _no_slower(gemm, many, INT8, _SCALED_MM, what="M=2048, int8"),
        _no_slower(gemm, many, FP8, _SCALED_MM, what="M=2048, fp8"),
        _of_roofline(records, many, INT8, 0.8, what="M=2048, int8"),
    ]


def _judge_attention(records: Sequence[GpuRecord]) -> list[Verdict]:
    mine = [record for record in records if record.section == "attention"]
    ours, prefill = attention.OURS, "causal prefill, head 64"
    return [
        _no_slower(mine, _PREFILL, ours, attention.CUDNN, what=prefill),
        _no_slower(mine, _PREFILL, ours, attention.FA3, what=prefill, stretch=True),
        _at_most(mine, [_MANY], ours, 40.0),
        _times_faster(mine, _MANY, ours, attention.FA3_LATENT, 1.9),
        _of_roofline(records, [_MANY], ours, 0.8),
        _at_most(mine, [_ONE], ours, 6.0),
        _at_most(mine, [_ONE], ours, 4.0, stretch=True),
    ]


def _judge_model(records: Sequence[GpuRecord]) -> list[Verdict]:
    from gpu_model import CONTEXTS, LAYERS, decode_case

    mine = [record for record in records if record.section == "model"]
    cases = [decode_case(1, context) for context in CONTEXTS]
    return [
        _at_most(mine, cases, _MODEL_OURS, 300.0, what="300m decode, batch 1"),
        *(_times_faster(mine, case, _MODEL_OURS, _MODEL_DENSE, 2.5) for case in cases),
        _at_most(mine, cases, _MODEL_OURS, 150.0, what="300m decode, batch 1", stretch=True),
        _engine_size(mine, LAYERS),
    ]


def _name(text: str, stretch: bool) -> str:
    return f"stretch: {text}" if stretch else text


def _at_most(
    records: Sequence[Record],
    cases: Sequence[str],
    ours: str,
    micros: float,
    *,
    what: str = "",
    stretch: bool = False,
) -> Verdict:
    """Want no case above a time."""
    target = _name(f"{what or cases[0]}: <= {micros:g} us", stretch)
    found = {case: find_record(records, case, ours) for case in cases}
    times = {case: median(record) for case, record in found.items() if record is not None}
    if len(times) < len(cases):
        missing = next(case for case in cases if case not in times)
        return not_measured(target, [r for r in records if r.case == missing], (ours,))
    worst = max(times, key=lambda case: times[case])
    return _verdict(target, times[worst] / micros, f"{_cell(times[worst])} us ({worst}, {ours})")


def _times_faster(
    records: Sequence[Record], case: str, ours: str, rival: str | None, factor: float
) -> Verdict:
    """Want a rival's time to be ``factor`` times ours; without a name, the fastest one's."""
    target = f"{case}: {factor:g}x as fast as {rival or 'the best peer'}"
    mine, other = find_record(records, case, ours), _rival(records, case, rival)
    if mine is None or other is None:
        here = [r for r in records if r.case == case]
        return not_measured(target, here, (ours, *([rival] if rival else _peers(here))))
    ratio = median(other) / median(mine)
    times = f"{_cell(median(other))} us ({other.contender}) / {_cell(median(mine))} us"
    return _verdict(target, factor / ratio, f"{times} = {ratio:.2f}x")


def _no_slower(
    records: Sequence[Record],
    cases: Sequence[str],
    ours: str,
    rival: str | None,
    *,
    what: str,
    stretch: bool = False,
) -> Verdict:
    """Want ours at or below a rival's time in every case; without a name, every peer's."""
    target = _name(f"{what}: at or below {rival or 'every peer'}", stretch)
    ratios = {}
    for case in cases:
        mine, other = find_record(records, case, ours), _rival(records, case, rival)
        if mine is None or other is None:
            here = [r for r in records if r.case == case]
            return not_measured(target, here, (ours, *([rival] if rival else _peers(here))))
        ratios[case] = median(mine) / median(other), other.contender
    held = sum(ratio <= 1.0 for ratio, _ in ratios.values())
    worst = max(ratios, key=lambda case: ratios[case][0])
    ratio, name = ratios[worst]
    measured = f"{held} of {len(cases)} cases; {worst}: {ratio:.2f}x the time of {name}"
    return _verdict(target, ratio, measured)


def _sixteen_rows(records: Sequence[Record]) -> Verdict:
    target = "M=16: <= 1.2x the M=1 time"
    ratios = {}
    for shape in gpu_gemm.SHAPES:
        case, single = (gpu_gemm.case_name(*shape, rows) for rows in (16, 1))
        sixteen, one = find_record(records, case, INT8), find_record(records, single, INT8)
        if sixteen is None or one is None:
            missing = case if sixteen is None else single
            return not_measured(target, [r for r in records if r.case == missing], (INT8,))
        ratios[case] = median(sixteen) / median(one)
    worst = max(ratios, key=lambda case: ratios[case])
    return _verdict(target, ratios[worst] / 1.2, f"{ratios[worst]:.2f}x ({worst})")


def _of_roofline(
    records: Sequence[GpuRecord],
    cases: Sequence[str],
    ours: str,
    share: float,
    *,
    what: str = "",
) -> Verdict:
    """Want a share of what the device did at best in this run."""
    target = f"stretch: {what or cases[0]}: {share:.0%} of the measured roofline"
    shares = {}
    for case in cases:
        found = find_record(records, case, ours)
        if not isinstance(found, GpuRecord):
            return not_measured(target, [r for r in records if r.case == case], (ours,))
        floor = floor_micros(found, records)
        if floor is None:
            return not_measured(target, [r for r in records if r.section == "roofline"], ("torch",))
        shares[case] = floor / median(found)
    worst = min(shares, key=lambda case: shares[case])
    return _verdict(target, share / shares[worst], f"{shares[worst]:.0%} ({worst}, {ours})")


def _engine_size(records: Sequence[Record], case: str) -> Verdict:
    target = "engine size, lm_head and embedding aside: <= 1/6 of the dense engine"
    ours, dense = (find_record(records, case, name) for name in (_MODEL_OURS, _MODEL_DENSE))
    if ours is None or dense is None:
        here = [r for r in records if r.case == case]
        return not_measured(target, here, (_MODEL_OURS, _MODEL_DENSE))
    ratio = median(ours) / median(dense)
    sizes = f"{median(ours):.0f} MB / {median(dense):.0f} MB = 1/{1 / ratio:.1f}"
    return _verdict(target, 6 * ratio, sizes)


def _peers(records: Sequence[Record]) -> list[str]:
    return [r.contender for r in records if r.contender not in _OURS_GEMM]


def _rival(records: Sequence[Record], case: str, name: str | None) -> Record | None:
    """Return a rival's record, or that of the fastest of those that ran."""
    if name is not None:
        return find_record(records, case, name)
    here = [r for r in records if r.case == case and r.spread is not None]
    return min((r for r in here if r.contender not in _OURS_GEMM), key=median, default=None)


def _verdict(target: str, excess: float, measured: str) -> Verdict:
    """Judge by how many times too large something is."""
    holds = excess <= 1.0
    outcome = "holds" if holds else f"{excess:.2f}x away"
    return Verdict(target=target, measured=measured, holds=holds, outcome=outcome)


def _cell(micros: float) -> str:
    return f"{micros:.2f}" if micros < 10 else f"{micros:.1f}"
