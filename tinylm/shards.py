"""The folder that ``tinylm data prepare`` writes: tokens in shards, an index, the tokenizer.

    index.json              format, tokenizer's digest, and for each split its counts and files
    train-00000.bin ...     token ids one after the other, little-endian uint16 (uint32 above
                            65536 ids)
    train-doc-ends.npy      index after each document's last token, int64 [num_docs]
    train-doc-hashes.npy    8 bytes of BLAKE2b of each document's UTF-8 text, uint64 [num_docs]
    val-...                 the same for held-out documents
    tokenizer/              its files, so that the folder is all that a run needs

A split's shards are one row of tokens, cut anywhere.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tinylm.corpus import TokenizedCorpus, padding_id, tokenizer_digest
from tinylm.directory import sha256
from tinylm.errors import DataError, TokenizerError
from tinylm.training_config import PREPARED_TOKENIZER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 1
INDEX_FILE = "index.json"
SPLITS = ("train", "val")
_AGAIN = "Copy the folder again, or make it anew with tinylm data prepare."


class ShardedTokens:
    """Shards as one row of token ids, memory-mapped; slices are copied out.

    Args:
        parts: The shards' tokens, in order.
    """

    def __init__(self, parts: list[npt.NDArray[np.unsignedinteger[Any]]]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        self.dtype = parts[0].dtype

    def __len__(self) -> int:
        """Return the number of tokens."""
        return int(self._ends[-1])

    def __getitem__(self, where: slice) -> npt.NDArray[np.unsignedinteger[Any]]:
        """Return a contiguous range of tokens."""
        start, stop, step = where.indices(len(self))
        if step != 1:
            raise ValueError(f"a slice of tokens must have step 1, found {step}.")
        pieces = []
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            begin = int(self._ends[shard]) - len(self._parts[shard])
            end = min(stop, int(self._ends[shard]))
            pieces.append(self._parts[shard][start - begin : end - begin])
            start, shard = end, shard + 1
        if len(pieces) == 1:
            return np.asarray(pieces[0])
        return np.concatenate(pieces) if pieces else np.zeros(0, dtype=self.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedData:
    """An opened folder.

    Attributes:
        train: Training documents.
        val: Held-out documents.
        fingerprint: What identifies tokens and tokenizer, for resuming.
    """

    train: TokenizedCorpus
    val: TokenizedCorpus
    fingerprint: dict[str, Any]


def read_index(directory: Path) -> dict[str, Any]:
    """Read ``index.json``.

    Raises:
        DataError: Missing, not such an index, or of another version.
    """
    path = directory / INDEX_FILE
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            f"{path}: not found. Expected a folder that tinylm data prepare made."
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: can't be read ({error}). {_AGAIN}") from error
    version = index.get("format_version") if isinstance(index, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path}: expected format_version {FORMAT_VERSION}, found {version!r}. Use the TinyLM "
            "version that wrote it, or make it anew with tinylm data prepare."
        )
    return dict(index)


def open_prepared(
    directory: str | Path, tokenizer: PreTrainedTokenizerBase, *, verify: bool = True
) -> PreparedData:
    """Map a prepared folder.

    Args:
        directory: From :func:`tinylm.prepare.prepare`.
        tokenizer: The run's; must be the one that the tokens were made with.
        verify: Read every file and compare its digest; sizes are compared in any case.

    Raises:
        DataError: A file is missing, truncated or altered.
        TokenizerError: Another tokenizer.
    """
    directory = Path(directory)
    index = read_index(directory)
    found = tokenizer_digest(tokenizer)
    if found != index["tokenizer_sha256"]:
        raise TokenizerError(
            f"{directory}: its tokens were made with the tokenizer {index['tokenizer_sha256'][:16]}"
            f", the one given is {found[:16]}. Leave --tokenizer out, or give "
            f"{directory / PREPARED_TOKENIZER}."
        )
    identity = [index["tokenizer_sha256"]]
    corpora = {}
    for split in SPLITS:
        entry = index["splits"][split]
        _check_files(directory, entry["files"], verify=verify)
        identity += [file["sha256"] for file in entry["files"]]
        corpora[split] = _open_split(directory, split, index, tokenizer)
    tokens = sum(corpus.num_tokens for corpus in corpora.values())
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return PreparedData(
        train=corpora["train"],
        val=corpora["val"],
        fingerprint={
            "bytes": sum(corpus.num_bytes for corpus in corpora.values()),
            "sha256": digest,
            "num_tokens": tokens,
            "tokens_sha256": digest,
        },
    )


def _check_files(directory: Path, files: list[dict[str, Any]], *, verify: bool) -> None:
    for file in files:
        path = directory / file["name"]
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: not found, and the index names it. {_AGAIN}") from error
        if size != file["bytes"]:
            raise DataError(f"{path}: expected {file['bytes']} bytes, found {size}. {_AGAIN}")
        if verify and sha256(path) != file["sha256"]:
            raise DataError(f"{path}: altered, its SHA-256 is not the index's. {_AGAIN}")


def _open_split(
    directory: Path, split: str, index: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> TokenizedCorpus:
    entry = index["splits"][split]
    dtype = np.dtype(index["dtype"]).newbyteorder("<")
    names = [file["name"] for file in entry["files"] if file["name"].endswith(".bin")]
    parts = [np.memmap(directory / name, dtype=dtype, mode="r") for name in names]
    tokens = ShardedTokens(list(parts))
    doc_ends = np.load(directory / f"{split}-doc-ends.npy", mmap_mode="r", allow_pickle=False)
    if len(tokens) != entry["num_tokens"] or doc_ends[-1] != len(tokens):
        raise DataError(
            f"{directory}: the index names {entry['num_tokens']} {split} tokens, the shards hold "
            f"{len(tokens)} and the last document ends at {doc_ends[-1]}. {_AGAIN}"
        )
    return TokenizedCorpus(
        path=directory,
        tokens=tokens,
        doc_ends=doc_ends,
        num_bytes=entry["num_bytes"],
        num_skipped=index["num_skipped"],
        first_problem=index["first_problem"],
        pad_token_id=padding_id(tokenizer),
        fingerprint=index["tokenizer_sha256"],
    )
