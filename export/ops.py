"""The op contract: what the custom ops are called, take and return.

PyTorch custom ops (:mod:`tinylm_export.torch_ops`), ONNX schemas (here), ONNX function bodies
(:mod:`tinylm_export.function_bodies`) and native kernels are all held to these tables.

Letters in shapes: B rows, S new tokens, C cache capacity, K inputs, N outputs, H heads, R latent
rank, P rope width, D query-key width, Dv value width. ``T`` is the graph's floating point type.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import onnx
from onnx import defs

DOMAIN = "tinylm"
VERSION = 1
# The ONNX operator set of the graph and of the function bodies.
OPSET = 20
IR_VERSION = 10

_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One input or output of an op.

    Attributes:
        name: Name in the schema.
        type: ONNX type string, or ``"T"`` for the graph's floating point type.
        shape: Shape in the letters of this module.
        doc: What it holds.
        optional: Whether it may be left out.
    """

    name: str
    type: str
    shape: str
    doc: str
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class Attribute:
    """One attribute of an op; required if ``default`` is None."""

    name: str
    type: Literal["int", "float", "string"]
    doc: str
    default: int | float | str | None = None


@dataclasses.dataclass(frozen=True)
class OpSpec:
    """A custom op."""

    name: str
    doc: str
    inputs: tuple[Parameter, ...]
    outputs: tuple[Parameter, ...]
    attributes: tuple[Attribute, ...]

    def attribute_names(self) -> list[str]:
        """Return the attributes' names, in order."""
        return [attribute.name for attribute in self.attributes]


BIT_LINEAR = OpSpec(
    name="BitLinear",
    doc=(
        "RMSNorm (if norm_weight is given), 8-bit quantisation per token, product with ternary "
        "weights, scale: y = (q . code) * weight_scale / s. The sum q . code is exact."
    ),
    inputs=(
        Parameter("x", "T", "[..., K]", "input"),
        Parameter("weight", "tensor(uint8)", "[N, K/4]", "2-bit codes, see tinylm/packing.py"),
        Parameter("weight_scale", "tensor(float)", "[N]", "scale of each row"),
        Parameter("norm_weight", "tensor(float)", "[K]", "RMSNorm weight", optional=True),
    ),
    outputs=(Parameter("y", "T", "[..., N]", "output"),),
    attributes=(
        Attribute("activation", "string", "int8 or fp8_e4m3", "int8"),
        Attribute("eps", "float", "added to the mean square in RMSNorm", 1e-5),
    ),
)

FLASH_MLA = OpSpec(
    name="FlashMLA",
    doc=(
        "Causal multi-head latent attention: rotate the query and the shared key, RMSNorm and "
        "quantise the latent, append both to the cache, attend, up-project values. Query i of row "
        "b sees cached tokens 0 .. past_lens[b] + i. y is zero past seq_lens."
    ),
    inputs=(
        Parameter("q", "T", "[B, S, H*D]", "queries, D = nope_dim + rope_dim"),
        Parameter("kv", "T", "[B, S, R+P]", "latent and rope key, before norm and rotation"),
        Parameter("kv_norm_weight", "tensor(float)", "[R]", "RMSNorm weight of the latent"),
        Parameter("kv_b", "tensor(uint8)", "[H*(nope+Dv), R/4]", "2-bit codes of kv_b"),
        Parameter("kv_b_scale", "tensor(float)", "[H*(nope+Dv)]", "scale of each row of kv_b"),
        Parameter("past_lens", "tensor(int32)", "[B]", "tokens already cached"),
        Parameter("seq_lens", "tensor(int32)", "[B]", "valid new tokens, right-padded"),
        Parameter("past_latent", "tensor(int8)", "[B, C, R]", "quantised latents"),
        Parameter("past_scale", "tensor(float)", "[B, C]", "multiplier s: latent / s"),
        Parameter("past_rope", "T", "[B, C, P]", "rotated shared keys"),
    ),
    outputs=(
        Parameter("y", "T", "[B, S, H*Dv]", "attention output"),
        Parameter("present_latent", "tensor(int8)", "[B, C, R]", "may share past_latent's memory"),
        Parameter("present_scale", "tensor(float)", "[B, C]", "may share past_scale's memory"),
        Parameter("present_rope", "T", "[B, C, P]", "may share past_rope's memory"),
    ),
    attributes=(
        Attribute("num_heads", "int", "H"),
        Attribute("nope_dim", "int", "query-key width without position"),
        Attribute("rope_dim", "int", "P, query-key width with rotary position"),
        Attribute("value_dim", "int", "Dv"),
        Attribute("theta", "float", "base of the rotary frequencies", 10000.0),
        Attribute("eps", "float", "added to the mean square in RMSNorm", 1e-5),
        Attribute("softmax_scale", "float", "factor on the scores"),
    ),
)

