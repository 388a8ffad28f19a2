"""Puts a training configuration together: flags win over the file, the file over the defaults.

A layer is ``{section: {field: value}}`` with the top-level names ``out``, ``preset`` and ``recipe``
beside the sections. Above the defaults stand the settings of a recipe; a resumed run has one more
layer below those, the configuration that it was saved with.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinylm.config import FORMAT_VERSION, MODEL_TYPE, ModelConfig, preset
from tinylm.errors import ConfigError
from tinylm.training_config import DEFAULT_PRESET, RECIPES, SECTIONS, TrainConfig

Layer = dict[str, Any]
_TOP_LEVEL = ("out", "preset", "recipe")
# Sizes that follow from others unless they are given: overriding the key resets the values.
_DERIVED = {
    "hidden_size": ("intermediate_size", "latent_rank", "nope_dim", "rope_dim", "value_dim"),
    "num_heads": ("nope_dim", "rope_dim", "value_dim"),
}
# What may change when a run goes on. Data and tokenizer are compared by content instead of name;
# a new length stretches or shrinks the rest of the schedule.
MAY_CHANGE_ON_RESUME = {
    "data": {"directory", "verify", "train_file", "val_file", "tokenizer", "num_proc"},
    "training": {
        "max_steps",
        "epochs",
        "grad_accum_steps",
        "micro_batch_size",
        "device",
        "num_threads",
        "max_bad_steps",
    },
    "performance": {
        "compile",
        "quantizers",
        "attention",
        "deterministic",
        "activation_checkpointing",
        "loss_chunk",
        "prefetch",
        "peak_tflops",
    },
    "evaluation": {"eval_every", "eval_max_tokens", "sample_prompt", "sample_tokens"},
    "checkpoint": {"save_every", "keep_last"},
    "logging": {"log_every", "tensorboard"},
    "parallel": {"mode", "replicas", "reshard_after_forward", "gather_mb"},
}
# What a given name cancels in the layers below: the other way to say the same, or a detail of it.
_CANCELS: dict[str, dict[str, tuple[str, ...]]] = {
    "data": {
        "directory": ("train_file", "val_file", "tokenizer"),  # the folder has its own
        "train_file": ("directory",),
        "val_file": ("directory",),
    },
    "training": {
        "max_steps": ("epochs",),
        "epochs": ("max_steps",),
        "batch_size": ("batch_tokens",),
        "batch_tokens": ("batch_size",),
        "grad_accum_steps": ("micro_batch_size",),
        "micro_batch_size": ("grad_accum_steps",),
    },
    "parallel": {"mode": ("replicas", "reshard_after_forward", "gather_mb")},
}


def field_types(section: type) -> dict[str, tuple[type, bool]]:
    """Return each field's plain type (int, float, bool or str) and whether None is allowed."""
    result = {}
    for name, hint in typing.get_type_hints(section).items():
        arguments = [a for a in typing.get_args(hint) if a is not types.NoneType]
        optional = types.NoneType in typing.get_args(hint)
        if typing.get_origin(hint) is typing.Literal:
            hint = str
        elif arguments:
            hint = arguments[0]
        result[name] = (hint, optional)
    return result


def _convert(value: Any, kind: type, optional: bool, name: str) -> Any:
    """Check a decoded JSON or YAML value against a field's type."""
    if value is None and optional:
        return None
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 2e-4 as a string
        except ValueError:
            pass
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise ConfigError(
        f"{name} must be {'null or ' if optional else ''}of type {kind.__name__}, found {value!r}."
    )


def _unknown_key(key: str, source: str) -> ConfigError:
    """Make the error for an unknown key, with the names that look like it."""
    names = list(_TOP_LEVEL)
    for section, owner in SECTIONS.items():
        names += [section, *(f"{section}.{field.name}" for field in dataclasses.fields(owner))]
    leaf = key.rpartition(".")[2]
    near = [name for name in names if name.rpartition(".")[2] == leaf]
    near += difflib.get_close_matches(key, names, n=3, cutoff=0.7)
    leaves = {name.rpartition(".")[2]: name for name in names}
    near += [leaves[x] for x in difflib.get_close_matches(leaf, list(leaves), n=3, cutoff=0.7)]
    near = list(dict.fromkeys(near))[:4]
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Sections: {', '.join(SECTIONS)}."
    return ConfigError(f"{source}: unknown key {key!r}. {hint}")


