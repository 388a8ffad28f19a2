"""Parity: PyTorch and each runtime on the same held-out tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from tinylm.bitlinear import BitLinear
from tinylm.checkpoint import load_model
from tinylm.generate import last_logits
from tinylm.model import TinyLM
from tinylm.norm import RMSNorm
from tinylm.precision import ordinary_float32
from tinylm_export.bit_linear_model import BitLinearWeights
from tinylm_export.generation_parity import GenerationSettings, compare_texts
from tinylm_export.head_effect import head_effect
from tinylm_export.logit_meter import LogitMeter
from tinylm_export.machine import describe_machine
from tinylm_export.op_probe import Probe, compare_bit_linear, merge, norm_path, read_weights
from tinylm_export.parity_batch import (
    ParityBatch,
    layer_difference,
    make_batch,
    merge_differences,
    row_batches,
)
from tinylm_export.parity_reference import bit_linear_names, run_reference
from tinylm_export.parity_report import (
    BitLinearAgreement,
    LayerDifference,
    LogitAgreement,
    ParityReport,
    RuntimeReport,
)
from tinylm_export.parity_runtime import OrtRuntime, ParityRuntime
from tinylm_export.parity_trt import TorchReferences, TrtRuntime, bisect_layers, compare_engine
from tinylm_export.to_onnx import ONNX_FILE, ExportInfo, source_checkpoint

Progress = Callable[[str, float], None]
# Every inner value of a batch is held twice, PyTorch's and the runtime's.
_TOKENS_AT_ONCE = 512


def compare_prefill(
    model: TinyLM,
    runtime: ParityRuntime,
    graph: ir.Model,
    batch: ParityBatch,
    rows_at_once: int,
    progress: Progress,
) -> tuple[LogitAgreement, list[BitLinearAgreement], list[LayerDifference], Tensor]:
    """Compare whole rows: logits, every node's output, and every BitLinear on PyTorch's input.

    Returns:
        The agreements, and PyTorch's logits [B, S, V] for :func:`compare_decode`.
    """
    names = bit_linear_names(model)
    probes = {name: _probe(model, graph, name, runtime.probe) for name in names}
    codes = {n: _bit_linear(model, n).weight_codes(torch.float32)[0].cpu() for n in names}
    meter = LogitMeter("prefill")
    linears: dict[str, list[BitLinearAgreement]] = {name: [] for name in names}
    layers: dict[str, list[LayerDifference]] = {}
    logits = torch.zeros(*batch.input_ids.shape, model.config.vocab_size)
    done = 0
    for ids, lens in row_batches(batch, rows_at_once):
        reference = run_reference(model, ids, lens)
        mask = torch.arange(ids.shape[1]) < lens[:, None]
        found = runtime.prefill(ids, lens, list(reference.values))
        meter.add(reference.logits[mask], found["logits"][mask])
        for node, value in reference.values.items():
            layers.setdefault(node, []).append(layer_difference(node, value, found[node][mask]))
        for name in names:
            norm = _norm(model, name)
            x = reference.norm_inputs[norm_path(name)]
            weight = norm.weight.cpu()
            linears[name].append(
                compare_bit_linear(name, x, weight, norm.eps, codes[name], probes[name])
            )
        logits[done : done + len(ids), : ids.shape[1]] = reference.logits
        done += len(ids)
        progress(f"{runtime.name}: prefill", done / len(batch.seq_lens))
    return (
        meter.result(),
        [merge(parts) for parts in linears.values()],
        [merge_differences(parts) for parts in layers.values()],
        logits,
    )


def _bit_linear(model: TinyLM, name: str) -> BitLinear:
    layer = model.get_submodule(name)
    assert isinstance(layer, BitLinear)
    return layer


def _norm(model: TinyLM, bit_linear: str) -> RMSNorm:
    norm = model.get_submodule(norm_path(bit_linear))
    assert isinstance(norm, RMSNorm)
    return norm


def _probe(
    model: TinyLM, graph: ir.Model, name: str, make: Callable[[BitLinearWeights], Probe]
) -> Probe:
    activation, eps = _bit_linear(model, name).activation, _norm(model, name).eps
    return make(read_weights(graph, name, activation, eps))


def compare_decode(
    runtime: ParityRuntime, batch: ParityBatch, reference: Tensor, progress: Progress
) -> LogitAgreement:
    """Prefill a part of each row in two chunks, then decode it token by token over the cache.

    Rows have different prompt lengths and end at different steps. Every logit is compared with
    PyTorch's from one pass over the whole row without a cache.

    Args:
        runtime: What to compare.
        batch: The rows.
        reference: PyTorch's logits [B, S, V].
        progress: Told how far it is.
    """
    meter = LogitMeter("decode")
    rows = torch.arange(len(batch.seq_lens))
    session, position = runtime.session, torch.zeros_like(batch.seq_lens)
    session.start(len(rows), int(batch.seq_lens.max()))

    def step(counts: Tensor) -> None:
        nonlocal position
        columns = position[:, None] + torch.arange(int(counts.max()))
        ids = batch.input_ids.gather(1, columns.clamp_max(batch.input_ids.shape[1] - 1))
        logits = last_logits(session.step(ids, counts), counts)
        position = position + counts
        active = counts > 0
        meter.add(reference[rows, (position - 1).clamp_min(0)][active], logits[active])

    first = batch.prompt_lens // 2
    step(first)
    step(batch.prompt_lens - first)
    total = int((batch.seq_lens - position).sum())
    while bool((position < batch.seq_lens).any()):
        step((position < batch.seq_lens).long())
        left = int((batch.seq_lens - position).sum())
        progress(f"{runtime.name}: decode", 1 - left / total)
    return meter.result()


def run_parity(
    directory: str | Path,
    tokens: Tensor,
    *,
    checkpoint: str | Path | None = None,
    num_tokens: int = 4096,
    length: int | None = None,
    native: bool | None = None,
    engines: Sequence[str | Path] = (),
    generation: GenerationSettings | None = None,
    bisect: bool = False,
    data: dict[str, Any] | None = None,
    progress: Progress = lambda text, fraction: None,
) -> ParityReport:
    """Compare PyTorch with every runtime that an exported directory has, and with engines of it.

    PyTorch runs on the GPU where there is one.

    Args:
        directory: What ``tinylm-export onnx`` wrote.
        tokens: int64 [N], held-out tokens.
        checkpoint: The checkpoint it was made from; default the one that was recorded.
        num_tokens: Least tokens to compare.
        length: Longest row; default 256, or the context if that is shorter.
        native: What runs the custom ops: None for the native library if there is one, True to
            require it, False for the function bodies.
        engines: Engine directories that were built from the exported one.
        generation: Greedy texts to compare, for engines; default none.
        bisect: Build each engine once more with every layer's output marked, to name the first one
            that departs.
        data: Where the tokens came from, for the report.
        progress: Told the phase and how much of it is done, 0 to 1.

    Raises:
        CheckpointError: The checkpoint is missing, or not the one that was exported.
        DataError: Too few tokens.
        ExportError: The directory can't be used.
        NativeError: The native library is required and not built, can't be used, or was not used.
    """
    directory = Path(directory)
    info = ExportInfo.load(directory)
    opened = [TrtRuntime(Path(engine), directory) for engine in engines]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = _load_reference(directory, info, checkpoint).to(device)
    longest = [model.config.max_seq_len, *(runtime.longest_row for runtime in opened)]
    length = min(length or 256, *longest)
    batch = make_batch(tokens, length, num_tokens)
    graph = ir.load(directory / ONNX_FILE)
    rows_at_once = max(1, _TOKENS_AT_ONCE // length)
    runtimes = []
    for runtime in (OrtRuntime(directory, native=native),):
        prefill, linears, layers, logits = compare_prefill(
            model, runtime, graph, batch, rows_at_once, progress
        )
        phases = [prefill]
        if info.task == "text-generation-with-past":
            phases.append(compare_decode(runtime, batch, logits, progress))
        runtimes.append(
            RuntimeReport(
                runtime=runtime.name,
                version=runtime.version,
                kernels=runtime.kernels,
                logits=phases,
                bit_linears=linears,
                layers=layers,
            )
        )
    references = TorchReferences(model, batch, rows_at_once, logits)
    for engine in opened:
        found = compare_engine(engine, batch, references, progress)
        if bisect:
            layers = bisect_layers(engine, directory, batch, references, progress)
            found = dataclasses.replace(found, layers=layers)
        if generation is not None:
            texts = compare_texts(engine, directory, batch, generation, native, progress)
            found = dataclasses.replace(found, generation=texts)
        runtimes.append(found)
    yardstick = _yardstick(model, batch, rows_at_once, logits)
    head = None
    if info.lm_head == "int8":
        plain = dataclasses.replace(info, lm_head="float32")
        whole = _load_reference(directory, plain, checkpoint)
        head = head_effect(whole, row_batches(batch, rows_at_once), logits)
    return ParityReport(
        model={"num_parameters": model.num_parameters(), **model.config.to_dict()},
        data={"num_rows": len(batch.seq_lens), "longest_row": length, **(data or {})},
        machine=describe_machine(),
        runtimes=runtimes,
        yardstick=yardstick,
        head=head,
    )


def _load_reference(directory: Path, info: ExportInfo, checkpoint: str | Path | None) -> TinyLM:
    model = load_model(source_checkpoint(directory, info, checkpoint))
    model.set_activation(info.activation)  # type: ignore[arg-type]
    return model.quantize_head() if info.lm_head == "int8" else model


@torch.no_grad()
def _yardstick(
    model: TinyLM, batch: ParityBatch, rows_at_once: int, reference: Tensor
) -> LogitAgreement:
    """Compare PyTorch's ordinary float32 arithmetic with its own wide one."""
    meter = LogitMeter("prefill")
    device = model.embed_tokens.weight.device
    done = 0
    with ordinary_float32():
        for ids, lens in row_batches(batch, rows_at_once):
            mask = torch.arange(ids.shape[1]) < lens[:, None]
            part = reference[done : done + len(ids), : ids.shape[1]]
            found = model(ids.to(device), mask.to(device)).cpu()
            meter.add(part[mask], found[mask])
            done += len(ids)
    return meter.result()
