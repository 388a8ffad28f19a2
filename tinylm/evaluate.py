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

from tinylm import quantization
from tinylm.distributed import World, is_sharded, local, sum_over_parts
from tinylm.quantization import abs_sum, scale_of_sum

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


@torch.no_grad()
def ternary_codes(model: TinyLM) -> dict[str, Tensor]:
    """Return the codes of every BitLinear, int8 [N, K], by module path.

    Of a sharded model they are those of this process's rows, under the whole matrix's scale; every
    process must ask.
    """
    layers = model.bit_linears()
    weights = [layer.weight for layer in layers.values()]
    if not weights or not is_sharded(weights[0]):
        return {name: layer.weight_codes()[0] for name, layer in layers.items()}
    parts = [local(weight) for weight in weights]
    totals = sum_over_parts(torch.stack([abs_sum(part) for part in parts]), weights[0])
    return {
        name: quantization.ternary_codes(part, scale_of_sum(total, layer.weight.numel())).to(
            torch.int8
        )
        for (name, layer), part, total in zip(layers.items(), parts, totals, strict=True)
    }


def ternary_statistics(
    codes: dict[str, Tensor],
    before: dict[str, Tensor] | None = None,
    *,
    world: World | None = None,
) -> dict[str, Any]:
    """Count ternary codes over all layers and per kind of layer.

    Args:
        codes: From :func:`ternary_codes`.
        before: The codes before an update; adds the flip rate, the part of the codes that the
            update changed.
        world: Processes that hold different codes, all of which must call this.

    Returns:
        ``fraction_minus``, ``fraction_zero``, ``fraction_plus``; ``zero_by_kind`` by the last part
        of the module path, such as ``q_proj``; and ``flip_rate``. Nothing for a dense model.
    """
    if not codes:
        return {}
    found = [
        torch.stack(
            (
                (layer_codes < 0).sum(),
                layer_codes.count_nonzero(),
                (layer_codes != before[name]).sum() if before else layer_codes.new_zeros(()).long(),
            )
        )
        for name, layer_codes in codes.items()
    ]
    minus = flipped = 0
    sizes: dict[str, int] = {}  # by kind of layer
    zeros: dict[str, int] = {}
    # One wait for the GPU, not one a layer.
    for (name, layer_codes), counted in zip(
        codes.items(), torch.stack(found).tolist(), strict=True
    ):
        kind, size = name.rpartition(".")[2], layer_codes.numel()
        sizes[kind] = sizes.get(kind, 0) + size
        zeros[kind] = zeros.get(kind, 0) + size - counted[1]
        minus += counted[0]
        flipped += counted[2]
    counts = [minus, flipped, *sizes.values(), *zeros.values()]
    all_minus, all_flipped, *rest = (world or World()).sum(counts)
    all_sizes = dict(zip(sizes, rest[: len(sizes)], strict=True))
    all_zeros = dict(zip(zeros, rest[len(sizes) :], strict=True))
    total, zero = sum(all_sizes.values()), sum(all_zeros.values())
    result: dict[str, Any] = {
        "fraction_minus": all_minus / total,
        "fraction_zero": zero / total,
        "fraction_plus": (total - all_minus - zero) / total,
        "zero_by_kind": {kind: all_zeros[kind] / size for kind, size in all_sizes.items()},
    }
    if before is not None:
        result["flip_rate"] = all_flipped / total
    return result
