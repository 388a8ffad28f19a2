"""The checkpoint format: a directory that is written whole or not at all, and checked when read.

    model.safetensors    weights, shared ones once
    config.json          tinylm.config.ModelConfig
    tokenizer files      as transformers writes them
    SHA256SUMS           for `sha256sum -c SHA256SUMS`, of every other file
    training_state/      only what training needs to go on

A run whose weights are sharded writes ``shards/`` (:mod:`tinylm.shard_storage`) in place of
``model.safetensors`` and the optimiser's file; ``tinylm consolidate`` makes the first form of it.

Everything is safetensors or JSON; nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tinylm.config import ModelConfig
from tinylm.directory import SUMS_FILE, check_sums, write_checksums, written_whole
from tinylm.distributed import like
from tinylm.errors import CheckpointError, ConfigError
from tinylm.model import TinyLM

MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
STATE_DIR = "training_state"
SHARDS_DIR = "shards"
SHARDS_INDEX = f"{SHARDS_DIR}/index.json"
STEP_PREFIX = "step-"


def save_model(
    directory: str | Path,
    model: TinyLM,
    *,
    tokenizer: Any = None,
    extra_files: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint directory atomically.

    The files are written into a temporary directory beside it, flushed to the disk and renamed. An
    existing checkpoint of that name is replaced.

    Args:
        directory: The checkpoint's name.
        model: Saved with its config.
        tokenizer: A transformers tokenizer to put beside the weights.
        extra_files: By relative name: tensors by name for ``*.safetensors``, else an object that
            JSON can hold.

    Returns:
        The directory.

    Raises:
        CheckpointError: The directory holds something else, or can't be written (disk full); what
            was there before is intact and the temporary directory is gone.
    """
    directory = Path(directory)
    with being_written(directory) as temporary:
        save_tensors(temporary / MODEL_FILE, unique_tensors(model))
        save_companions(temporary, model.config, tokenizer=tokenizer, extra_files=extra_files)
        write_checksums(temporary)
    return directory


def being_written(directory: Path) -> contextlib.AbstractContextManager[Path]:
    """Return the context that gives a temporary directory and renames it to a checkpoint.

    Raises:
        CheckpointError: As :func:`save_model`.
    """
    return written_whole(
        directory,
        marker=(MODEL_FILE, SHARDS_INDEX),
        error=CheckpointError,
        hint="Training goes on with --resume.",
    )


def save_companions(
    directory: Path,
    config: ModelConfig,
    *,
    tokenizer: Any = None,
    extra_files: Mapping[str, Any] | None = None,
) -> None:
    """Write what stands beside the weights: config, tokenizer and further files.

    Args:
        directory: Where to.
        config: Of the model.
        tokenizer: A transformers tokenizer.
        extra_files: As for :func:`save_model`.
    """
    config.save(directory / CONFIG_FILE)
    if tokenizer is not None:
        from tinylm.tokenizer import save_tokenizer

        save_tokenizer(tokenizer, directory)
    for name, content in (extra_files or {}).items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            save_tensors(path, content)
        else:
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and saved buffers by name; a shared one once, under its first name."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file.

    Raises:
        OSError: It can't be written.
    """
    try:
        save_file({name: t.contiguous() for name, t in tensors.items()}, path, {"format": "pt"})
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(str(error)) from error


def check_intact(directory: Path, *, training_state: bool = False) -> None:
    """Compare every file with ``SHA256SUMS``.

    Args:
        directory: A checkpoint.
        training_state: Whether to check the files in ``training_state/`` too, and whether weights
            may be sharded.

    Raises:
        CheckpointError: A file is missing, truncated or altered.
    """
    weights = SHARDS_INDEX if training_state and is_sharded(directory) else MODEL_FILE
    check_sums(
        directory,
        required=(weights, CONFIG_FILE),
        error=CheckpointError,
        hint=_convert_hint(directory) or other_checkpoints(directory),
        skip=lambda name: name.startswith(f"{STATE_DIR}/") and not training_state,
    )


def _convert_hint(directory: Path) -> str:
    """Say how a model that transformers saved becomes a checkpoint; nothing for all others."""
    if (directory / SUMS_FILE).is_file():
        return ""
    try:
        config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    if not isinstance(config, dict) or "architectures" not in config:
        return ""
    return (
        "It is a model of transformers: `tinylm convert "
        f"{directory} --to checkpoint --out CHECKPOINT` makes a checkpoint of it."
    )


def is_sharded(directory: Path) -> bool:
    """Return whether a checkpoint's weights are in shards."""
    return (directory / SHARDS_INDEX).is_file()


def is_checkpoint(directory: Path) -> bool:
    """Return whether a directory holds weights, in one file or in shards."""
    return (directory / MODEL_FILE).is_file() or is_sharded(directory)


def _require_file(path: Path) -> None:
    if not path.is_file():
        owner = path.parent.parent if path.parent.name == STATE_DIR else path.parent
        raise CheckpointError(
            f"{path}: expected a file, found none; the checkpoint is incomplete. "
            f"{other_checkpoints(owner)}"
        )


