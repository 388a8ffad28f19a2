from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from model_helpers import (
    ACTIVATIONS,
    RaggedBatch,
    Recording,
    feed_in_chunks,
    hidden_states,
    make_model,
    ragged_batch,
)
from tolerances import LOGITS, assert_equal
from torch import Tensor

from tinylm import TinyLM, attention, preset
from tinylm.latent_attention import attend_absorbed, attend_expanded
from tinylm.latent_cache import LatentCache


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "chunks",
    [
        [24],
        [7, 5] + [1] * 12,  # prefill in two chunks, then token by token
        [1] * 24,
        [1, 2, 3, 1, 4, 13],  # absorbed and expanded steps in turn
    ],
    ids=["one chunk", "prefill and decode", "token by token", "mixed"],
)
def test_cached_equals_uncached_bit_for_bit(activation: str, chunks: list[int]) -> None:
    model = make_model(seed=5, activation=activation)
    batch = ragged_batch(seed=5)
    expected = hidden_states(model, batch.input_ids, batch.attention_mask)
    rows = feed_in_chunks(model, batch, chunks)
    for row, length in enumerate(batch.lens):
        assert_equal(rows[row], expected[row, :length])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("chunks", [[4], [1], [3, 1, 1]])
def test_rows_at_different_speeds(activation: str, chunks: list[int]) -> None:
    model = make_model(seed=15, activation=activation)
    batch = ragged_batch(seed=15)
    expected = hidden_states(model, batch.input_ids, batch.attention_mask)
    rows = feed_in_chunks(model, batch, chunks, speeds=15)
    for row, length in enumerate(batch.lens):
        assert_equal(rows[row], expected[row, :length])


@pytest.mark.parametrize("backend", ["sdpa", "plain"])
def test_cached_backends_agree_bit_for_bit(backend: str) -> None:
    model, batch = make_model(seed=6), ragged_batch(seed=6)
    expected = hidden_states(model, batch.input_ids, batch.attention_mask)
    model.set_attention_backend(backend)
    rows = feed_in_chunks(model, batch, [8, 8, 8])
    for row, length in enumerate(batch.lens):
        assert_equal(rows[row], expected[row, :length])


