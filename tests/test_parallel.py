"""Several processes train as one does: losses, weights, checkpoints, and going on from them."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from distributed_helpers import (
    DEADLINE_SECONDS,
    arguments,
    group_of_one,
    join_all,
    run_processes,
    start_processes,
)
from safetensors.torch import load_file
from tolerances import (
    BFLOAT16_RUN,
    SAME_NORMS,
    SAME_SUMS,
    SHORT_RUN,
    SHORT_RUN_NORMS,
    SHORT_RUN_WEIGHTS,
)
from training_helpers import losses, records

from tinylm import TinyLM, preset
from tinylm.checkpoint import load_model
from tinylm.cli import main
from tinylm.consolidate import consolidate
from tinylm.distributed import World, is_sharded
from tinylm.errors import CheckpointError
from tinylm.parallel import layer_groups, parallelize
from tinylm.training_config import DEFAULT_GATHER_MB, ParallelConfig

Runs = Callable[..., Path]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Give finished runs by mode and number of processes; each is made once."""
    folder = tmp_path_factory.mktemp("runs")

    def get(mode: str, num: int, *, dense: bool = False) -> Path:
        out = folder / f"{mode}-{num}{'-dense' if dense else ''}"
        if not out.exists():
            further = ["--parallel", mode, *(["--replicas", "2"] if mode == "hsdp" else [])]
            further += ["--dense"] if dense else []
            run_processes(num, arguments(out, *further), folder / f"logs-{out.name}")
        return out

    return get


def assert_same_run(actual: Path, expected: Path, *, dense: bool = False) -> None:
    """Compare what two runs logged: close at first, and as close as flips allow later.

    A dense model has no codes that could flip, so all of its steps are close.
    """
    for kind, fields in (("train", ("loss", "grad_norm")), ("eval", ("loss", "bits_per_byte"))):
        ours, theirs = records(actual, kind), records(expected, kind)
        assert [r["step"] for r in ours] == [r["step"] for r in theirs]
        for field in fields:
            got = torch.tensor([r[field] for r in ours])
            want = torch.tensor([r[field] for r in theirs])
            if field == "grad_norm":
                (SAME_NORMS if dense else SHORT_RUN_NORMS).assert_close(got, want)
                continue
            if kind == "train":
                SAME_SUMS.assert_close(got[:2], want[:2])
            (SAME_SUMS if dense else SHORT_RUN).assert_close(got, want)
    same = ("tokens", "lr", "rejected_steps")
    assert [[r[f] for f in same] for r in records(actual, "train")] == [
        [r[f] for f in same] for r in records(expected, "train")
    ]
    if not dense:
        flips = [
            torch.tensor([r["flip_rate"] for r in records(o, "train")]) for o in (actual, expected)
        ]
        torch.testing.assert_close(flips[0], flips[1], rtol=0.0, atol=1e-3)


CASES = [("ddp", 2), ("ddp", 4), ("fsdp", 1), ("fsdp", 2), ("fsdp", 4), ("hsdp", 4)]


@pytest.mark.parametrize(("mode", "num"), CASES)
def test_any_number_of_processes_trains_alike(finished: Runs, mode: str, num: int) -> None:
    single, several = finished("ddp", 1), finished(mode, num)
    assert_same_run(several, single)
    assert len(records(several, "run")) == 1  # one process writes
    texts = [r["text"] for r in records(several, "sample")]
    assert texts[0] == records(single, "sample")[0]["text"]


@pytest.mark.parametrize(("mode", "num"), CASES)
def test_without_codes_every_step_is_the_same(finished: Runs, mode: str, num: int) -> None:
    single, several = (finished(*of, dense=True) for of in (("ddp", 1), (mode, num)))
    assert_same_run(several, single, dense=True)


MODES = [
    ("ddp",),
    ("fsdp",),
    ("fsdp", "--no-reshard-after-forward"),
    ("fsdp", "--gather-mb", "0"),
    ("fsdp", "--activation-checkpointing"),
]


@pytest.mark.parametrize("mode", MODES, ids=" ".join)
def test_parts_of_a_share_add_up_to_the_same_step(
    finished: Runs, tmp_path: Path, mode: tuple[str, ...]
) -> None:
    further = ("--parallel", *mode, "--micro-batch-size", "1", "--dense")
    run_processes(2, arguments(tmp_path / "run", *further), tmp_path / "logs")
    assert_same_run(tmp_path / "run", finished("ddp", 1, dense=True), dense=True)


def test_layers_are_gathered_together_up_to_a_size() -> None:
    with torch.device("meta"):
        model = TinyLM.from_config(preset("tinylm-300m"))  # 45.8 MB a layer

    def sizes(megabytes: int) -> list[int]:
        return [len(group) for group in layer_groups(model, megabytes)]

    assert sizes(0) == sizes(45) == [1] * 24
    assert sizes(46) == [2] * 12
    assert sizes(DEFAULT_GATHER_MB) == [4] * 6
    assert sizes(200) == [5, 5, 5, 5, 4]
    assert sizes(10_000) == [24]


