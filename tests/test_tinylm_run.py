"""tinylm-run: what it refuses, and on a GPU that its ids are the Python session's."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import edit_manifest, flip_byte, make_engine_directory, needs_gpu
from export_helpers import make_export

from tinylm.generate import stream
from tinylm_export import gpu_sdk
from tinylm_export.manifest import MANIFEST_FILE
from tinylm_export.trt_engine import ENGINE_FILE

ROOT = Path(__file__).resolve().parents[1]
LIBRARY_VARIABLE = "TINYLM_TENSORRT_LIBRARY"


@pytest.fixture(scope="module")
def program() -> Path:
    """Find the program in the native build, or skip."""
    folder = Path(os.environ.get("TINYLM_NATIVE_DIR", ROOT / "build" / "native"))
    found = sorted(path for path in folder.rglob("tinylm-run") if path.is_file())
    if not found:
        pytest.skip(
            f"NOT TESTED: {folder} holds no tinylm-run: run `tinylm-export native build --gpu`, or "
            "set TINYLM_NATIVE_DIR"
        )
    return found[0]


@pytest.fixture(scope="module")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("run"), tie_embeddings=False)[1]


@pytest.fixture
def fake(onnx: Path, tmp_path: Path) -> Path:
    return make_engine_directory(onnx, tmp_path / "engine")


def run(program: Path, *arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    libraries = gpu_sdk.find_libraries()
    library = None if libraries is None else gpu_sdk.library_in(libraries)
    named = {} if library is None else {LIBRARY_VARIABLE: str(library)}
    return subprocess.run(
        [str(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **named, **environment},
    )


def refusal(program: Path, *arguments: Any, **environment: str) -> str:
    """Return the message of a run that must fail."""
    done = run(program, *arguments, **environment)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("tinylm-run: ")
    return done.stderr


def test_help(program: Path) -> None:
    done = run(program, "--help")
    assert done.returncode == 0 and "Example: tinylm-run --engine" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--engine is missing"),
        (["--engine", "x"], "--prompt-ids is missing"),
        (["--engine", "x", "--prompt-ids", "1,two"], "an integer expected, found 'two'"),
        (["--engine", "x", "--prompt-ids", "1,,2"], "an integer expected, found ''"),
        (["--engine", "x", "--prompt-ids="], "an integer expected, found ''"),
        (["--engine", "x", "--prompt-ids", "99999999999999999999"], "an integer expected"),
        (["--engine", "x", "--prompt-ids", "1", "--prompt-ids", "2"], "--prompt-ids: given twice"),
        (["--engine", "x", "--prompt-ids"], "--prompt-ids: a value expected"),
        (["--engine=", "--prompt-ids", "1"], "--engine: a path expected"),
        (["--engine", "x", "--prompt-ids", "1", "--max-new-tokens", "-1"], "must be 0 or more"),
        (["--engine", "x", "--prompt-ids", "1", "--ignore-eos=1"], "takes no value"),
        (["engine"], "unknown argument 'engine'"),
    ],
)
def test_bad_arguments(program: Path, arguments: list[str], message: str) -> None:
    found = refusal(program, *arguments)
    assert message in found and "tinylm-run --help" in found


def test_not_an_engine_directory(program: Path, onnx: Path) -> None:
    message = refusal(program, "--engine", onnx, "--prompt-ids", "1,2")
    assert "manifest.json: not found" in message and "tinylm-export trt" in message


@pytest.mark.parametrize("name", [ENGINE_FILE, "config.json"])
def test_an_altered_file(program: Path, fake: Path, name: str) -> None:
    flip_byte(fake / name)
    message = refusal(program, "--engine", fake, "--prompt-ids", "1,2")
    assert f"{name}: truncated or altered: SHA-256" in message


def test_every_length_of_a_file_has_pythons_digest(program: Path, fake: Path) -> None:
    """An engine of each length around the blocks of SHA-256 gets past the checksums."""
    for length in (0, 1, 55, 56, 63, 64, 65, 119, 120, 128, (1 << 20) - 1, 1 << 20, (1 << 20) + 3):
        (fake / ENGINE_FILE).write_bytes(bytes(range(256)) * (length // 256 + 1))
        with (fake / ENGINE_FILE).open("r+b") as file:
            file.truncate(length)
        copy = edit_manifest(fake, fake.parent / str(length), dense=True)
        message = refusal(program, "--engine", copy, "--prompt-ids", "1,2")
        assert "a --dense engine only serves" in message, length


def test_missing_files(program: Path, fake: Path) -> None:
    (fake / ENGINE_FILE).unlink()
    assert "model.engine: not found" in refusal(program, "--engine", fake, "--prompt-ids", "1")
    (fake / "SHA256SUMS").unlink()
    assert "SHA256SUMS: not found" in refusal(program, "--engine", fake, "--prompt-ids", "1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 7}, "format_version 1 expected, found 7"),
        ({"tensorrt_version": 10}, "tensorrt_version must be a string, found 10"),
        ({"dense": "no"}, 'dense must be true or false, found "no"'),
    ],
)
def test_a_bad_manifest(
    program: Path, fake: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    copy = edit_manifest(fake, tmp_path / "copy", **changes)
    found = refusal(program, "--engine", copy, "--prompt-ids", "1")
    assert MANIFEST_FILE in found and message in found


def test_a_tensorrt_that_is_not_there(program: Path, fake: Path) -> None:
    environment = {LIBRARY_VARIABLE: "/nowhere/libnvinfer.so.10"}
    message = refusal(program, "--engine", fake, "--prompt-ids", "1", **environment)
    assert "TensorRT can't be loaded" in message and LIBRARY_VARIABLE in message


@pytest.mark.skipif(
    gpu_sdk.find_libraries() is None, reason="NOT TESTED: TensorRT's libraries are not here"
)
def test_another_tensorrt(program: Path, fake: Path, tmp_path: Path) -> None:
    copy = edit_manifest(fake, tmp_path / "copy", tensorrt_version="9.9.9")
    message = refusal(program, "--engine", copy, "--prompt-ids", "1")
    assert "was built for TensorRT 9.9.9, found 1" in message


@pytest.mark.skipif(
    gpu_sdk.find_libraries() is None or torch.cuda.is_available(),
    reason="NOT TESTED: TensorRT's libraries are not here, or there is a GPU",
)
def test_no_gpu(program: Path, fake: Path, tmp_path: Path) -> None:
    version = gpu_sdk.load_tensorrt()
    copy = edit_manifest(fake, tmp_path / "copy", tensorrt_version=version)
    message = refusal(program, "--engine", copy, "--prompt-ids", "1")
    assert "no GPU is found" in message


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def engine(
    request: pytest.FixtureRequest, onnx: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    from tinylm_export.to_engine import build_engine

    directory = tmp_path_factory.mktemp("engine") / request.param
    build_engine(onnx, directory, dtype=request.param, max_batch_size=2, max_seq_len=64)
    return directory


@pytest.mark.gpu
@needs_gpu
class TestOnGpu:
    @pytest.fixture(scope="class")
    def plugins(self) -> Path:
        from tinylm_export.native_gpu import plugin_library

        return plugin_library()

    @pytest.mark.parametrize("option", ["", "--no-cuda-graph"])
    @pytest.mark.parametrize("prompt", [[7], [1, 2, 3], [*range(100, 155)]])
    def test_ids_are_pythons(
        self, program: Path, engine: Path, plugins: Path, prompt: list[int], option: str
    ) -> None:
        from tinylm_export.trt_session import TrtSession

        chosen = stream(
            TrtSession(engine),
            torch.tensor([prompt]),
            torch.tensor([len(prompt)]),
            max_new_tokens=40,
        )
        expected = [int(tokens) for tokens in chosen]
        ids = ",".join(map(str, prompt))
        arguments = ["--max-new-tokens", 40, "--ignore-eos", *([option] if option else [])]
        done = run(
            program, "--engine", engine, "--prompt-ids", ids, "--plugins", plugins, *arguments
        )
        assert done.returncode == 0, done.stderr
        assert [int(line) for line in done.stdout.split()] == expected
        assert len(expected) == min(40, 64 - len(prompt))

    def test_bad_input(self, program: Path, engine: Path, plugins: Path) -> None:
        def message(ids: str) -> str:
            return refusal(program, "--engine", engine, "--plugins", plugins, "--prompt-ids", ids)

        assert "below vocab_size 512, found 512 at position 1" in message("1,512")
        assert "the prompt has 64 tokens" in message(",".join(["5"] * 64))

    def test_plugins_that_are_not_there(self, program: Path, engine: Path, tmp_path: Path) -> None:
        arguments = ("--engine", engine, "--prompt-ids", "1")
        assert "needs the plugin library beside it" in refusal(program, *arguments)
        missing = tmp_path / "none.so"
        assert "none.so: not found" in refusal(program, *arguments, "--plugins", missing)
        missing.write_bytes(b"no library")
        assert "can't be loaded" in refusal(program, *arguments, "--plugins", missing)

    def test_another_gpu(self, program: Path, engine: Path, plugins: Path, tmp_path: Path) -> None:
        copy = edit_manifest(engine, tmp_path / "copy", compute_capability="7.0")
        message = refusal(program, "--engine", copy, "--prompt-ids", "1", "--plugins", plugins)
        assert "was built for a GPU of compute capability 7.0" in message
