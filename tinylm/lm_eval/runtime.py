"""What computes logits for the harness: the PyTorch model, or a runtime of another package.

``tinylm`` knows no other runtime by name. A package that has one announces it as an entry point of
the group ``tinylm.runtimes``; the entry point's name is the file that tells its directories, such
as ``model.onnx``, and it is called with the directory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tinylm.checkpoint import load_model, resolve_checkpoint
from tinylm.config import ModelConfig
from tinylm.device import choose_device, precision_context
from tinylm.errors import CheckpointError, ConfigError
from tinylm.generate import Session, TorchSession
from tinylm.model import TinyLM

RUNTIMES = "tinylm.runtimes"


class Runtime(Protocol):
    """A model that is ready to compute.

    Attributes:
        config: The model's configuration.
        directory: Where it was loaded from; the tokenizer lies there too.
        device: Where its tensors live.
    """

    config: ModelConfig
    directory: Path
    device: torch.device

    def logits(self, input_ids: Tensor, seq_lens: Tensor) -> Iterator[Tensor]:
        """Compute logits at every position.

        Args:
            input_ids: int64 [B, S], right-padded, on any device.
            seq_lens: int64 [B], real tokens of each row.

        Yields:
            Floating point [B, s, V], one part of the positions after the other; those at padding
            mean nothing.
        """

    def session(self) -> Session:
        """Return something that takes cached steps, for generation."""


class TorchRuntime:
    """A checkpoint in PyTorch.

    Args:
        directory: A checkpoint, or a training run's output directory for its best one.
        device: ``auto``, ``cpu``, ``cuda:0`` ...
        precision: ``fp32``, ``bf16`` or ``auto``. In fp32 a row's hidden states do not depend on
            the batch it stands in.

    Raises:
        CheckpointError: The checkpoint can't be loaded.
        ConfigError: No such device or precision.
    """

    def __init__(
        self, directory: str | Path, *, device: str = "auto", precision: str = "fp32"
    ) -> None:
        self.device = choose_device(device)
        self._precision = precision_context(precision, self.device)
        self.directory = resolve_checkpoint(directory)
        self.model = load_model(self.directory).to(self.device)
        self.config = self.model.config

    @torch.no_grad()
    def logits(self, input_ids: Tensor, seq_lens: Tensor) -> Iterator[Tensor]:
        """Compute all logits [B, S, V] at once."""
        mask = torch.arange(input_ids.shape[1]) < seq_lens[:, None]
        with self._precision:
            yield self.model(input_ids.to(self.device), mask.to(self.device))

    def session(self) -> Session:
        """Return the model's cached steps, in this runtime's precision."""
        return _PreciseSession(self.model, self._precision)


class _PreciseSession(TorchSession):
    def __init__(self, model: TinyLM, precision: contextlib.AbstractContextManager[Any]) -> None:
        super().__init__(model)
        self._precision = precision

    def step(self, input_ids: Tensor, seq_lens: Tensor) -> Tensor:
        with self._precision:
            return super().step(input_ids, seq_lens)


def open_runtime(
    directory: str | Path, *, device: str = "auto", precision: str = "fp32"
) -> Runtime:
    """Open a checkpoint, or a directory that an installed runtime knows.

    Args:
        directory: Holds ``model.safetensors``, or the file that a runtime is announced for.
        device: For PyTorch; other runtimes choose their own and take only ``auto`` and ``cpu``.
        precision: For PyTorch; other runtimes compute as they were exported and take only
            ``fp32``.

    Raises:
        TinyLMError: Nothing that can be opened, or an option that would do nothing.
    """
    announced = entry_points(group=RUNTIMES)
    for entry in announced:
        if not (Path(directory) / entry.name).is_file():
            continue
        for option, value, allowed in (
            ("device", device, ("auto", "cpu")),
            ("precision", precision, ("fp32",)),
        ):
            if value not in allowed:
                raise ConfigError(
                    f"{directory}: {option} must be {' or '.join(allowed)} for a directory with "
                    f"{entry.name}, found {value!r}."
                )
        runtime: Runtime = entry.load()(directory)
        return runtime
    try:
        return TorchRuntime(directory, device=device, precision=precision)
    except CheckpointError as error:
        known = ", ".join(entry.name for entry in announced) or "none"
        raise CheckpointError(
            f"{error} Files of other runtimes installed here: {known}."
        ) from error
