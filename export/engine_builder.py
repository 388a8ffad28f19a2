"""From an ONNX file to a serialised engine, with TensorRT's Python bindings."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinylm.errors import ExportError
from tinylm.paths import cache_dir
from tinylm_export.trt_engine import load_plugins, make_logger

Progress = Callable[[str, float], None]
# By profile name: least, best and largest shape of every input.
Profiles = dict[str, dict[str, dict[str, list[int]]]]
DECODE, PREFILL = "decode", "prefill"
_BYTES_PER_MIB = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuilderSettings:
    """How TensorRT builds.

    Attributes:
        profiles: Optimisation profiles, in the engine's order.
        plugins: The plugin library; None for a graph without plugins.
        embed_plugins: Put the library into the engine.
        workspace_mib: Most scratch memory of a layer; None for all of the GPU's.
        timing_cache: File that keeps measured kernel times between builds.
    """

    profiles: Profiles
    plugins: Path | None
    embed_plugins: bool
    workspace_mib: int | None
    timing_cache: Path


def make_profiles(
    inputs: Mapping[str, Sequence[int | str]], *, max_batch_size: int, max_seq_len: int
) -> Profiles:
    """Make the profiles: one token a row, and any number up to ``max_seq_len``.

    Args:
        inputs: Shape of every input, dynamic dimensions as ``"batch"``, ``"length"`` and
            ``"capacity"``.
        max_batch_size: Most rows.
        max_seq_len: Longest step and largest cache.
    """
    profiles: Profiles = {}
    for profile, longest in ((DECODE, 1), (PREFILL, max_seq_len)):
        # One row is what most steps have; a cache is as large as can be from the start.
        ranges = {
            "batch": (1, 1, max_batch_size),
            "length": (1, longest, longest),
            "capacity": (1, max_seq_len, max_seq_len),
        }
        profiles[profile] = {
            name: {
                kind: [size if isinstance(size, int) else ranges[size][index] for size in shape]
                for index, kind in enumerate(("min", "opt", "max"))
            }
            for name, shape in inputs.items()
        }
    return profiles


def default_timing_cache(tensorrt_version: str, gpu: str) -> Path:
    """Return where kernel times of a TensorRT version and GPU are kept."""
    name = "".join(c if c.isalnum() else "-" for c in gpu)
    return cache_dir() / "tensorrt-timing" / f"{tensorrt_version}-{name}.cache"


def serialize_engine(
    trt: Any, onnx_file: Path, settings: BuilderSettings, progress: Progress | None = None
) -> Any:
    """Parse an ONNX file and build its engine as a strongly typed network.

    Args:
        trt: The module.
        onnx_file: The graph, its weights beside it.
        settings: How to build.
        progress: Called with what is done and how much of it.

    Returns:
        The engine's bytes, in TensorRT's memory (the buffer protocol).

    Raises:
        ExportError: The parser or the builder failed; holds its message and node.
    """
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    if settings.plugins is not None:
        load_plugins(trt, settings.plugins, logger)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_file)):
        raise ExportError(_parser_message(trt, parser, logger))
    config = _make_config(trt, builder, settings, logger)
    monitor = _make_monitor(trt, progress)
    config.progress_monitor = monitor
    cache = _load_timing_cache(config, settings.timing_cache, logger)
    engine = builder.build_serialized_network(network, config)
    if monitor.interrupted:
        raise KeyboardInterrupt
    if engine is None:
        raise ExportError(
            f"TensorRT {trt.__version__} can't build the engine: {logger.last()}. If memory is "
            "what is missing, build with a smaller --max-batch-size, --max-seq-len or "
            "--workspace-mib."
        )
    _save_timing_cache(cache, settings.timing_cache)
    return engine


def _parser_message(trt: Any, parser: Any, logger: Any) -> str:
    reasons = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        reasons.append(f"node {error.node_name()!r} ({error.node_operator()}): {error.desc()}")
    return (
        f"TensorRT {trt.__version__} can't parse the graph: {'; '.join(reasons) or 'no reason'}. "
        f"Its log says: {logger.last()}."
    )


def _make_config(trt: Any, builder: Any, settings: BuilderSettings, logger: Any) -> Any:
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32
    if settings.workspace_mib is not None:
        size = settings.workspace_mib * _BYTES_PER_MIB
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, size)
    if settings.plugins is not None:
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
        if settings.embed_plugins:
            config.plugins_to_serialize = [str(settings.plugins)]
    for name, shapes in settings.profiles.items():
        profile = builder.create_optimization_profile()
        for tensor, shape in shapes.items():
            profile.set_shape(tensor, shape["min"], shape["opt"], shape["max"])
        if config.add_optimization_profile(profile) < 0:
            raise ExportError(
                f"TensorRT {trt.__version__} refuses the profile {name!r}: {logger.last()}."
            )
    return config


def _make_monitor(trt: Any, progress: Progress | None) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Passes the builder's progress on, and stops it on Ctrl-C."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted = False
            self._num_steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            """Take note of a phase."""
            self._num_steps[phase_name] = max(num_steps, 1)
            self._tell(phase_name, 0.0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            """Take note of a step; False stops the builder."""
            self._tell(phase_name, (step + 1) / self._num_steps.get(phase_name, step + 1))
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            """Take note of a phase's end."""
            self._tell(phase_name, 1.0)

        def _tell(self, phase_name: str, fraction: float) -> None:
            try:
                if progress is not None:
                    progress(phase_name, min(fraction, 1.0))
            except KeyboardInterrupt:  # must not pass through the builder
                self.interrupted = True

    return Monitor()


def _load_timing_cache(config: Any, path: Path, logger: Any) -> Any:
    """Give the builder the kernel times of earlier builds; one that doesn't fit starts anew."""
    held = b""
    if path.is_file():
        try:
            held = path.read_bytes()
        except OSError as error:
            warnings.warn(f"{path}: can't be read ({error}); kernels are timed anew.", stacklevel=2)
    cache = config.create_timing_cache(held)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        warnings.warn(
            f"{path}: not a timing cache for this TensorRT and GPU ({logger.last()}); kernels are "
            "timed anew and the file is replaced.",
            stacklevel=2,
        )
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _save_timing_cache(cache: Any, path: Path) -> None:
    """Keep kernel times; a build that can't is slower next time, no worse."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        with os.fdopen(handle, "wb") as file:
            file.write(cache.serialize())
        Path(name).replace(path)
    except OSError as error:
        warnings.warn(
            f"{path}: kernel times can't be kept ({error}); the next build measures them again.",
            stacklevel=2,
        )
