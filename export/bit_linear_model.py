"""Models of a single BitLinear, to run a layer by itself."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx

from tinylm_export.function_bodies import function_bodies
from tinylm_export.ops import BIT_LINEAR, DOMAIN, IR_VERSION, OPSET, VERSION


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitLinearWeights:
    """What the graph holds for one BitLinear.

    Attributes:
        weight: uint8 [N, K / 4].
        weight_scale: float32 [N].
        norm_weight: float32 [K].
        activation: Number format.
        eps: Of the norm.
    """

    weight: np.ndarray
    weight_scale: np.ndarray
    norm_weight: np.ndarray
    activation: str
    eps: float

    @property
    def num_inputs(self) -> int:
        """K."""
        return 4 * int(self.weight.shape[1])


def bit_linear_model(weights: BitLinearWeights) -> onnx.ModelProto:
    """Make a model of one BitLinear with its function body: ``x`` [tokens, K] to ``y``.

    The weights are constants, as they are in an exported model and as the native kernels need.
    """
    constants = {
        "weight": weights.weight,
        "weight_scale": weights.weight_scale,
        "norm_weight": weights.norm_weight,
    }
    node = onnx.helper.make_node(
        BIT_LINEAR.name,
        ["x", *constants],
        ["y"],
        name="bit_linear",
        domain=DOMAIN,
        activation=weights.activation,
        eps=weights.eps,
    )
    real = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [node],
        "bit_linear",
        [onnx.helper.make_tensor_value_info("x", real, ["tokens", weights.num_inputs])],
        [onnx.helper.make_tensor_value_info("y", real, ["tokens", len(weights.weight)])],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    bodies = function_bodies(weights.activation)
    return onnx.helper.make_model(
        graph,
        functions=[body for body in bodies if body.name == BIT_LINEAR.name],
        opset_imports=[
            onnx.helper.make_opsetid("", OPSET),
            onnx.helper.make_opsetid(DOMAIN, VERSION),
        ],
        ir_version=IR_VERSION,
    )
