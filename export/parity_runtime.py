"""The runtimes that parity compares with PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import onnx_ir as ir
import torch
from torch import Tensor

from tinylm.generate import Session
from tinylm_export.bit_linear_model import BitLinearWeights
from tinylm_export.kernel_meter import KernelMeter, MeteredSession
from tinylm_export.op_probe import BitLinearProbe, Probe
from tinylm_export.op_probe_native import NativeBitLinearProbe
from tinylm_export.ort_session import OrtSession, make_inference_session
from tinylm_export.passes.all_logits import expose_all_logits
from tinylm_export.passes.mark_outputs import mark_outputs
from tinylm_export.to_onnx import ONNX_FILE


class ParityRuntime(Protocol):
    """A runtime that can be compared."""

    name: str
    version: str

    @property
    def kernels(self) -> str:
        """What ran the custom ops."""

    @property
    def probe(self) -> Callable[[BitLinearWeights], Probe]:
        """Makes a single BitLinear that runs as those of the graph do."""

    @property
    def session(self) -> Session:
        """Cached steps."""

    def prefill(self, input_ids: Tensor, seq_lens: Tensor, nodes: list[str]) -> dict[str, Tensor]:
        """Run a right-padded batch and return ``logits`` [B, S, V] and the nodes' [B, S, width]."""


class OrtRuntime:
    """ONNX Runtime over an exported directory.

    Args:
        directory: What ``tinylm-export onnx`` wrote.
        native: What runs the custom ops: None for the native library if there is one, True to
            require it, False for the function bodies.

    Raises:
        ExportError: The directory can't be used.
        NativeError: The native library is required and not built, or can't be used.
    """

    def __init__(self, directory: Path, *, native: bool | None = None) -> None:
        import onnxruntime

        self.name, self.version = "ONNX Runtime", onnxruntime.__version__
        session = OrtSession(directory, native=native)
        self._info = session.info
        self._meter = KernelMeter(session.library, ir.load(directory / ONNX_FILE))
        self.session: Session = MeteredSession(session, self._meter)
        self._directory = directory
        self._inner: Any = None
        self._value_names: dict[str, str] = {}

    @property
    def kernels(self) -> str:
        """What ran the custom ops, proven by the library's own count."""
        return self._meter.describe()

    @property
    def probe(self) -> Callable[[BitLinearWeights], Probe]:
        """Makes a single BitLinear that runs as those of the graph do."""
        return BitLinearProbe if self._meter.library is None else NativeBitLinearProbe

    def prefill(self, input_ids: Tensor, seq_lens: Tensor, nodes: list[str]) -> dict[str, Tensor]:
        """Run a right-padded batch from an empty cache, with the nodes' outputs beside it."""
        if self._inner is None:
            model = expose_all_logits(ir.load(self._directory / ONNX_FILE))
            self._value_names = mark_outputs(model, nodes)
            data = ir.to_proto(model).SerializeToString()
            self._inner = make_inference_session(
                data, data_folder=self._directory, native=self._meter.library is not None
            )
        config = self.session.config
        batch, length = input_ids.shape
        feeds: dict[str, Any] = {"input_ids": input_ids.numpy()}
        if self._info.task == "text-generation":
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
        with self._meter.one_run():
            results = map(torch.from_numpy, self._inner.run(names, feeds))
        values = dict(zip(names, results, strict=True))
        return {"logits": values["logits"]} | {n: values[self._value_names[n]] for n in nodes}
