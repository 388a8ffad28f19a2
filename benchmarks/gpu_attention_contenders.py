"""The contenders of attention on a GPU, each over several copies of its inputs and cache.

Ours is the whole op: it rotates, norms and quantises the latent, appends it, attends and projects
values up. The rivals attend over keys and values that somebody else has made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from bench_records import NotRunError, first_line
from gpu_attention_problem import (
    HEAD_DIM,
    RANK,
    LatentProblem,
    MultiHeadProblem,
    SharedLatentProblem,
    Step,
)
from gpu_timing import REFUSALS, Call, GpuContender, Stopwatch, check
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinylm_export import cuda_kernels

OURS, FLASH, CUDNN = "ours", "torch flash", "cuDNN"
FA3, FA3_LATENT = "fa3-fwd", "fa3-fwd latent 256+64 bf16"
# bfloat16 keeps 8 bits of weights, keys, values and output; an average of thousands of random
# values is small beside them.
_LIMIT = 5e-2
Prepare = Callable[[Step, Stopwatch], GpuContender]


def ours(step: Step, stopwatch: Stopwatch) -> GpuContender:
    """``tinylm::FlashMLA`` with every launch of its step."""
    problem = LatentProblem(step)
    packed = cuda_kernels.pack(problem.codes)
    sizes = cuda_kernels.attention_sizes(
        problem.shape, RANK, step.batch, step.length, step.total, torch.bfloat16
    )
    workspace = cuda_kernels.latent_attention_workspace(sizes)
    past = torch.full((step.batch,), step.past, dtype=torch.int32, device="cuda")
    new = torch.full_like(past, step.length)
    width = (step.batch, step.length, step.num_heads * HEAD_DIM)
    out = torch.empty(width, dtype=torch.bfloat16, device="cuda")
    parts = (problem.qkv, problem.latent, problem.scale, problem.rope)
    calls = []
    for _ in range(stopwatch.copies(sum(part.nbytes for part in parts))):
        qkv, latent, scale, rope = (part.clone() for part in parts)
        attend = functools.partial(
            cuda_kernels.latent_attention,
            *(sizes, qkv, problem.norm_weight, packed, problem.weight_scale, past, new),
            (latent, scale, rope),
            out=out,
            workspace=workspace,
        )
        calls.append(attend)
    note = "the whole op: norm, quantiser, rotation, append, attention, up-projection of values"
    return _checked(OURS, calls, problem.pick, problem.answer(), note)


def flash(step: Step, stopwatch: Stopwatch) -> GpuContender:
    """PyTorch's flash attention over ordinary heads."""
    return _torch(FLASH, SDPBackend.FLASH_ATTENTION, step, stopwatch)


def cudnn(step: Step, stopwatch: Stopwatch) -> GpuContender:
    """CuDNN's attention over ordinary heads."""
    return _torch(CUDNN, SDPBackend.CUDNN_ATTENTION, step, stopwatch)


def fa3(step: Step, stopwatch: Stopwatch) -> GpuContender:
    """FlashAttention-3 over ordinary heads."""
    interface = _import_fa3()
    problem = MultiHeadProblem(step)
    calls = []
    for q, k, v in _copies(problem, stopwatch):
        if step.past:  # splits keys over the SMs
            call = functools.partial(interface.flash_attn_with_kvcache, q, k, v)
        else:
            call = functools.partial(interface.flash_attn_func, q, k, v, causal=True)
        calls.append(call)
    return _checked(FA3, calls, problem.pick, problem.answer())


def fa3_latent(step: Step, stopwatch: Stopwatch) -> GpuContender:
    """FlashAttention-3 over a shared latent in bfloat16."""
    interface = _import_fa3()
    problem = SharedLatentProblem(step)
    num_bytes = problem.k.nbytes + problem.latent.nbytes
    calls = []
    for _ in range(stopwatch.copies(num_bytes)):
        call = functools.partial(
            interface.flash_attn_with_kvcache,
            *(problem.q, problem.k.clone(), problem.latent.clone()),
            qv=problem.q_latent,
            softmax_scale=problem.softmax_scale,
        )
        calls.append(call)
    note = "queries come absorbed, values are not projected up, nothing is appended"
    return _checked(FA3_LATENT, calls, _flatten, problem.answer(), note)


PREFILL: dict[str, Prepare] = {OURS: ours, FLASH: flash, CUDNN: cudnn, FA3: fa3}
DECODE: dict[str, Prepare] = {OURS: ours, FLASH: flash, FA3: fa3, FA3_LATENT: fa3_latent}


def _import_fa3() -> Any:
    try:
        import fa3_fwd_interface

        return fa3_fwd_interface
    except REFUSALS as error:
        reason = f"can't be imported: {first_line(error)}; pip install 'tinylm[bench-gpu]'"
        raise NotRunError(reason) from error


def _torch(name: str, backend: SDPBackend, step: Step, stopwatch: Stopwatch) -> GpuContender:
    problem = MultiHeadProblem(step)
    calls = []
    for tensors in _copies(problem, stopwatch):
        q, k, v = (tensor.transpose(1, 2) for tensor in tensors)
        calls.append(functools.partial(_attend, backend, q, k, v, not step.past))
    return _checked(name, calls, problem.pick, problem.answer())


def _attend(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def _copies(problem: MultiHeadProblem, stopwatch: Stopwatch) -> list[tuple[Tensor, ...]]:
    tensors = (problem.q, problem.k, problem.v)
    count = stopwatch.copies(sum(tensor.nbytes for tensor in tensors))
    return [tuple(tensor.clone() for tensor in tensors) for _ in range(count)]


def _flatten(y: Tensor) -> Tensor:
    return y[:, 0].flatten(1)


def _checked(
    name: str,
    calls: Sequence[Call],
    pick: Callable[[Tensor], Tensor],
    expected: Tensor,
    note: str = "",
) -> GpuContender:
    """Check what is picked of the first and the last call's output; time the calls alone."""
    picked = [functools.partial(_picked, pick, call) for call in calls]
    contender = check(name, picked, expected, _LIMIT, note)
    contender.calls = calls
    return contender


def _picked(pick: Callable[[Tensor], Tensor], call: Call) -> Tensor:
    return pick(call())
