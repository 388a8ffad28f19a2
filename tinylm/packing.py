"""2-bit packing of ternary codes: one specification for Python, ONNX and C++.

A byte holds four codes along K, first code in the low bits. A code is stored as ``code + 1``, so
-1, 0, 1 become 0, 1, 2; the value 3 is invalid. ``tests/golden/packing.json`` holds golden bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinylm.config import PACK_LANES
from tinylm.errors import CheckpointError

_SHIFTS = (0, 2, 4, 6)
_HIGH_BITS = 0xAA  # the high bit of each lane; a lane of 3 has both bits set


def pack(codes: Tensor) -> Tensor:
    """Pack ternary codes, four to a byte.

    Args:
        codes: [N, K] of any dtype, values -1, 0, 1; K a multiple of 4.

    Returns:
        uint8 [N, K / 4].

    Raises:
        CheckpointError: K is not a multiple of 4, or a value is not ternary.
    """
    if codes.ndim != 2 or codes.shape[1] % PACK_LANES:
        raise CheckpointError(
            f"packing needs codes [N, K] with K a multiple of {PACK_LANES}, "
            f"found shape {list(codes.shape)}."
        )
    lanes = (codes + 1).to(torch.uint8)  # -1 and anything below wrap to large values
    if lanes.max() > 2 or not torch.equal(lanes.to(codes.dtype) - 1, codes):
        raise CheckpointError("packing needs codes -1, 0 or 1, found another value.")
    lanes = lanes.view(codes.shape[0], -1, PACK_LANES)  # [N, K/4, 4]
    packed = torch.zeros(lanes.shape[:2], dtype=torch.uint8, device=codes.device)
    for lane, shift in enumerate(_SHIFTS):
        packed |= lanes[..., lane] << shift
    return packed


def unpack(packed: Tensor, dtype: torch.dtype = torch.int8) -> Tensor:
    """Unpack ternary codes.

    Args:
        packed: uint8 [N, K / 4].
        dtype: Type of the result.

    Returns:
        [N, K] holding -1, 0, 1.
    """
    shifts = torch.tensor(_SHIFTS, dtype=torch.uint8, device=packed.device)
    lanes = (packed.unsqueeze(-1) >> shifts) & 3  # [N, K/4, 4]
    return (lanes.to(torch.int8) - 1).flatten(1).to(dtype)


def check_packed(packed: Tensor, name: str) -> None:
    """Check that packed weights hold no invalid code.

    Args:
        packed: uint8 [N, K / 4].
        name: The tensor's name, for the message.

    Raises:
        CheckpointError: Wrong dtype or rank, or a byte with code 3; names row and column.
    """
    if packed.dtype != torch.uint8 or packed.ndim != 2:
        raise CheckpointError(
            f"{name}: packed weights must be uint8 [N, K/4], "
            f"found {packed.dtype} {list(packed.shape)}."
        )
    invalid = packed & (packed << 1) & _HIGH_BITS
    if invalid.any():
        row, byte = invalid.nonzero()[0].tolist()
        lane = next(i for i, s in enumerate(_SHIFTS) if packed[row, byte] >> s & 3 == 3)
        raise CheckpointError(
            f"{name}: code 3 at row {row}, column {PACK_LANES * byte + lane}; codes are 0, 1 or 2. "
            "The file is damaged or was packed by something else: export the model again."
        )
