"""Training and evaluation batches from a tokenised corpus.

``read_jsonl`` -> ``load_corpus`` -> ``PackedSequences`` or ``PaddedSequences`` -> ``Batch``, in
the order of a ``BatchOrder``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tinylm.corpus import TokenizedCorpus, load_corpus
from tinylm.errors import DataError
from tinylm.jsonl import JsonlReader, read_jsonl
from tinylm.losses import IGNORED_LABEL

__all__ = [
    "IGNORED_LABEL",
    "Batch",
    "BatchOrder",
    "JsonlReader",
    "PackedSequences",
    "PaddedSequences",
    "TokenizedCorpus",
    "load_corpus",
    "read_jsonl",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of a corpus, ready for the model.

    Attributes:
        input_ids: int64 [B, S].
        labels: The next token at each position, int64 [B, S]; -100 where there is none.
        attention_mask: int64 [B, S], 1 at tokens and 0 at right padding; None for packed rows,
            which are attended as a whole.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor | None

    @property
    def num_labels(self) -> int:
        """Number of positions that count in the loss."""
        return int((self.labels != IGNORED_LABEL).sum())

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory, which a GPU copies from in the background."""
        mask = self.attention_mask
        return Batch(
            input_ids=self.input_ids.pin_memory(),
            labels=self.labels.pin_memory(),
            attention_mask=None if mask is None else mask.pin_memory(),
        )

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on another device."""
        mask = self.attention_mask
        return Batch(
            input_ids=self.input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            attention_mask=None if mask is None else mask.to(device, non_blocking=True),
        )


class _Windows:
    """Windows of a corpus: window i has ``lengths[i]`` inputs from token ``starts[i]`` on.

    Its labels are the same tokens shifted by one, so each window reads one token more. Labels
    are masked by these lengths, never by id: the padding id is the end token's.
    """

    def __init__(
        self,
        corpus: TokenizedCorpus,
        starts: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
    ) -> None:
        self.corpus = corpus
        self._starts = starts
        self._lengths = lengths

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self._starts)

    @property
    def num_labels(self) -> int:
        """Number of labels in all sequences together."""
        return int(self._lengths.sum())

    def _rows(
        self, indices: Sequence[int] | npt.NDArray[np.int64], width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and labels, int64 [B, width]."""
        rows = len(indices)
        input_ids = np.full((rows, width), self.corpus.pad_token_id, dtype=np.int64)
        labels = np.full((rows, width), IGNORED_LABEL, dtype=np.int64)
        for row, index in enumerate(indices):
            start, length = int(self._starts[index]), int(self._lengths[index])
            tokens = self.corpus.tokens[start : start + length + 1]
            input_ids[row, :length] = tokens[:-1]
            labels[row, :length] = tokens[1:]
        return torch.from_numpy(input_ids), torch.from_numpy(labels)


