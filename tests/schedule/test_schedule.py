"""The scheduler: the rate of each group at each update, with any optimizer."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, LRScheduler, SequentialLR

from fused_tricks import FusedSGD, WarmupCosineLR
from support.comparison import assert_same_bits
from support.scheduled import FACTORS, parameter, rates, run, two_groups

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "FusedSGD": FusedSGD,
    "SGD": torch.optim.SGD,
    "AdamW": torch.optim.AdamW,
    "RMSprop": torch.optim.RMSprop,
    "Adafactor": torch.optim.Adafactor,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_update_of_any_optimizer_has_its_factor(name: str) -> None:
    optimizer = OPTIMIZERS[name]([parameter()], lr=0.1)
    schedule = WarmupCosineLR(optimizer, 7, 4)
    assert run(optimizer, schedule, 9) == [pytest.approx([0.1 * factor], rel=1e-15) for factor in FACTORS]


@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["float", "tensor"])
def test_a_scheduled_run_is_torch_sgds_bit_for_bit(kind: Any, backend: str, device: torch.device) -> None:
    finals = []
    for cls, options in ((torch.optim.SGD, {"foreach": False}), (FusedSGD, {"backend": backend})):
        param = Parameter(torch.linspace(-1, 1, 65, device=device))
        optimizer = cls([param], lr=kind(0.1), momentum=0.9, **options)
        schedule = WarmupCosineLR(optimizer, 5, 2)
        for step in range(6):
            param.grad = torch.sin(param.detach() + step)
            optimizer.step()
            schedule.step()
        finals.append(param)
    assert_same_bits(*finals)


def test_groups_keep_their_ratio() -> None:
    optimizer = two_groups(0.1, 0.4)
    schedule = WarmupCosineLR(optimizer, 7, 4, min_ratio=0.1)
    for low, high in run(optimizer, schedule, 9):
        assert high == pytest.approx(4 * low, rel=1e-15)


def test_a_warmup_may_start_from_zero() -> None:
    optimizer = two_groups()
    WarmupCosineLR(optimizer, 10, 5, warmup_start=0.0)
    assert rates(optimizer) == pytest.approx([0.02, 0.08], rel=1e-15)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_tensor_rate_is_written_in_place(shape: tuple[int, ...]) -> None:
    rate = torch.full(shape, 0.5)
    optimizer = torch.optim.SGD([parameter()], lr=rate)
    schedule = WarmupCosineLR(optimizer, 7, 4)
    assert run(optimizer, schedule, 9) == [[0.5 * factor] for factor in FACTORS]
    assert optimizer.param_groups[0]["lr"] is rate


def test_last_rates_are_copies_of_those_that_are_set() -> None:
    optimizer = two_groups(torch.tensor(0.5))
    schedule = WarmupCosineLR(optimizer, 7, 4)
    schedule.get_last_lr()[0].fill_(9.0)
    assert rates(optimizer) == pytest.approx([0.125, 0.1])
    schedule.step()
    assert schedule.get_last_lr() == rates(optimizer)


@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["float", "tensor"])
@pytest.mark.parametrize("cls", [FusedSGD, torch.optim.SGD])
def test_a_late_group_is_scheduled_at_once_from_its_own_rate(cls: Any, kind: Any) -> None:
    optimizer = cls([parameter()], lr=kind(0.5))
    schedule = WarmupCosineLR(optimizer, 7, 4)
    run(optimizer, schedule, 5)
    optimizer.add_param_group({"params": parameter(), "lr": kind(2.0)})
    optimizer.add_param_group({"params": parameter()})
    assert rates(optimizer) == schedule.get_last_lr() == pytest.approx([0.375, 1.5, 0.375])
    optimizer.add_param_group({"params": parameter()})
    assert run(optimizer, schedule, 3) == [
        pytest.approx([0.5 * factor, 2.0 * factor, 0.5 * factor, 0.5 * factor]) for factor in FACTORS[5:8]
    ]


def test_a_late_group_with_the_tensor_of_another_has_its_base_rate_and_a_tensor_of_its_own() -> None:
    rate = torch.tensor(1.0)
    optimizer = torch.optim.SGD([parameter()], lr=rate)
    schedule = WarmupCosineLR(optimizer, 7, 4)
    schedule.step()
    optimizer.add_param_group({"params": parameter(), "lr": optimizer.param_groups[0]["lr"]})
    assert run(optimizer, schedule, 2) == [[0.5, 0.5], [0.75, 0.75]]


def test_a_group_that_no_method_added_is_scheduled_from_the_next_step() -> None:
    optimizer = two_groups()
    schedule = WarmupCosineLR(optimizer, 7, 4)
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [parameter()], "lr": 8.0})
    del optimizer.param_groups[-1]["initial_lr"]
    schedule.step()
    assert rates(optimizer)[-1] == 4.0


def test_a_refused_group_leaves_the_others_as_they_were() -> None:
    optimizer = two_groups()
    WarmupCosineLR(optimizer, 7, 4)
    before = rates(optimizer)
    with pytest.raises(TypeError):
        optimizer.add_param_group({"params": "no tensors"})
    assert rates(optimizer) == before


def test_the_newest_of_several_schedules_gives_a_late_group_its_rate() -> None:
    optimizer = two_groups()
    older, newer = WarmupCosineLR(optimizer, 100, 50), WarmupCosineLR(optimizer, 7, 4)
    optimizer.add_param_group({"params": parameter(), "lr": 1.0})
    assert rates(optimizer)[-1] == newer.curve.factor(0)
    del newer
    optimizer.add_param_group({"params": parameter(), "lr": 1.0})
    assert rates(optimizer)[-1] == older.curve.factor(0)


def test_what_others_put_in_place_of_add_param_group_is_still_called() -> None:
    optimizer = two_groups()
    added = []

    def recording(group: dict[str, Any]) -> None:
        added.append(group)
        torch.optim.SGD.add_param_group(optimizer, group)

    vars(optimizer)["add_param_group"] = recording
    schedule = WarmupCosineLR(optimizer, 7, 4)
    optimizer.add_param_group({"params": parameter(), "lr": 1.0})
    assert [group["lr"] for group in added] == [schedule.curve.factor(0)]


def test_it_is_a_torch_scheduler_that_counts_updates_from_zero() -> None:
    schedule = WarmupCosineLR(two_groups(), 7, 4)
    assert isinstance(schedule, LRScheduler)
    assert schedule.last_epoch == 0
    schedule.step()
    assert schedule.last_epoch == 1


def test_a_step_may_go_to_any_update() -> None:
    optimizer = two_groups()
    schedule = WarmupCosineLR(optimizer, 7, 4)
    schedule.step(5)
    assert rates(optimizer) == pytest.approx([0.075, 0.3])
    schedule.step()
    assert schedule.last_epoch == 6


@pytest.mark.parametrize("epoch, error", [(1.5, TypeError), (-1, ValueError)])
def test_a_step_to_no_update_changes_nothing(epoch: Any, error: type[Exception]) -> None:
    optimizer = two_groups()
    schedule = WarmupCosineLR(optimizer, 7, 4)
    before = rates(optimizer)
    with pytest.raises(error, match="^epoch must be "):
        schedule.step(epoch)
    assert (schedule.last_epoch, rates(optimizer)) == (0, before)


def test_a_first_step_that_a_grad_scaler_leaves_out_is_no_reason_to_warn() -> None:
    optimizer = two_groups()
    schedule = WarmupCosineLR(optimizer, 7, 4)
    scaler = torch.amp.GradScaler("cpu")
    optimizer.param_groups[0]["params"][0].grad.fill_(torch.inf)
    scaler.scale(torch.ones(()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaler.step(optimizer)
        scaler.update()
        schedule.step()


UPDATES_AFTER_OVERFLOWS = {
    "FusedSGD": FusedSGD,
    "SGD(fused=True)": partial(torch.optim.SGD, fused=True),
}


@pytest.mark.parametrize("make", UPDATES_AFTER_OVERFLOWS.values(), ids=UPDATES_AFTER_OVERFLOWS)
def test_a_schedule_that_is_stepped_before_the_optimizer_warns_once_at_the_users_line(make: Any) -> None:
    param = Parameter(torch.zeros(2))
    param.grad = torch.ones(2)
    optimizer = make([param], lr=1.0)
    schedule = WarmupCosineLR(optimizer, 7, 4)
    with pytest.warns(UserWarning, match="before the first optimizer.step") as caught:
        for _ in range(2):
            schedule.step()
            optimizer.step()
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize(
    "case", ["optimizer first", "saved step first", "counts applied", "goes to an update", "resumes"]
)
def test_a_schedule_that_loses_no_rate_does_not_warn(case: str) -> None:
    param = Parameter(torch.zeros(2))
    param.grad = torch.ones(2)
    optimizer = FusedSGD([param], lr=1.0, momentum=0.9)
    saved_step = optimizer.step
    schedule = WarmupCosineLR(optimizer, 7, 4, count="applied" if case == "counts applied" else "calls")
    if case == "resumes":
        schedule.load_state_dict({**schedule.state_dict(), "last_epoch": 2})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if case == "optimizer first":
            optimizer.step()
        if case == "saved step first":
            saved_step()
        schedule.step(3 if case == "goes to an update" else None)


def test_a_copy_is_no_reason_to_warn() -> None:
    twin = copy.deepcopy(WarmupCosineLR(two_groups(), 7, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(twin.optimizer, twin, 3)


def sequence() -> tuple[Optimizer, SequentialLR]:
    optimizer = two_groups(1.0, 2.0)
    schedules = [ConstantLR(optimizer, factor=0.5, total_iters=100), WarmupCosineLR(optimizer, 7, 4)]
    return optimizer, SequentialLR(optimizer, schedules, milestones=[3])


SEQUENCE = [0.5, 0.5, 0.5, *FACTORS]


def test_it_can_be_the_last_of_a_sequence() -> None:
    optimizer, schedule = sequence()
    assert run(optimizer, schedule, 12) == [pytest.approx([factor, 2 * factor]) for factor in SEQUENCE]


def test_before_its_turn_in_a_sequence_it_leaves_a_late_group_alone() -> None:
    optimizer = two_groups()
    schedules = [ConstantLR(optimizer, factor=0.5, total_iters=100), WarmupCosineLR(optimizer, 7, 4)]
    schedule = SequentialLR(optimizer, schedules, milestones=[3])
    optimizer.add_param_group({"params": parameter(), "lr": 1.0})
    assert rates(optimizer)[-1] == 1.0
    schedules[1]._update_lr(0)
    assert schedule.optimizer.param_groups[-1]["lr"] == 0.25


@pytest.mark.parametrize("updates", [1, 3, 7])
@pytest.mark.parametrize("optimizer_first", [True, False])
def test_a_sequence_resumes_on_schedule(updates: int, optimizer_first: bool) -> None:
    optimizer, schedule = sequence()
    run(optimizer, schedule, updates)
    states = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
    resumed, resumed_schedule = sequence()
    if optimizer_first:
        resumed.load_state_dict(states[0])
    resumed_schedule.load_state_dict(states[1])
    if not optimizer_first:
        resumed.load_state_dict(states[0])
    assert run(resumed, resumed_schedule, 12 - updates) == [
        pytest.approx([factor, 2 * factor]) for factor in SEQUENCE[updates:]
    ]


@pytest.mark.parametrize("argument", [{"warmup_steps": 8}, {"T_mult": 2}, {"min_ratio": -1.0}])
def test_a_refused_schedule_leaves_the_optimizer_as_it_was(argument: dict[str, Any]) -> None:
    optimizer = two_groups()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=f"^{next(iter(argument))}"):
        WarmupCosineLR(optimizer, 7, **argument)
    assert optimizer.state_dict() == before
    assert "add_param_group" not in vars(optimizer)


def test_what_is_no_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match="^optimizer must be a torch.optim.Optimizer, got Linear"):
        WarmupCosineLR(torch.nn.Linear(1, 1), 7)
