"""Masters that follow their parameters: through other dtypes, and by `refresh_masters` after unnoticed writes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from fused_tricks import FusedSGD, fp32_state_dict
from support.backends import takes_no_step
from support.comparison import assert_same_bits, parameters, set_gradients

LOW = [torch.float16, torch.bfloat16]


def trained(dtype: torch.dtype, backend: str, device: torch.device) -> tuple[FusedSGD, torch.nn.Module]:
    """Returns an optimizer, and a model of one parameter whose master has more bits than the parameter."""
    model = torch.nn.Module()
    model.weight = parameters([(2, 3)], dtype, device)[0]
    optimizer = FusedSGD(model.parameters(), lr=0.013, momentum=0.9, backend=backend)
    step(optimizer, model)
    return optimizer, model


def step(optimizer: FusedSGD, model: torch.nn.Module) -> None:
    set_gradients([model.weight], [torch.full((2, 3), 0.7, dtype=model.weight.dtype)])
    optimizer.step()


def master(optimizer: FusedSGD, model: torch.nn.Module) -> Tensor:
    tensor: Tensor = optimizer.state[model.weight]["master_param"]
    return tensor


@pytest.mark.parametrize("between", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_a_master_of_before_a_conversion_is_not_used_after_it(backend, device, dtype, between):
    optimizer, model = trained(dtype, backend, device)
    rates = optimizer.param_groups[0]
    model.weight.grad = None
    model.to(between)
    # This update is smaller than the rounding to `dtype`.
    rates["lr"] = 1e-9
    step(optimizer, model)
    model.weight.grad = None
    model.to(dtype)
    begin = model.weight.detach().clone()
    rates["lr"] = 0.0
    step(optimizer, model)
    assert_same_bits(master(optimizer, model), begin.float())


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_a_master_is_not_saved_beside_a_parameter_in_fp32(backend, device, dtype):
    optimizer, model = trained(dtype, backend, device)
    assert set(optimizer.state_dict()["state"][0]) == {"master_param", "momentum_buffer"}
    model.float()
    assert set(optimizer.state_dict()["state"][0]) == {"momentum_buffer"}


def by_data(param: Parameter, values: Tensor) -> None:
    param.data.copy_(values)


def by_numpy(param: Parameter, values: Tensor) -> None:
    if param.dtype == torch.bfloat16:
        pytest.skip("NumPy has no bfloat16")
    param.detach().numpy()[...] = values.numpy()


def by_dlpack(param: Parameter, values: Tensor) -> None:
    torch.from_dlpack(param.detach()).copy_(values)


def by_storage(param: Parameter, values: Tensor) -> None:
    param.untyped_storage().copy_(values.contiguous().untyped_storage())


def by_another_parameter(param: Parameter, values: Tensor) -> None:
    with torch.no_grad():
        Parameter(param.data).copy_(values)


UNNOTICED: dict[str, Callable[[Parameter, Tensor], None]] = {
    "param.data": by_data,
    "NumPy": by_numpy,
    "DLPack": by_dlpack,
    "storage": by_storage,
    "another parameter": by_another_parameter,
}


@pytest.mark.parametrize("write", UNNOTICED)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_refreshed_masters_have_what_was_written_without_notice(backend, device, dtype, write):
    optimizer, model = trained(dtype, backend, device)
    before = master(optimizer, model).clone()
    values = model.weight.detach().clone()
    values[0] = torch.tensor([1.5, -2.0, 3.0], dtype=dtype)
    UNNOTICED[write](model.weight, values)
    optimizer.refresh_masters()
    expected = before.clone()
    expected[0] = values[0].float()
    assert_same_bits(master(optimizer, model), expected)
    optimizer.param_groups[0]["lr"] = 0.0
    step(optimizer, model)
    assert_same_bits(model.weight, values)
    assert_same_bits(fp32_state_dict(model, optimizer)["weight"], expected)


def test_masters_that_are_refreshed_for_nothing_keep_their_bits(backend, device):
    optimizer, model = trained(torch.float16, backend, device)
    before = master(optimizer, model).clone()
    optimizer.refresh_masters()
    assert_same_bits(master(optimizer, model), before)


@takes_no_step
def test_there_is_nothing_to_refresh_before_the_first_step(backend, device):
    optimizer = FusedSGD(parameters([(3,)], torch.float16, device), lr=0.1, backend=backend)
    optimizer.refresh_masters()
    assert not optimizer.state


def test_masters_are_refreshed_after_a_first_step_that_was_skipped(backend, device):
    param = parameters([(3,)], torch.float16, device)[0]
    optimizer = FusedSGD([param], lr=1.0, loss_scale=1.0, backend=backend)
    param.grad = torch.full_like(param, torch.inf)
    optimizer.step()
    param.data.fill_(2.0)
    optimizer.refresh_masters()
    param.grad = torch.full_like(param, 0.5)
    optimizer.step()
    assert param.tolist() == [1.5, 1.5, 1.5]
