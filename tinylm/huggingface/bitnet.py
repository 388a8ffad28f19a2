"""What a BitNet b1.58 checkpoint (``BitNetForCausalLM``) can give to a TinyLM.

The two share embedding, head, norms and the SwiGLU feed-forward layers, weights and numerics alike.
They do not share attention: BitNet keeps keys and values per head, TinyLM makes both from one
normed latent per token, and no choice of weights turns one into the other. So a BitNet checkpoint
never becomes a TinyLM that says the same; a part of it is a start for training.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinylm.checkpoint import (
    CONFIG_FILE,
    MODEL_FILE,
    read_json,
    read_tensors,
    save_model,
    unique_tensors,
)
from tinylm.config import ModelConfig
from tinylm.errors import CheckpointError, TinyLMError
from tinylm.huggingface.convert import load_tokenizer_beside, read_config
from tinylm.model import TinyLM
from tinylm.quantization import master_weight

MODEL_TYPE = "bitnet"
_INDEX_FILE = "model.safetensors.index.json"
_CONFIG_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
_LANES = 4
_ATTENTION = ".self_attn."


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitNetImport:
    """A model that took a part of its weights from a BitNet checkpoint.

    Attributes:
        model: The model, in evaluation mode.
        taken: Names of the tensors that came from the checkpoint.
        fresh: Names of those that are random or 1 still: attention.
        left: Names of the checkpoint's tensors that have no place.
    """

    model: TinyLM
    taken: list[str]
    fresh: list[str]
    left: list[str]


def import_bitnet(directory: str | Path, *, partial: bool = False, seed: int = 0) -> BitNetImport:
    """Make a TinyLM from a directory of ``BitNetForCausalLM``, as far as that is possible.

    Linear weights may be float masters, or codes (packed or not) with a ``weight_scale`` in the
    convention of ``quantization_config.linear_class``: mean |W| for ``autobitlinear``, its
    reciprocal for ``bitlinear``. Imported codes and scales are kept exactly.

    Args:
        directory: ``config.json`` and safetensors, in one file or with an index.
        partial: Take what fits and leave attention fresh. Without it every BitNet checkpoint is
            refused, with the reason.
        seed: Draws the fresh weights.

    Raises:
        CheckpointError: The checkpoint does not fit, or is damaged; names tensors and fields.
    """
    directory = Path(directory)
    values = read_config(directory)
    if values.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{directory / CONFIG_FILE}: expected model_type {MODEL_TYPE!r}, found "
            f"{values.get('model_type')!r}."
        )
    tensors = _read_tensors(directory)
    left = sorted(name for name in tensors if _ATTENTION in name)
    quantization = values.get("quantization_config") or {}
    if not partial:
        raise CheckpointError(_why_not(directory, values, quantization, left, tensors))
    config = _model_config(directory, values, quantization)
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = TinyLM.from_config(config).eval()
    torch.random.set_rng_state(generator_state)
    taken, fresh = [], []
    with torch.no_grad():
        for name, target in unique_tensors(model).items():
            if _ATTENTION in name:
                fresh.append(name)
                continue
            source = name if name.startswith("lm_head") else f"model.{name}"
            target.copy_(_weight(directory, tensors, source, target, quantization))
            taken.append(source)
    used = {*taken, *left, *(f"{n}_scale" for n in taken)}
    if config.tie_embeddings:
        used.add("lm_head.weight")
    unknown = sorted(set(tensors) - used)
    if unknown:
        raise CheckpointError(
            f"{directory}: no place for {unknown[0]} {list(tensors[unknown[0]].shape)} "
            f"({len(unknown)} such): TinyLM has no such tensor."
        )
    return BitNetImport(model=model, taken=taken, fresh=fresh, left=left)


def save_import(result: BitNetImport, directory: str | Path, out: str | Path) -> Path:
    """Write an imported model as a checkpoint, with the tokenizer that stands in ``directory``.

    Raises:
        CheckpointError: ``out`` holds something else, or can't be written.
        TokenizerError: The tokenizer has more ids than the vocabulary.
    """
    model = result.model
    tokenizer = load_tokenizer_beside(Path(directory), model.config.vocab_size)
    return save_model(out, model, tokenizer=tokenizer)


def _why_not(
    directory: Path,
    values: dict[str, Any],
    quantization: dict[str, Any],
    left: list[str],
    tensors: dict[str, Tensor],
) -> str:
    """Say which tensors and fields keep a BitNet checkpoint from becoming a TinyLM."""
    kinds: dict[str, list[str]] = {}
    for name in left:
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(name)
    rows = "; ".join(
        f"{kind} {list(tensors[names[0]].shape)} ({len(names)})" for kind, names in kinds.items()
    )
    way_out = (
        "--partial takes embedding, head, norms and feed-forward layers and leaves attention "
        "random: a start for training, not a model that answers."
    )
    try:
        _model_config(directory, values, quantization)
    except TinyLMError as error:
        way_out = f"And {error}"
    return (
        f"{directory}: a BitNet checkpoint can't become a TinyLM that says the same. Its attention "
        "has keys and values per head, TinyLM's makes both from one normed latent per token "
        "(kv_a_proj, kv_a_layernorm, kv_b_proj), so these tensors have no place: "
        f"{rows or 'none found'}. {way_out}"
    )


def _model_config(
    directory: Path, values: dict[str, Any], quantization: dict[str, Any]
) -> ModelConfig:
    """Turn a BitNetConfig into ours, or say which field does not fit."""
    source = directory / CONFIG_FILE
    activation = values.get("hidden_act", "relu2")  # what transformers takes for a missing field
    if activation != "silu":
        raise CheckpointError(
            f"{source}: hidden_act must be 'silu', found {activation!r}: TinyLM's feed-forward is "
            "SwiGLU, and gate_proj, up_proj and down_proj would mean something else."
        )
    if quantization.get("use_rms_norm"):
        raise CheckpointError(
            f"{source}: quantization_config.use_rms_norm must be false, found true: TinyLM has one "
            "norm for q and kv_a, and one for gate and up, not one in each linear layer."
        )
    missing = [name for name in _CONFIG_FIELDS if name not in values]
    if missing:
        raise CheckpointError(f"{source}: expected {', '.join(missing)}, found no such field.")
    rope = values.get("rope_parameters") or {}
    eos = values.get("eos_token_id")
    return ModelConfig(
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=values["num_attention_heads"],
        intermediate_size=values["intermediate_size"],
        max_seq_len=values["max_position_embeddings"],
        dropout=0.0,
        rope_theta=float(rope.get("rope_theta", values.get("rope_theta", 500000.0))),
        norm_eps=values.get("rms_norm_eps", 1e-5),
        tie_embeddings=values.get("tie_word_embeddings", False),
        bos_token_id=values.get("bos_token_id"),
        eos_token_id=eos[0] if isinstance(eos, list) else eos,
        pad_token_id=values.get("pad_token_id"),
    )


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    if (directory / _INDEX_FILE).is_file():
        files = sorted(set(read_json(directory / _INDEX_FILE)["weight_map"].values()))
    else:
        files = [MODEL_FILE]
    return {name: t for file in files for name, t in read_tensors(directory / file).items()}


def _weight(
    directory: Path,
    tensors: dict[str, Tensor],
    name: str,
    target: Tensor,
    quantization: dict[str, Any],
) -> Tensor:
    """Return one tensor as float32 of the target's shape."""
    if name not in tensors:
        raise CheckpointError(f"{directory}: expected a tensor {name}, found none.")
    weight, scale = tensors[name], tensors.get(f"{name}_scale")
    if weight.dtype == torch.uint8:
        rows = -(-target.shape[0] // _LANES)
        if weight.shape != (rows, target.shape[1]):
            raise CheckpointError(
                f"{directory}: {name}: expected packed uint8 {[rows, target.shape[1]]}, found "
                f"{list(weight.shape)}."
            )
        weight = _unpack_rows(weight, f"{directory}: {name}")[: target.shape[0]]
        if scale is None:
            raise CheckpointError(f"{directory}: expected {name}_scale beside packed codes.")
    if weight.shape != target.shape:
        raise CheckpointError(
            f"{directory}: {name}: expected {list(target.shape)}, found {list(weight.shape)}."
        )
    if scale is None:
        return weight.float()
    return master_weight(
        weight.float(), _mean_magnitude(directory, scale, quantization), f"{directory}: {name}"
    )


def _mean_magnitude(directory: Path, scale: Tensor, quantization: dict[str, Any]) -> Tensor:
    """Return mean |W| from a ``weight_scale`` [1], whose meaning the linear class decides."""
    if not quantization:
        raise CheckpointError(
            f"{directory / CONFIG_FILE}: found weight_scale tensors and no quantization_config. "
            "Its linear_class decides whether they are mean |W| (autobitlinear) or 1 / mean |W| "
            "(bitlinear); the wrong one gives wrong answers without an error. Add it."
        )
    linear_class = quantization.get("linear_class", "bitlinear")  # transformers' default
    if linear_class not in ("bitlinear", "autobitlinear"):
        raise CheckpointError(
            f"{directory / CONFIG_FILE}: linear_class must be bitlinear or autobitlinear, found "
            f"{linear_class!r}."
        )
    mean = scale.float().reshape(())
    return mean if linear_class == "autobitlinear" else mean.reciprocal()


def _unpack_rows(packed: Tensor, name: str) -> Tensor:
    """Unpack transformers' layout: lane i (bits 2i) holds rows i * N / 4 and on, as code + 1."""
    codes = torch.cat([(packed >> 2 * lane) & 3 for lane in range(_LANES)]).to(torch.int8) - 1
    if bool((codes > 1).any()):
        row, column = (codes > 1).nonzero()[0].tolist()
        raise CheckpointError(
            f"{name}: code 3 at row {row}, column {column}; codes are 0, 1 or 2. The file is "
            "damaged or was packed by something else."
        )
    return codes
