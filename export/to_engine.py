"""ONNX directory -> TensorRT engine directory.

model.engine  manifest.json  config.json  tokenizer files  export.json  SHA256SUMS
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

import tinylm
from tinylm.checkpoint import CONFIG_FILE
from tinylm.config import ModelConfig
from tinylm.directory import SUMS_FILE, check_sums, sha256, write_checksums, written_whole
from tinylm.errors import ExportError
from tinylm_export.engine_builder import (
    BuilderSettings,
    Profiles,
    Progress,
    default_timing_cache,
    make_profiles,
    serialize_engine,
)
from tinylm_export.manifest import MANIFEST_FILE, EngineMachine, EngineManifest, current_machine
from tinylm_export.passes.cast_graph import DTYPES
from tinylm_export.passes.mark_outputs import mark_outputs
from tinylm_export.to_onnx import DATA_FILE, ONNX_FILE, ExportInfo
from tinylm_export.trt_engine import ENGINE_FILE, import_tensorrt
from tinylm_export.trt_graph import dense_graph, plugin_graph

DEFAULT_MAX_BATCH_SIZE = 8
_HINT = "Export the checkpoint again with `tinylm-export onnx CKPT --out DIR`."


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What engine is to be built.

    Attributes:
        dtype: Type of activations: ``"bf16"``, ``"fp16"`` or ``"fp32"``.
        fp8_act: Quantise the BitLinears' activations to fp8_e4m3.
        max_batch_size: Most rows.
        max_seq_len: Longest step and largest cache; None for the model's context.
        all_logits: Give logits at every position.
        dense: Ordinary weights without plugins, to compare with.
        workspace_mib: Most scratch memory of a layer; None for all of the GPU's.
        timing_cache: File that keeps measured kernel times; None for one in TinyLM's cache.
        embed_plugins: Put the plugin library into the engine.
        mark_nodes: Nodes whose first outputs are outputs of the engine too.

    Raises:
        ExportError: A value is out of range, or two don't go together.
    """

    dtype: str = "bf16"
    fp8_act: bool = False
    max_batch_size: int = DEFAULT_MAX_BATCH_SIZE
    max_seq_len: int | None = None
    all_logits: bool = False
    dense: bool = False
    workspace_mib: int | None = None
    timing_cache: Path | None = None
    embed_plugins: bool = False
    mark_nodes: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ExportError(f"dtype must be one of {', '.join(DTYPES)}, found {self.dtype!r}.")
        for name in ("max_batch_size", "max_seq_len", "workspace_mib"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ExportError(f"{name} must be at least 1, found {value}.")
        for name in ("fp8_act", "embed_plugins"):
            if self.dense and getattr(self, name):
                raise ExportError(
                    f"dense and {name} don't go together: a dense engine has ordinary weights and "
                    "no plugins. Leave one out."
                )


def build_engine(
    onnx_dir: str | Path,
    out_dir: str | Path,
    *,
    dtype: str = "bf16",
    fp8_act: bool = False,
    max_batch_size: int = DEFAULT_MAX_BATCH_SIZE,
    max_seq_len: int | None = None,
    all_logits: bool = False,
    dense: bool = False,
    workspace_mib: int | None = None,
    timing_cache: str | Path | None = None,
    embed_plugins: bool = False,
    mark_nodes: Sequence[str] = (),
    progress: Progress | None = None,
) -> EngineManifest:
    """Build the engine of an exported model for this machine's GPU.

    The directory is written whole or not at all; an earlier engine of the same name is replaced.

    Args:
        onnx_dir: What ``tinylm-export onnx`` wrote, with the latent cache.
        out_dir: The engine directory.
        dtype: See :class:`EngineOptions`, as for the others.
        fp8_act: Quantise activations to fp8_e4m3.
        max_batch_size: Most rows.
        max_seq_len: Longest step and largest cache.
        all_logits: Logits at every position.
        dense: Ordinary weights, no plugins.
        workspace_mib: Most scratch memory of a layer.
        timing_cache: File of measured kernel times.
        embed_plugins: Put the plugin library into the engine.
        mark_nodes: Nodes of the engine's graph to look into, such as ``"layers.0.self_attn"``.
        progress: Called with what is done and how much of it.

    Returns:
        What ``manifest.json`` holds.

    Raises:
        ExportError: Bad options, no TensorRT or GPU, a damaged directory, or TensorRT's failure.
        NativeError: The plugin library is not built.
    """
    options = EngineOptions(
        dtype=dtype,
        fp8_act=fp8_act,
        max_batch_size=max_batch_size,
        max_seq_len=max_seq_len,
        all_logits=all_logits,
        dense=dense,
        workspace_mib=workspace_mib,
        timing_cache=None if timing_cache is None else Path(timing_cache),
        embed_plugins=embed_plugins,
        mark_nodes=tuple(mark_nodes),
    )
    source, out = Path(onnx_dir), Path(out_dir)
    ExportInfo.load(source)
    sums = check_sums(
        source, required=(ONNX_FILE, DATA_FILE, CONFIG_FILE), error=ExportError, hint=_HINT
    )
    config = ModelConfig.load(source / CONFIG_FILE)
    longest = _longest(options, config)
    machine = current_machine(plugins=not dense)
    model, activation = engine_graph(ir.load(source / ONNX_FILE), options, config)
    profiles = make_profiles(
        _input_shapes(model), max_batch_size=max_batch_size, max_seq_len=longest
    )
    with written_whole(out, marker=MANIFEST_FILE, error=ExportError) as temporary:
        _write_engine(model, temporary / ENGINE_FILE, options, profiles, machine, progress)
        _copy_files(source, temporary)
        if activation in ("int8", "fp8_e4m3"):
            config = config.replace(activation=activation)
        config.save(temporary / CONFIG_FILE)
        manifest = EngineManifest(
            tinylm_version=tinylm.__version__,
            **dataclasses.asdict(machine),
            embedded_plugins=embed_plugins,
            dense=dense,
            dtype=dtype,
            activation=activation,
            all_logits=_rank_of_logits(model) == 3,
            max_batch_size=max_batch_size,
            max_seq_len=longest,
            profiles=profiles,
            marked_nodes=list(mark_nodes),
            onnx_sha256=sums[ONNX_FILE],
            onnx_data_sha256=sums[DATA_FILE],
            engine_sha256=sha256(temporary / ENGINE_FILE),
            engine_bytes=(temporary / ENGINE_FILE).stat().st_size,
        )
        manifest.save(temporary)
        write_checksums(temporary)
    return manifest


def engine_graph(
    model: ir.Model, options: EngineOptions, config: ModelConfig
) -> tuple[ir.Model, str]:
    """Rewrite an exported model to what TensorRT parses, in place.

    Returns:
        The model, and the number format that its BitLinears quantise activations to (``"none"``
        for a dense one).

    Raises:
        ExportError: The graph is not as it was exported, or has no node of ``mark_nodes``.
    """
    if options.dense:
        model = dense_graph(model, config, dtype=options.dtype, all_logits=options.all_logits)
        activation = "none"
    else:
        model = plugin_graph(
            model, dtype=options.dtype, fp8_act=options.fp8_act, all_logits=options.all_logits
        )
        activation = "fp8_e4m3" if options.fp8_act else config.activation
    mark_outputs(model, options.mark_nodes)
    return model, activation


def _longest(options: EngineOptions, config: ModelConfig) -> int:
    """Return the longest sequence of the engine."""
    if options.max_seq_len is None:
        return config.max_seq_len
    if options.max_seq_len > config.max_seq_len:
        raise ExportError(
            f"max_seq_len must be at most the model's context of {config.max_seq_len} tokens, "
            f"found {options.max_seq_len}. Give a smaller --max-seq-len, or none."
        )
    return options.max_seq_len


def _input_shapes(model: ir.Model) -> dict[str, list[int | str]]:
    """Return every input's shape; dynamic dimensions by name."""
    shapes: dict[str, list[int | str]] = {}
    for value in model.graph.inputs:
        assert value.name is not None and value.shape is not None
        shapes[value.name] = [
            size if isinstance(size, int) else str(size.value) for size in value.shape
        ]
    return shapes


def _rank_of_logits(model: ir.Model) -> int:
    shape = model.graph.outputs[0].shape
    assert shape is not None
    return len(shape)


def _write_engine(
    model: ir.Model,
    path: Path,
    options: EngineOptions,
    profiles: Profiles,
    machine: EngineMachine,
    progress: Progress | None,
) -> None:
    plugins = None
    if not options.dense:
        from tinylm_export.native_gpu import plugin_library

        plugins = plugin_library()
    settings = BuilderSettings(
        profiles=profiles,
        plugins=plugins,
        embed_plugins=options.embed_plugins,
        workspace_mib=options.workspace_mib,
        timing_cache=options.timing_cache
        or default_timing_cache(machine.tensorrt_version, machine.gpu),
    )
    with tempfile.TemporaryDirectory(dir=path.parent.parent, prefix=".tmp-graph-") as scratch:
        # A file, because the weights of a large model exceed what one message may hold.
        ir.save(model, Path(scratch, ONNX_FILE), external_data=DATA_FILE)
        engine = serialize_engine(import_tensorrt(), Path(scratch, ONNX_FILE), settings, progress)
        path.write_bytes(engine)


def _copy_files(source: Path, target: Path) -> None:
    """Copy the tokenizer and ``export.json``."""
    own = {ONNX_FILE, DATA_FILE, CONFIG_FILE, SUMS_FILE}
    for path in sorted(source.iterdir()):
        if path.name not in own and path.is_file():
            shutil.copy2(path, target / path.name)
