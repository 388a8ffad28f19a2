"""A TensorRT engine against PyTorch on the held-out rows."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from tinylm.bitlinear import PackedBitLinear
from tinylm.errors import ExportError
from tinylm.model import TinyLM
from tinylm_export.logit_meter import LogitMeter, top1_error
from tinylm_export.manifest import EngineManifest
from tinylm_export.parity_batch import (
    ParityBatch,
    layer_difference,
    merge_differences,
    row_batches,
)
from tinylm_export.parity_nodes import engine_nodes, engine_values
from tinylm_export.parity_reference import run_reference
from tinylm_export.parity_report import (
    LayerDifference,
    LogitLimits,
    RuntimeReport,
)
from tinylm_export.tolerances import limit
from tinylm_export.trt_session import TrtSession

Progress = Callable[[str, float], None]
HALF_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_ROWS_AT_ONCE = 8
_LONGEST_CHUNK = 16
# Rounds of chunks, for engines that give the logits of a chunk's last token only.
_CHUNK_ROUNDS = 8
_SMALLEST_LAYER_LIMIT = 1e-6
_CHUNK_SEED = 0


class TrtRuntime:
    """An engine that was built from an exported directory.

    Args:
        engine: What ``tinylm-export trt`` wrote.
        directory: What ``tinylm-export onnx`` wrote.

    Attributes:
        name: The runtime's name in the report.
        session: Cached steps.
        longest_row: Most tokens of a row.
        rows_at_once: Rows of a batch.

    Raises:
        ExportError: The engine can't be used, or was built from another ONNX file.
    """

    def __init__(self, engine: Path, directory: Path) -> None:
        manifest = EngineManifest.load(engine)
        manifest.check_onnx(engine, directory)
        if manifest.dense:
            raise ExportError(
                f"{engine} is a --dense engine: it quantises no activations, so it says something "
                "else on purpose. Only `tinylm-export bench` takes it."
            )
        self.session = TrtSession(engine)
        self.name = f"TensorRT {engine.resolve().name}"
        self.longest_row = min(self.session.limits.capacity, self.session.limits.length)
        self.rows_at_once = min(_ROWS_AT_ONCE, self.session.limits.batch_size)

    @property
    def dtype(self) -> str:
        """The type of its activations: ``"fp32"``, ``"bf16"`` or ``"fp16"``."""
        return self.session.manifest.dtype

    @property
    def activation(self) -> str:
        """Number format of its quantised activations."""
        return self.session.manifest.activation


class TorchReferences:
    """PyTorch's runs that engines are compared with, each made when it is first needed.

    Args:
        model: The reference, in float32.
        batch: The rows.
        rows_at_once: Rows of each PyTorch batch.
        logits: The reference's logits [B, S, V].
    """

    def __init__(
        self, model: TinyLM, batch: ParityBatch, rows_at_once: int, logits: Tensor
    ) -> None:
        self._model, self._batch, self._rows = model, batch, rows_at_once
        self._logits = {(str(model.config.activation), "fp32"): logits}

    def model(self, activation: str, dtype: str = "fp32") -> TinyLM:
        """Return the model with that format of activations, its ternary codes as they are.

        A half-precision one has packed weights with float32 scales, as an engine has: codes and
        scales made from rounded weights would be other ones.
        """
        model = self._model
        if (activation, dtype) == (model.config.activation, "fp32"):
            return model
        model = copy.deepcopy(model)
        model.set_activation(activation)  # type: ignore[arg-type]
        if dtype == "fp32":
            return model
        layers = [m for m in model.pack().modules() if isinstance(m, PackedBitLinear)]
        scales = [layer.weight_scale for layer in layers]
        model.to(HALF_DTYPES[dtype])
        for layer, scale in zip(layers, scales, strict=True):
            layer.weight_scale = scale
        return model

    def logits(self, activation: str, dtype: str = "fp32") -> Tensor:
        """Return PyTorch's logits [B, S, V] in that type, as float32."""
        if (activation, dtype) not in self._logits:
            logits = torch.zeros_like(next(iter(self._logits.values())))
            model, done = self.model(activation, dtype), 0
            for ids, lens in row_batches(self._batch, self._rows):
                logits[done : done + len(ids), : ids.shape[1]] = _run(model, ids, lens)
                done += len(ids)
            self._logits[activation, dtype] = logits
        return self._logits[activation, dtype]


