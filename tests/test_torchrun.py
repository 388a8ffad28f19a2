"""torchrun itself: restarts after a killed process, and the scaling benchmark on top of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed_helpers import DEADLINE_SECONDS, arguments
from training_helpers import losses, records

ROOT = Path(__file__).resolve().parent.parent


def children(pid: int) -> list[int]:
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="NOT TESTED: needs Linux's /proc")
def test_torchrun_restarts_from_the_last_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "run"
    # Steps enough that the kill comes long before the end.
    further = ("--max-steps", "150", "--save-every", "25", "--eval-every", "1000", "--resume")
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--nproc-per-node", "2", "--max-restarts", "1", "-m", "tinylm.cli"),
                *arguments(out, "--parallel", "ddp", *further),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            deadline = time.monotonic() + DEADLINE_SECONDS
            while not (out / "last").exists():
                assert launcher.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.01)
            os.kill(children(launcher.pid)[-1], signal.SIGKILL)
            launcher.wait(DEADLINE_SECONDS)
        finally:
            launcher.kill()
    said = (tmp_path / "log").read_text()
    assert launcher.returncode == 0, said
    assert "No checkpoint yet: the run starts from the beginning." in said
    assert said.count(f"Going on from {out}/checkpoints/step-") == 1
    assert "Training done at step 150 of 150." in said
    assert [step for step, _ in losses(out)] == list(range(1, 151))
    assert len(records(out, "run")) == 1


@pytest.mark.slow
def test_scaling_benchmark_measures_both_engines(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "benchmarks/train_scaling.py"), "--processes", "2"),
            *("--modes", "fsdp-no-reshard", "--part", "speed"),
            *("--device", "cpu", "--preset", "tinylm-test"),
            *("--seq-len", "32", "--batch-per-process", "2", "--steps", "4", "--log-every", "2"),
            *("--inputs", str(tmp_path / "inputs"), "--work", str(tmp_path / "runs")),
            *("--out", str(tmp_path / "scaling.json"), "--", "--vocab-size", "2048"),
        ],
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "scaling.json").read_text())["speed"]
    assert [(r["mode"], r["processes"]) for r in results] == [("ddp", 1), ("fsdp-no-reshard", 2)]
    single, several = (r["tokens_per_second"] for r in results)
    assert single > 0 and results[0]["efficiency"] == 1.0
    assert results[1]["efficiency"] == pytest.approx(several / (2 * single))
    assert f"| fsdp-no-reshard | 2 | {several:,.0f} |" in done.stdout
    assert not (tmp_path / "runs").exists()
