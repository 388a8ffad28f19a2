"""How far two sets of logits are from each other."""

from __future__ import annotations

import torch
from torch import Tensor

from tinylm_export.parity_report import LogitAgreement, LogitLimits

_POSITIONS_AT_ONCE = 64


class LogitMeter:
    """Adds up how a phase's logits agree with PyTorch's, on the GPU where there is one.

    Args:
        phase: ``"prefill"``, ``"chunked prefill"`` or ``"decode"``.
        limits: What the figures are judged by; default float32's.
    """

    def __init__(self, phase: str, limits: LogitLimits | None = None) -> None:
        self.phase = phase
        self.limits = limits or LogitLimits()
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self.count = 0
        self.same_top1: list[Tensor] = []  # bool [M] of each addition
        self.max_abs = self.sum_abs = self.sum_kl = self.max_kl = 0.0

    def add(self, reference: Tensor, found: Tensor) -> None:
        """Compare logits [M, V], a few positions at a time: float64 takes eight bytes a logit."""
        for part in zip(
            reference.split(_POSITIONS_AT_ONCE), found.split(_POSITIONS_AT_ONCE), strict=True
        ):
            self._add(*part)

    def _add(self, reference: Tensor, found: Tensor) -> None:
        reference, found = reference.to(self._device), found.to(self._device)
        difference = (found.double() - reference.double()).abs()
        log_p, log_q = (x.double().log_softmax(dim=-1) for x in (reference, found))
        kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
        self.count += len(reference)
        self.same_top1.append((reference.argmax(dim=-1) == found.argmax(dim=-1)).cpu())
        # max() of Python would lose a NaN that comes second.
        self.max_abs = float(torch.tensor(self.max_abs).maximum(difference.max().cpu()))
        self.max_kl = float(torch.tensor(self.max_kl).maximum(kl.max().cpu()))
        self.sum_abs += float(difference.mean(dim=-1).sum())
        self.sum_kl += float(kl.sum())

    def result(self) -> LogitAgreement:
        """Return the figures."""
        return LogitAgreement(
            phase=self.phase,
            num_tokens=self.count,
            max_abs=self.max_abs,
            mean_abs=self.sum_abs / self.count,
            mean_kl=max(self.sum_kl / self.count, 0.0),
            max_kl=self.max_kl,
            top1_agreement=int(torch.cat(self.same_top1).sum()) / self.count,
            limits=self.limits,
        )


def top1_error(meter: LogitMeter, other: LogitMeter) -> float:
    """Return the standard error of the difference between two top-1 agreements.

    Only positions where one agrees and the other does not tell them apart: ``sqrt(n01 + n10) / n``
    (McNemar, 1947).

    Args:
        meter: Has compared some positions.
        other: Has compared the same ones in the same order.
    """
    pairs = zip(meter.same_top1, other.same_top1, strict=True)
    return sum(int((a != b).sum()) for a, b in pairs) ** 0.5 / meter.count
