from __future__ import annotations

import copy
import io
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import reference
import tolerances
import torch
from model_helpers import ACTIVATIONS
from tolerances import assert_equal
from torch import Tensor, nn

from tinylm import BitLinear, PackedBitLinear
from tinylm.errors import CheckpointError

SHAPES = [(5,), (1, 3), (2, 3, 4)]


def make_layer(activation: str = "int8", k: int = 96, n: int = 24, seed: int = 0) -> BitLinear:
    torch.manual_seed(seed)
    return BitLinear(k, n, activation=activation)


def make_input(*shape: int, seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if x.ndim > 1:
        x.view(-1, shape[-1])[0] = 0.0  # a row of zeros, as padding gives
    return x


def expected_output(layer: BitLinear, x: Tensor) -> Tensor:
    y = reference.bit_linear(x.numpy(), layer.weight.detach().numpy(), layer.activation)
    return torch.from_numpy(y)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_equals_the_formula(activation: str, shape: tuple[int, ...]) -> None:
    layer, x = make_layer(activation), make_input(*shape, 96)
    expected = expected_output(layer, x)
    assert_equal(layer(x).detach(), expected)  # training mode
    assert_equal(layer.eval()(x).detach(), expected)  # evaluation with gradients
    with torch.no_grad():
        assert_equal(layer(x), expected)  # kept codes


def straight_through(x: Tensor, quantised: Tensor) -> Tensor:
    """Return ``quantised``, with the gradient of x."""
    return x + (quantised - x).detach()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(), *SHAPES])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_straight_through(
    activation: str, shape: tuple[int, ...], training: bool
) -> None:
    layer = make_layer(activation).train(training)
    x = make_input(*shape, 96).requires_grad_()
    dy = make_input(*shape, 24, seed=1)
    layer(x).backward(dy)

    # x + (quantise(x) - x).detach() and the same for W, in float64, by autograd.
    x64 = x.detach().double().requires_grad_()
    w64 = layer.weight.detach().double().requires_grad_()
    q, s = reference.quantize_activation(x.detach().numpy(), activation)
    codes, scale = reference.ternarize(layer.weight.detach().numpy())
    x_hat = straight_through(x64, torch.from_numpy(q / s.astype(np.float64)))
    w_hat = straight_through(w64, torch.from_numpy(codes * float(scale)))
    (x_hat @ w_hat.t()).backward(dy.double())

    assert x.grad is not None
    assert layer.weight.grad is not None
    assert x64.grad is not None
    assert w64.grad is not None
    tolerances.BIT_LINEAR_GRADIENT.assert_close(x.grad, x64.grad)
    tolerances.BIT_LINEAR_GRADIENT.assert_close(layer.weight.grad, w64.grad)


def test_only_the_gradients_asked_for_are_computed() -> None:
    layer, x = make_layer(), make_input(5, 96)
    layer(x).sum().backward()
    assert x.grad is None
    assert layer.weight.grad is not None
    frozen = make_layer().requires_grad_(False)
    x.requires_grad_()
    frozen(x).sum().backward()
    assert frozen.weight.grad is None
    assert x.grad is not None


def test_no_rows_give_no_output_and_a_zero_gradient() -> None:
    layer = make_layer()
    y = layer(torch.zeros(0, 96))
    y.sum().backward()
    assert y.shape == (0, 24)
    assert layer.weight.grad is not None
    assert not bool(layer.weight.grad.any())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.float64, torch.bfloat16])
def test_packed_equals_unpacked(
    activation: str, shape: tuple[int, ...], out_dtype: torch.dtype | None
) -> None:
    layer, x = make_layer(activation), make_input(*shape, 96)
    packed = PackedBitLinear.from_bit_linear(layer)
    with torch.no_grad():
        y = packed(x, out_dtype=out_dtype)
        assert y.dtype == (out_dtype or torch.float32)
        assert_equal(layer(x, out_dtype=out_dtype), y)  # training mode
        assert_equal(layer.eval()(x, out_dtype=out_dtype), y)
    assert_equal(layer.train()(x, out_dtype=out_dtype).detach(), y)


def test_packed_form_takes_two_bits_a_weight() -> None:
    layer = make_layer()
    packed = PackedBitLinear.from_bit_linear(layer)
    assert packed.weight.numel() * packed.weight.element_size() * 8 == 2 * layer.weight.numel()
    assert packed.weight_scale.shape == (24,)
    codes, scale = layer.weight_codes()
    assert_equal(packed.weight_codes()[0], codes)
    assert bool((packed.weight_scale == scale).all())
    assert list(packed.parameters()) == []
    clone = PackedBitLinear(torch.zeros_like(packed.weight), torch.ones(24))
    clone.load_state_dict(packed.state_dict())
    with torch.no_grad():
        assert_equal(clone(make_input(3, 96)), packed(make_input(3, 96)))


def test_packed_form_refuses_code_3() -> None:
    with pytest.raises(CheckpointError, match="code 3 at row 1, column 2"):
        PackedBitLinear(torch.tensor([[0x00], [0x30]], dtype=torch.uint8), torch.ones(2))


def new_parameter(layer: BitLinear) -> None:
    # The old weight goes first, so that the new one may well lie where it did.
    shape = layer.weight.shape
    del layer.weight
    layer.weight = nn.Parameter(torch.randn(shape))


def optimizer_step(layer: BitLinear) -> None:
    with torch.enable_grad():
        layer(make_input(5, 96)).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=1.0).step()


