from __future__ import annotations

import pytest
import tolerances
import torch
from model_helpers import RaggedBatch, make_model, ragged_batch
from tolerances import assert_equal
from torch import Tensor

from tinylm import TinyLM
from tinylm.errors import ConfigError
from tinylm.generate import SamplingConfig, TorchSession, sample, stream

NEW = 16


@pytest.fixture
def model() -> TinyLM:
    """A model without tied embeddings: those make random weights repeat the last token."""
    return make_model(seed=1, tie_embeddings=False)


@torch.no_grad()
def greedy_without_cache(model: TinyLM, prompt: Tensor, num_new: int) -> list[int]:
    """Recompute the whole row for each token."""
    ids = prompt
    for _ in range(num_new):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
    return ids[0].tolist()


def draws(logits: Tensor, sampling: SamplingConfig, count: int = 20000) -> Tensor:
    """Sample many times from one row of logits and return the frequencies."""
    generator = torch.Generator().manual_seed(0)
    tokens = sample(logits.expand(count, -1), sampling, generator)
    assert tokens.dtype == torch.int64
    return torch.bincount(tokens, minlength=logits.shape[-1]) / count


@pytest.mark.parametrize("seed", range(3))
def test_greedy_with_cache_equals_recomputing(seed: int) -> None:
    model = make_model(seed, tie_embeddings=False)
    prompt = ragged_batch(seed, length=7).input_ids[:1]
    expected = greedy_without_cache(model, prompt, NEW)
    assert len(set(expected[7:])) > 3, "the test needs text that changes"
    assert model.generate(prompt, max_new_tokens=NEW).tolist() == [expected]


@pytest.mark.parametrize("padding", ["right", "left", "gaps"])
def test_batch_equals_rows_alone(model: TinyLM, batch: RaggedBatch, padding: str) -> None:
    rows = [batch.row(i) for i in range(4)]
    ids, mask = batch.input_ids, batch.attention_mask
    if padding == "left":
        ids = torch.stack([r.roll(24 - n) for r, n in zip(ids, batch.lens, strict=True)])
        mask = mask.flip(1)
    if padding == "gaps":
        ids = torch.stack([ids, torch.full_like(ids, 3)], dim=2).flatten(1)
        mask = torch.stack([mask, torch.zeros_like(mask)], dim=2).flatten(1)
    out = model.generate(ids, mask, max_new_tokens=NEW)
    assert out.dtype == torch.int64
    assert out.shape == (4, 24 + NEW)
    for row, length in enumerate(batch.lens):
        alone = model.generate(rows[row], max_new_tokens=NEW)[0]
        assert alone.tolist()[:length] == rows[row][0].tolist()
        assert_equal(out[row, : length + NEW], alone)
        assert not bool(out[row, length + NEW :].any())


def test_rows_end_at_eos_and_are_filled_with_it(model: TinyLM, batch: RaggedBatch) -> None:
    free = model.generate(batch.input_ids, batch.attention_mask, max_new_tokens=NEW)
    new = [free[row, n : n + NEW].tolist() for row, n in enumerate(batch.lens)]
    eos = new[2][5]  # ends row 2 at its sixth token or before, other rows elsewhere or never
    ends = [tokens.index(eos) + 1 if eos in tokens else NEW for tokens in new]
    assert len(set(ends)) > 1
    out = model.generate(
        batch.input_ids, batch.attention_mask, max_new_tokens=NEW, eos_token_id=eos
    )
    for row, length in enumerate(batch.lens):
        kept = length + ends[row]
        assert_equal(out[row, :kept], free[row, :kept])
        assert bool((out[row, kept:] == eos).all())


def test_generation_stops_when_every_row_has_ended(model: TinyLM) -> None:
    prompt = ragged_batch(length=7).input_ids[:1]
    free = model.generate(prompt, max_new_tokens=NEW)[0, 7:].tolist()
    eos = next(t for i, t in enumerate(free) if i >= 2 and t not in free[:i])
    end = free.index(eos) + 1
    out = model.generate(prompt, max_new_tokens=NEW, eos_token_id=eos)
    assert out[0, 7:].tolist() == free[:end]


