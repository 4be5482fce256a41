"""Tensors that have lost their memory, meta tensors, and tensors of a FakeTensorMode."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import Parameter

from fused_tricks import (
    DynamicLossScale,
    FusedSGD,
    WarmupCosineLR,
    cast_model,
    fp32_state_dict,
    load_fp32_state_dict,
)
from support.comparison import assert_all_same_bits, assert_same_bits, assert_unchanged, parameters, snapshot

OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


def stepped(
    dtype: torch.dtype, backend: str, device: torch.device, steps: int
) -> tuple[FusedSGD, list[Parameter]]:
    params = parameters([(5,), (5,)], dtype, device)
    optimizer = FusedSGD([("a", params[0]), ("b", params[1])], **OPTIONS, backend=backend)
    for param in params:
        param.grad = torch.ones_like(param)
    for _ in range(steps):
        optimizer.step()
    return optimizer, params


@pytest.mark.parametrize("steps", [1, 3], ids="after {} steps".format)
@pytest.mark.parametrize("left", [0, 2], ids="{} bytes left".format)
@pytest.mark.parametrize(
    "what, dtype",
    [
        ("momentum_buffer", torch.float32),
        ("momentum_buffer", torch.float16),
        ("master_param", torch.float16),
        ("parameter", torch.float32),
        ("parameter", torch.bfloat16),
        ("parameter", torch.float64),
    ],
    ids=str,
)
def test_a_tensor_whose_memory_was_freed_is_refused_by_name(backend, device, what, dtype, left, steps):
    optimizer, params = stepped(dtype, backend, device, steps)
    lost = params[1].data if what == "parameter" else optimizer.state[params[1]][what]
    before = params[0].detach().clone()
    lost.untyped_storage().resize_(left)
    with pytest.raises(RuntimeError, match=f"{what} .*'b' has no memory|parameter 'b' has no memory"):
        optimizer.step()
    assert_same_bits(params[0], before)
    assert optimizer.stats().applied_steps == steps


@pytest.mark.parametrize("steps", [0, 2], ids="after {} steps".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_gradient_whose_memory_was_freed_is_refused_by_name(backend, device, dtype, steps):
    optimizer, params = stepped(dtype, backend, device, steps)
    assert params[1].grad is not None
    params[1].grad.untyped_storage().resize_(0)
    before = params[0].detach().clone()
    with pytest.raises(RuntimeError, match="the gradient of parameter 'b' has no memory"):
        optimizer.step()
    assert_same_bits(params[0], before)


@pytest.mark.parametrize("left", [0, 36], ids="{} bytes left".format)
@pytest.mark.parametrize("steps", [0, 2], ids="after {} steps".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_gradient_within_memory_that_was_freed_is_refused_by_name(backend, device, dtype, steps, left):
    optimizer, params = stepped(dtype, backend, device, 0)
    params[1].grad = torch.ones(100, dtype=dtype, device=device)[95:]
    for _ in range(steps):
        optimizer.step()
    assert params[1].grad is not None
    params[1].grad.untyped_storage().resize_(left)
    before = params[0].detach().clone()
    with pytest.raises(RuntimeError, match="the gradient of parameter 'b' has no memory"):
        optimizer.step()
    assert_same_bits(params[0], before)


@pytest.mark.parametrize("steps", [0, 3], ids="after {} steps".format)
def test_memory_freed_beside_a_parameter_that_is_not_dense_is_refused_by_name(backend, device, steps):
    param = Parameter(torch.ones(10, 7, device=device)[:, ::2])
    optimizer = FusedSGD([("a", param)], **OPTIONS, backend=backend)
    for _ in range(steps):
        param.grad = torch.ones(10, 4, device=device)
        optimizer.step()
    before = param.detach().clone()
    param.grad = torch.ones(10, 4, device=device)
    param.grad.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="the gradient of parameter 'a' has no memory"):
        optimizer.step()
    assert_same_bits(param, before)


@pytest.mark.parametrize("key", ["momentum_buffer", "master_param"])
def test_loaded_state_whose_memory_was_freed_is_refused_by_name(backend, device, key):
    optimizer, _params = stepped(torch.float16, backend, device, 1)
    before = snapshot(optimizer)
    saved = optimizer.state_dict()
    saved["state"] = {index: dict(entry) for index, entry in saved["state"].items()}
    saved["state"][1][key] = torch.ones(5, device=device)
    saved["state"][1][key].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"{key} for parameter 'b' whose memory was freed"):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("what", ["parameter", "master_param"])
def test_masters_are_not_refreshed_where_memory_is_missing(backend, device, what):
    optimizer, params = stepped(torch.float16, backend, device, 1)
    with torch.no_grad():
        params[0].fill_(3.0)
    lost = params[1].data if what == "parameter" else optimizer.state[params[1]][what]
    before = optimizer.state[params[0]]["master_param"].clone()
    lost.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="has no memory"):
        optimizer.refresh_masters()
    assert_same_bits(optimizer.state[params[0]]["master_param"], before)


def test_memory_that_comes_back_is_used_again(backend, device):
    optimizer, params = stepped(torch.float32, backend, device, 2)
    buffer = optimizer.state[params[1]]["momentum_buffer"]
    kept, size = buffer.clone(), buffer.untyped_storage().nbytes()
    buffer.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="momentum_buffer"):
        optimizer.step()
    buffer.untyped_storage().resize_(size)
    buffer.copy_(kept)
    optimizer.step()
    _, unharmed = stepped(torch.float32, backend, device, 3)
    assert_all_same_bits(params, [param.detach() for param in unharmed])


def test_state_on_meta_beside_a_parameter_with_memory_is_refused_by_name(backend, device):
    optimizer, params = stepped(torch.float32, backend, device, 1)
    optimizer.state[params[1]]["momentum_buffer"] = torch.zeros(5, device="meta")
    before = params[0].detach().clone()
    with pytest.raises(RuntimeError, match="the momentum_buffer of parameter 'b' has no memory.*meta"):
        optimizer.step()
    assert_same_bits(params[0], before)


def test_a_fake_gradient_of_a_parameter_with_memory_is_refused_by_name(backend, device):
    param = Parameter(torch.ones(3, device=device))
    with FakeTensorMode():
        fake = torch.ones(3, device=device)
    param.grad = fake
    with pytest.raises(
        RuntimeError, match="the gradient of parameter 0 of group 0 has no memory.*FakeTensor"
    ):
        FusedSGD([param], lr=0.1, backend=backend).step()


FORMS = {
    "plain": {},
    "static": {"loss_scale": 8.0},
    "dynamic": {"loss_scale": "dynamic"},
    "clipped": {"max_grad_norm": 1.0},
    "no momentum": {"momentum": 0.0},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_steps_on_fake_tensors_make_the_state_that_real_ones_would(backend, device, dtype, form):
    def shapes_of_state() -> list[dict[str, tuple[torch.Size, torch.dtype]]]:
        model = nn.Sequential(
            nn.Linear(3, 4, device=device, dtype=dtype), nn.Linear(4, 2, device=device, dtype=dtype)
        )
        optimizer = FusedSGD(model.parameters(), backend=backend, **OPTIONS | FORMS[form])
        for _ in range(12):
            optimizer.zero_grad()
            optimizer.scale(model(torch.ones(2, 3, device=device, dtype=dtype)).float().sum()).backward()
            optimizer.step()
        return [
            {key: (value.shape, value.dtype) for key, value in optimizer.state.get(param, {}).items()}
            for param in model.parameters()
        ]

    with FakeTensorMode():
        fake = shapes_of_state()
    assert fake == shapes_of_state()


def test_a_fake_optimizer_is_saved_with_its_own_numbers(backend, device):
    with FakeTensorMode():
        param = Parameter(torch.ones(3, device=device))
        optimizer = FusedSGD([param], lr=0.1, loss_scale=32.0, backend=backend)
        param.grad = torch.ones_like(param)
        optimizer.step()
        (group,) = optimizer.state_dict()["param_groups"]
    assert (group["applied_steps"], group["loss_scale"]) == (1, 32.0)


@pytest.mark.parametrize("when", ["made", "saved"])
def test_a_schedule_by_updates_applied_may_be_used_in_a_fake_mode(backend, device, when):
    with FakeTensorMode() if when == "made" else nullcontext():
        param = Parameter(torch.ones(3, device=device))
        optimizer = FusedSGD([param], lr=0.1, backend=backend)
        schedule = WarmupCosineLR(optimizer, total_steps=5, warmup_steps=4, count="applied")
        for _ in range(2):
            param.grad = torch.ones_like(param)
            optimizer.step()
            schedule.step()
    with FakeTensorMode():
        assert optimizer.state_dict()["param_groups"][0]["lr"] == pytest.approx(0.075)
        assert schedule.get_last_lr() == pytest.approx([0.075])


@pytest.mark.parametrize("count", ["calls", "applied"])
def test_a_schedule_refuses_a_learning_rate_whose_memory_was_freed_and_writes_no_other(count):
    groups = [{"params": [Parameter(torch.ones(3))], "lr": torch.tensor(0.1)} for _ in range(2)]
    optimizer = FusedSGD(groups, lr=0.1)
    schedule = WarmupCosineLR(optimizer, total_steps=5, warmup_steps=4, count=count)
    optimizer.step()
    before = optimizer.param_groups[0]["lr"].clone(), schedule.last_epoch
    optimizer.param_groups[1]["lr"].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="the lr of group 1 has no memory"):
        schedule.step()
    assert (optimizer.param_groups[0]["lr"], schedule.last_epoch) == before


@pytest.mark.parametrize("is_dense", [True, False], ids=["dense", "with gaps"])
@pytest.mark.parametrize("steps", [0, 2], ids="after {} steps".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_real_parameters_are_stepped_and_loaded_in_a_fake_mode_as_outside(
    backend, device, dtype, steps, is_dense
):
    def trained(inside: bool) -> tuple[FusedSGD, Parameter]:
        whole = torch.ones(4, 6, dtype=dtype, device=device)
        param = Parameter(whole[:, :3].contiguous() if is_dense else whole[:, ::2])
        optimizer = FusedSGD([param], **OPTIONS, max_grad_norm=100.0, loss_scale=4.0, backend=backend)
        gradients = [torch.full((4, 3), 4.0 * (i + 1), dtype=dtype, device=device) for i in range(steps + 3)]
        for grad in gradients[:steps]:
            param.grad = grad
            optimizer.step()
        with FakeTensorMode(allow_non_fake_inputs=True) if inside else nullcontext():
            for grad in gradients[steps : steps + 2]:
                param.grad = grad
                optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
        param.grad = gradients[-1]
        optimizer.step()
        return optimizer, param

    (ours, param), (expected, same) = trained(True), trained(False)
    assert_same_bits(param, same)
    for key, value in expected.state[same].items():
        assert_same_bits(ours.state[param][key], value)
    assert ours.stats() == expected.stats()


@pytest.mark.parametrize("what", ["weight", "master", "buffer", "value"])
def test_full_precision_is_not_exported_or_loaded_where_memory_was_freed(backend, device, what):
    model = cast_model(nn.BatchNorm1d(3, device=device), torch.float16)
    model.weight.data = model.weight.data.half()
    optimizer = FusedSGD(model.parameters(), lr=0.1, backend=backend)
    model.weight.grad, model.bias.grad = torch.ones_like(model.weight), torch.ones_like(model.bias)
    optimizer.step()
    state = fp32_state_dict(model, optimizer)
    lost = {
        "weight": model.weight.data,
        "master": optimizer.state[model.weight]["master_param"],
        "buffer": model.running_mean,
        "value": state["running_mean"],
    }
    lost[what].untyped_storage().resize_(0)
    bias = model.bias.detach().clone()
    state["bias"] = state["bias"] + 1
    with pytest.raises(ValueError, match="(weight|running_mean).* has no memory"):
        load_fp32_state_dict(model, optimizer, state)
    if what != "value":
        with pytest.raises(ValueError, match="(weight|running_mean).* has no memory"):
            fp32_state_dict(model, optimizer)
    assert_same_bits(model.bias, bias)


def test_parameters_without_elements_need_no_memory(backend, device):
    columns = torch.zeros(0, 2, device=device)
    params = [Parameter(columns[:, 0]), Parameter(columns[:, 1]), Parameter(torch.ones(2, device=device))]
    optimizer = FusedSGD(params, **OPTIONS, backend=backend)
    for _ in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    assert optimizer.stats().applied_steps == 2


def test_torch_estimates_the_memory_of_a_step():
    tracker_module = pytest.importorskip("torch.distributed._tools.mem_tracker")
    with FakeTensorMode():
        model = nn.Linear(64, 64)
        optimizer = FusedSGD(model.parameters(), lr=0.1, momentum=0.9)
        tracker = tracker_module.MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            model(torch.ones(8, 64)).sum().backward()
            optimizer.step()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    # Weights, gradients and momentum, in FP32.
    assert sum(peak.values()) >= 3 * 2 * 4 * (64 * 64 + 64) / 2


def test_a_fake_model_on_a_gpu_needs_no_gpu():
    with FakeTensorMode(allow_non_fake_inputs=False):
        param = Parameter(torch.ones(3, device="cuda", dtype=torch.float16))
        optimizer = FusedSGD([param], lr=0.1, momentum=0.9, loss_scale="dynamic", max_grad_norm=1.0)
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert optimizer.state[param]["master_param"].device.type == "cuda"


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_meta_parameters_are_stepped_as_torch_steps_them(backend, dtype, form):
    param = Parameter(torch.ones(3, device="meta", dtype=dtype))
    param.grad = torch.ones_like(param)
    optimizer = FusedSGD([param], backend=backend, **OPTIONS | FORMS[form])
    for _ in range(2):
        optimizer.step()
    assert optimizer.stats().applied_steps == 2
    assert all(value.is_meta and value.dtype == torch.float32 for value in optimizer.state[param].values())
    assert optimizer.state_dict()["param_groups"][0]["applied_steps"] == 2


@pytest.mark.parametrize("order", [1, -1])
def test_parameters_on_meta_and_on_the_cpu_share_an_optimizer(order):
    real, meta = Parameter(torch.ones(3)), Parameter(torch.ones(3, device="meta"))
    expected = Parameter(torch.ones(3))
    optimizer = FusedSGD(
        [real, meta][::order], loss_scale=4.0, max_grad_norm=10.0, **OPTIONS, bias_decay=True
    )
    reference = torch.optim.SGD([expected], **OPTIONS)
    for _ in range(2):
        for param in (real, meta):
            param.grad = torch.full_like(param, 4.0)
        expected.grad = torch.ones(3)
        optimizer.step()
        reference.step()
    assert_same_bits(real, expected)
    assert optimizer.stats()[:3] == (4.0, 2, 0)


def test_an_overflow_is_found_beside_parameters_on_meta():
    real, meta = Parameter(torch.ones(3)), Parameter(torch.ones(3, device="meta"))
    optimizer = FusedSGD([meta, real], loss_scale="dynamic", **OPTIONS)
    for param in (real, meta):
        param.grad = torch.full_like(param, torch.inf)
    optimizer.step()
    assert optimizer.stats().last_step_skipped
    assert torch.equal(real, torch.ones(3))


def test_a_parameter_on_meta_without_a_gradient_disturbs_nobody(backend, device):
    real, meta = Parameter(torch.ones(3, device=device)), Parameter(torch.ones(3, device="meta"))
    optimizer = FusedSGD([meta, real], loss_scale="dynamic", backend=backend, **OPTIONS)
    real.grad = torch.full_like(real, 65536.0)
    before = snapshot(optimizer)
    assert before["counters"] == (65536.0, 0, 0)
    optimizer.step()
    assert optimizer.stats().applied_steps == 1
    assert_unchanged(optimizer, before, but=("params", "state", "saved state", "options", "counters"))


@pytest.mark.parametrize(
    "loss_scale", [lambda: 1024.0, lambda: DynamicLossScale(init_scale=1024.0)], ids=["static", "dynamic"]
)
def test_the_scale_survives_a_model_that_leaves_meta(backend, device, loss_scale):
    model = nn.Linear(3, 2, device="meta")
    optimizer = FusedSGD(model.parameters(), loss_scale=loss_scale(), backend=backend, **OPTIONS)
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to_empty(device=device)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(1.0)
    for param in model.parameters():
        param.grad = torch.full_like(param, 1024.0)
    optimizer.step()
    assert optimizer.stats()[:3] == (1024.0, 1, 0)
    assert torch.equal(model.bias.detach().cpu(), torch.full((2,), 0.9))


def test_a_loss_on_meta_is_scaled_to_one_on_meta():
    optimizer = FusedSGD([Parameter(torch.ones(3))], lr=0.1, loss_scale="dynamic")
    assert optimizer.scale(torch.ones((), device="meta", dtype=torch.float16)).device.type == "meta"
