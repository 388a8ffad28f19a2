"""Latent attention in standard ops, absorbed: no key or value of a past token is ever expanded."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from tinylm.latent_attention import rotary_angles
from tinylm_export.graph_builder import Dims, GraphBuilder
from tinylm_export.model_graph import BOOL, F32, I32, I64
from tinylm_export.passes.dense_ops import rms_norm, slice_last, ternary_weight, wide
from tinylm_export.passes.rewrite import attributes_of

_QUERY, _KEY_VALUE, _NORM, _KV_B = range(4)
_PAST_LATENT, _PAST_ROPE = 7, 9
# Outputs; there is none for the scale.
_Y, _LATENT, _ROPE = 0, 1, 3
_ROWS = ("batch", "length")
_CELLS = ("batch", "capacity")


class DenseAttention:
    """Expands FlashMLA nodes; what does not depend on the layer is computed once.

    Args:
        g: Takes the nodes that come before every layer.
        graph: The graph, for its inputs.
        attributes: Those of a FlashMLA node; all layers have the same.
        max_seq_len: Positions that the rotary tables cover.
    """

    def __init__(
        self, g: GraphBuilder, graph: ir.Graph, attributes: dict[str, Any], max_seq_len: int
    ) -> None:
        inputs = {value.name: value for value in graph.inputs}
        self._num_heads = int(attributes["num_heads"])
        self._nope, self._rope = int(attributes["nope_dim"]), int(attributes["rope_dim"])
        self._value = int(attributes["value_dim"])
        half = self._rope // 2
        past = self._column(g, inputs["past_lens"], "past")
        new = self._column(g, inputs["seq_lens"], "new")
        self._length = self._size(g, inputs["input_ids"], "length")
        self._capacity = self._size(g, inputs["past.0.latent"], "capacity")
        steps, slots = (
            self._range(g, self._length, "steps"),
            self._range(g, self._capacity, "slots"),
        )
        positions = g.node("Add", [past, steps], "dense.positions", I32, [*_ROWS])

        last = g.initializer("dense.last_position", np.array(max_seq_len - 1, np.int32))
        # Padding may lie behind the table.
        known = g.node("Min", [positions, last], "dense.known_positions", I32, [*_ROWS])
        tables = rotary_angles(
            torch.arange(max_seq_len)[None], self._rope, float(attributes["theta"])
        )
        self._rotary = [
            wide(
                g,
                "Gather",
                [g.initializer(f"dense.{name}_table", table[0].numpy()), known],
                f"dense.{name}",
                [*_ROWS, half],
            )
            for name, table in zip(("cos", "sin"), tables, strict=True)
        ]
        axis_2 = g.initializer("dense.axis_2", np.array([2], np.int64))
        self._rotary_heads = [
            wide(g, "Unsqueeze", [v, axis_2], f"{v.name}_heads", [*_ROWS, 1, half])
            for v in self._rotary
        ]
        self._find_new(g, slots, past, new, axis_2)
        self._find_visible(g, slots, positions, axis_2)
        self._make_shapes(g, inputs["past.0.latent"])

    def _find_new(
        self, g: GraphBuilder, slots: ir.Value, past: ir.Value, new: ir.Value, axis_2: ir.Value
    ) -> None:
        """Find which slots take a new token, and which one."""
        zero = g.initializer("dense.zero", np.array(0, np.int32))
        one = g.initializer("dense.one", np.array(1, np.int32))
        index = g.node("Sub", [slots, past], "dense.new_index", I32, [*_CELLS])
        before = g.node("Less", [index, zero], "dense.is_past", BOOL, [*_CELLS])
        inside = g.node("Less", [index, new], "dense.is_before_end", BOOL, [*_CELLS])
        not_before = g.node("Not", [before], "dense.is_not_past", BOOL, [*_CELLS])
        is_new = g.node("And", [not_before, inside], "dense.is_new", BOOL, [*_CELLS])
        self._is_new = g.node(
            "Unsqueeze", [is_new, axis_2], "dense.is_new_column", BOOL, [*_CELLS, 1]
        )
        length = g.node("Cast", [self._length], "dense.length_int32", I32, [1], to=int(I32))
        last = g.node("Sub", [length, one], "dense.last_step", I32, [1])
        index = g.node("Max", [index, zero], "dense.from_first", I32, [*_CELLS])
        index = g.node("Min", [index, last], "dense.to_last", I32, [*_CELLS])
        index = g.node("Cast", [index], "dense.source", I64, [*_CELLS], to=int(I64))
        self._source = g.node(
            "Unsqueeze", [index, axis_2], "dense.source_column", I64, [*_CELLS, 1]
        )

    def _find_visible(
        self, g: GraphBuilder, slots: ir.Value, positions: ir.Value, axis_2: ir.Value
    ) -> None:
        """Find which slots each query sees: bool [B, 1, S, C]."""
        axis_1 = g.initializer("dense.int_1", np.array([1], np.int64))
        column = g.node("Unsqueeze", [positions, axis_2], "dense.query", I32, [*_ROWS, 1])
        shape = [*_ROWS, "capacity"]
        hidden = g.node("Greater", [slots, column], "dense.is_hidden", BOOL, shape)
        visible = g.node("Not", [hidden], "dense.is_visible", BOOL, shape)
        self._visible = g.node(
            "Unsqueeze", [visible, axis_1], "dense.visible", BOOL, ["batch", 1, *shape[1:]]
        )

    def _make_shapes(self, g: GraphBuilder, latent: ir.Value) -> None:
        """Make the shapes that have two dimensions which are known only at run time."""
        heads = g.initializer("dense.batch_heads", np.array([-1, self._num_heads], np.int64))
        rows = g.initializer("dense.batch_rows", np.array([0, -1], np.int64))
        self._by_head = g.node(
            "Concat",
            [heads, self._length, self._capacity],
            "dense.scores_shape",
            I64,
            [4],
            axis=0,
        )
        self._by_row = g.node(
            "Concat", [rows, self._capacity], "dense.weights_shape", I64, [3], axis=0
        )
        assert latent.shape is not None
        rank = g.initializer("dense.rank", np.array([latent.shape[-1]], np.int64))
        self._latent_shape = g.node(
            "Concat", [heads, self._length, rank], "dense.latent_shape", I64, [4], axis=0
        )

    def _column(self, g: GraphBuilder, lens: ir.Value, name: str) -> ir.Value:
        """Return lengths as a column int32 [B, 1]."""
        axis = g.initializer("dense.int_1", np.array([1], np.int64))
        return g.node("Unsqueeze", [lens, axis], f"dense.{name}_column", I32, ["batch", 1])

    def _size(self, g: GraphBuilder, value: ir.Value, name: str) -> ir.Value:
        """Return dimension 1 of a value as int64 [1]."""
        return g.node("Shape", [value], f"dense.{name}", I64, [1], start=1, end=2)

    def _range(self, g: GraphBuilder, size: ir.Value, name: str) -> ir.Value:
        """Return 0, 1, ... up to a size [1], as int32 [size]."""
        zero = g.initializer("dense.zero", np.array(0, np.int32))
        one = g.initializer("dense.one", np.array(1, np.int32))
        axis = g.initializer("dense.int_0", np.array([0], np.int64))
        scalar = g.node("Squeeze", [size, axis], f"dense.{name}_size", I64, [])
        scalar = g.node("Cast", [scalar], f"dense.{name}_end", I32, [], to=int(I32))
        dimension = {"steps": "length", "slots": "capacity"}[name]
        return g.node("Range", [zero, scalar, one], f"dense.{name}", I32, [dimension])

    def expand(self, g: GraphBuilder, node: ir.Node) -> dict[int, ir.Value]:
        """Add what one FlashMLA node computes.

        Args:
            g: Takes the nodes.
            node: The node; its latent cache becomes one of floats.

        Returns:
            The new values by output index; there is none for the scale.
        """
        name = str(node.name)
        query, key_value, norm = (node.inputs[i] for i in (_QUERY, _KEY_VALUE, _NORM))
        past_latent, past_rope = node.inputs[_PAST_LATENT], node.inputs[_PAST_ROPE]
        assert query is not None and key_value is not None and norm is not None
        assert past_latent is not None and past_rope is not None and norm.shape is not None
        rank = int(norm.shape.numpy()[0])
        past_latent.type = ir.TensorType(F32)

        end = rank + self._rope
        width: Dims = [*_ROWS, end]
        latent = slice_last(g, key_value, 0, rank, f"{name}.latent", width)
        eps = float(attributes_of(node)["eps"])
        latent = rms_norm(g, latent, norm, eps, f"{name}.latent_norm", [*_ROWS, rank])
        key = slice_last(g, key_value, rank, end, f"{name}.key", width)
        key = self._rotate(g, key, self._rotary, f"{name}.key", [*_ROWS, self._rope])
        latent = self._append(g, past_latent, latent, f"{name}.present_latent", rank)
        rope = self._append(g, past_rope, key, f"{name}.present_rope", self._rope)
        y = self._attend(g, node, query, latent, rope)
        return {_Y: y, _LATENT: latent, _ROPE: rope}

    def _rotate(
        self, g: GraphBuilder, x: ir.Value, rotary: list[ir.Value], name: str, shape: Dims
    ) -> ir.Value:
        """Rotate by halves, in float32; cos and sin fit x but for the last dimension."""
        cos, sin = rotary
        half = self._rope // 2
        part: Dims = [*shape[:-1], half]
        first = slice_last(g, x, 0, half, f"{name}.first", shape, f32=True)
        second = slice_last(g, x, half, self._rope, f"{name}.second", shape, f32=True)

        def times(value: ir.Value, angle: ir.Value, what: str) -> ir.Value:
            return wide(g, "Mul", [value, angle], f"{name}.{what}", part)

        front = [times(first, cos, "first_cos"), times(second, sin, "second_sin")]
        back = [times(second, cos, "second_cos"), times(first, sin, "first_sin")]
        halves = [
            wide(g, "Sub", front, f"{name}.front", part),
            wide(g, "Add", back, f"{name}.back", part),
        ]
        return wide(g, "Concat", halves, f"{name}.rotated", shape, axis=-1)

    def _append(
        self, g: GraphBuilder, past: ir.Value, new: ir.Value, name: str, width: int
    ) -> ir.Value:
        """Write new tokens [B, S, W] behind the old ones of a cache [B, C, W].

        Every slot is either kept or taken from the new tokens, so that the result may lie where the
        cache lies.
        """
        shape: Dims = [*_CELLS, width]
        inputs = [new, self._source]
        taken = g.node("GatherND", inputs, f"{name}.taken", F32, shape, batch_dims=1)
        return g.node("Where", [self._is_new, taken, past], name, F32, shape)

    def _attend(
        self, g: GraphBuilder, node: ir.Node, query: ir.Value, latent: ir.Value, rope: ir.Value
    ) -> ir.Value:
        """Attend in the latent space: query [B, S, H*D] -> y [B, S, H*Dv].

        Queries of all heads are rows of one product, so that a cache is read once for all heads.
        """
        name, heads = str(node.name), self._num_heads
        w_uk, w_uv = self._absorbed(g, node)
        rank = int(w_uk.shape.numpy()[-1])  # type: ignore[union-attr]
        qk_dim = self._nope + self._rope

        def constant(*values: int) -> ir.Value:
            text = "_".join(map(str, values))
            return g.initializer(f"dense.shape_{text}", np.array(values, np.int64))

        def by_head(x: ir.Value, what: str, width: int) -> ir.Value:
            """[B, S, H, W] -> [B, H, S, W]."""
            shape: Dims = ["batch", heads, "length", width]
            return g.node("Transpose", [x], f"{name}.{what}_by_head", F32, shape, perm=[0, 2, 1, 3])

        def rows(x: ir.Value, what: str, width: int) -> ir.Value:
            """[B, H, S, W] -> [B, H*S, W]."""
            shape: Dims = ["batch", "rows", width]
            return g.node("Reshape", [x, constant(0, -1, width)], f"{name}.{what}_rows", F32, shape)

        def scores_with(q: ir.Value, cache: ir.Value, what: str, width: int) -> ir.Value:
            """[B, H*S, W] x [B, C, W] -> [B, H*S, C]."""
            columns = g.node(
                "Transpose",
                [cache],
                f"{name}.{what}_columns",
                F32,
                ["batch", width, "capacity"],
                perm=[0, 2, 1],
            )
            shape: Dims = ["batch", "rows", "capacity"]
            return g.node("MatMul", [q, columns], f"{name}.{what}_scores", F32, shape)

        split: Dims = [*_ROWS, heads, qk_dim]
        q = g.node("Reshape", [query, constant(0, 0, heads, qk_dim)], f"{name}.q", F32, split)
        q_nope = slice_last(g, q, 0, self._nope, f"{name}.q_nope", split)
        q_rope = slice_last(g, q, self._nope, qk_dim, f"{name}.q_rope", split)
        q_rope = self._rotate(
            g, q_rope, self._rotary_heads, f"{name}.q_rope", [*_ROWS, heads, self._rope]
        )
        inputs = [by_head(q_nope, "q_nope", self._nope), w_uk]
        wide_shape: Dims = ["batch", heads, "length", rank]
        q_latent = g.node("MatMul", inputs, f"{name}.q_latent", F32, wide_shape)
        q_latent = rows(q_latent, "q_latent", rank)
        q_rope = rows(by_head(q_rope, "q_rope", self._rope), "q_rope", self._rope)
        parts = [
            scores_with(q_latent, latent, "latent", rank),
            scores_with(q_rope, rope, "rope", self._rope),
        ]
        scores = g.node("Add", parts, f"{name}.scores", F32, ["batch", "rows", "capacity"])
        weights = self._softmax(g, name, scores, float(attributes_of(node)["softmax_scale"]))
        y = g.node("MatMul", [weights, latent], f"{name}.y_latent", F32, ["batch", "rows", rank])
        y = g.node("Reshape", [y, self._latent_shape], f"{name}.y_latent_heads", F32, wide_shape)
        shape: Dims = ["batch", heads, "length", self._value]
        y = g.node("MatMul", [y, w_uv], f"{name}.y_by_head", F32, shape)
        shape = [*_ROWS, heads, self._value]
        y = g.node("Transpose", [y], f"{name}.y_heads", F32, shape, perm=[0, 2, 1, 3])
        flat = heads * self._value
        return g.node("Reshape", [y, constant(0, 0, flat)], name, F32, [*_ROWS, flat])

    def _softmax(self, g: GraphBuilder, name: str, scores: ir.Value, scale: float) -> ir.Value:
        """Mask and normalise scores [B, H*S, C], in float32."""
        shape: Dims = ["batch", self._num_heads, "length", "capacity"]
        x = wide(g, "Reshape", [scores, self._by_head], f"{name}.scores_by_head", shape)
        factor = g.initializer(f"{name}.softmax_scale", np.array(scale, np.float32))
        nothing = g.initializer("dense.minus_infinity", np.array(-np.inf, np.float32))
        x = wide(g, "Mul", [x, factor], f"{name}.scores_scaled", shape)
        x = wide(g, "Where", [self._visible, x, nothing], f"{name}.scores_visible", shape)
        x = wide(g, "Softmax", [x], f"{name}.weights", shape, axis=-1)
        flat: Dims = ["batch", "rows", "capacity"]
        return g.node("Reshape", [x, self._by_row], f"{name}.weights_rows", F32, flat)

    def _absorbed(self, g: GraphBuilder, node: ir.Node) -> tuple[ir.Value, ir.Value]:
        """Add kv_b's halves, W_uk [1, H, nope, R] and W_uv [1, H, R, Dv]."""
        name = str(node.name)
        weight = ternary_weight(node, _KV_B)
        by_head = weight.reshape(1, self._num_heads, self._nope + self._value, -1)
        w_uk, w_uv = np.split(by_head, [self._nope], axis=2)
        return (
            g.initializer(f"{name}.w_uk", w_uk),
            g.initializer(f"{name}.w_uv", w_uv.transpose(0, 1, 3, 2)),
        )