@torch.no_grad()
def _run(model: TinyLM, input_ids: Tensor, seq_lens: Tensor) -> Tensor:
    """Return float32 logits [B, S, V] on the CPU."""
    device = model.embed_tokens.weight.device
    mask = torch.arange(input_ids.shape[1]) < seq_lens[:, None]
    return model(input_ids.to(device), mask.to(device)).float().cpu()


def compare_engine(
    runtime: TrtRuntime, batch: ParityBatch, references: TorchReferences, progress: Progress
) -> RuntimeReport:
    """Compare prefill, chunked prefill and decode, and the marked nodes of a debug engine.

    Args:
        runtime: The engine.
        batch: The rows; their lengths differ.
        references: PyTorch's runs.
        progress: Told the phase and how much of it is done.
    """
    reference = references.logits(runtime.activation)
    own_logits = None
    if runtime.dtype in HALF_DTYPES:
        own_logits = references.logits(runtime.activation, runtime.dtype)
    phases, own_phases = [], []
    for phase, plan in {
        "prefill": _prefill_plan,
        "chunked prefill": _chunk_plan,
        "decode": _decode_plan,
    }.items():
        meter, own_meter, done = LogitMeter(phase), LogitMeter(phase), 0
        for part in _parts(batch, runtime.rows_at_once):
            rows = slice(done, done + len(part.seq_lens))
            for steps in plan(part, runtime.session.all_logits):
                for index, found in _feed(runtime.session, part, steps):
                    meter.add(reference[rows][index], found)
                    if own_logits is not None:
                        own_meter.add(reference[rows][index], own_logits[rows][index])
            done += len(part.seq_lens)
            progress(f"{runtime.name}: {phase}", done / len(batch.seq_lens))
        own = None if own_logits is None else own_meter.result()
        error = 0.0 if own is None else top1_error(meter, own_meter)
        limits = LogitLimits.of_engine(own, error)
        phases.append(dataclasses.replace(meter.result(), limits=limits))
        own_phases += [] if own is None else [own]
    return RuntimeReport(
        runtime=runtime.name,
        version=runtime.session.manifest.tensorrt_version,
        kernels=runtime.session.kernels,
        logits=phases,
        bit_linears=[],
        layers=compare_layers(runtime, batch, references),
        own=own_phases,
    )


def _parts(batch: ParityBatch, rows: int) -> Iterator[ParityBatch]:
    for start in range(0, len(batch.seq_lens), rows):
        part = slice(start, start + rows)
        yield ParityBatch(
            input_ids=batch.input_ids[part],
            seq_lens=batch.seq_lens[part],
            prompt_lens=batch.prompt_lens[part],
        )


# A plan gives runs over an empty cache; a run is the list of its steps' seq_lens [B].


def _prefill_plan(part: ParityBatch, all_logits: bool) -> Iterator[list[Tensor]]:
    """Whole rows in one step; where only the last logits are given, every prefix of them."""
    if all_logits:
        yield [part.seq_lens]
        return
    for length in range(1, int(part.seq_lens.max()) + 1):
        yield [torch.where(part.seq_lens >= length, length, 0)]


def _chunk_plan(part: ParityBatch, all_logits: bool) -> Iterator[list[Tensor]]:
    """Chunks whose sizes differ from step to step and from row to row, none included."""
    generator = torch.Generator().manual_seed(_CHUNK_SEED)
    for _ in range(1 if all_logits else _CHUNK_ROUNDS):
        left, counts = part.seq_lens.clone(), []
        while bool((left > 0).any()):
            sizes = torch.randint(_LONGEST_CHUNK + 1, left.shape, generator=generator)
            if bool((sizes.minimum(left) > 0).any()):
                counts.append(sizes.minimum(left))
                left = left - counts[-1]
        yield counts


def _decode_plan(part: ParityBatch, all_logits: bool) -> Iterator[list[Tensor]]:
    """A prompt in one step, then one token at a time; rows end at different steps."""
    counts, position = [part.prompt_lens], part.prompt_lens
    while bool((position < part.seq_lens).any()):
        counts.append((position < part.seq_lens).long())
        position = position + counts[-1]
    yield counts


