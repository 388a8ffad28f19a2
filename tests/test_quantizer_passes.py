"""The passes around BitLinear's products: Triton's equal PyTorch's, and who is chosen."""

from __future__ import annotations

import os

import pytest
import torch
from tolerances import TRITON_INTERPRETER_BFLOAT16, TRITON_INTERPRETER_LAYER
from torch import Tensor
from triton_helpers import run_interpreted

from tinylm import BitLinear
from tinylm.errors import ConfigError
from tinylm.quantizer_passes import TORCH_PASSES, choose_quantizers, passes

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytest.importorskip("triton", reason="NOT TESTED: triton is not installed")


def weights(device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 4), (24, 96), (288, 1024), (96, 176)]
    found = [torch.randn(shape, generator=generator) for shape in shapes]
    found.append(torch.zeros(8, 16))
    found.append(torch.tensor([[0.5, 1.5, -0.5, -1.5]]))  # halves after division by the mean 1
    found.append(torch.randn(16, 64, generator=generator) * 1e-7)
    return [weight.to(device) for weight in found]


def activations(device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, 4), (5, 96), (2, 3, 176), (7, 1000)]
    found = [torch.randn(shape, generator=generator) for shape in shapes]
    found += [x.bfloat16() for x in found]
    found.append(torch.zeros(3, 64))
    # Products that lie on a half, where half to even decides.
    halves = torch.arange(-63, 64, dtype=torch.float32).add(0.5).clamp(-127, 127)
    found.append(torch.cat((halves, torch.tensor([127.0])))[None])
    return [x.to(device) for x in found]


def check_rounded(found: Tensor, expected: Tensor) -> None:
    """Compare bit for bit, but for the interpreter's way of rounding to bfloat16."""
    assert found.dtype == expected.dtype
    if INTERPRETED and found.dtype == torch.bfloat16:
        TRITON_INTERPRETER_BFLOAT16.assert_close(found, expected)
    else:
        assert torch.equal(found, expected)


def check_passes(device: str) -> None:
    """Compare every pass bit for bit."""
    from tinylm.triton_quantizers import TRITON_PASSES

    for dtype in (torch.bfloat16, torch.float32):
        for weight in weights(device):
            codes, scale = TRITON_PASSES.ternarize(weight, dtype)
            expected, expected_scale = TORCH_PASSES.ternarize(weight, dtype)
            assert torch.equal(codes, expected) and codes.dtype == dtype
            assert torch.equal(scale, expected_scale) and scale.dtype == torch.float32
        for x in activations(device):
            q, stored, s = TRITON_PASSES.quantize(x, "int8", dtype, keep=True)
            expected_q, expected_stored, expected_s = TORCH_PASSES.quantize(
                x, "int8", dtype, keep=True
            )
            assert torch.equal(q, expected_q) and q.dtype == dtype
            assert torch.equal(stored, expected_stored) and stored.dtype == torch.int8
            assert torch.equal(s, expected_s) and s.shape == (*x.shape[:-1], 1)
            for work in (TORCH_PASSES, TRITON_PASSES):
                q, nothing, s = work.quantize(x, "int8", dtype, keep=False)
                assert torch.equal(q, expected_q) and torch.equal(s, expected_s) and nothing is None
            x_hat = TRITON_PASSES.dequantize(stored, s, dtype)
            check_rounded(x_hat, TORCH_PASSES.dequantize(stored, s, dtype))
            scale = torch.tensor(0.0317, device=device)
            for out_dtype in (torch.bfloat16, torch.float32):
                for divisor in (s, None):
                    found = TRITON_PASSES.rescale(q.clone(), scale, divisor, out_dtype)
                    wanted = TORCH_PASSES.rescale(q.clone(), scale, divisor, out_dtype)
                    check_rounded(found, wanted)
    for bad in (float("nan"), float("inf")):
        x = torch.ones(2, 8, device=device)
        x[1, 3] = bad
        q, stored, s = TRITON_PASSES.quantize(x, "int8", torch.bfloat16, keep=False)
        assert stored is None
        assert torch.isfinite(q[0]).all() and not torch.isfinite(q[1].float() / s[1]).all()
        codes, _ = TRITON_PASSES.ternarize(x, torch.bfloat16)
        assert not torch.isfinite(codes).all()


def check_layer(device: str) -> None:
    """Compare output and gradients of the layer under bf16 autocast."""
    results = []
    for quantizers in ("torch", "triton"):
        torch.manual_seed(0)
        layer = BitLinear(96, 24).to(device)
        layer.quantizers = quantizers
        x = torch.randn(5, 7, 96, device=device, requires_grad=True)
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            y = layer(x)
            with torch.no_grad():
                layer.eval()
                inferred = layer(x)
        y.backward(torch.randn(5, 7, 24, device=device).to(y.dtype))
        results.append([y.detach(), x.grad, layer.weight.grad, inferred])
    for found, expected in zip(*results, strict=True):
        if INTERPRETED:
            TRITON_INTERPRETER_LAYER.assert_close(found, expected)
        else:
            assert torch.equal(found, expected)


def test_triton_passes_equal_the_reference_in_the_interpreter() -> None:
    run_interpreted("-c", "import test_quantizer_passes as t; t.check_passes('cpu')")


def test_triton_layer_equals_the_reference_in_the_interpreter() -> None:
    run_interpreted("-c", "import test_quantizer_passes as t; t.check_layer('cpu')")


@pytest.mark.gpu
def test_triton_passes_equal_the_reference_on_the_gpu() -> None:
    check_passes("cuda")


@pytest.mark.gpu
def test_triton_layer_equals_the_reference_on_the_gpu() -> None:
    check_layer("cuda")


def test_who_does_the_passes() -> None:
    cpu = torch.device("cpu")
    assert choose_quantizers("auto", cpu) == "torch"
    assert choose_quantizers("auto", torch.device("cuda")) == "triton"
    with pytest.raises(ConfigError, match="expected a CUDA device, found cpu"):
        choose_quantizers("triton", cpu)
    x = torch.zeros(1, 4)
    assert passes("torch", x, "int8") is TORCH_PASSES
    assert passes("triton", x, "int8") is TORCH_PASSES  # float32 stays exact
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert passes("triton", x, "int8") is not TORCH_PASSES
        assert passes("triton", x, "fp8_e4m3") is TORCH_PASSES
