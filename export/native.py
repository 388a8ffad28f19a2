"""The native library: CPU kernels of the custom ops, for ONNX Runtime.

It is built where it is used (:mod:`tinylm_export.native_build`), for every instruction set of the
processor's kind; which one runs is chosen when it is loaded, or by ``TINYLM_CPU_ISA``.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import tinylm
from tinylm.errors import NativeError
from tinylm.paths import cache_dir

FOLDER_VARIABLE = "TINYLM_NATIVE_DIR"
ISA_VARIABLE = "TINYLM_CPU_ISA"
ISAS = ("portable", "avx2", "avx-vnni", "avx512-vnni", "amx-int8")
LIBRARY_NAME = "libtinylm_ort.dylib" if sys.platform == "darwin" else "libtinylm_ort.so"
BUILD_COMMAND = "tinylm-export native build"
BODIES = "function bodies in standard ops"
# Where a library may lie in its folder: installed, or in the build tree of a CMake preset.
INSTALL_FOLDERS = ("lib", "lib64", ".")
_IN_FOLDER = (*INSTALL_FOLDERS, "ort_ops")
_PACKAGE = Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class NativeInfo:
    """A library that can be used.

    Attributes:
        version: Its version, equal to the Python package's.
        isa: The instruction set that its kernels use, one of :data:`ISAS`.
        path: The file.
    """

    version: str
    isa: str
    path: Path

    @property
    def kernels(self) -> str:
        """What runs the custom ops with this library, as a text for people."""
        return f"tinylm {self.version} native, {self.isa}"


def source_dir() -> Path:
    """Return the folder of the C++ sources, in a checkout or in the installed package.

    Raises:
        NativeError: They are in neither.
    """
    for folder in (_PACKAGE / "trt_plugins", _PACKAGE.parent / "trt_plugins"):
        if (folder / "CMakeLists.txt").is_file():
            return folder
    raise NativeError(
        f"{_PACKAGE}: the C++ sources are missing: expected a folder trt_plugins in it or beside "
        "it. Install tinylm again: pip install --force-reinstall tinylm."
    )


def in_checkout() -> bool:
    """Whether this package runs from a source checkout rather than from a wheel."""
    return (_PACKAGE.parent / "trt_plugins" / "CMakeLists.txt").is_file()


def cached_folder() -> Path:
    """Return the folder in the user's cache for this version's library."""
    return cache_dir() / "native" / tinylm.__version__


def build_folder() -> Path:
    """Return where ``tinylm-export native build`` puts the library.

    That is ``TINYLM_NATIVE_DIR``, else the checkout's ``build/native``, else the user's cache.
    """
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named).expanduser().resolve()
    return _PACKAGE.parent / "build" / "native" if in_checkout() else cached_folder()


def find_library() -> Path | None:
    """Find the native library.

    Looked at in this order: ``TINYLM_NATIVE_DIR``, the checkout's ``build/native``, the user's
    cache.

    Returns:
        The library, or None if it is nowhere.

    Raises:
        NativeError: ``TINYLM_NATIVE_DIR`` is set and doesn't hold it.
    """
    found = _in_folder(build_folder())
    if found is not None:
        return found
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        raise NativeError(
            f"{FOLDER_VARIABLE}={named}: expected {LIBRARY_NAME} in it or in its lib/, found none. "
            f"Unset {FOLDER_VARIABLE}, or run `{BUILD_COMMAND}`, which builds it there."
        )
    return _in_folder(cached_folder())


def _in_folder(folder: Path) -> Path | None:
    return newest_in_folder(folder, LIBRARY_NAME, _IN_FOLDER)


def newest_in_folder(folder: Path, name: str, parts: Iterable[str]) -> Path | None:
    """Return the newest library in parts of a folder: whoever built last is the one to be used."""
    paths = [folder / part / name for part in parts]
    # In whole seconds: CMake installs a copy with the time of the original, cut to that.
    return max(
        filter(Path.is_file, paths), key=lambda path: int(path.stat().st_mtime), default=None
    )


def describe(path: Path | None = None) -> NativeInfo:
    """Load a library and check that it fits.

    Args:
        path: Default: what :func:`find_library` finds.

    Raises:
        NativeError: There is none, it can't be loaded, it is of another version than the Python
            package, or ``TINYLM_CPU_ISA`` asks for what the processor lacks.
    """
    path = path or find_library()
    if path is None:
        raise NativeError(
            f"the native library is not built: no {LIBRARY_NAME} in {build_folder()}. Run "
            f"`{BUILD_COMMAND}`."
        )
    library = _load(path)
    version = library.tinylm_version().decode()
    if version != tinylm.__version__:
        raise NativeError(
            f"{path} is of another version than the Python package: expected "
            f"{tinylm.__version__}, found {version}. Run `{BUILD_COMMAND}`."
        )
    isa = library.tinylm_cpu_isa().decode()
    if isa not in ISAS:  # the library says why instead
        raise NativeError(f"{path}: {isa}. Unset {ISA_VARIABLE} to let the library choose.")
    return NativeInfo(version=version, isa=isa, path=path)


def choose(native: bool | None) -> NativeInfo | None:
    """Choose what runs the custom ops.

    Args:
        native: None for the library if there is one, True to require it, False for the function
            bodies.

    Returns:
        The library, or None for the function bodies.

    Raises:
        NativeError: It is required and not built, or there is one that can't be used.
    """
    if native is False or (native is None and find_library() is None):
        return None
    return describe()


def describe_kernels(info: NativeInfo | None) -> str:
    """Return what runs the custom ops, as a text for people."""
    return info.kernels if info else BODIES


def kernel_calls(info: NativeInfo, ops: Iterable[str]) -> dict[str, int]:
    """Return how often the library's kernels of each op have run in this process."""
    library = _load(info.path)
    return {op: int(library.tinylm_kernel_calls(op.encode())) for op in ops}


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    """Load a library and declare its functions.

    Raises:
        NativeError: It is no library for this machine, or lacks a function.
    """
    try:
        library = ctypes.CDLL(str(path))
        library.tinylm_version.restype = ctypes.c_char_p
        library.tinylm_cpu_isa.restype = ctypes.c_char_p
        library.tinylm_kernel_calls.restype = ctypes.c_uint64
        library.tinylm_kernel_calls.argtypes = [ctypes.c_char_p]
    except (OSError, AttributeError) as error:
        raise NativeError(
            f"{path} can't be loaded as the native library: {error}. Run `{BUILD_COMMAND}`."
        ) from error
    return library
