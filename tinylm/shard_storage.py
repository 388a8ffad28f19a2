"""Storage of torch.distributed.checkpoint in safetensors and JSON; nothing is ever unpickled.

    shard-00000-of-00004.safetensors    what process 0 of 4 held: pieces of tensors, by name
    index.json                          shape and dtype of each tensor, and where its pieces are

A piece is a block of a tensor that begins at ``offsets`` and has the shape ``sizes``.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from tinylm.directory import sha256
from tinylm.errors import CheckpointError

INDEX_FILE = "index.json"
FORMAT_VERSION = 1


class ShardWriter(StorageWriter):
    """Writes each process's pieces into one file of its own.

    Args:
        folder: Where the files go; it exists when the first process's ``open_folder`` returns.
        rank: Number of this process.
        num_shards: Number of processes.
        open_folder: Makes the folder; called in the first process only.
        close_folder: Called there when the index is written, with the digests of the shards by
            file name.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        num_shards: int,
        open_folder: Callable[[], None],
        close_folder: Callable[[dict[str, str]], None],
    ) -> None:
        self.folder = folder
        self.num_shards = num_shards
        self.shard = f"shard-{rank:05d}-of-{num_shards:05d}.safetensors"
        self._open_folder = open_folder
        self._close_folder = close_folder

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: a writer serves one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Make the folder."""
        if is_coordinator:
            self._open_folder()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Leave the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Leave the plans as they are."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this process's file and flush it to the disk."""
        pieces = {}
        for item in plan.items:
            piece = planner.resolve_data(item)
            if not isinstance(piece, torch.Tensor) or item.index.fqn in pieces:
                raise ValueError(f"{item.index.fqn}: expected one piece of a tensor.")
            pieces[item.index.fqn] = piece.detach().cpu().contiguous()
        path = self.folder / self.shard
        try:
            save_file(pieces, path, {"format": "pt"})
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(f"{self.shard}: {error}") from error
        with path.open("rb") as file:
            os.fsync(file.fileno())
        data = (self.shard, sha256(path))
        results: Future[list[WriteResult]] = Future()
        results.set_result(
            [
                WriteResult(
                    index=item.index,
                    size_in_bytes=pieces[item.index.fqn].nbytes,
                    storage_data=data,
                )
                for item in plan.items
            ]
        )
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index."""
        places, digests = {}, {}
        for result in (r for part in results for r in part):
            shard, digest = result.storage_data
            places[result.index] = shard
            digests[shard] = digest
        tensors = {}
        for name, about in metadata.state_dict_metadata.items():
            if not isinstance(about, TensorStorageMetadata):
                raise ValueError(f"{name}: expected a tensor, found {about}.")
            tensors[name] = {
                "dtype": str(about.properties.dtype).removeprefix("torch."),
                "shape": list(about.size),
                "pieces": [
                    {
                        "file": places[MetadataIndex(name, piece.offsets)],
                        "offsets": list(piece.offsets),
                        "sizes": list(piece.sizes),
                    }
                    for piece in about.chunks
                ],
            }
        index = {
            "format_version": FORMAT_VERSION,
            "num_shards": self.num_shards,
            "tensors": tensors,
        }
        (self.folder / INDEX_FILE).write_text(json.dumps(index) + "\n", encoding="utf-8")
        self._close_folder(digests)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether this storage could be chosen by a path alone: no."""
        return False


class ShardReader(StorageReader):
    """Reads what :class:`ShardWriter` wrote, whatever pieces are asked for.

    Args:
        folder: Where the files are.

    Raises:
        CheckpointError: The index is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metadata = _read_index(folder / INDEX_FILE)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: a reader serves one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return what there is."""
        return self.metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Do nothing: the files are opened when they are read."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Leave the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Leave the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy blocks of stored pieces into blocks of the tensors that are there."""
        by_file: dict[str, list[Any]] = {}
        for item in plan.items:
            by_file.setdefault(self.metadata.storage_data[item.storage_index], []).append(item)
        for file, items in sorted(by_file.items()):
            with _opened(self.folder / file) as shard:
                for item in items:
                    name = item.storage_index.fqn
                    block = tuple(
                        slice(start, start + length)
                        for start, length in zip(item.storage_offsets, item.lengths, strict=True)
                    )
                    # A scalar has no slices.
                    values = shard.get_slice(name)[block] if block else shard.get_tensor(name)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(values)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether this storage could be chosen by a path alone: no."""
        return False


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a shard, and say its name if it can't be read."""
    try:
        with safe_open(path, framework="pt") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        found = f"{path.stat().st_size} bytes" if path.is_file() else "none"
        raise CheckpointError(
            f"{path}: expected a whole shard, found {found} ({error}). Copy it again."
        ) from error


def _read_index(path: Path) -> Metadata:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version {index['format_version']}, not {FORMAT_VERSION}")
        return Metadata(
            state_dict_metadata={
                name: TensorStorageMetadata(
                    properties=TensorProperties(dtype=getattr(torch, about["dtype"])),
                    size=torch.Size(about["shape"]),
                    chunks=[
                        ChunkStorageMetadata(
                            offsets=torch.Size(piece["offsets"]), sizes=torch.Size(piece["sizes"])
                        )
                        for piece in about["pieces"]
                    ],
                )
                for name, about in index["tensors"].items()
            },
            storage_data=dict(_places(index["tensors"])),
        )
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: expected a file, found none.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: not the index of a sharded checkpoint ({error})."
        ) from error


def _places(tensors: dict[str, Any]) -> Iterator[tuple[MetadataIndex, str]]:
    for name, about in tensors.items():
        for piece in about["pieces"]:
            yield MetadataIndex(name, torch.Size(piece["offsets"])), piece["file"]
