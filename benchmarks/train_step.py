"""Time of a training step: the ternary model beside its dense twin, in turns, in one process.

Each variant of settings trains both on the same random tokens, forward to optimiser. Before
anything is timed, the loss of the fast path is compared with the plain one's. MFU is that of
``tinylm.throughput``; the causal figure counts half of attention's square.

Example: python benchmarks/train_step.py --variant compile --variant compile-cudnn --out step.json
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tinylm import TinyLM
from tinylm.config import PRESETS, ModelConfig, preset
from tinylm.device import choose_device, precision_context
from tinylm.losses import sum_loss
from tinylm.optim import build_optimizer, clip_gradients, step_if_finite
from tinylm.performance import apply_performance, without_compilation
from tinylm.throughput import flops_per_token, peak_flops, peak_memory_bytes
from tinylm.training_config import PRECISIONS, OptimizerConfig, PerformanceConfig
from tinylm_export.bench_report import Spread
from tinylm_export.machine import describe_machine

VARIANTS: dict[str, dict[str, Any]] = {
    "eager": {"quantizers": "torch"},
    "triton": {"quantizers": "triton"},
    "triton-cudnn": {"quantizers": "triton", "attention": "cudnn"},
    "compile": {"compile": True},
    "compile-torch": {"compile": True, "quantizers": "torch"},
    "compile-cudnn": {"compile": True, "attention": "cudnn"},
    "compile-recompute": {"compile": True, "activation_checkpointing": True},
}
MODELS = ("ternary", "dense")
TARGET_MFU, TARGET_RATIO = 0.40, 1.25
LEARNING_RATE = 1e-4
# bfloat16 keeps 8 bits; the mean loss over thousands of tokens averages their roundings.
LARGEST_ERROR = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured.

    Attributes:
        config: The ternary model's; the dense twin differs in ``dense`` only.
        batch: Sequences a step.
        device: Where.
        precision: As in training.
        repeats: Timed turns of each model.
        steps: Steps a turn.
        warmup: Steps before; compilation happens there.
        peak_tflops: The device's dense bf16 peak, where the table doesn't have it.
        loss_chunk: Tokens whose logits are in memory at a time.
    """

    config: ModelConfig
    batch: int
    device: torch.device
    precision: str
    repeats: int
    steps: int
    warmup: int
    peak_tflops: float | None
    loss_chunk: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One model under one variant.

    Attributes:
        variant: Name of the settings.
        model: ``"ternary"`` or ``"dense"``.
        milliseconds: Of a step, over the turns.
        tokens_per_second: At the median.
        mfu: At the median; None where the peak is not known.
        mfu_causal: The same with half of attention's square.
        peak_memory_bytes: Most memory of this model's steps; on a CPU of the process so far.
        first_step_seconds: The first step, with compilation.
        loss: Of the first batch before any update, by the fast path.
        loss_error: Its relative distance from the plain path's.
    """

    variant: str
    model: str
    milliseconds: Spread
    tokens_per_second: float
    mfu: float | None
    mfu_causal: float | None
    peak_memory_bytes: int
    first_step_seconds: float
    loss: float
    loss_error: float


class Contender:
    """One model with its optimiser."""

    def __init__(self, name: str, variant: str, settings: Settings) -> None:
        self.name, self.variant, self.settings = name, variant, settings
        device = settings.device
        before = _allocated(device)
        torch.manual_seed(0)
        config = settings.config.replace(dense=name == "dense")
        self.model = TinyLM.from_config(config).to(device).train()
        self.optimizer_config = OptimizerConfig()
        self.optimizer = build_optimizer(self.model, self.optimizer_config)
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE
        self.precision = precision_context(settings.precision, device)
        shape = (settings.batch, config.max_seq_len + 1)
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(config.vocab_size, shape, generator=generator).to(device)
        self.ids, self.labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        self.reference = self._plain_loss()
        apply_performance(
            self.model,
            PerformanceConfig(loss_chunk=settings.loss_chunk, **VARIANTS[variant]),
            device,
            precision=settings.precision,
        )
        started = time.perf_counter()
        self.loss = float(self.step()) / self.labels.numel()
        _synchronize(device)
        self.first_step_seconds = time.perf_counter() - started
        self.error = abs(self.loss - self.reference) / self.reference
        if not self.error <= LARGEST_ERROR:  # NaN too
            raise SystemExit(
                f"{variant}, {name}: the loss must be within {LARGEST_ERROR:.0%} of the plain "
                f"path's {self.reference:.5f}, found {self.loss:.5f}. Nothing was timed."
            )
        for _ in range(settings.warmup):
            self.step()
        _synchronize(device)
        self.resident = _allocated(device) - before
        self.seconds: list[float] = []
        self.peak = 0

    @torch.no_grad()
    def _plain_loss(self) -> float:
        """Return the mean loss by whole logits, a row at a time and without settings for speed."""
        total = torch.zeros((), device=self.ids.device)
        with self.precision, without_compilation():
            for row, labels in zip(self.ids, self.labels, strict=True):
                total += sum_loss(self.model(row[None]), labels[None])
        return float(total) / self.labels.numel()

    def step(self) -> Tensor:
        """Do one update; return the summed loss."""
        with self.precision:
            loss: Tensor = self.model(self.ids, labels=self.labels)
        mean = loss / self.labels.numel()
        mean.backward()
        norm = clip_gradients(self.optimizer, self.optimizer_config.max_grad_norm)
        step_if_finite(self.optimizer, torch.stack((mean.detach(), norm)))
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def turn(self, others_resident: int) -> None:
        """Time some steps, and take the memory that is this model's own."""
        device = self.settings.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        for _ in range(self.settings.steps):
            self.step()
        _synchronize(device)
        self.seconds.append((time.perf_counter() - started) / self.settings.steps)
        self.peak = max(self.peak, peak_memory_bytes(device) - others_resident)

    def record(self) -> Record:
        """Summarise."""
        spread = Spread.of([1e3 * seconds for seconds in self.seconds])
        speed = self.labels.numel() / (spread.median / 1e3)
        peak = peak_flops(self.settings.device, self.settings.peak_tflops)
        length = self.settings.config.max_seq_len

        def mfu(causal: bool) -> float | None:
            flops = flops_per_token(self.model, length, causal=causal)
            return None if peak is None else speed * flops / peak

        return Record(
            variant=self.variant,
            model=self.name,
            milliseconds=spread,
            tokens_per_second=speed,
            mfu=mfu(False),
            mfu_causal=mfu(True),
            peak_memory_bytes=self.peak,
            first_step_seconds=self.first_step_seconds,
            loss=self.loss,
            loss_error=self.error,
        )


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(variant: str, settings: Settings, *, profile: Path | None = None) -> list[Record]:
    """Time both models under one variant, in turns."""
    torch._dynamo.reset()
    contenders = [Contender(name, variant, settings) for name in MODELS]
    resident = sum(contender.resident for contender in contenders)
    for _ in range(settings.repeats):
        for contender in contenders:
            contender.turn(resident - contender.resident)
    if profile is not None:
        _profile(contenders, variant, settings.device, profile)
    records = [contender.record() for contender in contenders]
    del contenders, contender
    gc.collect()
    if settings.device.type == "cuda":
        torch.cuda.empty_cache()
    return records


