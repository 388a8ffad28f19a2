"""What parity found: plain records that JSON can hold, and their verdict."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from tinylm_export.tolerances import TOLERANCES, limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitLimits:
    """What the logits of one phase must keep to.

    Attributes:
        max_abs: Largest |difference| of a logit that passes; None for any.
        mean_kl: Largest mean KL that passes.
        top1_agreement: Smallest share that passes.
    """

    max_abs: float | None = dataclasses.field(default_factory=lambda: limit("max_abs_logit"))
    mean_kl: float = dataclasses.field(default_factory=lambda: limit("mean_kl"))
    top1_agreement: float = dataclasses.field(default_factory=lambda: limit("top1_agreement"))

    @classmethod
    def of_engine(cls, own: LogitAgreement | None, top1_error: float = 0.0) -> LogitLimits:
        """Return an engine's limits.

        Args:
            own: How PyTorch's own run in the engine's type agrees with PyTorch float32 at the same
                positions; None for a float32 engine.
            top1_error: Standard error of the difference between both top-1 agreements.
        """
        if own is None:
            return cls(max_abs=None)
        return cls(
            max_abs=None,
            mean_kl=limit("half_kl_ratio") * own.mean_kl,
            top1_agreement=own.top1_agreement
            - limit("half_top1_drop")
            - limit("half_top1_errors") * top1_error,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitAgreement:
    """Logits of one phase against PyTorch's.

    Attributes:
        phase: ``"prefill"``, ``"chunked prefill"`` or ``"decode"``.
        num_tokens: Positions compared.
        max_abs: Largest |difference| of a logit.
        mean_abs: Mean |difference| of a logit.
        mean_kl: Mean KL(PyTorch || runtime) of a position, in nats.
        max_kl: Largest of them.
        top1_agreement: Share of positions with the same most probable token.
        limits: What it is judged by.
    """

    phase: str
    num_tokens: int
    max_abs: float
    mean_abs: float
    mean_kl: float
    max_kl: float
    top1_agreement: float
    limits: LogitLimits = dataclasses.field(default_factory=LogitLimits)

    @property
    def passed(self) -> bool:
        """Whether every figure is within its limit; a figure that is not finite never is."""
        limits = self.limits
        return (
            (
                math.isfinite(self.max_abs)
                if limits.max_abs is None
                else self.max_abs <= limits.max_abs
            )
            and self.mean_kl <= limits.mean_kl
            and self.top1_agreement >= limits.top1_agreement
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
        limit: Largest ``relative`` that is no departure.
    """

    node: str
    max_abs: float
    relative: float
    num_different: int
    num_values: int
    limit: float = dataclasses.field(default_factory=lambda: limit("layer_departure"))

    @property
    def departs(self) -> bool:
        """Whether it is out of tolerance; a value that is not finite always is."""
        return not self.relative <= self.limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstDifference:
    """Where one greedy text leaves another.

    Attributes:
        prompt: Index of the prompt.
        position: Index of the new token.
        expected: The other runtime's token; None where its text has ended.
        found: The engine's token; None where its text has ended.
        gap: Lead of the other runtime's best logit over its second best one there; None where it
            is not known.
    """

    prompt: int
    position: int
    expected: int | None
    found: int | None
    gap: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationAgreement:
    """Greedy texts of an engine against those of another runtime.

    Attributes:
        other: The other runtime.
        num_prompts: Texts compared.
        num_tokens: New tokens of each.
        differences: One entry for each text that is not the same.
        largest_gap: Largest gap that passes; None where no difference fails.
    """

    other: str
    num_prompts: int
    num_tokens: int
    differences: list[FirstDifference]
    largest_gap: float | None

    @property
    def passed(self) -> bool:
        """Whether the texts are the same, but for ties."""
        largest = self.largest_gap
        return largest is None or all(
            d.gap is not None and d.gap < largest for d in self.differences
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuntimeReport:
    """One runtime against PyTorch.

    Attributes:
        runtime: Its name.
        version: Its version.
        kernels: What ran the custom ops.
        logits: One entry a phase.
        bit_linears: One entry a BitLinear, in forward order; none for an engine.
        layers: One entry a node, in execution order; none for an engine without marked nodes.
        own: PyTorch's own run in an engine's bf16 or fp16 at the positions of each phase, which
            sets the engine's limits; none for float32.
        generation: How greedy texts agree, if that was asked for.
    """

    runtime: str
    version: str
    kernels: str
    logits: list[LogitAgreement]
    bit_linears: list[BitLinearAgreement]
    layers: list[LayerDifference]
    own: list[LogitAgreement] = dataclasses.field(default_factory=list)
    generation: list[GenerationAgreement] = dataclasses.field(default_factory=list)

    @property
    def first_departure(self) -> str | None:
        """The first node whose output departs from PyTorch's, or None."""
        for layer in self.layers:
            if layer.departs:
                return layer.node
        return None

    @property
    def passed(self) -> bool:
        """Whether logits, every BitLinear and the generated texts agree."""
        return (
            all(agreement.passed for agreement in self.logits)
            and all(layer.passed for layer in self.bit_linears)
            and all(texts.passed for texts in self.generation)
        )


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
            for item, texts in zip(entry["generation"], runtime.generation, strict=True):
                item["passed"] = texts.passed
        values["tolerances"] = [dataclasses.asdict(t) for t in TOLERANCES.values()]
        return values
