"""``humming-kernels`` from PyPI: 2-bit weights, with int8 or bfloat16 activations.

It compiles a kernel for each shape and number of rows when that is first wanted, some seconds each;
:func:`compile_all` does that beforehand, on all cores.
"""

from __future__ import annotations

import concurrent.futures
import functools
import json
import os
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from bench_records import NotRunError, first_line, log
from gpu_gemm_contenders import GpuGemmContender
from gpu_gemm_problem import GpuGemmProblem
from gpu_timing import REFUSALS, Call
from torch import Tensor
from typing_extensions import override

_OUTPUTS_MULTIPLE = 128  # its own choices of tiles fail for less, such as N = 1312


def import_humming() -> Any:
    """Import its layer module.

    Raises:
        NotRunError: It is not installed, or can't be loaded.
    """
    try:
        import humming.layer

        return humming.layer
    except REFUSALS as error:
        reason = f"can't be imported: {first_line(error)}; pip install 'tinylm[bench-gpu]'"
        raise NotRunError(reason) from error


def make_layer(codes: Tensor, scale: float, activation: str | None) -> Any:
    """Make one layer of its own packing.

    Args:
        codes: int8 [N, K], ternary.
        scale: The weights' scale.
        activation: ``"int8"``, or None for bfloat16.
    """
    module = import_humming()
    num_outputs, num_inputs = codes.shape
    layer = module.HummingLayer(
        shape_n=num_outputs,
        shape_k=num_inputs,
        weight_config={"dtype": "int2"},
        input_config=None if activation is None else {"dtype": activation},
        pad_n_to_multiple=_OUTPUTS_MULTIPLE,
        torch_dtype=torch.bfloat16,
    ).cuda()
    scales = torch.full((num_outputs, 1), scale, dtype=torch.bfloat16, device=codes.device)
    layer.load_from_tensors({"weight": pack_int2(codes), "weight_scale": scales})
    layer.transform()
    return layer


def pack_int2(codes: Tensor) -> Tensor:
    """Pack codes + 2, sixteen to a word along K, first in the low bits: int32 [N, K / 16]."""
    lanes = (codes + 2).to(torch.uint8).unflatten(1, (-1, 4))
    packed = lanes[..., 0] | lanes[..., 1] << 2 | lanes[..., 2] << 4 | lanes[..., 3] << 6
    return packed.contiguous().view(torch.int32)


def tuning(layer: Any, num_rows: int) -> str:
    """Return its own choice for a number of rows; by default it compiles those for every number."""
    from humming.tune import get_heuristics_config

    return json.dumps(get_heuristics_config(layer_config=layer.humming_config, shape_m=num_rows))


Shape = tuple[int, int]  # N, K


class HummingA16(GpuGemmContender):
    """bfloat16 by 2 bits."""

    name = "humming w2a16"
    bits = 2.0
    limit = 2e-2  # 8 bits of the output, and of the scale
    activation: ClassVar[str | None] = None

    @override
    def load(self) -> None:
        self._copies = [
            make_layer(self.problem.codes, self.problem.scale, self.activation)
            for _ in range(self.num_copies)
        ]

    @override
    def bind(self, num_rows: int) -> Sequence[Call]:
        x = self.problem.x[:num_rows].contiguous()
        config = tuning(self._copies[0], num_rows)
        return [functools.partial(layer, x, tuning_config=config) for layer in self._copies]

    @override
    def answer(self) -> Tensor:
        return self.problem.dense_answer


class HummingA8(HummingA16):
    """int8 by 2 bits; quantises each row."""

    name = "humming w2a8"
    activation = "int8"
    note = "quantises each row in the timed call, as its name's a8 says"

    @override
    def answer(self) -> Tensor:
        return self.problem.quantized_answer(self.problem.x.float(), "int8")


KINDS = (HummingA8, HummingA16)


def compile_all(
    shapes: Sequence[Shape], rows: Sequence[int], seconds: float
) -> dict[tuple[str, Shape, int], NotRunError]:
    """Compile what the contenders will call, on all cores, before anything is timed.

    Args:
        shapes: N and K.
        rows: M.
        seconds: When to give up.

    Returns:
        By contender, shape and number of rows: why it can't run. It is not installed, the compiler
        fails, or is not done in time.
    """
    cases = [(kind, shape, m) for kind in KINDS for shape in shapes for m in rows]
    try:
        import_humming()
        layers = {
            (kind, shape): make_layer(GpuGemmProblem(*shape, 1).codes, 1.0, kind.activation)
            for kind in KINDS
            for shape in shapes
        }
    except NotRunError as reason:
        return {(kind.name, shape, m): reason for kind, shape, m in cases}
    except REFUSALS as error:
        refused = NotRunError(f"refuses: {first_line(error)}")
        return {(kind.name, shape, m): refused for kind, shape, m in cases}
    log(f"humming-kernels: compile {len(cases)} kernels")
    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    futures = {
        (kind.name, shape, m): pool.submit(_call_once, layers[kind, shape], m)
        for kind, shape, m in cases
    }
    done, _ = concurrent.futures.wait(futures.values(), timeout=seconds)
    pool.shutdown(wait=False, cancel_futures=True)
    torch.cuda.synchronize()
    reasons = {}
    for case, future in futures.items():
        if future not in done:
            reasons[case] = NotRunError(f"not compiled within {seconds:g} s")
        elif (failure := future.exception()) is not None:
            reasons[case] = NotRunError(f"can't compile: {first_line(failure)}")
    return reasons


def _call_once(layer: Any, num_rows: int) -> None:
    x = torch.zeros(num_rows, layer.shape_k, dtype=torch.bfloat16, device="cuda")
    layer(x, tuning_config=tuning(layer, num_rows))
