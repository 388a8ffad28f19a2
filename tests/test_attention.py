from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
import tolerances
import torch
from model_helpers import ACTIVATIONS, Recording, make_model, ragged_batch
from tolerances import assert_equal
from torch import Tensor

from tinylm.config import AttentionShape
from tinylm.latent_attention import (
    attend_absorbed,
    attend_expanded,
    rotary_angles,
    rotate,
    split_query,
)

SHAPE = AttentionShape(
    num_heads=3, nope_dim=6, rope_dim=4, value_dim=8, theta=100.0, eps=1e-5, softmax_scale=0.3
)
RANK = 12


def draw(seed: int, past_lens: list[int], num_new: int, dtype: torch.dtype) -> dict[str, Any]:
    """Draw what attend_expanded and attend_absorbed take, with garbage in the unused slots."""
    g = torch.Generator().manual_seed(seed)
    batch, num_keys = len(past_lens), max(past_lens) + num_new

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    latent = torch.randint(-127, 128, (batch, num_keys, RANK), generator=g).to(dtype)
    s = torch.rand(batch, num_keys, generator=g) * 60 + 20
    k_rope = normal(batch, num_keys, SHAPE.rope_dim)
    for row, past in enumerate(past_lens):
        latent[row, past + num_new :] = 127
        s[row, past + num_new :] = 1e-3
        k_rope[row, past + num_new :] = 1e3
    rows = SHAPE.num_heads * (SHAPE.nope_dim + SHAPE.value_dim)
    return {
        "q_nope": normal(batch, num_new, SHAPE.num_heads, SHAPE.nope_dim),
        "q_rope": normal(batch, num_new, SHAPE.num_heads, SHAPE.rope_dim),
        "latent": latent,
        "s": s,
        "k_rope": k_rope,
        "codes": torch.randint(-1, 2, (rows, RANK), generator=g).to(dtype),
        "past_lens": torch.tensor(past_lens),
        "shape": SHAPE,
    }


def by_hand(args: dict[str, Any], weight_scale: Tensor) -> Tensor:
    """Expand each visible latent and attend, one query at a time, in float64."""
    q_nope, q_rope = args["q_nope"].double(), args["q_rope"].double()
    weight = args["codes"].double() * weight_scale.double().reshape(-1, 1)
    out = torch.zeros(*q_nope.shape[:3], SHAPE.value_dim, dtype=torch.float64)
    for b, past in enumerate(args["past_lens"].tolist()):
        for i in range(q_nope.shape[1]):
            seen = past + i + 1
            c = args["latent"][b, :seen].double() / args["s"][b, :seen, None].double()
            expanded = c @ weight.t()
            for h in range(SHAPE.num_heads):
                width = SHAPE.nope_dim + SHAPE.value_dim
                kv = expanded[:, h * width : (h + 1) * width]
                scores = kv[:, : SHAPE.nope_dim] @ q_nope[b, i, h]
                scores = scores + args["k_rope"][b, :seen].double() @ q_rope[b, i, h]
                p = (scores * SHAPE.softmax_scale).softmax(0)
                out[b, i, h] = p @ kv[:, SHAPE.nope_dim :]
    return out


@pytest.mark.parametrize("past_lens", [[0, 0], [5, 0, 17], [30]])
@pytest.mark.parametrize("num_new", [1, 4])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, tolerances.ATTENTION_FLOAT64),
        (torch.float32, tolerances.ATTENTION_FLOAT32),
    ],
)
def test_absorbed_equals_expanded(
    past_lens: list[int],
    num_new: int,
    per_row: bool,
    dtype: torch.dtype,
    tolerance: tolerances.Tolerance,
) -> None:
    args = draw(7, past_lens, num_new, dtype)
    scale = torch.linspace(0.05, 0.3, args["codes"].shape[0]) if per_row else torch.tensor(0.2)
    expanded = attend_expanded(**args, weight_scale=scale)
    absorbed = attend_absorbed(**args, weight_scale=scale)
    assert expanded.dtype == absorbed.dtype == dtype
    tolerance.assert_close(absorbed, expanded)
    tolerance.assert_close(expanded, by_hand(args, scale))
    if dtype == torch.float64:  # what float32 inference makes of them
        assert_equal(absorbed.float(), expanded.float())


