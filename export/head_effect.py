"""What an int8 head costs in quality, on the tokens of a parity run."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from tinylm.data import IGNORED_LABEL
from tinylm.losses import sum_loss
from tinylm.model import TinyLM
from tinylm_export.parity_report import HeadEffect


@torch.no_grad()
def head_effect(
    model: TinyLM, batches: Iterable[tuple[Tensor, Tensor]], int8_logits: Tensor
) -> HeadEffect:
    """Compare the losses of both heads; every token but a row's first is predicted.

    Args:
        model: The model with its float32 head.
        batches: Right-padded ids int64 [b, S] and row lengths [b], as often as the rows need.
        int8_logits: Logits [B, S, V] of the same rows with the int8 head.
    """
    float32, int8, count, done = 0.0, 0.0, 0, 0
    for ids, lens in batches:
        columns = torch.arange(ids.shape[1])
        labels = ids.roll(-1, dims=1).masked_fill(columns >= lens[:, None] - 1, IGNORED_LABEL)
        own = model(ids, columns < lens[:, None])  # [b, S, V]
        float32 += float(sum_loss(own, labels))
        int8 += float(sum_loss(int8_logits[done : done + len(ids), : ids.shape[1]], labels))
        count, done = count + int((labels != IGNORED_LABEL).sum()), done + len(ids)
    losses = float32 / count, int8 / count
    return HeadEffect(
        num_tokens=count,
        float32_loss=losses[0],
        int8_loss=losses[1],
        float32_perplexity=math.exp(min(losses[0], 700.0)),  # beyond that a float overflows
        int8_perplexity=math.exp(min(losses[1], 700.0)),
    )
