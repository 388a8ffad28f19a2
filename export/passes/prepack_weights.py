"""Pack ternary weights in the order in which the CUDA kernels read them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from tinylm.packing import check_packed, unpack
from tinylm_export.gpu_packing import pack_gpu
from tinylm_export.passes.rewrite import (
    Rewrites,
    add_initializer,
    array_of,
    drop_unused,
    nodes_of,
)

# Where the packed weight stands: in BitLinear, and in FlashMLA on the fused projection.
_WEIGHTS = {"BitLinear": 1, "FlashMLA": 2}


def prepack_weights(model: ir.Model) -> Rewrites:
    """Replace uint8 weights [N, K/4] by what :func:`pack_gpu` makes of them, in place.

    BitLinear gets ``num_inputs`` and ``num_outputs``, which the bytes don't tell. A weight that is
    packed for the GPU already is refused.

    Raises:
        CheckpointError: A byte holds the invalid code 3.
    """
    graph, done = model.graph, Rewrites()
    packed: dict[str, ir.Value] = {}  # two nodes may share a weight
    for op, index in _WEIGHTS.items():
        for node in nodes_of(graph, op):
            weight = array_of(node.inputs[index], node)
            name = str(node.inputs[index].name)  # type: ignore[union-attr]
            if weight.dtype != np.uint8 or weight.ndim != 2:
                done.refused[str(node.name)] = (
                    f"{name} is {weight.dtype} {list(weight.shape)}, not uint8 [N, K/4]"
                )
                continue
            tensor = torch.from_numpy(np.array(weight))  # a copy: the file is mapped read-only
            check_packed(tensor, name)
            codes = unpack(tensor)  # [N, K]
            if name not in packed:
                packed[name] = add_initializer(graph, f"{name}_gpu", pack_gpu(codes.numpy()))
            node.replace_input_with(index, packed[name])
            if op == "BitLinear":
                for attribute, size in zip(("num_outputs", "num_inputs"), codes.shape, strict=True):
                    node.attributes[attribute] = ir.AttrInt64(attribute, size)
            done.matched.append(str(node.name))
    drop_unused(graph)
    return done