@pytest.mark.parametrize("backend", ["sdpa", "plain"])
def test_expanded_takes_a_backend(backend: str) -> None:
    args = draw(8, [3, 9], 2, torch.float64)
    y = attend_expanded(**args, weight_scale=torch.tensor(0.2), backend=backend)
    tolerances.ATTENTION_FLOAT64.assert_close(y, by_hand(args, torch.tensor(0.2)))


def test_rotation_equals_the_formula() -> None:
    x = torch.randn(1, 40, 8, generator=torch.Generator().manual_seed(0))
    cos, sin = rotary_angles(torch.arange(40)[None], 8, 10000.0)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == sin.shape == (1, 40, 4)
    y = rotate(x, cos.double(), sin.double()).float()
    assert_equal(y[0], torch.from_numpy(reference.rotate(x[0].numpy(), 10000.0)))
    assert_equal(y[:, 0], x[:, 0])  # position 0 is not rotated
    assert not torch.equal(y[:, 1], x[:, 1])


def test_rotated_scores_depend_on_the_distance_only() -> None:
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(8, generator=g, dtype=torch.float64) for _ in range(2))

    def score(query_position: int, key_position: int) -> Tensor:
        def at(x: Tensor, position: int) -> Tensor:
            cos, sin = rotary_angles(torch.tensor([[position]]), 8, 100.0)
            return rotate(x[None, None], cos.double(), sin.double())[0, 0]

        return at(q, query_position) @ at(k, key_position)

    near = score(3, 1)
    torch.testing.assert_close(score(12, 10), near, rtol=1e-5, atol=1e-5)  # float32 angles
    assert abs(float(score(12, 1) - near)) > 1e-2


def test_split_query_rotates_the_second_part_of_each_head() -> None:
    q = torch.randn(2, 5, 3 * 10, generator=torch.Generator().manual_seed(0))
    cos, sin = rotary_angles(torch.arange(5)[None], 4, 100.0)
    q_nope, q_rope = split_query(q, (cos.double(), sin.double()), SHAPE)
    assert q_nope.dtype == q_rope.dtype == torch.float32
    for row in range(2):
        for head in range(3):
            part = q[row, :, head * 10 : head * 10 + 10]
            assert_equal(q_nope[row, :, head], part[:, :6])
            expected = reference.rotate(part[:, 6:].numpy(), 100.0)
            assert_equal(q_rope[row, :, head], torch.from_numpy(expected))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "dims", [{}, {"nope_dim": 12, "rope_dim": 8, "value_dim": 24, "latent_rank": 40}]
)
def test_module_equals_the_formula_bit_for_bit(activation: str, dims: dict[str, int]) -> None:
    model = make_model(seed=3, activation=activation, num_heads=4, **dims)
    batch = ragged_batch(seed=3, batch=2)
    recording = Recording(model)
    with torch.no_grad():
        model(batch.input_ids, batch.attention_mask)
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    for layer in ("layers.0.self_attn", "layers.1.self_attn"):
        x, y = recording.inputs[layer], recording.inputs[f"{layer}.attn_sub_norm"]
        for row, length in enumerate(batch.lens):
            expected = reference.attention(
                x[row, :length].numpy().astype(np.float32), weights, layer, model.config
            )
            assert_equal(y[row, :length], torch.from_numpy(expected))


def test_attention_of_masked_tokens_is_zero() -> None:
    model = make_model(seed=4)
    batch = ragged_batch(seed=4)
    mask = batch.attention_mask.clone()
    mask[1] = 0  # a row without any token
    recording = Recording(model)
    with torch.no_grad():
        logits = model(batch.input_ids, mask)
    assert bool(logits.isfinite().all())
    for layer in range(2):
        y = recording.inputs[f"layers.{layer}.self_attn.attn_sub_norm"]
        assert not bool(y[mask == 0].any())
        assert bool((y[mask == 1] != 0).any(dim=-1).all())
        assert not bool(recording.outputs[f"layers.{layer}.self_attn"][mask == 0].any())
