"""The benchmark of a training step, at a size for a CPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "train_step", ROOT / "benchmarks" / "train_step.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_step"] = module
    spec.loader.exec_module(module)
    return module


SMALL = [
    *("--preset", "tinylm-test", "--batch-size", "2", "--seq-len", "16", "--device", "cpu"),
    *("--variant", "eager", "--repeats", "2", "--steps", "1", "--warmup", "1"),
]


def test_it_writes_what_it_prints(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, profile = tmp_path / "step.json", tmp_path / "profile"
    benchmark.main([*SMALL, "--peak-tflops", "0.5", "--out", str(out), "--profile", str(profile)])
    results = json.loads(out.read_text())
    assert [(r["variant"], r["model"]) for r in results["records"]] == [
        ("eager", "ternary"),
        ("eager", "dense"),
    ]
    for record in results["records"]:
        assert record["loss_error"] < 1e-5 and record["loss"] > 1.0
        ms = record["milliseconds"]
        assert 0.0 < ms["minimum"] <= ms["median"] <= ms["maximum"]
        assert record["tokens_per_second"] == pytest.approx(2 * 16 / ms["median"] * 1e3)
        assert 0.0 < record["mfu_causal"] < record["mfu"]
    medians = [r["milliseconds"]["median"] for r in results["records"]]
    verdict = results["targets"]["eager"]
    assert verdict["ratio"] == pytest.approx(medians[0] / medians[1])
    assert verdict["ratio_met"] == (verdict["ratio"] <= 1.25)
    text = capsys.readouterr().out
    assert "ternary" in text and "target 40%" in text
    assert "aten::" in (profile / "eager-dense.txt").read_text()


def test_a_wrong_loss_is_not_timed(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    step = benchmark.Contender.step
    monkeypatch.setattr(benchmark.Contender, "step", lambda self: step(self) * torch.tensor(1.1))
    with pytest.raises(SystemExit, match="Nothing was timed"):
        benchmark.main(SMALL)