SWIGLU = OpSpec(
    name="SwiGLU",
    doc="silu(gate) * up; silu is computed in float64 and rounded to T, then multiplied in T.",
    inputs=(
        Parameter("gate", "T", "[..., K]", "input of silu"),
        Parameter("up", "T", "[..., K]", "factor"),
    ),
    outputs=(Parameter("y", "T", "[..., K]", "output"),),
    attributes=(),
)

INT8_LINEAR = OpSpec(
    name="Int8Linear",
    doc=(
        "RMSNorm (if norm_weight is given), int8 quantisation per token, product with int8 "
        "weights, scale: y = float(q . weight) * weight_scale / s. The sum is exact, in int32."
    ),
    inputs=(
        Parameter("x", "T", "[..., K]", "input"),
        Parameter("weight", "tensor(int8)", "[N, K]", "codes, -127 to 127"),
        Parameter("weight_scale", "tensor(float)", "[N]", "scale of each row"),
        Parameter("norm_weight", "tensor(float)", "[K]", "RMSNorm weight", optional=True),
    ),
    outputs=(Parameter("y", "T", "[..., N]", "output"),),
    attributes=(Attribute("eps", "float", "added to the mean square in RMSNorm", 1e-5),),
)

OPS: dict[str, OpSpec] = {spec.name: spec for spec in (BIT_LINEAR, FLASH_MLA, SWIGLU, INT8_LINEAR)}

_ATTRIBUTE_TYPES = {
    "int": defs.OpSchema.AttrType.INT,
    "float": defs.OpSchema.AttrType.FLOAT,
    "string": defs.OpSchema.AttrType.STRING,
}


def onnx_schema(spec: OpSpec) -> defs.OpSchema:
    """Return the ONNX schema of an op."""

    def formal(parameter: Parameter) -> defs.OpSchema.FormalParameter:
        option = defs.OpSchema.FormalParameterOption
        return defs.OpSchema.FormalParameter(
            parameter.name,
            parameter.type,
            f"{parameter.shape}: {parameter.doc}",
            param_option=option.Optional if parameter.optional else option.Single,
        )

    def attribute(item: Attribute) -> defs.OpSchema.Attribute:
        if item.default is None:
            return defs.OpSchema.Attribute(
                item.name, _ATTRIBUTE_TYPES[item.type], item.doc, required=True
            )
        default = onnx.helper.make_attribute(item.name, item.default)
        return defs.OpSchema.Attribute(item.name, default, item.doc)

    return defs.OpSchema(
        spec.name,
        DOMAIN,
        VERSION,
        doc=spec.doc,
        inputs=[formal(p) for p in spec.inputs],
        outputs=[formal(p) for p in spec.outputs],
        type_constraints=[("T", _FLOATS, "floating point type of the graph")],
        attributes=[attribute(a) for a in spec.attributes],
    )


def register_onnx_schemas() -> None:
    """Make the schemas known to ``onnx.checker`` in this process; may be called again."""
    # onnx has a SwiGLU of its own, and its reference evaluator, which onnxscript imports, refuses
    # to load once two domains share a name. Loaded before, it does not mind.
    import onnx.reference  # noqa: F401

    for spec in OPS.values():
        if not defs.has(spec.name, VERSION, DOMAIN):
            defs.register_schema(onnx_schema(spec))
