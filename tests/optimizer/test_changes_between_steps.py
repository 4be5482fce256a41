"""Changes by user code between two steps: the next step uses them, as in torch.optim.SGD."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from fused_tricks import FusedSGD
from support.comparison import BOTH_SHAPES as SHAPES
from support.comparison import (
    assert_all_same_bits,
    assert_same_bits,
    both,
    copies,
    drive,
    gradients,
    masters,
    parameters,
    set_gradients,
)

pytestmark = pytest.mark.both_watches

CHANGES: dict[str, Callable[[int, dict[str, Any]], dict[str, Any]]] = {
    "lr": lambda i, g: {"lr": 0.1 / (i + 1)},
    "lr becomes a tensor": lambda i, g: {"lr": torch.tensor(0.02) if i == 2 else g["lr"]},
    "momentum on": lambda i, g: {"momentum": 0.9 if i >= 2 else 0.0},
    "momentum off and on": lambda i, g: {"momentum": 0.0 if i in (2, 3) else 0.9},
    "dampening": lambda i, g: {"momentum": 0.9, "dampening": 0.1 * i},
    "nesterov": lambda i, g: {"momentum": 0.9, "nesterov": i % 2 == 1},
    "weight decay on": lambda i, g: {"weight_decay": 0.1 if i >= 2 else 0},
    "maximize": lambda i, g: {"maximize": i % 2 == 1},
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_option_changed_between_steps_takes_effect_as_in_torch(backend, device, change):
    def edit(index: int, optimizer: torch.optim.Optimizer, _: list[Parameter]) -> None:
        for group in optimizer.param_groups:
            group.update(CHANGES[change](index, group))

    drive(both(backend, device, lr=0.05), 6, edit)


def test_bias_decay_changed_between_steps_takes_effect(backend, device):
    params = parameters([(5,)], device=device)
    optimizer = FusedSGD(params, lr=0.5, weight_decay=0.5, backend=backend)
    for decays in (False, True, False):
        optimizer.param_groups[0]["bias_decay"] = decays
        before = params[0].detach().clone()
        set_gradients(params, [torch.zeros(5)])
        optimizer.step()
        assert torch.equal(params[0], before) is not decays


def test_decoupled_weight_decay_changed_between_steps_takes_effect(backend, device):
    params = parameters([(5, 2)], device=device)
    optimizer = FusedSGD(params, lr=0.5, momentum=0.5, weight_decay=0.5, backend=backend)
    for is_decoupled in (False, True, False):
        optimizer.param_groups[0]["decoupled_weight_decay"] = is_decoupled
        optimizer.state.clear()
        before = params[0].detach().clone()
        set_gradients(params, [torch.zeros(5, 2)])
        optimizer.step()
        momentum = optimizer.state[params[0]]["momentum_buffer"]
        assert momentum.any() == (not is_decoupled)
        assert_all_same_bits(
            params, [before * 0.75 if is_decoupled else before.add(before * 0.5, alpha=-0.5)]
        )


def test_memory_replaced_while_another_gradient_goes_is_what_is_updated(backend, device):
    params, same = (parameters([(3,), (2,)], torch.bfloat16, device) for _ in range(2))
    for each in (params, same):
        optimizer = FusedSGD([{"params": each[:1]}, {"params": each[1:]}], lr=0.5, backend=backend)
        for step in range(3):
            if step == 2:
                values = each[0].detach().clone()
                each[0].data = values if each is params else each[0].data
                each[1].grad = None
            each[0].grad = torch.ones_like(each[0])
            if step < 2:
                each[1].grad = torch.ones_like(each[1])
            optimizer.step()
    assert_all_same_bits(params, [param.detach() for param in same])


def test_a_parameter_that_gets_gradients_late_is_first_then(backend, device):
    def withhold(index: int, _: torch.optim.Optimizer, params: list[Parameter]) -> None:
        if index < 2 or index == 4:
            params[1].grad = None

    drive(both(backend, device, lr=0.05, momentum=0.9, dampening=0.5), 7, withhold)


@pytest.mark.parametrize("options", [{"momentum": 0.9, "dampening": 0.5}, {"weight_decay": 0.1}], ids=str)
def test_parameters_that_take_turns_at_having_gradients_are_updated_as_in_torch(backend, device, options):
    def alternate(index: int, _: torch.optim.Optimizer, params: list[Parameter]) -> None:
        for param in params[index % 2 :: 2]:
            param.grad = None

    drive(both(backend, device, lr=0.05, **options), 7, alternate)


STATE_EDITS: dict[str, Callable[[torch.optim.Optimizer, list[Parameter]], None]] = {
    "zeroed": lambda o, ps: o.state[ps[1]]["momentum_buffer"].zero_(),
    "replaced": lambda o, ps: o.state[ps[1]].update(momentum_buffer=torch.ones_like(ps[1])),
    "replaced by another layout": lambda o, ps: o.state[ps[1]].update(
        momentum_buffer=torch.arange(12.0, device=ps[1].device).view(3, 4).t()
    ),
    "deleted": lambda o, ps: o.state[ps[1]].pop("momentum_buffer"),
    "set to None": lambda o, ps: o.state[ps[1]].update(momentum_buffer=None),
    "cleared": lambda o, ps: o.state.clear(),
    "of one parameter deleted": lambda o, ps: o.state.pop(ps[0]),
}


@pytest.mark.parametrize("edit", STATE_EDITS)
def test_momentum_edited_between_steps_is_used_as_in_torch(backend, device, edit):
    def change(index: int, optimizer: torch.optim.Optimizer, params: list[Parameter]) -> None:
        if index == 3:
            STATE_EDITS[edit](optimizer, params)

    drive(both(backend, device, lr=0.05, momentum=0.9, dampening=0.5), 6, change)


def test_a_group_added_between_steps_is_first_then(backend, device):
    pairs = both(backend, device, lr=0.05, momentum=0.9, dampening=0.5)
    drive(pairs, 3)
    late = parameters([(6,), (2, 2)], device=device, seed=8)
    for (optimizer, params), added in zip(pairs, (late, copies(late)), strict=True):
        optimizer.add_param_group({"params": added, "lr": 0.2, "weight_decay": 0.1})
        params += added
    drive(pairs, 3)
    assert pairs[0][0].param_groups[1]["momentum"] == 0.9


def test_parameters_put_into_and_taken_out_of_a_group_are_noticed(backend, device):
    pairs = both(backend, device, lr=0.05, momentum=0.9)
    drive(pairs, 2)
    late = parameters([(6,)], device=device, seed=8)
    for (optimizer, params), added in zip(pairs, (late, copies(late)), strict=True):
        optimizer.param_groups[0]["params"] = [*params[1:], *added]
        params += added
    drive(pairs, 2)
    assert_same_bits(pairs[0][1][0], pairs[1][1][0])


def test_a_parameter_taken_off_the_end_of_a_group_is_not_updated_any_more(backend, device):
    pairs = both(backend, device, lr=0.05, momentum=0.9)
    drive(pairs, 3)
    for optimizer, _ in pairs:
        optimizer.param_groups[0]["params"].pop()
    before = pairs[0][1][-1].detach().clone()
    drive(pairs, 2)
    assert_same_bits(pairs[0][1][-1], before)


def test_parameters_replaced_by_new_ones_of_the_same_shape_are_noticed(backend, device):
    pairs = both(backend, device, lr=0.05, momentum=0.9)
    drive(pairs, 2)
    fresh = parameters(SHAPES, device=device, seed=8)
    for (optimizer, params), new in zip(pairs, (fresh, copies(fresh)), strict=True):
        optimizer.param_groups[0]["params"][:] = new
        params[:] = new
    drive(pairs, 2)


def test_gradients_kept_and_zeroed_in_place_are_read_anew_at_every_step(backend, device):
    pairs = both(backend, device, lr=0.05, momentum=0.9)
    for optimizer, params in pairs:
        for step in range(4):
            optimizer.zero_grad(set_to_none=False)
            sum((p * (i + step)).sum() for i, p in enumerate(params)).backward()
            optimizer.step()
    assert_all_same_bits(pairs[0][1], pairs[1][1])


def test_an_empty_state_dict_forgets_the_momentum(backend, device):
    pairs = both(backend, device, lr=0.05, momentum=0.9, dampening=0.5)
    fresh = [deepcopy(optimizer.state_dict()) for optimizer, _ in pairs]
    drive(pairs, 2)
    for (optimizer, _), state in zip(pairs, fresh, strict=True):
        optimizer.load_state_dict(state)
    drive(pairs, 2)


def test_two_optimizers_share_nothing(backend, device):
    first, second = (both(backend, device, lr=lr, momentum=0.9) for lr in (0.1, 0.01))
    for _ in range(3):
        drive(first, 1)
        drive(second, 1)


@pytest.mark.parametrize(
    "clear", [lambda o, p: o.state.clear(), lambda o, p: o.state.pop(p)], ids=["all", "one"]
)
def test_a_low_precision_parameter_whose_state_is_dropped_starts_anew(backend, device, clear):
    params = parameters([(33,)], torch.float16, device)
    options = {"lr": 0.05, "momentum": 0.9, "dampening": 0.5}
    optimizer = FusedSGD(params, backend=backend, **options)
    stream = gradients(params, 5)
    for grads in stream[:3]:
        set_gradients(params, grads)
        optimizer.step()
    clear(optimizer, params[0])
    expected = copies(params, torch.float32)
    reference = torch.optim.SGD(expected, foreach=False, **options)
    for grads in stream[3:]:
        set_gradients(params, grads)
        optimizer.step()
        set_gradients(expected, [g.float() for g in grads])
        reference.step()
    assert_all_same_bits(masters(optimizer, params), expected)


def test_momentum_dropped_by_the_optimizer_is_not_written_any_more(backend, device):
    """The step does not read the buffer either, because the memory may belong to another tensor."""
    params = parameters(SHAPES, device=device)
    optimizer = FusedSGD(params, lr=0.05, momentum=0.9, backend=backend)
    (grads,) = gradients(params, 1)
    set_gradients(params, grads)
    optimizer.step()
    dropped = [optimizer.state[p]["momentum_buffer"] for p in params]
    before = [buffer.clone() for buffer in dropped]
    optimizer.state.clear()
    optimizer.step()
    assert_all_same_bits(dropped, before)


def test_state_replaced_as_a_whole_is_used(backend, device):
    pairs = both(backend, device, lr=0.05, momentum=0.9)
    drive(pairs, 2)
    for optimizer, params in pairs:
        optimizer.state = type(optimizer.state)(
            dict, {p: {"momentum_buffer": torch.ones_like(p.detach())} for p in params}
        )
    drive(pairs, 2)
    assert_same_bits(*(o.state[ps[1]]["momentum_buffer"] for o, ps in pairs))
