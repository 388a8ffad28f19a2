"""Random data for attention on a GPU, and exact answers in float64 for some of the queries."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from tinylm.config import AttentionShape

NUM_HEADS, RANK, NOPE_DIM, ROPE_DIM, VALUE_DIM = 16, 256, 32, 32, 64
HEAD_DIM = NOPE_DIM + ROPE_DIM
KEY_DIM = 64  # of FlashAttention-3's latent form, which has no 32
THETA, EPS, SOFTMAX_SCALE = 10000.0, 1e-5, HEAD_DIM**-0.5
CACHE_BYTES = RANK + 4 + 2 * ROPE_DIM  # a token: int8 latent, its scale, roped key
_NUM_CHECKED = 16  # queries of a row that a prefill is checked on


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One step of attention.

    Attributes:
        batch: B, rows.
        num_heads: H.
        length: S, new tokens of a row.
        past: Tokens of a row that are cached already.
    """

    batch: int
    num_heads: int = NUM_HEADS
    length: int
    past: int = 0

    @property
    def total(self) -> int:
        """Tokens of a row after the step."""
        return self.past + self.length

    @property
    def checked(self) -> list[int]:
        """The new tokens whose answers are checked: first, last and some between."""
        last = self.length - 1
        count = min(_NUM_CHECKED, self.length)
        return sorted({round(i * last / max(1, count - 1)) for i in range(count)})

    @property
    def num_pairs(self) -> int:
        """Pairs of a query and a key, of all rows and heads."""
        pairs = self.length * self.past + self.length * (self.length + 1) // 2
        return self.batch * self.num_heads * pairs


