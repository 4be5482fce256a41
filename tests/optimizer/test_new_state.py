"""Masters and momentum buffers between the step that makes them and the first update that writes them."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch.nn import Linear, Parameter

from fused_tricks import FusedSGD, fp32_state_dict, load_fp32_state_dict
from fused_tricks.backends import BACKENDS
from fused_tricks.step.device_state import StepState
from fused_tricks.step.new_state import NewState
from support.comparison import assert_all_same_bits, assert_same_bits

DAMPED = {"lr": 0.5, "momentum": 0.5, "dampening": 0.5}


def skipped_first_step(backend, device, dtype=torch.float16, **options):
    """Returns an optimizer whose only step was skipped, and its parameter of ones."""
    param = Parameter(torch.ones(3, device=device, dtype=dtype))
    optimizer = FusedSGD([param], backend=backend, loss_scale=1.0, **{**DAMPED, **options})
    param.grad = torch.full_like(param, float("inf"))
    optimizer.step()
    return optimizer, param


def step(optimizer, param, value=1.0):
    param.grad = torch.full_like(param, value)
    optimizer.step()


def test_after_a_skipped_first_step_the_state_has_a_buffer_of_zeros_and_the_parameters_values(
    backend, device
):
    optimizer, param = skipped_first_step(backend, device)
    state = optimizer.state[param]
    assert list(state) == ["master_param", "momentum_buffer"]
    assert state["master_param"].tolist() == [1.0] * 3
    assert state["momentum_buffer"].tolist() == [0.0] * 3


def test_a_state_dict_has_no_state_before_the_first_update(backend, device):
    optimizer, param = skipped_first_step(backend, device)
    assert optimizer.state_dict()["state"] == {}
    step(optimizer, param)
    assert list(optimizer.state_dict()["state"][0]) == ["master_param", "momentum_buffer"]


def test_a_state_dict_has_the_state_of_parameters_without_elements_once_an_update_was_applied(
    backend, device
):
    params = [Parameter(torch.zeros(size, device=device)) for size in (0, 3)]
    optimizer = FusedSGD(params, backend=backend, **DAMPED)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert [list(own) for own in optimizer.state_dict()["state"].values()] == [["momentum_buffer"]] * 2


@pytest.mark.parametrize(
    "copied",
    [
        lambda pair: pair,
        copy.deepcopy,
        lambda pair: pickle.loads(pickle.dumps(pair)),
        lambda pair: (copy.copy(pair[0]), pair[1]),
    ],
    ids=["itself", "deepcopy", "pickle", "copy"],
)
def test_the_first_update_after_skipped_steps_is_not_dampened(backend, device, copied):
    optimizer, param = copied(skipped_first_step(backend, device))
    step(optimizer, param, float("nan"))
    step(optimizer, param)
    assert optimizer.state[param]["momentum_buffer"].tolist() == [1.0] * 3
    step(optimizer, param)
    assert optimizer.state[param]["momentum_buffer"].tolist() == [1.0] * 3
    assert param.tolist() == [0.0] * 3


def test_a_buffer_that_changes_its_dtype_with_the_parameter_is_still_unwritten(backend, device):
    optimizer, param = skipped_first_step(backend, device, torch.float32)
    param.grad = None
    param.data = param.data.double()
    step(optimizer, param)
    assert optimizer.state[param]["momentum_buffer"].dtype == torch.float64
    assert optimizer.state[param]["momentum_buffer"].tolist() == [1.0] * 3


@pytest.mark.parametrize("updates", [0, 1])
def test_a_buffer_that_is_copied_to_another_device_takes_along_whether_it_is_written(updates):
    step_state, new_state = StepState(), NewState()
    buffer, copied = torch.zeros(3), torch.zeros(3)
    new_state.add([], [buffer], step_state, torch.device("cpu"))
    if updates:
        (note,) = new_state.first_updates_of([buffer], torch.device("cpu"))
        note.fill_(updates)
    new_state.replace(buffer, copied, step_state, torch.device("cpu", 0))
    assert new_state.is_unwritten(copied, step_state) is (updates == 0)


def test_a_state_assigned_by_user_code_is_used_in_the_first_update(backend, device):
    optimizer, param = skipped_first_step(backend, device)
    optimizer.state[param]["momentum_buffer"] = torch.full((3,), 4.0, device=device)
    step(optimizer, param)
    assert optimizer.state[param]["momentum_buffer"].tolist() == [2.5] * 3


def test_masters_that_were_loaded_after_a_skipped_first_step_are_saved(backend, device):
    torch.manual_seed(0)
    model = Linear(3, 2, device=device, dtype=torch.float16)
    optimizer = FusedSGD(model.parameters(), backend=backend, loss_scale=1.0, **DAMPED)
    model(torch.ones(1, 3, device=device, dtype=torch.float16) / 0).sum().backward()
    optimizer.step()
    weights = {key: torch.rand_like(value) for key, value in fp32_state_dict(model, optimizer).items()}
    load_fp32_state_dict(model, optimizer, weights)
    saved = optimizer.state_dict()["state"].values()
    assert_all_same_bits([own["master_param"] for own in saved], weights.values(), "master")


@pytest.mark.parametrize(
    "options", [{"lr": 1e300}, {"momentum": "0.9"}, {"nesterov": torch.ones(2)}], ids=str
)
def test_a_refused_first_step_leaves_no_state(backend, device, options):
    param = Parameter(torch.ones(3, device=device, dtype=torch.float16))
    other = Parameter(torch.ones(3, device=device))
    optimizer = FusedSGD([param, other], backend=backend, **DAMPED)
    optimizer.param_groups[0].update(options)
    param.grad = torch.ones_like(param)
    with pytest.raises((TypeError, ValueError)):
        optimizer.step()
    assert not optimizer.state
    optimizer.param_groups[0].update(DAMPED, nesterov=False)
    step(optimizer, param)
    assert optimizer.state[param]["momentum_buffer"].tolist() == [1.0] * 3


def test_a_refused_step_keeps_the_state_of_the_steps_before(backend, device):
    params = [Parameter(torch.ones(3, device=device)) for _ in range(2)]
    optimizer = FusedSGD(params, backend=backend, **DAMPED)
    step(optimizer, params[0])
    params[1].grad = torch.ones_like(params[1])
    optimizer.param_groups[0]["momentum"] = "0.5"
    with pytest.raises(TypeError, match="momentum"):
        optimizer.step()
    assert list(optimizer.state) == params[:1]
    assert_same_bits(optimizer.state[params[0]]["momentum_buffer"], torch.ones(3))


def test_a_second_step_needs_no_new_plan(backend, device, monkeypatch):
    if BACKENDS[backend].device_type is None:
        pytest.skip("the reference makes a plan for every step")
    optimizer, param = skipped_first_step(backend, device)
    monkeypatch.setattr(optimizer, "_prepare", lambda: pytest.fail("a new plan was made"))
    for _ in range(3):
        step(optimizer, param)
    optimizer.state_dict()
    step(optimizer, param)


def test_a_whole_optimizer_is_saved_between_a_skipped_first_step_and_its_first_update(backend, device):
    optimizer, param = skipped_first_step(backend, device)
    file = io.BytesIO()
    torch.save((optimizer, param), file)
    file.seek(0)
    loaded, loaded_param = torch.load(file, weights_only=False)
    for _ in range(2):
        step(optimizer, param)
        step(loaded, loaded_param)
    assert_same_bits(loaded_param, param)


def test_the_state_of_a_parameter_that_left_after_a_skipped_first_step_is_not_saved(backend, device):
    optimizer, _ = skipped_first_step(backend, device)
    other = Parameter(torch.ones(3, device=device))
    optimizer.param_groups[0]["params"][0] = other
    assert optimizer.state_dict()["state"] == {}
    step(optimizer, other)
    assert list(optimizer.state_dict()["state"]) == [0]


def test_an_optimizer_is_pickled_by_every_protocol(backend, device):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        param = Parameter(torch.ones(3, device=device))
        loaded, loaded_param = pickle.loads(
            pickle.dumps((FusedSGD([param], backend=backend, **DAMPED), param), protocol)
        )
        step(loaded, loaded_param)
        assert len(loaded.state_dict()["state"]) == 1


def test_a_shallow_copy_continues_from_buffers_that_the_original_has_written(backend, device):
    if backend not in ("cpu", "reference"):
        pytest.skip("a GPU takes the update of another optimizer with the same number for its own")
    optimizer, param = skipped_first_step(backend, device, torch.float32, lr=1.0, dampening=0.0)
    twin = copy.copy(optimizer)
    step(optimizer, param)
    assert list(twin.state_dict()["state"]) == [0]
    step(twin, param)
    assert optimizer.state[param]["momentum_buffer"].tolist() == [1.5] * 3


@pytest.mark.parametrize("copied", [False, True])
def test_values_that_user_code_writes_into_a_new_master_are_saved(backend, device, copied):
    optimizer, param = skipped_first_step(backend, device)
    optimizer.state[param]["master_param"].fill_(1 + 2**-12)
    if copied:
        param, optimizer = copy.deepcopy((param, optimizer))
    assert optimizer.state_dict()["state"][0]["master_param"].tolist() == [1 + 2**-12] * 3


@pytest.mark.parametrize("value", [None, 1 + 2**-12])
def test_a_new_master_that_changes_its_layout_is_saved_only_if_user_code_wrote_it(backend, device, value):
    param = Parameter(torch.ones(2, 2, 2, 2, device=device, dtype=torch.float16))
    optimizer = FusedSGD([param], lr=0.5, loss_scale=1.0, backend=backend)
    step(optimizer, param, float("inf"))
    master = optimizer.state[param]["master_param"]
    if value is not None:
        master.fill_(value)
    param.data = param.data.contiguous(memory_format=torch.channels_last)
    step(optimizer, param, float("inf"))
    assert optimizer.state[param]["master_param"] is not master
    saved = optimizer.state_dict()["state"]
    assert [state["master_param"].unique().tolist() for state in saved.values()] == (
        [] if value is None else [[value]]
    )


def pair_after_a_skipped_step(backend, device, **options):
    """Returns an optimizer whose first step was skipped and whose second step updated one of two parameters."""
    params = [Parameter(torch.ones(3, device=device, dtype=torch.float16)) for _ in range(2)]
    optimizer = FusedSGD(params, loss_scale=1.0, backend=backend, **{"lr": 0.5, **options})
    for param in params:
        param.grad = torch.full_like(param, float("inf"))
    optimizer.step()
    params[1].grad = None
    step(optimizer, params[0])
    return optimizer, params


def test_the_update_of_one_parameter_writes_no_master_of_another(backend, device):
    optimizer, _params = pair_after_a_skipped_step(backend, device)
    assert list(optimizer.state_dict()["state"]) == [0]
    del optimizer.param_groups[0]["params"][1]
    assert list(optimizer.state_dict()["state"]) == [0]


def test_a_parameter_that_an_update_leaves_out_has_its_own_first_update_later(backend, device):
    optimizer, params = pair_after_a_skipped_step(backend, device, **DAMPED, ema_decay=0.5)
    params[0].grad = None
    step(optimizer, params[1])
    state = optimizer.state[params[1]]
    assert state["momentum_buffer"].tolist() == [1.0] * 3
    assert_same_bits(state["ema_param"], state["master_param"])


def test_a_parameter_may_change_its_shape_before_its_own_first_update(backend, device):
    optimizer, params = pair_after_a_skipped_step(backend, device)
    params[1].data = torch.ones(5, device=device, dtype=torch.float16)
    step(optimizer, params[1])
    assert optimizer.state[params[1]]["master_param"].tolist() == [0.5] * 5


def test_a_resynchronised_master_is_still_unwritten(backend, device):
    optimizer, param = skipped_first_step(backend, device)
    with torch.no_grad():
        param.mul_(2)
    step(optimizer, param, float("inf"))
    param.data.mul_(2)
    optimizer.refresh_masters()
    assert optimizer.state[param]["master_param"].tolist() == [4.0] * 3
    assert optimizer.state_dict()["state"] == {}


def test_a_shallow_copy_saves_the_masters_that_the_original_has_written(backend, device):
    optimizer, param = skipped_first_step(backend, device)
    twin = copy.copy(optimizer)
    step(optimizer, param)
    assert list(twin.state_dict()["state"][0]) == ["master_param", "momentum_buffer"]


def test_a_skipped_first_step_adds_no_empty_entries_to_the_state_dict(backend, device):
    params = [Parameter(torch.ones(3, device=device, dtype=d)) for d in (torch.float16, torch.float32)]
    optimizer = FusedSGD(params, lr=0.5, loss_scale=1.0, backend=backend)
    for param in params:
        param.grad = torch.full_like(param, float("inf"))
    optimizer.step()
    assert optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize("value", [torch.zeros(3), 0], ids=["tensor", "number"])
def test_entries_of_user_code_are_saved_after_a_skipped_first_step(backend, device, value):
    optimizer, _ = skipped_first_step(backend, device)
    optimizer.state["of user code"] = value
    assert list(optimizer.state_dict()["state"]) == ["of user code"]


def test_a_malformed_option_is_refused_before_a_new_plan_changes_state(backend, device):
    param = Parameter(torch.ones(3, device=device, dtype=torch.float16))
    optimizer = FusedSGD([param], lr=0.5, loss_scale=1.0, backend=backend)
    step(optimizer, param)
    param.grad, param.data = None, param.data.float()
    optimizer.param_groups[0]["momentum"] = "0.5"
    with pytest.raises(TypeError, match="momentum"):
        step(optimizer, param)
    assert list(optimizer.state[param]) == ["master_param"]