def _feed(
    session: TrtSession, part: ParityBatch, steps: list[Tensor]
) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
    """Do the steps of a run over an empty cache.

    Args:
        session: The engine.
        part: The rows.
        steps: seq_lens [B] of each step.

    Yields:
        For each step the positions whose logits it gives, as indices of rows and columns [M], and
        the logits [M, V].
    """
    rows = torch.arange(len(part.seq_lens))
    session.start(len(rows), int(part.seq_lens.max()))
    position = torch.zeros_like(part.seq_lens)
    for counts in steps:
        columns = position[:, None] + torch.arange(int(counts.max()))  # [B, S]
        columns = columns.clamp_max(part.input_ids.shape[1] - 1)
        logits = session.step(part.input_ids.gather(1, columns), counts)
        position = position + counts
        if logits.ndim == 3:
            valid = torch.arange(columns.shape[1]) < counts[:, None]
            yield (rows[:, None].expand_as(columns)[valid], columns[valid]), logits[valid]
        else:
            active = counts > 0
            yield (rows[active], (position - 1)[active]), logits[active]


def compare_layers(
    runtime: TrtRuntime, batch: ParityBatch, references: TorchReferences
) -> list[LayerDifference]:
    """Compare the marked nodes of a debug engine with PyTorch, in execution order.

    Returns:
        One entry a node, none for an engine without marked nodes.
    """
    activation, dtype, session = runtime.activation, runtime.dtype, runtime.session
    model = references.model(activation)
    own_model = references.model(activation, dtype) if dtype in HALF_DTYPES else None
    found: dict[str, list[LayerDifference]] = {}
    own: dict[str, float] = {}
    for ids, lens in row_batches(batch, runtime.rows_at_once):
        session.start(len(lens), ids.shape[1])
        session.step(ids, lens)
        if not session.node_values:
            return []
        mask = torch.arange(ids.shape[1]) < lens[:, None]
        reference = engine_values(run_reference(model, ids, lens).values)
        rounded = (
            {} if own_model is None else engine_values(run_reference(own_model, ids, lens).values)
        )
        for node, expected in reference.items():
            if node not in session.node_values:
                continue
            value = session.node_values[node][mask]
            found.setdefault(node, []).append(layer_difference(node, expected, value))
            if node in rounded:
                departure = layer_difference(node, expected, rounded[node]).relative
                own[node] = max(own.get(node, _SMALLEST_LAYER_LIMIT), departure)
    return [
        merge_differences(
            parts,
            limit=limit("half_layer_ratio") * own[node]
            if node in own
            else limit("engine_layer_departure"),
        )
        for node, parts in found.items()
    ]


def bisect_layers(
    runtime: TrtRuntime,
    directory: Path,
    batch: ParityBatch,
    references: TorchReferences,
    progress: Progress,
) -> list[LayerDifference]:
    """Build an engine as this one was, with every layer's output marked, and compare the layers.

    TensorRT may choose other kernels where an output is marked, but for the plugins' layers.

    Args:
        runtime: The engine to look into.
        directory: What ``tinylm-export onnx`` wrote.
        batch: The rows.
        references: PyTorch's runs.
        progress: Told how far it is.

    Returns:
        One entry a layer, in execution order.
    """
    from tinylm_export.to_engine import build_engine

    manifest = runtime.session.manifest
    with tempfile.TemporaryDirectory() as folder:
        debug = Path(folder) / "debug"
        progress(f"{runtime.name}: build the debug engine", 0.0)
        build_engine(
            directory,
            debug,
            dtype=manifest.dtype,
            fp8_act=manifest.activation == "fp8_e4m3",
            max_batch_size=manifest.max_batch_size,
            max_seq_len=manifest.max_seq_len,
            all_logits=manifest.all_logits,
            mark_nodes=list(engine_nodes(runtime.session.config.num_layers)),
        )
        progress(f"{runtime.name}: build the debug engine", 1.0)
        return compare_layers(TrtRuntime(debug, directory), batch, references)
