"""Small models with nothing trivial in them, random ragged batches, and views into a model."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinylm import TinyLM, preset
from tinylm.latent_cache import LatentCache

ACTIVATIONS = ("int8", "fp8_e4m3")


def make_model(seed: int = 0, **changes: Any) -> TinyLM:
    """Make a tinylm-test model for inference.

    Norm weights are uniform in 0.5 .. 1.5 and weights are large enough that attention is far from
    uniform, so that a norm, a scale or a rotation left out shows.
    """
    torch.manual_seed(seed)
    model = TinyLM.from_config(preset("tinylm-test").replace(**changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif "embed_tokens" in name or "lm_head" in name:
                parameter.normal_(std=0.4, generator=generator)
            else:
                std = float(torch.empty(()).uniform_(0.08, 0.24, generator=generator))
                parameter.normal_(std=std, generator=generator)
    return model


class RaggedBatch(NamedTuple):
    """Rows of different lengths, right-padded with random tokens rather than with zeros."""

    input_ids: Tensor  # int64 [B, S]
    attention_mask: Tensor  # int64 [B, S]
    lens: list[int]

    def row(self, index: int) -> Tensor:
        """Return one row's real tokens, [1, length]."""
        return self.input_ids[index : index + 1, : self.lens[index]]


def ragged_batch(
    seed: int = 0, *, batch: int = 4, length: int = 24, vocab_size: int = 512
) -> RaggedBatch:
    """Draw rows; one fills the whole length and one holds a single token."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(vocab_size, (batch, length), generator=generator)
    lens = torch.randint(1, length + 1, (batch,), generator=generator)
    lens[0], lens[-1] = length, 1
    lens = lens[torch.randperm(batch, generator=generator)]
    attention_mask = (torch.arange(length) < lens[:, None]).long()
    return RaggedBatch(input_ids, attention_mask, lens.tolist())


class Recording:
    """Inputs and outputs of a model's modules in one forward pass."""

    def __init__(self, model: TinyLM) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            module.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def record(module: Any, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                self.inputs[name], self.outputs[name] = args[0], output

        return record


@torch.no_grad()
def hidden_states(
    model: TinyLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    cache: LatentCache | None = None,
) -> Tensor:
    """Return the head's input [B, S, hidden]; rows with gaps have their real tokens first."""
    seen: list[Tensor] = []
    handle = model.norm.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        model(input_ids, attention_mask, cache=cache)
    finally:
        handle.remove()
    return seen[0]


def feed_in_chunks(
    model: TinyLM, batch: RaggedBatch, chunks: list[int], *, speeds: int | None = None
) -> list[Tensor]:
    """Feed a ragged batch over a cache, chunk by chunk, and return each row's hidden states.

    Args:
        model: The model.
        batch: Rows of different lengths.
        chunks: Most tokens a row takes in each step; started again when they are used up.
        speeds: Seed for how many each row really takes, 0 included; None for as many as it can.
    """
    columns = batch.input_ids.shape[1]
    cache = LatentCache(model.config, len(batch.lens), columns + max(chunks))
    generator = torch.Generator().manual_seed(speeds or 0)
    lens = torch.tensor(batch.lens)
    done = torch.zeros_like(lens)
    rows: list[list[Tensor]] = [[] for _ in batch.lens]
    for size in itertools.cycle(chunks):
        take = (lens - done).clamp_max(size)
        if speeds is not None:
            take = take.minimum(torch.randint(size + 1, lens.shape, generator=generator))
        taken = (done[:, None] + torch.arange(size)).clamp_max(columns - 1)
        mask = (torch.arange(size) < take[:, None]).long()
        hidden = hidden_states(model, batch.input_ids.gather(1, taken), mask, cache)
        for row, count in enumerate(take.tolist()):
            rows[row].append(hidden[row, :count])
        done += take
        if torch.equal(done, lens):
            break
    assert cache.past_lens.tolist() == batch.lens
    return [torch.cat(parts) for parts in rows]
