"""What ``tinylm-export bench`` measures and shows."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tinylm.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What is timed.

    Attributes:
        batch_size: Rows.
        prompt_len: Tokens of each prompt, read in one prefill step.
        new_tokens: Decode steps after it, one token a row each.
        repeats: Timed runs of each runtime.
        warmup: Runs of each runtime that come before and are not counted.
        num_threads: Threads within an op; None for each runtime's own choice.

    Raises:
        ConfigError: A value is out of range.
    """

    batch_size: int = 1
    prompt_len: int = 64
    new_tokens: int = 32
    repeats: int = 5
    warmup: int = 1
    num_threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "prompt_len", "new_tokens", "repeats", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, found {value}.")
        if self.warmup < 0:
            raise ConfigError(f"warmup must be 0 or more, found {self.warmup}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and range of repeated measurements."""

    median: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise measurements, at least one."""
        return cls(median=statistics.median(values), minimum=min(values), maximum=max(values))

    def __format__(self, spec: str) -> str:
        """Format as the median, and the range in a second line."""
        return f"{self.median:{spec}}\n{self.minimum:{spec}} .. {self.maximum:{spec}}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuntimeResult:
    """One runtime's measurements.

    Attributes:
        runtime: Its name.
        kernels: What ran the custom ops.
        load_seconds: From files to a model ready to run, checksums included.
        prefill_ms: Time of the prefill step, in milliseconds.
        prefill_tokens_per_s: Prompt tokens of all rows per second.
        decode_ms_per_token: Time of one decode step, in milliseconds.
        decode_tokens_per_s: New tokens of all rows per second.
        rss_growth_bytes: Largest resident set, less the one before loading with the libraries in
            memory already; mapped weights count once they are read. None where the system does
            not say.
        rss_held_bytes: The same for the resident set after the last run, once memory that was
            freed, such as what only loading needed, has gone back to the system.
        peak_rss_bytes: Largest resident set, libraries included.
        cache_bytes: The latent cache of the batch.
        file_bytes: The files it loads weights and graph from.
        layer_bytes: An engine's file without embedding and head, however often it holds them; None
            for other runtimes, and where they are not found.
        same_tokens: New tokens of all rows that are the first runtime's, up to a row's first
            difference.
    """

    runtime: str
    kernels: str
    load_seconds: float
    prefill_ms: Spread
    prefill_tokens_per_s: Spread
    decode_ms_per_token: Spread
    decode_tokens_per_s: Spread
    rss_growth_bytes: int | None
    rss_held_bytes: int | None
    peak_rss_bytes: int | None
    cache_bytes: int
    file_bytes: int
    layer_bytes: int | None
    same_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchReport:
    """Every runtime's measurements, and what they were taken on.

    Attributes:
        directory: ONNX directory.
        checkpoint: Checkpoint that PyTorch ran, if it did.
        settings: What was timed.
        machine: See :func:`tinylm_export.machine.describe_machine`.
        results: In the order in which they ran.
        left_out: Why a runtime was not measured, by its name.
        tokens: The greedy tokens of the first runtime, [B, new_tokens + 1].
    """

    directory: str
    checkpoint: str | None
    settings: BenchSettings
    machine: dict[str, Any]
    results: tuple[RuntimeResult, ...]
    left_out: dict[str, str]
    tokens: list[list[int]]

    def to_dict(self) -> dict[str, Any]:
        """Return an object that JSON can hold."""
        values = dataclasses.asdict(self)
        values["results"] = list(values["results"])
        return values


def render(report: BenchReport) -> RenderableType:
    """Return the report as a rich table."""
    settings, machine = report.settings, report.machine
    table = Table(
        title=f"batch {settings.batch_size}, prompt {settings.prompt_len}, "
        f"{settings.new_tokens} new tokens, median and range of {settings.repeats} runs",
        show_lines=True,
    )
    table.add_column("")
    for result in report.results:
        table.add_column(result.runtime, justify="right")
    results = report.results
    num_tokens = sum(map(len, report.tokens))
    same = all(r.same_tokens == num_tokens for r in results)
    for label, cells in {
        "kernels": [r.kernels for r in results],
        "prefill tokens/s": [f"{r.prefill_tokens_per_s:,.1f}" for r in results],
        "prefill ms": [f"{r.prefill_ms:.2f}" for r in results],
        "decode tokens/s": [f"{r.decode_tokens_per_s:,.1f}" for r in results],
        "decode ms a token": [f"{r.decode_ms_per_token:.2f}" for r in results],
        "load s": [f"{r.load_seconds:.2f}" for r in results],
        "resident set growth": [_megabytes(r.rss_growth_bytes) for r in results],
        "of it still in use": [_megabytes(r.rss_held_bytes) for r in results],
        "largest resident set": [_megabytes(r.peak_rss_bytes) for r in results],
        "cache": [_megabytes(r.cache_bytes) for r in results],
        "files": [_megabytes(r.file_bytes) for r in results],
        "without embedding, head": [
            "" if r.layer_bytes is None else _megabytes(r.layer_bytes) for r in results
        ],
        "same greedy tokens": [f"{r.same_tokens} of {num_tokens}" for r in results],
    }.items():
        if not any(cells):
            continue
        table.add_row(label, *cells)
    threads = settings.num_threads or "the runtime's own choice of"
    lines = [
        f"{machine['cpu']}, {machine['usable_cores']} cores, {threads} threads; "
        + ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
        *(["all give the same greedy tokens"] if same and len(results) > 1 else []),
        *(f"left out {name}: {reason}" for name, reason in report.left_out.items()),
    ]
    return Group(table, *(Text(line) for line in lines))


def _megabytes(num_bytes: int | None) -> str:
    return "not known" if num_bytes is None else f"{num_bytes / 1e6:.2f} MB"
