"""Puts the settings that make training faster or smaller onto a model.

None of them changes what is computed, except for the last bits of sums.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from tinylm.attention_backends import DEFAULT_CHAIN
from tinylm.device import precision_context
from tinylm.model import TinyLM
from tinylm.quantizer_passes import choose_quantizers
from tinylm.training_config import PerformanceConfig


def apply_performance(
    model: TinyLM, config: PerformanceConfig, device: torch.device, *, precision: str = "auto"
) -> None:
    """Set a model up for training.

    Layers are compiled one by one: all have the same code, so the first one's compilation serves
    the rest, and names in checkpoints stay as they are.

    Args:
        model: On its device.
        config: What to do.
        device: The model's.
        precision: As in :func:`tinylm.device.precision_context`.

    Raises:
        ConfigError: A setting can't be had on this device.
    """
    model.loss_chunk = config.loss_chunk
    model.recompute_layers = config.activation_checkpointing
    model.compiled_loss = config.compile
    quantizers = choose_quantizers(config.quantizers, device)
    for linear in model.bit_linears().values():
        linear.quantizers = quantizers
    if config.compile:
        _settle_attention(model, device, precision)
        for layer in model.layers:
            layer.compile()


def _settle_attention(model: TinyLM, device: torch.device, precision: str) -> None:
    """Let back ends that are not there fail, and warn, now and not inside a compilation."""
    shape = model.config.attention_shape
    with precision_context(precision, device):
        enabled = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if enabled else torch.float32
    q = torch.zeros(1, 1, shape.num_heads, shape.qk_dim, dtype=dtype, device=device)
    v = torch.zeros(1, 1, shape.num_heads, shape.value_dim, dtype=dtype, device=device)
    DEFAULT_CHAIN.attend(q, q, v, scale=shape.softmax_scale)


def without_compilation() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which compiled layers run as they are written.

    Evaluation and sampling have other shapes, modes and a cache: each would be compiled anew.
    """
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
