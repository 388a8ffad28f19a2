"""What is built for the GPU, as far as that can be seen without one.

`make native-gpu` builds it. CI sets TINYLM_REQUIRE_GPU_BUILD: nothing is skipped then.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import tinylm
from tinylm.errors import NativeToolError
from tinylm_export import gpu_sdk, native_build, native_gpu
from tinylm_export.gpu_sdk_fetch import fetch_headers
from tinylm_export.plugin_ops import PLUGIN_NAMESPACE, PLUGIN_VERSION, PLUGINS

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "native"
LIBRARY = BUILD / "lib" / native_gpu.LIBRARY_NAME
CREATORS = {name: set(spec.attribute_names()) for name, spec in PLUGINS.items()}
EXPORTED = {"getCreators", "setLoggerFinder", "tinylm_version", "tinylm_trt_build_info"}

if not LIBRARY.is_file() and not os.environ.get("TINYLM_REQUIRE_GPU_BUILD"):
    pytest.skip(
        f"NOT TESTED: {native_gpu.LIBRARY_NAME} is not built; run `make native-gpu`, which fetches "
        "nvcc and TensorRT and needs no GPU",
        allow_module_level=True,
    )


def run(*command: str | Path) -> str:
    sdk = gpu_sdk.find_sdk()
    environment = os.environ | {"LD_LIBRARY_PATH": str(sdk.libraries)}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def compile_commands() -> dict[Path, list[str]]:
    commands = json.loads((BUILD / "compile_commands.json").read_text(encoding="utf-8"))
    return {Path(item["file"]): shlex.split(item["command"]) for item in commands}


def architectures() -> list[str]:
    """Return what the build tree is for, such as sm_80."""
    cache = (BUILD / "CMakeCache.txt").read_text(encoding="utf-8")
    found = re.search(r"^TINYLM_CUDA_ARCHITECTURES:STRING=(.*)$", cache, re.MULTILINE)
    assert found
    return [f"sm_{one.removesuffix('-real')}" for one in found[1].split(";")]


def test_every_cuda_file_is_compiled_for_every_gpu() -> None:
    assert {"sm_80", "sm_90a"} <= set(architectures())
    sources = sorted((ROOT / "trt_plugins").rglob("*.cu"))
    assert sources
    commands = compile_commands()
    for source in sources:
        line = " ".join(commands[source])
        for architecture in architectures():
            assert f"{architecture}]" in line, (source, architecture)


def test_the_library_is_built_from_the_sources_as_they_are() -> None:
    cmake = native_build.find_tool("cmake")
    assert "no work to do" in run(cmake, "--build", BUILD, "--target", "tinylm_trt")


def test_the_library_loads_without_a_gpu() -> None:
    info = native_gpu.describe_plugins(LIBRARY)
    assert info.version == tinylm.__version__
    headers = gpu_sdk.find_headers()
    assert headers is not None
    assert ".".join(map(str, gpu_sdk.header_version(headers))) in info.build


def test_its_creators_are_the_contract() -> None:
    output = run(BUILD / "plugins" / "list_creators", LIBRARY)
    lines = [line.split("\t") for line in output.splitlines()]
    assert {(name, *rest[:2]) for name, *rest in lines} == {
        (name, PLUGIN_VERSION, PLUGIN_NAMESPACE) for name in CREATORS
    }
    assert {line[0]: set(line[3].split(",")) for line in lines} == CREATORS


def test_nothing_else_is_exported() -> None:
    for library, expected in ((LIBRARY, EXPORTED), (BUILD / "lib/libtinylm_cuda_test.so", None)):
        lines = run("nm", "-D", "--defined-only", library).splitlines()
        names = {line.split()[-1] for line in lines}
        if expected is None:
            assert names and all(name.startswith("tinylm_") for name in names), names
        else:
            assert names == expected


def test_it_needs_no_cuda_library() -> None:
    needed = run("readelf", "-d", LIBRARY)
    assert "libcudart" not in needed


@pytest.mark.slow
def test_the_sources_suit_tensorrt_11_too() -> None:
    headers = gpu_sdk.tensorrt_folder() / "include-11.4"
    if not (headers / gpu_sdk.HEADER).is_file():
        try:
            fetch_headers(headers, "11.4")
        except NativeToolError as error:
            if os.environ.get("TINYLM_REQUIRE_GPU_BUILD"):
                raise
            pytest.skip(f"NOT TESTED: {error}")
    assert gpu_sdk.header_version(headers)[0] == 11
    found = gpu_sdk.find_headers()
    assert found is not None
    used = found.resolve()
    sources = sorted((ROOT / "trt_plugins" / "plugins").glob("*.cpp"))
    assert sources
    commands = compile_commands()
    for source in sources:
        command = [
            str(headers) if Path(part).resolve() == used else part for part in commands[source]
        ]
        assert str(headers) in command
        run(*command[: command.index("-o")], "-fsyntax-only", source)