def test_eos_of_the_config_is_the_default() -> None:
    prompt = ragged_batch(length=7).input_ids[:1]
    free = make_model(tie_embeddings=False).generate(prompt, max_new_tokens=NEW)[0, 7:].tolist()
    eos = next(t for i, t in enumerate(free) if i >= 2 and t not in free[:i])
    out = make_model(tie_embeddings=False, eos_token_id=eos).generate(prompt, max_new_tokens=NEW)
    assert out[0, 7:].tolist() == free[: free.index(eos) + 1]


def test_generation_ends_with_the_context(model: TinyLM) -> None:
    prompt = torch.randint(512, (1, 60), generator=torch.Generator().manual_seed(0))
    out = model.generate(prompt, max_new_tokens=100)
    assert out.shape == (1, 64)
    assert out[0].tolist() == greedy_without_cache(model, prompt, 4)
    assert model.generate(prompt, max_new_tokens=0).tolist() == prompt.tolist()


def test_sampled_text_follows_the_seed(model: TinyLM, batch: RaggedBatch) -> None:
    def run(seed: int) -> list[list[int]]:
        return model.generate(
            batch.input_ids,
            batch.attention_mask,
            max_new_tokens=NEW,
            temperature=1.0,
            top_k=50,
            top_p=0.9,
            generator=torch.Generator().manual_seed(seed),
        ).tolist()

    assert run(0) == run(0)
    assert run(0) != run(1)


def test_packed_model_generates_the_same(batch: RaggedBatch) -> None:
    expected = make_model().generate(batch.input_ids, batch.attention_mask, max_new_tokens=8)
    packed = make_model().pack()
    assert_equal(packed.generate(batch.input_ids, batch.attention_mask, max_new_tokens=8), expected)


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored(training: bool) -> None:
    model = make_model(dropout=0.5).train(training)
    prompt = ragged_batch(length=7).input_ids[:1]
    first = model.generate(prompt, max_new_tokens=4)
    assert model.training is training
    assert_equal(model.generate(prompt, max_new_tokens=4), first)  # no dropout while generating
    with pytest.raises(ValueError, match="context"):
        model.generate(torch.zeros(1, 64, dtype=torch.long), max_new_tokens=4)
    assert model.training is training


def test_temperature_0_takes_the_most_probable_token() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    assert sample(logits, SamplingConfig()).tolist() == [1, 0]
    # Whatever else is asked for.
    assert sample(logits, SamplingConfig(top_k=2, top_p=0.1)).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    frequencies = draws(logits, SamplingConfig(temperature=temperature))
    expected = (logits[0] / temperature).softmax(-1)
    tolerances.SAMPLE_FREQUENCY.assert_close(frequencies, expected)


@pytest.mark.parametrize(("top_k", "kept"), [(1, [2]), (2, [1, 2]), (3, [0, 1, 2]), (9, None)])
def test_top_k_keeps_the_k_most_probable(top_k: int, kept: list[int] | None) -> None:
    logits = torch.tensor([[0.5, 1.0, 2.0, 0.0]])
    frequencies = draws(logits, SamplingConfig(temperature=1.0, top_k=top_k))
    mask = torch.full((4,), float("-inf"))
    mask[kept if kept is not None else slice(None)] = 0.0
    expected = (logits[0] + mask).softmax(-1)
    assert_equal(frequencies > 0, expected > 0)
    tolerances.SAMPLE_FREQUENCY.assert_close(frequencies, expected)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.05, [2]),  # the most probable token always stays
        (0.49, [2]),
        (0.51, [0, 2]),
        (0.81, [0, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_top_p_keeps_the_smallest_set_with_that_probability(top_p: float, kept: list[int]) -> None:
    probabilities = torch.tensor([0.3, 0.05, 0.5, 0.15])
    frequencies = draws(probabilities.log()[None], SamplingConfig(temperature=1.0, top_p=top_p))
    expected = torch.zeros(4)
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    assert_equal(frequencies > 0, expected > 0)
    tolerances.SAMPLE_FREQUENCY.assert_close(frequencies, expected)


def test_top_p_applies_after_temperature_and_top_k() -> None:
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1])
    # Among the first three the shares are 0.44, 0.33, 0.22: two reach 0.7 (0.77), and without
    # top_k it would take three.
    sampling = SamplingConfig(temperature=1.0, top_k=3, top_p=0.72)
    assert (draws(probabilities.log()[None], sampling) > 0).tolist() == [True, True, False, False]
    # Temperature 1/2 squares them: 0.53, 0.3, ...
    sampling = SamplingConfig(temperature=0.5, top_p=0.5)
    assert (draws(probabilities.log()[None], sampling) > 0).tolist() == [True, False, False, False]


