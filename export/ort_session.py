"""ONNX Runtime over an exported directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tinylm.config import ModelConfig
from tinylm.directory import check_sums
from tinylm.errors import ExportError, NativeError
from tinylm_export.native import BUILD_COMMAND, choose, describe_kernels
from tinylm_export.to_onnx import DATA_FILE, EXPORT_FILE, ONNX_FILE, ExportInfo

if TYPE_CHECKING:
    import onnxruntime

CACHE_PARTS = ("latent", "scale", "rope")
_HINT = "Export the checkpoint again with `tinylm-export onnx CKPT --out DIR`."


def import_onnxruntime() -> object:
    """Import onnxruntime.

    Raises:
        ExportError: It is not installed, or broken; says which package to install.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportError(
            f"onnxruntime can't be imported ({error}). Run `pip install 'tinylm[cpu]'`, or "
            "'tinylm[gpu]' on a machine with a CUDA GPU (not both: they install the same files)."
        ) from error
    return onnxruntime


def make_inference_session(
    model: bytes | Path,
    *,
    num_threads: int | None = None,
    data_folder: Path | None = None,
    native: bool | None = None,
) -> onnxruntime.InferenceSession:
    """Make an ONNX Runtime session on the CPU.

    Args:
        model: Path of a model, or its bytes.
        num_threads: Threads within an op; default ONNX Runtime's own choice.
        data_folder: Where the weights' file lies, for a model given as bytes.
        native: What runs the custom ops: None for the native library if there is one, True to
            require it, False for the function bodies.

    Raises:
        ExportError: ONNX Runtime can't load the model; holds its reason.
        NativeError: The native library is required and not built, or there is one that can't be
            used.
    """
    import onnxruntime as ort

    library = choose(native)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if num_threads is not None:
        options.intra_op_num_threads = num_threads
    if data_folder is not None:
        key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(key, str(data_folder))
    if library is not None:
        try:
            options.register_custom_ops_library(str(library.path))
        except Exception as error:  # as below
            raise NativeError(
                f"{library.path}: ONNX Runtime {ort.__version__} can't load it: {error}. Run "
                f"`{BUILD_COMMAND}`."
            ) from error
    try:
        return ort.InferenceSession(
            model,
            options,
            providers=["CPUExecutionProvider"],
            # Up to 1.23 it fuses float64 products into an op that knows only float32.
            disabled_optimizers=["MatmulTransposeFusion"],
        )
    except Exception as error:  # pybind exceptions of onnxruntime share no public base class
        name = model if isinstance(model, (str, os.PathLike)) else "the model"
        raise ExportError(
            f"{name}: ONNX Runtime {ort.__version__} can't load it: {error}"
        ) from error


