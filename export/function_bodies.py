"""ONNX function bodies of the custom ops, in standard ops.

A stock ONNX Runtime inlines them, so an exported file runs without any extra library. They follow
:mod:`tinylm.quantization` and :mod:`tinylm.latent_attention` step by step, with the same float64
parts (:mod:`tinylm.precision`), and differ from them only in the order of floating point sums.
"""

from __future__ import annotations

import onnx
import onnx.parser

from tinylm.errors import ExportError
from tinylm_export.body_parts import NORM, QUANTIZE_FP8, QUANTIZE_INT8, UNPACK
from tinylm_export.ops import DOMAIN, OPS, OPSET, Attribute

_LAST_AXIS = "    last_axis = Constant <value_ints = [-1]> ()\n"

_BIT_LINEAR_INT8 = """
    codes_t = Transpose <perm = [1, 0]> (codes)
    accumulator = MatMulInteger (quantized, codes_t)
    accumulator_float = Cast <to = 1> (accumulator)
"""

# The two sums are exact in float32, see tinylm.quantization.accumulate.
_BIT_LINEAR_FP8 = """
    codes_int8_t = Transpose <perm = [1, 0]> (codes)
    codes_t = Cast <to = 1> (codes_int8_t)
    whole = Round (quantized)
    rest = Sub (quantized, whole)
    whole_sum = MatMul (whole, codes_t)
    rest_sum = MatMul (rest, codes_t)
    accumulator_float = Add (whole_sum, rest_sum)
"""

_INT8_LINEAR = """
    weight_t = Transpose <perm = [1, 0]> (weight)
    accumulator = MatMulInteger (quantized, weight_t)
    accumulator_float = Cast <to = 1> (accumulator)
"""

_LINEAR_END = """
    scaled = Mul (accumulator_float, weight_scale)
    dequantized = Div (scaled, s)
    y = CastLike (dequantized, x)
"""

# Not through Sigmoid: ONNX Runtime takes it as 1 - 1 / (1 + exp(x)) for negative x, which cancels.
_SWIGLU = """
    wide = Cast <to = 11> (gate)
    negative = Neg (wide)
    exponential = Exp (negative)
    one_wide = Constant <value = double {1}> ()
    denominator = Add (exponential, one_wide)
    silu_wide = Div (wide, denominator)
    silu = CastLike (silu_wide, gate)
    y = Mul (silu, up)
"""

_MLA_SIZES = """
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    two = Constant <value = int64 {2}> ()
    last_axis = Constant <value_ints = [-1]> ()
    axis_0 = Constant <value_ints = [0]> ()
    axis_1 = Constant <value_ints = [1]> ()
    axis_2 = Constant <value_ints = [2]> ()
    num_heads = Constant <value_int: int = @num_heads> ()
    nope_dim = Constant <value_int: int = @nope_dim> ()
    rope_dim = Constant <value_int: int = @rope_dim> ()
    value_dim = Constant <value_int: int = @value_dim> ()
    rows_and_steps = Shape <start = 0, end = 2> (q)
    num_rows = Gather (rows_and_steps, zero)
    num_steps = Gather (rows_and_steps, one)
    rank_1 = Shape (kv_norm_weight)
    heads_1 = Unsqueeze (num_heads, axis_0)
    nope_1 = Unsqueeze (nope_dim, axis_0)
    rope_1 = Unsqueeze (rope_dim, axis_0)
    value_1 = Unsqueeze (value_dim, axis_0)
    past = Cast <to = 7> (past_lens)
    new = Cast <to = 7> (seq_lens)
    past_column = Unsqueeze (past, axis_1)
    new_column = Unsqueeze (new, axis_1)
    steps_range = Range (zero, num_steps, one)
    positions = Add (past_column, steps_range)
"""

