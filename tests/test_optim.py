import math

import pytest
import torch

from tinylm import ModelConfig, TinyLM
from tinylm.errors import CheckpointError, ConfigError
from tinylm.optim import (
    Schedule,
    ShardedAdamW,
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    set_step_hyperparameters,
    step_if_finite,
)
from tinylm.training_config import OptimizerConfig, ScheduleConfig


def small_model() -> TinyLM:
    torch.manual_seed(0)
    return TinyLM.from_config(
        ModelConfig(vocab_size=32, hidden_size=16, num_layers=1, num_heads=2, max_seq_len=8)
    )


def give_gradients(model: TinyLM) -> None:
    ids = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(1))
    model(ids).square().mean().backward()


def test_defaults_are_the_specification() -> None:
    optimizer, schedule = OptimizerConfig(), ScheduleConfig()
    assert (schedule.lr, schedule.warmup_steps, schedule.kind) == (2e-4, 375, "cosine")
    assert (optimizer.weight_decay, optimizer.beta1, optimizer.beta2) == (0.1, 0.9, 0.95)
    assert optimizer.max_grad_norm == 1.0


@pytest.mark.parametrize("kind", ["cosine", "linear", "two-stage"])
def test_warm_up_rises_linearly_to_the_peak(kind: str) -> None:
    schedule = Schedule(ScheduleConfig(kind=kind, lr=1e-3, warmup_steps=10), 1000)
    rates = [schedule.learning_rate(step) for step in range(10)]
    assert rates == pytest.approx([1e-4 * (i + 1) for i in range(10)])
    assert schedule.learning_rate(10) < schedule.learning_rate(9)


def test_cosine_and_linear_reach_their_floor_at_the_last_step() -> None:
    for kind in ("cosine", "linear"):
        schedule = Schedule(
            ScheduleConfig(kind=kind, lr=1.0, warmup_steps=10, min_lr_ratio=0.2), 110
        )
        rates = [schedule.learning_rate(step) for step in range(9, 110)]
        assert rates == sorted(rates, reverse=True)
        assert rates[-1] == pytest.approx(0.2)
        # Half of the way down after half of the steps, for both shapes.
        assert schedule.learning_rate(59) == pytest.approx(0.6)
    quarter = Schedule(ScheduleConfig(lr=1.0, warmup_steps=10, min_lr_ratio=0.0), 110)
    assert quarter.learning_rate(34) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_two_stage_drops_to_the_second_line_and_ends_weight_decay() -> None:
    config = ScheduleConfig(kind="two-stage", warmup_steps=0)
    assert (config.lr, config.second_lr) == (1.5e-3, pytest.approx(1e-3))
    schedule = Schedule(config, 1000)
    assert schedule.learning_rate(499) == pytest.approx(1.5e-3 * 0.5)
    assert schedule.learning_rate(500) == pytest.approx(1e-3 * 0.499)
    assert schedule.learning_rate(999) == 0.0
    assert [schedule.weight_decay_factor(step) for step in (0, 499, 500, 999)] == [1, 1, 0, 0]


def test_given_rate_replaces_the_recipes_default() -> None:
    config = ScheduleConfig(kind="two-stage", lr=3e-4)
    assert config.second_lr == pytest.approx(2e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "step"}, "kind must be one of cosine, linear, two-stage, found 'step'"),
        ({"lr": -1.0}, "lr must be above zero, found -1.0"),
        ({"second_lr": 1e-3}, "second_lr belongs to --schedule two-stage"),
        ({"kind": "two-stage", "second_lr": 1.0}, "second_lr must be at most lr"),
        ({"min_lr_ratio": 2.0}, "min_lr_ratio must be in"),
    ],
)
def test_bad_schedule_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScheduleConfig(**fields)


def test_warm_up_as_long_as_the_run_is_refused_with_a_way_out() -> None:
    with pytest.raises(ConfigError, match=r"less than the run's 200 steps, found 375.*-steps 20"):
        Schedule(ScheduleConfig(), 200)


