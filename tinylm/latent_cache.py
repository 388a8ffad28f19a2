"""The latent cache: what FlashMLA keeps of past tokens.

A token takes, per layer, ``latent_rank`` bytes of int8 latent, one float32 scale and ``rope_dim``
values of rotated key. The latent is the very vector that kv_b's quantiser produces, so a cached
token gives the same keys and values as one that is computed anew.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinylm.config import ModelConfig


class LatentCache:
    """Cached latents of a batch; rows fill independently.

    Args:
        config: The model's configuration.
        batch_size: B.
        capacity: C, most tokens a row can hold, at most ``config.max_seq_len``.
        device: Where the tensors live.
        dtype: dtype of the rotated key.

    Attributes:
        latent: int8 [L, B, C, R].
        scale: float32 [L, B, C], the quantiser's multiplier s: ``latent / scale`` is the latent.
        rope: ``dtype`` [L, B, C, P], the rotated key shared by all heads.
        past_lens: int64 [B], tokens each row holds.

    Raises:
        ValueError: ``capacity`` exceeds the model's context.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        capacity: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if capacity > config.max_seq_len:
            raise ValueError(
                f"a cache of {capacity} tokens a row was asked for, the model takes at most "
                f"max_seq_len = {config.max_seq_len}."
            )
        shape = (config.num_layers, batch_size, capacity)
        self.capacity = capacity
        self.latent = torch.zeros(*shape, config.latent_rank, dtype=torch.int8, device=device)
        # Ones, not zeros: an empty slot then divides to 0 rather than to NaN.
        self.scale = torch.ones(shape, dtype=torch.float32, device=device)
        self.rope = torch.zeros(*shape, config.rope_dim, dtype=dtype, device=device)
        self.past_lens = torch.zeros(batch_size, dtype=torch.int64, device=device)
        # Upper bound of past_lens, kept on the host so that no step waits for the device.
        self.longest = 0

    @classmethod
    def from_tensors(
        cls, latent: Tensor, scale: Tensor, rope: Tensor, past_lens: Tensor
    ) -> LatentCache:
        """Wrap one layer's tensors, without a copy.

        Args:
            latent: int8 [B, C, R].
            scale: float32 [B, C].
            rope: [B, C, P].
            past_lens: Integer [B].
        """
        cache = cls.__new__(cls)
        cache.capacity = latent.shape[1]
        cache.latent, cache.scale, cache.rope = latent[None], scale[None], rope[None]
        cache.past_lens = past_lens.long()
        cache.longest = int(past_lens.max())
        return cache

    def num_bytes(self) -> int:
        """Return the bytes the cached tensors take."""
        return sum(t.numel() * t.element_size() for t in (self.latent, self.scale, self.rope))

    def grow(self, capacity: int) -> None:
        """Make room for ``capacity`` tokens a row; what is cached stays. Never shrinks."""
        more = capacity - self.capacity
        if more <= 0:
            return
        self.latent, self.scale, self.rope = (
            torch.cat((old, old.new_full((*old.shape[:2], more, *old.shape[3:]), empty)), dim=2)
            for old, empty in ((self.latent, 0), (self.scale, 1), (self.rope, 0))
        )
        self.capacity = capacity

    def select_rows(self, rows: Tensor) -> None:
        """Keep these rows in this order, int64 [any]; a row may come up more than once."""
        rows = rows.to(self.past_lens.device)
        self.latent, self.scale, self.rope = (
            t.index_select(1, rows) for t in (self.latent, self.scale, self.rope)
        )
        self.past_lens = self.past_lens[rows]

    def drop_last(self, counts: Tensor) -> None:
        """Forget each row's last tokens, integer [B]."""
        self.past_lens = self.past_lens - counts.to(self.past_lens.device)
        self.longest = int(self.past_lens.max())

    def reserve(self, num_new: int) -> None:
        """Check that ``num_new`` more tokens fit into every row.

        Raises:
            ValueError: They do not; names the capacity and what was asked for.
        """
        if self.longest + num_new > self.capacity:
            self.longest = int(self.past_lens.max())
        if self.longest + num_new > self.capacity:
            raise ValueError(
                f"the cache holds {self.capacity} tokens a row, {self.longest} are taken and "
                f"{num_new} more were given. Make the cache larger or the input shorter."
            )

    def append(
        self, layer: int, latent: Tensor, scale: Tensor, rope: Tensor, seq_lens: Tensor | None
    ) -> None:
        """Write one layer's new tokens behind each row's past; call :meth:`advance` after the last.

        Args:
            layer: Layer index.
            latent: [B, S, R], integers in int8's range.
            scale: float32 [B, S].
            rope: [B, S, P].
            seq_lens: int64 [B], valid new tokens of each row; None for all S.

        The cache holds values only: no gradient flows into a cached token.
        """
        scale, rope = scale.detach(), rope.detach()
        batch, length = scale.shape
        steps = torch.arange(length, device=scale.device)
        rows = torch.arange(batch, device=scale.device)[:, None].expand(batch, length)
        slots = self.past_lens[:, None] + steps  # [B, S]
        if seq_lens is not None:
            valid = steps < seq_lens[:, None]
            rows, slots = rows[valid], slots[valid]
            latent, scale, rope = latent[valid], scale[valid], rope[valid]
        self.latent[layer, rows, slots] = latent.to(torch.int8)
        self.scale[layer, rows, slots] = scale
        self.rope[layer, rows, slots] = rope.to(self.rope.dtype)

    def read(self, layer: int, num_new: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return one layer's latent, scale and rope key up to the newest token, [B, T, ...]."""
        used = self.longest + num_new
        return (
            self.latent[layer, :, :used],
            self.scale[layer, :, :used],
            self.rope[layer, :, :used],
        )

    def advance(self, num_new: int, seq_lens: Tensor | None) -> None:
        """Count the tokens that every layer has appended."""
        self.past_lens = self.past_lens + (num_new if seq_lens is None else seq_lens)
        self.longest += num_new
