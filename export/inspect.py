"""What an exported directory holds: ops, sizes, bits per weight, ternary fractions per layer."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch

from tinylm.config import PACK_LANES, ModelConfig
from tinylm.errors import ExportError
from tinylm.latent_cache import LatentCache
from tinylm.packing import check_packed
from tinylm_export.ops import DOMAIN, OPS
from tinylm_export.to_onnx import DATA_FILE, ONNX_FILE, ExportInfo

if TYPE_CHECKING:
    from rich.console import RenderableType

# The inputs of each op that hold packed weights and their row scales.
_PACKED_INPUTS = {"BitLinear": ("weight", "weight_scale"), "FlashMLA": ("kv_b", "kv_b_scale")}
_INT8_HEAD = ("lm_head.weight", "lm_head.weight_scale")
_EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")
_SUFFIX = ".weight"
_HINT = "Export the checkpoint again with `tinylm-export onnx CKPT --out DIR`."

# How often each lane value 0..3 stands in each of the 256 bytes.
_LANES_OF_BYTE = np.array(
    [[sum((b >> s & 3) == value for s in (0, 2, 4, 6)) for value in range(4)] for b in range(256)]
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TernaryLayer:
    """The packed weight of one BitLinear.

    Attributes:
        name: Module path.
        num_rows: N, outputs.
        num_columns: K, inputs.
        weight_bytes: Bytes of the packed codes.
        scale_bytes: Bytes of the row scales.
        minus: Fraction of weights that are -1.
        zero: Fraction of weights that are 0.
        plus: Fraction of weights that are +1.
    """

    name: str
    num_rows: int
    num_columns: int
    weight_bytes: int
    scale_bytes: int
    minus: float
    zero: float
    plus: float

    @property
    def num_weights(self) -> int:
        """Number of ternary weights."""
        return self.num_rows * self.num_columns


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelReport:
    """What an exported directory holds.

    Attributes:
        directory: The directory.
        task: What the graph was exported for.
        activation: Number format of activations.
        op_counts: Nodes of the graph by op, custom ones with their domain; most frequent first.
        file_sizes: Bytes by file name.
        layers: Every BitLinear, in the graph's order.
        num_parameters: Parameters of the model, shared ones once.
        num_embedding_parameters: Those in the embedding and in a head of its own.
        embedding_bytes: Bytes of the same.
        cache_bytes_per_token: What one token takes in the latent cache, over all layers.
    """

    directory: str
    task: str
    activation: str
    op_counts: dict[str, int]
    file_sizes: dict[str, int]
    layers: tuple[TernaryLayer, ...]
    num_parameters: int
    num_embedding_parameters: int
    embedding_bytes: int
    cache_bytes_per_token: int

    @property
    def num_ternary_weights(self) -> int:
        """Ternary weights of all layers."""
        return sum(layer.num_weights for layer in self.layers)

    @property
    def bits_per_code(self) -> float:
        """Bits per ternary weight, codes only."""
        return 8 * sum(layer.weight_bytes for layer in self.layers) / self.num_ternary_weights

    @property
    def bits_per_ternary_weight(self) -> float:
        """Bits per ternary weight, codes and row scales."""
        num_bytes = sum(layer.weight_bytes + layer.scale_bytes for layer in self.layers)
        return 8 * num_bytes / self.num_ternary_weights

    @property
    def bits_per_ternary_weight_in_files(self) -> float:
        """Bits per ternary weight, counting everything in the ONNX files but the embeddings."""
        num_bytes = self.file_sizes[ONNX_FILE] + self.file_sizes.get(DATA_FILE, 0)
        return 8 * (num_bytes - self.embedding_bytes) / self.num_ternary_weights

    @property
    def zero_fraction(self) -> float:
        """Fraction of all ternary weights that are 0."""
        zeros = sum(layer.zero * layer.num_weights for layer in self.layers)
        return zeros / self.num_ternary_weights

    def to_dict(self) -> dict[str, Any]:
        """Return an object that JSON can hold."""
        derived = (
            "num_ternary_weights",
            "bits_per_code",
            "bits_per_ternary_weight",
            "bits_per_ternary_weight_in_files",
            "zero_fraction",
        )
        values = dataclasses.asdict(self)
        values["layers"] = list(values["layers"])
        return values | {name: getattr(self, name) for name in derived}


def inspect_onnx(directory: str | Path) -> ModelReport:
    """Read an exported directory; weights are mapped from the file, not loaded.

    Args:
        directory: What ``tinylm-export onnx`` wrote.

    Raises:
        ExportError: Not an exported directory, or its files are damaged.
        CheckpointError: Packed weights hold the invalid code 3; names tensor, row and column.
    """
    directory = Path(directory)
    info = ExportInfo.load(directory)
    config = ModelConfig.load(directory / "config.json")
    graph = _load(directory / ONNX_FILE).graph
    packed = {weight.name: (weight, scale) for weight, scale in _packed_weights(graph)}
    layers = tuple(_ternary_layer(weight, scale) for weight, scale in packed.values())
    if not layers:
        raise ExportError(
            f"{directory / ONNX_FILE}: expected {DOMAIN}::BitLinear nodes, found none. {_HINT}"
        )
    scales = {scale.name for _, scale in packed.values()}
    plain = [
        value.const_value
        for name, value in graph.initializers.items()
        if name not in packed
        and name not in scales
        and value.const_value is not None
        # 0-d constants and integers belong to the graph, not to the model.
        and value.const_value.dtype == ir.DataType.FLOAT
        and len(value.const_value.shape) > 0
    ]
    head = [
        value.const_value
        for name, value in graph.initializers.items()
        if info.lm_head == "int8" and name in _INT8_HEAD and value.const_value is not None
    ]
    plain = [tensor for tensor in plain if all(tensor is not t for t in head)]
    # A tied head's codes are the embedding's parameters a second time.
    own = [] if config.tie_embeddings else [t for t in head if t.name in _EMBEDDINGS]
    embeddings = [tensor for tensor in plain if tensor.name in _EMBEDDINGS]
    return ModelReport(
        directory=str(directory),
        task=info.task,
        activation=info.activation,
        op_counts=_op_counts(graph),
        file_sizes={p.name: p.stat().st_size for p in sorted(directory.iterdir()) if p.is_file()},
        layers=layers,
        num_parameters=sum(layer.num_weights for layer in layers)
        + sum(int(tensor.size) for tensor in [*plain, *own]),
        num_embedding_parameters=sum(int(tensor.size) for tensor in [*embeddings, *own]),
        embedding_bytes=sum(int(tensor.nbytes) for tensor in [*embeddings, *head]),
        cache_bytes_per_token=LatentCache(config, 1, 1, device="meta").num_bytes(),
    )


def _load(path: Path) -> ir.Model:
    try:
        return ir.load(path)
    except FileNotFoundError as error:
        raise ExportError(f"{path}: expected a file, found none. {_HINT}") from error
    except Exception as error:  # protobuf's and onnx_ir's errors share no base class
        raise ExportError(f"{path}: not a readable ONNX model ({error}). {_HINT}") from error


def _op_counts(graph: ir.Graph) -> dict[str, int]:
    counts = Counter(
        f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in graph
    )
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _packed_weights(graph: ir.Graph) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Yield the packed weight and the row scales of each node that has them."""
    for node in graph:
        if node.domain != DOMAIN or node.op_type not in _PACKED_INPUTS:
            continue
        names = [parameter.name for parameter in OPS[node.op_type].inputs]
        weight, scale = (node.inputs[names.index(name)] for name in _PACKED_INPUTS[node.op_type])
        for value in (weight, scale):
            if value is None or value.const_value is None:
                raise ExportError(
                    f"node {node.name!r}: expected its weights as constants of the graph, found a "
                    f"computed value. {_HINT}"
                )
        assert weight is not None and scale is not None
        yield weight, scale


