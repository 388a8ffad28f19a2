"""What parity found: plain records that JSON can hold, and their verdict."""

from __future__ import annotations

import dataclasses
from typing import Any

from tinylm_export.tolerances import TOLERANCES, limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitAgreement:
    """Logits of one phase against PyTorch's.

    Attributes:
        phase: ``"prefill"`` or ``"decode"``.
        num_tokens: Positions compared.
        max_abs: Largest |difference| of a logit.
        mean_abs: Mean |difference| of a logit.
        mean_kl: Mean KL(PyTorch || runtime) of a position, in nats.
        max_kl: Largest of them.
        top1_agreement: Share of positions with the same most probable token.
    """

    phase: str
    num_tokens: int
    max_abs: float
    mean_abs: float
    mean_kl: float
    max_kl: float
    top1_agreement: float

    @property
    def passed(self) -> bool:
        """Whether every figure is within its limit; a figure that is not finite never is."""
        return (
            self.max_abs <= limit("max_abs_logit")
            and self.mean_kl <= limit("mean_kl")
            and self.top1_agreement >= limit("top1_agreement")
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitLinearAgreement:
    """One BitLinear, fed the very input that PyTorch's layer had.

    Attributes:
        name: Module path.
        num_activations: Quantised activations compared.
        flips: Activations that differ.
        max_steps: Largest difference, in quantiser steps.
        num_accumulators: Sums compared.
        mismatches: Sums that differ although all their activations are equal, or that are not the
            exact sum of the runtime's own activations.
        examples: The first flips: token, channel, both values.
    """

    name: str
    num_activations: int
    flips: int
    max_steps: int
    num_accumulators: int
    mismatches: int
    examples: list[str]

    @property
    def passed(self) -> bool:
        """Whether flips are rare and small, and every sum is exact."""
        return (
            self.flips <= limit("activation_flip_rate") * self.num_activations
            and self.max_steps <= limit("activation_max_steps")
            and self.mismatches <= limit("accumulator_mismatches")
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerDifference:
    """One node's output in the whole graph against PyTorch's, in execution order.

    Attributes:
        node: Name of the node.
        max_abs: Largest |difference|.
        relative: ``max_abs`` over the largest |value|.
        num_different: Values that are not equal bit for bit.
        num_values: Values compared.
    """

    node: str
    max_abs: float
    relative: float
    num_different: int
    num_values: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuntimeReport:
    """One runtime against PyTorch.

    Attributes:
        runtime: Its name.
        version: Its version.
        kernels: What ran the custom ops.
        logits: One entry a phase.
        bit_linears: One entry a BitLinear, in forward order.
        layers: One entry a node, in execution order.
    """

    runtime: str
    version: str
    kernels: str
    logits: list[LogitAgreement]
    bit_linears: list[BitLinearAgreement]
    layers: list[LayerDifference]

    @property
    def first_departure(self) -> str | None:
        """The first node whose output departs from PyTorch's, or None."""
        for layer in self.layers:
            if not layer.relative <= limit("layer_departure"):
                return layer.node
        return None

    @property
    def passed(self) -> bool:
        """Whether logits and every BitLinear agree."""
        return all(a.passed for a in self.logits) and all(b.passed for b in self.bit_linears)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadEffect:
    """What an int8 head costs in quality: PyTorch with either head on parity's tokens.

    Attributes:
        num_tokens: Predicted tokens.
        float32_loss: Mean negative log likelihood with the float32 head, in nats.
        int8_loss: The same with the int8 head.
        float32_perplexity: ``exp(float32_loss)``.
        int8_perplexity: ``exp(int8_loss)``.
    """

    num_tokens: int
    float32_loss: float
    int8_loss: float
    float32_perplexity: float
    int8_perplexity: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParityReport:
    """The whole comparison.

    Attributes:
        model: The model's size and number format.
        data: Where the tokens came from.
        machine: Processor and library versions.
        runtimes: One report a runtime.
        yardstick: PyTorch with ordinary float32 arithmetic against itself; informative.
        head: What the int8 head costs; None where the head is float32.
    """

    model: dict[str, Any]
    data: dict[str, Any]
    machine: dict[str, Any]
    runtimes: list[RuntimeReport]
    yardstick: LogitAgreement
    head: HeadEffect | None = None

    @property
    def passed(self) -> bool:
        """Whether every runtime agrees."""
        return all(runtime.passed for runtime in self.runtimes)

    def to_dict(self) -> dict[str, Any]:
        """Return the object that ``--json`` writes, with verdicts and tolerances."""
        values = dataclasses.asdict(self)
        values["passed"] = self.passed
        for entry, runtime in zip(values["runtimes"], self.runtimes, strict=True):
            entry["passed"] = runtime.passed
            entry["first_departure"] = runtime.first_departure
            for item, agreement in zip(entry["logits"], runtime.logits, strict=True):
                item["passed"] = agreement.passed
            for item, layer in zip(entry["bit_linears"], runtime.bit_linears, strict=True):
                item["passed"] = layer.passed
        values["tolerances"] = [dataclasses.asdict(t) for t in TOLERANCES.values()]
        return values
