"""The CUDA kernels through ctypes, on torch tensors: for the tests and for ``benchmarks/gpu.py``.

Needs ``libtinylm_cuda_test.so`` (``tinylm-export native build --gpu --cuda-tests``); its functions
stand in ``trt_plugins/tests/cuda/cuda_test_api.cu``. Calls are enqueued on PyTorch's current
stream; with ``out`` and ``workspace`` given they allocate nothing: a CUDA graph may capture them.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tinylm.config import AttentionShape
from tinylm.errors import NativeError
from tinylm_export.gpu_packing import pack_gpu

LIBRARY = "libtinylm_cuda_test.so"
_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_ACTIVATIONS = {"int8": 0, "fp8_e4m3": 1}
_BUILD = "tinylm-export native build --gpu --cuda-tests"
_ROOT = Path(__file__).resolve().parent.parent


class Plan(NamedTuple):
    """``ProductPlan`` of trt_plugins/kernels/cuda/product_plan.h."""

    rows: int
    k_parts: int = 1
    tiling: int = 0  # thin, wide, turns


class Sizes(ctypes.Structure):
    """``AttentionSizes`` of trt_plugins/tests/cuda/cuda_test_api.cu."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("num_heads", "nope_dim", "rope_dim", "value_dim")),
        *((name, ctypes.c_int64) for name in ("latent_rank", "batch", "length", "capacity")),
        *((name, ctypes.c_float) for name in ("theta", "eps", "softmax_scale")),
        ("type", ctypes.c_int),
    ]


def library_path() -> Path | None:
    """Return the test library: in TINYLM_NATIVE_DIR, or in the build tree of this checkout."""
    root = _root()
    folders = (root, root / "lib", root / "tests" / "cuda")
    return next((path for folder in folders if (path := folder / LIBRARY).is_file()), None)


def _root() -> Path:
    return Path(os.environ.get("TINYLM_NATIVE_DIR") or _ROOT / "build" / "native")


