"""Give TinyLM's nodes the form in which TensorRT's ONNX parser finds their plugins."""

from __future__ import annotations

import onnx_ir as ir

from tinylm.errors import ExportError
from tinylm_export.ops import DOMAIN
from tinylm_export.passes.fold_residual import RESIDUAL
from tinylm_export.passes.rewrite import Rewrites, input_of
from tinylm_export.plugin_ops import PLUGIN_NAMESPACE, PLUGIN_VERSION, PLUGINS

_NORM = 3


def mark_plugins(model: ir.Model, *, activation: str | None = None) -> Rewrites:
    """Add plugin name space, version and the attributes that say which inputs are there, in place.

    Inputs that are left out are closed up, because the parser gives plugins no empty ones.

    Args:
        model: The graph, fused and packed.
        activation: Number format of every BitLinear's activations; default as it is.

    Raises:
        ExportError: An op that has no plugin, or a node without an attribute that the plugin needs.
    """
    done = Rewrites()
    for node in [node for node in model.graph if node.domain == DOMAIN]:
        if node.op_type not in PLUGINS:
            raise ExportError(
                f"node {node.name!r}: expected an op with a TensorRT plugin "
                f"({', '.join(PLUGINS)}), found {DOMAIN}::{node.op_type}. Export the checkpoint "
                "with `--lm-head float32` and an unaltered graph."
            )
        values: dict[str, int | str] = {}
        if node.op_type == "BitLinear":
            gated = node.attributes.get("gated")
            values = {
                "has_norm": int(input_of(node, _NORM) is not None),
                "has_residual": int(input_of(node, RESIDUAL) is not None),
                "gated": 0 if gated is None else gated.as_int(),
            }
            if activation is not None:
                values["activation"] = activation
        values |= {"plugin_namespace": PLUGIN_NAMESPACE, "plugin_version": PLUGIN_VERSION}
        for attribute in ir.convenience.convert_attributes(values):
            node.attributes[attribute.name] = attribute
        needed = PLUGINS[node.op_type].attribute_names()
        missing = [name for name in needed if name not in node.attributes]
        if missing:
            raise ExportError(
                f"node {node.name!r}: expected the attributes of the plugin {node.op_type}, "
                f"{', '.join(missing)} missing. Pack the weights and fuse the projections first."
            )
        _close_up(node)
        done.matched.append(str(node.name))
    return done


def _close_up(node: ir.Node) -> None:
    """Remove empty inputs."""
    present = [value for value in node.inputs if value is not None]
    for index, value in enumerate(present):
        node.replace_input_with(index, value)
    node.resize_inputs(len(present))
