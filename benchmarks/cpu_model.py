"""The whole 300M model: tokens a second, memory and time to start.

Every contender runs in a process of its own with its own number of threads, and they take turns.
llama.cpp runs a LLaMA of the same width and depth, with random ternary weights; its answers are
not compared with anything.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from bench_records import NotRunError, Record, log
from cpu_model_process import (
    CONTENDERS,
    DECODE_TOKENS,
    PROMPTS,
    ModelContender,
    ModelFiles,
    make_files,
    model_process,
)
from cpu_model_worker import REFERENCE
from cpu_timing import Settings

from tinylm_export.bench_report import Spread
from tinylm_export.worker_process import WorkerProcess

LLAMA = {name: f"llama.cpp {name}" for name in llama_cpp.FORMATS}
DECODE = f"decode {DECODE_TOKENS}"
_CASES = (*(f"prefill {tokens}" for tokens in PROMPTS), DECODE)
_MEMORY_REPEATS = 3
_MEMORY_CASES = {
    "resident growth": "MB",
    "of it still in use": "MB",
    "largest resident set": "MB",
    "session start": "s",
}


def prepare(settings: Settings) -> tuple[ModelFiles, dict[str, llama_cpp.LlamaModel | NotRunError]]:
    """Make what both sections need: our model and llama.cpp's."""
    try:
        rivals = llama_cpp.prepare(settings.work_dir)
    except NotRunError as error:
        rivals = dict.fromkeys(llama_cpp.FORMATS, error)
    return make_files(settings.work_dir), rivals


def run_model(
    settings: Settings,
    files: ModelFiles,
    rivals: dict[str, llama_cpp.LlamaModel | NotRunError],
) -> list[Record]:
    """Time prefill and decode of every contender."""
    with tempfile.TemporaryDirectory() as folder:
        expected = Path(folder) / "reference.npy"
        log("model: reference logits")
        with model_process(REFERENCE, files, "float32", max(settings.threads)) as (worker, _):
            worker.ask("logits", out=str(expected))
        reference = np.load(expected)
    records = []
    for num_threads in settings.threads:
        records += _run_threads(settings, files, rivals, reference, num_threads)
    return records


class _Turns:
    """What one contender gave in its turns, or why it gave nothing."""

    def __init__(self) -> None:
        self.speeds: dict[str, list[float]] = {case: [] for case in _CASES}
        self.not_run = ""
        self.error: float | None = None
        self.note = ""

    def records(self, contender: str, num_threads: int) -> list[Record]:
        """Return a record for each case."""
        return [
            Record(
                section="model",
                case=case,
                contender=contender,
                threads=num_threads,
                unit="tokens/s",
                spread=Spread.of(speeds) if speeds and not self.not_run else None,
                not_run=self.not_run or ("" if speeds else f"{case}: too slow to be of interest"),
                error=self.error,
                note=self.note,
            )
            for case, speeds in self.speeds.items()
        ]


def _run_threads(
    settings: Settings,
    files: ModelFiles,
    rivals: dict[str, llama_cpp.LlamaModel | NotRunError],
    reference: np.ndarray[Any, Any],
    num_threads: int,
) -> list[Record]:
    turns = {name: _Turns() for name in (*(c.name for c in CONTENDERS), *LLAMA.values())}
    with contextlib.ExitStack() as stack:
        workers = {}
        for contender in CONTENDERS:
            log(f"model, {num_threads} threads: load {contender.name}")
            try:
                context = model_process(contender.runtime, files, contender.head, num_threads)
                worker, _ = stack.enter_context(context)
                turns[contender.name].error = _check(worker, contender, reference)
                for num_tokens in contender.prompts:  # a first time allocates
                    worker.ask("prefill", tokens=num_tokens)
                workers[contender.name] = worker
            except NotRunError as error:
                turns[contender.name].not_run = str(error)
        for repeat in range(settings.repeats):
            log(f"model, {num_threads} threads: turn {repeat + 1} of {settings.repeats}")
            for contender in CONTENDERS:
                if contender.name in workers and repeat < contender.most_repeats:
                    _take_turn(workers[contender.name], contender, turns[contender.name])
            for name, model in rivals.items():
                _take_llama_turn(model, turns[LLAMA[name]], num_threads)
    return [r for name, turn in turns.items() for r in turn.records(name, num_threads)]


