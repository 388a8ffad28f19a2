"""Loading a TensorRT engine: its manifest, its plugins, and a message for whatever is wrong."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
from collections import deque
from pathlib import Path
from typing import Any

import torch

from tinylm.directory import check_sums
from tinylm.errors import ExportError
from tinylm_export import gpu_sdk
from tinylm_export.manifest import MANIFEST_FILE, EngineManifest

ENGINE_FILE = "model.engine"
_HINT = "Build the engine again with `tinylm-export trt DIR --out ENGINE_DIR`."
_BESIDE = ("libnvinfer_plugin", "libnvonnxparser")
_KEPT_MESSAGES = 5
_loaded_plugins: set[Path] = set()


def import_tensorrt() -> Any:
    """Import TensorRT's Python bindings, which two wheels give under two names.

    Raises:
        ExportError: They are not installed, or TensorRT's libraries are not found.
        NativeToolError: TensorRT's libraries can't be loaded.
    """
    _load_libraries()
    reasons = []
    for name in ("tensorrt", "tensorrt_bindings"):
        try:
            return importlib.import_module(name)
        except (ImportError, OSError) as error:
            reasons.append(f"{name}: {error}")
    raise ExportError(
        f"TensorRT can't be imported ({'; '.join(reasons)}). `tinylm-export doctor` says what is "
        "missing and how to get it."
    )


def _load_libraries() -> None:
    """Load what the bindings are linked to; their own search knows only the loader's folders."""
    folder = gpu_sdk.find_libraries()
    if folder is None or gpu_sdk.load_tensorrt(folder) is None:
        return
    for name in _BESIDE:
        for path in sorted(folder.glob(f"{name}.so.{gpu_sdk.library_major(folder)}")):
            # One that can't be loaded is named by the bindings' own error.
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def require_gpu() -> None:
    """Check that there is a CUDA device.

    Raises:
        ExportError: There is none.
    """
    if not torch.cuda.is_available():
        raise ExportError(
            "a TensorRT engine needs an NVIDIA GPU, and PyTorch finds none on this machine. Use "
            "ONNX Runtime here, or a machine with a GPU."
        )


def make_logger(trt: Any) -> Any:
    """Return a TensorRT logger that keeps its last errors in ``messages`` and prints nothing."""

    class KeepingLogger(trt.ILogger):
        """Keeps errors, so that an exception can say them."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: deque[str] = deque(maxlen=_KEPT_MESSAGES)

        def log(self, severity: Any, message: str) -> None:
            """Take a message from TensorRT."""
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.messages.append(message)

        def last(self) -> str:
            """Return what was said since the last call."""
            text = "; ".join(self.messages) or "it gives no reason"
            self.messages.clear()
            return text

    return KeepingLogger()


class TrtEngine:
    """An engine directory, checked and loaded.

    Args:
        directory: What ``tinylm-export trt`` wrote.
        verify: Whether to compare the files with ``SHA256SUMS`` first. An engine is a program:
            TensorRT may crash on one that was altered.

    Attributes:
        manifest: What was built, for which machine.
        engine: TensorRT's ``ICudaEngine``.
        logger: Keeps TensorRT's errors; ``last()`` returns them.
        plugins: The plugin library that was loaded; None if the engine needs none beside it.
        trt: The module.

    Raises:
        ExportError: No engine directory, altered files, an engine for another TensorRT version, GPU
            or plugin version, or TensorRT can't load it.
        NativeError: The plugin library is not built.
    """

    def __init__(self, directory: Path, *, verify: bool = True) -> None:
        self.manifest = EngineManifest.load(directory)
        if verify:
            required = (ENGINE_FILE, MANIFEST_FILE, "config.json")
            check_sums(directory, required=required, error=ExportError, hint=_HINT)
        self.manifest.check(directory)
        self.trt = import_tensorrt()
        self.plugins = self._plugin_library()
        self.logger = make_logger(self.trt)
        self._runtime = self.trt.Runtime(self.logger)
        if self.plugins is None:
            # The plugins' code is in the engine. Its bytes are those that SHA256SUMS lists.
            self._runtime.engine_host_code_allowed = not self.manifest.dense
        else:
            load_plugins(self.trt, self.plugins, self.logger)
        path = directory / ENGINE_FILE
        try:
            self.engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        except OSError as error:
            raise ExportError(f"{path}: can't be read ({error}). {_HINT}") from error
        if self.engine is None:
            raise ExportError(
                f"{path}: TensorRT {self.trt.__version__} can't load it: {self.logger.last()}. "
                f"{_HINT}"
            )

    def _plugin_library(self) -> Path | None:
        """Return the library to load beside the engine; None if it needs none."""
        if self.manifest.dense or self.manifest.embedded_plugins:
            return None
        from tinylm_export.native_gpu import plugin_library

        return plugin_library()


def load_plugins(trt: Any, path: Path, logger: Any) -> None:
    """Register the plugins of a library, once a process.

    The process's registry is used: a builder's own is not where the ONNX parser looks.

    Raises:
        ExportError: TensorRT can't load it.
    """
    path = path.resolve()
    if path in _loaded_plugins:
        return
    if trt.get_plugin_registry().load_library(str(path)) is None:
        raise ExportError(
            f"{path}: TensorRT can't load the plugins: {logger.last()}. Build them again with "
            "`tinylm-export native build`."
        )
    _loaded_plugins.add(path)
