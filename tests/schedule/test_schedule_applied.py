"""A schedule that counts applied updates: kernels read the next update's rate, however many steps are skipped."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.lr_scheduler import ConstantLR, SequentialLR

from fused_tricks import FusedSGD, WarmupCosineLR
from fused_tricks.schedule.curve import WarmupCosine
from support.comparison import assert_same_bits

CURVE: dict[str, Any] = {"total_steps": 9, "warmup_steps": 3, "T_0": 3, "peak_decay": 0.5, "min_ratio": 0.05}
FACTORS = [WarmupCosine(**CURVE).factor(t) for t in range(14)]
SKIPPED = {0, 1, 4, 5, 9}
BASES = (0.1, 0.7)


def parameters(device: torch.device, dtype: torch.dtype) -> list[Parameter]:
    return [
        Parameter(torch.linspace(-1, 1, 65, device=device).to(dtype)),
        Parameter(torch.linspace(-2, 3, 33, device=device).reshape(3, 11)),
    ]


def give_gradients(params: list[Parameter], step: int, skipped: bool = False) -> None:
    for param in params:
        param.grad = torch.sin(param.detach().float() * 3 + step).to(param.dtype)
        if skipped:
            param.grad.view(-1)[-1] = torch.inf


def build(
    params: list[Parameter], backend: str, loss_scale: Any = "dynamic", **options: Any
) -> tuple[FusedSGD, WarmupCosineLR]:
    groups = [{"params": [param], "lr": lr} for param, lr in zip(params, BASES)]
    optimizer = FusedSGD(groups, momentum=0.9, loss_scale=loss_scale, backend=backend, **options)
    return optimizer, WarmupCosineLR(optimizer, **CURVE, count="applied")


def set_rates(optimizer: FusedSGD, factor: float) -> None:
    for group, base in zip(optimizer.param_groups, BASES):
        group["lr"] = base * factor


def bits(optimizer: FusedSGD) -> list[Tensor]:
    tensors = [param.detach() for group in optimizer.param_groups for param in group["params"]]
    return tensors + [tensor for state in optimizer.state.values() for tensor in state.values()]


@pytest.mark.parametrize("calls_step", [True, False], ids=["step called", "step not called"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_skipped_steps_do_not_move_the_schedule(
    dtype: torch.dtype, calls_step: bool, backend: str, device: torch.device
) -> None:
    optimizer, schedule = build(parameters(device, dtype), backend)
    plain = FusedSGD(
        [{"params": [param]} for param in parameters(device, dtype)],
        momentum=0.9,
        loss_scale="dynamic",
        backend=backend,
    )
    for step in range(14):
        set_rates(plain, FACTORS[plain.stats().applied_steps])
        for one in (optimizer, plain):
            give_gradients([group["params"][0] for group in one.param_groups], step, step in SKIPPED)
            one.step()
        if calls_step:
            schedule.step()
    assert optimizer.stats().applied_steps == 14 - len(SKIPPED)
    for scheduled, expected in zip(bits(optimizer), bits(plain), strict=True):
        assert_same_bits(scheduled, expected)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}, {"loss_scale": 4.0}], ids=str)
def test_any_kind_of_step_takes_the_rate_that_is_due(
    options: dict[str, Any], backend: str, device: torch.device
) -> None:
    options = {"loss_scale": None, **options}
    optimizer, _ = build(parameters(device, torch.bfloat16), backend, **options)
    plain, _ = build(parameters(device, torch.bfloat16), backend, **options)
    for step in range(11):
        set_rates(plain, FACTORS[step])
        for one in (optimizer, plain):
            give_gradients([group["params"][0] for group in one.param_groups], step)
            one.step()
    for scheduled, expected in zip(bits(optimizer), bits(plain), strict=True):
        assert_same_bits(scheduled, expected)


def test_found_inf_of_a_grad_scaler_counts_too(backend: str, device: torch.device) -> None:
    optimizer, schedule = build(parameters(device, torch.float32), backend, loss_scale=None)
    scaler = torch.amp.GradScaler(device.type)
    scaler.scale(torch.ones((), device=device))
    for step in range(6):
        give_gradients([group["params"][0] for group in optimizer.param_groups], step, step in SKIPPED)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
    assert schedule.last_epoch == 2
    assert schedule.get_last_lr() == [base * FACTORS[2] for base in BASES]


@pytest.mark.parametrize("count", [9, 49])
def test_many_groups_follow_each_from_its_own_rate(count: int, backend: str, device: torch.device) -> None:
    params = [Parameter(torch.zeros(3, device=device)) for _ in range(count)]
    groups = [{"params": [param], "lr": 1.0 + index} for index, param in enumerate(params)]
    optimizer = FusedSGD(groups, backend=backend)
    WarmupCosineLR(optimizer, 4, 2, count="applied")
    for _ in range(2):
        for param in params:
            param.grad = torch.full_like(param, -1.0)
        optimizer.step()
    assert [param[0].item() for param in params] == [1.5 * (1 + index) for index in range(count)]


def test_the_rate_can_be_read_from_the_group(backend: str, device: torch.device) -> None:
    optimizer, schedule = build(parameters(device, torch.float32), backend)
    for step in range(6):
        give_gradients([group["params"][0] for group in optimizer.param_groups], step, step in SKIPPED)
        optimizer.step()
        schedule.step()
        expected = [base * FACTORS[optimizer.stats().applied_steps] for base in BASES]
        assert [float(group["lr"]) for group in optimizer.param_groups] == expected
        assert schedule.get_last_lr() == schedule.get_lr() == expected
        assert optimizer.param_groups[0]["lr"].device == device


def test_a_rate_that_is_set_by_hand_holds_until_the_schedules_next_step(
    backend: str, device: torch.device
) -> None:
    param = Parameter(torch.zeros(3, device=device))
    optimizer = FusedSGD([param], lr=1.0, backend=backend)
    schedule = WarmupCosineLR(optimizer, 8, 4, count="applied")
    moved = []
    for by_hand in (False, True, False):
        before = param[0].item()
        if by_hand:
            optimizer.param_groups[0]["lr"] = 8.0
        param.grad = torch.full_like(param, -1.0)
        optimizer.step()
        schedule.step()
        moved.append(param[0].item() - before)
    assert moved == [0.25, 8.0, 0.75]


def test_a_late_group_follows_from_its_own_rate(backend: str, device: torch.device) -> None:
    first, late = (Parameter(torch.zeros(3, device=device)) for _ in range(2))
    optimizer = FusedSGD([first], lr=1.0, backend=backend)
    schedule = WarmupCosineLR(optimizer, 8, 4, count="applied")
    first.grad = torch.full_like(first, -1.0)
    optimizer.step()
    optimizer.add_param_group({"params": [late], "lr": 2.0})
    late.grad = torch.full_like(late, -1.0)
    optimizer.step()
    assert (first[0].item(), late[0].item()) == (0.75, 1.0)
    assert schedule.get_last_lr() == [0.75, 1.5]


ORDERS = [
    order
    for order in itertools.permutations(["build schedule", "load schedule", "load optimizer"])
    if order.index("build schedule") < order.index("load schedule")
]


@pytest.mark.parametrize("order", ORDERS, ids=", ".join)
def test_a_resumed_run_goes_on_bit_for_bit(
    order: tuple[str, ...], backend: str, device: torch.device
) -> None:
    params = parameters(device, torch.float16)
    optimizer, schedule = build(params, backend)

    def run(optimizer: FusedSGD, schedule: WarmupCosineLR, steps: range) -> None:
        for step in steps:
            give_gradients([g["params"][0] for g in optimizer.param_groups], step, step in SKIPPED)
            optimizer.step()
            schedule.step()

    run(optimizer, schedule, range(7))
    saved = io.BytesIO()
    torch.save([optimizer.state_dict(), schedule.state_dict(), params], saved)
    saved.seek(0)
    optimizer_state, schedule_state, resumed_params = torch.load(saved, weights_only=False)
    groups = [{"params": [param], "lr": lr} for param, lr in zip(resumed_params, BASES)]
    resumed = FusedSGD(groups, momentum=0.9, loss_scale="dynamic", backend=backend)
    for action in order:
        if action == "build schedule":
            resumed_schedule = WarmupCosineLR(resumed, **CURVE, count="applied")
        elif action == "load schedule":
            resumed_schedule.load_state_dict(schedule_state)
        else:
            resumed.load_state_dict(optimizer_state)
    assert resumed_schedule.last_epoch == schedule.last_epoch == 3
    run(optimizer, schedule, range(7, 14))
    run(resumed, resumed_schedule, range(7, 14))
    for got, expected in zip(bits(resumed), bits(optimizer), strict=True):
        assert_same_bits(got, expected)


def test_a_checkpoint_has_numbers_that_torch_can_load() -> None:
    params = parameters(torch.device("cpu"), torch.float32)
    optimizer, _ = build(params, "auto", loss_scale=None)
    give_gradients(params, 0)
    optimizer.step()
    state = optimizer.state_dict()
    assert [group["lr"] for group in state["param_groups"]] == [base * FACTORS[1] for base in BASES]
    theirs = torch.optim.SGD([{"params": [param]} for param in params], momentum=0.9)
    theirs.load_state_dict(state)
    assert [group["lr"] for group in theirs.param_groups] == [base * FACTORS[1] for base in BASES]


def test_a_schedule_built_in_the_middle_of_a_run_begins_at_its_first_update() -> None:
    params = parameters(torch.device("cpu"), torch.float32)
    optimizer = FusedSGD(params, lr=0.5)
    give_gradients(params, 0)
    optimizer.step()
    schedule = WarmupCosineLR(optimizer, **CURVE, count="applied")
    assert schedule.last_epoch == 0
    assert schedule.get_last_lr() == [0.5 * FACTORS[0]]


def test_a_step_may_go_to_any_update(backend: str, device: torch.device) -> None:
    param = Parameter(torch.zeros(3, device=device))
    optimizer = FusedSGD([param], lr=1.0, backend=backend)
    schedule = WarmupCosineLR(optimizer, 8, 4, count="applied")
    schedule.step(2)
    param.grad = torch.full_like(param, -1.0)
    optimizer.step()
    assert param[0].item() == 0.75
    assert schedule.last_epoch == 3


def test_a_state_that_counted_calls_continues_at_its_update() -> None:
    params = parameters(torch.device("cpu"), torch.float32)
    optimizer, schedule = build(params, "auto")
    by_calls = WarmupCosineLR(torch.optim.SGD(params, lr=0.1), **CURVE)
    by_calls.step(5)
    with pytest.warns(UserWarning, match="count was 'calls' and is 'applied'"):
        schedule.load_state_dict(by_calls.state_dict())
    assert schedule.last_epoch == 5
    assert [float(group["lr"]) for group in optimizer.param_groups] == [base * FACTORS[5] for base in BASES]


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_goes_on_by_itself(how: str) -> None:
    params = parameters(torch.device("cpu"), torch.float16)
    optimizer, schedule = build(params, "auto")
    give_gradients(params, 0)
    optimizer.step()
    twin = copy.deepcopy(schedule) if how == "deepcopy" else pickle.loads(pickle.dumps(schedule))
    for step in range(1, 4):
        for one in (optimizer, twin.optimizer):
            give_gradients([group["params"][0] for group in one.param_groups], step, step == 2)
            one.step()
    twin.step()
    assert twin.last_epoch == schedule.last_epoch == 3
    for got, expected in zip(bits(twin.optimizer), bits(optimizer), strict=True):
        assert_same_bits(got, expected)


def test_only_a_fused_optimizer_counts_applied_updates() -> None:
    optimizer = torch.optim.SGD([Parameter(torch.zeros(2))], lr=0.1)
    with pytest.raises(
        TypeError, match="optimizer must be a FusedSGD for count='applied', got SGD; use count='calls'"
    ):
        WarmupCosineLR(optimizer, 7, count="applied")
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_restarts_without_end_have_no_table() -> None:
    with pytest.raises(ValueError, match="total_steps must be an integer for count='applied', got None"):
        WarmupCosineLR(FusedSGD([Parameter(torch.zeros(2))]), None, T_0=3, count="applied")


def test_an_unknown_count_is_refused() -> None:
    with pytest.raises(ValueError, match="count must be 'calls' or 'applied', got 'steps'"):
        WarmupCosineLR(FusedSGD([Parameter(torch.zeros(2))]), 3, count="steps")


def test_it_cannot_be_used_in_a_sequence() -> None:
    optimizer = FusedSGD([Parameter(torch.zeros(2))], lr=1.0)
    schedule = WarmupCosineLR(optimizer, 8, 4, count="applied")
    with pytest.raises(RuntimeError, match="cannot be used in SequentialLR"):
        SequentialLR(optimizer, [ConstantLR(optimizer, 0.5, 9), schedule], [3])


@pytest.mark.parametrize("order", ["optimizer first", "schedule first"])
def test_a_state_that_counted_calls_and_its_optimizer_load_in_any_order(order: str) -> None:
    params = parameters(torch.device("cpu"), torch.float32)
    by_calls = FusedSGD(params, lr=0.1)
    calls = WarmupCosineLR(by_calls, **CURVE)
    for step in range(4):
        give_gradients(params, step)
        by_calls.step()
        calls.step()
    optimizer = FusedSGD(params, lr=0.1)
    schedule = WarmupCosineLR(optimizer, **CURVE, count="applied")
    if order == "optimizer first":
        optimizer.load_state_dict(by_calls.state_dict())
    with pytest.warns(UserWarning, match="count was"):
        schedule.load_state_dict(calls.state_dict())
    if order == "schedule first":
        optimizer.load_state_dict(by_calls.state_dict())
    assert schedule.last_epoch == 4
    assert schedule.get_last_lr() == [0.1 * FACTORS[4]]