def _ternary_layer(weight: ir.Value, scale: ir.Value) -> TernaryLayer:
    assert weight.name is not None and scale.const_value is not None
    array = _array(weight)
    counts = _count_bytes(weight.name, array) @ _LANES_OF_BYTE
    num_rows, num_bytes = array.shape
    minus, zero, plus = (counts[:3] / array.size / PACK_LANES).tolist()
    return TernaryLayer(
        name=weight.name.removesuffix(_SUFFIX),
        num_rows=num_rows,
        num_columns=num_bytes * PACK_LANES,
        weight_bytes=array.nbytes,
        scale_bytes=int(scale.const_value.nbytes),
        minus=minus,
        zero=zero,
        plus=plus,
    )


def _array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    try:
        return value.const_value.numpy()
    except (OSError, ValueError) as error:
        raise ExportError(
            f"{value.name}: its {value.const_value.nbytes} bytes can't be read from {DATA_FILE} "
            f"({error}); the file is missing or truncated. {_HINT}"
        ) from error


def _count_bytes(name: str, array: np.ndarray) -> np.ndarray:
    """Return how often each byte occurs [256], after a check that all are valid."""
    if array.dtype == np.uint8 and array.ndim == 2:
        counts = np.bincount(array.reshape(-1), minlength=256)
        if not counts[_LANES_OF_BYTE[:, 3] > 0].any():
            return counts
    check_packed(torch.from_numpy(np.array(array)), name)
    raise AssertionError(f"{name}: check_packed passed what the byte counts did not")


def render(report: ModelReport) -> RenderableType:
    """Return the report as rich tables."""
    from rich.console import Group
    from rich.table import Table

    summary = Table("", "", title=report.directory, show_header=False)
    megabyte = 1e6
    for label, value in {
        "task": report.task,
        "activation": report.activation,
        "parameters": f"{report.num_parameters:,}",
        "ternary weights": f"{report.num_ternary_weights:,}",
        "embedding": f"{report.num_embedding_parameters:,} parameters, "
        f"{report.embedding_bytes / megabyte:,.2f} MB",
        "bits a ternary weight": f"{report.bits_per_code:.3f} codes, "
        f"{report.bits_per_ternary_weight:.3f} with scales, "
        f"{report.bits_per_ternary_weight_in_files:.3f} all of the files but embeddings",
        "zeros": f"{report.zero_fraction:.1%}",
        "cache": f"{report.cache_bytes_per_token:,} bytes a token",
    }.items():
        summary.add_row(label, value)

    files = Table("file", "bytes", title="files")
    for name, size in report.file_sizes.items():
        files.add_row(name, f"{size:,}")
    ops = Table("op", "nodes", title="ops")
    for name, count in report.op_counts.items():
        ops.add_row(name, str(count))
    layers = Table("BitLinear", "outputs x inputs", "bytes", "-1", "0", "+1", title="layers")
    for layer in report.layers:
        layers.add_row(
            layer.name,
            f"{layer.num_rows} x {layer.num_columns}",
            f"{layer.weight_bytes + layer.scale_bytes:,}",
            *(f"{fraction:.1%}" for fraction in (layer.minus, layer.zero, layer.plus)),
        )
    layers.columns[0].no_wrap = True
    for table in (files, ops, layers):
        for column in table.columns[1:]:
            column.justify = "right"
    return Group(summary, files, ops, layers)
