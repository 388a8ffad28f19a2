"""The ops of the contract as PyTorch custom ops, and their way into a traced ONNX export.

``torch.ops.tinylm.bit_linear``, ``flash_mla``, ``swiglu`` and ``int8_linear`` compute what the
ONNX function bodies and the native kernels compute, from the same packed weights: results of an
exported graph can be asked of PyTorch. A module of your own that calls them is exported so::

    program = torch.onnx.export(
        module, args, dynamo=True, opset_version=OPSET,
        custom_translation_table=onnx_translation_table(),
    )
    model = add_function_bodies(program.model)

They are for inference and define no gradients; :class:`tinylm.bitlinear.BitLinear` trains.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from tinylm.config import PACK_LANES, Activation, AttentionShape, float32
from tinylm.errors import ExportError
from tinylm.latent_attention import (
    attend_absorbed,
    attend_expanded,
    rotary_angles,
    rotate,
    split_query,
)
from tinylm.latent_cache import LatentCache
from tinylm.norm import rms_norm
from tinylm.packing import unpack
from tinylm.quantization import accumulate, accumulate_int8, dequantize, quantize_activation
from tinylm_export.function_bodies import function_body
from tinylm_export.ops import DOMAIN, OPS, OPSET, VERSION, OpSpec, register_onnx_schemas

TORCH_NAMES = {
    "BitLinear": "bit_linear",
    "FlashMLA": "flash_mla",
    "SwiGLU": "swiglu",
    "Int8Linear": "int8_linear",
}
_TORCH_TYPES = {"int": "int", "float": "float", "string": "str"}


def torch_schema(spec: OpSpec) -> str:
    """Return the PyTorch schema of an op: its inputs by position, its attributes by keyword."""
    inputs = [
        f"Tensor? {item.name}=None" if item.optional else f"Tensor {item.name}"
        for item in spec.inputs
    ]
    attributes = []
    for attribute in spec.attributes:
        default = attribute.default
        value = f'"{default}"' if isinstance(default, str) else repr(default)
        end = "" if default is None else f"={value}"
        attributes.append(f"{_TORCH_TYPES[attribute.type]} {attribute.name}{end}")
    arguments = inputs + (["*", *attributes] if attributes else [])
    results = ", ".join(f"Tensor {item.name}" for item in spec.outputs)
    return f"({', '.join(arguments)}) -> ({results})"


def _bit_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    norm_weight: Tensor | None = None,
    *,
    activation: Activation = "int8",
    eps: float = 1e-5,
) -> Tensor:
    """Norm if asked for, quantise per token, multiply by ternary codes, scale.

    Args:
        x: Floating point [..., K].
        weight: uint8 [N, K / 4], see :mod:`tinylm.packing`.
        weight_scale: float32 [N].
        norm_weight: float32 [K], or None for an input that is normed already.
        activation: Number format of the activations.
        eps: Added to the mean square.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: The shapes don't fit each other.
    """
    inputs, outputs = x.shape[-1], weight_scale.shape[0]
    _require("weight", weight, [outputs, inputs // PACK_LANES], torch.uint8)
    normed = x.float()
    if norm_weight is not None:
        _require("norm_weight", norm_weight, [inputs])
        normed = rms_norm(x, norm_weight, float32(eps))
    q, s = quantize_activation(normed, activation)
    accumulator = accumulate(q, unpack(weight, torch.float32), activation)
    return dequantize(accumulator, weight_scale, s).to(x.dtype)


def _flash_mla(
    q: Tensor,
    kv: Tensor,
    kv_norm_weight: Tensor,
    kv_b: Tensor,
    kv_b_scale: Tensor,
    past_lens: Tensor,
    seq_lens: Tensor,
    past_latent: Tensor,
    past_scale: Tensor,
    past_rope: Tensor,
    *,
    num_heads: int,
    nope_dim: int,
    rope_dim: int,
    value_dim: int,
    theta: float = 10000.0,
    eps: float = 1e-5,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Append to the latent cache and attend over it; see ``FLASH_MLA`` for the shapes.

    The past tensors are left as they are. What they hold past ``past_lens`` never matters.

    Returns:
        y [B, S, H * Dv] in q's dtype, and the present latent, scale and rope key.

    Raises:
        ValueError: The shapes don't fit each other, or the cache can't take the new tokens.
    """
    shape = AttentionShape(
        num_heads=num_heads,
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        value_dim=value_dim,
        theta=float32(theta),
        eps=float32(eps),
        softmax_scale=float32(softmax_scale),
    )
    batch, length = q.shape[:2]
    rank, capacity = kv_norm_weight.shape[0], past_scale.shape[1]
    rows = num_heads * (nope_dim + value_dim)
    _require("q", q, [batch, length, num_heads * shape.qk_dim])
    _require("kv", kv, [batch, length, rank + rope_dim])
    _require("kv_b", kv_b, [rows, rank // PACK_LANES], torch.uint8)
    _require("past_latent", past_latent, [batch, capacity, rank], torch.int8)
    _require("past_rope", past_rope, [batch, capacity, rope_dim])
    past, new = past_lens.long(), seq_lens.long()
    filled = past + new  # [B]
    longest = int(filled.max())
    if longest > capacity:
        raise ValueError(
            f"the cache holds {capacity} tokens a row, and row {int(filled.argmax())} needs "
            f"{longest}. Give a larger cache or fewer tokens."
        )
    positions = past[:, None] + torch.arange(length, device=q.device)  # [B, S]
    cos, sin = (angle.double() for angle in rotary_angles(positions, rope_dim, shape.theta))
    q_nope, q_rope = split_query(q, (cos, sin), shape)  # [B, S, H, nope], [B, S, H, P]
    new_latent, new_rope = kv.split([rank, rope_dim], dim=-1)
    codes, s = quantize_activation(rms_norm(new_latent, kv_norm_weight, shape.eps), "int8")
    cache = LatentCache.from_tensors(
        past_latent.clone(), past_scale.clone(), past_rope.clone(), past
    )
    cache.append(0, codes, s.squeeze(-1), rotate(new_rope, cos, sin), new)
    latent, scale, rope = cache.latent[0], cache.scale[0], cache.rope[0]

    # Slots that hold no token may hold anything, and NaN times a weight of 0 is NaN.
    held = torch.arange(longest, device=q.device) < filled[:, None]  # [B, T]
    keys = rope[:, :longest].double().masked_fill(~held[..., None], 0.0)
    steps = scale[:, :longest].masked_fill(~held, 1.0)
    attend = attend_absorbed if length == 1 else attend_expanded
    y = attend(
        q_nope.double(),
        q_rope.double(),
        latent[:, :longest].double(),
        steps,
        keys,
        unpack(kv_b, torch.float64),
        kv_b_scale,
        past,
        shape,
    )  # [B, S, H, Dv]
    valid = torch.arange(length, device=q.device) < new[:, None]  # [B, S]
    y = y.masked_fill(~valid[..., None, None], 0.0).flatten(2).to(q.dtype)
    return y, latent, scale, rope


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return ``silu(gate) * up``: two tensors [..., K] -> [..., K]."""
    return F.silu(gate.double()).to(gate.dtype) * up


def _int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    norm_weight: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """Norm if asked for, quantise per token, multiply by int8 codes, scale.

    Args:
        x: Floating point [..., K].
        weight: int8 [N, K].
        weight_scale: float32 [N].
        norm_weight: float32 [K], or None for an input that is normed already.
        eps: Added to the mean square.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: The shapes don't fit each other.
    """
    inputs, outputs = x.shape[-1], weight_scale.shape[0]
    _require("weight", weight, [outputs, inputs], torch.int8)
    normed = x.float()
    if norm_weight is not None:
        _require("norm_weight", norm_weight, [inputs])
        normed = rms_norm(x, norm_weight, float32(eps))
    q, s = quantize_activation(normed, "int8")
    return dequantize(accumulate_int8(q, weight).float(), weight_scale, s).to(x.dtype)


def _require(name: str, tensor: Tensor, shape: list[int], dtype: torch.dtype | None = None) -> None:
    if list(tensor.shape) != shape or dtype not in (None, tensor.dtype):
        expected = f"{dtype} {shape}" if dtype else f"{shape}"
        raise ValueError(
            f"{name}: expected {expected} to fit the other inputs, "
            f"found {tensor.dtype} {list(tensor.shape)}."
        )


def _fake_linear(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_flash_mla(q: Tensor, *rest: Any, **attributes: Any) -> tuple[Tensor, ...]:
    width = attributes["num_heads"] * attributes["value_dim"]
    y = q.new_empty((*q.shape[:2], width))
    return y, *(torch.empty_like(past) for past in rest[-3:])


def _fake_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)


def _register() -> None:
    implementations: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "BitLinear": (_bit_linear, _fake_linear),
        "FlashMLA": (_flash_mla, _fake_flash_mla),
        "SwiGLU": (_swiglu, _fake_swiglu),
        "Int8Linear": (_int8_linear, _fake_linear),
    }
    for name, (real, fake) in implementations.items():
        op = torch.library.custom_op(
            f"{DOMAIN}::{TORCH_NAMES[name]}", real, mutates_args=(), schema=torch_schema(OPS[name])
        )
        op.register_fake(fake)


_register()


def torch_op(name: str) -> Any:
    """Return the PyTorch op for a name of the contract, such as ``"BitLinear"``."""
    return getattr(torch.ops.tinylm, TORCH_NAMES[name]).default


def onnx_translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return what ``torch.onnx.export(dynamo=True)`` takes as ``custom_translation_table``.

    It turns each PyTorch op into the ONNX op of the same name. Pass ``opset_version=OPSET`` too,
    and finish with :func:`add_function_bodies`.
    """
    import onnxscript  # slow, and only traced exports need it

    register_onnx_schemas()
    opset = onnxscript.values.Opset(DOMAIN, VERSION)
    return {torch_op(name): _translation(opset, spec) for name, spec in OPS.items()}


def _translation(opset: Any, spec: OpSpec) -> Callable[..., Any]:
    """Make the function that the exporter calls for one op, with the op's own signature."""

    def translate(*inputs: Any, **attributes: Any) -> Any:
        return getattr(opset, spec.name)(*inputs, **attributes)

    kind = inspect.Parameter
    translate.__name__ = TORCH_NAMES[spec.name]
    # The exporter matches a call's arguments to the function's parameters by name.
    translate.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            kind(
                item.name, kind.POSITIONAL_OR_KEYWORD, default=None if item.optional else kind.empty
            )
            for item in spec.inputs
        ]
        + [
            kind(
                item.name,
                kind.KEYWORD_ONLY,
                default=kind.empty if item.default is None else item.default,
            )
            for item in spec.attributes
        ]
    )
    return translate


