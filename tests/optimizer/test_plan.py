"""The contents of a plan: addresses that may change, new state, and the lifetimes of objects."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from fused_tricks import FusedSGD, extension
from fused_tricks.backends import BACKENDS
from fused_tricks.step import planned_steps
from fused_tricks.step.plan import build_plan
from support.comparison import assert_all_same_bits, assert_same_bits

pytestmark = pytest.mark.both_watches


def stepped(backend: str, param: Parameter, times: int = 2, **options: object) -> FusedSGD:
    optimizer = FusedSGD([param], backend=backend, **{"lr": 0.5, "momentum": 0.5} | options)
    for _ in range(times):
        param.grad = torch.ones_like(param)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("key", ["momentum_buffer", "master_param"])
def test_state_whose_data_was_replaced_is_used_at_its_new_address(backend, device, key):
    """Offloading moves state away and back through `.data`."""
    params = [Parameter(torch.zeros(1000, device=device, dtype=torch.float16)) for _ in range(2)]
    optimizers = [stepped(backend, param) for param in params]
    moved = optimizers[0].state[params[0]][key]
    moved.data = moved.data.clone()
    for param, optimizer in zip(params, optimizers, strict=True):
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert_all_same_bits([params[0], moved], [params[1], optimizers[1].state[params[1]][key]])


def test_a_parameter_that_refers_to_its_optimizer_is_collected_with_it(backend, device):
    param = Parameter(torch.zeros(3, device=device))
    param.optimizer = stepped(backend, param)
    watch = weakref.ref(param)
    del param
    gc.collect()
    assert watch() is None


def test_a_buffer_that_no_update_wrote_is_first_when_momentum_comes_back(backend, device):
    param = Parameter(torch.zeros(1, device=device))
    optimizer = FusedSGD([param], lr=1.0, momentum=0.9, dampening=0.5, loss_scale=1.0, backend=backend)
    for grad, momentum in ((float("inf"), 0.9), (1.0, 0.0), (1.0, 0.9)):
        optimizer.param_groups[0]["momentum"] = momentum
        param.grad = torch.full_like(param, grad)
        optimizer.step()
    assert param.item() == -2.0


def test_new_data_of_a_staged_parameter_is_noticed_although_an_address_was_used_before(backend, device):
    param = Parameter(torch.ones(64, 64, device=device, dtype=torch.float16))
    optimizer = FusedSGD([param], lr=0.0, backend=backend)
    for _ in range(3):
        param.grad = torch.ones_like(param).t()
        optimizer.step()
    for factor in range(2, 12):
        param.data = torch.full_like(param, factor)
        param.data = param.data.clone()
        param.grad = torch.ones_like(param).t()
        optimizer.step()
        assert (param == factor).all()


def test_a_staged_parameter_whose_data_becomes_low_precision_gets_a_master(backend, device):
    param = Parameter(torch.zeros(3, 4, device=device))
    optimizer = FusedSGD([param], lr=2.0**-12, backend=backend)
    for step in range(5):
        if step == 2:
            param.grad = None
            param.data = param.data.half() + 1
            param.grad_dtype = torch.float32
        param.grad = torch.ones(4, 3, device=device).t()
        optimizer.step()
    assert param.dtype == torch.float16
    assert_same_bits(optimizer.state[param]["master_param"], torch.full((3, 4), 1 - 5 * 2.0**-12))


@pytest.mark.parametrize("layout", [lambda t: t, lambda t: t.t().contiguous().t()], ids=["dense", "staged"])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradients_that_take_turns_soon_need_no_new_plan(
    backend, device, dtype, options, layout, monkeypatch
):
    if backend == "reference":
        pytest.skip("the reference makes a plan for every step")
    params = [Parameter(torch.zeros(3, 4, device=device, dtype=dtype)) for _ in range(4)]
    optimizer = FusedSGD(params, lr=0.5, backend=backend, **options)
    for step in range(8):
        if step == 4:
            monkeypatch.setattr(optimizer, "_prepare", lambda: pytest.fail("a new plan was made"))
        for index, param in enumerate(params):
            param.grad = layout(torch.ones_like(param)) if index % 2 == step % 2 else None
        optimizer.step()


def test_a_parameter_resized_after_a_skipped_first_step_starts_anew(backend, device):
    param = Parameter(torch.zeros(6, device=device, dtype=torch.float16))
    optimizer = FusedSGD([param], lr=1.0, momentum=0.9, loss_scale=1.0, backend=backend)
    for size, value in ((6, float("inf")), (9, 1.0)):
        param.grad = None
        param.data = torch.zeros(size, device=device, dtype=torch.float16)
        param.grad = torch.full_like(param, value)
        optimizer.step()
    assert param.tolist() == [-1.0] * 9


def test_a_staged_gradient_may_change_its_dtype(backend, device):
    param = Parameter(torch.zeros(3, 4, device=device, dtype=torch.float16).t()[:, :2])
    optimizer = FusedSGD([param], lr=1.0, max_grad_norm=float("inf"), backend=backend)
    for dtype in (torch.float32, torch.float16, torch.float32):
        for value in (float("inf"), 1.0):
            param.grad = None
            param.grad_dtype = dtype
            param.grad = torch.full((4, 2), value, dtype=dtype, device=device)
            optimizer.step()
    assert_same_bits(param.detach(), torch.full((4, 2), -3.0, dtype=torch.float16))


def test_numbers_of_numpy_are_numbers(backend, device):
    param = Parameter(torch.zeros(2, device=device))
    optimizer = FusedSGD([param], lr=np.float32(0.5), momentum=np.float64(0.5), backend=backend)
    param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert param.tolist() == [-0.5, -0.5]


def test_a_state_saved_while_a_schedule_had_momentum_off_is_loaded(backend, device):
    param = Parameter(torch.zeros(2, device=device))
    optimizer = FusedSGD([param], lr=0.5, momentum=0.5, nesterov=True, backend=backend)
    optimizer.param_groups[0]["momentum"] = 0.0
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["nesterov"] is True


def test_a_first_group_may_be_empty(backend, device):
    param = Parameter(torch.zeros(2, device=device))
    optimizer = FusedSGD([{"params": []}, {"params": [param]}], lr=0.5, backend=backend)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert param.tolist() == [-0.5, -0.5]


def test_a_gradient_that_begins_to_wrap_other_tensors_is_not_overlooked(backend, device):
    from torch.testing._internal.two_tensor import TwoTensor

    param = Parameter(torch.zeros(3, device=device))
    optimizer = stepped(backend, param, momentum=0.0)
    parts: list[Tensor] = [torch.ones(3, device=device) for _ in range(2)]
    param.grad = TwoTensor(*parts)
    if BACKENDS[backend].device_type is not None:
        with pytest.raises(RuntimeError, match="parameter 0 of group 0 .*TwoTensor"):
            optimizer.step()
        assert param.tolist() == [-1.0] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 8, 9, 100])
@pytest.mark.parametrize("former", [1.0, float("nan")])
def test_a_master_takes_over_those_elements_of_its_parameter_that_others_wrote(
    backend, device, dtype, size, former
):
    param = Parameter(torch.full((size,), former, device=device, dtype=dtype))
    optimizer = stepped(backend, param, lr=1e-4, momentum=0.0)
    expected = optimizer.state[param]["master_param"].clone()
    with torch.no_grad():
        param[size // 2] = -2.0
    expected[size // 2] = -2.0
    optimizer.step()
    assert_same_bits(
        optimizer.state[param]["master_param"], expected.add(torch.ones_like(expected), alpha=-1e-4)
    )


@pytest.mark.parametrize("functions", [(), extension._STABLE_FUNCTIONS], ids=["DLPack", "shim"])
def test_tensors_are_read_alike_by_every_interface_of_torch(functions, monkeypatch):
    if extension.missing_because() is not None:
        pytest.skip(extension.missing_because())
    module = extension.load_extension()
    params = [Parameter(torch.ones(3, 4, dtype=dtype)) for dtype in extension._DTYPES]
    try:
        with monkeypatch.context() as patch:
            patch.setattr(extension, "_STABLE_FUNCTIONS", functions)
            extension.connect(module)
        for param in params:
            optimizer = stepped("cpu", param, momentum=0.0)
            param.data = torch.zeros(4, 3, dtype=param.dtype).t()
            param.grad = torch.ones_like(param)
            optimizer.step()
            param.grad = torch.ones(3, 4, dtype=param.dtype)
            optimizer.step()
            assert (param == -1.0).all()
    finally:
        extension.connect(module)


def test_parameters_that_are_views_of_one_tensor_keep_their_plan(backend, device):
    flat = torch.zeros(40, device=device, dtype=torch.float16)
    params = [Parameter(flat[begin : begin + 10]) for begin in range(0, 40, 10)]
    optimizer = FusedSGD(params, lr=0.5, momentum=0.5, backend=backend)
    plans = []
    for _ in range(4):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        plans.append(optimizer._prepared.plan)
    if BACKENDS[backend].device_type is not None:
        assert plans[2] is plans[3]
    assert_same_bits(flat, torch.full((40,), -3.0625, dtype=torch.float16))


def test_a_master_written_after_a_skipped_first_step_is_in_the_state_although_momentum_went_off(
    backend, device
):
    param = Parameter(torch.ones(3, device=device, dtype=torch.float16))
    optimizer = FusedSGD([param], lr=2.0**-15, momentum=0.9, loss_scale=2.0, backend=backend)
    param.grad = torch.full_like(param, float("inf"))
    optimizer.step()
    optimizer.param_groups[0]["momentum"] = 0.0
    for _ in range(3):
        param.grad = torch.full_like(param, 2.0)
        optimizer.step()
    (state,) = optimizer.state_dict()["state"].values()
    assert list(state) == ["master_param"]
    assert_same_bits(state["master_param"], torch.full((3,), 1 - 3 * 2.0**-15))


def test_a_master_written_before_another_parameter_came_is_in_the_state_although_that_step_was_skipped(
    backend, device
):
    params = [Parameter(torch.ones(3, device=device, dtype=torch.float16)) for _ in range(2)]
    optimizer = FusedSGD(params, lr=2.0**-15, loss_scale=2.0, backend=backend)
    params[0].grad = torch.full_like(params[0], 2.0)
    optimizer.step()
    for param in params:
        param.grad = torch.full_like(param, float("inf"))
    optimizer.step()
    state = optimizer.state_dict()["state"]
    assert list(state) == [0]
    assert_same_bits(state[0]["master_param"], torch.full((3,), 1 - 2.0**-15))


def test_a_step_that_raises_leaves_no_gradient_in_a_stand_in(backend, device):
    param = Parameter(torch.ones(4, 6, device=device)[:, ::2])
    optimizer = FusedSGD([param], lr=0.1, momentum=0.9, backend=backend)
    param.grad = torch.ones(4, 3, device=device)
    optimizer.step()
    before = param.detach().clone()
    param.grad = torch.ones(4, 3, device=device)
    gradient = weakref.ref(param.grad)
    optimizer.param_groups[0]["momentum"] = "0.9"
    with pytest.raises(TypeError, match="momentum"):
        optimizer.step()
    (entry,) = optimizer._prepared.plan.entries
    assert entry.source.grad is None
    param.grad = None
    assert gradient() is None
    assert torch.equal(param, before)


@pytest.mark.parametrize("is_enabled", [True, False], ids=["collects", "collects nothing"])
@pytest.mark.parametrize("is_refused", [False, True], ids=["applied", "refused"])
def test_the_garbage_collector_pauses_while_a_plan_is_made(
    backend, device, monkeypatch, is_enabled, is_refused
):
    seen = []

    def build(*arguments):
        seen.append(gc.isenabled())
        return build_plan(*arguments)

    monkeypatch.setattr(planned_steps, "build_plan", build)
    param = Parameter(torch.zeros(1, 3, device=device).expand(2 if is_refused else 1, 3))
    param.grad = torch.ones_like(param)
    (gc.enable if is_enabled else gc.disable)()
    try:
        with pytest.raises(RuntimeError, match="share memory") if is_refused else nullcontext():
            FusedSGD([param], lr=0.1, backend=backend).step()
        assert gc.isenabled() == is_enabled
    finally:
        gc.enable()
    assert seen and not any(seen)
