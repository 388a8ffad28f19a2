from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest
import torch
from export_helpers import MLA_CASES, MlaCase, bit_linear_inputs, run_onnx
from tolerances import ONE_ROUNDING, assert_equal
from torch import Tensor, nn

from tinylm import BitLinear
from tinylm.attention import FlashMLA
from tinylm.bitlinear import PackedBitLinear
from tinylm.config import ModelConfig
from tinylm.errors import ExportError
from tinylm.latent_attention import rotary_angles
from tinylm.latent_cache import LatentCache
from tinylm.model import FeedForward
from tinylm.norm import RMSNorm
from tinylm_export.ops import DOMAIN, OPSET
from tinylm_export.torch_ops import add_function_bodies, onnx_translation_table

OPS = torch.ops.tinylm
CASES = pytest.mark.parametrize("case", MLA_CASES.values(), ids=MLA_CASES.keys())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [True, False])
def test_opcheck_bit_linear(dtype: torch.dtype, norm: bool) -> None:
    tensors = bit_linear_inputs(0, dtype=dtype, norm=norm)
    torch.library.opcheck(OPS.bit_linear, tuple(tensors.values()), {"activation": "fp8_e4m3"})


def test_opcheck_flash_mla() -> None:
    case = MLA_CASES["chunk"]
    torch.library.opcheck(OPS.flash_mla, tuple(case.inputs().values()), case.attributes)


def test_opcheck_swiglu() -> None:
    torch.library.opcheck(OPS.swiglu, (torch.randn(2, 3, 5), torch.randn(2, 3, 5)))


@torch.no_grad()
@pytest.mark.parametrize("activation", ["int8", "fp8_e4m3"])
def test_bit_linear_is_the_module(activation: Any) -> None:
    torch.manual_seed(1)
    layer = BitLinear(32, 24, activation=activation).eval()
    norm = RMSNorm(32, eps=1e-3).eval()
    norm.weight.uniform_(0.5, 1.5)
    x = torch.randn(2, 5, 32) * 3
    packed = PackedBitLinear.from_bit_linear(layer)
    y = OPS.bit_linear(
        x, packed.weight, packed.weight_scale, norm.weight, activation=activation, eps=1e-3
    )
    assert_equal(y, layer(norm(x)))
    normed = norm(x)
    y = OPS.bit_linear(normed, packed.weight, packed.weight_scale, activation=activation)
    assert_equal(y, layer(normed))


@torch.no_grad()
@CASES
def test_flash_mla_is_the_module(case: MlaCase) -> None:
    tensors, shape = case.inputs(), case.shape
    config = ModelConfig(
        hidden_size=8,
        num_layers=1,
        num_heads=case.num_heads,
        latent_rank=case.rank,
        nope_dim=case.nope_dim,
        rope_dim=case.rope_dim,
        # Only a multiple of 4 values in all can feed o_proj, which is not part of the op.
        value_dim=4,
    )
    module = FlashMLA(config, 0).eval()
    module.shape = shape
    module.kv_a_layernorm.weight.copy_(tensors["kv_norm_weight"])
    module.kv_b_proj = PackedBitLinear(tensors["kv_b"], tensors["kv_b_scale"])
    cache = LatentCache.from_tensors(
        *(tensors[f"past_{part}"].clone() for part in ("latent", "scale", "rope")),
        tensors["past_lens"],
    )
    # The module reads up to the longest row's padded end, which the op needs no room for.
    room = cache.longest + case.length - case.capacity
    if room > 0:
        cache.latent, cache.rope = (
            nn.functional.pad(t, (0, 0, 0, room)) for t in (cache.latent, cache.rope)
        )
        cache.scale = nn.functional.pad(cache.scale, (0, room), value=1.0)
    positions = cache.past_lens[:, None] + torch.arange(case.length)
    rotary = rotary_angles(positions, shape.rope_dim, shape.theta)
    expected = module.attend(tensors["q"], tensors["kv"], rotary, tensors["seq_lens"].long(), cache)
    y, latent, scale, rope = OPS.flash_mla(*tensors.values(), **case.attributes)
    assert_equal(y, expected)
    assert_equal(latent, cache.latent[0, :, : case.capacity])
    assert_equal(scale, cache.scale[0, :, : case.capacity])
    assert_equal(rope, cache.rope[0, :, : case.capacity])


