"""The runtimes that parity compares with PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import onnx_ir as ir
import torch
from torch import Tensor

from tinylm.generate import Session
from tinylm_export.ort_session import OrtSession, make_inference_session
from tinylm_export.passes.all_logits import expose_all_logits
from tinylm_export.passes.mark_outputs import mark_outputs
from tinylm_export.to_onnx import ONNX_FILE


class ParityRuntime(Protocol):
    """A runtime that can be compared."""

    name: str
    version: str
    kernels: str

    @property
    def session(self) -> Session:
        """Cached steps."""

    def prefill(self, input_ids: Tensor, seq_lens: Tensor, nodes: list[str]) -> dict[str, Tensor]:
        """Run a right-padded batch and return ``logits`` [B, S, V] and the nodes' [B, S, width]."""


class OrtRuntime:
    """ONNX Runtime over an exported directory.

    Args:
        directory: What ``tinylm-export onnx`` wrote.
    """

    def __init__(self, directory: Path) -> None:
        import onnxruntime

        self.name, self.version = "ONNX Runtime", onnxruntime.__version__
        self.kernels = "function bodies in standard ops"
        self.session = OrtSession(directory)
        self._directory = directory
        self._inner: Any = None
        self._value_names: dict[str, str] = {}

    def prefill(self, input_ids: Tensor, seq_lens: Tensor, nodes: list[str]) -> dict[str, Tensor]:
        """Run a right-padded batch from an empty cache, with the nodes' outputs beside it."""
        if self._inner is None:
            model = expose_all_logits(ir.load(self._directory / ONNX_FILE))
            self._value_names = mark_outputs(model, nodes)
            data = ir.to_proto(model).SerializeToString()
            self._inner = make_inference_session(data, data_folder=self._directory)
        config = self.session.config
        batch, length = input_ids.shape
        feeds: dict[str, Any] = {"input_ids": input_ids.numpy()}
        if self.session.info.task == "text-generation":
            mask = torch.arange(length) < seq_lens[:, None]
            feeds["attention_mask"] = mask.long().numpy()
        else:
            feeds["past_lens"] = torch.zeros(batch, dtype=torch.int32).numpy()
            feeds["seq_lens"] = seq_lens.int().numpy()
            shapes = {
                "latent": torch.zeros(batch, length, config.latent_rank, dtype=torch.int8),
                "scale": torch.ones(batch, length),
                "rope": torch.zeros(batch, length, config.rope_dim),
            }
            for i in range(config.num_layers):
                feeds |= {f"past.{i}.{part}": t.numpy() for part, t in shapes.items()}
        # The head's output is both a node's and the logits.
        names = list(dict.fromkeys(["logits", *self._value_names.values()]))
        results = map(torch.from_numpy, self._inner.run(names, feeds))
        values = dict(zip(names, results, strict=True))
        return {"logits": values["logits"]} | {n: values[self._value_names[n]] for n in nodes}
