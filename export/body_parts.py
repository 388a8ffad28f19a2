"""Steps that several function bodies share, with holes for the names they work on."""

from __future__ import annotations

# Types in Cast: 1 float, 2 uint8, 3 int8, 6 int32, 7 int64, 11 double, 17 float8e4m3fn.
NORM = """
    {x}_wide = Cast <to = 11> ({x})
    {x}_square = Mul ({x}_wide, {x}_wide)
    {x}_mean = ReduceMean <keepdims = 1> ({x}_square, last_axis)
    eps_float = Constant <value_float: float = @eps> ()
    eps_wide = Cast <to = 11> (eps_float)
    {x}_mean_eps = Add ({x}_mean, eps_wide)
    {x}_rms = Sqrt ({x}_mean_eps)
    {x}_inverse = Reciprocal ({x}_rms)
    {x}_factor = Cast <to = 1> ({x}_inverse)
    {x}_float = Cast <to = 1> ({x})
    {x}_scaled = Mul ({x}_float, {x}_factor)
    {x}_normed = Mul ({x}_scaled, {weight})
"""

QUANTIZE_INT8 = """
    magnitude = Abs ({x})
    largest = ReduceMax <keepdims = 1> (magnitude, last_axis)
    min_scale = Constant <value = float {{0.00001}}> ()
    absmax = Max (largest, min_scale)
    int8_max = Constant <value = float {{127}}> ()
    int8_min = Constant <value = float {{-128}}> ()
    s = Div (int8_max, absmax)
    steps = Mul ({x}, s)
    rounded = Round (steps)
    clipped = Clip (rounded, int8_min, int8_max)
    quantized = Cast <to = 3> (clipped)
"""

QUANTIZE_FP8 = """
    magnitude = Abs ({x})
    largest = ReduceMax <keepdims = 1> (magnitude, last_axis)
    min_scale = Constant <value = float {{0.00001}}> ()
    absmax = Max (largest, min_scale)
    fp8_max = Constant <value = float {{448}}> ()
    fp8_min = Constant <value = float {{-448}}> ()
    s = Div (fp8_max, absmax)
    steps = Mul ({x}, s)
    clipped = Clip (steps, fp8_min, fp8_max)
    rounded = Cast <to = 17> (clipped)
    quantized = Cast <to = 1> (rounded)
"""

# The four codes of each byte. A table rather than shifts and masks: ONNX Runtime computes the codes
# when it loads the model, and holds every step of that at once.
_CODES_OF_BYTE = ", ".join(str((byte >> s & 3) - 1) for byte in range(256) for s in (0, 2, 4, 6))

UNPACK = f"""
    codes_of_byte = Constant <value = int8[256, 4] {{{{{_CODES_OF_BYTE}}}}}> ()
    rows_by_rest = Constant <value_ints = [0, -1]> ()
    bytes = Cast <to = 6> ({{weight}})
    code_groups = Gather (codes_of_byte, bytes)
    codes = Reshape (code_groups, rows_by_rest)
"""
