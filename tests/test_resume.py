import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from training_helpers import (
    config,
    inputs,
    losses,
    records,
    start_process,
    stop_after,
    trainer,
    write_jsonl,
)

from tinylm.cli import main
from tinylm.errors import CheckpointError, ConfigError, TokenizerError
from tinylm.tokenizer import train_tokenizer
from tinylm.trainer import Trainer
from tinylm.training_state import load_saved_config
from tinylm.validation import Validation

STEPS = 40
DEADLINE_SECONDS = 120.0


def arguments(out: Path) -> list[str]:
    """A run in which everything random matters: dropout, shuffling, unequal documents."""
    data = inputs()
    return [
        *("train", "--preset", "tinylm-test", "--tokenizer", str(data.tokenizer)),
        *("--train-file", str(data.train), "--val-file", str(data.val), "--out", str(out)),
        *("--max-steps", str(STEPS), "--batch-size", "4", "--grad-accum-steps", "2"),
        *("--lr", "3e-3", "--warmup-steps", "3", "--max-seq-len", "32", "--dropout", "0.1"),
        *("--no-packing", "--save-every", "3", "--eval-every", "10", "--log-every", "1"),
        *("--eval-max-tokens", "300", "--sample-tokens", "4", "--no-tensorboard"),
        # One thread: on a busy machine, tiny steps on several wait for each other most of the time.
        *("--device", "cpu", "--num-threads", "1"),
    ]


