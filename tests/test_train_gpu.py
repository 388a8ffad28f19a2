"""Training on a GPU: what was interrupted goes on to the same bits.

The machine may lack `datasets`, so the text is tokenised here without it.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_helpers import inputs, losses

import tinylm.prepare
from tinylm.documents import DocumentReader
from tinylm.tokenizer import load_tokenizer

STEPS = 8
SPEED = {
    "triton": ("--quantizers", "triton"),
    "compile": ("--compile",),
    "recompute": ("--compile", "--activation-checkpointing"),
}


def tokenised_plainly(
    readers: list[DocumentReader], tokenizer: Any, scratch: Path, **options: Any
) -> Iterator[Any]:
    for text in (text for reader in readers for text in reader):
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        yield tinylm.prepare._Document(
            np.array(ids, dtype=np.uint16), len(text.encode()), tinylm.prepare.document_hash(text)
        )


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "tokens"
    data = inputs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tinylm.prepare, "_tokenised", tokenised_plainly)
        tokenizer = load_tokenizer(str(data.tokenizer))
        tinylm.prepare.prepare([data.train], tokenizer, out, val_files=[data.val])
    return out


def train(tokens: Path, out: Path, device: str, *further: str) -> None:
    """Train in a process of its own: determinism is settled where a process starts."""
    command = [
        *(sys.executable, "-m", "tinylm.cli", "train", "--preset", "tinylm-test"),
        *("--data", str(tokens), "--out", str(out), "--device", device, "--deterministic"),
        *("--max-seq-len", "64", "--max-steps", str(STEPS), "--save-every", str(STEPS // 2)),
        *("--batch-size", "8", "--grad-accum-steps", "2", "--lr", "3e-3", "--warmup-steps", "2"),
        *("--dropout", "0.1", "--log-every", "1", "--eval-every", "4", "--eval-max-tokens", "500"),
        *("--sample-tokens", "0", "--no-tensorboard", *further),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def check_resume(tokens: Path, out: Path, device: str, *further: str) -> None:
    """Train, then once more from the middle's checkpoint, and compare all bits."""
    train(tokens, out, device, *further)
    weights = out / "last/model.safetensors"
    expected, expected_losses = weights.read_bytes(), losses(out)
    assert [step for step, _ in expected_losses] == [*range(1, STEPS + 1)]
    middle = out / "checkpoints" / f"step-{STEPS // 2:08d}"
    train(tokens, out, device, *further, "--resume-from", str(middle))
    assert losses(out) == expected_losses
    assert weights.read_bytes() == expected


@pytest.mark.gpu
@pytest.mark.parametrize("speed", SPEED)
def test_resume_is_exact_on_the_gpu(tokens: Path, tmp_path: Path, speed: str) -> None:
    check_resume(tokens, tmp_path / "run", "cuda", *SPEED[speed])


def test_resume_is_exact_from_prepared_tokens(tokens: Path, tmp_path: Path) -> None:
    check_resume(tokens, tmp_path / "run", "cpu")