@torch.no_grad()
def test_swiglu_is_the_module() -> None:
    layer = FeedForward(ModelConfig(hidden_size=64, num_heads=1)).eval()
    gate, up = torch.randn(2, 3, 50) * 4, torch.randn(2, 3, 50)
    assert_equal(OPS.swiglu(gate, up), layer.swiglu(gate, up))


def test_defaults_are_the_contract() -> None:
    tensors = bit_linear_inputs(2)
    tensors["x"] *= 1e-3  # so that eps matters
    x = tuple(tensors.values())
    assert_equal(OPS.bit_linear(*x), OPS.bit_linear(*x, activation="int8", eps=1e-5))
    assert not torch.equal(OPS.bit_linear(*x), OPS.bit_linear(*x, eps=1e-4))
    case = MLA_CASES["chunk"]
    tensors = case.inputs()
    tensors["kv"] *= 1e-3
    attributes = case.attributes
    del attributes["theta"], attributes["eps"]
    y = OPS.flash_mla(*tensors.values(), **attributes)
    for found, expected in zip(
        y, OPS.flash_mla(*tensors.values(), **attributes, theta=1e4, eps=1e-5), strict=True
    ):
        assert_equal(found, expected)


def test_the_past_is_left_as_it_was() -> None:
    case = MLA_CASES["chunk"]
    tensors = case.inputs()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    OPS.flash_mla(*tensors.values(), **case.attributes)
    for name, tensor in tensors.items():
        assert_equal(tensor, before[name])


def test_wrong_shapes_are_named() -> None:
    tensors = bit_linear_inputs(0, num_inputs=32, num_outputs=24)
    tensors["weight"] = tensors["weight"][:, :4]
    with pytest.raises(ValueError, match=r"weight: expected torch.uint8 \[24, 8\].*\[24, 4\]"):
        OPS.bit_linear(*tensors.values())
    case = MLA_CASES["chunk"]
    inputs = case.inputs()
    inputs["past_latent"] = inputs["past_latent"].float()
    with pytest.raises(
        ValueError, match=r"past_latent: expected torch.int8 .* found torch.float32"
    ):
        OPS.flash_mla(*inputs.values(), **case.attributes)


def test_full_cache_is_named() -> None:
    case = MlaCase(past_lens=(2, 4), seq_lens=(2, 2), length=2, capacity=5)
    with pytest.raises(ValueError, match="the cache holds 5 tokens a row, and row 1 needs 6"):
        OPS.flash_mla(*case.inputs().values(), **case.attributes)


def test_there_are_no_silent_gradients() -> None:
    gate = torch.randn(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="swiglu"):
        OPS.swiglu(gate, torch.randn(3)).sum().backward()


class Block(nn.Module):
    """A module of a user's own over the three ops."""

    def __init__(self, case: MlaCase) -> None:
        super().__init__()
        self.case = case
        width = case.num_heads * case.shape.qk_dim
        self.sizes = [width, case.rank + case.rope_dim]
        # Fused q and kv_a, with a scale for each row.
        for name, value in bit_linear_inputs(5, num_inputs=16, num_outputs=sum(self.sizes)).items():
            if name != "x":
                self.register_buffer(name, value)
        for name in ("kv_norm_weight", "kv_b", "kv_b_scale"):
            self.register_buffer(name, case.inputs()[name])

    def forward(self, x: Tensor, past_lens: Tensor, seq_lens: Tensor, *past: Tensor) -> Any:
        qkv = OPS.bit_linear(x, self.weight, self.weight_scale, self.norm_weight, eps=1e-4)
        q, kv = qkv.split(self.sizes, dim=-1)
        weights = (self.kv_norm_weight, self.kv_b, self.kv_b_scale)
        y, *present = OPS.flash_mla(
            q, kv, *weights, past_lens, seq_lens, *past, **self.case.attributes
        )
        return OPS.swiglu(y, y * 2), *present


INPUT_NAMES = ["x", "past_lens", "seq_lens", "past_latent", "past_scale", "past_rope"]


