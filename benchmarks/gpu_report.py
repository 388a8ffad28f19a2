"""Tables and pictures of the GPU benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpu_gemm
from bench_records import Verdict, median
from bench_tables import section_table, show_notes, target_table
from gpu_roofline import BF16, COPY, floor_micros, peak, peak_8bit
from gpu_timing import GpuRecord
from rich.console import Console
from rich.table import Table

_TITLES = {
    "roofline": "What this GPU does at best",
    "gemm": "One GEMM, microseconds (ours with norm and quantiser inside)",
    "attention": "Attention, microseconds",
    "model": "The 300M model as a TensorRT engine",
}


def show(console: Console, records: Sequence[GpuRecord], verdicts: Sequence[Verdict]) -> None:
    """Print a table for each section, ours against the roofline, what was not run, the targets."""
    for section, title in _TITLES.items():
        mine = [record for record in records if record.section == section]
        if mine:
            console.print(section_table(title, mine))
    if any(_share(record, records) for record in records):
        console.print(_roofline_table(records))
    show_notes(console, records)
    console.print(target_table(verdicts))


def _is_ours(record: GpuRecord) -> bool:
    return record.contender.startswith("ours")


def _share(record: GpuRecord, records: Sequence[GpuRecord]) -> float | None:
    """Return the share of the roofline that one of ours reached."""
    floor = floor_micros(record, records) if _is_ours(record) and record.spread else None
    return None if floor is None else floor / median(record)


def _roofline_table(records: Sequence[GpuRecord]) -> Table:
    table = Table(title="Ours against the roofline of this run")
    for column in ("case", "contender", "us", "least us", "share", "TB/s", "TFLOPS"):
        table.add_column(column, justify="left" if column in ("case", "contender") else "right")
    for record in records:
        share = _share(record, records)
        if share is None or record.num_bytes is None or record.num_ops is None:
            continue
        us = median(record)
        table.add_row(
            record.case,
            record.contender,
            *(f"{us:.2f}", f"{share * us:.2f}", f"{share:.0%}"),
            *(f"{record.num_bytes / us / 1e6:.2f}", f"{record.num_ops / us / 1e6:.1f}"),
        )
    return table


def draw(records: Sequence[GpuRecord], machine: dict[str, Any], path: Path) -> list[Path]:
    """Draw microseconds against M, and what was achieved against the roofline.

    Args:
        records: Of one run.
        machine: Whose ``"gpu"`` names the card.
        path: A PNG file; the second picture gets ``-roofline`` in its name.

    Returns:
        The files that were written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for paint, target in (
        (_draw_times, path),
        (_draw_roofline, path.with_stem(f"{path.stem}-roofline")),
    ):
        figure = paint(plt, records)
        if figure is None:
            continue
        figure.suptitle(f"{machine.get('gpu', {}).get('name', 'GPU')}; medians of CUDA graphs")
        figure.savefig(target, dpi=100)
        plt.close(figure)
        written.append(target)
    return written


def _draw_times(plt: Any, records: Sequence[GpuRecord]) -> Any:
    """Draw a panel for each GEMM shape, and one for attention."""
    gemm = [record for record in records if record.section == "gemm" and record.spread]
    attention = [record for record in records if record.section == "attention" and record.spread]
    shapes = list(dict.fromkeys(record.case.partition(" ")[0] for record in gemm))
    if not shapes and not attention:
        return None
    num_panels = len(shapes) + bool(attention)
    height = -(-num_panels // 4)
    figure, axes = plt.subplots(
        height, 4, figsize=(22, 5 * height), squeeze=False, constrained_layout=True
    )
    for axis in axes.flat[num_panels:]:
        axis.set_axis_off()
    for axis, shape in zip(axes.flat, shapes, strict=False):
        mine = [record for record in gemm if record.case.partition(" ")[0] == shape]
        _times_panel(axis, mine, shape)
    if shapes:
        lines = axes.flat[0].get_legend_handles_labels()
        figure.legend(*lines, loc="outside lower center", ncols=len(lines[0]))
    if attention:
        _attention_panel(axes.flat[len(shapes)], attention)
    return figure


def _times_panel(axis: Any, records: Sequence[GpuRecord], shape: str) -> None:
    for name in dict.fromkeys(record.contender for record in records):
        mine = [record for record in records if record.contender == name]
        rows = [int(record.case.rpartition("=")[2]) for record in mine]
        style = "-o" if name.startswith("ours") else "--."
        axis.plot(rows, [median(record) for record in mine], style, label=name)
    axis.set(xscale="log", yscale="log", title=f"N x K = {shape}, microseconds", xlabel="M")
    axis.set_xticks(gpu_gemm.ROWS, [str(rows) for rows in gpu_gemm.ROWS])
    low, high = axis.get_ylim()
    ticks = [n * 10**e for e in range(-1, 5) for n in (1, 2, 5) if low <= n * 10**e <= high]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def _attention_panel(axis: Any, records: Sequence[GpuRecord]) -> None:
    cases = list(dict.fromkeys(record.case for record in records))
    for name in dict.fromkeys(record.contender for record in records):
        mine = [record for record in records if record.contender == name]
        places = [cases.index(record.case) for record in mine]
        style = "o" if name.startswith("ours") else "x"
        axis.plot([median(record) for record in mine], places, style, label=name)
    axis.set(xscale="log", title="Attention, microseconds")
    axis.set_yticks(range(len(cases)), cases, fontsize=8)
    axis.invert_yaxis()
    axis.legend(fontsize=8)


def _draw_roofline(plt: Any, records: Sequence[GpuRecord]) -> Any:
    """Draw achieved operations a second against operations a byte, under the measured roofs."""
    points: dict[str, list[tuple[float, float]]] = {}  # by contender: operations a byte, a second
    for record in records:
        if record.spread and record.num_bytes and record.num_ops:
            place = record.num_ops / record.num_bytes, record.num_ops / median(record) / 1e6
            points.setdefault(record.contender, []).append(place)
    bandwidth = peak(records, COPY)
    if not points or bandwidth is None:
        return None
    figure, axis = plt.subplots(figsize=(12, 8), constrained_layout=True)
    intensities = [x for places in points.values() for x, _ in places]
    ends = [min(intensities), max(intensities)]
    tops = (("8-bit GEMM", peak_8bit(records), "k-"), (BF16, peak(records, BF16), "k:"))
    for case, top, style in tops:
        if top is not None:
            knee = [top / bandwidth] if ends[0] < top / bandwidth < ends[1] else []
            roof = [(x, min(top, x * bandwidth) / 1e12) for x in sorted(ends + knee)]
            label = f"roof: {case} {top / 1e12:.0f} TFLOPS, copy {bandwidth / 1e12:.2f} TB/s"
            axis.plot(*zip(*roof, strict=True), style, label=label)
    for name, places in points.items():
        style, alpha = ("o", 1.0) if name.startswith("ours") else ("x", 0.5)
        axis.plot(*zip(*places, strict=True), style, label=name, alpha=alpha)
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="operations a byte, with 2-bit weights or the latent cache",
        ylabel="TFLOPS achieved",
    )
    axis.legend(fontsize=8)
    return figure
