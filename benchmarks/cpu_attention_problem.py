"""Random data for one decode step of attention, and exact answers in float64."""

from __future__ import annotations

import functools

import numpy as np
from cpu_onnx import Array

NUM_HEADS, RANK, NOPE_DIM, ROPE_DIM, VALUE_DIM = 16, 256, 32, 32, 64
HEAD_DIM = 64  # of the rival's heads: NOPE_DIM + ROPE_DIM
NUM_CACHED = 2048
CAPACITY = NUM_CACHED + 16
THETA = 10000.0
EPS = float(np.float32(1e-5))
SOFTMAX_SCALE = float(np.float32((NOPE_DIM + ROPE_DIM) ** -0.5))


class LatentProblem:
    """A full latent cache and one new token, for ``tinylm::FlashMLA``.

    Attributes:
        q: float32 [1, 1, H * (nope + P)].
        kv: float32 [1, 1, R + P].
        norm_weight: float32 [R].
        codes: int8 [H * (nope + Dv), R].
        weight_scale: float32 [H * (nope + Dv)].
        latent: int8 [1, C, R]; free slots hold what a new cache holds.
        scale: float32 [1, C].
        rope: float32 [1, C, P].
    """

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        rows = NUM_HEADS * (NOPE_DIM + VALUE_DIM)
        held = (np.arange(CAPACITY) < NUM_CACHED)[None]

        def normal(*shape: int) -> Array:
            return rng.standard_normal(shape, dtype=np.float32)

        self.q = normal(1, 1, NUM_HEADS * (NOPE_DIM + ROPE_DIM))
        self.kv = normal(1, 1, RANK + ROPE_DIM)
        self.norm_weight: Array = rng.uniform(0.5, 1.5, RANK).astype(np.float32)
        self.codes: Array = rng.integers(-1, 2, (rows, RANK), dtype=np.int8)
        self.weight_scale: Array = rng.uniform(0.05, 0.1, rows).astype(np.float32)
        latent = rng.integers(-127, 128, (1, CAPACITY, RANK), dtype=np.int8)
        self.latent: Array = latent * held[..., None].astype(np.int8)
        scale = rng.uniform(30, 60, (1, CAPACITY)).astype(np.float32)
        self.scale: Array = np.where(held, scale, np.float32(1))
        self.rope: Array = normal(1, CAPACITY, ROPE_DIM) * held[..., None].astype(np.float32)

    @functools.cached_property
    def new_entry(self) -> tuple[Array, np.float32, Array]:
        """What the new token adds to the cache: latent [R], its multiplier, rotated key [P]."""
        raw = self.kv[0, 0, :RANK]
        mean = np.mean(np.square(raw.astype(np.float64)))
        normed = raw * np.float32(1.0 / np.sqrt(mean + EPS)) * self.norm_weight
        s = np.float32(127) / max(np.abs(normed).max(), np.float32(1e-5))
        latent = np.clip(np.rint(normed * s), -128, 127).astype(np.int8)
        return latent, s, _rotate(self.kv[0, 0, RANK:])

    @functools.cached_property
    def answer(self) -> Array:
        """Expand every latent to keys and values and attend, in float64: [1, H * Dv]."""
        used = NUM_CACHED + 1
        latent, scale, rope = (a[0, :used].copy() for a in (self.latent, self.scale, self.rope))
        latent[-1], scale[-1], rope[-1] = self.new_entry
        weight = self.codes * self.weight_scale.astype(np.float64)[:, None]
        expanded = (latent.astype(np.float64) @ weight.T) / scale.astype(np.float64)[:, None]
        heads = expanded.reshape(used, NUM_HEADS, NOPE_DIM + VALUE_DIM)
        q = self.q.reshape(NUM_HEADS, NOPE_DIM + ROPE_DIM)
        found = []
        for head in range(NUM_HEADS):
            scores = heads[:, head, :NOPE_DIM] @ q[head, :NOPE_DIM].astype(np.float64)
            scores += rope.astype(np.float64) @ _rotate(q[head, NOPE_DIM:]).astype(np.float64)
            found.append(_softmax(scores * SOFTMAX_SCALE) @ heads[:, head, NOPE_DIM:])
        return np.concatenate(found)[None]


class MultiHeadProblem:
    """A full multi-head cache in float32 and one new token, for GroupQueryAttention.

    Attributes:
        query: float32 [1, 1, H * head].
        key: float32 [1, 1, H * head].
        value: float32 [1, 1, H * head].
        past_key: float32 [1, H, C, head].
        past_value: float32 [1, H, C, head].
    """

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        new, past = (1, 1, NUM_HEADS * HEAD_DIM), (1, NUM_HEADS, CAPACITY, HEAD_DIM)
        self.query: Array = rng.standard_normal(new, dtype=np.float32)
        self.key: Array = rng.standard_normal(new, dtype=np.float32)
        self.value: Array = rng.standard_normal(new, dtype=np.float32)
        self.past_key: Array = rng.standard_normal(past, dtype=np.float32)
        self.past_value: Array = rng.standard_normal(past, dtype=np.float32)

    @functools.cached_property
    def answer(self) -> Array:
        """Attend in float64: [1, H * head]."""
        split = (NUM_HEADS, HEAD_DIM)
        query, key, value = (
            a.reshape(split).astype(np.float64) for a in (self.query, self.key, self.value)
        )
        found = []
        for head in range(NUM_HEADS):
            keys = np.vstack((self.past_key[0, head, :NUM_CACHED], key[head]))
            values = np.vstack((self.past_value[0, head, :NUM_CACHED], value[head]))
            found.append(_softmax(keys @ query[head] * HEAD_DIM**-0.5) @ values)
        return np.concatenate(found)[None]


def _rotate(x: Array) -> Array:
    """Rotate one vector [P] by halves to position NUM_CACHED; angles are float32."""
    half = len(x) // 2
    frequencies = np.power(THETA, -2.0 * np.arange(half) / len(x)).astype(np.float32)
    angles = (np.float32(NUM_CACHED) * frequencies).astype(np.float64)
    cos, sin = (f(angles).astype(np.float32).astype(np.float64) for f in (np.cos, np.sin))
    a, b = x[:half].astype(np.float64), x[half:].astype(np.float64)
    return np.concatenate((a * cos - b * sin, b * cos + a * sin)).astype(np.float32)


def _softmax(scores: Array) -> Array:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()
