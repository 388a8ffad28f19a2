"""Engines of one model on a GPU: size, parity, generation and speed.

    python benchmarks/trt_engines.py --work work --out benchmarks/results/gpu/engines_300m.json

The model is the 300M preset with random weights, or exported directories that are given. Parts run
one after the other, or one call each (``--part``), because they need different things: building
wants cores, ``bench`` a quiet GPU. Each leaves a JSON file in ``work``; ``--out`` joins them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from export_300m import export, in_own_process, make_checkpoint

DENSE = "dense-bf16"
ACTIVATIONS = {"int8": "int8", "fp8": "fp8_e4m3"}
NUM_RANDOM_TOKENS = 8192


class Kind(NamedTuple):
    """An engine to build."""

    activation: str
    dtype: str
    dense: bool = False


ENGINES = {
    **{f"int8-{dtype}": Kind("int8", dtype) for dtype in ("fp32", "bf16", "fp16")},
    **{f"fp8-{dtype}": Kind("fp8", dtype) for dtype in ("fp32", "bf16", "fp16")},
    DENSE: Kind("int8", "bf16", dense=True),
}


class Work:
    """The folder that the parts share.

    Args:
        folder: Where models, engines and results are.
        onnx: Exported directories by activation; default ones in the folder.
        text: Held-out JSON lines; default random tokens.
    """

    def __init__(self, folder: Path, onnx: dict[str, Path], text: Path | None) -> None:
        self.folder = folder
        self.onnx = {name: onnx.get(name, folder / f"onnx-{name}") for name in ACTIVATIONS}
        self._text = text

    def engine(self, name: str) -> Path:
        """Return the directory of an engine."""
        return self.folder / name

    def tokens(self, vocab_size: int) -> torch.Tensor:
        """Return held-out tokens."""
        if self._text is not None:
            from tinylm.data import load_corpus
            from tinylm.tokenizer import load_tokenizer

            corpus = load_corpus(self._text, load_tokenizer(self.onnx["int8"]))
            return torch.from_numpy(corpus.tokens[:].astype("int64"))
        generator = torch.Generator().manual_seed(5)
        return torch.randint(vocab_size, (NUM_RANDOM_TOKENS,), generator=generator)

    def save(self, part: str, values: dict[str, Any]) -> None:
        """Keep what a part found."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{part}.json"
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    def join(self, out: Path) -> None:
        """Write what all parts found into one file."""
        values = {
            path.stem: json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(self.folder.glob("*.json"))
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        whole = out.with_name(f".{out.name}-{os.getpid()}")  # several processes may join
        whole.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        whole.replace(out)


def export_model(work: Work) -> None:
    """Make the random model and export it with both number formats."""
    checkpoint = work.folder / "checkpoint"
    values = {"checkpoint": in_own_process(make_checkpoint, checkpoint)}
    for name, activation in ACTIVATIONS.items():
        values[name] = in_own_process(export, checkpoint, work.onnx[name], activation)
    work.save("export", values)


def build(work: Work, name: str, max_batch_size: int) -> None:
    """Build one engine and measure its file."""
    from tinylm_export.engine_tables import table_bytes, weight_copies
    from tinylm_export.to_engine import build_engine

    kind = ENGINES[name]
    onnx = work.onnx[kind.activation]
    manifest = build_engine(
        onnx,
        work.engine(name),
        dtype=kind.dtype,
        dense=kind.dense,
        max_batch_size=max_batch_size,
    )
    tables = table_bytes(work.engine(name), onnx)
    found = {
        "engine_bytes": manifest.engine_bytes,
        "table_bytes": tables,
        "layer_bytes": None if tables is None else manifest.engine_bytes - tables,
        "weight_copies": {} if kind.dense else weight_copies(work.engine(name), onnx),
        "tensorrt": manifest.tensorrt_version,
        "gpu": manifest.gpu,
    }
    work.save(f"build-{name}", found)


def parity(work: Work, activation: str, num_tokens: int) -> None:
    """Compare PyTorch, ONNX Runtime and every engine of an activation's that is there."""
    from tinylm.config import ModelConfig
    from tinylm_export.parity import run_parity

    config = ModelConfig.load(work.onnx[activation] / "config.json")
    engines = [
        work.engine(name)
        for name, kind in ENGINES.items()
        if kind.activation == activation and not kind.dense and work.engine(name).is_dir()
    ]
    report = run_parity(
        work.onnx[activation],
        work.tokens(config.vocab_size),
        num_tokens=num_tokens,
        engines=engines,
    ).to_dict()
    print("parity holds" if report["passed"] else "parity FAILED", flush=True)
    for runtime in report["runtimes"]:
        for name in ("bit_linears", "layers"):  # one entry a layer, all alike
            runtime[f"num_{name}"] = len(runtime.pop(name))
    work.save(f"parity-{activation}", report)


def generation(work: Work, engine: str, program: Path | None, prompts: int, tokens: int) -> None:
    """Compare greedy texts with ONNX Runtime's and the C++ program's."""
    from tinylm.config import ModelConfig
    from tinylm_export.generation_parity import GenerationSettings, compare_texts
    from tinylm_export.parity_batch import make_batch
    from tinylm_export.parity_trt import TrtRuntime

    onnx = work.onnx[ENGINES[engine].activation]
    config = ModelConfig.load(onnx / "config.json")
    batch = make_batch(work.tokens(config.vocab_size), 64, 64 * prompts)
    settings = GenerationSettings(num_prompts=prompts, max_new_tokens=tokens, program=program)
    runtime = TrtRuntime(work.engine(engine), onnx)
    found = compare_texts(runtime, onnx, batch, settings, None, lambda text, fraction: None)
    print("texts agree" if all(a.passed for a in found) else "texts DIFFER", flush=True)
    work.save(
        f"generation-{engine}",
        {a.other: {**dataclasses.asdict(a), "passed": a.passed} for a in found},
    )


def bench(work: Work, batch_sizes: list[int], prompt_lens: list[int], new_tokens: int) -> None:
    """Time the bf16 engine, the dense one and PyTorch in turns."""
    from tinylm_export.bench import run_bench
    from tinylm_export.bench_report import BenchSettings

    engines = [work.engine(name) for name in ("int8-bf16", DENSE)]
    found = {}
    for batch_size in batch_sizes:
        for prompt_len in prompt_lens:
            settings = BenchSettings(
                batch_size=batch_size,
                prompt_len=prompt_len,
                new_tokens=new_tokens,
                repeats=3,
                warmup=1,
            )
            report = run_bench(work.onnx["int8"], settings, runtimes=["pytorch"], engines=engines)
            values = report.to_dict()
            for name in ("directory", "checkpoint", "tokens"):  # of this machine only
                values.pop(name)
            found[f"batch {batch_size}, prompt {prompt_len}"] = values
            work.save("bench", found)


def main() -> None:
    """Run the parts and join what they found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for models and engines")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--part", action="append", help="part to run; default all, in order")
    parser.add_argument("--engine", action="append", choices=ENGINES, help="default all")
    parser.add_argument("--onnx-int8", type=Path, help="exported directory, instead of the 300M")
    parser.add_argument("--onnx-fp8", type=Path, help="the same with fp8 activations")
    parser.add_argument("--text", type=Path, help="held-out JSON lines; default random tokens")
    parser.add_argument("--max-batch-size", type=int, default=8, help="most rows of an engine")
    parser.add_argument("--num-tokens", type=int, default=2048, help="tokens for parity")
    parser.add_argument("--program", type=Path, help="tinylm-run, to compare its texts")
    parser.add_argument("--prompts", type=int, default=20, help="texts to generate")
    parser.add_argument("--text-tokens", type=int, default=256, help="tokens of each")
    parser.add_argument("--batch-size", type=int, action="append", help="for bench; default 1")
    parser.add_argument("--prompt-len", type=int, action="append", help="for bench; default 512")
    parser.add_argument("--new-tokens", type=int, default=64, help="for bench")
    arguments = parser.parse_args()
    given = {"int8": arguments.onnx_int8, "fp8": arguments.onnx_fp8}
    work = Work(arguments.work, {k: v for k, v in given.items() if v}, arguments.text)
    engines = arguments.engine or list(ENGINES)
    parts: dict[str, Callable[[], None]] = {}
    if not all(given.values()):
        parts["export"] = lambda: export_model(work)
    for engine in engines:
        parts[f"build-{engine}"] = lambda engine=engine: build(
            work, engine, arguments.max_batch_size
        )
    for activation in ACTIVATIONS:
        parts[f"parity-{activation}"] = lambda activation=activation: parity(
            work, activation, arguments.num_tokens
        )
    parts["generation"] = lambda: generation(
        work, "int8-fp32", arguments.program, arguments.prompts, arguments.text_tokens
    )
    parts["bench"] = lambda: bench(
        work, arguments.batch_size or [1], arguments.prompt_len or [512], arguments.new_tokens
    )
    parts["join"] = lambda: None  # writes --out alone
    for part in arguments.part or parts:
        if part not in parts:
            parser.error(f"--part must be one of {', '.join(parts)}, found {part!r}")
        print(part, flush=True)
        parts[part]()
        if arguments.out is not None:  # each time: a later part may fail
            work.join(arguments.out)


if __name__ == "__main__":
    main()
