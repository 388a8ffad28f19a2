from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_equal

from tinylm.errors import CheckpointError
from tinylm.packing import check_packed, pack, unpack

GOLDEN = json.loads((Path(__file__).parent / "golden/packing.json").read_text(encoding="utf-8"))


def golden_bytes(case: dict[str, Any]) -> torch.Tensor:
    return torch.tensor([[int(b, 16) for b in row] for row in case["bytes"]], dtype=torch.uint8)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_golden_bytes(case: dict[str, Any]) -> None:
    codes = torch.tensor(case["codes"], dtype=torch.int8)
    assert_equal(pack(codes), golden_bytes(case))
    assert_equal(unpack(golden_bytes(case)), codes)
    check_packed(golden_bytes(case), "weight")


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 7), st.integers(1, 9))
def test_round_trip(seed: int, rows: int, row_bytes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, (rows, 4 * row_bytes), generator=generator, dtype=torch.int8)
    packed = pack(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, row_bytes)
    assert_equal(unpack(packed), codes)
    check_packed(packed, "weight")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float32, torch.float64])
def test_any_dtype_of_codes(dtype: torch.dtype) -> None:
    codes = torch.tensor([[1, 0, -1, 1]], dtype=dtype)
    assert pack(codes).tolist() == [[0x86]]
    unpacked = unpack(pack(codes), dtype)
    assert unpacked.dtype == dtype
    assert_equal(unpacked, codes)


@pytest.mark.parametrize("shape", [(4,), (2, 6), (2, 3), (2, 2, 4)])
def test_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError) as error:
        pack(torch.zeros(shape, dtype=torch.int8))
    assert "multiple of 4" in str(error.value)
    assert str(list(shape)) in str(error.value)


@pytest.mark.parametrize("value", [2, -2, 127, -128, 3, 0.5, -0.5, 1.5, float("nan"), 255.0, 256.0])
def test_values_that_are_not_ternary(value: float) -> None:
    dtype = torch.int8 if isinstance(value, int) else torch.float32
    codes = torch.zeros(2, 8, dtype=dtype)
    codes[1, 5] = value
    with pytest.raises(CheckpointError, match="-1, 0 or 1"):
        pack(codes)


@pytest.mark.parametrize("column", range(8))
def test_code_3_is_named_by_row_and_column(column: int) -> None:
    lanes = torch.randint(0, 3, (3, 2, 4), generator=torch.Generator().manual_seed(column))
    lanes[2, column // 4, column % 4] = 3
    packed = sum(lanes[..., i] << 2 * i for i in range(4)).to(torch.uint8)
    with pytest.raises(CheckpointError) as error:
        check_packed(packed, "layers.0.mlp.up_proj.weight")
    message = str(error.value)
    assert message.startswith("layers.0.mlp.up_proj.weight: ")
    assert f"row 2, column {column};" in message
    assert "export the model again" in message


def test_every_byte_is_judged() -> None:
    for byte in range(256):
        packed = torch.tensor([[byte]], dtype=torch.uint8)
        if any(byte >> shift & 3 == 3 for shift in (0, 2, 4, 6)):
            with pytest.raises(CheckpointError, match="code 3"):
                check_packed(packed, "weight")
        else:
            check_packed(packed, "weight")
            assert_equal(pack(unpack(packed)), packed)


@pytest.mark.parametrize(
    "packed", [torch.zeros(2, 2, dtype=torch.int8), torch.zeros(4, dtype=torch.uint8)]
)
def test_packed_dtype_and_rank(packed: torch.Tensor) -> None:
    with pytest.raises(CheckpointError) as error:
        check_packed(packed, "w")
    assert str(packed.dtype) in str(error.value)
    assert str(list(packed.shape)) in str(error.value)
