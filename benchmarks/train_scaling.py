"""How training scales over the processes of one machine: speed, memory, efficiency, agreement.

    python benchmarks/train_scaling.py --processes 2 --out scaling.json    # on two GPUs

Every figure is of ``tinylm train`` itself, started by torchrun, and read from its records. One
process and N processes have the same batch each, so the efficiency is
``tokens/s of N / (N * tokens/s of 1)``. Then runs with the same global batch on 1 and N processes
must have the same losses, and a checkpoint of N must go on in 1, and one of 1 in N.

``--data`` takes a folder of ``tinylm data prepare``, and any machine with PyTorch will do. Without
it, text and tokenizer are made once in ``--inputs`` from docstrings of the installed packages.
What follows ``--`` goes to ``tinylm train``, such as ``-- --compile``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from train_records import records_of, training_speed

from tinylm_export.machine import describe_machine

VOCAB_SIZE = 2048
TEXT_BYTES = 1_000_000
# Float32 sums in another order move weights across the borders between codes: see SHORT_RUN in
# tests/tolerances.py. bfloat16 has such borders in every product.
TOLERANCE = {"cpu": 1e-3, "cuda": 5e-3}
PARTS = ("speed", "losses")
# What `tinylm train` is told for each.
MODES = {
    "ddp": ("--parallel", "ddp"),
    "fsdp": ("--parallel", "fsdp"),
    "fsdp-no-reshard": ("--parallel", "fsdp", "--no-reshard-after-forward"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What all runs of a measurement share.

    Attributes:
        data: Folder of ``tinylm data prepare``; None: the files in ``inputs``.
        inputs: Folder of text, tokenizer and tokens.
        work: Folder for runs, emptied after each.
        preset: Model.
        seq_len: Tokens of a sequence.
        batch_per_process: Sequences a process has in each step.
        steps: Steps of a timed run; the first record, with its warm-up, is left out.
        loss_steps: Steps of a run whose losses are compared; its middle is where runs change over.
        log_every: Steps a record.
        device: cpu or cuda.
        further: Arguments for ``tinylm train``.
    """

    data: Path | None
    inputs: Path
    work: Path
    preset: str
    seq_len: int
    batch_per_process: int
    steps: int
    loss_steps: int
    log_every: int
    device: str
    further: tuple[str, ...] = ()


def make_inputs(folder: Path) -> None:
    """Gather text and train a tokenizer, unless they are there."""
    if (folder / "tokenizer").is_dir():
        return
    from tinylm.sample import gather_docstrings
    from tinylm.tokenizer import train_tokenizer

    gather_docstrings(folder / "train.jsonl", folder / "val.jsonl", max_bytes=TEXT_BYTES)
    train_tokenizer([folder / "train.jsonl"], folder / "tokenizer", vocab_size=VOCAB_SIZE)


def command(setup: Setup, out: Path, processes: int, *further: str) -> list[str]:
    """Return the command line of one run."""
    if setup.data is not None:
        source = ["--data", str(setup.data), "--no-verify-data"]
    else:
        source = [
            *("--train-file", str(setup.inputs / "train.jsonl")),
            *("--val-file", str(setup.inputs / "val.jsonl")),
            *("--tokenizer", str(setup.inputs / "tokenizer"), "--num-proc", "1"),
        ]
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(processes), "-m", "tinylm.cli", "train"),
        *("--preset", setup.preset, "--max-seq-len", str(setup.seq_len)),
        *source,
        *("--out", str(out), "--device", setup.device, "--dropout", "0"),
        *("--warmup-steps", "2", "--eval-every", "1000000", "--sample-tokens", "0"),
        *("--eval-max-tokens", str(4 * setup.seq_len), "--no-tensorboard"),
        *setup.further,
        *further,
    ]


