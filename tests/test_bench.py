from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import make_engine_directory, needs_gpu
from export_helpers import PLAIN, make_checkpoint, make_export
from native_helpers import LIBRARY, needs_library
from rich.console import Console

from tinylm import TinyLM
from tinylm.directory import SUMS_FILE, write_checksums
from tinylm.errors import CheckpointError, ConfigError, ExportError
from tinylm.latent_cache import LatentCache
from tinylm_export.bench import _count_same, check_answers, check_engines, run_bench
from tinylm_export.bench_report import BenchReport, BenchSettings, Spread, render
from tinylm_export.bench_worker import ORT_RUNTIMES, RUNTIMES
from tinylm_export.to_onnx import DATA_FILE, EXPORT_FILE, ONNX_FILE, export_onnx
from tinylm_export.trt_engine import ENGINE_FILE

SMALL = BenchSettings(batch_size=2, prompt_len=6, new_tokens=4, repeats=3, warmup=1, num_threads=1)


PARENT_BYTES = 1_200_000_000


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyLM, Path]:
    """An fp8 export of an int8 checkpoint: PyTorch has to follow it to give the same tokens."""
    folder = tmp_path_factory.mktemp("bench")
    model, checkpoint = make_checkpoint(folder)
    model.set_activation("fp8_e4m3")
    return model, export_onnx(checkpoint, folder / "onnx", activation="fp8_e4m3")


