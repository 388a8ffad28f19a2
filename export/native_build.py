"""Build the native libraries with CMake, from the sources of a checkout or of the wheel."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from tinylm.errors import NativeError, NativeToolError
from tinylm_export import native, native_gpu
from tinylm_export.file_lock import locked
from tinylm_export.gpu_sdk import GpuSdk, find_sdk, library_in
from tinylm_export.gpu_sdk_fetch import complete_sdk
from tinylm_export.native_sdk import header_dir, runtime_library

LOG_FILE = "build.log"
_LOG_TAIL_LINES = 15
_COMPILERS = ("c++", "g++", "clang++")
_STEP = re.compile(r"^\[(\d+)/(\d+)\] ")  # Ninja's
_CACHED_NVCC = re.compile(r"^CMAKE_CUDA_COMPILER:\w+=(.*)$", re.MULTILINE)

Progress = Callable[[str, float], None]


def build(
    folder: Path | None = None,
    *,
    sdk: GpuSdk | None = None,
    cuda_tests: bool = False,
    progress: Progress = lambda text, fraction: None,
) -> native.NativeInfo:
    """Fetch ONNX Runtime's header, then configure, build and install the libraries.

    A second build only compiles what has changed.

    Args:
        folder: Build tree and place of the library; default :func:`native.build_folder`.
        sdk: What TensorRT's plugins are built with too; None to leave them out.
        cuda_tests: Whether to build the library of CUDA kernels for the tests too.
        progress: Told what is done and how much of it, 0 to 1.

    Returns:
        The library for ONNX Runtime, loaded in a process of its own to prove that it works.

    Raises:
        NativeToolError: CMake, Ninja, a C++ compiler or the header is missing; says how to get it.
        NativeError: CMake or the compiler fails; names the log and shows its last lines.
    """
    folder = (folder or native.build_folder()).resolve()
    source = native.source_dir()
    cmake, ninja, compiler = find_tool("cmake"), find_tool("ninja"), find_compiler()
    progress("header", 0.0)
    header = header_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NativeError(
            f"{folder}: the library can't be built there ({error.strerror}). Set "
            f"{native.FOLDER_VARIABLE} to a folder that can be written."
        ) from error
    configure = [
        *(cmake, "-S", str(source), "-B", str(folder), "-G", "Ninja"),
        # Not remembered from an earlier build, whose header may be gone.
        *("-U", "TINYLM_ORT_HEADER_DIR", "-D", f"ONNXRUNTIME_INCLUDE_DIR={header}"),
        *("-D", "TINYLM_ORT=ON", "-D", f"CMAKE_MAKE_PROGRAM={ninja}"),
        *("-D", f"ONNXRUNTIME_LIBRARY={runtime_library() or ''}"),
        *("-D", "CMAKE_BUILD_TYPE=Release"),
        *("-D", f"CMAKE_INSTALL_PREFIX={folder}", "-D", "CMAKE_INSTALL_LIBDIR=lib"),
        *_gpu_options(sdk, cuda_tests=cuda_tests),
    ]
    if sdk is not None and sdk.nvcc is not None:
        _forget_other_nvcc(folder, sdk.nvcc.path)
    if not (folder / "CMakeCache.txt").exists():  # CMake keeps the first compiler of a build tree
        configure += ["-D", f"CMAKE_CXX_COMPILER={compiler}"]
    with locked(folder), (folder / LOG_FILE).open("w", encoding="utf-8") as log:
        for name, command in {
            "configure": configure,
            "build": [cmake, "--build", str(folder)],
            "install": [cmake, "--install", str(folder)],
        }.items():
            _run(name, command, log_path=folder / LOG_FILE, log=log, progress=progress)
    path = folder / "lib" / native.LIBRARY_NAME
    for made in (path, folder / "lib" / native_gpu.LIBRARY_NAME)[: 2 if sdk else 1]:
        if not made.is_file():
            raise NativeError(
                f"the build ended well and made no {made}. See {folder / LOG_FILE}, or delete "
                f"{folder} and build again."
            )
    return _describe_elsewhere(path)


def choose_sdk(gpu: bool | None, progress: Progress = lambda text, fraction: None) -> GpuSdk | None:
    """Choose what the plugins are built with.

    Args:
        gpu: None for what is on this machine, True to fetch what is missing, False for nothing.
        progress: Told what is fetched and how much of it, 0 to 1.

    Returns:
        The SDK, or None to leave the plugins out.

    Raises:
        NativeError: A part is needed and missing, or a variable names what can't be used.
    """
    if gpu is False:
        return None
    sdk = find_sdk()
    if gpu and not sdk.can_build:
        return complete_sdk(progress)
    return sdk if sdk.can_build else None


def _gpu_options(sdk: GpuSdk | None, *, cuda_tests: bool) -> list[str]:
    """Return CMake's options for the GPU's part."""
    switch = "OFF" if sdk is None else "ON"
    values = {"TINYLM_CUDA": switch, "TINYLM_TENSORRT": switch}
    values["TINYLM_CUDA_TESTS"] = "ON" if cuda_tests else "OFF"
    if sdk is not None:
        assert sdk.nvcc is not None and sdk.headers is not None
        library = library_in(sdk.libraries) if sdk.libraries else None
        values["TINYLM_NVCC"] = str(sdk.nvcc.path)
        values["TINYLM_TENSORRT_HEADER_DIR"] = str(sdk.headers)
        values["TINYLM_TENSORRT_LIBRARY"] = str(library or "TINYLM_TENSORRT_LIBRARY-NOTFOUND")
    return [part for name, value in values.items() for part in ("-D", f"{name}={value}")]


def _forget_other_nvcc(folder: Path, nvcc: Path) -> None:
    """Drop what CMake remembers of another CUDA compiler: it can't change one in a build tree."""
    cache = folder / "CMakeCache.txt"
    if not cache.is_file():
        return
    found = _CACHED_NVCC.search(cache.read_text(encoding="utf-8", errors="replace"))
    if found and Path(found[1]).resolve() != nvcc.resolve():
        cache.unlink()
        shutil.rmtree(folder / "CMakeFiles", ignore_errors=True)


