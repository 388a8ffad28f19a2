"""The CUDA kernels against the ops' own definition (export/torch_ops.py), on random shapes."""

from __future__ import annotations

import ctypes
import math
import os
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from tinylm.config import AttentionShape
from tinylm.packing import pack
from tinylm_export import cuda_kernels
from tinylm_export.torch_ops import torch_op

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="SKIPPED: there is no CUDA GPU"),
    pytest.mark.skipif(
        cuda_kernels.library_path() is None,
        reason=f"SKIPPED: {cuda_kernels.LIBRARY} is not built",
    ),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Fewer under compute-sanitizer (tools/gpu_sanitize.sh), which makes everything slow.
NUM_SHAPES = int(os.environ.get("TINYLM_NUM_SHAPES", "500"))
NUM_REPEATS = int(os.environ.get("TINYLM_NUM_REPEATS", "20"))


def ternary(n: int, k: int, generator: torch.Generator) -> Tensor:
    return torch.randint(-1, 2, (n, k), generator=generator, device="cuda", dtype=torch.int8)


def generator_for(seed: int) -> torch.Generator:
    return torch.Generator("cuda").manual_seed(seed)


def random_rows(rng: random.Random, most: int = 300) -> int:
    return rng.choice((1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 64, 65, rng.randint(1, most)))


class Linear:
    """A random layer and its input."""

    def __init__(self, seed: int, *, large: bool = False) -> None:
        rng, g = random.Random(seed), generator_for(seed)
        self.m, self.n = random_rows(rng, 2000 if large else 300), rng.randint(1, 700)
        self.k = 4 * rng.randint(1, 300)
        self.gated, self.activation = rng.random() < 0.3, rng.choice(("int8", "fp8_e4m3"))
        self.dtype = rng.choice(DTYPES)
        self.codes = ternary(self.n, self.k, g)
        self.scale = torch.rand(self.n, generator=g, device="cuda") + 0.01
        self.norm = None
        if rng.random() < 0.7:
            self.norm = torch.rand(self.k, generator=g, device="cuda") + 0.5
        width = self.k * (2 if self.gated else 1)
        size = 10.0 ** rng.uniform(-3, 1)
        self.x = (torch.randn(self.m, width, generator=g, device="cuda") * size).to(self.dtype)
        self.x[rng.randrange(self.m)] = 0
        self.residual = None
        if rng.random() < 0.3:
            self.residual = torch.randn(self.m, self.n, generator=g, device="cuda").to(self.dtype)

    def input(self) -> Tensor:
        return torch_op("SwiGLU")(*self.x.chunk(2, dim=-1)) if self.gated else self.x

    def expected(self) -> Tensor:
        y = torch_op("BitLinear")(
            self.input().contiguous(),
            pack(self.codes.cpu()).cuda(),
            self.scale,
            self.norm,
            activation=self.activation,
        )
        return y if self.residual is None else self.residual + y

    def found(self, **options: Tensor) -> Tensor:
        return cuda_kernels.bit_linear(
            self.x,
            cuda_kernels.pack(self.codes),
            self.scale,
            self.norm,
            activation=self.activation,
            gated=self.gated,
            residual=self.residual,
            **options,
        )


def test_every_sum_is_exact() -> None:
    for seed in range(NUM_SHAPES):
        rng, g = random.Random(seed), generator_for(seed)
        m, n, k = random_rows(rng), rng.randint(1, 600), 4 * rng.randint(1, 400)
        codes = ternary(n, k, g)
        q = torch.randint(-128, 128, (m, k), generator=g, device="cuda", dtype=torch.int8)
        q[rng.randrange(m)] = rng.choice((-128, 127, 0))
        sums = cuda_kernels.accumulate_int8(q, cuda_kernels.pack(codes), n)
        wide = q.double() @ codes.double().t()  # integers below 2**53
        assert torch.equal(sums.long(), wide.long()), (seed, m, n, k)


# Every plan of trt_plugins/kernels/cuda/gemv_plan.h on 132 multiprocessors, with shares that differ
# by a tile and without.
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        *((5, 300, 2304), (16, 1056, 2816), (9, 1500, 1028), (8, 5632, 1024), (3, 8200, 516)),
        *((7, 8200, 4100), (20, 5000, 772), (16, 8190, 4228), (30, 8190, 516), (29, 8190, 8192)),
    ],
)
def test_few_rows_of_many_outputs_give_exact_sums(m: int, n: int, k: int) -> None:
    g = generator_for(n)
    codes = ternary(n, k, g)
    q = torch.randint(-128, 128, (m, k), generator=g, device="cuda", dtype=torch.int8)
    sums = cuda_kernels.accumulate_int8(q, cuda_kernels.pack(codes), n)
    assert torch.equal(sums.long(), (q.double() @ codes.double().t()).long())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize(("m", "n", "k"), [(3, 8200, 1024), (30, 8190, 516), (100, 1030, 2816)])