# cos(x) = 1 - 2 sin(x/2)^2, because older ONNX Runtimes have no Cos for doubles.
_MLA_ROTATE = """
    theta_float = Constant <value_float: float = @theta> ()
    theta_wide = Cast <to = 11> (theta_float)
    pair_range = Range (zero, rope_dim, two)
    pair_wide = Cast <to = 11> (pair_range)
    pair_negative = Neg (pair_wide)
    rope_wide = Cast <to = 11> (rope_dim)
    exponents = Div (pair_negative, rope_wide)
    frequencies_wide = Pow (theta_wide, exponents)
    frequencies = Cast <to = 1> (frequencies_wide)
    positions_float = Cast <to = 1> (positions)
    positions_3d = Unsqueeze (positions_float, last_axis)
    angles_float = Mul (positions_3d, frequencies)
    angles = Cast <to = 11> (angles_float)
    half = Constant <value = double {0.5}> ()
    half_angles = Mul (angles, half)
    half_sin = Sin (half_angles)
    half_sin_square = Mul (half_sin, half_sin)
    half_sin_square_twice = Add (half_sin_square, half_sin_square)
    one_wide = Constant <value = double {1}> ()
    cos_wide = Sub (one_wide, half_sin_square_twice)
    sin_wide = Sin (angles)
    cos_float = Cast <to = 1> (cos_wide)
    sin_float = Cast <to = 1> (sin_wide)
    cos = Cast <to = 11> (cos_float)
    sin = Cast <to = 11> (sin_float)

    heads_shape = Concat <axis = 0> (rows_and_steps, heads_1, last_axis)
    q_heads = Reshape (q, heads_shape)
    qk_sizes = Concat <axis = 0> (nope_1, rope_1)
    q_nope_raw, q_rope_raw = Split <axis = -1> (q_heads, qk_sizes)
    q_rope_raw_wide = Cast <to = 11> (q_rope_raw)
    q_first, q_second = Split <axis = -1, num_outputs = 2> (q_rope_raw_wide)
    cos_heads = Unsqueeze (cos, axis_2)
    sin_heads = Unsqueeze (sin, axis_2)
    q_first_cos = Mul (q_first, cos_heads)
    q_second_sin = Mul (q_second, sin_heads)
    q_second_cos = Mul (q_second, cos_heads)
    q_first_sin = Mul (q_first, sin_heads)
    q_rotated_first = Sub (q_first_cos, q_second_sin)
    q_rotated_second = Add (q_second_cos, q_first_sin)
    q_rotated = Concat <axis = -1> (q_rotated_first, q_rotated_second)
    q_rope_rounded = CastLike (q_rotated, q)
    q_rope_bshp = Cast <to = 11> (q_rope_rounded)
    q_nope_bshd = Cast <to = 11> (q_nope_raw)
    q_nope = Transpose <perm = [0, 2, 1, 3]> (q_nope_bshd)
    q_rope = Transpose <perm = [0, 2, 1, 3]> (q_rope_bshp)

    kv_sizes = Concat <axis = 0> (rank_1, rope_1)
    latent_raw, k_raw = Split <axis = -1> (kv, kv_sizes)
    k_raw_wide = Cast <to = 11> (k_raw)
    k_first, k_second = Split <axis = -1, num_outputs = 2> (k_raw_wide)
    k_first_cos = Mul (k_first, cos)
    k_second_sin = Mul (k_second, sin)
    k_second_cos = Mul (k_second, cos)
    k_first_sin = Mul (k_first, sin)
    k_rotated_first = Sub (k_first_cos, k_second_sin)
    k_rotated_second = Add (k_second_cos, k_first_sin)
    k_rotated = Concat <axis = -1> (k_rotated_first, k_rotated_second)
    new_rope = CastLike (k_rotated, past_rope)
"""

# A padded step writes the row's last valid token again, so equal values meet in one slot. A row
# without new tokens writes back what its slot holds.
_MLA_APPEND = """
    new_latent = Cast <to = 1> (quantized)
    new_scale = Squeeze (s, last_axis)
    newest = Sub (new_column, one)
    newest_or_0 = Max (newest, zero)
    source_steps = Min (steps_range, newest_or_0)
    capacity_1 = Shape <start = 1, end = 2> (past_latent)
    last_slot = Sub (capacity_1, one)
    target_slots = Add (past_column, source_steps)
    slots = Min (target_slots, last_slot)
    row_range = Range (zero, num_rows, one)
    row_column = Unsqueeze (row_range, axis_1)
    rows = Expand (row_column, rows_and_steps)
    rows_3d = Unsqueeze (rows, last_axis)
    slots_3d = Unsqueeze (slots, last_axis)
    source_3d = Unsqueeze (source_steps, last_axis)
    target_index = Concat <axis = -1> (rows_3d, slots_3d)
    source_index = Concat <axis = -1> (rows_3d, source_3d)
    row_grows = Greater (new_column, zero)
    row_grows_3d = Unsqueeze (row_grows, last_axis)

    source_latent = GatherND (new_latent, source_index)
    held_latent_int8 = GatherND (past_latent, target_index)
    held_latent = Cast <to = 1> (held_latent_int8)
    write_latent_float = Where (row_grows_3d, source_latent, held_latent)
    write_latent = Cast <to = 3> (write_latent_float)
    present_latent = ScatterND (past_latent, target_index, write_latent)
    source_scale = GatherND (new_scale, source_index)
    held_scale = GatherND (past_scale, target_index)
    write_scale = Where (row_grows, source_scale, held_scale)
    present_scale = ScatterND (past_scale, target_index, write_scale)
    source_rope = GatherND (new_rope, source_index)
    held_rope = GatherND (past_rope, target_index)
    write_rope = Where (row_grows_3d, source_rope, held_rope)
    present_rope = ScatterND (past_rope, target_index, write_rope)
"""

