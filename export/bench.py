"""Prefill and decode speed and memory of each runtime that is there.

Every runtime loads in a fresh process (:mod:`tinylm_export.bench_worker`), proves that it gives the
same greedy tokens as the first one, and is then timed in turns with the others, so that whatever
else the machine does falls on all of them alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tinylm.checkpoint import MODEL_FILE
from tinylm.config import ModelConfig
from tinylm.errors import CheckpointError, ConfigError, ExportError
from tinylm.latent_cache import LatentCache
from tinylm_export.bench_report import BenchReport, BenchSettings, RuntimeResult, Spread, render
from tinylm_export.bench_worker import (
    ENGINE_RUNTIME,
    ORT_RUNTIMES,
    RUNTIMES,
    WorkerSettings,
)
from tinylm_export.engine_tables import table_bytes
from tinylm_export.machine import describe_machine
from tinylm_export.manifest import EngineManifest
from tinylm_export.native import BUILD_COMMAND, NativeInfo, choose
from tinylm_export.ort_session import import_onnxruntime
from tinylm_export.to_onnx import DATA_FILE, ONNX_FILE, ExportInfo, source_checkpoint
from tinylm_export.trt_engine import ENGINE_FILE
from tinylm_export.worker_process import worker_process

__all__ = ["BenchReport", "BenchSettings", "check_answers", "render", "run_bench"]

WITH_PAST = "text-generation-with-past"
_PROMPT_SEED = 0
_WORKER = ("-m", "tinylm_export.bench_worker")


def run_bench(
    directory: str | Path,
    settings: BenchSettings | None = None,
    *,
    checkpoint: str | Path | None = None,
    runtimes: Sequence[str] | None = None,
    native: bool | None = None,
    engines: Sequence[str | Path] = (),
    show_progress: bool = False,
) -> BenchReport:
    """Measure every runtime that is there, and TensorRT engines.

    Engines in half precision round differently and dense ones do not quantise, so they need not
    give the tokens that the others give; the report says how many they do.

    Args:
        directory: What ``tinylm-export onnx`` wrote.
        settings: What to time.
        checkpoint: Where the checkpoint is, if not where it was when it was exported.
        runtimes: Keys of :data:`tinylm_export.bench_worker.RUNTIMES`; default all that are there.
        native: What ``"onnxruntime"`` runs the custom ops by: None for the native library if there
            is one, True to require it, False for the function bodies.
        engines: Engine directories, each a runtime called ``tensorrt:NAME``.
        show_progress: Whether to show a progress bar on stderr, if that is a terminal.

    Raises:
        ConfigError: Prompt and new tokens do not fit the context.
        ExportError: Unknown runtime, one that was asked for is not there, or the runtimes give
            different tokens.
        NativeError: The native library is required and not built, or can't be used.
    """
    directory, settings = Path(directory), settings or BenchSettings()
    info = ExportInfo.load(directory)
    config = ModelConfig.load(directory / "config.json")
    _check(directory, info, config, settings)
    source, problem = _find_checkpoint(directory, info, checkpoint)
    chosen, left_out = _choose(
        runtimes, checkpoint_problem=problem, library=choose(native), engines=engines
    )
    engine_of = check_engines(engines, directory)
    requests = {
        name: WorkerSettings(
            runtime=ENGINE_RUNTIME if name in engine_of else name,
            engine=str(engine_of[name]) if name in engine_of else None,
            directory=str(directory),
            checkpoint=str(source) if source else None,
            activation=info.activation,
            lm_head=info.lm_head,
            prompt=_prompt(config, settings),
            new_tokens=settings.new_tokens,
            num_threads=settings.num_threads,
            native=native,
        )
        for name in (*chosen, *engine_of)
    }
    measurements = _measure(requests, settings, show_progress=show_progress)
    capacity = settings.prompt_len + settings.new_tokens
    cache = LatentCache(config, settings.batch_size, capacity, device="meta")
    steps = next(iter(measurements.values())).answer["tokens"]
    return BenchReport(
        directory=str(directory),
        checkpoint=str(source) if source else None,
        settings=settings,
        machine=describe_machine(),
        results=tuple(
            _result(
                name,
                settings,
                measured,
                cache_bytes=cache.num_bytes(),
                file_bytes=_file_bytes(name, directory, source, engine_of.get(name)),
                tables=table_bytes(engine_of[name], directory) if name in engine_of else None,
                same_tokens=_count_same(steps, measured.answer["tokens"]),
            )
            for name, measured in measurements.items()
        ),
        left_out=left_out,
        tokens=[list(row) for row in zip(*steps, strict=True)],
    )


@dataclasses.dataclass
class _Measurements:
    """A worker's replies."""

    load: dict[str, Any]
    answer: dict[str, Any] = dataclasses.field(default_factory=dict)
    times: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    memory: dict[str, Any] = dataclasses.field(default_factory=dict)