def other_checkpoints(directory: Path) -> str:
    """Say which checkpoints stand beside a damaged one, as a way out."""
    directory = directory.resolve()
    others = [p for p in list_checkpoints(directory.parent) if p != directory]
    if not others:
        return "No other checkpoint stands beside it."
    return f"Other checkpoints: {', '.join(str(p) for p in others)}."


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the ``step-00000100`` directories of a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(
        p
        for p in folder.iterdir()
        if p.name.startswith(STEP_PREFIX) and p.name[len(STEP_PREFIX) :].isdigit() and p.is_dir()
    )


def resolve_checkpoint(path: str | Path, *, sharded: bool = False) -> Path:
    """Find the checkpoint that a path means.

    Args:
        path: A checkpoint, or the output directory of a training run, which stands for its
            ``best`` checkpoint, or its ``last`` if none was evaluated.
        sharded: Whether one with sharded weights will do.

    Raises:
        CheckpointError: There is no checkpoint, or it is sharded.
    """
    path = Path(path)
    for candidate in (path, path / "best", path / "last"):
        if (candidate / MODEL_FILE).is_file() or (sharded and is_sharded(candidate)):
            return candidate
        if is_sharded(candidate):
            raise CheckpointError(
                f"{candidate}: expected {MODEL_FILE}, found a sharded checkpoint. Make one file of "
                f"it: tinylm consolidate {candidate} OUT"
            )
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
    else:
        found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "an empty directory"
    raise CheckpointError(
        f"{path}: expected a checkpoint ({MODEL_FILE}, {CONFIG_FILE}, tokenizer files) or the "
        f"--out directory of a training run, found {found}."
    )


def read_json(path: Path) -> Any:
    """Read a JSON file of a checkpoint.

    Raises:
        CheckpointError: Missing, or not JSON.
    """
    _require_file(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: expected JSON, found otherwise ({error}).") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Map a safetensors file into memory and return its tensors, which read from it when used.

    Raises:
        CheckpointError: Missing, or not a whole safetensors file.
    """
    _require_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: expected a whole safetensors file, found {path.stat().st_size} bytes that "
            f"are not one ({error}). {other_checkpoints(path.parent)}"
        ) from error


def _read_weights(directory: Path, model: TinyLM) -> dict[str, Tensor]:
    """Return the weights of a checkpoint, which fit the model in name, shape and dtype."""
    path = directory / MODEL_FILE
    found, expected = read_tensors(path), unique_tensors(model)
    belongs = f"The file doesn't belong to the {CONFIG_FILE} beside it."
    for problem, names in {
        "no tensor": sorted(set(expected) - set(found)),
        "unknown tensor": sorted(set(found) - set(expected)),
    }.items():
        if names:
            raise CheckpointError(
                f"{path}: {problem} {names[0]!r} ({len(names)} such): expected {len(expected)} "
                f"tensors, found {len(found)}. {belongs} {other_checkpoints(directory)}"
            )
    for name, tensor in expected.items():
        want = f"{tensor.dtype} {list(tensor.shape)}"
        have = f"{found[name].dtype} {list(found[name].shape)}"
        if want != have:
            raise CheckpointError(
                f"{path}: {name}: expected {want}, found {have}. {belongs} "
                f"{other_checkpoints(directory)}"
            )
    return found


def load_config(directory: Path) -> ModelConfig:
    """Read the model's configuration of a checkpoint.

    Raises:
        CheckpointError: It is missing or wrong.
    """
    path = directory / CONFIG_FILE
    _require_file(path)
    try:
        return ModelConfig.load(path)
    except ConfigError as error:
        raise CheckpointError(f"{error} {other_checkpoints(directory)}") from error


class _SkipInit(TorchFunctionMode):
    """Leaves weights as they are: on the meta device torch.nn.init would import its compiler."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def load_model(directory: str | Path, *, verify: bool = True) -> TinyLM:
    """Load a model for use, in evaluation mode, with its weights mapped from the file.

    Args:
        directory: A checkpoint directory.
        verify: Whether to compare the files with ``SHA256SUMS`` first.

    Raises:
        CheckpointError: Missing, truncated, altered, or not fitting its config.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: expected a checkpoint directory, found none.")
    if verify:
        check_intact(directory)
    with torch.device("meta"), _SkipInit():
        model = TinyLM.from_config(load_config(directory))
    weights = _read_weights(directory, model)
    parameters = {
        id(p): nn.Parameter(weights[name]) for name, p in model.named_parameters()
    }  # shared parameters come up once, and every owner gets the same new one
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, parameters[id(parameter)])
    return model.eval()


def restore_weights(directory: Path, model: TinyLM) -> None:
    """Copy the weights of a checkpoint into a model that exists, for training to go on.

    Args:
        directory: A checkpoint with its weights in one file.
        model: Its parameters may be sharded.

    Raises:
        CheckpointError: Missing, or not fitting the model.
    """
    weights = _read_weights(directory, model)
    with torch.no_grad():
        for name, tensor in unique_tensors(model).items():
            tensor.copy_(like(weights[name], tensor))
