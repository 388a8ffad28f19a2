"""The ONNX graph of a model: ``tinylm::BitLinear`` and ``tinylm::FlashMLA`` nodes.

The graph is built node by node from the model's modules rather than traced: a node is called what
its module is called, every value has a shape, and the same checkpoint gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import onnx_ir as ir
from torch import nn

from tinylm.bitlinear import BitLinear, PackedBitLinear
from tinylm.errors import ExportError
from tinylm.int8_linear import Int8Linear
from tinylm.model import DecoderLayer
from tinylm.norm import RMSNorm
from tinylm_export.function_bodies import function_bodies
from tinylm_export.graph_builder import GraphBuilder
from tinylm_export.ops import INT8_LINEAR, IR_VERSION

if TYPE_CHECKING:
    from torch import Tensor

    from tinylm.attention import FlashMLA
    from tinylm.model import TinyLM

Task = Literal["text-generation-with-past", "text-generation"]
TASKS: tuple[str, ...] = get_args(Task)

F32, I8, I32, I64, BOOL = (
    ir.DataType.FLOAT,
    ir.DataType.INT8,
    ir.DataType.INT32,
    ir.DataType.INT64,
    ir.DataType.BOOL,
)
# Name of the node that picks each row's last valid position; passes/all_logits.py removes it.
SELECT_LAST = "last_token"


@dataclasses.dataclass
class _Context:
    """Values that every layer reads."""

    seq_lens: ir.Value
    past_lens: ir.Value
    past: list[tuple[ir.Value, ir.Value, ir.Value]]
    capacity: str


def build_onnx(
    model: TinyLM, *, task: str = "text-generation-with-past", all_logits: bool = False
) -> ir.Model:
    """Build the ONNX model.

    Args:
        model: A float or packed model; its config's ``activation`` chooses the number format, and
            ``model.quantize_head()`` before makes the head ``tinylm::Int8Linear``.
        task: ``"text-generation-with-past"`` (latent cache as inputs and outputs) or
            ``"text-generation"`` (``input_ids``, ``attention_mask`` -> ``logits``).
        all_logits: Give logits [B, S, V] rather than [B, V] at each row's last valid token;
            always so for ``"text-generation"``.

    Returns:
        The model with function bodies; dynamic batch, length and cache capacity.

    Raises:
        ExportError: Unknown task, or a dense model.
    """
    if task not in TASKS:
        raise ExportError(f"task must be one of {', '.join(TASKS)}, found {task!r}.")
    config = model.config
    if config.dense:
        raise ExportError(
            "expected a ternary model, found a dense one (trained with --dense), which is for "
            "comparison only. Export a run without --dense."
        )
    g = GraphBuilder("tinylm")
    with_past = task == "text-generation-with-past"
    ids = g.input("input_ids", I64, ["batch", "length"])
    if with_past:
        context, order = _past_inputs(g, model), None
    else:
        all_logits = True
        ids, context, order = _plain_inputs(g, model, ids)

    x = g.node(
        "Gather",
        [g.initializer("embed_tokens.weight", _array(model.embed_tokens.weight)), ids],
        "embed_tokens",
        F32,
        ["batch", "length", config.hidden_size],
    )
    presents = []
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, DecoderLayer)
        x, present = _decoder_layer(g, f"layers.{index}", layer, x, context, index, model)
        presents.append(present)
    if not isinstance(model.lm_head, Int8Linear):  # which has the norm in it
        x = _rms_norm(g, "norm", x, model.norm, config.hidden_size)
    g.output(_head(g, model, x, order, context.seq_lens, all_logits), "logits")
    if with_past:
        for index, present in enumerate(presents):
            for value, kind in zip(present, ("latent", "scale", "rope"), strict=True):
                g.output(value, f"present.{index}.{kind}")
    functions = [
        ir.serde.deserialize_function(body)
        for body in function_bodies(config.activation)
        if body.name != INT8_LINEAR.name or isinstance(model.lm_head, Int8Linear)
    ]
    return ir.Model(
        g.graph(),
        ir_version=IR_VERSION,
        producer_name="tinylm",
        functions=functions,
        metadata_props={"tinylm.config": json.dumps(config.to_dict()), "tinylm.task": task},
    )


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def _past_inputs(g: GraphBuilder, model: TinyLM) -> _Context:
    config = model.config
    past_lens = g.input("past_lens", I32, ["batch"])
    seq_lens = g.input("seq_lens", I32, ["batch"])
    past = [
        (
            g.input(f"past.{i}.latent", I8, ["batch", "capacity", config.latent_rank]),
            g.input(f"past.{i}.scale", F32, ["batch", "capacity"]),
            g.input(f"past.{i}.rope", F32, ["batch", "capacity", config.rope_dim]),
        )
        for i in range(config.num_layers)
    ]
    return _Context(seq_lens, past_lens, past, "capacity")


def _plain_inputs(
    g: GraphBuilder, model: TinyLM, ids: ir.Value
) -> tuple[ir.Value, _Context, ir.Value]:
    """Move each row's real tokens to its front and start from an empty cache of S slots.

    Returns:
        The moved ids, the layers' context, and ``order`` [B, S]: where each token went.
    """
    config = model.config
    rows, row = ["batch", "length"], ["batch"]

    def constant(name: str, *values: int) -> ir.Value:
        return g.initializer(name, np.array(values, dtype=np.int64))

    axis_1, one = constant("axis_1", 1), constant("one", 1)
    mask = g.input("attention_mask", I64, rows)
    valid = g.node("Cast", [mask], "right_pad.valid", BOOL, rows, to=int(BOOL))
    ones = g.node("Cast", [valid], "right_pad.ones", I64, rows, to=int(I64))
    gaps = g.node("Sub", [one, ones], "right_pad.gaps", I64, rows)
    count = g.node("ReduceSum", [ones, axis_1], "right_pad.count", I64, ["batch", 1], keepdims=1)
    axis = g.initializer("axis_1_scalar", np.array(1, dtype=np.int64))
    ones_up_to = g.node("CumSum", [ones, axis], "right_pad.ones_up_to", I64, rows)
    gaps_up_to = g.node("CumSum", [gaps, axis], "right_pad.gaps_up_to", I64, rows)
    gaps_after = g.node("Add", [gaps_up_to, count], "right_pad.gaps_after", I64, rows)
    place = g.node("Where", [valid, ones_up_to, gaps_after], "right_pad.place", I64, rows)
    order = g.node("Sub", [place, one], "right_pad.order", I64, rows)
    moved = g.node("ScatterElements", [ids, order, ids], "right_pad", I64, rows, axis=1)

    count_row = g.node("Squeeze", [count, axis_1], "right_pad.count_row", I64, row)
    seq_lens = g.node("Cast", [count_row], "seq_lens", I32, row, to=int(I32))
    past_lens = g.node("Sub", [seq_lens, seq_lens], "past_lens", I32, row)
    shape = g.node("Shape", [ids], "empty_cache.shape", I64, [2])

    def empty(kind: str, dtype: ir.DataType, fill: np.ndarray, *width: int) -> ir.Value:
        dims = shape
        if width:
            last = constant(f"empty_cache.{kind}_width", *width)
            dims = g.node("Concat", [shape, last], f"empty_cache.{kind}_shape", I64, [3], axis=0)
        name = f"empty_cache.{kind}"
        out: list[int | str] = [*rows, *width]
        return g.node("ConstantOfShape", [dims], name, dtype, out, value=ir.tensor(fill))

    cache = (
        empty("latent", I8, np.zeros(1, np.int8), config.latent_rank),
        empty("scale", F32, np.ones(1, np.float32)),
        empty("rope", F32, np.zeros(1, np.float32), config.rope_dim),
    )
    context = _Context(seq_lens, past_lens, [cache] * config.num_layers, "length")
    return moved, context, order


def _bit_linear(
    g: GraphBuilder,
    name: str,
    x: ir.Value,
    layer: nn.Module,
    norm_name: str,
    norm: RMSNorm,
) -> ir.Value:
    assert isinstance(layer, BitLinear | PackedBitLinear)
    weight, scale = _packed(g, name, layer)
    num_outputs = scale.shape[0]  # type: ignore[index]
    out: list[int | str] = ["batch", "length", int(num_outputs)]  # type: ignore[arg-type]
    return g.custom(
        "BitLinear",
        [x, weight, scale, g.initializer(f"{norm_name}.weight", _array(norm.weight))],
        name,
        [(F32, out)],
        activation=layer.activation,
        eps=norm.eps,
    )[0]


def _packed(g: GraphBuilder, name: str, layer: nn.Module) -> tuple[ir.Value, ir.Value]:
    """Add a layer's 2-bit weight [N, K/4] and its row scales [N]."""
    if isinstance(layer, BitLinear):
        layer = PackedBitLinear.from_bit_linear(layer)
    assert isinstance(layer, PackedBitLinear)
    return (
        g.initializer(f"{name}.weight", layer.weight.cpu().numpy()),
        g.initializer(f"{name}.weight_scale", _array(layer.weight_scale)),
    )


