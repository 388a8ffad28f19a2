"""Checkpoint directory <-> Hugging Face directory.

    checkpoint     model.safetensors  config.json  SHA256SUMS                    tokenizer files
    Hugging Face   model.safetensors  config.json  generation_config.json       tokenizer files

The weights are the same float32 masters, with the prefix ``model.`` on the Hugging Face side.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tinylm.checkpoint import CONFIG_FILE, MODEL_FILE, load_model, resolve_checkpoint, save_model
from tinylm.config import MODEL_TYPE
from tinylm.directory import written_whole
from tinylm.errors import CheckpointError
from tinylm.tokenizer import HF_FILE, SPM_FILE, load_tokenizer, save_tokenizer


def to_huggingface(checkpoint: str | Path, out: str | Path) -> Path:
    """Write a checkpoint as a directory that transformers loads.

    Args:
        checkpoint: A checkpoint, or a training run's output directory for its best one.
        out: The directory; an earlier model there is replaced, anything else is not.

    Returns:
        ``out`` as a path.

    Raises:
        CheckpointError: The checkpoint can't be loaded, or ``out`` can't be written.
    """
    from tinylm.huggingface.modeling import TinyLMForCausalLM

    source, out = resolve_checkpoint(checkpoint), Path(out)
    model = TinyLMForCausalLM.from_tinylm(load_model(source))
    tokenizer = load_tokenizer_beside(source, model.config.vocab_size)
    with written_whole(out, marker=MODEL_FILE, error=CheckpointError) as temporary:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            save_tokenizer(tokenizer, temporary)
    return out


def from_huggingface(directory: str | Path, out: str | Path) -> Path:
    """Write a TinyLM that transformers saved as a checkpoint.

    Weights of another dtype become float32, which is what a checkpoint holds.

    Args:
        directory: What :func:`to_huggingface` or ``TinyLMForCausalLM.save_pretrained`` wrote.
        out: The checkpoint; an earlier one of that name is replaced, anything else is not.

    Returns:
        ``out`` as a path.

    Raises:
        CheckpointError: The directory holds another model or can't be loaded, or ``out`` can't be
            written.
    """
    from tinylm.huggingface.modeling import TinyLMForCausalLM

    directory = Path(directory)
    model_type = read_config(directory).get("model_type")
    if model_type != MODEL_TYPE:
        raise CheckpointError(
            f"{directory / CONFIG_FILE}: expected model_type {MODEL_TYPE!r}, found {model_type!r}. "
            "Of other models only a part of a BitNet checkpoint can be taken: see "
            "`tinylm convert --help`."
        )
    wrapped = TinyLMForCausalLM.from_pretrained(str(directory), dtype=torch.float32)
    model = wrapped.model.eval()
    return save_model(
        out, model, tokenizer=load_tokenizer_beside(directory, model.config.vocab_size)
    )


def read_config(directory: Path) -> dict[str, Any]:
    """Read a directory's ``config.json``.

    Raises:
        CheckpointError: Missing, or not a JSON object.
    """
    path = directory / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: expected a model's directory with {CONFIG_FILE}, found none."
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected a JSON object ({error}).") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(values).__name__}.")
    return values


def load_tokenizer_beside(directory: Path, vocab_size: int) -> Any:
    """Load the tokenizer in a model's directory, or None if there is none.

    Raises:
        TokenizerError: It is damaged, or has ids at or above ``vocab_size``.
    """
    if not any((directory / name).is_file() for name in (HF_FILE, SPM_FILE)):
        return None
    return load_tokenizer(directory, vocab_size=vocab_size)