def test_absorbed_equals_expanded_through_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make_model(seed=16), ragged_batch(seed=16)
    calls: list[str] = []

    def count(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(*args: Any, **kwargs: Any) -> Tensor:
            calls.append(name)
            return function(*args, **kwargs)

        return counted

    monkeypatch.setattr(attention, "attend_absorbed", count("absorbed", attend_absorbed))
    monkeypatch.setattr(attention, "attend_expanded", count("expanded", attend_expanded))
    absorbed = feed_in_chunks(model, batch, [1])
    assert set(calls) == {"absorbed"}
    # The very same steps, with the other form in its place.
    monkeypatch.setattr(attention, "attend_absorbed", attend_expanded)
    for row, hidden in enumerate(feed_in_chunks(model, batch, [1])):
        assert_equal(hidden, absorbed[row])
    calls.clear()
    feed_in_chunks(model, batch, [24])
    assert calls == ["expanded", "expanded"]


def test_packed_model_with_a_cache() -> None:
    model, batch = make_model(seed=7), ragged_batch(seed=7)
    expected = feed_in_chunks(model, batch, [20] + [1] * 4)
    actual = feed_in_chunks(model.pack(), batch, [20] + [1] * 4)
    for row in range(4):
        assert_equal(actual[row], expected[row])


def test_logits_over_a_cache(model: TinyLM, batch: RaggedBatch) -> None:
    cache = LatentCache(model.config, 4, 24)
    with torch.no_grad():
        LOGITS.assert_close(
            model(batch.input_ids, batch.attention_mask, cache=cache)[batch.attention_mask == 1],
            model(batch.input_ids, batch.attention_mask)[batch.attention_mask == 1],
        )


def test_cache_holds_what_the_formulas_say(model: TinyLM, batch: RaggedBatch) -> None:
    recording = Recording(model)
    cache = LatentCache(model.config, 4, 24)
    with torch.no_grad():
        model(batch.input_ids, batch.attention_mask, cache=cache)
    for layer in range(2):
        kv = recording.outputs[f"layers.{layer}.self_attn.kv_a_proj"].numpy()
        norm = model.get_submodule(f"layers.{layer}.self_attn.kv_a_layernorm")
        weight = norm.get_parameter("weight").detach().numpy()
        for row, length in enumerate(batch.lens):
            rank = model.config.latent_rank
            latent = reference.rms_norm(kv[row, :length, :rank], weight, model.config.norm_eps)
            q, s = reference.quantize_activation(latent, "int8")
            rope = reference.rotate(kv[row, :length, rank:], model.config.rope_theta)
            assert_equal(cache.latent[layer, row, :length], torch.from_numpy(q).to(torch.int8))
            assert_equal(cache.scale[layer, row, :length], torch.from_numpy(s[:, 0]))
            assert_equal(cache.rope[layer, row, :length], torch.from_numpy(rope))
            assert not bool(cache.latent[layer, row, length:].any()), "padding was stored"
            assert not bool(cache.rope[layer, row, length:].any()), "padding was stored"


@pytest.mark.parametrize("name", ["tinylm-300m", "tinylm-test"])
def test_bytes_per_token_and_layer(name: str) -> None:
    config = preset(name)
    batch_size, capacity = 2, 16
    cache = LatentCache(config, batch_size, capacity)
    per_token = cache.num_bytes() / (config.num_layers * batch_size * capacity)
    assert per_token == config.latent_rank + 4 + 4 * config.rope_dim
    half = LatentCache(config, batch_size, capacity, dtype=torch.bfloat16)
    per_token = half.num_bytes() / (config.num_layers * batch_size * capacity)
    assert per_token == config.latent_rank + 4 + 2 * config.rope_dim


def test_rows_with_nothing_new_stay_as_they_are(model: TinyLM, batch: RaggedBatch) -> None:
    cache = LatentCache(model.config, 4, 40)
    with torch.no_grad():
        model(batch.input_ids, batch.attention_mask, cache=cache)
        before = [t[:, 1].clone() for t in (cache.latent, cache.scale, cache.rope)]
        mask = torch.tensor([[1], [0], [1], [1]])
        logits = model(torch.full((4, 1), 9), mask, cache=cache)
    assert bool(logits.isfinite().all())
    assert cache.past_lens.tolist() == [n + (i != 1) for i, n in enumerate(batch.lens)]
    for kept, now in zip(before, (cache.latent, cache.scale, cache.rope), strict=True):
        assert_equal(now[:, 1], kept)


def test_row_without_any_token_is_finite(model: TinyLM) -> None:
    cache = LatentCache(model.config, 2, 8)
    with torch.no_grad():
        for length in (3, 1):
            mask = torch.tensor([[1] * length, [0] * length])
            logits = model(torch.ones(2, length, dtype=torch.long), mask, cache=cache)
            assert bool(logits.isfinite().all())
    assert cache.past_lens.tolist() == [4, 0]


def test_overflow_names_capacity_and_request(model: TinyLM) -> None:
    cache = LatentCache(model.config, 2, 10)
    ids = torch.zeros(2, 6, dtype=torch.long)
    with torch.no_grad():
        model(ids, cache=cache)
        with pytest.raises(ValueError, match=r"holds 10 tokens a row, 6 are taken and 6 more"):
            model(ids, cache=cache)
        assert cache.past_lens.tolist() == [6, 6], "a refused input leaves the cache unchanged"
        model(ids[:, :4], cache=cache)
    assert cache.past_lens.tolist() == [10, 10]


def test_padding_does_not_fill_the_cache(model: TinyLM) -> None:
    """The room a row has left is counted in its real tokens, not in the columns fed so far."""
    cache = LatentCache(model.config, 2, 8)
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0]])
    with torch.no_grad():
        for _ in range(3):
            model(torch.ones(2, 4, dtype=torch.long), mask, cache=cache)
    assert cache.past_lens.tolist() == [3, 6]


