"""The processes of a run: who they are, and what they tell each other.

``torchrun`` starts one process a GPU and describes them in the environment. A run without it is one
process, for which everything here is a plain function call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from tinylm.errors import ConfigError, TinyLMError

T = TypeVar("T")
_START = "tinylm-start"
_START_SECONDS = 600


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """The processes of a run, seen from one of them.

    Messages go through a group of their own over gloo, so that they wait for no GPU and cross no
    gradient. Every method that sends one must be called by all processes in the same order.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        local_rank: Number of this process on its machine.
        local_size: Processes on its machine.
        messages: Group for small messages; None where there is one process.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    messages: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def any(self, value: bool) -> bool:
        """Return whether it is true in any process."""
        if self.size == 1:
            return value
        return self.sum([float(value)])[0] > 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Add up numbers over all processes, in float64; whole numbers stay exact up to 2**53."""
        return self.start_sum(values)()

    def start_sum(self, values: Sequence[float]) -> Callable[[], list[float]]:
        """Begin what :meth:`sum` does; return what waits for the result.

        The message is on its way while the caller gives a GPU something to do.
        """
        if self.size == 1:
            return lambda: list(values)
        total = torch.tensor(values, dtype=torch.float64)
        work = dist.all_reduce(total, group=self.messages, async_op=True)

        def finish() -> list[float]:
            work.wait()
            return total.tolist()

        return finish

    def sum_tensor(self, tensor: Tensor) -> Tensor:
        """Add up a tensor on the device over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Return every process's value, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.messages)
        return values

    def on_main(self, action: Callable[[], T]) -> T:
        """Do something in the first process only and return its result in all.

        Raises:
            TinyLMError: What the first process raised; raised in all, so that none waits forever.
        """
        if self.size == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = action()
            except TinyLMError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self.messages)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    @contextlib.contextmanager
    def local_main_first(self) -> Iterator[None]:
        """Let the first process of each machine do something before the others, who find it done.

        Its error ends the run: torchrun stops the processes that wait.
        """
        if self.size == 1:
            yield
        elif self.local_rank == 0:
            yield
            self.gather(None)
        else:
            self.gather(None)
            yield


def launched_world(environment: Mapping[str, str] | None = None) -> World:
    """Read what ``torchrun`` put into the environment; without it, a single process.

    Raises:
        ConfigError: The variables are incomplete or contradict each other.
    """
    found = os.environ if environment is None else environment
    if found.get("WORLD_SIZE", "1") == "1":
        return World()
    world = World(
        rank=_number(found, "RANK"),
        size=_number(found, "WORLD_SIZE"),
        local_rank=_number(found, "LOCAL_RANK"),
        local_size=_number(found, "LOCAL_WORLD_SIZE", found["WORLD_SIZE"]),
    )
    if world.rank >= world.size or world.local_rank >= world.local_size:
        raise ConfigError(
            f"RANK must be below WORLD_SIZE and LOCAL_RANK below LOCAL_WORLD_SIZE, found "
            f"{world.rank} of {world.size} and {world.local_rank} of {world.local_size}. "
            "Start the processes with torchrun."
        )
    return world


def _number(environment: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = environment.get(name, default)
    if text is None or not text.isdigit():
        raise ConfigError(
            f"the environment variable {name} must be a number where WORLD_SIZE is "
            f"{environment.get('WORLD_SIZE')}, found {text!r}. Start the processes with torchrun: "
            "torchrun --nproc-per-node N -m tinylm.cli train ..."
        )
    return int(text)


def connect(world: World, device: torch.device, *, alone: bool = False) -> World:
    """Connect the processes: NCCL between GPUs, gloo between CPUs and for messages.

    Args:
        world: From :func:`launched_world`.
        device: Of this process.
        alone: Whether a single process needs a group too, as sharding does.

    Returns:
        The world with its group for messages.
    """
    if world.size == 1 and not alone:
        return world
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = dist.HashStore() if world.size == 1 else _store_of_this_start(world)
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size)
    messages = dist.new_group(backend="gloo")
    assert not isinstance(messages, int)  # what it is for processes outside of the group
    return dataclasses.replace(world, messages=messages)


def _store_of_this_start(world: World) -> dist.Store:
    """Return a store that holds nothing of processes that torchrun has replaced.

    torchrun keeps one store over restarts, and the addresses of dead processes in it. So the first
    process names each start anew, and the others take the name only from a first process that has
    seen them, not from one that is gone.
    """
    store: dist.Store = next(rendezvous("env://", world.rank, world.size))[0]
    mine = uuid.uuid4().hex
    if world.is_main:
        store.set(_START, mine)
        for rank in range(1, world.size):
            here = f"{_START}/{mine}/{rank}"
            store.wait([here], datetime.timedelta(seconds=_START_SECONDS))
            store.set(f"{here}/seen", store.get(here).decode())
        return dist.PrefixStore(f"{_START}/{mine}", store)
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if store.check([_START]):
            name = store.get(_START).decode()
            here = f"{_START}/{name}/{world.rank}"
            store.set(here, mine)
            if store.check([f"{here}/seen"]) and store.get(f"{here}/seen").decode() == mine:
                return dist.PrefixStore(f"{_START}/{name}", store)
        time.sleep(0.02)
    raise ConfigError(
        f"process {world.rank} of {world.size} found no process 0 at "
        f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} within "
        f"{_START_SECONDS} s. Look at that process's messages, and start all of them anew."
    )


def disconnect() -> None:
    """Leave the groups; only after a run that went well, since it may wait for the others."""
    if dist.is_initialized():
        dist.destroy_process_group()


def like(source: Tensor, target: Tensor) -> Tensor:
    """Return a copy of a whole tensor in the form of another: on its device, sharded if it is.

    Args:
        source: The whole values, the same in every process.
        target: Decides the form; a tensor of another shape, such as a scalar, stays whole.
    """
    value = source.to(target.device, copy=True)
    if not is_sharded(target) or value.shape != target.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = target.device_mesh, target.placements  # type: ignore[attr-defined]
    return distribute_tensor(value, mesh, placements, src_data_rank=None)


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor; of one that isn't sharded, all of it."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def sum_over_parts(values: Tensor, like: Tensor) -> Tensor:
    """Add up what processes computed of their parts of a tensor sharded as ``like``.

    Every process must call it; copies of a part count once. One exchange for many tensors, and
    operators on plain tensors, are far quicker than one on each sharded tensor.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements = [Partial() if p.is_shard() else Replicate() for p in like.placements]  # type: ignore[attr-defined]
    mesh = like.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(values, mesh, placements, run_check=False).full_tensor()


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor's values are distributed over processes."""
    return hasattr(tensor, "to_local")  # a DTensor, whose module takes long to import
