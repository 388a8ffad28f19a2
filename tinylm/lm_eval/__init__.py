"""TinyLM for EleutherAI's lm-evaluation-harness, as the model ``tinylm``.

    python -m tinylm.lm_eval run --model tinylm --model_args pretrained=DIR --tasks ...

``DIR`` is a checkpoint, a training run, or what another installed runtime opens: with
``tinylm_export`` an ONNX directory. In a program, importing this package registers the model.
"""

from __future__ import annotations

try:
    import lm_eval as _harness  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"lm-evaluation-harness can't be imported ({error}). Run `pip install 'tinylm[eval]'`."
    ) from error

from tinylm.lm_eval.adapter import TinyLMHarness
from tinylm.lm_eval.runtime import Runtime, TorchRuntime, open_runtime

__all__ = ["Runtime", "TinyLMHarness", "TorchRuntime", "open_runtime"]
