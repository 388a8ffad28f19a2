"""What a training run wrote down, for the benchmarks that read it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinylm.logs import Record, read_metrics
from tinylm.run_directory import RunDirectory


def records_of(run: Path, kind: str) -> list[Record]:
    """Return a run's records of one kind, such as ``train`` or ``eval``."""
    return [r for r in read_metrics(RunDirectory(run).metrics_file) if r["kind"] == kind]


def training_speed(records: Sequence[Record]) -> dict[str, Any]:
    """Summarise ``train`` records; the first, with its warm-up, is left out if there are more.

    Returns:
        Medians of ``tokens_per_second`` (and its range), ``seconds_per_step`` and ``mfu``, and the
        largest ``peak_memory_bytes``; the last two where the trainer recorded them.
    """
    records = records[1:] or records
    speeds = [r["tokens_per_second"] for r in records]
    result: dict[str, Any] = {
        "tokens_per_second": statistics.median(speeds),
        "tokens_per_second_range": [min(speeds), max(speeds)],
        "seconds_per_step": statistics.median(r["seconds_per_step"] for r in records),
    }
    for field, summarise in (("mfu", statistics.median), ("peak_memory_bytes", max)):
        if values := [r[field] for r in records if field in r]:
            result[field] = summarise(values)
    return result
