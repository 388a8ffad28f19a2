"""Cutting batches, and the settings and environment of several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_helpers import config

from tinylm.batch_plan import plan_batch
from tinylm.device import choose_device
from tinylm.distributed import World, launched_world
from tinylm.errors import ConfigError
from tinylm.parallel import choose_mode
from tinylm.training_config import LoopConfig, ParallelConfig


def world(size: int, rank: int = 0, local_size: int | None = None) -> World:
    local_size = local_size or size
    return World(rank=rank, size=size, local_rank=rank % local_size, local_size=local_size)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("cut", [{}, {"grad_accum_steps": 1}, {"micro_batch_size": 1}])
def test_processes_and_parts_make_up_the_batch_in_order(size: int, cut: dict[str, int]) -> None:
    batch = np.random.default_rng(0).permutation(100)[:12]
    training = LoopConfig(batch_size=12, **cut)
    plans = [plan_batch(training, world(size, rank), seq_len=8) for rank in range(size)]
    parts = [plan.parts(batch) for plan in plans]
    assert {len(p) for p in parts} == {12 // size if "micro_batch_size" in cut else 1}
    assert max(len(part) for share in parts for part in share) == plans[0].part_size
    assert np.array_equal(np.concatenate([np.concatenate(share) for share in parts]), batch)


@pytest.mark.parametrize(
    ("training", "size", "message"),
    [
        ({"batch_size": 16}, 3, r"16 sequences \(128 tokens\) can't be shared equally by 3 "
         r"processes\. Make --batch-size a multiple of 3 \(--batch-tokens one of 24\)"),
        ({"batch_size": 16, "micro_batch_size": 3}, 2, r"leaves 8 sequences to each, which "
         r"micro_batch_size 3 does not divide\. .* multiple of 6 \(--batch-tokens one of 48\)"),
        ({"batch_size": 4, "grad_accum_steps": 4}, 2, r"at most the 2 sequences .* found 4"),
    ],
)  # fmt: skip
def test_batch_that_does_not_divide_is_refused(
    training: dict[str, int], size: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_batch(LoopConfig(**training), world(size), seq_len=8)


def test_batch_in_tokens_is_a_number_of_sequences(tmp_path: Path) -> None:
    sections: dict[str, Any] = {"training": {"batch_tokens": 320, "batch_size": None}}
    training = config(tmp_path, **sections).training
    assert (training.batch_size, training.batch_tokens) == (10, None)
    sections["training"]["batch_tokens"] = 330
    with pytest.raises(ConfigError, match=r"multiple of max_seq_len 32, found 330; .* 320 and 352"):
        config(tmp_path, **sections)
    with pytest.raises(ConfigError, match="give batch_size or batch_tokens, not both"):
        LoopConfig(batch_size=4, batch_tokens=64)
    with pytest.raises(ConfigError, match="give grad_accum_steps or micro_batch_size, not both"):
        LoopConfig(grad_accum_steps=2, micro_batch_size=4)
    assert LoopConfig().batch_size == 16


@pytest.mark.parametrize(
    ("parallel", "size", "expected"),
    [
        ({}, 1, "none"),
        ({}, 2, "ddp"),
        ({"mode": "ddp"}, 1, "none"),
        ({"mode": "fsdp"}, 1, "fsdp"),
        ({"mode": "hsdp", "replicas": 2}, 4, "hsdp"),
    ],
)
def test_mode_follows_settings_and_processes(
    parallel: dict[str, Any], size: int, expected: str
) -> None:
    assert choose_mode(ParallelConfig(**parallel), world(size)) == expected


def test_groups_that_hsdp_cannot_form_are_refused() -> None:
    hsdp = ParallelConfig(mode="hsdp")
    assert choose_mode(hsdp, world(8, local_size=4)) == "hsdp"  # one group a machine
    with pytest.raises(ConfigError, match=r"two or more groups of equal size, found 1 for 8"):
        choose_mode(hsdp, world(8))
    with pytest.raises(ConfigError, match=r"found 3 for 8 processes"):
        choose_mode(ParallelConfig(mode="hsdp", replicas=3), world(8))
    with pytest.raises(ConfigError, match=r"replicas belongs to --parallel hsdp, .*'fsdp'"):
        ParallelConfig(mode="fsdp", replicas=2)
    with pytest.raises(
        ConfigError, match=r"reshard_after_forward .* fsdp or hsdp only, found .*ddp"
    ):
        ParallelConfig(mode="ddp", reshard_after_forward=False)
    with pytest.raises(ConfigError, match=r"gather_mb belongs to --parallel fsdp or hsdp, .*None"):
        ParallelConfig(gather_mb=100)
    with pytest.raises(ConfigError, match=r"gather_mb must be zero or more, found -1"):
        ParallelConfig(mode="fsdp", gather_mb=-1)
    with pytest.raises(ConfigError, match=r"mode must be one of ddp, fsdp, hsdp, found 'dp'"):
        ParallelConfig(mode="dp")


def test_environment_of_torchrun_is_checked() -> None:
    assert launched_world({}) == World()
    good = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert launched_world(good) == World(rank=3, size=4, local_rank=1, local_size=2)
    with pytest.raises(ConfigError, match=r"RANK must be a number where WORLD_SIZE is 4, .*None"):
        launched_world({"WORLD_SIZE": "4"})
    with pytest.raises(ConfigError, match=r"found 4 of 4"):
        launched_world({**good, "RANK": "4"})


def test_each_process_needs_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu", local_rank=1, local_size=2) == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"auto, cpu or cuda where 2 processes .*'cuda:1'"):
        choose_device("cuda:1", local_rank=1, local_size=2)
    many = torch.cuda.device_count() + 1
    if many > 1:
        with pytest.raises(ConfigError, match=rf"{many} processes on this machine need as many"):
            choose_device("cuda", local_rank=0, local_size=many)


def test_what_is_said_to_several_is_said_to_one() -> None:
    alone = World()
    assert alone.is_main and alone.sum([1.5, 2.0]) == [1.5, 2.0] and alone.gather("a") == ["a"]
    assert alone.any(True) and not alone.any(False) and alone.on_main(lambda: 7) == 7
