"""Parameters, gradients and state that share memory: torch's result of one update after the other, or an error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from fused_tricks import FusedSGD
from support.backends import is_slow
from support.comparison import assert_all_same_bits, assert_unchanged, snapshot, wide_range

OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


def values(count: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    return wide_range((count,), torch.Generator().manual_seed(0)).to(device, dtype)


def set_data(memory: Tensor) -> list[Parameter]:
    params = [Parameter(memory[:24].clone()) for _ in range(2)]
    params[1].data = params[0].data
    return params


OVERLAPPING: dict[str, Callable[[Tensor], list[Parameter]]] = {
    "one .data": set_data,
    "two Parameters": lambda memory: [Parameter(memory), Parameter(memory)],
    "slices": lambda memory: [Parameter(memory[:20]), Parameter(memory[10:40]), Parameter(memory[30:])],
    "a part": lambda memory: [Parameter(memory), Parameter(memory[5:6])],
    "another shape": lambda memory: [Parameter(memory.view(6, 8)), Parameter(memory[8:16])],
    "every second": lambda memory: [Parameter(memory), Parameter(memory[::2])],
    "rows and columns": lambda memory: [
        Parameter(memory.view(6, 8)[:, 2:5]),
        Parameter(memory.view(6, 8)[1:3]),
    ],
}
APART: dict[str, Callable[[Tensor], list[Parameter]]] = {
    "halves": lambda memory: [Parameter(memory[:24]), Parameter(memory[24:])],
    "columns": lambda memory: [Parameter(memory.view(6, 8)[:, :3]), Parameter(memory.view(6, 8)[:, 3:])],
    "alternate": lambda memory: [Parameter(memory[::2]), Parameter(memory[1::2])],
    "complex": lambda memory: [
        Parameter(memory.as_strided((6, 4), (8, 2))),
        Parameter(memory.as_strided((6, 4), (8, 2), 1)),
    ],
}


def both(
    layout: Callable[[Tensor], list[Parameter]],
    dtype: torch.dtype,
    backend: str,
    device: torch.device,
    **options,
) -> tuple[tuple[FusedSGD, list[Parameter]], tuple[torch.optim.SGD, list[Parameter]]]:
    """Returns FusedSGD and torch.optim.SGD, each over its own memory with the same values."""
    params, expected = layout(values(48, dtype, device)), layout(values(48, dtype, "cpu"))
    options = OPTIONS | options
    return (
        (FusedSGD(params, bias_decay=True, backend=backend, **options), params),
        (torch.optim.SGD(expected, foreach=False, **options), expected),
    )


def step_both(pairs, steps: int = 3, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        grads = [wide_range(p.shape, generator).to(p.dtype) for p in pairs[0][1]]
        for optimizer, params in pairs:
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.to(param.device, copy=True)
            optimizer.step()
    assert_all_same_bits(pairs[0][1], pairs[1][1])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", OVERLAPPING)
def test_overlapping_parameters_are_updated_one_after_the_other(backend, device, layout, dtype, momentum):
    step_both(both(OVERLAPPING[layout], dtype, backend, device, momentum=momentum))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", OVERLAPPING)
def test_overlapping_parameters_with_masters_are_refused_by_both_names(backend, device, layout, dtype):
    params = OVERLAPPING[layout](values(48, dtype, device))
    optimizer = FusedSGD([(f"w{i}", p) for i, p in enumerate(params)], **OPTIONS, backend=backend)
    for param in params:
        param.grad = torch.ones_like(param)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="'w0' and parameter 'w1' share memory"):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_an_fp32_view_of_an_fp16_parameter_is_refused(backend, device):
    low = Parameter(values(48, torch.float16, device))
    params = [low, Parameter(low.detach().view(torch.float32))]
    optimizer = FusedSGD(params, lr=0.1, backend=backend)
    for param in params:
        param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match="parameter 0 of group 0 and parameter 1 of group 0 share memory"):
        optimizer.step()


def test_a_parameter_that_comes_to_share_memory_between_steps_is_noticed(backend, device):
    pairs = both(APART["halves"], torch.float32, backend, device)
    step_both(pairs, 2)
    for _, params in pairs:
        params[1].data = params[0].data
    step_both(pairs, 2, seed=2)
    for _, params in pairs:
        params[1].data = params[0].detach().clone()
    step_both(pairs, 2, seed=3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", APART)
def test_interleaved_elements_are_not_shared(backend, device, layout, dtype):
    params = APART[layout](values(48, dtype, device))
    alone = [Parameter(p.detach().clone()) for p in params]
    for one in (params, alone):
        optimizer = FusedSGD(one, **OPTIONS, backend=backend)
        for _ in range(2):
            for param in one:
                param.grad = torch.ones_like(param)
            optimizer.step()
    assert_all_same_bits(params, [p.detach() for p in alone])


def test_a_frozen_parameter_may_share_the_memory_of_another(backend, device):
    memory = values(48, torch.float16, device)
    params = [Parameter(memory), Parameter(memory)]
    optimizer = FusedSGD(params, lr=0.1, backend=backend)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert torch.equal(params[0], params[1])


@pytest.mark.parametrize("shape, stride", [((4, 4), (2, 1)), ((3, 3), (1, 1)), ((2, 5), (0, 1))], ids=str)
def test_a_parameter_whose_own_elements_share_memory_is_refused(backend, device, shape, stride):
    param = Parameter(values(48, torch.float32, device).as_strided(shape, stride))
    param.grad = torch.ones(shape, device=device)
    with pytest.raises(RuntimeError, match="parameter 0 of group 0 has elements that share memory"):
        FusedSGD([param], lr=0.1, backend=backend).step()


ALIASES: dict[str, Callable[[list[Parameter], torch.optim.Optimizer], Tensor]] = {
    "its own parameter": lambda params, optimizer: params[1].detach(),
    "an earlier parameter": lambda params, optimizer: params[0].detach(),
    "a later parameter": lambda params, optimizer: params[2].detach(),
    "an earlier buffer": lambda params, optimizer: optimizer.state[params[0]]["momentum_buffer"],
    "its own buffer": lambda params, optimizer: optimizer.state[params[1]]["momentum_buffer"],
}


@pytest.mark.parametrize("alias", ALIASES)
def test_a_gradient_may_be_a_parameter_or_a_buffer(backend, device, alias):
    def layout(memory: Tensor) -> list[Parameter]:
        return [Parameter(part.clone()) for part in memory.view(3, 16)]

    pairs = both(layout, torch.float32, backend, device)
    step_both(pairs, 2)
    for optimizer, params in pairs:
        for _ in range(1 if is_slow(backend) else 3):
            params[0].grad = torch.ones_like(params[0])
            params[1].grad = ALIASES[alias](params, optimizer)
            params[2].grad = torch.full_like(params[2], -1)
            optimizer.step()
    assert_all_same_bits(pairs[0][1], pairs[1][1])
    step_both(pairs, 2, seed=2)


def test_a_gradient_that_lies_across_its_parameter_is_refused(backend, device):
    memory = values(48, torch.float32, device)
    param = Parameter(memory[:24])
    param.grad = memory[12:36]
    optimizer = FusedSGD([param], lr=0.1, backend=backend)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="the gradient of parameter 0 of group 0.* overlap"):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_buffers_may_share_memory(backend, device):
    def layout(memory: Tensor) -> list[Parameter]:
        return [Parameter(part.clone()) for part in memory.view(3, 16)]

    pairs = both(layout, torch.float32, backend, device)
    step_both(pairs, 1)
    for optimizer, params in pairs:
        optimizer.state[params[2]]["momentum_buffer"] = optimizer.state[params[0]]["momentum_buffer"]
        optimizer.state[params[1]]["momentum_buffer"] = params[0].detach()
    step_both(pairs, 3, seed=2)


@pytest.mark.parametrize("key", ["master_param", "momentum_buffer"])
def test_a_master_that_shares_memory_is_refused(backend, device, key):
    params = [Parameter(part.clone()) for part in values(48, torch.float16, device).view(2, 24)]
    optimizer = FusedSGD(params, **OPTIONS, backend=backend)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.state[params[1]][key] = optimizer.state[params[0]]["master_param"]
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=f"master_param of parameter 0 of group 0.*{key} of parameter 1"):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_momentum_that_the_host_has_not_heard_of_survives_the_change_to_shared_memory(backend, device):
    pairs = both(APART["halves"], torch.float32, backend, device)
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        grads = [wide_range((24,), generator) for _ in range(2)]
        for optimizer, params in pairs:
            if step == 1:
                params[1].data = params[0].data
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.to(param.device, copy=True)
            optimizer.step()
    assert_all_same_bits(pairs[0][1], pairs[1][1])