def test_few_rows_of_many_outputs(
    m: int, n: int, k: int, activation: str, dtype: torch.dtype
) -> None:
    layer, g = Linear(1), generator_for(n)
    layer.activation, layer.dtype, layer.gated, layer.residual = activation, dtype, False, None
    layer.m, layer.n, layer.k, layer.codes = m, n, k, ternary(n, k, g)
    layer.norm = torch.rand(k, generator=g, device="cuda") + 0.5
    layer.scale = torch.full((n,), 0.02, device="cuda")
    layer.x = torch.randn(m, k, generator=g, device="cuda").to(dtype)
    if fp8_tensor_cores(layer):
        pytest.skip("a GPU of so few multiprocessors sums this by fp8 tensor cores")
    assert (layer.found() == layer.expected()).all(dim=1).float().mean() >= 0.9


# Every way to cut a product of many rows on Hopper (trt_plugins/kernels/cuda/product_plan.h).
PLANS = [cuda_kernels.Plan(rows, k_parts) for rows in (64, 128, 256) for k_parts in (1, 2, 3, 4)]
PLANS += [cuda_kernels.Plan(128, 1, tiling) for tiling in (1, 2)]


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_gives_exact_sums(plan: cuda_kernels.Plan) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("other GPUs than Hopper have no plans")
    shapes = ((33, 50, 1024), (300, 700, 1100), (200, 513, 2052), (1100, 1500, 516))
    # The last has more tiles than a GPU has multiprocessors, whatever the plan.
    for m, n, k in (*shapes, (3000, 2000, 1156)):
        g = generator_for(m)
        codes = ternary(n, k, g)
        q = torch.randint(-128, 128, (m, k), generator=g, device="cuda", dtype=torch.int8)
        sums = cuda_kernels.accumulate_int8(q, cuda_kernels.pack(codes), n, plan)
        assert torch.equal(sums.long(), (q.double() @ codes.double().t()).long()), (m, n, k)


# Sums of fp8 tensor cores, relative to the sum of the products' magnitudes. Found on an H200 with
# bfloat16: 5.4e-4, 2.9e-4, 3.2e-4 at K 1024, 4096, 8192, of which its rounding is the most.
FP8_SUM_LIMIT = 1e-3


def fp8_tensor_cores(layer: Linear) -> bool:
    """Whether the kernels sum e4m3 activations by fp8 tensor cores, which are not exact."""
    if layer.activation != "fp8_e4m3" or layer.dtype == torch.float32:
        return False
    # gemv_beats_wgmma() of trt_plugins/kernels/cuda/gemv_plan.h
    few = math.ceil(layer.m / 16) * math.ceil(layer.n / 32) <= 2 * num_multiprocessors()
    return layer.m > 32 and not few and torch.cuda.get_device_capability()[0] == 9


def num_multiprocessors() -> int:
    return int(torch.cuda.get_device_properties(0).multi_processor_count)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("k", [1024, 4096, 8192])
def test_sums_of_fp8_tensor_cores(dtype: torch.dtype, k: int) -> None:
    g = generator_for(k)
    codes, x = ternary(512, k, g), torch.randn(640, k, generator=g, device="cuda").to(dtype)
    ones = torch.ones(512, device="cuda")
    y = cuda_kernels.bit_linear(x, cuda_kernels.pack(codes), ones, None, activation="fp8_e4m3")
    largest = x.float().abs().amax(dim=1, keepdim=True)
    s = torch.full_like(largest, 448.0) / largest  # a number / a tensor would be rounded twice
    q = (x.float() * s).to(torch.float8_e4m3fn).double()
    expected, size = q @ codes.double().t(), q.abs() @ codes.double().abs().t()
    worst = ((y.double() * s.double() - expected).abs() / size).max()
    assert worst <= FP8_SUM_LIMIT, float(worst)


ROW_INPUTS = (4, 128, 1000, 1024, 1100, 2816, 4096, 4100, 8192, 8196, 14336, 16384, 16388)


