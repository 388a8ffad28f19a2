"""Give logits at every position where the graph gives them at each row's last one."""

from __future__ import annotations

import onnx_ir as ir

from tinylm.errors import ExportError
from tinylm_export.graph_builder import GraphBuilder
from tinylm_export.model_graph import F32, SELECT_LAST, add_all_logits
from tinylm_export.ops import INT8_LINEAR


def expose_all_logits(model: ir.Model) -> ir.Model:
    """Rewrite ``logits`` [B, V] to [B, S, V], in place, and return the model.

    Pattern: ``norm -> GatherND "last_token" -> Gemm "lm_head" -> logits``, or the same with an
    Int8Linear "lm_head", whose input is not normed yet. A graph that gives all
    logits already is left as it is.

    Raises:
        ExportError: The graph has neither form; says what was found.
    """
    graph = model.graph
    nodes = {node.name or "": node for node in graph}
    logits = graph.outputs[0]
    if logits.name != "logits" or logits.shape is None:
        raise ExportError(f"expected the first output to be logits, found {logits.name!r}.")
    if len(logits.shape) == 3:
        return model
    select, head = nodes.get(SELECT_LAST), nodes.get("lm_head")
    if select is None or head is None or head.outputs[0] is not logits:
        raise ExportError(
            f"expected nodes {SELECT_LAST!r} and 'lm_head' before logits, found "
            f"{', '.join(list(nodes)[-4:])}. Export the checkpoint again."
        )
    hidden, weight = select.inputs[0], head.inputs[1]
    assert hidden is not None and weight is not None and weight.shape is not None
    vocab_size, hidden_size = (int(size) for size in weight.shape.numpy())

    tail = GraphBuilder("tail")
    logits.name = "last_logits"
    if head.op_type == INT8_LINEAR.name:
        inputs = [hidden, *(value for value in head.inputs[1:] if value is not None)]
        out: list[int | str] = ["batch", "length", vocab_size]
        eps = head.attributes["eps"].as_float()
        new = tail.custom(INT8_LINEAR.name, inputs, "lm_head", [(F32, out)], eps=eps)[0]
    else:
        new = add_all_logits(tail, hidden, weight, hidden_size, vocab_size)
    new.name = "logits"
    graph.outputs[0] = new
    doomed = [n for name, n in nodes.items() if n is head or name.startswith(SELECT_LAST)]
    graph.remove(doomed, safe=True)
    graph.extend(tail.take_nodes())
    for name, value in tail.take_initializers().items():
        graph.initializers[name] = value
    return model