def find_tool(name: str) -> str:
    """Find cmake or ninja: on the path, or beside this Python, where pip puts them.

    Raises:
        NativeToolError: It is in neither place.
    """
    beside = str(Path(sys.executable).parent)
    found = shutil.which(name) or shutil.which(name, path=beside)
    if found is None:
        raise NativeToolError(
            f"{name} is needed to build the native library: expected it on the path or in "
            f"{beside}, found it in neither. Run `pip install {name}`."
        )
    return found


def find_compiler() -> str:
    """Find the C++ compiler: what CXX names, else c++, g++ or clang++.

    Raises:
        NativeToolError: There is none.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    # A launcher before the compiler, as in CXX="ccache g++", is CMake's to understand.
    names = named[-1:] or _COMPILERS
    for name in names:
        found = shutil.which(name)
        if found:
            return found
    expected = f"CXX={os.environ['CXX']}" if named else " or ".join(names)
    raise NativeToolError(
        f"a C++ compiler is needed to build the native library: expected {expected} on the path, "
        "found none. Run `sudo apt-get install g++` (macOS: `xcode-select --install`)."
    )


def _run(name: str, command: list[str], *, log_path: Path, log: TextIO, progress: Progress) -> None:
    """Run one step of the build, its output going to the log.

    Raises:
        NativeError: It fails.
    """
    log.write(f"$ {shlex.join(command)}\n")
    progress(name, 0.0)
    lines: list[str] = []
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            lines.append(line.rstrip())
            step = _STEP.match(line)
            if step:
                progress(name, int(step[1]) / int(step[2]))
    progress(name, 1.0)
    if process.returncode:
        tail = "\n".join(lines[-_LOG_TAIL_LINES:])
        raise NativeError(
            f"the native library: `{name}` failed with exit code {process.returncode}. The last "
            f"lines of {log_path}:\n{tail}\nMend that, or delete {log_path.parent} and build again."
        )


def _describe_elsewhere(path: Path) -> native.NativeInfo:
    """Describe a new library in a fresh process; this one may hold an older file of that name."""
    code = (
        "import sys; from pathlib import Path; from tinylm_export.native import describe\n"
        "try:\n    info = describe(Path(sys.argv[1]))\n"
        "except ValueError as error:\n    sys.exit(str(error))\n"
        "print(info.version, info.isa)"
    )
    command = [sys.executable, "-c", code, str(path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise NativeError(f"the library was built and doesn't work: {done.stderr.strip()}")
    version, isa = done.stdout.split()
    return native.NativeInfo(version=version, isa=isa, path=path)
