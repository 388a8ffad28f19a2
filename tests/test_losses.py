"""The chunked loss against the plain one: value, gradients, memory."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from model_helpers import make_model, ragged_batch
from tolerances import LOSS_BFLOAT16, LOSS_GRADIENT_FLOAT32, LOSS_GRADIENT_FLOAT64
from torch import Tensor

from tinylm import losses
from tinylm.losses import IGNORED_LABEL, linear_cross_entropy, sum_loss

TOLERANCES = {torch.float32: LOSS_GRADIENT_FLOAT32, torch.float64: LOSS_GRADIENT_FLOAT64}


class Problem(NamedTuple):
    hidden: Tensor
    weight: Tensor
    labels: Tensor


def problem(dtype: torch.dtype = torch.float32, *, tokens: int = 35) -> Problem:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, tokens, 24, generator=generator, dtype=dtype)
    weight = torch.randn(500, 24, generator=generator, dtype=dtype) * 0.3
    labels = torch.randint(0, 500, (2, tokens), generator=generator)
    labels[0, -9:] = IGNORED_LABEL
    return Problem(hidden.requires_grad_(), weight.requires_grad_(), labels)


def gradients(loss: Tensor, p: Problem) -> list[Tensor]:
    return list(torch.autograd.grad(loss / 61, [p.hidden, p.weight]))


def plain(p: Problem) -> Tensor:
    return F.cross_entropy(
        F.linear(p.hidden, p.weight).flatten(0, 1), p.labels.flatten(), reduction="sum"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk", [1, 7, 35, 70, 4096])
def test_chunked_loss_and_gradients_are_the_plain_ones(dtype: torch.dtype, chunk: int) -> None:
    p, tolerance = problem(dtype), TOLERANCES[dtype]
    loss = linear_cross_entropy(*p, chunk=chunk)
    expected = plain(p)
    assert loss.dtype == dtype and loss.shape == ()
    tolerance.assert_close(loss, expected)
    for found, wanted in zip(gradients(loss, p), gradients(expected, p), strict=True):
        assert found.dtype == dtype
        tolerance.assert_close(found, wanted)


def test_loss_without_gradients_and_with_one_of_them() -> None:
    p = problem()
    expected = plain(p)
    with torch.no_grad():
        LOSS_GRADIENT_FLOAT32.assert_close(linear_cross_entropy(*p, chunk=16), expected)
    for index in (0, 1):
        tensors = [t.detach() for t in p[:2]]
        tensors[index].requires_grad_()
        loss = linear_cross_entropy(tensors[0], tensors[1], p.labels, chunk=16)
        (found,) = torch.autograd.grad(loss / 61, tensors[index])
        LOSS_GRADIENT_FLOAT32.assert_close(found, gradients(plain(p), p)[index])


def test_autocast_multiplies_in_bfloat16_and_sums_in_float32() -> None:
    p = problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(*p, chunk=16)
        expected = sum_loss(F.linear(p.hidden, p.weight), p.labels)
    assert loss.dtype == torch.float32
    LOSS_BFLOAT16.assert_close(loss / 61, expected / 61)
    for found, wanted in zip(gradients(loss, p), gradients(expected, p), strict=True):
        assert found.dtype == torch.float32
        LOSS_BFLOAT16.assert_close(found, wanted)


def test_all_labels_ignored_give_no_loss_and_no_gradient_even_for_broken_rows() -> None:
    p = problem()
    labels = torch.full_like(p.labels, IGNORED_LABEL)
    labels[1] = p.labels[1]
    with torch.no_grad():
        p.hidden[0, 3] = float("nan")
    loss = linear_cross_entropy(p.hidden, p.weight, labels, chunk=16)
    assert torch.isfinite(loss)
    nothing = linear_cross_entropy(p.hidden, p.weight, torch.full_like(labels, -100), chunk=16)
    assert nothing.item() == 0.0


def test_a_loss_that_is_not_finite_is_seen() -> None:
    p = problem()
    with torch.no_grad():
        p.hidden[1, 3] = float("inf")
    assert not torch.isfinite(linear_cross_entropy(*p, chunk=16))


def test_no_more_logits_than_a_chunks_are_ever_made(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    inner = losses._chunk_loss

    def counting(logits: Tensor, labels: Tensor, backward: bool) -> tuple[Tensor, Tensor | None]:
        rows.append(len(logits))
        return inner(logits, labels, backward)

    monkeypatch.setattr(losses, "_chunk_loss", counting)
    p = problem()
    linear_cross_entropy(*p, chunk=16).backward()
    assert rows == [16, 16, 16, 16, 6]


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("chunk", [3, 4096])
def test_model_with_labels_gives_the_loss_of_its_logits(tie: bool, chunk: int) -> None:
    model = make_model(seed=3, tie_embeddings=tie).train()
    model.loss_chunk = chunk
    batch = ragged_batch(seed=3)
    labels = batch.input_ids.roll(-1, dims=1).masked_fill(batch.attention_mask == 0, -100)
    results = []
    for loss in (
        model(batch.input_ids, batch.attention_mask, labels=labels),
        sum_loss(model(batch.input_ids, batch.attention_mask), labels),
    ):
        model.zero_grad()
        (loss / 50).backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for found, expected in zip(*results, strict=True):
        LOSS_GRADIENT_FLOAT32.assert_close(found, expected)
    model.eval().quantize_head()
    with torch.no_grad():
        found = model(batch.input_ids, batch.attention_mask, labels=labels)
        logits = model(batch.input_ids, batch.attention_mask)
    assert found.item() == sum_loss(logits, labels).item()