def _check(
    worker: WorkerProcess, contender: ModelContender, reference: np.ndarray[Any, Any]
) -> float:
    """Return the largest difference from the reference's logits, if the contender's limits allow.

    Raises:
        NotRunError: They do not.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "logits.npy"
        worker.ask("logits", out=str(path))
        found = np.load(path).astype(np.float64)
    difference = float(np.abs(found - reference).max())
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(reference, axis=1)
    cosine = float(((found * reference).sum(axis=1) / norms).min())
    limit = contender.max_abs_logit
    if not cosine >= contender.min_cosine or (limit is not None and difference > limit):
        raise NotRunError(
            f"wrong answer: logits differ by {difference:.3g}, cosine {cosine:.6f}; "
            f"limits {limit} and {contender.min_cosine}"
        )
    return difference


def _take_turn(worker: WorkerProcess, contender: ModelContender, turns: _Turns) -> None:
    if contender.decode_tokens != DECODE_TOKENS:
        turns.note = f"decodes {contender.decode_tokens} tokens only"
    try:
        for num_tokens in contender.prompts:
            seconds = worker.ask("prefill", tokens=num_tokens)["seconds"]
            turns.speeds[f"prefill {num_tokens}"].append(num_tokens / seconds)
        seconds = worker.ask("decode", tokens=contender.decode_tokens)["seconds"]
        turns.speeds[DECODE].append(contender.decode_tokens / seconds)
    except NotRunError as error:
        turns.not_run = str(error)


def _take_llama_turn(
    model: llama_cpp.LlamaModel | NotRunError, turns: _Turns, num_threads: int
) -> None:
    if turns.not_run:
        return
    if isinstance(model, NotRunError):
        turns.not_run = str(model)
        return
    turns.note = model.note
    try:
        speeds = llama_cpp.time_model(
            model, prompts=PROMPTS, new_tokens=DECODE_TOKENS, num_threads=num_threads
        )
    except NotRunError as error:
        turns.not_run = str(error)
        return
    for case, values in speeds.items():
        turns.speeds[case] += values


def run_memory(
    settings: Settings,
    files: ModelFiles,
    rivals: dict[str, llama_cpp.LlamaModel | NotRunError],
) -> list[Record]:
    """Measure memory while decoding and the time to start, each in fresh processes."""
    num_threads = max(settings.threads)
    records = []
    for contender in CONTENDERS:
        log(f"memory: {contender.name}")
        found: dict[str, list[float]] = {case: [] for case in _MEMORY_CASES}
        not_run = ""
        try:
            for _ in range(min(settings.repeats, _MEMORY_REPEATS)):
                for case, number in _one_life(contender, files, num_threads).items():
                    found[case].append(number)
        except NotRunError as error:
            not_run = str(error)
        records += _memory_records(contender.name, num_threads, found, not_run)
    for name, model in rivals.items():
        log(f"memory: {LLAMA[name]}")
        records += _llama_memory(LLAMA[name], model, num_threads)
    return records


def _llama_memory(
    name: str, model: llama_cpp.LlamaModel | NotRunError, num_threads: int
) -> list[Record]:
    known, unknown = "largest resident set", "llama-bench shows only its largest resident set"
    found: dict[str, list[float]] = {known: []}
    not_run = ""
    try:
        if isinstance(model, NotRunError):
            raise model
        peak = llama_cpp.peak_memory(model, new_tokens=DECODE_TOKENS, num_threads=num_threads)
        found[known].append(peak / 1e6)
    except NotRunError as error:
        not_run = str(error)
    others: dict[str, list[float]] = {case: [] for case in _MEMORY_CASES if case != known}
    return [
        *_memory_records(name, num_threads, found, not_run),
        *_memory_records(name, num_threads, others, not_run or unknown),
    ]


def _one_life(contender: ModelContender, files: ModelFiles, num_threads: int) -> dict[str, float]:
    """Start, decode, and return the numbers of ``_MEMORY_CASES``."""
    context = model_process(contender.runtime, files, contender.head, num_threads)
    with context as (worker, seconds):
        worker.ask("decode", tokens=contender.decode_tokens)
        memory = worker.ask("memory")
    if None in memory.values():
        raise NotRunError("the system does not say how much memory a process takes")
    baseline, peak, held = (memory[f"{k}_bytes"] / 1e6 for k in ("baseline", "peak", "held"))
    return {
        "resident growth": peak - baseline,
        "of it still in use": held - baseline,
        "largest resident set": peak,
        "session start": seconds,
    }


def _memory_records(
    contender: str, num_threads: int, found: dict[str, list[float]], not_run: str
) -> list[Record]:
    return [
        Record(
            section="memory",
            case=case,
            contender=contender,
            threads=num_threads,
            unit=_MEMORY_CASES[case],
            spread=Spread.of(values) if values and not not_run else None,
            not_run=not_run,
        )
        for case, values in found.items()
    ]
