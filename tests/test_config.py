from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinylm import PRESETS, ModelConfig, preset
from tinylm.errors import ConfigError, TinyLMError


def test_defaults_are_those_of_the_specification() -> None:
    config = ModelConfig()
    assert (config.vocab_size, config.hidden_size, config.num_layers) == (50257, 768, 12)
    assert (config.num_heads, config.max_seq_len, config.dropout) == (12, 2048, 0.1)
    assert config.intermediate_size == 2048
    assert config.latent_rank == 192
    assert (config.nope_dim, config.rope_dim, config.value_dim) == (32, 32, 64)
    assert config.activation == "int8"
    assert None not in (config.intermediate_size, config.latent_rank, config.nope_dim)


def test_preset_300m_is_the_one_of_the_design() -> None:
    config = preset("tinylm-300m")
    assert (config.hidden_size, config.num_layers, config.num_heads) == (1024, 24, 16)
    assert (config.intermediate_size, config.latent_rank) == (2816, 256)
    assert (config.vocab_size, config.max_seq_len) == (32000, 2048)
    assert (config.nope_dim, config.rope_dim, config.value_dim) == (32, 32, 64)
    assert config.tie_embeddings


def test_unknown_preset_lists_the_known_ones() -> None:
    assert set(PRESETS) == {"tinylm-300m", "tinylm-demo", "tinylm-test"}
    with pytest.raises(ConfigError) as error:
        preset("tinylm-7b")
    for name in ("tinylm-7b", *PRESETS):
        assert name in str(error.value)


@pytest.mark.parametrize(("hidden", "expected"), [(96, 256), (384, 1024), (1024, 2816)])
def test_feed_forward_width_follows_llama(hidden: int, expected: int) -> None:
    assert ModelConfig(hidden_size=hidden, num_heads=4).intermediate_size == expected


@pytest.mark.parametrize(
    ("head_dim", "nope", "rope"), [(64, 32, 32), (20, 10, 10), (28, 14, 14), (12, 6, 6), (10, 6, 4)]
)
def test_heads_are_split_in_halves_with_an_even_rope(head_dim: int, nope: int, rope: int) -> None:
    config = ModelConfig(hidden_size=4 * head_dim, num_heads=4)
    assert (config.nope_dim, config.rope_dim, config.value_dim) == (nope, rope, head_dim)


def test_head_sizes_given_need_no_divisible_width() -> None:
    config = ModelConfig(hidden_size=64, num_heads=3, nope_dim=5, rope_dim=6, value_dim=8)
    assert config.attention_shape.qk_dim == 11


