"""A thin layer over onnx_ir: typed values, module paths as node names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from tinylm_export.ops import DOMAIN, OPS, OPSET, VERSION

Dims = Sequence[int | str]


class GraphBuilder:
    """Collects nodes, initializers and graph inputs and outputs in order.

    Every value gets a type and a shape when it is made, so that the finished graph can be read in
    a viewer and checked against shape inference.

    Args:
        name: The graph's name.
        constants: A builder to share initializers with; default none.
    """

    def __init__(self, name: str, *, constants: GraphBuilder | None = None) -> None:
        self._name = name
        self._nodes: list[ir.Node] = []
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._initializers: dict[str, ir.Value] = (
            {} if constants is None else constants._initializers
        )

    def input(self, name: str, dtype: ir.DataType, shape: Dims) -> ir.Value:
        """Add a graph input."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self._inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str) -> None:
        """Make a value a graph output under a name of its own."""
        value.name = name
        self._outputs.append(value)

    def initializer(self, name: str, array: np.ndarray) -> ir.Value:
        """Add a constant, or return the one of that name."""
        if name not in self._initializers:
            tensor = ir.tensor(np.asarray(array, order="C"), name=name)
            value = ir.Value(
                name=name,
                type=ir.TensorType(tensor.dtype),
                shape=ir.Shape(tensor.shape.numpy()),
                const_value=tensor,
            )
            self._initializers[name] = value
        return self._initializers[name]

    def node(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        dtype: ir.DataType,
        shape: Dims,
        **attributes: Any,
    ) -> ir.Value:
        """Add a standard op with one output, called ``name``."""
        out = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self._nodes.append(
            ir.node(op, inputs, attributes=attributes or None, outputs=[out], name=name)
        )
        return out

    def custom(
        self,
        op: str,
        inputs: Sequence[ir.Value],
        name: str,
        outputs: Sequence[tuple[ir.DataType, Dims]],
        **attributes: Any,
    ) -> list[ir.Value]:
        """Add an op of the contract; its outputs are called ``name.<output>``."""
        spec = OPS[op]
        values = [
            ir.Value(
                name=f"{name}.{parameter.name}", type=ir.TensorType(dtype), shape=ir.Shape(shape)
            )
            for parameter, (dtype, shape) in zip(spec.outputs, outputs, strict=True)
        ]
        self._nodes.append(
            ir.node(
                op,
                inputs,
                attributes=attributes or None,
                domain=DOMAIN,
                outputs=values,
                name=name,
            )
        )
        return values

    def take_nodes(self) -> list[ir.Node]:
        """Return the nodes, for a graph that exists already."""
        return self._nodes

    def take_initializers(self) -> dict[str, ir.Value]:
        """Return the initializers by name, for a graph that exists already."""
        return self._initializers

    def graph(self) -> ir.Graph:
        """Return the finished graph."""
        return ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports={"": OPSET, DOMAIN: VERSION},
            name=self._name,
        )
