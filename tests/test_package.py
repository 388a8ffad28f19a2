from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import typer

import tinylm

ROOT = Path(__file__).resolve().parent.parent


def modules(folder: str) -> set[str]:
    return {path.relative_to(ROOT / folder).as_posix() for path in (ROOT / folder).rglob("*.py")}


def files(folder: str) -> set[str]:
    paths = (path for path in (ROOT / folder).rglob("*") if path.is_file())
    return {path.relative_to(ROOT / folder).as_posix() for path in paths}


def test_the_wheel_holds_every_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir"]
    subprocess.run([*command, str(tmp_path), str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("tinylm-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for package, folder in {"tinylm": "tinylm", "tinylm_export": "export"}.items():
        found = {n.removeprefix(f"{package}/") for n in names if n.startswith(f"{package}/")}
        assert {n for n in found if n.endswith(".py")} == modules(folder)
        assert "py.typed" in found
        if package == "tinylm_export":
            sources = {
                n.removeprefix("trt_plugins/") for n in found if n.startswith("trt_plugins/")
            }
            assert sources == files("trt_plugins")
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_one_version_everywhere() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.findall(r'^version = "(.*)"$', text, re.M) == [tinylm.__version__]
    native = (ROOT / "trt_plugins" / "VERSION").read_text(encoding="utf-8")
    assert native.split() == [tinylm.__version__]


def test_the_folder_can_not_be_imported_under_its_own_name() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "import export"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "installs as 'tinylm_export' and was imported as 'export'" in result.stderr


def test_the_model_never_imports_the_exporter() -> None:
    for path in (ROOT / "tinylm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not any(name.split(".")[0] == "tinylm_export" for name in names), path.name


def commands(app: typer.Typer, prefix: str) -> set[str]:
    click = typer.main.get_command(app)
    found = set()
    for name, command in click.commands.items():  # type: ignore[attr-defined]
        nested = getattr(command, "commands", None)
        found |= {f"{prefix} {name} {n}" for n in nested} if nested else {f"{prefix} {name}"}
    return found


def test_the_readme_lists_every_command_and_no_other() -> None:
    from tinylm.cli import app as tinylm_app
    from tinylm_export.cli import app as export_app

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(tinylm(?:-export)?(?: [a-z]+)+)", readme, re.M)
    expected = commands(tinylm_app, "tinylm") | commands(export_app, "tinylm-export")
    assert set(rows) == expected


@pytest.mark.parametrize("program", ["tinylm.cli", "tinylm_export.cli"])
def test_help_is_quick_because_it_imports_no_torch(program: str) -> None:
    code = (
        f"import sys, {program} as cli\n"
        "try:\n    cli.main(['--help'])\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        "assert 'torch' not in sys.modules and 'onnxruntime' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("program", ["tinylm", "tinylm_export"])
def test_every_command_has_an_example(program: str) -> None:
    import importlib

    click = typer.main.get_command(importlib.import_module(f"{program}.cli").app)

    def check(command: object, name: str) -> None:
        nested = getattr(command, "commands", None)
        if nested:
            for child, sub in nested.items():
                check(sub, f"{name} {child}")
        else:
            assert f"Example: {name}" in (getattr(command, "epilog", "") or ""), name

    check(click, program.replace("_", "-"))
