"""The arithmetic of latent attention, as functions of tensors.

Source: DeepSeek-V2 (2405.04434), section 2.1; RoPE (2104.09864). Letters in shape comments:
B rows, S new tokens, T visible tokens, H heads, R latent rank, P rope width, Dv value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinylm.attention_backends import DEFAULT_CHAIN, visible_keys
from tinylm.config import AttentionShape
from tinylm.quantization import dequantize


def rotary_angles(positions: Tensor, rope_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the rotary angles.

    Frequencies and angles are float32; :mod:`tinylm.precision` says why the rest is float64.

    Args:
        positions: Integer [B, S] or [1, S].
        rope_dim: P, even.
        theta: Base of the frequencies.

    Returns:
        Two float32 tensors [B or 1, S, P / 2].
    """
    exponents = torch.arange(0, rope_dim, 2, dtype=torch.float64, device=positions.device)
    frequencies = torch.pow(theta, -exponents / rope_dim).float()
    angles = (positions[..., None].float() * frequencies).double()
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate by halves: the pair of dimension i is i + P/2, as in Llama.

    Args:
        x: [B, S, ..., P].
        cos: Broadcast against [B, S, ..., P / 2].
        sin: As ``cos``.

    Returns:
        [B, S, ..., P] in the dtype that x and cos promote to.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def split_query(
    q: Tensor, rotary: tuple[Tensor, Tensor], shape: AttentionShape
) -> tuple[Tensor, Tensor]:
    """Split [B, S, H * (nope + P)] into heads and rotate the second part of each.

    Args:
        q: [B, S, H * (nope + P)].
        rotary: cos and sin [B or 1, S, P / 2], in the dtype to rotate in.
        shape: Head sizes.

    Returns:
        q_nope [B, S, H, nope] and q_rope [B, S, H, P], in q's dtype.
    """
    q = q.unflatten(-1, (shape.num_heads, shape.qk_dim))
    q_nope, q_rope = q.split([shape.nope_dim, shape.rope_dim], dim=-1)
    cos, sin = (angle[:, :, None] for angle in rotary)
    return q_nope, rotate(q_rope, cos, sin).to(q.dtype)


def attend_heads(
    q_nope: Tensor,
    q_rope: Tensor,
    kv_b: Tensor,
    k_rope: Tensor,
    past_lens: Tensor | None,
    shape: AttentionShape,
    *,
    backend: str = "auto",
) -> Tensor:
    """Attend with keys and values of every head.

    Args:
        q_nope: [B, S, H, nope].
        q_rope: [B, S, H, P].
        kv_b: [B, T, H * (nope + Dv)], the expanded latent.
        k_rope: [B, T, P], shared by the heads.
        past_lens: Integer [B], tokens before the first query; None for none.
        shape: Head sizes.
        backend: Attention back end to begin with.

    Returns:
        [B, S, H, Dv].
    """
    kv_b = kv_b.unflatten(-1, (shape.num_heads, shape.nope_dim + shape.value_dim))
    k_nope, v = kv_b.split([shape.nope_dim, shape.value_dim], dim=-1)
    k_rope = k_rope[:, :, None].expand(-1, -1, shape.num_heads, -1).to(k_nope.dtype)
    return DEFAULT_CHAIN.attend(
        torch.cat((q_nope, q_rope), dim=-1),
        torch.cat((k_nope, k_rope), dim=-1),
        v,
        scale=shape.softmax_scale,
        past_lens=past_lens,
        first=backend,
    )


def attend_expanded(
    q_nope: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    s: Tensor,
    k_rope: Tensor,
    codes: Tensor,
    weight_scale: Tensor,
    past_lens: Tensor,
    shape: AttentionShape,
    *,
    backend: str = "auto",
) -> Tensor:
    """Attend over cached latents, expanding each to keys and values through kv_b.

    Args:
        q_nope: [B, S, H, nope].
        q_rope: [B, S, H, P].
        latent: Integers [B, T, R] in a floating dtype, which the sums are carried in.
        s: float32 [B, T], the latents' multiplier.
        k_rope: [B, T, P].
        codes: Ternary codes of kv_b [H * (nope + Dv), R], in the latent's dtype.
        weight_scale: float32 scalar or [H * (nope + Dv)].
        past_lens: Integer [B].
        shape: Head sizes.
        backend: Attention back end to begin with.

    Returns:
        [B, S, H, Dv].
    """
    kv_b = dequantize(latent @ codes.t(), weight_scale, s[..., None]).to(q_nope.dtype)
    return attend_heads(q_nope, q_rope, kv_b, k_rope, past_lens, shape, backend=backend)


def attend_absorbed(
    q_nope: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    s: Tensor,
    k_rope: Tensor,
    codes: Tensor,
    weight_scale: Tensor,
    past_lens: Tensor,
    shape: AttentionShape,
) -> Tensor:
    """Attend in the latent space, with kv_b absorbed into the query and the output.

    ``score = (W_uk^T q) . c_t / s_t + q_rope . k_rope_t``, and W_uv after the weighted sum
    (DeepSeek-V2, section 2.1.2). Takes and returns what :func:`attend_expanded` does; the same
    sums in another order, with no per-head key or value of a past token.
    """
    inner = latent.dtype
    w_uk, w_uv = (
        (codes * weight_scale.reshape(-1, 1))
        .unflatten(0, (shape.num_heads, shape.nope_dim + shape.value_dim))
        .split([shape.nope_dim, shape.value_dim], dim=1)
    )  # [H, nope, R], [H, Dv, R]
    q_latent = torch.einsum("bshd,hdr->bshr", q_nope.to(inner), w_uk)
    scores = torch.einsum("bshr,btr->bhst", q_latent, latent) / s[:, None, None]
    scores = scores + torch.einsum("bshp,btp->bhst", q_rope.to(inner), k_rope.to(inner))
    visible = visible_keys(q_nope.shape[1], latent.shape[1], past_lens)[:, None]
    scores = (scores * shape.softmax_scale).masked_fill(~visible, float("-inf"))
    weights = scores.softmax(dim=-1) / s[:, None, None]  # [B, H, S, T]
    y_latent = torch.einsum("bhst,btr->bshr", weights, latent)
    return torch.einsum("bshr,hdr->bshd", y_latent, w_uv).to(q_nope.dtype)
