"""benchmarks/gpu.py without a GPU: its references, verdicts, tables, pictures and refusals."""

from __future__ import annotations

import dataclasses
import functools
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gpu
import gpu_attention
import gpu_counters
import gpu_gemm
import gpu_model
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bench_records import NotRunError, Verdict
from cpu_gemm_problem import GemmProblem
from gpu_attention_contenders import DECODE, OURS, PREFILL
from gpu_attention_problem import (
    HEAD_DIM,
    RANK,
    LatentProblem,
    MultiHeadProblem,
    SharedLatentProblem,
    Step,
)
from gpu_gemm_problem import GpuGemmProblem
from gpu_humming import pack_int2
from gpu_report import draw, show
from gpu_targets import judge
from gpu_timing import GpuRecord, Work, check, departure
from rich.console import Console
from torch import Tensor

from tinylm.packing import pack
from tinylm_export.bench_report import Spread
from tinylm_export.torch_ops import torch_op

SCRIPT = Path(gpu.__file__)
MACHINE = {"gpu": {"name": "a GPU"}}


class TestReferences:
    def test_int8_sums_are_those_of_the_cpu_benchmark(self) -> None:
        problem = GpuGemmProblem(24, 128, 7, "cpu")
        other = GemmProblem(24, 128, 7)
        other.x, other.norm_weight = problem.x.float().numpy(), problem.norm_weight.numpy()
        other.codes, other.scale = problem.codes.numpy(), np.float32(problem.scale)
        q, s = problem.quantize(problem.normed, "int8")
        np.testing.assert_array_equal(q.numpy(), other.quantized[0])
        np.testing.assert_array_equal(problem.sums(q).numpy(), other.integer_answer)
        answer = problem.quantized_answer(problem.normed, "int8")
        np.testing.assert_allclose(answer.numpy(), other.bit_linear_answer, rtol=1e-6)
        assert s.shape == (7, 1)

    @pytest.mark.parametrize("activation", ["int8", "fp8_e4m3"])
    def test_bit_linear(self, activation: str) -> None:
        problem = GpuGemmProblem(24, 128, 7, "cpu")
        found = torch_op("BitLinear")(
            problem.x,
            pack(problem.codes),
            torch.full((24,), problem.scale),
            problem.norm_weight,
            activation=activation,
        )
        expected = problem.quantized_answer(problem.normed, activation)
        assert departure(found, expected) < 1e-2

    @pytest.mark.parametrize(
        "step",
        [Step(batch=2, num_heads=3, length=21), Step(batch=3, num_heads=2, length=1, past=9)],
        ids=["prefill", "decode"],
    )
    def test_latent_attention(self, step: Step) -> None:
        problem = LatentProblem(step, "cpu")
        width = step.num_heads * HEAD_DIM
        shape = problem.shape
        y, *_ = torch_op("FlashMLA")(
            problem.qkv[..., :width].contiguous(),
            problem.qkv[..., width:].contiguous(),
            problem.norm_weight,
            pack(problem.codes),
            problem.weight_scale,
            torch.full((step.batch,), step.past, dtype=torch.int32),
            torch.full((step.batch,), step.length, dtype=torch.int32),
            *(problem.latent, problem.scale, problem.rope),
            num_heads=step.num_heads,
            nope_dim=shape.nope_dim,
            rope_dim=shape.rope_dim,
            value_dim=shape.value_dim,
            softmax_scale=shape.softmax_scale,
        )
        assert departure(problem.pick(y), problem.answer()) < 2e-2

    @pytest.mark.parametrize("past", [0, 13])
    def test_ordinary_heads(self, past: int) -> None:
        step = Step(batch=2, num_heads=3, length=1 if past else 19, past=past)
        problem = MultiHeadProblem(step, "cpu")
        q, k, v = (t.double().transpose(1, 2) for t in (problem.q, problem.k, problem.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=not past).transpose(1, 2)
        assert departure(problem.pick(y), problem.answer()) < 1e-12

    def test_a_shared_latent(self) -> None:
        problem = SharedLatentProblem(Step(batch=2, num_heads=3, length=1, past=13), "cpu")
        q = torch.cat((problem.q, problem.q_latent), dim=3).double().transpose(1, 2)
        k = torch.cat((problem.k, problem.latent), dim=3).double().transpose(1, 2)
        v = problem.latent.double().transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k.expand(-1, 3, -1, -1), v.expand(-1, 3, -1, -1))
        assert departure(y[:, :, 0].flatten(1), problem.answer()) < 1e-12
        assert problem.q_latent.shape[-1] == RANK

    def test_a_prefill_is_checked_on_its_first_and_last_token(self) -> None:
        step = gpu_attention.PREFILL_STEPS[-1]
        assert (step.checked[0], step.checked[-1]) == (0, 8191) and len(step.checked) == 16

    def test_humming_packs_codes_plus_two(self) -> None:
        codes = torch.randint(-1, 2, (5, 48), dtype=torch.int8)
        words = pack_int2(codes).long() & 0xFFFFFFFF
        lanes = (words[..., None] >> torch.arange(0, 32, 2)) & 3
        assert torch.equal(lanes.flatten(1) - 2, codes.long())


