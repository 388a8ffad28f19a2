"""Records of a training run: JSON lines, TensorBoard, the loss curve and the progress bar."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tinylm.errors import ConfigError

Record = dict[str, Any]


class MetricsLog:
    """``metrics.jsonl``: one object a line, each with ``kind`` and ``step``.

    A run that goes on from a checkpoint drops the records after it, so that the file reads like one
    run that was never interrupted.

    Args:
        path: The file; it is made or continued.
        resume_step: Records after this step are dropped. None starts a new file.
    """

    def __init__(self, path: Path, *, resume_step: int | None = None) -> None:
        self.path = path
        kept = [] if resume_step is None else read_metrics(path, until=resume_step)
        temporary = path.with_name(f".tmp-{path.name}")
        temporary.write_text("".join(_line(record) for record in kept), encoding="utf-8")
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record; it survives a kill of the process."""
        self._file.write(_line(record))
        self._file.flush()

    def sync(self) -> None:
        """Wait until the records are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _line(record: Mapping[str, Any]) -> str:
    # JSON has no NaN: a measurement that is not finite becomes null.
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
    return json.dumps(finite, ensure_ascii=False, allow_nan=False) + "\n"


def read_metrics(path: Path, *, until: int | None = None) -> list[Record]:
    """Read ``metrics.jsonl``; a last line that a kill cut off is left out.

    Args:
        path: The file; one that isn't there has no records.
        until: Last step to return.
    """
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if until is None or record["step"] <= until:
            records.append(record)
    return records


class TensorBoardLog:
    """Scalars and samples for TensorBoard.

    Args:
        directory: Event files go here.
        resume_step: Events after this step are hidden. None for a new run.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self, directory: Path, *, resume_step: int | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "TensorBoard is not installed: pip install tensorboard, or train with "
                "--no-tensorboard (metrics.jsonl holds the same numbers)."
            ) from error

        purge_step = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(directory), purge_step=purge_step)

    def write(self, record: Mapping[str, Any]) -> None:
        """Add the numbers of a record under its kind, such as ``train/loss``."""
        kind, step = record["kind"], record["step"]
        for name, value in record.items():
            if isinstance(value, Mapping):
                for key, part in value.items():
                    self._writer.add_scalar(f"{kind}_{name}/{key}", part, step)
            elif isinstance(value, (int, float)) and name != "step":
                self._writer.add_scalar(f"{kind}/{name}", value, step)
            elif name == "text":
                self._writer.add_text(kind, value, step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


def draw_loss_curve(records: list[Record], path: Path) -> None:
    """Draw training and validation loss, with the unigram entropy as a line, into a picture.

    Args:
        records: From :func:`read_metrics`.
        path: A ``.png`` file, replaced atomically.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for kind, style in (("train", {"lw": 1, "alpha": 0.7}), ("eval", {"lw": 2, "marker": "o"})):
        points = [
            (r["step"], r["loss"]) for r in records if r["kind"] == kind and r["loss"] is not None
        ]
        if points:
            axes.plot(*zip(*points, strict=True), label=f"{kind} loss", **style)
    for record in records:
        if record["kind"] == "run":
            entropy = record["unigram_entropy"]
            label = f"unigram entropy {entropy:.2f}"
            axes.axhline(entropy, color="gray", ls="--", label=label)
            break
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.legend()
    axes.grid(alpha=0.3)
    temporary = path.with_name(f".tmp-{path.name}")
    figure.savefig(temporary, format="png")
    temporary.replace(path)


class Reporter:
    """Shows how a run goes: a progress bar on a terminal, else a line for each log record.

    Args:
        console: Where to print.
        total_steps: Steps of the run.
        step: Steps already done.
    """

    def __init__(self, console: Console, *, total_steps: int, step: int = 0) -> None:
        self.console = console
        self.total_steps = total_steps
        self._step = step
        self._seconds_per_step = 0.0
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID = self._progress.add_task(
            "train", total=total_steps, completed=step, numbers=""
        )

    def __enter__(self) -> Reporter:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(
        self, step: int, *, loss: float, learning_rate: float, speed: float, usage: str = ""
    ) -> None:
        """Show that a step is done.

        Args:
            step: Steps done.
            loss: Of this step.
            learning_rate: Of this step.
            speed: Tokens a second.
            usage: MFU and memory in words.
        """
        self._step = step
        if self.console.is_terminal:
            numbers = f"loss {loss:.4f}  lr {learning_rate:.2e}  {speed:,.0f} tok/s  {usage}"
            self._progress.update(self._task, completed=step, numbers=numbers)

    def train_record(self, record: Record) -> None:
        """Print a log record where no bar shows it."""
        if self.console.is_terminal:
            return
        left = (self.total_steps - record["step"]) * record["seconds_per_step"]
        minutes, seconds = divmod(round(left), 60)
        eta = f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
        usage = f"mfu {record['mfu']:.1%}  " if "mfu" in record else ""
        self.line(
            f"step {record['step']}/{self.total_steps}  loss {record['loss']:.4f}  "
            f"lr {record['lr']:.2e}  grad {record['grad_norm']:.3f}  "
            f"{record['tokens_per_second']:,.0f} tok/s  {usage}eta {eta}"
        )

    def line(self, text: str) -> None:
        """Print a line of text above the bar."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
