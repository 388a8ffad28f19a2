"""Parity as a table and as a picture."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tinylm_export.parity_nodes import engine_nodes
from tinylm_export.parity_report import (
    GenerationAgreement,
    HeadEffect,
    LogitAgreement,
    ParityReport,
    RuntimeReport,
)
from tinylm_export.tolerances import TOLERANCES, limit

_FLOOR = 1e-9  # where a difference of exactly zero stands on a logarithmic axis


def _verdict(passed: bool) -> Text:
    return Text("ok", style="green") if passed else Text("FAILED", style="bold red")


def render(report: ParityReport) -> RenderableType:
    """Return the report as rich tables."""
    parts: list[RenderableType] = [_logits_table(report)]
    for runtime in report.runtimes:
        if runtime.bit_linears:
            parts.append(_bit_linear_table(runtime))
        if runtime.layers:
            parts.append(_layer_line(runtime))
        parts += [_generation_line(runtime, texts) for texts in runtime.generation]
    if report.head is not None:
        parts.append(_head_line(report.head))
    return Group(*parts)


def _logits_table(report: ParityReport) -> Table:
    activation = report.model["activation"]
    table = Table(
        padding=(0, 0, 0, 1), title=f"Logits against PyTorch float32, {activation} activations"
    )
    for column in ("runtime", "phase"):
        table.add_column(column, no_wrap=True)
    for column in ("tokens", "max |Δ|", "mean |Δ|", "mean KL", "top-1", ""):
        table.add_column(column, justify="right")

    def row(name: str, agreement: LogitAgreement, verdict: Text) -> None:
        table.add_row(
            name,
            agreement.phase,
            f"{agreement.num_tokens:,}",
            f"{agreement.max_abs:.1e}",
            f"{agreement.mean_abs:.1e}",
            f"{agreement.mean_kl:.1e}",
            f"{agreement.top1_agreement:.2%}",
            verdict,
        )

    for runtime in report.runtimes:
        for agreement in runtime.logits:
            row(runtime.runtime, agreement, _verdict(agreement.passed))
        for agreement in runtime.own:
            row("  PyTorch's own", agreement, Text("-", style="dim"))
    table.add_section()
    row("PyTorch *", report.yardstick, Text("-", style="dim"))
    table.caption = (
        f"limits: max |Δ| {limit('max_abs_logit'):g}, mean KL {limit('mean_kl'):g}, "
        f"top-1 {limit('top1_agreement'):.1%}\n"
        "* yardstick: PyTorch with ordinary float32 arithmetic against itself"
    )
    for runtime in report.runtimes:
        table.caption += f"\n{runtime.runtime} {runtime.version}: {runtime.kernels}"
        if runtime.own:
            table.caption += (
                f"; limits: mean KL {limit('half_kl_ratio'):g} times PyTorch's own, top-1 "
                f"{limit('half_top1_drop'):.1%} and {limit('half_top1_errors'):g} standard errors "
                "below it"
            )
        elif runtime.logits[0].limits.max_abs is None:
            table.caption += "; max |Δ| not limited"
    return table


def _generation_line(runtime: RuntimeReport, texts: GenerationAgreement) -> Text:
    same = texts.num_prompts - len(texts.differences)
    line = (
        f"{runtime.runtime}: {same} of {texts.num_prompts} greedy texts of {texts.num_tokens} "
        f"tokens are {texts.other}'s"
    )
    for difference in texts.differences:
        gap = "not known" if difference.gap is None else f"{difference.gap:.1e}"
        line += (
            f"\n  prompt {difference.prompt}, new token {difference.position}: {texts.other} "
            f"{difference.expected}, found {difference.found}; top-2 logit gap {gap}"
        )
    return Text(line, style="" if texts.passed else "bold red")


def _bit_linear_table(runtime: RuntimeReport) -> Table:
    table = Table(title=f"Each BitLinear on PyTorch's input: {runtime.runtime}")
    table.add_column("layers", no_wrap=True)
    for column in ("activations", "flipped", "sums", "unequal", ""):
        table.add_column(column, justify="right")
    kinds: dict[str, list[int]] = {}
    for index, layer in enumerate(runtime.bit_linears):
        kinds.setdefault(layer.name.split(".", 2)[2], []).append(index)
    for kind, indices in kinds.items():
        layers = [runtime.bit_linears[i] for i in indices]
        total, flips = sum(x.num_activations for x in layers), sum(x.flips for x in layers)
        table.add_row(
            f"{len(layers)} x {kind.rpartition('.')[2]}",
            f"{total:,}",
            f"{flips:,}",
            f"{sum(x.num_accumulators for x in layers):,}",
            f"{sum(x.mismatches for x in layers):,}",
            _verdict(all(x.passed for x in layers)),
        )
    examples = [f"{x.name}: {e}" for x in runtime.bit_linears for e in x.examples]
    if examples:
        table.caption = "\n".join(examples[:5])
    return table


def _layer_line(runtime: RuntimeReport) -> Text:
    first = runtime.first_departure
    if first is not None:
        layer = next(x for x in runtime.layers if x.node == first)
        return Text(
            f"{runtime.runtime}: the first node that departs is {first}: max |Δ| "
            f"{layer.max_abs:.1e}, {layer.relative:.1e} of its largest value.",
            style="bold red",
        )
    equal = sum(layer.num_different == 0 for layer in runtime.layers)
    return Text(
        f"{runtime.runtime}: no node departs; {equal} of {len(runtime.layers)} node outputs equal "
        "PyTorch's bit for bit."
    )


def _head_line(head: HeadEffect) -> Text:
    return Text(
        f"PyTorch, float32 and int8 head, {head.num_tokens:,} tokens: loss {head.float32_loss:.5f} "
        f"and {head.int8_loss:.5f} nats, perplexity {head.float32_perplexity:.4f} and "
        f"{head.int8_perplexity:.4f} ({head.int8_perplexity - head.float32_perplexity:+.4f})."
    )


def plot(report: ParityReport, path: Path) -> None:
    """Write a picture of the difference of every node's output, in execution order.

    The first node above the limit, if there is one, is where to look for a fault.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    nodes = [layer.node for layer in report.runtimes[0].layers]
    fused = engine_nodes(report.model["num_layers"])
    width = min(24.0, max(9.0, 0.11 * len(nodes)))
    figure, axes = plt.subplots(figsize=(width, 5), layout="constrained")
    shown = [runtime for runtime in report.runtimes if runtime.layers]
    for runtime in shown:
        # A node of an engine stands where the first of those that it joins stands.
        places = [nodes.index(fused.get(x.node, (x.node,))[0]) for x in runtime.layers]
        if runtime is report.runtimes[0]:
            places = list(range(len(nodes)))
        relative = [max(layer.relative, _FLOOR) for layer in runtime.layers]
        axes.plot(places, relative, marker="o", markersize=3, linewidth=0.8, label=runtime.runtime)
        first = runtime.first_departure
        if first is not None:
            index = [layer.node for layer in runtime.layers].index(first)
            axes.annotate(
                f"first departure:\n{first}",
                (places[index], relative[index]),
                xytext=(0, 18),
                textcoords="offset points",
                ha="center",
                color="tab:red",
                arrowprops={"arrowstyle": "->", "color": "tab:red"},
            )
    departure = TOLERANCES["layer_departure"].limit
    axes.axhline(departure, color="tab:red", linewidth=0.8, linestyle="--", label="departure")
    axes.axhline(_FLOOR, color="gray", linewidth=0.8, linestyle=":", label="equal bit for bit")
    step = max(1, len(nodes) // 66)
    axes.set_xticks(range(0, len(nodes), step), nodes[::step], rotation=90, fontsize=6)
    axes.set_yscale("log")
    axes.set_ylim(_FLOOR / 3, max(1.0, *(x.relative for r in shown for x in r.layers)))
    axes.set_ylabel("max |difference| / max |value|")
    axes.set_title(
        f"Node outputs against PyTorch float32, {report.model['activation']} activations"
    )
    axes.legend(loc="upper left", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
