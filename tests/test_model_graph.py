from __future__ import annotations

import dataclasses
import json

import onnx
import onnx_ir as ir
import pytest
import torch
from export_helpers import PLAIN, WITH_PAST, run_onnx
from model_helpers import make_model

from tinylm import TinyLM
from tinylm.bitlinear import PackedBitLinear
from tinylm.errors import ExportError
from tinylm_export.model_graph import TASKS, build_onnx
from tinylm_export.ops import DOMAIN, OPS, OPSET, register_onnx_schemas

TASK = pytest.mark.parametrize("task", TASKS)
CACHE = ("latent", "scale", "rope")


def proto(model: ir.Model) -> onnx.ModelProto:
    return ir.to_proto(model)


@TASK
@pytest.mark.parametrize("all_logits", [False, True])
@pytest.mark.parametrize("activation", ["int8", "fp8_e4m3"])
def test_checker_and_strict_shape_inference_pass(
    task: str, all_logits: bool, activation: str
) -> None:
    register_onnx_schemas()
    model = proto(build_onnx(make_model(activation=activation), task=task, all_logits=all_logits))
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


@TASK
def test_every_value_has_a_type_and_a_shape(task: str) -> None:
    graph = build_onnx(make_model(), task=task).graph
    values = [*graph.inputs, *graph.initializers.values()]
    values += [value for node in graph for value in node.outputs]
    for value in values:
        assert value.name
        assert value.dtype is not None, value.name
        assert value.shape is not None, value.name


@pytest.mark.parametrize("all_logits", [False, True])
@TASK
def test_stated_shapes_are_the_real_ones(task: str, all_logits: bool) -> None:
    """Every node's output, computed, has the type and the shape that the graph states."""
    model = make_model()
    graph_model = build_onnx(model, task=task, all_logits=all_logits)
    graph = graph_model.graph
    for node in graph:
        for value in node.outputs:
            if not value.is_graph_output():
                graph.outputs.append(value)
    sizes: dict[str, int] = {"batch": 3, "length": 5, "capacity": 7, "tokens": 15}
    feeds = {
        str(value.name): torch.zeros(shape_of(value, sizes), dtype=TORCH_TYPES[value.dtype])
        for value in graph.inputs
        if value.dtype is not None
    }
    results = run_onnx(ir.to_proto(graph_model), feeds)
    for value, found in zip(graph.outputs, results, strict=True):
        assert value.dtype is not None
        assert found.dtype == TORCH_TYPES[value.dtype], value.name
        assert list(found.shape) == shape_of(value, sizes), value.name


TORCH_TYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.BOOL: torch.bool,
}


def shape_of(value: ir.Value, sizes: dict[str, int]) -> list[int]:
    assert value.shape is not None
    return [d if isinstance(d, int) else sizes[str(d.value)] for d in value.shape]


@TASK
def test_nodes_are_called_what_their_modules_are(task: str) -> None:
    model = make_model()
    nodes = {node.name: node for node in build_onnx(model, task=task).graph}
    modules = dict(model.named_modules())
    linears = {name for name in model.bit_linears() if not name.endswith("kv_b_proj")}
    assert {name for name, node in nodes.items() if node.op_type == "BitLinear"} == linears
    attention = {f"layers.{i}.self_attn" for i in range(2)}
    assert {name for name, node in nodes.items() if node.op_type == "FlashMLA"} == attention
    assert {n for n, node in nodes.items() if node.op_type == "SwiGLU"} == {
        f"layers.{i}.mlp.swiglu" for i in range(2)
    }
    for name in ("embed_tokens", "norm", "lm_head"):
        assert name in modules
        assert name in nodes


@TASK
def test_names_are_unique(task: str) -> None:
    graph = build_onnx(make_model(), task=task).graph
    names = [node.name for node in graph]
    assert len(names) == len(set(names))
    values = [*graph.inputs, *graph.initializers.values()]
    values += [value for node in graph for value in node.outputs]
    assert len(values) == len({value.name for value in values})


