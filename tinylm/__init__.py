"""TinyLM: a 1.58-bit language model from training text to ONNX Runtime and TensorRT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tinylm.config import PRESETS, ModelConfig, preset

if TYPE_CHECKING:
    from tinylm.bitlinear import BitLinear, PackedBitLinear
    from tinylm.model import TinyLM

__version__ = "0.1.0"
__all__ = ["PRESETS", "BitLinear", "ModelConfig", "PackedBitLinear", "TinyLM", "preset"]

_LAZY = {
    "TinyLM": "tinylm.model",
    "BitLinear": "tinylm.bitlinear",
    "PackedBitLinear": "tinylm.bitlinear",
}


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds; `tinylm --help` should not.
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'tinylm' has no attribute {name!r}")
