"""The ops by their native kernels in ONNX Runtime, against the PyTorch ops."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from export_helpers import MLA_CASES, MlaCase, bit_linear_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from native_helpers import (
    LIBRARY,
    example,
    feeds,
    kernel_calls,
    native_model,
    native_session,
    needs_library,
    run_native,
)
from tolerances import ONE_ROUNDING, assert_equal
from torch import Tensor

from tinylm.config import float32
from tinylm.norm import rms_norm
from tinylm.quantization import dequantize, quantize_activation
from tinylm_export.ops import OPS as OPS_OF_CONTRACT
from tinylm_export.torch_ops import torch_op

pytestmark = needs_library

OPS = torch.ops.tinylm
ACTIVATIONS = pytest.mark.parametrize("activation", ["int8", "fp8_e4m3"])
NORM = pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
CASES = pytest.mark.parametrize("case", MLA_CASES.values(), ids=MLA_CASES.keys())
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
PRESENT = ("present_latent", "present_scale", "present_rope")
ISAS = ("portable", "avx2", "avx-vnni", "avx512-vnni", "amx-int8")


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 2**31),
    lead=st.lists(st.integers(0, 5), max_size=3).map(tuple),
    row_bytes=st.integers(1, 70),
    num_outputs=st.integers(1, 70),
    activation=st.sampled_from(["int8", "fp8_e4m3"]),
    norm=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_bit_linear_on_random_shapes(
    seed: int,
    lead: tuple[int, ...],
    row_bytes: int,
    num_outputs: int,
    activation: str,
    norm: bool,
    dtype: torch.dtype,
) -> None:
    tensors = bit_linear_inputs(
        seed,
        lead=lead,
        num_inputs=4 * row_bytes,
        num_outputs=num_outputs,
        norm=norm,
        dtype=dtype,
    )
    expected = torch_bit_linear(tensors, activation=activation, eps=1e-3)
    assert_equal(run_native("BitLinear", tensors, activation=activation, eps=1e-3)[0], expected)


def torch_bit_linear(tensors: dict[str, Tensor], **attributes: Any) -> Tensor:
    """The PyTorch op, which can't take the maximum of a row in an empty tensor."""
    x = tensors["x"]
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], len(tensors["weight_scale"]))
    return OPS.bit_linear(*tensors.values(), **attributes)


@ACTIVATIONS
@NORM
def test_rows_of_zeros_and_extremes(activation: str, norm: bool) -> None:
    tensors = bit_linear_inputs(3, lead=(6,), norm=norm)
    scales = torch.tensor([0.0, 1e-38, 1e-6, 1e6, 1e18, 1.0])
    tensors["x"] = tensors["x"].sign() * scales[:, None]
    found = run_native("BitLinear", tensors, activation=activation)[0]
    assert not found[0].any()
    assert_equal(found, OPS.bit_linear(*tensors.values(), activation=activation))