@pytest.fixture(scope="module")
def report(exported: tuple[TinyLM, Path]) -> BenchReport:
    held = torch.ones(PARENT_BYTES // 4)  # memory of this process, which no worker may count
    report = run_bench(exported[1], SMALL)
    assert held.numel()
    return report


def test_every_runtime_is_measured(report: BenchReport) -> None:
    if LIBRARY is None:
        expected = [name for name in RUNTIMES if name != "onnxruntime-bodies"]
        assert "build the library" in report.left_out["onnxruntime-bodies"]
    else:
        expected = list(RUNTIMES)
        assert not report.left_out
    assert [result.runtime for result in report.results] == expected
    for result in report.results:
        for spread in (
            result.prefill_ms,
            result.prefill_tokens_per_s,
            result.decode_ms_per_token,
            result.decode_tokens_per_s,
        ):
            assert 0 < spread.minimum <= spread.median <= spread.maximum
        assert result.load_seconds > 0


@needs_library
def test_native_kernels_and_function_bodies_stand_side_by_side(report: BenchReport) -> None:
    kernels = {result.runtime: result.kernels for result in report.results}
    assert kernels["onnxruntime"].startswith("tinylm 0.1.0 native, ")
    assert kernels["onnxruntime-bodies"] == "function bodies in standard ops"
    assert kernels["pytorch"] == "PyTorch"


def test_without_native_kernels_the_bodies_are_measured_once(
    exported: tuple[TinyLM, Path],
) -> None:
    report = run_bench(exported[1], SMALL, native=False)
    kernels = {result.runtime: result.kernels for result in report.results}
    assert kernels["onnxruntime"] == "function bodies in standard ops"
    assert "already" in report.left_out["onnxruntime-bodies"]


def test_speeds_are_tokens_over_time(report: BenchReport) -> None:
    for result in report.results:
        fastest = 2 * 6 / (result.prefill_ms.minimum / 1000)
        assert result.prefill_tokens_per_s.maximum == pytest.approx(fastest)
        # One step gives a token to each of the two rows.
        fastest = 2 / (result.decode_ms_per_token.minimum / 1000)
        assert result.decode_tokens_per_s.maximum == pytest.approx(fastest)


def test_sizes(report: BenchReport, exported: tuple[TinyLM, Path]) -> None:
    model, directory = exported
    cache = LatentCache(model.config, 2, 10).num_bytes()
    files = sum((directory / name).stat().st_size for name in (ONNX_FILE, DATA_FILE))
    weights = (directory.parent / "checkpoint" / "model.safetensors").stat().st_size
    for result in report.results:
        assert result.cache_bytes == cache
        assert result.file_bytes == (files if result.runtime in ORT_RUNTIMES else weights)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc")
def test_memory_is_the_workers_own(report: BenchReport) -> None:
    for result in report.results:
        assert result.rss_growth_bytes is not None and result.peak_rss_bytes is not None
        assert 0 < result.rss_growth_bytes < result.peak_rss_bytes < PARENT_BYTES
        assert result.rss_held_bytes is not None
        assert result.rss_held_bytes <= result.rss_growth_bytes


def test_tokens_are_the_models(report: BenchReport, exported: tuple[TinyLM, Path]) -> None:
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(512, (2, 6), generator=generator)
    tokens = exported[0].generate(prompt, max_new_tokens=5)[:, 6:]
    assert report.tokens == tokens.tolist()


def test_json_holds_everything(report: BenchReport) -> None:
    values = json.loads(json.dumps(report.to_dict()))
    assert values["settings"]["prompt_len"] == 6
    assert values["results"][0]["decode_ms_per_token"]["median"] > 0
    assert {"cpu", "usable_cores", "python", "versions"} <= set(values["machine"])
    assert {"torch", "onnxruntime"} <= set(values["machine"]["versions"])


def test_table_shows_what_was_measured(report: BenchReport) -> None:
    console = Console(width=140)
    with console.capture() as captured:
        console.print(render(report))
    text = captured.get()
    for result in report.results:
        assert result.runtime in text
        assert f"{result.decode_ms_per_token.median:.2f}" in text
    assert "batch 2, prompt 6, 4 new tokens" in text
    assert "all give the same greedy tokens" in text


def test_runtimes_that_disagree_are_not_compared(
    exported: tuple[TinyLM, Path], tmp_path: Path
) -> None:
    """An export of other weights that claims to be of this checkpoint."""
    _, other = make_export(tmp_path, seed=77)
    info = json.loads((exported[1] / EXPORT_FILE).read_text(encoding="utf-8"))
    info["checkpoint"] = str(exported[1].parent / "checkpoint")
    (other / EXPORT_FILE).write_text(json.dumps(info), encoding="utf-8")
    (other / SUMS_FILE).unlink()
    write_checksums(other)
    with pytest.raises(ExportError, match=r"answer differently.*pytorch gives \d+ .*onnxruntime"):
        run_bench(other, SMALL, runtimes=["pytorch", "onnxruntime"])


def answer(tokens: list[list[int]]) -> dict[str, Any]:
    return {"tokens": tokens, "margins": [[0.25] * len(row) for row in tokens]}


def test_the_first_difference_is_named() -> None:
    answers = {"a": answer([[1, 2], [3, 4]]), "b": answer([[1, 2], [3, 5]])}
    with pytest.raises(
        ExportError, match=r"row 1, new token 1: a gives 4 \(leads by 0.25\), b gives 5"
    ):
        check_answers(answers)
    check_answers({"a": answer([[1, 2]]), "b": answer([[1, 2]])})
    check_answers({"a": answer([[1, 2]])})


def test_a_checkpoint_that_is_gone_leaves_pytorch_out(
    exported: tuple[TinyLM, Path], tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(exported[1], tmp_path / "elsewhere" / "onnx"))
    report = run_bench(moved, SMALL)
    assert {result.runtime for result in report.results} <= set(ORT_RUNTIMES)
    assert {"pytorch", "pytorch-packed"} <= set(report.left_out)
    assert "give it with --checkpoint" in report.left_out["pytorch"]
    with pytest.raises(ExportError, match=r"runtime 'pytorch' is not there: .*--checkpoint"):
        run_bench(moved, SMALL, runtimes=["pytorch"])


def test_a_named_checkpoint_must_be_the_right_one(
    exported: tuple[TinyLM, Path], tmp_path: Path
) -> None:
    _, wrong = make_checkpoint(tmp_path, seed=5)
    with pytest.raises(ExportError, match=r"was exported from weights with SHA-256"):
        run_bench(exported[1], SMALL, checkpoint=wrong)
    with pytest.raises(CheckpointError, match="expected a checkpoint"):
        run_bench(exported[1], SMALL, checkpoint=tmp_path / "nowhere")


def test_altered_files_are_named_by_the_worker(
    exported: tuple[TinyLM, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(exported[1], tmp_path / "onnx"))
    (copy / DATA_FILE).write_bytes((copy / DATA_FILE).read_bytes()[:-1])
    with pytest.raises(ExportError, match=r"runtime 'onnxruntime': .*truncated or altered"):
        run_bench(copy, SMALL, runtimes=["onnxruntime"])


def test_engines_are_checked_before_anything_runs(
    exported: tuple[TinyLM, Path], tmp_path: Path
) -> None:
    engine = make_engine_directory(exported[1], tmp_path / "a" / "trt")
    assert check_engines([engine], exported[1]) == {"tensorrt:trt": engine}
    same = make_engine_directory(exported[1], tmp_path / "b" / "trt")
    with pytest.raises(ExportError, match=r"are both called tensorrt:trt\. Rename"):
        run_bench(exported[1], SMALL, engines=[engine, same])
    other = make_engine_directory(exported[1], tmp_path / "c", onnx_sha256="0" * 64)
    with pytest.raises(ExportError, match=r"another model\.onnx: expected SHA-256 0+, found"):
        run_bench(exported[1], SMALL, engines=[other])
    (engine / "config.json").write_text("{}")
    with pytest.raises(ExportError, match=r"runtime 'tensorrt:trt': .*(TensorRT|altered)"):
        run_bench(exported[1], SMALL, engines=[engine], runtimes=["onnxruntime"])


def test_an_engine_is_shown_with_its_size_and_tokens(report: BenchReport) -> None:
    first = report.results[0]
    engine = dataclasses.replace(
        first, runtime="tensorrt:trt", layer_bytes=1_230_000, same_tokens=first.same_tokens - 3
    )
    console = Console(width=140)
    with console.capture() as captured:
        console.print(render(dataclasses.replace(report, results=(first, engine))))
    text = captured.get()
    assert "1.23 MB" in text and "7 of 10" in text and "10 of 10" in text
    assert "all give the same" not in text


def test_tokens_count_up_to_the_first_difference_of_each_row() -> None:
    expected = [[1, 9], [2, 8], [3, 7]]  # [steps][batch]
    assert _count_same(expected, expected) == 6
    assert _count_same(expected, [[1, 9], [0, 8], [3, 7]]) == 4
    assert _count_same(expected, [[0, 0], [2, 8], [3, 7]]) == 0


@pytest.mark.gpu
@needs_gpu
def test_engines_are_measured(exported: tuple[TinyLM, Path], tmp_path: Path) -> None:
    from tinylm_export.to_engine import build_engine

    engines = [tmp_path / "plugins", tmp_path / "dense"]
    for engine in engines:
        build_engine(exported[1], engine, max_batch_size=2, dense=engine.name == "dense")
    report = run_bench(exported[1], SMALL, engines=engines, runtimes=["pytorch"])
    assert [r.runtime for r in report.results] == ["pytorch", "tensorrt:plugins", "tensorrt:dense"]
    for result, engine in zip(report.results[1:], engines, strict=True):
        assert result.file_bytes == (engine / ENGINE_FILE).stat().st_size
        assert result.decode_tokens_per_s.median > 0 and result.same_tokens >= 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, found 0"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"num_threads": 0}, "num_threads must be at least 1"),
        ({"warmup": -1}, "warmup must be 0 or more"),
    ],
)
def test_bad_settings(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BenchSettings(**changes)


def test_bad_arguments(exported: tuple[TinyLM, Path], tmp_path: Path) -> None:
    too_long = BenchSettings(prompt_len=60, new_tokens=5)
    with pytest.raises(ConfigError, match=r"need a context of 65, the model has 64"):
        run_bench(exported[1], too_long)
    with pytest.raises(ExportError, match=r"one of pytorch, .* found 'tflite'"):
        run_bench(exported[1], SMALL, runtimes=["tflite"])
    _, plain = make_export(tmp_path, task=PLAIN)
    with pytest.raises(ExportError, match=r"no decode step to time\. Export with --task"):
        run_bench(plain, SMALL)


def test_spread() -> None:
    spread = Spread.of([5.0, 1.0, 2.0, 9.0])
    assert (spread.median, spread.minimum, spread.maximum) == (3.5, 1.0, 9.0)
    assert f"{spread:.1f}" == "3.5\n1.0 .. 9.0"
