"""Checks of the custom ops: by their function bodies, and by the native library."""

from __future__ import annotations

import torch
from torch import Tensor

from tinylm.bitlinear import PackedBitLinear
from tinylm.config import float32
from tinylm.errors import NativeError
from tinylm.norm import rms_norm
from tinylm.packing import pack
from tinylm_export.bit_linear_model import BitLinearWeights, bit_linear_model
from tinylm_export.doctor_check import Check, first_line
from tinylm_export.native import (
    BUILD_COMMAND,
    FOLDER_VARIABLE,
    ISA_VARIABLE,
    describe,
    find_library,
    kernel_calls,
)
from tinylm_export.ops import BIT_LINEAR
from tinylm_export.ort_session import import_onnxruntime, make_inference_session


def check_onnxruntime_runs() -> Check:
    """Run a BitLinear by its function body in ONNX Runtime, and compare it with PyTorch."""
    name, needed_for = "BitLinear in ONNX Runtime", "exported models without a custom-op library"
    import_onnxruntime()
    try:
        x, weights = _example()
        difference = float((_run(weights, x, native=False) - _in_pytorch(weights, x)).abs().max())
    except ImportError:
        raise
    except Exception as error:  # whatever a broken installation raises
        return Check(
            name=name,
            status="problem",
            found=first_line(error),
            needed_for=needed_for,
            command="pip install --upgrade --force-reinstall onnxruntime",
        )
    if difference == 0.0:
        found = "same result as PyTorch, bit for bit"
        return Check(name=name, status="ok", found=found, needed_for=needed_for)
    return Check(
        name=name,
        status="problem",
        found=f"differs from PyTorch by up to {difference:.3g}",
        needed_for=needed_for,
        command="pip install --upgrade torch onnxruntime",
    )


def check_native_ops() -> Check:
    """Load the native library into ONNX Runtime; its BitLinear must equal the function body's."""
    name, needed_for = "Native ops", "exported models at speed on the CPU"
    command = BUILD_COMMAND
    import_onnxruntime()
    try:
        if find_library() is None:
            return Check(
                name=name,
                status="optional",
                found="not built; the function bodies run instead, more slowly",
                needed_for=needed_for,
                command=command,
            )
        info = describe()
        x, weights = _example()
        before = kernel_calls(info, [BIT_LINEAR.name])
        y = _run(weights, x, native=True)
        called = kernel_calls(info, [BIT_LINEAR.name]) != before
        difference = float((y - _run(weights, x, native=False)).abs().max())
    except ImportError:
        raise
    except Exception as error:  # ours, or whatever a broken library raises
        problem = first_line(error)
        for variable in (FOLDER_VARIABLE, ISA_VARIABLE):
            if isinstance(error, NativeError) and f"Unset {variable}" in problem:
                command = f"unset {variable}"
    else:
        if called and difference == 0.0:
            found = f"{info.kernels}; same result as the function body, bit for bit; {info.path}"
            return Check(name=name, status="ok", found=found, needed_for=needed_for)
        problem = f"{info.path}: differs from the function body by up to {difference:.3g}"
        if not called:
            problem = f"{info.path}: loaded, but ONNX Runtime does not use it"
    return Check(name=name, status="problem", found=problem, needed_for=needed_for, command=command)


def _example() -> tuple[Tensor, BitLinearWeights]:
    """Return an input [6, K] and a layer."""
    generator = torch.Generator().manual_seed(0)
    num_inputs, num_outputs = 64, 32
    x = torch.randn(6, num_inputs, generator=generator)
    codes = torch.randint(-1, 2, (num_outputs, num_inputs), generator=generator)
    return x, BitLinearWeights(
        weight=pack(codes).numpy(),
        weight_scale=(torch.rand(num_outputs, generator=generator) + 0.5).numpy(),
        norm_weight=(torch.rand(num_inputs, generator=generator) + 0.5).numpy(),
        activation="int8",
        eps=float32(1e-5),
    )


def _run(weights: BitLinearWeights, x: Tensor, *, native: bool) -> Tensor:
    model = bit_linear_model(weights).SerializeToString()
    session = make_inference_session(model, num_threads=1, native=native)
    return torch.from_numpy(session.run(["y"], {"x": x.numpy()})[0])


def _in_pytorch(weights: BitLinearWeights, x: Tensor) -> Tensor:
    normed = rms_norm(x, torch.from_numpy(weights.norm_weight), weights.eps)
    layer = PackedBitLinear(
        torch.from_numpy(weights.weight), torch.from_numpy(weights.weight_scale)
    )
    return layer(normed)
