"""What the native ops accept is export/ops.py, and what they refuse is refused with a reason."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from export_helpers import MLA_CASES, bit_linear_inputs
from native_helpers import (
    CONSTANT_INPUTS,
    NODE,
    example,
    feeds,
    native_error,
    native_model,
    native_session,
    needs_library,
    op_specs,
    run_native,
    session_error,
)
from tolerances import assert_equal
from torch import Tensor

from tinylm_export.ops import OPS, OpSpec

pytestmark = needs_library

SPECS = pytest.mark.parametrize("spec", OPS.values(), ids=OPS.keys())
MLA = MLA_CASES["chunk"]
_OTHER_TYPES = (torch.float32, torch.float16, torch.float64, torch.int8, torch.uint8, torch.int32)


def test_the_library_has_the_ops_of_the_contract() -> None:
    assert sorted(op_specs()) == sorted(OPS)


@SPECS
def test_the_librarys_table_is_the_contract(spec: OpSpec) -> None:
    expected: list[tuple[str, ...]] = []
    for kind, parameters in (("input", spec.inputs), ("output", spec.outputs)):
        for p in parameters:
            needed = "optional" if p.optional else "required"
            expected.append((kind, p.name, p.type, p.shape, needed))
    for a in spec.attributes:
        default = "required" if a.default is None else str(a.default)
        expected.append(("attribute", a.name, a.type, default))
    assert op_specs()[spec.name] == expected


@SPECS
def test_example_is_accepted(spec: OpSpec) -> None:
    tensors, attributes = example(spec.name)
    model = native_model(spec.name, tensors, attributes)
    assert len(native_session(model).run(None, feeds(model, tensors))) == len(spec.outputs)


@SPECS
def test_every_input_has_its_type(spec: OpSpec) -> None:
    tensors, attributes = example(spec.name)
    assert list(tensors) == [p.name for p in spec.inputs]
    # Inputs of type T must agree; one alone may have another float type.
    alone = [p.name for p in spec.inputs if p.type == "T"] == [spec.inputs[0].name]
    for name, tensor in tensors.items():
        for dtype in _OTHER_TYPES:
            changed = {**tensors, name: tensor.to(dtype)}
            if dtype == tensor.dtype or (
                dtype == torch.float16 and alone and name == spec.inputs[0].name
            ):
                continue
            message = session_error(native_model(spec.name, changed, attributes), changed)
            assert NODE in message, f"{name} as {dtype}: {message}"


@SPECS
def test_only_optional_inputs_may_be_left_out(spec: OpSpec) -> None:
    tensors, attributes = example(spec.name)
    for parameter in spec.inputs:
        model = native_model(spec.name, tensors, attributes)
        node = model.graph.node[0]
        node.input[list(node.input).index(parameter.name)] = ""
        if parameter.optional:
            native_session(model)
        else:
            message = session_error(model, tensors)
            assert NODE in message or spec.name in message, f"{parameter.name}: {message}"


@SPECS
def test_there_are_no_more_inputs_and_outputs(spec: OpSpec) -> None:
    tensors, attributes = example(spec.name)
    model = native_model(spec.name, tensors, attributes)
    model.graph.node[0].input.append(spec.inputs[0].name)
    assert NODE in session_error(model, tensors)
    model = native_model(spec.name, tensors, attributes)
    model.graph.node[0].output.append("one_more")
    assert NODE in session_error(model, tensors)


@SPECS
def test_attributes_are_required_or_have_their_default(spec: OpSpec) -> None:
    tensors, attributes = example(spec.name)
    for attribute in spec.attributes:
        rest = {name: value for name, value in attributes.items() if name != attribute.name}
        if attribute.default is None:
            message = native_error(spec.name, tensors, rest)
            assert NODE in message, message
            assert attribute.name in message, message
        else:
            given = run_native(spec.name, tensors, **rest, **{attribute.name: attribute.default})
            left_out = run_native(spec.name, tensors, **rest)
            for have, want in zip(left_out, given, strict=True):
                assert_equal(have, want)


@SPECS
def test_attributes_change_the_result(spec: OpSpec) -> None:
    """So that an attribute under another name, which would be ignored, shows."""
    changed_values = {"activation": "fp8_e4m3", "eps": 0.7, "theta": 3.0, "softmax_scale": 2.0}
    tensors, attributes = example(spec.name)
    expected = run_native(spec.name, tensors, **attributes)
    for name, value in changed_values.items():
        if name in spec.attribute_names():
            found = run_native(spec.name, tensors, **{**attributes, name: value})
            assert not torch.equal(found[0], expected[0]), name


@SPECS
def test_attributes_have_their_types(spec: OpSpec) -> None:
    tensors, attributes = example(spec.name)
    for name in spec.attribute_names():
        wrong = 3.5 if isinstance(attributes[name], (int, str)) else "a string"
        message = native_error(spec.name, tensors, {**attributes, name: wrong})
        assert NODE in message, message
        assert name in message, message


def grow(tensor: Tensor, axis: int, by: int = 4) -> Tensor:
    """Repeat the last slice of a tensor along an axis."""
    return torch.cat((tensor, tensor.narrow(axis, -1, 1).repeat_interleave(by, axis)), axis)


BIT_LINEAR_SHAPES = [
    ("x", -1, "K"),
    ("weight", 0, "N"),
    ("weight", 1, "K/4"),
    ("weight_scale", 0, "N"),
    ("norm_weight", 0, "K"),
]


@pytest.mark.parametrize(("name", "axis", "letter"), BIT_LINEAR_SHAPES)
def test_bit_linear_refuses_shapes_that_do_not_fit(name: str, axis: int, letter: str) -> None:
    tensors = bit_linear_inputs(0)
    found = tensors[name].shape[axis] + 4
    tensors[name] = grow(tensors[name], axis)
    message = native_error("BitLinear", tensors, {})
    assert NODE in message, message
    assert str(found) in message or str(found - 4) in message, message


def test_bit_linear_refuses_a_k_not_divisible_by_4() -> None:
    tensors = bit_linear_inputs(0, norm=False)
    tensors["x"] = tensors["x"][..., :30].contiguous()
    message = native_error("BitLinear", tensors, {})
    assert NODE in message, message
    assert "30" in message, message


def test_bit_linear_refuses_a_scalar_x() -> None:
    tensors = bit_linear_inputs(0, norm=False)
    tensors["x"] = torch.tensor(1.0)
    assert NODE in native_error("BitLinear", tensors, {})


FLASH_MLA_SHAPES = [
    ("q", 0),
    ("q", 1),
    ("q", 2),
    ("kv", 0),
    ("kv", 1),
    ("kv", 2),
    ("kv_norm_weight", 0),
    ("kv_b", 0),
    ("kv_b", 1),
    ("kv_b_scale", 0),
    ("past_lens", 0),
    ("seq_lens", 0),
    ("past_latent", 0),
    ("past_latent", 1),
    ("past_latent", 2),
    ("past_scale", 0),
    ("past_scale", 1),
    ("past_rope", 0),
    ("past_rope", 1),
    ("past_rope", 2),
]


@pytest.mark.parametrize(("name", "axis"), FLASH_MLA_SHAPES)
def test_flash_mla_refuses_shapes_that_do_not_fit(name: str, axis: int) -> None:
    tensors = MLA.inputs()
    tensors[name] = grow(tensors[name], axis)
    assert NODE in native_error("FlashMLA", tensors, MLA.attributes)


@pytest.mark.parametrize("name", ["q", "kv_b", "past_lens", "past_latent", "past_scale"])
def test_flash_mla_refuses_another_rank(name: str) -> None:
    tensors = MLA.inputs()
    tensors[name] = tensors[name][..., None]
    assert NODE in native_error("FlashMLA", tensors, MLA.attributes)


@pytest.mark.parametrize("name", ["num_heads", "nope_dim", "rope_dim", "value_dim"])
@pytest.mark.parametrize("change", [lambda n: n + 2, lambda _: 0, lambda n: -n])
def test_flash_mla_refuses_sizes_that_do_not_fit(name: str, change: Callable[[int], int]) -> None:
    attributes = {**MLA.attributes, name: change(MLA.attributes[name])}
    assert NODE in native_error("FlashMLA", MLA.inputs(), attributes)


LENGTHS = [
    ("past_lens", [2, 6, 0], "row 1", "7"),  # past_lens + seq_lens > 7
    ("past_lens", [-1, 5, 0], "row 0", "-1"),
    ("past_lens", [2, 5, 2**31 - 1], "row 2", "7"),  # the sum must not wrap
    ("seq_lens", [3, 2, -1], "row 2", "-1"),
    ("seq_lens", [3, 2, 4], "row 2", "4"),  # S is 3
]


@pytest.mark.parametrize(("name", "values", "row", "number"), LENGTHS)
def test_flash_mla_refuses_lengths_that_do_not_fit(
    name: str, values: list[int], row: str, number: str
) -> None:
    tensors = MLA.inputs()
    tensors[name] = torch.tensor(values, dtype=torch.int32)
    message = native_error("FlashMLA", tensors, MLA.attributes)
    for part in (NODE, row, number):
        assert part in message, message


def test_lengths_that_are_refused_leave_the_cache_alone() -> None:
    import onnxruntime as ort

    tensors = MLA.inputs()
    tensors["past_lens"] = torch.tensor([2, 6, 0], dtype=torch.int32)  # only row 1 is wrong
    model = native_model("FlashMLA", tensors, MLA.attributes)
    session = native_session(model)
    binding = session.io_binding()
    buffers = {}
    for name, array in feeds(model, tensors).items():
        buffers[name] = ort.OrtValue.ortvalue_from_numpy(array.copy())
        binding.bind_ortvalue_input(name, buffers[name])
    for part in ("latent", "scale", "rope"):
        binding.bind_ortvalue_output(f"present_{part}", buffers[f"past_{part}"])
    binding.bind_output("y")
    with pytest.raises(Exception, match="row 1"):
        session.run_with_iobinding(binding)
    for part in ("latent", "scale", "rope"):
        held = buffers[f"past_{part}"].numpy()
        np.testing.assert_array_equal(held, tensors[f"past_{part}"].numpy())


@pytest.mark.parametrize(("op", "name"), [("BitLinear", "weight"), ("FlashMLA", "kv_b")])
def test_code_3_is_refused(op: str, name: str) -> None:
    tensors, attributes = example(op)
    tensors[name] = tensors[name].clone()
    tensors[name][2, 1] = 0b01_11_01_00  # column 4 + 2
    message = native_error(op, tensors, attributes)
    for part in (NODE, "row 2", "column 6"):
        assert part in message, message


CONSTANTS = [(op, name) for op, names in CONSTANT_INPUTS.items() for name in names]


@pytest.mark.parametrize(("op", "name"), CONSTANTS)
def test_weights_must_be_constant(op: str, name: str) -> None:
    tensors, attributes = example(op)
    message = native_error(op, tensors, attributes, variable=(name,))
    assert NODE in message, message
    assert name in message, message


def test_an_unknown_activation_is_refused() -> None:
    message = native_error("BitLinear", bit_linear_inputs(0), {"activation": "int3"})
    for part in (NODE, "int3", "int8", "fp8_e4m3"):
        assert part in message, message


def test_swiglu_refuses_shapes_that_do_not_fit() -> None:
    tensors = {"gate": torch.ones(2, 5), "up": torch.ones(5, 2)}
    assert NODE in native_error("SwiGLU", tensors, {})
