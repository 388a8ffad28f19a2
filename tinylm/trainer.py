"""The trainer: ``train()`` sequences, ``train_step()`` holds the mathematics."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console

from tinylm import training_state as saved_state
from tinylm.checkpoint import (
    check_intact,
    load_config,
    read_tensors,
    restore_weights,
    save_model,
)
from tinylm.data import Batch, BatchOrder
from tinylm.device import choose_device, precision_context
from tinylm.errors import CheckpointError, ConfigError, TrainingDivergedError
from tinylm.evaluate import (
    EvalResult,
    evaluate,
    ternary_codes,
    ternary_statistics,
)
from tinylm.model import TinyLM
from tinylm.optim import (
    Schedule,
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    set_step_hyperparameters,
)
from tinylm.performance import apply_performance, without_compilation
from tinylm.prefetch import BatchQueue
from tinylm.recorder import Recorder
from tinylm.run_directory import RunDirectory
from tinylm.run_settings import check_resumable
from tinylm.stop_signals import StopSignals
from tinylm.throughput import Throughput
from tinylm.training_config import TrainConfig
from tinylm.training_data import load_training_data

SAMPLE_SEED = 0
SAMPLE_TEMPERATURE = 0.8


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepResult:
    """One optimiser step.

    Attributes:
        loss: Mean over the batch's predicted tokens, in nats.
        grad_norm: Before clipping.
        learning_rate: Used by the update.
        num_tokens: Predicted tokens of the batch.
        accepted: False if loss or gradient was not finite and nothing was updated.
        ternary: Statistics of the codes if they were asked for, else empty.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    accepted: bool
    ternary: Mapping[str, Any]