def _profile(
    contenders: Sequence[Contender], variant: str, device: torch.device, folder: Path
) -> None:
    """Write what the time of one step goes into, a table for each model."""
    folder.mkdir(parents=True, exist_ok=True)
    by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    for contender in contenders:
        with torch.profiler.profile() as profiler:
            contender.step()
            _synchronize(device)
        table = profiler.key_averages().table(sort_by=by, row_limit=60, max_name_column_width=90)
        (folder / f"{variant}-{contender.name}.txt").write_text(table + "\n", encoding="utf-8")


def judge(records: Sequence[Record]) -> dict[str, Any]:
    """Compare each variant with the targets: MFU of the ternary model, time against the twin's."""
    verdicts = {}
    for variant in dict.fromkeys(record.variant for record in records):
        ternary, dense = (
            next(r for r in records if (r.variant, r.model) == (variant, name)) for name in MODELS
        )
        ratio = ternary.milliseconds.median / dense.milliseconds.median
        verdicts[variant] = {
            "mfu": ternary.mfu,
            "mfu_met": None if ternary.mfu is None else ternary.mfu >= TARGET_MFU,
            "ratio": ratio,
            "ratio_met": ratio <= TARGET_RATIO,
        }
    return verdicts


def show(console: Console, records: Sequence[Record], verdicts: dict[str, Any]) -> None:
    """Print a table, and the targets."""
    table = Table(title="One training step")
    columns = ("variant", "model", "ms, median (range)", "tokens/s", "MFU", "MFU, causal")
    for name in (*columns, "peak GiB", "first step s", "loss error"):
        table.add_column(name, justify="left" if name in columns[:2] else "right")
    for r in records:
        ms = r.milliseconds
        table.add_row(
            r.variant,
            r.model,
            f"{ms.median:.1f} ({ms.minimum:.1f} .. {ms.maximum:.1f})",
            f"{r.tokens_per_second:,.0f}",
            "" if r.mfu is None else f"{r.mfu:.1%}",
            "" if r.mfu_causal is None else f"{r.mfu_causal:.1%}",
            f"{r.peak_memory_bytes / 2**30:.2f}",
            f"{r.first_step_seconds:.1f}",
            f"{r.loss_error:.1e}",
        )
    console.print(table)
    for variant, verdict in verdicts.items():
        mfu = "unknown (--peak-tflops)" if verdict["mfu"] is None else f"{verdict['mfu']:.1%}"
        console.print(
            f"{variant}: MFU {mfu}, target {TARGET_MFU:.0%}; ternary / dense "
            f"{verdict['ratio']:.2f}, target {TARGET_RATIO}"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="tinylm-300m", choices=list(PRESETS))
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seq-len", type=int, help="default: the preset's")
    parser.add_argument(
        "--variant", action="append", choices=list(VARIANTS), help="repeatable; default: compile"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=PRECISIONS)
    parser.add_argument("--repeats", type=int, default=7, help="timed turns of each model")
    parser.add_argument("--steps", type=int, default=4, help="steps a turn")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--loss-chunk", type=int, default=4096)
    parser.add_argument("--peak-tflops", type=float)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--profile", type=Path, help="folder for tables of one step's kernels")
    arguments = parser.parse_args(argv)
    for name in ("batch_size", "repeats", "steps", "warmup"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more")
    config = preset(arguments.preset)
    if arguments.seq_len is not None:
        config = config.replace(max_seq_len=arguments.seq_len)
    settings = Settings(
        config=config,
        batch=arguments.batch_size,
        device=choose_device(arguments.device),
        precision=arguments.precision,
        repeats=arguments.repeats,
        steps=arguments.steps,
        warmup=arguments.warmup,
        peak_tflops=arguments.peak_tflops,
        loss_chunk=arguments.loss_chunk,
    )
    records: list[Record] = []
    for variant in arguments.variant or ["compile"]:
        records += measure(variant, settings, profile=arguments.profile)
    verdicts = judge(records)
    # Wide enough for every column, also where the output goes into a file.
    show(Console(width=160), records, verdicts)
    if arguments.out:
        results = {
            "machine": describe_machine(),
            "preset": arguments.preset,
            "settings": {
                **{k: v for k, v in vars(arguments).items() if isinstance(v, (int, float))},
                "seq_len": config.max_seq_len,
                "precision": settings.precision,
                "device": str(settings.device),
                "variants": {name: VARIANTS[name] for name in arguments.variant or ["compile"]},
            },
            "records": [dataclasses.asdict(record) for record in records],
            "targets": verdicts,
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
