"""Parity of engines: the verdicts and plans with PyTorch as the engine, and real ones on a GPU."""

from __future__ import annotations

import dataclasses
import json
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_helpers import command_line
from engine_helpers import make_engine_directory, make_manifest, needs_gpu
from export_helpers import make_export
from model_helpers import make_model
from rich.console import Console
from torch import Tensor

from tinylm.checkpoint import save_model
from tinylm.errors import ConfigError, ExportError
from tinylm.generate import TorchSession
from tinylm.model import TinyLM
from tinylm_export.cli import main
from tinylm_export.generation_parity import (
    GenerationSettings,
    GreedyText,
    compare_texts,
    compare_tokens,
    greedy_texts,
    make_prompts,
)
from tinylm_export.parity import run_parity
from tinylm_export.parity_batch import ParityBatch, make_batch
from tinylm_export.parity_nodes import engine_nodes, engine_values
from tinylm_export.parity_reference import run_reference
from tinylm_export.parity_render import plot, render
from tinylm_export.parity_report import (
    GenerationAgreement,
    LogitAgreement,
    LogitLimits,
    ParityReport,
    RuntimeReport,
)
from tinylm_export.parity_trt import TorchReferences, TrtRuntime, compare_engine
from tinylm_export.to_onnx import export_onnx
from tinylm_export.trt_session import EngineLimits

QUIET = lambda text, fraction: None  # noqa: E731


def held_out(count: int = 600) -> Tensor:
    return torch.randint(0, 512, (count,), generator=torch.Generator().manual_seed(3))


class TorchEngine(TorchSession):
    """PyTorch with what the TensorRT session has beside start() and step()."""

    def __init__(self, model: TinyLM, onnx: Path, *, all_logits: bool, marked: bool) -> None:
        super().__init__(model)
        self.manifest = make_manifest(onnx, all_logits=all_logits)
        self.info = SimpleNamespace(activation="int8")
        self.directory, self.plugins = onnx, None
        self.all_logits, self.marked = all_logits, marked
        self.limits = EngineLimits(batch_size=4, capacity=64, length=64)
        self.kernels = "PyTorch as an engine"
        self.node_values: dict[str, Tensor] = {}

    def start(self, batch_size: int, capacity: int) -> None:
        super().start(batch_size, capacity + 16)  # its cache needs room for a chunk's padding too

    @torch.no_grad()
    def step(self, input_ids: Tensor, seq_lens: Tensor) -> Tensor:
        if self.marked:
            values = engine_values(run_reference(self.model, input_ids, seq_lens).values)
            mask = torch.arange(input_ids.shape[1]) < seq_lens[:, None]
            self.node_values = {
                node: torch.zeros(*mask.shape, value.shape[1]).masked_scatter(
                    mask[..., None].expand(*mask.shape, value.shape[1]), value
                )
                for node, value in values.items()
            }
        if not self.all_logits:
            return super().step(input_ids, seq_lens)
        assert self._cache is not None
        mask = torch.arange(input_ids.shape[1]) < seq_lens[:, None]
        return self.model(input_ids, mask, cache=self._cache).float()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parity_trt")
    return export_onnx(save_model(folder / "checkpoint", make_model(seed=1)), folder / "onnx")


@pytest.fixture(scope="module")
def batch() -> ParityBatch:
    return make_batch(held_out(), 40, 150)


def make_runtime(
    model: TinyLM,
    onnx: Path,
    *,
    dtype: str = "fp32",
    activation: str = "int8",
    all_logits: bool = False,
    marked: bool = False,
) -> Any:
    """Make what :class:`TrtRuntime` is, over PyTorch."""
    session = TorchEngine(model, onnx, all_logits=all_logits, marked=marked)
    return SimpleNamespace(
        name="TensorRT test", session=session, rows_at_once=4, dtype=dtype, activation=activation
    )


@torch.no_grad()
def references(batch: ParityBatch) -> TorchReferences:
    model = make_model(seed=1)
    mask = torch.arange(batch.input_ids.shape[1]) < batch.seq_lens[:, None]
    return TorchReferences(model, batch, 2, model(batch.input_ids, mask))


