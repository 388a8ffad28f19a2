"""``tinylm-export native``: build the native library, find it, say what it uses."""

from __future__ import annotations

from typing import Annotated

import typer

from tinylm.cli_shared import EXIT_NO, Json, write_json

app = typer.Typer(
    name="native",
    help="Build the CPU kernels for ONNX Runtime, and see which are used.",
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
    json: Json = None,
) -> None:
    """Fetch ONNX Runtime's C header and build the native library with CMake.

    It goes to TINYLM_NATIVE_DIR, else to build/native of a source checkout, else to the cache.
    """
    from rich.console import Console
    from rich.progress import Progress

    from tinylm.errors import NativeToolError
    from tinylm_export.native_build import build as build_library

    stderr = Console(stderr=True)
    try:
        with Progress(console=stderr, disable=not stderr.is_terminal, transient=True) as bar:
            task = bar.add_task("native", total=1.0)

            def progress(text: str, fraction: float) -> None:
                bar.update(task, description=f"native: {text}", completed=fraction)

            info = build_library(progress=progress)
    except NativeToolError as error:
        if not if_possible:
            raise
        stderr.print(
            f"NATIVE LIBRARY NOT BUILT, the slower function bodies run instead: {error}",
            style="bold yellow",
            highlight=False,
            soft_wrap=True,
        )
        return
    print(f"{info.path}: version {info.version}, {info.isa}")
    write_json(json, {"path": str(info.path), "version": info.version, "isa": info.isa})


@app.command(epilog="Example: tinylm-export native path")
def path() -> None:
    """Print the native library's path; exit 1 if there is none."""
    import sys

    from tinylm_export.native import BUILD_COMMAND, build_folder, find_library

    found = find_library()
    if found is None:
        print(f"not built: none in {build_folder()}. Run `{BUILD_COMMAND}`.", file=sys.stderr)
        raise typer.Exit(EXIT_NO)
    print(found)


@app.command(epilog="Example: tinylm-export native info")
def info(json: Json = None) -> None:
    """Show the native library's version and the instruction set it uses on this machine."""
    from tinylm_export.native import describe

    found = describe()
    print(f"version  {found.version}\nisa      {found.isa}\npath     {found.path}")
    write_json(json, {"path": str(found.path), "version": found.version, "isa": found.isa})
