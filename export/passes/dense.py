"""The same network with ordinary weights, in standard ops: what the plugins are compared with."""

from __future__ import annotations

import onnx_ir as ir

from tinylm_export.graph_builder import Dims, GraphBuilder
from tinylm_export.model_graph import F32
from tinylm_export.ops import DOMAIN
from tinylm_export.passes.dense_attention import DenseAttention
from tinylm_export.passes.dense_ops import rms_norm, ternary_weight, wide
from tinylm_export.passes.rewrite import (
    Rewrites,
    attributes_of,
    drop_unused,
    input_of,
    width_of,
)

_ROWS = ("batch", "length")
_WEIGHT, _NORM = 1, 3


def make_dense(model: ir.Model, *, max_seq_len: int) -> Rewrites:
    """Replace TinyLM's ops by standard ones on dequantised weights, in place.

    Neither activations nor latents are quantised. The cache holds normed latents in the graph's
    type; ``past.{i}.scale`` and ``present.{i}.scale`` are gone. Norms, rotations, silu and softmax
    are marked to stay float32.

    Args:
        model: An exported graph with the latent cache, in float32.
        max_seq_len: Positions that the rotary tables cover.
    """
    graph, done = model.graph, Rewrites()
    shared = GraphBuilder("shared")
    attention: DenseAttention | None = None
    for node in [node for node in graph if node.domain == DOMAIN]:
        g = GraphBuilder(str(node.name), constants=shared)
        if node.op_type == "BitLinear":
            outputs = {0: _linear(g, node)}
        elif node.op_type == "SwiGLU":
            outputs = {0: _swiglu(g, node)}
        elif node.op_type == "FlashMLA":
            if attention is None:
                attention = DenseAttention(shared, graph, attributes_of(node), max_seq_len)
            outputs = attention.expand(g, node)
        else:
            done.refused[str(node.name)] = f"{DOMAIN}::{node.op_type} has no dense form"
            continue
        _replace(graph, node, outputs, g)
        done.matched.append(str(node.name))
    if shared.take_nodes():
        graph.insert_before(graph[0], shared.take_nodes())
    graph.initializers.update(shared.take_initializers())
    for value in [v for v in graph.inputs if str(v.name).endswith(".scale")]:
        graph.inputs.remove(value)
    drop_unused(graph)
    return done


def _linear(g: GraphBuilder, node: ir.Node) -> ir.Value:
    """Add RMSNorm and a product with the dequantised weight: x [B, S, K] -> y [B, S, N]."""
    x, norm, name = node.inputs[0], input_of(node, _NORM), str(node.name)
    assert x is not None
    matrix = ternary_weight(node, _WEIGHT)
    outputs, inputs = matrix.shape
    if norm is not None:
        eps = node.attributes["eps"].as_float()
        x = rms_norm(g, x, norm, eps, f"{name}.norm", [*_ROWS, inputs])
    weight = g.initializer(f"{name}.dense_weight", matrix.T)  # [K, N]
    return g.node("MatMul", [x, weight], name, F32, [*_ROWS, outputs])


def _swiglu(g: GraphBuilder, node: ir.Node) -> ir.Value:
    """Add silu, rounded to the graph's type, times up."""
    gate, up = node.inputs
    assert gate is not None and up is not None
    name, width = str(node.name), width_of(gate)
    assert width is not None
    shape: Dims = [*_ROWS, width]
    sigmoid = wide(g, "Sigmoid", [gate], f"{name}.sigmoid", shape)
    silu = wide(g, "Mul", [gate, sigmoid], f"{name}.silu", shape)
    return g.node("Mul", [silu, up], name, F32, shape)


def _replace(graph: ir.Graph, node: ir.Node, outputs: dict[int, ir.Value], g: GraphBuilder) -> None:
    """Put new nodes in a node's place; outputs without a new value leave the graph."""
    graph.insert_before(node, g.take_nodes())
    for index, old in enumerate(node.outputs):
        new = outputs.get(index)
        if old.is_graph_output():
            place = graph.outputs.index(old)
            if new is None:
                del graph.outputs[place]
            else:
                new.name = old.name
                graph.outputs[place] = new
        if new is not None:
            ir.convenience.replace_all_uses_with(old, new)
    graph.remove(node, safe=True)
