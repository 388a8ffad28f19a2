"""Compares BitLinear's integer sums with NumPy's: ``python native_accumulators.py LIBRARY COUNT``.

Integers of magnitude 127 at most, with 127 among them, are their own quantised values (s = 1); with
weight scales of 1 the output is the sum itself, which float32 holds up to 2**24.
"""

from __future__ import annotations

import sys

import numpy as np
import onnx
import onnxruntime as ort


def make_model(codes: np.ndarray) -> onnx.ModelProto:
    """Make a BitLinear without norm around ternary codes [N, K]."""
    lanes = (codes + 1).astype(np.uint8).reshape(len(codes), -1, 4)
    packed = lanes[..., 0] | lanes[..., 1] << 2 | lanes[..., 2] << 4 | lanes[..., 3] << 6
    real = onnx.TensorProto.FLOAT
    node = onnx.helper.make_node("BitLinear", ["x", "w", "s"], ["y"], name="n", domain="tinylm")
    graph = onnx.helper.make_graph(
        [node],
        "sums",
        [onnx.helper.make_tensor_value_info("x", real, [None, codes.shape[1]])],
        [onnx.helper.make_tensor_value_info("y", real, [None, codes.shape[0]])],
        [
            onnx.numpy_helper.from_array(packed, "w"),
            onnx.numpy_helper.from_array(np.ones(len(codes), np.float32), "s"),
        ],
    )
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("tinylm", 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)


def draw_rows(random: np.random.Generator, rows: int, width: int) -> np.ndarray:
    """Draw int64 [rows, width] in -127 .. 127, each row with 127 or -127 in it."""
    x = random.integers(-127, 128, (rows, width))
    for row in x:
        kind = random.integers(0, 8)
        if kind == 0:
            row[:] = -127
        elif kind == 1:
            row[:] = 127
        elif kind == 2:
            row[:] = np.where(np.arange(width) % 2, 127, -127)
        row[random.integers(width)] = random.choice([-127, 127])
    return x


def main(library: str, count: int) -> None:
    """Compare ``count`` random shapes, and stop at the first that differs."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.register_custom_ops_library(library)
    random = np.random.default_rng(0)
    for number in range(count):
        rows, outputs = random.integers(0, 40), random.integers(1, 131)
        width = 4 * random.integers(1, 130)
        codes = random.integers(-1, 2, (outputs, width))
        x = draw_rows(random, rows, width)
        session = ort.InferenceSession(
            make_model(codes).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        found = session.run(None, {"x": x.astype(np.float32)})[0]
        if not np.array_equal(found, x @ codes.T):
            sys.exit(f"shape {number}: {rows} rows, {width} inputs, {outputs} outputs differ")
    print(f"{count} shapes equal")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