def _decoder_layer(
    g: GraphBuilder,
    path: str,
    layer: DecoderLayer,
    x: ir.Value,
    context: _Context,
    index: int,
    model: TinyLM,
) -> tuple[ir.Value, list[ir.Value]]:
    config = model.config
    hidden: list[int | str] = ["batch", "length", config.hidden_size]
    attn, mlp = layer.self_attn, layer.mlp

    def linear(
        name: str, source: ir.Value, module: nn.Module, norm_name: str, norm: RMSNorm
    ) -> ir.Value:
        return _bit_linear(g, f"{path}.{name}", source, module, f"{path}.{norm_name}", norm)

    before = ("input_layernorm", layer.input_layernorm)
    q = linear("self_attn.q_proj", x, attn.q_proj, *before)
    kv = linear("self_attn.kv_a_proj", x, attn.kv_a_proj, *before)
    y, *present = _flash_mla(g, f"{path}.self_attn", attn, q, kv, context, index)
    y = linear("self_attn.o_proj", y, attn.o_proj, "self_attn.attn_sub_norm", attn.attn_sub_norm)
    x = g.node("Add", [x, y], f"{path}.self_attn.residual", F32, hidden)

    before = ("post_attention_layernorm", layer.post_attention_layernorm)
    gate = linear("mlp.gate_proj", x, mlp.gate_proj, *before)
    up = linear("mlp.up_proj", x, mlp.up_proj, *before)
    inner: list[int | str] = ["batch", "length", config.intermediate_size]
    y = g.custom("SwiGLU", [gate, up], f"{path}.mlp.swiglu", [(F32, inner)])[0]
    y = linear("mlp.down_proj", y, mlp.down_proj, "mlp.ffn_sub_norm", mlp.ffn_sub_norm)
    return g.node("Add", [x, y], f"{path}.mlp.residual", F32, hidden), present


