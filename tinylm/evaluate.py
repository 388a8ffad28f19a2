"""Measurements: perplexity and bits per byte on held-out text, and the state of ternary weights."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

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
) -> EvalResult | None:
    """Measure a model on held-out text; the model's mode is put back afterwards.

    Args:
        model: The model.
        sequences: Held-out text. Packed, every token but the file's first is predicted once.
        batch_size: Sequences at a time.
        max_tokens: Read about this many tokens, in sequences spread evenly over the file; None for
            all.
        precision: Context to compute in, such as autocast.
        should_stop: Asked before every batch; True ends the evaluation without a result.
        progress: Called with (sequences done, sequences in all).

    Returns:
        The result, or None if it was stopped.
    """
    corpus = sequences.corpus
    chosen = _spread(len(sequences), corpus.num_tokens, max_tokens)
    device = model.embed_tokens.weight.device
    total, count, started = 0.0, 0, time.perf_counter()
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(chosen), batch_size):
            if should_stop is not None and should_stop():
                return None
            indices = chosen[start : start + batch_size]
            batch = sequences.batch(indices)
            count += batch.num_labels
            batch = batch.to(device)
            with precision or contextlib.nullcontext():
                loss = model(batch.input_ids, batch.attention_mask, labels=batch.labels)
            total += float(loss)
            if progress is not None:
                progress(start + len(indices), len(chosen))
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
        num_tokens=count,
        seconds=seconds,
        tokens_per_second=count / max(seconds, 1e-9),
    )


def _spread(num_sequences: int, num_tokens: int, max_tokens: int | None) -> np.ndarray:
    """Choose the sequences to read: all, or some spread evenly over the file."""
    wanted = num_sequences
    if max_tokens is not None:
        wanted = min(num_sequences, max(1, round(num_sequences * max_tokens / num_tokens)))
    return np.arange(wanted, dtype=np.int64) * num_sequences // wanted


@torch.no_grad()
def ternary_codes(model: TinyLM) -> dict[str, Tensor]:
    """Return the codes of every BitLinear, int8 [N, K], by module path."""
    return {name: layer.weight_codes()[0] for name, layer in model.bit_linears().items()}


def ternary_statistics(
    codes: dict[str, Tensor], before: dict[str, Tensor] | None = None
) -> dict[str, Any]:
    """Count ternary codes over all layers and per kind of layer.

    Args:
        codes: From :func:`ternary_codes`.
        before: The codes before an update; adds the flip rate, the part of the codes that the
            update changed.

    Returns:
        ``fraction_minus``, ``fraction_zero``, ``fraction_plus``; ``zero_by_kind`` by the last part
        of the module path, such as ``q_proj``; and ``flip_rate``. Nothing for a dense model.
    """
    minus = zero = total = flipped = 0
    by_kind: dict[str, list[int]] = {}
    if not codes:
        return {}
    for name, layer_codes in codes.items():
        size, zeros = layer_codes.numel(), layer_codes.numel() - int(layer_codes.count_nonzero())
        total, zero = total + size, zero + zeros
        minus += int((layer_codes < 0).sum())
        kind = by_kind.setdefault(name.rpartition(".")[2], [0, 0])
        kind[0], kind[1] = kind[0] + zeros, kind[1] + size
        if before is not None:
            flipped += int((layer_codes != before[name]).sum())
    result: dict[str, Any] = {
        "fraction_minus": minus / total,
        "fraction_zero": zero / total,
        "fraction_plus": (total - minus - zero) / total,
        "zero_by_kind": {kind: zeros / size for kind, (zeros, size) in by_kind.items()},
    }
    if before is not None:
        result["flip_rate"] = flipped / total
    return result