def test_capacity_is_bounded_by_the_context(model: TinyLM) -> None:
    LatentCache(model.config, 1, 64)
    with pytest.raises(ValueError, match=r"65 tokens.*max_seq_len = 64"):
        LatentCache(model.config, 1, 65)


def test_batch_size_must_fit(model: TinyLM) -> None:
    with pytest.raises(ValueError, match="the cache has 3 rows, input_ids has 2"):
        model(torch.zeros(2, 4, dtype=torch.long), cache=LatentCache(model.config, 3, 8))


@pytest.mark.parametrize("chunk", [1, 5, 24])
def test_padding_may_stand_anywhere(model: TinyLM, batch: RaggedBatch, chunk: int) -> None:
    order = torch.rand(4, 24, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    mask = batch.attention_mask.gather(1, order)  # gaps anywhere, and whole chunks of padding
    ids = torch.full_like(mask, 3).masked_scatter(
        mask == 1, batch.input_ids[batch.attention_mask == 1]
    )
    cache = LatentCache(model.config, 4, 24)
    with torch.no_grad():
        whole = model(ids, mask)
        for start in range(0, 24, chunk):
            part = slice(start, start + chunk)
            before = cache.past_lens
            logits = model(ids[:, part], mask[:, part], cache=cache)
            real = mask[:, part] == 1
            LOGITS.assert_close(logits[real], whole[:, part][real])
            assert_equal(cache.past_lens - before, real.sum(dim=1))


def test_a_cache_that_grows_equals_one_made_large(model: TinyLM, batch: RaggedBatch) -> None:
    large, grown = LatentCache(model.config, 4, 32), LatentCache(model.config, 4, 24)
    tokens = torch.tensor([[1], [2], [3], [4]])
    with torch.no_grad():
        for cache in (large, grown):
            model(batch.input_ids, batch.attention_mask, cache=cache)
            cache.grow(32)
            cache.grow(5)  # never shrinks
        assert_equal(model(tokens, cache=grown), model(tokens, cache=large))
    for name in ("latent", "scale", "rope", "past_lens"):
        assert_equal(getattr(grown, name), getattr(large, name))
    assert grown.capacity == 32


def test_rows_can_be_chosen_and_tokens_forgotten(model: TinyLM, batch: RaggedBatch) -> None:
    cache = LatentCache(model.config, 4, 30)
    rows, drop = torch.tensor([2, 0, 0]), torch.tensor([0, 1, 0])
    with torch.no_grad():
        model(batch.input_ids, batch.attention_mask, cache=cache)
        cache.select_rows(rows)
        cache.drop_last(drop)
        kept = batch.attention_mask[rows]
        kept[1, batch.lens[0] - 1] = 0
        expected = LatentCache(model.config, 3, 30)
        model(batch.input_ids[rows], kept, cache=expected)
        assert_equal(cache.past_lens, expected.past_lens)
        assert cache.longest == expected.past_lens.max()
        tokens = torch.tensor([[7], [8], [9]])
        assert_equal(model(tokens, cache=cache), model(tokens, cache=expected))


def test_steps_without_no_grad_keep_no_graph(model: TinyLM) -> None:
    cache = LatentCache(model.config, 1, 8)
    for _ in range(3):
        model(torch.ones(1, 1, dtype=torch.long), cache=cache)
    assert not any(t.requires_grad for t in (cache.latent, cache.scale, cache.rope))


def test_from_tensors_shares_memory(model: TinyLM, batch: RaggedBatch) -> None:
    cache = LatentCache(model.config, 4, 24)
    with torch.no_grad():
        model(batch.input_ids, batch.attention_mask, cache=cache)
    view = LatentCache.from_tensors(
        cache.latent[1], cache.scale[1], cache.rope[1], cache.past_lens.int()
    )
    assert view.capacity == 24
    assert view.longest == 24
    assert view.past_lens.tolist() == batch.lens
    for ours, theirs in zip(
        view.read(0, 0),
        (cache.latent[1], cache.scale[1], cache.rope[1]),
        strict=True,
    ):
        assert ours.data_ptr() == theirs.data_ptr()
        assert_equal(ours, theirs)
