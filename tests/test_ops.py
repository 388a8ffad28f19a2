"""The op contract: schemas, PyTorch ops and function bodies are held to the same tables."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import onnx
import pytest
from export_helpers import MLA_CASES, bit_linear_inputs, op_model

from tinylm.config import float32
from tinylm.errors import ExportError
from tinylm_export.function_bodies import function_bodies
from tinylm_export.ops import (
    DOMAIN,
    OPS,
    OPSET,
    VERSION,
    OpSpec,
    register_onnx_schemas,
)
from tinylm_export.torch_ops import torch_op

SPECS = pytest.mark.parametrize("spec", OPS.values(), ids=OPS.keys())
VARIANTS = [("int8", True), ("int8", False), ("fp8_e4m3", True), ("fp8_e4m3", False)]


@pytest.fixture(autouse=True)
def schemas() -> None:
    register_onnx_schemas()
    register_onnx_schemas()  # may be called again


@SPECS
def test_onnx_schema_is_the_table(spec: OpSpec) -> None:
    schema = onnx.defs.get_schema(spec.name, VERSION, DOMAIN)
    for formal, declared in ((schema.inputs, spec.inputs), (schema.outputs, spec.outputs)):
        assert [p.name for p in formal] == [p.name for p in declared]
        assert [p.type_str for p in formal] == [p.type for p in declared]
        optional = onnx.defs.OpSchema.FormalParameterOption.Optional
        assert [p.option == optional for p in formal] == [p.optional for p in declared]
    assert sorted(schema.attributes) == sorted(spec.attribute_names())
    for attribute in spec.attributes:
        found = schema.attributes[attribute.name]
        assert found.required == (attribute.default is None)
        if attribute.default is not None:
            assert_default(onnx.helper.get_attribute_value(found.default_value), attribute.default)


def assert_default(found: Any, declared: Any) -> None:
    if isinstance(declared, str):
        assert found.decode() == declared
    else:
        assert found == float32(declared)


@SPECS
def test_torch_schema_is_the_table(spec: OpSpec) -> None:
    schema = torch_op(spec.name)._schema
    inputs = [a for a in schema.arguments if not a.kwarg_only]
    assert [a.name for a in inputs] == [p.name for p in spec.inputs]
    assert ["Optional" in str(a.type) for a in inputs] == [p.optional for p in spec.inputs]
    attributes = [a for a in schema.arguments if a.kwarg_only]
    types = {"int": "int", "float": "float", "str": "string"}
    assert [(a.name, types[str(a.type)]) for a in attributes] == [
        (a.name, a.type) for a in spec.attributes
    ]
    for found, declared in zip(attributes, spec.attributes, strict=True):
        assert found.has_default_value() == (declared.default is not None)
        assert found.default_value == declared.default
    assert [r.name for r in schema.returns] == [p.name for p in spec.outputs]


@pytest.mark.parametrize(("activation", "norm"), VARIANTS)
def test_function_bodies_are_the_table(activation: str, norm: bool) -> None:
    bodies = {body.name: body for body in function_bodies(activation, norm=norm)}
    assert list(bodies) == list(OPS)
    for name, spec in OPS.items():
        body = bodies[name]
        assert body.domain == DOMAIN
        assert list(body.input) == [p.name for p in spec.inputs]
        assert list(body.output) == [p.name for p in spec.outputs]
        assert list(body.attribute) == [a.name for a in spec.attributes if a.default is None]
        defaults = {a.name: a.default for a in spec.attributes if a.default is not None}
        assert [a.name for a in body.attribute_proto] == list(defaults)
        for attribute in body.attribute_proto:
            assert_default(onnx.helper.get_attribute_value(attribute), defaults[attribute.name])
        assert [(o.domain, o.version) for o in body.opset_import] == [("", OPSET)]
        assert {node.domain for node in all_nodes(body.node)} == {""}


@pytest.mark.parametrize(("activation", "norm"), VARIANTS)
def test_function_bodies_use_every_attribute_and_input(activation: str, norm: bool) -> None:
    for body in function_bodies(activation, norm=norm):
        nodes = list(all_nodes(body.node))
        used = {a.ref_attr_name for node in nodes for a in node.attribute if a.ref_attr_name}
        read = {name for node in nodes for name in node.input}
        # The activation format and the norm choose the body instead of being read by it.
        chosen = set() if norm else {"eps"}
        unread = set() if norm else {"norm_weight"}
        if body.name == "BitLinear":
            chosen = chosen | {"activation"}
        elif body.name != "Int8Linear":
            chosen = unread = set()
        assert used == set(OPS[body.name].attribute_names()) - chosen
        assert set(body.input) - read == unread


def all_nodes(nodes: Any) -> Iterator[Any]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from all_nodes(attribute.g.node)


def test_registration_leaves_the_reference_evaluator_importable() -> None:
    # A fresh process: once imported, it stays imported.
    code = "from tinylm_export.ops import *; register_onnx_schemas(); import onnx.reference"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unknown_activation_is_an_error() -> None:
    with pytest.raises(ExportError, match="one of int8, fp8_e4m3, found 'int4'"):
        function_bodies("int4")


def mla_model(**changes: Any) -> Any:
    case = MLA_CASES["chunk"]
    return op_model("FlashMLA", case.inputs(), {**case.attributes, **changes})


def test_checker_accepts_the_ops() -> None:
    onnx.checker.check_model(op_model("BitLinear", bit_linear_inputs(0), {}), full_check=True)
    onnx.checker.check_model(mla_model(), full_check=True)


def test_checker_knows_required_attributes() -> None:
    model = mla_model()
    node = model.graph.node[0]
    del node.attribute[[a.name for a in node.attribute].index("softmax_scale")]
    with pytest.raises(onnx.checker.ValidationError, match="softmax_scale"):
        onnx.checker.check_model(model)


def test_checker_knows_unknown_attributes() -> None:
    model = op_model("BitLinear", bit_linear_inputs(0), {"bits": 2})
    with pytest.raises(onnx.checker.ValidationError, match="bits"):
        onnx.checker.check_model(model)


def test_checker_knows_the_number_of_inputs() -> None:
    model = op_model("BitLinear", bit_linear_inputs(0), {})
    del model.graph.node[0].input[1:]
    with pytest.raises(onnx.checker.ValidationError, match="input size 1 not in range"):
        onnx.checker.check_model(model)
