"""What an engine directory says of its engine: what was built, from what, for which machine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from tinylm.errors import ExportError

MANIFEST_FILE = "manifest.json"
ENGINE_FILE = "model.engine"
FORMAT_VERSION = 1
_HINT = "Build the engine with `tinylm-export trt DIR --out ENGINE_DIR`."


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineManifest:
    """What ``manifest.json`` holds.

    Attributes:
        format_version: Of this file.
        tensorrt_version: TensorRT that built the engine.
        gpu: Name of the GPU that it was built on.
        compute_capability: Of that GPU, such as ``"9.0"``.
        plugin_version: Of the plugin library; None for a dense engine.
        embedded_plugins: Whether the engine holds the plugin library.
        onnx_sha256: Digest of the exported ``model.onnx``.
        dtype: Type of activations and cache: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        activation: Number format of quantised activations.
        dense: Whether it is the rival with ordinary weights and no plugins.
        all_logits: Whether it gives logits at every position.
        max_batch_size: Most rows.
        max_seq_len: Most tokens of a row.
    """

    format_version: int
    tensorrt_version: str
    gpu: str
    compute_capability: str
    plugin_version: str | None
    embedded_plugins: bool
    onnx_sha256: str
    dtype: str
    activation: str
    dense: bool
    all_logits: bool
    max_batch_size: int
    max_seq_len: int

    @classmethod
    def load(cls, directory: Path) -> EngineManifest:
        """Read ``manifest.json``.

        Raises:
            ExportError: The directory holds no engine, or one of another format.
        """
        path = directory / MANIFEST_FILE
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if values["format_version"] != FORMAT_VERSION:
                raise ExportError(
                    f"{path}: format_version {FORMAT_VERSION} expected, found "
                    f"{values['format_version']}. {_HINT}"
                )
            return cls(**values)
        except (OSError, ValueError, TypeError, KeyError) as error:
            if isinstance(error, ExportError):
                raise
            raise ExportError(
                f"{directory}: not an engine directory, {MANIFEST_FILE} can't be read ({error}). "
                f"{_HINT}"
            ) from error

    def check(
        self,
        directory: Path,
        *,
        tensorrt_version: str,
        gpu: str,
        compute_capability: str,
        plugin_version: str | None,
    ) -> None:
        """Compare with what is on this machine.

        Args:
            directory: The engine's, for messages.
            tensorrt_version: TensorRT's.
            gpu: The GPU's name.
            compute_capability: The GPU's.
            plugin_version: The plugin library's; None where none is loaded.

        Raises:
            ExportError: One of them is another; names both values.
        """
        found = {
            "TensorRT": (self.tensorrt_version, tensorrt_version),
            "a GPU of compute capability": (
                f"{self.compute_capability} ({self.gpu})",
                f"{compute_capability} ({gpu})",
            ),
            "TinyLM's plugins of version": (self.plugin_version, plugin_version),
        }
        if compute_capability == self.compute_capability:
            del found["a GPU of compute capability"]
        if plugin_version is None:
            del found["TinyLM's plugins of version"]
        for what, (expected, actual) in found.items():
            if expected != actual:
                raise ExportError(
                    f"{directory / MANIFEST_FILE}: the engine was built for {what} {expected}, "
                    f"found {actual}. Build it again on this machine with `tinylm-export trt`."
                )

    def check_source(self, directory: Path, onnx: Path, digest: str) -> None:
        """Compare with an exported model.

        Args:
            directory: The engine's, for messages.
            onnx: The exported file.
            digest: Its SHA-256.

        Raises:
            ExportError: The engine was built from another file.
        """
        if self.onnx_sha256 != digest:
            raise ExportError(
                f"{directory} was built from an ONNX file with SHA-256 {self.onnx_sha256}, found "
                f"{digest} in {onnx}. Build it again with `tinylm-export trt`."
            )

    def describe(self) -> str:
        """Return what it is, for people."""
        if self.dense:
            return f"{self.dtype}, dense"
        return f"{self.dtype}, {self.activation} activations, plugins {self.plugin_version}"
