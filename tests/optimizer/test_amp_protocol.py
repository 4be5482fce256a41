"""FusedSGD(loss_scale=None) under torch.amp.GradScaler."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from fused_tricks import FusedSGD
from support import backends
from support.comparison import (
    assert_all_same_bits,
    assert_unchanged,
    copies,
    gradients,
    parameters,
    set_gradients,
    snapshot,
)

SHAPES = [(33,), (4, 5), (0,), (1,)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9, "dampening": 0.3},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2, "maximize": True},
]
INIT_SCALE = 1024.0


def scaler_for(device: torch.device, **options: Any) -> torch.amp.GradScaler:
    """Returns a GradScaler with a scale tensor, so that a test can set gradients by hand."""
    scaler = torch.amp.GradScaler(device.type, **{"init_scale": INIT_SCALE, "growth_interval": 3, **options})
    scaler.scale(torch.ones((), device=device))
    return scaler


def with_overflow(grads: list[torch.Tensor], value: float = torch.inf) -> list[torch.Tensor]:
    grads = [g.clone() for g in grads]
    grads[1].view(-1)[-1] = value
    return grads


def has_scaler_attributes(optimizer: torch.optim.Optimizer) -> bool:
    return hasattr(optimizer, "grad_scale") or hasattr(optimizer, "found_inf")


@pytest.mark.parametrize("overflows", [(), (0,), (0, 1, 4), (3, 7)], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_training_under_grad_scaler_equals_torch_sgd_under_grad_scaler(backend, device, options, overflows):
    params = parameters(SHAPES, device=device)
    expected = copies(params)
    optimizer = FusedSGD(params, lr=0.05, bias_decay=True, backend=backend, **options)
    reference = torch.optim.SGD(expected, lr=0.05, foreach=False, **options)
    scaler, other = scaler_for(device), scaler_for(torch.device("cpu"))
    for step, grads in enumerate(gradients(params, 10)):
        grads = with_overflow(grads) if step in overflows else grads
        for s, o, p in ((scaler, optimizer, params), (other, reference, expected)):
            set_gradients(p, [g * s.get_scale() for g in grads])
            s.step(o)
            s.update()
        assert scaler.state_dict() == other.state_dict()
    assert_all_same_bits(params, expected)
    assert optimizer.stats().applied_steps == 10 - len(overflows)
    assert optimizer.stats().skipped_steps == len(overflows)
    assert not has_scaler_attributes(optimizer)


def test_the_gradients_stay_scaled(backend, device):
    params = parameters(SHAPES, device=device)
    optimizer = FusedSGD(params, lr=0.05, backend=backend)
    (grads,) = gradients(params, 1)
    set_gradients(params, grads)
    scaler_for(device).step(optimizer)
    assert_all_same_bits([p.grad for p in params], grads)


def test_an_overflow_in_the_first_step_changes_nothing(backend, device):
    params = parameters(SHAPES, device=device)
    optimizer = FusedSGD(params, lr=0.05, momentum=0.9, backend=backend)
    set_gradients(params, with_overflow(gradients(params, 1)[0]))
    before = snapshot(optimizer)
    scaler = scaler_for(device)
    scaler.step(optimizer)
    assert_unchanged(optimizer, before, but=("counters", "options", "state"))
    assert optimizer.stats().last_step_skipped
    scaler.update()
    assert scaler.get_scale() == INIT_SCALE / 2


@pytest.mark.parametrize("max_norm", [0.1, 1e9])
def test_explicitly_unscaled_gradients_are_not_unscaled_again(backend, device, max_norm):
    params = parameters(SHAPES, device=device)
    expected = copies(params)
    optimizer = FusedSGD(params, lr=0.05, momentum=0.9, bias_decay=True, backend=backend)
    reference = torch.optim.SGD(expected, lr=0.05, momentum=0.9, foreach=False)
    scaler, other = scaler_for(device), scaler_for(torch.device("cpu"))
    for step, grads in enumerate(gradients(params, 5)):
        grads = with_overflow(grads, torch.nan) if step == 2 else grads
        for s, o, p in ((scaler, optimizer, params), (other, reference, expected)):
            set_gradients(p, [g * s.get_scale() for g in grads])
            s.unscale_(o)
            torch.nn.utils.clip_grad_value_(p, max_norm)
            s.step(o)
            s.update()
    assert_all_same_bits(params, expected)


def test_a_step_without_any_gradient_is_let_through(backend, device):
    """GradScaler passes `found_inf` as the int 0 when no parameter has a gradient."""
    params = parameters(SHAPES, device=device)
    optimizer = FusedSGD(params, lr=0.05, momentum=0.9, backend=backend)
    scaler_for(device).step(optimizer)
    assert_all_same_bits(params, parameters(SHAPES))
    assert not has_scaler_attributes(optimizer)


@pytest.mark.parametrize("found", [1.0, 2.0, 3.0, 0.5])
@pytest.mark.parametrize("unscaled", [True, False])
def test_any_found_inf_but_zero_skips(backend, device, found, unscaled):
    """A sum over ranks or devices can exceed 1."""
    params = parameters(SHAPES, device=device)
    optimizer = FusedSGD(params, lr=0.05, momentum=0.9, backend=backend)
    set_gradients(params, gradients(params, 1)[0])
    before = snapshot(optimizer)
    optimizer.grad_scale = None if unscaled else torch.tensor(INIT_SCALE, device=device)
    optimizer.found_inf = torch.tensor(found, device=device)
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf
    assert_unchanged(optimizer, before, but=("counters", "options", "state"))
    assert optimizer.stats().skipped_steps == 1


@pytest.mark.parametrize("found", [0, 0.0, "tensor", "one-element tensor"], ids=str)
def test_a_found_inf_of_zero_applies_the_step(backend, device, found):
    params, expected = (parameters(SHAPES, device=device) for _ in range(2))
    optimizer, plain = (FusedSGD(p, lr=0.05, momentum=0.9, backend=backend) for p in (params, expected))
    (grads,) = gradients(params, 1)
    set_gradients(params, [g * 8 for g in grads])
    set_gradients(expected, grads)
    tensors = {"tensor": torch.zeros((), device=device), "one-element tensor": torch.zeros(1, device=device)}
    optimizer.found_inf = tensors.get(found, found)
    optimizer.grad_scale = torch.tensor(8.0, device=device)
    optimizer.step()
    plain.step()
    assert_all_same_bits(params, expected)


def test_a_disabled_scaler_takes_plain_steps(backend, device):
    params, expected = (parameters(SHAPES, device=device) for _ in range(2))
    optimizer, plain = (FusedSGD(p, lr=0.05, momentum=0.9, backend=backend) for p in (params, expected))
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    for grads in gradients(params, 3):
        set_gradients(params, grads)
        set_gradients(expected, grads)
        scaler.step(optimizer)
        scaler.update()
        plain.step()
    assert_all_same_bits(params, expected)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_disabled_scaler_may_stand_beside_loss_scaling(backend, device, enabled):
    params = parameters(SHAPES, device=device)
    optimizer = FusedSGD(params, lr=0.05, loss_scale="dynamic", backend=backend)
    set_gradients(params, gradients(params, 1)[0])
    scaler = scaler_for(device) if enabled else torch.amp.GradScaler(device.type, enabled=False)
    if enabled:
        with pytest.raises(RuntimeError, match="(?s)GradScaler.*loss_scale|loss_scale.*GradScaler"):
            scaler.step(optimizer)
    else:
        scaler.step(optimizer)
    assert optimizer.stats().applied_steps == (0 if enabled else 1)


@pytest.mark.parametrize("scale", ["dynamic", 8.0])
def test_a_refused_scaler_leaves_nothing_behind(backend, device, scale):
    params = parameters(SHAPES, device=device)
    optimizer = FusedSGD(params, lr=0.05, momentum=0.9, loss_scale=scale, backend=backend)
    set_gradients(params, gradients(params, 1)[0])
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="GradScaler"):
        scaler_for(device).step(optimizer)
    assert not has_scaler_attributes(optimizer)
    assert_unchanged(optimizer, before)
    optimizer.step()
    assert optimizer.stats().applied_steps == 1


def test_a_step_refused_for_its_gradient_leaves_no_found_inf_behind(backend, device):
    """With a remaining `found_inf`, the next scaler step would multiply two scales."""
    params = parameters(SHAPES, device=device)
    optimizer = FusedSGD(params, lr=0.05, backend=backend)
    set_gradients(params, gradients(params, 1)[0])
    params[1].grad = params[1].grad.to_sparse()
    scaler = scaler_for(device)
    with pytest.raises(RuntimeError, match="sparse"):
        scaler.step(optimizer)
    assert not has_scaler_attributes(optimizer)


def fail(*_: Any) -> None:
    raise ArithmeticError("in a hook")


@contextlib.contextmanager
def refused_gradient(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    param = optimizer.param_groups[0]["params"][1]
    good, param.grad = param.grad, param.grad.to_sparse()
    yield
    param.grad = good


@contextlib.contextmanager
def raising_pre_hook(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    handle = optimizer.register_step_pre_hook(fail)
    yield
    handle.remove()


@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("trouble", [refused_gradient, raising_pre_hook])
def test_training_goes_on_after_steps_that_raised(backend, device, trouble, unscaled):
    """The steps that raised leave no trace in the results."""
    params = parameters(SHAPES, device=device)
    expected = copies(params)
    optimizer = FusedSGD(params, lr=0.05, momentum=0.9, bias_decay=True, backend=backend)
    reference = torch.optim.SGD(expected, lr=0.05, momentum=0.9, foreach=False)
    scaler, other = scaler_for(device), scaler_for(torch.device("cpu"))
    for step, grads in enumerate(gradients(params, 6)):
        grads = with_overflow(grads) if step == 3 else grads
        for s, o, p in ((scaler, optimizer, params), (other, reference, expected)):
            set_gradients(p, [g * s.get_scale() for g in grads])
            if unscaled:
                s.unscale_(o)
            if o is optimizer and step in (0, 2):
                before = snapshot(optimizer)
                with trouble(optimizer), pytest.raises((ArithmeticError, RuntimeError)):
                    s.step(o)
                assert not has_scaler_attributes(optimizer)
                assert_unchanged(optimizer, before)
            s.step(o)
            s.update()
    assert_all_same_bits(params, expected)


def test_a_hook_that_raises_after_the_step_leaves_no_scale_behind(backend, device):
    """With a remaining scale, the next step would unscale twice."""
    params, expected = (parameters(SHAPES, device=device) for _ in range(2))
    optimizer, plain = (FusedSGD(p, lr=0.05, momentum=0.9, backend=backend) for p in (params, expected))
    scaler = scaler_for(device)
    for step, grads in enumerate(gradients(params, 3)):
        set_gradients(params, [g * scaler.get_scale() for g in grads])
        set_gradients(expected, grads)
        handle = optimizer.register_step_post_hook(fail if step == 0 else lambda *_: None)
        with pytest.raises(ArithmeticError) if step == 0 else contextlib.nullcontext():
            scaler.step(optimizer)
        handle.remove()
        scaler.update()
        plain.step()
    assert_all_same_bits(params, expected)


@pytest.mark.parametrize("has_gradients", [True, False])
@pytest.mark.parametrize("unscaled", [True, False])
def test_a_closure_is_refused_under_a_scaler(backend, device, unscaled, has_gradients):
    params = parameters(SHAPES, device=device)
    optimizer = FusedSGD(params, lr=0.05, backend=backend)
    scaler = scaler_for(device)
    if has_gradients:
        set_gradients(params, gradients(params, 1)[0])
    if unscaled:
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="closure"):
        scaler.step(optimizer, lambda: pytest.fail("the closure was called"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_parameters_are_trained_through_their_masters(backend, device, dtype):
    """GradScaler refuses FP16 gradients of `torch.optim.SGD`; FusedSGD unscales FP16 gradients in FP32."""
    params = parameters(SHAPES, dtype, device)
    expected = copies(params, torch.float32)
    optimizer = FusedSGD(params, lr=0.05, momentum=0.9, bias_decay=True, backend=backend)
    reference = torch.optim.SGD(expected, lr=0.05, momentum=0.9, foreach=False)
    scaler = scaler_for(device)
    for step, grads in enumerate(gradients(params, 8)):
        set_gradients(params, with_overflow(grads) if step in (0, 3) else grads)
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if step not in (0, 3):
            set_gradients(expected, [g.float() / scale for g in grads])
            reference.step()
    assert_all_same_bits(params, [p.to(dtype) for p in expected])


@pytest.mark.parametrize("overflow_in", [None, 0, 1])
def test_several_optimizers_share_one_scaler(backend, device, overflow_in):
    first, second, third = (parameters(SHAPES, device=device, seed=seed) for seed in range(3))
    ours = [FusedSGD(p, lr=0.1, momentum=0.9, backend=backend) for p in (first, second)]
    optimizers = [*ours, torch.optim.SGD(third, lr=0.1)]
    before = [[p.detach().clone() for p in of] for of in (first, second, third)]
    scaler = scaler_for(device)
    for index, (optimizer, of) in enumerate(zip(optimizers, (first, second, third), strict=True)):
        (grads,) = gradients(of, 1)
        set_gradients(of, with_overflow(grads) if index == overflow_in else grads)
        scaler.step(optimizer)
    scaler.update()
    moved = [not torch.equal(of[0], b[0]) for of, b in zip((first, second, third), before, strict=True)]
    assert moved == [index != overflow_in for index in range(3)]
    assert scaler.get_scale() == INIT_SCALE * (1 if overflow_in is None else 0.5)


@pytest.mark.parametrize("scale", [1024.0, 1000.0])
def test_max_grad_norm_measures_gradients_unscaled_by_the_scaler(backend, device, scale):
    params, expected = (parameters(SHAPES, device=device) for _ in range(2))
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "max_grad_norm": 0.5, "backend": backend}
    optimizer, plain = FusedSGD(params, **options), FusedSGD(expected, loss_scale=scale, **options)
    scaler = scaler_for(device, init_scale=scale, growth_interval=100)
    for grads in gradients(params, 3):
        set_gradients(params, grads)
        set_gradients(expected, grads)
        scaler.step(optimizer)
        scaler.update()
        plain.step()
        assert optimizer.stats().grad_norm == plain.stats().grad_norm
    assert_all_same_bits(params, expected)


def trained(optimizer_class: Any, device: torch.device, steps: int, clips: bool, **options: Any) -> list[Any]:
    """Returns losses, scales and weights of a training under autocast. Some gradients overflow."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3)).to(device)
    groups = [
        {"params": list(layer.parameters()), "lr": lr} for layer, lr in ((model[0], 0.05), (model[2], 0.1))
    ]
    optimizer = optimizer_class(groups, momentum=0.9, weight_decay=1e-3, nesterov=True, **options)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, growth_interval=7)
    generator = torch.Generator().manual_seed(1)
    seen: list[Any] = []
    for step in range(steps):
        inputs = torch.randn(16, 6, generator=generator).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = (model(inputs).float() - inputs[:, :3]).square().mean()
        if step % 11 in (0, 4):
            loss = loss * (torch.inf if step % 2 else 1e38)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if clips:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        for group in optimizer.param_groups:
            group["lr"] *= 0.99
        seen += [
            loss.detach().clone(),
            torch.tensor(scaler.get_scale()),
            *(p.detach().clone() for p in model.parameters()),
        ]
    return seen


