"""FlashMLA: causal multi-head latent attention with a decoupled rotary part.

Source: DeepSeek-V2 (2405.04434), section 2.1, with BitLinear projections and an int8 latent.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tinylm.bitlinear import make_linear
from tinylm.config import Activation, ModelConfig
from tinylm.latent_attention import (
    attend_absorbed,
    attend_expanded,
    attend_heads,
    rotate,
    split_query,
)
from tinylm.latent_cache import LatentCache
from tinylm.norm import RMSNorm
from tinylm.precision import inner_dtype
from tinylm.quantization import quantize_activation

# The latent is what the cache holds, so its format does not follow ``ModelConfig.activation``.
LATENT_ACTIVATION: Activation = "int8"


class FlashMLA(nn.Module):
    """Multi-head latent attention over BitLinear projections.

    Args:
        config: The model's configuration.
        layer: Index of this layer in the cache.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.shape = shape = config.attention_shape
        self.latent_rank = config.latent_rank
        self.layer = layer
        self.backend = "auto"
        hidden = config.hidden_size
        q_width = shape.num_heads * shape.qk_dim
        kv_b_width = shape.num_heads * (shape.nope_dim + shape.value_dim)
        o_width = shape.num_heads * shape.value_dim
        self.q_proj = make_linear(hidden, q_width, config)
        self.kv_a_proj = make_linear(hidden, self.latent_rank + shape.rope_dim, config)
        self.kv_a_layernorm = RMSNorm(self.latent_rank, eps=config.norm_eps)
        self.kv_b_proj = make_linear(
            self.latent_rank, kv_b_width, config, activation=LATENT_ACTIVATION
        )
        self.attn_sub_norm = RMSNorm(o_width, eps=config.norm_eps)
        self.o_proj = make_linear(o_width, hidden, config)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        seq_lens: Tensor | None = None,
        cache: LatentCache | None = None,
    ) -> Tensor:
        """Attend: normed x [B, S, hidden] -> [B, S, hidden].

        Args:
            x: RMS-normed input [B, S, hidden].
            rotary: cos and sin, float32 [B or 1, S, P / 2].
            seq_lens: int64 [B], valid tokens of each right-padded row; None for all S.
            cache: Past tokens; the new ones are appended.
        """
        y = self.attend(self.q_proj(x), self.kv_a_proj(x), rotary, seq_lens, cache)
        return self.o_proj(self.attn_sub_norm(y))

    def attend(
        self,
        q: Tensor,
        kv: Tensor,
        rotary: tuple[Tensor, Tensor],
        seq_lens: Tensor | None = None,
        cache: LatentCache | None = None,
    ) -> Tensor:
        """Do what the op ``tinylm::FlashMLA`` covers, between the projections.

        Args:
            q: [B, S, H * (nope + P)].
            kv: [B, S, R + P], latent and rope key before norm and rotation.
            rotary: As in :meth:`forward`.
            seq_lens: As in :meth:`forward`.
            cache: As in :meth:`forward`.

        Returns:
            [B, S, H * Dv] in q's dtype; zeros at positions past ``seq_lens``.
        """
        dtype, length = q.dtype, q.shape[1]
        inner = inner_dtype(q, training=self.training)
        # float64 where inference must not depend on the order of summation, else q's own dtype.
        wide = inner if inner == torch.float64 else dtype
        cos, sin = (angle.to(inner) for angle in rotary)
        q_nope, q_rope = split_query(q, (cos, sin), self.shape)
        q_nope, q_rope = q_nope.to(wide), q_rope.to(wide)
        latent, k_rope = kv.split([self.latent_rank, self.shape.rope_dim], dim=-1)
        latent = self.kv_a_layernorm(latent)  # [B, S, R]
        k_rope = rotate(k_rope, cos, sin).to(dtype)  # [B, S, P]

        if cache is None:
            kv_b = self.kv_b_proj(latent, out_dtype=wide)
            y = attend_heads(q_nope, q_rope, kv_b, k_rope, None, self.shape, backend=self.backend)
        else:
            codes, s = quantize_activation(latent, LATENT_ACTIVATION)
            cache.append(self.layer, codes, s.squeeze(-1), k_rope, seq_lens)
            y = self._attend_cache(q_nope, q_rope, cache, inner)
        y = y.to(dtype)  # [B, S, H, Dv]
        if seq_lens is not None:
            valid = torch.arange(length, device=y.device) < seq_lens[:, None]
            y = y.masked_fill(~valid[:, :, None, None], 0.0)
        return y.flatten(2)

    def _attend_cache(
        self, q_nope: Tensor, q_rope: Tensor, cache: LatentCache, inner: torch.dtype
    ) -> Tensor:
        """Attend over the cache: absorbed for one new token, expanded for more."""
        length = q_nope.shape[1]
        latent, s, k_rope = cache.read(self.layer, length)
        kv_b = self.kv_b_proj.weight_codes(inner)
        args = (q_nope, q_rope, latent.to(inner), s, k_rope, *kv_b, cache.past_lens, self.shape)
        if length == 1:
            return attend_absorbed(*args)
        return attend_expanded(*args, backend=self.backend)
