"""One contender of the whole model in its own process, driven by ``cpu_model`` over JSON lines.

Requests, see :mod:`tinylm_export.worker_process`::

    {"do": "load", "contender": ..., "checkpoint": ..., "onnx": ..., "threads": ...} -> seconds
    {"do": "logits", "out": FILE} -> {}
    {"do": "prefill", "tokens": ...} -> {"seconds": ...}
    {"do": "decode", "tokens": ...} -> {"seconds": ...}
    {"do": "memory"} -> {"baseline_bytes": ..., "peak_bytes": ..., "held_bytes": ...}

A reply of ``{"error": ...}`` says what went wrong.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from bench_records import NotRunError

from tinylm.errors import TinyLMError
from tinylm.generate import Session, TorchSession
from tinylm.precision import ordinary_float32
from tinylm_export.ort_session import OrtSession, import_onnxruntime
from tinylm_export.worker_process import ResidentMemory, serve

SHORT_PROMPT = 8
_CHECKED_PROMPT, _CHECKED_STEPS = 24, 4
REFERENCE, TORCH_FLOAT32, TORCH_BFLOAT16 = "reference", "torch float32", "torch bfloat16"
NATIVE, BODY = "native", "function bodies"


class Worker:
    """Loads one contender and answers requests about it."""

    def __init__(self) -> None:
        self._session: Session | None = None
        self._vocab_size = 0
        self._memory: ResidentMemory | None = None
        self._modes = contextlib.ExitStack()

    def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what a request asks for and return the reply."""
        action = request.pop("do")
        actions: dict[str, Callable[..., dict[str, Any]]] = {
            "load": self.load,
            "logits": self.logits,
            "prefill": self.prefill,
            "decode": self.decode,
            "memory": self.memory,
        }
        return actions[action](**request)

    def load(self, *, contender: str, checkpoint: str, onnx: str, threads: int) -> dict[str, Any]:
        """Load the contender; the resident set counts from here, with its libraries in memory."""
        torch.set_num_threads(threads)
        # Imported first: neither the time nor the memory of Python's modules is the runtime's.
        import_onnxruntime()
        self._memory = ResidentMemory()
        start = time.perf_counter()
        if contender in (NATIVE, BODY):
            self._session = _onnxruntime(onnx, threads, native=contender == NATIVE)
        else:
            self._session = _pytorch(checkpoint, contender)
            if contender != REFERENCE:
                self._modes.enter_context(ordinary_float32())
        seconds = time.perf_counter() - start
        self._vocab_size = self._session.config.vocab_size
        return {"seconds": seconds}

    def logits(self, *, out: str) -> dict[str, Any]:
        """Save the logits after a prompt and after some more given tokens, [1 + steps, V]."""
        tokens = self._tokens(_CHECKED_PROMPT + _CHECKED_STEPS)
        self._start(tokens.shape[1])
        found = [self._step(tokens[:, :_CHECKED_PROMPT])]
        found += [self._step(tokens[:, i : i + 1]) for i in range(_CHECKED_PROMPT, tokens.shape[1])]
        np.save(out, torch.cat(found).numpy())
        return {}

    def prefill(self, *, tokens: int) -> dict[str, Any]:
        """Time one prefill."""
        prompt = self._tokens(tokens)
        self._start(tokens)
        start = time.perf_counter()
        self._step(prompt)
        return {"seconds": time.perf_counter() - start}

    def decode(self, *, tokens: int) -> dict[str, Any]:
        """Time decode steps after a short prompt; which tokens they are is settled before."""
        given = self._tokens(SHORT_PROMPT + tokens)
        self._start(given.shape[1])
        self._step(given[:, :SHORT_PROMPT])
        start = time.perf_counter()
        for i in range(SHORT_PROMPT, given.shape[1]):
            self._step(given[:, i : i + 1])
        return {"seconds": time.perf_counter() - start}

    def memory(self) -> dict[str, Any]:
        """Return the resident set before loading, the largest since, and what is still in use."""
        assert self._memory is not None
        return self._memory.figures()

    def _tokens(self, count: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self._vocab_size, (1, count), generator=generator)

    def _start(self, capacity: int) -> None:
        assert self._session is not None
        self._session.start(1, capacity)

    def _step(self, tokens: torch.Tensor) -> torch.Tensor:
        assert self._session is not None
        return self._session.step(tokens, torch.tensor([tokens.shape[1]]))


def _pytorch(checkpoint: str, contender: str) -> Session:
    from tinylm.checkpoint import load_model

    model = load_model(checkpoint)
    if contender == TORCH_BFLOAT16:
        model = model.to(torch.bfloat16)
    return TorchSession(model)


def _onnxruntime(directory: str, threads: int, *, native: bool) -> Session:
    return OrtSession(directory, num_threads=threads, native=native)


def main() -> None:
    """Serve requests until stdin ends."""
    serve(Worker().handle, (TinyLMError, NotRunError, ValueError, RuntimeError, MemoryError))


if __name__ == "__main__":
    main()
