"""One decode step of attention: FlashMLA against ONNX Runtime's GroupQueryAttention.

Ours also rotates the query and the key, norms and quantises the latent and appends it; the rival
appends keys and values that are ready, over a float32 cache. Both caches are bound in place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_records import NotRunError, Record, log, num_copies
from cpu_attention_problem import (
    EPS,
    HEAD_DIM,
    NOPE_DIM,
    NUM_CACHED,
    NUM_HEADS,
    ROPE_DIM,
    SOFTMAX_SCALE,
    THETA,
    VALUE_DIM,
    LatentProblem,
    MultiHeadProblem,
)
from cpu_gemm_problem import departure
from cpu_onnx import (
    MICROSOFT,
    Array,
    Bound,
    make_session,
    native_library,
    op_model,
    share_threads,
    value,
)
from cpu_timing import Contender, Settings, micros, time_in_turns

from tinylm.packing import pack
from tinylm_export.ops import DOMAIN, FLASH_MLA

CASE = f"decode, {NUM_HEADS} heads, {NUM_CACHED} cached"
OURS, RIVAL, BODY = "ours", "ORT GroupQueryAttention", "ours, function body"
# Sums over 2049 tokens in float32, exp included; ours is held to a float64 contract whose output
# is rounded once.
_LIMITS = {OURS: 1e-6, BODY: 1e-6, RIVAL: 1e-4}

Prepared = tuple[Sequence[Callable[[], object]], float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachedOp:
    """A single-op model whose cache is input and output at once.

    Attributes:
        model: The model.
        inputs: What it reads beside the cache.
        cache: The cache's parts; the graph calls them ``past_*`` and ``present_*``.
        answer: What its output ``y`` must be, float64 [1, H * Dv].
        slot: Where each part of the cache gets the new token.
        appended: What it must hold there afterwards.
    """

    model: bytes
    inputs: dict[str, Array]
    cache: dict[str, Array]
    answer: Array
    slot: tuple[int | slice, ...]
    appended: dict[str, Array]

    def prepare(self, cold_bytes: int, limit: float, native: Path | None = None) -> Prepared:
        """Return a call for each copy of model and cache, and the departure, if small enough.

        Raises:
            NotRunError: ONNX Runtime refuses it, or the answer is wrong.
        """
        num_bytes = sum(array.nbytes for array in self.cache.values())
        calls, errors = [], []
        for _ in range(num_copies(num_bytes, cold_bytes)):
            cache = {part: value(array) for part, array in self.cache.items()}
            past = {f"past_{part}": kept for part, kept in cache.items()}
            present = {f"present_{part}": kept for part, kept in cache.items()}
            inputs = {name: value(array) for name, array in self.inputs.items()}
            y = value(np.zeros((1, 1, self.answer.shape[1]), np.float32))
            session = make_session(self.model, native=native)
            bound = Bound(session, inputs | past, {"y": y} | present)
            try:
                bound.run()
            except Exception as error:  # pybind exceptions of onnxruntime share no base class
                raise NotRunError(f"refuses: {str(error)[:200]}") from error
            errors.append(departure(y.numpy()[0], self.answer))
            self._check_cache(cache)
            calls.append(bound.run)
        if max(errors) > limit:
            raise NotRunError(f"wrong answer: departs by {max(errors):.2g}, limit {limit:g}")
        return calls, max(errors)

    def _check_cache(self, cache: dict[str, Any]) -> None:
        for part, expected in self.appended.items():
            found = cache[part].numpy()[self.slot]
            tolerance = 0 if expected.dtype == np.int8 else 1e-6  # some float32 roundings
            if not np.allclose(found, expected, rtol=tolerance, atol=tolerance):
                raise NotRunError(f"wrong answer: appends another {part} to the cache")


def run_attention(settings: Settings, num_threads: int) -> list[Record]:
    """Measure every contender; for a process of its own."""
    log(f"attention, {num_threads} threads")
    share_threads(num_threads)
    latent, multi_head = latent_op(LatentProblem()), multi_head_op(MultiHeadProblem())
    ready: dict[str, Contender | NotRunError] = {}
    for name, op in {OURS: latent, RIVAL: multi_head, BODY: latent}.items():
        try:
            native = native_library() if name == OURS else None
            calls, error = op.prepare(settings.cold_bytes, _LIMITS[name], native)
            ready[name] = Contender(name=name, calls=calls, error=error)
        except NotRunError as reason:
            ready[name] = reason
    running = [c for c in ready.values() if isinstance(c, Contender)]
    time_in_turns(running, repeats=settings.repeats, num_threads=num_threads)
    return [micros("attention", CASE, n, num_threads, c) for n, c in ready.items()]


def latent_op(problem: LatentProblem) -> CachedOp:
    """Make ``tinylm::FlashMLA`` over a latent cache."""
    inputs = {
        "q": problem.q,
        "kv": problem.kv,
        "past_lens": np.array([NUM_CACHED], np.int32),
        "seq_lens": np.array([1], np.int32),
    }
    cache = {"latent": problem.latent, "scale": problem.scale, "rope": problem.rope}
    model = op_model(
        FLASH_MLA.name,
        DOMAIN,
        names=[p.name for p in FLASH_MLA.inputs],
        inputs=inputs | {f"past_{part}": array for part, array in cache.items()},
        constants={
            "kv_norm_weight": problem.norm_weight,
            "kv_b": pack(torch.from_numpy(problem.codes)).numpy(),
            "kv_b_scale": problem.weight_scale,
        },
        outputs={"y": problem.q} | {f"present_{part}": array for part, array in cache.items()},
        attributes={
            "num_heads": NUM_HEADS,
            "nope_dim": NOPE_DIM,
            "rope_dim": ROPE_DIM,
            "value_dim": VALUE_DIM,
            "theta": THETA,
            "eps": EPS,
            "softmax_scale": SOFTMAX_SCALE,
        },
    )
    new_latent, new_scale, new_rope = problem.new_entry
    return CachedOp(
        model=model,
        inputs=inputs,
        cache=cache,
        answer=problem.answer,
        slot=(0, NUM_CACHED),
        appended={"latent": new_latent, "scale": np.asarray(new_scale), "rope": new_rope},
    )


def multi_head_op(problem: MultiHeadProblem) -> CachedOp:
    """Make ``com.microsoft::GroupQueryAttention`` over a float32 cache."""
    new = {"query": problem.query, "key": problem.key, "value": problem.value}
    cache = {"key": problem.past_key, "value": problem.past_value}
    lens = {
        "seqlens_k": np.array([NUM_CACHED], np.int32),  # keys after this step, less one
        "total_sequence_length": np.array(NUM_CACHED + 1, np.int32),
    }
    past = {f"past_{part}": array for part, array in cache.items()}
    model = op_model(
        "GroupQueryAttention",
        MICROSOFT,
        names=[*new, *past, *lens],
        inputs=new | past | lens,
        constants={},
        outputs={"y": problem.query} | {f"present_{part}": a for part, a in cache.items()},
        attributes={"num_heads": NUM_HEADS, "kv_num_heads": NUM_HEADS},
    )
    return CachedOp(
        model=model,
        inputs=new | lens,
        cache=cache,
        answer=problem.answer,
        slot=(0, slice(None), NUM_CACHED),
        appended={
            "key": problem.key.reshape(NUM_HEADS, HEAD_DIM),
            "value": problem.value.reshape(NUM_HEADS, HEAD_DIM),
        },
    )
