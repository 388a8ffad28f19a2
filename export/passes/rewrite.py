"""What the rewrites of a graph have in common."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir

from tinylm.errors import ExportError
from tinylm_export.ops import DOMAIN


@dataclasses.dataclass
class Rewrites:
    """What a pass did.

    Attributes:
        matched: Names of the nodes that it made or changed, in the graph's order.
        refused: Why a node that looked like the pattern was left as it is, by node name.
    """

    matched: list[str] = dataclasses.field(default_factory=list)
    refused: dict[str, str] = dataclasses.field(default_factory=dict)

    def require_all(self, what: str) -> None:
        """Check that nothing was refused.

        Args:
            what: What the pass does, for the message.

        Raises:
            ExportError: A node was left as it is; names it and says why.
        """
        for name, reason in self.refused.items():
            raise ExportError(
                f"node {name!r}: can't {what}: {reason}. The graph is not as `tinylm-export onnx` "
                "writes it: export the checkpoint again."
            )


def nodes_of(graph: ir.Graph, op: str) -> list[ir.Node]:
    """Return the nodes of one of TinyLM's ops, in the graph's order."""
    return [node for node in graph if node.domain == DOMAIN and node.op_type == op]


def attributes_of(node: ir.Node) -> dict[str, Any]:
    """Return a node's attributes as Python values."""
    return {name: attribute.value for name, attribute in node.attributes.items()}


def input_of(node: ir.Node, index: int) -> ir.Value | None:
    """Return an input, or None where it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def array_of(value: ir.Value | None, owner: ir.Node) -> np.ndarray:
    """Return a constant.

    Raises:
        ExportError: It is computed, or its data can't be read.
    """
    if value is None or value.const_value is None:
        raise ExportError(
            f"node {owner.name!r}: expected its weights as constants of the graph, found "
            f"{'none' if value is None else value.name}. Export the checkpoint again."
        )
    try:
        return value.const_value.numpy()
    except (OSError, ValueError) as error:
        raise ExportError(
            f"{value.name}: its data can't be read ({error}); the file is missing or truncated. "
            "Export the checkpoint again."
        ) from error


def add_initializer(graph: ir.Graph, name: str, tensor: np.ndarray | ir.Tensor) -> ir.Value:
    """Add a constant to a graph, in the place of one of the same name."""
    made = ir.tensor(np.asarray(tensor, order="C")) if isinstance(tensor, np.ndarray) else tensor
    made.name = name
    value = ir.Value(
        name=name,
        type=ir.TensorType(made.dtype),
        shape=ir.Shape(made.shape.numpy()),
        const_value=made,
    )
    graph.initializers.pop(name, None)
    graph.initializers[name] = value
    return value


def only_reader(value: ir.Value) -> ir.Node | None:
    """Return the node that reads a value, if it is the only one and no graph output is read."""
    readers = list(value.uses())
    if len(readers) != 1 or value.is_graph_output():
        return None
    return readers[0].node


def new_value(name: str, dtype: ir.DataType | None, shape: ir.Shape | None) -> ir.Value:
    """Make a value that a new node will give."""
    assert dtype is not None
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=shape)


def with_width(shape: ir.Shape | None, width: int) -> ir.Shape:
    """Return a shape with another last dimension."""
    assert shape is not None
    return ir.Shape([*list(shape)[:-1], width])


def width_of(value: ir.Value) -> int | None:
    """Return the last dimension, if it is known."""
    if value.shape is None or not len(value.shape):
        return None
    last = value.shape[-1]
    return last if isinstance(last, int) else None


def is_split_in_two(node: ir.Node | None) -> bool:
    """Whether a node splits its input along the last dimension into two."""
    return (
        node is not None
        and node.op_type == "Split"
        and len(node.outputs) == 2
        and attributes_of(node).get("axis", 0) == -1
    )


def drop_unused(graph: ir.Graph) -> None:
    """Remove Splits whose parts nobody reads, and constants that no node reads."""
    for node in list(graph):
        if node.op_type == "Split" and not any(map(_is_read, node.outputs)):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not _is_read(value):
            del graph.initializers[name]


def _is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()