class TestCheck:
    expected = torch.tensor([[1.0, -2.0], [3.0, 4.0]], dtype=torch.float64)

    def test_a_right_answer(self) -> None:
        contender = check("c", [lambda: self.expected.bfloat16()] * 2, self.expected, 1e-2)
        assert contender.error == 0.0 and len(contender.calls) == 2

    @pytest.mark.parametrize("factor", [1.5, float("nan")])
    def test_a_wrong_answer_of_the_last_copy(self, factor: float) -> None:
        calls: list[Callable[[], Tensor]] = [lambda: self.expected, lambda: self.expected * factor]
        with pytest.raises(NotRunError, match=r"wrong answer: departs by .*limit 0\.01"):
            check("c", calls, self.expected, 1e-2)

    def test_a_refusal(self) -> None:
        def refuse() -> Tensor:
            raise RuntimeError("only sm_90\nand a stack")

        with pytest.raises(NotRunError, match=r"refuses: only sm_90$"):
            check("c", [refuse], self.expected, 1e-2)


def test_the_floor_of_performance_md() -> None:
    """2-bit weights at 3.35 TB/s, and 1979 TOPS."""
    one, many = gpu_gemm.work(8192, 8192, 1), gpu_gemm.work(8192, 8192, 2048)
    assert round(1e6 * one.num_bytes / 3.35e12, 1) == 5.0
    assert round(1e6 * many.num_ops / 1979e12) == 139
    step = gpu_attention.DECODE_STEPS[-1]
    assert round(1e6 * gpu_attention.work(step).num_bytes / 3.35e12) == 25


def made(section: str, case: str, contender: str, value: float, work: Work | None) -> GpuRecord:
    record = GpuRecord(
        section=section,
        case=case,
        contender=contender,
        unit="us",
        spread=Spread.of([value, value * 1.1, value * 0.9]),
        error=1e-3,
    )
    if work is None:
        return record
    return dataclasses.replace(record, num_bytes=work.num_bytes, num_ops=work.num_ops)


@functools.cache
def a_run() -> tuple[GpuRecord, ...]:
    """A run in which ours does the least that there is to do, at 3 TB/s and 1000 TOPS."""

    def least(work: Work) -> float:  # a launch takes 1 us
        return max(1.0, 1e6 * work.num_bytes / 3e12, 1e6 * work.num_ops / 1e15)

    records = [
        made("roofline", "device copy", "torch", 3.0, None),
        made("roofline", "int8 GEMM", "torch", 1000.0, None),
        made("roofline", "bf16 GEMM", "torch", 1000.0, None),
    ]
    for n, k in gpu_gemm.SHAPES:
        for m in gpu_gemm.ROWS:
            work = gpu_gemm.work(n, k, m)
            for kind in gpu_gemm.CONTENDERS:
                factor = 1.0 if kind.name.startswith("ours") else 8.0
                case = gpu_gemm.case_name(n, k, m)
                records.append(made("gemm", case, kind.name, factor * least(work), work))
    for steps, contenders in (
        (gpu_attention.PREFILL_STEPS, PREFILL),
        (gpu_attention.DECODE_STEPS, DECODE),
    ):
        for step in steps:
            work = gpu_attention.work(step)
            for name in contenders:
                value = least(work) * (1.0 if name == OURS else 2.0)
                records.append(made("attention", gpu_attention.case_name(step), name, value, work))
    for name, factor in ((gpu_model.OURS, 1.0), (gpu_model.DENSE, 7.0)):
        for context in gpu_model.CONTEXTS:
            case = gpu_model.decode_case(1, context)
            records.append(made("model", case, name, 140.0 * factor, None))
        records.append(made("model", gpu_model.LAYERS, name, 60.0 * factor, None))
    return tuple(records)