@pytest.mark.parametrize("gather_mb", [0, None])
@pytest.mark.parametrize("reshard", [True, False])
def test_a_layers_weights_are_dropped_after_its_forward_pass_or_kept(
    reshard: bool, gather_mb: int | None
) -> None:
    model = TinyLM.from_config(preset("tinylm-test"))
    settings = ParallelConfig(mode="fsdp", reshard_after_forward=reshard, gather_mb=gather_mb)
    with group_of_one():
        parallelize(model, settings, World())
        loss = model(torch.zeros(1, 4, dtype=torch.int64)).sum()
        weights = [layer.mlp.down_proj.weight for layer in model.layers]
        assert [is_sharded(weight) for weight in weights] == [reshard] * len(weights)
        loss.backward()
        weights = [layer.mlp.down_proj.weight for layer in model.layers]
        assert all(is_sharded(weight) for weight in weights)


@pytest.mark.parametrize(("mode", "num"), [("fsdp", 2), ("hsdp", 4)])
def test_consolidated_shards_are_the_single_processs_checkpoint(
    finished: Runs, tmp_path: Path, mode: str, num: int
) -> None:
    # Dense, because a flipped code moves weights elsewhere: the files say nothing of it.
    run, single = finished(mode, num, dense=True), finished("ddp", 1, dense=True)
    assert not list(run.rglob("model.safetensors"))
    with pytest.raises(SystemExit) as done:
        main(["consolidate", str(run), str(tmp_path / "out")])
    assert done.value.code == 0
    ours = load_file(tmp_path / "out/model.safetensors")
    theirs = load_file(single / "best/model.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {
        n: (t.shape, t.dtype) for n, t in theirs.items()
    }
    for name, tensor in ours.items():
        SHORT_RUN_WEIGHTS.assert_close(tensor, theirs[name])
        assert (tensor - theirs[name]).abs().median() < 1e-6, name
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {p.name for p in (single / "best").iterdir()} - {"training_state"}
    assert load_model(tmp_path / "out")(torch.tensor([[1, 2, 3]])).shape == (1, 3, 512)


def test_consolidating_one_file_copies_it(finished: Runs, tmp_path: Path) -> None:
    best = finished("ddp", 1) / "best"
    consolidate(best, tmp_path / "out")
    one, other = (d / "model.safetensors" for d in (tmp_path / "out", best))
    assert one.read_bytes() == other.read_bytes()
    with pytest.raises(ValueError, match="expected another directory"):
        consolidate(tmp_path / "out", tmp_path / "out")


def test_other_commands_name_the_way_to_one_file(
    finished: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["generate", str(finished("fsdp", 2)), "--prompt", "a"])
    assert refused.value.code == 2
    message = capsys.readouterr().err
    assert "found a sharded checkpoint" in message and "tinylm consolidate" in message