_MLA_READ = """
    filled = Add (past, new)
    longest = ReduceMax <keepdims = 1> (filled)
    latent_used = Slice (present_latent, axis_0, longest, axis_1)
    scale_used = Slice (present_scale, axis_0, longest, axis_1)
    rope_used = Slice (present_rope, axis_0, longest, axis_1)
    longest_0d = Squeeze (longest, axis_0)
    key_range = Range (zero, longest_0d, one)
    filled_column = Unsqueeze (filled, axis_1)
    key_filled = Less (key_range, filled_column)
    one_float = Constant <value = float {1}> ()
    scale_safe = Where (key_filled, scale_used, one_float)
    scale_wide = Cast <to = 11> (scale_safe)
    rope_wide_keys = Cast <to = 11> (rope_used)
    k_rope = Unsqueeze (rope_wide_keys, axis_1)
    k_rope_t = Transpose <perm = [0, 1, 3, 2]> (k_rope)
    positions_column = Unsqueeze (positions, last_axis)
    visible_3d = LessOrEqual (key_range, positions_column)
    visible = Unsqueeze (visible_3d, axis_1)
    minus_infinity = Constant <value = double {-inf}> ()
    softmax_scale_float = Constant <value_float: float = @softmax_scale> ()
    softmax_scale = Cast <to = 11> (softmax_scale_float)
    kv_b_scale_wide = Cast <to = 11> (kv_b_scale)
    kv_b_sizes = Concat <axis = 0> (nope_1, value_1)
    codes_t = Transpose <perm = [1, 0]> (codes)
    codes_wide = Cast <to = 11> (codes)
    kv_b_scale_column = Unsqueeze (kv_b_scale_wide, last_axis)
    w_rows = Mul (codes_wide, kv_b_scale_column)
    w_shape = Concat <axis = 0> (heads_1, last_axis, rank_1)
    w_heads = Reshape (w_rows, w_shape)
    w_uk, w_uv = Split <axis = 1> (w_heads, kv_b_sizes)
    w_uv_t = Transpose <perm = [0, 2, 1]> (w_uv)
    scores_rope = MatMul (q_rope, k_rope_t)
    is_step = Equal (num_steps, one)
"""

_MLA_ABSORBED = """
        latent_wide = Cast <to = 11> (latent_used)
        latent_heads = Unsqueeze (latent_wide, axis_1)
        latent_heads_t = Transpose <perm = [0, 1, 3, 2]> (latent_heads)
        scale_2 = Unsqueeze (scale_wide, axis_1)
        scale_keys = Unsqueeze (scale_2, axis_1)
        q_latent = MatMul (q_nope, w_uk)
        scores_latent_steps = MatMul (q_latent, latent_heads_t)
        scores_latent = Div (scores_latent_steps, scale_keys)
        scores_sum_a = Add (scores_latent, scores_rope)
        scores_scaled_a = Mul (scores_sum_a, softmax_scale)
        scores_a = Where (visible, scores_scaled_a, minus_infinity)
        weights_a = Softmax <axis = -1> (scores_a)
        weights_scaled = Div (weights_a, scale_keys)
        y_latent = MatMul (weights_scaled, latent_heads)
        y_absorbed = MatMul (y_latent, w_uv_t)
"""

_MLA_EXPANDED = """
        scale_column = Unsqueeze (scale_wide, last_axis)
        kv_b_accumulator = MatMulInteger (latent_used, codes_t)
        kv_b_wide = Cast <to = 11> (kv_b_accumulator)
        kv_b_scaled = Mul (kv_b_wide, kv_b_scale_wide)
        kv_b_values = Div (kv_b_scaled, scale_column)
        num_rows_1 = Unsqueeze (num_rows, axis_0)
        head_width = Add (nope_1, value_1)
        kv_b_shape = Concat <axis = 0> (num_rows_1, longest, heads_1, head_width)
        kv_b_heads = Reshape (kv_b_values, kv_b_shape)
        k_nope_heads, v_heads = Split <axis = -1> (kv_b_heads, kv_b_sizes)
        k_nope_t = Transpose <perm = [0, 2, 3, 1]> (k_nope_heads)
        v = Transpose <perm = [0, 2, 1, 3]> (v_heads)
        scores_nope = MatMul (q_nope, k_nope_t)
        scores_sum_e = Add (scores_nope, scores_rope)
        scores_scaled_e = Mul (scores_sum_e, softmax_scale)
        scores_e = Where (visible, scores_scaled_e, minus_infinity)
        weights_e = Softmax <axis = -1> (scores_e)
        y_expanded = MatMul (weights_e, v)
"""

