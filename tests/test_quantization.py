from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import ACTIVATIONS
from tolerances import assert_equal

from tinylm.errors import ConfigError
from tinylm.quantization import (
    MAX_EXACT_K,
    accumulate,
    dequantize,
    quantize_activation,
    storage_dtype,
    ternarize,
)

reproducible = settings(derandomize=True, deadline=None, max_examples=60)
SEEDS = st.integers(0, 2**31)
MAGNITUDES = st.integers(-12, 36).map(lambda e: 10.0**e)


def draw(seed: int, shape: tuple[int, ...], magnitude: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(shape) * magnitude).astype(np.float32)
    x[rng.random(shape) < 0.05] = 0.0
    return x


@reproducible
@given(SEEDS, MAGNITUDES, st.integers(1, 9), st.sampled_from([4, 20, 64]))
def test_ternarize_equals_the_formula(seed: int, magnitude: float, n: int, k: int) -> None:
    weight = draw(seed, (n, k), magnitude)
    codes, scale = ternarize(torch.from_numpy(weight))
    expected_codes, expected_scale = reference.ternarize(weight)
    assert scale.dtype == torch.float32
    assert scale.ndim == 0
    assert float(scale) == float(expected_scale)
    assert np.array_equal(codes.numpy(), expected_codes)


def test_ternarize_rounds_half_to_even() -> None:
    # mean|W| is 1, so W / scale is W: 1/2 goes to 0, 3/2 to 2 and is clamped to 1.
    weight = torch.tensor([[0.5, -0.5, 1.5, -1.5], [0.75, -0.25, 2.5, -0.5]])
    codes, scale = ternarize(weight)
    assert scale == 1.0
    assert codes.tolist() == [[0, 0, 1, -1], [1, 0, 1, 0]]


@pytest.mark.parametrize("value", [0.0, 1e-9, -9e-6])
def test_ternarize_scale_has_a_floor(value: float) -> None:
    codes, scale = ternarize(torch.full((3, 4), value))
    assert scale == torch.tensor(1e-5)
    assert codes.tolist() == [[float(np.sign(round(value / 1e-5)))] * 4] * 3


def test_ternarize_does_not_depend_on_the_number_of_threads() -> None:
    threads = torch.get_num_threads()
    try:
        for seed in range(4):
            weight = torch.from_numpy(draw(seed, (1024, 1024), 0.02))
            torch.set_num_threads(1)
            codes, scale = ternarize(weight)
            torch.set_num_threads(4)
            assert_equal(ternarize(weight)[1], scale)
            assert_equal(ternarize(weight)[0], codes)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@reproducible
@given(SEEDS, MAGNITUDES)
def test_activations_equal_the_formula(activation: str, seed: int, magnitude: float) -> None:
    x = draw(seed, (2, 5, 24), magnitude)
    q, s = quantize_activation(torch.from_numpy(x), activation)
    expected_q, expected_s = reference.quantize_activation(x, activation)
    assert q.dtype == s.dtype == torch.float32
    assert s.shape == (2, 5, 1)
    assert np.array_equal(s.numpy(), expected_s)
    assert np.array_equal(q.double().numpy(), expected_q)
    assert_equal(q.to(storage_dtype(activation)).float(), q)  # held without loss


def test_int8_rounds_half_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127.0]])
    q, s = quantize_activation(x, "int8")
    assert s.tolist() == [[1.0]]
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -2, -127]]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_zero_rows_stay_zero(activation: str) -> None:
    x = torch.zeros(2, 8)
    x[1, 3] = 5.0
    q, s = quantize_activation(x, activation)
    largest = {"int8": 127.0, "fp8_e4m3": 448.0}[activation]
    assert q[0].tolist() == [0.0] * 8
    assert s[0] == torch.tensor(largest) / torch.tensor(1e-5)
    assert q[1].tolist() == [0, 0, 0, largest, 0, 0, 0, 0]


