"""Turns text files into the folder of :mod:`tinylm.shards`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tinylm.corpus import token_dtype, tokenise, tokenizer_digest
from tinylm.directory import sha256, written_whole
from tinylm.documents import DocumentReader
from tinylm.errors import DataError, TokenizerError
from tinylm.shards import FORMAT_VERSION, INDEX_FILE, SPLITS
from tinylm.tokenizer import save_tokenizer
from tinylm.training_config import PREPARED_TOKENIZER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_VAL_FRACTION = 0.01
DEFAULT_SHARD_MB = 60.0
_HASH_BYTES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareReport:
    """What was written.

    Attributes:
        out: The folder.
        num_train_docs: Training documents.
        num_train_tokens: Their tokens.
        num_val_docs: Held-out documents.
        num_val_tokens: Their tokens.
        num_shards: Files of tokens.
        num_dropped: Training documents left out because a held-out one has the same text.
        num_skipped: Bad lines left out.
        first_problem: What was wrong with the first of them.
    """

    out: str
    num_train_docs: int
    num_train_tokens: int
    num_val_docs: int
    num_val_tokens: int
    num_shards: int
    num_dropped: int
    num_skipped: int
    first_problem: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return an object that JSON can hold."""
        return dataclasses.asdict(self)


def document_hash(text: str) -> int:
    """Return the first 8 bytes of BLAKE2b of the UTF-8 text, as a little-endian integer."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=_HASH_BYTES).digest()
    return int.from_bytes(digest, "little")


def prepare(
    files: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    out: str | Path,
    *,
    val_files: Sequence[str | Path] = (),
    val_fraction: float = DEFAULT_VAL_FRACTION,
    shard_mb: float = DEFAULT_SHARD_MB,
    skip_bad_lines: bool = False,
    num_proc: int | None = None,
) -> PrepareReport:
    """Tokenise files into shards, with whole documents held out.

    Without ``val_files``, a document is held out by its own hash: the choice depends on neither the
    order of the files nor the other documents, and equal texts go the same way. With them, a
    training document whose text is held out too is dropped.

    Args:
        files: Text, JSON lines or Parquet, see :class:`tinylm.documents.DocumentReader`.
        tokenizer: A tokenizer from :func:`tinylm.tokenizer.load_tokenizer`.
        out: New or empty folder, or an earlier one of this kind, which is replaced.
        val_files: Held-out documents.
        val_fraction: Part of the documents to hold out where no ``val_files`` are given, in (0, 1).
        shard_mb: Largest file of tokens, in 10^6 bytes.
        skip_bad_lines: Count bad lines instead of raising.
        num_proc: Processes that tokenise. Default: as many as there are CPUs, fewer for little
            text.

    Raises:
        DataError: A file can't be used, a number is out of range, one of the two splits would be
            empty, or ``out`` can't be written.
        TokenizerError: The tokenizer has no end token.
    """
    _check(files, val_fraction, shard_mb, num_proc)
    if tokenizer.eos_token_id is None:
        raise TokenizerError("expected a tokenizer with an end token (eos_token), found none.")
    out = Path(out)
    dtype = token_dtype(tokenizer).newbyteorder("<")
    shard_tokens = max(1, int(shard_mb * 1e6) // dtype.itemsize)
    limit = None if val_files else int(val_fraction * 2.0 ** (8 * _HASH_BYTES))
    options: dict[str, Any] = {"skip_bad_lines": skip_bad_lines, "num_proc": num_proc}
    with (
        written_whole(out, marker=INDEX_FILE, error=DataError) as ready,
        tempfile.TemporaryDirectory(prefix=".building-", dir=ready) as scratch,
    ):
        writers = {name: _SplitWriter(ready, name, dtype, shard_tokens) for name in SPLITS}
        readers = [DocumentReader(Path(f), skip_bad_lines=skip_bad_lines) for f in val_files]
        for document in _tokenised(readers, tokenizer, Path(scratch, "val"), **options):
            writers["val"].add(document)
        held_out = set(writers["val"].hashes)
        train_readers = [DocumentReader(Path(f), skip_bad_lines=skip_bad_lines) for f in files]
        num_dropped = 0
        for document in _tokenised(train_readers, tokenizer, Path(scratch, "train"), **options):
            if document.hash in held_out:
                num_dropped += 1
            else:
                is_val = limit is not None and document.hash < limit
                writers["val" if is_val else "train"].add(document)
        readers += train_readers
        num_skipped = sum(reader.num_skipped for reader in readers)
        problems = [reader.first_problem for reader in readers if reader.first_problem]
        index = {
            "format_version": FORMAT_VERSION,
            "dtype": dtype.name,
            "tokenizer_sha256": tokenizer_digest(tokenizer),
            "num_skipped": num_skipped,
            "first_problem": problems[0] if problems else None,
            "num_dropped": num_dropped,
            "splits": {name: writer.finish() for name, writer in writers.items()},
        }
        save_tokenizer(tokenizer, ready / PREPARED_TOKENIZER)
        (ready / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    train, val = writers["train"], writers["val"]
    return PrepareReport(
        out=str(out),
        num_train_docs=len(train.ends),
        num_train_tokens=train.num_tokens,
        num_val_docs=len(val.ends),
        num_val_tokens=val.num_tokens,
        num_shards=len(train.names) + len(val.names),
        num_dropped=num_dropped,
        num_skipped=num_skipped,
        first_problem=problems[0] if problems else None,
    )


def _check(
    files: Sequence[str | Path], val_fraction: float, shard_mb: float, num_proc: int | None
) -> None:
    if not files:
        raise DataError("expected at least one file of text, found none. Pass --file.")
    if not 0.0 < val_fraction < 1.0:
        raise DataError(f"val_fraction must be between 0 and 1, found {val_fraction}.")
    if not shard_mb > 0.0:
        raise DataError(f"shard_mb must be above zero, found {shard_mb}.")
    if num_proc is not None and num_proc < 1:
        raise DataError(f"num_proc must be positive, found {num_proc}.")


@dataclasses.dataclass(frozen=True)
class _Document:
    tokens: npt.NDArray[np.unsignedinteger[Any]]
    num_bytes: int
    hash: int


def _tokenised(
    readers: list[DocumentReader],
    tokenizer: PreTrainedTokenizerBase,
    scratch: Path,
    *,
    skip_bad_lines: bool,
    num_proc: int | None,
) -> Iterator[_Document]:
    if not readers:
        return
    for reader in readers:
        if not reader.path.is_file():
            raise DataError(f"{reader.path}: expected a file, found none. Give a file of text.")

    def texts() -> Iterator[str]:
        for reader in readers:
            yield from reader

    table = tokenise(
        texts,
        tokenizer,
        scratch,
        size=sum(reader.path.stat().st_size for reader in readers),
        num_proc=num_proc,
        name=", ".join(reader.path.name for reader in readers[:3]),
        hash_text=document_hash,
    )
    for batch in table.data.to_batches():
        rows = batch.column("tokens")
        flat, offsets = rows.values.to_numpy(), rows.offsets.to_numpy()
        counts = batch.column("num_bytes").to_numpy()
        hashes = batch.column("hash").to_numpy()
        for i, (num_bytes, digest) in enumerate(zip(counts, hashes, strict=True)):
            yield _Document(flat[offsets[i] : offsets[i + 1]], int(num_bytes), int(digest))


class _SplitWriter:
    """Writes one split's files."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, dtype, shard_tokens
        self.names: list[str] = []
        self.ends: list[int] = []
        self.hashes: list[int] = []
        self.num_tokens = self.num_bytes = 0
        self._pending: list[npt.NDArray[Any]] = []
        self._num_pending = 0

    def add(self, document: _Document) -> None:
        self.num_tokens += len(document.tokens)
        self.num_bytes += document.num_bytes
        self.ends.append(self.num_tokens)
        self.hashes.append(document.hash)
        self._pending.append(document.tokens)
        self._num_pending += len(document.tokens)
        if self._num_pending >= self.shard_tokens:
            self._write(only_full=True)

    def _write(self, *, only_full: bool) -> None:
        tokens = np.concatenate(self._pending).astype(self.dtype, copy=False)
        while len(tokens) >= self.shard_tokens or (len(tokens) and not only_full):
            name = f"{self.split}-{len(self.names):05d}.bin"
            # Not through a memory map: on a full disk that is a bus error, not an exception.
            (self.folder / name).write_bytes(tokens[: self.shard_tokens].tobytes())
            self.names.append(name)
            tokens = tokens[self.shard_tokens :]
        self._pending, self._num_pending = [tokens], len(tokens)

    def finish(self) -> dict[str, Any]:
        """Write what is left; return the split's entry in the index."""
        if self.num_tokens < 2:
            raise DataError(
                f"expected {'training' if self.split == 'train' else 'held-out'} text, found "
                f"{len(self.ends)} documents with {self.num_tokens} tokens. Give more text, "
                "another --val-fraction, or --val-file."
            )
        self._write(only_full=False)
        arrays = {
            f"{self.split}-doc-ends.npy": np.array(self.ends, dtype=np.int64),
            f"{self.split}-doc-hashes.npy": np.array(self.hashes, dtype=np.uint64),
        }
        for name, values in arrays.items():
            np.save(self.folder / name, values)
        paths = [self.folder / name for name in [*self.names, *arrays]]
        return {
            "num_docs": len(self.ends),
            "num_tokens": self.num_tokens,
            "num_bytes": self.num_bytes,
            "files": [
                {"name": p.name, "bytes": p.stat().st_size, "sha256": sha256(p)} for p in paths
            ],
        }
