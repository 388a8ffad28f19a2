"""Finding and fetching nvcc and TensorRT, with made-up folders and programs."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import pytest
from cli_helpers import Cli, command_line

from tinylm.errors import NativeError, NativeToolError
from tinylm_export import gpu_sdk, gpu_sdk_fetch, native_build
from tinylm_export.cli import main


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    return command_line(main, capsys)


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without any of it: an empty cache, no folders of the system, no programs."""
    for variable in (
        *("CUDA_HOME", "LD_LIBRARY_PATH"),
        *(gpu_sdk.ROOT_VARIABLE, gpu_sdk.INCLUDE_VARIABLE),
    ):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TINYLM_CACHE", str(tmp_path / "cache"))
    for name in ("_SYSTEM_INCLUDES", "_SYSTEM_LIBRARIES"):
        monkeypatch.setattr(gpu_sdk, name, ())
    monkeypatch.setattr(gpu_sdk, "_TOOLKIT", str(tmp_path / "toolkit"))
    monkeypatch.setattr(gpu_sdk, "_nvidia_packages", list)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return tmp_path


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def nvcc(root: Path, release: str = "13.0") -> Path:
    for part in gpu_sdk._NVCC_PARTS:
        (root / part).parent.mkdir(parents=True, exist_ok=True)
        (root / part).touch()
    return program(root / "bin" / "nvcc", f"echo 'tools, release {release}, V{release}.88'")


def headers(folder: Path, major: int = 10, minor: int = 16) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "NvInfer.h").touch()
    (folder / "NvInferVersion.h").write_text(
        f"#define TRT_MAJOR_ENTERPRISE {major}\n#define TRT_MINOR_ENTERPRISE {minor}\n"
        "#define NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE //!< TensorRT major version.\n"
    )
    return folder


def libraries(folder: Path, major: int = 10) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"libnvinfer.so.{major}").touch()
    (folder / f"libnvinfer_builder_resource.so.{major}.6.0").touch()
    return folder


def test_nothing_there(nowhere: Path, cli: Cli) -> None:
    sdk = gpu_sdk.find_sdk()
    assert sdk.missing == ("nvcc", "TensorRT's headers", "TensorRT's libraries")
    assert not sdk.can_build and sdk.root is None
    assert gpu_sdk.load_tensorrt() is None
    assert native_build.choose_sdk(None) is native_build.choose_sdk(False) is None
    code, out, err = cli("native", "sdk", "--no-fetch")
    assert (code, out) == (1, "")
    assert "missing: nvcc, TensorRT's headers, TensorRT's libraries." in err