class OrtSession:
    """Cached steps of an exported model; the same interface as the PyTorch session.

    The cache lives in buffers that are inputs and outputs of the graph at once, so no step copies
    it.

    Args:
        directory: What ``tinylm-export onnx`` wrote.
        num_threads: Threads within an op; default ONNX Runtime's own choice.
        verify: Whether to compare the files with ``SHA256SUMS`` first.
        native: What runs the custom ops: None for the native library if there is one, True to
            require it, False for the function bodies.

    Attributes:
        kernels: What runs the custom ops, as a text for people.
        library: The native library, or None for the function bodies.

    Raises:
        ExportError: Not an exported directory, altered files, another task, or no onnxruntime.
        NativeError: The native library is required and not built, or there is one that can't be
            used.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        num_threads: int | None = None,
        verify: bool = True,
        native: bool | None = None,
    ) -> None:
        import_onnxruntime()
        self.library = choose(native)
        self.kernels = describe_kernels(self.library)
        self.directory = Path(directory)
        self.info = ExportInfo.load(self.directory)
        if verify:
            required = (ONNX_FILE, DATA_FILE, EXPORT_FILE)
            check_sums(self.directory, required=required, error=ExportError, hint=_HINT)
        self.config = ModelConfig.load(self.directory / "config.json")
        self.session = make_inference_session(
            self.directory / ONNX_FILE,
            num_threads=num_threads,
            native=self.library is not None,
        )
        self._binding: onnxruntime.IOBinding | None = None
        # A binding borrows memory; these own it.
        self._buffers: list[onnxruntime.OrtValue] = []
        self._past_lens = torch.zeros(0, dtype=torch.int64)
        self._capacity = 0

    def start(self, batch_size: int, capacity: int) -> None:
        """Make an empty cache of ``capacity`` tokens for each of ``batch_size`` rows.

        Raises:
            ExportError: The model was exported without a cache.
        """
        import onnxruntime as ort

        if self.info.task != "text-generation-with-past":
            raise ExportError(
                f"{self.directory}: task {self.info.task!r} has no cache. Export with "
                "--task text-generation-with-past."
            )
        config = self.config
        shape = (batch_size, capacity)
        self._past_lens = torch.zeros(batch_size, dtype=torch.int64)
        self._capacity = capacity
        self._binding = binding = self.session.io_binding()
        self._buffers = []
        for layer in range(config.num_layers):
            arrays = (
                np.zeros((*shape, config.latent_rank), np.int8),
                np.ones(shape, np.float32),
                np.zeros((*shape, config.rope_dim), np.float32),
            )
            for part, array in zip(CACHE_PARTS, arrays, strict=True):
                buffer = ort.OrtValue.ortvalue_from_numpy(array)
                self._buffers.append(buffer)
                binding.bind_ortvalue_input(f"past.{layer}.{part}", buffer)
                binding.bind_ortvalue_output(f"present.{layer}.{part}", buffer)

    def step(self, input_ids: Tensor, seq_lens: Tensor) -> Tensor:
        """Append tokens to the cache.

        Args:
            input_ids: int64 [B, S], right-padded.
            seq_lens: int64 [B], valid tokens of each row; 0 leaves a row as it is.

        Returns:
            float32 logits after each row's last token [B, V]; at every position [B, S, V] if the
            model was exported with ``--all-logits``.

        Raises:
            ValueError: The cache is full, or :meth:`start` was not called for this batch size.
        """
        if self._binding is None or len(seq_lens) != len(self._past_lens):
            raise ValueError(
                f"the cache has {len(self._past_lens)} rows and the input {len(seq_lens)}; call "
                "start() with the batch size first."
            )
        filled = int((self._past_lens + seq_lens).max())
        if filled > self._capacity:
            raise ValueError(
                f"the cache holds {self._capacity} tokens a row and {filled} are needed. Start "
                "with a larger capacity or give fewer tokens."
            )
        binding = self._binding
        inputs = {
            "input_ids": input_ids.contiguous().numpy(),
            "past_lens": self._past_lens.to(torch.int32).numpy(),
            "seq_lens": seq_lens.to(torch.int32).numpy(),
        }
        for name, array in inputs.items():  # kept alive until the run is done
            binding.bind_cpu_input(name, array)
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding)
        self._past_lens = self._past_lens + seq_lens
        return torch.from_numpy(binding.get_outputs()[self._logits_index()].numpy())

    def _logits_index(self) -> int:
        # Outputs come in the order in which they were bound: the cache first, logits last.
        return len(CACHE_PARTS) * self.config.num_layers

    def logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Compute logits [B, S, V] with a model exported for ``text-generation``.

        Raises:
            ExportError: The model was exported with a cache.
        """
        if self.info.task != "text-generation":
            raise ExportError(
                f"{self.directory}: task {self.info.task!r} takes a cache. Use start() and step(), "
                "or export with --task text-generation."
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        feeds = {
            "input_ids": input_ids.long().numpy(),
            "attention_mask": attention_mask.long().numpy(),
        }
        return torch.from_numpy(self.session.run(["logits"], feeds)[0])
