"""Single-op ONNX models, random inputs for the ops of the contract, and exported directories."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from model_helpers import make_model
from torch import Tensor

from tinylm import TinyLM
from tinylm.checkpoint import save_model
from tinylm.config import AttentionShape, float32
from tinylm.packing import pack
from tinylm_export.function_bodies import function_bodies
from tinylm_export.ops import DOMAIN, IR_VERSION, OPS, OPSET, VERSION
from tinylm_export.ort_session import make_inference_session
from tinylm_export.to_onnx import export_onnx

WITH_PAST, PLAIN = "text-generation-with-past", "text-generation"
_ELEMENT_TYPES = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.uint8: onnx.TensorProto.UINT8,
    torch.int8: onnx.TensorProto.INT8,
    torch.int32: onnx.TensorProto.INT32,
    torch.int64: onnx.TensorProto.INT64,
}


def op_model(op: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any]) -> Any:
    """Make a model of one node, with the function body that suits it."""
    spec = OPS[op]
    inputs = [
        onnx.helper.make_tensor_value_info(name, _ELEMENT_TYPES[t.dtype], [None] * t.ndim)
        for name, t in tensors.items()
    ]
    first = next(iter(tensors.values()))
    types = {"T": _ELEMENT_TYPES[first.dtype], "tensor(int8)": onnx.TensorProto.INT8}
    outputs = []
    for p in spec.outputs:
        rank = first.ndim if p.name == "y" else p.shape.count(",") + 1
        element_type = types.get(p.type, onnx.TensorProto.FLOAT)
        outputs.append(onnx.helper.make_tensor_value_info(p.name, element_type, [None] * rank))
    names = [p.name if p.name in tensors else "" for p in spec.inputs]
    while not names[-1]:
        names.pop()
    node = onnx.helper.make_node(
        op, names, [p.name for p in spec.outputs], name="node", domain=DOMAIN, **attributes
    )
    bodies = function_bodies(attributes.get("activation", "int8"), norm="norm_weight" in tensors)
    return onnx.helper.make_model(
        onnx.helper.make_graph([node], "one_op", inputs, outputs),
        functions=[body for body in bodies if body.name == op],
        opset_imports=[
            onnx.helper.make_opsetid("", OPSET),
            onnx.helper.make_opsetid(DOMAIN, VERSION),
        ],
        ir_version=IR_VERSION,
    )


def run_onnx(model: Any, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Run a model in a stock ONNX Runtime."""
    session = make_inference_session(model.SerializeToString(), num_threads=1, native=False)
    found = session.run(None, {name: t.numpy() for name, t in tensors.items()})
    return [torch.from_numpy(array) for array in found]


def run_op(op: str, tensors: Mapping[str, Tensor], **attributes: Any) -> list[Tensor]:
    """Run one op by its function body in a stock ONNX Runtime."""
    return run_onnx(op_model(op, tensors, attributes), tensors)


def random_codes(generator: torch.Generator, rows: int, columns: int) -> Tensor:
    return torch.randint(-1, 2, (rows, columns), generator=generator, dtype=torch.int8)


