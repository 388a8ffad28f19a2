"""TensorRT's plugins as a native library, built beside the CPU's (:mod:`tinylm_export.native`).

Building needs nvcc and TensorRT's headers (:mod:`tinylm_export.gpu_sdk`), and no GPU.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
from pathlib import Path

import tinylm
from tinylm.errors import NativeError
from tinylm_export import gpu_sdk, native

LIBRARY_NAME = "libtinylm_trt.so"
BUILD_COMMAND = "tinylm-export native build --gpu"
# Where they lie in the build tree of a CMake preset, apart from where they are installed.
_IN_FOLDER = (*native.INSTALL_FOLDERS, "plugins")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PluginInfo:
    """A plugin library that can be used.

    Attributes:
        version: Its version, equal to the Python package's.
        build: What it was built with, in its own words.
        path: The file.
    """

    version: str
    build: str
    path: Path


def find_plugin_library() -> Path | None:
    """Find TensorRT's plugins: in ``TINYLM_NATIVE_DIR``, else the checkout, else the cache."""
    folders = [native.build_folder()]
    if not os.environ.get(native.FOLDER_VARIABLE):
        folders.append(native.cached_folder())
    found = (native.newest_in_folder(folder, LIBRARY_NAME, _IN_FOLDER) for folder in folders)
    return next(filter(None, found), None)


def plugin_library() -> Path:
    """Return the library of TensorRT's plugins.

    Raises:
        NativeError: It is nowhere.
    """
    found = find_plugin_library()
    if found is None:
        raise NativeError(
            f"TensorRT's plugins are not built: no {LIBRARY_NAME} in {native.build_folder()}. Run "
            f"`{BUILD_COMMAND}`."
        )
    return found


def describe_plugins(path: Path | None = None) -> PluginInfo:
    """Load a plugin library, which needs no GPU, and check that it fits.

    Args:
        path: Default: what :func:`plugin_library` returns.

    Raises:
        NativeError: There is none, it can't be loaded, TensorRT's libraries that it needs are
            missing, or it is of another version than the Python package.
    """
    path = path or plugin_library()
    gpu_sdk.load_tensorrt()
    try:
        library = ctypes.CDLL(str(path))
        library.tinylm_version.restype = ctypes.c_char_p
        library.tinylm_trt_build_info.restype = ctypes.c_char_p
        version = library.tinylm_version().decode()
        build = library.tinylm_trt_build_info().decode()
    except (OSError, AttributeError) as error:
        raise NativeError(
            f"{path} can't be loaded as TensorRT's plugins: {error}. Run `{gpu_sdk.SDK_COMMAND}` "
            f"for TensorRT's libraries, then `{BUILD_COMMAND}`."
        ) from error
    if version != tinylm.__version__:
        raise NativeError(
            f"{path} is of another version than the Python package: expected "
            f"{tinylm.__version__}, found {version}. Run `{BUILD_COMMAND}`."
        )
    return PluginInfo(version=version, build=build, path=path)
