"""Real text, a real tokenizer and short runs for the tests of training."""

from __future__ import annotations

import atexit
import functools
import io
import itertools
import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

import tinylm
from tinylm.paths import cache_dir
from tinylm.run_settings import resolve
from tinylm.trainer import Trainer
from tinylm.training_config import TrainConfig

VOCAB_SIZE = 384


class Inputs(NamedTuple):
    train: Path
    val: Path
    tokenizer: Path


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@functools.cache
def inputs() -> Inputs:
    """Make training text from this package's own sources, and a tokenizer for it."""
    from tinylm.tokenizer import train_tokenizer

    folder = Path(tempfile.mkdtemp(prefix="tinylm-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _use_cache(folder / "cache")
    sources = sorted(Path(tinylm.__file__).parent.glob("*.py"))
    paragraphs = [p for s in sources for p in s.read_text(encoding="utf-8").split("\n\n\n")]
    train = write_jsonl(folder / "train.jsonl", paragraphs[: len(paragraphs) * 9 // 10][:80])
    held_out: list[str] = []
    while sum(map(len, held_out)) < 10_000:
        held_out.append(paragraphs[-1 - len(held_out)])
    val = write_jsonl(folder / "val.jsonl", held_out)
    tokenizer = train_tokenizer([train], folder / "tokenizer", vocab_size=VOCAB_SIZE)
    return Inputs(train, val, tokenizer)


def _use_cache(folder: Path) -> None:
    """Keep this process's tokens in a cache of its own; SDKs stay where they were fetched."""
    if "TINYLM_CACHE" in os.environ:
        return
    shared = cache_dir()
    folder.mkdir()
    for sdk in ("tensorrt", "cuda"):
        if (shared / sdk).is_dir():
            (folder / sdk).symlink_to(shared / sdk)
    os.environ["TINYLM_CACHE"] = str(folder)


def config(out: Path, **sections: dict[str, Any]) -> TrainConfig:
    """Make a short run of the test preset; sections override."""
    data = inputs()
    base: dict[str, dict[str, Any]] = {
        "model": {"max_seq_len": 32},
        "data": {
            "train_file": str(data.train),
            "val_file": str(data.val),
            "tokenizer": str(data.tokenizer),
        },
        "optimizer": {},
        "schedule": {"lr": 3e-3, "warmup_steps": 2},
        "training": {"max_steps": 8, "batch_size": 4, "device": "cpu"},
        "performance": {},
        "evaluation": {"eval_every": 4, "eval_max_tokens": 500, "sample_tokens": 0},
        "checkpoint": {"save_every": 4},
        "logging": {"log_every": 1, "tensorboard": False},
    }
    merged = {name: {**values, **sections.get(name, {})} for name, values in base.items()}
    return resolve({"out": str(out), "preset": "tinylm-test", **merged}, {})


def trainer(out: Path, *, resume: bool = False, **sections: dict[str, Any]) -> Trainer:
    return Trainer(config(out, **sections), resume=resume, console=Console(file=io.StringIO()))


def stop_after(run: Trainer, num_steps: int) -> None:
    """Let a run stop by itself after its step of that number, as a signal would have it."""
    take, numbers = run.take_gradients, itertools.count(run.state.step + 1)

    def take_and_stop() -> Any:
        run.stop.requested = next(numbers) == num_steps
        return take()

    run.take_gradients = take_and_stop  # type: ignore[method-assign]


def records(out: Path, kind: str) -> list[dict[str, Any]]:
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def losses(out: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in records(out, "train")]


def start_process(target: Callable[..., Any], *args: Any) -> Any:
    """Start a process of its own that has the slow imports behind it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tinylm.trainer", "tinylm.cli", "torch._dynamo", "transformers", "datasets"]
    )
    process = context.Process(target=target, args=args)
    process.start()
    return process