@functools.cache
def library() -> ctypes.CDLL:
    """Load the library.

    Raises:
        NativeError: It is not built, or can't be loaded.
    """
    path = library_path()
    if path is None:
        raise NativeError(f"{LIBRARY} is not built: none in {_root()}. Run `{_BUILD}`.")
    try:
        found = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeError(
            f"{path} can't be loaded: {error}. Build it again: `{_BUILD}`."
        ) from error
    found.tinylm_bit_linear_workspace.restype = ctypes.c_int64
    found.tinylm_latent_attention_workspace.restype = ctypes.c_int64
    found.tinylm_latent_attention_unsupported.restype = ctypes.c_char_p
    return found


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return memory that no kernel may leave as it is: NaN, or the largest integer."""
    out = torch.empty(shape, dtype=dtype, device="cuda")
    return out.fill_(float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max)


def pack(codes: Tensor) -> Tensor:
    """Pack ternary codes int8 [N, K] for the kernels; the result is on the GPU."""
    return torch.from_numpy(pack_gpu(codes.cpu().numpy())).cuda()


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    assert tensor is None or (tensor.is_cuda and tensor.is_contiguous())
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _stream() -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


def _int64(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]


def _plan(plan: Plan | None) -> ctypes.Array[ctypes.c_int32] | None:
    return None if plan is None else (ctypes.c_int32 * len(plan))(*plan)


def _check(error: int) -> None:
    if error:
        raise NativeError(f"a CUDA kernel's launch failed with cudaError_t {error}.")


def bit_linear_workspace(m: int, k: int, activation: str) -> Tensor:
    """Return workspace of :func:`bit_linear` for m rows."""
    count = library().tinylm_bit_linear_workspace(*_int64(m, k), _ACTIVATIONS[activation])
    return torch.full((count,), 0xA5, dtype=torch.uint8, device="cuda")


def bit_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    norm: Tensor | None,
    *,
    activation: str = "int8",
    eps: float = 1e-5,
    gated: bool = False,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """Norm, quantise, multiply by ternary codes, scale.

    Args:
        x: [M, K], or [M, 2K] if ``gated``.
        packed: What :func:`pack` gave for [N, K].
        scale: float32 [N].
        norm: float32 [K], or None for no norm.
        activation: ``"int8"`` or ``"fp8_e4m3"``.
        eps: Of the norm.
        gated: Whether x is ``[gate | up]`` and the input ``silu(gate) * up``.
        residual: [M, N] to add.
        out: Where y goes; new memory if None.
        workspace: From :func:`bit_linear_workspace`; new memory if None.
        plan: How a product of many rows is cut on Hopper; the launcher's choice if None.

    Returns:
        y [M, N], of x's type.

    Raises:
        NativeError: The library is not built, or a launch failed.
    """
    m, k = x.shape[0], x.shape[1] // (2 if gated else 1)
    n = scale.shape[0]
    y = poisoned(m, n, dtype=x.dtype) if out is None else out
    if workspace is None:
        workspace = bit_linear_workspace(m, k, activation)
    _check(
        library().tinylm_bit_linear(
            *(_TYPES[x.dtype], _ACTIVATIONS[activation], *_int64(m, n, k), int(gated)),
            *map(_pointer, (x, residual, y, packed, scale, norm)),
            *(ctypes.c_float(eps), _plan(plan), _pointer(workspace), _stream()),
        )
    )
    return y


def accumulate_int8(q: Tensor, packed: Tensor, n: int, plan: Plan | None = None) -> Tensor:
    """Return the sums of int8 q [M, K] times ternary codes [N, K]: int32 [M, N]."""
    m, k = q.shape
    sums = poisoned(m, n, dtype=torch.int32)
    workspace = bit_linear_workspace(m, k, "int8")
    _check(
        library().tinylm_accumulate_int8(
            *(_pointer(q), _pointer(packed), *_int64(m, n, k)),
            *(_pointer(sums), _plan(plan), _pointer(workspace), _stream()),
        )
    )
    return sums


def lm_head(
    x: Tensor, table: Tensor, norm: Tensor, seq_lens: Tensor, *, eps: float = 1e-5
) -> Tensor:
    """Return float32 logits [B, N] of the last tokens of x [B, S, K].

    Args:
        x: [B, S, K], right-padded.
        table: [N, K] of x's type.
        norm: float32 [K].
        seq_lens: int32 [B].
        eps: Of the norm.
    """
    batch, length, hidden = x.shape
    logits = poisoned(batch, table.shape[0], dtype=torch.float32)
    _check(
        library().tinylm_lm_head(
            *(_TYPES[x.dtype], *_int64(batch, length, hidden, table.shape[0])),
            *map(_pointer, (x, table, norm, seq_lens, logits)),
            *(ctypes.c_float(eps), _stream()),
        )
    )
    return logits


def attention_sizes(
    shape: AttentionShape, rank: int, batch: int, length: int, capacity: int, dtype: torch.dtype
) -> Sizes:
    """Describe a layer and its step for :func:`latent_attention`."""
    return Sizes(
        *(shape.num_heads, shape.nope_dim, shape.rope_dim, shape.value_dim, rank),
        *(batch, length, capacity, shape.theta, shape.eps, shape.softmax_scale, _TYPES[dtype]),
    )


def latent_attention_workspace(sizes: Sizes) -> Tensor:
    """Return workspace of :func:`latent_attention`."""
    count = library().tinylm_latent_attention_workspace(ctypes.byref(sizes))
    return torch.full((count,), 0xFF, dtype=torch.uint8, device="cuda")


def latent_attention(
    sizes: Sizes,
    qkv: Tensor,
    norm: Tensor,
    packed: Tensor,
    scales: Tensor,
    past_lens: Tensor,
    seq_lens: Tensor,
    cache: tuple[Tensor, Tensor, Tensor],
    *,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """Append to the cache in place and attend.

    Args:
        sizes: From :func:`attention_sizes`.
        qkv: [B, S, H * (nope + P) + R + P].
        norm: float32 [R].
        packed: What :func:`pack` gave for kv_b [H * (nope + Dv), R].
        scales: float32 [H * (nope + Dv)].
        past_lens: int32 [B], tokens in the cache.
        seq_lens: int32 [B], new tokens.
        cache: latent int8 [B, C, R], scale float32 [B, C], rope [B, C, P].
        out: Where y goes; new memory if None.
        workspace: From :func:`latent_attention_workspace`; new memory if None.

    Returns:
        y [B, S, H * Dv].

    Raises:
        NativeError: The library is not built, or a launch failed.
    """
    width = sizes.num_heads * sizes.value_dim
    y = poisoned(*qkv.shape[:2], width, dtype=qkv.dtype) if out is None else out
    if workspace is None:
        workspace = latent_attention_workspace(sizes)
    tensors = (qkv, norm, packed, scales, past_lens, seq_lens, *cache, y, workspace)
    _check(
        library().tinylm_latent_attention(ctypes.byref(sizes), *map(_pointer, tensors), _stream())
    )
    return y