def test_decay_shrinks_matrices_and_the_embedding_but_no_norm_weight() -> None:
    model, config = small_model(), OptimizerConfig(weight_decay=0.5)
    optimizer = build_optimizer(model, config)
    schedule = Schedule(ScheduleConfig(lr=0.1, warmup_steps=0, min_lr_ratio=1.0), 10)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    set_step_hyperparameters(optimizer, schedule, config, 0)
    optimizer.step()
    shrunk = {n for n, p in model.named_parameters() if torch.equal(p, before[n] * (1 - 0.1 * 0.5))}
    same = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
    assert same == {n for n in before if "norm" in n}
    assert shrunk == set(before) - same
    assert "embed_tokens.weight" in shrunk


def test_update_is_adamw() -> None:
    model, config = small_model(), OptimizerConfig()
    optimizer = build_optimizer(model, config)
    schedule = Schedule(ScheduleConfig(lr=1e-2, warmup_steps=0, min_lr_ratio=1.0), 10)
    weight = model.layers[0].mlp.up_proj.weight
    moment = second = torch.zeros_like(weight, dtype=torch.float64)
    expected = weight.detach().double()
    for step in range(3):
        give_gradients(model)
        grad = weight.grad.double()
        moment = 0.9 * moment + 0.1 * grad
        second = 0.95 * second + 0.05 * grad**2
        corrected = second / (1 - 0.95 ** (step + 1))
        expected = expected * (1 - 1e-2 * 0.1)
        expected -= 1e-2 * moment / (1 - 0.9 ** (step + 1)) / (corrected.sqrt() + 1e-8)
        set_step_hyperparameters(optimizer, schedule, config, step)
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=1e-7)


def test_state_comes_back_bit_for_bit() -> None:
    runs = []
    for restored in (False, True):
        model = small_model()
        optimizer = build_optimizer(model, OptimizerConfig())
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        for step in range(4):
            if restored and step == 2:
                tensors = {k: v.clone() for k, v in optimizer_tensors(model, optimizer).items()}
                groups = optimizer.param_groups
                optimizer = build_optimizer(model, OptimizerConfig())
                for new, old in zip(optimizer.param_groups, groups, strict=True):
                    new["lr"] = old["lr"]
                load_optimizer_tensors(model, optimizer, tensors, source="memory")
            give_gradients(model)
            optimizer.step()
            optimizer.zero_grad()
        runs.append({n: p.detach().clone() for n, p in model.named_parameters()})
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_state_of_another_model_is_refused() -> None:
    model = small_model()
    optimizer = build_optimizer(model, OptimizerConfig())
    give_gradients(model)
    optimizer.step()
    good = optimizer_tensors(model, optimizer)
    name = "exp_avg.norm.weight"
    for tensors, message in (
        ({**good, name: torch.zeros(5)}, r"f\.st: exp_avg\.norm\.weight .*\[16\], found \[5\]"),
        ({**good, "exp_avg.other": torch.zeros(5)}, r"f\.st: unknown tensor 'exp_avg\.other'"),
        ({k: v for k, v in good.items() if k != name}, r"f\.st: no exp_avg for norm\.weight"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_optimizer_tensors(model, optimizer, tensors, source="f.st")


def test_update_of_parts_is_adamws() -> None:
    """Of plain tensors each is its own only part."""
    models = [torch.nn.Linear(5, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    options = {"lr": 0.02, "betas": (0.8, 0.97), "eps": 1e-6, "weight_decay": 0.1, "fused": True}
    ours = ShardedAdamW(models[0].parameters(), **options)
    theirs = torch.optim.AdamW(models[1].parameters(), **options)
    for step in range(3):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            model(x).square().sum().backward()
            if step == 1:
                model.bias.grad = None  # has no part in this update
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    for found, expected in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(found, expected)
        states = ours.state[found], theirs.state[expected]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("kind", [torch.optim.AdamW, ShardedAdamW])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_update_is_left_out_if_a_figure_is_not_finite(
    kind: type[torch.optim.AdamW], bad: float
) -> None:
    results = []
    for figures in ([1.0, 2.0], [1.0, bad], [3.0, 4.0]), ([1.0, 2.0], [3.0, 4.0]):
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 3)
        optimizer = kind(model.parameters(), lr=0.1, fused=True)
        for values in figures:
            sound = all(math.isfinite(value) for value in values)
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, values[1] if sound else bad)
            step_if_finite(optimizer, torch.tensor(values))
        states = [value for state in optimizer.state.values() for value in state.values()]
        results.append([*model.parameters(), *states])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
