"""The CUDA kernels' weight layout: golden bytes, a slow loop over its definition, its inverse."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from tinylm.errors import ExportError
from tinylm_export.gpu_packing import pack_gpu, packed_size, unpack_gpu

SHAPES = [(16, 128), (1, 1), (17, 129), (48, 64), (24, 176), (176, 512)]


def draw_codes(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1, 2, (rows, columns)).astype(np.int8)


def pack_slowly(codes: np.ndarray) -> bytes:
    """Write down the layout's definition, one code at a time."""
    num_rows, num_columns = codes.shape
    words: list[int] = []
    for n0 in range(0, num_rows, 16):
        for k0 in range(0, num_columns, 128):
            for lane in range(32):
                g, t = lane // 4, lane % 4
                for w in range(4):
                    word = 0
                    for i in range(4):
                        for j in range(4):
                            row = n0 + g + 8 * (i & 1)
                            column = k0 + 32 * w + 16 * (i >> 1) + 4 * t + j
                            inside = row < num_rows and column < num_columns
                            code = int(codes[row, column]) if inside else 0
                            word |= (code + 1) << (8 * j + 2 * i)
                    words.append(word)
    return b"".join(word.to_bytes(4, "little") for word in words)


def golden_codes() -> np.ndarray:
    """Codes [16, 128] that need no random generator: (3 row + 5 column + row column) mod 3 - 1."""
    row, column = np.arange(16)[:, None], np.arange(128)
    return ((3 * row + 5 * column + row * column) % 3 - 1).astype(np.int8)


def test_golden_bytes() -> None:
    packed = pack_gpu(golden_codes())
    assert packed.dtype == np.int8 and packed.shape == (512,)
    assert packed[:16].tobytes().hex() == "60960960096096099609609660960960"
    assert (
        hashlib.sha256(packed.tobytes()).hexdigest()
        == "b48e4f6ba39bb0474ccd177002dcb9f305e99c76f22965f88d4fbffb6741c389"
    )


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_bytes_are_those_of_the_definition(rows: int, columns: int) -> None:
    codes = draw_codes(rows, columns)
    packed = pack_gpu(codes)
    assert packed.size == packed_size(rows, columns)
    assert packed.tobytes() == pack_slowly(codes)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_unpacking_gives_the_codes_back(rows: int, columns: int) -> None:
    codes = draw_codes(rows, columns, seed=1)
    found = unpack_gpu(pack_gpu(codes), rows, columns)
    assert found.dtype == np.int8
    np.testing.assert_array_equal(found, codes)


def test_padding_is_code_zero() -> None:
    padded = unpack_gpu(pack_gpu(np.ones((3, 5), np.int8)), 16, 128)
    assert padded.sum() == 15 and (padded[:3, :5] == 1).all()


def test_refusals_name_what_was_found() -> None:
    with pytest.raises(ExportError, match=r"matrix \[N, K\], found shape \[4\]"):
        pack_gpu(np.zeros(4, np.int8))
    with pytest.raises(ExportError, match="-1, 0 or 1, found 0 to 2"):
        pack_gpu(np.array([[0, 2]], np.int8))
    with pytest.raises(ExportError, match=r"\[16, 128\] need 512 packed bytes, found 511"):
        unpack_gpu(np.zeros(511, np.int8), 16, 128)