def _flash_mla(
    g: GraphBuilder,
    path: str,
    attn: FlashMLA,
    q: ir.Value,
    kv: ir.Value,
    context: _Context,
    index: int,
) -> list[ir.Value]:
    shape, rank = attn.shape, attn.latent_rank
    weight, scale = _packed(g, f"{path}.kv_b_proj", attn.kv_b_proj)
    norm = g.initializer(f"{path}.kv_a_layernorm.weight", _array(attn.kv_a_layernorm.weight))
    lens = [context.past_lens, context.seq_lens]
    cells: list[int | str] = ["batch", context.capacity]
    return g.custom(
        "FlashMLA",
        [q, kv, norm, weight, scale, *lens, *context.past[index]],
        path,
        [
            (F32, ["batch", "length", shape.num_heads * shape.value_dim]),
            (I8, [*cells, rank]),
            (F32, cells),
            (F32, [*cells, shape.rope_dim]),
        ],
        **dataclasses.asdict(shape),
    )


def _rms_norm(g: GraphBuilder, name: str, x: ir.Value, norm: RMSNorm, width: int) -> ir.Value:
    """Add the final norm in standard float32 ops: no quantiser follows it."""
    full: list[int | str] = ["batch", "length", width]
    column: list[int | str] = ["batch", "length", 1]
    axes = g.initializer("last_axis", np.array([-1], dtype=np.int64))
    eps = g.initializer(f"{name}.eps", np.array(norm.eps, dtype=np.float32))
    square = g.node("Mul", [x, x], f"{name}.square", F32, full)
    mean = g.node("ReduceMean", [square, axes], f"{name}.mean", F32, column, keepdims=1)
    mean = g.node("Add", [mean, eps], f"{name}.mean_eps", F32, column)
    rms = g.node("Sqrt", [mean], f"{name}.rms", F32, column)
    scaled = g.node("Div", [x, rms], f"{name}.scaled", F32, full)
    weight = g.initializer(f"{name}.weight", _array(norm.weight))
    return g.node("Mul", [scaled, weight], name, F32, full)


