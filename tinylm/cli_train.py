"""``tinylm train``: every field of the configuration is a flag."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from tinylm.config import ACTIVATIONS, PRESETS, ModelConfig
from tinylm.errors import ConfigError
from tinylm.run_settings import Layer, field_types, load_layer, resolve
from tinylm.training_config import DEFAULT_PRESET, RECIPES, SECTIONS, TrainConfig

# Known from the tokenizer only.
_NO_FLAG = {"bos_token_id", "eos_token_id", "pad_token_id"}
_EXAMPLE = (
    "Example: tinylm train --preset tinylm-demo --tokenizer DIR --train-file train.jsonl "
    "--val-file val.jsonl --out run"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Flag:
    """A configuration field on the command line."""

    section: str
    name: str
    parameter: inspect.Parameter


def _parameter(name: str, kind: Any, panel: str, help: str, *spellings: str) -> inspect.Parameter:
    option = typer.Option(*spellings, help=help, rich_help_panel=panel, show_default=False)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )


def _model_help() -> dict[str, str]:
    """Read the first sentence about each field from the docstring of ModelConfig."""
    text = inspect.cleandoc(ModelConfig.__doc__ or "")
    about = {}
    for match in re.finditer(r"^    (\w+): (.+?)(?=^    \w|^\S|\Z)", text, re.M | re.S):
        sentence = " ".join(match[2].split())
        about[match[1]] = re.split(r"(?<=[.;])\s", sentence)[0].rstrip(".;").replace("``", "") + "."
    return about


def _choice(name: str, values: tuple[str, ...]) -> type[enum.Enum]:
    """Make the enumeration that tells typer which values there are."""
    members = {value: value for value in values}
    return enum.Enum(name, members)  # type: ignore[return-value]


def _config_flags() -> Iterator[_Flag]:
    """Make a flag for every field of every section."""
    model_help = _model_help()
    for section, owner in SECTIONS.items():
        kinds = field_types(owner)
        for field in dataclasses.fields(owner):
            if field.name in _NO_FLAG:
                continue
            about = dict(field.metadata)
            if section == "model":
                about = {"help": model_help.get(field.name, ""), "choices": (), "flag": None}
                if field.name == "activation":
                    about["choices"] = ACTIVATIONS
            text = about["help"]
            kind: Any = kinds[field.name][0]
            default = field.default
            if section != "model" and isinstance(default, bool):
                text += f" Default: {'on' if default else 'off'}."
            elif section != "model" and isinstance(default, (int, float, str)):
                text += f" Default: {default}."
            if about["choices"]:
                kind = _choice(field.name, about["choices"])
            flag = (about["flag"] or field.name).replace("_", "-")
            spelling = f"--{flag}/--no-{flag}" if kind is bool else f"--{flag}"
            name = about["flag"] or field.name
            panel = "Model (default: the preset's)" if section == "model" else section.capitalize()
            yield _Flag(
                section=section,
                name=field.name,
                parameter=_parameter(name, kind, panel, text, spelling),
            )


_FLAGS = tuple(_config_flags())
_RUN_PARAMETERS = (
    _parameter("out", Path, "Run", "Output directory; new or empty, unless resuming.", "--out"),
    _parameter(
        "preset", str, "Run", f"{', '.join(PRESETS)}. Default: {DEFAULT_PRESET}.", "--preset"
    ),
    _parameter(
        "recipe",
        str,
        "Run",
        f"{', '.join(RECIPES)}: schedule and optimizer of a publication. Other flags win.",
        "--recipe",
    ),
    _parameter(
        "config",
        Path,
        "Run",
        "YAML or JSON file with the same settings, such as a run's training_config.json; "
        "flags win.",
        "--config",
    ),
    _parameter(
        "resume", bool, "Run", "Go on exactly where the run in --out was interrupted.", "--resume"
    ),
    _parameter(
        "resume_from", Path, "Run", "Resume from this checkpoint of the run.", "--resume-from"
    ),
    _parameter("json", Path, "Run", "Write how the run ended to this file.", "--json"),
)


def register(app: typer.Typer) -> None:
    """Add the command to an app."""
    signature = inspect.Signature(
        [*_RUN_PARAMETERS, *(flag.parameter for flag in _FLAGS)], return_annotation=None
    )

    def command(**given: Any) -> None:
        train(given)

    command.__doc__ = train.__doc__
    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    app.command("train", epilog=_EXAMPLE)(command)


def train(given: dict[str, Any]) -> None:
    """Train a model on JSON lines {"text": ...}: logs, checkpoints, resumes.

    Long runs survive: SIGTERM saves and ends with 0, and --resume goes on from the last checkpoint.
    Flags win over --config, which wins over the defaults. Under torchrun every process is one
    worker: torchrun --nproc-per-node 8 -m tinylm.cli train ... --parallel fsdp
    """
    from tinylm.cli import write_json
    from tinylm.distributed import disconnect
    from tinylm.trainer import Trainer

    resume_from = given["resume_from"]
    resume = bool(given["resume"]) or resume_from is not None
    config = settings(given, resume=resume)
    trainer = Trainer(config, resume=resume, resume_from=resume_from)
    summary = trainer.train()
    disconnect()
    if not trainer.world.is_main:
        return
    console = trainer.console
    state = "stopped by a signal" if summary.stopped else "done"
    lines = [f"Training {state} at step {summary.step} of {summary.total_steps}."]
    if summary.val_loss is not None:
        lines.append(
            f"Validation loss {summary.val_loss:.4f} nats per token; unigram entropy "
            f"{summary.unigram_entropy:.4f}."
        )
    if summary.stopped:
        lines.append(f"Go on with: tinylm train --out {config.out} --resume")
    elif summary.best_checkpoint is not None:
        lines.append(f"Best checkpoint: {summary.best_checkpoint}")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    write_json(given["json"], summary.to_dict())


def settings(given: dict[str, Any], *, resume: bool) -> TrainConfig:
    """Turn the command line into a configuration.

    Args:
        given: Value of every flag by its Python name; None where it wasn't given.
        resume: Whether the run in ``out`` goes on; its own settings are then the lowest layer.

    Raises:
        ConfigError: Something is missing, unknown or out of range.
        CheckpointError: The run to go on has no readable configuration.
    """
    flags: Layer = {}
    for key in ("out", "preset", "recipe"):
        if given[key] is not None:
            flags[key] = str(given[key])
    for flag in _FLAGS:
        value = given[flag.parameter.name]
        if value is not None:
            value = value.value if isinstance(value, enum.Enum) else value
            flags.setdefault(flag.section, {})[flag.name] = value
    file = {} if given["config"] is None else load_layer(given["config"])
    saved = None
    if resume:
        out = flags.get("out") or file.get("out")
        if not out:
            raise ConfigError("--resume must know the run: pass its --out DIR.")
        saved = _saved_settings(Path(out), given["resume_from"])
    return resolve(flags, file, saved)


def _saved_settings(out: Path, resume_from: Path | None) -> TrainConfig | None:
    """Read the settings of the run that goes on; None if it hadn't even started."""
    from tinylm.run_directory import RunDirectory
    from tinylm.training_state import CONFIG_FILE, load_saved_config

    run = RunDirectory(out)
    checkpoint = run.resume_point(resume_from)
    if checkpoint is not None:
        return load_saved_config(checkpoint / CONFIG_FILE)
    return load_saved_config(run.config_file) if run.config_file.is_file() else None
