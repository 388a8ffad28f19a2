import gc
import json
import math
import resource
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from training_helpers import config, inputs, losses, records, trainer, write_jsonl

from tinylm.checkpoint import check_intact, load_model
from tinylm.errors import CheckpointError, ConfigError, TrainingDivergedError
from tinylm.evaluate import evaluate
from tinylm.optim import optimizer_tensors
from tinylm.ternary_statistics import start_statistics, ternary_codes, ternary_statistics
from tinylm.trainer import Trainer


def snapshot(run: Trainer) -> dict[str, torch.Tensor]:
    tensors = dict(run.model.named_parameters()) | optimizer_tensors(run.model, run.optimizer)
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def differences(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    assert set(a) == set(b)
    return [name for name in a if not torch.equal(a[name], b[name])]


def test_training_learns_and_writes_what_it_promises(tmp_path: Path) -> None:
    run = trainer(
        tmp_path,
        training={"max_steps": 60, "batch_size": 8},
        schedule={"lr": 1e-2, "warmup_steps": 5},
        evaluation={"eval_every": 20, "sample_tokens": 5},
        checkpoint={"save_every": 25, "keep_last": 2},
        logging={"log_every": 10, "tensorboard": True},
    )
    summary = run.train()
    evaluations = {r["step"]: r for r in records(tmp_path, "eval")}
    assert list(evaluations) == [0, 20, 40, 60]
    # Logits of a random model have a variance of about one.
    assert evaluations[0]["loss"] == pytest.approx(math.log(384) + 0.5, abs=0.8)
    assert evaluations[60]["loss"] < evaluations[0]["loss"] - 0.7
    assert summary.val_loss == evaluations[60]["loss"] and not summary.stopped
    best = min((r for s, r in evaluations.items() if s), key=lambda r: r["loss"])["step"]
    kept = sorted(int(p.name[5:]) for p in (tmp_path / "checkpoints").iterdir())
    assert kept == sorted({50, 60, best})
    assert (tmp_path / "last").resolve().name == "step-00000060"
    assert (tmp_path / "best").resolve().name == f"step-{best:08d}"
    for checkpoint in (tmp_path / "checkpoints").iterdir():
        check_intact(checkpoint, training_state=True)

    logged = records(tmp_path, "train")
    assert [r["step"] for r in logged] == [10, 20, 30, 40, 50, 60]
    for record in logged:
        fractions = [record[f"fraction_{name}"] for name in ("minus", "zero", "plus")]
        assert sum(fractions) == pytest.approx(1.0) and all(0.1 < f < 0.6 for f in fractions)
        assert 0.0 < record["flip_rate"] < 0.2
        assert set(record["zero_by_kind"]) >= {"q_proj", "kv_b_proj", "down_proj"}
        assert record["tokens_per_second"] > 0
    assert logged[-1]["tokens"] == summary.tokens
    assert len(records(tmp_path, "sample")) == 4
    assert (tmp_path / "loss_curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert list((tmp_path / "tensorboard").glob("events*"))
    saved = json.loads((tmp_path / "training_config.json").read_text())
    assert saved["model"]["eos_token_id"] == 2 and saved["training"]["max_steps"] == 60


def test_without_tensorboard_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [
        n for n in sys.modules if n.startswith(("tensorboard", "torch.utils.tensorboard"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(
        ConfigError, match="pip install tensorboard, or train with --no-tensorboard"
    ):
        trainer(tmp_path, logging={"log_every": 1, "tensorboard": True}).train()


def test_unigram_entropy_is_the_validation_tokens(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    counts = Counter(run.data.val.corpus.tokens.tolist())
    total = sum(counts.values())
    expected = -sum(c / total * math.log(c / total) for c in counts.values())
    assert run.data.unigram_entropy == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("parts", [1, 3])
def test_loss_and_gradient_are_the_mean_over_all_tokens(
    tmp_path: Path, packing: bool, parts: int
) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", ["to be or not " * n for n in range(1, 9)])
    run = trainer(
        tmp_path / "run",
        data={"packing": packing, "train_file": str(rows)},
        training={"batch_size": 7, "grad_accum_steps": parts},
        optimizer={"max_grad_norm": 1e9},
    )
    # The reference goes through the rows one by one and takes one mean at the end.
    order = type(run.order)(len(run.data.train), 7, seed=0)
    token_losses = []
    for index in next(order):
        batch = run.data.train.batch(np.array([index]))
        logits = run.model(batch.input_ids, batch.attention_mask)[0].double()
        keep = batch.labels[0] != -100
        chosen = F.log_softmax(logits[keep], dim=-1)[range(int(keep.sum())), batch.labels[0][keep]]
        token_losses.append(-chosen)
    loss = torch.cat(token_losses).mean()
    lengths = {len(part) for part in token_losses}
    assert packing or len(lengths) > 1  # else the parts would be equal and nothing be tested
    gradients = torch.autograd.grad(loss, list(run.model.parameters()))
    norm = torch.stack([g.norm() for g in gradients]).norm()

    result = run.train_step()
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-3)
    assert result.num_tokens == sum(len(part) for part in token_losses)


def test_gradients_are_clipped_before_the_update(tmp_path: Path) -> None:
    run = trainer(tmp_path, optimizer={"max_grad_norm": 0.01, "beta1": 0.5})
    result = run.train_step()
    assert result.grad_norm > 0.1
    moments = optimizer_tensors(run.model, run.optimizer)
    first = [m for name, m in moments.items() if name.startswith("exp_avg.")]
    # After one step the first moment is (1 - beta1) times the clipped gradient.
    assert torch.stack([m.norm() for m in first]).norm().item() == pytest.approx(0.005, rel=1e-3)


def test_flip_rate_counts_the_codes_that_a_step_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path)
    run.train_step()

    def codes() -> dict[str, torch.Tensor]:
        return {name: layer.weight_codes()[0] for name, layer in run.model.bit_linears().items()}

    before = codes()
    reported = run.train_step(with_statistics=True).ternary
    after = codes()
    changed = sum(int((after[n] != before[n]).sum()) for n in after)
    size = sum(code.numel() for code in after.values())
    assert changed > 0 and reported["flip_rate"] == changed / size
    for name, value in (("minus", -1), ("zero", 0), ("plus", 1)):
        found = sum(int((code == value).sum()) for code in after.values())
        assert reported[f"fraction_{name}"] == found / size
    assert set(reported["zero_by_kind"]) == {name.rpartition(".")[2] for name in after}
    of_kind = [code for name, code in after.items() if name.endswith(".down_proj")]
    zeros = sum(int((code == 0).sum()) for code in of_kind)
    share = zeros / sum(code.numel() for code in of_kind)
    assert reported["zero_by_kind"]["down_proj"] == share
    only = ternary_statistics(run.model)
    assert only == {name: value for name, value in reported.items() if name != "flip_rate"}
    monkeypatch.setattr("tinylm.ternary_statistics._WEIGHTS_AT_ONCE", 1)  # layer by layer
    assert ternary_statistics(run.model) == only


def test_waiting_for_statistics_keeps_no_codes(tmp_path: Path) -> None:
    model = trainer(tmp_path).model

    def codes_alive() -> int:
        gc.collect()
        found = (t for t in gc.get_objects() if type(t) is torch.Tensor)
        return sum(t.dtype == torch.int8 and t.ndim == 3 for t in found)

    others = codes_alive()
    codes = ternary_codes(model)
    assert codes_alive() == others + len(codes) > others
    statistics = start_statistics(model, codes)
    del codes
    assert codes_alive() == others
    assert statistics()["flip_rate"] == 0.0


def test_evaluation_is_perplexity_and_bits_per_byte_of_the_file(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    corpus = run.data.val.corpus
    tokens = torch.from_numpy(corpus.tokens.astype(np.int64))
    total = 0.0
    for start in range(0, len(tokens) - 1, 32):
        window = tokens[start : start + 33]
        with torch.no_grad():
            logits = run.model.eval()(window[None, :-1])[0].double()
        total -= F.log_softmax(logits, dim=-1)[range(len(window) - 1), window[1:]].sum().item()
    run.model.train()
    result = evaluate(run.model, run.data.val, batch_size=3)
    assert result is not None and run.model.training
    text_bytes = sum(
        len(json.loads(line)["text"].encode()) for line in inputs().val.read_text().splitlines()
    )
    assert result.num_tokens == len(tokens) - 1
    assert result.loss == pytest.approx(total / (len(tokens) - 1), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.bits_per_byte == pytest.approx(total / math.log(2) / text_bytes, rel=1e-5)
    assert result.bits_per_byte_basis == "whole file"


def test_a_part_of_the_file_is_spread_over_it_and_says_so(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    whole = evaluate(run.model, run.data.val)
    part = evaluate(run.model, run.data.val, max_tokens=600)
    assert whole is not None and part is not None
    assert 500 < part.num_tokens < 700 < whole.num_tokens
    assert part.bits_per_byte_basis == "token ratio"
    assert part.bits_per_byte == pytest.approx(whole.bits_per_byte, rel=0.05)


def test_evaluating_and_saving_do_not_touch_the_run(tmp_path: Path) -> None:
    often: dict[str, Any] = {
        "evaluation": {"eval_every": 1, "sample_tokens": 3},
        "checkpoint": {"save_every": 1},
    }
    dropout = {"model": {"dropout": 0.2, "max_seq_len": 32}}
    trainer(tmp_path / "often", **often, **dropout).train()
    trainer(tmp_path / "rarely", logging={"log_every": 1}, **dropout).train()
    assert losses(tmp_path / "often") == losses(tmp_path / "rarely")


def test_not_finite_step_is_rejected_before_it_does_harm(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train_step()
    weight = run.model.layers[1].mlp.down_proj.weight
    good = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] = math.inf
    before = snapshot(run)
    result = run.train_step(with_statistics=True)
    assert not result.accepted and not math.isfinite(result.loss) and result.ternary == {}
    assert differences(snapshot(run), before) == []
    assert all(p.grad is None for p in run.model.parameters())
    with torch.no_grad():
        weight[0, 0] = good
    assert run.train_step().accepted
    assert all(bool(p.isfinite().all()) for p in run.model.parameters())


def test_diverged_run_stops_and_names_the_last_good_checkpoint(tmp_path: Path) -> None:
    run = trainer(tmp_path, training={"max_steps": 20, "max_bad_steps": 3})
    real_take, seen = run.take_gradients, []

    def poisoned() -> Any:
        if len(seen) == 6:
            with torch.no_grad():
                run.model.norm.weight.fill_(math.inf)
        seen.append(real_take())
        return seen[-1]

    run.take_gradients = poisoned  # type: ignore[method-assign]
    with pytest.raises(TrainingDivergedError) as error:
        run.train()
    message = str(error.value)
    assert "diverged after step 6" in message and "3 steps in a row" in message
    assert f"last good one is {tmp_path}/checkpoints/step-00000004" in message
    # One more was under way when the third was counted.
    assert [bool(batch.loss.isfinite()) for batch in seen] == [True] * 6 + [False] * 4
    assert run.state.rejected_steps == 3
    check_intact(tmp_path / "last", training_state=True)
    assert all(bool(p.isfinite().all()) for p in load_model(tmp_path / "last").parameters())


def poison(run: Trainer, *bad: int) -> list[float]:
    """Give a run a norm weight that is not a number in its batches number ``bad``, from 1.

    Returns:
        The batches' losses, as they come.
    """
    real_take, taken = run.take_gradients, []

    def take() -> Any:
        weight = run.model.norm.weight
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.fill_(math.nan if len(taken) + 1 in bad else 1.0).mul_(kept)
        batch = real_take()
        with torch.no_grad():
            weight.copy_(kept)
        taken.append(batch.loss.item())
        return batch

    run.take_gradients = take  # type: ignore[method-assign]
    return taken


def test_single_bad_steps_are_counted_and_survived(tmp_path: Path) -> None:
    run = trainer(tmp_path, training={"max_bad_steps": 2})
    taken = poison(run, 2, 5)
    summary = run.train()
    assert (summary.step, summary.rejected_steps, len(taken)) == (8, 2, 10)


def test_looking_at_a_step_later_changes_nothing(tmp_path: Path) -> None:
    often: dict[str, Any] = {"evaluation": {"eval_every": 3}, "checkpoint": {"save_every": 4}}
    runs, batches = {}, {}
    for name in ("each", "rarely"):
        run = runs[name] = trainer(tmp_path / name, logging={"log_every": 1}, **often)
        batches[name] = poison(run, 2, 4, 9)
        if name == "each":
            run._must_look_after = lambda step: True  # type: ignore[method-assign]
        run.train()
    assert losses(tmp_path / "each") == losses(tmp_path / "rarely")
    assert [math.isnan(loss) for loss in batches["each"]] == [i in (1, 3, 8) for i in range(11)]
    np.testing.assert_array_equal(batches["each"], batches["rarely"])
    assert differences(snapshot(runs["each"]), snapshot(runs["rarely"])) == []
    assert runs["each"].state.to_dict() == runs["rarely"].state.to_dict()
    kept = [{p.name for p in (tmp_path / name / "checkpoints").iterdir()} for name in runs]
    assert kept[0] == kept[1] != set()


def test_next_batch_is_under_way_before_a_step_is_looked_at(tmp_path: Path) -> None:
    run = trainer(
        tmp_path,
        logging={"log_every": 2},
        evaluation={"eval_every": 100},
        checkpoint={"save_every": 4},
    )
    done: list[str] = []
    take, count = run.take_gradients, run._count_and_record
    run.take_gradients = lambda: (done.append("take"), take())[1]  # type: ignore[method-assign]
    run._count_and_record = lambda result: (done.append("count"), count(result))[1]  # type: ignore[method-assign, func-returns-value]
    run.train()
    # Steps 4 and 8 are saved: nothing is under way while they are. Logging waits for nothing.
    four = ["take", "take", "count", "take", "count", "take", "count", "count"]
    assert done == 2 * four


def test_absurd_learning_rate_ends_in_the_divergence_error(tmp_path: Path) -> None:
    run = trainer(tmp_path, schedule={"lr": 1e38, "warmup_steps": 0}, training={"max_steps": 30})
    with pytest.raises(TrainingDivergedError, match=r"lower --lr"):
        run.train()


def test_full_disk_stops_the_run_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    real_take = run.take_gradients
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk_later() -> Any:
        if run.state.step == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        return real_take()

    run.take_gradients = fill_disk_later  # type: ignore[method-assign]
    try:
        with pytest.raises(CheckpointError, match=r"step-00000008: can't be written: .*--resume"):
            run.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]
    resumed = trainer(tmp_path, resume=True)
    assert resumed.state.step == 4
    assert resumed.train().step == 8


def test_epochs_become_steps(tmp_path: Path) -> None:
    run = trainer(tmp_path, training={"max_steps": None, "epochs": 2, "batch_size": 4})
    assert run.total_steps == math.ceil(2 * len(run.data.train) / 4)
    assert trainer(tmp_path, training={"max_steps": None}).total_steps == math.ceil(
        len(run.data.train) / 4
    )


def test_bf16_autocast_trains_on_the_cpu_too(tmp_path: Path) -> None:
    run = trainer(tmp_path, training={"precision": "bf16"})
    assert run.train().val_loss is not None
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    got, exact = losses(tmp_path), trainer(tmp_path / "fp32").train_step()
    assert got[0][1] == pytest.approx(exact.loss, rel=0.02) and got[0][1] != exact.loss


def test_sizes_follow_an_overridden_width(tmp_path: Path) -> None:
    model = config(tmp_path, model={"hidden_size": 128, "num_heads": 4}).model
    assert (model.latent_rank, model.intermediate_size, model.value_dim) == (32, 512, 32)
    assert config(tmp_path, model={"num_layers": 3}).model.intermediate_size == 176


def test_bad_runs_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    out = tmp_path / "run"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model": {"vocab_size": 100}}, r"vocabulary has 100 ids, the tokenizer has 384"),
        ({"evaluation": {"sample_prompt": "x " * 50}}, r"context of 32 tokens, .*--sample-prompt"),
        ({"training": {"device": "cuda:77"}}, r"device must be auto, cpu or a GPU .*'cuda:77'"),
        ({"schedule": {"warmup_steps": 8}}, r"warmup_steps must be less than the run's 8 steps"),
        ({"model": {"eos_token_id": 7}}, r"model\.eos_token_id is 7, and the tokenizer .* has 2"),
    ]
    for sections, message in cases:
        with pytest.raises(ValueError, match=message):
            trainer(out, **sections)
        assert not out.exists()
    with pytest.raises(ConfigError, match=r"grad_accum_steps must be at most batch_size 4"):
        config(out, training={"grad_accum_steps": 5})
    with pytest.raises(ConfigError, match=r"give max_steps or epochs, not both"):
        config(out, training={"epochs": 2.0})
