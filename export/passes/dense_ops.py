"""What the dense network's layers are made of: float32 nodes, RMSNorm, slices, ternary weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from tinylm.packing import check_packed, unpack
from tinylm_export.graph_builder import Dims, GraphBuilder
from tinylm_export.model_graph import F32
from tinylm_export.passes.cast_graph import keep_float32
from tinylm_export.passes.rewrite import array_of


def wide(
    g: GraphBuilder,
    op: str,
    inputs: Sequence[ir.Value],
    name: str,
    shape: Dims,
    **attributes: Any,
) -> ir.Value:
    """Add a node that stays float32 in a graph of another type."""
    out = g.node(op, inputs, name, F32, shape, **attributes)
    keep_float32(g.take_nodes()[-1])
    return out


def rms_norm(
    g: GraphBuilder, x: ir.Value, weight: ir.Value, eps: float, name: str, shape: Dims
) -> ir.Value:
    """Add RMSNorm over the last dimension, in float32: x and result [..., K]."""
    column = [*shape[:-1], 1]
    axes = g.initializer("dense.last_axis", np.array([-1], np.int64))
    small = g.initializer(f"{name}.eps", np.array(eps, np.float32))
    square = wide(g, "Mul", [x, x], f"{name}.square", shape)
    mean = wide(g, "ReduceMean", [square, axes], f"{name}.mean", column, keepdims=1)
    mean = wide(g, "Add", [mean, small], f"{name}.mean_eps", column)
    rms = wide(g, "Sqrt", [mean], f"{name}.rms", column)
    scaled = wide(g, "Div", [x, rms], f"{name}.scaled", shape)
    return wide(g, "Mul", [scaled, weight], f"{name}.normed", shape)


def slice_last(
    g: GraphBuilder, x: ir.Value, start: int, end: int, name: str, shape: Dims, *, f32: bool = False
) -> ir.Value:
    """Add a slice of the last dimension."""
    ends = [
        g.initializer(f"dense.int_{value}", np.array([value], np.int64))
        for value in (start, end, -1)
    ]
    out_shape = [*shape[:-1], end - start]
    if f32:
        return wide(g, "Slice", [x, *ends], name, out_shape)
    return g.node("Slice", [x, *ends], name, F32, out_shape)


def ternary_weight(node: ir.Node, index: int) -> np.ndarray:
    """Return a node's dequantised weight float32 [N, K]; its scales are the next input."""
    packed = torch.from_numpy(np.array(array_of(node.inputs[index], node)))
    check_packed(packed, str(node.name))
    scale = array_of(node.inputs[index + 1], node)
    return unpack(packed, torch.float32).numpy() * scale[:, None]
