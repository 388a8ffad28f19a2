"""Single-op models for the native library: constant weights, no function body unless asked for."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from export_helpers import MLA_CASES, bit_linear_inputs, op_model
from torch import Tensor

from tinylm_export.native import find_library
from tinylm_export.ops import DOMAIN, IR_VERSION, OPSET, VERSION

LIBRARY: Path | None = find_library()
needs_library = pytest.mark.skipif(
    LIBRARY is None,
    reason="NOT TESTED: the native library is not built; run `tinylm-export native build`",
)
# The kernels re-pack these when the session is made, so they must be initialisers.
CONSTANT_INPUTS = {
    "BitLinear": ("weight", "weight_scale", "norm_weight"),
    "FlashMLA": ("kv_norm_weight", "kv_b", "kv_b_scale"),
    "Int8Linear": ("weight", "weight_scale", "norm_weight"),
    "SwiGLU": (),
}
NODE = "layer.3"  # what error messages must name


def native_model(
    op: str,
    tensors: Mapping[str, Tensor],
    attributes: Mapping[str, Any],
    *,
    variable: tuple[str, ...] = (),
    bodies: bool = False,
) -> onnx.ModelProto:
    """Make a model of one node whose weights are initialisers.

    Args:
        op: Name in the contract.
        tensors: The node's inputs, of any type.
        attributes: The node's attributes, of any value.
        variable: Weights to leave as graph inputs.
        bodies: Whether the model holds the op's function body too.
    """
    constant = [name for name in CONSTANT_INPUTS[op] if name in tensors and name not in variable]
    outputs = ["y"]
    if op == "FlashMLA":
        outputs += [f"present_{part}" for part in ("latent", "scale", "rope")]
    sources = [
        name.replace("present", "past") if name != "y" else next(iter(tensors)) for name in outputs
    ]
    node = onnx.helper.make_node(op, list(tensors), outputs, name=NODE, domain=DOMAIN, **attributes)
    graph = onnx.helper.make_graph(
        [node],
        "one_op",
        [value_info(name, t) for name, t in tensors.items() if name not in constant],
        [value_info(name, tensors[source]) for name, source in zip(outputs, sources, strict=True)],
        [onnx.numpy_helper.from_array(tensors[name].numpy(), name) for name in constant],
    )
    versions = [("", OPSET), (DOMAIN, VERSION)]
    return onnx.helper.make_model(
        graph,
        functions=op_model(op, tensors, attributes).functions if bodies else [],
        opset_imports=[onnx.helper.make_opsetid(*version) for version in versions],
        ir_version=IR_VERSION,
    )


def value_info(name: str, tensor: Tensor) -> onnx.ValueInfoProto:
    """Declare a graph input or output of a tensor's type and rank."""
    element_type = onnx.helper.np_dtype_to_tensor_dtype(tensor.numpy().dtype)
    return onnx.helper.make_tensor_value_info(name, element_type, [None] * tensor.ndim)


def native_session(model: onnx.ModelProto, *, num_threads: int = 1) -> Any:
    """Make a session with the library registered."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = num_threads
    options.register_custom_ops_library(str(LIBRARY))
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def feeds(model: onnx.ModelProto, tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Return the tensors that are graph inputs."""
    names = {item.name for item in model.graph.input}
    return {name: t.numpy() for name, t in tensors.items() if name in names}


def run_native(
    op: str, tensors: Mapping[str, Tensor], *, num_threads: int = 1, **attributes: Any
) -> list[Tensor]:
    """Run one op by its kernel; fail if the kernel was not called."""
    model = native_model(op, tensors, attributes)
    session = native_session(model, num_threads=num_threads)
    before = kernel_calls(op)
    found = session.run(None, feeds(model, tensors))
    assert kernel_calls(op) == before + 1
    return [torch.from_numpy(array) for array in found]


def kernel_calls(op: str) -> int:
    """Return how often an op's kernel ran in this process."""
    function = ctypes.CDLL(str(LIBRARY)).tinylm_kernel_calls
    function.argtypes = [ctypes.c_char_p]
    function.restype = ctypes.c_uint64
    return int(function(op.encode()))


def op_specs() -> dict[str, list[tuple[str, ...]]]:
    """Return the library's own tables: for each op its inputs, outputs and attributes in order."""
    function = ctypes.CDLL(str(LIBRARY)).tinylm_op_specs
    function.restype = ctypes.c_char_p
    specs: dict[str, list[tuple[str, ...]]] = {}
    for line in function().decode().splitlines():
        kind, name, *rest = line.strip().split("\t")
        if kind == "op":
            lines = specs[name] = []
        else:
            lines.append((kind, name, *rest))
    return specs


def example(op: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inputs and attributes that an op accepts."""
    if op == "FlashMLA":
        return MLA_CASES["chunk"].inputs(), MLA_CASES["chunk"].attributes
    g = torch.Generator().manual_seed(0)
    if op == "SwiGLU":
        return {name: torch.randn(2, 5, generator=g) for name in ("gate", "up")}, {}
    tensors = bit_linear_inputs(0)
    if op == "BitLinear":
        return tensors, {"activation": "int8", "eps": 1e-5}
    tensors["weight"] = torch.randint(-127, 128, (24, 32), generator=g, dtype=torch.int8)
    return tensors, {"eps": 1e-5}


def native_error(
    op: str,
    tensors: Mapping[str, Tensor],
    attributes: Mapping[str, Any],
    *,
    variable: tuple[str, ...] = (),
) -> str:
    """Return the message with which a session refuses the node, when made or when run."""
    model = native_model(op, tensors, attributes, variable=variable)
    return session_error(model, tensors)


def session_error(model: onnx.ModelProto, tensors: Mapping[str, Tensor]) -> str:
    """Return the message with which ONNX Runtime refuses a model or its inputs."""
    with pytest.raises(Exception) as error:  # its exceptions share no public base class
        native_session(model).run(None, feeds(model, tensors))
    return str(error.value)
