"""Every numeric tolerance of the model's tests, each with its reason.

What is not here is compared with ``torch.equal``: quantised activations, codes, accumulators,
packed against unpacked layers, and the hidden states of float32 inference. The last is the claim of
``tinylm/precision.py``: sums are carried in float64 and rounded to float32 once. Two orders of
summation then differ by about 1e-15, against a float32 spacing of 1e-7, so one value in 1e8 may
round the other way. The tests compare some 1e5 values from fixed seeds: a failure is a bug.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tolerance:
    rtol: float
    atol: float
    reason: str

    def assert_close(self, actual: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(
            actual.double(), expected.double(), rtol=self.rtol, atol=self.atol
        )


LOGITS = Tolerance(
    rtol=1e-6,
    atol=1e-5,
    reason="equal hidden states; the head is one float32 product over 64 values of about 1, whose "
    "order of summation depends on the batch's shape: 64 roundings of 6e-8 at magnitude 1",
)
LOG_LIKELIHOOD = Tolerance(
    rtol=1e-5,
    atol=1e-4,
    reason="sums of up to 150 log probabilities, each off by what LOGITS allows and by the "
    "roundings of a float32 log-softmax; and the harness keeps them in float32",
)
ATTENTION_FLOAT64 = Tolerance(
    rtol=1e-11,
    atol=1e-12,
    reason="the same sums in another order in float64, epsilon 2e-16, over up to 100 terms",
)
ATTENTION_FLOAT32 = Tolerance(
    rtol=1e-4,
    atol=1e-5,
    reason="the same sums in another order in float32, epsilon 6e-8; scores of magnitude 10 pass "
    "through exp, which turns their absolute error into a relative one",
)
ATTENTION_BFLOAT16 = Tolerance(
    rtol=2e-2,
    atol=2e-2,
    reason="outputs near 1 rounded to bfloat16, spacing 2**-8, and weights rounded before the sum",
)
BIT_LINEAR_GRADIENT = Tolerance(
    rtol=1e-5,
    atol=1e-5,
    reason="float32 products over up to 96 terms of about 1, against float64: 96 * 6e-8",
)
BIT_LINEAR_AUTOCAST = Tolerance(
    rtol=2**-7,
    atol=2**-7,
    reason="bfloat16 keeps 8 bits: the int8 values and codes are exact in it, the sum is rounded "
    "by 2**-9 of itself, and so is the output",
)
TRITON_INTERPRETER_BFLOAT16 = Tolerance(
    rtol=2**-7,
    atol=0.0,
    reason="Triton's interpreter cuts float32 off where a GPU rounds it to bfloat16: one spacing, "
    "2**-7 at most; in float32 the same passes are compared bit for bit",
)
TRITON_INTERPRETER_LAYER = Tolerance(
    rtol=2**-6,
    atol=2**-3,
    reason="a layer of which all bfloat16 values are cut off: sums of 35 terms of up to 3, each "
    "off by up to 2**-7 of itself with mixed signs: 3 * 2**-7 * sqrt(35)",
)
LOSS_GRADIENT_FLOAT32 = Tolerance(
    rtol=1e-4,
    atol=1e-6,
    reason="float32 sums over up to 70 tokens and 500 logits in another order: 500 * 6e-8",
)
LOSS_GRADIENT_FLOAT64 = Tolerance(
    rtol=1e-11, atol=1e-13, reason="the same sums in another order in float64, epsilon 2e-16"
)
LOSS_BFLOAT16 = Tolerance(
    rtol=2**-6,
    atol=2**-8,
    reason="autograd and the chunks round the same products and gradients to bfloat16, at other "
    "places: two roundings of 2**-9 each in values of up to 1, summed with mixed signs",
)
COMPILED_LOSS = Tolerance(
    rtol=0.0,
    atol=1e-2,
    reason="the compiler reorders float32 sums, which moves a quantised activation now and then by "
    "a step of 1/127, a token's logits by 0.1 and the mean over 128 tokens by 1e-3 (2e-3 seen)",
)
COMPILED_DENSE_LOSS = Tolerance(
    rtol=1e-5,
    atol=0.0,
    reason="without quantisers the reordered float32 sums stay what they are: 6e-8 a sum, over 8 "
    "updates whose steps Adam makes as long for small gradients as for large ones",
)
HUGGING_FACE_FLOAT = Tolerance(
    rtol=1e-5,
    atol=1e-5,
    reason="Hugging Face's online form sums de-quantised float32 values of about 1, ours exact "
    "integers: up to 96 roundings of 6e-8",
)
HUGGING_FACE_INTEGER = Tolerance(
    rtol=1e-6,
    atol=0.0,
    reason="the same integers; the scales are multiplied in another order and 1/mean is rounded: "
    "four float32 roundings of 6e-8",
)
RMS = Tolerance(
    rtol=1e-5,
    atol=0.0,
    reason="a root mean square of float32 values, each rounded three times by the norm",
)
SMALLEST_GRADIENT = 1e-12
"""What counts as a gradient: below lies float32 noise of a path that leads nowhere."""

MODE_GRADIENT_COSINE = 0.99
"""Training and inference differ by float32 sums, which move a few quantised activations by a step
of 1/127 of the row's maximum; each such step turns the gradient a little."""