def test_rows_are_filtered_one_by_one() -> None:
    logits = torch.tensor([[0.0, 9.0, 8.0], [9.0, 0.0, 8.0]])
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        first, second = sample(logits, SamplingConfig(temperature=3.0, top_k=2), generator).tolist()
        assert first in (1, 2)
        assert second in (0, 2)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", -0.1, "temperature must be 0 or more, found -0.1"),
        ("temperature", float("nan"), "temperature must be"),
        ("top_k", -1, "top_k must be 0 or more, found -1"),
        ("top_p", 0.0, r"top_p must be in \(0, 1\], found 0.0"),
        ("top_p", 1.1, "top_p must be"),
        ("top_p", float("nan"), "top_p must be"),
    ],
)
def test_bad_sampling_values(model: TinyLM, field: str, value: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingConfig(**{field: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        model.generate(torch.ones(1, 2, dtype=torch.long), **{field: value})  # type: ignore[arg-type]


def test_prompt_that_fills_the_context(model: TinyLM) -> None:
    with pytest.raises(ValueError, match=r"prompt has 64 tokens.*context of 64.*Shorten"):
        model.generate(torch.zeros(2, 64, dtype=torch.long), max_new_tokens=1)


def test_empty_prompt_names_the_row(model: TinyLM) -> None:
    mask = torch.tensor([[1, 1], [0, 0]])
    with pytest.raises(ValueError, match=r"row 1 has an empty prompt"):
        model.generate(torch.zeros(2, 2, dtype=torch.long), mask, max_new_tokens=1)


def test_stream_yields_what_generate_returns(model: TinyLM, batch: RaggedBatch) -> None:
    lens = torch.tensor(batch.lens)
    steps = stream(TorchSession(model), batch.input_ids, lens, max_new_tokens=NEW)
    tokens = torch.stack(list(steps), dim=1)  # [B, NEW]
    out = model.generate(batch.input_ids, batch.attention_mask, max_new_tokens=NEW)
    for row, length in enumerate(batch.lens):
        assert_equal(tokens[row], out[row, length : length + NEW])


def test_ended_rows_take_no_room_in_the_cache(model: TinyLM, batch: RaggedBatch) -> None:
    class RecordingSession(TorchSession):
        def step(self, input_ids: Tensor, seq_lens: Tensor) -> Tensor:
            fed.append(seq_lens.tolist())
            return super().step(input_ids, seq_lens)

    fed: list[list[int]] = []
    lens = torch.tensor(batch.lens)
    free = model.generate(batch.input_ids, batch.attention_mask, max_new_tokens=NEW)
    eos = int(free[0, batch.lens[0] + 2])
    steps = stream(
        RecordingSession(model), batch.input_ids, lens, max_new_tokens=NEW, eos_token_id=eos
    )
    tokens = torch.stack(list(steps), dim=1)
    assert fed[0] == batch.lens
    ended = (tokens == eos).cumsum(dim=1) > 0  # [B, NEW]
    assert bool(ended[0, 2])
    for step, seq_lens in enumerate(fed[1:]):
        assert seq_lens == (~ended[:, step]).long().tolist()


def test_session_must_be_started(model: TinyLM) -> None:
    with pytest.raises(RuntimeError, match=r"start\(\)"):
        TorchSession(model).step(torch.ones(1, 1, dtype=torch.long), torch.ones(1))
