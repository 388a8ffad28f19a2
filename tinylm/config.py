"""The model's configuration: one frozen dataclass and one JSON schema from checkpoint to C++."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from tinylm.errors import ConfigError

Activation = Literal["int8", "fp8_e4m3"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)

MODEL_TYPE = "tinylm"
FORMAT_VERSION = 1
# Packing puts four ternary codes into a byte along K, so every BitLinear input is a multiple of 4.
PACK_LANES = 4


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _is_finite_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def float32(value: float) -> float:
    """Round to float32, which is what an ONNX attribute and a C++ kernel hold."""
    return float(np.float32(value))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """What FlashMLA needs to know beside its tensors; the attributes of ``tinylm::FlashMLA``.

    Attributes:
        num_heads: H.
        nope_dim: Query-key dimensions per head without position.
        rope_dim: P, query-key dimensions per head with rotary position.
        value_dim: Dv, value dimensions per head.
        theta: Base of the rotary frequencies.
        eps: Added to the mean square in the latent's RMSNorm, a float32 number.
        softmax_scale: Factor on the scores, a float32 number.
    """

    num_heads: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    theta: float
    eps: float
    softmax_scale: float

    @property
    def qk_dim(self) -> int:
        """Query-key width of one head: ``nope_dim + rope_dim``."""
        return self.nope_dim + self.rope_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of a TinyLM.

    Fields that are ``None`` are derived from the others when the object is made, so that a
    finished config never holds ``None`` except for token ids that are not known yet.

    Attributes:
        vocab_size: Number of rows of the embedding table.
        hidden_size: Width of the residual stream.
        num_layers: Number of decoder layers.
        num_heads: Number of attention heads.
        max_seq_len: Longest sequence, prompt and generated tokens together.
        dropout: Probability of dropping an activation after the embedding and after each
            residual branch; used in training only.
        intermediate_size: Width of the SwiGLU feed-forward. Default: 8/3 of ``hidden_size``,
            rounded up to a multiple of 256 (Llama's rule).
        latent_rank: Width of the compressed key-value latent. Default: ``hidden_size / 4``.
        nope_dim: Query-key dimensions per head without position. Default: half a head.
        rope_dim: Query-key dimensions per head with rotary position. Default: half a head.
        value_dim: Value dimensions per head. Default: a whole head.
        rope_theta: Base of the rotary frequencies.
        norm_eps: Added to the mean square in every RMSNorm.
        tie_embeddings: Whether the head shares the embedding's weight.
        activation: Number format of BitLinear activations. The latent is int8 in either case.
        dense: Whether plain linear layers stand in place of BitLinear: a twin to compare with,
            which can't be exported.
        initializer_range: Standard deviation of the initial embedding (and head). Default:
            ``hidden_size ** -0.5``, which gives initial logits a variance of 1.
        bos_token_id: First token of a document, if the tokenizer has one.
        eos_token_id: Token that ends a document.
        pad_token_id: Token that fills short rows.

    Raises:
        ConfigError: A value is out of range or does not fit the others.
    """

    vocab_size: int = 50257
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    max_seq_len: int = 2048
    dropout: float = 0.1
    intermediate_size: int = None  # type: ignore[assignment]
    latent_rank: int = None  # type: ignore[assignment]
    nope_dim: int = None  # type: ignore[assignment]
    rope_dim: int = None  # type: ignore[assignment]
    value_dim: int = None  # type: ignore[assignment]
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    activation: Activation = "int8"
    dense: bool = False
    initializer_range: float = None  # type: ignore[assignment]
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "max_seq_len"):
            self._require_positive_int(name)
        self._derive_defaults()
        for name in ("intermediate_size", "latent_rank", "nope_dim", "rope_dim", "value_dim"):
            self._require_positive_int(name)
        self._check()

    def _require_positive_int(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be a positive integer, found {value!r}.")

    def _derive_defaults(self) -> None:
        def default(name: str, value: int) -> None:
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

        default("intermediate_size", _round_up(self.hidden_size * 8 // 3, 256))
        default("initializer_range", self.hidden_size**-0.5)
        default("latent_rank", _round_up(self.hidden_size // 4, PACK_LANES))
        if None in (self.nope_dim, self.rope_dim, self.value_dim):
            if self.hidden_size % self.num_heads:
                raise ConfigError(
                    f"hidden_size must be a multiple of num_heads, found {self.hidden_size} and "
                    f"{self.num_heads}. Change one, or give nope_dim, rope_dim and value_dim."
                )
            head_dim = self.hidden_size // self.num_heads
            default("value_dim", head_dim)
            default("rope_dim", head_dim // 2 // 2 * 2)
            default("nope_dim", head_dim - self.rope_dim)

    def _check(self) -> None:
        if self.rope_dim % 2:
            raise ConfigError(f"rope_dim must be even (half rotation), found {self.rope_dim}.")
        attention_width = self.num_heads * self.value_dim
        for name, width in {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "latent_rank": self.latent_rank,
            "num_heads * value_dim": attention_width,
        }.items():
            if width % PACK_LANES:
                raise ConfigError(
                    f"{name} must be a multiple of {PACK_LANES}, because packed weights hold "
                    f"{PACK_LANES} codes a byte; found {width}."
                )
        if not _is_finite_number(self.dropout) or not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout must be a number in [0, 1), found {self.dropout!r}.")
        for name in ("rope_theta", "norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not _is_finite_number(value) or value <= 0.0:
                raise ConfigError(f"{name} must be a positive number, found {value!r}.")
        for name in ("tie_embeddings", "dense"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, found {getattr(self, name)!r}.")
        if self.activation not in ACTIVATIONS:
            raise ConfigError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, found {self.activation!r}."
            )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            token = getattr(self, name)
            if token is None:
                continue
            is_int = isinstance(token, int) and not isinstance(token, bool)
            if not is_int or not 0 <= token < self.vocab_size:
                raise ConfigError(
                    f"{name} must be an integer from 0 to below vocab_size {self.vocab_size}, "
                    f"found {token!r}."
                )

    @property
    def attention_shape(self) -> AttentionShape:
        """Head sizes and constants of attention; ``softmax_scale`` is 1 / sqrt(nope + rope)."""
        return AttentionShape(
            num_heads=self.num_heads,
            nope_dim=self.nope_dim,
            rope_dim=self.rope_dim,
            value_dim=self.value_dim,
            theta=float32(self.rope_theta),
            eps=float32(self.norm_eps),
            softmax_scale=float32((self.nope_dim + self.rope_dim) ** -0.5),
        )

    def replace(self, **changes: Any) -> ModelConfig:
        """Return a copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object that ``config.json`` holds."""
        values = dataclasses.asdict(self)
        if not self.dense:  # no part of the schema that C++ and exported models share
            del values["dense"]
        return {"model_type": MODEL_TYPE, "format_version": FORMAT_VERSION, **values}

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, source: str = "config") -> ModelConfig:
        """Make a config from a ``config.json`` object.

        Args:
            values: The decoded JSON object.
            source: Where it came from, for error messages.

        Raises:
            ConfigError: Another model type, a newer format, an unknown field, or a value that is
                out of range.
        """
        values = dict(values)
        model_type = values.pop("model_type", MODEL_TYPE)
        if model_type != MODEL_TYPE:
            raise ConfigError(f"{source}: model_type must be {MODEL_TYPE!r}, found {model_type!r}.")
        version = values.pop("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise ConfigError(
                f"{source}: format_version {FORMAT_VERSION} expected, found {version}. "
                "Use the TinyLM version that wrote it, or export it again."
            )
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(
                f"{source}: unknown field {', '.join(unknown)}. Known: {', '.join(sorted(known))}."
            )
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from error

    def save(self, path: Path) -> None:
        """Write ``config.json``."""
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> ModelConfig:
        """Read ``config.json``.

        Raises:
            ConfigError: The file is missing, is not JSON, or does not hold a valid config.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ConfigError(
                f"{path}: not found. A TinyLM directory holds config.json beside its weights."
            ) from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not valid JSON ({error}).") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: expected a JSON object, found {type(values).__name__}.")
        return cls.from_dict(values, source=str(path))


PRESETS: dict[str, ModelConfig] = {
    "tinylm-300m": ModelConfig(
        vocab_size=32000,
        hidden_size=1024,
        num_layers=24,
        num_heads=16,
        intermediate_size=2816,
        latent_rank=256,
        max_seq_len=2048,
        dropout=0.0,
    ),
    "tinylm-demo": ModelConfig(
        vocab_size=4096,
        hidden_size=256,
        num_layers=4,
        num_heads=4,
        intermediate_size=704,
        latent_rank=64,
        max_seq_len=256,
        dropout=0.0,
    ),
    "tinylm-test": ModelConfig(
        vocab_size=512,
        hidden_size=64,
        num_layers=2,
        num_heads=2,
        intermediate_size=176,
        latent_rank=32,
        max_seq_len=64,
        dropout=0.0,
    ),
}


def preset(name: str) -> ModelConfig:
    """Return a named preset.

    Raises:
        ConfigError: No preset has that name.
    """
    try:
        return PRESETS[name]
    except KeyError:
        raise ConfigError(f"unknown preset {name!r}. Presets: {', '.join(PRESETS)}.") from None
