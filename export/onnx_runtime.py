"""An ONNX directory as a runtime of ``tinylm.lm_eval``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from tinylm.generate import Session
from tinylm_export.ort_session import OrtSession


class OnnxRuntime:
    """An exported model in ONNX Runtime, on the CPU.

    A graph with a cache gives logits at each row's last token; for the others its tokens are fed
    one by one, which is slow. One exported with ``--all-logits``, or for ``text-generation``, gives
    all at once.

    Args:
        directory: What ``tinylm-export onnx`` wrote.

    Raises:
        ExportError: It can't be loaded.
        NativeError: The native library is there and can't be used.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.device = torch.device("cpu")
        self._session = OrtSession(directory)
        self.config = self._session.config
        self._warned = False

    def logits(self, input_ids: Tensor, seq_lens: Tensor) -> Iterator[Tensor]:
        """Compute logits at every position, float32 [B, s, V] in parts."""
        session, (batch, length) = self._session, input_ids.shape
        if session.info.task == "text-generation":
            yield session.logits(input_ids, torch.arange(length) < seq_lens[:, None])
            return
        session.start(batch, length)
        if session.info.all_logits:
            yield session.step(input_ids, seq_lens)
            return
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.directory} gives logits at the last token only, so each token is a step of "
                "its own. Export with --all-logits to score faster.",
                RuntimeWarning,
                stacklevel=2,
            )
        for position in range(length):
            real = (position < seq_lens).long()
            yield session.step(input_ids[:, position : position + 1], real)[:, None]

    def session(self) -> Session:
        """Return the graph's cached steps.

        Raises:
            ExportError: From ``start``, where the graph has no cache.
        """
        return self._session
