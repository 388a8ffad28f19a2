"""The contenders of the whole model: their files, and their processes."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from bench_records import NotRunError, log
from cpu_model_worker import BODY, NATIVE, TORCH_BFLOAT16, TORCH_FLOAT32
from export_300m import in_own_process, make_checkpoint

PROMPTS, DECODE_TOKENS = (128, 512), 128
_SLOW_DECODE_TOKENS = 16
_STDERR_TAIL_CHARS = 300


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


class WorkerProcess:
    """Asks one worker."""

    def __init__(self, process: subprocess.Popen[str], stderr: IO[str]) -> None:
        self._process = process
        self._stderr = stderr

    def ask(self, action: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for its reply.

        Raises:
            NotRunError: The worker reports an error, or has ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps({"do": action, **arguments}), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            self._stderr.seek(0)
            tail = self._stderr.read()[-_STDERR_TAIL_CHARS:].strip()
            raise NotRunError(f"ended with code {self._process.wait()} during {action!r}: {tail}")
        reply = json.loads(line)
        if "error" in reply:
            raise NotRunError(reply["error"])
        return reply


@contextlib.contextmanager
def worker_process(
    runtime: str, files: ModelFiles, head: str, num_threads: int
) -> Iterator[tuple[WorkerProcess, float]]:
    """Start a worker and load its model; give it and the seconds that loading took.

    Raises:
        NotRunError: Something it needs is missing.
    """
    onnx = files.onnx[head]
    if isinstance(onnx, NotRunError):
        raise onnx
    command = [sys.executable, str(Path(__file__).with_name("cpu_model_worker.py"))]
    with (
        tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace") as stderr,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as process,
    ):
        try:
            worker = WorkerProcess(process, stderr)
            loaded = worker.ask(
                "load",
                contender=runtime,
                checkpoint=str(files.checkpoint),
                onnx=str(onnx),
                threads=num_threads,
            )
            yield worker, loaded["seconds"]
        finally:
            process.kill()
