"""The bits of the CPU backend, the same on every instruction set of this processor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from fused_tricks import FusedSGD
from fused_tricks.step.parameters import GRAD_DTYPES
from support.backends import unusable_because
from support.comparison import (
    VECTOR_EDGES,
    assert_all_same_bits,
    assert_same_bits,
    gradients,
    parameters,
    rounding_cases,
    set_gradients,
)

if unusable_because("cpu") is not None:
    pytest.skip(f"backend cpu: {unusable_because('cpu')}", allow_module_level=True)

from fused_tricks import _extension

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(params=_extension.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Selects each instruction set in turn, and restores the former selection."""
    before = _extension.selected_instruction_set()
    _extension.select_instruction_set(request.param)
    yield request.param
    _extension.select_instruction_set(before)


def train(
    backend: str, chosen: list[torch.dtype] = DTYPES, max_grad_norm: float | None = 1.0
) -> tuple[list[Tensor], list[float | None]]:
    """Trains parameters of every chosen dtype, with sizes around every vector width.

    Returns:
        The parameters and their state, and the norm of each step.
    """
    dtypes = [dtype for dtype in chosen for _ in (*VECTOR_EDGES, 4099)]
    params = parameters([(n,) for n in (*VECTOR_EDGES, 4099)] * len(chosen), dtypes)
    for index, param in enumerate(params):
        choices = GRAD_DTYPES[param.dtype]
        param.grad_dtype = choices[index % len(choices)]
    optimizer = FusedSGD(
        [
            {"params": params[::2], "ema_decay": 0.9},
            {"params": params[1::2], "nesterov": True, "maximize": True, "ema_decay": 0.25},
        ],
        lr=0.05, momentum=0.9, weight_decay=1e-3, bias_decay=True, loss_scale=48.0,
        max_grad_norm=max_grad_norm, backend=backend,
    )  # fmt: skip
    norms = []
    for grads in gradients(params, 6):
        set_gradients(params, [grad.to(param.grad_dtype) for param, grad in zip(params, grads, strict=True)])
        optimizer.step()
        norms.append(optimizer.stats().grad_norm)
    state = [value for param in params for value in optimizer.state[param].values()]
    return [*params, *state], norms


@pytest.mark.parametrize(
    ("chosen", "max_grad_norm"), [(DTYPES[:3], 1.0), (DTYPES, None)], ids=["clipped", "with FP64"]
)
def test_every_instruction_set_gives_the_bits_of_the_reference(instruction_set, chosen, max_grad_norm):
    """FP64 parameters are not clipped, because an FP64 norm depends on the order of the squares."""
    tensors, _ = train("cpu", chosen, max_grad_norm)
    expected, _ = train("reference", chosen, max_grad_norm)
    assert_all_same_bits(tensors, expected)


def test_every_instruction_set_measures_the_same_norm(instruction_set):
    tensors, norms = train("cpu")
    _extension.select_instruction_set(_extension.instruction_sets()[0])
    expected, expected_norms = train("cpu")
    assert norms == expected_norms
    assert_all_same_bits(tensors, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_instruction_set_rounds_to_nearest_even(instruction_set, dtype):
    values = rounding_cases(dtype)
    param = Parameter(torch.zeros(len(values), dtype=dtype))
    param.grad_dtype = torch.float32
    param.grad = -values
    FusedSGD([param], lr=1.0, backend="cpu").step()
    assert_same_bits(param, (0.0 + values).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_reads_every_gradient_exactly(instruction_set, dtype):
    """Gradients have every finite bit pattern of a 16-bit type, or random values of a wider type."""
    if dtype.itemsize == 2:
        grad = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        grad = grad[grad.isfinite()]
    else:
        grad = torch.randn(60_001, dtype=dtype, generator=torch.Generator().manual_seed(0)) * 1e-3
    param = Parameter(torch.zeros(len(grad), dtype=dtype))
    param.grad = grad
    optimizer = FusedSGD([param], lr=1.0, backend="cpu")
    optimizer.step()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = torch.zeros(len(grad), dtype=wide).add_(grad.to(wide), alpha=-1.0)
    assert_same_bits(optimizer.state[param].get("master_param", param), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_every_instruction_set_finds_every_overflow(instruction_set, dtype, value):
    param = Parameter(torch.zeros(67, dtype=dtype))
    optimizer = FusedSGD([param], lr=0.1, loss_scale=8.0, backend="cpu")
    for element in range(67):
        param.grad = torch.ones_like(param)
        param.grad[element] = value
        optimizer.step()
        assert optimizer.stats().last_step_skipped, f"element {element}"


def train_large(dtype: torch.dtype, backend: str) -> list[Tensor]:
    """Trains on enough elements for stores past the caches: aligned or not, with a partial vector or not."""
    sizes = (1 << 22, 4099)
    params = [
        Parameter(torch.linspace(-1, 1, size + skipped)[skipped:].to(dtype))
        for size in sizes
        for skipped in (0, 1)
    ]
    for param in params[1::2]:
        memory = torch.empty(param.numel() + 1, dtype=dtype)
        memory[1:] = param.detach()
        param.data = memory[1:]
    optimizer = FusedSGD(params, lr=0.3, momentum=0.9, loss_scale=8.0, backend=backend)
    for step in range(2):
        for param in params:
            param.grad = (param.detach().float() * 3 + step).to(dtype)
        optimizer.step()
    return [*params, *(optimizer.state[param]["master_param"] for param in params)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_large_model_gets_the_bits_of_the_reference_on_every_instruction_set(instruction_set, dtype):
    assert_all_same_bits(train_large(dtype, "cpu"), train_large(dtype, "reference"))
