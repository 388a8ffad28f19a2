"""``tinylm-export trt``: an ONNX directory to a TensorRT engine."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from tinylm.cli_shared import Json, write_json


class DtypeChoice(str, enum.Enum):
    """Values of ``--dtype``."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


def trt(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="What `tinylm-export onnx` wrote."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Directory to write to.")],
    dtype: Annotated[
        DtypeChoice, typer.Option("--dtype", help="Type of activations and of the head.")
    ] = DtypeChoice.bf16,
    fp8_act: Annotated[
        bool, typer.Option("--fp8-act", help="Quantise activations to fp8_e4m3, not to int8.")
    ] = False,
    max_batch_size: Annotated[int, typer.Option("--max-batch-size", min=1, help="Most rows.")] = 8,
    max_seq_len: Annotated[
        int | None,
        typer.Option(
            "--max-seq-len", min=1, help="Longest sequence, at most the context. Default: that."
        ),
    ] = None,
    dense: Annotated[
        bool,
        typer.Option("--dense", help="Ordinary weights and no plugins, to compare speeds with."),
    ] = False,
    all_logits: Annotated[
        bool, typer.Option("--all-logits", help="Logits at every position, not the last only.")
    ] = False,
    workspace_mib: Annotated[
        int | None,
        typer.Option(
            "--workspace-mib", min=1, help="Most scratch memory of a layer. Default: the GPU's."
        ),
    ] = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option(
            "--timing-cache", help="File of measured kernel times. Default: in TinyLM's cache."
        ),
    ] = None,
    embed_plugins: Annotated[
        bool,
        typer.Option("--embed-plugins", help="Put the plugin library into the engine."),
    ] = False,
    mark_node: Annotated[
        list[str] | None,
        typer.Option(
            "--mark-node",
            help="Give this node's value as an output too, such as layers.0.self_attn; may be "
            "given again. For a debug engine.",
        ),
    ] = None,
    json: Json = None,
) -> None:
    """Build a TensorRT engine for this machine's GPU, with its manifest.

    The engine runs on GPUs of this architecture, with this TensorRT version.
    """
    from rich.console import Console
    from rich.progress import Progress

    from tinylm_export.to_engine import build_engine
    from tinylm_export.trt_engine import ENGINE_FILE

    stderr = Console(stderr=True)
    with Progress(console=stderr, disable=not stderr.is_terminal, transient=True) as bar:
        task = bar.add_task("TensorRT", total=1.0)

        def progress(text: str, fraction: float) -> None:
            bar.update(task, description=f"TensorRT: {text}", completed=fraction)

        manifest = build_engine(
            directory,
            out,
            dtype=dtype.value,
            fp8_act=fp8_act,
            max_batch_size=max_batch_size,
            max_seq_len=max_seq_len,
            all_logits=all_logits,
            dense=dense,
            workspace_mib=workspace_mib,
            timing_cache=timing_cache,
            embed_plugins=embed_plugins,
            mark_nodes=mark_node or (),
            progress=progress,
        )
    print(f"{out / ENGINE_FILE}: {manifest.engine_bytes:,} bytes, {manifest.describe()}")
    print(
        f"for TensorRT {manifest.tensorrt_version} and compute capability "
        f"{manifest.compute_capability} ({manifest.gpu}); up to {manifest.max_batch_size} rows of "
        f"{manifest.max_seq_len} tokens"
    )
    write_json(json, {"directory": str(out), **manifest.to_dict()})