def _head(
    g: GraphBuilder,
    model: TinyLM,
    x: ir.Value,
    order: ir.Value | None,
    seq_lens: ir.Value,
    all_logits: bool,
) -> ir.Value:
    """Add the head: logits [B, V] at each row's last token, or [B, S, V].

    Gemm takes the embedding as it lies, so that a tied head needs no second copy in the file.
    """
    config = model.config
    axis = g.initializer("last_axis", np.array([-1], dtype=np.int64))
    full: list[int | str] = ["batch", "length", config.hidden_size]
    index_shape: list[int | str] = ["batch", "length", 1]
    tied = config.tie_embeddings
    name = "embed_tokens.weight" if tied else "lm_head.weight"
    int8 = isinstance(model.lm_head, Int8Linear)
    weight = None if int8 else g.initializer(name, _array(model.lm_head.weight))
    if not all_logits:
        one = g.initializer("one_int32", np.array(1, dtype=np.int32))
        zero = g.initializer("zero_int32", np.array(0, dtype=np.int32))
        last = g.node("Sub", [seq_lens, one], f"{SELECT_LAST}.minus_one", I32, ["batch"])
        last = g.node("Max", [last, zero], f"{SELECT_LAST}.position", I32, ["batch"])
        last = g.node("Cast", [last], f"{SELECT_LAST}.index", I64, ["batch"], to=int(I64))
        last = g.node("Unsqueeze", [last, axis], f"{SELECT_LAST}.column", I64, ["batch", 1])
        rows: list[int | str] = ["batch", config.hidden_size]
        x = g.node("GatherND", [x, last], SELECT_LAST, F32, rows, batch_dims=1)
        if weight is None:
            return _int8_head(g, model, x, ["batch"])
        return g.node("Gemm", [x, weight], "lm_head", F32, ["batch", config.vocab_size], transB=1)
    if order is not None:
        index = g.node("Unsqueeze", [order, axis], "restore.index", I64, index_shape)
        x = g.node("GatherND", [x, index], "restore", F32, full, batch_dims=1)
    if weight is None:
        return _int8_head(g, model, x, ["batch", "length"])
    return add_all_logits(g, x, weight, config.hidden_size, config.vocab_size)


def _int8_head(g: GraphBuilder, model: TinyLM, x: ir.Value, rows: list[int | str]) -> ir.Value:
    """Add the int8 head with the final norm in it: x [*rows, hidden] -> logits [*rows, V]."""
    head = model.lm_head
    assert isinstance(head, Int8Linear)
    return g.custom(
        "Int8Linear",
        [
            x,
            g.initializer("lm_head.weight", head.weight.cpu().numpy()),
            g.initializer("lm_head.weight_scale", _array(head.weight_scale)),
            g.initializer("norm.weight", _array(model.norm.weight)),
        ],
        "lm_head",
        [(F32, [*rows, model.config.vocab_size])],
        eps=model.norm.eps,
    )[0]


def add_all_logits(
    g: GraphBuilder, x: ir.Value, weight: ir.Value, hidden_size: int, vocab_size: int
) -> ir.Value:
    """Add the head over every position: x [B, S, hidden] -> logits [B, S, V]."""
    rows = g.initializer("head_rows", np.array([-1, hidden_size], dtype=np.int64))
    size = g.initializer("head_vocab_size", np.array([vocab_size], dtype=np.int64))
    flat = g.node("Reshape", [x, rows], "lm_head.rows", F32, ["tokens", hidden_size])
    flat = g.node("Gemm", [flat, weight], "lm_head", F32, ["tokens", vocab_size], transB=1)
    shape = g.node("Shape", [x], "lm_head.batch_and_length", I64, [2], start=0, end=2)
    shape = g.node("Concat", [shape, size], "lm_head.shape", I64, [3], axis=0)
    out: list[int | str] = ["batch", "length", vocab_size]
    return g.node("Reshape", [flat, shape], "lm_head.logits", F32, out)
