"""AdamW and the learning-rate schedules of a training run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from tinylm.distributed import is_sharded, like, local, sum_over_parts
from tinylm.errors import CheckpointError, ConfigError
from tinylm.training_config import OptimizerConfig, ScheduleConfig

# What AdamW keeps for each parameter.
_STATE_NAMES = ("step", "exp_avg", "exp_avg_sq")


class Schedule:
    """Learning rate and weight decay of each step.

    The rate rises linearly over the warm-up and reaches its peak at the warm-up's last step. After
    that, with ``p`` the part of the remaining steps that is done:

    - cosine: ``floor + (peak - floor) (1 + cos(pi p)) / 2``
    - linear: ``floor + (peak - floor) (1 - p)``
    - two-stage (microsoft/unilm, *The Era of 1-bit LLMs: Training Tips, Code and FAQ*): the linear
      line, and from ``second_stage_start`` of the run on the line with the peak ``second_lr``;
      weight decay is off there.

    ``floor`` is ``min_lr_ratio`` of the peak.

    Args:
        config: Kind, peaks and floor.
        total_steps: Optimiser steps of the whole run.

    Raises:
        ConfigError: The warm-up is as long as the run.
    """

    def __init__(self, config: ScheduleConfig, total_steps: int) -> None:
        if config.warmup_steps >= total_steps:
            raise ConfigError(
                f"warmup_steps must be less than the run's {total_steps} steps, found "
                f"{config.warmup_steps}. Pass --warmup-steps {total_steps // 10}, or train longer."
            )
        self.config = config
        self.total_steps = total_steps

    def _in_second_stage(self, step: int) -> bool:
        start = self.config.second_stage_start
        return start is not None and step >= start * self.total_steps

    def learning_rate(self, step: int) -> float:
        """Return the rate of the update number ``step``, counted from 0."""
        config = self.config
        peak = config.lr
        if self._in_second_stage(step) and config.second_lr is not None:
            peak = config.second_lr
        if step < config.warmup_steps:
            return peak * (step + 1) / config.warmup_steps
        done = (step + 1 - config.warmup_steps) / (self.total_steps - config.warmup_steps)
        done = min(done, 1.0)
        left = (1.0 + math.cos(math.pi * done)) / 2.0 if config.kind == "cosine" else 1.0 - done
        return peak * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * left)

    def weight_decay_factor(self, step: int) -> float:
        """Return the factor on the weight decay of the update number ``step``: 1, or 0."""
        return 0.0 if self._in_second_stage(step) else 1.0


class ShardedAdamW(torch.optim.AdamW):
    """AdamW over the parts of sharded parameters.

    The update is elementwise, so each process does that of its parts as on plain tensors; on
    sharded tensors PyTorch spends tens of milliseconds a step on deciding so. States are sharded
    as their parameters are.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Do one update with the gradients that are there."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter] = _zero_state(parameter)
            states = [self.state[p] for p in parameters]
            adamw(
                [local(p) for p in parameters],
                [local(p.grad) for p in parameters],
                [local(state["exp_avg"]) for state in states],
                [local(state["exp_avg_sq"]) for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                found_inf=getattr(self, "found_inf", None),
            )


def _zero_state(parameter: Tensor) -> dict[str, Tensor]:
    """Return AdamW's state before the first update, sharded as the parameter is."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
    }


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Make AdamW with weight decay on matrices only.

    A matrix is a parameter with two or more dimensions. The embedding counts as one, as in GPT-2's
    and Llama's trainings: it is usually tied to the head, which is a matrix like the others. Norm
    weights are not decayed.

    Args:
        model: Its parameters are optimised, shared ones once.
        config: Betas, eps and decay. The learning rate is set at each step.
    """
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (matrices if parameter.ndim >= 2 else vectors).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    kind = ShardedAdamW if is_sharded(matrices[0]) else torch.optim.AdamW
    # The fused kernel updates a parameter in one pass over memory, on the CPU too.
    return kind(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def step_if_finite(optimizer: torch.optim.AdamW, figures: Tensor) -> None:
    """Do one update, unless a figure is not finite: then weights and moments stay as they are.

    The fused kernel looks by itself, as it does for ``torch.amp.GradScaler``, so that a GPU need
    not wait until the host knows.

    Args:
        optimizer: Made by :func:`build_optimizer`.
        figures: What tells whether the gradients are sound, such as loss and norm; any shape.
    """
    optimizer.found_inf = (~figures.isfinite().all()).float()  # type: ignore[attr-defined]
    optimizer.step()


@torch.no_grad()
def clip_gradients(optimizer: torch.optim.AdamW, max_norm: float) -> Tensor:
    """Shorten all gradients together to a norm of at most ``max_norm``, in place.

    Args:
        optimizer: Whose parameters have them; all are sharded or none.
        max_norm: Largest Euclidean norm.

    Returns:
        The norm before, over all processes' parts; a scalar.
    """
    parameters = itertools.chain.from_iterable(g["params"] for g in optimizer.param_groups)
    owners = [p for p in parameters if p.grad is not None]
    if not owners or not is_sharded(owners[0]):
        return torch.nn.utils.clip_grad_norm_(owners, max_norm)
    parts = [local(p.grad) for p in owners]
    squares = torch.stack(torch._foreach_norm(parts)).square().sum()
    norm = sum_over_parts(squares, owners[0]).sqrt()
    torch._foreach_mul_(parts, (max_norm / (norm + 1e-6)).clamp(max=1.0))  # as torch's own
    return norm


def set_step_hyperparameters(
    optimizer: torch.optim.AdamW, schedule: Schedule, config: OptimizerConfig, step: int
) -> float:
    """Set learning rate and weight decay for one update.

    Args:
        optimizer: Made by :func:`build_optimizer`.
        schedule: Of the run.
        config: The optimiser's configuration.
        step: Number of the update, from 0.

    Returns:
        The learning rate.
    """
    rate = schedule.learning_rate(step)
    matrices, vectors = optimizer.param_groups
    matrices["lr"] = vectors["lr"] = rate
    matrices["weight_decay"] = config.weight_decay * schedule.weight_decay_factor(step)
    return rate


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Return the optimiser's state by name, such as ``exp_avg.layers.0.mlp.up_proj.weight``.

    Parameters without a state yet (before the first update) are left out.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value
    return tensors


def empty_optimizer_tensors(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Give every parameter a state of zeros, to be filled in, sharded as the parameter is.

    Returns:
        What :func:`optimizer_tensors` returns: these very tensors by name.
    """
    for parameter in model.parameters():
        optimizer.state[parameter] = _zero_state(parameter)
    return optimizer_tensors(model, optimizer)


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.AdamW, tensors: Mapping[str, Tensor], *, source: str
) -> None:
    """Put back what :func:`optimizer_tensors` gave, as copies on the parameters' devices.

    A sharded parameter takes its part of each tensor.

    Args:
        model: The model whose parameters ``optimizer`` holds.
        optimizer: Made by :func:`build_optimizer`.
        tensors: State by name.
        source: File that it came from, for messages.

    Raises:
        CheckpointError: A name or a shape doesn't belong to the model.
    """
    left = dict(tensors)
    for name, parameter in model.named_parameters():
        state = {}
        for key in _STATE_NAMES:
            value = left.pop(f"{key}.{name}", None)
            if value is None:
                continue
            expected = [] if key == "step" else list(parameter.shape)
            if list(value.shape) != expected:
                raise CheckpointError(
                    f"{source}: {key}.{name} must have the shape {expected}, found "
                    f"{list(value.shape)}. The checkpoint belongs to another model."
                )
            # `step` lives where the fused kernel wants it: with the parameter.
            state[key] = like(value, parameter)
        if state and len(state) < len(_STATE_NAMES):
            missing = sorted(set(_STATE_NAMES) - set(state))
            raise CheckpointError(f"{source}: no {', '.join(missing)} for {name}.")
        if state:
            optimizer.state[parameter] = state
    if left:
        raise CheckpointError(
            f"{source}: unknown tensor {sorted(left)[0]!r} ({len(left)} in all). The checkpoint "
            "belongs to another model."
        )
