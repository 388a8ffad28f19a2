"""Runs a graph node by node in PyTorch: exported ones, and those that TensorRT gets.

TinyLM's ops are the PyTorch custom ops; weights that are packed for the GPU are unpacked first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from tinylm.packing import pack
from tinylm_export.gpu_packing import unpack_gpu
from tinylm_export.ops import DOMAIN, OPS
from tinylm_export.torch_ops import torch_op

_TORCH_TYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.BOOL: torch.bool,
}


def run_graph(model: ir.Model, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run a graph and return its outputs by name; every value's dtype is checked on the way."""
    graph = model.graph
    values: dict[str, Tensor] = {}
    for value in graph.inputs:
        values[str(value.name)] = feeds[str(value.name)]
        _check(value, feeds[str(value.name)])
    for name, value in graph.initializers.items():
        assert value.const_value is not None
        values[name] = _tensor(value.const_value)
    for node in graph:
        inputs = [None if v is None else values[str(v.name)] for v in node.inputs]
        attributes = {name: a.value for name, a in node.attributes.items()}
        run = _CUSTOM[node.op_type] if node.domain == DOMAIN else _STANDARD[node.op_type]
        results = run(inputs, attributes)
        for value, result in zip(node.outputs, results, strict=True):
            _check(value, result)
            values[str(value.name)] = result
    return {str(value.name): values[str(value.name)] for value in graph.outputs}


def _tensor(tensor: Any) -> Tensor:
    if tensor.dtype == ir.DataType.BFLOAT16:
        return torch.from_numpy(tensor.numpy().astype("float32")).bfloat16()
    return torch.from_numpy(tensor.numpy().copy())


def _check(value: ir.Value, found: Tensor) -> None:
    assert value.dtype is not None and found.dtype == _TORCH_TYPES[value.dtype], value
    assert value.shape is not None and len(value.shape) == found.ndim, value
    for declared, size in zip(value.shape, found.shape, strict=True):
        assert not isinstance(declared, int) or declared == size, (value, found.shape)


def _bit_linear(inputs: list[Any], attributes: dict[str, Any]) -> list[Tensor]:
    kwargs = {name: attributes[name] for name in OPS["BitLinear"].attribute_names()}
    if "has_norm" not in attributes:  # the op of the contract, or one on the way to the plugin's
        x, weight, scale, norm, residual = [*inputs, *[None] * 5][:5]
    else:
        x, weight, scale, *rest = inputs
        norm = rest.pop(0) if attributes["has_norm"] else None
        residual = rest.pop(0) if attributes["has_residual"] else None
        assert not rest
    if attributes.get("gated"):
        x = torch_op("SwiGLU")(*(half.contiguous() for half in x.chunk(2, dim=-1)))
    if weight.dtype == torch.int8:
        weight = _repack(weight, attributes["num_outputs"], attributes["num_inputs"])
    y = torch_op("BitLinear")(x, weight, scale, norm, **kwargs)
    return [y if residual is None else residual + y]


def _flash_mla(inputs: list[Any], attributes: dict[str, Any]) -> list[Tensor]:
    if "latent_rank" in attributes:  # the plugin's form
        qkv, norm, weight, *rest = inputs
        rank = attributes["latent_rank"]
        width = rank + attributes["rope_dim"]
        rows = attributes["num_heads"] * (attributes["nope_dim"] + attributes["value_dim"])
        if weight.dtype == torch.int8:
            weight = _repack(weight, rows, rank)
        q, kv = (part.contiguous() for part in qkv.split([qkv.shape[-1] - width, width], dim=-1))
        inputs = [q, kv, norm, weight, *rest]
    kwargs = {name: attributes[name] for name in OPS["FlashMLA"].attribute_names()}
    return list(torch_op("FlashMLA")(*inputs, **kwargs))


def _lm_head(inputs: list[Any], attributes: dict[str, Any]) -> list[Tensor]:
    x, table, norm, seq_lens = inputs
    assert x.dtype == table.dtype
    last = x[torch.arange(len(x)), (seq_lens.long() - 1).clamp_min(0)].float()
    rms = (last.square().mean(dim=-1, keepdim=True) + attributes["eps"]).sqrt()
    return [((last / rms * norm).to(x.dtype) @ table.t()).float()]


def _repack(weight: Tensor, rows: int, columns: int) -> Tensor:
    return pack(torch.from_numpy(unpack_gpu(weight.numpy(), rows, columns)))


def _gather_nd(inputs: list[Any], attributes: dict[str, Any]) -> list[Tensor]:
    data, indices = inputs
    assert attributes["batch_dims"] == 1 and indices.shape[-1] == 1
    index = indices[..., 0].reshape(len(data), -1)
    rows = torch.arange(len(data))[:, None]
    return [data[rows, index].reshape(*indices.shape[:-1], *data.shape[2:])]


def _gemm(inputs: list[Any], attributes: dict[str, Any]) -> list[Tensor]:
    assert attributes == {"transB": 1}
    return [inputs[0] @ inputs[1].t()]


def _split(inputs: list[Any], attributes: dict[str, Any]) -> list[Tensor]:
    return [part.contiguous() for part in inputs[0].split(inputs[1].tolist(), attributes["axis"])]


def _shape(inputs: list[Any], attributes: dict[str, Any]) -> list[Tensor]:
    shape = list(inputs[0].shape)
    return [torch.tensor(shape[attributes.get("start", 0) : attributes.get("end", len(shape))])]


def _unsqueeze(inputs: list[Any], attributes: dict[str, Any]) -> list[Tensor]:
    (axis,) = inputs[1].tolist()
    return [inputs[0].unsqueeze(axis)]


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Any:
    def run(inputs: list[Any], attributes: dict[str, Any]) -> list[Tensor]:
        assert inputs[0].dtype == inputs[1].dtype, "a strongly typed network promotes nothing"
        return [function(*inputs)]

    return run


_CUSTOM: dict[str, Any] = {
    "BitLinear": _bit_linear,
    "FlashMLA": _flash_mla,
    "LmHead": _lm_head,
    "SwiGLU": lambda inputs, _: [torch_op("SwiGLU")(*inputs)],
}
_STANDARD: dict[str, Any] = {
    "Add": _binary(torch.add),
    "Sub": _binary(torch.sub),
    "Mul": _binary(torch.mul),
    "Div": _binary(torch.div),
    "Max": _binary(torch.maximum),
    "Sqrt": lambda inputs, _: [inputs[0].sqrt()],
    "Cast": lambda inputs, a: [inputs[0].to(_TORCH_TYPES[ir.DataType(a["to"])])],
    "Concat": lambda inputs, a: [torch.cat(inputs, dim=a["axis"])],
    "Gather": lambda inputs, a: [inputs[0][inputs[1]]],
    "GatherND": _gather_nd,
    "Gemm": _gemm,
    "ReduceMean": lambda inputs, a: [inputs[0].mean(inputs[1].tolist(), keepdim=True)],
    "Reshape": lambda inputs, _: [inputs[0].reshape(inputs[1].tolist())],
    "Shape": _shape,
    "Split": _split,
    "Unsqueeze": _unsqueeze,
}