class LatentProblem:
    """A latent cache and new tokens, for ``tinylm::FlashMLA`` in bfloat16.

    Args:
        step: Sizes.
        device: Where it lies.

    Attributes:
        shape: The layer.
        qkv: bfloat16 [B, S, H * (nope + P) + R + P].
        norm_weight: float32 [R].
        codes: int8 [H * (nope + Dv), R].
        weight_scale: float32 [H * (nope + Dv)].
        latent: int8 [B, C, R]; the slots of new tokens are ones.
        scale: float32 [B, C].
        rope: bfloat16 [B, C, P].
    """

    def __init__(self, step: Step, device: str = "cuda") -> None:
        self.step, self.device = step, device
        self.shape = AttentionShape(
            num_heads=step.num_heads,
            nope_dim=NOPE_DIM,
            rope_dim=ROPE_DIM,
            value_dim=VALUE_DIM,
            theta=THETA,
            eps=EPS,
            softmax_scale=SOFTMAX_SCALE,
        )
        generator = torch.Generator(device).manual_seed(step.total)
        options: dict[str, Any] = {"generator": generator, "device": device}
        rows, heads = (step.batch, step.total), step.num_heads
        width = heads * HEAD_DIM + RANK + ROPE_DIM
        self.qkv = torch.randn(step.batch, step.length, width, **options).bfloat16()
        self.norm_weight = torch.rand(RANK, **options) + 0.5
        outputs = heads * (NOPE_DIM + VALUE_DIM)
        self.codes = torch.randint(-1, 2, (outputs, RANK), dtype=torch.int8, **options)
        self.weight_scale = torch.rand(outputs, **options) * 0.05 + 0.05
        self.latent = torch.randint(-127, 128, (*rows, RANK), dtype=torch.int8, **options)
        self.scale = torch.rand(rows, **options) * 30 + 30
        self.rope = torch.randn(*rows, ROPE_DIM, **options).bfloat16()
        for part in (self.latent, self.scale, self.rope):
            part[:, step.past :] = 1

    def answer(self) -> Tensor:
        """Expand every latent to keys and values and attend: float64 [B * checked, H * Dv]."""
        return torch.cat([self._answer_row(b) for b in range(self.step.batch)])

    def pick(self, y: Tensor) -> Tensor:
        """Return what :meth:`answer` gives of an output [B, S, H * Dv]."""
        return y[:, self.step.checked].flatten(0, 1)

    def _answer_row(self, row: int) -> Tensor:
        step = self.step
        latent, scale, rope = (part[row].clone() for part in (self.latent, self.scale, self.rope))
        new = slice(step.past, None)
        latent[new], scale[new], rope[new] = self._new_entries(row)
        weight = self.codes.double() * self.weight_scale.double()[:, None]
        expanded = (latent.double() @ weight.t()) / scale.double()[:, None]
        keys, values = expanded.unflatten(1, (step.num_heads, -1)).split([NOPE_DIM, VALUE_DIM], 2)
        rope_keys = rope.double()[:, None].expand(-1, step.num_heads, -1)
        keys = torch.cat((keys, rope_keys), dim=2)
        q = self.qkv[row, step.checked, : step.num_heads * HEAD_DIM]
        q = q.unflatten(1, (step.num_heads, HEAD_DIM))
        positions = torch.tensor(step.checked, device=self.device) + step.past
        turned = rotate(q[..., NOPE_DIM:], positions)
        q = torch.cat((q[..., :NOPE_DIM].double(), turned), dim=2)
        return attend(q, keys, values, positions).flatten(1)

    def _new_entries(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return latent [S, R], scale [S] and roped key [S, P] of a row's new tokens."""
        kv = self.qkv[row, :, self.step.num_heads * HEAD_DIM :]
        raw = kv[:, :RANK].float()
        mean = raw.double().square().mean(dim=1, keepdim=True)
        normed = raw * (1.0 / (mean + EPS).sqrt()).float() * self.norm_weight
        s = 127.0 / normed.abs().amax(dim=1, keepdim=True).clamp_min(1e-5)
        latent = (normed * s).round().clamp(-128, 127).to(torch.int8)
        positions = torch.arange(self.step.past, self.step.total, device=self.device)
        return latent, s[:, 0], rotate(kv[:, RANK:], positions).bfloat16()


class MultiHeadProblem:
    """Queries, keys and values of ordinary heads of 64, in bfloat16.

    Args:
        step: Sizes.
        device: Where it lies.

    Attributes:
        q: bfloat16 [B, S, H, 64].
        k: bfloat16 [B, past + S, H, 64].
        v: The same.
    """

    def __init__(self, step: Step, device: str = "cuda") -> None:
        self.step, self.device = step, device
        generator = torch.Generator(device).manual_seed(step.total)

        def normal(length: int) -> Tensor:
            shape = (step.batch, length, step.num_heads, HEAD_DIM)
            values = torch.randn(shape, dtype=torch.bfloat16, device=device, generator=generator)
            return values

        self.q, self.k, self.v = normal(step.length), normal(step.total), normal(step.total)

    def answer(self) -> Tensor:
        """Attend in float64: [B * checked, H * 64]."""
        positions = torch.tensor(self.step.checked, device=self.device) + self.step.past
        rows = [
            attend(self.q[b, self.step.checked].double(), k.double(), v.double(), positions)
            for b, (k, v) in enumerate(zip(self.k, self.v, strict=True))
        ]
        return torch.cat(rows).flatten(1)

    def pick(self, y: Tensor) -> Tensor:
        """Return what :meth:`answer` gives of an output [B, S, H, 64]."""
        return y[:, self.step.checked].flatten(0, 1).flatten(1)


class SharedLatentProblem:
    """One new token over a latent in bfloat16 that all heads share, as FlashAttention-3 takes it.

    The query is absorbed already and the answer is not up-projected: both are left out.

    Attributes:
        q: bfloat16 [B, 1, H, 64].
        q_latent: bfloat16 [B, 1, H, 256].
        k: bfloat16 [B, past + 1, 1, 64].
        latent: bfloat16 [B, past + 1, 1, 256], keys and values at once.
    """

    def __init__(self, step: Step, device: str = "cuda") -> None:
        self.step = step
        generator = torch.Generator(device).manual_seed(step.total)

        def normal(length: int, heads: int, width: int) -> Tensor:
            shape = (step.batch, length, heads, width)
            return torch.randn(shape, dtype=torch.bfloat16, device=device, generator=generator)

        self.q, self.q_latent = (normal(1, step.num_heads, w) for w in (KEY_DIM, RANK))
        self.k, self.latent = (normal(step.total, 1, w) for w in (KEY_DIM, RANK))

    @functools.cached_property
    def softmax_scale(self) -> float:
        """Of the scores."""
        return float((KEY_DIM + RANK) ** -0.5)

    def answer(self) -> Tensor:
        """Attend in float64: [B, H * 256]."""
        q = torch.cat((self.q, self.q_latent), dim=3)[:, 0].double()
        rows = []
        for b in range(self.step.batch):
            keys = torch.cat((self.k[b, :, 0], self.latent[b, :, 0]), dim=1).double()
            weights = (q[b] @ keys.t() * self.softmax_scale).softmax(dim=1)
            rows.append(weights @ self.latent[b, :, 0].double())
        return torch.stack(rows).flatten(1)


def attend(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """Attend causally, in float64.

    Args:
        q: [Q, H, D].
        keys: [T, H, D].
        values: [T, H, Dv].
        positions: int64 [Q]; a query sees the keys up to its own position.

    Returns:
        [Q, H, Dv].
    """
    scores = torch.einsum("qhd,thd->hqt", q, keys) * SOFTMAX_SCALE
    hidden = torch.arange(len(keys), device=keys.device) > positions[:, None]
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=2)
    return torch.einsum("hqt,thd->qhd", weights, values)


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotate by halves; angles are float32, the rest float64.

    Args:
        x: [S, ..., P].
        positions: int64 [S].

    Returns:
        float64, of x's shape.
    """
    half = x.shape[-1] // 2
    exponents = torch.arange(half, dtype=torch.float64, device=x.device) / half
    frequencies = (THETA**-exponents).float()
    angles = (positions.float()[:, None] * frequencies).double()
    angles = angles.view(len(positions), *(1,) * (x.ndim - 2), half)
    a, b = x.double().chunk(2, dim=-1)
    return torch.cat(
        (a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), dim=-1
    )
