"""The latent cache behind transformers' cache interface."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache

from tinylm.config import ModelConfig
from tinylm.latent_cache import LatentCache

_FIRST_CAPACITY = 64


class TinyLMCache(Cache):
    """Latents of a batch that grow as tokens come.

    transformers counts columns, padding included; TinyLM stores each row's real tokens one after
    the other. This class keeps both counts.

    Args:
        config: The model's configuration.

    Attributes:
        latents: The cache that the model reads and writes; None until there are tokens.
        real: bool [B, columns], which of the columns so far are real tokens.
    """

    def __init__(self, config: ModelConfig) -> None:
        # Not the base class's __init__: it makes a list of key-value layers.
        self.layers = []
        self.config = config
        self.latents: LatentCache | None = None
        self.real = torch.zeros(0, 0, dtype=torch.bool)

    def __len__(self) -> int:
        """Return the number of layers."""
        return self.config.num_layers

    def __repr__(self) -> str:
        """Describe the cache."""
        rows, columns = self.real.shape
        size = 0 if self.latents is None else self.latents.num_bytes()
        return f"TinyLMCache({rows} rows, {columns} columns, {size} bytes)"

    def make_room(self, batch_size: int, num_new: int, like: Tensor) -> LatentCache:
        """Grow, if need be, for ``num_new`` more tokens in every row.

        Args:
            batch_size: Rows of the coming step.
            num_new: Columns of the coming step.
            like: A tensor on the model's device, in the dtype of its activations.

        Returns:
            ``latents``.

        Raises:
            ValueError: The model's context has no room for them.
        """
        context = self.config.max_seq_len
        past = 0
        if self.latents is not None:
            past = self.latents.longest  # an upper bound, known without asking the device
            if past + num_new > self.latents.capacity:
                past = self.latents.longest = int(self.latents.past_lens.max())
        if past + num_new > context:
            raise ValueError(
                f"the context holds max_seq_len = {context} tokens, and {past + num_new} are "
                "needed. Shorten the prompt or ask for fewer new tokens."
            )
        if self.latents is None:
            capacity = min(context, max(_FIRST_CAPACITY, num_new))
            self.latents = LatentCache(
                self.config, batch_size, capacity, device=like.device, dtype=like.dtype
            )
            self.real = torch.zeros(batch_size, 0, dtype=torch.bool, device=like.device)
        elif past + num_new > self.latents.capacity:
            self.latents.grow(min(context, max(past + num_new, 2 * self.latents.capacity)))
        return self.latents

    def count(self, real: Tensor) -> None:
        """Note which of the newest columns were real tokens, bool [B, S]."""
        self.real = torch.cat((self.real, real), dim=1)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of columns so far, padding included."""
        return self.real.shape[1]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return the model's context."""
        return self.config.max_seq_len

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Return the model's context, under the name that earlier versions of transformers use."""
        return self.config.max_seq_len

    def reset(self) -> None:
        """Forget everything."""
        self.latents, self.real = None, self.real[:0, :0]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take rows in another order, int64 [any]; some may repeat, as in beam search."""
        if self.latents is not None:
            self.latents.select_rows(beam_idx)
            self.real = self.real[beam_idx.to(self.real.device)]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, int64 [any]."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        rows = torch.arange(self.real.shape[0], device=self.real.device)
        self.reorder_cache(rows.repeat_interleave(repeats))

    def crop(self, length: int) -> None:
        """Keep the first ``length`` columns, or drop the last ``-length`` if it is not positive."""
        columns = self.real.shape[1]
        kept = min(columns, length) if length > 0 else max(0, columns + length)
        if self.latents is not None:
            self.latents.drop_last(self.real[:, kept:].sum(dim=1))
        self.real = self.real[:, :kept]

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.real.shape[0]

    @property
    def is_initialized(self) -> bool:
        """Whether the tensors exist."""
        return self.latents is not None

    @property
    def is_compileable(self) -> bool:
        """Whether a compiled step can use it; no, because it grows."""
        return False

    @property
    def is_croppable(self) -> bool:
        """Whether :meth:`crop` restores an earlier state exactly."""
        return True

    @property
    def is_sliding(self) -> list[bool]:
        """Per layer: no sliding window."""
        return [False] * len(self)

    @property
    def is_linear(self) -> list[bool]:
        """Per layer: no linear attention."""
        return [False] * len(self)

    @property
    def is_dummy(self) -> list[bool]:
        """Per layer: none is empty."""
        return [False] * len(self)