def check_layer(values: Any, *, source: str) -> Layer:
    """Check a decoded configuration: every key is known and every value has its type.

    Args:
        values: The decoded file.
        source: Its name, for messages.

    Returns:
        The layer. A ``model_type`` and ``format_version`` that fit are dropped.

    Raises:
        ConfigError: An unknown key (with near matches), or a value of another type.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{source}: expected sections, found {type(values).__name__}.")
    layer: Layer = {}
    for key, content in values.items():
        if key in _TOP_LEVEL:
            layer[key] = _convert(content, str, False, f"{source}: {key}")
        elif key not in SECTIONS:
            raise _unknown_key(str(key), source)
        elif not isinstance(content, Mapping):
            raise ConfigError(f"{source}: {key} must be a section, found {content!r}.")
        else:
            layer[key] = _check_section(key, content, source)
    return layer


def _check_section(section: str, content: Mapping[Any, Any], source: str) -> dict[str, Any]:
    content = dict(content)
    if section == "model":
        for key, expected in {"model_type": MODEL_TYPE, "format_version": FORMAT_VERSION}.items():
            if content.pop(key, expected) != expected:
                raise ConfigError(f"{source}: model.{key} must be {expected!r}.")
    known = field_types(SECTIONS[section])
    result = {}
    for key, value in content.items():
        if key not in known:
            raise _unknown_key(f"{section}.{key}", source)
        result[key] = _convert(value, *known[key], f"{source}: {section}.{key}")
    return result


def load_layer(path: Path) -> Layer:
    """Read a ``--config`` file, YAML or JSON.

    Raises:
        ConfigError: Not found, not YAML or JSON, an unknown key, or a value of another type.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such configuration file.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 ({error}).") from error
    try:
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise ConfigError(f"{path}: not valid {kind} ({error}).") from error
    return check_layer(values if values is not None else {}, source=str(path))


def resolve(flags: Layer, file: Layer, saved: TrainConfig | None = None) -> TrainConfig:
    """Put the layers together.

    Args:
        flags: From the command line.
        file: From ``--config``.
        saved: The configuration of the run that goes on, if one does.

    Returns:
        The whole configuration.

    Raises:
        ConfigError: Something required is missing, or a value is out of range.
    """
    base: Layer = {} if saved is None else check_layer(saved.to_dict(), source="saved run")
    out = flags.get("out") or file.get("out") or base.get("out")
    if not out:
        raise ConfigError("out must be given: pass --out DIR.")
    recipe = _recipe(flags.get("recipe") or file.get("recipe"))
    sections: dict[str, Any] = {"model": _resolve_model(flags, file, saved)}
    for name, owner in SECTIONS.items():
        if name == "model":
            continue
        layers = [
            base.get(name, {}),
            dict(recipe.get(name, {})),
            file.get(name, {}),
            flags.get(name, {}),
        ]
        _cancel_below(layers, _CANCELS.get(name, {}))
        merged = {key: value for layer in layers for key, value in layer.items()}
        for field in dataclasses.fields(owner):
            if field.default is dataclasses.MISSING and field.name not in merged:
                raise ConfigError(
                    f"{field.name} must be given: pass --{field.name.replace('_', '-')} "
                    f"(or {name}.{field.name} in the --config file)."
                )
        sections[name] = owner(**merged)
    return TrainConfig(out=str(out), **sections)


def _recipe(name: str | None) -> Mapping[str, Mapping[str, Any]]:
    """Return the settings that a recipe's name stands for."""
    if name is None:
        return {}
    if name not in RECIPES:
        raise ConfigError(f"recipe must be one of {', '.join(RECIPES)}, found {name!r}.")
    return RECIPES[name]


def _cancel_below(layers: list[dict[str, Any]], cancels: Mapping[str, tuple[str, ...]]) -> None:
    """Remove from the layers below what a layer says in another way."""
    for i, layer in enumerate(layers):
        cancelled = {
            name
            for given, others in cancels.items()
            if layer.get(given) is not None
            for name in others
            if layer.get(name) is None
        }
        for j in range(i):
            layers[j] = {k: v for k, v in layers[j].items() if k not in cancelled}


def _resolve_model(flags: Layer, file: Layer, saved: TrainConfig | None) -> ModelConfig:
    """Start from the preset (or the saved model) and lay the given fields over it."""
    name = flags.get("preset") or file.get("preset")
    base = saved.model if saved and not name else preset(name or DEFAULT_PRESET)
    given = {**file.get("model", {}), **flags.get("model", {})}
    values = dataclasses.asdict(base)
    for key, derived in _DERIVED.items():
        if key in given and given[key] != values[key]:
            values.update(dict.fromkeys(derived))
    return ModelConfig(**{**values, **given})


def check_resumable(saved: TrainConfig, new: TrainConfig) -> None:
    """Refuse to continue a run under settings that would make it another run.

    Args:
        saved: From the checkpoint.
        new: What was asked for, with the model's token ids filled in.

    Raises:
        ConfigError: A setting differs that decides about the weights; it is named with both values.
    """
    differences = []
    for section in SECTIONS:
        old_part, new_part = getattr(saved, section), getattr(new, section)
        for field in dataclasses.fields(old_part):
            old, now = getattr(old_part, field.name), getattr(new_part, field.name)
            if old != now and field.name not in MAY_CHANGE_ON_RESUME.get(section, set()):
                differences.append(f"{section}.{field.name} is {old!r} in it, {now!r} was asked")
    if differences:
        raise ConfigError(
            f"the run in {new.out} can't go on with other settings: {'; '.join(differences)}. "
            "Leave these out to resume, or start a new run with another --out."
        )
