"""Parity: PyTorch and each runtime on the same held-out tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from tinylm.bitlinear import BitLinear
from tinylm.checkpoint import load_model
from tinylm.errors import DataError
from tinylm.model import TinyLM
from tinylm.norm import RMSNorm
from tinylm.precision import ordinary_float32
from tinylm_export.bit_linear_model import BitLinearWeights
from tinylm_export.head_effect import head_effect
from tinylm_export.logit_meter import LogitMeter
from tinylm_export.machine import describe_machine
from tinylm_export.op_probe import Probe, compare_bit_linear, merge, norm_path, read_weights
from tinylm_export.parity_reference import bit_linear_names, run_reference
from tinylm_export.parity_report import (
    BitLinearAgreement,
    LayerDifference,
    LogitAgreement,
    ParityReport,
    RuntimeReport,
)
from tinylm_export.parity_runtime import OrtRuntime, ParityRuntime
from tinylm_export.to_onnx import ONNX_FILE, ExportInfo, source_checkpoint

Progress = Callable[[str, float], None]
# Every inner value of a batch is held twice, PyTorch's and the runtime's.
_TOKENS_AT_ONCE = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParityBatch:
    """Held-out rows of different lengths.

    Attributes:
        input_ids: int64 [B, S], right-padded.
        seq_lens: int64 [B].
        prompt_lens: int64 [B], how much of each row is prefilled before decoding.
    """

    input_ids: Tensor
    seq_lens: Tensor
    prompt_lens: Tensor


def make_batch(tokens: Tensor, length: int, num_tokens: int) -> ParityBatch:
    """Cut a token stream into rows of different lengths.

    Args:
        tokens: int64 [N], held-out tokens.
        length: Longest row.
        num_tokens: Least tokens in all rows together.

    Raises:
        DataError: There are fewer tokens than that.
    """
    if len(tokens) < num_tokens:
        raise DataError(
            f"parity needs {num_tokens} held-out tokens, found {len(tokens)}. Give a longer --file "
            "or a smaller --tokens."
        )
    spread = max(1, length // 8)
    lens: list[int] = []
    while sum(lens) < num_tokens:
        lens.append(length - 7 * len(lens) % spread)
    seq_lens = torch.tensor(lens)
    ids = torch.zeros(len(lens), length, dtype=torch.int64)
    start = 0
    for row, count in enumerate(lens):
        taken = tokens[start : start + count]
        if len(taken) < count:  # the last row takes the last tokens
            taken = tokens[-count:]
        ids[row, :count] = taken
        start += count
    prompts = torch.tensor([max(1, length // 4 + 5 * row % spread) for row in range(len(lens))])
    return ParityBatch(
        input_ids=ids, seq_lens=seq_lens, prompt_lens=torch.minimum(prompts, seq_lens - 1)
    )


def _row_batches(batch: ParityBatch, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(batch.seq_lens), rows):
        lens = batch.seq_lens[start : start + rows]
        yield batch.input_ids[start : start + rows, : int(lens.max())], lens


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
    codes = {name: _bit_linear(model, name).weight_codes(torch.float32)[0] for name in names}
    meter = LogitMeter("prefill")
    linears: dict[str, list[BitLinearAgreement]] = {name: [] for name in names}
    layers: dict[str, list[LayerDifference]] = {}
    logits = torch.zeros(*batch.input_ids.shape, model.config.vocab_size)
    done = 0
    for ids, lens in _row_batches(batch, rows_at_once):
        reference = run_reference(model, ids, lens)
        mask = torch.arange(ids.shape[1]) < lens[:, None]
        found = runtime.prefill(ids, lens, list(reference.values))
        meter.add(reference.logits[mask], found["logits"][mask])
        for node, value in reference.values.items():
            layers.setdefault(node, []).append(_difference(node, value, found[node][mask]))
        for name in names:
            norm = _norm(model, name)
            x = reference.norm_inputs[norm_path(name)]
            linears[name].append(
                compare_bit_linear(name, x, norm.weight, norm.eps, codes[name], probes[name])
            )
        logits[done : done + len(ids), : ids.shape[1]] = reference.logits
        done += len(ids)
        progress(f"{runtime.name}: prefill", done / len(batch.seq_lens))
    return (
        meter.result(),
        [merge(parts) for parts in linears.values()],
        [_merge_differences(parts) for parts in layers.values()],
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


def _difference(node: str, reference: Tensor, found: Tensor) -> LayerDifference:
    difference = (found.double() - reference.double()).abs().max()
    return LayerDifference(
        node=node,
        max_abs=float(difference),
        relative=float(difference / reference.double().abs().max().clamp_min(1e-30)),
        num_different=int((found != reference).sum()),
        num_values=reference.numel(),
    )


def _merge_differences(parts: list[LayerDifference]) -> LayerDifference:
    return LayerDifference(
        node=parts[0].node,
        max_abs=float(torch.tensor([p.max_abs for p in parts]).max()),
        relative=float(torch.tensor([p.relative for p in parts]).max()),
        num_different=sum(p.num_different for p in parts),
        num_values=sum(p.num_values for p in parts),
    )


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
        logits = session.step(ids, counts)
        position = position + counts
        if logits.ndim == 3:
            logits = logits[rows, (counts - 1).clamp_min(0)]
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
    data: dict[str, Any] | None = None,
    progress: Progress = lambda text, fraction: None,
) -> ParityReport:
    """Compare PyTorch with every runtime that an exported directory has.

    Args:
        directory: What ``tinylm-export onnx`` wrote.
        tokens: int64 [N], held-out tokens.
        checkpoint: The checkpoint it was made from; default the one that was recorded.
        num_tokens: Least tokens to compare.
        length: Longest row; default 256, or the context if that is shorter.
        native: What runs the custom ops: None for the native library if there is one, True to
            require it, False for the function bodies.
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
    model = _load_reference(directory, info, checkpoint)
    length = min(length or 256, model.config.max_seq_len)
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
    yardstick = _yardstick(model, batch, rows_at_once, logits)
    head = None
    if info.lm_head == "int8":
        plain = dataclasses.replace(info, lm_head="float32")
        whole = _load_reference(directory, plain, checkpoint)
        head = head_effect(whole, _row_batches(batch, rows_at_once), logits)
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
    done = 0
    with ordinary_float32():
        for ids, lens in _row_batches(batch, rows_at_once):
            mask = torch.arange(ids.shape[1]) < lens[:, None]
            part = reference[done : done + len(ids), : ids.shape[1]]
            meter.add(part[mask], model(ids, mask)[mask])
            done += len(ids)
    return meter.result()
