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
from export_helpers import op_model
from torch import Tensor

from tinylm_export.native import find_library

LIBRARY: Path | None = find_library()
needs_library = pytest.mark.skipif(
    LIBRARY is None,
    reason="NOT TESTED: the native library is not built; run `tinylm-export native build`",
)
# The kernels re-pack these when the session is made, so they must be initialisers.
CONSTANT_INPUTS = {
    "BitLinear": ("weight", "weight_scale", "norm_weight"),
    "FlashMLA": ("kv_norm_weight", "kv_b", "kv_b_scale"),
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
        tensors: The node's inputs.
        attributes: The node's attributes.
        variable: Weights to leave as graph inputs.
        bodies: Whether the model holds the op's function body too.
    """
    model = op_model(op, tensors, attributes)
    model.graph.node[0].name = NODE
    if not bodies:
        del model.functions[:]
    for name in CONSTANT_INPUTS[op]:
        if name in tensors and name not in variable:
            make_constant(model, name, tensors[name].numpy())
    return model


def make_constant(model: onnx.ModelProto, name: str, value: np.ndarray) -> None:
    """Turn a graph input into an initialiser."""
    inputs = [item for item in model.graph.input if item.name != name]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))


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
    function.restype = ctypes.c_int64
    return int(function(op.encode()))


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
