"""Make inner values graph outputs, to compare layer by layer."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from tinylm.errors import ExportError


def mark_outputs(model: ir.Model, node_names: Iterable[str]) -> dict[str, str]:
    """Add the first output of each named node to the graph's outputs, in place.

    Args:
        model: The model.
        node_names: Names of nodes, such as ``"layers.0.self_attn.q_proj"``.

    Returns:
        The output's name by node name.

    Raises:
        ExportError: A node is missing.
    """
    nodes = {node.name: node for node in model.graph}
    marked = {}
    for name in node_names:
        if name not in nodes:
            raise ExportError(f"the graph has no node {name!r}; it has {len(nodes)} others.")
        value = nodes[name].outputs[0]
        assert value.name is not None
        if not value.is_graph_output():
            model.graph.outputs.append(value)
        marked[name] = value.name
    return marked
