"""What is installed, what is missing, and the command that mends it.

Nothing is taken from a version number alone where it can be tried: PyTorch multiplies on the GPU,
ONNX Runtime runs a BitLinear, the compiler compiles, the tokenizer encodes.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tinylm.errors import TinyLMError
from tinylm.paths import cache_dir
from tinylm_export.machine import installed_versions

if TYPE_CHECKING:
    from rich.console import RenderableType

# ok: there and working. missing: needed and not there. problem: there and not working.
# optional: not there, and only needed for what the check says.
Status = Literal["ok", "missing", "problem", "optional"]

MIN_PYTHON = (3, 10)
LLAMA2_FOLDER = "llama2-tokenizer"  # where tools/llama2_tokenizer.py puts it
_COMMAND_TIMEOUT_SECONDS = 10
_CPP_PROGRAM = "#include <optional>\nint main() { return std::optional<int>(0).value(); }\n"
_NVCC_PACKAGES = "nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-runtime nvidia-cuda-cccl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: The thing.
        status: See :data:`Status`.
        found: What is there, or what went wrong.
        needed_for: What does not work without it.
        command: What to run to mend it; empty where nothing is to be done.
    """

    name: str
    status: Status
    found: str
    needed_for: str
    command: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorReport:
    """Every check, in the order in which a user would mend them."""

    checks: tuple[Check, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing that is needed is missing and nothing that is there is broken."""
        return all(check.status in ("ok", "optional") for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return an object that JSON can hold."""
        return {
            "healthy": self.healthy,
            "checks": [dataclasses.asdict(check) for check in self.checks],
        }


def run_doctor() -> DoctorReport:
    """Look at everything; takes a few seconds."""
    ort = installed_versions(("onnxruntime", "onnxruntime-gpu"))
    checks: dict[str, Callable[[], Check]] = {
        "Python": check_python,
        "Python packages": check_requirements,
        "CUDA GPU": check_gpu,
        "ONNX Runtime": lambda: check_onnxruntime_package(ort),
        "BitLinear in ONNX Runtime": check_onnxruntime_runs,
        "Default tokenizer": check_default_tokenizer,
        "Llama 2 tokenizer": check_llama2_tokenizer,
        "flash-attn": check_flash_attn,
        "TensorRT": check_tensorrt,
        "nvcc": check_nvcc,
        "C++ compiler": check_cpp_compiler,
        "CMake": check_cmake,
    }
    return DoctorReport(checks=tuple(attempt(name, check) for name, check in checks.items()))


def attempt(name: str, check: Callable[[], Check]) -> Check:
    """Make a check; a package that it can't be made without is the finding then."""
    try:
        return check()
    except ImportError as error:
        return Check(
            name=name,
            status="missing",
            found=f"not checked: {_first_line(error)}",
            needed_for="this check",
            command=f"pip install {error.name}" if error.name else "pip install -e '.[cpu]'",
        )


def check_python(version: tuple[int, int, int] = sys.version_info[:3]) -> Check:
    """Check the interpreter's version."""
    found = ".".join(map(str, version))
    needed_for = "everything"
    if version[:2] >= MIN_PYTHON:
        return Check(name="Python", status="ok", found=found, needed_for=needed_for)
    lowest = ".".join(map(str, MIN_PYTHON))
    return Check(
        name="Python",
        status="problem",
        found=f"{found}, expected {lowest} or newer",
        needed_for=needed_for,
        command=f"python{lowest} -m venv .venv",
    )


def check_requirements(requirements: list[str] | None = None) -> Check:
    """Check the packages that tinylm declares, extras apart.

    Args:
        requirements: As in a package's metadata; default tinylm's own.
    """
    from packaging.requirements import Requirement

    name, needed_for = "Python packages", "training and export"
    if requirements is None:
        try:
            requirements = metadata.requires("tinylm") or []
        except metadata.PackageNotFoundError:
            return Check(
                name=name,
                status="missing",
                found="tinylm itself is not installed",
                needed_for=needed_for,
                command="pip install -e '.[cpu]'",
            )
    parsed = [Requirement(text) for text in requirements]
    needed = [r for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]
    have = installed_versions(tuple(r.name for r in needed))
    absent = [r for r in needed if r.name not in have]
    old = [r for r in needed if r.name in have and not r.specifier.contains(have[r.name], True)]
    if not absent and not old:
        shown = ("torch", "transformers", "onnx", "onnx-ir")
        found = ", ".join(f"{package} {have[package]}" for package in shown if package in have)
        return Check(name=name, status="ok", found=found or "all there", needed_for=needed_for)
    problems = [f"{r.name} not found" for r in absent]
    problems += [f"{r.name} {have[r.name]}, expected {r.specifier}" for r in old]
    return Check(
        name=name,
        status="missing" if absent else "problem",
        found="; ".join(problems),
        needed_for=needed_for,
        command="pip install " + " ".join(f"'{r.name}{r.specifier}'" for r in absent + old),
    )


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
                found=f"{build} sees a GPU and can't compute on it: {_first_line(error)}",
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
    output = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return output.splitlines()[0].strip() if output else None


def check_onnxruntime_package(installed: Mapping[str, str]) -> Check:
    """Check that exactly one of the two ONNX Runtime packages is installed.

    Args:
        installed: Versions of ``onnxruntime`` and ``onnxruntime-gpu``, those that are there.
    """
    name, needed_for = "ONNX Runtime", "running, checking and measuring exported models"
    found = ", ".join(f"{package} {version}" for package, version in installed.items())
    if len(installed) > 1:
        return Check(
            name=name,
            status="problem",
            found=f"{found}: both install the same files, and one overwrites the other",
            needed_for=needed_for,
            command="pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'tinylm[cpu]'"
            "  # or 'tinylm[gpu]' on a CUDA machine",
        )
    if not installed:
        return Check(
            name=name,
            status="missing",
            found="neither onnxruntime nor onnxruntime-gpu",
            needed_for=needed_for,
            command="pip install 'tinylm[cpu]'  # or 'tinylm[gpu]' on a CUDA machine",
        )
    return Check(name=name, status="ok", found=found, needed_for=needed_for)


def check_onnxruntime_runs() -> Check:
    """Run a BitLinear by its function body in ONNX Runtime, and compare it with PyTorch."""
    name, needed_for = "BitLinear in ONNX Runtime", "exported models without a custom-op library"
    try:
        difference = _bit_linear_difference()
    except ImportError:
        raise
    except Exception as error:  # whatever a broken installation raises
        return Check(
            name=name,
            status="problem",
            found=_first_line(error),
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


def _bit_linear_difference() -> float:
    """Return the largest difference between the op in PyTorch and its body in ONNX Runtime."""
    import onnx
    import torch

    from tinylm.bitlinear import PackedBitLinear
    from tinylm.config import float32
    from tinylm.norm import rms_norm
    from tinylm.packing import pack
    from tinylm_export.function_bodies import function_bodies
    from tinylm_export.ops import DOMAIN, IR_VERSION, OPSET, VERSION
    from tinylm_export.ort_session import import_onnxruntime, make_inference_session

    import_onnxruntime()
    generator = torch.Generator().manual_seed(0)
    num_inputs, num_outputs, eps = 64, 32, float32(1e-5)
    tensors = {
        "x": torch.randn(2, 3, num_inputs, generator=generator),
        "weight": pack(torch.randint(-1, 2, (num_outputs, num_inputs), generator=generator)),
        "weight_scale": torch.rand(num_outputs, generator=generator) + 0.5,
        "norm_weight": torch.rand(num_inputs, generator=generator) + 0.5,
    }
    inputs = [
        onnx.helper.make_tensor_value_info(
            key, onnx.helper.np_dtype_to_tensor_dtype(value.numpy().dtype), list(value.shape)
        )
        for key, value in tensors.items()
    ]
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2, 3, num_outputs])
    node = onnx.helper.make_node("BitLinear", list(tensors), ["y"], domain=DOMAIN)
    node.attribute.append(onnx.helper.make_attribute("activation", "int8"))
    node.attribute.append(onnx.helper.make_attribute("eps", eps))
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "doctor", inputs, [output]),
        functions=function_bodies("int8")[:1],
        opset_imports=[
            onnx.helper.make_opsetid("", OPSET),
            onnx.helper.make_opsetid(DOMAIN, VERSION),
        ],
        ir_version=IR_VERSION,
    )
    session = make_inference_session(model.SerializeToString())
    found = session.run(["y"], {key: value.numpy() for key, value in tensors.items()})[0]
    normed = rms_norm(tensors["x"], tensors["norm_weight"], eps)
    expected = PackedBitLinear(tensors["weight"], tensors["weight_scale"])(normed)
    return float((torch.from_numpy(found) - expected).abs().max())


