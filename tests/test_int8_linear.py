"""Int8Linear: module, PyTorch op, function body, graph, parity."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from export_helpers import PLAIN, WITH_PAST, run_op
from model_helpers import make_model
from torch import nn

from tinylm.checkpoint import save_model
from tinylm.errors import ConfigError, ExportError
from tinylm.int8_linear import Int8Linear
from tinylm.quantization import accumulate_int8, quantize_activation, quantize_rows
from tinylm_export.inspect import inspect_onnx
from tinylm_export.model_graph import build_onnx
from tinylm_export.parity import run_parity
from tinylm_export.parity_render import render
from tinylm_export.to_onnx import ExportInfo, export_onnx
from tinylm_export.torch_ops import torch_op


def test_rows_are_quantised_by_absmax_and_round_half_to_even() -> None:
    weight = torch.tensor([[127.0, 0.5, 1.5, -2.5], [0.0, 0.0, 0.0, 0.0], [-254.0, 1.0, 2.0, 3.0]])
    codes, scale = quantize_rows(weight)
    assert codes.tolist() == [[127, 0, 2, -2], [0, 0, 0, 0], [-127, 0, 1, 2]]
    assert scale.tolist() == [1.0, float(np.float32(1e-5) / np.float32(127)), 2.0]


def test_scale_is_a_division_of_float32_numbers() -> None:
    weight = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    expected = np.abs(weight.numpy()).max(axis=1) / np.float32(127)
    assert np.array_equal(quantize_rows(weight)[1].numpy(), expected)


def test_sums_are_exact_beyond_float32() -> None:
    q = torch.full((2, 65536), 127.0)
    q[1, 0] = 126.0
    codes = torch.full((5000, 65536), 127, dtype=torch.int8)[:3]
    total = accumulate_int8(q, codes)
    assert total.dtype == torch.int32
    assert total.tolist() == [[127 * 127 * 65536] * 3, [127 * 127 * 65536 - 127] * 3]


def test_module_follows_the_formula() -> None:
    g = torch.Generator().manual_seed(1)
    linear = nn.Linear(40, 24, bias=False)
    x = torch.randn(2, 3, 40, generator=g)
    codes, scale = quantize_rows(linear.weight.detach())
    q, s = quantize_activation(x, "int8")
    expected = (q.long() @ codes.long().t()).float() * scale / s
    assert torch.equal(Int8Linear.from_linear(linear).eval()(x), expected)


def test_misuse_is_an_error() -> None:
    with pytest.raises(ConfigError, match="has no bias"):
        Int8Linear.from_linear(nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="in training mode"):
        Int8Linear.from_linear(nn.Linear(4, 4, bias=False)).train()(torch.ones(1, 4))
    with pytest.raises(ConfigError, match=r"weight must be int8 \[N, K\]"):
        Int8Linear(torch.ones(2, 4), torch.ones(2))
    with pytest.raises(ConfigError, match=r"weight_scale must be float32 \[2\]"):
        Int8Linear(torch.ones(2, 4, dtype=torch.int8), torch.ones(3))


@pytest.mark.parametrize("tie", [True, False])
def test_quantize_head_leaves_the_embedding(tie: bool) -> None:
    model = make_model(seed=1, tie_embeddings=tie)
    embedding = model.embed_tokens.weight.detach().clone()
    assert model.quantize_head() is model and not model.training
    assert isinstance(model.lm_head, Int8Linear)
    assert torch.equal(model.embed_tokens.weight, embedding)
    assert isinstance(model.quantize_head().lm_head, Int8Linear)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("num_inputs", [36, 4100])
def test_body_equals_the_pytorch_op(norm: bool, num_inputs: int) -> None:
    g = torch.Generator().manual_seed(2)
    tensors = {
        "x": torch.randn(2, 3, num_inputs, generator=g),
        "weight": torch.randint(-127, 128, (50, num_inputs), generator=g, dtype=torch.int8),
        "weight_scale": torch.rand(50, generator=g) + 0.5,
    }
    tensors["x"][0, 0] = 3.0  # every activation 127, against the largest codes
    tensors["weight"][0], tensors["weight"][1] = 127, -127
    if norm:
        tensors["norm_weight"] = torch.rand(num_inputs, generator=g) + 0.5
    expected = torch_op("Int8Linear")(*tensors.values(), eps=1e-3)
    assert torch.equal(run_op("Int8Linear", tensors, eps=1e-3)[0], expected)


@pytest.mark.parametrize("task", [WITH_PAST, PLAIN])
def test_graph_has_one_node_for_norm_and_head(task: str) -> None:
    model = build_onnx(make_model(seed=1).quantize_head(), task=task)
    nodes = {node.name: node for node in model.graph}
    assert "norm" not in nodes and nodes["lm_head"].op_type == "Int8Linear"
    plain = build_onnx(make_model(seed=1), task=task)
    assert "Int8Linear" not in {function.name for function in plain.functions.values()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("head") / "checkpoint", make_model(seed=1))


@pytest.mark.parametrize(
    ("task", "all_logits"), [(WITH_PAST, False), (WITH_PAST, True), (PLAIN, True)]
)
def test_parity_holds_and_reports_the_effect(
    checkpoint: Path, tmp_path: Path, task: str, all_logits: bool
) -> None:
    out = export_onnx(checkpoint, tmp_path / "o", task=task, all_logits=all_logits, lm_head="int8")
    tokens = torch.randint(0, 512, (300,), generator=torch.Generator().manual_seed(3))
    report = run_parity(out, tokens, checkpoint=checkpoint, num_tokens=100, length=32)
    assert report.passed
    layers = {layer.node: layer for layer in report.runtimes[0].layers}
    assert "norm" not in layers and layers["lm_head"].num_different == 0
    assert report.head is not None
    assert report.head.float32_loss != report.head.int8_loss
    assert report.head.float32_loss == pytest.approx(report.head.int8_loss, abs=0.05)
    assert report.to_dict()["head"] == dataclasses.asdict(report.head)
    from rich.console import Console

    console = Console(record=True, width=160)
    console.print(render(report))
    assert "float32 and int8 head" in console.export_text()


def test_inspect_counts_the_head(checkpoint: Path, tmp_path: Path) -> None:
    plain = inspect_onnx(export_onnx(checkpoint, tmp_path / "plain"))
    int8 = inspect_onnx(export_onnx(checkpoint, tmp_path / "int8", lm_head="int8"))
    assert int8.num_parameters == plain.num_parameters
    assert int8.op_counts["tinylm::Int8Linear"] == 1


def test_export_json_of_before_means_float32(checkpoint: Path, tmp_path: Path) -> None:
    out = export_onnx(checkpoint, tmp_path / "onnx", lm_head="int8")
    assert ExportInfo.load(out).lm_head == "int8"
    values = json.loads((out / "export.json").read_text())
    del values["lm_head"]
    (out / "export.json").write_text(json.dumps(values))
    assert ExportInfo.load(out).lm_head == "float32"
    with pytest.raises(ExportError, match="lm_head must be one of float32, int8, found 'int4'"):
        export_onnx(checkpoint, tmp_path / "other", lm_head="int4")
