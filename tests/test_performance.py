"""Settings for speed and memory change nothing but the last bits; speed is reported truly."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed_helpers import group_of_one
from model_helpers import make_model
from rich.console import Console
from tolerances import BIT_LINEAR_GRADIENT, COMPILED_DENSE_LOSS, COMPILED_LOSS, Tolerance
from torch.nn.parallel import DistributedDataParallel
from training_helpers import config, losses, records, stop_after, trainer

from tinylm import BitLinear, ModelConfig, TinyLM, preset
from tinylm.attention_backends import BackendChain, PlainBackend
from tinylm.checkpoint import load_model
from tinylm.data import Batch, BatchOrder
from tinylm.dense_linear import DenseLinear
from tinylm.errors import ConfigError, DataError
from tinylm.performance import apply_performance
from tinylm.prefetch import BatchQueue
from tinylm.throughput import PEAK_TFLOPS, Throughput, flops_per_token, peak_flops
from tinylm.training_config import PerformanceConfig


def close(a: Path, b: Path, tolerance: Tolerance = COMPILED_LOSS) -> None:
    found, expected = losses(a), losses(b)
    assert [step for step, _ in found] == [step for step, _ in expected]
    tolerance.assert_close(
        torch.tensor([loss for _, loss in found]), torch.tensor([loss for _, loss in expected])
    )


def test_compiled_run_is_the_eager_run(tmp_path: Path) -> None:
    torch._dynamo.reset()
    # Small steps: on the way up a flipped code would lead the two runs apart.
    options: dict[str, Any] = {"schedule": {"lr": 1e-4, "warmup_steps": 2}}
    trainer(tmp_path / "eager", **options).train()
    compiled = trainer(tmp_path / "compiled", performance={"compile": True}, **options)
    compiled.train()
    close(tmp_path / "compiled", tmp_path / "eager")
    assert torch._dynamo.utils.counters["graph_break"] == {}
    # One compilation serves every layer, and none was made for evaluation.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # a layer, the loss
    assert list(compiled.model.state_dict()) == list(trainer(tmp_path / "names").model.state_dict())


def test_a_layer_under_ddp_is_compiled_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._dynamo.config, "optimize_ddp", True)  # its default
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # Layers of more than the MiB that DDP's first bucket holds.
    config = ModelConfig(vocab_size=64, hidden_size=256, num_layers=2, num_heads=4, max_seq_len=8)
    model = TinyLM.from_config(config)
    apply_performance(model, PerformanceConfig(compile=True), torch.device("cpu"))
    ids = torch.zeros(1, 8, dtype=torch.int64)
    with group_of_one():
        DistributedDataParallel(model)(ids, labels=ids).backward()
    assert torch._dynamo.utils.counters["aot_autograd"]["total"] == 2  # a layer, the loss


def test_compiled_dense_run_is_the_eager_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": {"dense": True}}
    trainer(tmp_path / "eager", **options).train()
    trainer(tmp_path / "compiled", performance={"compile": True}, **options).train()
    close(tmp_path / "compiled", tmp_path / "eager", COMPILED_DENSE_LOSS)


def test_compiled_layer_has_the_eager_outputs_and_gradients() -> None:
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        layer = BitLinear(96, 24)
        if compiled:
            layer.compile(fullgraph=True)
        x = torch.randn(3, 5, 96, requires_grad=True)
        y = layer(x)
        y.backward(torch.randn(3, 5, 24))
        results.append([y.detach(), x.grad, layer.weight.grad])
    for found, expected in zip(*results, strict=True):
        BIT_LINEAR_GRADIENT.assert_close(found, expected)


def test_compiled_run_resumes_exactly(tmp_path: Path) -> None:
    options: dict[str, Any] = {"performance": {"compile": True}}
    trainer(tmp_path / "whole", **options).train()
    out = tmp_path / "parts"
    run = trainer(out, **options)
    stop_after(run, 5)
    assert run.train().step == 5
    trainer(out, resume=True, **options).train()
    assert losses(out) == losses(tmp_path / "whole")


def test_activation_checkpointing_changes_no_bit(tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": {"max_seq_len": 32, "dropout": 0.1}}
    trainer(tmp_path / "kept", **options).train()
    trainer(tmp_path / "again", performance={"activation_checkpointing": True}, **options).train()
    assert losses(tmp_path / "again") == losses(tmp_path / "kept")


def test_activation_checkpointing_computes_the_layers_twice() -> None:
    model = make_model().train()
    calls: list[int] = []
    model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    ids = torch.randint(512, (2, 8))
    model(ids, labels=ids).backward()
    assert len(calls) == 1
    model.recompute_layers = True
    model(ids, labels=ids).backward()
    assert len(calls) == 3


def test_small_chunks_are_the_same_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {"schedule": {"lr": 1e-4, "warmup_steps": 2}}
    trainer(tmp_path / "one", **options).train()
    trainer(tmp_path / "many", performance={"loss_chunk": 50}, **options).train()
    close(tmp_path / "many", tmp_path / "one")


def test_settings_may_change_when_a_run_goes_on(tmp_path: Path) -> None:
    trainer(tmp_path).train()
    changed = {
        "prefetch": 0,
        "loss_chunk": 64,
        "activation_checkpointing": True,
        "peak_tflops": 1.0,
    }
    run = trainer(tmp_path, resume=True, training={"max_steps": 9}, performance=changed)
    assert run.train().step == 9
    assert "mfu" in records(tmp_path, "train")[-1]


def test_bad_settings_are_named() -> None:
    for values, message in (
        ({"loss_chunk": 0}, "loss_chunk must be above zero, found 0"),
        ({"prefetch": -1}, "prefetch must be zero or more, found -1"),
        ({"peak_tflops": 0.0}, "peak_tflops must be above zero"),
        ({"quantizers": "cuda"}, "quantizers must be one of auto, torch, triton, found 'cuda'"),
    ):
        with pytest.raises(ConfigError, match=message):
            PerformanceConfig(**values)
    with pytest.raises(ConfigError, match="expected a CUDA device, found cpu"):
        trainer(Path("unused"), performance={"quantizers": "triton"})


# ---- the dense twin


def test_dense_twin_differs_in_the_quantisers_only(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ternary = TinyLM.from_config(preset("tinylm-test"))
    torch.manual_seed(0)
    dense = TinyLM.from_config(preset("tinylm-test").replace(dense=True))
    assert not dense.bit_linears()
    names = [n for n, m in dense.named_modules() if isinstance(m, DenseLinear)]
    assert names == list(ternary.bit_linears())
    for (a, x), (b, y) in zip(
        ternary.state_dict().items(), dense.state_dict().items(), strict=True
    ):
        assert a == b and torch.equal(x, y)
    with pytest.raises(ConfigError, match="no ternary weights to pack"):
        dense.pack()


def test_dense_twin_trains_saves_and_generates(tmp_path: Path) -> None:
    sample = {"eval_every": 4, "eval_max_tokens": 500, "sample_tokens": 4}
    run = trainer(tmp_path, model={"dense": True}, evaluation=sample)
    summary = run.train()
    assert summary.val_loss is not None and summary.val_loss < records(tmp_path, "eval")[0]["loss"]
    assert "flip_rate" not in records(tmp_path, "train")[0]
    assert len(records(tmp_path, "sample")) == 3
    model = load_model(tmp_path / "last")
    assert model.config.dense
    ids = torch.randint(384, (1, 20))
    x = model.layers[0].input_layernorm(model.embed_tokens(ids))
    layer = model.layers[0].mlp.gate_proj
    assert torch.equal(layer(x), x @ layer.weight.t())


def test_dense_model_is_not_exported() -> None:
    from tinylm_export.model_graph import build_onnx

    with pytest.raises(ValueError, match="expected a ternary model, found a dense one"):
        build_onnx(make_model(dense=True))


# ---- speed


def test_flops_are_those_of_the_products() -> None:
    """Count by hand what one token of the 300M shape is multiplied with."""
    with torch.device("meta"):
        model = TinyLM.from_config(preset("tinylm-300m"))
    layer = 1024 * (16 * 64 + 256 + 32) + 256 * 16 * (32 + 64) + 1024 * 1024 + 3 * 1024 * 2816
    matrices = 24 * layer + 32000 * 1024
    attention = 24 * 16 * (64 + 64) * 2048
    assert flops_per_token(model, 2048) == 6 * matrices + 6 * attention
    assert flops_per_token(model, 2048, causal=True) == 6 * matrices + 3 * attention
    untied = TinyLM.from_config(preset("tinylm-test").replace(tie_embeddings=False))
    tied = TinyLM.from_config(preset("tinylm-test"))
    assert flops_per_token(untied, 64) == flops_per_token(tied, 64)
    dense = TinyLM.from_config(preset("tinylm-test").replace(dense=True))
    assert flops_per_token(dense, 64) == flops_per_token(tied, 64)


def test_peak_by_device_name_and_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert peak_flops(cpu) is None and peak_flops(cpu, 2.5) == 2.5e12
    for name, expected in (
        ("NVIDIA H100 80GB HBM3", PEAK_TFLOPS["H100"]),
        ("NVIDIA H100 PCIe", PEAK_TFLOPS["H100 PCIe"]),
        ("NVIDIA A100-SXM4-80GB", PEAK_TFLOPS["A100"]),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_flops(cuda) == expected * 1e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA Unheard-of")
    assert peak_flops(cuda) is None


def test_records_hold_memory_and_mfu(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    from tinylm.trainer import Trainer

    run = Trainer(config(tmp_path, performance={"peak_tflops": 0.5}), console=console)
    run.train()
    record = records(tmp_path, "train")[-1]
    speed = record["tokens_per_second"]
    assert record["mfu"] == pytest.approx(speed * flops_per_token(run.model, 32) / 0.5e12)
    assert record["peak_memory_bytes"] > 50e6
    assert "mfu" in console.file.getvalue() and "GiB" in console.file.getvalue()  # type: ignore[attr-defined]
    without = Throughput.of(run.model, torch.device("cpu"))
    assert set(without.fields(1.0)) == {"peak_memory_bytes"}


# ---- batches


def parts_of(indices: np.ndarray) -> list[Batch]:
    ids = torch.from_numpy(indices)[:, None]
    return [Batch(input_ids=ids, labels=ids, attention_mask=None)]


def take(queue: BatchQueue, count: int) -> list[list[int]]:
    return [parts[0].input_ids.flatten().tolist() for parts in itertools.islice(queue, count)]


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_batches_read_ahead_are_in_order_and_resume_anywhere(depth: int) -> None:
    def queue() -> BatchQueue:
        return BatchQueue(BatchOrder(10, 3, seed=1), parts_of, depth=depth)

    order = BatchOrder(10, 3, seed=1)
    expected = [next(order).tolist() for _ in range(12)]
    whole = queue()
    assert take(whole, 12) == expected
    for done in (0, 1, 4, 7):
        first = queue()
        assert take(first, done) == expected[:done]
        second = queue()
        take(second, 2)  # what is under way must be dropped
        second.load_state_dict(first.state_dict())
        assert second.state_dict() == first.state_dict()
        assert take(second, 12 - done) == expected[done:]


def test_problem_in_the_background_is_raised_where_the_batch_is_taken() -> None:
    def broken(indices: np.ndarray) -> list[Batch]:
        if 7 in indices:
            raise DataError("the file has vanished")
        return parts_of(indices)

    order = BatchOrder(10, 1, seed=0)
    place = [int(next(order)[0]) for _ in range(10)].index(7)
    queue = BatchQueue(BatchOrder(10, 1, seed=0), broken, depth=3)
    take(queue, place)
    with pytest.raises(DataError, match="vanished"):
        next(queue)


def test_every_layer_is_told_who_quantises(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    assert {m.quantizers for m in run.model.modules() if isinstance(m, BitLinear)} == {"torch"}


def test_attention_and_determinism_are_set_up(
    tmp_path: Path, fresh_backends: None, recwarn: pytest.WarningsRecorder
) -> None:
    run = trainer(tmp_path / "run", performance={"attention": "cudnn", "deterministic": True})
    try:
        assert torch.are_deterministic_algorithms_enabled()
        run.train()
    finally:
        torch.use_deterministic_algorithms(False)
    # There is no GPU in this run: cuDNN gives way, and says so once.
    messages = [str(w.message) for w in recwarn if "cudnn" in str(w.message)]
    assert len(messages) == 1 and "needs a CUDA device" in messages[0]
    trainer(tmp_path / "usual").train()
    assert losses(tmp_path / "run") == losses(tmp_path / "usual")


def test_cudnn_is_tried_only_by_name(fresh_backends: None) -> None:
    tried: list[str] = []

    class Noted(PlainBackend):
        def __init__(self, name: str) -> None:
            self.name = name

        def attend(self, q: Any, k: Any, v: Any, **options: Any) -> Any:
            tried.append(self.name)
            return super().attend(q, k, v, **options)

    chain = BackendChain([Noted("cudnn"), Noted("sdpa")], by_name_only=["cudnn"])
    q = torch.zeros(1, 2, 1, 4)
    chain.attend(q, q, q, scale=1.0)
    chain.attend(q, q, q, scale=1.0, first="cudnn")
    assert tried == ["sdpa", "cudnn"]