@pytest.mark.parametrize("k", ROW_INPUTS)
def test_one_row_of_every_length(k: int) -> None:
    for seed in range(12):
        layer, g = Linear(seed), generator_for(seed)
        if layer.activation == "fp8_e4m3" and k > 8192:
            continue
        layer.m, layer.k, layer.codes = 1, k, ternary(layer.n, k, g)
        x = torch.randn(1, k * (2 if layer.gated else 1), generator=g, device="cuda")
        layer.x = x.to(layer.dtype)
        layer.norm = None if layer.norm is None else torch.rand(k, generator=g, device="cuda") + 0.5
        layer.residual = None if layer.residual is None else layer.residual[:1].contiguous()
        step = layer.scale.max() / 127 * layer.input().float().abs().max().clamp_min(1e-5) * 64
        found, expected = layer.found(), layer.expected()
        worst = (found.double() - expected.double()).abs().max()
        assert found.isfinite().all() and worst <= step, (seed, worst, step)


def test_sums_equal_the_cpu_kernels_at_the_largest_k() -> None:
    g = generator_for(0)
    codes = torch.ones(17, 32768, dtype=torch.int8, device="cuda")
    q = torch.randint(-128, 128, (3, 32768), generator=g, device="cuda", dtype=torch.int8)
    q[0] = -128
    sums = cuda_kernels.accumulate_int8(q, cuda_kernels.pack(codes), 17).cpu().numpy()
    np.testing.assert_array_equal(
        sums, q.cpu().numpy().astype(np.int64) @ codes.cpu().numpy().astype(np.int64).T
    )


def test_bit_linear_on_random_shapes() -> None:
    different = compared = 0
    for seed in range(NUM_SHAPES):
        layer = Linear(seed, large=seed % 25 == 0)
        found, expected = layer.found(), layer.expected()
        # A row whose quantised activations differ by one step somewhere may be off by that step.
        rows = (found != expected).any(dim=1)
        step = layer.scale.max() / 127 * layer.input().float().abs().max().clamp_min(1e-5) * 64
        worst = (found.double() - expected.double()).abs().max()
        if fp8_tensor_cores(layer):
            # FP8_SUM_LIMIT of some K / 2 products, and a rounding of the result's type.
            step = 64 * step + expected.double().abs().max() * torch.finfo(layer.dtype).eps
        else:
            different, compared = different + int(rows.sum()), compared + layer.m
        assert found.isfinite().all() and worst <= step, (seed, vars(layer).keys(), worst, step)
    assert different <= compared * 2e-3, f"{different} of {compared} rows differ"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["int8", "fp8_e4m3"])
def test_a_float32_row_is_the_same_in_every_bit(dtype: torch.dtype, activation: str) -> None:
    g = generator_for(3)
    layer = Linear(1)
    layer.activation, layer.dtype, layer.gated, layer.residual = activation, dtype, False, None
    layer.m, layer.n, layer.k = 64, 512, 1024
    layer.codes, layer.norm = ternary(512, 1024, g), torch.ones(1024, device="cuda")
    layer.scale = torch.full((512,), 0.02, device="cuda")
    layer.x = torch.randn(64, 1024, generator=g, device="cuda").to(dtype)
    if fp8_tensor_cores(layer):
        layer.x = layer.x[:32].contiguous()  # as many as are summed exactly
        layer.m = 32
    assert (layer.found() == layer.expected()).all(dim=1).float().mean() >= 0.95


def test_not_a_number_spoils_its_row_and_no_other() -> None:
    for seed, bad in ((0, float("nan")), (4, float("inf")), (7, float("nan"))):
        layer = Linear(seed)
        layer.gated, layer.x, layer.residual = False, layer.x[:, : layer.k].contiguous(), None
        layer.x[0, 0] = bad
        found = layer.found()
        assert found[0].isnan().all()
        assert found[1:].isfinite().all()


def test_twenty_repeats_are_the_same_in_every_bit() -> None:
    for seed in (1, 2, 3, 25, 50):
        layer = Linear(seed, large=seed % 25 == 0)
        first = layer.found()
        assert all(torch.equal(first, layer.found()) for _ in range(NUM_REPEATS))


SHAPES = (
    (16, 32, 32, 64, 256),  # tinylm-300m
    (4, 16, 16, 32, 64),
    (4, 64, 32, 64, 128),
    (2, 64, 64, 128, 512),
    (3, 20, 4, 12, 36),
    (20, 32, 32, 64, 192),
)


