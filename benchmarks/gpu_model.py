"""The whole 300M model as a TensorRT engine, against the same network with dense weights.

Both engines are loaded in one process and take turns. A decode step is timed as a CUDA graph on the
device, and as a user calls it, with its logits on the host.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from bench_records import NotRunError, first_line, log
from gpu_timing import REFUSALS, GpuRecord
from torch import Tensor

from tinylm.checkpoint import load_model
from tinylm.errors import CheckpointError
from tinylm.generate import Session, TorchSession
from tinylm_export.bench_report import Spread
from tinylm_export.engine_tables import table_bytes
from tinylm_export.to_onnx import ExportInfo, source_checkpoint
from tinylm_export.trt_engine import ENGINE_FILE

if TYPE_CHECKING:
    from tinylm_export.trt_session import TrtSession

SECTION = "model"
OURS, DENSE = "ours", "dense engine"
BATCHES, CONTEXTS = (1, 8, 64), (128, 2048)
FILE, LAYERS = "engine file", "without embedding and head"
_REPEATS = 5
_USER_STEPS, _WINDOWS, _WINDOW_STEPS = 4, 3, 8
_AFTER_PREFILL = _USER_STEPS + _WINDOWS * _WINDOW_STEPS
_PROBE_TOKENS, _PROBE_STEPS = 32, 4
# Quantised activations that round the other way, or are not quantised at all, move logits of random
# weights much; a wrong kernel or cache leaves no resemblance.
_MIN_COSINE = 0.9


def decode_case(batch_size: int, context: int) -> str:
    """Name the decode step as a CUDA graph."""
    return f"decode step, batch {batch_size}, context {context}"


def user_case(batch_size: int, context: int) -> str:
    """Name the decode step with logits on the host."""
    return f"{decode_case(batch_size, context)}, logits on the host"


def prefill_case(batch_size: int, context: int) -> str:
    """Name the prefill before it."""
    return f"prefill, batch {batch_size} x {context - _AFTER_PREFILL}"


_UNITS = {decode_case: "us", user_case: "us", prefill_case: "tokens/s"}


@dataclasses.dataclass
class _Engine:
    """An engine and what it gave, or why it gave nothing."""

    session: TrtSession
    error: float | None = None
    note: str = ""


def run_model(engines: dict[str, Path], onnx: Path | None) -> Iterator[GpuRecord]:
    """Measure engines.

    Args:
        engines: Directories by contender.
        onnx: What they were built from. It finds embedding and head in their files, and the
            checkpoint that logits are compared with; if None, the second engine's are compared
            with the first one's.
    """
    ready: dict[str, _Engine | NotRunError] = {}
    expected = None if onnx is None else _reference(onnx)
    for name, directory in engines.items():
        log(f"model: load {directory}")
        yield from _sizes(name, directory, onnx)
        try:
            loaded, logits = _load(directory, expected)
            ready[name] = loaded
            expected = logits if expected is None else expected
        except NotRunError as reason:
            ready[name] = reason
    for batch_size in BATCHES:
        for context in CONTEXTS:
            log(f"model: batch {batch_size}, context {context}")
            yield from _run_case(ready, batch_size, context)


def _reference(onnx: Path) -> Tensor | None:
    """Return PyTorch's logits, or None where the checkpoint is not there any more."""
    info = ExportInfo.load(onnx)
    try:
        model = load_model(source_checkpoint(onnx, info))
    except CheckpointError as error:
        log(f"model: engines are compared with each other only: {error}")
        return None
    log("model: reference logits of PyTorch")
    model.set_activation(info.activation)  # type: ignore[arg-type]
    return _probe(TorchSession(model.quantize_head() if info.lm_head == "int8" else model))


def _load(directory: Path, expected: Tensor | None) -> tuple[_Engine, Tensor]:
    from tinylm_export.trt_session import TrtSession

    try:
        session = TrtSession(directory)
        logits = _probe(session)
    except REFUSALS as error:
        raise NotRunError(f"refuses: {first_line(error)}") from error
    if not logits.isfinite().all():
        raise NotRunError("wrong answer: logits that are not finite")
    loaded = _Engine(session, note="its logits were compared with nothing: give --onnx")
    if expected is not None:
        cosine = float(torch.cosine_similarity(logits, expected, dim=1).min())
        if not cosine >= _MIN_COSINE:
            raise NotRunError(f"wrong answer: cosine {cosine:.4f}, limit {_MIN_COSINE}")
        loaded.note = f"cosine of logits with the reference at least {cosine:.5f}"
        loaded.error = float((logits - expected).abs().max())
    return loaded, logits


