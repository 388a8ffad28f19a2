"""The ops by their function bodies, in a stock ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from export_helpers import MLA_CASES, MlaCase, bit_linear_inputs, run_op
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import HALF_PRODUCT, ONE_ROUNDING, assert_equal
from torch import Tensor

from tinylm.latent_cache import LatentCache
from tinylm.norm import rms_norm
from tinylm.packing import pack
from tinylm.quantization import quantize_activation
from tinylm_export.torch_ops import torch_op

OPS = torch.ops.tinylm
ACTIVATIONS = pytest.mark.parametrize("activation", ["int8", "fp8_e4m3"])
CASES = pytest.mark.parametrize("case", MLA_CASES.values(), ids=MLA_CASES.keys())
CACHE = ("latent", "scale", "rope")


def run_both(op: str, tensors: dict[str, Tensor], **attributes: object) -> None:
    """Run an op in PyTorch and in ONNX Runtime; the cache must be the same bit for bit."""
    expected = torch_op(op)(*tensors.values(), **attributes)
    found = run_op(op, tensors, **attributes)
    expected = expected if isinstance(expected, tuple) else (expected,)
    ONE_ROUNDING.assert_close(found[0], expected[0])
    for have, want in zip(found[1:], expected[1:], strict=True):
        assert_equal(have, want)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    lead=st.lists(st.integers(1, 5), max_size=3).map(tuple),
    row_bytes=st.integers(1, 40),
    num_outputs=st.integers(1, 50),
    activation=st.sampled_from(["int8", "fp8_e4m3"]),
    norm=st.booleans(),
)
def test_bit_linear_on_random_shapes(
    seed: int,
    lead: tuple[int, ...],
    row_bytes: int,
    num_outputs: int,
    activation: str,
    norm: bool,
) -> None:
    tensors = bit_linear_inputs(
        seed, lead=lead, num_inputs=4 * row_bytes, num_outputs=num_outputs, norm=norm
    )
    expected = OPS.bit_linear(*tensors.values(), activation=activation, eps=1e-3)
    # No sum but the mean square depends on order, and that one is rounded before it is used.
    assert_equal(run_op("BitLinear", tensors, activation=activation, eps=1e-3)[0], expected)


@ACTIVATIONS
def test_bit_linear_in_half_precision(activation: str) -> None:
    tensors = bit_linear_inputs(1, dtype=torch.float16)
    found = run_op("BitLinear", tensors, activation=activation)[0]
    assert found.dtype == torch.float16
    assert_equal(found, OPS.bit_linear(*tensors.values(), activation=activation))


def identity_inputs(x: Tensor) -> dict[str, Tensor]:
    """Inputs of a BitLinear whose output is its quantised input, undone: ``q / s``."""
    width = x.shape[-1]
    return {
        "x": x,
        "weight": pack(torch.eye(width, dtype=torch.int8)),
        "weight_scale": torch.ones(width),
    }


def test_int8_rounds_half_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])  # so s = 1
    found = run_op("BitLinear", identity_inputs(x), activation="int8")[0]
    assert found.tolist() == [[127.0, 0.0, 2.0, 2.0, 0.0, -2.0, -2.0, 126.0]]


def test_int8_follows_the_formula() -> None:
    x = (
        torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-8, 8, 50)[:, None]
    )
    found = run_op("BitLinear", identity_inputs(x), activation="int8")[0].numpy()
    values = x.numpy()
    largest = np.maximum(np.abs(values).max(axis=1, keepdims=True), np.float32(1e-5))
    s = np.float32(127) / largest
    q = np.clip(np.rint(values * s), -128, 127)
    np.testing.assert_array_equal(found, q / s)


def test_fp8_gives_every_value_of_the_format() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    x = every[every.isfinite()].reshape(1, -1)  # 254 values, the largest 448: s = 1
    x = torch.nn.functional.pad(x, (0, 2))
    assert_equal(run_op("BitLinear", identity_inputs(x), activation="fp8_e4m3")[0], x)


def test_fp8_never_gives_nan_at_the_top() -> None:
    """A product that rounds to just above 448 is cut, because the format has no infinity."""
    x = torch.rand(3000, 4, generator=torch.Generator().manual_seed(0)) + 0.01
    tensors = identity_inputs(x)
    s = 448.0 / x.amax(dim=1)
    assert (x.amax(dim=1) * s > 448.0).any()
    found = run_op("BitLinear", tensors, activation="fp8_e4m3")[0]
    assert found.isfinite().all()
    assert_equal(found, OPS.bit_linear(*tensors.values(), activation="fp8_e4m3"))


@ACTIVATIONS
@pytest.mark.parametrize("norm", [True, False])
def test_rows_of_zeros_and_extremes(activation: str, norm: bool) -> None:
    tensors = bit_linear_inputs(3, lead=(6,), norm=norm)
    scales = torch.tensor([0.0, 1e-38, 1e-6, 1e6, 1e18, 1.0])
    tensors["x"] = tensors["x"].sign() * scales[:, None]
    found = run_op("BitLinear", tensors, activation=activation)[0]
    assert not found[0].any()
    assert found.isfinite().all()
    assert_equal(found, OPS.bit_linear(*tensors.values(), activation=activation))


@CASES
def test_flash_mla(case: MlaCase) -> None:
    run_both("FlashMLA", case.inputs(), **case.attributes)


@settings(derandomize=True, deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 2**31),
    lens=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), min_size=1, max_size=4),
    padding=st.integers(0, 2),
    spare=st.integers(0, 3),
    rank=st.integers(1, 6).map(lambda n: 4 * n),
    num_heads=st.integers(1, 4),
    nope_dim=st.integers(1, 9),
    rope_pairs=st.integers(1, 5),
    value_dim=st.integers(1, 9),
)
def test_flash_mla_on_random_shapes(
    seed: int,
    lens: list[tuple[int, int]],
    padding: int,
    spare: int,
    rank: int,
    num_heads: int,
    nope_dim: int,
    rope_pairs: int,
    value_dim: int,
) -> None:
    past_lens, seq_lens = zip(*lens, strict=True)
    case = MlaCase(
        past_lens=past_lens,
        seq_lens=seq_lens,
        length=max(1, max(seq_lens) + padding),
        capacity=max(1, max(map(sum, lens)) + spare),
        rank=rank,
        num_heads=num_heads,
        nope_dim=nope_dim,
        rope_dim=2 * rope_pairs,
        value_dim=value_dim,
    )
    run_both("FlashMLA", case.inputs(seed), **case.attributes)


@pytest.mark.parametrize("name", ["chunk", "ragged decode"])
def test_flash_mla_in_half_precision(name: str) -> None:
    case = MLA_CASES[name]
    tensors = case.inputs(dtype=torch.float16)
    found = run_op("FlashMLA", tensors, **case.attributes)
    expected = OPS.flash_mla(*tensors.values(), **case.attributes)
    for have, want in zip(found, expected, strict=True):
        assert have.dtype == want.dtype
        assert_equal(have, want)


@CASES
def test_cache_is_what_pytorch_keeps(case: MlaCase) -> None:
    tensors = case.inputs(seed=4)
    cache = LatentCache.from_tensors(
        *(tensors[f"past_{part}"].clone() for part in CACHE), tensors["past_lens"]
    )
    latent = tensors["kv"][..., : case.rank]
    codes, s = quantize_activation(
        rms_norm(latent, tensors["kv_norm_weight"], case.shape.eps), "int8"
    )
    _, latent, scale, rope = run_op("FlashMLA", tensors, **case.attributes)
    new = tensors["seq_lens"].long()
    # The rotated key has a test of its own in test_flash_mla; here it is taken as it is.
    slots = (tensors["past_lens"].long()[:, None] + torch.arange(case.length)).clamp_max(
        case.capacity - 1
    )
    new_rope = rope.gather(1, slots[..., None].expand(-1, -1, case.rope_dim))
    cache.append(0, codes, s.squeeze(-1), new_rope, new)
    assert_equal(latent, cache.latent[0])
    assert_equal(scale, cache.scale[0])
    assert_equal(rope, cache.rope[0])


def test_absorbed_equals_expanded() -> None:
    """One new token takes the absorbed branch; with a padded step after it, the expanded one."""
    one = MlaCase(past_lens=(5, 0, 3), seq_lens=(1, 1, 0), length=1, capacity=7)
    two = MlaCase(past_lens=(5, 0, 3), seq_lens=(1, 1, 0), length=2, capacity=7)
    tensors = one.inputs(seed=9)
    padded = dict(tensors)
    for name in ("q", "kv"):
        padded[name] = torch.cat((tensors[name], torch.randn_like(tensors[name])), dim=1)
    y_absorbed, *present = run_op("FlashMLA", tensors, **one.attributes)
    y_expanded, *present_expanded = run_op("FlashMLA", padded, **two.attributes)
    ONE_ROUNDING.assert_close(y_expanded[:, :1], y_absorbed)
    assert not y_expanded[:, 1:].any()
    for found, expected in zip(present_expanded, present, strict=True):
        assert_equal(found, expected)


@CASES
def test_garbage_in_unused_slots_is_harmless(case: MlaCase) -> None:
    tensors = case.inputs(seed=2)
    dirty = dict(tensors)
    unused = torch.arange(case.capacity) >= tensors["past_lens"][:, None]
    dirty["past_latent"] = tensors["past_latent"].masked_fill(unused[..., None], -128)
    dirty["past_scale"] = tensors["past_scale"].masked_fill(unused, 0.0)
    dirty["past_scale"][:, -1] = torch.where(unused[:, -1], torch.nan, dirty["past_scale"][:, -1])
    dirty["past_rope"] = tensors["past_rope"].masked_fill(unused[..., None], torch.nan)
    y, *present = run_op("FlashMLA", tensors, **case.attributes)
    y_dirty, *present_dirty = run_op("FlashMLA", dirty, **case.attributes)
    assert_equal(y_dirty, y)
    assert_equal(
        OPS.flash_mla(*dirty.values(), **case.attributes)[0],
        OPS.flash_mla(*tensors.values(), **case.attributes)[0],
    )
    filled = torch.arange(case.capacity) < (tensors["past_lens"] + tensors["seq_lens"])[:, None]
    for part, found, clean in zip(CACHE, present_dirty, present, strict=True):
        assert_equal(found[filled], clean[filled])
        # What is not filled is not touched either.
        torch.testing.assert_close(
            found[~filled], dirty[f"past_{part}"][~filled], rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("length", [1, 3])
def test_rows_without_new_tokens_keep_their_cache(length: int) -> None:
    """The first row is full, the second is not, the third is empty; the last one grows."""
    case = MlaCase(past_lens=(5, 2, 0, 1), seq_lens=(0, 0, 0, 1), length=length, capacity=5)
    tensors = case.inputs(seed=6)
    y, *present = run_op("FlashMLA", tensors, **case.attributes)
    assert not y[:3].any()
    assert y[3, 0].any()
    for part, found in zip(CACHE, present, strict=True):
        assert_equal(found[:3], tensors[f"past_{part}"][:3])
        assert not torch.equal(found[3], tensors[f"past_{part}"][3])


@pytest.mark.parametrize("length", [1, 2])
def test_an_empty_batch_of_rows_gives_zeros(length: int) -> None:
    case = MlaCase(past_lens=(0, 0), seq_lens=(0, 0), length=length, capacity=3)
    tensors = case.inputs()
    y, *present = run_op("FlashMLA", tensors, **case.attributes)
    assert not y.any()
    for part, found in zip(CACHE, present, strict=True):
        assert_equal(found, tensors[f"past_{part}"])


def test_swiglu() -> None:
    g = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(2, 3, 500, generator=g) * 8 for _ in range(2))
    gate[0, 0, :5] = torch.tensor([0.0, -0.0, 500.0, -500.0, -1e30])
    assert_equal(run_op("SwiGLU", {"gate": gate, "up": up})[0], OPS.swiglu(gate, up))
    half = {"gate": gate.clamp_min(-9e3).half(), "up": up.half()}
    HALF_PRODUCT.assert_close(run_op("SwiGLU", half)[0], OPS.swiglu(*half.values()))