class PackedSequences(_Windows):
    """Windows of ``seq_len`` tokens over the whole corpus, across documents.

    Window i covers tokens ``[i * seq_len, (i + 1) * seq_len]``: every token but the corpus's first
    is a label exactly once. The last window may be short; it is filled with padding on the right,
    which a causal model never looks at, and its labels there are ignored.

    Args:
        corpus: Where the tokens are.
        seq_len: Inputs of a window.

    Raises:
        DataError: ``seq_len`` is not positive, or the corpus has fewer than two tokens.
    """

    def __init__(self, corpus: TokenizedCorpus, seq_len: int) -> None:
        _check_sequences(corpus, seq_len)
        starts = np.arange(0, corpus.num_tokens - 1, seq_len, dtype=np.int64)
        lengths = np.minimum(seq_len, corpus.num_tokens - 1 - starts)
        super().__init__(corpus, starts, lengths)
        self.seq_len = seq_len

    def batch(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Batch:
        """Return sequences as one batch of shape [len(indices), seq_len]."""
        input_ids, labels = self._rows(indices, self.seq_len)
        return Batch(input_ids=input_ids, labels=labels, attention_mask=None)


class PaddedSequences(_Windows):
    """One document per row, padded on the right.

    A document longer than ``seq_len`` goes on in further rows, so that every token but a
    document's first is a label exactly once.

    Args:
        corpus: Where the tokens are.
        seq_len: Largest number of inputs of a row.

    Raises:
        DataError: ``seq_len`` is not positive, or no document has two tokens.
    """

    def __init__(self, corpus: TokenizedCorpus, seq_len: int) -> None:
        _check_sequences(corpus, seq_len)
        ends = np.asarray(corpus.doc_ends)
        doc_starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
        num_labels = ends - doc_starts - 1
        rows_per_doc = -(-num_labels // seq_len)
        # Number of each row within its document: 0, 1, .. for the first, 0, 1, .. for the next.
        first_rows = np.cumsum(rows_per_doc) - rows_per_doc
        row_in_doc = np.arange(rows_per_doc.sum()) - np.repeat(first_rows, rows_per_doc)
        offsets = row_in_doc * seq_len
        starts = np.repeat(doc_starts, rows_per_doc) + offsets
        lengths = np.minimum(seq_len, np.repeat(num_labels, rows_per_doc) - offsets)
        if not len(starts):
            raise DataError(f"{corpus.path}: expected a document of two tokens, found none.")
        super().__init__(corpus, starts, lengths)
        self.seq_len = seq_len

    def batch(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Batch:
        """Return sequences as one batch, as wide as the longest of them."""
        lengths = self._lengths[np.asarray(indices, dtype=np.int64)]
        width = int(lengths.max())
        input_ids, labels = self._rows(indices, width)
        mask = np.arange(width)[None, :] < lengths[:, None]  # [B, S]
        return Batch(
            input_ids=input_ids,
            labels=labels,
            attention_mask=torch.from_numpy(mask.astype(np.int64)),
        )


def _check_sequences(corpus: TokenizedCorpus, seq_len: int) -> None:
    if seq_len < 1:
        raise DataError(f"seq_len must be positive, found {seq_len}.")
    if corpus.num_tokens < 2:
        raise DataError(
            f"{corpus.path}: expected at least two tokens, found {corpus.num_tokens}. "
            "Give more text."
        )


class BatchOrder:
    """Which sequences make up each batch: endless, shuffled anew each epoch, restorable.

    Epoch e visits all sequences in an order that depends on (seed, e) only. A batch may take the
    end of one epoch and the start of the next, so that none is short.

    Args:
        num_sequences: Sequences in an epoch.
        batch_size: Sequences in a batch; may exceed ``num_sequences``.
        seed: Chooses the order; not negative.

    Raises:
        DataError: A number is out of range.
    """

    def __init__(self, num_sequences: int, batch_size: int, *, seed: int) -> None:
        for name, value, least in (
            ("num_sequences", num_sequences, 1),
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise DataError(f"{name} must be at least {least}, found {value}.")
        self.num_sequences = num_sequences
        self.batch_size = batch_size
        self.seed = seed
        self._seek(0, 0)

    def __iter__(self) -> BatchOrder:
        """Return itself: the order has one position."""
        return self

    def __next__(self) -> npt.NDArray[np.int64]:
        """Return the next batch's sequence indices, int64 [batch_size]."""
        parts: list[npt.NDArray[np.int64]] = []
        missing = self.batch_size
        while missing:
            if self._position == self.num_sequences:
                self._seek(self._epoch + 1, 0)
            part = self._permutation[self._position : self._position + missing]
            self._position += len(part)
            missing -= len(part)
            parts.append(part)
        return np.concatenate(parts)

    @property
    def epoch(self) -> float:
        """Passes over the data so far, with fraction."""
        return self._epoch + self._position / self.num_sequences

    def state_dict(self) -> dict[str, int]:
        """Return the position, as JSON can hold it."""
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            DataError: The position is not one of this data.
        """
        epoch, position = state.get("epoch"), state.get("position")
        if (
            not isinstance(epoch, int)
            or not isinstance(position, int)
            or epoch < 0
            or not 0 <= position <= self.num_sequences
        ):
            raise DataError(
                f"data position: expected an epoch and a position up to {self.num_sequences} "
                f"sequences, found {dict(state)}. Resume with the training file and the sequence "
                "length that the checkpoint was made with."
            )
        self._seek(epoch, position)

    def _seek(self, epoch: int, position: int) -> None:
        # RandomState's streams are frozen; those of numpy's Generator may change between versions.
        bits = np.random.MT19937(np.random.SeedSequence([self.seed, epoch]))
        self._permutation = np.random.RandomState(bits).permutation(self.num_sequences)
        self._epoch = epoch
        self._position = position
