"""TinyLM: a decoder-only language model with ternary linear layers and latent attention.

    ids [B, S] -> embedding -> num_layers x ( + FlashMLA(RMSNorm(x)), + FeedForward(RMSNorm(x)) )
               -> RMSNorm -> head -> logits [B, S, V]

Every BitLinear input is RMS-normed: before q and kv_a, on the latent before kv_b, before o
(SubLN), before gate and up, and before down (SubLN), as in BitNet b1.58 2B4T (2504.12285).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinylm.attention import FlashMLA
from tinylm.bitlinear import BitLinear, PackedBitLinear, make_linear
from tinylm.config import Activation, ModelConfig
from tinylm.errors import ConfigError
from tinylm.fused_feed_forward import fused_feed_forward
from tinylm.int8_linear import Int8Linear
from tinylm.latent_attention import rotary_angles
from tinylm.latent_cache import LatentCache
from tinylm.losses import linear_cross_entropy, sum_loss
from tinylm.norm import RMSNorm
from tinylm.precision import inner_dtype
from tinylm.training_config import DEFAULT_LOSS_CHUNK


class FeedForward(nn.Module):
    """SwiGLU (2002.05202) over BitLinear, with SubLN before the last projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = make_linear(hidden, inner, config)
        self.up_proj = make_linear(hidden, inner, config)
        self.ffn_sub_norm = RMSNorm(inner, eps=config.norm_eps)
        self.down_proj = make_linear(inner, hidden, config)
        self.fused = False  # whether training goes through tinylm.fused_feed_forward

    def forward(self, x: Tensor) -> Tensor:
        """Apply to normed x [B, S, hidden] -> [B, S, hidden]."""
        apply = fused_feed_forward(self.gate_proj, x) if self.fused else None
        if apply is not None:
            gate, up, down = self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight
            return apply(x, gate, up, self.ffn_sub_norm.weight, down, self.ffn_sub_norm.eps)
        return self.down_proj(self.ffn_sub_norm(self.swiglu(self.gate_proj(x), self.up_proj(x))))

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return ``silu(gate) * up``: two tensors [B, S, inner] -> [B, S, inner]."""
        inner = inner_dtype(gate, training=self.training)
        return F.silu(gate.to(inner)).to(gate.dtype) * up


class DecoderLayer(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = FlashMLA(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        seq_lens: Tensor | None,
        cache: LatentCache | None,
    ) -> Tensor:
        """Apply to the residual stream x [B, S, hidden]."""
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rotary, seq_lens, cache))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class TinyLM(nn.Module):
    """A 1.58-bit language model.

    Args:
        vocab_size: Number of tokens.
        hidden_size: Width of the residual stream.
        num_layers: Number of decoder layers.
        num_heads: Number of attention heads.
        max_seq_len: Longest sequence.
        dropout: Dropout probability, in training only.
        **fields: Further fields of :class:`tinylm.config.ModelConfig`.

    Raises:
        ConfigError: A value is out of range.

    Example:
        >>> model = TinyLM(vocab_size=50257, hidden_size=768, num_layers=12, num_heads=12)
        >>> logits = model(torch.randint(0, 50257, (1, 16)))  # [1, 16, 50257]
    """

    def __init__(
        self,
        vocab_size: int = 50257,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        max_seq_len: int = 2048,
        dropout: float = 0.1,
        **fields: Any,
    ) -> None:
        super().__init__()
        self.config = config = ModelConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            max_seq_len=max_seq_len,
            dropout=dropout,
            **fields,
        )
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            head.weight = self.embed_tokens.weight
        self.lm_head: nn.Linear | Int8Linear = head
        # How to train, not what: see tinylm.performance.
        self.loss_chunk = DEFAULT_LOSS_CHUNK
        self.compiled_loss = False
        self.recompute_layers = False
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):  # BitLinear has its own
            nn.init.normal_(module.weight, std=self.config.initializer_range)

    @classmethod
    def from_config(cls, config: ModelConfig) -> TinyLM:
        """Build a model with random weights from a config."""
        values = config.to_dict()
        del values["model_type"], values["format_version"]
        return cls(**values)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> TinyLM:
        """Load a checkpoint directory, in evaluation mode.

        Args:
            directory: Holds ``model.safetensors`` and ``config.json``; a training output
                directory works too and gives its best checkpoint.

        Raises:
            CheckpointError: Missing, truncated, altered, or not fitting its config.
        """
        from tinylm.checkpoint import load_model, resolve_checkpoint

        return load_model(resolve_checkpoint(directory))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cache: LatentCache | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Compute next-token logits, or the loss where labels are given.

        Args:
            input_ids: Integer [B, S].
            attention_mask: [B, S], nonzero for real tokens; None for all real. Any pattern works:
                positions count the real tokens only.
            cache: Past tokens. The new ones are appended, and logits continue after them.
            labels: int64 [B, S], the next token at each position; -100 is ignored.

        Returns:
            With labels: their summed cross entropy in nats, a scalar in float32 or wider, for
            which the logits are never all in memory. Else logits [B, S, V], in the weights' dtype
            (autocast's under autocast). Those at masked positions mean nothing, and are finite.

        Raises:
            ValueError: Wrong shapes, or more tokens than ``max_seq_len`` or the cache holds.
        """
        x, restore = self._hidden(input_ids, attention_mask, cache)
        if restore is not None:
            x = x.gather(1, restore[:, :, None].expand_as(x))
        return self.lm_head(x) if labels is None else self._loss(x, labels)

    def _loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """Return the summed cross entropy of hidden states [B, S, hidden] and labels [B, S]."""
        if not isinstance(self.lm_head, nn.Linear):
            return sum_loss(self.lm_head(x), labels)
        return linear_cross_entropy(
            x, self.lm_head.weight, labels, chunk=self.loss_chunk, compiled=self.compiled_loss
        )

    def last_logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cache: LatentCache | None = None,
    ) -> Tensor:
        """Compute the logits after each row's last real token: [B, V].

        Takes what :meth:`forward` takes; the head runs on one position a row. Rows without any
        real token give logits that mean nothing.
        """
        x, _ = self._hidden(input_ids, attention_mask, cache)  # each row's real tokens come first
        last = x.shape[1] - 1
        if attention_mask is None:
            return self.lm_head(x[:, last])
        last_valid = (attention_mask != 0).sum(dim=1).sub(1).clamp_min(0)  # [B]
        return self.lm_head(x[torch.arange(x.shape[0], device=x.device), last_valid])

    def _hidden(
        self, input_ids: Tensor, attention_mask: Tensor | None, cache: LatentCache | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return normed hidden states [B, S, hidden] and where each original token went.

        Rows with gaps have their real tokens moved to the front; the second result undoes that
        and is None where nothing was moved.
        """
        length = self._check_input(input_ids, attention_mask, cache)
        seq_lens = order = restore = None
        if attention_mask is not None:
            seq_lens, order = _right_pad(attention_mask)
        if order is not None:
            input_ids, restore = input_ids.gather(1, order), order.argsort(dim=1)

        positions = torch.arange(length, device=input_ids.device)[None]  # [1, S]
        if cache is not None:
            cache.reserve(length)
            positions = cache.past_lens[:, None] + positions
        shape = self.config.attention_shape
        rotary = rotary_angles(positions, shape.rope_dim, shape.theta)
        x = self.dropout(self.embed_tokens(input_ids))  # [B, S, hidden]
        for layer in self.layers:
            if self.recompute_layers and torch.is_grad_enabled():
                x = checkpoint(layer, x, rotary, seq_lens, cache, use_reentrant=False)
            else:
                x = layer(x, rotary, seq_lens, cache)
        if cache is not None:
            cache.advance(length, seq_lens)
        return self.norm(x), restore

    def _check_input(
        self, input_ids: Tensor, attention_mask: Tensor | None, cache: LatentCache | None
    ) -> int:
        if input_ids.ndim != 2 or input_ids.is_floating_point():
            raise ValueError(
                f"input_ids must be integers [batch, length], "
                f"found {input_ids.dtype} {list(input_ids.shape)}."
            )
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of input_ids {list(input_ids.shape)}, "
                f"found {list(attention_mask.shape)}."
            )
        batch, length = input_ids.shape
        if cache is not None and cache.past_lens.shape[0] != batch:
            raise ValueError(
                f"the cache has {cache.past_lens.shape[0]} rows, input_ids has {batch}."
            )
        if cache is None and length > self.config.max_seq_len:
            raise ValueError(
                f"input_ids has {length} tokens, the model takes at most "
                f"max_seq_len = {self.config.max_seq_len}. Shorten the input."
            )
        return length

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        eos_token_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue a batch of prompts over the latent cache.

        Args:
            input_ids: Integer [B, S].
            attention_mask: [B, S]; padding may stand on either side.
            max_new_tokens: Most tokens to add; fewer where the context or every row ends.
            temperature: 0 takes the most probable token.
            top_k: Sample from the k most probable tokens; 0 for all.
            top_p: Sample from the smallest set of tokens with this probability.
            eos_token_id: Ends a row. Default: the config's.
            generator: Source of randomness.

        Returns:
            int64 [B, T]: each row's prompt, then its new tokens, then padding with eos.

        Raises:
            ValueError: Bad sampling values, or a prompt that fills the context.
        """
        from tinylm.generate import SamplingConfig, generate

        sampling = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
        return generate(
            self,
            input_ids,
            attention_mask,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            eos_token_id=eos_token_id,
            generator=generator,
        )

    def bit_linears(self) -> dict[str, BitLinear]:
        """Return every BitLinear by its module path, in forward order."""
        return {n: m for n, m in self.named_modules() if isinstance(m, BitLinear)}

    def pack(self) -> TinyLM:
        """Replace every BitLinear by its 2-bit form, in place, and return the model.

        The model is for inference from then on; its float32 logits stay the same bit for bit.

        Raises:
            ConfigError: The model is a dense twin.
        """
        if self.config.dense:
            raise ConfigError("a dense model has no ternary weights to pack. Train one without it.")
        for name, layer in self.bit_linears().items():
            parent, _, child = name.rpartition(".")
            setattr(self.get_submodule(parent), child, PackedBitLinear.from_bit_linear(layer))
        return self.eval()

    def quantize_head(self) -> TinyLM:
        """Replace the head by its int8 form, in place, and return the model.

        The model is for inference from then on. The embedding stays float32, tied or not.
        """
        if isinstance(self.lm_head, nn.Linear):
            self.lm_head = Int8Linear.from_linear(self.lm_head)
        return self.eval()

    def set_attention_backend(self, name: str) -> None:
        """Choose the attention back end: auto, flash, cudnn, sdpa or plain.

        Raises:
            ConfigError: No back end has that name.
        """
        from tinylm.attention_backends import DEFAULT_CHAIN

        if name != "auto" and name not in DEFAULT_CHAIN.names():
            raise ConfigError(
                f"attention backend must be auto or one of {', '.join(DEFAULT_CHAIN.names())}, "
                f"found {name!r}."
            )
        for layer in self.layers:
            layer.get_submodule("self_attn").backend = name  # type: ignore[assignment]

    def set_quantizers(self, name: str) -> None:
        """Choose who does what lies around the products: torch or triton.

        Args:
            name: What :func:`tinylm.quantizer_passes.choose_quantizers` returned.
        """
        for module in self.modules():
            if isinstance(module, BitLinear):
                module.quantizers = name
            elif isinstance(module, FeedForward):
                module.fused = name == "triton"

    def set_activation(self, activation: Activation) -> None:
        """Choose the number format of activations; the latent stays int8.

        Raises:
            ConfigError: Unknown format.
        """
        self.config = self.config.replace(activation=activation)
        for name, layer in self.named_modules():
            if isinstance(layer, (BitLinear, PackedBitLinear)) and not name.endswith("kv_b_proj"):
                layer.activation = activation

    def num_parameters(self) -> int:
        """Return the number of parameters, shared ones once."""
        return sum(p.numel() for p in self.parameters())


def _right_pad(attention_mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Turn a mask [B, S] into row lengths [B] and, if rows have gaps, the order that closes them.

    A causal model never looks to the right, so right-padded rows need no mask. Any other mask is
    served by moving the real tokens of each row to its front and the result back.
    """
    valid = attention_mask != 0
    seq_lens = valid.sum(dim=1)
    columns = torch.arange(valid.shape[1], device=valid.device)
    if bool((valid == (columns < seq_lens[:, None])).all()):
        return seq_lens, None
    return seq_lens, (~valid).int().argsort(dim=1, stable=True)
