from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from model_helpers import make_model
from native_helpers import needs_library

from tinylm.checkpoint import save_model
from tinylm.directory import write_checksums
from tinylm.errors import CheckpointError, DataError, ExportError
from tinylm_export.logit_meter import LogitMeter, top1_error
from tinylm_export.op_probe import _step_index
from tinylm_export.parity import run_parity
from tinylm_export.parity_batch import make_batch
from tinylm_export.parity_render import plot, render
from tinylm_export.parity_report import BitLinearAgreement, ParityReport
from tinylm_export.to_onnx import export_onnx
from tinylm_export.tolerances import TOLERANCES

NUM_TOKENS = 300
KERNELS = [
    pytest.param(False, id="bodies"),
    pytest.param(True, id="native", marks=needs_library),
]


def held_out() -> torch.Tensor:
    return torch.randint(0, 512, (600,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("parity") / "checkpoint", make_model(seed=1))


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> Path:
    return export_onnx(checkpoint, checkpoint.parent / "onnx")


@pytest.fixture(scope="module", params=KERNELS)
def native(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(scope="module")
def report(exported: Path, native: bool) -> ParityReport:
    return run_parity(exported, held_out(), num_tokens=NUM_TOKENS, length=48, native=native)


def altered(exported: Path, directory: Path, name: str, change: object) -> Path:
    """Copy an export with one initializer changed and its checksums made anew."""
    shutil.copytree(exported, directory)
    shutil.copytree(exported.parent / "checkpoint", directory.parent / "checkpoint")
    model = ir.load(exported / "model.onnx")
    value = model.graph.initializers[name]
    assert value.const_value is not None
    value.const_value = ir.tensor(change(value.const_value.numpy().copy()))  # type: ignore[operator]
    ir.save(model, directory / "model.onnx", external_data="model.onnx_data")
    write_checksums(directory)
    return directory


def test_onnx_runtime_says_what_pytorch_says(report: ParityReport) -> None:
    assert report.passed
    (runtime,) = report.runtimes
    prefill, decode = runtime.logits
    assert prefill.phase == "prefill" and prefill.num_tokens >= NUM_TOKENS
    assert decode.phase == "decode" and decode.num_tokens > NUM_TOKENS / 2
    assert prefill.max_abs < 1e-5 and decode.max_abs < 1e-5
    assert prefill.max_abs > 0, "two different programs agree in every bit of the logits?"
    assert runtime.first_departure is None


def test_the_report_says_which_kernels_ran(report: ParityReport, native: bool) -> None:
    (runtime,) = report.runtimes
    if not native:
        assert runtime.kernels == "function bodies in standard ops"
        return
    assert re.fullmatch(
        r"tinylm 0\.1\.0 native, [a-z0-9-]+: [0-9,]+ BitLinear, [0-9,]+ FlashMLA, [0-9,]+ SwiGLU "
        r"calls counted by the library",
        runtime.kernels,
    )


def test_every_bit_linear_is_compared_and_exact(report: ParityReport) -> None:
    (runtime,) = report.runtimes
    names = [layer.name for layer in runtime.bit_linears]
    assert len(names) == len(set(names)) == 2 * 7
    for layer in runtime.bit_linears:
        assert layer.num_activations > 0 and layer.num_accumulators > 0
        assert layer.mismatches == 0 and layer.passed


def test_inner_values_are_equal_bit_for_bit(report: ParityReport) -> None:
    # The claim of tinylm/precision.py; the final norm has no quantiser behind it.
    (runtime,) = report.runtimes
    different = {layer.node for layer in runtime.layers if layer.num_different}
    assert different <= {"norm"}
    assert len(runtime.layers) == 2 + 2 * 10


@pytest.mark.parametrize("task", ["text-generation-with-past", "text-generation"])
def test_fp8_and_both_tasks(checkpoint: Path, tmp_path: Path, task: str, native: bool) -> None:
    directory = export_onnx(checkpoint, tmp_path / "onnx", task=task, activation="fp8_e4m3")
    report = run_parity(directory, held_out(), num_tokens=100, length=32, native=native)
    assert report.passed
    assert report.model["activation"] == "fp8_e4m3"
    phases = [agreement.phase for agreement in report.runtimes[0].logits]
    assert phases == (["prefill", "decode"] if task.endswith("past") else ["prefill"])


def test_an_export_with_all_logits_decodes_too(checkpoint: Path, tmp_path: Path) -> None:
    directory = export_onnx(checkpoint, tmp_path / "onnx", all_logits=True)
    assert run_parity(directory, held_out(), num_tokens=100, length=32).passed


def test_one_wrong_code_is_found_and_named(exported: Path, tmp_path: Path, native: bool) -> None:
    def flip(weight: np.ndarray) -> np.ndarray:
        code = weight[3, 2] & 3
        weight[3, 2] = (weight[3, 2] & ~np.uint8(3)) | (2 if code != 2 else 0)
        return weight

    name = "layers.1.mlp.up_proj"
    directory = altered(exported, tmp_path / "onnx", f"{name}.weight", flip)
    report = run_parity(directory, held_out(), num_tokens=100, length=32, native=native)
    assert not report.passed
    (runtime,) = report.runtimes
    assert runtime.first_departure == name
    assert [layer.name for layer in runtime.bit_linears if not layer.passed] == [name]


def test_a_wrong_norm_weight_shows_as_flipped_activations(
    exported: Path, tmp_path: Path, native: bool
) -> None:
    def scale(weight: np.ndarray) -> np.ndarray:
        weight[5] *= 1.02
        return weight

    name = "layers.0.self_attn.attn_sub_norm.weight"
    directory = altered(exported, tmp_path / "onnx", name, scale)
    report = run_parity(directory, held_out(), num_tokens=100, length=32, native=native)
    assert not report.passed
    failed = [layer for layer in report.runtimes[0].bit_linears if not layer.passed]
    assert [layer.name for layer in failed] == ["layers.0.self_attn.o_proj"]
    assert "channel 5" in failed[0].examples[0]


def test_ordinary_arithmetic_is_the_yardstick(report: ParityReport) -> None:
    assert report.yardstick.mean_abs > report.runtimes[0].logits[0].mean_abs


def test_report_goes_to_json_table_and_picture(report: ParityReport, tmp_path: Path) -> None:
    values = json.loads(json.dumps(report.to_dict()))
    assert values["passed"] is True
    assert {t["name"] for t in values["tolerances"]} == set(TOLERANCES)
    assert values["runtimes"][0]["first_departure"] is None
    from rich.console import Console

    console = Console(record=True, width=160)
    console.print(render(report))
    text = console.export_text()
    assert "yardstick" in text and "2 x kv_b_proj" in text and "FAILED" not in text
    plot(report, tmp_path / "deep" / "parity.png")
    assert (tmp_path / "deep" / "parity.png").read_bytes().startswith(b"\x89PNG")


def test_another_checkpoint_is_refused(exported: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", make_model(seed=2))
    with pytest.raises(ExportError, match="was exported from weights with SHA-256"):
        run_parity(exported, held_out(), checkpoint=other, num_tokens=100)


def test_a_moved_checkpoint_is_asked_for(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "elsewhere" / "onnx")
    with pytest.raises(CheckpointError, match="give it with --checkpoint"):
        run_parity(tmp_path / "elsewhere" / "onnx", held_out(), num_tokens=100)


def test_too_few_tokens(exported: Path) -> None:
    with pytest.raises(DataError, match="needs 1000 held-out tokens, found 600"):
        run_parity(exported, held_out(), num_tokens=1000)


def test_rows_are_ragged_and_cover_the_tokens_in_order() -> None:
    tokens = torch.arange(5000)
    batch = make_batch(tokens, 64, 2000)
    assert int(batch.seq_lens.sum()) >= 2000
    assert len(set(batch.seq_lens.tolist())) > 4 and len(set(batch.prompt_lens.tolist())) > 2
    rows = zip(batch.input_ids, batch.seq_lens, strict=True)
    flat = torch.cat([row[:count] for row, count in rows])
    assert torch.equal(flat, tokens[: len(flat)])
    assert bool((batch.prompt_lens < batch.seq_lens).all()) and bool((batch.prompt_lens > 0).all())


def test_logit_meter_against_formulas() -> None:
    rng = np.random.default_rng(0)
    p, q = rng.normal(size=(5, 7)), rng.normal(size=(5, 7))
    meter = LogitMeter("prefill")
    meter.add(torch.from_numpy(p[:2]), torch.from_numpy(q[:2]))
    meter.add(torch.from_numpy(p[2:]), torch.from_numpy(q[2:]))
    result = meter.result()
    probability = [np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (p, q)]
    kl = (probability[0] * np.log(probability[0] / probability[1])).sum(axis=1)
    assert result.mean_kl == pytest.approx(kl.mean())
    assert result.max_kl == pytest.approx(kl.max())
    assert result.max_abs == pytest.approx(np.abs(p - q).max())
    assert result.mean_abs == pytest.approx(np.abs(p - q).mean())
    assert result.top1_agreement == np.mean(p.argmax(axis=1) == q.argmax(axis=1))


def test_the_error_of_a_difference_in_top1_agreement() -> None:
    # Positions where only one of them agrees: two of five. With no such position there is none.
    reference = torch.eye(5)
    meter, other = LogitMeter("decode"), LogitMeter("decode")
    for rows in (slice(0, 2), slice(2, 5)):
        meter.add(reference[rows], reference[[1, 0, 2, 3, 4]][rows])
        other.add(reference[rows], reference[[1, 2, 2, 4, 3]][rows])
    assert top1_error(meter, other) == pytest.approx(math.sqrt(2) / 5)
    assert top1_error(meter, meter) == 0.0


@pytest.mark.parametrize("nan_first", [True, False])
def test_a_nan_logit_never_passes(nan_first: bool) -> None:
    good, bad = torch.zeros(1, 4), torch.tensor([[0.0, math.nan, 0.0, 0.0]])
    meter = LogitMeter("decode")
    for found in (bad, good) if nan_first else (good, bad):
        meter.add(torch.zeros(1, 4), found)
    assert not meter.result().passed


def test_bit_linear_limits() -> None:
    def agreement(**changes: int) -> BitLinearAgreement:
        values = {
            "num_activations": 100_000,
            "flips": 10,
            "max_steps": 1,
            "num_accumulators": 1000,
            "mismatches": 0,
        }
        return BitLinearAgreement(name="x", examples=[], **(values | changes))

    assert agreement().passed
    assert not agreement(flips=11).passed
    assert not agreement(max_steps=2).passed
    assert not agreement(mismatches=1).passed


def test_fp8_steps_are_numbered_in_order() -> None:
    bits = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    values = bits.view(torch.float8_e4m3fn).float()
    finite = values[~values.isnan()].unique()  # sorted; -0 and +0 are one value
    index = _step_index(finite, "fp8_e4m3")
    assert torch.equal(index, torch.arange(-126, 127, dtype=index.dtype))
