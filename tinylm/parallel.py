"""Data parallelism with PyTorch's own engines: DDP, FSDP2 and HSDP.

A sharded weight is gathered whole before its layers run, in float32. BitLinear therefore sees the
whole master matrix and finds the same scale and the same codes as one process does; bfloat16, which
would move values across the codes' borders, begins behind the quantiser, under autocast.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tinylm.distributed import World
from tinylm.errors import ConfigError
from tinylm.model import TinyLM
from tinylm.training_config import DEFAULT_GATHER_MB, ParallelConfig

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def choose_mode(config: ParallelConfig, world: World) -> str:
    """Return ``none``, ``ddp``, ``fsdp`` or ``hsdp``.

    Raises:
        ConfigError: The processes can't form the groups that HSDP needs.
    """
    if config.mode in (None, "ddp"):
        return "ddp" if world.size > 1 else "none"
    if config.mode == "hsdp":
        count_replicas(config, world)
    return str(config.mode)


def count_replicas(config: ParallelConfig, world: World) -> int:
    """Return how many groups of HSDP hold a whole model each.

    Raises:
        ConfigError: There would be one group, or the processes don't divide.
    """
    replicas = config.replicas or world.size // world.local_size
    if replicas < 2 or world.size % replicas:
        raise ConfigError(
            f"--parallel hsdp needs two or more groups of equal size, found {replicas} for "
            f"{world.size} processes. Pass --replicas with a divisor of {world.size} above 1, or "
            "--parallel fsdp."
        )
    return replicas


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelModel:
    """A model as this process holds it.

    Attributes:
        mode: ``none``, ``ddp``, ``fsdp`` or ``hsdp``.
        module: The model, its parameters sharded or not.
        compute: What to call in a training step.
    """

    mode: str
    module: TinyLM
    compute: nn.Module

    @property
    def is_sharded(self) -> bool:
        """Whether a process holds only parts of the weights."""
        return self.mode in ("fsdp", "hsdp")

    def last_part(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Return the context of one part of a batch; gradients meet in the last one only.

        With FSDP each part's gradient is reduced at once, since a whole one would not fit; with
        HSDP the groups exchange only the last sum.
        """
        if self.mode == "ddp" and not last:
            return self.compute.no_sync()  # type: ignore[operator]
        if self.mode == "hsdp":
            self.module.set_requires_all_reduce(last)  # type: ignore[operator]
        return contextlib.nullcontext()


def parallelize(model: TinyLM, config: ParallelConfig, world: World) -> ParallelModel:
    """Distribute a model on its device; every process must hold the same weights.

    Raises:
        ConfigError: The processes can't form the groups that HSDP needs.
    """
    mode = choose_mode(config, world)
    compute: nn.Module = model
    if mode == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        device = model.embed_tokens.weight.device
        compute = DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
    elif mode != "none":
        _shard(model, _mesh(model, mode, config, world), config)
    return ParallelModel(mode=mode, module=model, compute=compute)


def _mesh(model: TinyLM, mode: str, config: ParallelConfig, world: World) -> DeviceMesh:
    from torch.distributed.device_mesh import init_device_mesh

    device = model.embed_tokens.weight.device.type
    if mode == "fsdp":
        return init_device_mesh(device, (world.size,), mesh_dim_names=("shard",))
    replicas = count_replicas(config, world)
    shape = (replicas, world.size // replicas)
    return init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))


def _shard(model: TinyLM, mesh: DeviceMesh, config: ParallelConfig) -> None:
    """Shard the layers in groups, so that one group at a time is whole, then the rest."""
    # Imported here, because it takes seconds and most runs are one process.
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    # Weights are gathered as they are, gradients are added up in float32.
    policy = MixedPrecisionPolicy(param_dtype=None, reduce_dtype=torch.float32)
    for linear in model.bit_linears().values():
        linear.keeps_codes = False
    reshard = config.reshard_after_forward
    megabytes = DEFAULT_GATHER_MB if config.gather_mb is None else config.gather_mb
    for group in layer_groups(model, megabytes):
        fully_shard(group, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "last_logits")  # what generating calls


def layer_groups(model: TinyLM, megabytes: int) -> list[list[nn.Module]]:
    """Return the layers that are gathered in one exchange: as few as have that size together.

    An exchange costs each process time, and all of them wait for the slowest, however little it
    brings. The layers of a large model are groups by themselves.
    """
    layers = list(model.layers)
    size = sum(p.numel() * p.element_size() for p in layers[0].parameters())
    together = max(1, math.ceil(megabytes * 1_000_000 / size))
    return [layers[start : start + together] for start in range(0, len(layers), together)]
