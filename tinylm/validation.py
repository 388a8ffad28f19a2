"""What a training run does with its model between steps: held-out text, and a sample."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from tinylm.distributed import World
from tinylm.evaluate import EvalResult, evaluate
from tinylm.model import TinyLM
from tinylm.performance import without_compilation
from tinylm.text_stream import TextStream
from tinylm.training_config import EvaluationConfig
from tinylm.training_data import TrainingData

SAMPLE_SEED = 0
SAMPLE_TEMPERATURE = 0.8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Validation:
    """Measures a model that is being trained; of a sharded one every process must ask.

    Attributes:
        model: The model, on its device.
        data: The run's.
        config: How much to read and to write.
        batch_size: Sequences that fit on the device.
        precision: Context in which the model computes.
        world: The run's processes.
    """

    model: TinyLM
    data: TrainingData
    config: EvaluationConfig
    batch_size: int
    precision: contextlib.AbstractContextManager[Any]
    world: World

    def evaluate(self, should_stop: Callable[[], bool]) -> EvalResult | None:
        """Measure the model on the held-out text; None if it was to stop meanwhile."""
        with without_compilation():
            return evaluate(
                self.model,
                self.data.val,
                batch_size=self.batch_size,
                max_tokens=self.config.eval_max_tokens,
                precision=self.precision,
                should_stop=should_stop,
                world=self.world,
            )

    def sample_text(self) -> str:
        """Continue the sample prompt, with a fixed seed that leaves the run's own alone."""
        device = self.model.embed_tokens.weight.device
        ids = torch.tensor([self.data.sample_ids], device=device)  # [1, S]
        generator = torch.Generator(device).manual_seed(SAMPLE_SEED)
        with self.precision, without_compilation():
            out = self.model.generate(
                ids,
                max_new_tokens=self.config.sample_tokens,
                temperature=SAMPLE_TEMPERATURE,
                generator=generator,
            )
        text = TextStream(self.data.tokenizer, self.data.sample_ids)
        new = out[0, len(self.data.sample_ids) :].tolist()
        return "".join(map(text.add, new)) + text.finish()
