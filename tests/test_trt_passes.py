"""Rewrites for TensorRT: what they match, what they refuse and why, and that numbers stay."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from export_helpers import PLAIN, run_onnx
from graph_interpreter import run_graph
from model_helpers import ACTIVATIONS, RaggedBatch, make_model
from test_passes import feeds
from tolerances import LOGITS, assert_equal
from torch import Tensor

from tinylm import TinyLM
from tinylm.errors import CheckpointError, ExportError
from tinylm_export.gpu_packing import packed_size
from tinylm_export.model_graph import build_onnx
from tinylm_export.ops import DOMAIN
from tinylm_export.passes.all_logits import expose_all_logits
from tinylm_export.passes.cast_graph import DTYPES, cast_graph
from tinylm_export.passes.drop_function_bodies import drop_function_bodies
from tinylm_export.passes.fold_lm_head import fold_lm_head
from tinylm_export.passes.fold_residual import fold_residual
from tinylm_export.passes.fold_swiglu import fold_swiglu
from tinylm_export.passes.fuse_projections import fuse_projections
from tinylm_export.passes.mark_outputs import mark_outputs
from tinylm_export.passes.mark_plugins import mark_plugins
from tinylm_export.passes.prepack_weights import prepack_weights
from tinylm_export.passes.rewrite import Rewrites
from tinylm_export.passes.trt_flash_mla import trt_flash_mla
from tinylm_export.trt_graph import plugin_graph

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
LAYERS = [0, 1]


def node(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


def fused(model: TinyLM) -> ir.Model:
    onnx_model = build_onnx(model)
    fuse_projections(onnx_model)
    return onnx_model


def decode_feeds(outputs: dict[str, Tensor], batch: RaggedBatch) -> dict[str, Tensor]:
    """Make the feeds of the step after a prefill."""
    lens = torch.tensor(batch.lens, dtype=torch.int32)
    following = {
        "input_ids": torch.arange(len(lens))[:, None] * 7 + 3,
        "past_lens": lens,
        "seq_lens": torch.ones_like(lens),
    }
    following |= {
        name.replace("present", "past"): value
        for name, value in outputs.items()
        if name.startswith("present.")
    }
    return following


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert_equal(found[name], value)


# The interpreter itself.


def test_the_interpreter_computes_what_onnx_runtime_does(model: TinyLM, batch: RaggedBatch) -> None:
    onnx_model = build_onnx(model)
    inputs = feeds(model, batch)
    found = run_graph(onnx_model, inputs)
    logits, *cache = run_onnx(ir.to_proto(onnx_model), inputs)
    LOGITS.assert_close(found.pop("logits"), logits)
    for value, expected in zip(found.values(), cache, strict=True):
        assert_equal(value, expected)


# Every pass by itself.


def test_function_bodies_are_dropped(model: TinyLM) -> None:
    onnx_model = build_onnx(model)
    other = ir.Function("other", "name", "", graph=ir.Graph([], [], nodes=[]), attributes=[])
    onnx_model.functions[other.identifier()] = other
    assert "BitLinear" in drop_function_bodies(onnx_model).matched
    assert list(onnx_model.functions.values()) == [other]


def test_projections_are_fused(model: TinyLM, batch: RaggedBatch) -> None:
    onnx_model = build_onnx(model)
    expected = run_graph(onnx_model, feeds(model, batch))
    done = fuse_projections(onnx_model)
    assert done.matched == [
        f"layers.{i}.{name}" for i in LAYERS for name in ("self_attn.qkv_proj", "mlp.gate_up_proj")
    ]
    assert not done.refused
    assert_same(run_graph(onnx_model, feeds(model, batch)), expected)
    assert not any("q_proj" in name or "up_proj.w" in name for name in unfused(onnx_model))


def unfused(model: ir.Model) -> list[str]:
    names = [*model.graph.initializers, *(str(n.name) for n in model.graph)]
    return [n for n in names if "gate_up" not in n and "qkv" not in n]


def change_input(name: str, index: int) -> Any:
    def change(model: ir.Model) -> None:
        target = node(model, name)
        value = target.inputs[index]
        assert value is not None
        copy = ir.Value(
            name="copy", type=value.type, shape=value.shape, const_value=value.const_value
        )
        if value.const_value is None:
            model.graph.insert_before(
                target, ir.node("Identity", [value], outputs=[copy], name="copy")
            )
        else:
            model.graph.initializers["copy"] = copy
        target.replace_input_with(index, copy)

    return change


def set_attribute(name: str, attribute: str, value: Any) -> Any:
    def change(model: ir.Model) -> None:
        (made,) = ir.convenience.convert_attributes({attribute: value})
        node(model, name).attributes[attribute] = made

    return change


def rename(name: str, new: str) -> Any:
    def change(model: ir.Model) -> None:
        node(model, name).name = new

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (change_input("layers.0.self_attn.kv_a_proj", 0), "another x: .* and copy"),
        (change_input("layers.0.self_attn.kv_a_proj", 3), "another norm_weight: .* and copy"),
        (set_attribute("layers.0.self_attn.kv_a_proj", "eps", 0.5), "another eps: .* and 0.5"),
        (
            set_attribute("layers.0.self_attn.kv_a_proj", "activation", "fp8_e4m3"),
            "another activation: int8 and fp8_e4m3",
        ),
        (set_attribute("layers.0.self_attn.q_proj", "gated", 1), "residual or gate already"),
        (rename("layers.0.self_attn.kv_a_proj", "other"), "no BitLinear 'kv_a_proj' beside it"),
    ],
)
def test_projections_that_differ_stay(
    model: TinyLM, batch: RaggedBatch, change: Any, reason: str
) -> None:
    onnx_model = build_onnx(model)
    change(onnx_model)
    done = fuse_projections(onnx_model)
    assert len(done.matched) == 3 and list(done.refused) == ["layers.0.self_attn.q_proj"]
    with pytest.raises(ExportError, match=f"'layers.0.self_attn.q_proj': can't join: .*{reason}"):
        done.require_all("join")


def test_flash_mla_reads_the_fused_projection(model: TinyLM, batch: RaggedBatch) -> None:
    onnx_model = fused(model)
    expected = run_graph(onnx_model, feeds(model, batch))
    done = trt_flash_mla(onnx_model)
    assert done.matched == ["layers.0.self_attn", "layers.1.self_attn"] and not done.refused
    changed = node(onnx_model, "layers.1.self_attn")
    assert len(changed.inputs) == 9 and changed.attributes["latent_rank"].as_int() == 32
    assert_same(run_graph(onnx_model, feeds(model, batch)), expected)
    assert Counter(n.op_type for n in onnx_model.graph)["Split"] == 2  # of gate and up


def test_flash_mla_without_a_fused_projection_is_refused(model: TinyLM) -> None:
    done = trt_flash_mla(build_onnx(model))
    assert not done.matched and len(done.refused) == 2
    assert "not the two parts of one value" in done.refused["layers.0.self_attn"]
    onnx_model = fused(model)
    trt_flash_mla(onnx_model)
    again = trt_flash_mla(onnx_model)
    assert "has 9 inputs, not the 10" in again.refused["layers.0.self_attn"]


def test_flash_mla_with_the_parts_exchanged_is_refused(model: TinyLM) -> None:
    onnx_model = fused(model)
    attention = node(onnx_model, "layers.0.self_attn")
    q, kv = attention.inputs[:2]
    attention.replace_input_with(0, kv)
    attention.replace_input_with(1, q)
    assert "before" in trt_flash_mla(onnx_model).refused["layers.0.self_attn"]


def test_swiglu_is_folded(model: TinyLM, batch: RaggedBatch) -> None:
    onnx_model = fused(model)
    expected = run_graph(onnx_model, feeds(model, batch))
    done = fold_swiglu(onnx_model)
    assert done.matched == ["layers.0.mlp.down_proj", "layers.1.mlp.down_proj"]
    assert not done.refused
    assert not any(n.op_type == "SwiGLU" for n in onnx_model.graph)
    assert_same(run_graph(onnx_model, feeds(model, batch)), expected)


def test_swiglu_that_does_not_fit_stays(model: TinyLM) -> None:
    unfused_done = fold_swiglu(build_onnx(model))
    assert "not the two parts" in unfused_done.refused["layers.0.mlp.swiglu"]
    onnx_model = fused(model)
    mark_outputs(onnx_model, ["layers.0.mlp.swiglu"])
    swiglu = node(onnx_model, "layers.1.mlp.swiglu")
    gate, up = swiglu.inputs
    swiglu.replace_input_with(0, up)
    swiglu.replace_input_with(1, gate)
    done = fold_swiglu(onnx_model)
    assert not done.matched
    assert "is an output of the graph" in done.refused["layers.0.mlp.swiglu"]
    assert "comes before" in done.refused["layers.1.mlp.swiglu"]


def test_residuals_are_folded(model: TinyLM, batch: RaggedBatch) -> None:
    onnx_model = build_onnx(model)
    expected = run_graph(onnx_model, feeds(model, batch))
    done = fold_residual(onnx_model)
    assert done.matched == [
        f"layers.{i}.{name}" for i in LAYERS for name in ("self_attn.o_proj", "mlp.down_proj")
    ]
    assert not done.refused
    assert not any(str(n.name).endswith(".residual") for n in onnx_model.graph)
    assert_same(run_graph(onnx_model, feeds(model, batch)), expected)


def test_residuals_that_do_not_fit_stay(model: TinyLM) -> None:
    onnx_model = build_onnx(model)
    mark_outputs(onnx_model, ["layers.0.self_attn.o_proj"])
    add = node(onnx_model, "layers.1.self_attn.residual")
    x = add.inputs[0]
    assert x is not None and x.shape is not None
    x.shape = ir.Shape([1, "length", 64])
    done = fold_residual(onnx_model)
    assert "other readers" in done.refused["layers.0.self_attn.residual"]
    assert "different shapes" in done.refused["layers.1.self_attn.residual"]
    assert len(done.matched) + len(done.refused) == 4


def test_the_norm_is_folded_into_the_head(model: TinyLM, batch: RaggedBatch) -> None:
    onnx_model = build_onnx(model)
    expected = run_graph(onnx_model, feeds(model, batch))
    assert fold_lm_head(onnx_model).matched == ["lm_head"]
    head = node(onnx_model, "lm_head")
    names = [str(value.name) for value in head.inputs if value is not None]
    assert names[1:] == ["embed_tokens.weight", "norm.weight", "seq_lens"]
    assert not [n.name for n in onnx_model.graph if str(n.name).startswith(("norm", "last_token"))]
    assert_same(run_graph(onnx_model, feeds(model, batch)), expected)


def test_a_head_without_the_norm_stays(model: TinyLM) -> None:
    onnx_model = build_onnx(model)
    node(onnx_model, "norm").name = "another"
    done = fold_lm_head(onnx_model)
    assert not done.matched and "does not read an RMSNorm called 'norm'" in done.refused["lm_head"]
    with_all = expose_all_logits(build_onnx(model))
    assert fold_lm_head(with_all) == Rewrites()
    model.quantize_head()
    assert fold_lm_head(build_onnx(model)) == Rewrites()


def test_weights_are_packed_for_the_gpu(model: TinyLM, batch: RaggedBatch) -> None:
    onnx_model = fused(model)
    trt_flash_mla(onnx_model)
    expected = run_graph(onnx_model, feeds(model, batch))
    done = prepack_weights(onnx_model)
    assert len(done.matched) == 2 * 5 and not done.refused
    types = {v.dtype for v in onnx_model.graph.initializers.values()}
    assert ir.DataType.UINT8 not in types
    down = node(onnx_model, "layers.0.mlp.down_proj")
    assert (down.attributes["num_outputs"].value, down.attributes["num_inputs"].value) == (64, 176)
    assert down.inputs[1] is not None and down.inputs[1].shape is not None
    assert list(down.inputs[1].shape) == [packed_size(64, 176)]
    assert_same(run_graph(onnx_model, feeds(model, batch)), expected)
    again = prepack_weights(onnx_model)
    assert not again.matched and len(again.refused) == 10
    assert "not uint8 [N, K/4]" in again.refused["layers.0.mlp.down_proj"]


def test_packing_finds_damaged_codes(model: TinyLM) -> None:
    onnx_model = build_onnx(model)
    weight = onnx_model.graph.initializers["layers.1.mlp.up_proj.weight"]
    assert weight.const_value is not None
    damaged = weight.const_value.numpy().copy()
    damaged[3, 2] |= 0x0C
    weight.const_value = ir.tensor(damaged, name=weight.name)
    fuse_projections(onnx_model)
    trt_flash_mla(onnx_model)
    with pytest.raises(CheckpointError, match=r"gate_up_proj\.weight: code 3 at row 179, column 9"):
        prepack_weights(onnx_model)


def test_plugin_nodes_say_what_they_have(model: TinyLM) -> None:
    onnx_model = plugin_graph(build_onnx(model), dtype="fp32", fp8_act=True)
    down, attention = (node(onnx_model, f"layers.0.{n}") for n in ("mlp.down_proj", "self_attn"))
    assert {name: a.value for name, a in down.attributes.items()} == {
        "activation": "fp8_e4m3",
        "eps": pytest.approx(1e-5),
        "num_inputs": 176,
        "num_outputs": 64,
        "has_norm": 1,
        "has_residual": 1,
        "gated": 1,
        "plugin_namespace": "tinylm",
        "plugin_version": "1",
    }
    assert "activation" not in attention.attributes
    assert attention.attributes["plugin_namespace"].value == "tinylm"
    for n in onnx_model.graph:
        assert all(value is not None for value in n.inputs)


def test_inputs_are_closed_up(model: TinyLM, batch: RaggedBatch) -> None:
    onnx_model = build_onnx(model)
    normless = node(onnx_model, "layers.0.self_attn.o_proj")
    normless.resize_inputs(3)
    expected = run_graph(onnx_model, feeds(model, batch))
    plugin_graph(onnx_model, dtype="fp32")
    o_proj = node(onnx_model, "layers.0.self_attn.o_proj")
    assert len(o_proj.inputs) == 4 and o_proj.attributes["has_norm"].value == 0
    assert_same(run_graph(onnx_model, feeds(model, batch)), expected)


def test_marking_refuses_what_has_no_plugin(model: TinyLM) -> None:
    with pytest.raises(ExportError, match=r"num_inputs, num_outputs missing. Pack the weights"):
        mark_plugins(build_onnx(model))
    model.quantize_head()
    with pytest.raises(ExportError, match=r"found tinylm::Int8Linear.*--lm-head float32"):
        plugin_graph(build_onnx(model))


# Types.


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("all_logits", [False, True])
def test_types_of_the_graph(
    model: TinyLM, batch: RaggedBatch, dtype: str, all_logits: bool
) -> None:
    onnx_model = plugin_graph(build_onnx(model), dtype=dtype, all_logits=all_logits)
    graph = onnx_model.graph
    dtypes = {str(v.name): v.dtype for v in [*graph.inputs, *graph.outputs]}
    kind = DTYPES[dtype]
    assert dtypes["logits"] == ir.DataType.FLOAT
    assert dtypes["past.0.rope"] == dtypes["present.1.rope"] == kind
    assert dtypes["past.0.scale"] == dtypes["present.1.scale"] == ir.DataType.FLOAT
    assert dtypes["past.0.latent"] == ir.DataType.INT8
    assert graph.initializers[f"embed_tokens.weight.{dtype}"].dtype == kind
    assert graph.initializers["norm.weight"].dtype == ir.DataType.FLOAT
    assert "embed_tokens.weight" not in graph.initializers
    inputs = feeds(model, batch)
    inputs |= {n: v.to(HALF[dtype]) for n, v in inputs.items() if n.endswith(".rope")}
    run_graph(onnx_model, inputs)  # which checks every value's type
    casts = [str(n.name) for n in graph if n.op_type == "Cast"]
    in_and_out_of_the_norm = ["layers.1.mlp.down_proj.y.fp32", f"norm.{dtype}"]
    assert casts == ([*in_and_out_of_the_norm, "logits"] if all_logits else [])


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_stays_near_float32(model: TinyLM, batch: RaggedBatch, dtype: str) -> None:
    inputs = feeds(model, batch)
    expected = run_graph(build_onnx(model), inputs)["logits"]
    inputs |= {n: v.to(HALF[dtype]) for n, v in inputs.items() if n.endswith(".rope")}
    found = run_graph(plugin_graph(build_onnx(model), dtype=dtype), inputs)["logits"]
    error = (found - expected).norm() / expected.norm()
    assert 0 < error < 0.1, error  # some 20 roundings, and quantisers that flip


def test_float32_is_left_alone(model: TinyLM) -> None:
    onnx_model = build_onnx(model)
    before = ir.to_proto(onnx_model).SerializeToString()
    assert cast_graph(onnx_model, "fp32") == Rewrites()
    assert ir.to_proto(onnx_model).SerializeToString() == before


def test_casting_refuses(model: TinyLM) -> None:
    with pytest.raises(ExportError, match="one of fp32, fp16, bf16, found 'fp8'"):
        cast_graph(build_onnx(model), "fp8")
    with torch.no_grad():
        model.embed_tokens.weight[3, 4] = 1e6
    with pytest.raises(ExportError, match=r"embed_tokens.weight: .*65504.* found 1e\+06"):
        plugin_graph(build_onnx(model), dtype="fp16")
    plugin_graph(build_onnx(model), dtype="bf16")


# All together.


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("all_logits", [False, True])
def test_the_whole_graph_in_float32_is_the_original(
    batch: RaggedBatch, activation: str, all_logits: bool
) -> None:
    model = make_model(seed=2, activation=activation)
    original = build_onnx(model)
    if all_logits:
        expose_all_logits(original)
    rewritten = plugin_graph(build_onnx(model), dtype="fp32", all_logits=all_logits)
    inputs = feeds(model, batch, capacity=30)
    expected = run_graph(original, inputs)
    assert_same(run_graph(rewritten, inputs), expected)
    following = decode_feeds(expected, batch)
    assert_same(run_graph(rewritten, following), run_graph(original, following))


def test_fp8_activations_are_those_of_an_fp8_model(batch: RaggedBatch) -> None:
    int8, fp8 = (make_model(seed=2, activation=activation) for activation in ACTIVATIONS)
    rewritten = plugin_graph(build_onnx(int8), dtype="fp32", fp8_act=True)
    inputs = feeds(int8, batch)
    assert_same(run_graph(rewritten, inputs), run_graph(build_onnx(fp8), inputs))


def test_nodes_of_the_whole_graph(model: TinyLM) -> None:
    onnx_model = plugin_graph(build_onnx(model))
    names = [n.name for n in onnx_model.graph if n.domain == DOMAIN]
    parts = ("self_attn.qkv_proj", "self_attn", "self_attn.o_proj", "mlp.gate_up_proj")
    in_layers = [f"layers.{i}.{part}" for i in LAYERS for part in (*parts, "mlp.down_proj")]
    assert names == [*in_layers, "lm_head"]
    assert [n.op_type for n in onnx_model.graph if n.domain != DOMAIN] == ["Gather"]
    marked = mark_outputs(onnx_model, in_layers)
    assert marked["layers.0.self_attn.o_proj"] == "layers.0.self_attn.o_proj.y"
    graph_inputs = [str(v.name) for v in onnx_model.graph.inputs]
    assert graph_inputs[:3] == ["input_ids", "past_lens", "seq_lens"]


def test_the_graph_survives_a_file(model: TinyLM, batch: RaggedBatch, tmp_path: Path) -> None:
    onnx_model = plugin_graph(build_onnx(model), dtype="fp32")
    inputs = feeds(model, batch)
    expected = run_graph(onnx_model, inputs)
    ir.save(onnx_model, tmp_path / "model.onnx", external_data="model.onnx_data")
    assert_same(run_graph(ir.load(tmp_path / "model.onnx"), inputs), expected)


def test_a_plain_graph_is_refused(model: TinyLM) -> None:
    with pytest.raises(ExportError, match=r"needs a model of the task.*attention_mask"):
        plugin_graph(build_onnx(model, task=PLAIN))


def test_a_changed_graph_is_refused_with_the_reason(model: TinyLM) -> None:
    onnx_model = build_onnx(model)
    mark_outputs(onnx_model, ["layers.0.mlp.swiglu"])
    with pytest.raises(ExportError, match=r"'layers.0.mlp.swiglu': can't fold SwiGLU.*an output"):
        plugin_graph(onnx_model)


def test_weights_of_the_graph_take_two_bits(model: TinyLM) -> None:
    onnx_model = plugin_graph(build_onnx(model))
    sizes = {
        name: int(np.prod(value.shape.numpy()))
        for name, value in onnx_model.graph.initializers.items()
        if value.dtype == ir.DataType.INT8 and value.shape is not None
    }
    assert len(sizes) == 10 and sizes["layers.0.mlp.gate_up_proj.weight_gpu"] == 352 * 128 // 4
