"""Let FlashMLA read the fused projection: the form that the TensorRT plugin takes."""

from __future__ import annotations

import onnx_ir as ir

from tinylm_export.ops import DOMAIN
from tinylm_export.passes.rewrite import (
    Rewrites,
    attributes_of,
    drop_unused,
    is_split_in_two,
    nodes_of,
    width_of,
)

_QUERY, _KEY_VALUE, _NORM = range(3)
# Inputs of the op of the contract; the plugin's has one fewer.
_NUM_INPUTS = 10


def trt_flash_mla(model: ir.Model) -> Rewrites:
    """Replace FlashMLA's inputs q and kv by the value that both are parts of, in place.

    Pattern: ``Split(qkv) -> q, kv -> FlashMLA``. The node gets the attribute ``latent_rank``, which
    the packed weight's shape tells no more once it is packed for the GPU.
    """
    graph, done = model.graph, Rewrites()
    for node in nodes_of(graph, "FlashMLA"):
        name = str(node.name)
        reason = _mismatch(node)
        if reason is not None:
            done.refused[name] = reason
            continue
        query, norm = node.inputs[_QUERY], node.inputs[_NORM]
        assert query is not None and norm is not None
        split, rank = query.producer(), width_of(norm)
        assert split is not None
        new = ir.node(
            "FlashMLA",
            [split.inputs[0], *node.inputs[_NORM:]],
            attributes_of(node) | {"latent_rank": rank},
            domain=DOMAIN,
            num_outputs=len(node.outputs),
            name=name,
        )
        ir.convenience.replace_nodes_and_values(
            graph, node, [node], [new], node.outputs, new.outputs
        )
        done.matched.append(name)
    drop_unused(graph)
    return done


def _mismatch(node: ir.Node) -> str | None:
    if len(node.inputs) != _NUM_INPUTS:
        return f"it has {len(node.inputs)} inputs, not the {_NUM_INPUTS} of the op"
    query, key_value, norm = (node.inputs[index] for index in (_QUERY, _KEY_VALUE, _NORM))
    if query is None or key_value is None or norm is None or width_of(norm) is None:
        return "q, kv or kv_norm_weight is missing, or its width unknown"
    split = query.producer()
    if not is_split_in_two(split) or split is not key_value.producer():
        return f"{query.name} and {key_value.name} are not the two parts of one value"
    assert split is not None
    if split.outputs[0] is not query:
        return f"{key_value.name} comes before {query.name} in the fused value"
    return None
