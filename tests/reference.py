"""The model's arithmetic in NumPy, written from the formulas and sharing no code with tinylm.

Slow and plain: one row at a time, no cache, no batches. Sums are float64 or exact; values are
rounded to float32 where the design says so (after norms, projections, attention, SwiGLU).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
F32 = np.float32


def ternarize(weight: Array) -> tuple[Array, np.float32]:
    """Return codes int64 and scale: scale = max(mean|W|, 1e-5), clamp(round(W / scale), -1, 1)."""
    mean = math.fsum(abs(float(w)) for w in weight.ravel()) / weight.size
    scale = max(F32(mean), F32(1e-5))
    return np.clip(np.rint(weight.astype(F32) / scale), -1, 1).astype(np.int64), scale


def round_to_e4m3(x: Array) -> Array:
    """Round |x| <= 448 to 1 sign, 4 exponent, 3 mantissa bits; bias 7, subnormals, half to even."""
    x = x.astype(np.float64)
    _, exponent = np.frexp(x)  # |x| = mantissa * 2**exponent, mantissa in [0.5, 1)
    step = np.exp2(np.maximum(exponent - 1, -6) - 3)
    return np.rint(x / step) * step


def quantize_activation(x: Array, activation: str) -> tuple[Array, Array]:
    """Return q (float64, exact) and s (float32 [..., 1]) of each row."""
    x = x.astype(F32)
    absmax = np.maximum(np.abs(x).max(axis=-1, keepdims=True), F32(1e-5))
    if activation == "int8":
        s = F32(127) / absmax
        return np.clip(np.rint(x * s), -128, 127).astype(np.float64), s
    s = F32(448) / absmax
    return round_to_e4m3(np.clip(x * s, F32(-448), F32(448))), s


def bit_linear(x: Array, weight: Array, activation: str, *, dtype: Any = F32) -> Array:
    """y = (q . code) * scale / s, the sum rounded to float32 once, the scaling in ``dtype``."""
    codes, scale = ternarize(weight)
    q, s = quantize_activation(x, activation)
    accumulator = (q @ codes.T.astype(np.float64)).astype(F32)  # exact in float64
    return accumulator.astype(dtype) * dtype(scale) / s.astype(dtype)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """(x * r) * weight with r = 1 / sqrt(mean(x^2) + eps) rounded to float32."""
    mean = np.mean(np.square(x.astype(np.float64)), axis=-1, keepdims=True)
    r = (1.0 / np.sqrt(mean + float(F32(eps)))).astype(F32)
    return x.astype(F32) * r * weight.astype(F32)


def rotate(x: Array, theta: float) -> Array:
    """Rotate row t of x [S, P] by t * theta^(-2i/P): the pair of dimension i is i + P/2."""
    length, width = x.shape
    half = width // 2
    frequencies = np.power(theta, -2.0 * np.arange(half) / width).astype(F32)
    angles = (np.arange(length, dtype=F32)[:, None] * frequencies).astype(np.float64)
    cos = np.cos(angles).astype(F32).astype(np.float64)
    sin = np.sin(angles).astype(F32).astype(np.float64)
    a, b = x[:, :half].astype(np.float64), x[:, half:].astype(np.float64)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=1).astype(F32)


def attention(x: Array, weights: dict[str, Array], prefix: str, config: Any) -> Array:
    """FlashMLA on normed x [S, hidden]: the input of SubLN, [S, H * value]."""

    def w(name: str) -> Array:
        return weights[f"{prefix}.{name}.weight"]

    heads, nope, rope, value = (
        config.num_heads,
        config.nope_dim,
        config.rope_dim,
        config.value_dim,
    )
    length, rank = x.shape[0], config.latent_rank
    q = bit_linear(x, w("q_proj"), config.activation)
    kv = bit_linear(x, w("kv_a_proj"), config.activation)
    latent = rms_norm(kv[:, :rank], w("kv_a_layernorm"), config.norm_eps)
    k_rope = rotate(kv[:, rank:], config.rope_theta).astype(np.float64)
    kv_b = bit_linear(latent, w("kv_b_proj"), "int8", dtype=np.float64)
    scale = float(F32(1.0 / math.sqrt(nope + rope)))
    y = np.zeros((length, heads * value), dtype=F32)
    for head in range(heads):
        q_head = q[:, head * (nope + rope) : (head + 1) * (nope + rope)]
        q_rope = rotate(q_head[:, nope:], config.rope_theta).astype(np.float64)
        kv_head = kv_b[:, head * (nope + value) : (head + 1) * (nope + value)]
        for t in range(length):
            scores = kv_head[: t + 1, :nope] @ q_head[t, :nope].astype(np.float64)
            scores = (scores + k_rope[: t + 1] @ q_rope[t]) * scale
            p = np.exp(scores - scores.max())
            y[t, head * value : (head + 1) * value] = (p / p.sum()) @ kv_head[: t + 1, nope:]
    return y


def feed_forward(x: Array, weights: dict[str, Array], prefix: str, config: Any) -> Array:
    """SwiGLU with SubLN on normed x [S, hidden]."""
    act = config.activation
    gate = bit_linear(x, weights[f"{prefix}.gate_proj.weight"], act).astype(np.float64)
    up = bit_linear(x, weights[f"{prefix}.up_proj.weight"], act)
    inner = (gate / (1.0 + np.exp(-gate))).astype(F32) * up
    inner = rms_norm(inner, weights[f"{prefix}.ffn_sub_norm.weight"], config.norm_eps)
    return bit_linear(inner, weights[f"{prefix}.down_proj.weight"], act)


def hidden_states(ids: list[int], weights: dict[str, Array], config: Any) -> Array:
    """Return the head's input, float32 [S, hidden], of one row of tokens."""
    x = weights["embed_tokens.weight"][ids]
    for i in range(config.num_layers):
        layer = f"layers.{i}"
        h = rms_norm(x, weights[f"{layer}.input_layernorm.weight"], config.norm_eps)
        y = attention(h, weights, f"{layer}.self_attn", config)
        y = rms_norm(y, weights[f"{layer}.self_attn.attn_sub_norm.weight"], config.norm_eps)
        x = x + bit_linear(y, weights[f"{layer}.self_attn.o_proj.weight"], config.activation)
        h = rms_norm(x, weights[f"{layer}.post_attention_layernorm.weight"], config.norm_eps)
        x = x + feed_forward(h, weights, f"{layer}.mlp", config)
    return rms_norm(x, weights["norm.weight"], config.norm_eps)
