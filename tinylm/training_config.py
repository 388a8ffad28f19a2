"""The configuration of a training run: one frozen dataclass for each part, checked when made.

The same dataclasses are the command line's flags, the sections of a ``--config`` file and the
``training_config.json`` that a run leaves behind, so a name exists once. ``tinylm.run_settings``
puts the layers (defaults, file, flags) together.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tinylm.config import ModelConfig
from tinylm.errors import ConfigError
from tinylm.tokenizer import DEFAULT_TOKENIZER

SCHEDULES = ("cosine", "linear", "two-stage")
PRECISIONS = ("auto", "fp32", "bf16")
PARALLEL_MODES = ("ddp", "fsdp", "hsdp")
DEFAULT_GATHER_MB = 150
DEFAULT_BATCH_SIZE = 16
QUANTIZERS = ("auto", "torch", "triton")
ATTENTION = ("auto", "flash", "cudnn", "sdpa", "plain")
DEFAULT_LOSS_CHUNK = 4096
PREPARED_TOKENIZER = "tokenizer"  # folder of the tokenizer in prepared data
DEFAULT_PRESET = "tinylm-300m"
# Settings by section that a name stands for; a config file and flags win over them.
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "default": {},
    # microsoft/unilm, The Era of 1-bit LLMs: Training Tips, Code and FAQ, table of the 700M model.
    # The schedule's own defaults follow it too: 1.5e-3, from half way 1e-3 and no weight decay.
    "two-stage": {
        "schedule": {"kind": "two-stage", "warmup_steps": 375},
        "optimizer": {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95},
    },
}


def setting(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    choices: tuple[str, ...] = (),
    flag: str | None = None,
) -> Any:
    """Declare a field together with what the command line says about it.

    Args:
        default: Value when neither flag nor file gives one; without it the field is required.
        help: One line for ``--help``.
        choices: Allowed values, if they are few.
        flag: Name of the flag where it isn't the field's name with hyphens.
    """
    metadata = {"help": help, "choices": choices, "flag": flag}
    return dataclasses.field(default=default, metadata=metadata)


def _positive(owner: object, *names: str, zero: bool = False) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is not None and not (value > 0 or (zero and value == 0)):
            expected = "zero or more" if zero else "above zero"
            raise ConfigError(f"{name} must be {expected}, found {value!r}.")


def _one_of(owner: object, name: str, choices: tuple[str, ...]) -> None:
    if getattr(owner, name) not in choices:
        raise ConfigError(
            f"{name} must be one of {', '.join(choices)}, found {getattr(owner, name)!r}."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Text and tokenizer.

    Raises:
        ConfigError: A file is not named, two sources are, or a count is out of range.
    """

    directory: str | None = setting(
        None, help="Folder from tinylm data prepare, instead of the two files.", flag="data"
    )
    verify: bool = setting(
        True, help="Compare the folder's files with their digests first.", flag="verify_data"
    )
    train_file: str | None = setting(
        None, help='Training text: JSON lines {"text": ...}, plain or .gz.'
    )
    val_file: str | None = setting(None, help="Held-out text in the same form.")
    tokenizer: str = setting(
        None,
        help=f"Directory, file or Hugging Face hub id. Default: {DEFAULT_TOKENIZER}; with --data "
        "the folder's.",
    )
    packing: bool = setting(
        True, help="Fill every sequence with consecutive documents, or pad one document a row."
    )
    skip_bad_lines: bool = setting(False, help="Count malformed lines instead of stopping.")
    num_proc: int | None = setting(
        None, help="Processes for tokenising. Default: as the size asks for."
    )

    def __post_init__(self) -> None:
        for name in ("train_file", "val_file"):
            if self.directory and getattr(self, name):
                raise ConfigError(
                    f"give --data or --train-file and --val-file, not both; found data "
                    f"{self.directory!r} and {name} {getattr(self, name)!r}."
                )
            if not self.directory and not getattr(self, name):
                raise ConfigError(
                    f"{name} must be given: pass --{name.replace('_', '-')}, or --data with a "
                    "folder from tinylm data prepare."
                )
        if self.tokenizer is None:
            own = DEFAULT_TOKENIZER
            if self.directory:
                own = str(Path(self.directory) / PREPARED_TOKENIZER)
            object.__setattr__(self, "tokenizer", own)
        if not self.tokenizer:
            raise ConfigError("tokenizer must be given: pass --tokenizer.")
        _positive(self, "num_proc")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and gradient clipping.

    Raises:
        ConfigError: A value is out of range.
    """

    weight_decay: float = setting(0.1, help="Decoupled decay, on matrices only.")
    beta1: float = setting(0.9, help="Decay of AdamW's first moment.")
    beta2: float = setting(0.95, help="Decay of AdamW's second moment.")
    eps: float = setting(1e-8, help="Added to the root of AdamW's second moment.")
    max_grad_norm: float = setting(1.0, help="Gradients are scaled down to this norm.")

    def __post_init__(self) -> None:
        _positive(self, "eps", "max_grad_norm")
        _positive(self, "weight_decay", zero=True)
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"{name} must be in [0, 1), found {getattr(self, name)}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate over the run. Fields that are ``None`` get the default of their ``kind``.

    Raises:
        ConfigError: A value is out of range, or belongs to another ``kind``.
    """

    kind: str = setting(
        "cosine",
        help="two-stage is the recipe of BitNet b1.58.",
        choices=SCHEDULES,
        flag="schedule",
    )
    lr: float = setting(None, help="Peak learning rate. Default: 2e-4; two-stage: 1.5e-3.")
    second_lr: float | None = setting(
        None, help="two-stage: peak of the second line. Default: 2/3 of --lr."
    )
    second_stage_start: float | None = setting(
        None, help="two-stage: part of the run after which it begins. Default: 0.5."
    )
    warmup_steps: int = setting(375, help="Steps over which the rate rises linearly.")
    min_lr_ratio: float = setting(
        None, help="Floor as a part of the peak. Default: 0.1; two-stage: 0."
    )

    def __post_init__(self) -> None:
        _one_of(self, "kind", SCHEDULES)
        two_stage = self.kind == "two-stage"
        self._default("lr", 1.5e-3 if two_stage else 2e-4)
        self._default("min_lr_ratio", 0.0 if two_stage else 0.1)
        if two_stage:
            self._default("second_lr", self.lr * 2 / 3)
            self._default("second_stage_start", 0.5)
        else:
            for name in ("second_lr", "second_stage_start"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"{name} belongs to --schedule two-stage, found schedule {self.kind!r}."
                    )
        _positive(self, "lr", "second_lr", "second_stage_start")
        _positive(self, "warmup_steps", zero=True)
        if not 0.0 <= self.min_lr_ratio <= 1.0:
            raise ConfigError(f"min_lr_ratio must be in [0, 1], found {self.min_lr_ratio}.")
        if self.second_lr is not None and self.second_lr > self.lr:
            raise ConfigError(
                f"second_lr must be at most lr {self.lr:g}: the rate drops at the second stage; "
                f"found {self.second_lr:g}."
            )
        if self.second_stage_start is not None and self.second_stage_start >= 1.0:
            raise ConfigError(
                f"second_stage_start must be in (0, 1), found {self.second_stage_start}."
            )

    def _default(self, name: str, value: float) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long and on what to train.

    Raises:
        ConfigError: A value is out of range, or both lengths are given.
    """

    max_steps: int | None = setting(None, help="Optimiser steps. Default: one epoch.")
    epochs: float | None = setting(None, help="Passes over the training text, instead of steps.")
    batch_size: int = setting(
        None,
        help=f"Sequences an optimiser step, over all processes. Default: {DEFAULT_BATCH_SIZE}.",
    )
    batch_tokens: int | None = setting(
        None, help="The same in tokens: a multiple of the model's max_seq_len."
    )
    grad_accum_steps: int = setting(
        1, help="Parts in which a process's share of a batch goes through the model."
    )
    micro_batch_size: int | None = setting(
        None, help="Sequences in such a part, instead of the number of parts."
    )
    seed: int = setting(0, help="Seed of weights, data order and dropout.")
    precision: str = setting(
        "auto", help="auto: bf16 autocast on a GPU that has it, else fp32.", choices=PRECISIONS
    )
    device: str = setting("auto", help="auto: the GPU if there is one. Or cpu, cuda, cuda:1 ...")
    num_threads: int | None = setting(None, help="CPU threads. Default: PyTorch's choice.")
    max_bad_steps: int = setting(
        5, help="Stop after this many rejected (not finite) steps in a row."
    )

    def __post_init__(self) -> None:
        if self.max_steps is not None and self.epochs is not None:
            raise ConfigError(
                f"give max_steps or epochs, not both; found {self.max_steps} and {self.epochs}."
            )
        if self.batch_size is not None and self.batch_tokens is not None:
            raise ConfigError(
                "give batch_size or batch_tokens, not both; found "
                f"{self.batch_size} and {self.batch_tokens}."
            )
        if self.batch_size is None and self.batch_tokens is None:
            object.__setattr__(self, "batch_size", DEFAULT_BATCH_SIZE)
        if self.micro_batch_size is not None and self.grad_accum_steps != 1:
            raise ConfigError(
                "give grad_accum_steps or micro_batch_size, not both; found "
                f"{self.grad_accum_steps} and {self.micro_batch_size}."
            )
        _positive(
            self,
            "max_steps",
            "epochs",
            "batch_size",
            "batch_tokens",
            "grad_accum_steps",
            "micro_batch_size",
            "num_threads",
            "max_bad_steps",
        )
        _positive(self, "seed", zero=True)
        _one_of(self, "precision", PRECISIONS)
        if self.batch_size is not None and self.grad_accum_steps > self.batch_size:
            raise ConfigError(
                f"grad_accum_steps must be at most batch_size {self.batch_size}: the batch is "
                f"divided into that many parts; found {self.grad_accum_steps}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerformanceConfig:
    """What makes a step faster or smaller; only the last bits of sums depend on it.

    Raises:
        ConfigError: A value is out of range.
    """

    compile: bool = setting(
        False, help="Compile layers and loss with torch.compile: a minute at first, then faster."
    )
    quantizers: str = setting(
        "auto",
        help="What lies around the products: BitLinear's quantisers where nothing is compiled, and "
        "the feed-forward's SwiGLU, norm and quantiser. auto: triton on a GPU.",
        choices=QUANTIZERS,
    )
    attention: str = setting(
        "auto",
        help="auto: flash-attn if installed, else PyTorch's. cudnn: cuDNN's by way of PyTorch.",
        choices=ATTENTION,
    )
    deterministic: bool = setting(
        False, help="Only kernels that give the same bits each time: exact resume on a GPU, slower."
    )
    activation_checkpointing: bool = setting(
        False, help="Compute each layer's forward pass again in the backward one: less memory."
    )
    loss_chunk: int = setting(
        DEFAULT_LOSS_CHUNK, help="Tokens whose logits are in memory at a time."
    )
    prefetch: int = setting(2, help="Batches read ahead in the background; 0: none.")
    peak_tflops: float | None = setting(
        None, help="Dense bf16 peak for MFU. Default: from a table of devices."
    )

    def __post_init__(self) -> None:
        _one_of(self, "quantizers", QUANTIZERS)
        _one_of(self, "attention", ATTENTION)
        _positive(self, "loss_chunk", "peak_tflops")
        _positive(self, "prefetch", zero=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured on the held-out text during training.

    Raises:
        ConfigError: A count is out of range.
    """

    eval_every: int = setting(500, help="Steps between evaluations; also before the first step.")
    eval_max_tokens: int | None = setting(
        None, help="Use about this many held-out tokens, spread over the file. Default: all."
    )
    sample_prompt: str = setting("The", help="Start of the text that is sampled to be looked at.")
    sample_tokens: int = setting(48, help="Tokens to sample at each evaluation; 0: none.")

    def __post_init__(self) -> None:
        _positive(self, "eval_every", "eval_max_tokens")
        _positive(self, "sample_tokens", zero=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save and what to keep. The checkpoint with the best validation loss always stays.

    Raises:
        ConfigError: A count is out of range.
    """

    save_every: int = setting(500, help="Steps between checkpoints.")
    keep_last: int = setting(2, help="Newest checkpoints to keep, besides the best.")

    def __post_init__(self) -> None:
        _positive(self, "save_every", "keep_last")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written down while training.

    Raises:
        ConfigError: A count is out of range.
    """

    log_every: int = setting(10, help="Steps between log records.")
    tensorboard: bool = setting(True, help="Write TensorBoard events beside metrics.jsonl.")

    def __post_init__(self) -> None:
        _positive(self, "log_every")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How several processes share the work.

    Raises:
        ConfigError: Unknown mode, or a number that belongs to another one.
    """

    mode: str | None = setting(
        None,
        help="ddp: every process holds the whole model. fsdp: each holds a part of every weight. "
        "hsdp: parts within a group of processes, copies across groups. Default: ddp.",
        choices=PARALLEL_MODES,
        flag="parallel",
    )
    replicas: int | None = setting(
        None, help="hsdp: groups that hold a whole model each. Default: one a machine."
    )
    reshard_after_forward: bool = setting(
        True,
        help="fsdp, hsdp: drop a layer's gathered weights after its forward pass, and gather them "
        "again for its backward pass. Off: one exchange less, whole weights in memory in between.",
    )
    gather_mb: int | None = setting(
        None,
        help="fsdp, hsdp: layers whose weights are gathered in one exchange, as many as together "
        f"have this many megabytes; 0: each by itself. Default: {DEFAULT_GATHER_MB}.",
    )

    def __post_init__(self) -> None:
        if self.mode is not None:
            _one_of(self, "mode", PARALLEL_MODES)
        _positive(self, "replicas")
        if self.replicas is not None and self.mode != "hsdp":
            raise ConfigError(f"replicas belongs to --parallel hsdp, found parallel {self.mode!r}.")
        if not self.reshard_after_forward and self.mode not in ("fsdp", "hsdp"):
            raise ConfigError(
                "reshard_after_forward can be off with --parallel fsdp or hsdp only, found "
                f"parallel {self.mode!r}."
            )
        _positive(self, "gather_mb", zero=True)
        if self.gather_mb is not None and self.mode not in ("fsdp", "hsdp"):
            raise ConfigError(
                f"gather_mb belongs to --parallel fsdp or hsdp, found parallel {self.mode!r}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that a training run is made from.

    Attributes:
        out: Output directory.
        model: Architecture. Token ids are filled in from the tokenizer when training starts.
        data: Text and tokenizer.
        optimizer: AdamW.
        schedule: Learning rate.
        training: Length, batch, device.
        performance: Speed and memory.
        evaluation: Measurements on held-out text.
        checkpoint: Saving.
        logging: Records.
        parallel: Processes.

    Raises:
        ConfigError: ``training.batch_tokens`` is no number of whole sequences.
    """

    out: str
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    training: LoopConfig = dataclasses.field(default_factory=LoopConfig)
    performance: PerformanceConfig = dataclasses.field(default_factory=PerformanceConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    logging: LogConfig = dataclasses.field(default_factory=LogConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        tokens, length = self.training.batch_tokens, self.model.max_seq_len
        if tokens is None:
            return
        if tokens % length:
            below = tokens // length * length
            raise ConfigError(
                f"batch_tokens must be a multiple of max_seq_len {length}, found {tokens}; near "
                f"are {below or length} and {below + length}."
            )
        # From here on there is one size, so that runs started in either way can be compared.
        training = dataclasses.replace(
            self.training, batch_size=tokens // length, batch_tokens=None
        )
        object.__setattr__(self, "training", training)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of ``training_config.json``, which ``--config`` accepts."""
        values = dataclasses.asdict(self)
        values["model"] = self.model.to_dict()
        return values

    def replace(self, **changes: Any) -> TrainConfig:
        """Return a copy with some parts changed."""
        return dataclasses.replace(self, **changes)


# Sections of a config file, in the order of the help text. All but `model` are built as they are.
SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "schedule": ScheduleConfig,
    "training": LoopConfig,
    "performance": PerformanceConfig,
    "evaluation": EvaluationConfig,
    "checkpoint": CheckpointConfig,
    "logging": LogConfig,
    "parallel": ParallelConfig,
}
