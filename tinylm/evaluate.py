"""Perplexity and bits per byte on held-out text."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tinylm.distributed import World

if TYPE_CHECKING:
    from tinylm.data import PackedSequences, PaddedSequences
    from tinylm.model import TinyLM


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Quality on held-out text.

    Attributes:
        loss: Mean negative log likelihood, in nats per predicted token.
        perplexity: ``exp(loss)``; depends on the tokenizer.
        bits_per_byte: Bits per UTF-8 byte of the text; comparable between tokenizers.
        bits_per_byte_basis: ``"whole file"``, or ``"token ratio"`` where only a part was read and
            the file's mean number of tokens per byte stands in for the part's.
        num_tokens: Predicted tokens.
        seconds: Time it took.
        tokens_per_second: Speed.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    bits_per_byte_basis: str
    num_tokens: int
    seconds: float
    tokens_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """Return an object that JSON can hold."""
        return dataclasses.asdict(self)


@torch.no_grad()
def evaluate(
    model: TinyLM,
    sequences: PackedSequences | PaddedSequences,
    *,
    batch_size: int = 16,
    max_tokens: int | None = None,
    precision: contextlib.AbstractContextManager[Any] | None = None,
    should_stop: Callable[[], bool] | None = None,
    progress: Callable[[int, int], None] | None = None,
    world: World | None = None,
) -> EvalResult | None:
    """Measure a model on held-out text; the model's mode is put back afterwards.

    Several processes share the sequences, and all get the result.

    Args:
        model: The model.
        sequences: Held-out text. Packed, every token but the file's first is predicted once.
        batch_size: Sequences at a time.
        max_tokens: Read about this many tokens, in sequences spread evenly over the file; None for
            all.
        precision: Context to compute in, such as autocast.
        should_stop: Asked before every batch; True ends the evaluation without a result. Must say
            the same in all processes.
        progress: Called with (sequences done, sequences in all).
        world: The processes, all of which must call this. Default: this one alone.

    Returns:
        The result, or None if it was stopped.
    """
    world = world or World()
    corpus = sequences.corpus
    chosen = _spread(len(sequences), corpus.num_tokens, max_tokens)
    device = model.embed_tokens.weight.device
    total, labels, started = 0.0, 0, time.perf_counter()
    was_training = model.training
    model.eval()
    try:
        # As many batches in every process: a sharded model runs in all of them or in none.
        rows = -(-len(chosen) // world.size)
        mine = chosen[world.rank :: world.size]
        for start in range(0, rows, batch_size):
            if should_stop is not None and should_stop():
                return None
            indices = mine[start : start + batch_size]
            batch = sequences.batch(indices if len(indices) else chosen[:1])
            batch = batch.to(device)
            with precision or contextlib.nullcontext():
                loss = model(batch.input_ids, batch.attention_mask, labels=batch.labels)
            if len(indices):
                labels += batch.num_labels
                total += float(loss)
            if progress is not None:
                progress(min((start + len(indices)) * world.size, len(chosen)), len(chosen))
        total, count = world.sum([total, labels])
    finally:
        model.train(was_training)
    seconds = time.perf_counter() - started
    whole = len(chosen) == len(sequences)
    nats_per_byte = (
        total / corpus.num_bytes if whole else total / count * corpus.num_tokens / corpus.num_bytes
    )
    loss = total / count
    return EvalResult(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),  # beyond that a float overflows
        bits_per_byte=nats_per_byte / math.log(2),
        bits_per_byte_basis="whole file" if whole else "token ratio",
        num_tokens=int(count),
        seconds=seconds,
        tokens_per_second=count / max(seconds, 1e-9),
    )


def _spread(num_sequences: int, num_tokens: int, max_tokens: int | None) -> np.ndarray:
    """Choose the sequences to read: all, or some spread evenly over the file."""
    wanted = num_sequences
    if max_tokens is not None:
        wanted = min(num_sequences, max(1, round(num_sequences * max_tokens / num_tokens)))
    return np.arange(wanted, dtype=np.int64) * num_sequences // wanted
