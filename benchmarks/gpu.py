"""TinyLM's speed on an NVIDIA GPU against what else its user could run, and its targets.

    tinylm-export native build --gpu --cuda-tests
    pip install -e '.[bench-gpu]'
    python benchmarks/gpu.py --out gpu.json --plot gpu.png
    python benchmarks/gpu.py --section model --engine trt --dense-engine trt-dense --onnx onnx

Every answer is checked against a float64 reference before it is timed; contenders take turns. What
can't be run is said, with the reason. ``--show gpu.json`` prints and draws an earlier run again,
without a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench_records import expecting_results, log
from gpu_timing import CALLS, REPEATS, GpuRecord, Stopwatch
from rich.console import Console

from tinylm_export import cuda_kernels
from tinylm_export.bench_report import Spread
from tinylm_export.machine import describe_machine, installed_versions

SECTIONS = ("gemm", "attention", "model")
_RIVALS = ("humming-kernels", "fa3-fwd", "triton")
_SMI_FIELDS = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem")


def main() -> None:
    """Measure or read, print, write and draw."""
    arguments = parse_arguments()
    broken: list[str] = []
    if arguments.show:
        machine, records = load(arguments.show)
    else:
        require_gpu(arguments.section)
        machine = describe_gpu_machine()
        records, broken = measure(arguments, machine)
    report(records, machine, plot=arguments.plot)
    if broken:
        log(f"ended by an error, see above: {', '.join(broken)}")
        sys.exit(1)
    log("done")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--plot", type=Path, help="PNG file to draw, and one NAME-roofline.png")
    parser.add_argument(
        "--section",
        action="append",
        choices=SECTIONS,
        help="repeatable; default gemm and attention, and model where an engine is named",
    )
    parser.add_argument("--engine", type=Path, help="engine directory of tinylm-export trt")
    parser.add_argument("--dense-engine", type=Path, help="the same, built with --dense")
    parser.add_argument("--onnx", type=Path, help="directory that both were built from")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="replays of each CUDA graph")
    parser.add_argument("--show", type=Path, metavar="JSON", help="an earlier run, not a new one")
    arguments = parser.parse_args()
    engines = arguments.engine or arguments.dense_engine
    arguments.section = arguments.section or list(SECTIONS if engines else SECTIONS[:2])
    if arguments.repeats < 1:
        parser.error(f"--repeats must be at least 1, found {arguments.repeats}")
    if "model" in arguments.section and not engines and not arguments.show:
        parser.error("--section model needs --engine or --dense-engine, or both")
    return arguments


def require_gpu(sections: list[str]) -> None:
    """End with a message if the machine lacks what the sections can't do without."""
    missing = []
    if not torch.cuda.is_available():
        missing.append("an NVIDIA GPU that PyTorch can use (found none)")
    if {"gemm", "attention"} & set(sections) and cuda_kernels.library_path() is None:
        missing.append(
            f"{cuda_kernels.LIBRARY} (found none; tinylm-export native build --gpu --cuda-tests)"
        )
    if missing:
        log(f"this benchmark needs {' and '.join(missing)}.")
        sys.exit(2)


def measure(
    arguments: argparse.Namespace, machine: dict[str, Any]
) -> tuple[list[GpuRecord], list[str]]:
    """Run the sections that were asked for; the file is written after each of them.

    Returns:
        What was measured, and the sections that an unforeseen error ended.
    """
    from gpu_attention import run_attention
    from gpu_gemm import run_gemm
    from gpu_roofline import run_roofline

    stopwatch = Stopwatch(arguments.repeats)
    runs: dict[str, Callable[[], Iterator[GpuRecord]]] = {
        "roofline": lambda: run_roofline(stopwatch),
        "gemm": lambda: run_gemm(stopwatch),
        "attention": lambda: run_attention(stopwatch),
        "model": lambda: _run_model(arguments),
    }
    records: list[GpuRecord] = []
    broken = []
    for section in ("roofline", *(name for name in SECTIONS if name in arguments.section)):
        started = time.perf_counter()
        try:
            for record in runs[section]():
                records.append(record)
        except Exception:  # nobody watches: what is measured is kept, and the rest goes on
            traceback.print_exc()
            broken.append(section)
        log(f"{section}: {time.perf_counter() - started:.1f} s")
        if arguments.out:
            save(arguments.out, machine, records, arguments.repeats)
    return records, broken


def _run_model(arguments: argparse.Namespace) -> Iterator[GpuRecord]:
    from gpu_model import DENSE, OURS, run_model

    engines = {OURS: arguments.engine, DENSE: arguments.dense_engine}
    given = {name: directory for name, directory in engines.items() if directory is not None}
    return run_model(given, arguments.onnx)


def describe_gpu_machine() -> dict[str, Any]:
    """Return the machine, its GPU and the versions that matter, for JSON."""
    properties = torch.cuda.get_device_properties(0)
    machine = describe_machine()
    machine["versions"] |= installed_versions(_RIVALS)
    machine["gpu"] = {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **_nvidia_smi(),
    }
    return machine


def _nvidia_smi() -> dict[str, str]:
    """Return what only the driver's tool says; nothing where it is missing."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = found.stdout.splitlines()[0].split(", ")
    return dict(zip(_SMI_FIELDS, values, strict=False))


def save(path: Path, machine: dict[str, Any], records: list[GpuRecord], repeats: int) -> None:
    """Write what was measured, and the verdicts on it."""
    from gpu_targets import judge

    results = {
        "machine": machine,
        "settings": {"calls": CALLS, "repeats": repeats},
        "records": [dataclasses.asdict(record) for record in records],
        "targets": [dataclasses.asdict(verdict) for verdict in judge(records)],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def load(path: Path) -> tuple[dict[str, Any], list[GpuRecord]]:
    """Read what :func:`save` wrote: the machine and the records."""
    with expecting_results(path):
        results = json.loads(path.read_text(encoding="utf-8"))
        records = []
        for values in results["records"]:
            spread = values["spread"]
            values["spread"] = None if spread is None else Spread(**spread)
            records.append(GpuRecord(**values))
        machine: dict[str, Any] = results["machine"]
    return machine, records


def report(records: list[GpuRecord], machine: dict[str, Any], *, plot: Path | None) -> None:
    """Print the tables and draw the pictures."""
    from gpu_report import draw, show
    from gpu_targets import judge

    # Wide enough for every column, also where the output goes into a file.
    show(Console(width=200), records, judge(records))
    if plot:
        try:
            for path in draw(records, machine, plot):
                log(f"drew {path}")
        except ImportError as error:
            log(f"no pictures: {error}. Draw them elsewhere with --show and the file of --out.")


if __name__ == "__main__":
    main()
