"""Drop the bodies of TinyLM's ops, so that TensorRT's parser finds plugins in their place."""

from __future__ import annotations

import onnx_ir as ir

from tinylm_export.ops import DOMAIN
from tinylm_export.passes.rewrite import Rewrites


def drop_function_bodies(model: ir.Model) -> Rewrites:
    """Remove the functions of TinyLM's domain, in place; those of other domains stay.

    The parser would otherwise inline them, and run float64 ops that TensorRT lacks.
    """
    done = Rewrites()
    for identifier in list(model.functions):
        domain, name, _ = identifier
        if domain == DOMAIN:
            del model.functions[identifier]
            done.matched.append(name)
    return done
