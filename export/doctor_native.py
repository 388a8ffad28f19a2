"""Checks of the GPU and of the tools that build native code."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess

from tinylm_export.doctor_check import COMMAND_TIMEOUT_SECONDS, Check, first_line, program_output

_CPP_PROGRAM = "#include <optional>\nint main() { return std::optional<int>(0).value(); }\n"


def check_gpu() -> Check:
    """Check that PyTorch computes on the CUDA device, if the machine has one."""
    name, needed_for = "CUDA GPU", "training at speed, TensorRT engines"
    import torch

    driver = _driver_version()
    build = f"torch {torch.__version__}"
    if torch.cuda.is_available():
        try:
            devices = [_try_device(index) for index in range(torch.cuda.device_count())]
        except RuntimeError as error:
            return Check(
                name=name,
                status="problem",
                found=f"{build} sees a GPU and can't compute on it: {first_line(error)}",
                needed_for=needed_for,
                command="pip install --upgrade torch",
            )
        found = f"{', '.join(devices)}; CUDA {torch.version.cuda}, driver {driver or 'not known'}"
        return Check(name=name, status="ok", found=found, needed_for=needed_for)
    if driver is None:
        found = f"none; {build} runs on the CPU"
        return Check(name=name, status="optional", found=found, needed_for=needed_for)
    if torch.version.cuda is None:
        return Check(
            name=name,
            status="problem",
            found=f"driver {driver}, but {build} is built without CUDA",
            needed_for=needed_for,
            command="pip install --force-reinstall torch",
        )
    return Check(
        name=name,
        status="problem",
        found=f"driver {driver}, but {build} (CUDA {torch.version.cuda}) can't use it",
        needed_for=needed_for,
        command="nvidia-smi  # then update the driver to one for that CUDA version",
    )


def _try_device(index: int) -> str:
    """Multiply on a device and describe it."""
    import torch

    x = torch.ones(8, 8, device=f"cuda:{index}")
    if float((x @ x).sum()) != 512.0:
        raise RuntimeError("a product of two matrices of ones is wrong")
    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)} (compute capability {major}.{minor})"


def _driver_version() -> str | None:
    """Return the NVIDIA driver's version, or None without one."""
    output = program_output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return output.splitlines()[0].strip() if output else None


def check_flash_attn() -> Check:
    """Check flash-attn, which only a CUDA device can use."""
    import torch

    suitable = "" if torch.cuda.is_available() else "; it needs a CUDA GPU, and there is none"
    return optional_module(
        "flash-attn",
        module="flash_attn",
        needed_for=f"faster training attention (PyTorch's own takes its place){suitable}",
        command="" if suitable else "pip install 'tinylm[flash]' --no-build-isolation",
    )


def optional_module(name: str, *, module: str, needed_for: str, command: str) -> Check:
    """Import a module that may be absent; one that is there must import."""
    try:
        found = f"{name} {getattr(importlib.import_module(module), '__version__', '')}".strip()
        return Check(name=name, status="ok", found=found, needed_for=needed_for)
    except ModuleNotFoundError as error:
        if error.name == module:
            return Check(
                name=name,
                status="optional",
                found="not installed",
                needed_for=needed_for,
                command=command,
            )
        problem = first_line(error)
    except Exception as error:  # whatever a broken native library raises when it is loaded
        problem = first_line(error)
    return Check(
        name=name,
        status="problem",
        found=f"installed and can't be imported: {problem}",
        needed_for=needed_for,
        command=f"pip install --force-reinstall {name.lower()}",
    )


def check_cpp_compiler() -> Check:
    """Compile a C++17 program."""
    name, needed_for = "C++ compiler", "building the native kernels and C++ programs"
    command = "sudo apt-get install g++"
    named = os.environ.get("CXX")
    path = next(
        filter(None, map(shutil.which, [named] if named else ["c++", "g++", "clang++"])), ""
    )
    if not path:
        return Check(
            name=name,
            status="optional",
            found=f"CXX={named}: no such program" if named else "no c++, g++ or clang++",
            needed_for=needed_for,
            command=command,
        )
    arguments = [path, "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    try:
        done = subprocess.run(
            arguments,
            input=_CPP_PROGRAM,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_SECONDS,
        )
        problem = done.stderr.strip().splitlines()[:1] if done.returncode else []
        failed = done.returncode != 0
    except (OSError, subprocess.TimeoutExpired) as error:
        problem, failed = [first_line(error)], True
    if failed:
        found = f"{path} can't compile a C++17 program: {' '.join(problem)}"
        return Check(
            name=name, status="problem", found=found, needed_for=needed_for, command=command
        )
    version = (program_output([path, "--version"]) or path).splitlines()[0]
    return Check(name=name, status="ok", found=version, needed_for=needed_for)


def check_cmake() -> Check:
    """Look for CMake."""
    output = program_output(["cmake", "--version"])
    return Check(
        name="CMake",
        status="ok" if output else "optional",
        found=output.splitlines()[0] if output else "not found on the path",
        needed_for="building the native kernels and C++ programs",
        command="" if output else "pip install cmake",
    )
