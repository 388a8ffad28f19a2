from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest
import torch
from export_helpers import PLAIN, WITH_PAST, make_checkpoint, make_export

from tinylm.directory import read_checksums, sha256
from tinylm.errors import CheckpointError, ConfigError, ExportError
from tinylm_export.ops import register_onnx_schemas
from tinylm_export.ort_session import OrtSession
from tinylm_export.to_onnx import DATA_FILE, ONNX_FILE, ExportInfo, export_onnx

FILES = {"model.onnx", "model.onnx_data", "config.json", "export.json", "SHA256SUMS"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("to_onnx"))[1]


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> Path:
    return export_onnx(checkpoint, checkpoint.parent / "onnx")


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(exported, tmp_path / "onnx"))


def test_directory_holds_everything(exported: Path) -> None:
    assert {path.name for path in exported.iterdir()} == FILES
    register_onnx_schemas()
    onnx.checker.check_model(exported / ONNX_FILE, full_check=True)
    sums = read_checksums(exported, error=ExportError)
    assert sums == {name: sha256(exported / name) for name in FILES - {"SHA256SUMS"}}


def test_weights_lie_outside_of_the_graph(exported: Path) -> None:
    model = onnx.load(exported / ONNX_FILE, load_external_data=False)
    for tensor in model.graph.initializer:
        if onnx.external_data_helper.uses_external_data(tensor):
            location = {entry.key: entry.value for entry in tensor.external_data}["location"]
            assert location == DATA_FILE
        else:
            assert len(tensor.SerializeToString()) < 400, tensor.name


def test_export_info_leads_back_to_the_checkpoint(exported: Path, checkpoint: Path) -> None:
    info = ExportInfo.load(exported)
    assert (exported / info.checkpoint).resolve() == checkpoint.resolve()
    assert f"{info.checkpoint_sha256}  model.safetensors" in (checkpoint / "SHA256SUMS").read_text(
        encoding="utf-8"
    )
    assert (info.task, info.activation, info.all_logits) == (WITH_PAST, "int8", False)


@pytest.mark.parametrize("task", [WITH_PAST, PLAIN])
def test_the_same_checkpoint_gives_the_same_bytes(
    checkpoint: Path, tmp_path: Path, task: str
) -> None:
    first = export_onnx(checkpoint, tmp_path / "first", task=task)
    second = export_onnx(checkpoint, tmp_path / "second", task=task)
    for name in sorted(FILES):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_another_seed_gives_other_weights(exported: Path, tmp_path: Path) -> None:
    _, other = make_export(tmp_path, seed=99)
    assert (other / DATA_FILE).read_bytes() != (exported / DATA_FILE).read_bytes()


def test_tokenizer_files_come_along(checkpoint: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    (source / "tokenizer.json").write_text("{}", encoding="utf-8")
    (source / "training_state").mkdir()
    (source / "training_state" / "step.json").write_text("{}", encoding="utf-8")
    out = export_onnx(source, tmp_path / "onnx")
    assert {path.name for path in out.iterdir()} == FILES | {"tokenizer.json"}


def test_activation_can_be_chosen(checkpoint: Path, tmp_path: Path) -> None:
    out = export_onnx(checkpoint, tmp_path / "onnx", activation="fp8_e4m3")
    assert ExportInfo.load(out).activation == "fp8_e4m3"
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["activation"] == "fp8_e4m3"
    nodes = onnx.load(out / ONNX_FILE, load_external_data=False).graph.node
    found = {
        onnx.helper.get_node_attr_value(node, "activation")
        for node in nodes
        if node.op_type == "BitLinear"
    }
    assert found == {b"fp8_e4m3"}


def test_an_earlier_export_is_replaced(exported: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(exported, tmp_path / "onnx"))
    (out / "tokenizer.json").write_text("left over", encoding="utf-8")
    export_onnx(checkpoint, out, task=PLAIN)
    assert {path.name for path in out.iterdir()} == FILES
    assert ExportInfo.load(out).task == PLAIN


def test_a_foreign_directory_is_not_replaced(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(ExportError, match=r"thesis: exists and holds no model.onnx.*Choose"):
        export_onnx(checkpoint, out)
    assert [path.name for path in out.iterdir()] == ["chapter.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"]


def test_the_checkpoint_itself_is_not_replaced(checkpoint: Path) -> None:
    with pytest.raises(ExportError, match=r"exists and holds no model\.onnx"):
        export_onnx(checkpoint, checkpoint)
    assert (checkpoint / "model.safetensors").is_file()


def test_bad_options(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="task must be one of"):
        export_onnx(checkpoint, tmp_path / "onnx", task="translation")
    with pytest.raises(ConfigError, match="found 'int4'"):
        export_onnx(checkpoint, tmp_path / "onnx", activation="int4")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="expected a checkpoint"):
        export_onnx(tmp_path / "nothing", tmp_path / "onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [ONNX_FILE, DATA_FILE, "config.json"])
def test_an_altered_file_is_named(copied: Path, name: str) -> None:
    data = bytearray((copied / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copied / name).write_bytes(data)
    with pytest.raises(ExportError, match=rf"{name}: truncated or altered.*Export the checkpoint"):
        OrtSession(copied)


def test_a_truncated_file_is_named(copied: Path) -> None:
    data = (copied / DATA_FILE).read_bytes()
    (copied / DATA_FILE).write_bytes(data[:1000])
    with pytest.raises(ExportError, match=rf"{DATA_FILE}: truncated or altered \(1000 bytes\)"):
        OrtSession(copied)


@pytest.mark.parametrize("name", [ONNX_FILE, DATA_FILE])
def test_a_missing_file_is_named(copied: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(ExportError, match=rf"{name}: expected a file, found none.*Export"):
        OrtSession(copied)


def test_missing_checksums_are_named(copied: Path) -> None:
    (copied / "SHA256SUMS").unlink()
    with pytest.raises(ExportError, match="SHA256SUMS: expected a file, found none"):
        OrtSession(copied)


@pytest.mark.parametrize("content", [None, "{", '{"task": "x"}', "[]"])
def test_not_an_exported_directory(copied: Path, content: str | None) -> None:
    if content is None:
        (copied / "export.json").unlink()
    else:
        (copied / "export.json").write_text(content, encoding="utf-8")
    with pytest.raises(ExportError, match=r"not an exported model.*`tinylm-export onnx CKPT"):
        OrtSession(copied)


def test_a_damaged_graph_is_named(copied: Path) -> None:
    (copied / ONNX_FILE).write_bytes(b"not a model")
    with pytest.raises(ExportError, match=r"model.onnx: ONNX Runtime .* can't load it"):
        OrtSession(copied, verify=False)


def test_wrong_task_is_named(exported: Path, checkpoint: Path, tmp_path: Path) -> None:
    ids = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ExportError, match=r"takes a cache. Use start\(\) and step\(\)"):
        OrtSession(exported).logits(ids)
    plain = OrtSession(export_onnx(checkpoint, tmp_path / "plain", task=PLAIN))
    with pytest.raises(ExportError, match=r"'text-generation' has no cache.*--task"):
        plain.start(1, 4)
