"""TinyLM's speed on a CPU against what else its user could run, and the targets it is held to.

    pip install -e '.[cpu,bench]'
    python benchmarks/cpu.py --out cpu.json --plot cpu.png

Every answer is checked against a float64 or integer reference before it is timed; contenders take
turns. What can't be run is said, with the reason. The first run builds llama.cpp (some minutes).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import cpu_attention
import cpu_gemm
import cpu_model
import llama_cpp
from bench_records import Record, log
from cpu_report import draw, show
from cpu_targets import judge
from cpu_timing import Settings, default_work_dir
from rich.console import Console

from tinylm_export.machine import describe_machine

SECTIONS = ("gemm", "attention", "model", "memory")


def in_process(
    run: Callable[[Settings, int], list[Record]], settings: Settings, num_threads: int
) -> list[Record]:
    """Run a section in a fresh process, whose pools of threads are then of the right size."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(run, (settings, num_threads))


def measure(settings: Settings, sections: list[str]) -> list[Record]:
    """Run the sections that were asked for."""
    records = []
    for name, run in {"gemm": cpu_gemm.run_gemm, "attention": cpu_attention.run_attention}.items():
        if name in sections:
            for num_threads in settings.threads:
                records += in_process(run, settings, num_threads)
    if {"model", "memory"} & set(sections):
        files, rivals = cpu_model.prepare(settings)
        if "model" in sections:
            records += cpu_model.run_model(settings, files, rivals)
        if "memory" in sections:
            records += cpu_model.run_memory(settings, files, rivals)
    return records


def main() -> None:
    """Measure, print, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--plot", type=Path, help="PNG file to draw")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="section; repeatable")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=7, help="timed turns of each contender")
    parser.add_argument("--cold-mib", type=int, default=16, help="size of the copies of weights")
    parser.add_argument("--work-dir", type=Path, default=default_work_dir())
    arguments = parser.parse_args()
    settings = Settings(
        repeats=arguments.repeats,
        cold_bytes=arguments.cold_mib << 20,
        work_dir=arguments.work_dir,
        threads=tuple(arguments.threads),
    )
    machine = describe_machine()
    records = measure(settings, arguments.only or list(SECTIONS))
    verdicts = judge(records, settings.threads)
    # Wide enough for every column, also where the output goes into a file.
    show(Console(width=200), records, verdicts)
    if arguments.out:
        results = {
            "machine": machine,
            "settings": {"repeats": settings.repeats, "cold_bytes": settings.cold_bytes},
            "rival_model": llama_cpp.describe(),
            "records": [dataclasses.asdict(record) for record in records],
            "targets": [dataclasses.asdict(verdict) for verdict in verdicts],
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if arguments.plot:
        draw(records, machine, arguments.plot)
    log("done")


if __name__ == "__main__":
    main()