def test_order_of_compilers(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> Path | None:
        compiler = gpu_sdk.find_nvcc()
        return compiler and compiler.path

    fetched = nvcc(gpu_sdk.nvcc_folder() / "nvidia" / "cu13")
    assert found() == fetched
    packages = nowhere / "site" / "nvidia"
    monkeypatch.setattr(gpu_sdk, "_nvidia_packages", lambda: [packages])
    installed = nvcc(packages / "cu13")
    assert found() == installed
    (packages / "cu13" / "nvvm" / "bin" / "cicc").unlink()  # that package is not installed
    assert found() == fetched
    toolkit = nvcc(nowhere / "toolkit")
    assert found() == toolkit
    on_path = nvcc(nowhere)
    assert found() == on_path
    nvcc(nowhere, release="11.8")  # too old
    assert found() == toolkit
    home = nvcc(nowhere / "home")
    monkeypatch.setenv("CUDA_HOME", str(nowhere / "home"))
    assert gpu_sdk.find_nvcc() == gpu_sdk.Nvcc(path=home, version=(13, 0))
    home.unlink()
    with pytest.raises(NativeError, match=r"CUDA_HOME=.*of version 12\.0 or newer, found none"):
        found()


def test_order_of_tensorrts(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = gpu_sdk.tensorrt_folder()
    headers(fetched / "include")
    libraries(fetched / "lib")
    sdk = gpu_sdk.find_sdk()
    assert (sdk.headers, sdk.libraries, sdk.root) == (fetched / "include", fetched / "lib", fetched)
    include, lib = headers(nowhere / "usr" / "include"), libraries(nowhere / "usr" / "lib")
    monkeypatch.setattr(gpu_sdk, "_SYSTEM_INCLUDES", (str(include),))
    monkeypatch.setattr(gpu_sdk, "_SYSTEM_LIBRARIES", (str(lib),))
    sdk = gpu_sdk.find_sdk()
    assert (sdk.headers, sdk.libraries) == (include, lib)
    flat = libraries(nowhere / "trt")  # as it is sent to a machine: no lib/, no headers
    monkeypatch.setenv(gpu_sdk.ROOT_VARIABLE, str(flat))
    sdk = gpu_sdk.find_sdk()
    assert (sdk.headers, sdk.libraries, sdk.root) == (include, flat, flat)
    headers(flat / "include")
    assert gpu_sdk.find_headers() == flat / "include"
    monkeypatch.setenv(gpu_sdk.INCLUDE_VARIABLE, str(include))
    assert gpu_sdk.find_headers() == include
    monkeypatch.setenv(gpu_sdk.INCLUDE_VARIABLE, str(nowhere))
    with pytest.raises(NativeError, match=r"TENSORRT_INCLUDE_DIR=.*expected NvInfer\.h in it"):
        gpu_sdk.find_headers()


def test_a_root_that_holds_nothing_is_named(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    monkeypatch.setenv(gpu_sdk.ROOT_VARIABLE, "/no/such/folder")
    message = r"TENSORRT_ROOT=/no/such/folder: expected lib/libnvinfer\.so\.10 .* found neither"
    with pytest.raises(NativeError, match=message):
        gpu_sdk.find_sdk()
    code, _, err = cli("native", "sdk", "--no-fetch")
    assert code == 2 and "TENSORRT_ROOT=/no/such/folder" in err and "Traceback" not in err


def test_versions_that_do_not_fit(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = nowhere / "trt"
    libraries(root / "lib")
    headers(root / "include", major=11, minor=4)
    monkeypatch.setenv(gpu_sdk.ROOT_VARIABLE, str(root))
    with pytest.raises(NativeError, match=r"expected headers of version 10, .* found 11\.4"):
        gpu_sdk.find_sdk()
    headers(root / "include", minor=2)
    with pytest.raises(NativeError, match=r"expected TensorRT 10\.3 or newer, found 10\.2"):
        gpu_sdk.find_sdk()
    (root / "include" / "NvInferVersion.h").unlink()
    with pytest.raises(NativeError, match="expected TensorRT's version in it, found none"):
        gpu_sdk.find_sdk()


def test_what_is_no_library_is_named(nowhere: Path) -> None:
    folder = libraries(nowhere / "trt")
    with pytest.raises(NativeToolError, match=r"libnvinfer\.so\.10 can't be loaded as TensorRT"):
        gpu_sdk.load_tensorrt(folder)


def test_version_text() -> None:
    assert gpu_sdk.version_text(100600) == "10.6.0"
    assert gpu_sdk.version_text(101602) == "10.16.2"


def fake_clients(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that need no network: mvn, cargo, and a Python that is pip."""
    jar = folder / "redist.jar"
    with zipfile.ZipFile(jar, "w") as archive:
        for name in ("nvinfer.so.10", "nvinfer_plugin.so.10", "nvonnxparser.so.10"):
            archive.writestr(f"org/bytedeco/tensorrt/linux-x86_64/lib{name}", name)
    program(
        folder / "bin" / "mvn",
        "for a; do case $a in -Dmaven.repo.local=*) r=${a#*=};; esac; done\n"
        "d=$r/org/bytedeco/tensorrt/10; mkdir -p $d; "
        f"cp {jar} $d/tensorrt-linux-x86_64-redist.jar",
    )
    source = headers(folder / "crate")
    program(
        folder / "bin" / "cargo",
        "for a; do :; done\n"
        "d=$a/trtx-sys/TensorRT-Headers/TRT-Enterprise-10.16; mkdir -p $d; "
        f"cp {source}/*.h $d",
    )
    compiler = nvcc(folder / "wheel" / "nvidia" / "cu13")
    python = program(
        folder / "bin" / "python",
        'case "$*" in\n'
        '*download*) for a; do [ "$p" = --dest ] && d=$a; p=$a; done\n'
        f"touch $d/bindings-cp{sys.version_info.major}{sys.version_info.minor}-none-any.whl;;\n"
        '*) for a; do [ "$p" = --target ] && d=$a; p=$a; done\n'
        f"mkdir -p $d; cp -r {compiler.parents[2]} $d;;\nesac",
    )
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(gpu_sdk_fetch, "importable", lambda module: module == "pip")


def test_everything_is_fetched_once(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    fake_clients(nowhere, monkeypatch)
    report = nowhere / "sdk.json"
    code, out, err = cli("native", "sdk", "--json", report)
    assert code == 0, err
    cache = nowhere / "cache"
    compiler = cache / "cuda" / "nvidia" / "cu13" / "bin" / "nvcc"
    assert out.splitlines() == [
        f"export CUDACXX={compiler}",
        f"export TENSORRT_INCLUDE_DIR={cache / 'tensorrt' / 'include'}",
        f"export TENSORRT_ROOT={cache / 'tensorrt'}",
        f"export LD_LIBRARY_PATH={cache / 'tensorrt' / 'lib'}",
    ]
    values = json.loads(report.read_text())
    assert values["headers"] == str(cache / "tensorrt" / "include")
    assert values["bindings"] in err and "pip install --no-deps" in err
    assert (cache / "tensorrt" / "lib" / "libnvinfer.so").resolve().name == "libnvinfer.so.10"
    for name in ("mvn", "cargo", "python"):
        (nowhere / "bin" / name).unlink()
    assert cli("native", "sdk", "--json", report)[:2] == (0, out)
    assert not list(cache.rglob("tmp*"))


def test_clients_that_are_missing_are_named(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(nowhere / "bin"))
    with pytest.raises(NativeToolError, match=r"expected `mvn` on the path.*Install Maven"):
        gpu_sdk_fetch.fetch_libraries()
    with pytest.raises(NativeToolError, match=r"expected `cargo` on the path.*Install Cargo"):
        gpu_sdk_fetch.fetch_headers(nowhere / "include")
    monkeypatch.setattr(sys, "executable", str(nowhere / "bin" / "python"))
    monkeypatch.setattr(gpu_sdk_fetch, "importable", lambda module: False)
    with pytest.raises(NativeToolError, match=r"expected pip in .* or uv on the path"):
        gpu_sdk_fetch.fetch_nvcc()
    with pytest.raises(NativeToolError, match=r"expected pip in .* Run `python -m ensurepip`"):
        gpu_sdk_fetch.fetch_bindings()


def test_a_client_that_fails_leaves_nothing(nowhere: Path) -> None:
    program(nowhere / "bin" / "mvn", "echo no route to host; exit 3")
    with pytest.raises(NativeToolError, match=r"failed with exit code 3:\nno route to host"):
        gpu_sdk_fetch.fetch_libraries()
    assert [path.name for path in gpu_sdk.tensorrt_folder().iterdir()] == [".lock"]


def test_another_system_is_named(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(NativeToolError, match=r"for Linux x86_64 only, found Linux riscv64"):
        gpu_sdk_fetch.fetch_libraries()


def test_another_compiler_starts_the_build_tree_afresh(tmp_path: Path) -> None:
    compiler = nvcc(tmp_path / "cuda")
    cache = tmp_path / "CMakeCache.txt"
    cache.write_text(f"CMAKE_CUDA_COMPILER:FILEPATH={compiler}\n")
    native_build._forget_other_nvcc(tmp_path, compiler)
    assert cache.is_file()
    native_build._forget_other_nvcc(tmp_path, tmp_path / "other" / "nvcc")
    assert not cache.is_file()
