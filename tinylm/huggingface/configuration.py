"""TinyLM's configuration as a transformers config."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import PretrainedConfig

from tinylm.config import FORMAT_VERSION, MODEL_TYPE, ModelConfig

_FIELDS = tuple(field.name for field in dataclasses.fields(ModelConfig))


class TinyLMConfig(PretrainedConfig):
    """The fields of :class:`tinylm.config.ModelConfig`, with transformers' own beside them.

    ``config.json`` always holds every field of the model, derived ones included: transformers
    would leave out those that equal a default, and a derived value depends on the others.

    Args:
        **kwargs: Fields of ``ModelConfig``, ``format_version``, and what transformers knows.

    Raises:
        ConfigError: A value is out of range, or a newer format.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012 (transformers' own)
    # transformers' names for the same things.
    attribute_map = {  # noqa: RUF012
        "max_position_embeddings": "max_seq_len",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "tie_word_embeddings": "tie_embeddings",
    }

    def __init__(self, **kwargs: Any) -> None:
        for theirs, ours in self.attribute_map.items():
            if theirs in kwargs:
                kwargs.setdefault(ours, kwargs.pop(theirs))
        values = {name: kwargs.pop(name) for name in _FIELDS if name in kwargs}
        values["format_version"] = kwargs.pop("format_version", FORMAT_VERSION)
        fields = dataclasses.asdict(ModelConfig.from_dict(values, source="TinyLMConfig"))
        # Handed over too: some versions set these from defaults of their own.
        kwargs["tie_word_embeddings"] = fields["tie_embeddings"]
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs[name] = fields[name]
        super().__init__(**kwargs)
        for name, value in fields.items():
            setattr(self, name, value)

    @classmethod
    def from_model_config(cls, config: ModelConfig) -> TinyLMConfig:
        """Make the transformers config of a model."""
        return cls(**dataclasses.asdict(config))

    def to_model_config(self) -> ModelConfig:
        """Return the model's own config, validated again.

        Raises:
            ConfigError: A field was changed to something out of range.
        """
        return ModelConfig(**{name: getattr(self, name) for name in _FIELDS})

    def to_dict(self) -> dict[str, Any]:
        """Return everything that JSON should hold."""
        return {**super().to_dict(), **self.to_model_config().to_dict()}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what ``config.json`` holds: every field of the model, others if not default."""
        return {**super().to_diff_dict(), **self.to_model_config().to_dict()}
