"""The feed-forward's Triton kernels against PyTorch's operators, by their distance from float32."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tolerances import FUSED_FEED_FORWARD
from torch import Tensor
from triton_helpers import run_interpreted

from tinylm.config import ModelConfig, preset
from tinylm.fused_feed_forward import fused_feed_forward
from tinylm.model import FeedForward

pytest.importorskip("triton", reason="NOT TESTED: triton is not installed")
ROOT = Path(__file__).resolve().parent.parent


def layer_of(config: ModelConfig, device: str) -> FeedForward:
    torch.manual_seed(0)
    layer = FeedForward(config)
    torch.nn.init.normal_(layer.ffn_sub_norm.weight, mean=1.0, std=0.2)
    return layer.to(device).train()


def results(layer: FeedForward, x: Tensor, dy: Tensor, *, autocast: bool) -> dict[str, Tensor]:
    """Return the output and all gradients."""
    layer, x = copy.deepcopy(layer), x.clone().requires_grad_()
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=autocast):
        y = layer(x)
    y.backward(dy.to(y.dtype))
    found = {"y": y.detach(), "dx": x.grad}
    found |= {f"d {name}": p.grad for name, p in layer.named_parameters()}
    return {name: value.float() for name, value in found.items() if value is not None}


def check(device: str) -> None:
    """Compare for ternary and dense layers, and for fewer and more rows than programs."""
    shapes = [(64, 176, (2, 7)), (32, 256, (1, 1)), (128, 96, (3, 5))]
    if device == "cuda":
        shapes.append((1024, 2816, (5, 331)))  # a row has two blocks, a program several rows
    for dense in (False, True):
        for hidden, inner, tokens in shapes:
            config = preset("tinylm-test").replace(
                hidden_size=hidden, intermediate_size=inner, dense=dense
            )
            layer = layer_of(config, device)
            generator = torch.Generator().manual_seed(1)
            x = torch.randn(*tokens, hidden, generator=generator).to(device)
            dy = torch.randn(*tokens, hidden, generator=generator).to(device)
            want = results(layer, x, dy, autocast=False)
            usual = results(layer, x, dy, autocast=True)
            layer.fused = True
            found = results(layer, x, dy, autocast=True)
            assert found.keys() == want.keys() and len(found) == 6
            assert any(not torch.equal(found[name], usual[name]) for name in found)
            for name, value in found.items():
                FUSED_FEED_FORWARD.assert_close(
                    (value - want[name]).norm() / want[name].norm(), torch.zeros((), device=device)
                )
            again = results(layer, x, dy, autocast=True)
            assert all(torch.equal(again[name], found[name]) for name in found)


def test_kernels_agree_with_the_operators_in_the_interpreter() -> None:
    run_interpreted("-c", "import test_fused_feed_forward as t; t.check('cpu')")


@pytest.mark.gpu
def test_kernels_agree_with_the_operators_on_the_gpu() -> None:
    check("cuda")


def test_a_compiled_step_takes_the_kernels() -> None:
    """The benchmark compares the losses of the compiled and the plain path before it times."""
    said = run_interpreted(
        *(str(ROOT / "benchmarks/train_step.py"), "--preset", "tinylm-test"),
        *("--device", "cpu", "--precision", "bf16", "--batch-size", "2", "--seq-len", "16"),
        *("--variant", "compile", "--repeats", "1", "--steps", "1", "--warmup", "1"),
        TORCH_LOGS="graph_breaks",
    )
    assert "Graph break" not in said, said


def test_who_is_served() -> None:
    x = torch.zeros(2, 64)
    config = preset("tinylm-test")
    ternary, dense = FeedForward(config), FeedForward(config.replace(dense=True))
    wide = FeedForward(config.replace(activation="fp8_e4m3"))
    layers = [layer.gate_proj for layer in (ternary, dense, wide)]
    assert [fused_feed_forward(layer, x) for layer in layers] == [None] * 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        served = [fused_feed_forward(layer, x) for layer in layers]
        assert served[0] and served[1] and served[0] is not served[1] and served[2] is None
        with torch.no_grad():
            assert fused_feed_forward(layers[0], x) is None
    with torch.autocast("cpu", dtype=torch.float16):
        assert fused_feed_forward(layers[0], x) is None