def _probe(session: Session) -> Tensor:
    """Return the logits of a prefill and of some steps: float64 [steps, V]."""
    generator = torch.Generator().manual_seed(0)
    length = _PROBE_TOKENS + _PROBE_STEPS
    ids = torch.randint(session.config.vocab_size, (1, length), generator=generator)
    session.start(1, length)
    found = [session.step(ids[:, :_PROBE_TOKENS], torch.tensor([_PROBE_TOKENS]))]
    for i in range(_PROBE_TOKENS, length):
        found.append(session.step(ids[:, i : i + 1], torch.tensor([1])))
    last = [logits[:, -1] if logits.ndim == 3 else logits for logits in found]
    return torch.cat(last).double().cpu()


def _run_case(
    ready: dict[str, _Engine | NotRunError], batch_size: int, context: int
) -> list[GpuRecord]:
    values: dict[str, dict[Any, list[float]]] = {
        name: {kind: [] for kind in _UNITS} for name in ready
    }
    failed = {name: str(found) for name, found in ready.items() if isinstance(found, NotRunError)}
    running = {name: found for name, found in ready.items() if isinstance(found, _Engine)}
    for repeat in range(_REPEATS + 1):
        for name, engine in running.items():
            if name in failed:
                continue
            try:
                for kind, value in _take_turn(engine.session, batch_size, context):
                    if repeat:  # the first one captures graphs
                        values[name][kind].append(value)
            except REFUSALS as error:
                failed[name] = f"refuses: {first_line(error)}"
    records = []
    for name, found in ready.items():
        for kind, unit in _UNITS.items():
            record = GpuRecord(
                section=SECTION,
                case=kind(batch_size, context),
                contender=name,
                unit=unit,
                not_run=failed.get(name, ""),
            )
            if isinstance(found, _Engine) and name not in failed:
                spread = Spread.of(values[name][kind])
                record = dataclasses.replace(
                    record, spread=spread, error=found.error, note=found.note
                )
            records.append(record)
    return records


def _take_turn(session: TrtSession, batch_size: int, context: int) -> Iterator[tuple[Any, float]]:
    """Fill the cache up to the context; yield each measurement with its kind."""
    generator = torch.Generator().manual_seed(0)
    length = context - _AFTER_PREFILL
    shape = (batch_size, length)
    ids = torch.randint(session.config.vocab_size, shape, generator=generator)
    session.start(batch_size, context)
    torch.cuda.synchronize()
    start = time.perf_counter()
    session.step(ids, torch.full((batch_size,), length))
    yield prefill_case, batch_size * length / (time.perf_counter() - start)
    one = torch.ones(batch_size, dtype=torch.int64)
    for i in range(_USER_STEPS):
        start = time.perf_counter()
        session.step(ids[:, i : i + 1], one)
        yield user_case, 1e6 * (time.perf_counter() - start)
    for _ in range(_WINDOWS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        session.repeat_decode(_WINDOW_STEPS)
        end.record()
        end.synchronize()
        yield decode_case, 1e3 * begin.elapsed_time(end) / _WINDOW_STEPS


def _sizes(name: str, directory: Path, onnx: Path | None) -> list[GpuRecord]:
    sizes: dict[str, float | None] = {FILE: None, LAYERS: None}
    not_run = "give --onnx"
    try:
        sizes[FILE] = num_bytes = (directory / ENGINE_FILE).stat().st_size
        if onnx is not None:
            tables = table_bytes(directory, onnx)
            not_run = "embedding and head are not found in the engine"
            sizes[LAYERS] = None if tables is None else num_bytes - tables
    except REFUSALS as error:
        not_run = first_line(error)
    return [
        GpuRecord(
            section=SECTION,
            case=case,
            contender=name,
            unit="MB",
            spread=None if size is None else Spread.of([size / 1e6]),
            not_run=not_run if size is None else "",
        )
        for case, size in sizes.items()
    ]
