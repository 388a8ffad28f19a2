"""The output directory of a training run: its checkpoints, and which of them to keep.

checkpoints/step-00000100/    see tinylm.checkpoint
last, best                    relative links to a checkpoint
training_config.json          metrics.jsonl    loss_curve.png    tensorboard/
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tinylm.checkpoint import (
    STEP_PREFIX,
    is_checkpoint,
    list_checkpoints,
    other_checkpoints,
)
from tinylm.directory import SUMS_FILE, TEMPORARY_PREFIX
from tinylm.errors import CheckpointError, ConfigError


class RunDirectory:
    """One output directory.

    Args:
        path: The directory.
        keep_last: Newest checkpoints to keep, besides the best.
    """

    def __init__(self, path: Path, *, keep_last: int = 2) -> None:
        self.path = path
        self.keep_last = keep_last
        self.checkpoints = path / "checkpoints"
        self.config_file = path / "training_config.json"
        self.metrics_file = path / "metrics.jsonl"
        self.curve_file = path / "loss_curve.png"
        self.tensorboard = path / "tensorboard"

    def check_free(self) -> None:
        """Make sure that a new run may use the directory.

        Raises:
            ConfigError: It is not empty, or a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"out must be a directory, found the file {self.path}.")
        if self.path.is_dir() and any(self.path.iterdir()):
            raise ConfigError(
                f"{self.path}: the output directory is not empty. Pass --resume to go on with the "
                "run in it, or choose another --out."
            )

    def unfinished(self) -> list[Path]:
        """Return what interrupted saves left behind: checkpoints that are not whole."""
        if not self.checkpoints.is_dir():
            return []
        begun = sorted(self.checkpoints.glob(f"{TEMPORARY_PREFIX}{STEP_PREFIX}*"))
        return begun + [p for p in list_checkpoints(self.checkpoints) if not _is_whole(p)]

    def prepare(self) -> None:
        """Make the directory and remove what an interrupted save left behind."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        for stale in self.checkpoints.glob(f"{TEMPORARY_PREFIX}*"):
            shutil.rmtree(stale, ignore_errors=True)

    def checkpoint(self, step: int) -> Path:
        """Return the path of the checkpoint after ``step`` updates."""
        return self.checkpoints / f"{STEP_PREFIX}{step:08d}"

    def linked(self, name: str) -> Path | None:
        """Return the checkpoint that the link ``last`` or ``best`` leads to."""
        link = self.path / name
        return self.path / link.readlink() if link.is_symlink() else None

    def resume_point(self, resume_from: Path | None = None) -> Path | None:
        """Return the checkpoint to go on from, or None if none was written yet.

        Args:
            resume_from: A checkpoint of this run; default: ``last``, or the newest before it that
                was written to the end.

        Raises:
            CheckpointError: The checkpoint isn't there, or belongs to another run.
        """
        checkpoint = resume_from if resume_from is not None else self._last_whole()
        if checkpoint is None:
            return None
        if not is_checkpoint(checkpoint):
            raise CheckpointError(
                f"{checkpoint}: expected a checkpoint to resume from, found none. "
                f"{other_checkpoints(checkpoint)} Go on from one with --resume-from."
            )
        if checkpoint.resolve().parent != self.checkpoints.resolve():
            raise CheckpointError(
                f"{checkpoint}: expected a checkpoint of this run, in {self.checkpoints}, found "
                "one elsewhere."
            )
        return self.checkpoints / checkpoint.resolve().name

    def _last_whole(self) -> Path | None:
        last = self.linked("last")
        if last is None or _is_whole(last):
            return last
        past = [p for p in list_checkpoints(self.checkpoints) if p.name < last.name]
        return next((p for p in reversed(past) if _is_whole(p)), last)

    def commit(self, step: int, *, best_step: int | None) -> None:
        """Point ``last`` and ``best`` at checkpoints that are written, and remove old ones.

        Checkpoints after ``step``, of a future that a resumed run left, are not counted and stay
        until they are replaced.

        Args:
            step: Of the newest checkpoint.
            best_step: Of the best checkpoint, if one is known.
        """
        self._link("last", self.checkpoint(step))
        best = None if best_step is None else self.checkpoint(best_step)
        if best is not None and best.is_dir():
            self._link("best", best)
        else:
            (self.path / "best").unlink(missing_ok=True)
        newest = self.checkpoint(step).name
        past = [p for p in list_checkpoints(self.checkpoints) if p.name <= newest]
        for old in past[: -self.keep_last]:
            if old != best:
                # Renamed first, so that an interrupted removal can't leave half a checkpoint.
                doomed = self.checkpoints / f"{TEMPORARY_PREFIX}old-{old.name}"
                shutil.rmtree(doomed, ignore_errors=True)
                old.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)

    def _link(self, name: str, target: Path) -> None:
        temporary = self.path / f"{TEMPORARY_PREFIX}{name}"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(os.path.relpath(target, self.path))
        temporary.replace(self.path / name)


def _is_whole(checkpoint: Path) -> bool:
    """Return whether a checkpoint was written to the end: its digests come last."""
    return (checkpoint / SUMS_FILE).is_file()
