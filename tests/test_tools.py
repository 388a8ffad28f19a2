"""The tools of the real run: gathering text, and a checkpoint in small parts."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from training_helpers import trainer

from tinylm.checkpoint import load_model
from tinylm.errors import CheckpointError

TOOLS = Path(__file__).resolve().parent.parent / "tools"


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tool_{name}", TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_corpus_holds_whole_documents_out_and_drops_what_occurred(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tool("corpus")

    def source(folder: Path) -> Iterator[tuple[str, str]]:
        assert folder.is_dir()
        for i in range(400):
            yield f"document {i}", f"This is the text of document {i}. " * 20
        yield "copy", "This is the text of document 7. " * 20
        yield "short", "too short"

    monkeypatch.setattr(corpus, "SOURCES", {"one": source})
    report = corpus.gather(tmp_path / "out", ["one"], docstring_bytes=0)
    texts = {
        split: [json.loads(line)["text"] for line in (tmp_path / f"out/{split}.jsonl").open()]
        for split in ("train", "val")
    }
    assert len(texts["train"]) + len(texts["val"]) == 400
    assert not set(texts["train"]) & set(texts["val"])
    assert report["one"]["val_docs"] == len(texts["val"]) and 1 <= len(texts["val"]) <= 25
    held_out = [i for i in range(400) if corpus.is_held_out("one", f"document {i}")]
    assert [t.split(".")[0].split()[-1] for t in texts["val"]] == [str(i) for i in held_out]
    assert not list((tmp_path / "out").glob(".*"))


def test_descriptions_become_text_once(tmp_path: Path) -> None:
    corpus = tool("corpus")
    services = [
        ("a", {"documentation": "<p>One &amp; <b>two</b></p><p>three</p>", "x": [{"y": 1}]}),
        ("b", {"s": [{"documentation": "<p>One &amp; two</p><p>three</p>"}], "documentation": "4"}),
    ]
    found = list(corpus._described(iter(services), "documentation"))
    assert found == [("a", "One & two\nthree"), ("b", "4")]


def test_missing_client_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = tool("corpus")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"npm is needed .* and was not found"):
        corpus.gather(tmp_path / "out", ["speeches"], docstring_bytes=0)


def test_checkpoint_in_parts_has_the_same_codes(tmp_path: Path) -> None:
    compact = tool("compact_checkpoint")
    trainer(tmp_path / "run").train()
    parts = compact.pack(tmp_path / "run", tmp_path / "parts", part_mib=0.02)
    assert len(parts) > 2 and max(p.stat().st_size for p in parts) == int(0.02 * 2**20)
    compact.unpack(tmp_path / "parts", tmp_path / "again")
    before, after = load_model(tmp_path / "run/best"), load_model(tmp_path / "again")
    assert after.config == before.config
    for name, layer in before.bit_linears().items():
        codes, scale = layer.weight_codes()
        found, found_scale = after.bit_linears()[name].weight_codes()
        assert torch.equal(found, codes)
        torch.testing.assert_close(found_scale, scale, rtol=2**-22, atol=0.0)
    rows = before.embed_tokens.weight
    half_step = rows.abs().amax(dim=1, keepdim=True) / 127 * 0.501
    assert ((after.embed_tokens.weight - rows).abs() <= half_step).all()
    assert torch.equal(after.norm.weight, before.norm.weight)
    parts[1].write_bytes(parts[1].read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated or altered"):
        compact.unpack(tmp_path / "parts", tmp_path / "other")
