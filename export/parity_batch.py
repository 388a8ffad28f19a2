"""The held-out rows that parity runs, and the comparison of one node on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from tinylm.errors import DataError
from tinylm_export.parity_report import LayerDifference


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParityBatch:
    """Held-out rows of different lengths.

    Attributes:
        input_ids: int64 [B, S], right-padded.
        seq_lens: int64 [B].
        prompt_lens: int64 [B], how much of each row is prefilled before decoding.
    """

    input_ids: Tensor
    seq_lens: Tensor
    prompt_lens: Tensor


def make_batch(tokens: Tensor, length: int, num_tokens: int) -> ParityBatch:
    """Cut a token stream into rows of different lengths.

    Args:
        tokens: int64 [N], held-out tokens.
        length: Longest row.
        num_tokens: Least tokens in all rows together.

    Raises:
        DataError: There are fewer tokens than that.
    """
    if len(tokens) < num_tokens:
        raise DataError(
            f"parity needs {num_tokens} held-out tokens, found {len(tokens)}. Give a longer --file "
            "or a smaller --tokens."
        )
    spread = max(1, length // 8)
    lens: list[int] = []
    while sum(lens) < num_tokens:
        lens.append(length - 7 * len(lens) % spread)
    seq_lens = torch.tensor(lens)
    ids = torch.zeros(len(lens), length, dtype=torch.int64)
    start = 0
    for row, count in enumerate(lens):
        taken = tokens[start : start + count]
        if len(taken) < count:  # the last row takes the last tokens
            taken = tokens[-count:]
        ids[row, :count] = taken
        start += count
    prompts = torch.tensor([max(1, length // 4 + 5 * row % spread) for row in range(len(lens))])
    return ParityBatch(
        input_ids=ids, seq_lens=seq_lens, prompt_lens=torch.minimum(prompts, seq_lens - 1)
    )


def row_batches(batch: ParityBatch, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Give the rows a few at a time, without columns that all of them pad."""
    for start in range(0, len(batch.seq_lens), rows):
        lens = batch.seq_lens[start : start + rows]
        yield batch.input_ids[start : start + rows, : int(lens.max())], lens


def layer_difference(node: str, reference: Tensor, found: Tensor) -> LayerDifference:
    """Compare one node's values of some tokens."""
    difference = (found.double() - reference.double()).abs().max()
    return LayerDifference(
        node=node,
        max_abs=float(difference),
        relative=float(difference / reference.double().abs().max().clamp_min(1e-30)),
        num_different=int((found != reference).sum()),
        num_values=reference.numel(),
    )


def merge_differences(
    parts: list[LayerDifference], *, limit: float | None = None
) -> LayerDifference:
    """Add up what several batches gave for one node.

    Args:
        parts: One entry a batch.
        limit: Largest relative difference that is no departure; default that of the parts.
    """
    return LayerDifference(
        node=parts[0].node,
        max_abs=float(torch.tensor([p.max_abs for p in parts]).max()),
        relative=float(torch.tensor([p.relative for p in parts]).max()),
        num_different=sum(p.num_different for p in parts),
        num_values=sum(p.num_values for p in parts),
        limit=parts[0].limit if limit is None else limit,
    )
