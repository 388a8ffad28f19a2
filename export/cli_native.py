"""``tinylm-export native``: build the native libraries, find them, say what they use."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from tinylm.cli_shared import EXIT_NO, Json, write_json

app = typer.Typer(
    name="native",
    help="Build the CPU kernels for ONNX Runtime and the GPU plugins for TensorRT, and see which "
    "are used.",
    no_args_is_help=True,
)


@app.command(epilog="Example: tinylm-export native build")
def build(
    if_possible: Annotated[
        bool,
        typer.Option(
            "--if-possible",
            help="Say so and exit with 0 where a tool or header is missing; a build that fails "
            "still exits with 2.",
        ),
    ] = False,
    gpu: Annotated[
        bool | None,
        typer.Option(
            "--gpu/--no-gpu",
            help="Build TensorRT's plugins too, and fetch nvcc and TensorRT for it (1.9 GB) if "
            "need be. Default: where they are on this machine already.",
        ),
    ] = None,
    cuda_tests: Annotated[
        bool,
        typer.Option("--cuda-tests", help="With the plugins, build what `make test-gpu` loads."),
    ] = False,
    json: Json = None,
) -> None:
    """Fetch ONNX Runtime's C header and build the native libraries with CMake.

    They go to TINYLM_NATIVE_DIR, else to build/native of a source checkout, else to the cache.
    """
    from tinylm.errors import NativeToolError
    from tinylm_export import native_build
    from tinylm_export.native_gpu import BUILD_COMMAND, describe_plugins

    try:
        with _progress("native") as progress:
            sdk = native_build.choose_sdk(gpu, progress)
            info = native_build.build(sdk=sdk, cuda_tests=cuda_tests, progress=progress)
    except NativeToolError as error:
        if not if_possible:
            raise
        _warn(f"NATIVE LIBRARY NOT BUILT, the slower function bodies run instead: {error}")
        return
    values: dict[str, Any] = {"path": str(info.path), "version": info.version, "isa": info.isa}
    print(f"{info.path}: version {info.version}, {info.isa}")
    if sdk is not None and sdk.libraries is None:
        _warn("TensorRT's plugins are built and not tried: there are no libraries of TensorRT here")
    elif sdk is not None:
        plugins = describe_plugins(info.path.parent / "libtinylm_trt.so")
        print(f"{plugins.path}: version {plugins.version}, {plugins.build}")
        values["plugins"] = _plugin_values(plugins)
    elif gpu is None:
        _warn(
            "TensorRT's plugins are left out: nvcc and TensorRT's headers are not both on this "
            f"machine; `{BUILD_COMMAND}` fetches them"
        )
    write_json(json, values)


@app.command(epilog="Example: tinylm-export native path")
def path(
    plugins: Annotated[
        bool, typer.Option("--plugins", help="The path of TensorRT's plugins instead.")
    ] = False,
) -> None:
    """Print the native library's path; exit 1 if there is none."""
    import sys

    from tinylm_export import native, native_gpu

    found = native_gpu.find_plugin_library() if plugins else native.find_library()
    if found is None:
        command = native_gpu.BUILD_COMMAND if plugins else native.BUILD_COMMAND
        print(f"not built: none in {native.build_folder()}. Run `{command}`.", file=sys.stderr)
        raise typer.Exit(EXIT_NO)
    print(found)


@app.command(epilog="Example: tinylm-export native info")
def info(json: Json = None) -> None:
    """Show versions and paths of the libraries, and the instruction set used on this machine."""
    from tinylm_export.native import describe
    from tinylm_export.native_gpu import describe_plugins, find_plugin_library

    found = describe()
    values: dict[str, Any] = {
        "path": str(found.path),
        "version": found.version,
        "isa": found.isa,
        "plugins": None,
    }
    print(f"version  {found.version}\nisa      {found.isa}\npath     {found.path}")
    if find_plugin_library() is None:
        print("plugins  not built")
    else:
        plugins = describe_plugins()
        print(f"plugins  {plugins.path}\n         version {plugins.version}, {plugins.build}")
        values["plugins"] = _plugin_values(plugins)
    write_json(json, values)


@app.command(epilog="Example: tinylm-export native sdk")
def sdk(
    fetch: Annotated[
        bool, typer.Option("--fetch/--no-fetch", help="Fetch what is missing (up to 1.9 GB).")
    ] = True,
    json: Json = None,
) -> None:
    """Find nvcc and TensorRT, fetch what is missing, and print the variables that name them.

    What is fetched goes to TinyLM's cache. Exit 1 if, with --no-fetch, something is missing.
    """
    import os
    import shlex

    from tinylm_export import gpu_sdk, gpu_sdk_fetch

    wheel = None
    with _progress("SDK") as progress:
        found = gpu_sdk_fetch.complete_sdk(progress) if fetch else gpu_sdk.find_sdk()
        bindings = any(map(gpu_sdk_fetch.importable, ("tensorrt", "tensorrt_bindings")))
        if fetch and not bindings:
            wheel = gpu_sdk_fetch.fetch_bindings(progress)
    values: dict[str, str | None] = {
        "nvcc": str(found.nvcc.path) if found.nvcc else None,
        "headers": str(found.headers) if found.headers else None,
        "libraries": str(found.libraries) if found.libraries else None,
        "bindings": str(wheel) if wheel else None,
    }
    for name, value in values.items():
        _say(f"{name:9}  {value or ('installed' if name == 'bindings' and bindings else 'none')}")
    if wheel:
        _say(f"pip install --no-deps {shlex.quote(str(wheel))}  # for this Python")
    if found.nvcc:
        print(f"export CUDACXX={shlex.quote(str(found.nvcc.path))}")
    if found.headers:
        print(f"export {gpu_sdk.INCLUDE_VARIABLE}={shlex.quote(str(found.headers))}")
    if found.libraries:
        print(f"export {gpu_sdk.ROOT_VARIABLE}={shlex.quote(str(found.root))}")
        paths = [str(found.libraries), os.environ.get("LD_LIBRARY_PATH", "")]
        unique = dict.fromkeys(":".join(filter(None, paths)).split(":"))
        print(f"export LD_LIBRARY_PATH={shlex.quote(':'.join(unique))}")
    write_json(json, values)
    if found.missing:
        _warn(f"missing: {', '.join(found.missing)}. `{gpu_sdk.SDK_COMMAND}` fetches them")
        raise typer.Exit(EXIT_NO)


def _plugin_values(plugins: Any) -> dict[str, str]:
    return {"path": str(plugins.path), "version": plugins.version, "build": plugins.build}


@contextlib.contextmanager
def _progress(name: str) -> Iterator[Callable[[str, float], None]]:
    """Show a progress bar on a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    stderr = Console(stderr=True)
    with Progress(console=stderr, disable=not stderr.is_terminal, transient=True) as bar:
        task = bar.add_task(name, total=1.0)

        def progress(text: str, fraction: float) -> None:
            bar.update(task, description=f"{name}: {text}", completed=fraction)

        yield progress


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _warn(text: str) -> None:
    from rich.console import Console

    Console(stderr=True).print(text, style="bold yellow", highlight=False, soft_wrap=True)