def test_attention_shape_holds_float32_numbers() -> None:
    shape = preset("tinylm-300m").attention_shape
    assert shape.softmax_scale == 0.125
    assert shape.theta == 10000.0
    assert shape.eps == float(np.float32(1e-5))
    odd = ModelConfig(nope_dim=20, rope_dim=32).attention_shape
    assert odd.softmax_scale == float(np.float32(1 / np.sqrt(52)))
    assert odd.qk_dim == 52


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size", 0, "hidden_size must be a positive integer, found 0"),
        ("num_layers", -1, "num_layers must be a positive integer, found -1"),
        ("vocab_size", 2.5, "vocab_size must be a positive integer, found 2.5"),
        ("num_heads", True, "num_heads must be a positive integer, found True"),
        ("max_seq_len", "64", "max_seq_len must be a positive integer, found '64'"),
        ("intermediate_size", 0, "intermediate_size must be a positive integer"),
        ("num_heads", 7, "hidden_size must be a multiple of num_heads, found 768 and 7"),
        ("hidden_size", 30, "hidden_size must be a multiple of"),
        ("intermediate_size", 102, "intermediate_size must be a multiple of 4"),
        ("latent_rank", 10, "latent_rank must be a multiple of 4"),
        ("rope_dim", 31, "rope_dim must be even"),
        ("dropout", 1.0, r"dropout must be a number in [0, 1), found 1.0"),
        ("dropout", -0.1, "dropout must be"),
        ("dropout", "0.1", "dropout must be a number in [0, 1), found '0.1'"),
        ("dropout", None, "dropout must be"),
        ("norm_eps", 0.0, "norm_eps must be a positive number, found 0.0"),
        ("norm_eps", float("nan"), "norm_eps must be a positive number"),
        ("rope_theta", float("inf"), "rope_theta must be a positive number"),
        ("initializer_range", "wide", "initializer_range must be a positive number"),
        ("activation", "int4", "activation must be one of int8, fp8_e4m3, found 'int4'"),
        ("tie_embeddings", "no", "tie_embeddings must be true or false, found 'no'"),
        ("eos_token_id", 50257, "eos_token_id must be an integer from 0 to below vocab_size 50257"),
        ("bos_token_id", -1, "bos_token_id must be an integer"),
        ("pad_token_id", "2", "pad_token_id must be an integer"),
        ("eos_token_id", [2], "eos_token_id must be an integer"),
    ],
)
def test_bad_values_are_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        ModelConfig(**{field: value})
    assert message in str(error.value)
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict({field: value}, source="some/config.json")
    assert str(error.value).startswith("some/config.json: ")
    assert message in str(error.value)


def test_attention_width_must_pack() -> None:
    with pytest.raises(ConfigError, match=r"num_heads \* value_dim must be a multiple of 4.*15"):
        ModelConfig(num_heads=3, value_dim=5)


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip_through_the_file(name: str, tmp_path: Path) -> None:
    config = preset(name).replace(
        bos_token_id=1, eos_token_id=2, activation="fp8_e4m3", tie_embeddings=False, nope_dim=12
    )
    path = tmp_path / "config.json"
    config.save(path)
    assert ModelConfig.load(path) == config
    values = json.loads(path.read_text(encoding="utf-8"))
    assert values["model_type"] == "tinylm"
    assert values["format_version"] == 1
    fields = {field.name for field in dataclasses.fields(ModelConfig)} - {"dense"}
    assert set(values) == fields | {"model_type", "format_version"}
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_config_cannot_be_changed_but_replaced() -> None:
    config = preset("tinylm-test")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_layers = 3  # type: ignore[misc]
    assert config.replace(num_layers=3).num_layers == 3
    assert config.num_layers == 2
    with pytest.raises(ConfigError, match="dropout"):
        config.replace(dropout=2.0)


def test_from_dict_leaves_its_argument_alone() -> None:
    values = preset("tinylm-test").to_dict()
    before = dict(values)
    ModelConfig.from_dict(values)
    assert values == before


def test_unknown_field_is_named_with_the_known_ones() -> None:
    values = preset("tinylm-test").to_dict() | {"num_experts": 8, "hiden_size": 64}
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict(values, source="model/config.json")
    message = str(error.value)
    assert message.startswith("model/config.json: unknown field hiden_size, num_experts.")
    assert "hidden_size" in message


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"model_type": "llama"}, ["model_type must be 'tinylm'", "'llama'"]),
        ({"format_version": 2}, ["format_version 1 expected, found 2", "export it again"]),
    ],
)
def test_other_formats(change: dict[str, Any], parts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(preset("tinylm-test").to_dict() | change), encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        ModelConfig.load(path)
    for part in (str(path), *parts):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "not found"),
        (b"", "not valid JSON"),
        (b'{"hidden_size": 64', "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[1, 2]", "expected a JSON object, found list"),
    ],
)
def test_unreadable_files(content: bytes | None, part: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        ModelConfig.load(path)
    assert str(path) in str(error.value)
    assert part in str(error.value)


def test_errors_are_value_errors() -> None:
    assert issubclass(ConfigError, TinyLMError)
    assert issubclass(TinyLMError, ValueError)