class Attention:
    """A random layer with a cache that holds something already."""

    def __init__(self, seed: int, *, decode: bool, most_past: int = 300) -> None:
        rng, g = random.Random(seed), generator_for(seed)
        heads, nope, rope, value, self.rank = rng.choice(SHAPES)
        self.shape = AttentionShape(
            num_heads=heads,
            nope_dim=nope,
            rope_dim=rope,
            value_dim=value,
            theta=10000.0,
            eps=1e-5,
            softmax_scale=(nope + rope) ** -0.5,
        )
        self.dtype = rng.choice(DTYPES)
        self.batch, self.length = rng.randint(1, 5), 1 if decode else rng.randint(2, 150)
        past = [rng.choice((0, rng.randint(0, most_past))) for _ in range(self.batch)]
        fresh = [rng.randint(0, self.length) for _ in range(self.batch)]
        self.capacity = max(map(sum, zip(past, fresh, strict=True))) + rng.randint(1, 70)
        as_int = {"device": "cuda", "dtype": torch.int32}
        self.past, self.fresh = torch.tensor(past, **as_int), torch.tensor(fresh, **as_int)
        rows, size = heads * (nope + value), (self.batch, self.capacity)
        self.codes = ternary(rows, self.rank, g)
        self.scales = torch.rand(rows, generator=g, device="cuda") * 0.1 + 0.02
        self.norm = torch.rand(self.rank, generator=g, device="cuda") + 0.5
        self.width = heads * (nope + rope)
        kv = self.rank + rope
        shape = (self.batch, self.length, self.width + kv)
        self.qkv = torch.randn(shape, generator=g, device="cuda").to(self.dtype)
        codes = torch.randint(-127, 128, (*size, self.rank), generator=g, device="cuda")
        keys = torch.randn((*size, rope), generator=g, device="cuda")
        steps = torch.rand(size, generator=g, device="cuda") * 30 + 30
        self.cache = (codes.to(torch.int8), steps, keys.to(self.dtype))
        for b in range(self.batch):  # slots that hold no token may hold anything
            self.cache[1][b, past[b] :] = float("nan")
            self.cache[2][b, past[b] :] = float("nan")

    def expected(self) -> tuple[Tensor, ...]:
        attributes = {
            name: getattr(self.shape, name)
            for name in ("num_heads", "nope_dim", "rope_dim", "value_dim", "softmax_scale")
        }
        q, kv = self.qkv[..., : self.width], self.qkv[..., self.width :]
        packed = pack(self.codes.cpu()).cuda()
        return torch_op("FlashMLA")(
            *(q.contiguous(), kv.contiguous(), self.norm, packed, self.scales),
            *(self.past, self.fresh, *self.cache),
            **attributes,
        )

    def found(self) -> tuple[Tensor, ...]:
        sizes = cuda_kernels.attention_sizes(
            self.shape, self.rank, self.batch, self.length, self.capacity, self.dtype
        )
        cache = tuple(part.clone() for part in self.cache)
        y = cuda_kernels.latent_attention(
            sizes,
            *(self.qkv, self.norm, cuda_kernels.pack(self.codes), self.scales),
            *(self.past, self.fresh, cache),
        )
        return y, *cache


# Largest |difference| of y against float64, relative to its largest value; roundings of the type
# of the output (2**-24, 2**-11, 2**-8), of keys and values where they are expanded, and of weights.
LIMITS = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("decode", [True, False])
def test_attention_on_random_shapes(decode: bool) -> None:
    flips = compared = 0
    for seed in range(NUM_SHAPES):
        case = Attention(seed, decode=decode)
        expected, found = case.expected(), case.found()
        steps = (found[1].int() - expected[1].int()).abs()
        assert steps.max() <= 1, seed
        flips += int((steps != 0).sum())
        compared += steps.numel()
        torch.testing.assert_close(found[2], expected[2], rtol=1e-6, atol=0, equal_nan=True)
        # A key may round the other way, to the neighbouring value of its type.
        keys = {"rtol": torch.finfo(case.dtype).eps, "atol": 1e-6, "equal_nan": True}
        torch.testing.assert_close(found[3], expected[3], **keys)
        flips += int((found[3] != expected[3]).logical_and(expected[3].isfinite()).sum())
        size = expected[0].double().abs().max().clamp_min(1e-3)
        worst = (found[0].double() - expected[0].double()).abs().max() / size
        assert worst <= LIMITS[case.dtype], (seed, case.dtype, case.shape, float(worst))
    assert flips <= 1e-5 * compared, f"{flips} of {compared}"