def _measure(
    requests: dict[str, WorkerSettings], settings: BenchSettings, *, show_progress: bool
) -> dict[str, _Measurements]:
    """Load the runtimes one after the other, compare their answers, and time them in turns."""
    found = {}
    num_runs = settings.warmup + settings.repeats
    with contextlib.ExitStack() as stack:
        step = stack.enter_context(_progress(len(requests) * (2 + num_runs), show_progress))
        workers = {}
        for name, request in requests.items():
            step(f"{name}: load")
            workers[name] = stack.enter_context(
                worker_process(_WORKER, prefix=f"runtime {name!r}: ")
            )
            load = workers[name].ask("load", **dataclasses.asdict(request))
            found[name] = _Measurements(load=load)
        for name, worker in workers.items():
            step(f"{name}: answer")
            found[name].answer = worker.ask("answer")
        check_answers(
            {
                name: measured.answer
                for name, measured in found.items()
                if requests[name].runtime != ENGINE_RUNTIME
            }
        )
        for run in range(num_runs):
            for name, worker in workers.items():
                step(f"{name}: run {run + 1} of {num_runs}")
                times = worker.ask("time")
                if run >= settings.warmup:
                    found[name].times.append(times)
        for name, worker in workers.items():
            found[name].memory = worker.ask("memory")
    return found


def _check(directory: Path, info: ExportInfo, config: ModelConfig, settings: BenchSettings) -> None:
    if info.task != WITH_PAST:
        raise ExportError(
            f"{directory}: task {info.task!r} has no cache, so there is no decode step to time. "
            f"Export with --task {WITH_PAST}."
        )
    needed = settings.prompt_len + settings.new_tokens
    if needed > config.max_seq_len:
        raise ConfigError(
            f"prompt_len {settings.prompt_len} and new_tokens {settings.new_tokens} need a context "
            f"of {needed}, the model has {config.max_seq_len}. Make one of them smaller."
        )


def _find_checkpoint(
    directory: Path, info: ExportInfo, given: str | Path | None
) -> tuple[Path | None, str]:
    """Return the checkpoint, or None and why there is none."""
    try:
        return source_checkpoint(directory, info, given), ""
    except CheckpointError as error:
        if given is not None:
            raise
        return None, str(error)


def _choose(
    wanted: Sequence[str] | None,
    *,
    checkpoint_problem: str,
    library: NativeInfo | None,
    engines: Sequence[str | Path] = (),
) -> tuple[list[str], dict[str, str]]:
    """Return the runtimes to measure, and why others are left out."""
    left_out = {}
    for name in RUNTIMES:
        try:
            if name in ORT_RUNTIMES:
                import_onnxruntime()
            elif checkpoint_problem:
                left_out[name] = checkpoint_problem
        except ExportError as error:
            left_out[name] = str(error)
    for name in wanted or ():
        if name not in RUNTIMES:
            raise ExportError(f"runtime must be one of {', '.join(RUNTIMES)}, found {name!r}.")
        if name in left_out:
            raise ExportError(f"runtime {name!r} is not there: {left_out[name]}")
    if not wanted and library is None and "onnxruntime-bodies" not in left_out:
        left_out["onnxruntime-bodies"] = (
            f"onnxruntime runs the function bodies already; build the library: {BUILD_COMMAND}"
        )
    chosen = [name for name in RUNTIMES if name not in left_out and name in (wanted or RUNTIMES)]
    if not chosen and not engines:
        reasons = " ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise ExportError(f"no runtime is there to measure. {reasons}")
    return chosen, left_out


def _prompt(config: ModelConfig, settings: BenchSettings) -> list[list[int]]:
    """Return random token ids; speed does not depend on what they say."""
    generator = torch.Generator().manual_seed(_PROMPT_SEED)
    shape = (settings.batch_size, settings.prompt_len)
    return torch.randint(config.vocab_size, shape, generator=generator).tolist()


