"""Which nodes of the exported graph a node of an engine's graph stands for."""

from __future__ import annotations

import torch
from torch import Tensor

# By an engine's node, relative to the decoder layer: nodes are fused, and residuals added in them.
_FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.kv_a_proj"),
    "self_attn": ("self_attn",),
    "self_attn.o_proj": ("self_attn.residual",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.residual",),
}


def engine_nodes(num_layers: int) -> dict[str, tuple[str, ...]]:
    """Return the exported graph's nodes by an engine's node, in execution order.

    Their values, joined along the last dimension, are the engine's node's value.
    """
    return {
        f"layers.{layer}.{node}": tuple(f"layers.{layer}.{part}" for part in parts)
        for layer in range(num_layers)
        for node, parts in _FUSED.items()
    }


def engine_values(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join PyTorch's values [M, width] by node into those of an engine's nodes."""
    num_layers = 1 + max(int(node.split(".")[1]) for node in values if node.startswith("layers."))
    return {
        node: torch.cat([values[part] for part in parts], dim=-1)
        for node, parts in engine_nodes(num_layers).items()
    }
