from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
from native_helpers import needs_library
from rich.console import Console

from tinylm_export.doctor import DoctorReport, attempt, render, run_doctor
from tinylm_export.doctor_check import Check
from tinylm_export.doctor_gpu import (
    check_bindings,
    check_headers,
    check_libraries,
    check_nvcc,
    check_plugins,
)
from tinylm_export.doctor_native import check_cpp_compiler, check_flash_attn
from tinylm_export.doctor_ops import check_native_ops, check_onnxruntime_runs
from tinylm_export.doctor_python import (
    check_default_tokenizer,
    check_llama2_tokenizer,
    check_onnxruntime_package,
    check_python,
    check_requirements,
)


@pytest.fixture(scope="module")
def report() -> DoctorReport:
    return run_doctor()


def test_this_machine_is_healthy(report: DoctorReport) -> None:
    bad = [check for check in report.checks if check.status in ("missing", "problem")]
    assert not bad
    assert report.healthy


def test_every_check_says_what_it_is_for(report: DoctorReport) -> None:
    names = [check.name for check in report.checks]
    assert len(names) == len(set(names)) == 16
    for check in report.checks:
        assert check.found and check.needed_for
        assert check.status != "ok" or not check.command


def test_json_and_table(report: DoctorReport) -> None:
    values = json.loads(json.dumps(report.to_dict()))
    assert values["healthy"] is True
    assert [check["name"] for check in values["checks"]] == [c.name for c in report.checks]
    console = Console(width=160)
    with console.capture() as captured:
        console.print(render(report))
    text = captured.get()
    for check in report.checks:
        assert check.name in text
    assert "Everything that is needed is there." in text


def test_a_problem_makes_it_unhealthy() -> None:
    good = Check(name="a", status="ok", found="1", needed_for="b")
    optional = Check(name="c", status="optional", found="none", needed_for="d", command="get c")
    assert DoctorReport(checks=(good, optional)).healthy
    bad = Check(name="e", status="problem", found="2", needed_for="f", command="mend e")
    report = DoctorReport(checks=(good, optional, bad))
    assert not report.healthy
    console = Console(width=100)
    with console.capture() as captured:
        console.print(render(report))
    assert "e (problem): mend e" in captured.get()
    assert "Something is amiss." in captured.get()


def test_quick_enough() -> None:
    """All but importing the libraries, which the fixture above has done."""
    start = time.perf_counter()
    run_doctor()
    assert time.perf_counter() - start < 10


def test_both_onnxruntime_packages_are_a_problem() -> None:
    both = {"onnxruntime": "1.20.0", "onnxruntime-gpu": "1.20.1"}
    check = check_onnxruntime_package(both)
    assert check.status == "problem"
    assert "onnxruntime 1.20.0, onnxruntime-gpu 1.20.1: both install the same files" in check.found
    assert check.command.startswith("pip uninstall -y onnxruntime onnxruntime-gpu && pip install")


def test_no_onnxruntime_package_is_missing() -> None:
    check = check_onnxruntime_package({})
    assert check.status == "missing"
    assert "'tinylm[cpu]'" in check.command
    assert check_onnxruntime_package({"onnxruntime-gpu": "1.20.1"}).status == "ok"


def test_bit_linear_really_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_onnxruntime_runs().found == "same result as PyTorch, bit for bit"
    from tinylm_export import function_bodies

    # A body with another rounding of activations must be found out.
    body = function_bodies.QUANTIZE_INT8.replace("Round (steps)", "Floor (steps)")
    monkeypatch.setattr(function_bodies, "QUANTIZE_INT8", body)
    check = check_onnxruntime_runs()
    assert check.status == "problem"
    assert check.found.startswith("differs from PyTorch by up to ")


def test_an_onnxruntime_that_does_not_work_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    from tinylm_export import function_bodies

    broken = function_bodies.QUANTIZE_INT8.replace("Round (steps)", "NoSuchOp (steps)")
    monkeypatch.setattr(function_bodies, "QUANTIZE_INT8", broken)
    check = check_onnxruntime_runs()
    assert check.status == "problem"
    assert "can't load it" in check.found


@needs_library
def test_native_ops_really_run(monkeypatch: pytest.MonkeyPatch) -> None:
    check = check_native_ops()
    assert check.status == "ok"
    assert check.found.startswith("tinylm 0.1.0 native, ")
    # Another rounding in the body stands for one in the library.
    from tinylm_export import function_bodies

    body = function_bodies.QUANTIZE_INT8.replace("Round (steps)", "Floor (steps)")
    monkeypatch.setattr(function_bodies, "QUANTIZE_INT8", body)
    check = check_native_ops()
    assert check.status == "problem"
    assert "differs from the function body by up to " in check.found
    assert check.command == "tinylm-export native build"


def test_native_ops_are_optional_and_a_wrong_folder_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinylm_export import native

    monkeypatch.setenv("TINYLM_NATIVE_DIR", str(tmp_path))
    check = check_native_ops()
    assert (check.status, check.command) == ("problem", "unset TINYLM_NATIVE_DIR")
    monkeypatch.delenv("TINYLM_NATIVE_DIR")
    monkeypatch.setattr(native, "build_folder", lambda: tmp_path)
    monkeypatch.setenv("TINYLM_CACHE", str(tmp_path))
    check = check_native_ops()
    assert (check.status, check.command) == ("optional", "tinylm-export native build")


