from __future__ import annotations

import warnings

import numpy as np
import pytest
import reference
import tolerances
import torch
from model_helpers import (
    ACTIVATIONS,
    RaggedBatch,
    Recording,
    hidden_states,
    make_model,
    ragged_batch,
)
from tolerances import LOGITS, assert_equal
from torch import Tensor, nn

import tinylm
from tinylm import BitLinear, ModelConfig, PackedBitLinear, TinyLM, preset
from tinylm.errors import ConfigError

# Which norm feeds which BitLinear (BitNet b1.58 2B4T), within one layer.
NORM_OF = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.kv_a_proj": "input_layernorm",
    "self_attn.kv_b_proj": "self_attn.kv_a_layernorm",
    "self_attn.o_proj": "self_attn.attn_sub_norm",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
    "mlp.down_proj": "mlp.ffn_sub_norm",
}


def test_specification_constructor() -> None:
    model = TinyLM(
        vocab_size=50257,
        hidden_size=768,
        num_layers=12,
        num_heads=12,
        max_seq_len=2048,
        dropout=0.1,
    )
    input_ids = torch.tensor([[15496, 995, 0], [50256, 1, 50256]])
    attention_mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    with torch.no_grad():
        logits = model(input_ids, attention_mask)
    assert logits.shape == (2, 3, 50257)
    assert logits.dtype == torch.float32
    assert bool(logits.isfinite().all())
    assert model.config == ModelConfig()
    assert len(model.layers) == 12
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.1}


def test_package_exports_and_defaults() -> None:
    assert set(tinylm.__all__) <= set(dir(tinylm)) | {"BitLinear", "PackedBitLinear", "TinyLM"}
    with torch.device("meta"):
        assert TinyLM(num_layers=1).config == ModelConfig(num_layers=1)
    with pytest.raises(AttributeError, match="no attribute 'TinyML'"):
        _ = tinylm.TinyML


def test_parameter_count_of_300m() -> None:
    with torch.device("meta"):
        model = TinyLM.from_config(preset("tinylm-300m"))
    assert 290e6 <= model.num_parameters() <= 320e6
    # By hand: the embedding once, per layer q, kv_a, kv_b, o, gate, up, down and the five norms.
    layer = 1024 * (1024 + 288 + 1024 + 3 * 2816) + 256 * 16 * 96 + 3 * 1024 + 256 + 2816
    assert model.num_parameters() == 32000 * 1024 + 24 * layer + 1024


def test_every_projection_is_a_bit_linear_and_nothing_has_a_bias(model: TinyLM) -> None:
    assert not [name for name, _ in model.named_parameters() if "bias" in name]
    assert not [name for name, _ in model.named_buffers()]
    assert [n for n, m in model.named_modules() if isinstance(m, nn.Linear)] == ["lm_head"]
    assert list(model.bit_linears()) == [f"layers.{i}.{name}" for i in range(2) for name in NORM_OF]


def test_embeddings_are_tied_or_not() -> None:
    tied = make_model()
    assert tied.lm_head.weight is tied.embed_tokens.weight
    untied = make_model(tie_embeddings=False)
    assert untied.lm_head.weight is not untied.embed_tokens.weight
    assert not torch.equal(untied.lm_head.weight, untied.embed_tokens.weight)
    assert untied.num_parameters() - tied.num_parameters() == 512 * 64


@pytest.mark.parametrize(
    "activation", ACTIVATIONS, ids=["other layers int8", "other layers fp8_e4m3"]
)
def test_latent_is_int8_under_both_formats(activation: str) -> None:
    for name, layer in make_model(activation=activation).bit_linears().items():
        assert layer.activation == ("int8" if "kv_b_proj" in name else activation)


