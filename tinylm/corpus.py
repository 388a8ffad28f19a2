"""Text files as one memory-mapped row of token ids.

`datasets` reads and tokenises in parallel; the result is kept in the cache folder under a digest
of everything it depends on (the file's bytes, the tokenizer, the options), so a changed file is
never answered from the cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from tinylm.errors import DataError, TokenizerError
from tinylm.jsonl import read_jsonl
from tinylm.paths import cache_dir
from tinylm.tokenizer import num_token_ids

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_FORMAT = 1  # raise when the files or the way of tokenising change
_META_FILE, _TOKENS_FILE, _ENDS_FILE = "corpus.json", "tokens.npy", "doc_ends.npy"
# One process tokenises this much before a second one has even started.
_MIN_BYTES_PER_PROCESS = 2_000_000
_BATCH_BYTES = 1_000_000
_COUNT_CHUNK = 1 << 22


class TokenRow(Protocol):
    """A row of token ids: an array, or :class:`tinylm.shards.ShardedTokens`."""

    def __len__(self) -> int:
        """Return the number of tokens."""

    def __getitem__(self, where: slice, /) -> npt.NDArray[np.unsignedinteger[Any]]:
        """Return a range of tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizedCorpus:
    """A file's documents as token ids, one after the other.

    Attributes:
        path: The text file.
        tokens: Token ids of all documents, uint16 or uint32 [num_tokens], memory-mapped. Each
            document ends with exactly one end token of its own.
        doc_ends: Index after each document's last token, int64 [num_docs].
        num_bytes: UTF-8 bytes of the text.
        num_skipped: Bad lines left out.
        first_problem: What was wrong with the first of them.
        pad_token_id: Id for positions that are masked anyway.
        fingerprint: Digest of the text, the tokenizer and the options; equal means equal tokens.
    """

    path: Path
    tokens: TokenRow
    doc_ends: npt.NDArray[np.int64]
    num_bytes: int
    num_skipped: int
    first_problem: str | None
    pad_token_id: int
    fingerprint: str

    @property
    def num_docs(self) -> int:
        """Number of documents."""
        return len(self.doc_ends)

    @property
    def num_tokens(self) -> int:
        """Number of tokens, special tokens included."""
        return len(self.tokens)

    def unigram_entropy(self) -> float:
        """Return the entropy of the token frequencies, in nats per token.

        This is the loss of a model that knows how often each token occurs and nothing else.
        """
        counts = np.zeros(0, dtype=np.int64)
        for start in range(0, self.num_tokens, _COUNT_CHUNK):
            part = np.bincount(self.tokens[start : start + _COUNT_CHUNK], minlength=len(counts))
            part[: len(counts)] += counts
            counts = part
        shares = counts[counts > 0] / self.num_tokens
        return float(-(shares * np.log(shares)).sum())


def load_corpus(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    skip_bad_lines: bool = False,
    num_proc: int | None = None,
    cache: str | Path | None = None,
) -> TokenizedCorpus:
    """Tokenise a JSON lines file, or map the result of an earlier call.

    Each document is ``tokenizer(text)`` with the tokenizer's own special tokens, then the end
    token. Special tokens that are spelled out in the text are text.

    Args:
        path: A file of lines ``{"text": ...}``, plain or gzip.
        tokenizer: A tokenizer from :func:`tinylm.tokenizer.load_tokenizer`.
        skip_bad_lines: Count bad lines instead of raising.
        num_proc: Processes that tokenise. Default: as many as there are CPUs, fewer for small
            files.
        cache: Folder for tokenised files. Default: ``corpora`` in :func:`tinylm.paths.cache_dir`.

    Raises:
        DataError: The file can't be used (message with line number), or the cache folder can't
            be written.
        TokenizerError: The tokenizer has no end token.
    """
    path = Path(path)
    if num_proc is not None and num_proc < 1:
        raise DataError(f"num_proc must be positive, found {num_proc}.")
    if tokenizer.eos_token_id is None:
        raise TokenizerError("expected a tokenizer with an end token (eos_token), found none.")
    fingerprint = _fingerprint(path, tokenizer, skip_bad_lines)
    root = Path(cache) if cache is not None else cache_dir() / "corpora"
    folder = root / fingerprint
    corpus = _open(folder, path, tokenizer, fingerprint)
    if corpus is not None:
        return corpus
    try:
        root.mkdir(parents=True, exist_ok=True)
        if folder.exists():  # damaged, as _open refused it
            shutil.rmtree(folder)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=root) as scratch:
            ready = Path(scratch, "corpus")
            ready.mkdir()
            _build(path, tokenizer, skip_bad_lines, num_proc, Path(scratch), ready)
            _publish(ready, folder)
    except OSError as error:
        raise DataError(
            f"{path}: its tokens can't be written to {root} ({error.strerror or error}). Free "
            "some space, or name another folder in the environment variable TINYLM_CACHE."
        ) from error
    corpus = _open(folder, path, tokenizer, fingerprint)
    if corpus is None:
        raise DataError(f"{folder}: vanished while {path} was being tokenised. Try again.")
    return corpus


