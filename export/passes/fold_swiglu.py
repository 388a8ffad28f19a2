"""Fold SwiGLU into the BitLinear that reads it."""

from __future__ import annotations

import onnx_ir as ir

from tinylm_export.passes.rewrite import (
    Rewrites,
    drop_unused,
    is_split_in_two,
    nodes_of,
    only_reader,
    width_of,
)


def fold_swiglu(model: ir.Model) -> Rewrites:
    """Let a BitLinear compute its input ``silu(gate) * up`` from ``gate | up`` itself, in place.

    Pattern: ``Split(gate_up) -> gate, up -> SwiGLU -> BitLinear`` with halves of equal width and no
    other reader of SwiGLU's output. The BitLinear reads ``gate_up`` and gets ``gated = 1``.
    """
    graph, done = model.graph, Rewrites()
    for node in nodes_of(graph, "SwiGLU"):
        reason = _mismatch(node)
        if reason is not None:
            done.refused[str(node.name)] = reason
            continue
        linear = only_reader(node.outputs[0])
        gate = node.inputs[0]
        assert linear is not None and gate is not None
        split = gate.producer()
        assert split is not None
        linear.replace_input_with(0, split.inputs[0])
        linear.attributes["gated"] = ir.AttrInt64("gated", 1)
        graph.remove(node, safe=True)
        done.matched.append(str(linear.name))
    drop_unused(graph)
    return done


def _mismatch(node: ir.Node) -> str | None:
    gate, up = node.inputs
    assert gate is not None and up is not None
    split = gate.producer()
    if not is_split_in_two(split) or split is not up.producer():
        return f"{gate.name} and {up.name} are not the two parts of one value"
    assert split is not None
    if split.outputs[0] is not gate:
        return f"{up.name} comes before {gate.name} in the fused value"
    if width_of(gate) is None or width_of(gate) != width_of(up):
        return f"{gate.name} and {up.name} are not equally wide"
    out = node.outputs[0]
    linear = only_reader(out)
    if linear is None:
        return f"{out.name} is read by {len(out.uses())} nodes or is an output of the graph"
    if linear.op_type != "BitLinear" or linear.inputs[0] is not out:
        return f"{linear.name!r}, which reads {out.name}, is no BitLinear on it"
    if "gated" in linear.attributes:
        return f"{linear.name!r} is gated already"
    return None
