"""One runtime in a process of its own, driven by ``tinylm_export.bench`` over JSON lines.

Requests, see :mod:`tinylm_export.worker_process`::

    {"do": "load", "runtime": ..., "directory": ..., ...}  -> {"load_seconds": ..., "kernels": ...}
    {"do": "answer"} -> {"tokens": [steps][batch], "margins": [steps][batch]}
    {"do": "time"}   -> {"prefill_seconds": ..., "decode_seconds": ...}
    {"do": "memory"} -> {"baseline_bytes": ..., "peak_bytes": ..., "held_bytes": ...}

A reply of ``{"error": ...}`` says what went wrong.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from tinylm.checkpoint import load_model
from tinylm.errors import TinyLMError
from tinylm.generate import Session, TorchSession, last_logits
from tinylm_export.worker_process import ResidentMemory, serve

if TYPE_CHECKING:
    from tinylm.model import TinyLM


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """What a worker is to run.

    Attributes:
        runtime: A key of :data:`RUNTIMES`, or :data:`ENGINE_RUNTIME`.
        directory: ONNX directory.
        checkpoint: The checkpoint it was exported from.
        activation: Number format of activations.
        lm_head: Number format of the head.
        prompt: Token ids [B, S]; the rows are equally long.
        new_tokens: Decode steps after the prompt.
        num_threads: Threads within an op; None for the runtime's own choice.
        native: Whether ``"onnxruntime"`` uses the native library; None if there is one.
        engine: Engine directory for ``"tensorrt"``.
    """

    runtime: str
    directory: str
    checkpoint: str | None
    activation: str
    lm_head: str
    prompt: list[list[int]]
    new_tokens: int
    num_threads: int | None
    native: bool | None = None
    engine: str | None = None


def _torch_model(settings: WorkerSettings) -> TinyLM:
    assert settings.checkpoint is not None
    model = load_model(settings.checkpoint)
    model.set_activation(settings.activation)  # type: ignore[arg-type]
    return model.quantize_head() if settings.lm_head == "int8" else model


def _pytorch(settings: WorkerSettings) -> Session:
    return TorchSession(_torch_model(settings))


def _pytorch_packed(settings: WorkerSettings) -> Session:
    return TorchSession(_torch_model(settings).pack())


def _onnxruntime(settings: WorkerSettings) -> Session:
    from tinylm_export.ort_session import OrtSession

    return OrtSession(settings.directory, num_threads=settings.num_threads, native=settings.native)


def _onnxruntime_bodies(settings: WorkerSettings) -> Session:
    return _onnxruntime(dataclasses.replace(settings, native=False))


def _tensorrt(settings: WorkerSettings) -> Session:
    from tinylm_export.trt_session import TrtSession

    assert settings.engine is not None
    return TrtSession(settings.engine)


RUNTIMES: dict[str, Callable[[WorkerSettings], Session]] = {
    "pytorch": _pytorch,
    "pytorch-packed": _pytorch_packed,
    "onnxruntime": _onnxruntime,
    "onnxruntime-bodies": _onnxruntime_bodies,
}
ORT_RUNTIMES = ("onnxruntime", "onnxruntime-bodies")
ENGINE_RUNTIME = "tensorrt"  # one for each engine that is named


class Worker:
    """Loads one runtime and answers requests about it."""

    def __init__(self) -> None:
        self._settings: WorkerSettings | None = None
        self._session: Session | None = None
        self._memory: ResidentMemory | None = None

    def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what a request asks for and return the reply."""
        action = request.pop("do")
        if action == "load":
            return self.load(WorkerSettings(**request))
        actions = {"answer": self.answer, "time": self.time, "memory": self.memory}
        return actions[action]()

    def load(self, settings: WorkerSettings) -> dict[str, Any]:
        """Load the runtime; the resident set counts from here, with its libraries in memory."""
        if settings.runtime in ORT_RUNTIMES:
            from tinylm_export.ort_session import import_onnxruntime

            import_onnxruntime()
        if settings.runtime == ENGINE_RUNTIME:
            from tinylm_export.trt_engine import import_tensorrt

            import_tensorrt()
        if settings.num_threads is not None:
            torch.set_num_threads(settings.num_threads)
        self._memory = ResidentMemory()
        start = time.perf_counter()
        make = _tensorrt if settings.runtime == ENGINE_RUNTIME else RUNTIMES[settings.runtime]
        self._session = make(settings)
        seconds = time.perf_counter() - start
        self._settings = settings
        kernels = getattr(self._session, "kernels", "PyTorch")
        return {"load_seconds": seconds, "kernels": kernels}

    def answer(self) -> dict[str, Any]:
        """Generate greedily; a token's margin is its logit's lead over the next best one."""
        tokens, margins = [], []
        for logits in self._steps():
            best = logits.topk(2, dim=-1)
            tokens.append(best.indices[:, 0].tolist())
            margins.append((best.values[:, 0] - best.values[:, 1]).tolist())
        return {"tokens": tokens, "margins": margins}

    def time(self) -> dict[str, Any]:
        """Time one prefill, and the decode steps together, with the choice of tokens."""
        steps = self._steps()
        start = time.perf_counter()
        next(steps)
        prefilled = time.perf_counter()
        for _ in steps:
            pass
        end = time.perf_counter()
        return {"prefill_seconds": prefilled - start, "decode_seconds": end - prefilled}

    def memory(self) -> dict[str, Any]:
        """Return the resident set before loading, the largest since, and what is still in use."""
        assert self._memory is not None
        return self._memory.figures()

    def _steps(self) -> Any:
        """Yield the logits [B, V] of the prefill and of each decode step."""
        assert self._session is not None and self._settings is not None
        tokens = torch.tensor(self._settings.prompt)
        batch, length = tokens.shape
        self._session.start(batch, length + self._settings.new_tokens)
        for _ in range(self._settings.new_tokens + 1):
            lens = torch.full((batch,), tokens.shape[1])
            logits = last_logits(self._session.step(tokens, lens), lens)
            yield logits
            tokens = logits.argmax(dim=-1, keepdim=True)


def main() -> None:
    """Serve requests until stdin ends."""
    serve(Worker().handle, (TinyLMError, ValueError, MemoryError))


if __name__ == "__main__":
    main()
