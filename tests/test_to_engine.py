"""Building engines: what can be checked anywhere, and on a GPU with TensorRT the engines."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from cli_helpers import Cli, command_line
from export_helpers import PLAIN, make_checkpoint, make_export

from tinylm import TinyLM
from tinylm.directory import check_sums, sha256, write_checksums
from tinylm.errors import ExportError
from tinylm_export.cli import main
from tinylm_export.engine_builder import default_timing_cache, make_profiles
from tinylm_export.manifest import EngineManifest
from tinylm_export.model_graph import build_onnx
from tinylm_export.native_gpu import find_plugin_library
from tinylm_export.to_engine import EngineOptions, build_engine, engine_graph
from tinylm_export.to_onnx import export_onnx


def what_is_missing() -> str:
    """Return why no engine can be built here; empty if one can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    names = ("tensorrt", "tensorrt_bindings")
    if not any(importlib.util.find_spec(name) for name in names):
        return "TensorRT's Python bindings are not installed"
    if find_plugin_library() is None:
        return "the plugins are not built"
    return ""


MISSING = what_is_missing()
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(MISSING), reason=f"ENGINES NOT TESTED: {MISSING}"),
]


def gpu(function: Any) -> Any:
    for mark in needs_gpu:
        function = mark(function)
    return function


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("to-engine"))[1]


# Anywhere.


