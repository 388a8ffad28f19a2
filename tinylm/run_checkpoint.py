"""Saves and restores a run: weights, optimiser, counters and every process's random state.

Where each process holds the whole model, the first one writes one file. Where weights are sharded,
each writes its part. Either form is read by any number of processes, sharded or not.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from tinylm import training_state as saved_state
from tinylm.checkpoint import (
    check_intact,
    is_sharded,
    load_config,
    read_tensors,
    restore_weights,
    save_companions,
    save_model,
    unique_tensors,
)
from tinylm.distributed import World
from tinylm.errors import CheckpointError
from tinylm.optim import empty_optimizer_tensors, load_optimizer_tensors, optimizer_tensors
from tinylm.parallel import ParallelModel
from tinylm.run_settings import check_resumable
from tinylm.training_config import TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunParts:
    """What a checkpoint is made from and restored into.

    Attributes:
        config: The run.
        model: Weights.
        optimizer: Moments.
        tokenizer: A transformers tokenizer.
        device: Whose random state counts.
        world: The processes.
    """

    config: TrainConfig
    model: ParallelModel
    optimizer: torch.optim.AdamW
    tokenizer: Any
    device: torch.device
    world: World


def save_run(directory: Path, parts: RunParts, state: saved_state.TrainState) -> None:
    """Write a checkpoint; every process must call it.

    Raises:
        CheckpointError: It can't be written.
    """
    module, optimizer, world = parts.model.module, parts.optimizer, parts.world
    rng = saved_state.join_rng(world.gather(saved_state.rng_tensors(parts.device)))
    files = {
        saved_state.STATE_FILE: state.to_dict(),
        saved_state.CONFIG_FILE: parts.config.to_dict(),
        saved_state.RNG_FILE: rng,
    }
    if parts.model.is_sharded:
        from tinylm import sharded_checkpoint as shards

        shards.save_sharded(
            directory,
            shards.prefixed(shards.WEIGHTS, unique_tensors(module))
            | shards.prefixed(shards.OPTIMIZER, optimizer_tensors(module, optimizer)),
            world=world,
            save_companions=lambda folder: save_companions(
                folder, module.config, tokenizer=parts.tokenizer, extra_files=files
            ),
        )
        return

    def save_whole() -> None:
        moments = optimizer_tensors(module, optimizer)
        save_model(
            directory,
            module,
            tokenizer=parts.tokenizer,
            extra_files={**files, saved_state.OPTIMIZER_FILE: moments},
        )

    world.on_main(save_whole)


def check_run(
    checkpoint: Path, config: TrainConfig, fingerprints: dict[str, Any]
) -> saved_state.TrainState:
    """Check that a checkpoint is intact and belongs to the run that is to go on.

    Args:
        checkpoint: The checkpoint.
        config: What was asked for.
        fingerprints: Of the data at hand.

    Returns:
        The counters.

    Raises:
        CheckpointError: It is damaged, or belongs to other data.
        ConfigError: A setting differs that decides about the weights.
    """
    check_intact(checkpoint, training_state=True)
    check_resumable(saved_state.load_saved_config(checkpoint / saved_state.CONFIG_FILE), config)
    if load_config(checkpoint) != config.model:
        raise CheckpointError(
            f"{checkpoint}: config.json and the training configuration beside it differ."
        )
    state = saved_state.TrainState.load(checkpoint)
    saved_state.check_same_data(state.fingerprints, fingerprints, config)
    return state


def restore_run(checkpoint: Path, parts: RunParts, state: saved_state.TrainState) -> bool:
    """Bring back weights, moments and random states; every process must call it.

    Args:
        checkpoint: Checked by :func:`check_run`.
        parts: What to restore.
        state: The counters of the checkpoint.

    Returns:
        Whether every process goes on with its own random numbers. With another number of
        processes each begins a new stream, which depends on the seed and the step.

    Raises:
        CheckpointError: A tensor is missing or doesn't fit.
    """
    module, optimizer, world = parts.model.module, parts.optimizer, parts.world
    if is_sharded(checkpoint):
        from tinylm import sharded_checkpoint as shards

        shards.load_sharded(
            checkpoint,
            shards.prefixed(shards.WEIGHTS, unique_tensors(module))
            | shards.prefixed(shards.OPTIMIZER, empty_optimizer_tensors(module, optimizer)),
            world=world,
        )
    else:
        restore_weights(checkpoint, module)
        file = checkpoint / saved_state.OPTIMIZER_FILE
        load_optimizer_tensors(module, optimizer, read_tensors(file), source=str(file))
    if state.num_processes != world.size:
        saved_state.seed_process(parts.config.training.seed, step=state.step, rank=world.rank)
        return False
    file = checkpoint / saved_state.RNG_FILE
    saved_state.restore_rng(read_tensors(file), parts.device, rank=world.rank, source=str(file))
    return True
