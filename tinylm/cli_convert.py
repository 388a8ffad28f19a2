"""The command ``tinylm convert``."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer


class Target(str, enum.Enum):
    """Values of ``--to``."""

    huggingface = "huggingface"
    checkpoint = "checkpoint"


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="A checkpoint or training run; for --to checkpoint a Hugging Face directory.",
        ),
    ],
    to: Annotated[Target, typer.Option("--to", help="What to write.")],
    out: Annotated[Path, typer.Option("--out", help="Directory to write to.")],
    partial: Annotated[
        bool,
        typer.Option(
            "--partial",
            help="Of a BitNet checkpoint, take what fits and leave attention random.",
        ),
    ] = False,
) -> None:
    """Turn a checkpoint into a Hugging Face directory, or such a directory into a checkpoint.

    A directory of BitNetForCausalLM has another attention and is refused, with the reason;
    --partial makes a start for training of it.
    """
    from tinylm.errors import ConfigError
    from tinylm.huggingface import bitnet
    from tinylm.huggingface.convert import from_huggingface, read_config, to_huggingface

    if partial and to is not Target.checkpoint:
        raise ConfigError("--partial is for a BitNet checkpoint and --to checkpoint. Leave it out.")
    if to is Target.huggingface:
        print(f"{to_huggingface(source, out)}: loads after `import tinylm.huggingface`")
        return
    if read_config(source).get("model_type") != bitnet.MODEL_TYPE:
        if partial:
            raise ConfigError(f"{source}: --partial is for BitNet checkpoints. Leave it out.")
        print(f"{from_huggingface(source, out)}: checkpoint")
        return
    result = bitnet.import_bitnet(source, partial=partial)
    path = bitnet.save_import(result, source, out)
    print(
        f"{path}: checkpoint; {len(result.taken)} tensors taken, {len(result.left)} without a "
        f"place, {len(result.fresh)} fresh ones in attention: train it before use"
    )
