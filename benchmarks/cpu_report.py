"""Tables and picture of the CPU benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_records import Record, Verdict
from bench_tables import section_table, show_notes, target_table
from cpu_attention import CASE
from cpu_targets import num_rows
from rich.console import Console

_TITLES = {
    "gemm": "One GEMM, microseconds (ours with norm and quantiser inside)",
    "attention": "One decode step of attention, microseconds",
    "model": "The 300M model, tokens/s",
    "memory": "Memory while decoding the 300M model, and time to start",
}


def show(console: Console, records: Sequence[Record], verdicts: Sequence[Verdict]) -> None:
    """Print a table for each section and number of threads, what was not run, and the targets."""
    for section, title in _TITLES.items():
        mine = [record for record in records if record.section == section]
        for threads in sorted({record.threads for record in mine}):
            chosen = [record for record in mine if record.threads == threads]
            console.print(section_table(f"{title}, {threads} threads", chosen))
    show_notes(console, records)
    console.print(target_table(verdicts))


def draw(records: Sequence[Record], machine: dict[str, Any], path: Path) -> None:
    """Draw speeds of the model, and the time of each GEMM and of attention."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [
        (_bars, [r for r in records if (r.section, r.case) == (section, case)], title)
        for section, case, title in (
            ("model", "prefill 512", "300M prefill 512, tokens/s"),
            ("model", "decode 128", "300M decode 128, tokens/s"),
            ("memory", "largest resident set", "largest resident set, MB"),
            ("attention", CASE, "attention, one decode step, microseconds"),
        )
    ]
    gemm = [record for record in records if record.section == "gemm"]
    for threads in sorted({record.threads for record in gemm}):
        for rows in sorted({num_rows(record.case) for record in gemm}):
            mine = [r for r in gemm if (r.threads, num_rows(r.case)) == (threads, rows)]
            panels.append((_lines, mine, f"GEMM, M = {rows}, {threads} threads, microseconds"))
    panels = [panel for panel in panels if panel[1]]
    height = -(-len(panels) // 4)
    size = (22, 5 * height)
    figure, axes = plt.subplots(height, 4, figsize=size, squeeze=False, constrained_layout=True)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (paint, mine, title) in zip(axes.flat, panels, strict=False):
        paint(axis, mine)
        axis.set_title(title)
    figure.suptitle(f"{machine['cpu']}, {machine['usable_cores']} cores; medians and ranges")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _bars(axis: Any, records: Sequence[Record]) -> None:
    """Draw a bar for each contender and number of threads."""
    names = list(dict.fromkeys(record.contender for record in records))
    counts = sorted({record.threads for record in records})
    height = 0.8 / len(counts)
    for i, count in enumerate(counts):
        mine = [r for r in records if r.threads == count and r.spread is not None]
        places = [names.index(record.contender) + i * height for record in mine]
        spreads = [record.spread for record in mine if record.spread is not None]
        medians = [spread.median for spread in spreads]
        errors = [
            [spread.median - spread.minimum for spread in spreads],
            [spread.maximum - spread.median for spread in spreads],
        ]
        axis.barh(places, medians, height, xerr=errors, label=f"{count} threads")
    run = {record.contender for record in records if record.spread is not None}
    labels = [name if name in run else f"{name}: not run" for name in names]
    axis.set_yticks([place + 0.4 - height / 2 for place in range(len(names))], labels)
    axis.set_ylim(len(names) - 0.2, -0.6)
    axis.legend()


def _lines(axis: Any, records: Sequence[Record]) -> None:
    """Draw a line for each contender over the shapes."""
    cases = list(dict.fromkeys(record.case for record in records))
    for name in dict.fromkeys(record.contender for record in records):
        found = {r.case: r.spread for r in records if r.contender == name and r.spread}
        style = "k-o" if name == "ours" else "--."
        shapes = [case.partition(" ")[0] for case in cases if case in found]
        medians = [found[case].median for case in cases if case in found]
        axis.plot(shapes, medians, style, label=name if found else f"{name}: not run")
    axis.set_yscale("log")
    axis.legend(fontsize=8)
