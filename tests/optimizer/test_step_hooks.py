"""Hooks of a step: each hook runs once, whatever wraps the step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fused_tricks import FusedSGD
from support.comparison import assert_same_bits


class Plain(FusedSGD):
    """A subclass that overrides nothing."""


class Overriding(FusedSGD):
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return super().step(closure)


class OverridingTwice(Overriding):
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return super().step(closure)


class Inheriting(Overriding):
    """A subclass that inherits an overridden step."""


class Wrapping(FusedSGD):
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return super().step(closure)

    # functools.wraps has the same effect.
    functools.update_wrapper(step, FusedSGD.step)


class Mixin:
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return super().step(closure)  # type: ignore[misc]


class Mixed(Mixin, Overriding):
    pass


CLASSES = [FusedSGD, Plain, Overriding, OverridingTwice, Inheriting, Mixed, Wrapping]
# torch wraps the step of a class when the class is first instantiated, here before the first test.
for kind in CLASSES:
    kind([Parameter(torch.ones(1))], lr=0.1)


def halve(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad.mul_(0.5)


def made(kind: type[FusedSGD], backend: str, device: torch.device) -> tuple[FusedSGD, Parameter]:
    param = Parameter(torch.ones(3, device=device))
    param.grad = torch.ones_like(param)
    return kind([param], lr=0.5, backend=backend), param


@pytest.mark.parametrize("kind", CLASSES)
def test_a_hook_that_halves_the_gradient_halves_it_once(backend, device, kind):
    optimizer, param = made(kind, backend, device)
    optimizer.register_step_pre_hook(halve)
    optimizer.step()
    assert_same_bits(param, torch.full((3,), 0.75))


@pytest.mark.parametrize("kind", CLASSES)
def test_every_hook_runs_once(kind):
    optimizer, _ = made(kind, "auto", torch.device("cpu"))
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("global post")),
    ]
    try:
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert calls == ["global pre", "pre", "post", "global post"]


@pytest.mark.parametrize("kind", CLASSES)
def test_hooks_run_once_under_a_scheduler(kind):
    optimizer, param = made(kind, "auto", torch.device("cpu"))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    optimizer.register_step_pre_hook(halve)
    optimizer.step()
    scheduler.step()
    assert_same_bits(param, torch.full((3,), 0.75))


@pytest.mark.parametrize("kind", CLASSES)
def test_hooks_run_once_under_a_grad_scaler(kind):
    optimizer, param = made(kind, "auto", torch.device("cpu"))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer.register_step_pre_hook(halve)
    scaler.scale(param.sum()).backward()
    param.grad = torch.full_like(param, 8.0)
    scaler.step(optimizer)
    assert_same_bits(param, torch.full((3,), 0.75))


def test_hooks_run_where_a_class_is_exchanged_for_one_that_torch_has_not_wrapped():
    optimizer, param = made(FusedSGD, "auto", torch.device("cpu"))

    class Unwrapped(FusedSGD):
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            return super().step(closure)

    optimizer.__class__ = Unwrapped
    optimizer.register_step_pre_hook(halve)
    optimizer.step()
    assert_same_bits(param, torch.full((3,), 0.75))


def test_a_hook_may_step_another_optimizer_of_a_subclass():
    inner, inner_param = made(Overriding, "auto", torch.device("cpu"))
    outer, outer_param = made(Overriding, "auto", torch.device("cpu"))
    inner.register_step_pre_hook(halve)
    outer.register_step_pre_hook(lambda *_: inner.step())
    outer.step()
    assert_same_bits(inner_param, torch.full((3,), 0.75))
    assert_same_bits(outer_param, torch.full((3,), 0.5))
