"""The rules of the loss scale: GradScaler's, a floor, a ceiling, and hysteresis."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from fused_tricks import DynamicLossScale, FusedSGD
from support.backends import takes_no_step
from support.comparison import assert_same_bits, parameters

FP32_MAX = float(torch.finfo(torch.float32).max)


def optimizer_with(scale: Any, backend: str, device: torch.device) -> tuple[FusedSGD, Parameter]:
    param = Parameter(torch.zeros(1, device=device))
    return FusedSGD([param], lr=0.0, loss_scale=scale, backend=backend), param


def step(optimizer: FusedSGD, param: Parameter, *, found: bool) -> None:
    param.grad = torch.full_like(param, torch.inf if found else 0.0)
    optimizer.step()


def tracker_of(optimizer: FusedSGD) -> int:
    return int(optimizer.state_dict()["param_groups"][0]["growth_tracker"])


def sequence(probability: float, length: int, seed: int) -> list[bool]:
    draw = random.Random(seed)
    return [draw.random() < probability for _ in range(length)]


class DocumentedScale:
    """The documented scale rules in Python, for comparison with the device code."""

    def __init__(
        self, init_scale, growth_factor, backoff_factor, growth_interval, hysteresis, min_scale, max_scale
    ):
        self.scale, self.growth_factor, self.backoff_factor = init_scale, growth_factor, backoff_factor
        self.growth_interval, self.hysteresis = growth_interval, hysteresis
        self.min_scale, self.max_scale = min_scale, max_scale
        self.growth_tracker, self.hysteresis_tracker = 0, hysteresis

    def update(self, found: bool) -> None:
        if found:
            self.growth_tracker = 0
            self.hysteresis_tracker -= 1
            if self.hysteresis_tracker <= 0:
                self.scale = float(np.float32(self.scale * self.backoff_factor))
        else:
            self.hysteresis_tracker = self.hysteresis
            self.growth_tracker += 1
            if self.growth_tracker >= self.growth_interval:
                grown = self.scale * self.growth_factor
                if grown <= FP32_MAX:
                    self.scale = float(np.float32(grown))
                self.growth_tracker = 0
        self.scale = min(max(self.scale, self.min_scale), self.max_scale)


@pytest.mark.parametrize(
    ("growth", "backoff", "interval"),
    [(2.0, 0.5, 3), (1.7, 0.3, 2), (2.0, 0.5, 1), (1.001, 0.999, 4), (3.0, 0.1, 5)],
)
def test_the_scale_follows_grad_scaler_bit_for_bit(backend, device, many_steps, growth, backoff, interval):
    rule = DynamicLossScale(
        init_scale=1000.0, growth_factor=growth, backoff_factor=backoff, growth_interval=interval,
        min_scale=2.0**-126, max_scale=FP32_MAX,
    )  # fmt: skip
    optimizer, param = optimizer_with(rule, backend, device)
    scale, tracker = torch.tensor(1000.0), torch.tensor(0, dtype=torch.int32)
    for found in sequence(0.25, many_steps, seed=interval):
        step(optimizer, param, found=found)
        torch._amp_update_scale_(scale, tracker, torch.tensor(float(found)), growth, backoff, interval)
        assert optimizer.stats().scale == scale.item()
        assert tracker_of(optimizer) == tracker.item()


@pytest.mark.parametrize("hysteresis", [1, 2, 3])
@pytest.mark.parametrize(
    ("floor", "ceiling"), [(1.0, 2.0**24), (512.0, 2048.0), (1000.0, 1500.0), (1024.0, 1024.0)]
)
def test_the_scale_follows_the_documented_rules(backend, device, many_steps, floor, ceiling, hysteresis):
    options = {
        "init_scale": 1024.0, "growth_factor": 1.9, "backoff_factor": 0.6, "growth_interval": 2,
        "hysteresis": hysteresis, "min_scale": floor, "max_scale": ceiling,
    }  # fmt: skip
    optimizer, param = optimizer_with(DynamicLossScale(**options), backend, device)
    model = DocumentedScale(**options)
    for found in sequence(0.4, many_steps, seed=hysteresis):
        step(optimizer, param, found=found)
        model.update(found)
        group = optimizer.state_dict()["param_groups"][0]
        assert optimizer.stats().scale == pytest.approx(model.scale, rel=0, abs=0)
        assert float(group["loss_scale"]) == model.scale
        assert int(group["growth_tracker"]) == model.growth_tracker
        if model.hysteresis_tracker > 0:
            assert int(group["hysteresis_tracker"]) == model.hysteresis_tracker


def test_the_floor_holds(backend, device):
    optimizer, param = optimizer_with(DynamicLossScale(init_scale=3.0, min_scale=2.0), backend, device)
    for _ in range(3):
        step(optimizer, param, found=True)
    assert optimizer.stats().scale == 2.0


def test_the_ceiling_holds(backend, device):
    rule = DynamicLossScale(init_scale=3.0, max_scale=5.0, growth_interval=1)
    optimizer, param = optimizer_with(rule, backend, device)
    for _ in range(3):
        step(optimizer, param, found=False)
    assert optimizer.stats().scale == 5.0


def test_the_scale_does_not_grow_to_infinity(backend, device):
    rule = DynamicLossScale(init_scale=2.0**127, max_scale=FP32_MAX, growth_interval=2)
    optimizer, param = optimizer_with(rule, backend, device)
    for expected in (1, 0, 1):
        step(optimizer, param, found=False)
        assert optimizer.stats().scale == 2.0**127
        assert tracker_of(optimizer) == expected


def test_hysteresis_keeps_the_scale_until_that_many_overflows_in_a_row(backend, device):
    optimizer, param = optimizer_with(DynamicLossScale(init_scale=64.0, hysteresis=3), backend, device)
    scales = []
    for found in (True, True, False, True, True, True, True, False, True):
        step(optimizer, param, found=found)
        scales.append(optimizer.stats().scale)
    assert scales == [64.0, 64.0, 64.0, 64.0, 64.0, 32.0, 16.0, 16.0, 16.0]


def test_an_overflow_that_hysteresis_forgives_still_skips_and_resets_the_growth(backend, device):
    rule = DynamicLossScale(init_scale=64.0, hysteresis=2, growth_interval=3)
    optimizer, param = optimizer_with(rule, backend, device)
    for found in (False, False, True, False, False):
        step(optimizer, param, found=found)
    assert optimizer.stats().scale == 64.0
    assert optimizer.stats().skipped_steps == 1
    step(optimizer, param, found=False)
    assert optimizer.stats().scale == 128.0


def test_an_interval_lowered_below_the_tracker_grows_at_the_next_good_step(backend, device):
    rule = DynamicLossScale(init_scale=64.0, growth_interval=10)
    optimizer, param = optimizer_with(rule, backend, device)
    for _ in range(5):
        step(optimizer, param, found=False)
    optimizer.loss_scale.growth_interval = 3
    step(optimizer, param, found=False)
    assert optimizer.stats().scale == 128.0
    assert tracker_of(optimizer) == 0


def test_factors_and_bounds_changed_between_steps_take_effect(backend, device):
    optimizer, param = optimizer_with(DynamicLossScale(init_scale=64.0, growth_interval=1), backend, device)
    optimizer.loss_scale.growth_factor = 4.0
    step(optimizer, param, found=False)
    assert optimizer.stats().scale == 256.0
    optimizer.loss_scale.backoff_factor = 0.25
    step(optimizer, param, found=True)
    assert optimizer.stats().scale == 64.0
    optimizer.loss_scale.max_scale = 100.0
    step(optimizer, param, found=False)
    assert optimizer.stats().scale == 100.0
    optimizer.loss_scale.min_scale = 50.0
    step(optimizer, param, found=True)
    assert optimizer.stats().scale == 50.0


def test_the_defaults_are_the_documented_ones():
    rule = DynamicLossScale()
    found = (rule.init_scale, rule.growth_factor, rule.backoff_factor, rule.growth_interval)
    assert found == (2.0**16, 2.0, 0.5, 2000)
    assert (rule.hysteresis, rule.min_scale, rule.max_scale) == (1, 1.0, 2.0**24)


@takes_no_step
def test_dynamic_is_short_for_the_default_rule(backend, device):
    optimizer, _param = optimizer_with("dynamic", backend, device)
    assert isinstance(optimizer.loss_scale, DynamicLossScale)
    assert optimizer.loss_scale.state_dict() == DynamicLossScale().state_dict()
    assert optimizer.stats().scale == 2.0**16


def test_the_rule_handed_over_is_the_one_in_use(backend, device):
    rule = DynamicLossScale(init_scale=8.0)
    optimizer, param = optimizer_with(rule, backend, device)
    assert optimizer.loss_scale is rule
    step(optimizer, param, found=True)
    assert rule.state_dict()["scale"] == 4.0


def test_a_step_without_any_gradient_counts_as_a_good_one(backend, device):
    optimizer, _ = optimizer_with(DynamicLossScale(init_scale=8.0, growth_interval=2), backend, device)
    for _ in range(2):
        optimizer.step()
    assert (optimizer.stats().scale, optimizer.stats().applied_steps) == (16.0, 2)


def test_a_static_scale_never_changes(backend, device):
    optimizer, param = optimizer_with(48.0, backend, device)
    for found in (True, False, True, True):
        step(optimizer, param, found=found)
    assert optimizer.stats().scale == 48.0


def test_without_a_scale_there_is_none(backend, device):
    optimizer, param = optimizer_with(None, backend, device)
    step(optimizer, param, found=False)
    assert optimizer.stats().scale is None
    assert "loss_scale" not in optimizer.state_dict()["param_groups"][0]


def test_the_state_dict_has_grad_scalers_keys_and_is_json(backend, device):
    optimizer, param = optimizer_with(DynamicLossScale(init_scale=8.0, growth_interval=5), backend, device)
    for found in (True, False, False):
        step(optimizer, param, found=found)
    state = json.loads(json.dumps(optimizer.loss_scale.state_dict()))
    expected = {
        "scale": 4.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 5, "_growth_tracker": 2,
    }  # fmt: skip
    assert {key: state[key] for key in expected} == expected


def test_a_state_dict_goes_over_to_grad_scaler(backend, device):
    optimizer, param = optimizer_with(DynamicLossScale(init_scale=8.0, growth_interval=5), backend, device)
    for found in (True, False, False):
        step(optimizer, param, found=found)
    scaler = torch.amp.GradScaler(device.type)
    scaler.load_state_dict(optimizer.loss_scale.state_dict())
    assert scaler.get_scale() == 4.0
    assert scaler.get_growth_interval() == 5
    assert scaler._get_growth_tracker() == 2


@pytest.mark.parametrize("attached", [True, False])
def test_a_state_dict_of_grad_scaler_is_taken_over(backend, device, attached):
    scaler = torch.amp.GradScaler("cpu", 96.0, growth_factor=3.0, backoff_factor=0.25, growth_interval=4)
    scaler.load_state_dict({**scaler.state_dict(), "_growth_tracker": 2})
    rule = DynamicLossScale(init_scale=8.0, max_scale=2.0**20)
    if not attached:
        rule.load_state_dict(scaler.state_dict())
    optimizer, param = optimizer_with(rule, backend, device)
    if attached:
        step(optimizer, param, found=False)
        optimizer.loss_scale.load_state_dict(scaler.state_dict())
    assert optimizer.stats().scale == 96.0
    step(optimizer, param, found=False)
    assert optimizer.stats().scale == 96.0
    step(optimizer, param, found=False)
    assert optimizer.stats().scale == 288.0
    step(optimizer, param, found=True)
    assert optimizer.stats().scale == 72.0
    assert rule.max_scale == 2.0**20


@takes_no_step
@pytest.mark.parametrize(("saved", "expected"), [(65536.0, 8.0), (1.0, 2.0), (4.0, 4.0)])
def test_a_saved_scale_is_taken_over_within_the_floor_and_the_ceiling(backend, device, saved, expected):
    rule = DynamicLossScale(init_scale=4.0, min_scale=2.0, max_scale=8.0)
    optimizer, _ = optimizer_with(rule, backend, device)
    source, _ = optimizer_with(DynamicLossScale(init_scale=saved), backend, device)
    optimizer.load_state_dict(source.state_dict())
    assert optimizer.stats().scale == expected
    scaler = torch.amp.GradScaler("cpu", saved)
    other = DynamicLossScale(init_scale=4.0, min_scale=2.0, max_scale=8.0)
    other.load_state_dict(scaler.state_dict())
    assert other.get_scale() == expected


def test_a_rules_own_state_dict_restores_everything(backend, device):
    options = {
        "init_scale": 64.0,
        "growth_interval": 3,
        "hysteresis": 3,
        "min_scale": 2.0,
        "max_scale": 256.0,
    }
    optimizer, param = optimizer_with(DynamicLossScale(**options), backend, device)
    for found in (False, True, True):
        step(optimizer, param, found=found)
    restored = DynamicLossScale()
    restored.load_state_dict(optimizer.loss_scale.state_dict())
    other, other_param = optimizer_with(restored, backend, device)
    for found in (True, False, False, False, True, False, True, True, True, False, False):
        step(optimizer, param, found=found)
        step(other, other_param, found=found)
        assert optimizer.stats().scale == other.stats().scale
    assert other.loss_scale.state_dict() == optimizer.loss_scale.state_dict()


@takes_no_step
@pytest.mark.parametrize("value", [65536.0, 48.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_scale_multiplies_a_loss_of_any_dtype_in_fp32(backend, device, dtype, value):
    optimizer, _ = optimizer_with(value, backend, device)
    loss = torch.tensor(7.0, dtype=dtype, device=device)
    scaled = optimizer.scale(loss)
    assert_same_bits(scaled, torch.tensor(7.0 * value))
    assert loss.item() == 7.0


@takes_no_step
def test_scale_keeps_an_fp64_loss_in_fp64(backend, device):
    optimizer, _ = optimizer_with(3.0, backend, device)
    loss = torch.tensor(0.1, dtype=torch.float64, device=device)
    assert_same_bits(optimizer.scale(loss), torch.tensor(0.1 * 3.0, dtype=torch.float64))


@takes_no_step
def test_scale_of_a_one_element_fp16_vector_does_not_overflow(backend, device):
    optimizer, _ = optimizer_with("dynamic", backend, device)
    loss = torch.ones(1, dtype=torch.float16, device=device)
    assert optimizer.scale(loss).float().item() == 65536.0


def test_scale_passes_gradients_times_the_scale(backend, device):
    optimizer, param = optimizer_with("dynamic", backend, device)
    optimizer.scale((param * 3).sum()).backward()
    assert param.grad.item() == 3 * 65536.0


def test_scale_uses_the_scale_of_now(backend, device):
    optimizer, param = optimizer_with(DynamicLossScale(init_scale=64.0), backend, device)
    held = optimizer.scale(torch.tensor(1.0, device=device))
    step(optimizer, param, found=True)
    assert optimizer.scale(torch.tensor(1.0, device=device)).item() == 32.0
    assert held.item() == 64.0


def test_a_graph_kept_over_a_step_keeps_the_scale_it_was_made_with(backend, device):
    optimizer, param = optimizer_with(DynamicLossScale(init_scale=64.0), backend, device)
    weight = torch.zeros(1, device=device, requires_grad=True)
    scaled = optimizer.scale((weight * 3).sum())
    step(optimizer, param, found=True)
    scaled.backward()
    assert weight.grad.item() == 3 * 64.0


@takes_no_step
def test_scale_of_an_fp16_loss_backpropagates_through_the_model(backend, device):
    (weight,) = parameters([(4,)], torch.float16, device)
    optimizer = FusedSGD([weight], lr=0.1, loss_scale=2.0**15, backend=backend)
    optimizer.scale((weight * 0.25).sum()).backward()
    assert_same_bits(weight.grad, torch.full((4,), 2.0**13, dtype=torch.float16))


@takes_no_step
def test_without_a_scale_the_loss_itself_is_returned(backend, device):
    optimizer, _ = optimizer_with(None, backend, device)
    loss = torch.tensor(1.0, device=device)
    assert optimizer.scale(loss) is loss


@pytest.mark.parametrize("value", [1024.0, 1000.0, 3.0, 1.0])
def test_gradients_are_multiplied_by_the_reciprocal_of_the_scale(backend, device, value):
    params = parameters([(1001,)] * 3, [torch.float32, torch.float16, torch.bfloat16], device)
    optimizer = FusedSGD(params, lr=0.05, momentum=0.9, weight_decay=1e-3, loss_scale=value, backend=backend)
    expected = [Parameter(p.detach().cpu().float()) for p in params]
    reference = torch.optim.SGD(expected, lr=0.05, momentum=0.9, foreach=False)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        for param, other in zip(params, expected, strict=True):
            grad = (torch.randn(1001, generator=generator) * value).to(param.dtype)
            param.grad = grad.to(device)
            other.grad = grad.float() * torch.tensor(value).reciprocal()
        optimizer.step()
        reference.step()
    for param, other in zip(params, expected, strict=True):
        assert_same_bits(param, other.to(param.dtype))