def run(setup: Setup, name: str, processes: int, *further: str) -> list[dict[str, Any]]:
    """Run to the end and return the training records.

    Raises:
        SystemExit: The run failed; its last lines are shown.
    """
    out = setup.work / name
    threads = str(max(1, len(os.sched_getaffinity(0)) // processes))
    environment = {
        **os.environ,
        "TINYLM_CACHE": str(setup.inputs / "cache"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
    }
    print(f"{name} ...", file=sys.stderr, flush=True)
    done = subprocess.run(
        command(setup, out, processes, *further), env=environment, capture_output=True, text=True
    )
    if done.returncode:
        tail = (done.stdout + done.stderr).splitlines()[-60:]
        raise SystemExit("\n".join([f"{name}: exit code {done.returncode}", *tail]))
    return records_of(out, "train")


def measure(setup: Setup, mode: str, processes: int) -> dict[str, Any]:
    """Time one mode: tokens a second over the records after the first."""
    name = f"{mode}-{processes}"
    records = run(
        setup,
        name,
        processes,
        *(*MODES[mode], "--max-steps", str(setup.steps)),
        *("--batch-size", str(setup.batch_per_process * processes)),
        *("--log-every", str(setup.log_every), "--save-every", "1000000"),
    )
    shutil.rmtree(setup.work / name)
    return {"mode": mode, "processes": processes, **training_speed(records)}


def add_efficiency(results: Sequence[dict[str, Any]]) -> None:
    """Add each mode's speed in relation to one process of DDP, which is a run of its own."""
    single = next(r for r in results if r["mode"] == "ddp" and r["processes"] == 1)
    for result in results:
        ideal = result["processes"] * single["tokens_per_second"]
        result["efficiency"] = result["tokens_per_second"] / ideal


def compare_losses(setup: Setup, modes: Sequence[str], processes: int) -> Iterator[dict[str, Any]]:
    """Train with one global batch on 1 and N processes, and hand checkpoints to and fro.

    With ``--deterministic``: else two runs of one process differ by as much as is looked for here,
    since the fastest kernels on a GPU add up in the order in which they come.

    Yields:
        For each pair of runs: the largest relative difference of a loss, and whether it is within
        the tolerance.
    """
    half = setup.loss_steps // 2
    fixed = (
        *("--max-steps", str(2 * half), "--save-every", str(half), "--log-every", "1"),
        *("--batch-size", str(setup.batch_per_process * processes)),
        *("--micro-batch-size", str(setup.batch_per_process), "--deterministic"),
    )
    limit = TOLERANCE[setup.device.partition(":")[0]]
    expected = run(setup, "one", 1, *MODES["ddp"], *fixed)

    def compare(what: str, records: list[dict[str, Any]]) -> dict[str, Any]:
        pairs = zip(records, expected, strict=True)
        worst = max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in pairs)
        print(f"{what}: worst difference of a loss {worst:.1e}", file=sys.stderr, flush=True)
        return {"run": what, "worst": worst, "tolerance": limit, "agrees": worst <= limit}

    for mode in modes:
        name = f"{mode}-many"
        yield compare(f"{mode} on {processes}", run(setup, name, processes, *MODES[mode], *fixed))
        middle = f"step-{half:08d}"
        back = ("--resume-from", str(setup.work / name / "checkpoints" / middle))
        records = run(setup, name, 1, *MODES["ddp"], *fixed, *back)
        yield compare(f"{mode} on {processes}, then 1", records)
        shutil.rmtree(setup.work / name)
        shutil.copytree(setup.work / "one", setup.work / name, symlinks=True)
        records = run(setup, name, processes, *MODES[mode], *fixed, *back)
        yield compare(f"1, then {mode} on {processes}", records)
        shutil.rmtree(setup.work / name)


def table(results: Sequence[dict[str, Any]], comparisons: Sequence[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    lines = []
    if results:
        lines += [
            "| mode | processes | tokens/s | s a step | efficiency | MFU | peak memory, GiB |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
    for r in results:
        mfu = f"{r['mfu']:.1%}" if "mfu" in r else ""
        memory = f"{r['peak_memory_bytes'] / 2**30:.2f}" if "peak_memory_bytes" in r else ""
        lines.append(
            f"| {r['mode']} | {r['processes']} | {r['tokens_per_second']:,.0f} | "
            f"{r['seconds_per_step']:.4f} | {r['efficiency']:.3f} | {mfu} | {memory} |"
        )
    if comparisons:
        lines += ["", "| same global batch | worst difference of a loss | |", "| --- | --- | --- |"]
    for c in comparisons:
        verdict = "agrees" if c["agrees"] else f"above {c['tolerance']:g}"
        lines.append(f"| {c['run']} | {c['worst']:.1e} | {verdict} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table and write JSON; 1 if losses disagree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--modes", default=",".join(MODES), help=f"of {', '.join(MODES)}")
    parser.add_argument("--preset", default="tinylm-300m")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch-per-process", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--loss-steps", type=int, default=20)
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--data", type=Path, help="folder of tinylm data prepare")
    parser.add_argument("--inputs", type=Path, default=Path("build/train_scaling"))
    parser.add_argument("--work", type=Path, default=Path("build/train_scaling/runs"))
    parser.add_argument("--part", choices=PARTS, help="default: both, one after the other")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("further", nargs="*", help="arguments for tinylm train, after --")
    given = parser.parse_args(argv)
    modes = given.modes.split(",")
    if unknown := set(modes) - set(MODES):
        parser.error(f"--modes takes {', '.join(MODES)}, found {', '.join(sorted(unknown))}")
    if given.steps < 2 * given.log_every:
        parser.error(f"--steps must be at least 2 * --log-every, found {given.steps}")
    if given.data is None:
        make_inputs(given.inputs)
    shutil.rmtree(given.work, ignore_errors=True)
    setup = Setup(
        data=given.data,
        inputs=given.inputs,
        work=given.work,
        preset=given.preset,
        seq_len=given.seq_len,
        batch_per_process=given.batch_per_process,
        steps=given.steps,
        loss_steps=given.loss_steps,
        log_every=given.log_every,
        device=given.device,
        further=tuple(given.further),
    )
    values: dict[str, Any] = {
        "machine": describe_machine(),
        "preset": given.preset,
        "seq_len": given.seq_len,
        "batch_per_process": given.batch_per_process,
        "arguments": given.further,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)

    def keep(part: str, result: dict[str, Any]) -> None:
        """Write down at once what a later run's failure can't take away."""
        values.setdefault(part, []).append(result)
        if part == "speed":
            add_efficiency(values[part])
        given.out.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    parts = PARTS if given.part is None else (given.part,)
    if "speed" in parts:
        for mode, processes in [("ddp", 1), *((mode, given.processes) for mode in modes)]:
            keep("speed", measure(setup, mode, processes))
    if "losses" in parts:
        for comparison in compare_losses(setup, modes, given.processes):
            keep("losses", comparison)
    shutil.rmtree(given.work, ignore_errors=True)
    print(table(values.get("speed", ()), values.get("losses", ())))
    return 0 if all(c["agrees"] for c in values.get("losses", ())) else 1


if __name__ == "__main__":
    sys.exit(main())