def check_answers(answers: dict[str, dict[str, Any]]) -> None:
    """Check that all runtimes gave the same greedy tokens.

    Args:
        answers: By runtime: ``tokens`` and ``margins``, both [steps][batch].

    Raises:
        ExportError: They differ; names the first step and row, with both tokens and the lead that
            each had over the next best one.
    """
    if not answers:
        return
    (reference, expected), *others = answers.items()
    for name, found in others:
        for step, (want, have) in enumerate(zip(expected["tokens"], found["tokens"], strict=True)):
            if want == have:
                continue
            row = next(i for i, pair in enumerate(zip(want, have, strict=True)) if len({*pair}) > 1)
            margins = expected["margins"][step][row], found["margins"][step][row]
            raise ExportError(
                f"the runtimes answer differently, so their speed is not compared: row {row}, new "
                f"token {step}: {reference} gives {want[row]} (leads by {margins[0]:.3g}), {name} "
                f"gives {have[row]} (leads by {margins[1]:.3g}). A lead below 0.01 is a tie that "
                "another --prompt-len may avoid; else run `tinylm-export parity` on the directory."
            )


def _result(
    name: str,
    settings: BenchSettings,
    measured: _Measurements,
    *,
    cache_bytes: int,
    file_bytes: int,
    tables: int | None,
    same_tokens: int,
) -> RuntimeResult:
    prompt_tokens = settings.batch_size * settings.prompt_len
    new_tokens = settings.batch_size * settings.new_tokens
    prefill = [run["prefill_seconds"] for run in measured.times]
    decode = [run["decode_seconds"] for run in measured.times]
    keys = ("baseline_bytes", "peak_bytes", "held_bytes")
    baseline, peak, held = (measured.memory[key] for key in keys)
    return RuntimeResult(
        runtime=name,
        kernels=measured.load["kernels"],
        load_seconds=measured.load["load_seconds"],
        prefill_ms=Spread.of([1000 * seconds for seconds in prefill]),
        prefill_tokens_per_s=Spread.of([prompt_tokens / seconds for seconds in prefill]),
        decode_ms_per_token=Spread.of([1000 * s / settings.new_tokens for s in decode]),
        decode_tokens_per_s=Spread.of([new_tokens / seconds for seconds in decode]),
        rss_growth_bytes=None if baseline is None or peak is None else peak - baseline,
        rss_held_bytes=None if baseline is None or held is None else held - baseline,
        peak_rss_bytes=peak,
        cache_bytes=cache_bytes,
        file_bytes=file_bytes,
        layer_bytes=None if tables is None else file_bytes - tables,
        same_tokens=same_tokens,
    )


def _count_same(expected: list[list[int]], found: list[list[int]]) -> int:
    """Return how many tokens [steps][batch] come before the first difference of their row."""
    rows = zip(zip(*expected, strict=True), zip(*found, strict=True), strict=True)
    pairs = (zip(want, have, strict=True) for want, have in rows)
    return sum(sum(1 for _ in itertools.takewhile(lambda p: p[0] == p[1], row)) for row in pairs)


def check_engines(engines: Sequence[str | Path], directory: Path) -> dict[str, Path]:
    """Check that engines were built from an exported directory.

    Returns:
        Their directories by the name of the runtime, ``tensorrt:NAME``.

    Raises:
        ExportError: Another directory than an engine's, an engine of another ONNX file, or two of
            one name.
    """
    found: dict[str, Path] = {}
    for path in map(Path, engines):
        EngineManifest.load(path).check_onnx(path, directory)
        name = f"{ENGINE_RUNTIME}:{path.resolve().name}"
        if name in found:
            raise ExportError(
                f"{path} and {found[name]} are both called {name}. Rename one of the directories."
            )
        found[name] = path
    return found


def _file_bytes(
    name: str, directory: Path, checkpoint: Path | None, engine: Path | None = None
) -> int:
    if engine is not None:
        return (engine / ENGINE_FILE).stat().st_size
    if name in ORT_RUNTIMES:
        return sum((directory / file).stat().st_size for file in (ONNX_FILE, DATA_FILE))
    assert checkpoint is not None
    return (checkpoint / MODEL_FILE).stat().st_size


@contextlib.contextmanager
def _progress(total: int, show: bool) -> Iterator[Any]:
    """Give a function that names the next step and counts the one before as done."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    shown = show and console.is_terminal
    with Progress(console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task("bench", total=total)
        done = -1

        def step(description: str) -> None:
            nonlocal done
            done += 1
            bar.update(task, completed=done, description=description)

        yield step