_MLA_END = """
    y_bshd = Transpose <perm = [0, 2, 1, 3]> (y_heads)
    valid_2d = Less (steps_range, new_column)
    valid_3d = Unsqueeze (valid_2d, last_axis)
    valid = Unsqueeze (valid_3d, last_axis)
    zero_wide = Constant <value = double {0}> ()
    y_valid = Where (valid, y_bshd, zero_wide)
    flat_shape = Concat <axis = 0> (rows_and_steps, last_axis)
    y_flat = Reshape (y_valid, flat_shape)
    y = CastLike (y_flat, q)
"""


def _flash_mla() -> str:
    head = _MLA_SIZES + _MLA_ROTATE
    norm = NORM.format(x="latent_raw", weight="kv_norm_weight")
    quantize = QUANTIZE_INT8.format(x="latent_raw_normed")
    unpack = UNPACK.format(weight="kv_b")
    branches = (
        "    y_heads = If (is_step) <\n"
        f"      then_branch = absorbed () => (double[B, H, S, V] y_absorbed) {{{_MLA_ABSORBED}}},\n"
        f"      else_branch = expanded () => (double[B, H, S, V] y_expanded) {{{_MLA_EXPANDED}}}\n"
        "    >\n"
    )
    return head + norm + quantize + _MLA_APPEND + unpack + _MLA_READ + branches + _MLA_END


def _bit_linear(activation: str, *, norm: bool) -> str:
    middle = {
        "int8": (QUANTIZE_INT8, _BIT_LINEAR_INT8),
        "fp8_e4m3": (QUANTIZE_FP8, _BIT_LINEAR_FP8),
    }
    if activation not in middle:
        raise ExportError(f"activation must be one of {', '.join(middle)}, found {activation!r}.")
    quantize, product = middle[activation]
    start, source = _source(norm=norm)
    unpack = UNPACK.format(weight="weight")
    return _LAST_AXIS + start + quantize.format(x=source) + unpack + product + _LINEAR_END


def _int8_linear(*, norm: bool) -> str:
    start, source = _source(norm=norm)
    quantize = QUANTIZE_INT8.format(x=source)
    return _LAST_AXIS + start + quantize + _INT8_LINEAR + _LINEAR_END


def _source(*, norm: bool) -> tuple[str, str]:
    """Return the steps from x to what is quantised, and its name."""
    if norm:
        return NORM.format(x="x", weight="norm_weight"), "x_normed"
    return "    x_float = Cast <to = 1> (x)\n", "x_float"


def _attribute(attribute: Attribute) -> str:
    """Declare an attribute, with its default, which a node may then leave out."""
    default = attribute.default
    if default is None:
        return attribute.name
    value = f'"{default}"' if isinstance(default, str) else f"{default:f}"
    return f"{attribute.name}: {attribute.type} = {value}"


def _function(op: str, body: str) -> onnx.FunctionProto:
    spec = OPS[op]
    attributes = ", ".join(map(_attribute, spec.attributes))
    text = (
        f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>\n'
        f"{op} {f'<{attributes}>' if attributes else ''} "
        f"({', '.join(p.name for p in spec.inputs)}) => "
        f"({', '.join(p.name for p in spec.outputs)})\n{{{body}}}\n"
    )
    function = onnx.parser.parse_function(text)
    function.doc_string = spec.doc
    return function


def function_body(op: str, activation: str = "int8", *, norm: bool = True) -> onnx.FunctionProto:
    """Return the function of one op.

    A function body can't branch on a string or on whether an input is there, so the bodies of
    BitLinear and Int8Linear are made for the variant that the model uses.

    Args:
        op: Name of an op of the contract.
        activation: ``"int8"`` or ``"fp8_e4m3"``; read by BitLinear only.
        norm: Whether the op gets ``norm_weight``, where it may.

    Raises:
        ExportError: Unknown activation format.
    """
    bodies = {
        "BitLinear": lambda: _bit_linear(activation, norm=norm),
        "FlashMLA": _flash_mla,
        "SwiGLU": lambda: _SWIGLU,
        "Int8Linear": lambda: _int8_linear(norm=norm),
    }
    return _function(op, bodies[op]())


def function_bodies(activation: str, *, norm: bool = True) -> list[onnx.FunctionProto]:
    """Return the functions of all ops; see :func:`function_body`."""
    return [function_body(op, activation, norm=norm) for op in OPS]
