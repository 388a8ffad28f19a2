"""ONNX Runtime's C header, which its Python package lacks and the native build needs."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tinylm.errors import NativeError, NativeToolError
from tinylm.paths import cache_dir

HEADER = "onnxruntime_c_api.h"
INCLUDE_VARIABLE = "ONNXRUNTIME_INCLUDE_DIR"
# What the ops ask for (trt_plugins/ort_ops); an older header does not declare it.
MIN_API_VERSION = 17
# ONNX Runtime publishes its headers in no Python package. This Go binding carries them unaltered.
GO_MODULE = "github.com/yalue/onnxruntime_go@v1.27.0"
GO_TIMEOUT_SECONDS = 120
_SYSTEM_ROOTS = ("/usr", "/usr/local", "/opt/homebrew")
_IN_ROOT = (
    "include/onnxruntime",
    "include/onnxruntime/core/session",
    "include",
)
_API_VERSION = re.compile(r"^\s*#\s*define\s+ORT_API_VERSION\s+(\d+)", re.MULTILINE)


def header_api_version(folder: Path) -> int:
    """Return the ORT_API_VERSION of the header in a folder.

    Raises:
        NativeError: The folder has no such header, or one that doesn't say.
    """
    path = folder / HEADER
    if not path.is_file():
        raise NativeError(
            f"{folder}: expected a folder with {HEADER}, found none. Name the folder that holds "
            f"it in {INCLUDE_VARIABLE}, or unset the variable."
        )
    found = _API_VERSION.search(path.read_text(encoding="utf-8", errors="replace"))
    if found is None:
        raise NativeError(f"{path}: expected a line `#define ORT_API_VERSION N`, found none.")
    return int(found[1])


def check_header(folder: Path) -> Path:
    """Return a folder whose header is new enough.

    Raises:
        NativeError: No header, or one that is too old.
    """
    version = header_api_version(folder)
    if version < MIN_API_VERSION:
        raise NativeError(
            f"{folder / HEADER}: expected ORT_API_VERSION {MIN_API_VERSION} or newer, found "
            f"{version}. Take the header of ONNX Runtime 1.{MIN_API_VERSION} or newer."
        )
    return folder


def header_dir() -> Path:
    """Return a folder with ONNX Runtime's C header, and fetch the header if need be.

    Looked at in this order: ``ONNXRUNTIME_INCLUDE_DIR``, the system's include folders, what was
    fetched before, a Go module.

    Raises:
        NativeToolError: The header is nowhere; says what to install.
        NativeError: ``ONNXRUNTIME_INCLUDE_DIR`` names a folder without it, or with an old one.
    """
    named = os.environ.get(INCLUDE_VARIABLE)
    if named:
        return check_header(Path(named).expanduser().resolve())
    reasons = []
    for folder in (*_system_folders(), fetched_folder()):
        if (folder / HEADER).is_file():
            try:
                return check_header(folder)
            except NativeError as error:  # another place may have a better one
                reasons.append(str(error))
    try:
        return fetch_with_go()
    except NativeToolError as error:
        reasons.append(str(error))
    raise NativeToolError(
        f"ONNX Runtime's C header {HEADER} is not on this machine: none in the system's include "
        f"folders. {' '.join(reasons)} Install Debian's libonnxruntime-dev or Go (golang-go), or "
        f"unpack an ONNX Runtime release and set {INCLUDE_VARIABLE} to its include folder."
    )


def _system_folders() -> list[Path]:
    roots = (*_SYSTEM_ROOTS, sys.prefix)  # the latter for conda
    return [Path(root, folder) for root in dict.fromkeys(roots) for folder in _IN_ROOT]


def fetched_folder() -> Path:
    """Return where a fetched header is kept."""
    return cache_dir() / "onnxruntime-include" / GO_MODULE.rpartition("@")[2]


def fetch_with_go() -> Path:
    """Fetch the header with ``go mod download`` and keep it in TinyLM's cache.

    Raises:
        NativeToolError: There is no Go, or it can't fetch the module.
        NativeError: The module holds no usable header.
    """
    go = shutil.which("go")
    if go is None:
        raise NativeToolError("It can't be fetched either: there is no `go` on the path.")
    with tempfile.TemporaryDirectory() as scratch:  # outside any module of the user's
        command = [go, "mod", "download", "-json", GO_MODULE]
        try:
            done = subprocess.run(
                command, cwd=scratch, capture_output=True, text=True, timeout=GO_TIMEOUT_SECONDS
            )
            values = json.loads(done.stdout)
        except (OSError, subprocess.TimeoutExpired, json.JSONDecodeError) as error:
            raise NativeToolError(f"`{' '.join(command)}` failed: {error}.") from error
    if "Dir" not in values:
        reason = values.get("Error") or done.stderr.strip() or f"exit code {done.returncode}"
        raise NativeToolError(f"`go mod download {GO_MODULE}` failed: {reason}.")
    module = check_header(Path(values["Dir"]))
    folder = fetched_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch, "include")
        made.mkdir()
        # The header includes others of the same family.
        for path in sorted(module.glob("onnxruntime*_c_api.h")):
            shutil.copyfile(path, made / path.name)
        shutil.rmtree(folder, ignore_errors=True)
        made.replace(folder)
    return folder


def runtime_library() -> Path | None:
    """Return the library of the installed onnxruntime package, for C++ programs to load.

    None without the package: the ops need no library to be built, the C++ runtime is left out then.
    """
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        return None
    found = sorted((Path(spec.origin).parent / "capi").glob("libonnxruntime.so.*"))
    return found[0] if found else None