def check_default_tokenizer() -> Check:
    """Check whether the default tokenizer is on this machine; nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache

    from tinylm.tokenizer import DEFAULT_TOKENIZER, HF_FILE, SPM_FILE

    name, needed_for = "Default tokenizer", "`tinylm train` without --tokenizer"
    for file in (HF_FILE, SPM_FILE):
        path = try_to_load_from_cache(DEFAULT_TOKENIZER, file)
        if isinstance(path, str):
            found = f"{DEFAULT_TOKENIZER} in the Hugging Face cache"
            return Check(name=name, status="ok", found=found, needed_for=needed_for)
    return Check(
        name=name,
        status="optional",
        found=f"{DEFAULT_TOKENIZER} is not in the Hugging Face cache",
        needed_for=needed_for,
        command=f"hf auth login && hf download {DEFAULT_TOKENIZER} --include 'tokenizer*'"
        "  # or give --tokenizer a folder",
    )


def check_llama2_tokenizer(folder: Path | None = None) -> Check:
    """Check the Llama 2 tokenizer that ``tools/llama2_tokenizer.py`` builds.

    Args:
        folder: Default: in TinyLM's cache.
    """
    from tinylm.tokenizer import load_tokenizer

    name, needed_for = "Llama 2 tokenizer", "training with Llama 2's vocabulary without the hub"
    folder = folder or cache_dir() / LLAMA2_FOLDER
    command = "python tools/llama2_tokenizer.py"
    if not folder.exists():
        return Check(
            name=name,
            status="optional",
            found=f"not in {folder}",
            needed_for=needed_for,
            command=command,
        )
    try:
        ids = load_tokenizer(folder)("Hello world")["input_ids"]
    except TinyLMError as error:
        found = str(error)
    else:
        if ids == [1, 15043, 3186]:
            return Check(name=name, status="ok", found=str(folder), needed_for=needed_for)
        found = f"{folder}: 'Hello world' expected as [1, 15043, 3186], found {ids}"
    return Check(
        name=name,
        status="problem",
        found=found,
        needed_for=needed_for,
        command=f"rm -r '{folder}' && {command}",
    )


def check_flash_attn() -> Check:
    """Check flash-attn, which only a CUDA device can use."""
    import torch

    suitable = "" if torch.cuda.is_available() else "; it needs a CUDA GPU, and there is none"
    return _optional_module(
        "flash-attn",
        module="flash_attn",
        needed_for=f"faster training attention (PyTorch's own takes its place){suitable}",
        command="" if suitable else "pip install 'tinylm[flash]' --no-build-isolation",
    )


def check_tensorrt() -> Check:
    """Check TensorRT's Python bindings."""
    return _optional_module(
        "TensorRT",
        module="tensorrt",
        needed_for="TensorRT engines on an NVIDIA GPU",
        command="pip install 'tinylm[tensorrt]'",
    )


