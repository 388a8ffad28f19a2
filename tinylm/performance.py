"""Puts the settings that make training faster or smaller onto a model.

None of them changes what is computed, except for the last bits of sums.
"""

from __future__ import annotations

import contextlib
import os
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
    model.set_attention_backend(config.attention)
    if config.deterministic:
        # cuBLAS reads it when its first handle is made, so not too late here.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.deterministic)
    model.set_quantizers(choose_quantizers(config.quantizers, device))
    if config.compile:
        _settle_attention(model, config.attention, device, precision)
        # Else DDP cuts each layer's graph where its buckets end, for gradients that come early:
        # three graphs for one, and no fusion across. A layer's are early enough for overlap.
        torch._dynamo.config.optimize_ddp = False
        for layer in model.layers:
            layer.compile()


def _settle_attention(model: TinyLM, name: str, device: torch.device, precision: str) -> None:
    """Let back ends that are not there fail, and warn, now and not inside a compilation."""
    shape = model.config.attention_shape
    with precision_context(precision, device):
        enabled = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if enabled else torch.float32
    length = model.config.max_seq_len
    q, k, v = (
        torch.zeros(1, length, shape.num_heads, width, dtype=dtype, device=device)
        for width in (shape.qk_dim, shape.qk_dim, shape.value_dim)
    )
    q.requires_grad_()  # a kernel without a backward pass is of no use
    DEFAULT_CHAIN.attend(q, k, v, scale=shape.softmax_scale, first=name).sum().backward()


def without_compilation() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which compiled layers run as they are written.

    Evaluation and sampling have other shapes, modes and a cache: each would be compiled anew.
    """
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
