"""What is installed, what is missing, and the command that mends it.

Nothing is taken from a version number alone where it can be tried: PyTorch multiplies on the GPU,
ONNX Runtime runs a BitLinear, the compiler compiles, the tokenizer encodes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tinylm_export import doctor_gpu as gpu
from tinylm_export import doctor_native as native
from tinylm_export import doctor_ops as ops
from tinylm_export import doctor_python as python
from tinylm_export.doctor_check import Check, first_line
from tinylm_export.machine import installed_versions


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
        "Python": python.check_python,
        "Python packages": python.check_requirements,
        "CUDA GPU": native.check_gpu,
        "ONNX Runtime": lambda: python.check_onnxruntime_package(ort),
        "BitLinear in ONNX Runtime": ops.check_onnxruntime_runs,
        "Native ops": ops.check_native_ops,
        "Default tokenizer": python.check_default_tokenizer,
        "Llama 2 tokenizer": python.check_llama2_tokenizer,
        "flash-attn": native.check_flash_attn,
        "TensorRT": gpu.check_bindings,
        "TensorRT libraries": gpu.check_libraries,
        "TensorRT headers": gpu.check_headers,
        "nvcc": gpu.check_nvcc,
        "TensorRT plugins": gpu.check_plugins,
        "C++ compiler": native.check_cpp_compiler,
        "CMake": native.check_cmake,
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
            found=f"not checked: {first_line(error)}",
            needed_for="this check",
            command=f"pip install {error.name}" if error.name else "pip install -e '.[cpu]'",
        )


def render(report: DoctorReport) -> RenderableType:
    """Return the report as a rich table; commands stand below it, ready to be copied."""
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
