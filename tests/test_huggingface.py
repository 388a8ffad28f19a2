"""TinyLMForCausalLM: the model's own answers through transformers' interface."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import RaggedBatch, make_model, ragged_batch
from tolerances import LOGITS, assert_equal
from torch import Tensor
from training_helpers import inputs
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    pipeline,
)
from transformers.utils import logging as transformers_logging

from tinylm import TinyLM
from tinylm.checkpoint import save_model
from tinylm.errors import CheckpointError, ConfigError
from tinylm.generate import SamplingConfig
from tinylm.generate import generate as generate_ours
from tinylm.huggingface import TinyLMCache, TinyLMConfig, TinyLMForCausalLM
from tinylm.huggingface.modeling import CACHE
from tinylm.tokenizer import load_tokenizer

NEW = 16


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """No progress bars; and right padding, which transformers warns of, is what we test."""
    transformers_logging.disable_progress_bar()
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    yield
    transformers_logging.set_verbosity(before)


@pytest.fixture
def model() -> TinyLM:
    """Without tied embeddings, which make random weights repeat the last token."""
    return make_model(seed=1, tie_embeddings=False)


@pytest.fixture
def wrapped(model: TinyLM) -> TinyLMForCausalLM:
    return TinyLMForCausalLM.from_tinylm(model)


def padded(batch: RaggedBatch, side: str) -> tuple[Tensor, Tensor]:
    """Return ids and mask with padding on a side, or between any two tokens."""
    ids, mask = batch.input_ids, batch.attention_mask
    if side == "left":
        ids = torch.stack([r.roll(len(r) - n) for r, n in zip(ids, batch.lens, strict=True)])
        mask = mask.flip(1)
    if side == "gaps":
        ids = torch.stack([ids, torch.full_like(ids, 3)], dim=2).flatten(1)
        mask = torch.stack([mask, torch.zeros_like(mask)], dim=2).flatten(1)
    return ids, mask


def greedy(wrapped: TinyLMForCausalLM, ids: Tensor, mask: Tensor, **kwargs: Any) -> Tensor:
    out = wrapped.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        **{"max_new_tokens": NEW, "pad_token_id": 0, **kwargs},
    )
    return out[:, ids.shape[1] :]


def new_tokens(model: TinyLM, batch: RaggedBatch, **kwargs: Any) -> Tensor:
    """What TinyLM.generate adds to each row, int64 [B, NEW]."""
    out = model.generate(batch.input_ids, batch.attention_mask, **{"max_new_tokens": NEW, **kwargs})
    return torch.stack([row[n : n + NEW] for row, n in zip(out, batch.lens, strict=True)])


@pytest.mark.parametrize("side", ["right", "left", "gaps"])
@pytest.mark.parametrize("activation", ["int8", "fp8_e4m3"])
@torch.no_grad()
def test_logits_are_the_models_own(batch: RaggedBatch, side: str, activation: str) -> None:
    model = make_model(seed=2, activation=activation)
    wrapped = TinyLMForCausalLM.from_tinylm(model)
    ids, mask = padded(batch, side)
    assert_equal(wrapped(ids, mask).logits, model(ids, mask))
    assert_equal(
        wrapped(ids, attention_mask=mask, use_cache=True).logits, _cached(model, ids, mask)
    )
    last = wrapped(ids, mask, logits_to_keep=1).logits
    assert last.shape == (4, 1, 512)
    assert_equal(last[:, 0], model.last_logits(ids, mask))
    columns = torch.tensor([0, 3])
    assert_equal(wrapped(ids, mask, logits_to_keep=columns).logits, model(ids, mask)[:, columns])
    assert_equal(wrapped(ids, mask, logits_to_keep=3).logits, model(ids, mask)[:, -3:])


def _cached(model: TinyLM, ids: Tensor, mask: Tensor) -> Tensor:
    from tinylm.latent_cache import LatentCache

    return model(ids, mask, cache=LatentCache(model.config, len(ids), ids.shape[1]))


@pytest.mark.parametrize("side", ["right", "left", "gaps"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_ids_are_the_models_own(
    model: TinyLM, wrapped: TinyLMForCausalLM, batch: RaggedBatch, side: str, use_cache: bool
) -> None:
    ids, mask = padded(batch, side)
    if side == "gaps":
        ids, mask = ids[:, :40], mask[:, :40]  # leaves room in the context of 64 columns
        batch = RaggedBatch(batch.input_ids, batch.attention_mask, [min(n, 20) for n in batch.lens])
        batch = batch._replace(
            attention_mask=(torch.arange(24) < torch.tensor(batch.lens)[:, None]).long()
        )
    expected = new_tokens(model, batch)
    assert len(set(expected.flatten().tolist())) > 8, "the test needs text that changes"
    assert_equal(greedy(wrapped, ids, mask, use_cache=use_cache), expected)


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_end_at_eos(model: TinyLM, batch: RaggedBatch, side: str) -> None:
    eos = int(new_tokens(model, batch)[2, 5])
    expected = new_tokens(model, batch, eos_token_id=eos)
    wrapped = TinyLMForCausalLM.from_tinylm(
        make_model(seed=1, tie_embeddings=False, eos_token_id=eos)
    )
    assert wrapped.generation_config.eos_token_id == eos
    found = greedy(wrapped, *padded(batch, side), pad_token_id=eos)
    assert bool((expected == eos).any())
    assert_equal(found, expected[:, : found.shape[1]])


@pytest.mark.parametrize("top_k", [0, 40])
def test_sampled_ids_are_the_models_own(
    model: TinyLM, wrapped: TinyLMForCausalLM, batch: RaggedBatch, top_k: int
) -> None:
    sampling = SamplingConfig(temperature=0.8, top_p=0.95, top_k=top_k)
    prompt = batch.row(3)
    for seed in range(3):
        expected = generate_ours(
            model,
            prompt,
            None,
            max_new_tokens=NEW,
            sampling=sampling,
            generator=torch.Generator().manual_seed(seed),
        )
        torch.manual_seed(seed)
        found = wrapped.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW,
            do_sample=True,
            temperature=0.8,
            top_p=0.95,
            top_k=top_k,
        )
        assert_equal(found, expected)


def test_beam_search_finds_what_recomputing_finds(
    wrapped: TinyLMForCausalLM, batch: RaggedBatch
) -> None:
    ids, mask = padded(batch, "left")
    found = [greedy(wrapped, ids, mask, num_beams=4, use_cache=cached) for cached in (True, False)]
    assert_equal(found[0], found[1])
    assert not torch.equal(found[0], greedy(wrapped, ids, mask))


def test_prompt_lookup_drops_refused_tokens_from_the_cache() -> None:
    ids = ragged_batch(seed=4).input_ids[:1].repeat(1, 2)[:, :40]  # repeats itself
    model = make_model(seed=1, tie_embeddings=False, eos_token_id=511)
    expected = model.generate(ids, max_new_tokens=NEW)[:, 40:]
    assert 511 not in expected
    wrapped = TinyLMForCausalLM.from_tinylm(model)
    found = greedy(wrapped, ids, torch.ones_like(ids), prompt_lookup_num_tokens=3)
    assert_equal(found, expected)


@torch.no_grad()
def test_a_cache_is_used_again(wrapped: TinyLMForCausalLM, batch: RaggedBatch) -> None:
    ids, mask = padded(batch, "left")
    first = wrapped(ids[:, :20], mask[:, :20], use_cache=True)
    cache = first[CACHE]
    assert isinstance(cache, TinyLMCache)
    assert cache.get_seq_length() == 20
    assert_equal(cache.latents.past_lens, mask[:, :20].sum(dim=1))
    rest = wrapped(ids[:, 20:], mask, **{CACHE: cache}).logits  # the mask covers cached columns
    real = mask[:, 20:] == 1
    LOGITS.assert_close(rest[real], wrapped(ids, mask).logits[:, 20:][real])
    expected = greedy(wrapped, ids, mask)
    assert_equal(greedy(wrapped, ids, mask, **{CACHE: _prefilled(wrapped, ids, mask)}), expected)


def _prefilled(wrapped: TinyLMForCausalLM, ids: Tensor, mask: Tensor) -> TinyLMCache:
    return wrapped(ids[:, :-1], mask[:, :-1], use_cache=True)[CACHE]


def test_a_cache_that_holds_the_whole_prompt_is_refused(wrapped: TinyLMForCausalLM) -> None:
    ids = ragged_batch(seed=4).input_ids[:2]
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    cache = wrapped(ids, mask, use_cache=True)[CACHE]
    with pytest.raises(ValueError, match="holds all 24 tokens of input_ids"):
        greedy(wrapped, ids, mask, **{CACHE: cache})


def test_text_ends_with_the_context(
    model: TinyLM, wrapped: TinyLMForCausalLM, caplog: pytest.LogCaptureFixture
) -> None:
    ids = torch.randint(512, (1, 60), generator=torch.Generator().manual_seed(0))
    found = greedy(wrapped, ids, torch.ones_like(ids), max_new_tokens=100)
    assert "context of 64 tokens" in caplog.text
    assert_equal(torch.cat([ids, found], dim=1), model.generate(ids, max_new_tokens=100))
    full = torch.zeros(1, 64, dtype=torch.long)
    with pytest.raises(ValueError, match="64"):
        greedy(wrapped, full, torch.ones_like(full))


@torch.no_grad()
def test_more_tokens_than_the_context(wrapped: TinyLMForCausalLM) -> None:
    cache = wrapped(torch.zeros(1, 64, dtype=torch.long), use_cache=True)[CACHE]
    with pytest.raises(ValueError, match="max_seq_len = 64 tokens, and 65 are needed"):
        wrapped(torch.zeros(1, 1, dtype=torch.long), **{CACHE: cache})


def test_loss_and_gradients(batch: RaggedBatch) -> None:
    torch.manual_seed(0)
    wrapped = TinyLMForCausalLM(
        TinyLMConfig(vocab_size=512, hidden_size=64, num_layers=2, num_heads=2, dropout=0.0)
    ).train()
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    output = wrapped(batch.input_ids, batch.attention_mask, labels=labels)
    logits = wrapped.model(batch.input_ids, batch.attention_mask)
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    LOGITS.assert_close(output.loss.detach(), expected.detach())
    output.loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in wrapped.parameters())
    loss, logits, *rest = wrapped(batch.input_ids, labels=labels, return_dict=False)
    assert loss.ndim == 0
    assert rest == []


@pytest.mark.parametrize("tie", [True, False])
def test_round_trip_through_a_directory(tmp_path: Path, batch: RaggedBatch, tie: bool) -> None:
    model = make_model(seed=3, tie_embeddings=tie, eos_token_id=2)
    TinyLMForCausalLM.from_tinylm(model).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is TinyLMForCausalLM
    assert not loaded.training
    assert loaded.config.to_model_config() == model.config == loaded.model.config
    assert (loaded.model.lm_head.weight is loaded.model.embed_tokens.weight) is tie
    assert loaded.num_parameters() == model.num_parameters()
    for name, tensor in model.state_dict().items():
        assert_equal(loaded.model.state_dict()[name], tensor)
    assert_equal(loaded(batch.input_ids).logits, model(batch.input_ids))
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half(batch.input_ids).logits.dtype == torch.bfloat16


def test_a_checkpoint_loads_as_it_is(tmp_path: Path, batch: RaggedBatch) -> None:
    model = make_model(seed=3)
    path = save_model(tmp_path / "checkpoint", model)
    loaded = AutoModelForCausalLM.from_pretrained(path)
    assert_equal(loaded(batch.input_ids).logits, model(batch.input_ids))
    with pytest.raises(CheckpointError, match="found a checkpoint of TinyLM"):
        loaded.save_pretrained(path)
    weights = path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match="truncated or altered"):
        AutoModelForCausalLM.from_pretrained(path)


def test_missing_and_unknown_tensors_are_refused(tmp_path: Path, model: TinyLM) -> None:
    from safetensors.torch import load_file, save_file

    TinyLMForCausalLM.from_tinylm(model).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.self_attn.q_proj.weight"
    kept = {n: t for n, t in tensors.items() if n != name}
    for change, message in (
        (kept, f"no tensor {name}"),
        ({**tensors, "model.extra.weight": torch.zeros(2)}, "unknown tensor model.extra.weight"),
    ):
        save_file(change, path, {"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            TinyLMForCausalLM.from_pretrained(tmp_path)


def test_config_holds_every_field(tmp_path: Path) -> None:
    config = TinyLMConfig(hidden_size=64, num_heads=2, vocab_size=512, tie_embeddings=False)
    assert config.max_position_embeddings == config.max_seq_len == 2048
    assert config.tie_word_embeddings is False
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is TinyLMConfig
    assert loaded.to_model_config() == config.to_model_config()
    assert (
        TinyLMConfig(num_hidden_layers=3, max_position_embeddings=99).to_model_config().num_layers
        == 3
    )
    with pytest.raises(ConfigError, match="activation must be one of int8"):
        TinyLMConfig(activation="int4")
    with pytest.raises(ConfigError, match="format_version 1 expected, found 2"):
        TinyLMConfig(format_version=2)
    config.rope_dim = 3
    with pytest.raises(ConfigError, match="rope_dim must be even"):
        config.to_model_config()


@torch.no_grad()
def test_resized_vocabulary(tmp_path: Path, batch: RaggedBatch) -> None:
    wrapped = TinyLMForCausalLM.from_tinylm(make_model(seed=3))
    before = wrapped(batch.input_ids).logits
    wrapped.resize_token_embeddings(520, mean_resizing=False)
    after = wrapped(batch.input_ids).logits
    assert after.shape == (4, 24, 520)
    LOGITS.assert_close(after[..., :512], before)
    wrapped.save_pretrained(tmp_path)
    loaded = TinyLMForCausalLM.from_pretrained(tmp_path)
    assert loaded.model.config.vocab_size == 520
    assert_equal(loaded(batch.input_ids).logits, after)


def test_what_is_not_available_is_refused(wrapped: TinyLMForCausalLM) -> None:
    ids = torch.zeros(2, 4, dtype=torch.long)
    for arguments, message in (
        ({"output_attentions": True}, "output_attentions: not available"),
        ({"output_hidden_states": True}, "output_hidden_states: not available"),
        ({"position_ids": ids}, "position_ids: not available.*counts positions itself"),
        ({"attention_mask": torch.ones(2, 5)}, r"expected attention_mask \[2, 4\], found \[2, 5\]"),
        ({CACHE: DynamicCache()}, "expected a TinyLMCache.*found DynamicCache"),
        ({"labels": ids, "logits_to_keep": 1}, "labels need all logits"),
        ({"input_ids": None}, r"expected input_ids \[batch, length\], found none"),
    ):
        with pytest.raises(ValueError, match=message):
            wrapped(**{"input_ids": ids, **arguments})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def text_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer."""
    tokenizer = load_tokenizer(inputs().tokenizer)
    model = make_model(
        seed=5,
        tie_embeddings=False,
        vocab_size=len(tokenizer),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return save_model(tmp_path_factory.mktemp("hf") / "checkpoint", model, tokenizer=tokenizer)


def test_text_generation_pipeline(text_directory: Path) -> None:
    generator = pipeline("text-generation", model=str(text_directory))
    assert type(generator.model) is TinyLMForCausalLM
    tokenizer, model = load_tokenizer(text_directory), TinyLM.from_pretrained(text_directory)
    prompts = ["def __init__(self", "The", "Return the number of rows of"]
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "return_full_text": False}
    alone = [generator(prompt, **options)[0]["generated_text"] for prompt in prompts]
    for prompt, text in zip(prompts, alone, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        expected = model.generate(ids, max_new_tokens=12)[0]
        whole = tokenizer.decode(expected, skip_special_tokens=True)
        start = tokenizer.decode(ids[0], skip_special_tokens=True)
        assert text == whole[len(start) :]
    for side in ("left", "right"):
        generator.tokenizer.padding_side = side
        together = generator(prompts, batch_size=3, **options)
        assert [rows[0]["generated_text"] for rows in together] == alone


def test_auto_tokenizer_encodes_as_ours(text_directory: Path) -> None:
    ours, theirs = load_tokenizer(text_directory), AutoTokenizer.from_pretrained(text_directory)
    for text in ("Hello", " Hello", "a\n  b = 12345", "</s>"):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