def test_inputs_and_outputs_with_past() -> None:
    config = make_model().config
    graph = build_onnx(make_model()).graph
    cells = ["batch", "capacity"]
    cache = {
        f"{{}}.{i}.{part}": (dtype, cells + width)
        for i in range(config.num_layers)
        for part, dtype, width in (
            ("latent", "INT8", [config.latent_rank]),
            ("scale", "FLOAT", []),
            ("rope", "FLOAT", [config.rope_dim]),
        )
    }
    assert signature(graph.inputs) == {
        "input_ids": ("INT64", ["batch", "length"]),
        "past_lens": ("INT32", ["batch"]),
        "seq_lens": ("INT32", ["batch"]),
        **{name.format("past"): value for name, value in cache.items()},
    }
    assert signature(graph.outputs) == {
        "logits": ("FLOAT", ["batch", config.vocab_size]),
        **{name.format("present"): value for name, value in cache.items()},
    }


def test_inputs_and_outputs_of_the_plain_task() -> None:
    graph = build_onnx(make_model(), task=PLAIN).graph
    rows = ["batch", "length"]
    assert signature(graph.inputs) == {
        "input_ids": ("INT64", rows),
        "attention_mask": ("INT64", rows),
    }
    assert signature(graph.outputs) == {"logits": ("FLOAT", [*rows, 512])}


def signature(values: list[ir.Value]) -> dict[str, tuple[str, list[int | str | None]]]:
    found = {}
    for value in values:
        assert value.name and value.dtype is not None and value.shape is not None
        dims = [d.value if isinstance(d, ir.SymbolicDim) else d for d in value.shape]
        found[value.name] = (value.dtype.name, dims)
    return found


def test_weights_are_the_packed_codes() -> None:
    model = make_model()
    constants = build_onnx(model).graph.initializers
    for name, layer in model.bit_linears().items():
        packed = PackedBitLinear.from_bit_linear(layer)
        for part in ("weight", "weight_scale"):
            tensor = constants[f"{name}.{part}"].const_value
            assert tensor is not None
            assert (tensor.numpy() == getattr(packed, part).detach().numpy()).all()


def test_attributes_are_the_config() -> None:
    model = make_model(norm_eps=3e-4, rope_theta=700.0, activation="fp8_e4m3")
    shape = dataclasses.asdict(model.config.attention_shape)
    for node in build_onnx(model).graph:
        if node.domain != DOMAIN:
            continue
        values = {name: attribute.value for name, attribute in node.attributes.items()}
        assert set(values) == set(OPS[node.op_type].attribute_names())
        if node.op_type == "FlashMLA":
            assert values == shape
        if node.op_type == "BitLinear":
            assert values == {"activation": "fp8_e4m3", "eps": shape["eps"]}


def test_a_tied_head_is_stored_once() -> None:
    tied = build_onnx(make_model()).graph.initializers
    assert "lm_head.weight" not in tied
    untied = build_onnx(make_model(tie_embeddings=False)).graph.initializers
    assert {"lm_head.weight", "embed_tokens.weight"} <= set(untied)


@TASK
def test_a_packed_model_gives_the_same_graph(task: str) -> None:
    expected = proto(build_onnx(make_model(), task=task)).SerializeToString()
    assert proto(build_onnx(make_model().pack(), task=task)).SerializeToString() == expected


def test_the_model_is_left_as_it_was(model: TinyLM) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    build_onnx(model)
    after = model.state_dict()
    assert set(before) == set(after)
    assert all((after[name] == tensor).all() for name, tensor in before.items())
    assert set(model.bit_linears()) == set(make_model().bit_linears())


def test_the_model_says_what_it_is() -> None:
    model = build_onnx(make_model())
    assert model.opset_imports == {"": OPSET, DOMAIN: 1}
    assert json.loads(model.metadata_props["tinylm.config"]) == make_model().config.to_dict()
    assert model.metadata_props["tinylm.task"] == WITH_PAST
    # A body is there for each op that the graph holds, and no other.
    assert {name for _, name, _ in model.functions} == set(OPS) - {"Int8Linear"}


def test_unknown_task() -> None:
    with pytest.raises(ExportError, match="one of text-generation-with-past, text-generation"):
        build_onnx(make_model(), task="summarization")
