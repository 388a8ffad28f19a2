"""How often an engine's file holds the embedding, the head and the packed weights."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from engine_helpers import make_engine_directory
from export_helpers import make_export

from tinylm_export.engine_tables import table_bytes, weight_copies
from tinylm_export.to_onnx import ONNX_FILE
from tinylm_export.trt_engine import ENGINE_FILE
from tinylm_export.trt_graph import plugin_graph


def embedding(onnx: Path) -> torch.Tensor:
    value = ir.load(onnx / ONNX_FILE).graph.initializers["embed_tokens.weight"].const_value
    assert value is not None
    return torch.tensor(value.numpy())


@pytest.fixture(scope="module")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("tables"))[1]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_copies_are_counted_transposed_or_not(onnx: Path, tmp_path: Path, dtype: str) -> None:
    engine = make_engine_directory(onnx, tmp_path / "trt", dtype=dtype)
    table = embedding(onnx).to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    once, transposed = (
        t.contiguous().view(torch.uint8).numpy().tobytes() for t in (table, table.t())
    )
    file = engine / ENGINE_FILE
    size = table.numel() * table.element_size()
    for content, copies in ((once, 1), (once + b"code" + transposed, 2), (once * 2, 2)):
        file.write_bytes(b"head" + content + b"tail")
        assert table_bytes(engine, onnx) == copies * size
    file.write_bytes(b"no table at all")
    assert table_bytes(engine, onnx) is None


def test_packed_weights_are_counted(onnx: Path, tmp_path: Path) -> None:
    engine = make_engine_directory(onnx, tmp_path / "trt")
    values = plugin_graph(ir.load(onnx / ONNX_FILE)).graph.initializers
    packed = {
        name: value.const_value.numpy().tobytes()
        for name, value in values.items()
        if value.dtype == ir.DataType.INT8 and value.const_value is not None
    }
    twice = "layers.1.mlp.down_proj.weight_gpu"
    (engine / ENGINE_FILE).write_bytes(b"".join(packed.values()) + packed[twice])
    copies = weight_copies(engine, onnx)
    assert copies.pop("mlp.down_proj.weight_gpu") == 2
    assert len(copies) == 4 and set(copies.values()) == {1}