@pytest.mark.parametrize("clips", [False, True])
def test_losses_and_weights_of_300_steps_are_those_of_torch_sgd(backend, device, clips):
    steps = 12 if backends.is_interpreted(backend) else 300
    actual = trained(FusedSGD, device, steps, clips, backend=backend, bias_decay=True)
    expected = trained(torch.optim.SGD, device, steps, clips, foreach=False)
    assert_all_same_bits(actual, expected)
    scales = {scale.item() for scale in expected[1::6]}
    assert len(scales) > (1 if steps < 300 else 3)


def test_autocast_and_backward_work_end_to_end(backend, device):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1)).to(device)
    optimizer = FusedSGD(model.parameters(), lr=0.05, momentum=0.9, backend=backend)
    scaler = torch.amp.GradScaler(device.type)
    inputs = torch.randn(64, 8).to(device)
    losses = []
    for _ in range(20):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = (model(inputs).float() - inputs.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert optimizer.stats().applied_steps == 20


def test_the_scale_of_the_scaler_is_not_reported_as_the_optimizers(backend, device):
    param = Parameter(torch.ones(3, device=device))
    optimizer = FusedSGD([param], lr=0.1, backend=backend)
    param.grad = torch.ones_like(param)
    scaler_for(device).step(optimizer)
    assert optimizer.stats().scale is None
