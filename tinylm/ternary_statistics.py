"""The state of ternary weights: how many codes are -1, 0 and +1, and how many a step changed."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinylm import quantization
from tinylm.bitlinear import BitLinear
from tinylm.device import start_reading
from tinylm.distributed import is_sharded, local, sum_over_parts
from tinylm.quantization import abs_sum, scale_of_sum

if TYPE_CHECKING:
    from tinylm.model import TinyLM

_WEIGHTS_AT_ONCE = 2**27  # what is stacked, and copied for it


@dataclasses.dataclass(frozen=True, kw_only=True)
class TernaryCodes:
    """The codes of some layers of one kind.

    They are stacked, because thousands of small operators would keep a GPU waiting for the host.

    Attributes:
        kind: Last part of their module paths, such as ``q_proj``.
        size: Codes in all; more than there are here where the layers are sharded.
        values: int8 [L, N, K]; of sharded layers this process's rows, under the whole scales.
    """

    kind: str
    size: int
    values: Tensor


@torch.no_grad()
def ternary_codes(model: TinyLM) -> list[TernaryCodes]:
    """Return the codes of every BitLinear; of a sharded model every process must ask."""
    stacks = _stacks(model)
    if not stacks:
        return []
    totals = torch.cat([abs_sum(_stacked(layers), dim=(1, 2)) for _, layers in stacks])
    lengths = [len(layers) for _, layers in stacks]
    result = []
    # Each is stacked once more: kept, the stacks would be a second model.
    for (kind, layers), total in zip(stacks, _over_all(totals, model).split(lengths), strict=True):
        numel = layers[0].weight.numel()
        scale = scale_of_sum(total, numel)[:, None, None]
        values = quantization.ternary_codes(_stacked(layers), scale).to(torch.int8)
        result.append(TernaryCodes(kind=kind, size=len(layers) * numel, values=values))
    return result


def _stacks(model: TinyLM) -> list[tuple[str, list[BitLinear]]]:
    """Return the layers by kind, in as many portions as may be stacked."""
    kinds: dict[str, list[BitLinear]] = {}
    for name, layer in model.bit_linears().items():
        kinds.setdefault(name.rpartition(".")[2], []).append(layer)
    stacks = []
    for kind, layers in kinds.items():
        together = max(1, _WEIGHTS_AT_ONCE // layers[0].weight.numel())
        for start in range(0, len(layers), together):
            stacks.append((kind, layers[start : start + together]))
    return stacks


def _stacked(layers: Sequence[BitLinear]) -> Tensor:
    """Return the weights, or this process's rows of them, float32 [L, N, K]."""
    return torch.stack([local(layer.weight) for layer in layers]).float()


def _over_all(counted: Tensor, model: TinyLM) -> Tensor:
    """Return what was counted of all parts of a model, whose weights are all sharded or none."""
    weight = model.embed_tokens.weight
    return sum_over_parts(counted, weight) if is_sharded(weight) else counted


def ternary_statistics(
    model: TinyLM, before: Sequence[TernaryCodes] | None = None
) -> dict[str, Any]:
    """Count the ternary codes of a model over all layers and per kind of layer.

    Args:
        model: Sharded or not; of a sharded one every process must ask.
        before: The codes before an update, from :func:`ternary_codes`; adds the flip rate, the
            part of the codes that the update changed.

    Returns:
        ``fraction_minus``, ``fraction_zero``, ``fraction_plus``; ``zero_by_kind`` by kind of layer;
        and ``flip_rate``. Nothing for a dense model.
    """
    return start_statistics(model, before)()


def start_statistics(
    model: TinyLM, before: Sequence[TernaryCodes] | None = None
) -> Callable[[], dict[str, Any]]:
    """Begin what :func:`ternary_statistics` does; return what waits for the result.

    A GPU counts the weights as they are now, and may be given more to do meanwhile.
    """
    codes = ternary_codes(model)
    if not codes:
        return dict
    earlier = [None] * len(codes) if before is None else [found.values for found in before]
    counts = [_count(found.values, old) for found, old in zip(codes, earlier, strict=True)]
    read = start_reading(_over_all(torch.stack(counts), model).flatten())
    # What waits must not keep the codes, a byte a weight, while the next batch is under way.
    sizes, with_flips = [(found.kind, found.size) for found in codes], before is not None

    def finish() -> dict[str, Any]:
        figures = np.asarray(read(), dtype=np.int64).reshape(len(sizes), -1)
        return _fractions(sizes, figures, with_flips=with_flips)

    return finish


def _count(codes: Tensor, before: Tensor | None) -> Tensor:
    """Return how many codes are -1, are not 0, and have changed: int64 [3]."""
    nonzero = codes.count_nonzero()
    changed = torch.zeros_like(nonzero) if before is None else (codes != before).sum()
    return torch.stack(((codes < 0).sum(), nonzero, changed))


def _fractions(
    sizes: Sequence[tuple[str, int]], figures: npt.NDArray[np.int64], *, with_flips: bool
) -> dict[str, Any]:
    """Turn the figures [L, 3] of layers, each of a kind and a size, into the statistics."""
    minus, nonzero, flipped = map(int, figures.sum(axis=0))
    total = sum(size for _, size in sizes)
    size_of: Counter[str] = Counter()
    nonzero_of: Counter[str] = Counter()
    for (kind, size), (_, found, _) in zip(sizes, figures.tolist(), strict=True):
        size_of[kind] += size
        nonzero_of[kind] += found
    result: dict[str, Any] = {
        "fraction_minus": minus / total,
        "fraction_zero": (total - nonzero) / total,
        "fraction_plus": (nonzero - minus) / total,
        "zero_by_kind": {kind: (size - nonzero_of[kind]) / size for kind, size in size_of.items()},
    }
    return {**result, "flip_rate": flipped / total} if with_flips else result
