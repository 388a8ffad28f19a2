"""Writes down what a training run does: records, TensorBoard, console lines and the loss curve."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console

from tinylm.evaluate import EvalResult
from tinylm.logs import (
    MetricsLog,
    Record,
    Reporter,
    TensorBoardLog,
    draw_loss_curve,
    read_metrics,
)
from tinylm.run_directory import RunDirectory
from tinylm.throughput import Throughput, describe
from tinylm.training_config import TrainConfig


class Recorder:
    """The records of one run; a context that closes its files.

    Args:
        run: Where the files go.
        config: The run, written to ``training_config.json``.
        console: Where lines and the progress bar are shown.
        total_steps: Steps of the run.
        resume_step: Records after this step are dropped. None for a new run.
        run_record: Facts about the run, written first when it is new.
        throughput: Adds MFU and memory to the records.
    """

    def __init__(
        self,
        run: RunDirectory,
        config: TrainConfig,
        console: Console,
        *,
        total_steps: int,
        resume_step: int | None,
        run_record: Record,
        throughput: Throughput | None = None,
    ) -> None:
        self.run = run
        self.config = config
        self.total_steps = total_steps
        self.throughput = throughput
        self.unigram_entropy: float = run_record["unigram_entropy"]
        self._seconds = 0.0  # spent in the steps since the last log record
        self._steps_timed = self._tokens_timed = 0
        run.config_file.write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
        self._metrics = MetricsLog(run.metrics_file, resume_step=resume_step)
        self._tensorboard = None
        if config.logging.tensorboard:
            self._tensorboard = TensorBoardLog(run.tensorboard, resume_step=resume_step)
        self._reporter = Reporter(console, total_steps=total_steps, step=resume_step or 0)
        if resume_step is None:
            self._write({"kind": "run", "step": 0, **run_record})

    def __enter__(self) -> Recorder:
        self._reporter.__enter__()
        return self

    def __exit__(self, *details: object) -> None:
        self._reporter.__exit__(*details)
        self._metrics.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def is_logged(self, step: int) -> bool:
        """Return whether the update that ends at ``step`` gets a record."""
        return step % self.config.logging.log_every == 0 or step == self.total_steps

    def time_step(self, seconds: float, num_tokens: int) -> None:
        """Count a step's time towards the speed of the next record."""
        self._seconds += seconds
        self._steps_timed += 1
        self._tokens_timed += num_tokens

    def train(self, record: Record) -> None:
        """Show a step, and write it down if its number is due.

        Args:
            record: ``step``, ``loss``, ``lr`` and what else there is to say.
        """
        speed = self._tokens_timed / max(self._seconds, 1e-9)
        usage = {} if self.throughput is None else self.throughput.fields(speed)
        self._reporter.advance(
            record["step"],
            loss=record["loss"],
            learning_rate=record["lr"],
            speed=speed,
            usage=describe(usage) if usage else "",
        )
        if not self.is_logged(record["step"]):
            return
        record = {
            "kind": "train",
            **record,
            "tokens_per_second": speed,
            "seconds_per_step": self._seconds / self._steps_timed,
            **usage,
        }
        self._write(record)
        self._reporter.train_record(record)
        self._seconds, self._steps_timed, self._tokens_timed = 0.0, 0, 0

    def evaluation(self, step: int, result: EvalResult) -> None:
        """Write down an evaluation and draw the loss curve."""
        self._write({"kind": "eval", "step": step, **result.to_dict()})
        self.line(
            f"step {step}  validation: loss {result.loss:.4f} (unigram entropy "
            f"{self.unigram_entropy:.4f})  perplexity {result.perplexity:.2f}  "
            f"{result.bits_per_byte:.4f} bits per byte"
        )
        self.draw_curve()

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Write down a text that the model made."""
        self._write({"kind": "sample", "step": step, "prompt": prompt, "text": text})
        self.line(f"step {step}  sample: {(prompt + text)!r}")

    def line(self, text: str) -> None:
        """Show a line of text."""
        self._reporter.line(text)

    def draw_curve(self) -> None:
        """Write ``loss_curve.png``."""
        draw_loss_curve(read_metrics(self.run.metrics_file), self.run.curve_file)

    def sync(self) -> None:
        """Wait until the records are on the disk."""
        self._metrics.sync()

    def _write(self, record: dict[str, Any]) -> None:
        self._metrics.write(record)
        if self._tensorboard is not None:
            self._tensorboard.write(record)


class SilentRecorder(Recorder):
    """The recorder of all processes but the first, which alone writes and shows anything."""

    def __init__(self, config: TrainConfig, *, total_steps: int) -> None:
        self.config = config
        self.total_steps = total_steps

    def __enter__(self) -> SilentRecorder:
        return self

    def __exit__(self, *details: object) -> None:
        """Do nothing."""

    def time_step(self, seconds: float, num_tokens: int) -> None:
        """Do nothing."""

    def train(self, record: Record) -> None:
        """Do nothing."""

    def evaluation(self, step: int, result: EvalResult) -> None:
        """Do nothing."""

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Do nothing."""

    def line(self, text: str) -> None:
        """Do nothing."""

    def draw_curve(self) -> None:
        """Do nothing."""

    def sync(self) -> None:
        """Do nothing."""
