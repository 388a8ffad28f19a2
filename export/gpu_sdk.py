"""Where nvcc and TensorRT are on this machine: what the GPU part is built with and runs on.

:mod:`tinylm_export.gpu_sdk_fetch` fetches what is missing.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from tinylm.errors import NativeError, NativeToolError
from tinylm.paths import cache_dir

ROOT_VARIABLE = "TENSORRT_ROOT"
INCLUDE_VARIABLE = "TENSORRT_INCLUDE_DIR"
SDK_COMMAND = "tinylm-export native sdk"
# Older ones know no sm_90a; TensorRT's plugins alias their inputs and outputs since 10.3.
MIN_NVCC = (12, 0)
MIN_HEADERS = (10, 3)
HEADER = "NvInfer.h"
_VERSION_HEADER = "NvInferVersion.h"
_VERSION = r"^#define (?:NV_TENSORRT|TRT)_{part}(?:_ENTERPRISE)?\s+(\d+)"
_LIBRARY = re.compile(r"libnvinfer\.so\.(\d+)")
_RELEASE = re.compile(r"release (\d+)\.(\d+)")
_SYSTEM_INCLUDES = (
    *("/usr/include/x86_64-linux-gnu", "/usr/include/aarch64-linux-gnu"),
    *("/usr/include", "/usr/local/include"),
)
_SYSTEM_LIBRARIES = (
    *("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu"),
    *("/usr/lib64", "/usr/lib", "/usr/local/lib"),
)
_TOOLKIT = "/usr/local/cuda"
_NVCC_TIMEOUT_SECONDS = 10
# What nvcc needs beside it; NVIDIA ships each part in a Python package of its own.
_NVCC_PARTS = ("nvvm/bin/cicc", "include/cuda_runtime.h", "lib/libcudart_static.a")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nvcc:
    """A CUDA compiler that runs.

    Attributes:
        path: The program.
        version: Its CUDA version, such as ``(13, 0)``.
    """

    path: Path
    version: tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuSdk:
    """What was found; None for what wasn't.

    Attributes:
        nvcc: The CUDA compiler.
        headers: The folder of TensorRT's C++ headers.
        libraries: The folder of TensorRT's libraries, ``libnvinfer.so.N``.
    """

    nvcc: Nvcc | None
    headers: Path | None
    libraries: Path | None

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of what was not found."""
        parts = {
            "nvcc": self.nvcc,
            "TensorRT's headers": self.headers,
            "TensorRT's libraries": self.libraries,
        }
        return tuple(name for name, part in parts.items() if part is None)

    @property
    def can_build(self) -> bool:
        """Whether the plugins can be compiled; their users bring the libraries."""
        return self.nvcc is not None and self.headers is not None

    @property
    def root(self) -> Path | None:
        """What ``TENSORRT_ROOT`` should be."""
        if self.libraries is None:
            return None
        inner = self.libraries.name in ("lib", "lib64")
        return self.libraries.parent if inner else self.libraries


def find_sdk() -> GpuSdk:
    """Look for everything, and fetch nothing.

    Raises:
        NativeError: ``TENSORRT_ROOT`` or ``CUDA_HOME`` names a folder without it, or the headers
            are too old or of another major version than the libraries.
    """
    headers, libraries = find_headers(), find_libraries()
    if headers and libraries:
        expected, found = library_major(libraries), header_version(headers)
        if expected != found[0]:
            raise NativeError(
                f"{headers}: TensorRT's headers and libraries don't fit: expected headers of "
                f"version {expected}, as the libraries in {libraries}, found {found[0]}.{found[1]}."
                f" Set {ROOT_VARIABLE} to a folder with both, in include/ and lib/."
            )
    return GpuSdk(nvcc=find_nvcc(), headers=headers, libraries=libraries)


def find_nvcc() -> Nvcc | None:
    """Find the CUDA compiler.

    Looked at in this order: ``CUDA_HOME``, the path, ``/usr/local/cuda``, NVIDIA's Python packages,
    what was fetched before. One that is too old or lacks a part is passed over.

    Raises:
        NativeError: ``CUDA_HOME`` is set and has none that can be used.
    """
    home = os.environ.get("CUDA_HOME")
    if home:
        path = Path(home).expanduser() / "bin" / "nvcc"
        found = _try_nvcc(path)
        if found is None:
            raise NativeError(
                f"CUDA_HOME={home}: expected a CUDA compiler {path} of version {MIN_NVCC[0]}."
                f"{MIN_NVCC[1]} or newer, found none that runs. Unset CUDA_HOME, or name the "
                "folder of a CUDA toolkit."
            )
        return found
    on_path = shutil.which("nvcc")
    places = [Path(on_path)] if on_path else []
    places.append(Path(_TOOLKIT, "bin", "nvcc"))
    for packages in (*_nvidia_packages(), nvcc_folder() / "nvidia"):
        for path in sorted(packages.glob("*/bin/nvcc"), reverse=True):
            root = path.parent.parent
            if all((root / part).exists() for part in _NVCC_PARTS):
                places.append(path)
    return next(filter(None, map(_try_nvcc, places)), None)


def _nvidia_packages() -> list[Path]:
    spec = importlib.util.find_spec("nvidia")
    return [Path(place) for place in (spec and spec.submodule_search_locations) or ()]