@pytest.mark.parametrize("all_logits", [False, True])
def test_every_position_is_compared_in_each_phase(
    exported: Path, batch: ParityBatch, all_logits: bool
) -> None:
    runtime = make_runtime(make_model(seed=1), exported, all_logits=all_logits)
    report = compare_engine(runtime, batch, references(batch), QUIET)
    prefill, chunks, decode = report.logits
    assert [a.phase for a in report.logits] == ["prefill", "chunked prefill", "decode"]
    assert prefill.num_tokens == int(batch.seq_lens.sum())
    if all_logits:
        assert chunks.num_tokens == decode.num_tokens == prefill.num_tokens
    else:
        assert chunks.num_tokens > len(batch.seq_lens) * 8
        rest = int((batch.seq_lens - batch.prompt_lens + 1).sum())
        assert decode.num_tokens == rest
    assert report.passed and not report.own
    assert all(a.max_abs < 1e-4 for a in report.logits)


def test_a_wrong_engine_fails_and_its_first_layer_is_named(
    exported: Path, batch: ParityBatch
) -> None:
    model = make_model(seed=1)
    with torch.no_grad():
        model.get_parameter("layers.1.mlp.down_proj.weight").neg_()
    runtime = make_runtime(model, exported, marked=True)
    report = compare_engine(runtime, batch, references(batch), QUIET)
    assert not report.passed
    assert [layer.node for layer in report.layers] == list(engine_nodes(2))
    assert report.first_departure == "layers.1.mlp.down_proj"


def test_half_precision_is_judged_by_pytorchs_own(exported: Path, batch: ParityBatch) -> None:
    known = references(batch)
    runtime = make_runtime(known.model("int8", "bf16"), exported, dtype="bf16", marked=True)
    report = compare_engine(runtime, batch, known, QUIET)
    assert len(report.own) == 3 and report.own[0].mean_kl > 1e-6
    # PyTorch's own run, with other batches; of 150 tokens a few take another one.
    for found, own in zip(report.logits, report.own, strict=True):
        assert found.num_tokens == own.num_tokens
        assert found.mean_kl < 1.25 * own.mean_kl
        assert found.limits.mean_kl == pytest.approx(1.25 * own.mean_kl)
        errors = (own.top1_agreement - 0.002 - found.limits.top1_agreement) / 3
        discordant = (errors * own.num_tokens) ** 2  # McNemar: sqrt(their number) / tokens
        assert discordant == pytest.approx(round(discordant), abs=1e-6)
        assert found.passed
    assert report.first_departure is None and len(report.layers) == 10


def test_an_fp8_engine_is_compared_with_fp8_numerics(exported: Path, batch: ParityBatch) -> None:
    known = references(batch)
    runtime = make_runtime(known.model("fp8_e4m3"), exported, activation="fp8_e4m3")
    assert compare_engine(runtime, batch, known, QUIET).passed
    assert known.model("int8").config.activation == "int8"
    runtime = make_runtime(make_model(seed=1), exported, activation="fp8_e4m3")
    assert not compare_engine(runtime, batch, known, QUIET).passed


def test_the_codes_of_a_half_precision_model_are_float32s(batch: ParityBatch) -> None:
    known = references(batch)
    half, whole = known.model("int8", "bf16"), known.model("int8")
    name = "layers.0.self_attn.q_proj"
    codes, scale = half.get_submodule(name).weight_codes()  # type: ignore[operator]
    expected, expected_scale = whole.get_submodule(name).weight_codes()  # type: ignore[operator]
    assert torch.equal(codes, expected)
    assert scale.dtype == torch.float32 and bool((scale == expected_scale).all())
    assert half.embed_tokens.weight.dtype == torch.bfloat16


def test_limits() -> None:
    def agreement(limits: LogitLimits, **changes: float) -> LogitAgreement:
        values = {
            "num_tokens": 2000,
            "max_abs": 0.5,
            "mean_abs": 0.0,
            "mean_kl": 1e-6,
            "max_kl": 0.0,
            "top1_agreement": 0.999,
        }
        return LogitAgreement(phase="decode", limits=limits, **(values | changes))  # type: ignore[arg-type]

    float32 = LogitLimits.of_engine(None)
    assert agreement(float32).passed
    assert not agreement(float32, mean_kl=1.1e-6).passed
    assert not agreement(float32, top1_agreement=0.9989).passed
    assert not agreement(float32, max_abs=float("nan")).passed
    assert not agreement(LogitLimits()).passed  # float32 runtimes keep to max |difference| too
    half = LogitLimits.of_engine(agreement(float32, mean_kl=4e-5, top1_agreement=0.99))
    assert agreement(half, mean_kl=5e-5, top1_agreement=0.988).passed
    assert not agreement(half, mean_kl=5.1e-5).passed
    assert not agreement(half, top1_agreement=0.9879).passed
    own = agreement(float32, mean_kl=4e-5, top1_agreement=0.99)
    noisy = LogitLimits.of_engine(own, top1_error=0.001)
    assert agreement(noisy, top1_agreement=0.98501).passed
    assert not agreement(noisy, top1_agreement=0.98499).passed


