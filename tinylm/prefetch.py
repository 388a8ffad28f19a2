"""Batches made in the background, in the order's order and with its exact position."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tinylm.data import Batch


class Order(Protocol):
    """What :class:`BatchQueue` needs of a :class:`tinylm.data.BatchOrder`."""

    def __next__(self) -> npt.NDArray[np.int64]:
        """Return the next batch's sequence indices."""

    def state_dict(self) -> dict[str, int]:
        """Return the position."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position."""


class BatchQueue:
    """Reads some batches ahead of the training step.

    The order is advanced in the caller's thread, and each batch carries the position behind it. So
    :meth:`state_dict` is the position of the last batch that was taken, however many more are
    under way, and a resumed run sees the same batches.

    Args:
        order: Which sequences make up each batch.
        make: Turns indices into the parts of a batch.
        depth: Batches under way; 0: each is made when it is asked for.
        pin: Put them into page-locked memory, from which a GPU copies without waiting.
    """

    def __init__(
        self,
        order: Order,
        make: Callable[[npt.NDArray[np.int64]], list[Batch]],
        *,
        depth: int = 2,
        pin: bool = False,
    ) -> None:
        self._order = order
        self._make = make
        self._depth = depth
        self._pin = pin
        self._taken = order.state_dict()
        self._under_way: deque[tuple[dict[str, int], Future[list[Batch]]]] = deque()
        self._thread: ThreadPoolExecutor | None = None
        if depth:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")

    def __iter__(self) -> BatchQueue:
        """Return itself: the queue has one position."""
        return self

    def __next__(self) -> list[Batch]:
        """Return the parts of the next batch.

        Raises:
            DataError: The data can't be read.
        """
        if self._thread is None:
            indices = next(self._order)
            self._taken = self._order.state_dict()
            return self._build(indices)
        while len(self._under_way) < self._depth:
            self._submit(self._thread)
        position, future = self._under_way.popleft()
        parts = future.result()
        self._taken = position
        self._submit(self._thread)
        return parts

    def state_dict(self) -> dict[str, int]:
        """Return the position behind the last batch taken, as JSON can hold it."""
        return self._taken

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position; what is under way is dropped.

        Raises:
            DataError: The position is not one of this data.
        """
        self._under_way.clear()
        self._order.load_state_dict(state)
        self._taken = self._order.state_dict()

    def _submit(self, thread: ThreadPoolExecutor) -> None:
        indices = next(self._order)
        self._under_way.append((self._order.state_dict(), thread.submit(self._build, indices)))

    def _build(self, indices: npt.NDArray[np.int64]) -> list[Batch]:
        parts = self._make(indices)
        return [part.pin_memory() for part in parts] if self._pin else parts
