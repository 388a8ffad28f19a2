"""Engine directories: real ones where there is a GPU, and ones whose engine is no engine."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tinylm.directory import sha256, write_checksums
from tinylm_export.manifest import MANIFEST_FILE, EngineManifest
from tinylm_export.to_onnx import DATA_FILE, EXPORT_FILE, ONNX_FILE
from tinylm_export.trt_engine import ENGINE_FILE

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="NOT TESTED: there is no CUDA device"
)


def make_manifest(onnx: Path, **changes: Any) -> EngineManifest:
    """Describe an engine of an exported directory, for a machine that there is not."""
    values = {
        "tinylm_version": "0.1.0",
        "tensorrt_version": "10.6.0",
        "gpu": "NVIDIA H100 80GB HBM3",
        "compute_capability": "9.0",
        "plugin_version": "0.1.0",
        "embedded_plugins": False,
        "dense": False,
        "dtype": "fp32",
        "activation": "int8",
        "all_logits": False,
        "max_batch_size": 4,
        "max_seq_len": 64,
        "profiles": {},
        "marked_nodes": [],
        "onnx_sha256": sha256(onnx / ONNX_FILE),
        "onnx_data_sha256": sha256(onnx / DATA_FILE),
        "engine_sha256": "0" * 64,
        "engine_bytes": 900,
    }
    return EngineManifest(**(values | changes))  # type: ignore[arg-type]


def make_engine_directory(onnx: Path, out: Path, **changes: Any) -> Path:
    """Write an engine directory whose engine TensorRT would refuse."""
    out.mkdir(parents=True)
    for name in ("config.json", EXPORT_FILE):
        shutil.copy2(onnx / name, out / name)
    (out / ENGINE_FILE).write_bytes(b"no engine" * 100)
    write_manifest(out, dataclasses.asdict(make_manifest(onnx, **changes)))
    return out


def write_manifest(directory: Path, values: dict[str, Any]) -> None:
    """Write a manifest and the checksums anew."""
    (directory / MANIFEST_FILE).write_text(json.dumps(values), encoding="utf-8")
    write_checksums(directory)


def edit_manifest(directory: Path, target: Path, **changes: Any) -> Path:
    """Copy an engine directory with other values in its manifest, and checksums that fit."""
    shutil.copytree(directory, target)
    values = json.loads((target / MANIFEST_FILE).read_text(encoding="utf-8"))
    write_manifest(target, values | changes)
    return target


def flip_byte(path: Path) -> None:
    """Alter the byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
