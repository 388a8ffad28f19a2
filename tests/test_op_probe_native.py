"""The parity probe of the native kernels: it must see what it is there to see."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest
import torch
from export_helpers import make_export
from native_helpers import LIBRARY, needs_library
from tolerances import assert_equal

from tinylm.config import float32
from tinylm.errors import NativeError
from tinylm.norm import rms_norm
from tinylm.packing import pack, unpack
from tinylm.quantization import dequantize, quantize_activation
from tinylm_export.bit_linear_model import BitLinearWeights
from tinylm_export.kernel_meter import KernelMeter, MeteredSession
from tinylm_export.native import describe
from tinylm_export.op_probe import compare_bit_linear
from tinylm_export.op_probe_native import NativeBitLinearProbe, _explain
from tinylm_export.ort_session import OrtSession

pytestmark = needs_library
FORMATS = pytest.mark.parametrize("activation", ["int8", "fp8_e4m3"])


def layer(activation: str, num_inputs: int = 192) -> tuple[torch.Tensor, BitLinearWeights]:
    g = torch.Generator().manual_seed(7)
    x = torch.randn(40, num_inputs, generator=g) * torch.logspace(-6, 4, 40)[:, None]
    x[0] = 0.0
    return x, BitLinearWeights(
        weight=pack(torch.randint(-1, 2, (72, num_inputs), generator=g)).numpy(),
        weight_scale=(torch.rand(72, generator=g) + 0.1).numpy(),
        norm_weight=(torch.rand(num_inputs, generator=g) + 0.5).numpy(),
        activation=activation,
        eps=float32(1e-5),
    )


def compare(probe: NativeBitLinearProbe, x: torch.Tensor) -> Any:
    weights = probe.weights
    norm, codes = torch.from_numpy(weights.norm_weight), torch.from_numpy(weights.weight)
    return compare_bit_linear("layer", x, norm, weights.eps, unpack(codes, torch.float32), probe)


@FORMATS
def test_quantised_activations_are_recovered_exactly(activation: str) -> None:
    x, weights = layer(activation)
    normed = rms_norm(x, torch.from_numpy(weights.norm_weight), weights.eps)
    q, s = quantize_activation(normed, activation)
    assert_equal(NativeBitLinearProbe(weights).run(x, s).q, q)
    agreement = compare(NativeBitLinearProbe(weights), x)
    assert agreement.passed and agreement.flips == agreement.mismatches == 0
    assert agreement.num_activations == x.numel()
    assert agreement.num_accumulators == 40 * 72


class Altered:
    """A session whose output is changed at one place."""

    def __init__(self, session: Any, change: Any) -> None:
        self.session, self.change = session, change

    def run(self, names: list[str], feeds: dict[str, Any]) -> list[Any]:
        (y,) = self.session.run(names, feeds)
        y[3, 5] = self.change(torch.tensor(y[3, 5]))
        return [y]


@FORMATS
def test_one_float32_step_in_one_output_is_an_unequal_sum(activation: str) -> None:
    x, weights = layer(activation)
    probe = NativeBitLinearProbe(weights)
    probe._layer = Altered(probe._layer, lambda y: torch.nextafter(y, torch.tensor(torch.inf)))
    agreement = compare(probe, x)
    assert (agreement.flips, agreement.mismatches) == (0, 1)
    assert not agreement.passed


@FORMATS
def test_one_activation_that_rounds_the_other_way_is_a_flip(activation: str) -> None:
    x, weights = layer(activation)
    probe = NativeBitLinearProbe(weights)
    normed = rms_norm(x, torch.from_numpy(weights.norm_weight), weights.eps)
    q, s = quantize_activation(normed, activation)
    own = int(q[3, 5]) if activation == "int8" else float(q[3, 5])
    other = own + 1 if activation == "int8" else own * 2
    probe._identity = Altered(probe._identity, lambda _: torch.tensor(float(other)) / s[3, 0])
    agreement = compare(probe, x)
    assert agreement.flips == 1
    assert "token 3, channel 5" in agreement.examples[0]
    # The layer itself did not see the flip, so its sums don't follow from it.
    assert agreement.mismatches > 0


def test_a_multiplier_one_step_off_is_understood() -> None:
    g = torch.Generator().manual_seed(0)
    q = torch.randint(-127, 128, (30, 64), generator=g).float()
    s = torch.rand(30, 1, generator=g) * 90 + 1
    near = torch.nextafter(s, torch.full_like(s, torch.inf))
    one = torch.ones(())
    assert_equal(_explain(dequantize(q, one, s), q, s), s)
    assert_equal(_explain(dequantize(q, one, near), q, s), near)
    far = s * 1.001
    assert_equal(_explain(dequantize(q, one, far), q, s), s)


def test_kernels_that_were_not_called_are_found_out(tmp_path: Any) -> None:
    _, directory = make_export(tmp_path)
    meter = KernelMeter(describe(LIBRARY), ir.load(directory / "model.onnx"))
    ids, lens = torch.ones(1, 3, dtype=torch.int64), torch.tensor([3])
    session = MeteredSession(OrtSession(directory, num_threads=1, native=True), meter)
    session.start(1, 4)
    session.step(ids, lens)
    assert meter.describe().endswith(
        "12 BitLinear, 2 FlashMLA, 2 SwiGLU calls counted by the library"
    )
    bodies = MeteredSession(OrtSession(directory, num_threads=1, native=False), meter)
    bodies.start(1, 4)
    with pytest.raises(NativeError, match=r"ONNX Runtime did not use it for every op: .*--no-nat"):
        bodies.step(ids, lens)