def block_inputs(case: MlaCase, seed: int) -> dict[str, Tensor]:
    x = torch.randn(
        len(case.past_lens), case.length, 16, generator=torch.Generator().manual_seed(seed)
    )
    tensors = {"x": x, **case.inputs(seed)}
    return {name: tensors[name] for name in INPUT_NAMES}


def trace(module: nn.Module, tensors: dict[str, Tensor], opset: int) -> ir.Model:
    any_size = torch.export.Dim.DYNAMIC
    rows, cells = {0: any_size}, {0: any_size, 1: any_size}
    program = torch.onnx.export(
        module.eval(),
        tuple(tensors.values()),
        dynamo=True,
        opset_version=opset,
        input_names=list(tensors),
        dynamic_shapes=(cells, rows, rows, (cells, cells, cells)),
        custom_translation_table=onnx_translation_table(),
        verbose=False,
    )
    assert program is not None
    return program.model


@pytest.fixture(scope="module")
def traced() -> ir.Model:
    case = MLA_CASES["chunk"]
    return add_function_bodies(trace(Block(case), block_inputs(case, 0), OPSET))


def test_traced_module_runs_in_onnx_runtime(traced: ir.Model) -> None:
    model, block = ir.to_proto(traced), Block(MLA_CASES["chunk"])
    for name in ("chunk", "ragged prefill", "ragged decode", "full row"):
        tensors = block_inputs(MLA_CASES[name], seed=7)
        expected = block(*tensors.values())
        y, *present = run_onnx(model, tensors)
        ONE_ROUNDING.assert_close(y, expected[0])
        for found, want in zip(present, expected[1:], strict=True):
            assert_equal(found, want)


def test_traced_module_holds_the_ops(traced: ir.Model) -> None:
    ops = [node.op_type for node in traced.graph if node.domain == DOMAIN]
    assert ops == ["BitLinear", "FlashMLA", "SwiGLU"]
    assert {name for _, name, _ in traced.functions} == set(ops)
    assert traced.opset_imports[DOMAIN] == 1


def text_model(text: str, opset: int = OPSET) -> ir.Model:
    head = f'<ir_version: 10, opset_import: ["" : {opset}, "{DOMAIN}" : 1]>\n'
    return ir.from_onnx_text(head + text)


def test_only_the_bodies_in_use_are_added() -> None:
    model = text_model("g (float[2] a) => (float[2] y) { y = tinylm.SwiGLU (a, a) }")
    assert [name for _, name, _ in add_function_bodies(model).functions] == ["SwiGLU"]
    model = text_model("g (float[2] a) => (float[2] y) { y = Add (a, a) }", opset=18)
    assert not add_function_bodies(model).functions


def test_ops_inside_branches_are_found() -> None:
    model = text_model(
        "g (bool c, float[2] a) => (float[2] y) { y = If (c) <"
        "then_branch = t () => (float[2] u) { u = tinylm.SwiGLU (a, a) },"
        "else_branch = e () => (float[2] v) { v = Identity (a) }> }"
    )
    assert [name for _, name, _ in add_function_bodies(model).functions] == ["SwiGLU"]


def test_another_operator_set_is_refused() -> None:
    model = text_model("g (float[2] a) => (float[2] y) { y = tinylm.SwiGLU (a, a) }", opset=18)
    with pytest.raises(ExportError, match=r"operator set 20, the model has 18.*opset_version=20"):
        add_function_bodies(model)


def test_two_variants_of_bit_linear_are_refused() -> None:
    model = text_model(
        "g (float[2,4] x, uint8[4,1] w, float[4] s) => (float[2,4] z) {"
        '[first] y = tinylm.BitLinear <activation = "int8"> (x, w, s)'
        '[second] z = tinylm.BitLinear <activation = "fp8_e4m3"> (y, w, s) }'
    )
    with pytest.raises(ExportError, match=r"(?s)'first' int8 without norm.*'second' fp8_e4m3"):
        add_function_bodies(model)


def test_unknown_op_is_refused() -> None:
    model = text_model("g (float[2] a) => (float[2] y) { [n] y = tinylm.Swish (a) }")
    with pytest.raises(ExportError, match="node 'n': tinylm::Swish is not an op of the contract"):
        add_function_bodies(model)
