"""Recipes of training beside each other: held-out loss of the demo preset after the same steps.

    python benchmarks/recipe_sweep.py --work work --out recipes.json --plot recipes.png

Every run is `tinylm train` on the same text, in the same order, from the same weights. The text is
docstrings of the installed Python packages, as in `make demo`; results of two machines differ.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from train_records import records_of

from tinylm.training_config import RECIPES
from tinylm_export.machine import describe_machine

STEPS, BATCH_SIZE, EVERY = 500, 8, 50
VOCAB_SIZE, MEGABYTES = 4096, 8
TWO_STAGE = ("--recipe", "two-stage")
RUNS: dict[str, tuple[str, ...]] = {
    "default, lr 2e-4": (),
    "default, lr 1.5e-3": ("--lr", "1.5e-3"),
    "default, lr 4e-3": ("--lr", "4e-3"),
    "two-stage, lr 1.5e-3": TWO_STAGE,
    "two-stage, lr 4e-3": ("--lr", "4e-3", *TWO_STAGE),
    "dense, default, lr 1.5e-3": ("--dense", "--lr", "1.5e-3"),
    "dense, two-stage, lr 1.5e-3": ("--dense", *TWO_STAGE),
}


def tinylm(*arguments: str) -> None:
    """Run a command of TinyLM; its output stays on the terminal."""
    subprocess.run([sys.executable, "-m", "tinylm.cli", *arguments], check=True)


def prepare(work: Path) -> Path:
    """Gather text and make a tokenizer, once; return the prepared data."""
    text, tokens = work / "text", work / "tokens"
    if not (tokens / "index.json").exists():
        tinylm("data", "sample", "--out", str(text), "--max-mb", str(MEGABYTES))
        train, val = (str(text / f"{name}.jsonl") for name in ("train", "val"))
        tokenizer = str(work / "tokenizer")
        vocab = ("--vocab-size", str(VOCAB_SIZE))
        tinylm("tokenizer", "train", "--file", train, "--out", tokenizer, *vocab)
        given = ("--file", train, "--val-file", val, "--tokenizer", tokenizer)
        tinylm("data", "prepare", *given, "--out", str(tokens))
    return tokens


def run(name: str, data: Path, work: Path, steps: int) -> dict[str, Any]:
    """Train, or take what an earlier call trained; return the curve of held-out text."""
    out = work / "runs" / name.replace(", ", "-").replace(" ", "")
    result = out.parent / f"{out.name}.json"
    if not result.exists():
        tinylm(
            *("train", "--preset", "tinylm-demo", "--data", str(data), "--out", str(out)),
            *("--max-steps", str(steps), "--batch-size", str(BATCH_SIZE)),
            # BitNet's 375 are of many thousands of steps: a tenth of so short a run.
            *("--warmup-steps", str(steps // 10)),
            *("--eval-every", str(EVERY), "--save-every", str(10 * steps), "--sample-tokens", "0"),
            *("--no-tensorboard", "--json", str(result), *RUNS[name]),
        )
    evaluations = records_of(out, "eval")
    return {
        "flags": list(RUNS[name]),
        "curve": [[r["step"], r["loss"]] for r in evaluations],
        "loss": evaluations[-1]["loss"],
        "bits_per_byte": evaluations[-1]["bits_per_byte"],
    }


def show(runs: dict[str, dict[str, Any]], steps: int) -> None:
    """Print the last losses, best first."""
    table = Table(title=f"tinylm-demo, {steps} steps of {BATCH_SIZE} sequences")
    for column in ("run", "held-out loss", "bits per byte"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for name, found in sorted(runs.items(), key=lambda item: float(item[1]["loss"])):
        table.add_row(name, f"{found['loss']:.4f}", f"{found['bits_per_byte']:.4f}")
    Console().print(table)


def draw(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw the curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, found in runs.items():
        steps, losses = zip(*found["curve"][1:], strict=True)
        axes.plot(steps, losses, label=name, linestyle="--" if "--dense" in found["flags"] else "-")
    axes.set(xlabel="step", ylabel="held-out loss, nats a token")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train everything, print, write and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for text and runs")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--plot", type=Path, help="picture to draw")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each run")
    parser.add_argument("--run", action="append", choices=RUNS, help="default all")
    arguments = parser.parse_args()
    data = prepare(arguments.work)
    runs = {
        name: run(name, data, arguments.work, arguments.steps) for name in arguments.run or RUNS
    }
    values = {
        "machine": describe_machine(),
        "preset": "tinylm-demo",
        "steps": arguments.steps,
        "batch_size": BATCH_SIZE,
        "recipes": RECIPES,
        "runs": runs,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    show(runs, arguments.steps)
    if arguments.plot is not None:
        draw(runs, arguments.plot)


if __name__ == "__main__":
    main()
