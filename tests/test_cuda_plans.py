"""Which kernels the CUDA launchers choose; needs the built library, and no GPU."""

from __future__ import annotations

import ctypes

import pytest
import torch

from tinylm.config import AttentionShape
from tinylm_export import cuda_kernels

pytestmark = pytest.mark.skipif(
    cuda_kernels.library_path() is None,
    reason=f"NOT TESTED: {cuda_kernels.LIBRARY} is not built",
)
H100_MULTIPROCESSORS = 132


def cluster(
    *,
    batch: int,
    capacity: int,
    heads: int = 16,
    nope: int = 32,
    rope: int = 32,
    value: int = 64,
    rank: int = 256,
) -> int:
    """Return how many thread blocks share a row; 0: other kernels run."""
    shape = AttentionShape(
        num_heads=heads,
        nope_dim=nope,
        rope_dim=rope,
        value_dim=value,
        theta=1e4,
        eps=1e-5,
        softmax_scale=0.125,
    )
    sizes = cuda_kernels.attention_sizes(shape, rank, batch, 1, capacity, torch.bfloat16)
    return cuda_kernels.library().tinylm_decode_cluster(ctypes.byref(sizes), H100_MULTIPROCESSORS)


@pytest.mark.parametrize(
    ("batch", "capacity", "expected"),
    [
        (1, 2048, 16),
        (1, 128, 16),
        (1, 32768, 16),
        (16, 8192, 16),
        (17, 8192, 8),
        (32, 8192, 8),
        (64, 8192, 4),
        (300, 8192, 2),
    ],
)
def test_a_row_is_shared_by_as_many_thread_blocks_as_fit(
    batch: int, capacity: int, expected: int
) -> None:
    assert cluster(batch=batch, capacity=capacity) == expected


def test_each_16_heads_are_a_row_of_their_own() -> None:
    assert cluster(batch=16, capacity=8192, heads=20) == 8
    assert cluster(batch=1, capacity=8192, heads=256) == 16


def test_large_ranks_have_one_thread_block_a_multiprocessor() -> None:
    assert cluster(batch=16, capacity=8192, rank=512) == 8


@pytest.mark.parametrize(
    "widths",
    [{"rank": 36}, {"rope": 8}, {"rope": 48}, {"nope": 20}, {"nope": 144}, {"value": 12}],
)
def test_other_widths_keep_the_other_kernels(widths: dict[str, int]) -> None:
    assert cluster(batch=1, capacity=2048, **widths) == 0
