"""One optimiser step: what a device was given to do, and what came of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchLoss:
    """A batch whose gradients are on the parameters, or soon will be.

    Attributes:
        loss: Mean over its predicted tokens, in nats; a scalar on the device.
        num_tokens: Predicted tokens.
        data_order: Position of the data behind it.
    """

    loss: Tensor
    num_tokens: int
    data_order: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepResult:
    """A step that was done.

    Attributes:
        loss: Mean over the batch's predicted tokens, in nats.
        grad_norm: Before clipping.
        learning_rate: Used by the update.
        num_tokens: Predicted tokens of the batch.
        data_order: Position of the data behind the batch.
        accepted: False if loss or gradient was not finite and nothing was updated.
        ternary: Statistics of the codes if they were asked for, else empty.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    data_order: dict[str, Any]
    accepted: bool
    ternary: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class IssuedStep:
    """A step that a GPU may still be at.

    Attributes:
        batch: What it learned from.
        learning_rate: Used by the update.
        read: Waits for loss and gradient norm.
        statistics: Waits for those of the ternary codes, if they were asked for.
    """

    batch: BatchLoss
    learning_rate: float
    read: Callable[[], list[float]]
    statistics: Callable[[], Mapping[str, Any]]

    def wait(self) -> StepResult:
        """Return what came of it, as soon as loss and norm are known."""
        loss, norm = self.read()
        accepted = math.isfinite(loss) and math.isfinite(norm)
        return StepResult(
            loss=loss,
            grad_norm=norm,
            learning_rate=self.learning_rate,
            num_tokens=self.batch.num_tokens,
            data_order=self.batch.data_order,
            accepted=accepted,
            ternary=self.statistics() if accepted else {},
        )