def wait_for_step(out: Path, step: int, process: Any) -> None:
    """Wait until a run has logged a step."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        lines = []
        if (out / "metrics.jsonl").is_file():
            lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        if any(f'"kind": "train", "step": {step},' in line for line in lines):
            return
        assert process.is_alive(), f"the run ended with {process.exitcode} before step {step}"
        time.sleep(0.002)
    raise AssertionError(f"no step {step} within {DEADLINE_SECONDS} s")


def same_weights(a: Path, b: Path) -> bool:
    name = "last/model.safetensors"
    return (a / name).read_bytes() == (b / name).read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    process = start_process(main, arguments(out))
    process.join(DEADLINE_SECONDS)
    assert process.exitcode == 0
    return out


@pytest.mark.parametrize("attempt", range(2))
def test_killed_and_resumed_gives_the_same_losses_bit_for_bit(
    tmp_path: Path, uninterrupted: Path, attempt: int
) -> None:
    out, command = tmp_path / "run", arguments(tmp_path / "run")
    chance = random.Random()  # another moment each time
    kills = sorted(chance.sample(range(1, STEPS - 2), 3))
    for i, step in enumerate(kills):
        process = start_process(main, [*command, "--resume"] if i else command)
        wait_for_step(out, step, process)
        time.sleep(chance.uniform(0.0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        process.join(DEADLINE_SECONDS)
        assert process.exitcode == -signal.SIGKILL, kills
    process = start_process(main, [*command, "--resume"])
    process.join(DEADLINE_SECONDS)
    assert process.exitcode == 0, kills
    # Floats are written so that they come back exactly: == compares bits.
    assert losses(out) == losses(uninterrupted), kills
    assert [step for step, _ in losses(out)] == list(range(1, STEPS + 1))
    for kind, field in (("eval", "loss"), ("sample", "text"), ("train", "flip_rate")):
        assert [(r["step"], r[field]) for r in records(out, kind)] == [
            (r["step"], r[field]) for r in records(uninterrupted, kind)
        ], kills
    assert same_weights(out, uninterrupted)
    assert (out / "best").resolve().name == (uninterrupted / "best").resolve().name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_exits_with_zero(
    tmp_path: Path, uninterrupted: Path, number: signal.Signals
) -> None:
    out = tmp_path / "run"
    command = arguments(out)
    process = start_process(main, command)
    wait_for_step(out, 7, process)
    os.kill(process.pid, number)
    process.join(DEADLINE_SECONDS)
    assert process.exitcode == 0
    done = losses(out)[-1][0]
    assert 7 <= done < STEPS
    assert (out / "last").resolve().name == f"step-{done:08d}"
    assert json.loads((out / "last/training_state/state.json").read_text())["step"] == done
    process = start_process(main, ["train", "--out", str(out), "--resume"])
    process.join(DEADLINE_SECONDS)
    assert process.exitcode == 0
    assert losses(out) == losses(uninterrupted) and same_weights(out, uninterrupted)


def test_installed_command_stops_on_sigterm_and_says_how_to_go_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [*arguments(out), "--max-steps", "100000", "--eval-every", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tinylm.cli", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not list(out.glob("checkpoints/step-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    stdout, stderr = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, stderr
    assert "Training stopped by a signal at step" in stdout
    assert f"Go on with: tinylm train --out {out} --resume" in stdout
    assert "Traceback" not in stderr


def test_run_killed_before_its_first_checkpoint_starts_again(tmp_path: Path) -> None:
    reference = trainer(tmp_path / "reference")
    reference.train()
    out = tmp_path / "run"
    early = trainer(out)
    early.run.prepare()
    with early._open_recorder() as early.recorder:
        early._count_and_record(early.train_step())
    assert len(losses(out)) == 1
    trainer(out, resume=True).train()
    assert losses(out) == losses(tmp_path / "reference")
    assert len(records(out, "run")) == 1


def test_several_threads_are_exact_too(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    two: dict[str, Any] = {
        "training": {"num_threads": 2},
        "model": {"max_seq_len": 32, "dropout": 0.1},
    }
    try:
        trainer(tmp_path / "reference", **two).train()
        out = tmp_path / "run"
        run = trainer(out, **two)
        stop_after(run, 5)
        assert run.train().step == 5
        trainer(out, resume=True, **two).train()
    finally:
        torch.set_num_threads(before)
    assert losses(out) == losses(tmp_path / "reference")
    assert same_weights(out, tmp_path / "reference")


def test_stop_during_the_evaluation_makes_up_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer(tmp_path / "reference").train()
    out = tmp_path / "run"
    run = trainer(out)
    evaluate = Validation.evaluate

    def stop_in_the_middle(self: Validation, should_stop: Callable[[], bool]) -> Any:
        run.stop.requested = run.state.step == 4
        return evaluate(self, should_stop)

    with monkeypatch.context() as patched:
        patched.setattr(Validation, "evaluate", stop_in_the_middle)
        assert run.train().step == 4
    assert [r["step"] for r in records(out, "eval")] == [0]
    assert not (out / "best").exists()
    trainer(out, resume=True).train()
    for kind in ("eval", "train"):
        assert [(r["step"], r["loss"]) for r in records(out, kind)] == [
            (r["step"], r["loss"]) for r in records(tmp_path / "reference", kind)
        ]
    assert (out / "best").resolve().name == (tmp_path / "reference/best").resolve().name


def test_log_cut_off_in_the_middle_of_a_line_is_repaired(tmp_path: Path) -> None:
    trainer(tmp_path / "reference").train()
    out = tmp_path / "run"
    trainer(out).train()
    (out / "last").unlink()
    (out / "last").symlink_to("checkpoints/step-00000004")
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 9, "lo')
    trainer(out, resume=True).train()
    assert losses(out) == losses(tmp_path / "reference")


def test_resume_from_an_earlier_checkpoint_when_the_last_is_damaged(tmp_path: Path) -> None:
    trainer(tmp_path / "reference").train()
    out = tmp_path / "run"
    trainer(out).train()
    weights = out / "checkpoints/step-00000008/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        trainer(out, resume=True)
    message = str(error.value)
    assert "model.safetensors: truncated or altered" in message
    other = re.search(r"Other checkpoints: (\S+step-00000004)\.", message)
    assert other is not None
    run = Trainer(
        config(out),
        resume=True,
        resume_from=Path(other[1]),
        console=Console(file=io.StringIO()),
    )
    run.train()
    assert losses(out) == losses(tmp_path / "reference")
    assert same_weights(out, tmp_path / "reference")


def test_finished_run_stays_as_it_is(tmp_path: Path) -> None:
    trainer(tmp_path).train()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    summary = trainer(tmp_path, resume=True).train()
    assert summary.step == 8 and summary.val_loss is not None
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_more_steps_go_on_from_the_end(tmp_path: Path) -> None:
    trainer(tmp_path).train()
    longer = trainer(tmp_path, resume=True, training={"max_steps": 12})
    assert longer.train().step == 12
    assert [step for step, _ in losses(tmp_path)] == list(range(1, 13))
    with pytest.raises(ConfigError, match="max_steps must be at least the 12 steps already done"):
        trainer(tmp_path, resume=True, training={"max_steps": 5})


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    trainer(tmp_path).train()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"schedule": {"lr": 1e-4}}, r"schedule\.lr is 0\.003 in it, 0\.0001 was asked"),
        ({"training": {"batch_size": 8}}, r"training\.batch_size is 4 in it, 8 was asked"),
        ({"model": {"num_layers": 3}}, r"model\.num_layers is 2 in it, 3 was asked"),
        ({"data": {"packing": False}}, r"data\.packing is True in it, False was asked"),
    ]
    for sections, message in cases:
        with pytest.raises(ConfigError, match=message):
            trainer(tmp_path, resume=True, **sections)
    free = {"checkpoint": {"save_every": 100}, "training": {"max_bad_steps": 9}}
    trainer(tmp_path, resume=True, **free)


def test_other_data_is_refused_and_a_moved_file_is_not(tmp_path: Path) -> None:
    out = tmp_path / "run"
    trainer(out).train()
    moved = shutil.copy(inputs().train, tmp_path / "moved.jsonl")
    trainer(out, resume=True, data={"train_file": str(moved)})
    text = Path(moved).read_text()
    Path(moved).write_text(text.replace("tensor", "censor", 1))
    with pytest.raises(CheckpointError) as error:
        trainer(out, resume=True, data={"train_file": str(moved)})
    message = str(error.value)
    assert f"{moved}: the train file is not the one" in message
    assert f"expected {len(text.encode())} bytes" in message and "--train-file" in message
    other = write_jsonl(tmp_path / "val.jsonl", ["A sentence.", "Another sentence."])
    with pytest.raises(CheckpointError, match="the val file is not the one"):
        trainer(out, resume=True, data={"val_file": str(other)})


def test_other_tokenizer_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"
    trainer(out).train()
    other = train_tokenizer([inputs().train], tmp_path / "tokenizer", vocab_size=350)
    with pytest.raises(CheckpointError, match=r"the tokenizer is not the one .* became \d+ tokens"):
        trainer(out, resume=True, data={"tokenizer": str(other)})
    # The files in a checkpoint are the same tokenizer.
    trainer(out, resume=True, data={"tokenizer": str(out / "last")})
    with pytest.raises(TokenizerError):
        trainer(out, resume=True, data={"tokenizer": str(tmp_path / "nothing.json")})


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path / "a").train()
    trainer(tmp_path / "b").train()
    with pytest.raises(CheckpointError, match="expected a checkpoint of this run"):
        Trainer(config(tmp_path / "a"), resume=True, resume_from=tmp_path / "b" / "last")
    with pytest.raises(CheckpointError, match="expected a checkpoint to resume from, found none"):
        Trainer(config(tmp_path / "a"), resume=True, resume_from=tmp_path / "a" / "lost")


def test_saved_configuration_is_whole(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train()
    saved = load_saved_config(tmp_path / "last/training_state/training_config.json")
    assert saved == run.config == load_saved_config(tmp_path / "training_config.json")


def test_random_state_is_restored_exactly(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train()
    expected = torch.rand(5)
    torch.manual_seed(999)
    trainer(tmp_path, resume=True)
    assert torch.equal(torch.rand(5), expected)
