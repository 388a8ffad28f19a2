"""The layout of ternary weights that the CUDA kernels read.

Weights are the A operand of ``mma.sync.m16n8k32``. They lie in the order of its registers, so that
a lane's 16-byte load brings 64 codes which need a shift and a mask each four:

    blocks [N/16][K/128] of 512 bytes, each [lane 32][word 4] of little-endian uint32

Word w of lane l (g = l // 4, t = l % 4) holds rows ``n0 + g`` and ``n0 + g + 8`` at columns
``k0 + 32 w`` ...: register i in 0..3 is row ``g + 8 (i & 1)``, columns ``16 (i >> 1) + 4 t + j``
for byte j, and its code + 1 stands in bits ``8 j + 2 i`` and the next. N is padded to 16 and K to
128 with code 0.
"""

from __future__ import annotations

import numpy as np

from tinylm.errors import ExportError

ROWS = 16
COLUMNS = 128


def packed_size(num_rows: int, num_columns: int) -> int:
    """Return the bytes of a packed matrix [num_rows, num_columns]."""
    return _round_up(num_rows, ROWS) * _round_up(num_columns, COLUMNS) // 4


def pack_gpu(codes: np.ndarray) -> np.ndarray:
    """Pack ternary codes for the CUDA kernels.

    Args:
        codes: Integers [N, K], each -1, 0 or 1.

    Returns:
        int8 [packed_size(N, K)], the bytes; int8 because TensorRT gives plugins no uint8.

    Raises:
        ExportError: Not a matrix, or another value than -1, 0 or 1.
    """
    if codes.ndim != 2:
        raise ExportError(f"codes must be a matrix [N, K], found shape {list(codes.shape)}.")
    if codes.size and (codes.min() < -1 or codes.max() > 1):
        raise ExportError(f"codes must be -1, 0 or 1, found {codes.min()} to {codes.max()}.")
    num_rows, num_columns = codes.shape
    rows, columns = _round_up(num_rows, ROWS), _round_up(num_columns, COLUMNS)
    padded = np.ones((rows, columns), np.uint8)
    padded[:num_rows, :num_columns] = codes.astype(np.int8) + 1
    blocks = padded.reshape(rows // ROWS, 2, 8, columns // COLUMNS, 4, 2, 4, 4)
    # -> N/16, K/128, g, t, w, j, (i >> 1, i & 1)
    ordered = blocks.transpose(0, 3, 2, 6, 4, 7, 5, 1).reshape(-1, 4)
    shifts = np.array([0, 2, 4, 6], np.uint8)
    return np.bitwise_or.reduce(ordered << shifts, axis=1).astype(np.uint8).view(np.int8)


def unpack_gpu(packed: np.ndarray, num_rows: int, num_columns: int) -> np.ndarray:
    """Return the codes int8 [N, K] of :func:`pack_gpu`.

    Raises:
        ExportError: Another number of bytes than the shape needs.
    """
    size = packed_size(num_rows, num_columns)
    if packed.size != size:
        raise ExportError(
            f"weights [{num_rows}, {num_columns}] need {size} packed bytes, found {packed.size}."
        )
    rows, columns = _round_up(num_rows, ROWS), _round_up(num_columns, COLUMNS)
    shifts = np.array([0, 2, 4, 6], np.uint8)
    codes = packed.view(np.uint8).reshape(-1, 1) >> shifts & 3
    blocks = codes.reshape(rows // ROWS, columns // COLUMNS, 8, 4, 4, 4, 2, 2)
    ordered = blocks.transpose(0, 7, 2, 1, 4, 6, 3, 5).reshape(rows, columns)
    return ordered[:num_rows, :num_columns].astype(np.int8) - 1


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