def _try_nvcc(path: Path) -> Nvcc | None:
    """Return a compiler that runs and is new enough."""
    try:
        done = subprocess.run(
            [str(path), "--version"], capture_output=True, text=True, timeout=_NVCC_TIMEOUT_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    release = _RELEASE.search(done.stdout)
    version = (int(release[1]), int(release[2])) if release else (0, 0)
    if done.returncode or version < MIN_NVCC:
        return None
    return Nvcc(path=path, version=version)


def find_headers() -> Path | None:
    """Find the folder of TensorRT's C++ headers.

    Looked at in this order: ``TENSORRT_INCLUDE_DIR``, ``TENSORRT_ROOT``, the system's include
    folders, what was fetched before.

    Raises:
        NativeError: ``TENSORRT_INCLUDE_DIR`` has none, or those that a variable names are too old.
    """
    root = _named_root()
    named = [root / "include", root] if root else []
    include = os.environ.get(INCLUDE_VARIABLE)
    if include:
        named.insert(0, Path(include).expanduser().resolve())
        if not (named[0] / HEADER).is_file():
            raise NativeError(
                f"{INCLUDE_VARIABLE}={include}: expected {HEADER} in it, found none. Unset "
                f"{INCLUDE_VARIABLE}, or name the folder of TensorRT's headers."
            )
    for folder in (*named, *map(Path, _SYSTEM_INCLUDES), tensorrt_folder() / "include"):
        if not (folder / HEADER).is_file():
            continue
        found = header_version(folder)
        if found >= MIN_HEADERS:
            return folder
        if folder in named:
            raise NativeError(
                f"{folder / HEADER}: expected TensorRT {MIN_HEADERS[0]}.{MIN_HEADERS[1]} or newer, "
                f"found {found[0]}.{found[1]}. Set {INCLUDE_VARIABLE} to the folder of newer ones."
            )
    return None


def header_version(folder: Path) -> tuple[int, int]:
    """Return the version of the headers in a folder.

    Raises:
        NativeError: They don't say.
    """
    path = folder / _VERSION_HEADER
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    numbers = [
        re.search(_VERSION.format(part=part), text, re.MULTILINE) for part in ("MAJOR", "MINOR")
    ]
    if numbers[0] is None or numbers[1] is None:
        raise NativeError(
            f"{path}: expected TensorRT's version in it, found none. Install TensorRT's headers "
            "again."
        )
    return int(numbers[0][1]), int(numbers[1][1])


def find_libraries() -> Path | None:
    """Find the folder of TensorRT's libraries.

    Looked at in this order: ``TENSORRT_ROOT`` (its lib/, or itself), the system's folders, the
    Python package tensorrt_libs, what was fetched before.

    Raises:
        NativeError: ``TENSORRT_ROOT`` is set and holds neither libraries nor headers.
    """
    root = _named_root()
    named = [root / "lib", root / "lib64", root] if root else []
    spec = importlib.util.find_spec("tensorrt_libs")
    package = [Path(place) for place in (spec and spec.submodule_search_locations) or ()]
    fetched = tensorrt_folder() / "lib"
    for folder in (*named, *map(Path, _SYSTEM_LIBRARIES), *package, fetched):
        if library_in(folder) is not None:
            return folder
    return None


def _named_root() -> Path | None:
    """Return ``TENSORRT_ROOT``, which must hold headers or libraries."""
    named = os.environ.get(ROOT_VARIABLE)
    if not named:
        return None
    root = Path(named).expanduser().resolve()
    has_headers = any((folder / HEADER).is_file() for folder in (root / "include", root))
    if has_headers or any(library_in(folder) for folder in (root / "lib", root / "lib64", root)):
        return root
    raise NativeError(
        f"{ROOT_VARIABLE}={named}: expected lib/libnvinfer.so.10 or include/{HEADER} in it, found "
        f"neither. Unset {ROOT_VARIABLE}, or run `{SDK_COMMAND}`, which finds or fetches TensorRT."
    )


def library_in(folder: Path) -> Path | None:
    """Return ``libnvinfer.so.N`` of the newest N in a folder, or None."""
    found = [path for path in folder.glob("libnvinfer.so.*") if _LIBRARY.fullmatch(path.name)]
    return max(found, key=_major, default=None)


def library_major(folder: Path) -> int:
    """Return the major version of the libraries in a folder that has them."""
    path = library_in(folder)
    assert path is not None
    return _major(path)


def _major(path: Path) -> int:
    found = _LIBRARY.fullmatch(path.name)
    assert found is not None
    return int(found[1])


def load_tensorrt(folder: Path | None = None) -> str | None:
    """Load ``libnvinfer`` into this process, so that what is linked to it can be loaded.

    Args:
        folder: Of the libraries; default :func:`find_libraries`.

    Returns:
        Its version, or None if there is none.

    Raises:
        NativeToolError: It can't be loaded.
    """
    folder = folder or find_libraries()
    path = library_in(folder) if folder else None
    if path is None:
        return None
    try:
        number = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL).getInferLibVersion()
    except (OSError, AttributeError) as error:
        raise NativeToolError(
            f"{path} can't be loaded as TensorRT: {error}. Set {ROOT_VARIABLE} to another, or run "
            f"`{SDK_COMMAND}`."
        ) from error
    return version_text(number)


def version_text(number: int) -> str:
    """Return what ``getInferLibVersion`` gives as a text: 100600 is 10.6.0."""
    # 10.x counts the major version in ten thousands, versions before it in thousands.
    parts: Iterable[int] = (number // 10000, number // 100 % 100, number % 100)
    return ".".join(map(str, parts))


def tensorrt_folder() -> Path:
    """Return where a fetched TensorRT is kept: lib/, include/ and wheels/."""
    return cache_dir() / "tensorrt"


def nvcc_folder() -> Path:
    """Return where a fetched CUDA compiler is kept."""
    return cache_dir() / "cuda"
