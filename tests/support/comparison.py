"""Exact comparison of optimizers, by bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._pytree import tree_flatten

from fused_tricks import FusedSGD

_INTEGER_OF_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

VECTOR_EDGES = (1, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65)
"""Sizes around the widths of vector registers and their unrolled loops."""

BOTH_SHAPES = ((5,), (4, 3), (1,), (2, 3, 3, 3))
"""The shapes of the parameters that `both` makes."""


def bits(tensor: Tensor) -> Tensor:
    """Returns the bit patterns of `tensor` on the CPU, so that NaN equals NaN and -0 differs from 0."""
    plain = tensor.detach().cpu().resolve_neg().contiguous()
    return plain.view(_INTEGER_OF_WIDTH[plain.element_size()])


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "tensor") -> None:
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {actual.shape}, expected {expected.shape}"
    different = (bits(actual) != bits(expected)).flatten().nonzero().flatten()
    if len(different):
        first = int(different[0])
        pair = [t.detach().cpu().contiguous().flatten()[first].item() for t in (actual, expected)]
        raise AssertionError(
            f"{what}: {len(different)} of {actual.numel()} elements differ, the first at {first}: "
            f"{pair[0]!r}, expected {pair[1]!r}"
        )


def assert_all_same_bits(actual: Iterable[Tensor], expected: Iterable[Tensor], what: str = "tensor") -> None:
    for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert_same_bits(one, other, f"{what} {index}")


def assert_same_tree(actual: Any, expected: Any) -> None:
    """Compares nested containers, and the tensors in them bit for bit."""
    (items, structure), (expected_items, expected_structure) = tree_flatten(actual), tree_flatten(expected)
    assert structure == expected_structure
    for item, expected_item in zip(items, expected_items, strict=True):
        if isinstance(expected_item, Tensor):
            assert_same_bits(item, expected_item)
        else:
            assert item == expected_item


def wide_range(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Returns random FP32 values whose magnitudes span four decades, so that every rounding has an effect."""
    values = torch.randn(shape, generator=generator)
    return values * 10 ** (4 * torch.rand(shape, generator=generator) - 3)


def rounding_cases(dtype: torch.dtype) -> torch.Tensor:
    """Returns FP32 values: random ones, and values around every midpoint and limit of the 16-bit `dtype`."""
    generator = torch.Generator().manual_seed(3)
    patterns = (
        torch.randint(-(2**31), 2**31, (60_000,), generator=generator).to(torch.int32).view(torch.float32)
    )
    exponents = torch.randint(-26, 17, (60_000,), generator=generator)
    in_range = torch.randn(60_000, generator=generator) * torch.exp2(exponents.float())
    representable = torch.arange(0, 2**15 - 1, dtype=torch.int16).view(dtype)
    representable = representable[representable.isfinite()].double()
    midpoints = ((representable[1:] + representable[:-1]) / 2).float()
    limit = torch.tensor([65519.99609375, 65520.0, 3.3961775e38, 3.3895314e38])
    halves = torch.cat([midpoints, limit])
    beside = [
        halves,
        torch.nextafter(halves, torch.tensor(torch.inf)),
        torch.nextafter(halves, torch.tensor(0.0)),
    ]
    values = torch.cat([patterns, in_range, *beside, *(-b for b in beside)])
    return values[values.isfinite()]


