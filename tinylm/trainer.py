"""The trainer: ``train()`` sequences, ``train_step()`` holds the mathematics."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console

from tinylm import training_state as saved_state
from tinylm.batch_plan import plan_batch
from tinylm.data import Batch, BatchOrder
from tinylm.device import choose_device, device_name, precision_context, start_reading
from tinylm.distributed import connect, launched_world
from tinylm.errors import ConfigError, TrainingDivergedError
from tinylm.model import TinyLM
from tinylm.optim import (
    Schedule,
    build_optimizer,
    clip_gradients,
    set_step_hyperparameters,
    step_if_finite,
)
from tinylm.parallel import choose_mode, parallelize
from tinylm.performance import apply_performance
from tinylm.prefetch import BatchQueue
from tinylm.recorder import Recorder, SilentRecorder
from tinylm.run_checkpoint import RunParts, check_run, restore_run, save_run
from tinylm.run_directory import RunDirectory
from tinylm.step_result import BatchLoss, IssuedStep, StepResult
from tinylm.stop_signals import StopSignals
from tinylm.ternary_statistics import start_statistics, ternary_codes
from tinylm.throughput import Throughput
from tinylm.training_config import TrainConfig
from tinylm.training_data import load_training_data
from tinylm.validation import Validation


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
        world = launched_world()
        self.console = console or Console(quiet=not world.is_main)
        self.device = choose_device(
            config.training.device, local_rank=world.local_rank, local_size=world.local_size
        )
        mode = choose_mode(config.parallel, world)
        self.world = connect(world, self.device, alone=mode != "none")
        if config.training.num_threads is not None:
            torch.set_num_threads(config.training.num_threads)
        self.plan = plan_batch(config.training, world, seq_len=config.model.max_seq_len)
        self.run = RunDirectory(Path(config.out), keep_last=config.checkpoint.keep_last)
        resume_point = self.world.on_main(lambda: self._resume_point(resume, resume_from))

        self.data = load_training_data(config, self.console, self.world)
        self.config = config = config.replace(model=self.data.model)
        self.total_steps = self.data.count_steps(config.training)
        self.schedule = Schedule(config.schedule, self.total_steps)
        self.order = BatchOrder(
            len(self.data.train), config.training.batch_size, seed=config.training.seed
        )
        torch.manual_seed(config.training.seed)  # the same weights in every process
        self.model = TinyLM.from_config(config.model).to(self.device).train()
        apply_performance(
            self.model,
            config.performance,
            self.device,
            precision=config.training.precision,
        )
        if not world.is_main:
            saved_state.seed_process(config.training.seed, step=0, rank=world.rank)
        self.parallel = parallelize(self.model, config.parallel, self.world)
        self.batches = BatchQueue(
            self.order,
            self._make_parts,
            depth=config.performance.prefetch,
            pin=self.device.type == "cuda",
        )
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.precision = precision_context(config.training.precision, self.device)
        self.validation = Validation(
            model=self.model,
            data=self.data,
            config=config.evaluation,
            batch_size=self.plan.part_size,
            precision=self.precision,
            world=self.world,
        )
        self.stop = StopSignals()
        self.stopping = False  # what all processes agreed on
        self.state = saved_state.TrainState(fingerprints=self.data.fingerprints)
        self._saved_step: int | None = None
        self._clock = 0.0  # when the last step was counted, or the first one began
        if resume_point is not None:
            self._restore(resume_point)
        elif resume:
            self.console.print("No checkpoint yet: the run starts from the beginning.")
        self.state.num_threads = torch.get_num_threads()
        self.state.device = self.device.type
        self.state.num_processes = world.size

    def _resume_point(self, resume: bool, resume_from: Path | None) -> Path | None:
        """Return the checkpoint to go on from, and say what is left out on the way to it."""
        if not resume:
            self.run.check_free()
            return None
        for unfinished in self.run.unfinished():
            text = f"Ignored {unfinished}: it was not written to the end."
            self.console.print(text, markup=False, soft_wrap=True)
        return self.run.resume_point(resume_from)

    def _parts(self) -> RunParts:
        return RunParts(
            config=self.config,
            model=self.parallel,
            optimizer=self.optimizer,
            tokenizer=self.data.tokenizer,
            device=self.device,
            world=self.world,
        )

    def _restore(self, checkpoint: Path) -> None:
        """Bring back weights, optimiser, counters, data order and random state."""
        state = self.world.on_main(
            lambda: check_run(checkpoint, self.config, self.data.fingerprints)
        )
        if state.step > self.total_steps:
            raise ConfigError(
                f"max_steps must be at least the {state.step} steps already done, found "
                f"{self.total_steps}."
            )
        same_random = restore_run(checkpoint, self._parts(), state)
        self.batches.load_state_dict(state.data_order)
        self.state = state
        self._saved_step = state.step
        self._commit()
        said = f"Going on from {checkpoint}, step {state.step}."
        self.console.print(said, markup=False, soft_wrap=True)
        here = (torch.get_num_threads(), self.device.type, self.world.size)
        then = (state.num_threads, state.device, state.num_processes)
        if here != then:
            self.console.print(
                f"Note: saved by {then[2]} processes with {then[0]} threads on {then[1]}, going on "
                f"with {here[2]}, {here[0]} and {here[1]}: sums may differ in their last bits.",
                soft_wrap=True,
            )
        if not same_random and self.config.model.dropout > 0:
            self.console.print("Note: with another number of processes, dropout draws anew.")

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
        self.world.on_main(self.run.prepare)
        with self._open_recorder() as self.recorder, self.stop:
            self._agree_to_stop()
            issued: IssuedStep | None = None
            while True:
                if issued is None:
                    self._evaluate_if_due()
                    self._save_if_due()
                    if self.finished or self.stopping:
                        break
                    self._clock = time.perf_counter()
                # A GPU is given the next batch before the last step's figures are asked for, so
                # that it never waits for the host.
                batch = self.take_gradients()
                if issued is not None:
                    self._count_and_record(issued.wait())
                number = self.state.step + 1
                issued = self._update(batch, with_statistics=self.recorder.is_logged(number))
                if self.world.size == 1:  # several have agreed within the step
                    self._agree_to_stop()
                if self._must_look_after(number):
                    self._count_and_record(issued.wait())
                    issued = None
            self.recorder.draw_curve()
        return self._summary()

    def _must_look_after(self, step: int) -> bool:
        """Return whether something is to be done with the weights that a step leaves."""
        return (
            self.stopping
            or self._is_due(step, self.config.evaluation.eval_every)
            or self._is_due(step, self.config.checkpoint.save_every)
        )

    def _is_due(self, step: int, every: int) -> bool:
        return step >= self.total_steps or step % every == 0

    def _agree_to_stop(self) -> bool:
        """Return whether a signal has reached any process."""
        self.stopping = self.stopping or self.world.any(self.stop.requested)
        return self.stopping

    def _open_recorder(self) -> Recorder:
        if not self.world.is_main:
            return SilentRecorder(self.config, total_steps=self.total_steps)
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
                "device": device_name(self.device),
                "num_processes": self.world.size,
            },
            throughput=Throughput.of(
                self.model,
                self.device,
                peak_tflops=self.config.performance.peak_tflops,
                num_devices=self.world.size,
            ),
        )

    def _make_parts(self, indices: npt.NDArray[np.int64]) -> list[Batch]:
        """Return this process's share of a batch in the parts that go through the model."""
        return [self.data.train.batch(part) for part in self.plan.parts(indices)]

    def train_step(self, *, with_statistics: bool = False) -> StepResult:
        """Do one update on the next batch, and wait until it is known to be good.

        The loss is the mean over all predicted tokens of the batch, however unequally processes
        and parts share them. If it or the gradient's norm is not finite, weights and moments stay
        untouched, in all processes.

        Args:
            with_statistics: Whether to compare the ternary codes before and after.
        """
        return self._update(self.take_gradients(), with_statistics=with_statistics).wait()

    def take_gradients(self) -> BatchLoss:
        """Take the next batch's loss and gradients."""
        parts = next(self.batches)
        data_order = self.batches.state_dict()
        counts = [sum(part.num_labels for part in parts), float(self.stop.requested)]
        agreed = self.world.start_sum(counts)
        num_tokens = 0
        loss = torch.zeros((), device=self.device)
        for i, part in enumerate(parts):
            part = part.to(self.device)
            with self.parallel.last_part(i + 1 == len(parts)):
                with self.precision:
                    total = self.parallel.compute(
                        part.input_ids, part.attention_mask, labels=part.labels
                    )
                if i == 0:
                    num_tokens, num_stops = map(int, agreed())
                    self.stopping = self.stopping or num_stops > 0
                part_loss = total / num_tokens
                # The engines average gradients over the processes; wanted is their sum.
                (part_loss * self.world.size).backward()
            loss += part_loss.detach()
        loss = self.world.sum_tensor(loss)
        return BatchLoss(loss=loss, num_tokens=num_tokens, data_order=data_order)

    def _update(self, batch: BatchLoss, *, with_statistics: bool) -> IssuedStep:
        """Update the weights with the gradients that are there, unless they are not finite."""
        norm = clip_gradients(self.optimizer, self.config.optimizer.max_grad_norm)
        figures = torch.stack((batch.loss, norm))
        read = start_reading(figures)
        rate = set_step_hyperparameters(
            self.optimizer, self.schedule, self.config.optimizer, self.state.step
        )
        before = ternary_codes(self.model) if with_statistics else None
        step_if_finite(self.optimizer, figures)
        self.optimizer.zero_grad(set_to_none=True)
        return IssuedStep(
            batch=batch,
            learning_rate=rate,
            read=read,
            statistics=start_statistics(self.model, before) if with_statistics else dict,
        )

    def _count_and_record(self, result: StepResult) -> None:
        """Count a step that was done, and stop the run if it diverged."""
        started, self._clock = self._clock, time.perf_counter()
        state = self.state
        state.data_order = result.data_order
        self.recorder.time_step(self._clock - started, result.num_tokens)
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
        due = self._is_due(state.step, self.config.evaluation.eval_every)
        if not due or state.last_eval_step == state.step or self.stopping:
            return
        result = self.validation.evaluate(should_stop=self._agree_to_stop)
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
            # Whole models are the same everywhere: one process is enough.
            if self.parallel.is_sharded or self.world.is_main:
                self.recorder.sample(state.step, prompt, self.validation.sample_text())

    def _save_if_due(self) -> None:
        state = self.state
        due = (
            self.stopping
            or self._is_due(state.step, self.config.checkpoint.save_every)
            or state.step == state.best_step
        )
        if state.step == 0 or not due:
            return
        if self._saved_step != state.step:
            self.recorder.sync()
            save_run(self.run.checkpoint(state.step), self._parts(), state)
            self._saved_step = state.step
        self._commit()

    def _commit(self) -> None:
        """Let the links lead to what is written now."""
        state = self.state
        self.world.on_main(lambda: self.run.commit(state.step, best_step=state.best_step))

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
