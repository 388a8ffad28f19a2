"""Generation: one loop for every runtime that can do a cached step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from tinylm.errors import ConfigError
from tinylm.latent_cache import LatentCache

if TYPE_CHECKING:
    from tinylm.config import ModelConfig
    from tinylm.model import TinyLM


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen.

    Attributes:
        temperature: Divides the logits; 0 takes the most probable token.
        top_k: Keep the k most probable tokens; 0 keeps all.
        top_p: Keep the smallest set of tokens with at least this probability.

    Raises:
        ConfigError: A value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0.0:
            raise ConfigError(f"temperature must be 0 or more, found {self.temperature}.")
        if self.top_k < 0:
            raise ConfigError(f"top_k must be 0 or more, found {self.top_k}.")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p must be in (0, 1], found {self.top_p}.")


def sample(
    logits: Tensor, sampling: SamplingConfig, generator: torch.Generator | None = None
) -> Tensor:
    """Choose one token a row.

    Args:
        logits: [B, V].
        sampling: How to choose.
        generator: Source of randomness.

    Returns:
        int64 [B].
    """
    if sampling.temperature == 0.0:
        return logits.argmax(dim=-1)
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest_kept = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, float("-inf"))
    if sampling.top_p < 1.0:
        ordered, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        # A token stays if the probability before it is below top_p, so the first always stays.
        dropped = ordered.cumsum(dim=-1) - ordered >= sampling.top_p
        logits = logits.masked_fill(dropped.gather(-1, order.argsort(dim=-1)), float("-inf"))
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(-1)


class Session(Protocol):
    """A runtime that holds a cache for a batch of rows and does one step at a time."""

    config: ModelConfig

    def start(self, batch_size: int, capacity: int) -> None:
        """Make an empty cache of ``capacity`` tokens for each of ``batch_size`` rows."""

    def step(self, input_ids: Tensor, seq_lens: Tensor) -> Tensor:
        """Append tokens and return the logits after each row's last one.

        Args:
            input_ids: int64 [B, S], right-padded.
            seq_lens: int64 [B], valid tokens of each row; 0 leaves a row as it is.

        Returns:
            float32 [B, V]; meaningless for rows with ``seq_lens`` 0. Exports with all logits give
            [B, S, V]: see :func:`last_logits`.
        """


def last_logits(logits: Tensor, seq_lens: Tensor) -> Tensor:
    """Return the logits [B, V] after each row's last token, out of those that a step gave.

    Args:
        logits: [B, V], or [B, S, V] of a graph that gives every position's.
        seq_lens: int64 [B], valid tokens of each row.
    """
    if logits.ndim == 2:
        return logits
    last = (seq_lens - 1).clamp_min(0).to(logits.device)
    return logits[torch.arange(len(logits), device=logits.device), last]


class TorchSession:
    """Cached steps of a PyTorch model.

    Args:
        model: The model; switched to evaluation mode.
    """

    def __init__(self, model: TinyLM) -> None:
        self.model = model.eval()
        self.config = model.config
        self._cache: LatentCache | None = None

    def start(self, batch_size: int, capacity: int) -> None:
        """Make an empty cache."""
        weight = self.model.embed_tokens.weight
        self._cache = LatentCache(
            self.config, batch_size, capacity, device=weight.device, dtype=weight.dtype
        )

    @torch.no_grad()
    def step(self, input_ids: Tensor, seq_lens: Tensor) -> Tensor:
        """Append tokens [B, S] and return the logits [B, V] after each row's last one."""
        if self._cache is None:
            raise RuntimeError("call start() before step()")
        device = self.model.embed_tokens.weight.device
        input_ids, seq_lens = input_ids.to(device), seq_lens.to(device)
        mask = torch.arange(input_ids.shape[1], device=device) < seq_lens[:, None]
        return self.model.last_logits(input_ids, mask, cache=self._cache).float()


def stream(
    session: Session,
    input_ids: Tensor,
    seq_lens: Tensor,
    *,
    max_new_tokens: int,
    sampling: SamplingConfig | None = None,
    eos_token_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Generate token by token.

    Args:
        session: Any runtime.
        input_ids: int64 [B, S], right-padded prompts.
        seq_lens: int64 [B], prompt lengths, each at least 1.
        max_new_tokens: Most tokens to yield; fewer where the context ends.
        sampling: How tokens are chosen; default greedy.
        eos_token_id: Ends a row; None never ends one.
        generator: Source of randomness.

    Yields:
        int64 [B]: each row's next token; rows that have ended repeat ``eos_token_id``. Ends when
        every row has.

    Raises:
        ValueError: An empty prompt, or one that leaves no room in the context.
    """
    sampling = sampling or SamplingConfig()
    longest, shortest = int(seq_lens.max()), int(seq_lens.min())
    context = session.config.max_seq_len
    if shortest < 1:
        raise ValueError(
            f"row {int(seq_lens.argmin())} has an empty prompt; give at least one token, "
            "such as the beginning-of-sequence token."
        )
    if longest >= context:
        raise ValueError(
            f"the prompt has {longest} tokens, and the context of {context} must hold at least "
            "one more. Shorten the prompt."
        )
    max_new_tokens = min(max_new_tokens, context - longest)
    session.start(input_ids.shape[0], longest + max_new_tokens)
    running = torch.ones_like(seq_lens, dtype=torch.bool)
    tokens, lens = input_ids[:, :longest], seq_lens
    for step in range(max_new_tokens):
        logits = last_logits(session.step(tokens, lens), lens)
        chosen = sample(logits, sampling, generator).to(running.device)
        if eos_token_id is not None:
            chosen = torch.where(running, chosen, eos_token_id)
            running = running & (chosen != eos_token_id)
        yield chosen
        if step + 1 == max_new_tokens or not bool(running.any()):
            return
        tokens, lens = chosen[:, None], running.to(seq_lens.dtype)


def generate(
    model: TinyLM,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    *,
    max_new_tokens: int,
    sampling: SamplingConfig,
    eos_token_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Generate whole sequences; see :meth:`tinylm.model.TinyLM.generate`."""
    batch, length = input_ids.shape
    valid = torch.ones_like(input_ids) if attention_mask is None else (attention_mask != 0).long()
    seq_lens = valid.sum(dim=1)
    prompts = input_ids.gather(1, (1 - valid).argsort(dim=1, stable=True))  # right-padded
    if eos_token_id is None:
        eos_token_id = model.config.eos_token_id
    was_training = model.training
    try:
        steps = list(
            stream(
                TorchSession(model),
                prompts,
                seq_lens,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                eos_token_id=eos_token_id,
                generator=generator,
            )
        )
    finally:
        model.train(was_training)
    filler = 0 if eos_token_id is None else eos_token_id
    out = input_ids.new_full((batch, length + len(steps)), filler)
    for row, count in enumerate(seq_lens.tolist()):
        out[row, :count] = prompts[row, :count]
        for i, tokens in enumerate(steps):
            out[row, count + i] = tokens[row]
    return out[:, : int(seq_lens.max()) + len(steps)]
