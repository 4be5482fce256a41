"""Decoupled weight decay shrinks the weight apart from the gradient."""

from __future__ import annotations

import copy
import pickle
from itertools import product
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from fused_tricks import FusedSGD, WarmupCosineLR
from support.backends import takes_no_step
from support.comparison import assert_all_same_bits, copies, gradients, parameters, set_gradients

OPTIONS: list[dict[str, Any]] = [
    {"momentum": momentum, "dampening": dampening, "nesterov": nesterov, "maximize": maximize}
    for (momentum, dampening, nesterov), maximize in product(
        [(0, 0, False), (0.9, 0, False), (0.9, 0.3, False), (0.9, 0, True)], [False, True]
    )
]
SHAPES = [(1,), (5, 3), (17,), (64, 33), (3, 0), (40_000,)]
RATES = {"number": lambda: 0.05, "tensor": lambda: torch.tensor(0.05, dtype=torch.float64)}


class Decoupled(torch.optim.SGD):
    """`torch.optim.SGD` that first multiplies every weight, as `torch.optim.AdamW` does."""

    def __init__(self, params: list[Parameter], lr: float, decay: float, **options: Any) -> None:
        super().__init__(params, lr=lr, foreach=False, **options)
        self._decay = decay

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.mul_(1 - float(group["lr"]) * self._decay)
        super().step(closure)


def assert_same_after_steps(
    ours: FusedSGD, params: list[Parameter], reference: torch.optim.Optimizer, expected: list[Parameter]
) -> None:
    for grads in gradients(params, 4):
        set_gradients(params, grads)
        set_gradients(expected, grads)
        ours.step()
        reference.step()
    assert_all_same_bits(params, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_equals_torch_after_a_multiplication_bit_for_bit(backend, device, options, dtype):
    params = parameters(SHAPES, dtype, device)
    expected = copies(params)
    decay = 0.037
    ours = FusedSGD(
        params,
        0.05,
        weight_decay=decay,
        decoupled_weight_decay=True,
        bias_decay=True,
        backend=backend,
        **options,
    )
    reference = Decoupled(expected, 0.05, decay, **options)
    assert_same_after_steps(ours, params, reference, expected)


@pytest.mark.parametrize("kind", RATES)
def test_it_uses_the_learning_rate_of_the_step(backend, device, kind):
    params = parameters([(5, 3), (300,)], device=device)
    expected = copies(params)
    ours = FusedSGD(
        params, RATES[kind](), weight_decay=0.1, decoupled_weight_decay=True, bias_decay=True, backend=backend
    )
    schedule = WarmupCosineLR(
        ours, total_steps=5, warmup_steps=2, count="applied" if kind == "number" else "calls"
    )
    reference = Decoupled(expected, 0.05, 0.1)
    for factor, grads in zip([0.5, 1.0, 1.0, 0.75], gradients(params, 4), strict=True):
        set_gradients(params, grads)
        set_gradients(expected, grads)
        reference.param_groups[0]["lr"] = 0.05 * factor
        ours.step()
        reference.step()
        schedule.step()
    assert_all_same_bits(params, expected)


def test_a_low_precision_parameter_decays_in_its_master(backend, device):
    (param,) = parameters([(5, 3)], torch.float16, device)
    master = Parameter(param.detach().float())
    options = {"momentum": 0.9, "nesterov": True}
    ours = FusedSGD(
        [param],
        0.05,
        weight_decay=0.1,
        decoupled_weight_decay=True,
        loss_scale=8.0,
        backend=backend,
        **options,
    )
    reference = Decoupled([master], 0.05, 0.1, **options)
    for _ in range(3):
        param.grad = torch.full_like(param, 4.0)
        master.grad = torch.full_like(master, 0.5)
        ours.step()
        reference.step()
    assert_all_same_bits([ours.state[param]["master_param"]], [master])
    assert_all_same_bits([param], [master.detach().half()])


def test_biases_do_not_decay_unless_asked(backend, device):
    (param,) = parameters([(4,)], device=device)
    before = param.detach().clone()
    ours = FusedSGD([param], 0.5, weight_decay=0.1, decoupled_weight_decay=True, backend=backend)
    param.grad = torch.zeros_like(param)
    ours.step()
    assert torch.equal(param, before)


def test_a_skipped_step_decays_nothing(backend, device):
    (param,) = parameters([(4, 2)], device=device)
    before = param.detach().clone()
    ours = FusedSGD(
        [param], 0.5, weight_decay=0.1, decoupled_weight_decay=True, loss_scale=8.0, backend=backend
    )
    param.grad = torch.full_like(param, torch.inf)
    ours.step()
    assert torch.equal(param, before)


@takes_no_step
def test_a_checkpoint_without_the_option_keeps_the_optimizers(backend, device):
    params = parameters([(4, 2)], device=device)
    ours = FusedSGD(params, 0.5, weight_decay=0.1, decoupled_weight_decay=True, backend=backend)
    saved = copy.deepcopy(ours.state_dict())
    del saved["param_groups"][0]["decoupled_weight_decay"]
    ours.load_state_dict(saved)
    assert ours.param_groups[0]["decoupled_weight_decay"] is True


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_equals_timm_bit_for_bit(backend, device, options):
    timm = pytest.importorskip("timm.optim")
    params = parameters(SHAPES, device=device)
    expected = copies(params)
    ours = FusedSGD(
        params,
        0.05,
        weight_decay=0.03,
        decoupled_weight_decay=True,
        bias_decay=True,
        backend=backend,
        **options,
    )
    reference = timm.SGDW(expected, 0.05, weight_decay=0.03, foreach=False, **options)
    assert_same_after_steps(ours, params, reference, expected)


def test_an_optimizer_that_was_pickled_before_the_option_goes_on_and_takes_new_groups(backend, device):
    param, late = parameters([(4, 2), (3, 2)], device=device)
    ours = FusedSGD([param], 0.5, weight_decay=0.1, backend=backend)
    for options in (ours.defaults, *ours.param_groups):
        del options["decoupled_weight_decay"]
    ours = pickle.loads(pickle.dumps(ours))
    ours.add_param_group({"params": [late]})
    for group in ours.param_groups:
        assert group["decoupled_weight_decay"] is False
        for each in group["params"]:
            each.grad = torch.ones_like(each)
    ours.step()
    assert ours.stats().applied_steps == 1