def test_prompts_come_from_the_rows(batch: ParityBatch) -> None:
    rows = len(batch.seq_lens)
    prompts = make_prompts(batch, rows + 1, 8)
    assert prompts.shape == (rows + 1, 8)
    assert torch.equal(prompts[:rows], batch.input_ids[:, :8])
    assert torch.equal(prompts[rows], batch.input_ids[0, 8:16])


def test_the_first_difference_and_its_gap() -> None:
    expected = [GreedyText([1, 2, 3], [0.5, 2e-3, 5e-4]), GreedyText([4, 5, 6], [1.0, 1.0, 1.0])]
    found = compare_tokens(expected, [[1, 2, 9], [4, 5, 6]], other="x", largest_gap=1e-3)
    assert [(d.prompt, d.position, d.expected, d.found) for d in found.differences] == [
        (0, 2, 3, 9)
    ]
    assert found.passed
    assert not compare_tokens(expected, [[1, 9, 3], [4, 5, 6]], other="x", largest_gap=1e-3).passed
    assert not compare_tokens(expected, [[1, 2, 9], [4, 5, 6]], other="x", largest_gap=0.0).passed
    assert compare_tokens(expected, [[7, 2, 9], [4, 5, 6]], other="x", largest_gap=None).passed
    short = compare_tokens(expected, [[1, 2], [4, 5, 6]], other="x", largest_gap=1e-3)
    assert short.differences[0].found is None and not short.passed


def make_program(path: Path, tokens: list[int], code: int = 0) -> Path:
    """Write a program that prints ids, whatever it is asked."""
    lines = "\n".join(f"echo {token}" for token in tokens)
    path.write_text(f"#!/bin/sh\n{lines}\necho a message >&2\nexit {code}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_texts_against_onnx_runtime_and_the_program(
    exported: Path, batch: ParityBatch, tmp_path: Path
) -> None:
    model = make_model(seed=1)
    runtime = make_runtime(model, exported)
    prompts = make_prompts(batch, 1, 8)
    text = greedy_texts(TorchSession(model), prompts, 5)[0]
    program = make_program(tmp_path / "run", text.tokens)
    settings = GenerationSettings(num_prompts=1, max_new_tokens=5, prompt_len=8, program=program)
    onnx, cpp = compare_texts(runtime, exported, batch, settings, False, QUIET)
    assert (onnx.other, cpp.other) == ("ONNX Runtime", "tinylm-run")
    assert onnx.passed and not onnx.differences and onnx.num_tokens == 5
    assert cpp.passed
    make_program(program, [*text.tokens[:-1], text.tokens[-1] + 1])
    _, cpp = compare_texts(runtime, exported, batch, settings, False, QUIET)
    assert not cpp.passed and cpp.differences[0].position == 4
    make_program(program, [], code=2)
    with pytest.raises(ExportError, match="exit code 2: a message"):
        compare_texts(runtime, exported, batch, settings, False, QUIET)


def test_report_goes_to_json_table_and_picture(
    exported: Path, batch: ParityBatch, tmp_path: Path
) -> None:
    report = run_parity(exported, held_out(), num_tokens=100, length=32)
    known = references(batch)
    runtime = make_runtime(known.model("int8", "bf16"), exported, dtype="bf16", marked=True)
    engine = compare_engine(runtime, batch, known, QUIET)
    text = GreedyText([1, 2], [0.5, 5e-4])
    texts = compare_tokens([text], [[1, 3]], other="ONNX Runtime", largest_gap=1e-3)
    engine = dataclasses.replace(engine, generation=[texts])
    report = dataclasses.replace(report, runtimes=[*report.runtimes, engine])
    values = json.loads(json.dumps(report.to_dict()))
    entry = values["runtimes"][1]
    assert entry["own"][0]["mean_kl"] > 0 and entry["logits"][0]["limits"]["max_abs"] is None
    assert entry["generation"][0]["passed"] is True
    console = Console(record=True, width=160)
    console.print(render(report))
    shown = console.export_text()
    assert "PyTorch's own" in shown and "chunked prefill" in shown
    assert "0 of 1 greedy texts" in shown and "top-2 logit gap 5.0e-04" in shown
    plot(report, tmp_path / "parity.png")
    assert (tmp_path / "parity.png").read_bytes().startswith(b"\x89PNG")