@pytest.mark.parametrize("training", [True, False])
def test_every_bit_linear_input_is_rms_normed(model: TinyLM, training: bool) -> None:
    recording = Recording(model.train(training))
    model(ragged_batch().input_ids)
    for layer in ("layers.0", "layers.1"):
        for name, norm in NORM_OF.items():
            x = recording.inputs[f"{layer}.{name}"]
            assert_equal(x, recording.outputs[f"{layer}.{norm}"])
            weight = model.get_submodule(f"{layer}.{norm}").get_parameter("weight")
            assert weight.std() > 0.1, "the test needs norm weights that differ"
            rms = (x / weight).double().square().mean(dim=-1).sqrt()
            before = recording.inputs[f"{layer}.{norm}"].double().square().mean(dim=-1)
            tolerances.RMS.assert_close(rms, (before / (before + 1e-5)).sqrt())
    last = recording.inputs["lm_head"]
    assert_equal(last, recording.outputs["norm"])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("seed", range(3))
def test_inference_equals_the_formulas_bit_for_bit(activation: str, seed: int) -> None:
    model = make_model(seed, activation=activation)
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    ids = ragged_batch(seed, batch=2, length=40).input_ids[:1]
    expected = reference.hidden_states(ids[0].tolist(), weights, model.config)
    assert expected.dtype == np.float32
    assert_equal(hidden_states(model, ids)[0], torch.from_numpy(expected))
    head = torch.from_numpy(expected).double() @ model.lm_head.weight.detach().double().t()
    LOGITS.assert_close(model(ids).detach()[0], head)


