"""``manifest.json``: what an engine directory holds, and for which machine it was built."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from tinylm.directory import sha256
from tinylm.errors import ExportError
from tinylm_export.to_onnx import DATA_FILE, ONNX_FILE

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1
_HINT = "Build it again on this machine with `tinylm-export trt ONNX_DIR --out ENGINE_DIR`."


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineMachine:
    """What an engine must find where it runs.

    Attributes:
        tensorrt_version: Such as ``"10.6.0"``.
        gpu: The GPU's name, for people.
        compute_capability: The GPU's architecture, such as ``"9.0"``.
        plugin_version: The plugin library's version; None where there is none.
    """

    tensorrt_version: str
    gpu: str
    compute_capability: str
    plugin_version: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineManifest:
    """What ``manifest.json`` holds.

    Attributes:
        tinylm_version: Of the package that built the engine.
        tensorrt_version: Of the builder; engines are not portable between versions.
        gpu: Name of the GPU that it was built on.
        compute_capability: Architecture of that GPU.
        plugin_version: Of the plugin library; None for ``dense``.
        embedded_plugins: Whether the plugin library is in the engine.
        dense: Whether the weights are ordinary ones, without plugins.
        dtype: Type of activations: ``"fp32"``, ``"fp16"`` or ``"bf16"``.
        activation: Number format that BitLinears quantise to; ``"none"`` for ``dense``.
        all_logits: Whether logits are given at every position.
        max_batch_size: Most rows.
        max_seq_len: Longest step and largest cache, in tokens.
        profiles: By profile name: least, best and largest shape of every input.
        marked_nodes: Names of nodes whose values are outputs too, in a debug engine.
        onnx_sha256: Digest of the ONNX graph that it was built from.
        onnx_data_sha256: Digest of that graph's weights.
        engine_sha256: Digest of the engine.
        engine_bytes: Its size.
        format_version: Of this file.
    """

    tinylm_version: str
    tensorrt_version: str
    gpu: str
    compute_capability: str
    plugin_version: str | None
    embedded_plugins: bool
    dense: bool
    dtype: str
    activation: str
    all_logits: bool
    max_batch_size: int
    max_seq_len: int
    profiles: dict[str, dict[str, dict[str, list[int]]]]
    marked_nodes: list[str]
    onnx_sha256: str
    onnx_data_sha256: str
    engine_sha256: str
    engine_bytes: int
    format_version: int = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object."""
        return dataclasses.asdict(self)

    def save(self, directory: Path) -> None:
        """Write ``manifest.json``."""
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        (directory / MANIFEST_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> EngineManifest:
        """Read ``manifest.json``.

        Raises:
            ExportError: Not an engine directory, a damaged file, or one of a newer format.
        """
        path = directory / MANIFEST_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ExportError(
                f"{directory}: not an engine directory, {MANIFEST_FILE} can't be read ({error}). "
                "Make one with `tinylm-export trt ONNX_DIR --out ENGINE_DIR`."
            ) from error
        if not isinstance(values, dict):
            raise ExportError(f"{path}: expected a JSON object, found {type(values).__name__}.")
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise ExportError(
                f"{path}: expected format_version {FORMAT_VERSION}, found {version}. {_HINT}"
            )
        names = {field.name for field in dataclasses.fields(cls)}
        if set(values) != names:
            raise ExportError(
                f"{path}: missing fields: {', '.join(sorted(names - set(values))) or 'none'}; "
                f"unknown ones: {', '.join(sorted(set(values) - names)) or 'none'}. {_HINT}"
            )
        return cls(**values)

    def check(self, directory: Path, current: EngineMachine | None = None) -> None:
        """Check that the engine was built for this machine.

        Args:
            directory: The engine directory, for the message.
            current: What is here; default: looked up.

        Raises:
            ExportError: Another TensorRT version, GPU architecture or plugin version; names both.
            NativeError: The plugins lie beside the engine and are not built here.
        """
        if current is None:
            current = current_machine(plugins=not self.dense and not self.embedded_plugins)
        if self.tensorrt_version != current.tensorrt_version:
            _refuse(directory, "TensorRT", self.tensorrt_version, current.tensorrt_version)
        if self.compute_capability != current.compute_capability:
            _refuse(
                directory,
                "a GPU of compute capability",
                f"{self.compute_capability} ({self.gpu})",
                f"{current.compute_capability} ({current.gpu})",
            )
        beside = not self.dense and not self.embedded_plugins
        if beside and self.plugin_version != current.plugin_version:
            expected, found = str(self.plugin_version), str(current.plugin_version)
            _refuse(directory, "TinyLM's plugins of version", expected, found)

    def check_onnx(self, directory: Path, onnx_directory: Path) -> None:
        """Check that the engine was built from an ONNX directory as it is now.

        Args:
            directory: The engine directory, for the message.
            onnx_directory: What ``tinylm-export onnx`` wrote.

        Raises:
            ExportError: The graph or the weights are others; names both digests.
        """
        expected = {ONNX_FILE: self.onnx_sha256, DATA_FILE: self.onnx_data_sha256}
        for name, digest in expected.items():
            path = onnx_directory / name
            found = sha256(path) if path.is_file() else "no such file"
            if found != digest:
                raise ExportError(
                    f"{directory} was built from another {name}: expected SHA-256 {digest}, found "
                    f"{found} in {onnx_directory}. {_HINT}"
                )

    def describe(self) -> str:
        """Return what the engine computes with, as a text for people."""
        if self.dense:
            return f"{self.dtype}, dense weights, no plugins"
        place = "in the engine" if self.embedded_plugins else "beside it"
        return f"{self.dtype}, {self.activation} activations, plugins {self.plugin_version} {place}"


def current_machine(*, plugins: bool) -> EngineMachine:
    """Return what is on this machine.

    Args:
        plugins: Whether to look for the plugin library.

    Raises:
        ExportError: TensorRT or a GPU is missing.
        NativeError: The plugin library is missing or does not fit.
    """
    import torch

    from tinylm_export.trt_engine import import_tensorrt, require_gpu

    trt = import_tensorrt()
    require_gpu()
    version = None
    if plugins:
        from tinylm_export.native_gpu import describe_plugins

        version = describe_plugins().version
    major, minor = torch.cuda.get_device_capability()
    return EngineMachine(
        tensorrt_version=".".join(re.findall(r"\d+", trt.__version__)[:3]),
        gpu=torch.cuda.get_device_name(),
        compute_capability=f"{major}.{minor}",
        plugin_version=version,
    )


def _refuse(directory: Path, what: str, expected: str, found: str) -> None:
    raise ExportError(
        f"{directory}: the engine was built for {what} {expected}, found {found}. {_HINT}"
    )