CHANGES: dict[str, Callable[[BitLinear], object]] = {
    "optimizer": optimizer_step,
    "load_state_dict": lambda layer: layer.load_state_dict(make_layer(seed=7).state_dict()),
    "assign": lambda layer: layer.load_state_dict(make_layer(seed=7).state_dict(), assign=True),
    "copy_": lambda layer: layer.weight.copy_(torch.randn_like(layer.weight)),
    "slice": lambda layer: layer.weight[3].neg_(),
    "new parameter": new_parameter,
    "kept old parameter": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.neg())),
    "bfloat16 and back": lambda layer: layer.bfloat16().float(),
    "data, then training": lambda layer: (layer.weight.data.neg_(), layer.train(), layer.eval()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_kept_codes_follow_the_weight(change: str) -> None:
    x = make_input(5, 96)
    for seed in range(5):  # a stale address is found by chance only
        layer = make_layer(seed=seed).eval()
        with torch.no_grad():
            before = layer(x)
            CHANGES[change](layer)
            assert_equal(layer(x), expected_output(layer, x))
            assert not torch.equal(layer(x), before)


def test_kept_codes_are_reused_and_dropped() -> None:
    layer = make_layer().eval()
    codes, _ = layer.weight_codes()
    assert layer.weight_codes()[0] is codes
    kept = weakref.ref(codes)
    del codes
    assert kept() is not None
    layer.train()
    assert kept() is None, "training should not hold a copy of the weight"
    assert layer.weight_codes()[0] is not layer.weight_codes()[0]


def test_codes_are_not_kept_where_a_layer_is_told_so() -> None:
    layer = BitLinear(16, 8).eval()
    layer.keeps_codes = False
    with torch.no_grad():
        first, second = layer.weight_codes()[0], layer.weight_codes()[0]
    assert torch.equal(first, second) and first is not second and layer._codes is None


def test_kept_codes_of_another_dtype_are_not_handed_out() -> None:
    layer = make_layer().eval()
    for dtype in (torch.int8, torch.float64, torch.float32, torch.int8):
        codes, scale = layer.weight_codes(dtype)
        assert codes.dtype == dtype
        assert scale.dtype == torch.float32
        assert_equal(codes, layer.weight_codes(torch.int8)[0].to(dtype))


def test_copies_are_independent() -> None:
    x, layer = make_input(5, 96), make_layer().eval()
    with torch.no_grad():
        before = layer(x)
        twin = copy.deepcopy(layer)
        assert_equal(twin(x), before)
        twin.weight.neg_()
        assert_equal(twin(x), -before)
        assert_equal(layer(x), before)


def test_a_used_layer_can_be_pickled() -> None:
    # multiprocessing does that; nothing in tinylm loads a pickle from a file.
    import pickle

    x, layer = make_input(5, 96), make_layer().eval()
    with torch.no_grad():
        before = layer(x)
        buffer = io.BytesIO(pickle.dumps(layer))
        assert_equal(pickle.load(buffer)(x), before)


def test_inference_mode() -> None:
    x = make_input(5, 96)
    layer = make_layer().eval()
    expected = expected_output(layer, x)
    with torch.inference_mode():
        assert_equal(layer(x), expected)
        inside = make_layer().eval()  # inference tensors count no versions
        assert_equal(inside(x), expected)
        inside.weight.neg_()
        assert_equal(inside(x), -expected)
    codes, _ = layer.weight_codes(torch.float32)
    scores = torch.ones(24, requires_grad=True) @ codes  # kept codes serve autograd afterwards
    scores.sum().backward()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_bfloat16_autocast_is_near(activation: str, training: bool) -> None:
    layer, x = make_layer(activation).train(training), make_input(7, 96)
    exact = layer(x).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        with torch.no_grad():
            assert_equal(layer(x), y.detach())
    assert y.dtype == torch.bfloat16
    tolerances.BIT_LINEAR_AUTOCAST.assert_close(y.detach(), exact)
    y.sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    assert bool(layer.weight.grad.any())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_packed_sums_stay_exact_under_autocast(activation: str) -> None:
    layer, x = make_layer(activation).eval(), make_input(7, 96)
    packed = PackedBitLinear.from_bit_linear(layer)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert packed(x).dtype == torch.bfloat16
        assert_equal(packed(x, out_dtype=torch.float32), expected_output(layer, x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_output_has_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    layer, x = make_layer(), make_input(5, 96).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    with torch.no_grad():
        assert_equal(PackedBitLinear.from_bit_linear(layer)(x), y.detach())
    if dtype != torch.float64:
        assert_equal(y.detach(), layer(x.float()).detach().to(dtype))  # one rounding, at the end


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float64_output_is_scaled_in_float64(activation: str) -> None:
    layer, x = make_layer(activation), make_input(5, 96)
    weight = layer.weight.detach().numpy()
    expected = torch.from_numpy(
        reference.bit_linear(x.numpy(), weight, activation, dtype=np.float64)
    )
    y = layer(x, out_dtype=torch.float64).detach()
    assert y.dtype == torch.float64
    assert_equal(y, expected)
    assert not torch.equal(y, y.float().double())


def test_layer_has_no_bias_and_says_what_it_is() -> None:
    layer = make_layer("fp8_e4m3")
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    assert repr(layer) == "BitLinear(96, 24, activation=fp8_e4m3)"