class Trainer:
    """One training run.

    Everything is loaded and checked when the object is made; :meth:`train` then runs to the end.

    Args:
        config: The run.
        resume: Go on from the run in ``config.out``; one without a checkpoint starts again.
        resume_from: Checkpoint of that run to go on from; default: its last.
        console: Where progress is shown.

    Raises:
        ConfigError: A setting is wrong, or differs from the run that goes on.
        DataError: A data file can't be used.
        TokenizerError: The tokenizer can't be loaded or doesn't fit.
        CheckpointError: The checkpoint is damaged or belongs to other data.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        resume: bool = False,
        resume_from: Path | None = None,
        console: Console | None = None,
    ) -> None:
        self.console = console or Console()
        self.device = choose_device(config.training.device)
        if config.training.num_threads is not None:
            torch.set_num_threads(config.training.num_threads)
        self.run = RunDirectory(Path(config.out), keep_last=config.checkpoint.keep_last)
        resume_point = None
        if resume:
            resume_point = self.run.resume_point(resume_from)
        else:
            self.run.check_free()

        self.data = load_training_data(config, self.console)
        self.config = config = config.replace(model=self.data.model)
        self.total_steps = self.data.count_steps(config.training)
        self.schedule = Schedule(config.schedule, self.total_steps)
        self.order = BatchOrder(
            len(self.data.train), config.training.batch_size, seed=config.training.seed
        )
        torch.manual_seed(config.training.seed)
        self.model = TinyLM.from_config(config.model).to(self.device).train()
        apply_performance(
            self.model,
            config.performance,
            self.device,
            precision=config.training.precision,
        )
        self.batches = BatchQueue(
            self.order,
            self._make_parts,
            depth=config.performance.prefetch,
            pin=self.device.type == "cuda",
        )
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.precision = precision_context(config.training.precision, self.device)
        self.stop = StopSignals()
        self.state = saved_state.TrainState(fingerprints=self.data.fingerprints)
        self._saved_step: int | None = None
        if resume_point is not None:
            self._restore(resume_point)
        elif resume:
            self.console.print("No checkpoint yet: the run starts from the beginning.")
        self.state.num_threads = torch.get_num_threads()
        self.state.device = self.device.type

    def _restore(self, checkpoint: Path) -> None:
        """Bring back weights, optimiser, counters, data order and random state."""
        check_intact(checkpoint, training_state=True)
        check_resumable(
            saved_state.load_saved_config(checkpoint / saved_state.CONFIG_FILE), self.config
        )
        if load_config(checkpoint) != self.config.model:
            raise CheckpointError(
                f"{checkpoint}: config.json and the training configuration beside it differ."
            )
        state = saved_state.TrainState.load(checkpoint)
        saved_state.check_same_data(state.fingerprints, self.data.fingerprints, self.config)
        if state.step > self.total_steps:
            raise ConfigError(
                f"max_steps must be at least the {state.step} steps already done, found "
                f"{self.total_steps}."
            )
        restore_weights(checkpoint, self.model)
        optimizer_file = checkpoint / saved_state.OPTIMIZER_FILE
        load_optimizer_tensors(
            self.model,
            self.optimizer,
            read_tensors(optimizer_file),
            source=str(optimizer_file),
        )
        rng_file = checkpoint / saved_state.RNG_FILE
        saved_state.restore_rng(read_tensors(rng_file), source=str(rng_file))
        self.batches.load_state_dict(state.data_order)
        self.state = state
        self._saved_step = state.step
        self.run.commit(state.step, best_step=state.best_step)
        self.console.print(f"Going on from {checkpoint}, step {state.step}.", markup=False)
        here = (torch.get_num_threads(), self.device.type)
        if here != (state.num_threads, state.device):
            self.console.print(
                f"Note: saved with {state.num_threads} threads on {state.device}, going on with "
                f"{here[0]} on {here[1]}: sums may differ in their last bits."
            )

    # ---- the run

    @property
    def finished(self) -> bool:
        """Whether every step is done."""
        return self.state.step >= self.total_steps

    def train(self) -> saved_state.TrainSummary:
        """Run to the end, or until SIGTERM or SIGINT.

        Raises:
            TrainingDivergedError: Too many steps in a row were not finite.
            CheckpointError: A checkpoint can't be written.
        """
        self.run.prepare()
        with self._open_recorder() as self.recorder, self.stop:
            while True:
                self._evaluate_if_due()
                self._save_if_due()
                if self.finished or self.stop.requested:
                    break
                self._count_and_record(*self._timed_step())
            self.recorder.draw_curve()
        return self._summary()

    def _open_recorder(self) -> Recorder:
        return Recorder(
            self.run,
            self.config,
            self.console,
            total_steps=self.total_steps,
            resume_step=self._saved_step,
            run_record={
                "unigram_entropy": self.data.unigram_entropy,
                "num_parameters": self.model.num_parameters(),
                "total_steps": self.total_steps,
            },
            throughput=Throughput.of(
                self.model, self.device, peak_tflops=self.config.performance.peak_tflops
            ),
        )

    def _make_parts(self, indices: npt.NDArray[np.int64]) -> list[Batch]:
        """Return a batch in the parts in which it goes through the model."""
        parts = np.array_split(indices, self.config.training.grad_accum_steps)
        return [self.data.train.batch(part) for part in parts]

    def train_step(self, *, with_statistics: bool = False) -> StepResult:
        """Do one update on the next batch.

        The loss is the mean over all predicted tokens of the batch, however unequally the parts of
        an accumulated batch share them. If it or the gradient's norm is not finite, weights and
        moments stay untouched.

        Args:
            with_statistics: Whether to compare the ternary codes before and after.
        """
        parts = next(self.batches)
        num_tokens = sum(part.num_labels for part in parts)
        loss = torch.zeros((), device=self.device)
        for part in parts:
            part = part.to(self.device)
            with self.precision:
                total = self.model(part.input_ids, part.attention_mask, labels=part.labels)
            part_loss = total / num_tokens
            part_loss.backward()
            loss += part_loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), self.config.optimizer.max_grad_norm
        )
        # The one synchronisation of a step on a GPU.
        loss_value, norm_value = torch.stack((loss, norm)).tolist()
        accepted = math.isfinite(loss_value) and math.isfinite(norm_value)
        rate = set_step_hyperparameters(
            self.optimizer, self.schedule, self.config.optimizer, self.state.step
        )
        statistics: Mapping[str, Any] = {}
        if accepted and with_statistics:
            before = ternary_codes(self.model)
            self.optimizer.step()
            statistics = ternary_statistics(ternary_codes(self.model), before)
        elif accepted:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(
            loss=loss_value,
            grad_norm=norm_value,
            learning_rate=rate,
            num_tokens=num_tokens,
            accepted=accepted,
            ternary=statistics,
        )

    def _timed_step(self) -> tuple[StepResult, float]:
        """Do a step and take its time in seconds."""
        started = time.perf_counter()
        result = self.train_step(with_statistics=self.recorder.is_logged(self.state.step + 1))
        return result, time.perf_counter() - started

    def _count_and_record(self, result: StepResult, seconds: float) -> None:
        """Count a step that was done, and stop the run if it diverged."""
        state = self.state
        state.data_order = self.batches.state_dict()
        self.recorder.time_step(seconds, result.num_tokens)
        if not result.accepted:
            state.rejected_steps += 1
            state.bad_steps_in_row += 1
            self.recorder.line(
                f"step {state.step + 1} rejected: loss {result.loss}, gradient norm "
                f"{result.grad_norm}; {state.bad_steps_in_row} in a row"
            )
            if state.bad_steps_in_row >= self.config.training.max_bad_steps:
                raise self._diverged(result)
            return
        state.step += 1
        state.tokens += result.num_tokens
        state.bad_steps_in_row = 0
        self.recorder.train(
            {
                "step": state.step,
                "loss": result.loss,
                "lr": result.learning_rate,
                "grad_norm": result.grad_norm,
                "tokens": state.tokens,
                "rejected_steps": state.rejected_steps,
                **result.ternary,
            }
        )

    def _diverged(self, result: StepResult) -> TrainingDivergedError:
        last = self.run.linked("last")
        saved = "no checkpoint was written yet" if last is None else f"the last good one is {last}"
        return TrainingDivergedError(
            f"training diverged after step {self.state.step}: expected finite numbers, found loss "
            f"{result.loss} and gradient norm {result.grad_norm} in {self.state.bad_steps_in_row} "
            f"steps in a row (--max-bad-steps). None of them changed the weights; {saved}. Start a "
            "new run with a lower --lr or more --warmup-steps."
        )

    # ---- evaluating and saving

    def _evaluate_if_due(self) -> None:
        state = self.state
        due = self.finished or state.step % self.config.evaluation.eval_every == 0
        if not due or state.last_eval_step == state.step or self.stop.requested:
            return
        result = self.evaluate()
        if result is None:
            return  # stopped; made up for when the run goes on
        state.last_eval_step, state.val_loss = state.step, result.loss
        better = math.isfinite(result.loss) and (
            state.best_loss is None or result.loss < state.best_loss
        )
        if state.step > 0 and better:
            state.best_step, state.best_loss = state.step, result.loss
        self.recorder.evaluation(state.step, result)
        if self.config.evaluation.sample_tokens:
            prompt = self.config.evaluation.sample_prompt
            self.recorder.sample(state.step, prompt, self.sample_text())

    def evaluate(self) -> EvalResult | None:
        """Measure the model on the held-out text; None if a signal asked to stop meanwhile."""
        training = self.config.training
        with without_compilation():
            return evaluate(
                self.model,
                self.data.val,
                batch_size=-(-training.batch_size // training.grad_accum_steps),
                max_tokens=self.config.evaluation.eval_max_tokens,
                precision=self.precision,
                should_stop=lambda: self.stop.requested,
            )

    def sample_text(self) -> str:
        """Continue the sample prompt, with a fixed seed that leaves the run's own alone."""
        ids = torch.tensor([self.data.sample_ids], device=self.device)  # [1, S]
        generator = torch.Generator(self.device).manual_seed(SAMPLE_SEED)
        with self.precision, without_compilation():
            out = self.model.generate(
                ids,
                max_new_tokens=self.config.evaluation.sample_tokens,
                temperature=SAMPLE_TEMPERATURE,
                generator=generator,
            )
        new = out[0, len(self.data.sample_ids) :].tolist()
        return str(self.data.tokenizer.decode(new, skip_special_tokens=True))

    def _save_if_due(self) -> None:
        state = self.state
        due = (
            self.finished
            or self.stop.requested
            or state.step % self.config.checkpoint.save_every == 0
            or state.step == state.best_step
        )
        if state.step == 0 or not due:
            return
        if self._saved_step != state.step:
            self._save()
        self.run.commit(state.step, best_step=state.best_step)

    def _save(self) -> None:
        """Write a checkpoint of this moment."""
        self.recorder.sync()
        save_model(
            self.run.checkpoint(self.state.step),
            self.model,
            tokenizer=self.data.tokenizer,
            extra_files={
                saved_state.STATE_FILE: self.state.to_dict(),
                saved_state.CONFIG_FILE: self.config.to_dict(),
                saved_state.OPTIMIZER_FILE: optimizer_tensors(self.model, self.optimizer),
                saved_state.RNG_FILE: saved_state.rng_tensors(),
            },
        )
        self._saved_step = self.state.step

    def _summary(self) -> saved_state.TrainSummary:
        links = {name: self.run.linked(name) for name in ("last", "best")}
        state = self.state
        return saved_state.TrainSummary(
            out=str(self.run.path),
            step=state.step,
            total_steps=self.total_steps,
            stopped=not self.finished,
            last_checkpoint=None if links["last"] is None else str(links["last"]),
            best_checkpoint=None if links["best"] is None else str(links["best"]),
            val_loss=state.val_loss,
            best_val_loss=state.best_loss,
            unigram_entropy=self.data.unigram_entropy,
            rejected_steps=state.rejected_steps,
            tokens=state.tokens,
        )
