"""The state of a run besides its weights: counters, random state, identity of the data."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tinylm.checkpoint import STATE_DIR, read_json
from tinylm.directory import sha256
from tinylm.errors import CheckpointError, ConfigError
from tinylm.run_settings import check_layer
from tinylm.training_config import SECTIONS, TrainConfig

if TYPE_CHECKING:
    from tinylm.data import TokenizedCorpus

STATE_FILE = f"{STATE_DIR}/state.json"
OPTIMIZER_FILE = f"{STATE_DIR}/optimizer.safetensors"
RNG_FILE = f"{STATE_DIR}/rng.safetensors"
CONFIG_FILE = f"{STATE_DIR}/training_config.json"


@dataclasses.dataclass(kw_only=True)
class TrainState:
    """Counters of a run.

    Attributes:
        step: Optimiser updates done.
        tokens: Tokens trained on.
        rejected_steps: Steps whose loss or gradient was not finite, in all.
        bad_steps_in_row: The same, since the last good step.
        last_eval_step: Step of the last evaluation, -1 before the first.
        best_step: Step of the lowest validation loss among the checkpoints, None before the first.
        best_loss: That loss, in nats per token.
        val_loss: The last validation loss.
        data_order: State of the batch order.
        fingerprints: Of the data, see :func:`fingerprint`.
        num_threads: CPU threads; another number may change the last bits of a sum.
        device: Kind of device.
        num_processes: Processes of the run; another number changes the order of sums.
    """

    step: int = 0
    tokens: int = 0
    rejected_steps: int = 0
    bad_steps_in_row: int = 0
    last_eval_step: int = -1
    best_step: int | None = None
    best_loss: float | None = None
    val_loss: float | None = None
    data_order: dict[str, Any] = dataclasses.field(default_factory=dict)
    fingerprints: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    num_threads: int = 0
    device: str = ""
    num_processes: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Return the object of ``state.json``."""
        return dataclasses.asdict(self)

    @classmethod
    def load(cls, checkpoint: Path) -> TrainState:
        """Read ``state.json`` of a checkpoint.

        Raises:
            CheckpointError: Missing, or not such a state.
        """
        path = checkpoint / STATE_FILE
        values = read_json(path)
        expected = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or set(values) != expected:
            found = sorted(values) if isinstance(values, dict) else type(values).__name__
            raise CheckpointError(f"{path}: expected {sorted(expected)}, found {found}.")
        return cls(**values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSummary:
    """How a run ended.

    Attributes:
        out: Output directory.
        step: Updates done.
        total_steps: Updates of the whole run.
        stopped: Whether a signal ended it early.
        last_checkpoint: Newest checkpoint, None if stopped before the first step.
        best_checkpoint: The one with the lowest validation loss.
        val_loss: Last validation loss, in nats per token.
        best_val_loss: The lowest among the checkpoints.
        unigram_entropy: Of the validation tokens, in nats: the loss of a model without context.
        rejected_steps: Steps whose loss or gradient was not finite.
        tokens: Tokens trained on.
    """

    out: str
    step: int
    total_steps: int
    stopped: bool
    last_checkpoint: str | None
    best_checkpoint: str | None
    val_loss: float | None
    best_val_loss: float | None
    unigram_entropy: float
    rejected_steps: int
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Return an object that JSON can hold."""
        return dataclasses.asdict(self)


def load_saved_config(path: Path) -> TrainConfig:
    """Read the ``training_config.json`` that a run wrote.

    Raises:
        CheckpointError: Missing, or not such a configuration.
    """
    try:
        layer = check_layer(read_json(path), source=str(path))
        # A run of an older version lacks the sections that are all defaults.
        parts = {name: owner(**layer.get(name, {})) for name, owner in SECTIONS.items()}
        return TrainConfig(out=layer["out"], **parts)
    except (ConfigError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a run's configuration: {error}") from error


def fingerprint(path: str, corpus: TokenizedCorpus) -> dict[str, Any]:
    """Identify a data file and the tokens it became.

    The file's digest shows that the text is the same, the tokens' digest that the tokenizer is.

    Args:
        path: The JSON lines file.
        corpus: What it became.
    """
    digest = hashlib.sha256()
    tokens = corpus.tokens
    for start in range(0, len(tokens), 1 << 22):
        part = np.ascontiguousarray(tokens[start : start + (1 << 22)], dtype="<u4")
        digest.update(part.tobytes())
    return {
        "bytes": Path(path).stat().st_size,
        "sha256": sha256(Path(path)),
        "num_tokens": len(tokens),
        "tokens_sha256": digest.hexdigest(),
    }


def _flag(name: str) -> str:
    """Return the flag of a field that names data."""
    return "--data" if name == "directory" else f"--{name.replace('_', '-')}"


def check_same_data(
    saved: Mapping[str, Mapping[str, Any]],
    now: Mapping[str, Mapping[str, Any]],
    config: TrainConfig,
) -> None:
    """Refuse to go on with other text or another tokenizer.

    Args:
        saved: Fingerprints by field name, from the checkpoint.
        now: Those of the files at hand.
        config: Names the files.

    Raises:
        CheckpointError: A file or the tokenizer changed.
    """
    if set(saved) != set(now):
        raise CheckpointError(
            f"the run was started with {' and '.join(map(_flag, saved))}, found "
            f"{' and '.join(map(_flag, now))}. Name the source that it was started with."
        )
    for name, new in now.items():
        old, path = saved[name], getattr(config.data, name)
        if (old["bytes"], old["sha256"]) != (new["bytes"], new["sha256"]):
            raise CheckpointError(
                f"{path}: the {name.replace('_', ' ')} is not the one the run was started with: "
                f"expected {old['bytes']} bytes with SHA-256 {old['sha256']}, found {new['bytes']} "
                f"bytes with {new['sha256']}. Bring the old file back ({_flag(name)} "
                "says where it is), or start a new run with another --out."
            )
        if old["tokens_sha256"] != new["tokens_sha256"]:
            raise CheckpointError(
                f"{config.data.tokenizer}: the tokenizer is not the one the run was started with: "
                f"{path} became {old['num_tokens']} tokens then and {new['num_tokens']} other ones "
                "now. Pass the old --tokenizer (each checkpoint holds its files), or start a new "
                "run with another --out."
            )


def seed_process(seed: int, *, step: int, rank: int) -> None:
    """Begin a stream of random numbers that no other step or process has."""
    stream = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(stream[0]))


def rng_tensors(device: torch.device) -> dict[str, Tensor]:
    """Return this process's random states, uint8: ``cpu``, and ``cuda`` where it uses a GPU."""
    tensors = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    return tensors


def join_rng(processes: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Name the random states of all processes, such as ``process0.cpu``."""
    return {
        f"process{rank}.{kind}": state
        for rank, states in enumerate(processes)
        for kind, state in states.items()
    }


def restore_rng(
    tensors: Mapping[str, Tensor], device: torch.device, *, rank: int, source: str
) -> None:
    """Put back what :func:`rng_tensors` gave; a state of another kind of device is left out.

    Args:
        tensors: From :func:`join_rng`.
        device: Of this process.
        rank: Number of this process.
        source: File that they came from, for messages.

    Raises:
        CheckpointError: A state is missing or not one.
    """
    cpu = tensors.get(f"process{rank}.cpu")
    if cpu is None:
        raise CheckpointError(
            f"{source}: expected the random state 'process{rank}.cpu', found none."
        )
    try:
        torch.set_rng_state(cpu.clone())
        cuda = tensors.get(f"process{rank}.cuda")
        if cuda is not None and device.type == "cuda":
            torch.cuda.set_rng_state(cuda.clone(), device)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"{source}: not a random state ({error}).") from error
