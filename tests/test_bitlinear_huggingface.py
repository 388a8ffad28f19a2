"""BitLinear against Hugging Face's BitNet layers on the same weights.

Their functions are compiled by torch.compile on first use; run eagerly here they need no C++
compiler and compute what their source says.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tolerances
import torch
from torch import Tensor
from transformers.integrations import bitnet

from tinylm import BitLinear, PackedBitLinear
from tinylm.norm import RMSNorm

SEEDS = range(4)
K, N = 96, 24


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def make_layer(seed: int) -> tuple[BitLinear, Tensor]:
    torch.manual_seed(seed)
    layer = BitLinear(K, N)
    x = torch.randn(2, 5, K) * torch.logspace(-2, 2, 5)[:, None]
    x[0, 0] = 0.0
    return layer, x


def online(layer: BitLinear, **kwargs: object) -> bitnet.AutoBitLinear:
    """Their layer with float master weights."""
    theirs = bitnet.AutoBitLinear(K, N, bias=False, online_quant=True, **kwargs)
    theirs.load_state_dict({"weight": layer.weight.detach()}, strict=False)
    return theirs


@pytest.mark.parametrize("seed", SEEDS)
def test_float_master_weights(seed: int) -> None:
    layer, x = make_layer(seed)
    theirs = online(layer)
    tolerances.HUGGING_FACE_FLOAT.assert_close(layer(x).detach(), theirs(x).detach())
    with torch.no_grad():
        packed = PackedBitLinear.from_bit_linear(layer)
        tolerances.HUGGING_FACE_FLOAT.assert_close(packed(x), theirs(x))


@pytest.mark.parametrize("seed", SEEDS)
def test_gradients(seed: int) -> None:
    layer, x = make_layer(seed)
    theirs = online(layer)
    dy = torch.randn(2, 5, N)
    ours_x, theirs_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(ours_x).backward(dy)
    theirs(theirs_x).backward(dy)
    assert ours_x.grad is not None
    assert theirs_x.grad is not None
    assert layer.weight.grad is not None
    assert theirs.weight.grad is not None
    tolerances.HUGGING_FACE_FLOAT.assert_close(ours_x.grad, theirs_x.grad)
    # x_hat reaches 300 here, so the gradient is compared at that scale.
    tolerances.HUGGING_FACE_FLOAT.assert_close(layer.weight.grad / 300, theirs.weight.grad / 300)


@pytest.mark.parametrize("seed", SEEDS)
def test_weights_packed_for_bitlinear(seed: int) -> None:
    """Their integer layer, whose ``weight_scale`` is 1 / mean|W|."""
    layer, x = make_layer(seed)
    codes, scale = layer.weight_codes()
    theirs = bitnet.BitLinear(K, N, bias=False, dtype=torch.float32)
    theirs.load_state_dict(
        {"weight": bitnet.pack_weights(codes.clone()), "weight_scale": (1 / scale).reshape(1)}
    )
    tolerances.HUGGING_FACE_INTEGER.assert_close(layer(x).detach(), theirs(x))


@pytest.mark.parametrize("seed", SEEDS)
def test_weights_packed_for_autobitlinear(seed: int) -> None:
    """Their float layer with unpacked codes, whose ``weight_scale`` is mean|W|."""
    layer, x = make_layer(seed)
    codes, scale = layer.weight_codes()
    packed = bitnet.pack_weights(codes.clone())
    theirs = bitnet.AutoBitLinear(K, N, bias=False, online_quant=False, dtype=torch.float32)
    weight = bitnet.unpack_weights(packed, dtype=torch.float32)
    theirs.load_state_dict({"weight": weight, "weight_scale": scale.reshape(1)})
    tolerances.HUGGING_FACE_FLOAT.assert_close(layer(x).detach(), theirs(x).detach())


@pytest.mark.parametrize("seed", SEEDS)
def test_codes_of_both_weight_quantisers_are_equal(seed: int) -> None:
    layer, _ = make_layer(seed)
    codes, scale = layer.weight_codes()
    theirs = bitnet.WeightQuant.apply(layer.weight.detach())
    assert torch.equal((theirs / scale).round().to(torch.int8), codes)
    assert {-1, 0, 1} == set(codes.unique().tolist())


@pytest.mark.parametrize("seed", SEEDS)
def test_norm_and_layer_together(seed: int) -> None:
    """``y = BitLinear(RMSNorm(x))`` against their layer with its norm built in."""
    layer, x = make_layer(seed)
    norm = RMSNorm(K, eps=1e-5)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    theirs = online(layer, use_rms_norm=True, rms_norm_eps=1e-5)
    assert theirs.rms_norm is not None
    theirs.rms_norm.load_state_dict(norm.state_dict())
    tolerances.HUGGING_FACE_FLOAT.assert_close(layer(norm(x)).detach(), theirs(x).detach())