def bit_linear_inputs(
    seed: int,
    *,
    lead: tuple[int, ...] = (2, 3),
    num_inputs: int = 32,
    num_outputs: int = 24,
    norm: bool = True,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Draw inputs of BitLinear; magnitudes vary by row, so that each has its own scale."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*lead, num_inputs, generator=g)
    x *= torch.empty(*lead, 1).exponential_(1.0, generator=g) + 0.01
    tensors = {
        "x": x.to(dtype),
        "weight": pack(random_codes(g, num_outputs, num_inputs)),
        "weight_scale": torch.rand(num_outputs, generator=g) + 0.5,
    }
    if norm:
        tensors["norm_weight"] = torch.rand(num_inputs, generator=g) + 0.5
    return tensors


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlaCase:
    """Sizes of one call of FlashMLA.

    Attributes:
        past_lens: Tokens cached, by row.
        seq_lens: New tokens, by row.
        length: S, at least the largest of ``seq_lens``.
        capacity: C.
    """

    past_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    length: int
    capacity: int
    rank: int = 12
    num_heads: int = 3
    nope_dim: int = 5
    rope_dim: int = 6
    value_dim: int = 7

    @property
    def shape(self) -> AttentionShape:
        return AttentionShape(
            num_heads=self.num_heads,
            nope_dim=self.nope_dim,
            rope_dim=self.rope_dim,
            value_dim=self.value_dim,
            theta=float32(5000.0),
            eps=float32(1e-5),
            softmax_scale=float32(0.37),
        )

    @property
    def attributes(self) -> dict[str, Any]:
        return dataclasses.asdict(self.shape)

    def inputs(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Draw inputs in the contract's order; empty slots hold what a new cache holds."""
        g = torch.Generator().manual_seed(seed)
        batch, shape = len(self.past_lens), self.shape
        rows = self.num_heads * (self.nope_dim + self.value_dim)
        cells = (batch, self.capacity)
        held = torch.arange(self.capacity) < torch.tensor(self.past_lens)[:, None]
        latent = torch.randint(-127, 128, (*cells, self.rank), generator=g).to(torch.int8)
        scale = torch.rand(cells, generator=g) * 60 + 10
        rope = torch.randn(*cells, self.rope_dim, generator=g)
        return {
            "q": torch.randn(
                batch, self.length, self.num_heads * shape.qk_dim, generator=g, dtype=dtype
            ),
            "kv": torch.randn(
                batch, self.length, self.rank + self.rope_dim, generator=g, dtype=dtype
            ),
            "kv_norm_weight": torch.rand(self.rank, generator=g) + 0.5,
            "kv_b": pack(random_codes(g, rows, self.rank)),
            "kv_b_scale": torch.rand(rows, generator=g) + 0.5,
            "past_lens": torch.tensor(self.past_lens, dtype=torch.int32),
            "seq_lens": torch.tensor(self.seq_lens, dtype=torch.int32),
            "past_latent": latent * held[..., None],
            "past_scale": torch.where(held, scale, 1.0),
            "past_rope": (rope * held[..., None]).to(dtype),
        }


MLA_CASES = {
    "prefill": MlaCase(past_lens=(0, 0), seq_lens=(6, 6), length=6, capacity=6),
    "ragged prefill": MlaCase(past_lens=(0, 0, 0), seq_lens=(6, 1, 3), length=6, capacity=9),
    "decode": MlaCase(past_lens=(4, 1), seq_lens=(1, 1), length=1, capacity=6),
    "ragged decode": MlaCase(past_lens=(5, 0, 2), seq_lens=(1, 1, 0), length=1, capacity=6),
    "chunk": MlaCase(past_lens=(2, 5, 0), seq_lens=(3, 2, 1), length=3, capacity=7),
    "one row": MlaCase(past_lens=(3,), seq_lens=(2,), length=2, capacity=5),
    "row without new tokens": MlaCase(past_lens=(3, 0), seq_lens=(0, 2), length=2, capacity=4),
    "full row": MlaCase(past_lens=(4, 1), seq_lens=(0, 3), length=3, capacity=4),
    "more padding than room": MlaCase(past_lens=(3, 0), seq_lens=(1, 4), length=4, capacity=4),
    "one head": MlaCase(
        past_lens=(1,), seq_lens=(2,), length=2, capacity=3, num_heads=1, rank=4, rope_dim=2
    ),
}


def make_checkpoint(folder: Path, *, seed: int = 3, **changes: Any) -> tuple[TinyLM, Path]:
    """Save a small random model; return it with its directory."""
    model = make_model(seed=seed, **changes)
    return model, save_model(folder / "checkpoint", model)


def make_export(
    folder: Path, *, seed: int = 3, task: str = WITH_PAST, all_logits: bool = False, **changes: Any
) -> tuple[TinyLM, Path]:
    """Save and export a small random model; return it with the ONNX directory."""
    model, checkpoint = make_checkpoint(folder, seed=seed, **changes)
    return model, export_onnx(checkpoint, folder / "onnx", task=task, all_logits=all_logits)
