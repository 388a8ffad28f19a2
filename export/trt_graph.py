"""The graph that TensorRT gets: the passes over an exported model, in their order."""

from __future__ import annotations

import onnx_ir as ir

from tinylm.config import ModelConfig
from tinylm.errors import ExportError
from tinylm_export.passes.all_logits import expose_all_logits
from tinylm_export.passes.cast_graph import cast_graph
from tinylm_export.passes.dense import make_dense
from tinylm_export.passes.drop_function_bodies import drop_function_bodies
from tinylm_export.passes.fold_lm_head import fold_lm_head
from tinylm_export.passes.fold_residual import fold_residual
from tinylm_export.passes.fold_swiglu import fold_swiglu
from tinylm_export.passes.fuse_projections import fuse_projections
from tinylm_export.passes.mark_plugins import mark_plugins
from tinylm_export.passes.prepack_weights import prepack_weights
from tinylm_export.passes.trt_flash_mla import trt_flash_mla

TASK = "text-generation-with-past"


def plugin_graph(
    model: ir.Model, *, dtype: str = "bf16", fp8_act: bool = False, all_logits: bool = False
) -> ir.Model:
    """Rewrite an exported model to plugins, in place, and return it.

    Args:
        model: What ``tinylm-export onnx`` wrote, with the latent cache.
        dtype: Type of activations: ``"bf16"``, ``"fp16"`` or ``"fp32"``.
        fp8_act: Quantise the BitLinears' activations to fp8_e4m3 rather than as exported.
        all_logits: Give logits at every position.

    Raises:
        ExportError: The graph is not as it was exported; names the node and says why.
    """
    _prepare(model, all_logits)
    trt_flash_mla(model).require_all("let FlashMLA read the fused projection")
    fold_swiglu(model).require_all("fold SwiGLU into a BitLinear")
    fold_residual(model).require_all("fold the residual into a BitLinear")
    fold_lm_head(model).require_all("fold the final norm into the head")
    prepack_weights(model).require_all("pack its weight for the GPU")
    mark_plugins(model, activation="fp8_e4m3" if fp8_act else None)
    cast_graph(model, dtype)
    return model


def dense_graph(
    model: ir.Model, config: ModelConfig, *, dtype: str = "bf16", all_logits: bool = False
) -> ir.Model:
    """Rewrite an exported model to ordinary weights and standard ops, in place, and return it.

    Args:
        model: What ``tinylm-export onnx`` wrote, with the latent cache.
        config: The model's, for the length of the rotary tables.
        dtype: Type of weights and activations: ``"bf16"``, ``"fp16"`` or ``"fp32"``.
        all_logits: Give logits at every position.

    Raises:
        ExportError: The graph is not as it was exported; names the node and says why.
    """
    _prepare(model, all_logits)
    make_dense(model, max_seq_len=config.max_seq_len).require_all("make it dense")
    cast_graph(model, dtype)
    return model


def _require_cache(model: ir.Model) -> None:
    names = {value.name for value in model.graph.inputs}
    if "past_lens" not in names:
        raise ExportError(
            f"an engine needs a model of the task {TASK}, found one with the inputs "
            f"{', '.join(map(str, names))}. Export the checkpoint with `--task {TASK}`."
        )


def _prepare(model: ir.Model, all_logits: bool) -> None:
    """Do what both rewrites begin with; a fair rival also reads its input once for both."""
    _require_cache(model)
    if all_logits:
        expose_all_logits(model)
    drop_function_bodies(model)
    fuse_projections(model).require_all("join the projections of one input")
