"""Proof of which kernels ran: the native library counts its own calls."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

import onnx_ir as ir
from torch import Tensor

from tinylm.errors import NativeError
from tinylm.generate import Session
from tinylm_export.native import NativeInfo, describe_kernels, kernel_calls
from tinylm_export.ops import DOMAIN


class KernelMeter:
    """Checks that each run of a graph calls the library once for every custom op.

    Args:
        library: What should run them; None for the function bodies, which can't be counted.
        model: The graph.
    """

    def __init__(self, library: NativeInfo | None, model: ir.Model) -> None:
        self.library = library
        self._nodes = Counter(node.op_type for node in model.graph if node.domain == DOMAIN)
        self._num_runs = 0

    @contextlib.contextmanager
    def one_run(self) -> Iterator[None]:
        """Count what happens within, which must be one run of the graph.

        Raises:
            NativeError: The library was not called for some of the ops, or more often.
        """
        if self.library is None:
            yield
            return
        before = kernel_calls(self.library, self._nodes)
        yield
        after = kernel_calls(self.library, self._nodes)
        found = {op: after[op] - before[op] for op in self._nodes}
        if found != dict(self._nodes):
            raise NativeError(
                f"{self.library.path} is loaded, but ONNX Runtime did not use it for every op: "
                f"expected {dict(self._nodes)} kernel calls in a run, found {found}. Run with "
                "--no-native for the function bodies."
            )
        self._num_runs += 1

    def describe(self) -> str:
        """Return what ran the ops, with the number of calls that the library counted."""
        text = describe_kernels(self.library)
        if self.library is None:
            return text
        calls = ", ".join(
            f"{count * self._num_runs:,} {op}" for op, count in sorted(self._nodes.items())
        )
        return f"{text}: {calls} calls counted by the library"


class MeteredSession:
    """A session that proves with every step which kernels ran.

    Args:
        session: What steps.
        meter: What proves it.
    """

    def __init__(self, session: Session, meter: KernelMeter) -> None:
        self.config = session.config
        self._session = session
        self._meter = meter

    def start(self, batch_size: int, capacity: int) -> None:
        """Make an empty cache of ``capacity`` tokens for each of ``batch_size`` rows."""
        self._session.start(batch_size, capacity)

    def step(self, input_ids: Tensor, seq_lens: Tensor) -> Tensor:
        """Append tokens to the cache; returns logits [B, V] or [B, S, V]."""
        with self._meter.one_run():
            return self._session.step(input_ids, seq_lens)
