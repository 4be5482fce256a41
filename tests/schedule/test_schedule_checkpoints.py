"""A schedule over checkpoints and copies: the rates continue, whatever is loaded first."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import json
import pickle
import warnings
import weakref
from typing import Any

import pytest
import torch

from fused_tricks import FusedSGD, WarmupCosineLR
from support.scheduled import FACTORS, parameter, rates, run, two_groups


def checkpoint(updates: int, **arguments: Any) -> tuple[dict[str, Any], dict[str, Any], list[list[float]]]:
    """Returns the states after some updates, and the rates of the next updates."""
    optimizer = two_groups()
    schedule = WarmupCosineLR(optimizer, 7, 4, **arguments)
    run(optimizer, schedule, updates)
    states = copy.deepcopy(optimizer.state_dict()), json.loads(json.dumps(schedule.state_dict()))
    return *states, run(optimizer, schedule, 9)


ORDERS = [
    order
    for order in itertools.permutations(["build schedule", "load schedule", "load optimizer"])
    if order.index("build schedule") < order.index("load schedule")
]


@pytest.mark.parametrize("updates", [0, 2, 4, 5, 8])
@pytest.mark.parametrize("order", ORDERS, ids=", ".join)
def test_a_resumed_run_has_the_rates_of_an_uninterrupted_one(order: tuple[str, ...], updates: int) -> None:
    optimizer_state, schedule_state, expected = checkpoint(updates)
    optimizer = two_groups()
    for action in order:
        if action == "build schedule":
            schedule = WarmupCosineLR(optimizer, 7, 4)
        elif action == "load schedule":
            schedule.load_state_dict(schedule_state)
        else:
            optimizer.load_state_dict(optimizer_state)
    assert run(optimizer, schedule, 9) == expected


@pytest.mark.parametrize("order", ORDERS, ids=", ".join)
def test_a_resumed_run_with_other_arguments_has_its_own_rates_at_once(order: tuple[str, ...]) -> None:
    optimizer_state, schedule_state, _ = checkpoint(5)
    optimizer = two_groups()
    for action in order:
        if action == "build schedule":
            schedule = WarmupCosineLR(optimizer, 14, 4)
        elif action == "load schedule":
            with pytest.warns(UserWarning, match="total_steps was 7 and is 14; this schedule keeps its own"):
                schedule.load_state_dict(schedule_state)
        else:
            optimizer.load_state_dict(optimizer_state)
    factor = schedule.curve.factor(5)
    assert rates(optimizer) == schedule.get_last_lr() == [0.1 * factor, 0.4 * factor]


def test_a_schedule_without_its_optimizers_state_sets_the_rates_by_itself() -> None:
    _, schedule_state, expected = checkpoint(5)
    optimizer = two_groups()
    schedule = WarmupCosineLR(optimizer, 7, 4)
    schedule.load_state_dict(schedule_state)
    assert run(optimizer, schedule, 9) == expected


def test_an_optimizer_state_from_before_the_schedule_is_scheduled_at_once() -> None:
    unscheduled = two_groups(1.0, 2.0).state_dict()
    optimizer = two_groups()
    schedule = WarmupCosineLR(optimizer, 7, 4)
    optimizer.load_state_dict(unscheduled)
    assert rates(optimizer) == schedule.get_last_lr() == [0.25, 0.5]


def test_a_fused_optimizer_with_loss_scaling_resumes_on_schedule() -> None:
    def build() -> tuple[FusedSGD, WarmupCosineLR]:
        optimizer = FusedSGD([parameter()], lr=torch.tensor(0.5), momentum=0.9, loss_scale="dynamic")
        return optimizer, WarmupCosineLR(optimizer, 7, 4)

    optimizer, schedule = build()
    run(optimizer, schedule, 5)
    buffer = io.BytesIO()
    torch.save([optimizer.state_dict(), schedule.state_dict()], buffer)
    buffer.seek(0)
    states = torch.load(buffer, weights_only=True)
    resumed, resumed_schedule = build()
    resumed_schedule.load_state_dict(states[1])
    resumed.load_state_dict(states[0])
    assert run(resumed, resumed_schedule, 4) == run(optimizer, schedule, 4)


def test_the_state_is_the_update_and_the_arguments() -> None:
    schedule = WarmupCosineLR(two_groups(), 7, 4, T_0=2, T_mult=1.5)
    schedule.step()
    assert json.loads(json.dumps(schedule.state_dict())) == {
        "last_epoch": 1,
        "total_steps": 7,
        "warmup_steps": 4,
        "warmup_start": 0.0,
        "min_ratio": 0.0,
        "T_0": 2,
        "T_mult": 1.5,
        "peak_decay": 1.0,
        "warmup_every_cycle": False,
        "count": "calls",
    }


def test_loading_the_state_of_an_equal_schedule_does_not_warn() -> None:
    state = WarmupCosineLR(two_groups(), 7, 4, T_0=2, T_mult=2).state_dict()
    schedule = WarmupCosineLR(two_groups(), 7, 4, T_0=2, T_mult=2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule.load_state_dict(state)


@pytest.mark.parametrize(
    "state, error, message",
    [
        ({}, KeyError, "state_dict has no 'last_epoch'"),
        ({"last_epoch": 1.5}, TypeError, "^last_epoch must be an integer"),
        ({"last_epoch": -2}, ValueError, "^last_epoch must be at least -1"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(
    state: dict[str, Any], error: type[Exception], message: str
) -> None:
    optimizer = two_groups()
    schedule = WarmupCosineLR(optimizer, 7, 4)
    before = rates(optimizer)
    with pytest.raises(error, match=message):
        schedule.load_state_dict(state)
    assert (schedule.last_epoch, rates(optimizer)) == (0, before)


def test_a_second_schedule_begins_from_the_initial_rates_or_from_others_that_are_set() -> None:
    optimizer = two_groups(1.0, 2.0)
    run(optimizer, WarmupCosineLR(optimizer, 7, 4), 6)
    schedule = WarmupCosineLR(optimizer, 7, 4)
    assert rates(optimizer) == [0.25, 0.5]
    schedule.base_lrs = [4.0, 8.0]
    schedule.step()
    assert rates(optimizer) == [2.0, 4.0]


def test_its_steps_are_counted_as_torch_counts_them_over_a_resume_too() -> None:
    _, state, _ = checkpoint(3)
    schedule = WarmupCosineLR(two_groups(), 7, 4)
    assert schedule._step_count == 1
    schedule.load_state_dict(state)
    schedule.step()
    assert schedule._step_count == 5


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("cls", [FusedSGD, torch.optim.SGD])
def test_a_copy_goes_on_by_itself(cls: Any, how: str) -> None:
    optimizer = cls([parameter()], lr=1.0)
    schedule = WarmupCosineLR(optimizer, 7, 4)
    run(optimizer, schedule, 1)
    twin = copy.deepcopy(schedule) if how == "deepcopy" else pickle.loads(pickle.dumps(schedule))
    assert run(twin.optimizer, twin, 8) == [[pytest.approx(factor)] for factor in FACTORS[1:]]
    assert rates(optimizer) == [0.5]


def test_a_copy_sees_late_groups_and_loads_too() -> None:
    twin = copy.deepcopy(WarmupCosineLR(two_groups(), 7, 4))
    twin.optimizer.load_state_dict(two_groups(1.0, 2.0).state_dict())
    twin.optimizer.add_param_group({"params": parameter(), "lr": 4.0})
    assert rates(twin.optimizer) == [0.25, 0.5, 1.0]


def test_an_optimizer_and_its_schedule_are_freed_without_the_garbage_collector() -> None:
    optimizer = two_groups()
    schedule = WarmupCosineLR(optimizer, 7, 4)
    gone = weakref.ref(optimizer), weakref.ref(schedule)
    gc.disable()
    try:
        del schedule
        assert gone[1]() is None
        optimizer.add_param_group({"params": parameter()})
        optimizer.load_state_dict(optimizer.state_dict())
        del optimizer
        assert gone[0]() is None
    finally:
        gc.enable()
