"""Fold the final norm and the choice of each row's last token into the head."""

from __future__ import annotations

import onnx_ir as ir

from tinylm_export.model_graph import SELECT_LAST
from tinylm_export.ops import DOMAIN
from tinylm_export.passes.rewrite import Rewrites, array_of, drop_unused

LM_HEAD = "LmHead"
_HEAD, _NORM, _SEQ_LENS = "lm_head", "norm", "seq_lens"


def fold_lm_head(model: ir.Model) -> Rewrites:
    """Replace the end of the graph by one LmHead, in place.

    Pattern: ``RMSNorm "norm" -> GatherND "last_token" -> Gemm "lm_head" -> logits``, which norms
    every token to use one a row. A graph that gives all logits, or has another op for a head, is
    left as it is.
    """
    graph, done = model.graph, Rewrites()
    nodes = {str(node.name): node for node in graph}
    head, select = nodes.get(_HEAD), nodes.get(SELECT_LAST)
    if head is None or select is None or head.op_type != "Gemm":
        return done
    hidden, weight, eps = _norm_of(select)
    if hidden is None or weight is None or eps is None:
        done.refused[_HEAD] = f"{SELECT_LAST!r} does not read an RMSNorm called {_NORM!r}"
        return done
    (seq_lens,) = (value for value in graph.inputs if value.name == _SEQ_LENS)
    new = ir.node(
        LM_HEAD,
        [hidden, head.inputs[1], weight, seq_lens],
        {"eps": eps},
        domain=DOMAIN,
        name=_HEAD,
    )
    logits = head.outputs[0]
    new.outputs[0].type, new.outputs[0].shape = logits.type, logits.shape
    ir.convenience.replace_nodes_and_values(graph, head, [head], [new], [logits], new.outputs)
    doomed = [n for name, n in nodes.items() if name.split(".")[0] in (_NORM, SELECT_LAST)]
    graph.remove(doomed, safe=True)
    drop_unused(graph)
    done.matched.append(_HEAD)
    return done


def _norm_of(select: ir.Node) -> tuple[ir.Value | None, ir.Value | None, float | None]:
    """Return input, weight and epsilon of the norm that a node reads."""
    value = select.inputs[0]
    product = None if value is None else value.producer()
    if product is None or product.op_type != "Mul" or product.name != _NORM:
        return None, None, None
    scaled, weight = product.inputs
    quotient = None if scaled is None else scaled.producer()
    if quotient is None or quotient.op_type != "Div":
        return None, None, None
    hidden, rms = quotient.inputs
    root = None if rms is None else rms.producer()
    mean = None if root is None or root.inputs[0] is None else root.inputs[0].producer()
    if root is None or root.op_type != "Sqrt" or mean is None or mean.op_type != "Add":
        return None, None, None
    return hidden, weight, float(array_of(mean.inputs[1], mean))
