"""The dense rival: the network that the model would be without quantised activations."""

from __future__ import annotations

from collections import Counter
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from export_helpers import run_onnx
from model_helpers import RaggedBatch, make_model, ragged_batch
from test_passes import feeds
from tolerances import DENSE_LOGITS
from torch import Tensor

from tinylm import TinyLM, attention, bitlinear, quantizer_passes
from tinylm.errors import ExportError
from tinylm_export.model_graph import build_onnx
from tinylm_export.ops import DOMAIN
from tinylm_export.passes.dense import make_dense
from tinylm_export.trt_graph import dense_graph


@pytest.fixture
def unquantized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make PyTorch's model keep its activations as they are."""

    def keep(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
        return x.float(), torch.ones(*x.shape[:-1], 1)

    for module in (bitlinear, quantizer_passes, attention):
        monkeypatch.setattr(module, "quantize_activation", keep)


def dense_feeds(model: TinyLM, batch: RaggedBatch, capacity: int = 24) -> dict[str, Tensor]:
    """Make the feeds of an empty cache, whose unused slots hold large values."""
    inputs = {n: v for n, v in feeds(model, batch, capacity).items() if not n.endswith(".scale")}
    return {n: v.float() + 9 if n.startswith("past.") else v for n, v in inputs.items()}


def run(model: ir.Model, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    names = [str(value.name) for value in model.graph.outputs]
    return dict(zip(names, run_onnx(ir.to_proto(model), inputs), strict=True))


def dense(model: TinyLM, **options: Any) -> ir.Model:
    return dense_graph(build_onnx(model), model.config, dtype="fp32", **options)


@pytest.mark.parametrize(
    "changes", [{}, {"num_heads": 4, "nope_dim": 12, "rope_dim": 6, "value_dim": 20}]
)
def test_prefill_is_the_model_without_quantised_activations(
    batch: RaggedBatch, unquantized: None, changes: Any
) -> None:
    model = make_model(seed=4, **changes)
    found = run(dense(model, all_logits=True), dense_feeds(model, batch, capacity=29))
    with torch.no_grad():
        expected = model(batch.input_ids, batch.attention_mask)
    valid = batch.attention_mask == 1
    DENSE_LOGITS.assert_close(found["logits"][valid], expected[valid])


def test_chunks_and_decode_steps_continue_the_cache(
    model: TinyLM, batch: RaggedBatch, unquantized: None
) -> None:
    graph = dense(model)
    lens = torch.tensor(batch.lens)
    inputs = dense_feeds(model, batch, capacity=26)
    past = torch.zeros_like(lens)
    last = torch.zeros(len(lens), 512)
    for size in (5, 1, 1, 9, 1, 24):  # rows end in different steps, some take nothing
        take = (lens - past).clamp(0, size)
        index = (past[:, None] + torch.arange(size)).clamp_max(batch.input_ids.shape[1] - 1)
        outputs = run(
            graph,
            inputs
            | {
                "input_ids": batch.input_ids.gather(1, index),
                "past_lens": past.int(),
                "seq_lens": take.int(),
            },
        )
        last = torch.where((take > 0)[:, None], outputs["logits"], last)
        past += take
        inputs |= {
            name.replace("present", "past"): value
            for name, value in outputs.items()
            if name.startswith("present.")
        }
    assert torch.equal(past, lens)
    with torch.no_grad():
        expected = model(batch.input_ids, batch.attention_mask)
    for row, length in enumerate(batch.lens):
        DENSE_LOGITS.assert_close(last[row], expected[row, length - 1])


def test_it_is_near_the_quantised_model(model: TinyLM, batch: RaggedBatch) -> None:
    found = run(dense(model), dense_feeds(model, batch))["logits"]
    expected = run_onnx(ir.to_proto(build_onnx(model)), feeds(model, batch))[0]
    # 8-bit activations are off by up to 1/254 of the largest, in each of 14 layers.
    assert 0 < (found - expected).norm() / expected.norm() < 0.1


def test_slots_past_the_end_keep_what_they_hold(model: TinyLM) -> None:
    batch = ragged_batch(seed=3, batch=2, length=4)
    outputs = run(dense(model), dense_feeds(model, batch, capacity=7))
    for row, length in enumerate(batch.lens):
        for name in ("present.0.latent", "present.1.rope"):
            assert (outputs[name][row, length:] == 9).all()
            assert (outputs[name][row, :length] != 9).all()


def test_the_graph_holds_standard_ops_only(model: TinyLM) -> None:
    graph = dense(model)
    assert not any(node.domain == DOMAIN for node in graph.graph) and not graph.functions
    onnx.checker.check_model(ir.to_proto(graph), full_check=True)
    ops = Counter(node.op_type for node in graph.graph)
    # A layer: qkv, o, gate | up, down; into the latent space, two scores, and out of it by two.
    assert ops["MatMul"] == 2 * 9 and "MatMulInteger" not in ops
    names = [str(value.name) for value in [*graph.graph.inputs, *graph.graph.outputs]]
    assert not any(name.endswith(".scale") for name in names)
    types = {value.dtype for node in graph.graph for value in node.outputs}
    assert ir.DataType.DOUBLE not in types


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_types_of_a_half_precision_graph(model: TinyLM, dtype: str) -> None:
    graph = dense_graph(build_onnx(model), model.config, dtype=dtype).graph
    kind = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}[dtype]
    assert {v.dtype for v in graph.inputs if str(v.name).startswith("past.")} == {kind}
    by_name = {node.name: node for node in graph}
    for name in ("layers.0.mlp.down_proj", "layers.1.self_attn.y_latent", "lm_head"):
        assert {value.dtype for value in by_name[name].inputs if value is not None} == {kind}
    for name in ("layers.0.self_attn.weights", "layers.0.mlp.down_proj.norm.square", "norm.square"):
        assert by_name[name].outputs[0].dtype == ir.DataType.FLOAT
    for node in graph:  # a strongly typed network promotes nothing
        floats = {v.dtype for v in node.inputs if v is not None and v.dtype in _FLOATS}
        assert len(floats) <= 1, node


_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def test_float16_stays_near_float32(model: TinyLM, batch: RaggedBatch) -> None:
    graph = dense_graph(build_onnx(model), model.config, dtype="fp16")
    inputs = dense_feeds(model, batch)
    expected = run(dense(model), inputs)["logits"]
    inputs |= {name: value.half() for name, value in inputs.items() if name.startswith("past.")}
    found = run(graph, inputs)["logits"]
    assert 0 < (found - expected).norm() / expected.norm() < 0.02  # some 50 roundings of 5e-4


def test_an_op_without_a_dense_form_is_refused(model: TinyLM) -> None:
    model.quantize_head()
    done = make_dense(build_onnx(model), max_seq_len=64)
    assert done.refused == {"lm_head": "tinylm::Int8Linear has no dense form"}
    with pytest.raises(ExportError, match="'lm_head': can't make it dense: tinylm::Int8Linear"):
        dense(model)