def _optional_module(name: str, *, module: str, needed_for: str, command: str) -> Check:
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
        problem = _first_line(error)
    except Exception as error:  # whatever a broken native library raises when it is loaded
        problem = _first_line(error)
    return Check(
        name=name,
        status="problem",
        found=f"installed and can't be imported: {problem}",
        needed_for=needed_for,
        command=f"pip install --force-reinstall {name.lower()}",
    )


def check_nvcc() -> Check:
    """Look for the CUDA compiler: CUDA_HOME, the path, then NVIDIA's Python packages."""
    candidates = [shutil.which("nvcc")]
    home = os.environ.get("CUDA_HOME")
    if home:
        candidates.insert(0, str(Path(home, "bin", "nvcc")))
    packages = Path(sysconfig.get_path("purelib"), "nvidia")
    candidates += [str(path) for path in sorted(packages.glob("*/bin/nvcc"), reverse=True)]
    needed_for = "building the CUDA kernels"
    for path in candidates:
        output = _output([path, "--version"]) if path else None
        release = [line for line in (output or "").splitlines() if "release" in line]
        if release:
            found = f"{path}, {release[0].split(',', 1)[1].strip()}"
            return Check(name="nvcc", status="ok", found=found, needed_for=needed_for)
    return Check(
        name="nvcc",
        status="optional",
        found="not found on the path, in CUDA_HOME or among the Python packages",
        needed_for=needed_for,
        command=f"pip install {_NVCC_PACKAGES}",
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
            timeout=_COMMAND_TIMEOUT_SECONDS,
        )
        problem = done.stderr.strip().splitlines()[:1] if done.returncode else []
        failed = done.returncode != 0
    except (OSError, subprocess.TimeoutExpired) as error:
        problem, failed = [_first_line(error)], True
    if failed:
        found = f"{path} can't compile a C++17 program: {' '.join(problem)}"
        return Check(
            name=name, status="problem", found=found, needed_for=needed_for, command=command
        )
    version = (_output([path, "--version"]) or path).splitlines()[0]
    return Check(name=name, status="ok", found=version, needed_for=needed_for)


def check_cmake() -> Check:
    """Look for CMake."""
    output = _output(["cmake", "--version"])
    return Check(
        name="CMake",
        status="ok" if output else "optional",
        found=output.splitlines()[0] if output else "not found on the path",
        needed_for="building the native kernels and C++ programs",
        command="" if output else "pip install cmake",
    )


def _output(command: list[str]) -> str | None:
    """Return what a program prints, or None if it is not there or fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def render(report: DoctorReport) -> RenderableType:
    """Return the report as a rich table; commands stand below it, ready to be copied."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "missing": "red", "problem": "red", "optional": "yellow"}
    table = Table("check", "status", "found", "needed for")
    for check in report.checks:
        status = Text(check.status, style=styles[check.status])
        table.add_row(check.name, status, Text(check.found), Text(check.needed_for))
    lines = [
        Text(f"{check.name} ({check.status}): {check.command}")
        for check in report.checks
        if check.command
    ]
    verdict = "Everything that is needed is there." if report.healthy else "Something is amiss."
    return Group(table, *lines, Text(verdict))
