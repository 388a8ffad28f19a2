import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_helpers import inputs

from tinylm import ModelConfig, TinyLM
from tinylm.checkpoint import (
    check_intact,
    load_model,
    read_tensors,
    resolve_checkpoint,
    restore_weights,
    save_model,
)
from tinylm.directory import write_checksums
from tinylm.errors import CheckpointError, ConfigError
from tinylm.run_directory import RunDirectory
from tinylm.tokenizer import load_tokenizer

IDS = torch.arange(12).reshape(2, 6)


def small_model(*, seed: int = 0, tied: bool = True, vocab_size: int = 384) -> TinyLM:
    torch.manual_seed(seed)
    return TinyLM.from_config(
        ModelConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            num_layers=2,
            num_heads=2,
            max_seq_len=16,
            tie_embeddings=tied,
        )
    ).eval()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint with training state, and an older one beside it."""
    folder = tmp_path / "run" / "checkpoints"
    model = small_model()
    tokenizer = load_tokenizer(inputs().tokenizer)
    for step in (100, 200):
        save_model(
            folder / f"step-{step:08d}",
            model,
            tokenizer=tokenizer,
            extra_files={
                "training_state/state.json": {"step": step},
                "training_state/optimizer.safetensors": {"x": torch.ones(3)},
            },
        )
    return folder / "step-00000200"


@pytest.mark.parametrize("tied", [True, False])
def test_model_comes_back_with_the_same_logits(tmp_path: Path, tied: bool) -> None:
    model = small_model(tied=tied)
    loaded = load_model(save_model(tmp_path / "ckpt", model))
    assert loaded.config == model.config and not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(IDS), model(IDS))
    names = set(load_file(tmp_path / "ckpt" / "model.safetensors"))
    assert ("lm_head.weight" in names) != tied
    assert (loaded.lm_head.weight is loaded.embed_tokens.weight) == tied


def test_from_pretrained_and_trainable_afterwards(tmp_path: Path) -> None:
    save_model(tmp_path / "ckpt", small_model())
    loaded = TinyLM.from_pretrained(tmp_path / "ckpt").train()
    loaded(IDS).square().mean().backward()
    assert all(p.grad is not None for p in loaded.parameters())
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter -= 0.1  # the file must not change with it
    check_intact(tmp_path / "ckpt")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_weights_are_mapped_from_the_file(tmp_path: Path) -> None:
    path = save_model(tmp_path / "mapped-ckpt", small_model())
    loaded = load_model(path)
    mapped = [
        [int(part, 16) for part in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "mapped-ckpt/model.safetensors" in line
    ]
    for name, parameter in loaded.named_parameters():
        assert any(low <= parameter.data_ptr() < high for low, high in mapped), name


def test_layout_is_safetensors_json_and_sums(checkpoint: Path) -> None:
    files = {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()}
    assert {
        "model.safetensors",
        "config.json",
        "SHA256SUMS",
        "tokenizer.json",
        "tokenizer.model",
        "training_state/state.json",
        "training_state/optimizer.safetensors",
    } <= files
    listed = {line.split("  ")[1] for line in (checkpoint / "SHA256SUMS").read_text().splitlines()}
    assert listed == files - {"SHA256SUMS"}
    tokenizer = load_tokenizer(checkpoint)
    assert (
        tokenizer("Hello 12")["input_ids"]
        == load_tokenizer(inputs().tokenizer)("Hello 12")["input_ids"]
    )


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum here")
def test_sums_are_what_sha256sum_reads(checkpoint: Path) -> None:
    command = ["sha256sum", "--check", "--quiet", "SHA256SUMS"]
    assert subprocess.run(command, cwd=checkpoint, check=False).returncode == 0
    (checkpoint / "config.json").write_text("{}")
    assert subprocess.run(command, cwd=checkpoint, check=False).returncode == 1


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "config.json", "tokenizer.json", "training_state/optimizer.safetensors"],
)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_names_the_file_and_the_other_checkpoint(
    checkpoint: Path, name: str, damage: str
) -> None:
    check_intact(checkpoint, training_state=True)
    path = checkpoint / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    with pytest.raises(CheckpointError) as error:
        check_intact(checkpoint, training_state=True)
    message = str(error.value)
    assert message.startswith(str(path))
    assert ("found none" if damage == "remove" else "truncated or altered") in message
    assert re.search(r"Other checkpoints: \S+step-00000100\.", message)
    if not name.startswith("training_state"):
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            load_model(checkpoint)
    else:
        load_model(checkpoint)  # a model needs no training state


def test_missing_sums_and_missing_lines_are_noticed(checkpoint: Path) -> None:
    sums = checkpoint / "SHA256SUMS"
    lines = sums.read_text().splitlines(keepends=True)
    sums.write_text("".join(line for line in lines if "model.safetensors" not in line))
    with pytest.raises(CheckpointError, match=r"SHA256SUMS: expected a line for model\.safe"):
        load_model(checkpoint)
    sums.unlink()
    with pytest.raises(CheckpointError, match=r"SHA256SUMS: expected a file, found none"):
        load_model(checkpoint)


def alter_weights(checkpoint: Path, how: str) -> None:
    path = checkpoint / "model.safetensors"
    tensors = {name: t.clone() for name, t in load_file(path).items()}
    if how == "shape":
        tensors["norm.weight"] = torch.ones(7)
    elif how == "dtype":
        tensors["norm.weight"] = tensors["norm.weight"].half()
    elif how == "missing":
        del tensors["norm.weight"]
    else:
        tensors["norm.bias"] = torch.zeros(32)
    save_file(tensors, path)
    write_checksums(checkpoint)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("shape", r"norm\.weight: expected torch\.float32 \[32\], found torch\.float32 \[7\]"),
        ("dtype", r"norm\.weight: expected torch\.float32 \[32\], found torch\.float16 \[32\]"),
        ("missing", r"no tensor 'norm\.weight' \(1 such\): expected 26 tensors, found 25"),
        ("unknown", r"unknown tensor 'norm\.bias' \(1 such\): expected 26 tensors, found 27"),
    ],
)
def test_weights_that_do_not_fit_their_config(checkpoint: Path, how: str, message: str) -> None:
    alter_weights(checkpoint, how)
    check_intact(checkpoint)
    for load in (load_model, lambda path: restore_weights(path, small_model())):
        with pytest.raises(CheckpointError, match=rf"model\.safetensors: {message}") as error:
            load(checkpoint)
        assert "Other checkpoints:" in str(error.value)


def test_a_file_that_is_no_safetensors_is_not_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    torch.save({"x": torch.ones(3)}, path)
    with pytest.raises(CheckpointError, match=r"expected a whole safetensors file, found \d+ byt"):
        read_tensors(path)


def test_config_of_another_model_is_refused(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "llama"}))
    write_checksums(checkpoint)
    with pytest.raises(CheckpointError, match="model_type must be 'tinylm', found 'llama'"):
        load_model(checkpoint)


def test_failing_write_leaves_the_old_checkpoint_and_nothing_else(checkpoint: Path) -> None:
    before = sorted(p.name for p in checkpoint.parent.iterdir())
    with pytest.raises(TypeError):
        save_model(checkpoint, small_model(seed=1), extra_files={"x.json": object()})
    assert sorted(p.name for p in checkpoint.parent.iterdir()) == before
    check_intact(checkpoint, training_state=True)


def test_full_disk_is_a_clear_error_and_loses_nothing(checkpoint: Path) -> None:
    before = sorted(p.name for p in checkpoint.parent.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The system refuses to write on, as it does when a disk is full.
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(CheckpointError) as error:
            save_model(checkpoint.parent / "step-00000300", small_model())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = str(error.value)
    assert "step-00000300: can't be written: " in message and "File too large" in message
    assert "MB are free there" in message and "what was there before is intact" in message
    assert sorted(p.name for p in checkpoint.parent.iterdir()) == before
    check_intact(checkpoint, training_state=True)


def test_checkpoint_is_replaced_but_other_directories_are_not(tmp_path: Path) -> None:
    path = save_model(tmp_path / "ckpt", small_model())
    model = small_model(seed=1)
    save_model(path, model)
    with torch.no_grad():
        assert torch.equal(load_model(path)(IDS), model(IDS))
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt"]
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"papers: exists and holds no model\.safetensors"):
        save_model(tmp_path / "papers", model)
    assert (tmp_path / "papers" / "thesis.txt").is_file()


def test_resolve_takes_a_checkpoint_or_a_run(checkpoint: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    assert resolve_checkpoint(checkpoint) == checkpoint
    run.commit(200, best_step=None)
    assert resolve_checkpoint(run.path).resolve() == checkpoint
    run.commit(200, best_step=100)
    assert resolve_checkpoint(run.path).resolve() == checkpoint.with_name("step-00000100")
    with pytest.raises(CheckpointError, match=r"expected a checkpoint .*, found nothing"):
        resolve_checkpoint(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"found notes\.txt"):
        resolve_checkpoint(tmp_path / "other")


def make_checkpoint(run: RunDirectory, step: int) -> None:
    run.checkpoint(step).mkdir(parents=True)
    (run.checkpoint(step) / "model.safetensors").touch()


def test_the_last_ones_and_the_best_stay(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run", keep_last=2)
    run.prepare()
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 2)):
        make_checkpoint(run, step)
        run.commit(step, best_step=best)
    assert [p.name[-1] for p in sorted(run.checkpoints.iterdir())] == ["2", "4", "5"]
    moved = (tmp_path / "run").rename(tmp_path / "elsewhere")  # links are relative
    assert (moved / "last").resolve().name == "step-00000005"
    assert (moved / "best").resolve().name == "step-00000002"


def test_going_back_keeps_what_came_later(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run", keep_last=1)
    run.prepare()
    for step in (1, 2, 3):
        make_checkpoint(run, step)
    run.commit(1, best_step=1)
    assert len(list(run.checkpoints.iterdir())) == 3
    assert (run.path / "last").resolve().name == "step-00000001"


def test_leftovers_of_a_kill_while_saving_are_removed(checkpoint: Path, tmp_path: Path) -> None:
    stale = checkpoint.parent / ".tmp-step-00000300"
    shutil.copytree(checkpoint, stale)
    RunDirectory(tmp_path / "run").prepare()
    assert not stale.exists() and checkpoint.is_dir()


def test_used_output_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match=r"not empty\. Pass --resume .* or choose another --out"):
        RunDirectory(tmp_path).check_free()
    RunDirectory(tmp_path / "new").check_free()
