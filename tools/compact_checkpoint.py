"""A trained checkpoint as small as it gets, in parts of a few MiB, and the checkpoint made from it.

Ternary codes go five to a byte, the embedding to int8 with one scale a row, norms stay float32: the
300M model takes 83 MiB. `unpack` writes an ordinary checkpoint: its ternary codes are the trained
ones, its scales those within one float32 rounding, its embedding is the rounded one.

Example: python tools/compact_checkpoint.py pack run/best parts
         python tools/compact_checkpoint.py unpack parts checkpoint
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from tinylm import TinyLM
from tinylm.checkpoint import load_model, resolve_checkpoint, save_model
from tinylm.config import ModelConfig
from tinylm.errors import CheckpointError
from tinylm.quantization import quantize_rows
from tinylm.tokenizer import load_tokenizer, save_tokenizer

INDEX_FILE = "index.json"
TOKENIZER_DIR = "tokenizer"
DEFAULT_PART_MIB = 15.0
_LANES = 5  # 3**5 = 243 fit into a byte


def pack_trits(codes: Tensor) -> Tensor:
    """Pack codes -1, 0, 1 five to a byte, the first in the lowest place of base 3."""
    flat = codes.flatten().to(torch.int16).add_(1)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % _LANES))
    powers = torch.tensor([3**i for i in range(_LANES)], dtype=torch.int16)
    return (flat.reshape(-1, _LANES) * powers).sum(dim=1).to(torch.uint8)


def unpack_trits(packed: Tensor, shape: torch.Size) -> Tensor:
    """Return the float32 codes that :func:`pack_trits` was given."""
    powers = torch.tensor([3**i for i in range(_LANES)], dtype=torch.int16)
    digits = packed.to(torch.int16)[:, None] // powers % 3
    return digits.flatten()[: shape.numel()].reshape(shape).float().sub_(1.0)


def weight_from_codes(codes: Tensor, scale: float) -> Tensor:
    """Return a weight that ternarises to these codes, with this scale but for one rounding.

    The scale of a weight is the mean of its magnitudes, which zeros lower: the other values are
    longer by as much, and clamping still makes them 1.
    """
    filled = float(codes.count_nonzero()) / codes.numel()
    return codes * float(np.float32(scale / filled)) if filled else codes


def pack(checkpoint: Path, out: Path, *, part_mib: float = DEFAULT_PART_MIB) -> list[Path]:
    """Write ``index.json``, the tokenizer and the parts into a new folder.

    Returns:
        The parts.

    Raises:
        CheckpointError: Not a ternary checkpoint, or ``out`` exists.
    """
    if out.exists():
        raise CheckpointError(f"{out}: exists. Name a new folder.")
    directory = resolve_checkpoint(checkpoint)
    model = load_model(directory)
    if model.config.dense:
        raise CheckpointError(f"{directory}: expected a ternary model, found a dense one.")
    tensors: dict[str, Tensor] = {}
    ternary = {f"{name}.weight" for name in model.bit_linears()}
    for name, layer in model.bit_linears().items():
        codes, scale = layer.weight_codes()
        tensors[f"{name}.weight.trits"] = pack_trits(codes)
        tensors[f"{name}.weight.scale"] = scale.reshape(1)
    for name, parameter in model.named_parameters():  # shared ones once
        if name in ternary:
            continue
        if parameter.ndim == 2:
            rows, scales = quantize_rows(parameter.detach())
            tensors[f"{name}.rows"], tensors[f"{name}.scales"] = rows, scales
        else:
            tensors[name] = parameter.detach()
    data = safetensors.torch.save({name: t.contiguous() for name, t in tensors.items()})
    out.mkdir(parents=True)
    save_tokenizer(
        load_tokenizer(directory, vocab_size=model.config.vocab_size), out / TOKENIZER_DIR
    )
    size = int(part_mib * 2**20)
    parts = []
    for start in range(0, len(data), size):
        parts.append(out / f"part-{len(parts):03d}.bin")
        parts[-1].write_bytes(data[start : start + size])
    index = {
        "config": model.config.to_dict(),
        "parts": [part.name for part in parts],
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    (out / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return parts


def unpack(folder: Path, out: Path) -> None:
    """Write a checkpoint from what :func:`pack` wrote.

    Raises:
        CheckpointError: A part is missing or altered, or ``out`` can't be written.
    """
    try:
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        data = b"".join((folder / name).read_bytes() for name in index["parts"])
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: not a whole packed checkpoint ({error}).") from error
    if hashlib.sha256(data).hexdigest() != index["sha256"]:
        raise CheckpointError(f"{folder}: a part is truncated or altered. Copy the parts again.")
    tensors = safetensors.torch.load(data)
    model = TinyLM.from_config(ModelConfig.from_dict(index["config"], source=str(folder)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"{name}.trits" in tensors:
                codes = unpack_trits(tensors[f"{name}.trits"], parameter.shape)
                parameter.copy_(weight_from_codes(codes, float(tensors[f"{name}.scale"])))
            elif f"{name}.rows" in tensors:
                parameter.copy_(tensors[f"{name}.rows"] * tensors[f"{name}.scales"][:, None])
            else:
                parameter.copy_(tensors[name])
    tokenizer = load_tokenizer(folder / TOKENIZER_DIR, vocab_size=model.config.vocab_size)
    save_model(out, model, tokenizer=tokenizer)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="checkpoint or run -> folder of parts")
    packing.add_argument("checkpoint", type=Path)
    packing.add_argument("out", type=Path)
    packing.add_argument("--part-mib", type=float, default=DEFAULT_PART_MIB)
    unpacking = commands.add_parser("unpack", help="folder of parts -> checkpoint")
    unpacking.add_argument("folder", type=Path)
    unpacking.add_argument("out", type=Path)
    arguments = parser.parse_args()
    try:
        if arguments.command == "pack":
            for part in pack(arguments.checkpoint, arguments.out, part_mib=arguments.part_mib):
                print(part, part.stat().st_size)
        else:
            unpack(arguments.folder, arguments.out)
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
