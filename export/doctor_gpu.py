"""Checks of what TensorRT engines are built and run with."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable

from tinylm.errors import NativeError
from tinylm_export import gpu_sdk, native_gpu
from tinylm_export.doctor_check import Check, first_line
from tinylm_export.doctor_native import optional_module

_BUILDING = "building TensorRT's plugins"
_RUNNING = "TensorRT engines on an NVIDIA GPU"


def check_bindings() -> Check:
    """Import TensorRT's Python bindings, which two packages give under two names."""
    with contextlib.suppress(NativeError):  # check_libraries says it
        gpu_sdk.load_tensorrt()  # bindings without libraries of their own find these then
    names = ("tensorrt", "tensorrt_bindings")
    module = next(filter(importlib.util.find_spec, names), names[0])
    return optional_module(
        "TensorRT",
        module=module,
        needed_for=_RUNNING,
        command="pip install 'tinylm[tensorrt]'  # or: tinylm-export native sdk",
    )


def check_libraries() -> Check:
    """Load TensorRT's libraries."""

    def look() -> str | None:
        folder = gpu_sdk.find_libraries()
        return f"TensorRT {gpu_sdk.load_tensorrt(folder)}, {folder}" if folder else None

    return _check("TensorRT libraries", look, needed_for=_RUNNING)


def check_headers() -> Check:
    """Look for TensorRT's C++ headers, which must fit its libraries."""

    def look() -> str | None:
        headers = gpu_sdk.find_sdk().headers
        if headers is None:
            return None
        return f"TensorRT {'.'.join(map(str, gpu_sdk.header_version(headers)))}, {headers}"

    return _check("TensorRT headers", look, needed_for=_BUILDING)


def check_nvcc() -> Check:
    """Look for the CUDA compiler, and run it."""

    def look() -> str | None:
        nvcc = gpu_sdk.find_nvcc()
        return f"{nvcc.path}, CUDA {nvcc.version[0]}.{nvcc.version[1]}" if nvcc else None

    return _check("nvcc", look, needed_for="building the CUDA kernels")


def check_plugins() -> Check:
    """Load the library of TensorRT's plugins."""

    def look() -> str | None:
        if native_gpu.find_plugin_library() is None:
            return None
        info = native_gpu.describe_plugins()
        return f"tinylm {info.version}, {info.build}; {info.path}"

    command = native_gpu.BUILD_COMMAND
    return _check("TensorRT plugins", look, needed_for=_RUNNING, command=command)


def _check(
    name: str,
    look: Callable[[], str | None],
    *,
    needed_for: str,
    command: str = gpu_sdk.SDK_COMMAND,
) -> Check:
    """Make a check of what may be absent; what is there must be usable."""
    try:
        found = look()
    except NativeError as error:
        problem = first_line(error)
        for variable in (gpu_sdk.ROOT_VARIABLE, gpu_sdk.INCLUDE_VARIABLE, "CUDA_HOME"):
            if f"Unset {variable}" in problem:
                command = f"unset {variable}"
        return Check(
            name=name, status="problem", found=problem, needed_for=needed_for, command=command
        )
    if found:
        return Check(name=name, status="ok", found=found, needed_for=needed_for)
    return Check(
        name=name, status="optional", found="not found", needed_for=needed_for, command=command
    )
