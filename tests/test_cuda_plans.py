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
# Clusters of 2, 4, 8 and 16 thread blocks that an H100 said it holds, for rank 256 and rope 32.
H100_CLUSTERS = (132, 62, 30, 14)


def cluster(
    *,
    batch: int,
    capacity: int,
    heads: int = 16,
    nope: int = 32,
    rope: int = 32,
    value: int = 64,
    rank: int = 256,
    clusters: tuple[int, ...] = H100_CLUSTERS,
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
    counts = (ctypes.c_int * 4)(*clusters)
    return cuda_kernels.library().tinylm_decode_cluster(ctypes.byref(sizes), counts)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [(1, 16), (8, 16), (14, 16), (16, 8), (30, 8), (62, 4), (64, 2), (300, 2)],
)
def test_rows_are_shared_by_as_many_thread_blocks_as_fit(batch: int, expected: int) -> None:
    assert cluster(batch=batch, capacity=8192) == expected
    assert cluster(batch=batch, capacity=128) == expected


def test_a_few_rows_too_many_take_a_turn_of_their_own() -> None:
    # Two of 32 wait for the first 30: 54.8 us at 8192 tokens, where clusters of 4 take 63.9.
    assert cluster(batch=32, capacity=8192) == 8


def test_each_16_heads_are_a_row_of_their_own() -> None:
    assert cluster(batch=8, capacity=8192, heads=20) == 8
    assert cluster(batch=1, capacity=8192, heads=128) == 16


def test_a_gpu_that_takes_no_cluster_of_16() -> None:
    assert cluster(batch=1, capacity=2048, clusters=(132, 62, 30, 0)) == 8


@pytest.mark.parametrize(
    "widths",
    [{"rank": 36}, {"rope": 8}, {"rope": 48}, {"nope": 20}, {"nope": 144}, {"value": 12}],
)
def test_other_widths_keep_the_other_kernels(widths: dict[str, int]) -> None:
    assert cluster(batch=1, capacity=2048, **widths) == 0