def _fingerprint(path: Path, tokenizer: PreTrainedTokenizerBase, skip_bad_lines: bool) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except FileNotFoundError as error:
        raise DataError(f"{path}: not found. Give a JSON lines file.") from error
    except IsADirectoryError as error:
        raise DataError(f"{path}: expected a file, found a folder.") from error
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror or error}).") from error
    options = [_FORMAT, skip_bad_lines, tokenizer.eos_token_id, tokenizer.bos_token_id]
    digest.update(json.dumps([_identity(tokenizer), options]).encode("utf-8"))
    return digest.hexdigest()[:32]


def _identity(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return an object for JSON that says everything about how text becomes tokens."""
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # What the latest call asked for is no part of the tokenizer.
        return {**backend, "padding": None, "truncation": None}
    return [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of what decides about a tokenizer's output."""
    parts = [_FORMAT, _identity(tokenizer), tokenizer.eos_token_id, tokenizer.bos_token_id]
    return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()


def token_dtype(tokenizer: PreTrainedTokenizerBase) -> np.dtype[Any]:
    """Return the dtype that holds every id: uint16, or uint32 above 65536 ids."""
    return np.dtype(np.uint16 if num_token_ids(tokenizer) <= 1 << 16 else np.uint32)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that fills a row: the tokenizer's, or its end of sequence where it has none."""
    pad = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if pad is None else pad)