def test_decode_over_long_rows() -> None:
    for seed in range(max(6, NUM_SHAPES // 20)):
        case = Attention(seed, decode=True, most_past=6000)
        expected, found = case.expected()[0].double(), case.found()[0].double()
        worst = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-3)
        assert worst <= LIMITS[case.dtype], (seed, case.dtype, case.shape, float(worst))


def test_attention_repeats_are_the_same_in_every_bit() -> None:
    for seed, decode in ((1, True), (2, False), (3, True), (4, False)):
        case = Attention(seed, decode=decode)
        first = case.found()
        for _ in range(NUM_REPEATS):
            again = case.found()
            for a, b in zip(first, again, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 40])
def test_a_full_cache_spoils_only_what_does_not_fit(dtype: torch.dtype, length: int) -> None:
    case = Attention(5, decode=length == 1)
    case.dtype, case.length = dtype, length
    case.qkv = torch.randn(case.batch, length, case.qkv.shape[-1], device="cuda").to(dtype)
    case.fresh[:] = length
    case.past[:] = case.capacity - length
    case.past[-1] = case.capacity - length + 1  # one token too many
    latent, scale, rope = case.cache
    case.cache = latent, scale.nan_to_num(1.0), rope.nan_to_num(0.0).to(dtype)
    y, *_ = case.found()
    assert y[-1, -1].isnan().all()
    assert y[:-1].isfinite().all() and y[-1, :-1].isfinite().all()


class Head:
    """A random head and its input."""

    def __init__(self, seed: int) -> None:
        rng, g = random.Random(seed), generator_for(seed)
        batch, length = rng.choice((1, 1, 2, 8, 9, 17, 33, 64, 70)), rng.randint(1, 9)
        hidden, vocab = 4 * rng.randint(1, 300), rng.randint(1, 900)
        if seed % 50 == 0:
            hidden = 6144  # as many as the kernels take
        self.dtype = rng.choice(DTYPES)
        x = torch.randn(batch, length, hidden, generator=g, device="cuda")
        self.x = (x * 10.0 ** rng.uniform(-3, 2)).to(self.dtype)
        self.table = torch.randn(vocab, hidden, generator=g, device="cuda").to(self.dtype)
        self.norm = torch.rand(hidden, generator=g, device="cuda") + 0.5
        self.lens = torch.randint(length + 1, (batch,), generator=g, device="cuda").int()
        rows = torch.arange(length, device="cuda")
        self.x[rows >= self.lens.clamp_min(1)[:, None]] = float("nan")  # padding

    def run(self) -> Tensor:
        return cuda_kernels.lm_head(self.x, self.table, self.norm, self.lens)

    def check(self, found: Tensor) -> None:
        rows = torch.arange(len(self.x), device="cuda")
        last = self.x[rows, (self.lens.long() - 1).clamp_min(0)].double()
        rms = (last.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        normed, table = last / rms * self.norm, self.table.double()
        expected = normed.to(self.dtype).double() @ table.T
        # float32 sums, and one value whose norm lies between two of the type.
        unit = {torch.float32: 2.0**-22, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
        one = normed.abs().amax(-1, keepdim=True) * table.abs().amax(-1)
        limit = 1e-6 * (normed.abs() @ table.abs().T) + 2 * unit[self.dtype] * one
        assert ((found - expected).abs() <= limit).all()


def test_the_head_on_random_shapes() -> None:
    for seed in range(NUM_SHAPES):
        head = Head(seed)
        head.check(head.run())


def test_the_heads_repeats_are_the_same_in_every_bit() -> None:
    for seed in range(6):
        head = Head(seed)
        first = head.run()
        for _ in range(NUM_REPEATS - 1):
            assert torch.equal(head.run(), first)


def test_unsupported_shapes_say_why() -> None:
    shape = AttentionShape(
        num_heads=2, nope_dim=8, rope_dim=6, value_dim=8, theta=1e4, eps=1e-5, softmax_scale=1.0
    )
    sizes = cuda_kernels.attention_sizes(shape, 64, 1, 1, 8, torch.float32)
    reason = cuda_kernels.library().tinylm_latent_attention_unsupported(ctypes.byref(sizes))
    assert b"multiples of 4" in reason
