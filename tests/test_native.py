"""Finding, building and refusing the native library; what its ops compute is tested elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from cli_helpers import Cli, command_line
from native_helpers import LIBRARY, needs_library

import tinylm
from tinylm.errors import NativeError, NativeToolError
from tinylm_export import native, native_build, native_gpu, native_sdk
from tinylm_export.cli import main

ROOT = Path(__file__).resolve().parent.parent
BUILD = "tinylm-export native build"


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    return command_line(main, capsys)


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine on which nothing is built: empty build folder and cache."""
    for variable in (native.FOLDER_VARIABLE, native.ISA_VARIABLE, native_sdk.INCLUDE_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TINYLM_CACHE", str(tmp_path / "cache"))
    package = tmp_path / "checkout" / "export"
    package.mkdir(parents=True)
    monkeypatch.setattr(native, "_PACKAGE", package)
    return tmp_path


def make_checkout(folder: Path) -> Path:
    sources = folder / "checkout" / "trt_plugins"
    sources.mkdir()
    (sources / "CMakeLists.txt").touch()
    return sources


def touch(path: Path, *, seconds: int = 1_000_000_000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (seconds, seconds))
    return path


def write_header(folder: Path, version: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / native_sdk.HEADER).write_text(f"#define ORT_API_VERSION {version}\n")
    return folder


def test_order_of_places(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkout(nowhere)
    name = native.LIBRARY_NAME
    assert native.find_library() is None
    cached = touch(nowhere / "cache" / "native" / tinylm.__version__ / "lib" / name)
    assert native.find_library() == cached
    built = touch(nowhere / "checkout" / "build" / "native" / "lib" / name)
    assert native.find_library() == built
    named = touch(nowhere / "named" / name)
    monkeypatch.setenv(native.FOLDER_VARIABLE, str(nowhere / "named"))
    assert native.find_library() == named


def test_an_installed_package_builds_in_the_cache(nowhere: Path) -> None:
    assert not native.in_checkout()
    assert native.build_folder() == nowhere / "cache" / "native" / tinylm.__version__


def test_the_newest_library_of_a_build_folder_counts(nowhere: Path) -> None:
    make_checkout(nowhere)
    folder = nowhere / "checkout" / "build" / "native"
    installed = touch(folder / "lib" / native.LIBRARY_NAME)
    tree = touch(folder / "ort_ops" / native.LIBRARY_NAME)
    assert native.find_library() == installed
    touch(tree, seconds=1_000_000_001)  # built by a CMake preset, not installed
    assert native.find_library() == tree


def test_a_variable_that_points_nowhere_is_named(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    monkeypatch.setenv(native.FOLDER_VARIABLE, "/no/such/folder")
    message = rf"TINYLM_NATIVE_DIR=/no/such/folder: expected libtinylm_ort.* found none.*{BUILD}"
    with pytest.raises(NativeError, match=message):
        native.find_library()
    with pytest.raises(NativeError, match=message):
        native.choose(None)
    assert native.choose(False) is None
    code, _, err = cli("native", "path")
    assert code == 2 and "TINYLM_NATIVE_DIR=/no/such/folder" in err


def test_nothing_built(nowhere: Path, cli: Cli) -> None:
    assert native.choose(None) is None
    assert native.describe_kernels(None) == "function bodies in standard ops"
    with pytest.raises(NativeError, match=f"is not built: no libtinylm_ort.*Run `{BUILD}`"):
        native.choose(True)
    code, out, err = cli("native", "path")
    assert (code, out) == (1, "") and f"Run `{BUILD}`" in err
    code, out, err = cli("native", "info")
    assert code == 2 and f"Run `{BUILD}`" in err


def test_plugins_that_are_not_built_or_no_library(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    command = "tinylm-export native build --gpu"
    with pytest.raises(NativeError, match=rf"no libtinylm_trt\.so in .* Run `{command}`"):
        native_gpu.plugin_library()
    code, _, err = cli("native", "path", "--plugins")
    assert code == 1 and f"Run `{command}`" in err
    cached = touch(
        nowhere / "cache" / "native" / tinylm.__version__ / "lib" / native_gpu.LIBRARY_NAME
    )
    assert native_gpu.plugin_library() == cached
    monkeypatch.setenv(native.FOLDER_VARIABLE, str(nowhere / "named"))
    assert native_gpu.find_plugin_library() is None
    named = touch(nowhere / "named" / "plugins" / native_gpu.LIBRARY_NAME)
    assert native_gpu.plugin_library() == named
    message = rf"{named} can't be loaded as TensorRT's plugins: .* then `{command}`"
    with pytest.raises(NativeError, match=message):
        native_gpu.describe_plugins()


def test_missing_sources_are_named(nowhere: Path) -> None:
    with pytest.raises(NativeError, match=r"the C\+\+ sources are missing.*pip install"):
        native.source_dir()
    sources = make_checkout(nowhere)
    assert native.source_dir() == sources


def test_what_is_no_library_is_named(tmp_path: Path) -> None:
    path = tmp_path / native.LIBRARY_NAME
    path.write_bytes(b"not a library")
    with pytest.raises(NativeError, match=rf"{path} can't be loaded .*Run `{BUILD}`"):
        native.describe(path)


@needs_library
def test_describe(cli: Cli, tmp_path: Path) -> None:
    info = native.describe()
    assert (info.version, info.path) == (tinylm.__version__, LIBRARY)
    assert info.isa in native.ISAS
    assert info.kernels == f"tinylm {info.version} native, {info.isa}"
    assert native.choose(None) == native.choose(True) == info
    code, out, _ = cli("native", "path")
    assert (code, out.strip()) == (0, str(LIBRARY))
    code, out, _ = cli("native", "info", "--json", tmp_path / "info.json")
    assert code == 0 and info.isa in out
    expected = {"path": str(LIBRARY), "version": info.version, "isa": info.isa}
    values = json.loads((tmp_path / "info.json").read_text())
    plugins = values.pop("plugins")
    assert values == expected
    found = native_gpu.find_plugin_library()
    code, path, _ = cli("native", "path", "--plugins")
    if found is None:
        assert (code, path, plugins) == (1, "", None) and "plugins  not built" in out
    else:
        assert (code, path.strip()) == (0, str(found)) and str(found) in out
        assert plugins == {
            "path": str(found),
            "version": tinylm.__version__,
            "build": native_gpu.describe_plugins().build,
        }


@needs_library
def test_a_stale_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tinylm, "__version__", "9.8.7")
    message = rf"expected 9\.8\.7, found 0\.1\.0\. Run `{BUILD}`"
    for native_flag in (None, True):
        with pytest.raises(NativeError, match=message):
            native.choose(native_flag)
    assert native.choose(False) is None


def info_in_a_fresh_process(isa: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tinylm_export.cli", "native", "info"]
    environment = os.environ | {native.ISA_VARIABLE: isa}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@needs_library
def test_an_instruction_set_can_be_forced() -> None:
    done = info_in_a_fresh_process("portable")
    assert done.returncode == 0, done.stderr
    assert "isa      portable" in done.stdout


@needs_library
def test_a_wrong_instruction_set_is_named() -> None:
    done = info_in_a_fresh_process("mmx")
    assert done.returncode == 2
    assert "TINYLM_CPU_ISA" in done.stderr and "mmx" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("tool", ["cmake", "ninja", "compiler"])
def test_a_missing_tool_is_named(
    tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    """With a PATH that holds only the tools before it."""
    order = ["cmake", "ninja", "compiler"]
    for name in order[: order.index(tool)]:
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))  # pip's own are not there
    monkeypatch.delenv("CXX", raising=False)
    expected = {
        "cmake": "Run `pip install cmake`",
        "ninja": "Run `pip install ninja`",
        "compiler": "expected c++ or g++ or clang++ on the path, found none. Run `sudo apt-get",
    }[tool]
    code, _, err = cli("native", "build")
    assert code == 2 and expected in err
    code, _, err = cli("native", "build", "--if-possible")
    assert code == 0 and "NATIVE LIBRARY NOT BUILT" in err and expected in err


def test_the_compiler_that_cxx_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(NativeToolError, match="expected CXX=no-such-compiler on the path"):
        native_build.find_compiler()
    compiler = tmp_path / "my-c++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", f"ccache {compiler}")
    assert native_build.find_compiler() == str(compiler)


def test_header_from_the_variable(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_header(nowhere / "include", 17)
    monkeypatch.setenv(native_sdk.INCLUDE_VARIABLE, str(folder))
    assert native_sdk.header_dir() == folder
    write_header(folder, 16)
    with pytest.raises(NativeError, match="expected ORT_API_VERSION 17 or newer, found 16"):
        native_sdk.header_dir()
    (folder / native_sdk.HEADER).write_text("int x;\n")
    with pytest.raises(NativeError, match="expected a line `#define ORT_API_VERSION N`"):
        native_sdk.header_dir()
    (folder / native_sdk.HEADER).unlink()
    with pytest.raises(NativeError, match=r"expected a folder with onnxruntime_c_api\.h"):
        native_sdk.header_dir()


def test_header_of_the_system_comes_before_what_was_fetched(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = write_header(native_sdk.fetched_folder(), 20)
    system = nowhere / "system"
    monkeypatch.setattr(native_sdk, "_system_folders", lambda: [system])
    assert native_sdk.header_dir() == fetched
    write_header(system, 16)  # too old to be used
    assert native_sdk.header_dir() == fetched
    write_header(system, 18)
    assert native_sdk.header_dir() == system


def test_no_header_anywhere(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_sdk, "_system_folders", list)
    monkeypatch.setenv("PATH", str(nowhere))
    with pytest.raises(NativeToolError, match=r"no `go` on the path.*Install .*golang-go"):
        native_sdk.header_dir()


def fake_go(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "go").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "go").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(native_sdk, "_system_folders", list)


def test_header_fetched_with_go(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = write_header(nowhere / "module", 24)
    (module / "onnxruntime_ep_c_api.h").touch()
    (module / "onnxruntime_wrapper.h").touch()  # the binding's own
    answer = json.dumps({"Dir": str(module)})
    fake_go(nowhere, f"echo '{answer}'", monkeypatch)
    folder = native_sdk.header_dir()
    assert folder == native_sdk.fetched_folder()
    assert {p.name for p in folder.iterdir()} == {"onnxruntime_c_api.h", "onnxruntime_ep_c_api.h"}
    (nowhere / "go").unlink()
    assert native_sdk.header_dir() == folder


def test_go_without_network(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_go(nowhere, """echo '{"Error": "no route to host"}'; exit 1""", monkeypatch)
    with pytest.raises(NativeToolError, match="failed: no route to host"):
        native_sdk.header_dir()
    fake_go(nowhere, "echo broken", monkeypatch)
    with pytest.raises(NativeToolError, match=r"`.*go mod download .*` failed: "):
        native_sdk.header_dir()


def need_build_tools() -> None:
    try:
        for tool in ("cmake", "ninja"):
            native_build.find_tool(tool)
        native_build.find_compiler()
        native_sdk.header_dir()
    except NativeToolError as error:
        pytest.skip(f"NOT TESTED: {error}")


def test_a_build_that_fails_shows_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    need_build_tools()
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22)\nproject(x LANGUAGES CXX)\n"
        "add_library(tinylm_ort SHARED a.cpp)\n"
    )
    (sources / "a.cpp").write_text("int main( { return wrong; }\n")
    monkeypatch.setattr(native, "source_dir", lambda: sources)
    monkeypatch.setenv(native.FOLDER_VARIABLE, str(tmp_path / "out"))
    for flag in ((), ("--if-possible",)):
        code, _, err = cli("native", "build", *flag)
        assert code == 2
        assert "`build` failed with exit code 1" in err
        assert f"The last lines of {tmp_path / 'out' / 'build.log'}:" in err
        assert "a.cpp:1" in err
    assert "a.cpp:1" in (tmp_path / "out" / "build.log").read_text()


def test_a_folder_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    need_build_tools()
    (tmp_path / "file").touch()
    with pytest.raises(NativeError, match=r"can't be built there .*Set TINYLM_NATIVE_DIR"):
        native_build.build(tmp_path / "file" / "folder")


@pytest.mark.slow
def test_an_installed_wheel_builds_its_own_library(tmp_path: Path) -> None:
    """No checkout in sight: sources from the wheel, library in the cache."""
    need_build_tools()
    header = native_sdk.header_dir()
    copy = tmp_path / "source"
    ignore = shutil.ignore_patterns(".*", "build", "demo", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=ignore)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir"]
    subprocess.run([*command, str(tmp_path), str(copy)], check=True, capture_output=True)
    shutil.rmtree(copy)
    site = tmp_path / "site"
    zipfile.ZipFile(next(tmp_path.glob("tinylm-*.whl"))).extractall(site)
    unwanted = {native.FOLDER_VARIABLE, native.ISA_VARIABLE}
    environment = {key: value for key, value in os.environ.items() if key not in unwanted}
    environment |= {
        "PYTHONPATH": str(site),
        "TINYLM_CACHE": str(tmp_path / "cache"),
        native_sdk.INCLUDE_VARIABLE: str(header),
    }

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "tinylm_export.cli", "native", *arguments],
            capture_output=True,
            text=True,
            env=environment,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    library = tmp_path / "cache" / "native" / tinylm.__version__ / "lib" / native.LIBRARY_NAME
    assert run("build").startswith(f"{library}: version {tinylm.__version__}, ")
    assert run("path").strip() == str(library)
    assert str(library) in run("info")
