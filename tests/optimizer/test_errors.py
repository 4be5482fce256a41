"""Bad input: an error names it, and a refused call changes nothing."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from fused_tricks import DynamicLossScale, FusedSGD
from support.backends import NAMES, takes_no_step, unusable_because
from support.comparison import (
    assert_unchanged,
    bits,
    parameters,
    set_gradients,
    snapshot,
)
from support.in_training import in_training

BAD_HYPER_PARAMETERS = [
    ({"lr": -0.1}, "Invalid learning rate"),
    ({"lr": torch.tensor(-0.1)}, "Invalid learning rate"),
    ({"lr": torch.tensor([0.1, 0.2])}, "Tensor lr must be 1-element"),
    ({"momentum": -0.5}, "Invalid momentum value"),
    ({"weight_decay": -1e-4}, "Invalid weight_decay value"),
    ({"nesterov": True}, "Nesterov momentum requires a momentum and zero dampening"),
    (
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        "Nesterov momentum requires a momentum and zero dampening",
    ),
]

BAD_SCALES = [0, 0.0, -1.0, float("nan"), float("inf"), "static", ""]

BAD_RULES = [
    {"init_scale": 0.0},
    {"init_scale": -2.0},
    {"init_scale": float("inf")},
    {"init_scale": float("nan")},
    {"growth_factor": 1.0},
    {"growth_factor": 0.5},
    {"growth_factor": float("nan")},
    {"backoff_factor": 1.0},
    {"backoff_factor": 2.0},
    {"backoff_factor": 0.0},
    {"backoff_factor": -0.5},
    {"growth_interval": 0},
    {"growth_interval": -3},
    {"hysteresis": 0},
    {"min_scale": 0.0},
    {"min_scale": -1.0},
    {"min_scale": 64.0, "max_scale": 32.0, "init_scale": 48.0},
]


@takes_no_step
@pytest.mark.parametrize(("options", "message"), BAD_HYPER_PARAMETERS, ids=str)
def test_bad_hyper_parameters_are_refused_in_torchs_words(backend, device, options, message):
    params = parameters([(3,)], device=device)
    with pytest.raises(ValueError, match=f"^{message}"):
        FusedSGD(params, backend=backend, **options)


@takes_no_step
@pytest.mark.parametrize("value", BAD_SCALES, ids=repr)
def test_a_bad_loss_scale_is_refused(backend, device, value):
    with pytest.raises(ValueError, match="loss_scale"):
        FusedSGD(parameters([(3,)], device=device), lr=0.1, loss_scale=value, backend=backend)


@takes_no_step
@pytest.mark.parametrize("value", [object(), [1.0], {"scale": 1.0}], ids=lambda v: type(v).__name__)
def test_a_loss_scale_of_the_wrong_type_is_refused(backend, device, value):
    with pytest.raises(TypeError, match="loss_scale"):
        FusedSGD(parameters([(3,)], device=device), lr=0.1, loss_scale=value, backend=backend)


@pytest.mark.parametrize("options", BAD_RULES, ids=str)
def test_a_bad_rule_of_the_loss_scale_is_refused_by_name(options):
    with pytest.raises(ValueError, match="|".join(options)):
        DynamicLossScale(**options)


@pytest.mark.parametrize("option", ["init_scale", "growth_factor", "growth_interval"])
def test_a_rule_of_the_wrong_type_is_refused_by_name(option):
    with pytest.raises(TypeError, match=option):
        DynamicLossScale(**{option: "big"})


@takes_no_step
@pytest.mark.parametrize("value", [-1.0, float("nan"), -float("inf")], ids=str)
def test_a_bad_max_grad_norm_is_refused(backend, device, value):
    with pytest.raises(ValueError, match="max_grad_norm"):
        FusedSGD(parameters([(3,)], device=device), lr=0.1, max_grad_norm=value, backend=backend)


@takes_no_step
def test_a_max_grad_norm_of_the_wrong_type_is_refused(backend, device):
    with pytest.raises(TypeError, match="max_grad_norm"):
        FusedSGD(parameters([(3,)], device=device), lr=0.1, max_grad_norm="1", backend=backend)


def test_an_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="quantum") as raised:
        FusedSGD(parameters([(3,)]), lr=0.1, backend="quantum")
    assert "reference" in str(raised.value)
    assert "auto" in str(raised.value)


def test_a_backend_of_the_wrong_type_is_refused():
    with pytest.raises(TypeError, match="backend"):
        FusedSGD(parameters([(3,)]), lr=0.1, backend=3)


def test_a_backend_that_is_not_usable_here_is_refused_with_its_reason():
    unusable = [
        name
        for name in NAMES
        if unusable_because(name) and "this version has no" not in unusable_because(name)
    ]
    if not unusable:
        pytest.skip("every backend of this version is usable here")
    for name in unusable:
        with pytest.raises(RuntimeError, match=name) as raised:
            FusedSGD(parameters([(3,)]), lr=0.1, backend=name)
        assert unusable_because(name) in str(raised.value)


@takes_no_step
def test_differentiable_is_refused(backend, device):
    with pytest.raises((ValueError, RuntimeError), match="differentiable"):
        FusedSGD(parameters([(3,)], device=device), lr=0.1, differentiable=True, backend=backend)


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ({"differentiable": True}, ValueError, "differentiable=True is not supported"),
        ({"nesterov": "no"}, TypeError, "nesterov must be True or False, got 'no'"),
        ({"bias_decay": "no"}, TypeError, "bias_decay must be True or False, got 'no'"),
        ({"maximize": None}, TypeError, "maximize must be True or False, got None"),
    ],
    ids=str,
)
@pytest.mark.parametrize("how", ["group", "checkpoint"])
def test_a_flag_that_means_nothing_is_refused_by_name(how, option, error, message):
    optimizer = FusedSGD(parameters([(3,)]), lr=0.1, momentum=0.9, backend="reference")
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        if how == "group":
            optimizer.add_param_group({"params": parameters([(2,)]), **option})
        else:
            checkpoint = deepcopy(optimizer.state_dict())
            checkpoint["param_groups"][0].update(option, lr=0.7)
            optimizer.load_state_dict(checkpoint)
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("flag", ["foreach", "fused"])
@pytest.mark.parametrize("value", [None, True, False])
def test_torchs_implementation_flags_are_accepted(backend, device, flag, value):
    params = parameters([(3,)], device=device)
    optimizer = FusedSGD(params, lr=0.1, backend=backend, **{flag: value})
    set_gradients(params, [torch.ones(3)])
    optimizer.step()
    assert optimizer.stats().applied_steps == 1


@takes_no_step
def test_one_loss_scale_serves_one_optimizer(backend, device):
    rule = DynamicLossScale(init_scale=8.0)
    first = FusedSGD(parameters([(3,)], device=device), lr=0.1, loss_scale=rule, backend=backend)
    before = snapshot(first)
    with pytest.raises(ValueError, match="(?i)loss.?scale"):
        FusedSGD(parameters([(3,)], device=device), lr=0.1, loss_scale=rule, backend=backend)
    assert_unchanged(first, before)


@takes_no_step
@pytest.mark.parametrize(
    "options", [{"lr": -1.0}, {"lr": 0.1, "max_grad_norm": -1.0}, {"lr": 0.1, "params": []}], ids=str
)
def test_a_refused_construction_leaves_the_loss_scale_free(backend, device, options):
    rule = DynamicLossScale(init_scale=8.0)
    params = parameters([(3,)], device=device)
    with pytest.raises(ValueError):
        FusedSGD(**{"params": params, "loss_scale": rule, "backend": backend, **options})
    assert FusedSGD(params, lr=0.1, loss_scale=rule, backend=backend).stats().scale == 8.0


@pytest.mark.parametrize("key", ["momentum_buffer", "master_param"])
@pytest.mark.parametrize("how", ["loaded", "assigned"])
def test_state_of_the_wrong_shape_is_refused_and_never_read(backend, device, key, how):
    optimizer, params = in_training(backend, device, torch.float16)
    weights = [bits(p).clone() for p in params]
    short = torch.ones(2, device=device)
    with pytest.raises((ValueError, RuntimeError), match=key):
        if how == "assigned":
            optimizer.state[params[-1]][key] = short
        else:
            checkpoint = deepcopy(optimizer.state_dict())
            checkpoint["state"][3][key] = short
            optimizer.load_state_dict(checkpoint)
        optimizer.step()
    assert all(torch.equal(bits(p), w) for p, w in zip(params, weights, strict=True))


@pytest.mark.parametrize("spoil", ["groups", "sizes"])
def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(backend, device, spoil):
    optimizer, _params = in_training(backend, device, torch.float16, loss_scale="dynamic")
    checkpoint = deepcopy(optimizer.state_dict())
    for group in checkpoint["param_groups"]:
        group["lr"] = 0.7
        group["loss_scale"] = 2.0
    if spoil == "groups":
        checkpoint["param_groups"].pop()
    else:
        checkpoint["param_groups"][1]["params"].pop()
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="param"):
        optimizer.load_state_dict(checkpoint)
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("key", ["applied_steps", "skipped_steps"])
@pytest.mark.parametrize("value", [-1, 2**63, None, True, 1.0], ids=repr)
def test_a_checkpoint_with_a_counter_out_of_range_is_refused_and_changes_nothing(backend, device, key, value):
    optimizer, _params = in_training(backend, device, torch.float16, loss_scale="dynamic")
    checkpoint = deepcopy(optimizer.state_dict())
    checkpoint["param_groups"][0] |= {"loss_scale": 8.0, "growth_tracker": 5, "lr": 0.7, key: value}
    before = snapshot(optimizer)
    with pytest.raises((TypeError, ValueError), match=key):
        optimizer.load_state_dict(checkpoint)
    assert_unchanged(optimizer, before)


def test_a_refused_group_changes_nothing(backend, device):
    optimizer, params = in_training(backend, device, torch.float32, loss_scale="dynamic")
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [params[0]]})
    with pytest.raises(TypeError):
        optimizer.add_param_group({"params": ["weight"]})
    assert_unchanged(optimizer, before)
    optimizer.step()
    assert optimizer.stats().applied_steps == 3


def test_a_non_finite_scale_in_a_checkpoint_is_refused():
    rule = DynamicLossScale(init_scale=8.0)
    state = rule.state_dict()
    for value in (float("nan"), float("inf"), 0.0, -1.0):
        with pytest.raises(ValueError, match="scale"):
            rule.load_state_dict({**state, "scale": value})
    assert rule.state_dict() == state
