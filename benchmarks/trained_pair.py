"""What tools/real_run.sh trained: the ternary model beside its dense twin.

    python benchmarks/trained_pair.py run --out benchmarks/results/300m --sample text1.json

Reads the records and evaluations of both runs and writes ``pair.json``, ``loss.png`` and the
records themselves. ``--sample`` adds texts that `tinylm generate --json` made of either model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from train_records import records_of, training_speed

from tinylm.logs import Record
from tinylm.run_directory import RunDirectory
from tinylm.training_state import load_saved_config

NAMES = ("ternary", "dense")
TARGET = 1.35  # times the dense twin's perplexity


def read_run(folder: Path, name: str) -> tuple[dict[str, Any], list[Record]]:
    """Return what one run came to, and its training records.

    Raises:
        SystemExit: The run is not done.
    """
    evaluated = folder / f"{name}-eval.json"
    if not evaluated.exists():
        raise SystemExit(f"{evaluated} is missing: call tools/real_run.sh until both runs are done")
    run = folder / name
    config = load_saved_config(RunDirectory(run).config_file)
    steps = records_of(run, "train")
    held_out = json.loads(evaluated.read_text(encoding="utf-8"))
    found = {
        "run": _without(records_of(run, "run")[0], "kind", "step"),
        "schedule": dataclasses.asdict(config.schedule),
        "batch_size": config.training.batch_size,
        "seq_len": config.model.max_seq_len,
        "steps": steps[-1]["step"],
        "tokens": steps[-1]["tokens"],
        "rejected_steps": steps[-1]["rejected_steps"],
        "held_out": _without(held_out, "checkpoint", "file"),  # where they lay
        "held_out_curve": [[r["step"], r["loss"]] for r in records_of(run, "eval")],
        **training_speed(steps),
        "samples": [_without(r, "kind") for r in records_of(run, "sample")],
    }
    return found, steps


def _without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def draw(runs: dict[str, dict[str, Any]], steps: dict[str, list[Record]], path: Path) -> None:
    """Draw training loss (thin) and held-out loss (dots)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for color, (name, found) in zip(("tab:blue", "tab:orange"), runs.items(), strict=True):
        numbers, losses = zip(*((r["step"], r["loss"]) for r in steps[name]), strict=True)
        axes.plot(numbers, losses, color=color, alpha=0.35, linewidth=1)
        numbers, losses = zip(*found["held_out_curve"][1:], strict=True)
        label = f"{name}: held-out perplexity {found['held_out']['perplexity']:.2f}"
        axes.plot(numbers, losses, color=color, marker="o", label=label)
    axes.set(xlabel="step", ylabel="loss, nats a token", ylim=(2, 8))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def show(runs: dict[str, dict[str, Any]], ratio: float) -> None:
    """Print both runs and the verdict."""
    table = Table(title="The same steps")
    for column in ("", "steps", "tokens", "perplexity", "bits per byte", "tokens/s", "MFU", "GiB"):
        table.add_column(column, justify="right" if column else "left")
    for name, found in runs.items():
        table.add_row(
            name,
            f"{found['steps']:,}",
            f"{found['tokens']:,}",
            f"{found['held_out']['perplexity']:.2f}",
            f"{found['held_out']['bits_per_byte']:.3f}",
            f"{found['tokens_per_second']:,.0f}",
            f"{found['mfu']:.1%}" if "mfu" in found else "",
            f"{found['peak_memory_bytes'] / 2**30:.1f}",
        )
    Console().print(table)
    print(f"perplexity ternary / dense {ratio:.3f}, target at most {TARGET}")


def main(argv: Sequence[str] | None = None) -> int:
    """Read, print, write and draw; 1 if the ternary model is too far from its twin."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="OUT of tools/real_run.sh")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--sample", type=Path, nargs="*", default=[], help="JSON of tinylm generate"
    )
    given = parser.parse_args(argv)
    runs, steps = {}, {}
    for name in NAMES:
        runs[name], steps[name] = read_run(given.folder, name)
    ratio = runs["ternary"]["held_out"]["perplexity"] / runs["dense"]["held_out"]["perplexity"]
    texts = []
    for path in given.sample:
        text = json.loads(path.read_text(encoding="utf-8"))
        texts.append({"name": path.stem, "prompt": text["prompt"], "text": text["text"]})
    given.out.mkdir(parents=True, exist_ok=True)
    values = {"perplexity_ratio": ratio, **runs, "texts": texts}
    pair = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    (given.out / "pair.json").write_text(pair, encoding="utf-8")
    for name in NAMES:
        metrics = RunDirectory(given.folder / name).metrics_file
        shutil.copyfile(metrics, given.out / f"{name}.jsonl")
    draw(runs, steps, given.out / "loss.png")
    show(runs, ratio)
    return int(ratio > TARGET)


if __name__ == "__main__":
    raise SystemExit(main())