def parameters(
    shapes: Iterable[Sequence[int]],
    dtypes: torch.dtype | Sequence[torch.dtype] = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> list[Parameter]:
    """Returns random parameters. The same seed gives the same values on every device."""
    generator = torch.Generator().manual_seed(seed)
    shapes = list(shapes)
    if isinstance(dtypes, torch.dtype):
        dtypes = [dtypes] * len(shapes)
    return [
        Parameter(torch.randn(tuple(shape), generator=generator).to(device, dtype))
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]


def gradients(params: Sequence[Tensor], steps: int, seed: int = 1) -> list[list[Tensor]]:
    """Returns one gradient per parameter for each of `steps` steps, on the CPU, in the parameter's dtype."""
    generator = torch.Generator().manual_seed(seed)
    return [[wide_range(p.shape, generator).to(p.dtype) for p in params] for _ in range(steps)]


def set_gradients(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """Gives each parameter a fresh copy of its gradient, on the parameter's device."""
    for param, grad in zip(params, grads, strict=True):
        param.grad = None if grad is None else grad.to(param.device, copy=True)


def fill_gradients(params: Iterable[Tensor], value: float = 1.0) -> None:
    """Gives each parameter a new gradient whose elements are all `value`."""
    for param in params:
        param.grad = torch.full_like(param, value)


def copies(params: Iterable[Tensor], dtype: torch.dtype | None = None) -> list[Parameter]:
    """Returns contiguous parameters on the CPU with the same values, for the reference optimizer."""
    return [
        Parameter(p.detach().to("cpu", dtype, copy=True).contiguous().clone(), p.requires_grad)
        for p in params
    ]


def build(kind: str, params: Any, backend: str, **options: Any) -> torch.optim.Optimizer:
    """Returns FusedSGD, or with `kind="torch"` the torch.optim.SGD for comparison."""
    if kind == "torch":
        return torch.optim.SGD(params, foreach=False, **options)
    return FusedSGD(params, bias_decay=True, backend=backend, **options)


def both(
    backend: str, device: torch.device, shapes: Any = BOTH_SHAPES, **options: Any
) -> tuple[tuple[torch.optim.Optimizer, list[Parameter]], tuple[torch.optim.Optimizer, list[Parameter]]]:
    """Returns FusedSGD and torch.optim.SGD over parameters of the same values."""
    params = parameters(shapes, device=device)
    expected = copies(params)
    # A scheduler writes to a learning rate that is a tensor, so each optimizer has its own.
    return (build("fused", params, backend, **deepcopy(options)), params), (
        build("torch", expected, backend, **deepcopy(options)),
        expected,
    )


def drive(
    pairs: Any,
    steps: int,
    between: Callable[[int, torch.optim.Optimizer, list[Parameter]], None] | None = None,
) -> None:
    """Takes the same steps with each pair of optimizer and parameters, then compares all bits."""
    stream = gradients(pairs[0][1], steps)
    for optimizer, params in pairs:
        for index, grads in enumerate(stream):
            set_gradients(params, grads)
            if between is not None:
                between(index, optimizer, params)
            optimizer.step()
    assert_all_same_bits(pairs[0][1], pairs[1][1])


def momentum_buffers(optimizer: torch.optim.Optimizer, params: Iterable[Tensor]) -> list[Tensor]:
    return [optimizer.state[p]["momentum_buffer"] for p in params]


def masters(optimizer: torch.optim.Optimizer, params: Iterable[Tensor]) -> list[Tensor]:
    return [optimizer.state[p]["master_param"] for p in params]


def snapshot(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns everything that a refused step must not change: parameters, gradients, state, options, counters."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    dense = [p.grad for p in params if p.grad is not None and p.grad.layout == torch.strided]
    stats = optimizer.stats()
    saved = optimizer.state_dict()
    return {
        "params": [bits(p).clone() for p in params if not p.is_meta],
        "grads": [
            bits(torch.view_as_real(g) if g.is_complex() else g).clone() for g in dense if not g.is_meta
        ],
        "state": [
            {key: bits(value).clone() for key, value in optimizer.state.get(p, {}).items()} for p in params
        ],
        "saved state": [
            {key: bits(value).clone() for key, value in saved["state"].get(index, {}).items()}
            for index in range(len(params))
        ],
        "options": [{k: v for k, v in group.items() if k != "params"} for group in saved["param_groups"]],
        "counters": (stats.scale, stats.applied_steps, stats.skipped_steps),
    }


def assert_unchanged(
    optimizer: torch.optim.Optimizer, before: dict[str, Any], *, but: Sequence[str] = ()
) -> None:
    """Asserts that the optimizer equals `before` bit for bit, except for the keys of `snapshot` in `but`."""
    now = snapshot(optimizer)
    changed = [key for key in before if key not in but and not _equal(now[key], before[key])]
    assert not changed, f"changed: {', '.join(changed)}"


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return type(one) is type(other) and one == other


def fma(a: float | np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Returns a * b + c of FP32 values with one rounding, on every machine.

    The product is exact in FP64. The sum is rounded to odd in FP64 (Boldo and Melquiond 2008), so that its second
    rounding, to FP32, gives the result of one rounding.
    """
    product = np.float64(a) * b.astype(np.float64)
    addend = c.astype(np.float64)
    total = product + addend
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)
    even = (np.atleast_1d(total).view(np.int64) & 1 == 0).reshape(total.shape)
    towards = np.where(error > 0, np.inf, -np.inf)
    return np.where((error != 0) & even, np.nextafter(total, towards), total).astype(np.float32)