def stop_at(out: Path, num: int, command: list[str], logs: Path, step: int) -> list[int | None]:
    """Start a run, send SIGTERM to its last process only, after a step; return the exit codes."""
    processes = start_processes(num, command, logs)
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (out / "metrics.jsonl").is_file() or not any(s >= step for s, _ in losses(out)):
        assert all(p.is_alive() for p in processes), (logs / "0.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(processes[-1].pid, signal.SIGTERM)
    return join_all(processes)


# Who writes, and who goes on: sharded and whole, more and fewer processes.
CHANGES = [
    (("fsdp", 4), ("fsdp", 2), ("ddp", 1)),
    (("ddp", 1), ("fsdp", 2), ("ddp", 2)),
]


@pytest.mark.parametrize("chain", CHANGES)
def test_stopped_run_goes_on_with_other_processes(
    finished: Runs, tmp_path: Path, chain: tuple[tuple[str, int], ...]
) -> None:
    out, steps = tmp_path / "run", []
    for i, (mode, num) in enumerate(chain):
        command = arguments(out, "--parallel", mode, *(["--resume"] if i else []))
        if i + 1 == len(chain):
            said = run_processes(num, command, tmp_path / f"logs-{i}")
            assert f"Going on from {out}/checkpoints/step-{steps[-1]:08d}" in said[0]
            note = f"Note: saved by {chain[i - 1][1]} processes"
            assert (note in said[0]) == (chain[i - 1][1] != num)
            assert all("step" not in text for text in said[1:])  # only the first one talks
        else:
            # One process hears the signal, and all of them save and end well.
            # They do so in the step in which they next talk: one after the next at the latest.
            begin = steps[-1] + 1 if steps else 1
            codes = stop_at(out, num, command, tmp_path / f"logs-{i}", begin)
            assert codes == [0] * num
            steps.append(losses(out)[-1][0])
            assert (out / "last").resolve().name == f"step-{steps[-1]:08d}"
    assert steps == sorted(steps) and steps[-1] < 8
    assert_same_run(out, finished("ddp", 1))


def test_killed_run_goes_on_bit_for_bit_with_as_many_processes(
    finished: Runs, tmp_path: Path
) -> None:
    dropout = ("--parallel", "fsdp", "--dropout", "0.2", "--eval-every", "100")
    whole, out = tmp_path / "whole", tmp_path / "run"
    run_processes(2, arguments(whole, *dropout), tmp_path / "logs")
    processes = start_processes(2, arguments(out, *dropout), tmp_path / "logs-killed")
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (out / "last").exists():
        assert time.monotonic() < deadline and all(p.is_alive() for p in processes)
        time.sleep(0.002)
    for process in processes:
        process.kill()
    assert join_all(processes) == [-signal.SIGKILL] * 2
    assert losses(out)[-1][0] < 8
    # What a save leaves behind that was cut off: said, and not taken.
    half = out / "checkpoints/.tmp-step-00000007"
    (half / "shards").mkdir(parents=True, exist_ok=True)
    (half / "shards/shard-00000-of-00002.safetensors").write_bytes(b"half")
    said = run_processes(2, arguments(out, *dropout, "--resume"), tmp_path / "logs-resumed")
    assert f"Ignored {half}: it was not written to the end." in said[0] and not half.exists()
    # Every process has its own dropout again: == compares bits.
    assert losses(out) == losses(whole)
    rng = load_file(out / "last/training_state/rng.safetensors")
    assert set(rng) == {"process0.cpu", "process1.cpu"}
    assert not torch.equal(rng["process0.cpu"], rng["process1.cpu"])


@pytest.fixture
def sharded(finished: Runs, tmp_path: Path) -> Path:
    """A copy of a sharded run, to be damaged."""
    out = tmp_path / "run"
    shutil.copytree(finished("fsdp", 2), out, symlinks=True)
    return out


def test_missing_or_altered_shard_is_refused_by_name(sharded: Path, tmp_path: Path) -> None:
    shard = sharded / "checkpoints/step-00000008/shards/shard-00001-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"shard-00001-of-00002.*truncated or altered"):
        consolidate(sharded / "last", tmp_path / "out")
    processes = start_processes(
        2, arguments(sharded, "--parallel", "fsdp", "--resume"), tmp_path / "logs"
    )
    assert join_all(processes) == [2, 2]  # both, and neither waits for the other
    said = [(tmp_path / f"logs/{rank}.log").read_text() for rank in range(2)]
    assert all("shard-00001-of-00002.safetensors: truncated or altered" in s for s in said)
    assert "Other checkpoints:" in said[0] and "step-00000004" in said[0]
    assert "Traceback" not in said[0]
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"shard-00001-of-00002.*expected a file, found none"):
        consolidate(sharded / "last", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_checkpoint_without_digests_was_never_finished(sharded: Path, tmp_path: Path) -> None:
    last = sharded / "checkpoints/step-00000008"
    (last / "SHA256SUMS").unlink()
    command = arguments(sharded, "--parallel", "fsdp", "--resume")
    said = run_processes(1, command, tmp_path / "logs")
    assert f"Ignored {last}: it was not written to the end." in said[0]
    assert "step-00000004, step 4" in said[0]
    assert json.loads((last / "training_state/state.json").read_text())["num_processes"] == 1


def test_full_disk_ends_all_processes_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "run"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    processes = start_processes(2, arguments(out, "--parallel", "fsdp"), tmp_path / "logs")
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (out / "last").exists():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    resource.prlimit(processes[1].pid, resource.RLIMIT_FSIZE, (50_000, limits[1]))
    codes = join_all(processes)
    if codes == [0, 0]:
        pytest.skip("the run was over before its disk was full")
    said = (tmp_path / "logs/0.log").read_text()
    assert codes == [2, 2], said
    assert "step-00000008: can't be written" in said and "process 1" in said
    assert (out / "last").resolve().name == "step-00000004"
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000004"]


def test_bfloat16_sharded_trains_as_one_process_does(tmp_path: Path) -> None:
    half = ("--precision", "bf16", "--max-steps", "6", "--eval-every", "100", "--save-every", "100")
    run_processes(1, arguments(tmp_path / "one", *half), tmp_path / "logs-one")
    sharded = arguments(tmp_path / "run", "--parallel", "fsdp", *half)
    run_processes(2, sharded, tmp_path / "logs")
    got, want = (
        torch.tensor([loss for _, loss in losses(tmp_path / name)]) for name in ("run", "one")
    )
    # Both quantise float32 masters, so the first step differs by sums over rows only.
    SAME_SUMS.assert_close(got[:1], want[:1])
    BFLOAT16_RUN.assert_close(got, want)
    # Masters and moments stay float32.
    index = json.loads((tmp_path / "run/last/shards/index.json").read_text())
    assert {about["dtype"] for about in index["tensors"].values()} == {"float32"}
