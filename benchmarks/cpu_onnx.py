"""Single-op ONNX models, and sessions that run them with as little around them as can be.

All sessions of a process share one pool of threads: a rotation over dozens of sessions with pools
of their own would time how their idle threads wait.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from bench_records import NotRunError

from tinylm_export.function_bodies import function_bodies
from tinylm_export.ops import DOMAIN, IR_VERSION, OPSET, VERSION

Array = np.ndarray[Any, Any]
MICROSOFT = "com.microsoft"


def share_threads(num_threads: int) -> None:
    """Size the pool that every later session of this process uses; call it first."""
    ort.set_global_thread_pool_sizes(num_threads, 1)


def native_library() -> Path:
    """Return TinyLM's library of native kernels.

    Raises:
        NotRunError: It is not built.
    """
    try:
        from tinylm_export import native
    except ImportError as error:
        raise NotRunError("native library not found: no module tinylm_export.native") from error
    found = native.find_library()
    if found is None:
        raise NotRunError("native library not found; make native")
    return Path(found)


def op_model(
    op: str,
    domain: str,
    *,
    names: Sequence[str],
    inputs: Mapping[str, Array],
    constants: Mapping[str, Array],
    outputs: Mapping[str, Array],
    attributes: Mapping[str, Any],
) -> bytes:
    """Make a model of one node.

    Args:
        op: Its type.
        domain: Its domain; nodes of TinyLM's bring their function body along.
        names: Its inputs in order, ``""`` for one that is left out.
        inputs: Arrays like those it will be fed, by name.
        constants: Its constant inputs.
        outputs: Arrays like those it will give, in order.
        attributes: Its attributes.
    """
    node = onnx.helper.make_node(op, names, list(outputs), name=op, domain=domain, **attributes)
    graph = onnx.helper.make_graph(
        [node],
        "one_op",
        [_value_info(name, array) for name, array in inputs.items()],
        [_value_info(name, array) for name, array in outputs.items()],
        initializer=[onnx.numpy_helper.from_array(a, name) for name, a in constants.items()],
    )
    versions = {"": OPSET, DOMAIN: VERSION} if domain == DOMAIN else {"": OPSET}
    if domain == MICROSOFT:
        versions[MICROSOFT] = 1
    bodies = function_bodies("int8") if domain == DOMAIN else []
    model = onnx.helper.make_model(
        graph,
        functions=[body for body in bodies if body.name == op],
        opset_imports=[onnx.helper.make_opsetid(*item) for item in versions.items()],
        ir_version=IR_VERSION,
    )
    return model.SerializeToString()


def _value_info(name: str, array: Array) -> onnx.ValueInfoProto:
    element_type = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    return onnx.helper.make_tensor_value_info(name, element_type, [None] * array.ndim)


def make_session(model: bytes, *, native: Path | None = None) -> ort.InferenceSession:
    """Make a session over the shared threads.

    Raises:
        NotRunError: ONNX Runtime refuses the model; holds its reason.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.use_per_session_threads = False
    try:
        if native is not None:
            options.register_custom_ops_library(str(native))
        return ort.InferenceSession(
            model,
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["MatmulTransposeFusion"],  # as tinylm_export.ort_session does
        )
    except Exception as error:  # pybind exceptions of onnxruntime share no public base class
        raise NotRunError(f"ONNX Runtime {ort.__version__}: {str(error)[:200]}") from error


class Bound:
    """One session with its inputs and outputs in place.

    Args:
        session: The session.
        inputs: What it reads.
        outputs: What it writes; a name of an input shares that input's memory.

    Attributes:
        run: Runs the session.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        inputs: Mapping[str, ort.OrtValue],
        outputs: Mapping[str, ort.OrtValue],
    ) -> None:
        binding = session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        # A binding borrows memory; these own it.
        self._values = [*inputs.values(), *outputs.values()]
        self.run: Callable[[], object] = functools.partial(session.run_with_iobinding, binding)


def value(array: Array) -> ort.OrtValue:
    """Copy an array into memory of ONNX Runtime."""
    return ort.OrtValue.ortvalue_from_numpy(array)