def changed(case: str, contender: str, factor: float) -> list[GpuRecord]:
    """The run with one contender slower, or not run if ``factor`` is 0."""
    records = []
    for record in a_run():
        if (record.case, record.contender) == (case, contender):
            assert record.spread is not None
            spread = Spread.of([record.spread.median * factor]) if factor else None
            record = dataclasses.replace(record, spread=spread, not_run="" if factor else "broken")
        records.append(record)
    return records


def verdict_on(verdicts: list[Verdict], text: str) -> Verdict:
    (found,) = [verdict for verdict in verdicts if text in verdict.target]
    return found


class TestTargets:
    def test_a_run_at_the_roofline_meets_all(self) -> None:
        verdicts = judge(a_run())
        assert len(verdicts) == 14 + 7 + 5
        assert [verdict for verdict in verdicts if verdict.holds is not True] == []

    def test_eight_bits_have_the_roof_of_the_faster_library(self) -> None:
        faster = made("roofline", "fp8 GEMM", "torch", 4000.0, None)
        text = "M=2048, int8: 80% of the measured roofline"
        found = verdict_on(judge([*a_run(), faster]), text)
        assert found.holds is False and found.measured.startswith("25% ")

    def test_only_what_was_run_is_judged(self) -> None:
        gemm = [record for record in a_run() if record.section in ("roofline", "gemm")]
        assert len(judge(gemm)) == 14

    @pytest.mark.parametrize(
        ("case", "contender", "factor", "target", "outcome"),
        [
            ("8192x8192 M=1", "ours int8", 2.0, "8192x8192 M=1: <= 7.5 us", "1.49x away"),
            ("8192x8192 M=1", "torch bf16", 0.5, "6x as fast as torch bf16", "1.50x away"),
            ("1024x1024 M=16", "ours int8", 1.8, "M=16: <= 1.2x", "1.50x away"),
            ("1024x2816 M=64", "humming w2a8", 0.1, "M=64 and 256", "1.25x away"),
            ("4096x4096 M=2048", "ours fp8", 9.0, "M=2048, fp8: at or below", "1.12x away"),
            ("prefill B2 H16 S4096", "cuDNN", 0.25, "at or below cuDNN", "2.00x away"),
            ("decode B32 H16 S8192", OURS, 1.6, "<= 40 us", "1.13x away"),
            (gpu_model.decode_case(1, 2048), gpu_model.OURS, 3.0, "<= 300 us", "1.40x away"),
            (gpu_model.LAYERS, gpu_model.OURS, 2.0, "engine size", "1.71x away"),
        ],
    )
    def test_how_far(
        self, case: str, contender: str, factor: float, target: str, outcome: str
    ) -> None:
        found = verdict_on(judge(changed(case, contender, factor)), target)
        assert found.holds is False and found.outcome.endswith(outcome), found

    def test_a_rival_that_is_missing_is_named(self) -> None:
        verdicts = judge(changed("prefill B1 H16 S8192", "cuDNN", 0))
        found = verdict_on(verdicts, "at or below cuDNN")
        assert found.holds is None and found.outcome == "not measured: cuDNN: broken"

    def test_other_peers_judge_where_one_is_missing(self) -> None:
        found = verdict_on(judge(changed("8192x8192 M=1", "humming w2a8", 0)), "best peer")
        assert found.holds is True

    def test_no_roofline(self) -> None:
        verdicts = judge([record for record in a_run() if record.section != "roofline"])
        assert verdict_on(verdicts, "M=2048, int8: 80%").holds is None