@NORM
@DTYPES
def test_int8_linear(norm: bool, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(4)
    tensors = bit_linear_inputs(4, num_inputs=508, num_outputs=131, norm=norm, dtype=dtype)
    weight = torch.randint(-127, 128, (131, 508), generator=g, dtype=torch.int8)
    tensors["weight"] = weight
    x = tensors["x"]
    normed = rms_norm(x, tensors["norm_weight"], float32(1e-5)) if norm else x.float()
    q, s = quantize_activation(normed, "int8")
    accumulator = (q.double() @ weight.double().t()).float()  # an exact sum, rounded once
    expected = dequantize(accumulator, tensors["weight_scale"], s).to(dtype)
    found = run_native("Int8Linear", tensors)[0]
    assert_equal(found, expected)
    assert_equal(found, torch_op("Int8Linear")(*tensors.values()))


@CASES
@DTYPES
def test_flash_mla(case: MlaCase, dtype: torch.dtype) -> None:
    tensors = case.inputs(dtype=dtype)
    found = run_native("FlashMLA", tensors, **case.attributes)
    expected = OPS.flash_mla(*tensors.values(), **case.attributes)
    ONE_ROUNDING.assert_close(found[0], expected[0])
    for have, want in zip(found, expected, strict=True):
        assert have.dtype == want.dtype
    for have, want in zip(found[1:], expected[1:], strict=True):
        assert_equal(have, want)


@CASES
def test_garbage_in_unused_slots_is_harmless_and_kept(case: MlaCase) -> None:
    tensors = case.inputs(seed=2)
    dirty = dict(tensors)
    unused = torch.arange(case.capacity) >= tensors["past_lens"][:, None]
    dirty["past_latent"] = tensors["past_latent"].masked_fill(unused[..., None], -128)
    dirty["past_scale"] = tensors["past_scale"].masked_fill(unused, torch.nan)
    dirty["past_rope"] = tensors["past_rope"].masked_fill(unused[..., None], torch.nan)
    y, *present = run_native("FlashMLA", tensors, **case.attributes)
    y_dirty, *present_dirty = run_native("FlashMLA", dirty, **case.attributes)
    assert_equal(y_dirty, y)
    filled = torch.arange(case.capacity) < (tensors["past_lens"] + tensors["seq_lens"])[:, None]
    for name, found, clean in zip(PRESENT, present_dirty, present, strict=True):
        assert_equal(found[filled], clean[filled])
        past = dirty[name.replace("present", "past")]
        np.testing.assert_array_equal(found[~filled].numpy(), past[~filled].numpy())


@DTYPES
def test_swiglu(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(2, 3, 500, generator=g) * 8 for _ in range(2))
    gate[0, 0, :5] = torch.tensor([0.0, -0.0, 500.0, -500.0, -6e4])
    tensors = {"gate": gate.to(dtype), "up": up.to(dtype)}
    assert_equal(run_native("SwiGLU", tensors)[0], OPS.swiglu(*tensors.values()))


def with_bfloat16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Compute in bfloat16 between casts; NumPy has no such type."""
    node = model.graph.node[0]
    to, back = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    nodes = []
    for item in model.graph.input:
        if item.name in ("x", "gate", "up", "q", "kv", "past_rope"):
            name = f"{item.name}_short"
            nodes.append(onnx.helper.make_node("Cast", [item.name], [name], to=to))
            node.input[list(node.input).index(item.name)] = name
    nodes.append(node)
    for item in model.graph.output:
        if item.name in ("y", "present_rope"):
            name = f"{item.name}_short"
            nodes.append(onnx.helper.make_node("Cast", [name], [item.name], to=back))
            node.output[list(node.output).index(item.name)] = name
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    del changed.graph.node[:]
    changed.graph.node.extend(nodes)
    return changed


@pytest.mark.parametrize("op", ["BitLinear", "SwiGLU", "FlashMLA", "FlashMLA decode"])
def test_bfloat16(op: str) -> None:
    attributes: dict[str, Any] = {}
    if op == "BitLinear":
        tensors = bit_linear_inputs(5)
    elif op == "SwiGLU":
        g = torch.Generator().manual_seed(1)
        tensors = {name: torch.randn(3, 70, generator=g) * 4 for name in ("gate", "up")}
    else:
        case = MLA_CASES["ragged decode" if "decode" in op else "chunk"]
        tensors, attributes = case.inputs(), case.attributes
    op = op.split()[0]
    floats = ("x", "gate", "up", "q", "kv", "past_rope")
    short = {name: t.bfloat16() if name in floats else t for name, t in tensors.items()}
    model = with_bfloat16(native_model(op, tensors, attributes))
    exact = {name: t.float() if name in floats else t for name, t in short.items()}
    found = native_session(model).run(None, feeds(model, exact))
    expected = torch_op(op)(*short.values(), **attributes)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for have, want in zip(found, expected, strict=True):
        want = want.float() if want.dtype == torch.bfloat16 else want
        assert_equal(torch.from_numpy(have), want)


@pytest.mark.parametrize("bodies", [True, False], ids=["with body", "without body"])
@pytest.mark.parametrize("op", list(OPS_OF_CONTRACT))
def test_the_kernel_runs_with_or_without_a_function_body(op: str, bodies: bool) -> None:
    tensors, attributes = example(op)
    model = native_model(op, tensors, attributes, bodies=bodies)
    session = native_session(model)
    for calls in range(1, 4):
        before = {name: kernel_calls(name) for name in OPS_OF_CONTRACT}
        session.run(None, feeds(model, tensors))
        grown = {name: kernel_calls(name) - count for name, count in before.items()}
        assert grown == {name: int(name == op) for name in grown}, calls


@pytest.mark.parametrize("name", ["chunk", "ragged decode", "more padding than room"])
@DTYPES
def test_cache_may_be_changed_in_place(name: str, dtype: torch.dtype) -> None:
    """Past and present in one buffer, as generation binds them, against buffers of their own."""
    import onnxruntime as ort

    case = MLA_CASES[name]
    tensors = case.inputs(seed=7, dtype=dtype)
    model = native_model("FlashMLA", tensors, case.attributes)
    session = native_session(model)
    arrays = feeds(model, tensors)
    expected = session.run(None, arrays)
    for key, array in arrays.items():  # the run above must leave its inputs as they were
        np.testing.assert_array_equal(array, tensors[key].numpy())
    binding = session.io_binding()
    buffers = {}
    for key, array in arrays.items():
        buffers[key] = ort.OrtValue.ortvalue_from_numpy(array.copy())
        binding.bind_ortvalue_input(key, buffers[key])
    for present in PRESENT:
        binding.bind_ortvalue_output(present, buffers[present.replace("present", "past")])
    binding.bind_output("y")
    session.run_with_iobinding(binding)
    found = dict(zip((*PRESENT, "y"), binding.get_outputs(), strict=True))
    for key, want in zip(("y", *PRESENT), expected, strict=True):
        np.testing.assert_array_equal(found[key].numpy(), want)
        if key in PRESENT:
            held = buffers[key.replace("present", "past")]
            np.testing.assert_array_equal(held.numpy(), want)


@pytest.mark.parametrize("op", ["BitLinear", "FlashMLA", "SwiGLU"])
def test_threads_give_the_same_bits(op: str) -> None:
    if op == "BitLinear":
        tensors = bit_linear_inputs(1, lead=(64,), num_inputs=512, num_outputs=700)
        attributes: dict[str, Any] = {}
    elif op == "SwiGLU":
        g = torch.Generator().manual_seed(2)
        tensors = {name: torch.randn(99, 1001, generator=g) for name in ("gate", "up")}
        attributes = {}
    else:
        sizes = {"rank": 64, "num_heads": 5, "nope_dim": 32, "rope_dim": 32, "value_dim": 64}
        case = MlaCase(past_lens=(30, 4), seq_lens=(40, 9), length=40, capacity=70, **sizes)
        tensors, attributes = case.inputs(), case.attributes
    serial = run_native(op, tensors, **attributes)
    parallel = run_native(op, tensors, num_threads=3, **attributes)
    for have, want in zip(parallel, serial, strict=True):
        assert_equal(have, want)


@pytest.mark.parametrize("isa", ISAS)
def test_sums_are_exact_on_a_thousand_shapes(isa: str) -> None:
    """The kernel family is chosen once in a process, so each has one of its own."""
    worker = Path(__file__).with_name("native_accumulators.py")
    done = subprocess.run(
        [sys.executable, str(worker), str(LIBRARY), "1000"],
        env={**os.environ, "TINYLM_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode and "TINYLM_CPU_ISA" in done.stderr:
        pytest.skip(f"NOT TESTED: {isa} can't run here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1000 shapes equal"