def test_old_python() -> None:
    check = check_python((3, 9, 18))
    assert (check.status, check.found) == ("problem", "3.9.18, expected 3.10 or newer")
    assert check_python((3, 14, 0)).status == "ok"


def test_requirements() -> None:
    assert check_requirements().status == "ok"
    check = check_requirements(["torch>=2.6", "no-such-package-at-all>=3"])
    assert (check.status, check.found) == ("missing", "no-such-package-at-all not found")
    assert check.command == "pip install 'no-such-package-at-all>=3'"
    check = check_requirements(["torch>=99"])
    assert check.status == "problem"
    assert "expected >=99" in check.found
    extra = 'no-such-package-at-all; extra == "gpu"'
    assert check_requirements([extra]).status == "ok"


def test_a_check_without_its_package_is_missing() -> None:
    def check() -> Check:
        import no_such_module_at_all  # type: ignore[import-not-found]  # noqa: F401

        raise AssertionError

    found = attempt("thing", check)
    assert (found.name, found.status) == ("thing", "missing")
    assert "no_such_module_at_all" in found.found
    assert found.command == "pip install no_such_module_at_all"


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder at the front of the import path."""
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("tensorrt", "tensorrt_bindings", "flash_attn"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_optional_modules(modules: Path) -> None:
    (modules / "tensorrt.py").write_text('__version__ = "10.6"\n', encoding="utf-8")
    check = check_bindings()
    assert (check.status, check.found) == ("ok", "TensorRT 10.6")
    (modules / "flash_attn.py").write_text(
        'raise OSError("undefined symbol: _ZN3c10")\n', encoding="utf-8"
    )
    check = check_flash_attn()
    assert check.status == "problem"
    assert check.found == "installed and can't be imported: undefined symbol: _ZN3c10"
    assert check.command == "pip install --force-reinstall flash-attn"


def test_a_module_that_lacks_its_own_parts_is_a_problem(modules: Path) -> None:
    (modules / "tensorrt.py").write_text("import no_such_bindings\n", encoding="utf-8")
    check = check_bindings()
    assert check.status == "problem"
    assert "no_such_bindings" in check.found


def program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)


def test_nvcc_in_cuda_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin" / "nvcc", "echo 'Cuda compilation tools, release 13.0, V13.0.88'")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    check = check_nvcc()
    assert check.status == "ok"
    assert check.found == f"{tmp_path}/bin/nvcc, CUDA 13.0"
    program(tmp_path / "bin" / "nvcc", "echo 'Cuda compilation tools, release 11.8, V11.8.89'")
    check = check_nvcc()
    assert (check.status, check.command) == ("problem", "unset CUDA_HOME")
    assert "of version 12.0 or newer" in check.found


def test_tensorrt_that_is_nowhere_is_optional(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinylm_export import gpu_sdk, native

    for variable in ("TENSORRT_ROOT", "TENSORRT_INCLUDE_DIR", "TINYLM_NATIVE_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TINYLM_CACHE", str(tmp_path))
    monkeypatch.setattr(gpu_sdk, "_SYSTEM_INCLUDES", ())
    monkeypatch.setattr(gpu_sdk, "_SYSTEM_LIBRARIES", ())
    monkeypatch.setattr(native, "build_folder", lambda: tmp_path)
    for check in (check_libraries(), check_headers()):
        assert (check.status, check.command) == ("optional", "tinylm-export native sdk")
    check = check_plugins()
    assert (check.status, check.command) == ("optional", "tinylm-export native build --gpu")
    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path))
    for check in (check_libraries(), check_headers()):
        assert (check.status, check.command) == ("problem", "unset TENSORRT_ROOT")
    (tmp_path / "libtinylm_trt.so").write_bytes(b"no library")
    assert check_plugins().status == "problem"


def test_a_compiler_that_does_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "cxx", "echo 'fatal error: optional: No such file' >&2; exit 1")
    monkeypatch.setenv("CXX", str(tmp_path / "cxx"))
    check = check_cpp_compiler()
    assert check.status == "problem"
    assert "can't compile a C++17 program: fatal error: optional" in check.found
    monkeypatch.setenv("CXX", str(tmp_path / "nothing"))
    assert check_cpp_compiler().status == "optional"


def test_llama2_tokenizer(tmp_path: Path) -> None:
    check = check_llama2_tokenizer(tmp_path / "none")
    assert (check.status, check.command) == ("optional", "python tools/llama2_tokenizer.py")
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{", encoding="utf-8")
    check = check_llama2_tokenizer(folder)
    assert check.status == "problem"
    assert check.command == f"rm -r '{folder}' && python tools/llama2_tokenizer.py"


def test_default_tokenizer_is_looked_up_without_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    check = check_default_tokenizer()
    assert check.status == "optional"
    assert "is not in the Hugging Face cache" in check.found
    repository = tmp_path / "models--meta-llama--Llama-2-7b-hf"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.model").write_bytes(b"")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc", encoding="utf-8")
    assert check_default_tokenizer().status == "ok"
