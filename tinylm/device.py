"""Which device to compute on, and in which precision."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from tinylm.errors import ConfigError
from tinylm.training_config import PRECISIONS


def choose_device(name: str) -> torch.device:
    """Turn ``auto`` or a device's name into a device that is there.

    Args:
        name: ``auto`` is the GPU if there is one; else ``cpu``, ``cuda``, ``cuda:1`` ...

    Raises:
        ConfigError: No such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        problem = str(error).splitlines()[0]
        raise ConfigError(
            f"device must be auto, cpu or a GPU of this machine such as cuda:0, found {name!r} "
            f"({problem})."
        ) from error


def precision_context(
    precision: str, device: torch.device
) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which a model computes; it can be entered again and again.

    Args:
        precision: auto, fp32 or bf16; auto is bf16 autocast on a GPU that has it, else float32.
        device: Of the model.

    Raises:
        ConfigError: No such precision.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}, found {precision!r}.")
    if precision == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
        precision = "bf16" if fast else "fp32"
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()
