"""Runs of ``tinylm train`` in several processes that talk over gloo."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from training_helpers import inputs, start_process

from tinylm.cli import main

DEADLINE_SECONDS = 120.0


def arguments(out: Path, *further: str) -> list[str]:
    """A run without dropout, whose unequal rows make a mean of means wrong."""
    data = inputs()
    return [
        *("train", "--preset", "tinylm-test", "--tokenizer", str(data.tokenizer)),
        *("--train-file", str(data.train), "--val-file", str(data.val), "--out", str(out)),
        *("--max-steps", "8", "--batch-size", "8", "--no-packing", "--dropout", "0"),
        *("--lr", "3e-3", "--warmup-steps", "2", "--max-seq-len", "32"),
        *("--save-every", "4", "--eval-every", "4", "--log-every", "1", "--eval-max-tokens", "500"),
        *("--sample-tokens", "4", "--no-tensorboard", "--device", "cpu", "--num-threads", "1"),
        *further,
    ]


@contextlib.contextmanager
def group_of_one() -> Iterator[None]:
    """Make this process a group, which DDP and FSDP need."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _worker(environment: dict[str, str], log: Path, command: list[str]) -> None:
    os.environ.update(environment)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = os.fdopen(1, "w", buffering=1)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        main(command)


def start_processes(num: int, command: Sequence[str], logs: Path) -> list[Any]:
    """Start what ``torchrun --nproc-per-node num`` would, without its seconds of imports."""
    port = free_port()
    logs.mkdir(parents=True, exist_ok=True)
    processes = []
    for rank in range(num):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num),
            "LOCAL_WORLD_SIZE": str(num),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        log = logs / f"{rank}.log"
        processes.append(start_process(_worker, environment, log, list(command)))
    return processes


def run_processes(num: int, command: Sequence[str], logs: Path) -> list[str]:
    """Run to the end and return what each process said; all must end with 0."""
    codes = join_all(start_processes(num, command, logs))
    said = [(logs / f"{rank}.log").read_text() for rank in range(num)]
    assert codes == [0] * num, "\n".join(said)
    return said


def join_all(processes: Sequence[Any]) -> list[int | None]:
    for process in processes:
        process.join(DEADLINE_SECONDS)
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.is_alive():
            process.kill()
    return codes
