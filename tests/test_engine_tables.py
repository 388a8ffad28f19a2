"""How often an engine's file holds the embedding and the head."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from engine_helpers import make_engine_directory
from export_helpers import make_export

from tinylm_export.engine_tables import table_bytes
from tinylm_export.to_onnx import ONNX_FILE
from tinylm_export.trt_engine import ENGINE_FILE


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