class TestReport:
    def test_tables(self) -> None:
        records = changed("8192x8192 M=16", "torch bf16", 0)
        text = io.StringIO()
        show(Console(file=text, width=220), records, judge(records))
        shown = text.getvalue()
        for part in (
            "One GEMM, microseconds",
            "Attention, microseconds",
            "torch bf16 (gemm): broken",
            "Ours against the roofline",
            "100%",
            "stretch: 8192x8192 M=1: 80% of the measured roofline",
            "not run",
        ):
            assert part in shown, part

    def test_two_pictures(self, tmp_path: Path) -> None:
        written = draw(a_run(), MACHINE, tmp_path / "new" / "gpu.png")
        assert [path.name for path in written] == ["gpu.png", "gpu-roofline.png"]
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)

    def test_nothing_measured_draws_nothing(self, tmp_path: Path) -> None:
        assert draw([], MACHINE, tmp_path / "gpu.png") == []

    def test_an_earlier_run_is_read_again(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        path = tmp_path / "new" / "gpu.json"
        gpu.save(path, MACHINE, list(a_run()), 15)
        machine, records = gpu.load(path)
        assert machine == MACHINE and tuple(records) == a_run()
        run_main(monkeypatch, "--show", str(path), "--plot", str(tmp_path / "gpu.png"))
        assert "Targets" in capsys.readouterr().out and (tmp_path / "gpu-roofline.png").is_file()


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    gpu.main()


def test_a_machine_without_a_gpu_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TINYLM_NATIVE_DIR", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    command = [sys.executable, str(SCRIPT), "--section", "gemm"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2 and result.stdout == ""
    assert "an NVIDIA GPU that PyTorch can use (found none)" in result.stderr
    assert "libtinylm_cuda_test.so" in result.stderr and "native build --gpu" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--section", "model"], "needs --engine or --dense-engine"),
        (["--repeats", "0"], "--repeats must be at least 1, found 0"),
        (["--show", "missing.json"], "missing.json: expected a file that --out wrote"),
    ],
)
def test_bad_usage(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_main(monkeypatch, *arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err


NCU_OUTPUT = """==PROF== Connected to process 7 (python3)
"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","digamma_vectorized4_kernel","Speed Of Light","Duration","ns","1,500"
"1","void tinylm::cuda::quantize<(int)4, float>(Row<T2>)","Speed Of Light","Duration","ns","2,500"
"1","void tinylm::cuda::quantize<(int)4, float>(Row<T2>)","Launch","Registers Per Thread","","64"
"2","tinylm::cuda::product(int)","Speed Of Light","SM Frequency","Mhz","1,750"
"3","digamma_vectorized4_kernel","Speed Of Light","Duration","ns","1,500"
"4","tinylm::cuda::product(int)","Speed Of Light","Duration","ms","1.5"
"""


def test_counters_are_read_by_case() -> None:
    assert list(gpu_counters.read_cases(NCU_OUTPUT, ["first", "second"])) == [
        {
            "case": "first",
            "kernels": [
                {"kernel": "quantize<(int)4, float>", "us": 2.5, "registers": 64.0},
                {"kernel": "product", "SM GHz": 1.75},
            ],
        },
        {"case": "second", "kernels": [{"kernel": "product", "us": 1500.0}]},
    ]


def test_a_unit_that_is_not_known_leaves_its_counter_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = NCU_OUTPUT.replace('"Mhz"', '"furlongs"')
    first, _ = gpu_counters.read_cases(output, ["first", "second"])
    assert first["kernels"][1] == {"kernel": "product"}
    assert "SM GHz is left out: expected hz, mhz, ghz, found 'furlongs'" in capsys.readouterr().err


def test_a_case_that_ran_nothing_is_not_taken_for_another() -> None:
    with pytest.raises(ValueError, match="shorter"):
        list(gpu_counters.read_cases(NCU_OUTPUT, ["first", "second", "third"]))


def test_every_counted_case_has_a_name() -> None:
    names = gpu_counters.case_names()
    assert names[0] == gpu_gemm.case_name(*gpu_counters.GEMM_CASES[0])
    assert len(set(names)) == len(names)
