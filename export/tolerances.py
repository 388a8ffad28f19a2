"""Every limit that parity is judged by, with its reason."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """One limit.

    Attributes:
        name: What is limited.
        limit: Largest value that passes (smallest, for ``top1_agreement``).
        reason: Why this value.
    """

    name: str
    limit: float
    reason: str


_TABLE = (
    Tolerance(
        "max_abs_logit",
        1e-2,
        "A quantised activation that rounds the other way moves a logit by about 1e-2; agreement "
        "below that means that no such flip reached the logits. Without flips 1e-5 is seen, from "
        "the order of summation in the float32 head.",
    ),
    Tolerance(
        "mean_kl",
        1e-6,
        "KL divergence grows with the square of a logit difference: 1e-3 on every logit would "
        "give 1e-6.",
    ),
    Tolerance(
        "top1_agreement",
        0.999,
        "Two tokens may tie within float32; one in a thousand covers that.",
    ),
    Tolerance(
        "activation_flip_rate",
        1e-4,
        "A float32 difference of one part in 1e7 before the quantiser crosses the middle between "
        "two of 255 steps about once in 1e5 values. Holds for fp8_e4m3 too: its steps are wider "
        "than a 448th of the largest value wherever that matters.",
    ),
    Tolerance(
        "activation_max_steps",
        1,
        "A difference that small can move a value to the neighbouring step only.",
    ),
    Tolerance(
        "accumulator_mismatches",
        0,
        "The sum of quantised activations times ternary codes is exact: an integer for int8, and "
        "for fp8_e4m3 two float32 sums without rounding, added once (tinylm.quantization). Where "
        "the activations are equal, nothing may differ.",
    ),
    Tolerance(
        "layer_departure",
        1e-5,
        "Relative to the largest value of the layer: 100 float32 roundings. A layer above it is "
        "where to look first.",
    ),
    Tolerance(
        "half_kl_ratio",
        1.25,
        "An engine in bf16 or fp16 rounds as often as PyTorch in that type does, in other places. "
        "Its mean KL may be so many times that of PyTorch's own run; two runs that round at random "
        "differ by a few per cent over thousands of tokens.",
    ),
    Tolerance(
        "half_top1_drop",
        0.002,
        "How far its top-1 agreement may lie below that of PyTorch's own run: four in 2,000 "
        "tokens, whose two best logits lie closer than the type's rounding.",
    ),
    Tolerance(
        "half_top1_errors",
        3.0,
        "And by so many standard errors of that difference more. Both runs round at random: each "
        "takes another token where two logits nearly tie, so that two equally good ones differ by "
        "0.2 points or more in every third sample of 2,000 tokens. More tokens make it smaller.",
    ),
    Tolerance(
        "engine_layer_departure",
        3e-2,
        "Relative to the largest value of the layer, for a float32 engine. Its kernels carry sums "
        "in float32, so that an activation may round the other way; one step is a 127th of a "
        "token's largest activation. A wrong layer is off by its whole size.",
    ),
    Tolerance(
        "half_layer_ratio",
        3.0,
        "Relative to how far the same layer of PyTorch's own bf16 or fp16 run departs: the largest "
        "of many differences varies more than their mean.",
    ),
    Tolerance(
        "generation_gap",
        1e-3,
        "Greedy generation may take another token only where the two best logits lie closer than "
        "this. After that the texts are different ones.",
    ),
)

TOLERANCES: dict[str, Tolerance] = {tolerance.name: tolerance for tolerance in _TABLE}


def limit(name: str) -> float:
    """Return the limit of that name."""
    return TOLERANCES[name].limit
