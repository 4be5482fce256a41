"""FusedSGD as a torch.optim.Optimizer, in everything that torch's own tests check for SGD."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

pytest.importorskip("expecttest", reason="torch's own test cases need it: pip install expecttest")
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

from fused_tricks import FusedSGD, WarmupCosineLR
from support.backends import is_interpreted, is_slow, takes_no_step
from support.comparison import (
    assert_all_same_bits,
    assert_same_bits,
    both,
    build,
    copies,
    drive,
    gradients,
    parameters,
    set_gradients,
    snapshot,
)

(SGD_INFO,) = [info for info in optim_db if info.optim_cls is torch.optim.SGD]
INPUTS = SGD_INFO.optim_inputs_func(device="cpu")
ERROR_INPUTS = SGD_INFO.optim_error_inputs_func(device="cpu", dtype=torch.float32)
SHAPES = [(5,), (4, 3), (1,), (2, 3, 3, 3)]


@pytest.mark.parametrize("case", INPUTS, ids=lambda case: case.desc)
def test_every_input_of_torchs_own_tests_gives_torchs_bits(backend, device, case):
    drive(both(backend, device, SHAPES, **deepcopy(case.kwargs)), 10)


@pytest.mark.parametrize("flags", [{"foreach": True}, {"fused": True}], ids=str)
def test_torchs_choices_of_an_implementation_change_no_bit(backend, device, flags):
    params = parameters(SHAPES, device=device)
    expected = copies(params)
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
    optimizer = FusedSGD(params, bias_decay=True, backend=backend, **options, **flags)
    drive([(optimizer, params), (torch.optim.SGD(expected, foreach=False, **options), expected)], 10)


SCHEDULERS = SGD_INFO.scheduler_inputs
RATES = [case for case in INPUTS if case.desc in ("default", "tensor lr", "momentum")]
# Every scheduler with every type of rate, and every other input with one scheduler.
SCHEDULED = [
    *((number, case) for number in range(len(SCHEDULERS)) for case in RATES),
    *((0, case) for case in INPUTS if case not in RATES),
]


@pytest.mark.parametrize(("number", "case"), SCHEDULED, ids=lambda value: getattr(value, "desc", value))
def test_every_scheduler_of_torchs_own_tests_gives_torchs_bits(backend, device, number, case):
    losses = torch.rand(10, generator=torch.Generator().manual_seed(0))
    pairs = both(backend, device, **deepcopy(case.kwargs))
    schedulers = {id(optimizer): [make(optimizer) for make in SCHEDULERS[number]] for optimizer, _ in pairs}

    def schedule(index: int, optimizer: torch.optim.Optimizer, _: list[Parameter]) -> None:
        for scheduler in schedulers[id(optimizer)] if index else []:
            if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                scheduler.step(losses[index])
            else:
                scheduler.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drive(pairs, 10, schedule)


@takes_no_step
@pytest.mark.parametrize("case", ERROR_INPUTS, ids=lambda case: case.optimizer_error_input.desc)
def test_every_error_input_of_torchs_own_tests_gives_torchs_error(backend, case):
    assert case.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
    params = case.optimizer_error_input.params
    if params is None:
        params = [Parameter(torch.ones(1, 1))]
    if issubclass(case.error_type, Warning):
        with pytest.warns(case.error_type, match=case.error_regex):
            FusedSGD(params, backend=backend, **case.optimizer_error_input.kwargs)
    else:
        with pytest.raises(case.error_type, match=case.error_regex):
            FusedSGD(params, backend=backend, **case.optimizer_error_input.kwargs)


def test_a_step_without_any_gradient_does_nothing(backend, device):
    params = parameters(SHAPES, device=device)
    optimizer = FusedSGD(params, lr=0.05, momentum=0.9, weight_decay=0.1, backend=backend)
    before = snapshot(optimizer)
    optimizer.step()
    assert_all_same_bits(params, parameters(SHAPES))
    assert snapshot(optimizer)["state"] == before["state"]


@takes_no_step
def test_an_optimizer_can_be_printed(backend, device):
    optimizer = FusedSGD(parameters(SHAPES, device=device), lr=0.05, momentum=0.9, backend=backend)
    text = repr(optimizer)
    assert text.startswith("FusedSGD")
    assert "Parameter Group 0" in text
    assert "bias_decay" in text


def test_the_signature_begins_with_torchs():
    ours, theirs = (
        [
            (p.name, p.default)
            for p in inspect.signature(cls).parameters.values()
            if p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        for cls in (FusedSGD, torch.optim.SGD)
    )
    assert ours == theirs


def test_positional_arguments_are_in_torchs_order(backend, device):
    params = parameters(SHAPES, device=device)
    expected = copies(params)
    arguments = (0.05, 0.9, 0.0, 1e-2, True)
    optimizer = FusedSGD(params, *arguments, bias_decay=True, backend=backend)
    drive([(optimizer, params), (torch.optim.SGD(expected, *arguments, foreach=False), expected)], 4)


@pytest.mark.parametrize("shape", [(), (7,), (7, 1), (1, 7), (2, 3, 3, 3), (1,), (1, 1)], ids=str)
def test_only_parameters_of_two_dimensions_and_more_decay_by_default(backend, device, shape):
    """Section 3.1 of the paper: no bias decay."""
    params = parameters([shape], device=device)
    expected = copies(params)
    optimizer = FusedSGD(params, lr=0.05, momentum=0.9, weight_decay=0.1, backend=backend)
    decay = 0.1 if len(shape) > 1 else 0.0
    reference = build("torch", expected, backend, lr=0.05, momentum=0.9, weight_decay=decay)
    drive([(optimizer, params), (reference, expected)], 3)


def test_bias_decay_is_an_option_of_each_group(backend, device):
    params = parameters([(5,), (5,), (3, 3)], device=device)
    expected = copies(params)
    optimizer = FusedSGD(
        [{"params": params[:1], "bias_decay": True}, {"params": params[1:]}],
        lr=0.05, weight_decay=0.1, backend=backend,
    )  # fmt: skip
    reference = torch.optim.SGD(
        [{"params": [expected[0], expected[2]]}, {"params": expected[1:2], "weight_decay": 0.0}],
        lr=0.05, weight_decay=0.1, foreach=False,
    )  # fmt: skip
    drive([(optimizer, params), (reference, expected)], 3)


def test_groups_with_different_options_are_each_updated_by_their_own(backend, device):
    options: list[dict[str, Any]] = [
        {"lr": 0.1},
        {"momentum": 0.9, "dampening": 0.4},
        {"momentum": 0.8, "nesterov": True, "weight_decay": 0.02},
        {"maximize": True, "lr": torch.tensor(0.03)},
    ]
    params = parameters(SHAPES, device=device)
    expected = copies(params)
    pairs = []
    for kind, of in (("fused", params), ("torch", expected)):
        groups = [{"params": [p], **deepcopy(o)} for p, o in zip(of, options, strict=True)]
        pairs.append((build(kind, groups, backend, lr=0.05), of))
    drive(pairs, 6)


@takes_no_step
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_works_as_in_torch(backend, device, set_to_none):
    params = parameters(SHAPES, device=device)
    optimizer = FusedSGD(params, lr=0.1, backend=backend)
    set_gradients(params, [torch.ones(p.shape) for p in params])
    optimizer.zero_grad(set_to_none=set_to_none)
    assert all(p.grad is None if set_to_none else not p.grad.any() for p in params)


def test_a_closure_is_called_once_with_gradients_enabled_and_its_loss_is_returned(backend, device):
    (param,) = parameters([(5,)], device=device)
    optimizer = FusedSGD([param], lr=0.1, backend=backend)
    calls = []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    assert isinstance(loss, torch.Tensor)
    assert_same_bits(loss, parameters([(5,)], device=device)[0].square().sum())
    assert optimizer.step() is None


def test_training_by_closure_equals_torch(backend, device):
    pairs = both(backend, device, [(5,)], lr=0.01, momentum=0.9)
    for optimizer, (param,) in pairs:

        def closure(param: Parameter = param, optimizer: torch.optim.Optimizer = optimizer) -> float:
            optimizer.zero_grad()
            loss = (param * param).sum()
            loss.backward()
            return float(loss.detach())

        losses = [optimizer.step(closure) for _ in range(5)]
        assert losses == sorted(losses, reverse=True)
    assert_all_same_bits(pairs[0][1], pairs[1][1])


@pytest.mark.parametrize("enabled", [True, False])
def test_the_grad_mode_is_left_as_it_was(backend, device, enabled):
    params = parameters(SHAPES, device=device)
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, backend=backend)
    set_gradients(params, [torch.ones(p.shape) for p in params])
    with torch.set_grad_enabled(enabled):
        optimizer.step()
        assert torch.is_grad_enabled() is enabled
    assert all(p.requires_grad and p.grad_fn is None for p in params)


def test_the_default_device_and_dtype_do_not_matter(backend, device):
    def surroundings() -> Iterator[None]:
        torch.set_default_dtype(torch.float64)
        try:
            with torch.device("meta"):
                yield
        finally:
            torch.set_default_dtype(torch.float32)

    params, twins = (parameters(SHAPES, torch.float16, device) for _ in range(2))
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "loss_scale": "dynamic", "max_grad_norm": 1.0}
    for of, inside in ((params, surroundings()), (twins, iter([None]))):
        stream = gradients(of, 3)
        next(inside)
        optimizer = FusedSGD(of, backend=backend, **options)
        try:
            for grads in stream:
                for param, grad in zip(of, grads, strict=True):
                    param.grad = grad.to(param.device)
                optimizer.step()
            assert optimizer.stats().applied_steps == 3
        finally:
            next(inside, None)
    assert_all_same_bits(params, twins)


def test_step_hooks_are_called_around_the_step(backend, device):
    params = parameters([(3,)], device=device)
    optimizer = FusedSGD(params, lr=0.5, backend=backend)
    start = params[0].detach().clone()
    seen: list[tuple[str, bool]] = []

    def note(name: str) -> Callable[..., None]:
        return lambda o, args, kwargs: seen.append((name, torch.equal(params[0], start)))

    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    try:
        set_gradients(params, [torch.ones(3)])
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert seen == [("global pre", True), ("pre", True), ("post", False), ("global post", False)]
    optimizer.step()
    assert len(seen) == 4


def test_a_step_pre_hook_may_change_the_gradients(backend, device):
    pairs = both(backend, device, lr=0.1)
    for optimizer, _params in pairs:
        optimizer.register_step_pre_hook(
            lambda o, args, kwargs: [p.grad.mul_(3) for g in o.param_groups for p in g["params"]] and None
        )
    drive(pairs, 2)


def test_a_step_pre_hook_may_replace_the_closure(backend, device):
    params = parameters([(3,)], device=device)
    optimizer = FusedSGD(params, lr=0.5, backend=backend)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: 17.0), {}))
    assert optimizer.step() == 17.0


@takes_no_step
def test_state_dict_hooks_are_called_and_may_replace_the_state_dict(backend, device):
    params = parameters([(3,)], device=device)
    optimizer = FusedSGD(params, lr=0.5, loss_scale=8.0, backend=backend)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("pre"))
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(
        lambda o, state: seen.append("load pre") or {**state, "more": 2}
    )
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("load post"))
    state = optimizer.state_dict()
    assert state["extra"] == 1
    optimizer.load_state_dict(state)
    assert seen == ["pre", "load pre", "load post"]


@takes_no_step
def test_a_state_dict_hook_may_return_what_is_no_state_dict_and_finds_a_finished_one(backend, device):
    optimizer = FusedSGD(parameters([(3,)], device=device), lr=0.5, backend=backend)
    WarmupCosineLR(optimizer, total_steps=4, count="applied")
    optimizer.register_state_dict_post_hook(lambda o, state: {"optimizer": state})
    state = optimizer.state_dict()
    assert list(state) == ["optimizer"]
    assert state["optimizer"]["param_groups"][0]["lr"] == 0.5


def test_a_subclass_may_wrap_the_step(backend, device):
    class Centered(FusedSGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad.sub_(p.grad.mean())
            return super().step(closure)

    params = parameters(SHAPES, device=device)
    expected = copies(params)
    optimizer = Centered(params, lr=0.05, momentum=0.9, bias_decay=True, backend=backend)
    reference = torch.optim.SGD(expected, lr=0.05, momentum=0.9, foreach=False)
    reference.register_step_pre_hook(
        lambda o, args, kwargs: [p.grad.sub_(p.grad.mean()) for p in expected] and None
    )
    drive([(optimizer, params), (reference, expected)], 4)
    assert repr(optimizer).startswith("Centered")


def test_named_parameters_are_accepted_and_saved(backend, device):
    model = torch.nn.Linear(4, 3).to(device)
    optimizer = FusedSGD(model.named_parameters(), lr=0.5, backend=backend)
    assert optimizer.param_groups[0]["params"] == list(model.parameters())
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    optimizer.load_state_dict(optimizer.state_dict())
    before = model.bias.detach().clone()
    model(torch.ones(1, 4, device=device)).sum().backward()
    optimizer.step()
    assert_same_bits(model.bias, before - 0.5)


def test_a_state_dict_from_before_an_option_existed_is_accepted(backend, device):
    pairs = both(backend, device, lr=0.05, momentum=0.9)
    drive(pairs, 2)
    for optimizer, _ in pairs:
        state = deepcopy(optimizer.state_dict())
        for group in state["param_groups"]:
            for key in ("nesterov", "maximize", "foreach", "differentiable", "fused", "bias_decay"):
                group.pop(key, None)
        optimizer.load_state_dict(state)
    drive(pairs, 2)


def test_optimizers_in_two_threads_do_not_disturb_each_other(backend, device):
    if is_slow(backend):
        pytest.skip("Triton's interpreter keeps the running program in one place for all threads")
    sizes = [[(40_001,), (33,)], [(33,), (50_001,)]]
    runs = [both(backend, device, shapes, lr=0.05, momentum=0.9) for shapes in sizes]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda pairs: drive(pairs, 4 if is_interpreted(backend) else 40), runs))


def test_the_optimizer_is_collected_with_its_parameters(backend, device):
    import gc
    import weakref

    params = parameters([(5,)], device=device)
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, loss_scale="dynamic", backend=backend)
    set_gradients(params, [torch.ones(5)])
    optimizer.step()
    watched = [weakref.ref(optimizer), weakref.ref(params[0])]
    del optimizer, params
    gc.collect()
    assert [ref() for ref in watched] == [None, None]