def add_function_bodies(model: ir.Model) -> ir.Model:
    """Add to a model the function bodies of the custom ops it holds, in place, and return it.

    A stock ONNX Runtime then runs it without any extra library. Bodies of ops that the model does
    not hold are left out.

    Raises:
        ExportError: Another operator set than the bodies are written in, an op that the contract
            does not know, or BitLinear or Int8Linear in two variants, which can't share one body.
    """
    everywhere = ir.traversal.RecursiveGraphIterator(model.graph)  # also inside If and Loop
    nodes = [node for node in everywhere if node.domain == DOMAIN]
    for node in nodes:
        if node.op_type not in OPS:
            raise ExportError(
                f"node {node.name!r}: {DOMAIN}::{node.op_type} is not an op of the contract, "
                f"expected one of {', '.join(OPS)}."
            )
    found = model.opset_imports.get("")
    if nodes and found != OPSET:
        raise ExportError(
            f"the function bodies need ONNX operator set {OPSET}, the model has {found}. "
            f"Export it with opset_version={OPSET}."
        )
    for op in dict.fromkeys(node.op_type for node in nodes):
        activation, norm = _only_variant(op, [node for node in nodes if node.op_type == op])
        function = ir.serde.deserialize_function(function_body(op, activation, norm=norm))
        model.functions[function.identifier()] = function
    return model


def _only_variant(op: str, nodes: list[ir.Node]) -> tuple[str, bool]:
    """Return the activation format of an op's nodes and whether they have a norm_weight."""
    if not any(item.name == "norm_weight" for item in OPS[op].inputs):
        return "int8", True  # the op has one variant
    variants = {_variant(node): node for node in nodes}
    if len(variants) > 1:
        listed = ", ".join(
            f"{node.name!r} {activation} {'with' if norm else 'without'} norm_weight"
            for (activation, norm), node in variants.items()
        )
        raise ExportError(
            f"every {op} of a model must have the same activation format and all or none a "
            f"norm_weight, because they share one function body; found {listed}."
        )
    return next(iter(variants))


def _variant(node: ir.Node) -> tuple[str, bool]:
    attribute = node.attributes.get("activation")
    activation = "int8" if attribute is None else attribute.as_string()
    return activation, len(node.inputs) > 3 and node.inputs[3] is not None
