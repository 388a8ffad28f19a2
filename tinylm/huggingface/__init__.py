"""TinyLM for Hugging Face transformers.

Importing this package registers the model, so that afterwards ``AutoConfig``,
``AutoModelForCausalLM`` and ``pipeline("text-generation")`` load TinyLM directories, those that
:func:`to_huggingface` writes and TinyLM's own checkpoints.
"""

from __future__ import annotations

import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from tinylm.errors import ConfigError

if int(transformers.__version__.split(".")[0]) < 5:
    raise ConfigError(
        f"tinylm.huggingface needs transformers 5.0 or newer, found {transformers.__version__}. "
        "Run `pip install 'transformers>=5'`."
    )

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
