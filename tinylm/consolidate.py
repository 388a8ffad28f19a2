"""Makes a checkpoint with its weights in one file, for every command to take, of any other."""

from __future__ import annotations

import shutil
from pathlib import Path

from tinylm.checkpoint import (
    MODEL_FILE,
    SHARDS_DIR,
    STATE_DIR,
    being_written,
    check_intact,
    is_sharded,
    resolve_checkpoint,
    save_tensors,
    unique_tensors,
)
from tinylm.directory import SUMS_FILE, write_checksums
from tinylm.errors import ConfigError

_LEFT_OUT = {SHARDS_DIR, STATE_DIR, SUMS_FILE}


def consolidate(source: str | Path, out: str | Path) -> Path:
    """Write a checkpoint's weights into one safetensors file, beside its config and tokenizer.

    The training state stays behind: a run goes on from its own checkpoints, with any number of
    processes.

    Args:
        source: A checkpoint, sharded or not, or a run's output directory, which stands for its best
            checkpoint.
        out: Directory to write; new, empty, or a checkpoint to replace.

    Returns:
        The checkpoint that was read.

    Raises:
        CheckpointError: A file or shard is missing or altered, or ``out`` can't be written.
        ConfigError: ``out`` is the checkpoint itself.
    """
    checkpoint, out = resolve_checkpoint(source, sharded=True), Path(out)
    if out.resolve() in (checkpoint.resolve(), Path(source).resolve()):
        raise ConfigError(f"{out}: expected another directory than the one that is read.")
    check_intact(checkpoint, training_state=True)
    with being_written(out) as temporary:
        for path in checkpoint.iterdir():
            if path.is_file() and path.name not in _LEFT_OUT:
                shutil.copyfile(path, temporary / path.name)
        if is_sharded(checkpoint):
            from tinylm.sharded_checkpoint import load_sharded_model

            save_tensors(temporary / MODEL_FILE, unique_tensors(load_sharded_model(checkpoint)))
        write_checksums(temporary)
    return checkpoint