def test_rows_below_the_floor_are_not_stretched() -> None:
    q, s = quantize_activation(torch.tensor([[2e-6, -2e-6, 0.0, 0.0]]), "int8")
    assert q.tolist() == [[25, -25, 0, 0]]  # 2e-6 * 127 / 1e-5 = 25.4
    assert s == torch.tensor(127.0) / torch.tensor(1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_largest_value_of_a_row_never_overflows(activation: str) -> None:
    # Over many maxima the product x * s also rounds to just above 127 or 448.
    largest = torch.tensor({"int8": 127.0, "fp8_e4m3": 448.0}[activation])
    absmax = torch.rand(20000, 1, generator=torch.Generator().manual_seed(0)) * 100 + 1e-3
    assert bool((absmax * (largest / absmax) > largest).any())
    q, _ = quantize_activation(torch.cat([absmax, -absmax], dim=1), activation)
    assert bool((q[:, 0] == largest).all())
    assert bool((q[:, 1] == -largest).all())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_huge_values_stay_finite(activation: str) -> None:
    x = torch.tensor([[torch.finfo(torch.float32).max, -1e38, 1.0, 0.0]])
    q, s = quantize_activation(x, activation)
    assert bool(q.isfinite().all())
    assert bool(s > 0)
    assert q[0, 0] == {"int8": 127.0, "fp8_e4m3": 448.0}[activation]
    assert q[0, 2:].tolist() == [0.0, 0.0]


def test_fp8_rounding_equals_e4m3_everywhere() -> None:
    # Every finite e4m3 value, and the midpoint of each pair of neighbours (half to even).
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = values[values.isfinite()].unique()  # sorted; -0 and 0 are one
    assert values.max() == 448.0
    probes = torch.cat([values, (values[1:] + values[:-1]) / 2, torch.tensor([448.0])])
    x = torch.stack([probes, torch.full_like(probes, 448.0)], dim=1)  # s is 1
    q, s = quantize_activation(x, "fp8_e4m3")
    assert bool((s == 1).all())
    assert np.array_equal(q[:, 0].numpy(), reference.round_to_e4m3(probes.numpy()))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_tokens_are_quantised_one_by_one(activation: str) -> None:
    x = torch.from_numpy(draw(0, (3, 7, 16), 1.0)) * torch.logspace(-3, 3, 7)[:, None]
    q, s = quantize_activation(x, activation)
    for row in range(3):
        for token in range(7):
            q_alone, s_alone = quantize_activation(x[row, token], activation)
            assert_equal(q[row, token], q_alone)
            assert_equal(s[row, token], s_alone)


def test_unknown_activation_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"one of int8, fp8_e4m3, found 'int4'"):
        quantize_activation(torch.ones(1, 4), "int4")


@pytest.mark.parametrize("k", [4, 256, 2816, MAX_EXACT_K])
def test_int8_accumulators_equal_int64(k: int) -> None:
    rng = np.random.default_rng(k)
    q = rng.integers(-128, 128, (6, k))
    codes = rng.integers(-1, 2, (8, k))
    q[0], codes[0] = -128, 1  # the largest sums there are
    q[1] = 127
    actual = accumulate(torch.tensor(q).float(), torch.tensor(codes).float(), "int8")
    assert np.array_equal(actual.to(torch.int64).numpy(), q @ codes.T)


@pytest.mark.parametrize("k", [4, 256, 2816, MAX_EXACT_K])
def test_fp8_accumulators_are_exact_sums_rounded_once(k: int) -> None:
    rng = np.random.default_rng(k)
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = values[values.isfinite()].numpy()
    q = rng.choice(values, (6, k))
    q[0] = rng.choice([448.0, 2.0**-9, 0.5, 0.4375], k)  # widest range of exponents
    q[1], q[2] = 448.0, 0.5
    q[3] = rng.choice([448.0, 2.0**-9], k)
    codes = rng.integers(-1, 2, (8, k))
    codes[0] = 1
    actual = accumulate(torch.tensor(q), torch.tensor(codes).float(), "fp8_e4m3")
    exact = q.astype(np.float64) @ codes.T.astype(np.float64)  # multiples of 2**-9 below 2**53
    assert np.array_equal(actual.numpy(), exact.astype(np.float32))


def test_dequantize_takes_one_scale_or_one_a_row() -> None:
    accumulator = torch.tensor([[10.0, -20.0], [30.0, 40.0]])
    s = torch.tensor([[2.0], [5.0]])
    one = dequantize(accumulator, torch.tensor(0.5), s)
    assert one.tolist() == [[2.5, -5.0], [3.0, 4.0]]
    rows = dequantize(accumulator, torch.tensor([0.5, 2.0]), s)
    assert rows.tolist() == [[2.5, -20.0], [3.0, 16.0]]
