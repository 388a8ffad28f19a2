"""Join two BitLinears that read the same normed input into one, followed by a Split."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tinylm_export.ops import DOMAIN
from tinylm_export.passes.rewrite import (
    Rewrites,
    add_initializer,
    array_of,
    attributes_of,
    drop_unused,
    input_of,
    new_value,
    nodes_of,
    with_width,
)

# The first and second part, and what they are together.
PAIRS = (
    ("q_proj", "kv_a_proj", "qkv_proj"),
    ("gate_proj", "up_proj", "gate_up_proj"),
)
_X, _WEIGHT, _SCALE, _NORM = range(4)


def fuse_projections(model: ir.Model) -> Rewrites:
    """Fuse ``q_proj | kv_a_proj`` and ``gate_proj | up_proj`` of every layer, in place.

    Pattern: two BitLinears on the same x, with the same norm weight, eps and activation. Weights
    and scales are joined along N; x is normed and quantised once. The sums are exact, so every
    value stays the same bit for bit.
    """
    graph, done = model.graph, Rewrites()
    by_name = {node.name or "": node for node in nodes_of(graph, "BitLinear")}
    for name, first in list(by_name.items()):
        path, _, part = name.rpartition(".")
        pair = next((pair for pair in PAIRS if pair[0] == part), None)
        if pair is None:
            continue
        second = by_name.get(f"{path}.{pair[1]}")
        reason = _mismatch(first, second, pair[1])
        if reason is not None or second is None:
            done.refused[name] = str(reason)
            continue
        fused = f"{path}.{pair[2]}"
        _fuse(graph, first, second, fused)
        done.matched.append(fused)
    drop_unused(graph)
    return done


def _mismatch(first: ir.Node, second: ir.Node | None, name: str) -> str | None:
    """Return why two nodes can't be joined, or None."""
    if second is None:
        return f"there is no BitLinear {name!r} beside it"
    for index, what in ((_X, "x"), (_NORM, "norm_weight")):
        one, other = input_of(first, index), input_of(second, index)
        if one is not other:
            return (
                f"{second.name!r} has another {what}: {one and one.name} and {other and other.name}"
            )
    for node in (first, second):
        if len(node.inputs) > _NORM + 1 or "gated" in node.attributes:
            return f"{node.name!r} has a residual or gate already"
    for attribute in ("eps", "activation"):
        values = [attributes_of(node).get(attribute) for node in (first, second)]
        if values[0] != values[1]:
            return f"{second.name!r} has another {attribute}: {values[0]} and {values[1]}"
    return None


def _fuse(graph: ir.Graph, first: ir.Node, second: ir.Node, name: str) -> None:
    both = (first, second)
    weight = np.concatenate([array_of(node.inputs[_WEIGHT], node) for node in both])
    scale = np.concatenate([array_of(node.inputs[_SCALE], node) for node in both])
    sizes = np.array([array_of(node.inputs[_SCALE], node).shape[0] for node in both], np.int64)
    outputs = [node.outputs[0] for node in both]
    y = new_value(f"{name}.y", outputs[0].dtype, with_width(outputs[0].shape, int(sizes.sum())))
    inputs = [
        first.inputs[_X],
        add_initializer(graph, f"{name}.weight", weight),
        add_initializer(graph, f"{name}.weight_scale", scale),
        *first.inputs[_NORM:],
    ]
    fused = ir.node(
        "BitLinear", inputs, attributes_of(first), domain=DOMAIN, outputs=[y], name=name
    )
    parts = [new_value(str(value.name), value.dtype, value.shape) for value in outputs]
    split = ir.node(
        "Split",
        [y, add_initializer(graph, f"{name}.sizes", sizes)],
        {"axis": -1},
        outputs=parts,
        name=f"{name}.split",
    )
    graph.insert_before(first, [fused, split])
    for old, new in zip(outputs, parts, strict=True):
        ir.convenience.replace_all_uses_with(old, new)
        if old.is_graph_output():
            graph.outputs[graph.outputs.index(old)] = new
    graph.remove(both, safe=True)