def test_profiles() -> None:
    inputs: dict[str, list[int | str]] = {
        "input_ids": ["batch", "length"],
        "past.0.latent": ["batch", "capacity", 32],
    }
    assert make_profiles(inputs, max_batch_size=4, max_seq_len=64) == {
        "decode": {
            "input_ids": {"min": [1, 1], "opt": [1, 1], "max": [4, 1]},
            "past.0.latent": {"min": [1, 1, 32], "opt": [1, 64, 32], "max": [4, 64, 32]},
        },
        "prefill": {
            "input_ids": {"min": [1, 1], "opt": [1, 64], "max": [4, 64]},
            "past.0.latent": {"min": [1, 1, 32], "opt": [1, 64, 32], "max": [4, 64, 32]},
        },
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp8"}, "dtype must be one of fp32, fp16, bf16, found 'fp8'"),
        ({"max_batch_size": 0}, "max_batch_size must be at least 1, found 0"),
        ({"workspace_mib": -1}, "workspace_mib must be at least 1, found -1"),
        ({"dense": True, "fp8_act": True}, "dense and fp8_act don't go together"),
        ({"dense": True, "embed_plugins": True}, "dense and embed_plugins don't go together"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        EngineOptions(**options)


def test_a_longer_sequence_than_the_context(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="at most the model's context of 64 tokens, found 65"):
        build_engine(exported, tmp_path / "engine", max_seq_len=65)


def test_a_damaged_onnx_directory(exported: Path, tmp_path: Path) -> None:
    directory = tmp_path / "onnx"
    shutil.copytree(exported, directory)
    flip_byte(directory / "model.onnx_data")
    with pytest.raises(ExportError, match=r"model\.onnx_data: truncated or altered"):
        build_engine(directory, tmp_path / "engine")
    with pytest.raises(ExportError, match="not an exported model"):
        build_engine(tmp_path / "none", tmp_path / "engine")


def test_marked_nodes_are_outputs(model: TinyLM) -> None:
    names = ["layers.0.self_attn.qkv_proj", "layers.1.self_attn"]
    options = EngineOptions(dtype="bf16", mark_nodes=names, fp8_act=True)
    graph, activation = engine_graph(build_onnx(model), options, model.config)
    outputs = {str(value.name): value.dtype for value in graph.graph.outputs}
    assert activation == "fp8_e4m3"
    assert list(outputs)[-2:] == [f"{name}.y" for name in names]
    assert outputs["layers.1.self_attn.y"] == ir.DataType.BFLOAT16
    with pytest.raises(ExportError, match=r"no node 'layers.0.mlp.up_proj'"):
        engine_graph(
            build_onnx(model), EngineOptions(mark_nodes=["layers.0.mlp.up_proj"]), model.config
        )


def test_the_timing_cache_lies_in_tinylms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TINYLM_CACHE", str(tmp_path))
    path = default_timing_cache("10.6.0", "NVIDIA H100 80GB HBM3")
    assert path == tmp_path / "tensorrt-timing" / "10.6.0-NVIDIA-H100-80GB-HBM3.cache"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_tensorrt_or_gpu_the_command_says_so(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli = command_line(main, capsys)
    code, _, err = cli("trt", exported, "--out", tmp_path / "engine")
    assert code == 2 and "Traceback" not in err
    assert "TensorRT can't be imported" in err or "needs an NVIDIA GPU" in err
    assert "tinylm-export doctor" in err or "a machine with a GPU" in err
    assert not (tmp_path / "engine").exists()


# With a GPU.


@pytest.fixture(scope="module")
def engine(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 engine of the test model."""
    out = tmp_path_factory.mktemp("engine") / "engine"
    build_engine(exported, out, max_batch_size=4)
    return out


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def load(directory: Path, *, verify: bool = True) -> Any:
    from tinylm_export.trt_engine import TrtEngine

    return TrtEngine(directory, verify=verify)


@gpu
def test_an_engine_directory_is_whole(exported: Path, engine: Path) -> None:
    manifest = EngineManifest.load(engine)
    check_sums(engine, required=("model.engine", "manifest.json"), error=ExportError)
    assert manifest.engine_sha256 == sha256(engine / "model.engine")
    assert manifest.engine_bytes == (engine / "model.engine").stat().st_size
    assert (manifest.dtype, manifest.activation, manifest.max_seq_len) == ("bf16", "int8", 64)
    manifest.check(engine)
    manifest.check_onnx(engine, exported)
    assert (engine / "export.json").read_bytes() == (exported / "export.json").read_bytes()
    loaded = load(engine).engine
    names = [loaded.get_tensor_name(i) for i in range(loaded.num_io_tensors)]
    assert loaded.num_optimization_profiles == 2
    assert tuple(loaded.get_tensor_profile_shape("input_ids", 0)[2]) == (4, 1)
    assert tuple(loaded.get_tensor_profile_shape("input_ids", 1)[2]) == (4, 64)
    assert set(names) >= {"input_ids", "past.1.scale", "present.1.rope", "logits"}


@gpu
@pytest.mark.parametrize(
    ("options", "activation"),
    [
        ({"dtype": "fp32"}, "int8"),
        ({"dtype": "fp16", "fp8_act": True}, "fp8_e4m3"),
        ({"dtype": "fp16", "all_logits": True}, "int8"),
        ({"dtype": "bf16", "embed_plugins": True}, "int8"),
        ({"dtype": "bf16", "mark_nodes": ["layers.0.self_attn.qkv_proj"]}, "int8"),
        ({"dtype": "fp32", "dense": True}, "none"),
        ({"dtype": "bf16", "dense": True}, "none"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_engines_of_every_kind_are_built_and_loaded(
    exported: Path, tmp_path: Path, options: dict[str, Any], activation: str
) -> None:
    seen: list[tuple[str, float]] = []
    manifest = build_engine(
        exported,
        tmp_path / "engine",
        max_batch_size=2,
        max_seq_len=32,
        workspace_mib=256,
        timing_cache=tmp_path / "kernels.cache",
        progress=lambda text, fraction: seen.append((text, fraction)),
        **options,
    )
    assert manifest.activation == activation
    assert manifest.dense == options.get("dense", False)
    assert manifest.all_logits == options.get("all_logits", False)
    assert seen and all(0 <= fraction <= 1 for _, fraction in seen)
    assert (tmp_path / "kernels.cache").stat().st_size > 0
    loaded = load(tmp_path / "engine").engine
    rank = 3 if options.get("all_logits") else 2
    assert len(loaded.get_tensor_shape("logits")) == rank
    for name in options.get("mark_nodes", ()):
        assert len(loaded.get_tensor_shape(f"{name}.y")) == 3
    names = [path.name for path in tmp_path.iterdir()]
    assert not any(name.startswith(".tmp-") for name in names)


@gpu
def test_a_timing_cache_that_is_none_is_replaced(exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "kernels.cache"
    path.write_bytes(b"no timing cache" * 10)
    with warnings.catch_warnings():  # TensorRT 10.6 takes it for an empty one without a word
        warnings.filterwarnings("ignore", message=".*not a timing cache for this TensorRT")
        build_engine(exported, tmp_path / "engine", max_seq_len=8, timing_cache=path)
    assert path.read_bytes()[:15] != b"no timing cache"


@gpu
def test_another_engine_is_refused(engine: Path, tmp_path: Path) -> None:
    altered = tmp_path / "engine"
    for field, value, message in (
        ("tensorrt_version", "10.5.1", r"TensorRT 10\.5\.1, found \d+\.\d+"),
        ("compute_capability", "7.5", r"capability 7\.5 .*, found \d+\.\d"),
        ("plugin_version", "0.0.1", r"plugins of version 0\.0\.1, found"),
    ):
        shutil.rmtree(altered, ignore_errors=True)
        shutil.copytree(engine, altered)
        manifest = dataclasses.replace(EngineManifest.load(altered), **{field: value})
        manifest.save(altered)
        write_checksums(altered)
        with pytest.raises(ExportError, match=message):
            load(altered)


@gpu
def test_a_flipped_byte_is_refused(engine: Path, tmp_path: Path) -> None:
    altered = tmp_path / "engine"
    shutil.copytree(engine, altered)
    flip_byte(altered / "model.engine")
    with pytest.raises(ExportError, match=r"model\.engine: truncated or altered.*expected SHA-256"):
        load(altered)


@gpu
def test_an_engine_of_another_export_is_refused(engine: Path, tmp_path: Path) -> None:
    _, other = make_export(tmp_path, seed=4)
    with pytest.raises(
        ExportError, match=r"was built from another model\.onnx: expected SHA-256 \w+, found"
    ):
        EngineManifest.load(engine).check_onnx(engine, other)


@gpu
def test_the_builders_failure_leaves_what_was_there(
    exported: Path, engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tinylm_export.to_engine as module

    out = tmp_path / "engine"
    shutil.copytree(engine, out)

    def other_op(model: ir.Model, options: Any, config: Any) -> tuple[ir.Model, str]:
        graph, activation = engine_graph(model, options, config)
        node = next(node for node in graph.graph if node.op_type == "BitLinear")
        node.op_type = "NoSuchOp"
        return graph, activation

    monkeypatch.setattr(module, "engine_graph", other_op)
    with pytest.raises(ExportError, match=r"can't parse the graph: .*NoSuchOp"):
        build_engine(exported, out)
    check_sums(out, required=("model.engine",), error=ExportError)


@gpu
def test_the_command(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli: Cli = command_line(main, capsys)
    out, file = tmp_path / "engine", tmp_path / "engine.json"
    arguments = ("--dtype", "fp16", "--max-batch-size", 2, "--max-seq-len", 16, "--json", file)
    code, text, err = cli("trt", exported, "--out", out, *arguments)
    assert code == 0, err
    assert "model.engine" in text and "fp16, int8 activations" in text
    assert json.loads(file.read_text())["max_seq_len"] == 16
    _, checkpoint = make_checkpoint(tmp_path)
    plain = export_onnx(checkpoint, tmp_path / "plain", task=PLAIN)
    code, _, err = cli("trt", plain, "--out", tmp_path / "none")
    assert code == 2 and "needs a model of the task text-generation-with-past" in err
