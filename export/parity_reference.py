"""PyTorch's side of parity: logits, inner values by node name, inputs of every BitLinear."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tinylm.model import TinyLM
from tinylm_export.op_probe import norm_path


@dataclasses.dataclass(frozen=True)
class Reference:
    """One batch through PyTorch, padding left out.

    Attributes:
        logits: float32 [B, S, V].
        values: By node name in execution order, float32 [M, width]: M valid tokens.
        norm_inputs: By module path of the norm, its input [M, K].
    """

    logits: Tensor
    values: dict[str, Tensor]
    norm_inputs: dict[str, Tensor]


@torch.no_grad()
def run_reference(model: TinyLM, input_ids: Tensor, seq_lens: Tensor) -> Reference:
    """Run a right-padded batch [B, S] and keep what each node of the exported graph computes.

    The model may be on any device and of any type; what is kept is float32 on the CPU.
    """
    device = model.embed_tokens.weight.device
    mask = torch.arange(input_ids.shape[1]) < seq_lens[:, None]
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind not in _HOOKED:
            continue

        def keep(_module: object, args: tuple[Tensor, ...], out: Tensor, name: str = name) -> None:
            inputs[name], outputs[name] = (t.detach().float().cpu() for t in (args[0], out))

        handles.append(module.register_forward_hook(keep))
    try:
        logits = model(input_ids.to(device), mask.to(device)).float().cpu()
    finally:
        for handle in handles:
            handle.remove()
    values = {node: value[mask] for node, value in _by_node(model, inputs, outputs).items()}
    norms = {norm_path(name) for name in bit_linear_names(model)}
    return Reference(logits, values, {n: inputs[n][mask] for n in norms})


def bit_linear_names(model: TinyLM) -> list[str]:
    """Return the module paths of every BitLinear, float or packed, in forward order."""
    return [n for n, m in model.named_modules() if type(m).__name__ in _BIT_LINEARS]


_BIT_LINEARS = ("BitLinear", "PackedBitLinear")
_HOOKED = (*_BIT_LINEARS, "RMSNorm", "Embedding", "DecoderLayer", "Int8Linear")


def _by_node(
    model: TinyLM, inputs: dict[str, Tensor], outputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Give module inputs and outputs the names of the graph's nodes, in execution order."""
    values = {"embed_tokens": outputs["embed_tokens"]}
    for i in range(model.config.num_layers):
        layer, attn, mlp = f"layers.{i}", f"layers.{i}.self_attn", f"layers.{i}.mlp"
        values[f"{attn}.q_proj"] = outputs[f"{attn}.q_proj"]
        values[f"{attn}.kv_a_proj"] = outputs[f"{attn}.kv_a_proj"]
        values[attn] = inputs[f"{attn}.attn_sub_norm"]
        values[f"{attn}.o_proj"] = outputs[f"{attn}.o_proj"]
        values[f"{attn}.residual"] = inputs[f"{layer}.post_attention_layernorm"]
        values[f"{mlp}.gate_proj"] = outputs[f"{mlp}.gate_proj"]
        values[f"{mlp}.up_proj"] = outputs[f"{mlp}.up_proj"]
        values[f"{mlp}.swiglu"] = inputs[f"{mlp}.ffn_sub_norm"]
        values[f"{mlp}.down_proj"] = outputs[f"{mlp}.down_proj"]
        values[f"{mlp}.residual"] = outputs[layer]
    last = "lm_head" if "lm_head" in outputs else "norm"  # an int8 head has the norm in it
    values[last] = outputs[last]
    return values
