"""Size, time and memory of exporting the 300M preset, and its parity with ONNX Runtime.

    python benchmarks/export_300m.py --out benchmarks/results/export_300m.json

The weights are random, because none of these figures depends on what the model has learned; the
norm weights are random too, so that no error hides behind a factor of one. Each step runs in a
process of its own, whose peak memory is what the operating system counted.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def in_own_process(function: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """Run a function in a fresh process; add its seconds and peak memory to what it returns."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (function, args))


def _measured(function: Callable[..., dict[str, Any]], args: tuple[Any, ...]) -> dict[str, Any]:
    started = time.perf_counter()
    result = function(*args)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": round(seconds, 2), "peak_gib": round(peak, 2), **result}


def make_checkpoint(directory: Path) -> dict[str, Any]:
    """Build the preset with random weights and save it."""
    from tinylm import TinyLM, preset
    from tinylm.checkpoint import save_model
    from tinylm.norm import RMSNorm

    torch.manual_seed(0)
    model = TinyLM.from_config(preset("tinylm-300m"))
    for module in model.modules():
        if isinstance(module, RMSNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    save_model(directory, model)
    return {"num_parameters": model.num_parameters()}


def export(checkpoint: Path, directory: Path, activation: str) -> dict[str, Any]:
    """Export, and count bits per ternary weight: everything in the file but the embedding."""
    from tinylm import preset
    from tinylm_export.to_onnx import export_onnx

    export_onnx(checkpoint, directory, activation=activation)  # type: ignore[arg-type]
    config = preset("tinylm-300m")
    sizes = {p.name: p.stat().st_size for p in directory.iterdir() if p.name.startswith("model")}
    embedding = 4 * config.vocab_size * config.hidden_size
    shape = config.attention_shape
    heads_out = shape.num_heads * shape.value_dim
    per_layer = (
        config.hidden_size * shape.num_heads * shape.qk_dim
        + config.hidden_size * (config.latent_rank + shape.rope_dim)
        + config.latent_rank * shape.num_heads * (shape.nope_dim + shape.value_dim)
        + heads_out * config.hidden_size
        + 3 * config.hidden_size * config.intermediate_size
    )
    ternary = config.num_layers * per_layer
    rest = sum(sizes.values()) - embedding
    return {
        "bytes": sizes,
        "embedding_bytes": embedding,
        "num_ternary_weights": ternary,
        "bits_per_ternary_weight": round(8 * rest / ternary, 4),
    }


def load_session(directory: Path) -> dict[str, Any]:
    """Start ONNX Runtime and do one step."""
    from tinylm_export.ort_session import OrtSession

    started = time.perf_counter()
    session = OrtSession(directory)
    ready = time.perf_counter() - started
    session.start(1, 16)
    session.step(torch.tensor([[1, 2, 3]]), torch.tensor([3]))
    return {"session_seconds": round(ready, 2)}


def parity(directory: Path, num_tokens: int) -> dict[str, Any]:
    """Compare with PyTorch on random tokens."""
    from tinylm_export.parity import run_parity

    tokens = torch.randint(
        0, 32000, (num_tokens + 256,), generator=torch.Generator().manual_seed(1)
    )
    report = run_parity(directory, tokens, num_tokens=num_tokens)
    values = report.to_dict()
    (runtime,) = values["runtimes"]
    return {
        "passed": values["passed"],
        "logits": runtime["logits"],
        "yardstick": values["yardstick"],
        "flips": sum(layer["flips"] for layer in runtime["bit_linears"]),
        "num_activations": sum(layer["num_activations"] for layer in runtime["bit_linears"]),
        "unequal_sums": sum(layer["mismatches"] for layer in runtime["bit_linears"]),
        "equal_nodes": sum(layer["num_different"] == 0 for layer in runtime["layers"]),
        "num_nodes": len(runtime["layers"]),
        "first_departure": runtime["first_departure"],
    }


def main() -> None:
    """Run every step and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens for parity; 0 skips it")
    arguments = parser.parse_args()
    from tinylm_export.parity import describe_machine

    results: dict[str, Any] = {"machine": describe_machine()}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        results["checkpoint"] = in_own_process(make_checkpoint, checkpoint)
        for activation in ("int8", "fp8_e4m3"):
            directory = Path(folder) / activation
            entry = results[activation] = {
                "export": in_own_process(export, checkpoint, directory, activation),
                "session": in_own_process(load_session, directory),
            }
            if arguments.tokens:
                entry["parity"] = in_own_process(parity, directory, arguments.tokens)
            print(activation, json.dumps(entry, indent=2), flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
