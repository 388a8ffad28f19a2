from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from export_helpers import PLAIN, make_export
from rich.console import Console

from tinylm import TinyLM
from tinylm.errors import CheckpointError, ExportError
from tinylm.latent_cache import LatentCache
from tinylm_export.inspect import ModelReport, inspect_onnx, render
from tinylm_export.to_onnx import DATA_FILE, ONNX_FILE


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyLM, Path]:
    return make_export(tmp_path_factory.mktemp("inspect"))


@pytest.fixture(scope="module")
def model(exported: tuple[TinyLM, Path]) -> TinyLM:
    return exported[0]


@pytest.fixture(scope="module")
def report(exported: tuple[TinyLM, Path]) -> ModelReport:
    return inspect_onnx(exported[1])


@pytest.fixture
def copied(exported: tuple[TinyLM, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported[1], tmp_path / "onnx"))


def test_layers_are_the_models(report: ModelReport, model: TinyLM) -> None:
    linears = model.bit_linears()
    assert {layer.name for layer in report.layers} == set(linears)
    for layer in report.layers:
        codes, _ = linears[layer.name].weight_codes()
        assert [layer.num_rows, layer.num_columns] == list(codes.shape)
        assert layer.weight_bytes == codes.numel() // 4
        assert layer.scale_bytes == 4 * codes.shape[0]
        for value, fraction in ((-1, layer.minus), (0, layer.zero), (1, layer.plus)):
            expected = (codes == value).double().mean().item()
            assert fraction == pytest.approx(expected, abs=1e-12)


def test_totals(report: ModelReport, model: TinyLM, exported: tuple[TinyLM, Path]) -> None:
    assert report.num_parameters == model.num_parameters()
    assert report.num_embedding_parameters == 512 * 64
    assert report.embedding_bytes == 4 * 512 * 64
    ternary = sum(layer.weight.numel() for layer in model.bit_linears().values())
    assert report.num_ternary_weights == ternary
    scales = sum(layer.out_features for layer in model.bit_linears().values())
    assert report.bits_per_code == 2.0
    assert report.bits_per_ternary_weight == pytest.approx(2.0 + 32 * scales / ternary)
    sizes = {path.name: path.stat().st_size for path in exported[1].iterdir()}
    assert report.file_sizes == sizes
    rest = sizes[ONNX_FILE] + sizes[DATA_FILE] - report.embedding_bytes
    assert report.bits_per_ternary_weight_in_files == pytest.approx(8 * rest / ternary)
    cache = LatentCache(model.config, 1, 10)
    assert 10 * report.cache_bytes_per_token == cache.num_bytes()
    zeros = sum((m.weight_codes()[0] == 0).sum().item() for m in model.bit_linears().values())
    assert report.zero_fraction == pytest.approx(zeros / ternary)


def test_op_counts(report: ModelReport) -> None:
    assert report.op_counts["tinylm::BitLinear"] == 2 * 6
    assert report.op_counts["tinylm::FlashMLA"] == report.op_counts["tinylm::SwiGLU"] == 2
    assert report.op_counts["Gemm"] == 1
    assert next(iter(report.op_counts)) == "tinylm::BitLinear"


def test_an_untied_head_counts_as_an_embedding(tmp_path: Path) -> None:
    model, directory = make_export(tmp_path, tie_embeddings=False, activation="fp8_e4m3")
    report = inspect_onnx(directory)
    assert report.num_parameters == model.num_parameters()
    assert report.num_embedding_parameters == 2 * 512 * 64
    assert report.activation == "fp8_e4m3"


def test_plain_task(tmp_path: Path) -> None:
    model, directory = make_export(tmp_path, task=PLAIN)
    report = inspect_onnx(directory)
    assert report.task == PLAIN
    assert report.num_parameters == model.num_parameters()


def test_json_holds_everything(report: ModelReport) -> None:
    values = json.loads(json.dumps(report.to_dict()))
    assert values["bits_per_code"] == 2.0
    assert values["num_parameters"] == report.num_parameters
    assert [layer["name"] for layer in values["layers"]] == [x.name for x in report.layers]


def test_table_shows_what_was_found(report: ModelReport) -> None:
    console = Console(width=120)
    with console.capture() as captured:
        console.print(render(report))
    text = captured.get()
    layer = report.layers[3]
    assert layer.name in text
    assert f"{layer.zero:.1%}" in text
    assert "tinylm::FlashMLA" in text
    assert f"{report.num_parameters:,}" in text


def test_code_3_is_named_by_tensor_row_and_column(copied: Path) -> None:
    """Row 5, column 4 * 7 + 2 of a layer, found in the file by the bytes around it."""
    name = "layers.1.mlp.up_proj"
    report = inspect_onnx(copied)
    layer = next(x for x in report.layers if x.name == name)
    offset = weight_offset(copied, f"{name}.weight") + 5 * layer.num_columns // 4 + 7
    data = bytearray((copied / DATA_FILE).read_bytes())
    data[offset] |= 0b00110000
    (copied / DATA_FILE).write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{name}.weight: code 3 at row 5, column 30;"):
        inspect_onnx(copied)


def weight_offset(directory: Path, name: str) -> int:
    import onnx

    model = onnx.load(directory / ONNX_FILE, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    return int({entry.key: entry.value for entry in tensor.external_data}["offset"])


def test_truncated_weights_are_named(copied: Path) -> None:
    data = (copied / DATA_FILE).read_bytes()
    (copied / DATA_FILE).write_bytes(data[: len(data) // 8])
    with pytest.raises(ExportError, match=rf"can't be read from {DATA_FILE}.*Export the check"):
        inspect_onnx(copied)


def test_missing_weights_are_named(copied: Path) -> None:
    (copied / DATA_FILE).unlink()
    with pytest.raises(ExportError, match=f"{DATA_FILE}.*missing or truncated"):
        inspect_onnx(copied)


def test_missing_graph_is_named(copied: Path) -> None:
    (copied / ONNX_FILE).unlink()
    with pytest.raises(ExportError, match=r"model\.onnx: expected a file, found none"):
        inspect_onnx(copied)


def test_damaged_graph_is_named(copied: Path) -> None:
    (copied / ONNX_FILE).write_bytes(b"\xff" * 100)
    with pytest.raises(ExportError, match=r"model\.onnx: not a readable ONNX model"):
        inspect_onnx(copied)


def test_a_directory_of_something_else_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="not an exported model"):
        inspect_onnx(tmp_path)


def test_a_graph_without_bit_linear_is_named(copied: Path) -> None:
    import onnx

    graph = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[2] a) => (float[2] y) {y = Neg (a)}'
    )
    onnx.save(graph, copied / ONNX_FILE)
    with pytest.raises(ExportError, match="expected tinylm::BitLinear nodes, found none"):
        inspect_onnx(copied)
