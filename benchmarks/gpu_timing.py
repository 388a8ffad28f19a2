"""What the GPU benchmarks share: contenders in CUDA graphs, timed in turns, and their records.

A graph holds 20 calls over different copies of what a call reads, and the L2 cache is filled with
something else before each replay, so that every call finds its weights or its cache cold.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

import torch
from bench_records import NotRunError, Record, first_line, num_copies
from torch import Tensor

from tinylm_export.bench_report import Spread

Call = Callable[[], Tensor]
CALLS, REPEATS = 20, 15  # calls in a graph; replays
_FLUSH_FACTOR = 4  # times the L2 cache's size are read to fill it
# What a contender's own code may raise: rivals compile, load and check in ways of their own.
REFUSALS = (
    RuntimeError,
    ValueError,
    TypeError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuRecord(Record):
    """A record with what a roofline needs.

    Attributes:
        num_bytes: Least memory traffic of the case with 2-bit weights or the latent cache.
        num_ops: Multiplications and additions of the case.
    """

    num_bytes: float | None = None
    num_ops: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """The least that a case has to do.

    Attributes:
        num_bytes: Bytes to read and write.
        num_ops: Multiplications and additions.
    """

    num_bytes: float
    num_ops: float


@dataclasses.dataclass
class GpuContender:
    """One way to compute a case.

    Attributes:
        name: Shown in the tables.
        calls: The same call over different copies of what it reads.
        error: Departure from the reference, already checked.
        note: What a reader should know of how it ran.
        micros: Microseconds of a call in each replay.
    """

    name: str
    calls: Sequence[Call]
    error: float
    note: str = ""
    micros: list[float] = dataclasses.field(default_factory=list)


class Stopwatch:
    """Times contenders on the current device.

    Args:
        repeats: Replays of each contender's graph.

    Attributes:
        l2_bytes: Size of the L2 cache.
    """

    def __init__(self, repeats: int = REPEATS) -> None:
        self.repeats = repeats
        self.l2_bytes = int(torch.cuda.get_device_properties(0).L2_cache_size)
        # Read, not written: written lines would go to memory while the next contender is timed.
        self._other = torch.zeros(_FLUSH_FACTOR * self.l2_bytes // 4, device="cuda")
        self._sink = torch.zeros((), device="cuda")
        self._stream = torch.cuda.Stream()  # one, since libraries keep workspace for each

    def copies(self, bytes_each: int) -> int:
        """Return how many copies a rotation needs; each call has its own where they are small."""
        return min(CALLS, num_copies(bytes_each, 2 * self.l2_bytes) + 1)

    def flush(self) -> None:
        """Fill the L2 cache with something else."""
        torch.sum(self._other, dim=0, out=self._sink)

    def time_in_turns(self, contenders: Sequence[GpuContender]) -> dict[str, NotRunError]:
        """Time every contender; each repeat begins with another one.

        Returns:
            Why contenders that can't be captured were not timed, by name.
        """
        graphs, refused = {}, {}
        for contender in contenders:
            try:
                graphs[contender.name] = self._capture(contender.calls)
            except REFUSALS as error:
                refused[contender.name] = NotRunError(f"no CUDA graph: {first_line(error)}")
        turns = [c for c in contenders if c.name in graphs]
        events = []
        for repeat in range(self.repeats):
            first = repeat % max(1, len(turns))
            for contender in turns[first:] + turns[:first]:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self.flush()
                start.record()
                graphs[contender.name].replay()
                end.record()
                events.append((contender, start, end))
        torch.cuda.synchronize()
        for contender, start, end in events:
            contender.micros.append(1e3 * start.elapsed_time(end) / CALLS)
        return refused

    def _capture(self, calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
        """Capture a rotation over the calls, each called once before, and replay it once.

        ``torch.cuda.graph`` would empty the allocator's cache for each of some hundred graphs.
        """
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for call in calls:  # libraries choose and allocate in their first call
                call()
            self._stream.synchronize()
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                for i in range(CALLS):
                    calls[i % len(calls)]()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # the first error says more
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph.replay()
        torch.cuda.synchronize()
        return graph


def micros(
    section: str, case: str, name: str, result: GpuContender | NotRunError, work: Work
) -> GpuRecord:
    """Record a contender's microseconds a call, or why there are none."""
    record = GpuRecord(
        section=section,
        case=case,
        contender=name,
        unit="us",
        num_bytes=work.num_bytes,
        num_ops=work.num_ops,
    )
    if isinstance(result, NotRunError):
        return dataclasses.replace(record, not_run=str(result))
    return dataclasses.replace(
        record, spread=Spread.of(result.micros), error=result.error, note=result.note
    )


def run_case(
    stopwatch: Stopwatch,
    section: str,
    case: str,
    ready: dict[str, GpuContender | NotRunError],
    work: Work,
) -> list[GpuRecord]:
    """Time the contenders of a case that are ready, and record all of them."""
    running = [c for c in ready.values() if isinstance(c, GpuContender)]
    refused = stopwatch.time_in_turns(running)
    return [
        micros(section, case, name, refused.get(name, found), work) for name, found in ready.items()
    ]


def check(
    name: str, calls: Sequence[Call], expected: Tensor, limit: float, note: str = ""
) -> GpuContender:
    """Call the first and the last copy and compare with the reference.

    Args:
        name: Of the contender.
        calls: Its calls, each giving [M, N].
        expected: The reference, float64 [M, N].
        limit: Largest departure that is taken for rounding.
        note: What a reader should know.

    Raises:
        NotRunError: The contender refuses, or its answer is wrong.
    """
    try:
        errors = [departure(call(), expected) for call in (calls[0], calls[-1])]
    except REFUSALS as reason:
        raise NotRunError(f"refuses: {first_line(reason)}") from reason
    for error in errors:  # each alone: max() may lose a NaN
        if not error <= limit:
            raise NotRunError(f"wrong answer: departs by {error:.2g}, limit {limit:g}")
    return GpuContender(name=name, calls=calls, error=max(errors), note=note)


def departure(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference of a row's values, relative to the row's largest one."""
    difference = (found.double() - expected).abs().amax(dim=-1)
    return float((difference / expected.abs().amax(dim=-1).clamp_min(1e-30)).max())
