"""Fetch nvcc and TensorRT from package registries, through their ordinary clients.

NVIDIA publishes nvcc on PyPI. TensorRT's libraries come from Maven (JavaCPP presets), its C++
headers, unaltered, from a Rust crate, and the Python bindings for those libraries from PyPI.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from tinylm.errors import NativeToolError
from tinylm_export import gpu_sdk
from tinylm_export.file_lock import locked

NVCC_PACKAGES = (
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
)
LIBRARIES = "org.bytedeco:tensorrt:10.6-1.5.11:jar:linux-x86_64-redist"
BINDINGS = "tensorrt-cu12-bindings==10.6.0"
# Crate, its version and the folder in it, for each version of the headers.
HEADERS = {
    "10.16": ("trtx-sys", "0.4.0", "TensorRT-Headers/TRT-Enterprise-10.16"),
    "11.4": ("trtx-sys", "0.9.1", "TensorRT-Headers/TRT-Enterprise-11.4"),
}
HEADERS_VERSION = "10.16"
_LINKED_NAMES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
_NVCC_BYTES = 280_000_000
_LIBRARIES_BYTES = 1_120_000_000
_HEADERS_BYTES = 215_000_000
_TIMEOUT_SECONDS = 1800

Progress = Callable[[str, float], None]


def complete_sdk(progress: Progress = lambda text, fraction: None) -> gpu_sdk.GpuSdk:
    """Find nvcc and TensorRT, and fetch what is missing into TinyLM's cache.

    Args:
        progress: Told what is fetched and how much of it, 0 to 1.

    Returns:
        An SDK that lacks nothing.

    Raises:
        NativeToolError: Something is missing and can't be fetched; says what to install.
        NativeError: A variable names a folder that can't be used.
    """
    sdk = gpu_sdk.find_sdk()
    if sdk.nvcc is None:
        fetch_nvcc(progress)
    if sdk.libraries is None:
        fetch_libraries(progress)
    if sdk.headers is None:
        fetch_headers(gpu_sdk.tensorrt_folder() / "include", HEADERS_VERSION, progress)
    sdk = gpu_sdk.find_sdk()
    if sdk.missing:
        raise NativeToolError(
            f"fetched, and still not found: {', '.join(sdk.missing)}. Delete "
            f"{gpu_sdk.tensorrt_folder()} and {gpu_sdk.nvcc_folder()} and run "
            f"`{gpu_sdk.SDK_COMMAND}` again."
        )
    return sdk


def fetch_nvcc(progress: Progress = lambda text, fraction: None) -> Path:
    """Fetch NVIDIA's Python packages with nvcc; they are not installed into this Python.

    Returns:
        :func:`gpu_sdk.nvcc_folder`.

    Raises:
        NativeToolError: There is neither pip nor uv, or it can't fetch them.
    """
    _need_linux_x86_64("nvcc", "a CUDA toolkit, and set CUDA_HOME to it")
    target = gpu_sdk.nvcc_folder()

    def fetch(made: Path) -> None:
        uv = _beside_python("uv")
        if importable("pip"):
            command = [*_pip(), "install", "--quiet", "--no-deps", "--target", str(made)]
        elif uv:
            command = [uv, "pip", "install", "--quiet", "--no-deps", "--target", str(made)]
        else:
            raise NativeToolError(
                f"nvcc can't be fetched: expected pip in {sys.executable} or uv on the path, found "
                "neither. Run `python -m ensurepip`, or set CUDA_HOME to a CUDA toolkit."
            )
        command += NVCC_PACKAGES
        _run("nvcc", command, progress, watched=made, total_bytes=_NVCC_BYTES)

    return _make(target, fetch)


def fetch_libraries(progress: Progress = lambda text, fraction: None) -> Path:
    """Fetch TensorRT's libraries with Maven.

    Returns:
        Their folder.

    Raises:
        NativeToolError: There is no Maven, or it can't fetch them.
    """
    instead = (
        "NVIDIA's TensorRT 10.3 or newer (`pip install tensorrt-cu12==10.6.0`, or a system package,"
        f" or a folder that {gpu_sdk.ROOT_VARIABLE} names)"
    )
    _need_linux_x86_64("TensorRT's libraries", instead)
    maven = shutil.which("mvn")
    if maven is None:
        raise NativeToolError(
            "TensorRT's libraries can't be fetched: expected `mvn` on the path, found none. "
            f"Install Maven (Debian: maven), or {instead}."
        )

    def fetch(made: Path) -> None:
        # A repository of its own: a gigabyte that nobody else wants to keep.
        repository = made.parent / "maven"
        goal = ["dependency:get", "-Dtransitive=false", f"-Dartifact={LIBRARIES}"]
        command = [maven, "-q", "-B", f"-Dmaven.repo.local={repository}", *goal]
        _run(
            "TensorRT's libraries",
            command,
            progress,
            watched=repository,
            total_bytes=_LIBRARIES_BYTES,
        )
        made.mkdir()
        for jar in repository.glob("org/bytedeco/tensorrt/*/*-redist.jar"):
            _extract_libraries(jar, made)
        for name in _LINKED_NAMES:
            library = next(made.glob(f"lib{name}.so.*"), None)
            if library is None:
                raise NativeToolError(f"{LIBRARIES} holds no lib{name}. Install {instead}.")
            (made / f"lib{name}.so").symlink_to(library.name)

    return _make(gpu_sdk.tensorrt_folder() / "lib", fetch)


def _extract_libraries(jar: Path, folder: Path) -> None:
    with zipfile.ZipFile(jar) as archive:
        for item in archive.infolist():
            name = Path(item.filename).name
            if ".so" in name:
                with archive.open(item) as source, (folder / name).open("wb") as copy:
                    shutil.copyfileobj(source, copy, 1 << 20)


def fetch_headers(
    folder: Path,
    version: str = HEADERS_VERSION,
    progress: Progress = lambda text, fraction: None,
) -> Path:
    """Fetch TensorRT's C++ headers with Cargo.

    Args:
        folder: Where to put them.
        version: A key of :data:`HEADERS`.
        progress: Told how much is done, 0 to 1.

    Returns:
        The folder.

    Raises:
        NativeToolError: There is no Cargo, or it can't fetch them.
    """
    cargo = shutil.which("cargo")
    if cargo is None:
        raise NativeToolError(
            "TensorRT's C++ headers can't be fetched: expected `cargo` on the path, found none. "
            "Install Cargo (Debian: cargo), or NVIDIA's package libnvinfer-headers-dev, or set "
            f"{gpu_sdk.ROOT_VARIABLE} to an unpacked TensorRT."
        )
    crate, crate_version, inner = HEADERS[version]

    def fetch(made: Path) -> None:
        package = made.parent / "package"
        package.mkdir()
        (package / "lib.rs").touch()
        (package / "Cargo.toml").write_text(
            '[package]\nname = "headers"\nversion = "0.0.0"\nedition = "2021"\n'
            f'[lib]\npath = "lib.rs"\n[dependencies]\n{crate} = "={crate_version}"\n',
            encoding="utf-8",
        )
        vendor = package / "vendor"
        manifest = str(package / "Cargo.toml")
        command = [cargo, "vendor", "--quiet", "--manifest-path", manifest, str(vendor)]
        name = f"TensorRT's headers {version}"
        _run(name, command, progress, watched=package, total_bytes=_HEADERS_BYTES)
        made.mkdir()
        for header in sorted((vendor / crate / inner).glob("*.h")):
            shutil.copyfile(header, made / header.name)

    return _make(folder, fetch)


def fetch_bindings(progress: Progress = lambda text, fraction: None) -> Path:
    """Fetch the wheel of TensorRT's Python bindings for this Python; it is not installed.

    Returns:
        The wheel.

    Raises:
        NativeToolError: There is no pip, or no wheel for this Python.
    """
    folder = gpu_sdk.tensorrt_folder() / "wheels"
    version = f"cp{sys.version_info.major}{sys.version_info.minor}"
    found = sorted(folder.glob(f"*-{version}-*.whl"))
    if found:
        return found[-1]
    if not importable("pip"):
        raise NativeToolError(
            f"TensorRT's Python bindings can't be fetched: expected pip in {sys.executable}, found "
            "none. Run `python -m ensurepip`."
        )
    folder.mkdir(parents=True, exist_ok=True)
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    command = [*_pip(), "download", *options, BINDINGS]
    _run("TensorRT's Python bindings", command, progress, watched=folder, total_bytes=1_200_000)
    return sorted(folder.glob(f"*-{version}-*.whl"))[-1]


def importable(module: str) -> bool:
    """Whether this Python has a module."""
    # Not importlib.util: once setuptools' hook is asked for pip, it lets nobody have its distutils.
    from importlib.machinery import PathFinder

    return PathFinder.find_spec(module) is not None


def _pip() -> list[str]:
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]


def _beside_python(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def _need_linux_x86_64(thing: str, instead: str) -> None:
    found = f"{platform.system()} {platform.machine()}"
    if found != "Linux x86_64":
        raise NativeToolError(
            f"{thing} can be fetched for Linux x86_64 only, found {found}. Install {instead}."
        )


def _make(target: Path, fetch: Callable[[Path], None]) -> Path:
    """Fetch a folder beside its place and move it there once it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.parent), tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch, target.name)
        fetch(made)
        shutil.rmtree(target, ignore_errors=True)
        made.replace(target)
    return target


def _run(
    name: str, command: list[str], progress: Progress, *, watched: Path, total_bytes: int
) -> None:
    """Run a client, and tell how full the folder that it fills is.

    Raises:
        NativeToolError: It fails or hangs.
    """
    progress(name, 0.0)
    end = time.monotonic() + _TIMEOUT_SECONDS
    with (
        tempfile.TemporaryFile("w+") as output,
        subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process,
    ):
        while process.poll() is None:
            if time.monotonic() > end:
                process.kill()
            time.sleep(0.5)
            progress(name, min(_num_bytes(watched) / total_bytes, 0.99))
        output.seek(0)
        lines = [line for line in output.read().splitlines() if line.strip()]
    if process.returncode:
        tail = "\n".join(lines[-10:])
        raise NativeToolError(
            f"{name} can't be fetched: `{' '.join(command)}` failed with exit code "
            f"{process.returncode}:\n{tail}"
        )
    progress(name, 1.0)


def _num_bytes(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):  # passes over folders that vanish meanwhile
        for name in names:
            with contextlib.suppress(OSError):
                total += Path(parent, name).lstat().st_size
    return total
