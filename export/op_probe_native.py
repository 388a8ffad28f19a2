"""Look inside one BitLinear of the native kernels, which give away nothing but their output.

A second layer with the same norm, an identity matrix for weights and scales of 1 returns the
quantised activations over their multiplier, ``q / s``. PyTorch's ``s``, or one of its float32
neighbours if the norm was rounded the other way, turns them back into exactly the values of the
number format, because those lie far further apart than a float32 rounding. From these, from the
layer's own codes and scales and from ``s`` follows what the layer must return, bit for bit.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from tinylm.packing import pack
from tinylm.quantization import FP8_MAX, dequantize
from tinylm_export.bit_linear_model import BitLinearWeights, bit_linear_model
from tinylm_export.op_probe import Probed
from tinylm_export.ort_session import make_inference_session

_NEIGHBOURS = 2  # float32 steps to either side of PyTorch's s


class NativeBitLinearProbe:
    """The native kernels of one BitLinear.

    Args:
        weights: The layer's weights, constants of the model as they are in the exported one.

    Raises:
        NativeError: The native library is not built, or can't be used.
    """

    def __init__(self, weights: BitLinearWeights) -> None:
        self.weights = weights
        num_inputs = weights.num_inputs
        identity = dataclasses.replace(
            weights,
            weight=pack(torch.eye(num_inputs, dtype=torch.int8)).numpy(),
            weight_scale=np.ones(num_inputs, np.float32),
        )
        self._layer, self._identity = (
            make_inference_session(
                bit_linear_model(w).SerializeToString(), num_threads=1, native=True
            )
            for w in (weights, identity)
        )

    def run(self, x: Tensor, s: Tensor) -> Probed:
        """Run on x, float32 [M, K], whose multiplier in PyTorch is s, float32 [M, 1]."""
        steps = torch.from_numpy(self._identity.run(["y"], {"x": x.numpy()})[0])  # q / s
        q = self._to_format(steps.double() * s.double())
        own_s = _explain(steps, q, s)
        scale = torch.from_numpy(self.weights.weight_scale.copy())  # the mapped file is read-only
        return Probed(
            q=q,
            values=torch.from_numpy(self._layer.run(["y"], {"x": x.numpy()})[0]),
            expected=lambda total: dequantize(total, scale, own_s),
        )

    def _to_format(self, steps: Tensor) -> Tensor:
        """Round to the nearest value of the number format, as float32."""
        if self.weights.activation == "int8":
            return steps.round().float()
        # Not clamped to less: a value out of range must not pass for the largest one.
        nearest = steps.float().to(torch.float8_e4m3fn).float()
        return torch.where(steps.abs() < FP8_MAX * 1.01, nearest, steps.float())


def _explain(steps: Tensor, q: Tensor, s: Tensor) -> Tensor:
    """Choose each row's multiplier [M, 1]: the float32 next to s for which ``q / s`` is exact.

    Where none is, the row keeps s, and its outputs will differ from what is expected.
    """
    one = torch.ones(())
    candidates = [s]
    for direction in (torch.inf, -torch.inf):
        near = s
        for _ in range(_NEIGHBOURS):
            near = torch.nextafter(near, torch.full_like(near, direction))
            candidates.append(near)
    chosen, found = s, torch.zeros_like(s, dtype=torch.bool)
    for candidate in candidates:
        exact = (dequantize(q, one, candidate) == steps).all(dim=1, keepdim=True)
        chosen = torch.where(exact & ~found, candidate, chosen)
        found |= exact
    return chosen
