"""What every benchmark gives: records, verdicts on targets, and reasons for what was not run."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tinylm_export.bench_report import Spread


class NotRunError(Exception):
    """Why a contender was not measured."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One contender's result in one case, ready for JSON.

    Attributes:
        section: Part of the benchmark, such as ``"gemm"`` or ``"model"``.
        case: What was measured, such as ``"1024x1024 M=1"`` or ``"decode 128"``.
        contender: Who ran it.
        unit: Of ``spread``, such as ``"us"`` or ``"tokens/s"``.
        threads: Threads it was given; None on a GPU.
        spread: Median and range over the repeats; None if it was not run.
        not_run: Why not; empty if it was.
        error: Largest departure from the reference, relative to its largest value.
        note: What a reader should know of how it ran.
    """

    section: str
    case: str
    contender: str
    unit: str
    threads: int | None = None
    spread: Spread | None = None
    not_run: str = ""
    error: float | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """How one target fared.

    Attributes:
        target: What is wanted.
        threads: Threads that both sides had; None on a GPU.
        measured: What was found.
        holds: Whether it holds; None if it was not measured.
        outcome: ``"holds"``, how far it is, or why it was not measured.
    """

    target: str
    threads: int | None = None
    measured: str
    holds: bool | None
    outcome: str


def find_record(records: Sequence[Record], case: str, contender: str) -> Record | None:
    """Return a contender's record of a case, if it was measured."""
    found = (r for r in records if (r.case, r.contender) == (case, contender))
    return next((r for r in found if r.spread is not None), None)


def median(record: Record) -> float:
    """Return the median of a record that was measured."""
    assert record.spread is not None
    return record.spread.median


def not_measured(
    target: str, records: Sequence[Record], wanted: Sequence[str], threads: int | None = None
) -> Verdict:
    """Say why a target could not be judged.

    Args:
        target: The target.
        records: Where the contenders that it needs would stand.
        wanted: Those contenders.
        threads: Threads of the target.
    """
    reasons = [f"{r.contender}: {r.not_run}" for r in records if r.contender in wanted]
    absent = set(wanted) - {r.contender for r in records}
    reasons += [f"{name}: not asked for" for name in sorted(absent)]
    why = "; ".join(dict.fromkeys(reason for reason in reasons if not reason.endswith(": ")))
    outcome = f"not measured: {why}"
    return Verdict(target=target, threads=threads, measured="", holds=None, outcome=outcome)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def num_copies(bytes_each: int, cold_bytes: int) -> int:
    """Return how many copies exceed ``cold_bytes``; two at least."""
    return max(2, -(-cold_bytes // bytes_each))


def log(message: str) -> None:
    """Say on stderr what goes on."""
    print(message, file=sys.stderr, flush=True)


@contextlib.contextmanager
def expecting_results(path: Path) -> Iterator[None]:
    """End with a message if the file that is read inside is not one that ``--out`` wrote."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        log(f"{path}: expected a file that --out wrote, found something else ({error}).")
        sys.exit(2)
