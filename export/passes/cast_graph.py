"""Give a float32 graph another floating point type, except where float32 is needed."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from tinylm.errors import ExportError
from tinylm_export.ops import DOMAIN
from tinylm_export.passes.rewrite import Rewrites, add_initializer, array_of, drop_unused

DTYPES = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
}
_NUMPY = {ir.DataType.FLOAT16: np.float16, ir.DataType.BFLOAT16: ml_dtypes.bfloat16}
# Inputs and outputs of the plugins' form that have the graph's type; the others are float32.
_TYPED_INPUTS = {"BitLinear": {0, 4}, "FlashMLA": {0, 8}, "LmHead": {0, 1}}
_TYPED_OUTPUTS: dict[str, set[int]] = {"BitLinear": {0}, "FlashMLA": {0, 3}, "LmHead": set()}
_PRECISION = "tinylm.precision"
_FINAL_NORM = "norm"
F32 = ir.DataType.FLOAT


def keep_float32(node: ir.Node) -> None:
    """Make :func:`cast_graph` leave a node in float32."""
    node.metadata_props[_PRECISION] = "float32"


def cast_graph(model: ir.Model, dtype: str) -> Rewrites:
    """Turn a float32 graph into one of another type, in place.

    Weights, activations and rope caches get the type. Scales and norm weights stay float32, and so
    do the final norm, nodes marked by :func:`keep_float32` and the logits; Casts stand between.

    Args:
        model: A graph with FlashMLA on the fused projection, or without TinyLM's ops.
        dtype: One of :data:`DTYPES`.

    Returns:
        Names of the nodes whose output has another type than before.

    Raises:
        ExportError: Unknown type, or a weight that float16 can't hold.
    """
    if dtype not in DTYPES:
        raise ExportError(f"dtype must be one of {', '.join(DTYPES)}, found {dtype!r}.")
    target, done = DTYPES[dtype], Rewrites()
    if target == F32:
        return done
    graph = model.graph
    nodes = list(graph)
    wanted = {
        (node, index): _wanted(node, index, target)
        for node in nodes
        for index, value in enumerate(node.inputs)
        if value is not None and value.dtype == F32
    }
    for value in graph.inputs:
        if value.dtype == F32 and any(wanted[use.node, use.idx] == target for use in value.uses()):
            value.type = ir.TensorType(target)
    for node in nodes:
        for index, out in enumerate(node.outputs):
            if out.dtype == F32 and _typed(node, index, _TYPED_OUTPUTS):
                out.type = ir.TensorType(target)
                done.matched.append(str(node.name))
    casts = _Casts(graph, target)
    for (node, index), dtype_wanted in wanted.items():
        read = node.inputs[index]
        assert read is not None
        if read.dtype != dtype_wanted:
            node.replace_input_with(index, casts.to(read, dtype_wanted))
    _cast_logits(graph)
    drop_unused(graph)
    return done


def _typed(node: ir.Node, index: int, table: dict[str, set[int]]) -> bool:
    """Whether an input or output of a node has the graph's type."""
    name = str(node.name)
    if node.metadata_props.get(_PRECISION) == "float32":
        return False
    if name == _FINAL_NORM or name.startswith(f"{_FINAL_NORM}."):
        return False
    return node.domain != DOMAIN or index in table[node.op_type]


def _wanted(node: ir.Node, index: int, target: ir.DataType) -> ir.DataType:
    return target if _typed(node, index, _TYPED_INPUTS) else F32


class _Casts:
    """Makes a value's other form once, however many nodes read it."""

    def __init__(self, graph: ir.Graph, target: ir.DataType) -> None:
        self._graph, self._target = graph, target
        self._made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def to(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        key = (value, dtype)
        if key not in self._made:
            self._made[key] = self._make(value, dtype)
        return self._made[key]

    def _make(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        kind = {v: k for k, v in DTYPES.items()}[dtype]
        name = f"{value.name}.{kind}"
        if value.is_initializer():
            return self._constant(value, name)
        out = ir.Value(name=name, type=ir.TensorType(dtype), shape=value.shape)
        node = ir.node("Cast", [value], {"to": int(dtype)}, outputs=[out], name=name)
        producer = value.producer()
        if producer is None:
            self._graph.insert_before(self._graph[0], node)
        else:
            self._graph.insert_after(producer, node)
        return out

    def _constant(self, value: ir.Value, name: str) -> ir.Value:
        """Convert a weight, rounding to nearest even."""
        readers = [use.node for use in value.uses()]
        array = array_of(value, readers[0])
        with np.errstate(over="ignore"):  # said below
            converted = array.astype(_NUMPY[self._target])
        if np.isfinite(array).all() and not np.isfinite(converted.astype(np.float32)).all():
            raise ExportError(
                f"{value.name}: expected weights of at most 65504, which float16 holds, found "
                f"{np.abs(array).max():g}. Build with --dtype bf16."
            )
        return add_initializer(self._graph, name, ir.Tensor(converted, dtype=self._target))


def _cast_logits(graph: ir.Graph) -> None:
    """Give the logits in float32 under their name."""
    for index, value in enumerate(graph.outputs):
        if value.name != "logits" or value.dtype == F32:
            continue
        value.name = "typed_logits"
        out = ir.Value(name="logits", type=ir.TensorType(F32), shape=value.shape)
        node = ir.node("Cast", [value], {"to": int(F32)}, outputs=[out], name="logits")
        producer = value.producer()
        assert producer is not None
        graph.insert_after(producer, node)
        graph.outputs[index] = out