TRAINING_LOGITS = Tolerance(
    rtol=0.0,
    atol=0.25,
    reason="one such step moves logits of standard deviation 3.3 by 0.07 (seen); most batches have "
    "none and differ by 5e-6",
)
AUTOCAST_LOGIT_COSINE = 0.99
"""bfloat16 keeps 8 bits of every activation, so most quantised ones move by a step."""

SAMPLE_FREQUENCY = Tolerance(
    rtol=0.0,
    atol=0.02,
    reason="20,000 draws from fixed seeds: one standard deviation of a frequency is at most "
    "sqrt(0.25 / 20000) = 0.0035, the bound is above five",
)

ONE_ROUNDING = Tolerance(
    rtol=2**-22,
    atol=1e-12,
    reason="the same op in PyTorch and by its ONNX body: sums in float64 in another order, rounded "
    "to float32 once, so one step of 2**-23 apart at most; a square doubles that. Where terms of "
    "magnitude 100 cancel, 1e-14 of them is left",
)

HALF_PRODUCT = Tolerance(
    rtol=2**-10,
    atol=2**-20,
    reason="ONNX Runtime multiplies float16 in float32 and leaves out the rounding before it: "
    "one step of float16, or half of its smallest number, 2**-25, times a factor of up to 32",
)


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    """Compare bit for bit, with a readable message."""
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.0)


DENSE_LOGITS = Tolerance(
    rtol=1e-4,
    atol=1e-3,
    reason="nothing is quantised, so float32 roundings of 6e-8 stay that small; PyTorch sums in "
    "float64 and expands keys, ONNX Runtime sums up to 176 terms in float32 in the latent space, "
    "over logits of magnitude 10",
)

SAME_SUMS = Tolerance(
    rtol=2e-6,
    atol=0.0,
    reason="a loss of several processes against one: the same float32 sums over rows and weights "
    "in another order, a few roundings of 6e-8 each; 7e-7 seen over eight steps of 8 dense runs",
)
SAME_NORMS = Tolerance(
    rtol=2e-5,
    atol=0.0,
    reason="as SAME_SUMS, for the norm of gradients, whose own sums cancel in part",
)
SHORT_RUN = Tolerance(
    rtol=1e-2,
    atol=0.0,
    reason="after some steps such a rounding moves a weight across a border between two codes or "
    "an activation across one between two int8 steps, and each such step moves others: most of 12 "
    "runs stayed within 1e-6 over eight steps, some reached 4e-4",
)
SHORT_RUN_NORMS = Tolerance(
    rtol=5e-2,
    atol=0.0,
    reason="as SHORT_RUN, for the gradient's norm: 2e-3 seen",
)
SHORT_RUN_WEIGHTS = Tolerance(
    rtol=0.0,
    atol=1e-3,
    reason="dense weights after eight steps: AdamW moves one by about the learning rate, 3e-3, a "
    "step whatever the gradient's size, so where a gradient is nearly nothing its rounding "
    "decides; 1e-4 seen, and most weights agree to 1e-8",
)
BFLOAT16_RUN = Tolerance(
    rtol=5e-3,
    atol=0.0,
    reason="as SHORT_RUN, where sums are rounded to 8 bits: gradients of two processes' rows are "
    "rounded before they are added, by 2**-9 of each",
)
FUSED_FEED_FORWARD = Tolerance(
    rtol=0.0,
    atol=2e-2,
    reason="distance from float32 over the norm, bfloat16 keeps 8 bits: 1.4e-2 seen where a "
    "rounding moves int8 codes, and as much for the same layer of PyTorch's operators",
)
