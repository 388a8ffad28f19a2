"""TinyLM as a transformers model: the same modules behind transformers' interface."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from tinylm.checkpoint import check_intact
from tinylm.directory import SUMS_FILE
from tinylm.errors import CheckpointError
from tinylm.huggingface.cache import TinyLMCache
from tinylm.huggingface.configuration import TinyLMConfig
from tinylm.model import TinyLM

_log = logging.getLogger(__name__)
_OUTPUT_FIELDS = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
# transformers renamed past_key_values to cache during version 5.
CACHE = "cache" if "cache" in _OUTPUT_FIELDS else "past_key_values"
_LOSS_ARGUMENTS = {"num_items_in_batch"}


class TinyLMForCausalLM(PreTrainedModel, GenerationMixin):
    """:class:`tinylm.model.TinyLM` for ``generate``, pipelines and trainers of transformers.

    Logits equal the model's own bit for bit. Padding may stand on either side, in ``forward`` and
    in ``generate``; positions count the real tokens only.

    Args:
        config: The configuration.
        model: A model of that configuration to wrap; default a new one with random weights.

    Example:
        >>> model = TinyLMForCausalLM.from_pretrained("run/best")
        >>> model.generate(**tokenizer("The function", return_tensors="pt"), max_new_tokens=20)
    """

    config_class = TinyLMConfig
    base_model_prefix = "model"  # so that TinyLM's own checkpoints, without prefix, load as well
    main_input_name = "input_ids"
    _tied_weights_keys = {  # noqa: RUF012 (transformers' own)
        "model.lm_head.weight": "model.embed_tokens.weight"
    }
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012

    def __init__(self, config: TinyLMConfig, model: TinyLM | None = None) -> None:
        super().__init__(config)
        self.model = TinyLM.from_config(config.to_model_config()) if model is None else model
        self.post_init()

    @classmethod
    def from_tinylm(cls, model: TinyLM) -> TinyLMForCausalLM:
        """Wrap a model, which is shared and not copied; the mode stays as it is."""
        return cls(TinyLMConfig.from_model_config(model.config), model).train(model.training)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any
    ) -> Any:
        """Load a directory that ``save_pretrained`` wrote, or a checkpoint of TinyLM.

        Takes what transformers takes. Where transformers would fill a gap with random weights,
        this raises.

        Raises:
            CheckpointError: A checkpoint's file is altered, or tensors are missing, unknown or of
                another shape.
        """
        source = pretrained_model_name_or_path
        wants_info = kwargs.pop("output_loading_info", False)
        if source is not None and (Path(source) / SUMS_FILE).is_file():
            check_intact(Path(source))
        loaded: Any = super().from_pretrained(
            source, *model_args, output_loading_info=True, **kwargs
        )
        model, info = loaded
        for key, problem in {
            "missing_keys": "no tensor",
            "unexpected_keys": "unknown tensor",
            "mismatched_keys": "tensor of another shape",
        }.items():
            names = sorted(str(name) for name in info.get(key) or ())
            if names and not (key == "mismatched_keys" and kwargs.get("ignore_mismatched_sizes")):
                raise CheckpointError(
                    f"{source}: {problem} {names[0]} ({len(names)} such). The weights don't belong "
                    "to the config.json beside them: convert or copy the directory again."
                )
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Write the directory that transformers expects.

        Raises:
            CheckpointError: ``save_directory`` is a checkpoint of TinyLM, whose checksums would no
                longer hold.
        """
        if (Path(save_directory) / SUMS_FILE).is_file():
            raise CheckpointError(
                f"{save_directory}: expected another directory, found a checkpoint of TinyLM with "
                f"{SUMS_FILE}. Choose another one; `tinylm convert` turns it into a checkpoint."
            )
        return super().save_pretrained(save_directory, *args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        # A TinyLM draws its weights when it is made; only a resized embedding or head is new here.
        if module not in (self.model.embed_tokens, self.model.lm_head):
            self.model._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.model.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.model.lm_head = new_embeddings

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Change the size of the vocabulary."""
        embedding = super().resize_token_embeddings(*args, **kwargs)
        self.model.config = self.config.to_model_config()
        return embedding

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: TinyLMCache | None = None,
        past_key_values: TinyLMCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Compute next-token logits.

        Args:
            input_ids: Integer [B, S].
            attention_mask: [B, S], or [B, cached + S] with a cache; nonzero for real tokens.
            cache: Past tokens, from an earlier output.
            past_key_values: The same under transformers' older name.
            labels: int64 [B, S], usually ``input_ids``; -100 is ignored. They are shifted here.
            use_cache: Make a cache if none is given. Default: no.
            logits_to_keep: 0 for all positions. 1 gives the logits after each row's last real
                token, wherever padding stands; n > 1 or indices give these columns.
            return_dict: Default the config's.
            output_attentions: Not available.
            output_hidden_states: Not available.
            **kwargs: ``num_items_in_batch`` for the loss.

        Returns:
            Loss, logits [B, S or kept, V] and the cache.

        Raises:
            ValueError: Wrong shapes, a foreign cache, something that is not available, or more
                tokens than the context holds.
        """
        _refuse({"output_attentions": output_attentions}, "FlashMLA keeps no attention weights")
        _refuse({"output_hidden_states": output_hidden_states}, "TinyLM returns logits only")
        foreign = {name: value for name, value in kwargs.items() if name not in _LOSS_ARGUMENTS}
        _refuse(foreign, "TinyLM takes input_ids and attention_mask and counts positions itself")
        if input_ids is None or input_ids.ndim != 2:
            found = "none" if input_ids is None else f"{list(input_ids.shape)}"
            raise ValueError(f"expected input_ids [batch, length], found {found}.")
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = TinyLMCache(self.model.config)
        mask = _newest_columns(attention_mask, input_ids, cache)
        logits = self._logits(input_ids, mask, cache, logits_to_keep)
        loss = None
        if labels is not None:
            if not isinstance(logits_to_keep, int) or logits_to_keep != 0:
                raise ValueError("labels need all logits; leave logits_to_keep at 0.")
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        values: dict[str, Any] = {"loss": loss, "logits": logits, CACHE: cache}
        output = CausalLMOutputWithPast(**values)
        as_object = self.config.return_dict if return_dict is None else return_dict
        return output if as_object else output.to_tuple()

    def _logits(
        self,
        input_ids: Tensor,
        mask: Tensor | None,
        cache: TinyLMCache | None,
        logits_to_keep: int | Tensor,
    ) -> Tensor:
        """Run the model over its cache and keep some of the logits: [B, kept, V]."""
        latents = None
        if cache is not None:
            batch, length = input_ids.shape
            latents = cache.make_room(batch, length, like=self.model.embed_tokens.weight)
        if isinstance(logits_to_keep, int) and logits_to_keep == 1:
            logits = self.model.last_logits(input_ids, mask, cache=latents)[:, None]
        else:
            logits = self.model(input_ids, mask, cache=latents)
            if isinstance(logits_to_keep, Tensor):
                logits = logits[:, logits_to_keep]
            elif logits_to_keep:
                logits = logits[:, -logits_to_keep:]
        if cache is not None:
            cache.count(torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask != 0)
        return logits

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # not one of keys and values

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Give ``generate`` a latent cache, unless the caller has one or wants none."""
        prepare: Any = GenerationMixin._prepare_cache_for_generation
        result = prepare(self, generation_config, model_kwargs, *args, **kwargs)
        if model_kwargs.get(CACHE) is None and generation_config.use_cache is not False:
            model_kwargs[CACHE] = TinyLMCache(self.model.config)
        return result

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Choose what one step of ``generate`` feeds: the tokens that the cache does not hold.

        Raises:
            ValueError: The cache holds all of them.
        """
        cache = kwargs.get(CACHE)
        whole = attention_mask is not None and attention_mask.shape[1] == input_ids.shape[1]
        if next_sequence_length is None and cache is not None and whole:
            next_sequence_length = input_ids.shape[1] - cache.get_seq_length()
        if next_sequence_length is not None:
            if next_sequence_length < 1:
                raise ValueError(
                    f"the cache holds all {input_ids.shape[1]} tokens of input_ids already. Give "
                    "at least one more, or no cache."
                )
            input_ids = input_ids[:, -next_sequence_length:]
        return {
            "input_ids": input_ids.contiguous(),
            "attention_mask": attention_mask,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            CACHE: cache,
        }

    def _prepare_generated_length(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        """End a text with the context, as ``tinylm generate`` does."""
        prepare: Any = GenerationMixin._prepare_generated_length
        generation_config = prepare(self, generation_config, *args, **kwargs)
        context = self.config.max_seq_len
        if generation_config.max_length > context:
            _log.warning(
                "max_length %d is more than the context of %d tokens; the text ends there.",
                generation_config.max_length,
                context,
            )
            generation_config.max_length = context
        return generation_config


def _refuse(arguments: dict[str, Any], reason: str) -> None:
    """Raise for arguments that are set and would do nothing."""
    given = sorted(
        name for name, value in arguments.items() if value is not None and value is not False
    )
    if given:
        raise ValueError(f"{', '.join(given)}: not available, because {reason}. Leave it out.")


def _newest_columns(
    attention_mask: Tensor | None, input_ids: Tensor, cache: TinyLMCache | None
) -> Tensor | None:
    """Return the mask of the new tokens [B, S] from one that may cover cached ones too."""
    if cache is not None and not isinstance(cache, TinyLMCache):
        raise ValueError(
            f"expected a TinyLMCache, because TinyLM keeps latents and no keys and values; found "
            f"{type(cache).__name__}. Pass none: use_cache=True makes one."
        )
    if attention_mask is None:
        return None
    batch, length = input_ids.shape
    past = 0 if cache is None else cache.get_seq_length()
    shape = tuple(attention_mask.shape)
    if shape not in ((batch, length), (batch, past + length)):
        raise ValueError(
            f"expected attention_mask [{batch}, {length}]"
            + (f" or [{batch}, {past + length}]" if past else "")
            + f", found {list(shape)}."
        )
    return attention_mask[:, shape[1] - length :]
