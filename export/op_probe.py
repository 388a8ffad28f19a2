"""Look inside one BitLinear of an exported model: its quantised activations and exact sums."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from tinylm.errors import ExportError
from tinylm.norm import rms_norm
from tinylm.packing import unpack
from tinylm.quantization import accumulate, quantize_activation
from tinylm_export.bit_linear_model import BitLinearWeights
from tinylm_export.function_bodies import function_bodies
from tinylm_export.ops import BIT_LINEAR, IR_VERSION, OPSET
from tinylm_export.ort_session import make_inference_session
from tinylm_export.parity_report import BitLinearAgreement

MAX_EXAMPLES = 3
# The norm in front of each BitLinear, relative to the decoder layer.
NORM_OF = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.kv_a_proj": "input_layernorm",
    "self_attn.kv_b_proj": "self_attn.kv_a_layernorm",
    "self_attn.o_proj": "self_attn.attn_sub_norm",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
    "mlp.down_proj": "mlp.ffn_sub_norm",
}


def norm_path(bit_linear: str) -> str:
    """Return the module path of the norm in front of a BitLinear's module path."""
    prefix, index, rest = bit_linear.split(".", 2)
    return f"{prefix}.{index}.{NORM_OF[rest]}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probed:
    """What a runtime's layer computed.

    Attributes:
        q: Quantised activations [M, K].
        values: What shows its sums [M, N]: the sums themselves, or the output.
        expected: Turns exact sums, float32 [M, N], into the ``values`` that follow from them.
    """

    q: Tensor
    values: Tensor
    expected: Callable[[Tensor], Tensor]


class Probe(Protocol):
    """One BitLinear of a runtime."""

    weights: BitLinearWeights

    def run(self, x: Tensor, s: Tensor) -> Probed:
        """Run on x, float32 [M, K], whose multiplier in PyTorch is s, float32 [M, 1]."""


def read_weights(model: ir.Model, name: str, activation: str, eps: float) -> BitLinearWeights:
    """Read a BitLinear's weights from an exported graph.

    Args:
        model: The exported model.
        name: Module path, such as ``"layers.0.self_attn.kv_b_proj"``.
        activation: Number format of this layer.
        eps: Of the norm before it.

    Raises:
        ExportError: The graph has no such weight.
    """

    def array(key: str) -> np.ndarray:
        value = model.graph.initializers.get(key)
        if value is None or value.const_value is None:
            raise ExportError(f"the graph has no initializer {key!r}. Export the checkpoint again.")
        return value.const_value.numpy()

    return BitLinearWeights(
        weight=array(f"{name}.weight"),
        weight_scale=array(f"{name}.weight_scale"),
        norm_weight=array(f"{norm_path(name)}.weight"),
        activation=activation,
        eps=eps,
    )


class BitLinearProbe:
    """ONNX Runtime over the function body of one BitLinear, with its inner values as outputs.

    Args:
        weights: The layer's weights, constants of the model as they are in the exported one.
    """

    def __init__(self, weights: BitLinearWeights) -> None:
        self.weights = weights
        # One thread: there are many probes, and the idle threads of each would wait busily.
        self._session = make_inference_session(
            _probe_model(weights).SerializeToString(), num_threads=1, native=False
        )

    def run(self, x: Tensor, s: Tensor) -> Probed:
        """Run on x, float32 [M, K]; the sums are inner values of the body."""
        q, total = self._session.run(None, {"x": x.numpy()})
        return Probed(
            q=torch.from_numpy(q),
            values=torch.from_numpy(total).float(),
            expected=lambda exact: exact,
        )


def _probe_model(weights: BitLinearWeights) -> onnx.ModelProto:
    body = next(f for f in function_bodies(weights.activation) if f.name == BIT_LINEAR.name)
    values = {"activation": weights.activation, "eps": weights.eps}
    nodes = []
    for node in body.node:
        node = onnx.NodeProto.FromString(node.SerializeToString())
        for i, attribute in enumerate(node.attribute):
            if attribute.ref_attr_name:
                made = onnx.helper.make_attribute(attribute.name, values[attribute.ref_attr_name])
                node.attribute[i].CopyFrom(made)
        nodes.append(node)
    real = onnx.TensorProto.FLOAT
    x = onnx.helper.make_tensor_value_info("x", real, ["tokens", weights.num_inputs])
    integer = weights.activation == "int8"
    outputs = ["quantized", "accumulator" if integer else "accumulator_float"]
    graph = onnx.helper.make_graph(
        nodes,
        "probe",
        [x],
        [onnx.helper.make_empty_tensor_value_info(name) for name in outputs],
        initializer=[
            onnx.numpy_helper.from_array(weights.weight, "weight"),
            onnx.numpy_helper.from_array(weights.weight_scale, "weight_scale"),
            onnx.numpy_helper.from_array(weights.norm_weight, "norm_weight"),
        ],
    )
    opset = onnx.helper.make_opsetid("", OPSET)
    return onnx.helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)


def compare_bit_linear(
    name: str,
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    codes: Tensor,
    probe: Probe,
) -> BitLinearAgreement:
    """Compare one BitLinear with PyTorch's on the same input.

    Args:
        name: Module path.
        x: float32 [M, K], the input of the norm before PyTorch's layer.
        norm_weight: That norm's weight [K].
        eps: That norm's eps.
        codes: PyTorch's ternary codes, float32 [N, K].
        probe: The runtime's layer.
    """
    activation = probe.weights.activation
    q_ref, s_ref = quantize_activation(rms_norm(x, norm_weight, eps), activation)
    total_ref = accumulate(q_ref, codes, activation)
    found = probe.run(x, s_ref)
    q = found.q.float()
    different = q != q_ref
    steps = (_step_index(q, activation) - _step_index(q_ref, activation)).abs()
    packed = torch.from_numpy(probe.weights.weight.copy())  # the mapped file is read-only
    own_codes = unpack(packed, torch.float32)
    own_total = accumulate(q, own_codes, activation)
    same_row = ~different.any(dim=1, keepdim=True)
    wrong = found.values != found.expected(own_total)
    wrong |= same_row & (found.values != found.expected(total_ref))
    examples = [
        f"token {token}, channel {channel}: PyTorch {q_ref[token, channel]:g}, "
        f"runtime {q[token, channel]:g}"
        for token, channel in different.nonzero()[:MAX_EXAMPLES].tolist()
    ]
    return BitLinearAgreement(
        name=name,
        num_activations=q.numel(),
        flips=int(different.sum()),
        max_steps=int(steps.max()),
        num_accumulators=found.values.numel(),
        mismatches=int(wrong.sum()),
        examples=examples,
    )


def _step_index(q: Tensor, activation: str) -> Tensor:
    """Number the values of a format in ascending order, so that neighbours differ by 1."""
    if activation == "int8":
        return q.int()
    bits = q.to(torch.float8_e4m3fn).view(torch.uint8).int()  # sign and magnitude
    magnitude = bits & 0x7F
    return torch.where(bits > 0x7F, -magnitude, magnitude)


def merge(parts: list[BitLinearAgreement]) -> BitLinearAgreement:
    """Add up what several batches gave for one layer."""
    return BitLinearAgreement(
        name=parts[0].name,
        num_activations=sum(p.num_activations for p in parts),
        flips=sum(p.flips for p in parts),
        max_steps=max(p.max_steps for p in parts),
        num_accumulators=sum(p.num_accumulators for p in parts),
        mismatches=sum(p.mismatches for p in parts),
        examples=[e for p in parts for e in p.examples][:MAX_EXAMPLES],
    )
