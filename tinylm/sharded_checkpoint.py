"""Checkpoints that every process writes its part of, and that any number of processes reads.

torch.distributed.checkpoint plans who writes and who reads what, and cuts the pieces anew where
the number of processes changed; :mod:`tinylm.shard_storage` is its format on the disk.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tinylm.checkpoint import SHARDS_DIR, being_written, load_config, unique_tensors
from tinylm.directory import temporary_name, write_checksums
from tinylm.distributed import World
from tinylm.errors import CheckpointError, TinyLMError
from tinylm.model import TinyLM
from tinylm.shard_storage import ShardReader, ShardWriter

WEIGHTS = "model."
OPTIMIZER = "optimizer."


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under longer names."""
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def save_sharded(
    directory: Path,
    tensors: Mapping[str, Tensor],
    *,
    world: World,
    save_companions: Callable[[Path], None],
) -> None:
    """Write a checkpoint together, whole or not at all; every process must call it.

    The folder must be one that all processes see.

    Args:
        directory: The checkpoint's name.
        tensors: By name; sharded ones are written in parts, whole ones once.
        world: The processes.
        save_companions: Writes the other files into a folder, in the first process.

    Raises:
        CheckpointError: It can't be written; what was there before is intact.
    """
    with contextlib.ExitStack() as stack:

        def open_folder() -> None:
            temporary = stack.enter_context(being_written(directory))
            (temporary / SHARDS_DIR).mkdir()
            save_companions(temporary)

        def close_folder(digests: dict[str, str]) -> None:
            known = {f"{SHARDS_DIR}/{name}": digest for name, digest in digests.items()}
            write_checksums(temporary_name(directory), known)
            stack.close()  # renames

        writer = ShardWriter(
            temporary_name(directory) / SHARDS_DIR,
            rank=world.rank,
            num_shards=world.size,
            open_folder=open_folder,
            close_folder=close_folder,
        )
        with _one_error(directory, "can't be written"):
            dcp.save(
                dict(tensors),
                storage_writer=writer,
                process_group=world.messages,
                no_dist=world.messages is None,
            )


def load_sharded(
    directory: Path, tensors: Mapping[str, Tensor], *, world: World, every: bool = True
) -> None:
    """Read tensors of a sharded checkpoint in place; every process must call it.

    Args:
        directory: The checkpoint.
        tensors: By name; a sharded one reads its own part only.
        world: The processes, as many as wrote it or not.
        every: Whether the checkpoint must hold nothing else.

    Raises:
        CheckpointError: A shard or tensor is missing or doesn't fit.
    """
    reader = ShardReader(directory / SHARDS_DIR)
    _check_fit(directory, reader, tensors, every=every)
    with _one_error(directory, "can't be read"), torch.no_grad():
        dcp.load(
            dict(tensors),
            storage_reader=reader,
            process_group=world.messages,
            no_dist=world.messages is None,
        )


def load_sharded_model(directory: Path) -> TinyLM:
    """Put the weights of a sharded checkpoint together in one process.

    Raises:
        CheckpointError: A shard is missing or doesn't fit the config.
    """
    model = TinyLM.from_config(load_config(directory)).eval()
    weights = prefixed(WEIGHTS, unique_tensors(model))
    load_sharded(directory, weights, world=World(), every=False)
    return model


def _check_fit(
    directory: Path, reader: ShardReader, tensors: Mapping[str, Tensor], *, every: bool
) -> None:
    """Compare names, shapes and dtypes before anything is overwritten."""
    found = reader.metadata.state_dict_metadata
    problems = {"no tensor": sorted(set(tensors) - set(found))}
    if every:
        problems["unknown tensor"] = sorted(set(found) - set(tensors))
    for problem, names in problems.items():
        if names:
            raise CheckpointError(
                f"{directory / SHARDS_DIR}: {problem} {names[0]!r} ({len(names)} such). The "
                "checkpoint belongs to another model."
            )
    for name, tensor in tensors.items():
        about = found[name]
        if not isinstance(about, TensorStorageMetadata):
            raise CheckpointError(f"{directory / SHARDS_DIR}: {name}: expected a tensor.")
        want = f"{tensor.dtype} {list(tensor.shape)}"
        have = f"{about.properties.dtype} {list(about.size)}"
        if want != have:
            raise CheckpointError(
                f"{directory / SHARDS_DIR}: {name}: expected {want}, found {have}. The checkpoint "
                "belongs to another model."
            )


@contextlib.contextmanager
def _one_error(directory: Path, problem: str) -> Iterator[None]:
    """Turn what went wrong in any process into one error, the same in all."""
    try:
        with warnings.catch_warnings():
            # That there is one process only is known.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as failure:
        rank, (error, _) = min(failure.failures.items())
        if isinstance(error, TinyLMError):
            raise CheckpointError(str(error)) from failure
        raise CheckpointError(
            f"{directory}: {problem}: {type(error).__name__} in process {rank}: {error}"
        ) from failure
