"""Which device to compute on, and in which precision."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tinylm.errors import ConfigError
from tinylm.training_config import PRECISIONS


def choose_device(name: str, *, local_rank: int = 0, local_size: int = 1) -> torch.device:
    """Turn ``auto`` or a device's name into a device that is there.

    Args:
        name: ``auto`` is the GPU if there is one; else ``cpu``, ``cuda``, ``cuda:1`` ...
        local_rank: Number of this process on its machine; of several each takes a GPU of its own.
        local_size: Processes of the run on this machine.

    Raises:
        ConfigError: No such device, or fewer than processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if local_size > 1 and name.startswith("cuda"):
        if name != "cuda":
            raise ConfigError(
                f"device must be auto, cpu or cuda where {local_size} processes take a GPU each, "
                f"found {name!r}. CUDA_VISIBLE_DEVICES chooses among the GPUs."
            )
        if torch.cuda.device_count() < local_size:
            raise ConfigError(
                f"{local_size} processes on this machine need as many GPUs, found "
                f"{torch.cuda.device_count()}. Start fewer (torchrun --nproc-per-node), or pass "
                "--device cpu."
            )
        name = f"cuda:{local_rank}"
        torch.cuda.set_device(local_rank)
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        problem = str(error).splitlines()[0]
        raise ConfigError(
            f"device must be auto, cpu or a GPU of this machine such as cuda:0, found {name!r} "
            f"({problem})."
        ) from error


def device_name(device: torch.device) -> str:
    """Return what a GPU is called, such as ``NVIDIA H100 80GB HBM3``; else the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


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


def start_reading(values: Tensor) -> Callable[[], list[float]]:
    """Begin to copy a vector to the host; return what waits for it and gives its numbers.

    What a GPU is given meanwhile is not waited for.
    """
    if values.device.type != "cuda":
        return values.tolist
    copied = values.to("cpu", non_blocking=True)  # into pinned memory
    done = torch.cuda.current_stream(values.device).record_event()

    def finish() -> list[float]:
        done.synchronize()
        return copied.tolist()

    return finish
