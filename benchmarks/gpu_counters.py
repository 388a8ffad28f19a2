"""What limits TinyLM's CUDA kernels: profiler counters of each kernel of some cases, by ncu.

    tinylm-export native build --gpu --cuda-tests
    python benchmarks/gpu_counters.py --out gpu_counters.json

Each kernel is profiled in its second call, with cold caches and at the GPU's own clocks. It runs
alone: where gpu.py lets kernels overlap (programmatic dependent launch), its times are smaller.
``--show gpu_counters.json`` prints an earlier run again, without a GPU.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench_records import expecting_results, log
from rich.console import Console
from rich.table import Table

SECTIONS = (
    "SpeedOfLight",
    "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis",
    "SchedulerStats",
    "WarpStateStats",
    "InstructionStats",
    "LaunchStats",
    "Occupancy",
)
# Column: ncu's name.
COUNTERS = {
    "us": "Duration",
    "SM GHz": "SM Frequency",
    "DRAM %": "DRAM Throughput",
    "L2 hits %": "L2 Hit Rate",
    "compute %": "Compute (SM) Throughput",
    "issue slots %": "Issue Slots Busy",
    "warp instructions a scheduler": "Avg. Executed Instructions Per Scheduler",
    "cycles a warp instruction": "Warp Cycles Per Executed Instruction",
    "registers": "Registers Per Thread",
    "thread blocks": "Grid Size",
    "threads": "Block Size",
}
# ncu chooses units by size.
_UNITS = {
    "us": {"ns": 1e-3, "us": 1.0, "ms": 1e3},
    "SM GHz": {"hz": 1e-9, "mhz": 1e-3, "ghz": 1.0},
}
# N, K, M with int8 activations.
GEMM_CASES = (
    (1024, 1024, 1),
    (5632, 1024, 1),
    (4096, 4096, 1),
    (8192, 8192, 1),
    (1024, 1024, 16),
    (8192, 8192, 16),
    (1024, 1024, 64),
    (1024, 1024, 256),
    (4096, 4096, 256),
    (1024, 1024, 2048),
    (5632, 1024, 2048),
    (8192, 8192, 2048),
)
_MARKER = "digamma"  # in the name of a kernel of PyTorch's that announces each case
_TIMEOUT_SECONDS = 300


def main() -> None:
    """Profile or read, print and write."""
    arguments = parse_arguments()
    if arguments.run:
        run_cases()
        return
    if arguments.show:
        results = load(arguments.show)
    else:
        results = profile()
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    show(results)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--show", type=Path, metavar="JSON", help="an earlier run, not a new one")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)  # what ncu runs
    return parser.parse_args()


def load(path: Path) -> dict[str, Any]:
    """Read what ``--out`` wrote."""
    with expecting_results(path):
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kernels = [kernel["kernel"] for case in results["cases"] for kernel in case["kernels"]]
        log(f"{len(kernels)} kernels on {results['machine']['gpu']['name']}")
    return results


def profile() -> dict[str, Any]:
    """Run the cases under ncu.

    Returns:
        The machine, and the kernels of each case in their order, with their counters.
    """
    from gpu import describe_gpu_machine, require_gpu

    require_gpu(["gemm"])
    ncu = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    if not Path(ncu).is_file():
        log("ncu (Nsight Compute) is not on the path; it comes with the CUDA toolkit.")
        sys.exit(2)
    command = [ncu, "--csv", "--page", "details", "--clock-control", "none"]
    command += ["--profile-from-start", "off"]
    for section in SECTIONS:
        command += ["--section", section]
    command += [sys.executable, __file__, "--run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
    if done.returncode != 0:
        log(f"ncu ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        sys.exit(1)
    cases = list(read_cases(done.stdout, case_names()))
    return {"machine": describe_gpu_machine(), "cases": cases}


def case_names() -> list[str]:
    """Return the cases in the order in which :func:`run_cases` runs them."""
    from gpu_attention import DECODE_STEPS, PREFILL_STEPS
    from gpu_attention import case_name as attention_name
    from gpu_gemm import case_name

    names = [case_name(*case) for case in GEMM_CASES]
    return names + [attention_name(step) for step in (*PREFILL_STEPS, *DECODE_STEPS)]


def run_cases() -> None:
    """Run each case once for the profiler, announced by a kernel of PyTorch's."""
    import torch
    from gpu_attention import DECODE_STEPS, PREFILL_STEPS
    from gpu_attention_contenders import ours
    from gpu_gemm_contenders import OursInt8
    from gpu_gemm_problem import GpuGemmProblem
    from gpu_timing import Call, Stopwatch

    stopwatch = Stopwatch(1)
    marker = torch.ones(1, device="cuda")

    def run(call: Call) -> None:
        call()  # whatever is done once only
        torch.digamma(marker)
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        torch.digamma(marker)
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        torch.cuda.empty_cache()

    with torch.inference_mode():
        for num_outputs, num_inputs, num_rows in GEMM_CASES:
            problem = GpuGemmProblem(num_outputs, num_inputs, num_rows)
            run(OursInt8(problem, stopwatch).bind(num_rows)[0])
        for step in (*PREFILL_STEPS, *DECODE_STEPS):
            run(ours(step, stopwatch).calls[0])


def read_cases(output: str, names: list[str]) -> Iterator[dict[str, Any]]:
    """Read ncu's ``--csv --page details``.

    Args:
        output: What it printed: lines of its own, then rows of one metric each.
        names: The cases; each begins with the marker's kernel.

    Yields:
        A case's name and its kernels, each with its name and counters.
    """
    lines = output.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith('"ID"'))
    kernels: dict[str, dict[str, Any]] = {}
    markers = set()
    for row in csv.DictReader(lines[head:]):
        name = re.sub(r"^void |tinylm::cuda::|\([^()]*\)$", "", row["Kernel Name"])
        if _MARKER in row["Kernel Name"]:
            markers.add(row["ID"])
        kernel = kernels.setdefault(row["ID"], {"kernel": name})
        for column, metric in COUNTERS.items():
            if row["Metric Name"] == metric:
                number = float(row["Metric Value"].replace(",", ""))
                scale = _scale(column, row["Metric Unit"])
                if scale is not None:
                    kernel[column] = number * scale
    found: list[list[dict[str, Any]]] = []
    for identity, kernel in kernels.items():
        if identity in markers:
            found.append([])
        else:
            found[-1].append(kernel)
    for name, run in zip(names, found, strict=True):
        yield {"case": name, "kernels": run}


def _scale(column: str, unit: str) -> float | None:
    """Return what makes a column's unit of ncu's; None, and say so, where that is not known."""
    if column not in _UNITS:
        return 1.0
    scale = _UNITS[column].get(unit.lower())
    if scale is None:
        log(f"{column} is left out: expected {', '.join(_UNITS[column])}, found {unit!r}.")
    return scale


def show(results: dict[str, Any]) -> None:
    """Print the table."""
    table = Table(title=f"Counters, {results['machine']['gpu']['name']}")
    for column in ("case", "kernel", *COUNTERS):
        table.add_column(column, justify="left" if column in ("case", "kernel") else "right")
    for case in results["cases"]:
        for kernel in case["kernels"]:
            cells = (f"{kernel[c]:,.4g}" if c in kernel else "" for c in COUNTERS)
            table.add_row(case["case"], kernel["kernel"], *cells)
    Console(width=240).print(table)


if __name__ == "__main__":
    main()