def masks() -> dict[str, Tensor]:
    gaps = torch.tensor(
        [
            [1, 0, 1, 1, 0, 0, 1, 1],
            [0, 0, 1, 0, 1, 1, 1, 0],
            [1, 1, 1, 1, 1, 1, 1, 1],
            [0, 0, 0, 0, 0, 1, 0, 0],
        ]
    ).repeat(1, 3)
    right = ragged_batch(seed=1).attention_mask
    return {
        "right": right,
        "left": right.flip(1),
        "gaps": gaps,
        "right, an empty row": torch.cat([right[:3], torch.zeros_like(right[:1])]),
        "left, an empty row": torch.cat([torch.zeros_like(right[:1]), right.flip(1)[1:]]),
    }


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", masks())
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_padded_batch_equals_each_row_alone(activation: str, kind: str, dtype: torch.dtype) -> None:
    model, mask = make_model(seed=2, activation=activation), masks()[kind]
    ids = torch.randint(512, mask.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = model(ids, mask.to(dtype))
    hidden = hidden_states(model, ids, mask.to(dtype))
    assert bool(logits.isfinite().all())
    for row in range(mask.shape[0]):
        alone = ids[row, mask[row] == 1][None]
        if alone.shape[1] == 0:
            continue
        assert_equal(hidden[row, : alone.shape[1]], hidden_states(model, alone)[0])
        with torch.no_grad():
            LOGITS.assert_close(logits[row, mask[row] == 1], model(alone)[0])


def test_what_padding_holds_does_not_matter(model: TinyLM, batch: RaggedBatch) -> None:
    other = torch.where(batch.attention_mask == 1, batch.input_ids, 511 - batch.input_ids)
    real = batch.attention_mask == 1
    with torch.no_grad():
        for flip in (False, True):
            a, b, mask = batch.input_ids, other, batch.attention_mask
            if flip:
                a, b, mask, real = a.flip(1), b.flip(1), mask.flip(1), mask.flip(1) == 1
            assert_equal(model(a, mask)[real], model(b, mask)[real])


@pytest.mark.parametrize("cached", [False, True])
def test_last_logits_are_those_of_the_last_real_token(
    model: TinyLM, batch: RaggedBatch, cached: bool
) -> None:
    from tinylm.latent_cache import LatentCache

    cache = LatentCache(model.config, 4, 24) if cached else None
    with torch.no_grad():
        last = model.last_logits(batch.input_ids, batch.attention_mask, cache=cache)
        full = model(batch.input_ids, batch.attention_mask)
        for row, length in enumerate(batch.lens):
            LOGITS.assert_close(last[row], full[row, length - 1])
        LOGITS.assert_close(model.last_logits(batch.input_ids), model(batch.input_ids)[:, -1])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", ["auto", "plain"])
@pytest.mark.parametrize("masked", [True, False])
def test_later_tokens_never_move_earlier_logits(training: bool, backend: str, masked: bool) -> None:
    model = make_model(seed=8).train(training)
    model.set_attention_backend(backend)
    batch = ragged_batch(seed=8)
    ids, mask = batch.input_ids, batch.attention_mask if masked else None
    with torch.no_grad():
        before = model(ids, mask)
        for t in (1, 12, 23):
            changed = ids.clone()
            changed[:, t:] = 511 - changed[:, t:]
            after = model(changed, mask)
            assert_equal(after[:, :t], before[:, :t])
            row = batch.lens.index(24)  # and they do move the others
            assert bool((after[row, t:] != before[row, t:]).any(dim=-1).all())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backends_agree_bit_for_bit(activation: str, batch: RaggedBatch) -> None:
    model = make_model(seed=9, activation=activation)
    outputs = []
    for backend in ("sdpa", "plain", "auto"):
        model.set_attention_backend(backend)
        outputs.append(hidden_states(model, batch.input_ids, batch.attention_mask))
    assert_equal(outputs[1], outputs[0])
    assert_equal(outputs[2], outputs[0])


def test_number_of_threads_and_batch_shape_do_not_matter() -> None:
    model = make_model(seed=10, hidden_size=256, num_heads=4, latent_rank=128, vocab_size=512)
    ids = torch.randint(512, (4, 48), generator=torch.Generator().manual_seed(0))
    expected = hidden_states(model, ids)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert_equal(hidden_states(model, ids), expected)
    finally:
        torch.set_num_threads(threads)
    assert_equal(hidden_states(model, ids.flip(0)), expected.flip(0))
    assert_equal(hidden_states(model, ids[2:3, :31]), expected[2:3, :31])


def test_unknown_backend_lists_the_known_ones(model: TinyLM) -> None:
    known = "auto or one of flash, cudnn, sdpa, plain, found 'xformers'"
    with pytest.raises(ConfigError, match=known):
        model.set_attention_backend("xformers")


@pytest.mark.usefixtures("fresh_backends")
def test_asking_for_flash_on_a_cpu_warns_once_and_works(model: TinyLM, batch: RaggedBatch) -> None:
    expected = hidden_states(model, batch.input_ids)
    model.set_attention_backend("flash")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_equal(hidden_states(model, batch.input_ids), expected)
    assert len(caught) == 1
    assert "needs a CUDA device" in str(caught[0].message)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_packed_model_equals_unpacked_bit_for_bit(activation: str, batch: RaggedBatch) -> None:
    model = make_model(seed=11, activation=activation)
    with torch.no_grad():
        expected = model(batch.input_ids, batch.attention_mask)
        packed = model.train().pack()
        assert packed is model
        assert not packed.training
        assert packed.bit_linears() == {}
        assert sum(isinstance(m, PackedBitLinear) for m in packed.modules()) == 14
        assert_equal(packed(batch.input_ids, batch.attention_mask), expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tied", [True, False])
def test_gradient_reaches_every_parameter(training: bool, activation: str, tied: bool) -> None:
    model = make_model(seed=12, activation=activation, tie_embeddings=tied).train(training)
    batch = ragged_batch(seed=12)
    logits = model(batch.input_ids, batch.attention_mask)
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.input_ids[:, 1:].flatten()
    )
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        moved = parameter.grad.abs() > tolerances.SMALLEST_GRADIENT
        # An untied embedding gets gradients for the batch's tokens only.
        share = 0.1 if "embed_tokens" in name else 0.9
        assert moved.float().mean() > share, name


def test_gradients_of_both_modes_agree() -> None:
    """Evaluation with gradients differs from training by float64 sums only."""
    grads = []
    for training in (True, False):
        model = make_model(seed=13).train(training)
        logits = model(ragged_batch(seed=13).input_ids)
        logits.logsumexp(-1).sum().backward()
        parameters = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        grads.append(torch.cat(parameters))
    cosine = torch.nn.functional.cosine_similarity(grads[0], grads[1], dim=0)
    assert cosine > tolerances.MODE_GRADIENT_COSINE


def test_training_and_inference_give_near_logits(model: TinyLM, batch: RaggedBatch) -> None:
    with torch.no_grad():
        inference = model(batch.input_ids)
        training = model.train()(batch.input_ids)
    tolerances.TRAINING_LOGITS.assert_close(training, inference)


def test_bfloat16_autocast_is_near(model: TinyLM, batch: RaggedBatch) -> None:
    with torch.no_grad():
        expected = model(batch.input_ids, batch.attention_mask)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(batch.input_ids, batch.attention_mask)
    assert logits.dtype == torch.bfloat16
    real = batch.attention_mask == 1
    cosine = torch.nn.functional.cosine_similarity(logits.float()[real], expected[real], dim=-1)
    assert cosine.min() > tolerances.AUTOCAST_LOGIT_COSINE


def test_dropout_is_for_training_only() -> None:
    ids = ragged_batch().input_ids
    model = make_model(dropout=0.3)
    with torch.no_grad():
        assert_equal(model(ids), make_model(dropout=0.0)(ids))
        assert_equal(model(ids), model(ids))
        model.train()
        assert not torch.equal(model(ids), model(ids))
        torch.manual_seed(0)
        first = model(ids)
        torch.manual_seed(0)
        assert_equal(model(ids), first)
        assert_equal(make_model().train()(ids), make_model().train()(ids))


def test_from_config_keeps_every_field() -> None:
    config = ModelConfig(
        vocab_size=96,
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        max_seq_len=16,
        dropout=0.2,
        intermediate_size=40,
        latent_rank=12,
        nope_dim=6,
        rope_dim=10,
        value_dim=14,
        rope_theta=500.0,
        norm_eps=1e-6,
        tie_embeddings=False,
        activation="fp8_e4m3",
        initializer_range=0.01,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = TinyLM.from_config(config)
    assert model.config == config
    assert model(torch.zeros(1, 16, dtype=torch.long)).shape == (1, 16, 96)
    fields = config.to_dict()
    del fields["model_type"], fields["format_version"]
    assert TinyLM(**fields).config == config


def test_initial_weights_have_the_range_of_the_config() -> None:
    torch.manual_seed(0)
    model = TinyLM.from_config(preset("tinylm-test").replace(initializer_range=0.05))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            expected = 0.05 if "embed" in name else parameter.shape[1] ** -0.5
            assert float(parameter.detach().std()) == pytest.approx(expected, rel=0.1), name
        else:
            assert bool((parameter == 1).all()), name


def test_config_errors_reach_the_constructor() -> None:
    with pytest.raises(ConfigError, match="num_heads"):
        TinyLM(hidden_size=64, num_heads=3)
    with pytest.raises(TypeError, match="num_experts"):
        TinyLM(num_experts=8)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (torch.zeros(4, dtype=torch.long), None, r"integers \[batch, length\].*\[4\]"),
        (torch.zeros(1, 4), None, r"integers \[batch, length\].*float32"),
        (torch.zeros(1, 2, 3, dtype=torch.long), None, r"\[1, 2, 3\]"),
        (torch.zeros(1, 65, dtype=torch.long), None, "65 tokens.*max_seq_len = 64. Shorten"),
        (torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 5), r"\[2, 4\], found \[2, 5\]"),
        (torch.zeros(2, 4, dtype=torch.long), torch.ones(4), r"\[2, 4\], found \[4\]"),
    ],
)
def test_bad_inputs(model: TinyLM, ids: Tensor, mask: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(ids, mask)


def test_longest_input_and_int32_tokens(model: TinyLM) -> None:
    ids = torch.randint(512, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_equal(model(ids.int()), model(ids))


def test_bit_linears_are_the_modules_themselves(model: TinyLM) -> None:
    for name, layer in model.bit_linears().items():
        assert isinstance(layer, BitLinear)
        assert model.get_submodule(name) is layer
