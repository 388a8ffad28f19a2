"""TinyLM for Hugging Face transformers.

Importing this package registers the model, so that afterwards ``AutoConfig``,
``AutoModelForCausalLM`` and ``pipeline("text-generation")`` load TinyLM directories, those that
:func:`to_huggingface` writes and TinyLM's own checkpoints.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM

from tinylm.huggingface.cache import TinyLMCache
from tinylm.huggingface.configuration import TinyLMConfig
from tinylm.huggingface.convert import from_huggingface, to_huggingface
from tinylm.huggingface.modeling import TinyLMForCausalLM

__all__ = [
    "TinyLMCache",
    "TinyLMConfig",
    "TinyLMForCausalLM",
    "from_huggingface",
    "to_huggingface",
]

AutoConfig.register(TinyLMConfig.model_type, TinyLMConfig)
AutoModelForCausalLM.register(TinyLMConfig, TinyLMForCausalLM)
