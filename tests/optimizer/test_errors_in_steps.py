"""Refused steps: the error has the name of the parameter or option, and nothing changes."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch.nn import Parameter
from torch.testing._internal.two_tensor import TwoTensor

from fused_tricks import FusedSGD
from support.backends import NAMES, device_of
from support.comparison import (
    assert_all_same_bits,
    assert_unchanged,
    parameters,
    set_gradients,
    snapshot,
)
from support.in_training import in_training

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
    "FP16 beside BF16": (
        torch.bfloat16,
        of_dtype(torch.float16),
        "cast the gradient to torch.bfloat16 or torch.float32",
    ),
    "BF16 beside FP16": (torch.float16, of_dtype(torch.bfloat16), "bfloat16"),
    "FP64 beside BF16": (torch.bfloat16, of_dtype(torch.float64), "float64"),
    "FP32 beside FP64": (torch.float32, after_data_became_double, "float32"),
    "of a former size": (torch.float32, after_data_grew, "shape"),
    "of a former shape": (torch.float32, after_data_was_reshaped, "shape"),
}


@pytest.mark.parametrize("options", SCALINGS, ids=str)
@pytest.mark.parametrize("case", BAD_GRADIENTS)
def test_a_bad_gradient_of_the_last_parameter_is_refused_by_its_name_and_changes_nothing(
    backend, device, case, options
):
    """The refused step is in the middle of training, or the first step, which creates no state."""
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
