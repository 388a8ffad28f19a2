"""The contenders of the whole model: their files, and their processes."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench_records import NotRunError, log
from cpu_model_worker import BODY, NATIVE, TORCH_BFLOAT16, TORCH_FLOAT32
from export_300m import in_own_process, make_checkpoint

from tinylm_export.worker_process import WorkerProcess, worker_process

PROMPTS, DECODE_TOKENS = (128, 512), 128
_SLOW_DECODE_TOKENS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelContender:
    """One way to run TinyLM.

    Attributes:
        name: Shown in the tables.
        runtime: What the worker loads.
        head: Number format of the exported head.
        prompts: Prefills that it is timed on, in tokens.
        decode_tokens: Decode steps that it is timed on, fewer for slow ones.
        most_repeats: Most turns, for slow ones.
        max_abs_logit: Largest difference from the reference's logits; None for no limit.
        min_cosine: Smallest cosine with the reference's logits.
    """

    name: str
    runtime: str
    head: str = "float32"
    prompts: tuple[int, ...] = PROMPTS
    decode_tokens: int = DECODE_TOKENS
    most_repeats: int = 1000
    max_abs_logit: float | None = None
    min_cosine: float


OURS, OURS_INT8 = "ours", "ours, int8 head"

# A quantised activation that rounds the other way moves a logit by about 1e-2 (export/tolerances).
# What PyTorch computes in ordinary arithmetic has many of those; an int8 head adds its rounding.
CONTENDERS = (
    ModelContender(name=OURS, runtime=NATIVE, max_abs_logit=1e-2, min_cosine=0.999999),
    ModelContender(name=OURS_INT8, runtime=NATIVE, head="int8", min_cosine=0.999),
    ModelContender(
        name="ours, function bodies",
        runtime=BODY,
        prompts=PROMPTS[:1],
        decode_tokens=_SLOW_DECODE_TOKENS,
        most_repeats=3,
        max_abs_logit=1e-2,
        min_cosine=0.999999,
    ),
    *(
        ModelContender(
            name=f"TinyLM in {runtime}",
            runtime=runtime,
            decode_tokens=_SLOW_DECODE_TOKENS,
            most_repeats=3,
            min_cosine=0.9,
        )
        for runtime in (TORCH_FLOAT32, TORCH_BFLOAT16)
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """The random 300M model and its exports.

    Attributes:
        checkpoint: Directory of the checkpoint.
        onnx: Directory of each export by its head's format, or why there is none.
    """

    checkpoint: Path
    onnx: dict[str, Path | NotRunError]


def make_files(work_dir: Path) -> ModelFiles:
    """Make the checkpoint if it is missing, and export it anew."""
    folder = work_dir / "tinylm-300m"
    checkpoint = folder / "checkpoint"
    if not (checkpoint / "SHA256SUMS").is_file():
        log("tinylm-300m: make random weights")
        in_own_process(make_checkpoint, checkpoint)
    onnx: dict[str, Path | NotRunError] = {}
    for head in ("float32", "int8"):
        log(f"tinylm-300m: export, {head} head")
        onnx[head] = folder / f"onnx-{head}"
        reply = in_own_process(_export, checkpoint, onnx[head], head)
        if "not_run" in reply:
            onnx[head] = NotRunError(reply["not_run"])
    return ModelFiles(checkpoint=checkpoint, onnx=onnx)


def _export(checkpoint: Path, directory: Path, head: str) -> dict[str, Any]:
    from tinylm_export.to_onnx import export_onnx

    options: dict[str, Any] = {}
    if "lm_head" in inspect.signature(export_onnx).parameters:
        options["lm_head"] = head
    elif head != "float32":
        return {"not_run": f"export_onnx can't export an {head} head"}
    export_onnx(checkpoint, directory, **options)
    return {}


@contextlib.contextmanager
def model_process(
    runtime: str, files: ModelFiles, head: str, num_threads: int
) -> Iterator[tuple[WorkerProcess, float]]:
    """Start a worker and load its model; give it and the seconds that loading took.

    Raises:
        NotRunError: Something it needs is missing.
    """
    onnx = files.onnx[head]
    if isinstance(onnx, NotRunError):
        raise onnx
    worker_file = str(Path(__file__).with_name("cpu_model_worker.py"))
    with worker_process([worker_file], error=NotRunError) as worker:
        loaded = worker.ask(
            "load",
            contender=runtime,
            checkpoint=str(files.checkpoint),
            onnx=str(onnx),
            threads=num_threads,
        )
        yield worker, loaded["seconds"]
