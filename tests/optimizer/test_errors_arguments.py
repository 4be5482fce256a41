"""Frequent mistakes in arguments: the error is one line that states the correct form."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from fused_tricks import DynamicLossScale, FusedSGD, WarmupCosineLR
from support.comparison import assert_same_bits, assert_unchanged, copies, parameters, set_gradients, snapshot

MODEL = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
NO_PARAMETERS: dict[str, Any] = {
    "module": MODEL,
    "method": MODEL.parameters,
    "method that gives names": MODEL.named_parameters,
    "modules": [MODEL[0], MODEL[1]],
    "modules with names": list(MODEL.named_children()),
    "iterator of modules": MODEL.children(),
    "methods": [MODEL[0].parameters, MODEL[1].parameters],
    "state dict": MODEL.state_dict(),
    "class": nn.Linear,
}


@pytest.mark.parametrize("what", NO_PARAMETERS)
def test_what_is_no_parameters_is_refused_with_what_to_write(what):
    params = list(NO_PARAMETERS[what]) if what == "iterator of modules" else NO_PARAMETERS[what]
    with pytest.raises(TypeError, match="write FusedSGD\\(model.parameters\\(\\), ...\\)") as raised:
        FusedSGD(params, lr=0.1)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"params": []}, "\\[group\\]"),
        ([MODEL[0].parameters(), MODEL[1].parameters()], "write a group"),
        (nn.ParameterDict({"a": Parameter(torch.ones(1))}), "values\\(\\)"),
        (None, "params must be an iterable of tensors or groups, got NoneType"),
        (3, "params must be an iterable of tensors or groups, got int"),
    ],
    ids=["group", "iterators", "ParameterDict", "None", "int"],
)
def test_other_things_that_are_no_parameters_are_refused(params, message):
    with pytest.raises(TypeError, match=message):
        FusedSGD(params, lr=0.1)


NO_GROUP: dict[str, Any] = {
    "module": MODEL[1],
    "method": MODEL[1].parameters,
    "modules": [MODEL[1]],
    "modules with names": [("head", MODEL[1])],
}


@pytest.mark.parametrize("what", NO_GROUP)
def test_a_group_of_no_parameters_is_refused_with_what_to_write_and_not_added(what):
    message = "write \\{'params': module.parameters\\(\\)\\}$"
    with pytest.raises(TypeError, match=message):
        FusedSGD([{"params": NO_GROUP[what]}], lr=0.1)
    optimizer = FusedSGD(MODEL[0].parameters(), lr=0.1)
    before = snapshot(optimizer)
    with pytest.raises(TypeError, match=message):
        optimizer.add_param_group({"params": NO_GROUP[what]})
    assert_unchanged(optimizer, before)


def test_a_parameter_list_is_a_list_of_parameters():
    params = nn.ParameterList(parameters([(2,), (3,)]))
    assert FusedSGD(params, lr=0.1).param_groups[0]["params"] == list(params)


def test_fused_and_foreach_together_are_refused_as_by_torch():
    with pytest.raises(RuntimeError) as expected:
        torch.optim.SGD(parameters([(2,)]), fused=True, foreach=True)
    with pytest.raises(RuntimeError, match=f"^{expected.value}$"):
        FusedSGD(parameters([(2,)]), fused=True, foreach=True)


TOO_LARGE = [10**400, -(10**400), 10**5000, Fraction(10**400)]
MESSAGES = {"lr": "learning rate", "loss_scale": "loss_scale", "max_grad_norm": "max_grad_norm"}


@pytest.mark.parametrize("value", TOO_LARGE, ids=["10^400", "-10^400", "10^5000", "fraction"])
@pytest.mark.parametrize(
    "option", ["lr", "momentum", "weight_decay", "dampening", "max_grad_norm", "loss_scale"]
)
def test_a_number_beyond_a_double_is_refused_by_name(option, value):
    with pytest.raises(ValueError, match=MESSAGES.get(option, option)):
        FusedSGD(parameters([(2,)]), **{"lr": 0.1, option: value})


@pytest.mark.parametrize(
    "value", [10**400, 10**5000, Fraction(1, 10**400)], ids=["10^400", "10^5000", "10^-400"]
)
@pytest.mark.parametrize("rule", ["init_scale", "growth_factor", "backoff_factor", "min_scale", "max_scale"])
def test_a_rule_beyond_a_double_is_refused_by_name(rule, value):
    with pytest.raises(ValueError, match=rule):
        DynamicLossScale(**{rule: value})
    scale = DynamicLossScale()
    with pytest.raises(ValueError, match=rule):
        setattr(scale, rule, value)
    assert repr(scale) == repr(DynamicLossScale())


@pytest.mark.parametrize("option", ["lr", "momentum", "weight_decay", "dampening"])
def test_a_number_beyond_fp32_is_refused_where_fp32_is_what_it_meets(option):
    options = {"lr": 0.1, option: 1e39}
    with pytest.raises(ValueError, match=f"{option}=1e\\+39 does not fit FP32"):
        FusedSGD(parameters([(2,)], torch.float16), **options)
    assert FusedSGD(parameters([(2,)], torch.float64), **options).param_groups[0][option] == 1e39


def test_a_late_group_whose_numbers_do_not_fit_is_not_added():
    optimizer = FusedSGD(parameters([(2,)]), lr=0.1)
    before = snapshot(optimizer)
    for value in (1e39, 10**400):
        with pytest.raises(ValueError, match="lr|learning rate"):
            optimizer.add_param_group({"params": parameters([(3,)]), "lr": value})
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("option", ["lr", "momentum", "weight_decay", "dampening"])
def test_a_number_beyond_a_double_in_a_group_is_refused_by_the_step(backend, device, option):
    params = parameters([(2,)], device=device)
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, backend=backend)
    set_gradients(params, [torch.ones(2)])
    optimizer.step()
    before = snapshot(optimizer)
    good = optimizer.param_groups[0][option]
    optimizer.param_groups[0][option] = 10**400
    with pytest.raises(ValueError, match=f"{option} must fit a double"):
        optimizer.step()
    optimizer.param_groups[0][option] = good
    assert_unchanged(optimizer, before)


# Kernels read a learning rate on a GPU, so the host cannot refuse its value.
@pytest.mark.parametrize(
    "option, value, message",
    [
        ("weight_decay", torch.tensor(1e39, dtype=torch.float64), "weight_decay=1e\\+39 does not fit FP32"),
        ("weight_decay", torch.empty((), device="meta"), "group 0 has a weight_decay without a value"),
        ("lr", torch.empty((), device="meta"), "group 0 has a lr without a value"),
    ],
    ids=["beyond FP32", "weight_decay on meta", "lr on meta"],
)
def test_a_tensor_that_cannot_be_used_is_refused_by_the_step_by_name(backend, device, option, value, message):
    params = parameters([(2,)], device=device)
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, weight_decay=0.1, bias_decay=True, backend=backend)
    set_gradients(params, [torch.ones(2)])
    optimizer.step()
    before = params[0].detach().clone()
    optimizer.param_groups[0][option] = value
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert_same_bits(params[0], before)


@pytest.mark.parametrize("option", ["lr", "momentum", "weight_decay", "dampening"])
@pytest.mark.parametrize("steps", [0, 1], ids="after {} steps".format)
def test_a_number_beyond_fp32_in_a_group_is_refused_by_the_step(backend, device, option, steps):
    params = parameters([(2,), (3,)], device=device)
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    optimizer = FusedSGD(groups, lr=0.1, momentum=0.9, backend=backend)
    set_gradients(params, [torch.ones(2), torch.ones(3)])
    for _ in range(steps):
        optimizer.step()
    before = snapshot(optimizer)
    good = optimizer.param_groups[1][option]
    optimizer.param_groups[1][option] = 1e39
    with pytest.raises(ValueError, match=f"{option}=1e\\+39 does not fit FP32"):
        optimizer.step()
    optimizer.param_groups[1][option] = good
    assert_unchanged(optimizer, before)


def test_a_number_beyond_fp32_is_used_for_fp64(backend, device):
    (param,) = parameters([(2,)], torch.float64, device)
    param.grad = torch.full_like(param, 1e-39)
    (expected,) = copies([param])
    expected.grad = torch.full_like(expected, 1e-39)
    optimizer = FusedSGD([param], lr=0.1, backend=backend)
    optimizer.param_groups[0]["lr"] = 1e39
    optimizer.step()
    torch.optim.SGD([expected], lr=1e39).step()
    assert_same_bits(param, expected)


@pytest.mark.parametrize("value", [[1.0, 2.0], "text", 1.0], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("key", [None, "momentum_buffer", "master_param"])
@pytest.mark.parametrize("steps", [0, 2], ids="after {} steps".format)
def test_state_put_by_hand_that_is_no_tensor_is_refused_by_name(backend, device, key, value, steps):
    params = parameters([(2,), (2,)], torch.float16, device)
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, backend=backend)
    set_gradients(params, [torch.ones_like(param) for param in params])
    for _ in range(steps):
        optimizer.step()
    before = params[0].detach().clone()
    if key is None:
        optimizer.state[params[1]] = value
    else:
        optimizer.state[params[1]][key] = value
    with pytest.raises(TypeError, match=f"{key or 'state'} of parameter 1 of group 0 must be a"):
        optimizer.step()
    assert_same_bits(params[0], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_parameter_made_for_inference_is_refused_by_name(backend, device, dtype):
    with torch.inference_mode():
        param = Parameter(torch.ones(2, dtype=dtype, device=device))
        param.grad = torch.ones_like(param)
    optimizer = FusedSGD([("head", param)], lr=0.1, backend=backend)
    with pytest.raises(RuntimeError, match="parameter 'head' was made under torch.inference_mode"):
        optimizer.step()


@pytest.mark.parametrize("name", ["total_steps", "warmup_steps", "T_0", "T_mult", "min_ratio"])
def test_a_schedule_takes_or_refuses_huge_numbers_by_name(name):
    optimizer = torch.optim.SGD(parameters([(2,)]), lr=0.1)
    try:
        schedule = WarmupCosineLR(optimizer, **{"total_steps": 10, "T_0": 3, name: 10**5000})
    except ValueError as error:
        assert name in str(error)
    else:
        assert name in repr(schedule)
