"""Graph rewrites: what they match, what they refuse and why, and that numbers stay the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from export_helpers import PLAIN, run_onnx
from model_helpers import RaggedBatch, Recording, make_model, ragged_batch
from tolerances import LOGITS, ONE_ROUNDING, assert_equal
from torch import Tensor

from tinylm import TinyLM
from tinylm.errors import ExportError
from tinylm_export.model_graph import build_onnx
from tinylm_export.passes.all_logits import expose_all_logits
from tinylm_export.passes.mark_outputs import mark_outputs


def feeds(model: TinyLM, batch: RaggedBatch, capacity: int = 24) -> dict[str, Tensor]:
    config, rows = model.config, len(batch.lens)
    inputs = {
        "input_ids": batch.input_ids,
        "past_lens": torch.zeros(rows, dtype=torch.int32),
        "seq_lens": torch.tensor(batch.lens, dtype=torch.int32),
    }
    for i in range(config.num_layers):
        cells = (rows, capacity)
        inputs[f"past.{i}.latent"] = torch.zeros(*cells, config.latent_rank, dtype=torch.int8)
        inputs[f"past.{i}.scale"] = torch.ones(cells)
        inputs[f"past.{i}.rope"] = torch.zeros(*cells, config.rope_dim)
    return inputs


def test_all_logits_numerics(model: TinyLM, batch: RaggedBatch) -> None:
    inputs = feeds(model, batch)
    last, *cache = run_onnx(ir.to_proto(build_onnx(model)), inputs)
    rewritten = expose_all_logits(build_onnx(model))
    every, *rewritten_cache = run_onnx(ir.to_proto(rewritten), inputs)
    assert every.shape == (4, 24, 512)
    for row, length in enumerate(batch.lens):
        LOGITS.assert_close(every[row, length - 1], last[row])
    for found, expected in zip(rewritten_cache, cache, strict=True):
        assert_equal(found, expected)
    with torch.no_grad():
        expected = model(batch.input_ids, batch.attention_mask)
    valid = batch.attention_mask == 1
    LOGITS.assert_close(every[valid], expected[valid])


def test_all_logits_equals_an_export_with_all_logits(model: TinyLM) -> None:
    batch = ragged_batch(seed=8, batch=2, length=5)
    rewritten = expose_all_logits(build_onnx(model))
    direct = build_onnx(model, all_logits=True)
    inputs = feeds(model, batch, capacity=5)
    assert_equal(
        run_onnx(ir.to_proto(rewritten), inputs)[0], run_onnx(ir.to_proto(direct), inputs)[0]
    )
    names = [node.name for node in rewritten.graph]
    assert sorted(map(str, names)) == sorted(str(node.name) for node in direct.graph)


@pytest.mark.parametrize("options", [{"task": PLAIN}, {"all_logits": True}])
def test_all_logits_leaves_a_graph_that_has_them(model: TinyLM, options: Any) -> None:
    onnx_model = build_onnx(model, **options)
    before = ir.to_proto(onnx_model).SerializeToString()
    assert expose_all_logits(onnx_model) is onnx_model
    assert ir.to_proto(onnx_model).SerializeToString() == before


def test_all_logits_twice_is_once(model: TinyLM) -> None:
    once = expose_all_logits(build_onnx(model))
    before = ir.to_proto(once).SerializeToString()
    assert ir.to_proto(expose_all_logits(once)).SerializeToString() == before


def test_all_logits_says_why_it_refuses(model: TinyLM) -> None:
    onnx_model = build_onnx(model)
    next(node for node in onnx_model.graph if node.name == "last_token").name = "renamed"
    with pytest.raises(ExportError, match=r"expected nodes 'last_token' and 'lm_head'.*renamed"):
        expose_all_logits(onnx_model)
    onnx_model = build_onnx(model)
    onnx_model.graph.outputs[0].name = "scores"
    with pytest.raises(ExportError, match="first output to be logits, found 'scores'"):
        expose_all_logits(onnx_model)


def test_marked_outputs_are_the_modules(model: TinyLM, batch: RaggedBatch) -> None:
    names = [name for name in model.bit_linears() if not name.endswith("kv_b_proj")]
    onnx_model = build_onnx(model, task=PLAIN)
    marked = mark_outputs(onnx_model, names)
    assert list(marked) == names
    found = run_onnx(
        ir.to_proto(onnx_model),
        {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask},
    )
    recording = Recording(model)
    with torch.no_grad():
        model(batch.input_ids, batch.attention_mask)
    valid = batch.attention_mask == 1
    for name, output in zip(names, found[1:], strict=True):
        ONE_ROUNDING.assert_close(output[valid], recording.outputs[name][valid])


def test_marking_twice_adds_nothing(model: TinyLM) -> None:
    onnx_model = build_onnx(model)
    number = len(onnx_model.graph.outputs)
    name = "layers.1.mlp.down_proj"
    assert mark_outputs(onnx_model, [name]) == mark_outputs(onnx_model, [name, name])
    assert len(onnx_model.graph.outputs) == number + 1


def test_marking_an_output_adds_nothing(model: TinyLM) -> None:
    onnx_model = build_onnx(model)
    number = len(onnx_model.graph.outputs)
    assert mark_outputs(onnx_model, ["lm_head"]) == {"lm_head": "logits"}
    assert len(onnx_model.graph.outputs) == number


def test_marking_an_unknown_node(model: TinyLM) -> None:
    with pytest.raises(ExportError, match=r"no node 'layers.9.mlp'; it has \d+ others"):
        mark_outputs(build_onnx(model), ["layers.9.mlp"])


def test_marked_values_keep_their_shapes() -> None:
    onnx_model = build_onnx(make_model())
    mark_outputs(onnx_model, ["layers.0.self_attn.q_proj"])
    output = onnx_model.graph.outputs[-1]
    assert output.dtype == ir.DataType.FLOAT
    assert output.shape is not None
    assert np.prod([d for d in output.shape if isinstance(d, int)]) == 64