def _open(
    folder: Path, path: Path, tokenizer: PreTrainedTokenizerBase, fingerprint: str
) -> TokenizedCorpus | None:
    """Map a cached corpus; None if it is not there or not whole."""
    try:
        meta = json.loads((folder / _META_FILE).read_text(encoding="utf-8"))
        tokens = np.load(folder / _TOKENS_FILE, mmap_mode="r", allow_pickle=False)
        doc_ends = np.load(folder / _ENDS_FILE, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if len(doc_ends) == 0 or doc_ends[-1] != len(tokens):
        return None
    return TokenizedCorpus(
        path=path,
        tokens=tokens,
        doc_ends=doc_ends,
        num_bytes=meta["num_bytes"],
        num_skipped=meta["num_skipped"],
        first_problem=meta["first_problem"],
        pad_token_id=padding_id(tokenizer),
        fingerprint=fingerprint,
    )


def _publish(ready: Path, folder: Path) -> None:
    """Move a finished corpus to its name, unless another process was faster."""
    try:
        ready.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _build(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    skip_bad_lines: bool,
    num_proc: int | None,
    scratch: Path,
    ready: Path,
) -> None:
    """Tokenise ``path`` into the three files of ``ready``."""
    reader = read_jsonl(path, skip_bad_lines=skip_bad_lines)
    tokenised = tokenise(
        lambda: iter(reader),
        tokenizer,
        scratch,
        size=path.stat().st_size,
        num_proc=num_proc,
        name=path.name,
    )
    num_bytes = _write_arrays(tokenised, token_dtype(tokenizer), ready)
    if not num_bytes:
        raise DataError(
            f"{path}: expected text, found {len(tokenised)} documents that are all empty."
        )
    meta = {
        "num_bytes": num_bytes,
        "num_skipped": reader.num_skipped,
        "first_problem": reader.first_problem,
    }
    (ready / _META_FILE).write_text(json.dumps(meta) + "\n", encoding="utf-8")


def tokenise(
    texts: Callable[[], Iterator[str]],
    tokenizer: PreTrainedTokenizerBase,
    scratch: Path,
    *,
    size: int,
    num_proc: int | None,
    name: str,
    hash_text: Callable[[str], int] | None = None,
) -> Dataset:
    """Tokenise documents in parallel, on the disk rather than in memory.

    Args:
        texts: Gives the documents.
        tokenizer: The tokenizer.
        scratch: Folder for what the result is mapped from; it must outlive the result.
        size: About how many bytes of text there are.
        num_proc: Processes. Default: as many as there are CPUs, fewer for little text.
        name: Of the text, for the progress bar.
        hash_text: Adds a column ``hash``, uint64.

    Returns:
        A row for each document: its ``tokens``, with the end token, and ``num_bytes``.
    """
    import datasets

    def rows() -> Iterator[dict[str, str]]:
        for text in texts():
            yield {"text": text}

    dtype = token_dtype(tokenizer)
    columns = {
        "tokens": datasets.Sequence(datasets.Value(dtype.name)),
        "num_bytes": datasets.Value("int64"),
    }
    if hash_text is not None:
        columns["hash"] = datasets.Value("uint64")
    workers = num_proc or min(os.cpu_count() or 1, max(1, size // _MIN_BYTES_PER_PROCESS))
    with _quiet_unless_terminal(), _unwrapped_errors():
        text = datasets.Dataset.from_generator(
            rows,
            features=datasets.Features({"text": datasets.Value("string")}),
            cache_dir=str(scratch / "text"),
        )
        mean_bytes = max(1, size // max(1, len(text)))
        return text.map(
            _tokenise,
            fn_kwargs={"tokenizer": tokenizer, "dtype": dtype.name, "hash_text": hash_text},
            batched=True,
            batch_size=min(1000, max(1, _BATCH_BYTES // mean_bytes)),
            remove_columns=["text"],
            features=datasets.Features(columns),
            num_proc=workers if workers > 1 else None,
            cache_file_name=str(scratch / "tokens.arrow"),
            new_fingerprint="tokens",
            desc=f"Tokenising {name}",
        )


def _tokenise(
    batch: dict[str, list[str]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
    hash_text: Callable[[str], int] | None,
) -> dict[str, Any]:
    """Turn a batch of texts into token ids that end with the end token."""
    texts = batch["text"]
    encoded = tokenizer(
        texts,
        return_attention_mask=False,
        return_token_type_ids=False,
        # Text can't forge the end of a document.
        split_special_tokens=True,
        # A document may well be longer than the tokenizer's model_max_length: it is cut later.
        verbose=False,
    )["input_ids"]
    eos = tokenizer.eos_token_id
    tokens = [
        np.asarray(ids if ids and ids[-1] == eos else [*ids, eos], dtype=dtype) for ids in encoded
    ]
    result: dict[str, Any] = {
        "tokens": tokens,
        "num_bytes": [len(text.encode("utf-8")) for text in texts],
    }
    if hash_text is not None:
        result["hash"] = np.array([hash_text(text) for text in texts], dtype=np.uint64)
    return result


def _write_arrays(tokenised: Dataset, dtype: np.dtype[Any], ready: Path) -> int:
    """Write all tokens as one array, and the documents' ends; return the text's bytes."""
    chunks = tokenised.data.column("tokens").chunks
    lengths = np.concatenate([chunk.value_lengths().to_numpy() for chunk in chunks])
    doc_ends = np.cumsum(lengths, dtype=np.int64)
    np.save(ready / _ENDS_FILE, doc_ends)
    # Not through a memory map: on a full disk that is a bus error, not an exception.
    with (ready / _TOKENS_FILE).open("wb") as file:
        header = {"descr": dtype.str, "fortran_order": False, "shape": (int(doc_ends[-1]),)}
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in chunks:
            file.write(chunk.flatten().to_numpy().tobytes())
    return sum(int(c.to_numpy().sum()) for c in tokenised.data.column("num_bytes").chunks)


@contextlib.contextmanager
def _quiet_unless_terminal() -> Iterator[None]:
    """Show the progress bars of `datasets` on a terminal only."""
    from datasets.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextlib.contextmanager
def _unwrapped_errors() -> Iterator[None]:
    """Raise our own errors and the system's as they are, not inside one of `datasets`."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, DataError | OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None or cause is error:
            raise
        raise cause from None
