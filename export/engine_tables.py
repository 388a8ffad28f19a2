"""How often an engine holds the embedding, the head and each packed weight."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from tinylm_export.manifest import EngineManifest
from tinylm_export.parity_trt import HALF_DTYPES
from tinylm_export.to_onnx import ONNX_FILE
from tinylm_export.trt_engine import ENGINE_FILE
from tinylm_export.trt_graph import plugin_graph

_TABLES = ("embed_tokens.weight", "lm_head.weight")
_DTYPES = {"fp32": torch.float32, **HALF_DTYPES}
_SAMPLE = 256  # elements that tell a table from everything else


def table_bytes(engine: str | Path, directory: str | Path) -> int | None:
    """Return the bytes that embedding and head take in an engine's file; None if not found.

    TensorRT may keep a table that both share once, or a second time transposed, so they are looked
    for: a part of a row, and of a column.

    Args:
        engine: What ``tinylm-export trt`` wrote.
        directory: What it was built from.
    """
    engine, directory = Path(engine), Path(directory)
    dtype = _DTYPES[EngineManifest.load(engine).dtype]
    initializers = ir.load(directory / ONNX_FILE).graph.initializers
    total = 0
    with (
        (engine / ENGINE_FILE).open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        for name in _TABLES:
            value = initializers.get(name)
            if value is None or value.const_value is None:
                continue
            table = value.const_value.numpy()
            row = int(np.abs(table[:, 0]).argmax())  # a row of padding may be all zeros
            parts = (table[row, :_SAMPLE], table[row : row + _SAMPLE, 0])
            copies = sum(_count(data, _bytes(part, dtype)) for part in parts)
            total += copies * table.size * dtype.itemsize
    return total or None


def weight_copies(engine: str | Path, directory: str | Path) -> dict[str, int]:
    """Count how often an engine holds each packed weight: the most, by the name in a layer.

    Args:
        engine: What ``tinylm-export trt`` wrote, not ``--dense``.
        directory: What it was built from.
    """
    engine, directory = Path(engine), Path(directory)
    graph = plugin_graph(ir.load(directory / ONNX_FILE)).graph
    most: dict[str, int] = {}
    with (
        (engine / ENGINE_FILE).open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        for name, value in graph.initializers.items():
            if value.dtype != ir.DataType.INT8 or value.const_value is None:
                continue
            packed = value.const_value.numpy().reshape(-1)
            middle = len(packed) // 2
            kind = name.split(".", 2)[-1]  # layers.3.mlp.down_proj.weight_gpu
            copies = _count(data, packed[middle : middle + _SAMPLE].tobytes())
            most[kind] = max(most.get(kind, 0), copies)
    return most


def _bytes(values: np.ndarray, dtype: torch.dtype) -> bytes:
    return torch.tensor(values).to(dtype).view(torch.uint8).numpy().tobytes()


def _count(data: mmap.mmap, sample: bytes) -> int:
    count, at = 0, data.find(sample)
    while at >= 0:
        count, at = count + 1, data.find(sample, at + len(sample))
    return count
