"""Fold the addition of the residual stream into the BitLinear before it."""

from __future__ import annotations

import onnx_ir as ir

from tinylm_export.ops import DOMAIN
from tinylm_export.passes.rewrite import (
    Rewrites,
    attributes_of,
    input_of,
    new_value,
    only_reader,
)

RESIDUAL = 4  # index of the input; norm_weight before it may be left out (None)


def fold_residual(model: ir.Model) -> Rewrites:
    """Let a BitLinear add the residual itself, in place.

    Pattern: ``Add(residual, BitLinear(...))`` in either order, of equal shapes, where nothing else
    reads the BitLinear. It gets the residual as an input of its own and gives what Add gave.
    """
    graph, done = model.graph, Rewrites()
    for node in [node for node in graph if node.domain == "" and node.op_type == "Add"]:
        candidates = [index for index in (1, 0) if _bit_linear(node.inputs[index]) is not None]
        if not candidates:
            continue
        reasons = [_mismatch(node, index) for index in candidates]
        if None not in reasons:
            done.refused[str(node.name)] = str(reasons[0])
            continue
        index = candidates[reasons.index(None)]
        linear = _bit_linear(node.inputs[index])
        assert linear is not None
        _fold(graph, node, linear, node.inputs[1 - index])
        done.matched.append(str(linear.name))
    return done


def _bit_linear(value: ir.Value | None) -> ir.Node | None:
    producer = None if value is None else value.producer()
    if producer is None or producer.domain != DOMAIN or producer.op_type != "BitLinear":
        return None
    return producer


def _mismatch(add: ir.Node, index: int) -> str | None:
    """Return why input ``index`` of an Add can't take the other input in, or None."""
    y, residual = add.inputs[index], add.inputs[1 - index]
    linear = _bit_linear(y)
    assert y is not None and residual is not None and linear is not None
    if only_reader(y) is not add:
        return f"{y.name} has other readers than the Add"
    if len(linear.inputs) > RESIDUAL:
        return f"{linear.name!r} adds a residual already"
    if y.shape is None or residual.shape is None or list(y.shape) != list(residual.shape):
        return f"{residual.name} {residual.shape} and {y.name} {y.shape} have different shapes"
    return None


def _fold(graph: ir.Graph, add: ir.Node, linear: ir.Node, residual: ir.Value | None) -> None:
    old = add.outputs[0]
    inputs = [input_of(linear, index) for index in range(RESIDUAL)]
    y = new_value(str(linear.outputs[0].name), old.dtype, old.shape)
    new = ir.node(
        "BitLinear",
        [*inputs, residual],
        attributes_of(linear),
        domain=DOMAIN,
        outputs=[y],
        name=linear.name,
    )
    # Where the Add stood: the residual may be computed after the BitLinear.
    graph.insert_after(add, new)
    ir.convenience.replace_all_uses_with(old, y)
    if old.is_graph_output():
        y.name = old.name
        graph.outputs[graph.outputs.index(old)] = y
    graph.remove([add, linear], safe=True)
