"""How a global batch is cut: first among processes, then into parts that go through the model."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from tinylm.distributed import World
from tinylm.errors import ConfigError
from tinylm.training_config import LoopConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The cut of a batch.

    Attributes:
        rank: This process.
        num_processes: Processes that share the batch equally.
        num_parts: Forward and backward passes of each process for one update.
        part_size: Sequences in the largest part.
    """

    rank: int
    num_processes: int
    num_parts: int
    part_size: int

    def parts(self, batch: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        """Return this process's parts of a batch of sequence indices."""
        share = np.split(batch, self.num_processes)[self.rank]
        return np.array_split(share, self.num_parts)


def plan_batch(training: LoopConfig, world: World, *, seq_len: int) -> BatchPlan:
    """Derive how a batch is cut.

    Args:
        training: Batch size, and micro-batch size or number of parts.
        world: The processes.
        seq_len: Tokens of a full sequence, for messages.

    Raises:
        ConfigError: The batch can't be cut equally.
    """
    batch, processes = training.batch_size, world.size
    size = f"a batch of {batch} sequences ({batch * seq_len} tokens)"
    if batch % processes:
        raise ConfigError(
            f"{size} can't be shared equally by {processes} processes. Make --batch-size a "
            f"multiple of {processes} (--batch-tokens one of {processes * seq_len}), or start "
            "another number of processes."
        )
    share = batch // processes
    micro = training.micro_batch_size
    if micro is not None and share % micro:
        raise ConfigError(
            f"{size} on {processes} {'process' if processes == 1 else 'processes'} leaves {share} "
            f"sequences to each, which micro_batch_size {micro} does not divide. Choose a "
            f"--micro-batch-size that divides {share}, or make --batch-size a multiple of "
            f"{processes * micro} (--batch-tokens one of {processes * micro * seq_len})."
        )
    num_parts = training.grad_accum_steps if micro is None else share // micro
    if num_parts > share:
        raise ConfigError(
            f"grad_accum_steps must be at most the {share} sequences that each of {processes} "
            f"processes has of {size}; found {num_parts}."
        )
    return BatchPlan(
        rank=world.rank,
        num_processes=processes,
        num_parts=num_parts,
        part_size=-(-share // num_parts),
    )