def test_engines_of_another_model_are_refused(exported: Path, tmp_path: Path) -> None:
    other = make_engine_directory(exported, tmp_path / "other", onnx_sha256="0" * 64)
    with pytest.raises(ExportError, match=r"another model\.onnx: expected SHA-256 0+, found"):
        run_parity(exported, held_out(), engines=[other], num_tokens=100)
    dense = make_engine_directory(exported, tmp_path / "dense", dense=True)
    with pytest.raises(ExportError, match="a --dense engine"):
        TrtRuntime(dense, exported)


def test_command_line_errors(exported: Path, tmp_path: Path, capsys: Any) -> None:
    run = command_line(main, capsys)
    file = tmp_path / "val.jsonl"
    file.write_text('{"text": "x"}\n')
    code, _, error = run("parity", exported, "--file", file, "--prompts", 20)
    assert code == 2 and "give one with --engine" in error
    code, _, error = run("parity", exported, "--engine", exported, "--program", "tinylm-run")
    assert code == 2 and "--program needs prompts" in error
    with pytest.raises(ConfigError, match="max_new_tokens must be at least 1"):
        GenerationSettings(max_new_tokens=0)


def build(onnx: Path, out: Path, **options: Any) -> Path:
    from tinylm_export.to_engine import build_engine

    build_engine(onnx, out, max_batch_size=4, max_seq_len=64, **options)
    return out


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("activation", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("all_logits", [False, True])
def test_engines_say_what_pytorch_says(
    tmp_path: Path, dtype: str, all_logits: bool, activation: str
) -> None:
    _, onnx = make_export(tmp_path, activation=activation, tie_embeddings=False)
    engine = build(onnx, tmp_path / "engine", dtype=dtype, all_logits=all_logits)
    report = run_parity(onnx, held_out(3000), engines=[engine], num_tokens=2000, length=48)
    runtime = report.runtimes[1]
    if dtype == "fp32":
        assert runtime.passed, show(report)
    # A random model has many near ties: its top-1 over 2,000 tokens varies by a point and more
    # between two of PyTorch's own runs.
    for found, own in zip(runtime.logits, runtime.own, strict=False):
        assert found.mean_kl <= found.limits.mean_kl, show(report)
        assert found.top1_agreement > own.top1_agreement - 0.03, show(report)


@pytest.mark.gpu
@needs_gpu
def test_greedy_texts_of_a_float32_engine(tmp_path: Path) -> None:
    _, onnx = make_export(tmp_path, tie_embeddings=False)
    engine = build(onnx, tmp_path / "engine", dtype="fp32")
    settings = GenerationSettings(num_prompts=5, max_new_tokens=40)
    report = run_parity(
        onnx, held_out(), engines=[engine], generation=settings, num_tokens=300, length=48
    )
    (texts,) = report.runtimes[1].generation
    assert isinstance(texts, GenerationAgreement) and texts.passed, show(report)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_debug_engine_names_no_layer(tmp_path: Path, dtype: str) -> None:
    _, onnx = make_export(tmp_path, tie_embeddings=False)
    engine = build(onnx, tmp_path / "engine", dtype=dtype)
    report = run_parity(onnx, held_out(), engines=[engine], bisect=True, num_tokens=300, length=48)
    runtime = report.runtimes[1]
    assert [layer.node for layer in runtime.layers] == list(engine_nodes(2))
    assert runtime.first_departure is None, show(report)


def show(report: ParityReport) -> str:
    """Return the report as text, for the message of a failed test."""
    console = Console(record=True, width=160)
    console.print(render(report))
    assert all(isinstance(runtime, RuntimeReport) for runtime in report.runtimes)
    return console.export_text()
