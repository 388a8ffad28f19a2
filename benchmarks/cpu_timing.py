"""What the CPU benchmarks share: settings, contenders and timing in turns."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench_records import NotRunError, Record

from tinylm_export.bench_report import Spread

# Pauses between contenders outlast the busy waiting of the last one's idle threads.
_SETTLE_SECONDS = 0.06
_BLOCK_SECONDS = 0.02
_MOST_CALLS = 2000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How to measure.

    Attributes:
        repeats: Timed turns of each contender.
        cold_bytes: What the copies of a contender's weights together exceed.
        work_dir: Where built rivals and random models are kept.
        threads: Numbers of threads to measure with.
    """

    repeats: int
    cold_bytes: int
    work_dir: Path
    threads: tuple[int, ...]


@dataclasses.dataclass
class Contender:
    """One way to compute a case.

    Attributes:
        name: Shown in the tables.
        calls: The same call over different copies of the weights, so that a round through all of
            them finds none in a core's own cache.
        error: Departure from the reference, already checked.
        seconds: Time of a call in each repeat.
    """

    name: str
    calls: Sequence[Callable[[], object]]
    error: float
    seconds: list[float] = dataclasses.field(default_factory=list)


def time_in_turns(contenders: Sequence[Contender], *, repeats: int, num_threads: int) -> None:
    """Time every contender ``repeats`` times; each repeat begins with another one."""
    counts = [_num_calls(contender) for contender in contenders]
    pairs = list(zip(contenders, counts, strict=True))
    for repeat in range(repeats):
        first = repeat % len(pairs)
        for contender, count in pairs[first:] + pairs[:first]:
            if num_threads > 1:
                time.sleep(_SETTLE_SECONDS)
            contender.seconds.append(_time_block(contender.calls, count))


def _num_calls(contender: Contender) -> int:
    """Return how many calls fill a block."""
    for call in contender.calls:  # the first call of each copy allocates
        call()
    once = _time_block(contender.calls, 1)
    return max(1, min(_MOST_CALLS, round(_BLOCK_SECONDS / once)))


def _time_block(calls: Sequence[Callable[[], object]], count: int) -> float:
    order = [calls[i % len(calls)] for i in range(count)]
    calls[-1]()  # wakes the threads
    start = time.perf_counter()
    for call in order:
        call()
    return (time.perf_counter() - start) / count


def micros(
    section: str, case: str, name: str, num_threads: int, result: Contender | NotRunError
) -> Record:
    """Record a contender's microseconds a call, or why there are none."""
    record = Record(section=section, case=case, contender=name, threads=num_threads, unit="us")
    if isinstance(result, NotRunError):
        return dataclasses.replace(record, not_run=str(result))
    spread = Spread.of([1e6 * seconds for seconds in result.seconds])
    return dataclasses.replace(record, spread=spread, error=result.error)


def default_work_dir() -> Path:
    """Return the folder of the user's cache that holds built rivals and random models."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "tinylm" / "bench"
