"""Bad input is refused with an error that says which, and a refused call changes nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.testing._internal.two_tensor import TwoTensor

from fused_tricks import DynamicLossScale, FusedSGD
from support.backends import NAMES, device_of, takes_no_step, unusable_because
from support.comparison import (
    assert_all_same_bits,
    assert_unchanged,
    bits,
    gradients,
    parameters,
    set_gradients,
    snapshot,
)

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


SCALINGS = [{}, {"loss_scale": "dynamic", "max_grad_norm": 1.0}]


def sparse(p: Parameter) -> None:
    p.grad = torch.zeros_like(p).index_fill_(0, torch.tensor([1], device=p.device), 1.0).to_sparse()


def of_dtype(dtype: torch.dtype) -> Callable[[Parameter], None]:
    def spoil(p: Parameter) -> None:
        p.grad_dtype = dtype
        p.grad = torch.ones(p.shape, dtype=dtype, device=p.device)

    return spoil


def after_data_became_double(p: Parameter) -> None:
    p.grad = torch.ones_like(p)
    p.data = p.data.double()


def after_data_grew(p: Parameter) -> None:
    p.grad = torch.ones_like(p)
    p.data = torch.ones(7, dtype=p.dtype, device=p.device)


def after_data_was_reshaped(p: Parameter) -> None:
    p.grad = torch.ones_like(p)
    p.data = p.data.view(2, 3)


BAD_GRADIENTS: dict[str, tuple[torch.dtype, Callable[[Parameter], None], str]] = {
    "sparse": (torch.float32, sparse, "sparse"),
    "sparse beside FP16": (torch.float16, sparse, "sparse"),
    "complex": (torch.float32, of_dtype(torch.complex64), "complex"),
    "integer": (torch.float32, of_dtype(torch.int32), "int32"),
    "FP64 beside FP32": (torch.float32, of_dtype(torch.float64), "float64"),
    "FP16 beside FP32": (torch.float32, of_dtype(torch.float16), "float16"),
    "BF16 beside FP16": (torch.float16, of_dtype(torch.bfloat16), "bfloat16"),
    "FP64 beside BF16": (torch.bfloat16, of_dtype(torch.float64), "float64"),
    "FP32 beside FP64": (torch.float32, after_data_became_double, "float32"),
    "of a former size": (torch.float32, after_data_grew, "shape"),
    "of a former shape": (torch.float32, after_data_was_reshaped, "shape"),
}


def in_training(
    backend: str,
    device: torch.device,
    last: torch.dtype,
    *,
    steps: int = 2,
    names: bool = False,
    **options: Any,
) -> tuple[FusedSGD, list[Parameter]]:
    """An optimizer over two groups, some good steps into training, its gradients set for the next."""
    params = parameters(
        [(4,), (2, 3), (5,), (6,)], [torch.float16, torch.float32, torch.float32, last], device
    )
    items = list(zip(("stem", "conv", "norm", "head.weight"), params, strict=True)) if names else params
    groups = [{"params": items[:1]}, {"params": items[1:]}]
    optimizer = FusedSGD(groups, lr=0.1, momentum=0.9, backend=backend, **options)
    *good, last_ones = gradients(params, steps + 1)
    for grads in good:
        set_gradients(params, grads)
        optimizer.step()
    set_gradients(params, last_ones)
    return optimizer, params


@pytest.mark.parametrize("options", SCALINGS, ids=str)
@pytest.mark.parametrize("case", BAD_GRADIENTS)
def test_a_bad_gradient_of_the_last_parameter_is_refused_by_its_name_and_changes_nothing(
    backend, device, case, options
):
    """In training, and in the first step, which creates no state."""
    dtype, spoil, word = BAD_GRADIENTS[case]
    for steps, names, where in ((2, True, r"head\.weight"), (0, False, "parameter 2 of group 1")):
        optimizer, params = in_training(backend, device, dtype, steps=steps, names=names, **options)
        params[-1].grad = None
        spoil(params[-1])
        before = snapshot(optimizer)
        with pytest.raises(RuntimeError, match=f"(?i){word}") as refused:
            optimizer.step()
        assert re.search(where, str(refused.value)), str(refused.value)
        assert_unchanged(optimizer, before)
        assert any(before["state"]) is (steps > 0)


@pytest.mark.parametrize(
    ("option", "value", "error", "message"),
    [
        ("lr", "0.1", TypeError, "lr must be a number, got '0.1'"),
        ("lr", torch.ones(2), ValueError, "Tensor lr must be 1-element"),
        ("momentum", None, TypeError, "momentum must be a number, got None"),
        ("dampening", "0", TypeError, "dampening must be a number, got '0'"),
        ("weight_decay", "x", TypeError, "weight_decay must be a number, got 'x'"),
        ("bias_decay", None, KeyError, "a parameter group has no option 'bias_decay'"),
    ],
    ids=str,
)
def test_an_option_spoilt_between_steps_is_refused_by_name(backend, device, option, value, error, message):
    optimizer, _params = in_training(backend, device, torch.float16, loss_scale="dynamic")
    before = snapshot(optimizer)
    good = optimizer.param_groups[1][option]
    if error is KeyError:
        del optimizer.param_groups[1][option]
    else:
        optimizer.param_groups[1][option] = value
    with pytest.raises(error, match=message):
        optimizer.step()
    optimizer.param_groups[1][option] = good
    assert_unchanged(optimizer, before)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_parameter_listed_twice_is_refused_by_name(backend, device, dtype):
    param, other = parameters([(3,), (2,)], dtype, device)
    optimizer = FusedSGD([("embed", param), ("norm", other), ("head", param)], lr=0.1, backend=backend)
    set_gradients([param, other], [torch.ones(3, dtype=dtype), torch.ones(2, dtype=dtype)])
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="parameter 'head' is also parameter 'embed'.*list it once"):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_training_goes_on_after_a_refused_step_as_if_it_had_not_been(backend, device):
    optimizer, params = in_training(backend, device, torch.float32, loss_scale="dynamic")
    twin, twins = in_training(backend, device, torch.float32, loss_scale="dynamic")
    good = params[-1].grad
    params[-1].grad = None
    sparse(params[-1])
    with pytest.raises(RuntimeError):
        optimizer.step()
    params[-1].grad = good
    optimizer.step()
    twin.step()
    assert_all_same_bits(params, twins)
    assert optimizer.stats() == twin.stats()


def test_complex_parameters_are_refused(backend, device):
    param = Parameter(torch.ones(3, dtype=torch.complex64, device=device))
    before = param.detach().clone()
    param.grad = torch.ones_like(param)
    with pytest.raises((TypeError, ValueError, RuntimeError), match="(?i)complex"):
        FusedSGD([param], lr=0.1, backend=backend).step()
    assert torch.equal(param, before)


@pytest.mark.parametrize("backend", [name for name in NAMES if name != "reference"], indirect=True)
def test_parameters_on_a_device_that_the_backend_cannot_reach_are_refused(backend):
    params = [Parameter(torch.ones(3, device=device)) for device in (device_of(backend), "meta")]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = FusedSGD(params, lr=0.1, backend=backend)
    with pytest.raises(RuntimeError, match="parameter 1 of group 0 is on meta"):
        optimizer.step()
    assert torch.equal(params[0].detach().cpu(), torch.ones(3))


def test_a_parameter_that_wraps_other_tensors_is_updated_or_refused(backend, device):
    """DTensor is such a subclass: it has a shape and a dtype, but no elements at its own address."""
    parts = [torch.ones(3, device=device) for _ in range(2)]
    param = Parameter(TwoTensor(*parts))
    other = Parameter(torch.ones(2, device=device))
    optimizer = FusedSGD([other, param], lr=1.0, backend=backend)
    for _ in range(2):
        optimizer.zero_grad()
        param.sum().backward()
        other.sum().backward()
        try:
            optimizer.step()
        except RuntimeError as error:
            assert "parameter 1 of group 0" in str(error)
            assert_all_same_bits([other, *parts], [torch.ones(2), torch.ones(3), torch.ones(3)])
            return
    assert_all_same_bits([other, *parts], [-torch.ones(2), -torch.ones(3), -torch.ones(3)])


@pytest.mark.parametrize("options", [{"loss_scale": "dynamic"}, {"loss_scale": 8.0}], ids=str)
def test_a_closure_together_with_loss_scaling_is_refused_before_it_is_called(backend, device, options):
    optimizer, _params = in_training(backend, device, torch.float32, **options)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step(lambda: pytest.fail("the closure was called"))
    assert_unchanged(optimizer, before)


def test_a_closure_that_raises_changes_nothing(backend, device):
    optimizer, _params = in_training(backend, device, torch.float32)
    before = snapshot(optimizer)

    def closure() -> None:
        raise ArithmeticError("diverged")

    with pytest.raises(ArithmeticError, match="diverged"):
        optimizer.step(closure)
    assert_unchanged(optimizer, before)


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
