"""TensorRT over an engine directory."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinylm.config import ModelConfig
from tinylm.errors import ExportError
from tinylm_export.to_onnx import ExportInfo
from tinylm_export.trt_engine import TrtEngine

DECODE_PROFILE, PREFILL_PROFILE = 0, 1
_STATE_INPUTS = ("input_ids", "past_lens", "seq_lens")


@dataclasses.dataclass(frozen=True)
class EngineLimits:
    """The largest sizes that an engine was built for.

    Attributes:
        batch_size: Rows.
        capacity: Tokens of a row's cache.
        length: Tokens of a row in one step.
    """

    batch_size: int
    capacity: int
    length: int


class _Cache:
    """The device memory of one batch size and capacity, and the graphs of its decode step.

    Args:
        engine: TensorRT's engine.
        dtypes: PyTorch's types by tensor name.
        batch_size: B.
        capacity: C.
        in_place: Whether a step writes present.* over past.*, as plugins do. A dense engine can't:
            it reads one set of buffers and writes another, and they change places.
    """

    def __init__(
        self,
        engine: Any,
        dtypes: dict[str, torch.dtype],
        batch_size: int,
        capacity: int,
        *,
        in_place: bool,
    ) -> None:
        self.batch_size, self.capacity = batch_size, capacity
        self.lens_on_host = torch.zeros(batch_size, dtype=torch.int64)
        self.past_lens = torch.zeros(batch_size, dtype=torch.int32, device="cuda")
        self.seq_lens = torch.zeros_like(self.past_lens)
        self.next_ids = torch.zeros(batch_size, 1, dtype=torch.int64, device="cuda")
        shapes = {
            name: (batch_size, capacity, *tuple(engine.get_tensor_shape(name))[2:])
            for name in dtypes
            if name.startswith("past.")
        }
        self._sets = [
            {n: torch.zeros(s, dtype=dtypes[n], device="cuda") for n, s in shapes.items()}
            for _ in range(1 if in_place else 2)
        ]
        self.current = 0
        self.decode_outputs: dict[str, Tensor] = {}
        # By ``current``: a graph holds the addresses that it was captured with.
        self.warm: set[int] = set()
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.clear()

    @property
    def past(self) -> dict[str, Tensor]:
        """What the next step reads."""
        return self._sets[self.current]

    @property
    def present(self) -> dict[str, Tensor]:
        """What the next step writes."""
        return self._sets[-1 - self.current]

    @property
    def in_place(self) -> bool:
        """Whether both are the same buffers."""
        return len(self._sets) == 1

    def advance(self) -> None:
        """Let the next step read what the last one wrote."""
        self.current = (self.current + 1) % len(self._sets)

    def clear(self) -> None:
        """Make it empty; addresses and graphs stay."""
        self.current = 0
        self.lens_on_host.zero_()
        self.past_lens.zero_()
        for buffers in self._sets:
            for name, buffer in buffers.items():
                # Ones, not zeros: an empty slot then divides to 0 rather than to NaN.
                buffer.fill_(1 if name.endswith(".scale") else 0)


class TrtSession:
    """Cached steps of an engine; the same interface as the ONNX Runtime session.

    The cache lives in buffers that are inputs and outputs of the engine at once, so no step copies
    it; only a dense engine has two sets of them. A step of one token a row is captured into a CUDA
    graph when it is done the second time, and replayed from then on.

    Args:
        directory: What ``tinylm-export trt`` wrote.
        verify: Whether to compare the files with ``SHA256SUMS`` first.
        cuda_graph: Whether decode steps become a CUDA graph; the results are the same.

    Attributes:
        config: The model's, with max_seq_len no larger than the engine takes.
        info: How the ONNX model was exported.
        manifest: What was built, for which machine.
        limits: The largest sizes that the engine takes.
        kernels: What runs the layers, as a text for people.
        plugins: The plugin library that was loaded; None if the engine needs none beside it.
        all_logits: Whether steps give logits at every position.
        node_values: Values of marked nodes in the last step [B, S, width], by node name; empty for
            an engine without marked nodes.

    Raises:
        ExportError: No engine directory, altered files, an engine for another TensorRT version, GPU
            or plugin version, or no GPU.
        NativeError: The plugin library is not built.
    """

    def __init__(
        self, directory: str | Path, *, verify: bool = True, cuda_graph: bool = True
    ) -> None:
        self.directory = Path(directory)
        self._loaded = TrtEngine(self.directory, verify=verify)
        self.manifest = self._loaded.manifest
        self.plugins = self._loaded.plugins
        model = ModelConfig.load(self.directory / "config.json")
        self.info = ExportInfo.load(self.directory)
        self._engine = engine = self._loaded.engine
        trt = self._loaded.trt
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self._dtypes = {name: _torch_dtype(trt, engine.get_tensor_dtype(name)) for name in names}
        outputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT]
        self._extra_outputs = [n for n in outputs if not n.startswith("present.")]
        self._check_tensors(names, model.num_layers)
        self.limits = EngineLimits(
            batch_size=self._maximum("input_ids", 0),
            capacity=self._maximum(next(n for n in names if n.startswith("past.")), 1),
            length=self._maximum("input_ids", 1),
        )
        # The context is what the engine takes, which may be less than the model does.
        self.config = model.replace(max_seq_len=min(self.limits.capacity, model.max_seq_len))
        self.all_logits = len(engine.get_tensor_shape("logits")) == 3
        self.kernels = f"TensorRT {trt.__version__}, {self.manifest.describe()}"
        self.node_values: dict[str, Tensor] = {}
        self._cuda_graph = cuda_graph
        self._stream = torch.cuda.Stream()
        self._contexts = [self._make_context(p) for p in (DECODE_PROFILE, PREFILL_PROFILE)]
        self._cache: _Cache | None = None

    def start(self, batch_size: int, capacity: int) -> None:
        """Make an empty cache of ``capacity`` tokens for each of ``batch_size`` rows.

        Raises:
            ExportError: The engine was built for smaller sizes.
        """
        self._require("batch_size", batch_size, self.limits.batch_size, "--max-batch-size")
        self._require("capacity", capacity, self.limits.capacity, "--max-seq-len")
        cache = self._cache
        with self._on_stream():
            if cache is not None and (cache.batch_size, cache.capacity) == (batch_size, capacity):
                cache.clear()
                return
            self._cache = None  # its memory is free before the next is taken
            self._cache = cache = _Cache(
                self._engine,
                self._dtypes,
                batch_size,
                capacity,
                in_place=not self.manifest.dense,
            )
            for context in self._contexts:
                self._bind_shapes(context, cache)
                self._bind_cache(context, cache)

    def step(self, input_ids: Tensor, seq_lens: Tensor) -> Tensor:
        """Append tokens to the cache.

        Args:
            input_ids: int64 [B, S], right-padded.
            seq_lens: int64 [B], valid tokens of each row; 0 leaves a row as it is.

        Returns:
            float32 logits after each row's last token [B, V], on the CPU; at every position
            [B, S, V] if the engine was built with all logits.

        Raises:
            ValueError: The cache is full, or :meth:`start` was not called for this batch size.
            ExportError: More tokens in one step than the engine takes, or TensorRT failed.
        """
        cache = self._checked_cache(input_ids, seq_lens)
        length = input_ids.shape[1]
        with self._on_stream():
            cache.seq_lens.copy_(seq_lens)
            if length == 1:
                cache.next_ids.copy_(input_ids)
                outputs = self._decode(cache)
            else:
                ids = input_ids.to(device="cuda", dtype=torch.int64).contiguous()
                outputs = self._bind_step(self._contexts[PREFILL_PROFILE], ids)
                self._execute(self._contexts[PREFILL_PROFILE], cache)
            logits = outputs["logits"].cpu()
            self.node_values = {
                name.removesuffix(".y"): value.float().cpu()
                for name, value in outputs.items()
                if name != "logits"
            }
        cache.lens_on_host += seq_lens
        cache.advance()
        return logits

    def repeat_decode(self, num_steps: int) -> None:
        """Do steps of one token a row, each with the tokens of the last such step.

        Nothing goes to or comes from the host, and the caller's stream waits for the steps: for
        timing the engine alone, and for filling a cache.

        Raises:
            ValueError: The cache is full, or :meth:`start` was not called.
            ExportError: TensorRT failed.
        """
        cache = self._cache
        if cache is None:
            raise ValueError("there is no cache; call start() first.")
        self._check_room(cache, num_steps)
        with self._on_stream():
            cache.seq_lens.fill_(1)
            for _ in range(num_steps):
                self._decode(cache)
                cache.advance()
        cache.lens_on_host += num_steps

    def _decode(self, cache: _Cache) -> dict[str, Tensor]:
        """Do a step of one token a row; buffers and graph are made in the first two of them."""
        context, which = self._contexts[DECODE_PROFILE], cache.current
        if not cache.decode_outputs:
            cache.decode_outputs = self._bind_step(context, cache.next_ids)
        if which in cache.graphs:
            cache.graphs[which].replay()
        elif self._cuda_graph and which in cache.warm:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._execute(context, cache)
            cache.graphs[which] = graph
            graph.replay()  # capturing runs nothing
        else:
            self._execute(context, cache)
            cache.warm.add(which)
        return cache.decode_outputs

    def _execute(self, context: Any, cache: _Cache) -> None:
        """Run a step and count its tokens, both on the device."""
        if not cache.in_place:
            self._bind_cache(context, cache)
        if not context.execute_async_v3(self._stream.cuda_stream):
            raise ExportError(
                f"{self.directory}: TensorRT failed in a step: {self._loaded.logger.last()}."
            )
        cache.past_lens.add_(cache.seq_lens)

    def _bind_shapes(self, context: Any, cache: _Cache) -> None:
        for name, buffer in cache.past.items():
            context.set_input_shape(name, tuple(buffer.shape))
        for name, buffer in (("past_lens", cache.past_lens), ("seq_lens", cache.seq_lens)):
            context.set_input_shape(name, tuple(buffer.shape))
            context.set_tensor_address(name, buffer.data_ptr())

    def _bind_cache(self, context: Any, cache: _Cache) -> None:
        for name, buffer in cache.past.items():
            context.set_tensor_address(name, buffer.data_ptr())
            present = name.replace("past", "present", 1)
            context.set_tensor_address(present, cache.present[name].data_ptr())

    def _bind_step(self, context: Any, input_ids: Tensor) -> dict[str, Tensor]:
        """Bind the tokens and new buffers for what the step gives."""
        if not context.set_input_shape("input_ids", tuple(input_ids.shape)):
            raise ExportError(
                f"{self.directory}: TensorRT refuses input_ids of shape {tuple(input_ids.shape)}: "
                f"{self._loaded.logger.last()}."
            )
        context.set_tensor_address("input_ids", input_ids.data_ptr())
        outputs = {}
        for name in self._extra_outputs:
            try:
                shape = tuple(context.get_tensor_shape(name))
            except ValueError as error:  # TensorRT's dimensions of what it can't work out
                raise ExportError(
                    f"{self.directory}: TensorRT can't run {tuple(input_ids.shape)} tokens: "
                    f"{self._loaded.logger.last()}. Give it fewer rows or shorter ones."
                ) from error
            outputs[name] = torch.empty(shape, dtype=self._dtypes[name], device="cuda")
            context.set_tensor_address(name, outputs[name].data_ptr())
        return outputs

    def _make_context(self, profile: int) -> Any:
        trt, engine = self._loaded.trt, self._engine
        # Memory for this profile only: the static strategy takes the largest profile's twice.
        strategy = trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        context = engine.create_execution_context(strategy)
        if context is None or not context.set_optimization_profile_async(
            profile, self._stream.cuda_stream
        ):
            raise ExportError(
                f"{self.directory}: TensorRT can't make a context for profile {profile}: "
                f"{self._loaded.logger.last()}. Free GPU memory, or build for smaller sizes."
            )
        self._stream.synchronize()
        return context

    @contextlib.contextmanager
    def _on_stream(self) -> Iterator[None]:
        """Work on the session's stream, after and before the caller's work."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    def _checked_cache(self, input_ids: Tensor, seq_lens: Tensor) -> _Cache:
        cache = self._cache
        if cache is None or len(seq_lens) != cache.batch_size:
            raise ValueError(
                f"the cache has {0 if cache is None else cache.batch_size} rows and the input "
                f"{len(seq_lens)}; call start() with the batch size first."
            )
        length = input_ids.shape[1]
        if int(seq_lens.min()) < 0 or int(seq_lens.max()) > length:
            raise ValueError(
                f"seq_lens must be from 0 to the {length} columns of input_ids, found "
                f"{seq_lens.tolist()}."
            )
        self._check_room(cache, seq_lens)
        vocab_size = self.config.vocab_size
        if int(input_ids.min()) < 0 or int(input_ids.max()) >= vocab_size:
            raise ValueError(
                f"input_ids must be from 0 to below vocab_size {vocab_size}, found "
                f"{int(input_ids.min())} .. {int(input_ids.max())}."
            )
        self._require("length of a step", length, self.limits.length, "--max-seq-len")
        return cache

    def _check_room(self, cache: _Cache, new_tokens: Tensor | int) -> None:
        filled = int((cache.lens_on_host + new_tokens).max())
        if filled > cache.capacity:
            raise ValueError(
                f"the cache holds {cache.capacity} tokens a row and {filled} are needed. Start "
                "with a larger capacity or give fewer tokens."
            )

    def _require(self, what: str, value: int, maximum: int, option: str) -> None:
        if not 1 <= value <= maximum:
            raise ExportError(
                f"{self.directory}: {what} must be from 1 to {maximum}, as the engine was built, "
                f"found {value}. Build it with a larger {option}."
            )

    def _maximum(self, name: str, dimension: int) -> int:
        _, _, largest = self._engine.get_tensor_profile_shape(name, PREFILL_PROFILE)
        return int(tuple(largest)[dimension])

    def _check_tensors(self, names: list[str], num_layers: int) -> None:
        """Check that the engine is one of ours for the model of config.json."""
        past = {
            f"past.{layer}.{part}"
            for layer in range(num_layers)
            for part in ("latent", "scale", "rope")
        }
        if self.manifest.dense:  # its cache is of another kind
            past = {name for name in names if name.startswith("past.")} or past
        present = {name.replace("past", "present", 1) for name in past}
        expected = past | present | {*_STATE_INPUTS, "logits"}
        missing = sorted(expected - set(names))
        if missing or self._engine.num_optimization_profiles != 2:
            raise ExportError(
                f"{self.directory}: expected an engine with 2 profiles and {len(expected)} tensors "
                f"for config.json's {num_layers} layers, found "
                f"{self._engine.num_optimization_profiles} profiles and {len(names)} tensors "
                f"(missing: {', '.join(missing[:3]) or 'none'}). Build it again with "
                "`tinylm-export trt`."
            )


def _torch_dtype(trt: Any, dtype: Any) -> torch.dtype:
    """Return PyTorch's name of a TensorRT type."""
    types = {
        trt.float32: torch.float32,
        trt.float16: torch.float16,
        trt.bfloat16: torch.bfloat16,
        trt.int8: torch.int8,
        trt.int32: torch.int32,
        trt.int64: torch.int64,
    }
    return types[dtype]
