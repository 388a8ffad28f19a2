from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tinylm.errors import ExportError
from tinylm_export.manifest import EngineMachine, EngineManifest

MACHINE = EngineMachine(
    tensorrt_version="10.6.0",
    gpu="NVIDIA H100 80GB HBM3",
    compute_capability="9.0",
    plugin_version="0.1.0",
)


def make_manifest(**changes: Any) -> EngineManifest:
    values: dict[str, Any] = {
        "tinylm_version": "0.1.0",
        **dataclasses.asdict(MACHINE),
        "embedded_plugins": False,
        "dense": False,
        "dtype": "bf16",
        "activation": "int8",
        "all_logits": False,
        "max_batch_size": 4,
        "max_seq_len": 64,
        "profiles": {"decode": {"past_lens": {"min": [1], "opt": [1], "max": [4]}}},
        "marked_nodes": [],
        "onnx_sha256": "a" * 64,
        "onnx_data_sha256": "b" * 64,
        "engine_sha256": "c" * 64,
        "engine_bytes": 1234,
    }
    return EngineManifest(**values | changes)


def test_a_manifest_comes_back_from_its_file(tmp_path: Path) -> None:
    make_manifest().save(tmp_path)
    assert EngineManifest.load(tmp_path) == make_manifest()
    values = json.loads((tmp_path / "manifest.json").read_text())
    assert values["format_version"] == 1 and values["compute_capability"] == "9.0"


def test_the_machine_it_was_built_on_is_taken() -> None:
    make_manifest().check(Path("engine"), MACHINE)
    other_name = dataclasses.replace(MACHINE, gpu="NVIDIA H200")  # of the same architecture
    make_manifest().check(Path("engine"), other_name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensorrt_version": "10.7.0"}, r"engine: .* TensorRT 10\.6\.0, found 10\.7\.0\. Build"),
        (
            {"compute_capability": "8.0", "gpu": "NVIDIA A100"},
            r"compute capability 9\.0 \(NVIDIA H100.*\), found 8\.0 \(NVIDIA A100\)",
        ),
        ({"plugin_version": "0.2.0"}, r"plugins of version 0\.1\.0, found 0\.2\.0"),
        ({"plugin_version": None}, r"plugins of version 0\.1\.0, found None"),
    ],
)
def test_another_machine_is_refused_with_both_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        make_manifest().check(Path("engine"), dataclasses.replace(MACHINE, **changes))


@pytest.mark.parametrize(
    "changes", [{"dense": True, "plugin_version": None}, {"embedded_plugins": True}]
)
def test_an_engine_without_a_library_beside_it_needs_no_plugins(changes: dict[str, Any]) -> None:
    other = dataclasses.replace(MACHINE, plugin_version="0.9.0")
    make_manifest(**changes).check(Path("engine"), other)


def test_what_it_computes_with_in_words() -> None:
    assert make_manifest().describe() == "bf16, int8 activations, plugins 0.1.0 beside it"
    assert "in the engine" in make_manifest(embedded_plugins=True).describe()
    assert make_manifest(dense=True).describe() == "bf16, dense weights, no plugins"


def test_another_onnx_directory_is_refused(tmp_path: Path) -> None:
    from tinylm.directory import sha256

    for name in ("model.onnx", "model.onnx_data"):
        (tmp_path / name).write_text(name)
    digests = [sha256(tmp_path / name) for name in ("model.onnx", "model.onnx_data")]
    manifest = make_manifest(onnx_sha256=digests[0], onnx_data_sha256=digests[1])
    manifest.check_onnx(Path("engine"), tmp_path)
    (tmp_path / "model.onnx_data").write_text("other weights")
    found = sha256(tmp_path / "model.onnx_data")
    with pytest.raises(
        ExportError, match=f"another model.onnx_data: .*{digests[1]}, found {found}"
    ):
        manifest.check_onnx(Path("engine"), tmp_path)
    (tmp_path / "model.onnx").unlink()
    with pytest.raises(ExportError, match=r"another model\.onnx: .*found no such file"):
        manifest.check_onnx(Path("engine"), tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"not an engine directory, manifest\.json can't be read.*tinylm-export trt"),
        ("{", "not an engine directory"),
        ("[]", "expected a JSON object, found list"),
        ('{"format_version": 2}', "expected format_version 1, found 2"),
        ('{"format_version": 1, "more": 1}', "missing fields: activation, .*; unknown ones: more"),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ExportError, match=message):
        EngineManifest.load(tmp_path)
