"""Checkpoint directory -> ONNX directory.

model.onnx  model.onnx_data  config.json  tokenizer files  export.json  SHA256SUMS
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from tinylm.checkpoint import (
    CONFIG_FILE,
    MODEL_FILE,
    STATE_DIR,
    load_model,
    resolve_checkpoint,
)
from tinylm.config import Activation
from tinylm.directory import SUMS_FILE, read_checksums, write_checksums, written_whole
from tinylm.errors import CheckpointError, ExportError
from tinylm_export.model_graph import build_onnx
from tinylm_export.ops import register_onnx_schemas

ONNX_FILE = "model.onnx"
DATA_FILE = "model.onnx_data"
EXPORT_FILE = "export.json"
LM_HEADS = ("float32", "int8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportInfo:
    """What ``export.json`` holds: how an ONNX directory was made.

    Attributes:
        checkpoint: The checkpoint directory, relative to the ONNX directory.
        checkpoint_sha256: Digest of its weights.
        task: See :func:`tinylm_export.model_graph.build_onnx`.
        activation: Number format of activations.
        all_logits: Whether the graph gives logits at every position.
        lm_head: Number format of the head, one of :data:`LM_HEADS`.
    """

    checkpoint: str
    checkpoint_sha256: str
    task: str
    activation: str
    all_logits: bool
    lm_head: str = "float32"  # older exports do not say

    @classmethod
    def load(cls, directory: Path) -> ExportInfo:
        """Read ``export.json``.

        Raises:
            ExportError: The directory is not an exported model.
        """
        try:
            return cls(**json.loads((directory / EXPORT_FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ExportError(
                f"{directory}: not an exported model, {EXPORT_FILE} can't be read ({error}). "
                "Make one with `tinylm-export onnx CKPT --out DIR`."
            ) from error


def source_checkpoint(directory: Path, info: ExportInfo, given: str | Path | None = None) -> Path:
    """Find the checkpoint that a directory was exported from.

    Args:
        directory: The exported directory.
        info: Its ``export.json``.
        given: Where the checkpoint is now, if it was moved.

    Raises:
        CheckpointError: It is not there.
        ExportError: It holds other weights than those that were exported.
    """
    try:
        source = resolve_checkpoint(directory / info.checkpoint if given is None else given)
    except CheckpointError as error:
        if given is not None:
            raise
        raise CheckpointError(
            f"{error} {directory} was exported from it; if it was moved, give it with --checkpoint."
        ) from error
    digest = read_checksums(source, error=CheckpointError)[MODEL_FILE]
    if digest != info.checkpoint_sha256:
        raise ExportError(
            f"{directory} was exported from weights with SHA-256 {info.checkpoint_sha256}, found "
            f"{digest} in {source}. Export it again, or give the right one with --checkpoint."
        )
    return source


def export_onnx(
    checkpoint: str | Path,
    out: str | Path,
    *,
    task: str = "text-generation-with-past",
    activation: Activation | None = None,
    all_logits: bool = False,
    lm_head: str = "float32",
) -> Path:
    """Export a checkpoint to an ONNX directory.

    The directory is written whole or not at all; an earlier export of the same name is replaced.
    The same checkpoint and options give the same bytes in ``model.onnx`` and ``model.onnx_data``.

    Args:
        checkpoint: A checkpoint directory, or a training output directory for its best one.
        out: The ONNX directory.
        task: ``"text-generation-with-past"`` or ``"text-generation"``.
        activation: Number format of activations; default the checkpoint's.
        all_logits: Logits at every position rather than at each row's last.
        lm_head: Number format of the head, ``"float32"`` or ``"int8"``.

    Returns:
        The ONNX directory.

    Raises:
        CheckpointError: The checkpoint can't be loaded.
        ExportError: Bad options, or ``out`` holds something else.
    """
    if lm_head not in LM_HEADS:
        raise ExportError(f"lm_head must be one of {', '.join(LM_HEADS)}, found {lm_head!r}.")
    source = resolve_checkpoint(checkpoint)
    out = Path(out)
    model = load_model(source)
    if activation is not None:
        model.set_activation(activation)
    if lm_head == "int8":
        model.quantize_head()
    onnx_model = build_onnx(model, task=task, all_logits=all_logits)
    info = ExportInfo(
        checkpoint=os.path.relpath(source.resolve(), out.resolve()),
        checkpoint_sha256=read_checksums(source, error=CheckpointError)[MODEL_FILE],
        task=task,
        activation=model.config.activation,
        all_logits=all_logits or task == "text-generation",
        lm_head=lm_head,
    )
    with written_whole(out, marker=ONNX_FILE, error=ExportError) as temporary:
        save_onnx(onnx_model, temporary)
        model.config.save(temporary / CONFIG_FILE)
        _copy_tokenizer(source, temporary)
        _write_json(temporary / EXPORT_FILE, dataclasses.asdict(info))
        write_checksums(temporary)
    return out


def save_onnx(model: ir.Model, directory: Path) -> None:
    """Save ``model.onnx`` and its weights, and check the result.

    Weights of 256 bytes or more stand in ``model.onnx_data``, which runtimes map into memory.

    Raises:
        onnx.checker.ValidationError: The graph breaks the op contract or contradicts its shapes.
    """
    register_onnx_schemas()
    ir.save(model, directory / ONNX_FILE, external_data=DATA_FILE)
    onnx.checker.check_model(directory / ONNX_FILE, full_check=True)


def _copy_tokenizer(source: Path, target: Path) -> None:
    own = {CONFIG_FILE, MODEL_FILE, SUMS_FILE, STATE_DIR}
    for path in sorted(source.iterdir()):
        if path.name not in own and path.is_file():
            shutil.copy2(path, target / path.name)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
